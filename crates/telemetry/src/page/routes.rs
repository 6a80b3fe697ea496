//! HTTP routes of the page.

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

use crate::http::AccessRefusal;
use crate::page::access::{AccessDecision, TOKEN_COOKIE, decide};
use crate::page::{PageState, events, files, verdicts};
use crate::{
    error::TelemetryError,
    view::{EvaluationRecord, RunStatus, RunView, SamplePage, SampleQuery},
};

/// Maximum number of rows of one page of samples.
const MAX_ROWS: usize = 100;

/// Content security policy: own scripts, styles and requests only.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// An error response: status and plain text.
pub(super) type ErrorResponse = (StatusCode, String);

/// All routes.
pub(super) fn router(state: Arc<PageState>) -> Router {
    Router::new()
        .route("/api/events", get(event_stream))
        .route("/api/runs/{run}/curves", get(curves))
        .route("/api/runs/{run}/samples", get(samples))
        .route("/api/runs/{run}/rounds", get(rounds))
        .route("/api/runs/{run}/config", get(config))
        .route("/api/runs/{run}/report", get(report))
        .merge(verdicts::router())
        .fallback(get(page))
        .layer(from_fn_with_state(Arc::clone(&state), authorize))
        .with_state(state)
}

/// Middleware: checks access, and adds security headers to every response.
async fn authorize(State(state): State<Arc<PageState>>, request: Request, next: Next) -> Response {
    let mut response = match decide(&state.access, request.uri(), request.headers()) {
        AccessDecision::Allow => next.run(request).await,
        AccessDecision::SetCookie(token) => redirect_with_cookie(&token),
        AccessDecision::Refuse(refusal) => refused(refusal),
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
    headers.insert(
        "cross-origin-resource-policy",
        HeaderValue::from_static("same-origin"),
    );
    response
}

fn refused(refusal: AccessRefusal) -> Response {
    let text = match refusal {
        AccessRefusal::Unauthorized => {
            "this page requires its token: open the printed URL, which ends with ?token=..."
        }
        other => other.message(),
    };
    (refusal.status(), format!("{text}\n")).into_response()
}

/// Redirects to the URL without the token, which would otherwise stay in the browser's history.
fn redirect_with_cookie(token: &str) -> Response {
    let cookie = format!("{TOKEN_COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict");
    let mut headers = HeaderMap::new();
    headers.insert(LOCATION, HeaderValue::from_static("/"));
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        headers.insert(SET_COOKIE, cookie);
    }
    (StatusCode::SEE_OTHER, headers).into_response()
}

async fn event_stream(State(state): State<Arc<PageState>>) -> Response {
    match events::stream(&state) {
        Some(stream) => stream.into_response(),
        None => {
            let text = "too many pages of this run are open: close one\n";
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

async fn page(uri: Uri) -> Response {
    let missing = || (StatusCode::NOT_FOUND, "no such page; see /\n").into_response();
    files::file(uri.path()).unwrap_or_else(missing)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CurvesQuery {
    /// Comma-separated names.
    names: String,
}

/// The requested curves that exist, and the names of all curves.
async fn curves(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
    Query(query): Query<CurvesQuery>,
) -> Result<Json<Value>, ErrorResponse> {
    let response = read(state.run(run)?, move |view| {
        let curves = view.curves();
        let requested = query
            .names
            .split(',')
            .filter_map(|name| Some((name, curves.get(name)?)));
        let found: Map<_, _> = requested
            .map(|(name, curve)| (name.to_owned(), json!(curve)))
            .collect();
        Ok(json!({"names": curves.names().collect::<Vec<_>>(), "curves": found}))
    });
    Ok(Json(response.await?))
}

async fn samples(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
    Query(mut query): Query<SampleQuery>,
) -> Result<Json<SamplePage>, ErrorResponse> {
    query.limit = query.limit.min(MAX_ROWS);
    let response = read(state.run(run)?, move |view| view.samples().page(&query));
    Ok(Json(response.await?))
}

async fn rounds(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
) -> Result<Json<Vec<Value>>, ErrorResponse> {
    Ok(Json(read(state.run(run)?, |view| view.rounds()).await?))
}

async fn config(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
) -> Result<Json<Option<Value>>, ErrorResponse> {
    Ok(Json(read(state.run(run)?, |view| view.config()).await?))
}

async fn report(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
) -> Result<Json<Option<Value>>, ErrorResponse> {
    Ok(Json(read(state.run(run)?, |view| view.report()).await?))
}

impl PageState {
    pub(super) fn run(&self, index: usize) -> Result<&Arc<Mutex<RunView>>, ErrorResponse> {
        let missing = || (StatusCode::NOT_FOUND, format!("no such run: {index}\n"));
        self.runs.get(index).ok_or_else(missing)
    }
}

/// Summary of a run and conditions of its last evaluation, refreshed on a blocking thread. If the run cannot be read,
/// the previous state.
pub(super) async fn status(run: &Arc<Mutex<RunView>>) -> (RunStatus, Option<EvaluationRecord>) {
    let again = Arc::clone(run);
    let refresh = tokio::task::spawn_blocking(move || {
        let mut view = locked(&again);
        if let Err(error) = view.refresh() {
            tracing::debug!(%error, "failed to read a run");
        }
        (view.status(), view.evaluation())
    });
    refresh.await.unwrap_or_else(|_| {
        let view = locked(run);
        (view.status(), view.evaluation())
    })
}

fn locked(run: &Mutex<RunView>) -> MutexGuard<'_, RunView> {
    // After a panic the view is still valid: files are read again on refresh.
    run.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refreshes a run and reads from it on a blocking thread.
pub(super) async fn read<T: Send + 'static>(
    run: &Arc<Mutex<RunView>>,
    extract: impl FnOnce(&RunView) -> Result<T, TelemetryError> + Send + 'static,
) -> Result<T, ErrorResponse> {
    let run = Arc::clone(run);
    let task = tokio::task::spawn_blocking(move || {
        let mut view = locked(&run);
        view.refresh()?;
        extract(&view)
    });
    let failed = |reason: String| (StatusCode::INTERNAL_SERVER_ERROR, reason + "\n");
    match task.await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(failed(error_chain(&error))),
        Err(_) => Err(failed("failed to read the run".into())),
    }
}

/// An error and its causes on one line.
pub(super) fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
