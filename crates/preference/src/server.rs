//! The preference service over HTTP: `POST /v1/preferences`, `GET /healthz` and `GET /readyz`.
//!
//! What travels is described in the wire's own module. Every refusal names the field or the limit and
//! is JSON. Requests do not wait at the bench's door: when the queue is full they are told to come
//! again, and when no judge answers in time, too. The server does not know who its judges are.

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

use crate::bench::{Bench, Orders, Ruling};
use crate::judge::key;
use crate::wire::{Preferences, PreferencesRequest, Ruled};
use crate::{PreferenceError, Texts, Verdict};
use request::Reader;
use token::Token;

mod refused;
mod request;
mod token;

use refused::Refused;

/// All that the server is made of.
pub struct ServerParts {
    /// Who judges.
    pub bench: Bench,
    /// In how many orders, unless a request says otherwise; left to itself, in both.
    pub orders: OrdersSetting,
    /// What texts are for the judge.
    pub texts: Arc<dyn Texts>,
    /// Where to listen, and the limits of requests.
    pub settings: HttpServiceSettings,
}

/// The service over HTTP, which listens and does not yet answer.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// What all requests share.
struct Shared {
    bench: Bench,
    orders: OrdersSetting,
    reader: Arc<Reader>,
    token: Option<Token>,
    /// Requests that may be in hand: each brings a question at least.
    requests: Semaphore,
}

impl Server {
    /// Takes the address; port 0 takes a free port.
    ///
    /// # Errors
    /// When the address cannot be listened on, or the token cannot be read.
    pub async fn bind(parts: ServerParts) -> Result<Self, PreferenceError> {
        let ServerParts {
            bench,
            orders,
            texts,
            settings,
        } = parts;
        let refuse = |source| PreferenceError::Listen {
            listen: settings.listen.clone(),
            source,
        };
        let listener = TcpListener::bind(&settings.listen).await.map_err(refuse)?;
        let address = listener.local_addr().map_err(refuse)?;
        let token = key(&settings.token_path)?;
        let shared = Shared {
            requests: Semaphore::new(bench.settings().max_queue.max(1)),
            reader: Arc::new(Reader::new(settings, texts, bench.settings().timeout)),
            token: token.as_deref().map(Token::new),
            bench,
            orders,
        };
        Ok(Self {
            listener,
            address,
            shared: Arc::new(shared),
        })
    }

    /// Whether the address can be listened on now.
    ///
    /// # Errors
    /// When it cannot, as [`Self::bind`].
    pub fn check(listen: &str) -> Result<(), PreferenceError> {
        let refuse = |source| PreferenceError::Listen {
            listen: listen.to_owned(),
            source,
        };
        std::net::TcpListener::bind(listen)
            .map(drop)
            .map_err(refuse)
    }

    /// Where it listens: with port 0, the port that was free.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown` is true or its sender is gone; requests in hand are still answered.
    /// Connections that by then could have brought a request and had its answer are cut.
    ///
    /// # Errors
    /// When the system lets it listen no more.
    pub async fn run(self, shutdown: watch::Receiver<bool>) -> Result<(), PreferenceError> {
        let listen = self.address.to_string();
        let grace = 2 * self.shared.bench.settings().timeout;
        tracing::info!(address = listen, "preference service listens");
        let late = {
            let stopped = stopped(shutdown.clone());
            async move {
                stopped.await;
                tokio::time::sleep(grace).await;
            }
        };
        let serving = axum::serve(self.listener, routes(self.shared))
            .with_graceful_shutdown(stopped(shutdown));
        tokio::select! {
            ended = serving.into_future() => {
                ended.map_err(|source| PreferenceError::Listen { listen, source })
            }
            () = late => {
                tracing::warn!("connections that do not end are cut");
                Ok(())
            }
        }
    }
}

/// Waits until the caller asks to stop. A caller that is gone asks for it too.
async fn stopped(mut shutdown: watch::Receiver<bool>) {
    drop(shutdown.wait_for(|stop| *stop).await);
}

fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/preferences", post(preferences))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(async || Refused::not_found())
        .method_not_allowed_fallback(async || Refused::method())
        .with_state(shared)
}

/// The process lives.
async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// A question that came now would be asked now: a circuit is closed, or due for a probe.
async fn readyz(State(shared): State<Arc<Shared>>) -> Result<Json<Value>, Refused> {
    let outage = shared.bench.outage().borrow().clone();
    match outage.filter(|outage| outage.probe_at > Instant::now()) {
        Some(outage) => Err(Refused::unavailable(
            format!("every circuit of the judge is open: {}", outage.reason),
            outage.probe_at - Instant::now(),
        )),
        None => Ok(Json(json!({"status": "ready"}))),
    }
}

async fn preferences(
    State(shared): State<Arc<Shared>>,
    request: Request,
) -> Result<Json<Preferences>, Refused> {
    if let Some(token) = &shared.token {
        token.check(request.headers())?;
    }
    let _in_hand = shared
        .requests
        .try_acquire()
        .map_err(|_| Refused::busy("too many requests at once: preference.max_queue is reached"))?;
    let asked = shared.reader.read(request).await?;
    Ok(Json(shared.answer(asked).await?))
}

impl Shared {
    async fn answer(&self, asked: PreferencesRequest) -> Result<Preferences, Refused> {
        let orders = Orders::of(asked.orders.unwrap_or(self.orders), Purpose::Evaluate);
        let questions = self.reader.questions(asked.pairs).await?;
        let settings = self.bench.settings();
        let rulings = self
            .bench
            .rule_within(settings.timeout, &questions, orders)
            .await
            .map_err(|error| Refused::unruled(&error, settings.circuit_probe))?;
        let newest = rulings.iter().map(|ruling| ruling.version).max();
        let version = self.bench.version().or(newest).unwrap_or_default();
        Ok(Preferences {
            judge: self.bench.name(),
            version: version.0,
            results: rulings.into_iter().map(ruled).collect(),
        })
    }
}

fn ruled(ruling: Ruling) -> Ruled {
    match ruling.verdict {
        Verdict::Preference(p) => Ruled {
            p: Some(p.get()),
            version: Some(ruling.version.0),
            order_gap: ruling.order_gap(),
            abstained: None,
        },
        Verdict::Abstained { reason } => Ruled {
            abstained: Some(reason),
            ..Ruled::default()
        },
    }
}

#[cfg(test)]
mod tests;
