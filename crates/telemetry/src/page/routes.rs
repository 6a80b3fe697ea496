//! What a browser may ask, and what it is answered.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, LOCATION, REFERRER_POLICY, SET_COOKIE,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::door::{Answer, TOKEN_COOKIE};
use super::{Shared, events, files};
use crate::{Error, EvaluationRecord, RunStatus, RunView, SamplePage, SampleQuery};

/// The most rows of one page of samples.
const MOST_ROWS: usize = 100;

/// What a browser may do with the page: run its own scripts, ask its own server, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A refusal, as text for people.
type Refusal = (StatusCode, String);

/// Everything that may be asked.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/events", get(told))
        .route("/api/runs/{run}/curves", get(curves))
        .route("/api/runs/{run}/samples", get(samples))
        .route("/api/runs/{run}/rounds", get(rounds))
        .route("/api/runs/{run}/config", get(config))
        .route("/api/runs/{run}/report", get(report))
        .fallback(get(page))
        .layer(from_fn_with_state(Arc::clone(&shared), guard))
        .with_state(shared)
}

/// Asks the door, and gives every answer its protecting headers.
async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let mut response = match shared.door.answer(request.uri(), request.headers()) {
        Answer::Enter => next.run(request).await,
        Answer::Remember(token) => remembered(&token),
        Answer::Unknown => (
            StatusCode::UNAUTHORIZED,
            "this page needs its token: open the address that was printed, with ?token=...\n",
        )
            .into_response(),
        Answer::Elsewhere => (
            StatusCode::FORBIDDEN,
            "this page answers to 127.0.0.1 and localhost only\n",
        )
            .into_response(),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Takes the token out of the address, where it would stay in the browser's history.
fn remembered(token: &str) -> Response {
    let cookie = format!("{TOKEN_COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict");
    let mut headers = HeaderMap::new();
    headers.insert(LOCATION, HeaderValue::from_static("/"));
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        headers.insert(SET_COOKIE, cookie);
    }
    (StatusCode::SEE_OTHER, headers).into_response()
}

async fn told(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    events::stream(&shared)
}

async fn page(uri: Uri) -> Response {
    let missing = || (StatusCode::NOT_FOUND, "there is no such page; see /\n").into_response();
    files::file(uri.path()).unwrap_or_else(missing)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CurvesQuery {
    /// The names that are wanted, with commas between them.
    names: String,
}

/// The wanted curves that there are, and the names of all.
async fn curves(
    State(shared): State<Arc<Shared>>,
    Path(run): Path<usize>,
    Query(query): Query<CurvesQuery>,
) -> Result<Json<Value>, Refusal> {
    let answer = read(shared.run(run)?, move |view| {
        let curves = view.curves();
        let wanted = query
            .names
            .split(',')
            .filter_map(|name| Some((name, curves.get(name)?)));
        let found: Map<_, _> = wanted
            .map(|(name, curve)| (name.to_owned(), json!(curve)))
            .collect();
        Ok(json!({"names": curves.names().collect::<Vec<_>>(), "curves": found}))
    });
    Ok(Json(answer.await?))
}

async fn samples(
    State(shared): State<Arc<Shared>>,
    Path(run): Path<usize>,
    Query(mut query): Query<SampleQuery>,
) -> Result<Json<SamplePage>, Refusal> {
    query.limit = query.limit.min(MOST_ROWS);
    let answer = read(shared.run(run)?, move |view| view.samples().page(&query));
    Ok(Json(answer.await?))
}

async fn rounds(
    State(shared): State<Arc<Shared>>,
    Path(run): Path<usize>,
) -> Result<Json<Vec<Value>>, Refusal> {
    Ok(Json(read(shared.run(run)?, |view| view.rounds()).await?))
}

async fn config(
    State(shared): State<Arc<Shared>>,
    Path(run): Path<usize>,
) -> Result<Json<Option<Value>>, Refusal> {
    Ok(Json(read(shared.run(run)?, |view| view.config()).await?))
}

async fn report(
    State(shared): State<Arc<Shared>>,
    Path(run): Path<usize>,
) -> Result<Json<Option<Value>>, Refusal> {
    Ok(Json(read(shared.run(run)?, |view| view.report()).await?))
}

impl Shared {
    fn run(&self, index: usize) -> Result<&Arc<Mutex<RunView>>, Refusal> {
        let missing = || (StatusCode::NOT_FOUND, format!("there is no run {index}\n"));
        self.runs.get(index).ok_or_else(missing)
    }
}

/// A run in a few numbers and what its last evaluation was made under, on a thread that may wait for files.
/// Of one that cannot be read, what was read before.
pub(super) async fn status(run: &Arc<Mutex<RunView>>) -> (RunStatus, Option<EvaluationRecord>) {
    let again = Arc::clone(run);
    let looking = tokio::task::spawn_blocking(move || {
        let mut view = locked(&again);
        if let Err(error) = view.refresh() {
            tracing::debug!(%error, "a run cannot be read");
        }
        (view.status(), view.evaluation())
    });
    looking.await.unwrap_or_else(|_| {
        let view = locked(run);
        (view.status(), view.evaluation())
    })
}

fn locked(run: &Mutex<RunView>) -> MutexGuard<'_, RunView> {
    // What is read of files may be read again after a panic.
    run.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at a run on a thread that may wait for files.
async fn read<T: Send + 'static>(
    run: &Arc<Mutex<RunView>>,
    of: impl FnOnce(&RunView) -> Result<T, Error> + Send + 'static,
) -> Result<T, Refusal> {
    let run = Arc::clone(run);
    let reading = tokio::task::spawn_blocking(move || {
        let mut view = locked(&run);
        view.refresh()?;
        of(&view)
    });
    let failed = |reason: String| (StatusCode::INTERNAL_SERVER_ERROR, reason + "\n");
    match reading.await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(failed(sentence(&error))),
        Err(_) => Err(failed("the run could not be read".into())),
    }
}

/// An error and its causes in one line.
fn sentence(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
