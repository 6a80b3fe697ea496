//! A TCP proxy with the faults of a network: latency, and connections that are dead without having been closed.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// A proxy on a free port of loopback in front of one server.
#[derive(Debug)]
pub struct FaultyProxy {
    address: SocketAddr,
    faults: Arc<Faults>,
}

/// The faults that all connections of a proxy share.
#[derive(Debug, Default)]
struct Faults {
    /// Latency of every transfer, in milliseconds.
    delay: AtomicU64,
    /// Number of times that connections were severed.
    severed: AtomicU64,
}

impl FaultyProxy {
    /// Starts a proxy in front of a port of loopback. It forwards everything at once.
    ///
    /// # Panics
    /// If there is no free port.
    #[must_use]
    pub fn start(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound listener");
        let faults = Arc::<Faults>::default();
        let shared = Arc::clone(&faults);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                connect(client, port, &shared).ok();
            }
        });
        Self { address, faults }
    }

    /// Port of the proxy.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Delays every transfer from now on.
    pub fn delay(&self, delay: Duration) {
        let millis = delay.as_millis().try_into().expect("a short time");
        self.faults.delay.store(millis, Ordering::Relaxed);
    }

    /// Severs all connections without closing them: what is sent on them is lost, and neither end learns of it. New
    /// connections work.
    pub fn sever(&self) {
        self.faults.severed.fetch_add(1, Ordering::Relaxed);
    }
}

/// Connects a client to the server.
fn connect(client: TcpStream, port: u16, faults: &Arc<Faults>) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", port))?;
    // Otherwise small messages wait for the acknowledgement of earlier ones.
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let born = faults.severed.load(Ordering::Relaxed);
    for (from, to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
        let faults = Arc::clone(faults);
        thread::spawn(move || forward(from, to, &faults, born));
    }
    Ok(())
}

/// Forwards one direction of a connection until it is closed; one that is severed is read and kept open.
fn forward(mut from: TcpStream, mut to: TcpStream, faults: &Faults, born: u64) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer)?;
        let is_severed = faults.severed.load(Ordering::Relaxed) != born;
        if length == 0 {
            return match is_severed {
                true => Ok(()),
                false => to.shutdown(std::net::Shutdown::Write),
            };
        }
        if !is_severed {
            thread::sleep(Duration::from_millis(faults.delay.load(Ordering::Relaxed)));
            to.write_all(&buffer[..length])?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_severed_connection_is_silent_and_a_new_one_works() {
        let server = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = server.local_addr().expect("a bound listener").port();
        thread::spawn(move || {
            for mut stream in server.incoming().flatten() {
                thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
                });
            }
        });
        let proxy = FaultyProxy::start(port);
        let connect = || {
            let stream = TcpStream::connect(("127.0.0.1", proxy.port())).expect("a listener");
            let timeout = Some(Duration::from_millis(200));
            stream.set_read_timeout(timeout).expect("a valid timeout");
            stream
        };
        let echo = |stream: &mut TcpStream| {
            let mut byte = [0];
            stream.write_all(b"x").expect("the connection is open");
            stream.read_exact(&mut byte).map(|()| byte[0])
        };
        let mut old = connect();
        assert_eq!(echo(&mut old).expect("an echo"), b'x');
        proxy.sever();
        let silent = echo(&mut old).expect_err("a severed connection");
        let kinds = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
        assert!(kinds.contains(&silent.kind()), "{silent}");
        assert_eq!(echo(&mut connect()).expect("an echo"), b'x');
    }
}
