//! HTTP server on a thread and a tokio runtime of its own.
//!
//! The runtime is shared with nothing else, so that compute never starves a request and a request never delays a
//! role. This part does not know what the routes serve.

use std::future::pending;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::thread::{self, JoinHandle};

use axum::Router;
use axum::middleware::from_fn;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use crate::error::TelemetryError;
use crate::http::{self, ConnectionLimits, drain_requests};

/// Number of blocking threads, which read files.
const BLOCKING_THREADS: usize = 4;

/// Maximum number of connections: a few browsers, or a few Prometheus servers.
const CONNECTIONS: usize = 64;

/// An HTTP server that listens until it is dropped.
pub(crate) struct HttpServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl HttpServer {
    /// Listens on `listen` and serves `router`, with `background` on the same thread. `bind_error` converts the
    /// error of a failed bind.
    pub(crate) fn start(
        name: &'static str,
        listen: SocketAddr,
        bind_error: impl Fn(io::Error) -> TelemetryError,
        router: Router,
        background: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Self, TelemetryError> {
        let listener = TcpListener::bind(listen).map_err(&bind_error)?;
        listener.set_nonblocking(true).map_err(&bind_error)?;
        let address = listener.local_addr().map_err(&bind_error)?;
        let thread_error = |source| TelemetryError::Thread {
            name: name.into(),
            source,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name(format!("{name}-reader"))
            .max_blocking_threads(BLOCKING_THREADS)
            .build()
            .map_err(thread_error)?;
        let router = router.layer(from_fn(drain_requests));
        let limits = ConnectionLimits::new(CONNECTIONS);
        let serving = async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            http::serve(listener, router, limits, pending()).await;
            Ok(())
        };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || serve(name, runtime, serving, background, stopped))
            .map_err(thread_error)?;
        Ok(Self {
            address,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The bound address: with port 0, with the port that was chosen.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed.
            thread.join().ok();
        }
    }
}

fn serve(
    name: &str,
    runtime: Runtime,
    serving: impl Future<Output = io::Result<()>>,
    background: impl Future<Output = ()>,
    stopped: oneshot::Receiver<()>,
) {
    let background = async {
        background.await;
        std::future::pending::<()>().await;
    };
    runtime.block_on(async {
        tokio::select! {
            ended = serving => if let Err(error) = ended {
                tracing::error!(%error, name, "the HTTP server has stopped");
            },
            () = background => {}
            // Nothing is ever sent: dropping the sender is the signal.
            _ = stopped => {}
        }
    });
    // Open connections are dropped; pending file reads are not awaited.
    runtime.shutdown_background();
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpStream};

    use axum::routing::get;

    use super::*;

    fn start(listen: SocketAddr) -> Result<HttpServer, TelemetryError> {
        let bind_error = |source| TelemetryError::Listen {
            address: listen,
            source,
        };
        let router = Router::new().route("/metrics", get(|| async { "agon_loss 0.5\n" }));
        HttpServer::start("exporter", listen, bind_error, router, async {})
    }

    fn on_free_port() -> HttpServer {
        start((Ipv4Addr::LOCALHOST, 0).into()).unwrap()
    }

    fn request(address: SocketAddr, bytes: &[u8]) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(bytes).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

    #[test]
    fn silent_and_malformed_clients_do_not_block_others() {
        let server = on_free_port();
        let silent: Vec<_> = (0..64)
            .map(|_| TcpStream::connect(server.address()).unwrap())
            .collect();
        let nonsense = request(server.address(), b"nonsense\r\n\r\n");
        assert!(nonsense.starts_with("HTTP/1.1 400"), "{nonsense}");
        let answer = request(server.address(), GET);
        assert!(answer.ends_with("agon_loss 0.5\n"), "{answer}");
        drop(silent);
    }

    #[test]
    fn a_dropped_server_releases_its_address() {
        let server = on_free_port();
        let address = server.address();
        assert_ne!(address.port(), 0);
        let message = start(address).err().unwrap().to_string();
        assert!(message.contains("`telemetry.listen`"), "{message}");
        assert!(message.contains(&address.to_string()), "{message}");
        drop(server);
        assert!(
            TcpStream::connect(address).is_err(),
            "{address} is still in use"
        );
    }
}
