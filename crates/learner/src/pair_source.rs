//! Source of training batches: sends prompts, receives labelled pairs and drop notes, buffers the pairs.
//!
//! Promises that every received pair is trained on, dropped with a counted reason, or handed to the evaluation or
//! APO loop that waits for it; that no pair is trained on twice; and that a wait without progress ends with an error.
//! Does not know what a step does with a batch.

use std::time::{Duration, Instant};

use messages::{DropReason, Dropped, LabelledPair, Pacing, PromptId, Purpose, WeightsVersion};
use settings::LearnerSettings;
use telemetry::{StageCounters, Waits};
use tokio::sync::watch;
use transport::{Delivery, Receipt, Receiver};

use crate::{
    dropped_prompts::{DroppedPrompts, StepDrops},
    error::LearnerError,
    pair_buffer::{self, BufferedPair, PairBuffer},
    progress::SessionLineage,
    prompt_scheduler::{PromptScheduler, PromptSchedulerState},
    publisher::Publisher,
};

/// Sends prompts and receives what comes of them.
pub(crate) struct PairSource {
    pub(crate) scheduler: PromptScheduler,
    labelled: Receiver<LabelledPair>,
    drops: Receiver<Dropped>,
    buffer: PairBuffer,
    dropped: DroppedPrompts,
    lineage: SessionLineage,
    counters: StageCounters,
    waits: Waits,
    limits: BatchLimits,
    /// Time spent waiting for batches since the last step.
    waited: Duration,
}

/// Inputs of a [`PairSource`].
pub(crate) struct PairSourceParts {
    pub(crate) scheduler: PromptScheduler,
    pub(crate) labelled: Receiver<LabelledPair>,
    pub(crate) drops: Receiver<Dropped>,
    pub(crate) lineage: SessionLineage,
    pub(crate) counters: StageCounters,
    pub(crate) waits: Waits,
    pub(crate) limits: BatchLimits,
}

/// Batch size, number of steps and limits on staleness and waiting.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchLimits {
    steps: u64,
    batch_size: usize,
    max_staleness: u64,
    timeout_seconds: u64,
}

/// Pairs of one step, and their receipts.
pub(crate) struct TrainingBatch {
    pub(crate) pairs: Vec<LabelledPair>,
    pub(crate) receipts: BatchReceipts,
}

/// Receipts of a batch; none for pairs from a checkpoint.
pub(crate) struct BatchReceipts(Vec<Option<Receipt>>);

/// Outcome of a wait.
pub(crate) enum Arrival {
    /// A judged evaluation pair, acknowledged.
    Evaluation(Box<LabelledPair>),
    /// An APO sample, acknowledged; the preference service has kept it.
    ApoSample,
    /// A training pair, a drop, or the end of an upload: it has been handled.
    Handled,
    /// A shutdown was requested.
    Shutdown,
}

/// Drops, waits and outstanding prompts since the last step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IntakeMetrics {
    /// Drops since the last step.
    pub(crate) drops: StepDrops,
    /// Time spent waiting for batches since the last step.
    pub(crate) waited: Duration,
    /// Number of outstanding training prompts.
    pub(crate) outstanding: usize,
    /// Number of stale pairs dropped in the run.
    pub(crate) stale: u64,
}

impl BatchLimits {
    /// The limits of the settings.
    pub(crate) fn new(settings: &LearnerSettings) -> Self {
        Self {
            steps: settings.steps,
            batch_size: settings.train_batch_size,
            max_staleness: settings.max_staleness,
            timeout_seconds: settings.batch_timeout_seconds,
        }
    }
}

impl PairSource {
    pub(crate) fn new(parts: PairSourceParts) -> Self {
        Self {
            scheduler: parts.scheduler,
            labelled: parts.labelled,
            drops: parts.drops,
            buffer: PairBuffer::default(),
            dropped: DroppedPrompts::new(),
            lineage: parts.lineage,
            counters: parts.counters,
            waits: parts.waits,
            limits: parts.limits,
            waited: Duration::ZERO,
        }
    }

    /// Current waits.
    pub(crate) fn waits(&self) -> Waits {
        self.waits.clone()
    }

    pub(crate) fn lineage(&self) -> &SessionLineage {
        &self.lineage
    }

    /// Copies of the buffered pairs, for a checkpoint.
    pub(crate) fn buffered(&self) -> Vec<LabelledPair> {
        self.buffer.pairs()
    }

    /// Restores a checkpoint's buffered pairs and sends its outstanding prompts again, for weights `version` or
    /// newer. Returns the number of buffered pairs.
    ///
    /// # Errors
    /// If the prompt stream is closed or stays full.
    pub(crate) async fn restore(
        &mut self,
        state: PromptSchedulerState,
        buffered: Vec<LabelledPair>,
        version: WeightsVersion,
    ) -> Result<usize, LearnerError> {
        for labelled in buffered {
            let receipt = None;
            self.buffer.push(BufferedPair { labelled, receipt });
        }
        let buffer = &mut self.buffer;
        let remove = |id: PromptId| buffer.remove(id);
        self.scheduler.restore(state, version, remove).await?;
        // Pairs of prompts that were sent again will be received again; only the rest counts as received.
        let count = self.buffer.len();
        self.counters.received(count as u64);
        self.counters.set_in_flight(count as u64);
        Ok(count)
    }

    /// Waits for the batch of step `step`, of pairs that are fresh enough. `None` on shutdown.
    ///
    /// # Errors
    /// If pairs do not arrive in time, a stream is closed, or an upload of weights fails.
    pub(crate) async fn next_batch(
        &mut self,
        step: u64,
        publisher: &mut Publisher,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Option<TrainingBatch>, LearnerError> {
        let started = Instant::now();
        let BatchLimits {
            steps, batch_size, ..
        } = self.limits;
        self.dropped.restart_deadline();
        loop {
            for stale in self.buffer.remove_stale(step, self.limits.max_staleness) {
                self.drop_pair(stale, DropReason::Stale);
            }
            let batch = self.buffer.pop(batch_size);
            let popped = batch.as_ref().map_or(0, Vec::len);
            let needed = (steps - step) as usize * batch_size;
            // The popped batch still holds its credits: prompts sent now require weights at least as new as those
            // before its step.
            self.scheduler
                .refill(publisher.version(), self.buffer.len() + popped, needed)
                .await?;
            if let Some(batch) = batch {
                self.waited += started.elapsed();
                let in_flight = self.buffer.len() + batch.len();
                self.counters.set_in_flight(in_flight as u64);
                return Ok(Some(TrainingBatch::new(batch)));
            }
            if let Arrival::Shutdown = self.next("labelled pairs", publisher, shutdown).await? {
                return Ok(None);
            }
        }
    }

    /// Waits for a pair, a drop note, the end of an upload or a shutdown, and handles it. `reason` names the wait.
    ///
    /// # Errors
    /// If the deadline passes, a stream is closed, or an upload of weights fails.
    pub(crate) async fn next(
        &mut self,
        reason: &'static str,
        publisher: &mut Publisher,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Arrival, LearnerError> {
        if *shutdown.borrow() {
            return Ok(Arrival::Shutdown);
        }
        let _wait = self.waits.enter(reason);
        let deadline = self.dropped.deadline(self.limits.timeout_seconds);
        let arrival = tokio::select! {
            delivery = self.labelled.receive() => self.receive(delivery?),
            delivery = self.drops.receive() => self.receive_note(delivery?),
            uploaded = publisher.uploaded() => uploaded.map(|()| Arrival::Handled)?,
            _ = shutdown.changed() => return Ok(Arrival::Shutdown),
            () = tokio::time::sleep_until(deadline) => return Err(self.overdue(reason)),
        };
        self.counters.set_in_flight(self.buffer.len() as u64);
        Ok(arrival)
    }

    /// Restarts the deadline of waits.
    pub(crate) fn restart_deadline(&mut self) {
        self.dropped.restart_deadline();
    }

    /// Restarts the deadline of waits without forgetting what was dropped.
    pub(crate) fn extend_deadline(&mut self) {
        self.dropped.extend_deadline();
    }

    /// Prompts dropped since the last progress.
    pub(crate) fn dropped(&self) -> &DroppedPrompts {
        &self.dropped
    }

    /// Acknowledges the pairs of a step.
    pub(crate) fn acknowledge(&mut self, receipts: BatchReceipts) {
        receipts.0.into_iter().for_each(acknowledge);
        self.counters.set_in_flight(self.buffer.len() as u64);
    }

    /// Counts `pairs` pairs as trained on; returns the metrics since the step before.
    pub(crate) fn finish_step(&mut self, pairs: usize) -> IntakeMetrics {
        self.counters.emitted(pairs as u64);
        let dropped = self.counters.snapshot().dropped;
        IntakeMetrics {
            drops: self.dropped.take_step(),
            waited: std::mem::take(&mut self.waited),
            outstanding: self.scheduler.outstanding(),
            stale: dropped.get(&DropReason::Stale).copied().unwrap_or(0),
        }
    }

    /// Counts `pairs` pairs as dropped: their step was not finite.
    pub(crate) fn drop_nonfinite(&mut self, pairs: usize) {
        for _ in 0..pairs {
            self.dropped.count_pair(DropReason::Poisoned);
        }
        self.counters.dropped(DropReason::Poisoned, pairs as u64);
    }

    fn receive(&mut self, delivery: Delivery<LabelledPair>) -> Arrival {
        self.counters.received(1);
        let pair = BufferedPair::from(delivery);
        if let Some(reason) = self.rejection(&pair.labelled) {
            self.drop_pair(pair, reason);
            return Arrival::Handled;
        }
        self.dropped.restart_deadline();
        let arrival = match pair.labelled.pair.prompt.purpose {
            Purpose::Train => {
                self.buffer.push(pair);
                return Arrival::Handled;
            }
            Purpose::Evaluate => Arrival::Evaluation(Box::new(pair.labelled)),
            Purpose::Apo => Arrival::ApoSample,
        };
        acknowledge(pair.receipt);
        self.counters.emitted(1);
        arrival
    }

    /// Why a received pair must be dropped; `None` if it is accepted, and its prompt no longer outstanding.
    fn rejection(&mut self, labelled: &LabelledPair) -> Option<DropReason> {
        if !self.is_of_this_run(labelled) {
            return Some(DropReason::Superseded);
        }
        let id = labelled.pair.id();
        if !self.scheduler.mark_returned(id) {
            return Some(DropReason::Duplicate);
        }
        if labelled.pair.prompt.purpose != Purpose::Apo && !pair_buffer::is_sound(labelled) {
            tracing::warn!(
                prompt = id.0,
                "a pair holds values that are not finite, or labels that do not fit it"
            );
            return Some(DropReason::Poisoned);
        }
        None
    }

    /// Whether a pair may be trained on although a session may have been superseded: its weights must be ancestors of
    /// the current ones, and with [`Pacing::Batched`], which must be reproducible, this session must have sent it.
    fn is_of_this_run(&self, labelled: &LabelledPair) -> bool {
        let is_of_session = labelled.pair.prompt.version.session == self.lineage.session;
        let is_batched = self.scheduler.pacing() == Pacing::Batched;
        is_of_session || !is_batched && self.lineage.descends_from(labelled.pair.version)
    }

    fn receive_note(&mut self, delivery: Delivery<Dropped>) -> Arrival {
        let note = delivery.message();
        if note.session == self.lineage.session {
            self.scheduler.mark_returned(note.prompt);
            self.dropped.count_note(note);
        }
        delivery.acknowledge();
        Arrival::Handled
    }

    fn drop_pair(&mut self, pair: BufferedPair, reason: DropReason) {
        self.dropped.count_pair(reason);
        acknowledge(pair.receipt);
        self.counters.dropped(reason, 1);
    }

    fn overdue(&self, reason: &'static str) -> LearnerError {
        LearnerError::Overdue {
            reason,
            seconds: self.limits.timeout_seconds,
            outstanding: self.scheduler.outstanding() + self.scheduler.eval_outstanding(),
            buffered: self.buffer.len(),
            dropped: self.dropped.to_string(),
        }
    }
}

impl TrainingBatch {
    fn new(batch: Vec<BufferedPair>) -> Self {
        let pairs = batch.into_iter().map(|pair| (pair.labelled, pair.receipt));
        let (pairs, receipts) = pairs.unzip();
        Self {
            pairs,
            receipts: BatchReceipts(receipts),
        }
    }
}

fn acknowledge(receipt: Option<Receipt>) {
    if let Some(receipt) = receipt {
        receipt.acknowledge();
    }
}
