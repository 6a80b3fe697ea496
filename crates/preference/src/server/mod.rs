//! The preference service over HTTP: `POST /v1/preferences`, `GET /healthz` and `GET /readyz`.
//!
//! [`crate::wire`] documents the messages. Every error is JSON and names the field or the limit. Requests do not wait
//! for admission: with a full queue they get 429, without a judge in time 503.
//! Does not know what its judges are.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Json;
use axum::routing::{get, post};
use messages::Purpose;
use serde_json::{Value, json};
use settings::{HttpServiceSettings, OrdersSetting};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::error::PreferenceError;
use crate::judge::{Verdict, read_key};
use crate::pool::{JudgePool, Orders, Preference};
use crate::prompt_encoder::PromptEncoder;
use crate::wire::{PreferenceResult, Preferences, PreferencesRequest};
use request::RequestReader;
use token::BearerToken;

mod http_error;
mod request;
mod token;

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
    state: Arc<ServerState>,
}

/// State shared by all handlers.
struct ServerState {
    pool: JudgePool,
    orders: OrdersSetting,
    reader: Arc<RequestReader>,
    token: Option<BearerToken>,
    /// Limits concurrent requests, each of which holds at least one comparison.
    concurrent: Semaphore,
}

impl Server {
    /// Binds the address; port 0 means any free port.
    ///
    /// # Errors
    /// When the address cannot be listened on, or the token cannot be read.
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
        let token = read_key(&settings.token_path)?;
        let state = ServerState {
            concurrent: Semaphore::new(pool.settings().max_queue.max(1)),
            reader: Arc::new(RequestReader::new(
                settings,
                encoder,
                pool.settings().timeout,
            )),
            token: token.as_deref().map(BearerToken::new),
            pool,
            orders,
        };
        Ok(Self {
            listener,
            address,
            state: Arc::new(state),
        })
    }

    /// Checks that the address can be bound now.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn check(listen: &str) -> Result<(), PreferenceError> {
        let listen_error = |source| PreferenceError::Listen {
            listen: listen.to_owned(),
            source,
        };
        std::net::TcpListener::bind(listen)
            .map(drop)
            .map_err(listen_error)
    }

    /// Bound address, with the actual port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` is true or its sender is dropped. Requests in progress are still answered; connections
    /// that are open after twice the judge timeout are closed.
    ///
    /// # Errors
    /// When accepting connections fails.
    pub async fn run(self, shutdown: watch::Receiver<bool>) -> Result<(), PreferenceError> {
        let listen = self.address.to_string();
        let grace = 2 * self.state.pool.settings().timeout;
        tracing::info!(address = listen, "preference service listens");
        let grace_over = {
            let stop = shutdown_requested(shutdown.clone());
            async move {
                stop.await;
                tokio::time::sleep(grace).await;
            }
        };
        let serving = axum::serve(self.listener, routes(self.state))
            .with_graceful_shutdown(shutdown_requested(shutdown));
        tokio::select! {
            result = serving.into_future() => {
                result.map_err(|source| PreferenceError::Listen { listen, source })
            }
            () = grace_over => {
                tracing::warn!("closing connections that are still open after the grace period");
                Ok(())
            }
        }
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
        .with_state(state)
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
    if let Some(token) = &state.token {
        token.check(request.headers())?;
    }
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
