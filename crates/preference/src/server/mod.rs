//! The preference service over HTTP: `POST /v1/preferences`, `GET /healthz` and `GET /readyz`.
//!
//! [`crate::wire`] documents the messages. Every error is JSON and names the field or the limit. Requests do not wait
//! for admission: with a full queue they get 429, without a judge in time 503. Requests of other machines must show a
//! token, and pages of other sites that a browser of this machine shows get no answer.
//! Does not know what its judges are.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, X_CONTENT_TYPE_OPTIONS};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use messages::Purpose;
use serde_json::{Value, json};
use settings::{HttpServiceSettings, OrdersSetting};
use telemetry::http::{
    self, AccessControl, ConnectionLimits, drain_requests, is_exposed, read_token,
};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::error::PreferenceError;
use crate::judge::Verdict;
use crate::pool::{JudgePool, Orders, Preference};
use crate::prompt_encoder::PromptEncoder;
use crate::wire::{PreferenceResult, Preferences, PreferencesRequest};
use request::RequestReader;

mod http_error;
mod request;

use http_error::HttpError;

/// Dependencies of a [`Server`].
pub struct ServerParts {
    /// Judges of all requests.
    pub pool: JudgePool,
    /// Default orders of a comparison; `auto` means both.
    pub orders: OrdersSetting,
    /// Encodes texts for the judge.
    pub encoder: Arc<dyn PromptEncoder>,
    /// Address and request limits.
    pub settings: HttpServiceSettings,
}

/// A bound HTTP server, ready to [run](Self::run).
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    limits: ConnectionLimits,
    state: Arc<ServerState>,
}

/// State shared by all handlers.
struct ServerState {
    pool: JudgePool,
    orders: OrdersSetting,
    reader: Arc<RequestReader>,
    access: AccessControl,
    /// Limits concurrent requests, each of which holds at least one comparison.
    concurrent: Semaphore,
}

impl Server {
    /// Binds the address; port 0 means any free port.
    ///
    /// # Errors
    /// When the address cannot be listened on, other machines can reach it and there is no token, or the token cannot
    /// be read.
    pub async fn bind(parts: ServerParts) -> Result<Self, PreferenceError> {
        let ServerParts {
            pool,
            orders,
            encoder,
            settings,
        } = parts;
        let listen_error = |source| PreferenceError::Listen {
            listen: settings.listen.clone(),
            source,
        };
        let listener = TcpListener::bind(&settings.listen)
            .await
            .map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;
        let token = read_token(&settings.token_path)?;
        require_protection(address, token.as_deref())?;
        let limits = ConnectionLimits::new(settings.max_connections);
        let state = ServerState {
            concurrent: Semaphore::new(pool.settings().max_queue.max(1)),
            reader: Arc::new(RequestReader::new(
                settings,
                encoder,
                pool.settings().timeout,
            )),
            access: AccessControl::new(token.as_deref()),
            pool,
            orders,
        };
        Ok(Self {
            listener,
            address,
            limits,
            state: Arc::new(state),
        })
    }

    /// Checks that the service can be bound to the address with this token now.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn check(listen: &str, token: Option<&str>) -> Result<(), PreferenceError> {
        let listen_error = |source| PreferenceError::Listen {
            listen: listen.to_owned(),
            source,
        };
        let bound = std::net::TcpListener::bind(listen);
        let address = bound.and_then(|listener| listener.local_addr());
        require_protection(address.map_err(listen_error)?, token)
    }

    /// Bound address, with the actual port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` is true or its sender is dropped. Requests in progress are still answered; connections
    /// that are open after twice the judge timeout are closed.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        let grace = 2 * self.state.pool.settings().timeout;
        tracing::info!(address = %self.address, "preference service listens");
        let grace_over = {
            let stop = shutdown_requested(shutdown.clone());
            async move {
                stop.await;
                tokio::time::sleep(grace).await;
            }
        };
        let router = routes(self.state);
        let stop = shutdown_requested(shutdown);
        tokio::select! {
            () = http::serve(self.listener, router, self.limits, stop) => {}
            () = grace_over => {
                tracing::warn!("closing connections that are still open after the grace period");
            }
        }
    }
}

/// Checks that the address is loopback or a token is set.
fn require_protection(address: SocketAddr, token: Option<&str>) -> Result<(), PreferenceError> {
    match is_exposed(address.ip(), token.is_some()) {
        true => Err(PreferenceError::Exposed { address }),
        false => Ok(()),
    }
}

/// Waits for the caller's request to stop. A dropped sender counts as a request.
async fn shutdown_requested(mut shutdown: watch::Receiver<bool>) {
    drop(shutdown.wait_for(|stop| *stop).await);
}

fn routes(state: Arc<ServerState>) -> Router {
    Router::new()
        .route("/v1/preferences", post(preferences))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(async || HttpError::not_found())
        .method_not_allowed_fallback(async || HttpError::method_not_allowed())
        .layer(from_fn_with_state(Arc::clone(&state), authorize))
        .layer(from_fn(drain_requests))
        .with_state(state)
}

/// Middleware: checks access. Only preferences require the token.
async fn authorize(
    State(state): State<Arc<ServerState>>,
    request: Request,
    next: Next,
) -> Response {
    let checked = match request.uri().path() {
        "/healthz" | "/readyz" => state.access.check_source(request.headers()),
        _ => state.access.check(request.headers()),
    };
    let mut response = match checked {
        Ok(()) => next.run(request).await,
        Err(refusal) => HttpError::refused(refusal).into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Liveness of the process.
async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Readiness: a circuit breaker is closed, or due for a probe.
async fn readyz(State(state): State<Arc<ServerState>>) -> Result<Json<Value>, HttpError> {
    let outage = state.pool.outage().borrow().clone();
    match outage.filter(|outage| outage.probe_at > Instant::now()) {
        Some(outage) => Err(HttpError::unavailable(
            format!(
                "every circuit breaker of the judge is open: {}",
                outage.reason
            ),
            outage.probe_at - Instant::now(),
        )),
        None => Ok(Json(json!({"status": "ready"}))),
    }
}

async fn preferences(
    State(state): State<Arc<ServerState>>,
    request: Request,
) -> Result<Json<Preferences>, HttpError> {
    let _permit = state.concurrent.try_acquire().map_err(|_| {
        HttpError::too_many_requests("too many requests at once: preference.max_queue is reached")
    })?;
    let parsed = state.reader.read(request).await?;
    Ok(Json(state.answer(parsed).await?))
}

impl ServerState {
    async fn answer(&self, request: PreferencesRequest) -> Result<Preferences, HttpError> {
        let orders = Orders::of(request.orders.unwrap_or(self.orders), Purpose::Evaluate);
        let requests = self.reader.comparisons(request.pairs).await?;
        let settings = self.pool.settings();
        let preferences = self
            .pool
            .compare_within(settings.timeout, &requests, orders)
            .await
            .map_err(|error| HttpError::from_comparison(&error, settings.circuit_probe))?;
        let newest = preferences
            .iter()
            .map(|preference| preference.version)
            .max();
        let version = self.pool.version().or(newest).unwrap_or_default();
        Ok(Preferences {
            judge: self.pool.name(),
            version: version.0,
            digest: self.pool.digest().map(|digest| digest.to_string()),
            results: preferences.into_iter().map(result).collect(),
        })
    }
}

fn result(preference: Preference) -> PreferenceResult {
    match preference.verdict {
        Verdict::Preference(p) => PreferenceResult {
            p: Some(p.get()),
            version: Some(preference.version.0),
            order_gap: preference.order_gap(),
            abstained: None,
        },
        Verdict::Abstained { reason } => PreferenceResult {
            abstained: Some(reason),
            ..PreferenceResult::default()
        },
    }
}

#[cfg(test)]
mod tests;
