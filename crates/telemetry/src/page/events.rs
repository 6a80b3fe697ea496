//! Server-sent events: status updates for all open pages, about once a second.
//!
//! The runs are read once for all pages together, and only while a page is open.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::{Stream, stream};
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::page::{PageState, routes};
use crate::view::{Reading, RunStatus, evaluation_differences, readings};

/// Interval between two updates.
const UPDATE_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of open pages; the connections above it are left to their requests.
const MAX_PAGES: usize = 24;

/// Metrics of the process that the page displays.
const LIVE_METRICS: [&str; 13] = [
    "agon_stage_received_total",
    "agon_stage_emitted_total",
    "agon_stage_dropped_total",
    "agon_stage_in_flight",
    "agon_wait_open_since_seconds",
    "agon_judge_queue",
    "agon_judge_batch_size",
    "agon_health_judge_circuit_open",
    "agon_actor_gen_throughput",
    "agon_actor_in_flight",
    "agon_staleness_outstanding",
    "agon_policy_version",
    "agon_perf_pairs_per_second",
];

/// Broadcast channel of updates to all open pages.
#[derive(Default)]
pub(super) struct EventChannel {
    /// The last update, as JSON.
    update: watch::Sender<String>,
    /// Notified when a page is opened.
    opened: Notify,
}

/// One status update.
#[derive(Serialize)]
struct StatusUpdate {
    runs: Vec<RunStatus>,
    /// Differences between the evaluations of these runs, one sentence each.
    differences: Vec<String>,
    /// Metrics of the running process; `None` when the page is not connected to one.
    live: Option<Vec<Reading>>,
}

/// Event stream of one page; `None` when too many are open.
pub(super) fn stream(
    state: &PageState,
) -> Option<Sse<impl Stream<Item = Result<Event, Infallible>> + use<>>> {
    if state.events.update.receiver_count() >= MAX_PAGES {
        return None;
    }
    let mut updates = state.events.update.subscribe();
    // The previous update may be old: the new page waits for the next one.
    updates.mark_unchanged();
    state.events.opened.notify_one();
    let events = stream::unfold(updates, |mut updates| async move {
        updates.changed().await.ok()?;
        let text = updates.borrow_and_update().clone();
        let event = Event::default().event("update").data(text);
        Some((Ok(event), updates))
    });
    Some(Sse::new(events).keep_alive(KeepAlive::default()))
}

/// Sends updates to all open pages until cancelled.
pub(super) async fn broadcast(state: Arc<PageState>) {
    loop {
        if state.events.update.receiver_count() == 0 {
            state.events.opened.notified().await;
        }
        state.events.update.send_replace(update(&state).await);
        // A newly opened page is updated early, but updates are at least a quarter of the interval apart.
        sleep(UPDATE_INTERVAL / 4).await;
        timeout(UPDATE_INTERVAL * 3 / 4, state.events.opened.notified())
            .await
            .ok();
    }
}

/// The current update, as JSON.
async fn update(state: &PageState) -> String {
    let (mut runs, mut evaluations) = (Vec::new(), Vec::new());
    for run in &state.runs {
        let (status, evaluation) = routes::status(run).await;
        runs.push(status);
        evaluations.extend(evaluation);
    }
    let differences = evaluation_differences(&evaluations);
    let live = match state.live.clone() {
        // The exposition may be fetched from another process.
        Some(page) => spawn_blocking(move || page()).await.ok(),
        None => None,
    };
    let live = live.map(|page| readings(&page, &|name| LIVE_METRICS.contains(&name)));
    let update = StatusUpdate {
        runs,
        differences,
        live,
    };
    serde_json::to_string(&update).expect("an update has string keys and finite numbers")
}
