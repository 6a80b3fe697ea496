//! Publisher of labels: sends labelled pairs and drop notes.

use std::sync::Arc;
use std::time::Duration;

use messages::{Dropped, LabelledPair, Pair, Stage};
use telemetry::{StageCounters, Waits, publish};
use transport::Sender;

use crate::error::PreferenceError;
use crate::labelling::PairLabels;

/// Sends every pair either on with its labels or out with a drop note, and counts it.
pub(super) struct LabelPublisher {
    pub(super) labelled: Sender<LabelledPair>,
    pub(super) drops: Sender<Dropped>,
    pub(super) counters: Arc<StageCounters>,
    pub(super) waits: Waits,
}

impl LabelPublisher {
    /// Sends a pair with the labels of `judge`, or its drop note. Returns when the message is stored.
    ///
    /// # Errors
    /// When the stream is closed. The pair is then counted as returned to its stream.
    pub(super) async fn send(
        &self,
        pair: Arc<Pair>,
        outcome: PairLabels,
        judge: String,
    ) -> Result<(), PreferenceError> {
        let _wait = self.waits.enter("room for labels");
        let sent = match outcome.labels {
            Ok(labels) => {
                let labelled = LabelledPair {
                    pair: Arc::unwrap_or_clone(pair),
                    labels,
                    judge,
                    judge_version: outcome.version,
                    scores: outcome.scores,
                    verdicts: outcome.verdicts,
                };
                let sent = self.labelled.send(labelled).await;
                sent.map(|()| self.counters.emitted(1))
            }
            Err(cause) => {
                let note = Dropped {
                    prompt: pair.prompt.id,
                    session: pair.prompt.version.session,
                    stage: Stage::Preference,
                    reason: cause.reason,
                    log_ratio: None,
                    detail: Dropped::shortened(cause.detail),
                };
                let sent = self.drops.send(note).await;
                sent.map(|()| self.counters.dropped(cause.reason, 1))
            }
        };
        if sent.is_err() {
            self.counters.returned(1);
        }
        Ok(sent?)
    }
}

/// Publishes the time from a pair's arrival to its labels.
pub(super) fn publish_judge_wait(waited: Duration) {
    let waited = [("time/wait_for_judge", waited.as_secs_f64())];
    publish(&waited.into_iter().collect(), &[("role", "preference")]);
}
