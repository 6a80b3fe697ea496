//! Pages over HTTP from a thread and a runtime of their own.
//!
//! They share no runtime with anything else, so that compute never starves a request and a request never
//! delays a role. A client that is slow or silent keeps no other out. This part does not know what the
//! pages say.

use std::future::IntoFuture;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::thread::{self, JoinHandle};

use axum::Router;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use crate::Error;

/// How many files are read at a time.
const READERS: usize = 4;

/// A server that listens until it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `listen` and answers from `router`, with `beside` on the same thread. `refused` says
    /// what it means that the address cannot be had.
    pub(crate) fn start(
        name: &'static str,
        listen: SocketAddr,
        refused: impl Fn(io::Error) -> Error,
        router: Router,
        beside: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Self, Error> {
        let listener = TcpListener::bind(listen).map_err(&refused)?;
        listener.set_nonblocking(true).map_err(&refused)?;
        let address = listener.local_addr().map_err(&refused)?;
        let threadless = |source| Error::Thread {
            name: name.into(),
            source,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name(format!("{name}-reader"))
            .max_blocking_threads(READERS)
            .build()
            .map_err(threadless)?;
        let answering = async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            axum::serve(listener, router).into_future().await
        };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || serve(name, runtime, answering, beside, stopped))
            .map_err(threadless)?;
        Ok(Self {
            address,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where it listens: with port 0, the port that was free.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            thread.join().ok();
        }
    }
}

fn serve(
    name: &str,
    runtime: Runtime,
    answering: impl Future<Output = io::Result<()>>,
    beside: impl Future<Output = ()>,
    stopped: oneshot::Receiver<()>,
) {
    let beside = async {
        beside.await;
        std::future::pending::<()>().await;
    };
    runtime.block_on(async {
        tokio::select! {
            ended = answering => if let Err(error) = ended {
                tracing::error!(%error, name, "is served no more");
            },
            () = beside => {}
            // Nothing is ever sent: the sender goes, and that is the sign.
            _ = stopped => {}
        }
    });
    // Who still listens is left; a file that is being read is not waited for.
    runtime.shutdown_background();
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpStream};

    use axum::routing::get;

    use super::*;

    fn start(listen: SocketAddr) -> Result<Server, Error> {
        let refused = |source| Error::Listen {
            address: listen,
            source,
        };
        let router = Router::new().route("/metrics", get(|| async { "agon_loss 0.5\n" }));
        Server::start("exporter", listen, refused, router, async {})
    }

    fn anywhere() -> Server {
        start((Ipv4Addr::LOCALHOST, 0).into()).unwrap()
    }

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(request).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

    #[test]
    fn clients_that_say_nothing_or_nonsense_do_not_keep_others_out() {
        let server = anywhere();
        let silent: Vec<_> = (0..64)
            .map(|_| TcpStream::connect(server.address()).unwrap())
            .collect();
        let nonsense = ask(server.address(), b"nonsense\r\n\r\n");
        assert!(nonsense.starts_with("HTTP/1.1 400"), "{nonsense}");
        let answer = ask(server.address(), GET);
        assert!(answer.ends_with("agon_loss 0.5\n"), "{answer}");
        drop(silent);
    }

    #[test]
    fn a_dropped_server_gives_its_address_back() {
        let server = anywhere();
        let address = server.address();
        assert_ne!(address.port(), 0);
        let message = start(address).err().unwrap().to_string();
        assert!(message.contains("`telemetry.listen`"), "{message}");
        assert!(message.contains(&address.to_string()), "{message}");
        drop(server);
        assert!(
            TcpStream::connect(address).is_err(),
            "someone still listens on {address}"
        );
    }
}
