//! What changes, told to every open page about once a second.
//!
//! Runs are looked at once for all pages together, and only while one is open.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::{Stream, stream};
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::{Shared, routes};
use crate::{Reading, RunStatus, evaluation_differences, readings};

/// Between two looks at the runs.
const PAUSE: Duration = Duration::from_secs(1);

/// What a page shows of a process's metrics: the ways of messages, and waits.
const LIVE: [&str; 13] = [
    "agon_station_taken_total",
    "agon_station_given_total",
    "agon_station_dropped_total",
    "agon_station_in_hand",
    "agon_wait_open_since_seconds",
    "agon_judge_queue",
    "agon_judge_batch_size",
    "agon_health_judge_circuit_open",
    "agon_actor_gen_throughput",
    "agon_actor_in_flight",
    "agon_staleness_in_flight",
    "agon_policy_version",
    "agon_perf_pairs_per_second",
];

/// The last look, which every open page is told.
#[derive(Default)]
pub(super) struct Events {
    last: watch::Sender<String>,
    opened: Notify,
}

/// What every open page is told.
#[derive(Serialize)]
struct Look {
    runs: Vec<RunStatus>,
    /// Why the evaluations of these runs cannot be compared, a sentence each.
    differences: Vec<String>,
    /// `None` when this process is none of the runs.
    live: Option<Vec<Reading>>,
}

/// The events of one page, until it closes.
pub(super) fn stream(
    shared: &Shared,
) -> Sse<impl Stream<Item = Result<Event, Infallible>> + use<>> {
    let mut looks = shared.events.last.subscribe();
    // What was told to the pages before may be old: this one waits for a new look.
    looks.mark_unchanged();
    shared.events.opened.notify_one();
    let events = stream::unfold(looks, |mut looks| async move {
        looks.changed().await.ok()?;
        let text = looks.borrow_and_update().clone();
        let event = Event::default().event("look").data(text);
        Some((Ok(event), looks))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// Looks, and tells every open page, until it is cancelled.
pub(super) async fn tell(shared: Arc<Shared>) {
    loop {
        if shared.events.last.receiver_count() == 0 {
            shared.events.opened.notified().await;
        }
        shared.events.last.send_replace(look(&shared).await);
        // A page that has just been opened is not kept waiting; one that is opened again and again is
        // told no faster than a quarter of a pause.
        sleep(PAUSE / 4).await;
        timeout(PAUSE * 3 / 4, shared.events.opened.notified())
            .await
            .ok();
    }
}

/// The runs and this process as they are now.
async fn look(shared: &Shared) -> String {
    let (mut runs, mut evaluations) = (Vec::new(), Vec::new());
    for run in &shared.runs {
        let (status, evaluation) = routes::status(run).await;
        runs.push(status);
        evaluations.extend(evaluation);
    }
    let differences = evaluation_differences(&evaluations);
    let live = match shared.live.clone() {
        // The page may come from afar.
        Some(page) => spawn_blocking(move || page()).await.ok(),
        None => None,
    };
    let live = live.map(|page| readings(&page, &|name| LIVE.contains(&name)));
    let look = Look {
        runs,
        differences,
        live,
    };
    serde_json::to_string(&look).expect("a look has text keys and finite numbers")
}
