//! Reading what a handler has left of a request.
//!
//! A socket that is closed with unread bytes is reset, and the client then often does not see the response: an error
//! such as 413 would look like a broken connection.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout;

/// Maximum number of unread bytes that are read after a handler has answered.
const MAX_BYTES: usize = 256 << 20;

/// Maximum time for it.
const MAX_TIME: Duration = Duration::from_secs(10);

/// Body that can be read on after its handler has dropped it.
#[derive(Clone)]
struct SharedBody {
    body: Arc<Mutex<Body>>,
    /// Whether the handler has asked for it, which sends `100 Continue` to a client that waits for that.
    is_requested: Arc<AtomicBool>,
}

/// Middleware: reads the rest of a request, within limits, before its response is sent.
pub async fn drain_requests(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let waits_for_permission = parts.headers.contains_key(EXPECT);
    let body = SharedBody {
        body: Arc::new(Mutex::new(body)),
        is_requested: Arc::default(),
    };
    let response = next
        .run(Request::from_parts(parts, Body::new(body.clone())))
        .await;
    // A client that still waits for permission to send sees the response instead.
    if !waits_for_permission || body.is_requested.load(Ordering::Relaxed) {
        timeout(MAX_TIME, body.read_rest()).await.ok();
    }
    response
}

impl SharedBody {
    fn body(&self) -> MutexGuard<'_, Body> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut *self.body()).poll_frame(context)
    }

    async fn read_rest(&self) {
        let mut bytes = 0;
        while bytes < MAX_BYTES {
            match poll_fn(|context| self.poll(context)).await {
                Some(Ok(frame)) => bytes += frame.data_ref().map_or(0, Bytes::len),
                Some(Err(_)) | None => return,
            }
        }
    }
}

impl HttpBody for SharedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.is_requested.store(true, Ordering::Relaxed);
        self.poll(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body().size_hint()
    }
}
