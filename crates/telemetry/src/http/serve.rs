//! The accept loop, and the life of one connection.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::http::connections::{
    AdmissionGuard, BusyGuard, ClientConnection, ConnectionLimits, ConnectionTable,
};
use crate::http::stream::WatchedStream;

/// Maximum size of a connection's buffer each way, and so of the head of a request, in bytes.
const BUFFER_BYTES: usize = 16 * 1024;

/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 64;

/// Pause after a connection could not be accepted, usually because no file descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves `router` until `shutdown` completes; then accepts no more connections and returns when the requests in
/// progress are answered. Dropping the future closes every connection.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ConnectionLimits,
    shutdown: impl Future<Output = ()>,
) {
    let table = ConnectionTable::new(limits);
    let closing = watch::Sender::new(false);
    tokio::select! {
        () = accept(listener, router, &table, &closing) => {}
        () = table.sweep() => {}
        () = shutdown => {}
    }
    closing.send_replace(true);
    tokio::select! {
        () = table.empty() => {}
        () = table.sweep() => {}
    }
}

/// Accepts connections until cancelled.
async fn accept(
    listener: TcpListener,
    router: Router,
    table: &Arc<ConnectionTable>,
    closing: &watch::Sender<bool>,
) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let admission = table.admit().await;
                let life = live(socket, router.clone(), admission, closing.subscribe());
                tokio::spawn(life);
            }
            Err(error) => {
                tracing::debug!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection until it ends, is overdue, or the listener closes it.
async fn live(
    socket: TcpStream,
    router: Router,
    admission: AdmissionGuard,
    mut closing: watch::Receiver<bool>,
) {
    // Only delays responses if it fails.
    socket.set_nodelay(true).ok();
    let connection = Arc::clone(admission.connection());
    let io = TokioIo::new(WatchedStream::new(socket, Arc::clone(&connection)));
    let router = TowerToHyperService::new(router);
    let answer = |request| answer(router.clone(), Arc::clone(&connection), request);
    let mut serving = pin!(
        http1::Builder::new()
            .max_buf_size(BUFFER_BYTES)
            .max_headers(MAX_HEADERS)
            .serve_connection(io, service_fn(answer))
    );
    tokio::select! {
        ended = serving.as_mut() => return report(ended),
        () = connection.ended() => return,
        closed = async { closing.wait_for(|is_closing| *is_closing).await.is_err() } => if closed {
            return;
        },
    }
    serving.as_mut().graceful_shutdown();
    tokio::select! {
        ended = serving => report(ended),
        () = connection.ended() => {}
        // The sender sends nothing more: it is dropped with the listener's future.
        _ = closing.changed() => {}
    }
}

/// Malformed requests and lost connections are a client's affair.
fn report(ended: Result<(), hyper::Error>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}

async fn answer(
    router: TowerToHyperService<Router>,
    connection: Arc<ClientConnection>,
    request: hyper::Request<Incoming>,
) -> Result<Response, Infallible> {
    let guard = connection.begin();
    let response = router.call(request).await?;
    Ok(response.map(|body| {
        Body::new(BusyBody {
            body,
            _guard: guard,
        })
    }))
}

/// Body of a response; the connection is busy until it is sent.
struct BusyBody {
    body: Body,
    _guard: BusyGuard,
}

impl HttpBody for BusyBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::http::StatusCode;
    use axum::middleware::from_fn;
    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::http::drain_requests;

    /// A listener that serves `/` and refuses every body at `/full`.
    struct Served {
        address: SocketAddr,
        stop: oneshot::Sender<()>,
        task: JoinHandle<()>,
    }

    async fn served(limits: ConnectionLimits) -> Served {
        let router = Router::new()
            .route("/", get(async || "hello\n"))
            .route("/full", post(async || StatusCode::PAYLOAD_TOO_LARGE))
            .layer(from_fn(drain_requests));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async {
            stopped.await.ok();
        };
        Served {
            address,
            stop,
            task: tokio::spawn(serve(listener, router, limits, shutdown)),
        }
    }

    /// Everything that the server sends in response to these bytes.
    async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(bytes).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

    fn limits() -> ConnectionLimits {
        ConnectionLimits {
            head: Duration::from_millis(50),
            ..ConnectionLimits::new(64)
        }
    }

    #[tokio::test]
    async fn more_silent_clients_than_connections_do_not_block_others() {
        let slow = ConnectionLimits {
            connections: 4,
            head: Duration::from_secs(3600),
            ..limits()
        };
        let served = served(slow).await;
        let mut silent = Vec::new();
        for bytes in [&b""[..], b"GET / HT", b"\r\n", b"GET / HTTP/1.1\r\nHost"] {
            let mut client = TcpStream::connect(served.address).await.unwrap();
            client.write_all(bytes).await.unwrap();
            silent.push(client);
        }
        let answer = exchange(served.address, GET).await;
        assert!(answer.ends_with("hello\n"), "{answer}");
    }

    #[tokio::test]
    async fn a_head_that_does_not_arrive_in_time_ends_the_connection() {
        let served = served(limits()).await;
        for bytes in [&b""[..], b"GET / HTTP/1.1\r\nHost: localhost\r\n"] {
            assert_eq!(exchange(served.address, bytes).await, "");
        }
    }

    #[tokio::test]
    async fn a_large_head_and_many_headers_are_refused() {
        let served = served(limits()).await;
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(2 * BUFFER_BYTES));
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(MAX_HEADERS + 1)
        );
        for request in [long, many] {
            let mut client = TcpStream::connect(served.address).await.unwrap();
            // The server may refuse it before all of it is sent.
            client.write_all(request.as_bytes()).await.ok();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.ok();
            let answer = String::from_utf8_lossy(&answer);
            assert!(
                answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
                "{answer}"
            );
        }
        let answer = exchange(served.address, GET).await;
        assert!(answer.ends_with("hello\n"), "{answer}");
    }

    #[tokio::test]
    async fn a_refused_request_is_read_before_it_is_answered() {
        let served = served(ConnectionLimits::new(64)).await;
        let body = "x".repeat(8 << 20);
        let head = format!(
            "POST /full HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let answer = exchange(served.address, (head + &body).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        let waiting = b"POST /full HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: 100-continue\r\n\
                        Content-Length: 9\r\n\r\n";
        let answer = exchange(served.address, waiting).await;
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    }

    #[tokio::test]
    async fn a_stopped_listener_answers_and_closes_its_connections() {
        let served = served(ConnectionLimits::new(64)).await;
        let _silent = TcpStream::connect(served.address).await.unwrap();
        let mut kept = TcpStream::connect(served.address).await.unwrap();
        kept.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await
            .unwrap();
        let mut first = [0; 12];
        kept.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        served.stop.send(()).unwrap();
        served.task.await.unwrap();
        let mut rest = String::new();
        kept.read_to_string(&mut rest).await.unwrap();
        assert!(rest.ends_with("hello\n"), "{rest}");
        assert!(TcpStream::connect(served.address).await.is_err());
    }
}
