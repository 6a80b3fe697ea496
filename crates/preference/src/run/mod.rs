//! The preference service: receives pairs, has them judged, sends labelled pairs.
//!
//! Promises: a pair is acknowledged after its label or its drop note is stored, so a service that ends at any moment
//! loses nothing: its unacknowledged pairs are delivered again. A pair that does not fit the run is rejected and ends
//! nothing. Many pairs are judged concurrently; they leave in the order in which they arrived.
//! Does not know what its judges are.

mod in_flight;
mod label_publisher;
mod pair_check;

use std::sync::Arc;

use messages::{Dropped, LabelledPair, MessageLimits, Pair, Purpose};
use model::PublishedWeights;
use settings::OrdersSetting;
use telemetry::{NamedWait, StageCounters, Waits};
use tokio::sync::watch;
use transport::{Receipt, Receiver, Sender, TransportError, WeightStore};

use crate::apo::{ApoRunner, next_model};
use crate::error::{ComparisonError, PreferenceError};
use crate::evaluation_judge::EvaluationJudge;
use crate::label_penalties::LabelPenalties;
use crate::labelling::{Labeller, PairLabels};
use crate::pool::{JudgePool, JudgeReplicas, Outage};
use in_flight::{InFlightPair, InFlightQueue};
use label_publisher::{LabelPublisher, publish_judge_wait};
use pair_check::PairCheck;

/// Dependencies of a [`PreferenceService`].
pub struct PreferenceServiceParts {
    /// Judge of all pairs.
    pub judge: JudgePool,
    /// Evaluation judges, which compare the first two completions of every evaluation pair and give no labels.
    pub evaluation: Vec<EvaluationJudge>,
    /// Orders in which completions are compared.
    pub orders: OrdersSetting,
    /// Penalties of training labels.
    pub penalties: LabelPenalties,
    /// Adversarial preference optimisation, if enabled.
    pub apo: Option<ApoRunner>,
    /// Source of pairs.
    pub pairs: Receiver<Pair>,
    /// Limits of received pairs.
    pub limits: MessageLimits,
    /// Announces the weights that completions may be of.
    pub weight_store: WeightStore<PublishedWeights>,
    /// Output of labelled pairs.
    pub labelled: Sender<LabelledPair>,
    /// Output of the notes of dropped pairs.
    pub drops: Sender<Dropped>,
    /// Counters of [`Stage::Preference`](messages::Stage::Preference); one service at a time updates them.
    pub counters: Arc<StageCounters>,
}

/// The preference service, ready to [run](Self::run).
pub struct PreferenceService {
    parts: PreferenceServiceParts,
    waits: Waits,
}

impl PreferenceService {
    /// A service with these dependencies. It receives and judges nothing before it runs.
    #[must_use]
    pub fn new(parts: PreferenceServiceParts) -> Self {
        Self {
            parts,
            waits: Waits::new("preference"),
        }
    }

    /// Current waits of the service: "pairs", "verdicts", "a judge: every circuit is open", "a judge: it asks for a
    /// pause", "an APO round", or "room for labels".
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// Labels pairs until `shutdown` is true or its sender is dropped, or until the stream of pairs ends.
    /// Pairs received by then are still judged and sent. A cancelled run returns them to their stream instead.
    ///
    /// # Errors
    /// When no replica of the judge is left, or when labels or drop notes have no receiver while no shutdown was
    /// requested. A judge that fails temporarily is retried or waited for.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) -> Result<(), PreferenceError> {
        let judge = self.parts.judge.name();
        tracing::info!(judge, "preference service started");
        let result = RunningService::new(self).run(&mut shutdown).await;
        match result {
            Err(PreferenceError::Transport(TransportError::Closed(closed)))
                if is_shutdown(&shutdown) =>
            {
                tracing::warn!(%closed, "unacknowledged pairs are returned: labels have no receiver");
            }
            result => result?,
        }
        tracing::info!(judge, "preference service finished");
        Ok(())
    }
}

/// State of the loop.
struct RunningService {
    pairs: Receiver<Pair>,
    check: PairCheck,
    judge: JudgePool,
    outage: watch::Receiver<Option<Outage>>,
    in_flight: InFlightQueue,
    apo: Option<ApoRunner>,
    publisher: LabelPublisher,
    waits: Waits,
}

impl RunningService {
    fn new(service: PreferenceService) -> Self {
        let PreferenceService { parts, waits } = service;
        let labeller = Arc::new(Labeller {
            judge: parts.judge.clone(),
            evaluation: parts.evaluation,
            orders: parts.orders,
            penalties: parts.penalties,
        });
        Self {
            pairs: parts.pairs,
            check: PairCheck {
                limits: parts.limits,
                weight_store: parts.weight_store,
            },
            outage: parts.judge.outage(),
            in_flight: InFlightQueue::new(labeller, parts.judge.settings()),
            judge: parts.judge,
            apo: parts.apo,
            publisher: LabelPublisher {
                labelled: parts.labelled,
                drops: parts.drops,
                counters: parts.counters,
                waits: waits.clone(),
            },
            waits,
        }
    }

    async fn run(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), PreferenceError> {
        let mut draining = false;
        let mut wait = NamedWait::new(self.waits.clone());
        loop {
            if draining && self.in_flight.is_empty() {
                return Ok(());
            }
            wait.set(self.wait_reason());
            self.pairs.prefetch(self.in_flight.prefetch());
            tokio::select! {
                biased;
                () = shutdown_requested(shutdown), if !draining => draining = true,
                Some((pair, labels)) = self.in_flight.next() => {
                    wait.set(None);
                    self.complete(pair, labels, shutdown).await?;
                }
                replicas = next_model(&mut self.apo) => self.finish_apo_round(replicas?),
                // The pool outlives the loop: its sender is never dropped.
                _changed = self.outage.changed() => {}
                received = self.pairs.receive(), if !draining && self.in_flight.has_room() => match received {
                    Ok(delivery) => {
                        let rejected = self.check.rejection(&delivery).await;
                        self.publisher.counters.received(1);
                        self.in_flight.push(delivery, rejected);
                        self.count_in_flight();
                    }
                    Err(_closed) => draining = true,
                },
            }
        }
    }

    fn wait_reason(&mut self) -> &'static str {
        if self.in_flight.is_empty() {
            "pairs"
        } else {
            let outage = self.outage.borrow_and_update();
            outage.as_ref().map_or("verdicts", Outage::wait_reason)
        }
    }

    /// Sends the oldest pair, and acknowledges it unless an APO round needs its samples.
    async fn complete(
        &mut self,
        in_flight: InFlightPair,
        labels: Result<PairLabels, ComparisonError>,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<(), PreferenceError> {
        let labels = labels
            .inspect_err(|_| self.publisher.counters.returned(1))
            .map_err(PreferenceError::NoJudge)?;
        publish_judge_wait(in_flight.received_at.elapsed());
        let InFlightPair { pair, receipt, .. } = in_flight;
        let invalid = labels.is_invalid().then(|| Arc::clone(&pair));
        let receipt = match pair.prompt.purpose {
            Purpose::Apo if labels.labels.is_ok() => {
                self.collect_samples(&pair, receipt, shutdown).await?
            }
            _ => Some(receipt),
        };
        self.publisher.send(pair, labels, self.judge.name()).await?;
        match (receipt, invalid) {
            (Some(receipt), Some(pair)) => receipt.dead_letter(&*pair).await,
            (Some(receipt), None) => receipt.acknowledge(),
            (None, _) => {}
        }
        self.count_in_flight();
        Ok(())
    }

    /// Hands the policy's samples and their receipt to APO. If labelling waits for the new model, returns when the
    /// round that these samples completed has ended. Without APO, returns the receipt.
    async fn collect_samples(
        &mut self,
        pair: &Pair,
        receipt: Receipt,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Option<Receipt>, PreferenceError> {
        let Some(apo) = &mut self.apo else {
            return Ok(Some(receipt));
        };
        apo.collect_samples(pair, receipt)?;
        if !apo.blocks_labelling() {
            return Ok(None);
        }
        let _wait = self.waits.enter("an APO round");
        tokio::select! {
            biased;
            () = shutdown_requested(shutdown) => {}
            replicas = next_model(&mut self.apo) => self.finish_apo_round(replicas?),
        }
        Ok(None)
    }

    /// Installs the model of a round, unless it was rejected, and acknowledges the round's samples.
    fn finish_apo_round(&mut self, replicas: Option<JudgeReplicas>) {
        if let Some(replicas) = replicas {
            self.judge.install(replicas);
        }
        if let Some(apo) = &mut self.apo {
            apo.acknowledge_samples();
        }
    }

    fn count_in_flight(&self) {
        let count = self.in_flight.len() as u64;
        self.publisher.counters.set_in_flight(count);
    }
}

impl Drop for RunningService {
    /// Counts the pairs that return to their stream with the service.
    fn drop(&mut self) {
        let counters = &self.publisher.counters;
        counters.returned(self.in_flight.len() as u64);
        counters.set_in_flight(0);
    }
}

/// Whether the caller requested a shutdown. A dropped sender counts as a request.
fn is_shutdown(shutdown: &watch::Receiver<bool>) -> bool {
    *shutdown.borrow() || shutdown.has_changed().is_err()
}

/// Waits for the caller's request to stop. A dropped sender counts as a request.
async fn shutdown_requested(shutdown: &mut watch::Receiver<bool>) {
    drop(shutdown.wait_for(|stop| *stop).await);
}

#[cfg(test)]
mod tests;
