//! Routes of the verdicts that people give: the next pair, a verdict, its withdrawal, and their summary.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::StatusCode;
use axum::response::Json;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};

use crate::metrics::registry::publish;
use crate::page::PageState;
use crate::page::routes::{ErrorResponse, error_chain, read};
use crate::run_dir::samples::SampleRow;
use crate::verdicts::{
    GivenVerdict, PairChoice, RunVerdicts, SampleKey, VerdictError, VerdictRow, VerdictSummary,
    judged,
};
use crate::view::RunView;

/// Maximum size of a request in bytes.
const MAX_BODY_BYTES: usize = 4 << 10;

/// A pair for a verdict. What the judge says about it is not part of it.
#[derive(Serialize)]
struct OfferedPair {
    #[serde(flatten)]
    key: SampleKey,
    /// The row without labels and scores.
    row: SampleRow,
    /// Whether the second completion is to be shown in the first place.
    swapped: bool,
    choice: PairChoice,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NextQuery {
    choice: PairChoice,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Withdrawal {
    /// Number of the last verdict.
    id: u64,
}

pub(super) fn router() -> Router<Arc<PageState>> {
    Router::new()
        .route("/api/runs/{run}/verdicts", get(summary).post(add))
        .route("/api/runs/{run}/verdicts/next", get(next))
        .route("/api/runs/{run}/verdicts/withdraw", post(withdraw))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
}

async fn summary(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
) -> Result<Json<VerdictSummary>, ErrorResponse> {
    let rows = read(state.run(run)?, |view| verdicts(view).read()).await?;
    Ok(Json(summarised(&rows)))
}

async fn next(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
    Query(query): Query<NextQuery>,
) -> Result<Json<Option<OfferedPair>>, ErrorResponse> {
    let choice = query.choice;
    let random = RandomState::new().build_hasher().finish();
    let found = read(state.run(run)?, move |view| {
        let judged = judged(&verdicts(view).read()?);
        view.samples().candidate(choice, random >> 1, &judged)
    });
    let offered = found.await?.map(|(key, row)| OfferedPair {
        key,
        row: without_labels(row),
        swapped: random & 1 == 1,
        choice,
    });
    Ok(Json(offered))
}

async fn add(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
    Json(given): Json<GivenVerdict>,
) -> Result<Json<VerdictSummary>, ErrorResponse> {
    let key = SampleKey {
        step: given.step,
        prompt_id: given.prompt_id,
    };
    let outcome = read(state.run(run)?, move |view| {
        let row = view.samples().row(key)?;
        Ok(row.map(|row| verdicts(view).add(given, row)))
    });
    let missing = || {
        let text = "the run has no such pair any more: a resumed run repeats its last steps\n";
        (StatusCode::NOT_FOUND, text.to_owned())
    };
    answer(outcome.await?.ok_or_else(missing)?)
}

async fn withdraw(
    State(state): State<Arc<PageState>>,
    Path(run): Path<usize>,
    Json(Withdrawal { id }): Json<Withdrawal>,
) -> Result<Json<VerdictSummary>, ErrorResponse> {
    let outcome = read(state.run(run)?, move |view| Ok(verdicts(view).withdraw(id)));
    answer(outcome.await?)
}

fn answer(
    outcome: Result<Vec<VerdictRow>, VerdictError>,
) -> Result<Json<VerdictSummary>, ErrorResponse> {
    let conflict = |text: &str| (StatusCode::CONFLICT, format!("{text}\n"));
    let rows = outcome.map_err(|error| match error {
        VerdictError::Judged => conflict("this pair has a verdict already"),
        VerdictError::NotLast => {
            conflict("only the last verdict can be withdrawn, and this is not the last one")
        }
        VerdictError::NoPair => conflict("this row has no two different completions"),
        VerdictError::File(error) => {
            let text = format!("{}\n", error_chain(&error));
            (StatusCode::INTERNAL_SERVER_ERROR, text)
        }
    })?;
    Ok(Json(summarised(&rows)))
}

/// The summary, which is also published as metrics.
fn summarised(rows: &[VerdictRow]) -> VerdictSummary {
    let summary = VerdictSummary::of(rows);
    let judge = rows.last().map_or("", |row| row.judge.as_str());
    if !rows.is_empty() {
        publish(
            &summary.measurements(),
            &[("role", "page"), ("judge", judge)],
        );
    }
    summary
}

/// Publishes the agreement of the verdicts that the run has already, and restores their pairs. A journal that cannot be
/// read is reported when somebody opens the view.
pub(super) fn announce(run: &Mutex<RunView>) {
    let view = run.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = verdicts(&view).restore_pairs() {
        let error = error_chain(&error);
        tracing::warn!(
            error,
            "the pairs of people's verdicts could not be restored"
        );
    }
    if let Ok(rows) = verdicts(&view).read() {
        summarised(&rows);
    }
}

fn verdicts(view: &RunView) -> RunVerdicts {
    RunVerdicts::new(view.root())
}

/// The row without what would influence the person.
fn without_labels(row: SampleRow) -> SampleRow {
    SampleRow {
        p: None,
        judge_p: None,
        gold: None,
        judge: String::new(),
        verdicts: BTreeMap::new(),
        scores: Vec::new(),
        sum_logp: Vec::new(),
        sum_ref_logp: Vec::new(),
        tokens: Vec::new(),
        logp: Vec::new(),
        ref_logp: Vec::new(),
        actor: String::new(),
        ..row
    }
}
