//! One page over HTTP, on threads of its own: `/metrics`.
//!
//! The threads share no runtime with anything else, so that compute never starves a scrape and a
//! scrape never delays a role. A client that is slow, silent or malformed loses its connection and
//! harms no other. This part does not know what the page says.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Error;

/// How many clients are answered at a time: a browser holds connections it may never use.
const THREADS: usize = 4;
/// What a client has to ask, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// What is read of a request at most, in bytes.
const HEAD_LIMIT: usize = 8 * 1024;
/// How long to wait when no connection can be accepted: without descriptors, at once is too soon.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// Makes the page anew for every request.
pub(crate) type Page = Arc<dyn Fn() -> String + Send + Sync>;

/// A server that listens until it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on `listen` and answers `GET /metrics` with the page.
    pub(crate) fn start(listen: SocketAddr, page: &Page) -> Result<Self, Error> {
        let refused = |source| Error::Listen {
            address: listen,
            source,
        };
        let listener = Arc::new(TcpListener::bind(listen).map_err(refused)?);
        let address = listener.local_addr().map_err(refused)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let mut server = Self {
            address,
            stopping,
            threads: Vec::new(),
        };
        for index in 0..THREADS {
            server.add_thread(index, &listener, page)?;
        }
        Ok(server)
    }

    /// Where it listens: with port 0, the port that was free.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    fn add_thread(
        &mut self,
        index: usize,
        listener: &Arc<TcpListener>,
        page: &Page,
    ) -> Result<(), Error> {
        let name = format!("exporter-{index}");
        let (listener, page) = (Arc::clone(listener), Arc::clone(page));
        let stopping = Arc::clone(&self.stopping);
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(move || serve(&listener, &page, &stopping))
            .map_err(|source| Error::Thread { name, source })?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // A thread waits for a connection, so it is given one. If it cannot be, it is left to wait:
        // better than to wait for it.
        let door = reachable(self.address);
        for _ in &self.threads {
            if TcpStream::connect_timeout(&door, PATIENCE).is_err() {
                return;
            }
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so itself.
            thread.join().ok();
        }
    }
}

/// The address under which a listener of this machine reaches itself.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn serve(listener: &TcpListener, page: &Page, stopping: &AtomicBool) {
    while !stopping.load(Ordering::Acquire) {
        match listener.accept() {
            Ok(_) if stopping.load(Ordering::Acquire) => return,
            Ok((client, _)) => {
                if let Err(error) = answer(client, page) {
                    tracing::debug!(%error, "exporter client went away");
                }
            }
            Err(error) => {
                tracing::debug!(%error, "exporter cannot accept a connection");
                thread::sleep(REFUSED_PAUSE);
            }
        }
    }
}

fn answer(mut client: TcpStream, page: &Page) -> io::Result<()> {
    let head = read_head(&mut client)?;
    client.set_write_timeout(Some(PATIENCE))?;
    client.write_all(&response(&head, page))?;
    client.shutdown(Shutdown::Write)
}

/// Reads until the empty line that ends a request's head, or until the limit.
fn read_head(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let (mut head, mut block) = (Vec::new(), [0; 1024]);
    while head.len() < HEAD_LIMIT && !head.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        client.set_read_timeout(Some(left))?;
        match client.read(&mut block)? {
            0 => break,
            count => head.extend_from_slice(&block[..count]),
        }
    }
    Ok(head)
}

fn response(head: &[u8], page: &Page) -> Vec<u8> {
    let head = String::from_utf8_lossy(head);
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let path = target.split('?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", page()),
        (_, "/metrics") => ("405 Method Not Allowed", "ask with GET\n".into()),
        (_, path) if path.starts_with('/') => ("404 Not Found", "see /metrics\n".into()),
        _ => ("400 Bad Request", "this is not an HTTP request\n".into()),
    };
    let length = body.len();
    let shown = if method == "HEAD" { "" } else { body.as_str() };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {length}\r\nAllow: GET, HEAD\r\nConnection: close\r\n\r\n{shown}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn page() -> Page {
        Arc::new(|| "agon_loss 0.5\n".into())
    }

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(request).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn only_a_get_of_the_metrics_is_answered_with_the_page() {
        let server = Server::start(ANY, &page()).unwrap();
        let cases = [
            (
                "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
                "200 OK",
                "agon_loss 0.5\n",
            ),
            (
                "GET /metrics?name=loss HTTP/1.1\r\n\r\n",
                "200 OK",
                "agon_loss 0.5\n",
            ),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", "200 OK", ""),
            (
                "POST /metrics HTTP/1.1\r\n\r\n",
                "405 Method Not Allowed",
                "ask with GET\n",
            ),
            ("GET / HTTP/1.1\r\n\r\n", "404 Not Found", "see /metrics\n"),
            (
                "GET /metrics/x HTTP/1.1\r\n\r\n",
                "404 Not Found",
                "see /metrics\n",
            ),
            (
                "nonsense\r\n\r\n",
                "400 Bad Request",
                "this is not an HTTP request\n",
            ),
            ("", "400 Bad Request", "this is not an HTTP request\n"),
        ];
        for (request, status, body) in cases {
            let answer = ask(server.address(), request.as_bytes());
            let (head, rest) = answer.split_once("\r\n\r\n").unwrap();
            assert!(
                head.starts_with(&format!("HTTP/1.1 {status}\r\n")),
                "{request:?}: {head}"
            );
            assert_eq!(rest, body, "{request:?}");
        }
        let head = ask(server.address(), b"HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.contains("\r\nContent-Length: 14\r\n"), "{head}");
    }

    #[test]
    fn clients_that_say_nothing_do_not_keep_others_out() {
        let server = Server::start(ANY, &page()).unwrap();
        let silent: Vec<_> = (1..THREADS)
            .map(|_| TcpStream::connect(server.address()).unwrap())
            .collect();
        let answer = ask(server.address(), b"GET /metrics HTTP/1.1\r\n\r\n");
        assert!(answer.ends_with("agon_loss 0.5\n"), "{answer}");
        drop(silent);
    }

    #[test]
    fn a_dropped_server_gives_its_address_back() {
        let server = Server::start(ANY, &page()).unwrap();
        let address = server.address();
        assert_ne!(address.port(), 0);
        let message = Server::start(address, &page()).err().unwrap().to_string();
        assert!(message.contains("`telemetry.listen`"), "{message}");
        assert!(message.contains(&address.to_string()), "{message}");
        drop(server);
        assert!(
            TcpStream::connect(address).is_err(),
            "someone still listens on {address}"
        );
    }
}
