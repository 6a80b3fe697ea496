//! Source of training batches: sends prompts, receives labelled pairs and drop notes, buffers the pairs.
//!
//! Promises that every received pair is trained on, dropped with a counted reason, or handed to the evaluation or
//! APO loop that waits for it; that no pair is trained on twice; that a message which does not fit the run is rejected
//! and ends nothing; and that a wait without progress ends with an error.
//! Does not know what a step does with a batch.

use std::time::{Duration, Instant};

use messages::{
    DropReason, Dropped, InvalidMessage, LabelledPair, MessageLimits, Pacing, PromptId, Purpose,
    WeightsVersion,
};
use settings::LearnerSettings;
use telemetry::{StageCounters, Waits};
use tokio::sync::watch;
use transport::{Delivery, Receipt, Receiver};

use crate::{
    dropped_prompts::{DroppedPrompts, StepDrops},
    error::LearnerError,
    file_pairs::{FileBatch, FilePairs, FilePairsState, LabelArrival, is_from_file},
    pair_buffer::{BufferedPair, PairBuffer},
    pair_selection::LabelSelection,
    progress::SessionLineage,
    progress_deadline::ProgressDeadline,
    prompt_scheduler::{PromptScheduler, PromptSchedulerState, is_evaluation},
    publisher::Publisher,
};

/// Sends prompts; receives labelled pairs and drop notes.
pub(crate) struct PairSource {
    scheduler: PromptScheduler,
    labelled: Receiver<LabelledPair>,
    drops: Receiver<Dropped>,
    buffer: PairBuffer,
    /// Pairs from files; `None` in a run without them.
    files: Option<FilePairs>,
    dropped: DroppedPrompts,
    waiting: Waiting,
    lineage: SessionLineage,
    counters: StageCounters,
    waits: Waits,
    limits: BatchLimits,
    message_limits: MessageLimits,
}

/// Times of waits for batches.
struct Waiting {
    progress: ProgressDeadline,
    /// Time spent waiting since the last step.
    waited: Duration,
}

/// Inputs of a [`PairSource`].
pub(crate) struct PairSourceParts {
    pub(crate) scheduler: PromptScheduler,
    pub(crate) labelled: Receiver<LabelledPair>,
    pub(crate) drops: Receiver<Dropped>,
    pub(crate) files: Option<FilePairs>,
    pub(crate) lineage: SessionLineage,
    pub(crate) counters: StageCounters,
    pub(crate) waits: Waits,
    pub(crate) limits: BatchLimits,
    /// Labels that are trained on.
    pub(crate) selection: LabelSelection,
    /// Limits of received pairs and drop notes.
    pub(crate) message_limits: MessageLimits,
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
pub(crate) struct BatchWaitMetrics {
    /// Drops since the last step.
    pub(crate) drops: StepDrops,
    /// Time spent waiting for batches since the last step.
    pub(crate) waited: Duration,
    /// Number of outstanding training prompts.
    pub(crate) outstanding: usize,
    /// Number of stale pairs dropped in the run.
    pub(crate) stale: u64,
    /// Passes over the pairs from files; `None` in a run without them.
    pub(crate) passes: Option<f64>,
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
            buffer: PairBuffer::new(parts.selection),
            files: parts.files,
            dropped: DroppedPrompts::new(),
            waiting: Waiting {
                progress: ProgressDeadline::start(Duration::ZERO),
                waited: Duration::ZERO,
            },
            lineage: parts.lineage,
            counters: parts.counters,
            waits: parts.waits,
            limits: parts.limits,
            message_limits: parts.message_limits,
        }
    }

    /// Current waits.
    pub(crate) fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// State of the prompts, for a checkpoint.
    pub(crate) fn scheduler_state(&self) -> PromptSchedulerState {
        self.scheduler.state()
    }

    /// Number of distinct held-out prompts; `None` if every index is an independent draw.
    pub(crate) fn held_out_count(&self) -> Option<usize> {
        self.scheduler.held_out_count()
    }

    /// Number of outstanding prompts that are not trained on: of an evaluation or of APO.
    pub(crate) fn eval_outstanding(&self) -> usize {
        self.scheduler.eval_outstanding()
    }

    /// Sends the held-out prompt `index` of the evaluation at `version`, for a comparison of this purpose.
    ///
    /// # Errors
    /// If the prompt stream is closed or stays full.
    pub(crate) async fn send_held_out(
        &mut self,
        index: u64,
        purpose: Purpose,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let sent = self.scheduler.send_held_out(index, purpose, version);
        sent.await
    }

    /// Sends the prompt `index` of the APO round at `version`.
    ///
    /// # Errors
    /// If the prompt stream is closed or stays full.
    pub(crate) async fn send_apo(
        &mut self,
        index: u64,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        self.scheduler.send_apo(index, version).await
    }

    pub(crate) fn lineage(&self) -> &SessionLineage {
        &self.lineage
    }

    /// Copies of the buffered pairs, for a checkpoint.
    pub(crate) fn buffered(&self) -> Vec<LabelledPair> {
        self.buffer.pairs()
    }

    /// State of the pairs from files, for a checkpoint.
    pub(crate) fn files_state(&self) -> FilePairsState {
        self.files
            .as_ref()
            .map(FilePairs::state)
            .unwrap_or_default()
    }

    /// Restores the state of the pairs from files.
    pub(crate) fn restore_files(&mut self, state: FilePairsState) {
        if let Some(files) = &mut self.files {
            files.restore(state);
        }
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
        let online = self.online_pairs(step, step + 1);
        self.restart_deadline();
        // A run without actors never waits, and only waits notice a shutdown.
        if self.files.is_some() && *shutdown.borrow() {
            return Ok(None);
        }
        loop {
            for stale in self.buffer.remove_stale(step, self.limits.max_staleness) {
                self.drop_pair(stale, Rejection::of(DropReason::Stale))
                    .await;
            }
            let batch = match self.draw_from_files(step, shutdown).await? {
                true => self.buffer.pop(online),
                false => None,
            };
            let popped = batch.as_ref().map_or(0, Vec::len);
            self.refill(step, popped, publisher.version(), shutdown)
                .await?;
            if let Some(batch) = batch {
                self.waiting.waited += started.elapsed();
                let from_files = self.take_from_files(step);
                let in_flight = self.buffered_count() + batch.len() + from_files.len();
                self.counters.set_in_flight(in_flight as u64);
                return Ok(Some(TrainingBatch::new(batch, from_files)));
            }
            if let Arrival::Shutdown = self.next("labelled pairs", publisher, shutdown).await? {
                return Ok(None);
            }
        }
    }

    /// Whether all pairs are from files, so that nobody waits for weights.
    pub(crate) fn is_offline(&self) -> bool {
        self.files.is_some() && self.online_pairs(0, self.limits.steps) == 0
    }

    /// Number of pairs from actors in the steps from `step` on and before `end`, or the run's end.
    fn online_pairs(&self, step: u64, end: u64) -> usize {
        let BatchLimits {
            steps, batch_size, ..
        } = self.limits;
        let end = end.min(steps);
        match self.files.as_ref().map(FilePairs::share) {
            Some(share) => share.online_between(step, end),
            None => (end - step) as usize * batch_size,
        }
    }

    /// Draws the pairs of step `step` from files, and sends those without a label to the judge; returns whether all of
    /// them have one.
    async fn draw_from_files(
        &mut self,
        step: u64,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<bool, LearnerError> {
        let Some(files) = &mut self.files else {
            return Ok(true);
        };
        let has_pairs = tokio::select! {
            biased;
            drawn = files.refill(step) => drawn?,
            // The server may be away for long.
            _ = shutdown.wait_for(|requested| *requested) => true,
        };
        match has_pairs {
            true => Ok(files.is_ready(step)),
            false => Err(files.without_labels(self.dropped.to_string())),
        }
    }

    /// Sends prompts as far as there are credits; ends early on shutdown. `popped` pairs are about to be trained on.
    async fn refill(
        &mut self,
        step: u64,
        popped: usize,
        version: WeightsVersion,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<(), LearnerError> {
        let window = self.limits.max_staleness.saturating_add(1);
        let needed = self.online_pairs(step, step.saturating_add(window));
        // The popped batch still holds its credits: prompts sent now require weights at least as new as those
        // before its step.
        let buffered = self.buffer.len() + popped;
        let refill = self.scheduler.refill(version, buffered, needed);
        tokio::select! {
            biased;
            refilled = refill => refilled,
            // The server may be away for long.
            _ = shutdown.wait_for(|requested| *requested) => Ok(()),
        }
    }

    /// The pairs of step `step` from files. Those that did not come in a message count as received now.
    fn take_from_files(&mut self, step: u64) -> Vec<LabelledPair> {
        let Some(files) = &mut self.files else {
            return Vec::new();
        };
        let FileBatch { pairs, received } = files.take(step);
        self.counters.received(pairs.len() as u64 - received);
        pairs
    }

    /// Number of pairs that were received and are not yet part of a batch.
    fn buffered_count(&self) -> usize {
        self.buffer.len() + self.files.as_ref().map_or(0, FilePairs::received)
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
        let deadline = self.deadline();
        self.message_limits.newest = publisher.version();
        let arrival = tokio::select! {
            delivery = self.labelled.receive() => self.receive(delivery?).await,
            delivery = self.drops.receive() => self.receive_note(delivery?).await,
            uploaded = publisher.uploaded() => uploaded.map(|()| Arrival::Handled)?,
            _ = shutdown.changed() => return Ok(Arrival::Shutdown),
            // The server may have been away meanwhile.
            () = tokio::time::sleep_until(deadline) => match self.deadline() > tokio::time::Instant::now() {
                true => Arrival::Handled,
                false => return Err(self.overdue(reason)),
            },
        };
        self.counters.set_in_flight(self.buffered_count() as u64);
        Ok(arrival)
    }

    /// Restarts the deadline: a wait begins, or made progress. It counts from the last progress, not from the last
    /// message: a policy that has collapsed onto single answers, or a judge that never reaches a verdict, keeps
    /// sending messages.
    pub(crate) fn restart_deadline(&mut self) {
        self.extend_deadline();
        self.dropped.progressed();
    }

    /// Restarts the deadline but keeps the counts of drops: a message that may have been one counts as progress.
    fn extend_deadline(&mut self) {
        self.waiting.progress = ProgressDeadline::start(self.labelled.outage_time());
    }

    /// Deadline of the current wait.
    fn deadline(&self) -> tokio::time::Instant {
        let allowed = Duration::from_secs(self.limits.timeout_seconds);
        self.waiting
            .progress
            .after(allowed, self.labelled.outage_time())
    }

    /// Prompts dropped since the last progress.
    pub(crate) fn dropped(&self) -> &DroppedPrompts {
        &self.dropped
    }

    /// Acknowledges the pairs of a step.
    pub(crate) fn acknowledge(&mut self, receipts: BatchReceipts) {
        receipts.0.into_iter().for_each(acknowledge);
        self.counters.set_in_flight(self.buffered_count() as u64);
    }

    /// Counts `pairs` pairs as trained on; returns the metrics since the step before.
    pub(crate) fn finish_step(&mut self, pairs: usize) -> BatchWaitMetrics {
        self.counters.emitted(pairs as u64);
        let dropped = self.counters.snapshot().dropped;
        BatchWaitMetrics {
            drops: self.dropped.take_step(),
            waited: std::mem::take(&mut self.waiting.waited),
            outstanding: self.scheduler.outstanding(),
            stale: dropped.get(&DropReason::Stale).copied().unwrap_or(0),
            passes: self.files.as_ref().map(FilePairs::passes),
        }
    }

    /// Counts `pairs` pairs as dropped: their step was not finite.
    pub(crate) fn drop_nonfinite(&mut self, pairs: usize) {
        for _ in 0..pairs {
            self.dropped
                .count_pair(DropReason::Invalid, "the step on it was not finite");
        }
        self.counters.dropped(DropReason::Invalid, pairs as u64);
    }

    async fn receive(&mut self, delivery: Delivery<LabelledPair>) -> Arrival {
        self.counters.received(1);
        let mut pair = BufferedPair::from(delivery);
        let rejection = self.rejection(&pair.labelled);
        if let Some(rejection) = rejection.or_else(|| self.select(&mut pair.labelled)) {
            self.drop_pair(pair, rejection).await;
            return Arrival::Handled;
        }
        self.restart_deadline();
        let arrival = match pair.labelled.pair.prompt.purpose {
            Purpose::Train => {
                self.buffer.push(pair);
                return Arrival::Handled;
            }
            Purpose::Evaluate | Purpose::EvaluateAverage | Purpose::EvaluateReference => {
                Arrival::Evaluation(Box::new(pair.labelled))
            }
            Purpose::Apo => Arrival::ApoSample,
            Purpose::File => {
                // Part of the next batches; it counts as emitted when it is trained on.
                acknowledge(pair.receipt);
                return Arrival::Handled;
            }
        };
        acknowledge(pair.receipt);
        self.counters.emitted(1);
        arrival
    }

    /// Reason why a received pair must be dropped; `None` if it is accepted, and its prompt no longer outstanding.
    fn rejection(&mut self, labelled: &LabelledPair) -> Option<Rejection> {
        let prompt = &labelled.pair.prompt;
        if is_from_file(prompt.id) || prompt.purpose == Purpose::File {
            return self.file_rejection(labelled);
        }
        if let Err(foreign) = self.scheduler.check_sent(prompt) {
            return Some(Rejection::invalid(labelled, &foreign));
        }
        let checked = labelled.check(&self.message_limits);
        if !self.is_of_this_run(labelled) {
            let reason = Rejection::of(DropReason::Superseded);
            return Some(checked.map_or_else(|e| Rejection::invalid(labelled, &e), |()| reason));
        }
        // An invalid pair returns its credit too: its prompt has come back.
        let is_outstanding = self.mark_returned(prompt.id);
        match checked {
            Err(invalid) => Some(Rejection::invalid(labelled, &invalid)),
            Ok(()) if !is_outstanding => Some(Rejection::of(DropReason::Duplicate)),
            Ok(()) => None,
        }
    }

    /// Reason why the judge's label of a pair from a file must be dropped; `None` if it is accepted. Of the message only the label
    /// is read: the pair is the one that was sent.
    fn file_rejection(&mut self, labelled: &LabelledPair) -> Option<Rejection> {
        let prompt = &labelled.pair.prompt;
        let mut checked = labelled.check(&self.message_limits);
        if !is_from_file(prompt.id) || prompt.purpose != Purpose::File {
            checked = Err(InvalidMessage::Foreign(prompt.id));
        }
        let is_of_session = prompt.version.session == self.lineage.session;
        let files = self.files.as_mut().filter(|_| is_of_session);
        match (checked, files) {
            (Err(invalid), files) => {
                // Its place in the order is given up.
                if let Some(files) = files {
                    files.discard(prompt.id);
                }
                Some(Rejection::invalid(labelled, &invalid))
            }
            (Ok(()), None) => Some(Rejection::of(DropReason::Superseded)),
            (Ok(()), Some(files)) => match files.accept(labelled) {
                LabelArrival::Accepted => None,
                LabelArrival::WithoutSignal => Some(Rejection::without_signal()),
                LabelArrival::Duplicate => Some(Rejection::of(DropReason::Duplicate)),
            },
        }
    }

    /// Removes the labels of an accepted training pair that are not trained on. Why the pair must be dropped if none
    /// remains.
    fn select(&mut self, labelled: &mut LabelledPair) -> Option<Rejection> {
        // The one label of a pair from a file has been checked.
        if labelled.pair.prompt.purpose != Purpose::Train {
            return None;
        }
        self.scheduler.measure(labelled);
        if self.buffer.select(labelled) {
            return None;
        }
        self.dropped.keep_samples(&labelled.pair);
        Some(Rejection::without_signal())
    }

    /// Marks a prompt as no longer outstanding; returns whether it was. An evaluation sends every prompt once, so that
    /// each that comes back is progress, with a verdict or without.
    fn mark_returned(&mut self, id: PromptId) -> bool {
        let was_outstanding = self.scheduler.mark_returned(id);
        if was_outstanding && is_evaluation(id) {
            self.extend_deadline();
        }
        was_outstanding
    }

    /// Whether a pair may be trained on although a session may have been superseded: its weights must be ancestors of
    /// the current ones, and with [`Pacing::Batched`], which must be reproducible, this session must have sent it.
    fn is_of_this_run(&self, labelled: &LabelledPair) -> bool {
        let is_of_session = labelled.pair.prompt.version.session == self.lineage.session;
        let is_batched = self.scheduler.pacing() == Pacing::Batched;
        is_of_session || !is_batched && self.lineage.descends_from(labelled.pair.version)
    }

    async fn receive_note(&mut self, delivery: Delivery<Dropped>) -> Arrival {
        let (note, receipt) = delivery.take();
        if let Err(invalid) = note.check(&self.message_limits) {
            self.reject_note(&note, receipt, &invalid).await;
            return Arrival::Handled;
        }
        if note.session == self.lineage.session {
            match self.files.as_mut().filter(|_| is_from_file(note.prompt)) {
                Some(files) => files.forget(&note),
                None => {
                    let was_outstanding = self.mark_returned(note.prompt);
                    if was_outstanding && note.reason == DropReason::Identical {
                        self.scheduler.measure_identical(note.prompt);
                    }
                }
            }
            self.dropped.count_note(&note);
        }
        receipt.acknowledge();
        Arrival::Handled
    }

    /// Rejects an invalid drop note. Unlike others, it counts as a message that the stage received and dropped.
    async fn reject_note(&mut self, note: &Dropped, receipt: Receipt, invalid: &InvalidMessage) {
        let (prompt, detail) = (note.prompt.0, invalid.to_string());
        tracing::warn!(prompt, detail, "an invalid drop note was rejected");
        self.counters.received(1);
        receipt.dead_letter(note).await;
        self.dropped.count_pair(DropReason::Invalid, &detail);
        self.counters.dropped(DropReason::Invalid, 1);
    }

    async fn drop_pair(&mut self, pair: BufferedPair, rejection: Rejection) {
        let Rejection { reason, detail } = rejection;
        self.dropped.count_pair(reason, &detail);
        match pair.receipt {
            Some(receipt) if reason == DropReason::Invalid => {
                receipt.dead_letter(&pair.labelled).await;
            }
            receipt => acknowledge(receipt),
        }
        self.counters.dropped(reason, 1);
    }

    fn overdue(&self, reason: &'static str) -> LearnerError {
        LearnerError::Overdue {
            reason,
            seconds: self.limits.timeout_seconds,
            outstanding: self.scheduler.outstanding()
                + self.scheduler.eval_outstanding()
                + self.files.as_ref().map_or(0, FilePairs::awaited),
            buffered: self.buffered_count(),
            dropped: self.dropped.to_string(),
        }
    }
}

/// Reason why a pair is dropped.
struct Rejection {
    reason: DropReason,
    detail: String,
}

impl Rejection {
    fn of(reason: DropReason) -> Self {
        let detail = String::new();
        Self { reason, detail }
    }

    fn without_signal() -> Self {
        Self {
            reason: DropReason::NoSignal,
            detail: "every |p - 1/2| is below learner.min_margin".into(),
        }
    }

    /// Logs an invalid pair, which is rejected.
    fn invalid(labelled: &LabelledPair, invalid: &InvalidMessage) -> Self {
        let (prompt, detail) = (labelled.pair.id().0, invalid.to_string());
        let (actor, judge) = (&labelled.pair.actor, &labelled.judge);
        tracing::warn!(
            prompt,
            ?actor,
            ?judge,
            detail,
            "an invalid labelled pair was rejected"
        );
        Self {
            reason: DropReason::Invalid,
            detail,
        }
    }
}

impl TrainingBatch {
    /// The pairs from actors, then those from files, each in order of their ids.
    fn new(batch: Vec<BufferedPair>, from_files: Vec<LabelledPair>) -> Self {
        let pairs = batch.into_iter().map(|pair| (pair.labelled, pair.receipt));
        let from_files = from_files.into_iter().map(|labelled| (labelled, None));
        let (pairs, receipts) = pairs.chain(from_files).unzip();
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use messages::{
        Completion, CompletionCounts, Finish, JudgeVersion, Label, Pair, Probability, Prompt, Seed,
        Stage,
    };
    use model::{DType, PublishedForm};
    use settings::PairSelection;
    use transport::{Sender, WeightStore};

    use super::*;
    use crate::{
        prompt_scheduler::PromptSchedulerParts,
        prompts::{PromptRow, PromptSet},
    };

    struct OneToken;

    impl PromptSet for OneToken {
        fn train(&self, index: u64) -> PromptRow {
            PromptRow {
                ids: vec![index as u32 % 8],
                text: String::new(),
                dialogue: None,
                golden: None,
                answer: None,
                route: None,
            }
        }
        fn held_out(&self, index: u64) -> PromptRow {
            self.train(index)
        }
        fn held_out_count(&self) -> Option<usize> {
            None
        }
    }

    /// A source and the other ends of its streams.
    struct Harness {
        source: PairSource,
        publisher: Publisher,
        prompts: Receiver<Prompt>,
        labelled: Sender<LabelledPair>,
        drops: Sender<Dropped>,
    }

    /// Step after which weights were published last.
    const PUBLISHED: u64 = 3;

    /// Every label is trained on.
    const ALL: LabelSelection = LabelSelection {
        kind: PairSelection::All,
        min_margin: 0.0,
        seed: Seed(1),
    };

    impl Harness {
        fn new() -> Self {
            Self::with(ALL, 2)
        }

        /// With pairs of this many completions.
        fn with(selection: LabelSelection, completions: usize) -> Self {
            let (prompts_sender, prompts) = transport::stream("prompts", 64);
            let (labelled, labelled_receiver) = transport::stream("labelled pairs", 64);
            let (drops, drops_receiver) = transport::stream("dropped prompts", 64);
            let waits = Waits::new("learner");
            let scheduler = PromptScheduler::new(PromptSchedulerParts {
                prompts: prompts_sender,
                set: Arc::new(OneToken),
                seed: Seed(1),
                pacing: Pacing::EachPrompt,
                window: 4,
                timeout: Duration::from_secs(60),
                waits: waits.clone(),
                curriculum: None,
            });
            let source = PairSource::new(PairSourceParts {
                scheduler,
                labelled: labelled_receiver,
                drops: drops_receiver,
                files: None,
                lineage: SessionLineage::new(0),
                counters: StageCounters::new(Stage::Learner),
                waits,
                limits: BatchLimits {
                    steps: 9,
                    batch_size: 4,
                    max_staleness: 9,
                    timeout_seconds: 10,
                },
                selection,
                message_limits: MessageLimits {
                    vocabulary: 8,
                    prompt_tokens: 1,
                    golden_tokens: None,
                    completion_tokens: 1,
                    file_tokens: None,
                    completions: CompletionCounts {
                        train: completions,
                        evaluate: 2,
                        apo: 2,
                    },
                    batch_prompts: 6,
                    lead_steps: 9,
                    newest: WeightsVersion::REFERENCE,
                },
            });
            let version = WeightsVersion::at(PUBLISHED);
            Self {
                source,
                publisher: Publisher::new(
                    WeightStore::default(),
                    PublishedForm::Tensors(DType::F32),
                    0,
                    version,
                ),
                prompts,
                labelled,
                drops,
            }
        }

        /// The prompts sent so far.
        fn sent(&self) -> Vec<Prompt> {
            let deliveries = std::iter::from_fn(|| self.prompts.try_receive());
            let take = |delivery: Delivery<Prompt>| {
                let (prompt, receipt) = delivery.take();
                receipt.acknowledge();
                prompt
            };
            deliveries.map(take).collect()
        }

        async fn next(&mut self) -> Result<Arrival, LearnerError> {
            let (_running, mut shutdown) = watch::channel(false);
            self.source
                .next("labelled pairs", &mut self.publisher, &mut shutdown)
                .await
        }

        async fn receive(&mut self, labelled: LabelledPair) {
            self.labelled.send(labelled).await.expect("open");
            self.next().await.expect("it ends nothing");
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            let counts = self.source.counters.snapshot();
            assert!(counts.is_conserved(), "{counts:?}");
            counts.dropped.get(&reason).copied().unwrap_or(0)
        }
    }

    fn labelled(prompt: &Prompt) -> LabelledPair {
        let completion = Completion {
            ids: vec![1],
            finish: Finish::Length,
            mixture_coef: 0.0,
            logp: vec![-1.0],
            ref_logp: vec![-1.0],
            behaviour_logp: vec![-1.0],
            text: String::new(),
        };
        LabelledPair {
            pair: Pair {
                prompt: prompt.clone(),
                version: WeightsVersion::at(PUBLISHED),
                completions: vec![completion.clone(), completion],
                actor: "actor-0".into(),
            },
            labels: vec![Label {
                first: 0,
                second: 1,
                p: Probability::HALF,
                judged: None,
            }],
            judge: "gold".into(),
            judge_version: JudgeVersion(1),
            scores: None,
            verdicts: Vec::new(),
        }
    }

    #[tokio::test]
    async fn invalid_messages_are_dropped_and_return_the_credit_of_their_own_prompt_only() {
        let mut harness = Harness::new();
        let version = WeightsVersion::at(PUBLISHED);
        let refilled = harness.source.scheduler.refill(version, 0, 4).await;
        refilled.expect("the stream has room");
        let sent = harness.sent();
        let [first, second, ..] = &sent[..] else {
            panic!("four were sent");
        };
        let alterations: [fn(&mut LabelledPair); 6] = [
            |l| l.pair.prompt.seed = Seed(9),
            |l| l.pair.prompt.ids = vec![7],
            |l| l.pair.prompt.purpose = Purpose::Evaluate,
            |l| {
                l.pair.prompt.id = PromptId(99);
                l.pair.prompt.prompt_batch.first = PromptId(99);
                l.labels.clear();
            },
            |l| {
                l.pair.prompt.seed = Seed(9);
                l.pair.prompt.version.session = u64::MAX;
            },
            |l| {
                l.pair.prompt.id = PromptId(99);
                l.pair.prompt.prompt_batch.first = PromptId(99);
                l.pair.version.step = u64::MAX;
            },
        ];
        for (index, alter) in alterations.into_iter().enumerate() {
            let mut forged = labelled(first);
            alter(&mut forged);
            harness.receive(forged).await;
            assert_eq!(harness.dropped(DropReason::Invalid), index as u64 + 1);
            assert_eq!(harness.source.scheduler.outstanding(), 4, "case {index}");
        }
        // One that came of the prompt itself returns its credit.
        let mut nonfinite = labelled(first);
        nonfinite.pair.completions[0].logp[0] = f32::NAN;
        harness.receive(nonfinite).await;
        assert_eq!(harness.dropped(DropReason::Invalid), 7);
        assert_eq!(harness.source.scheduler.outstanding(), 3);
        let note = Dropped {
            prompt: second.id,
            session: u64::MAX,
            stage: Stage::Actor,
            reason: DropReason::Failed,
            log_ratio: None,
            detail: String::new(),
        };
        harness.drops.send(note).await.expect("open");
        harness.next().await.expect("it ends nothing");
        assert_eq!(harness.dropped(DropReason::Invalid), 8);
        assert_eq!(harness.source.scheduler.outstanding(), 3);
        harness.receive(labelled(second)).await;
        assert_eq!(harness.source.buffered(), [labelled(second)]);
        harness.receive(labelled(second)).await;
        assert_eq!(harness.dropped(DropReason::Duplicate), 1);
    }

    /// The pair of a prompt with three completions and these p.
    fn labelled_three(prompt: &Prompt, p: [f32; 3]) -> LabelledPair {
        let mut labelled = labelled(prompt);
        let third = labelled.pair.completions[0].clone();
        labelled.pair.completions.push(third);
        let rows = [(0, 1), (0, 2), (1, 2)].into_iter().zip(p);
        let labels = rows.map(|((first, second), p)| Label {
            first,
            second,
            p: Probability::new(p).unwrap(),
            judged: None,
        });
        labelled.labels = labels.collect();
        labelled
    }

    #[tokio::test(start_paused = true)]
    async fn labels_that_are_not_trained_on_are_not_buffered_and_a_pair_without_any_is_dropped() {
        let selection = LabelSelection {
            kind: PairSelection::BestWorst,
            min_margin: 0.1,
            ..ALL
        };
        let mut harness = Harness::with(selection, 3);
        let version = WeightsVersion::at(PUBLISHED);
        let refilled = harness.source.scheduler.refill(version, 0, 4).await;
        refilled.expect("the stream has room");
        let sent = harness.sent();
        let started = tokio::time::Instant::now();
        harness.source.restart_deadline();
        harness
            .receive(labelled_three(&sent[0], [0.9, 0.6, 0.3]))
            .await;
        // The best is 0, the worst 1.
        let mut selected = labelled_three(&sent[0], [0.9, 0.6, 0.3]);
        selected.labels.truncate(1);
        assert_eq!(harness.source.buffered(), [selected.clone()]);
        tokio::time::sleep(Duration::from_secs(6)).await;
        harness
            .receive(labelled_three(&sent[1], [0.55, 0.5, 0.45]))
            .await;
        assert_eq!(harness.dropped(DropReason::NoSignal), 1);
        assert_eq!(harness.source.buffered(), [selected]);
        assert_eq!(
            harness.source.scheduler.outstanding(),
            2,
            "its credit is back"
        );
        let refilled = harness.source.scheduler.refill(version, 1, 4).await;
        refilled.expect("the stream has room");
        assert_eq!(harness.sent().len(), 1, "another prompt takes its place");
        assert_eq!(harness.source.finish_step(1).drops.no_signal, 1);
        // A judge without an opinion is no progress.
        let error = harness.next().await.err().expect("no progress");
        let listed = "1 no_signal (the last: every |p - 1/2| is below learner.min_margin)";
        assert!(error.to_string().contains(listed), "{error}");
        assert_eq!(started.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn an_evaluation_progresses_with_each_of_its_prompts_and_with_nothing_else() {
        let mut harness = Harness::new();
        let version = WeightsVersion::at(PUBLISHED);
        for index in 0..3 {
            let scheduler = &mut harness.source.scheduler;
            let sent = scheduler
                .send_held_out(index, Purpose::Evaluate, version)
                .await;
            sent.expect("the stream has room");
        }
        let sent = harness.sent();
        harness.source.restart_deadline();
        let started = tokio::time::Instant::now();
        // Of ten seconds, a prompt comes back after eight.
        for (prompt, seconds) in sent.iter().take(2).zip([8, 16]) {
            tokio::time::sleep_until(started + Duration::from_secs(seconds)).await;
            let note = Dropped {
                prompt: prompt.id,
                session: 0,
                stage: Stage::Preference,
                reason: DropReason::Abstained,
                log_ratio: None,
                detail: "no verdict".into(),
            };
            harness.drops.send(note).await.expect("open");
            assert!(harness.next().await.is_ok());
        }
        // Then every second one that came back before.
        for _ in 0..9 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let again = harness.labelled.send(labelled(&sent[0])).await;
            again.expect("open");
            assert!(harness.next().await.is_ok());
        }
        let error = harness.next().await.err().expect("no progress");
        let message = error.to_string();
        let listed = "2 abstained (the last: no verdict), 9 duplicate";
        assert!(message.contains(listed), "{message}");
        assert_eq!(started.elapsed().as_secs(), 26);
    }
}
