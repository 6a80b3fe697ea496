//! Sends prompts as credits: never more outstanding and buffered than the learner will train on in time.
//!
//! Promises that the prompt of an id and its seed are the same in every run with the same seed. Does not know what is
//! done with the pairs that come back.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use messages::{
    Digest, InvalidMessage, LabelledPair, Pacing, Prompt, PromptBatch, PromptId, Purpose, Seed,
    WeightsVersion,
};
use serde::{Deserialize, Serialize};
use telemetry::Waits;
use transport::Sender;

use crate::{
    curriculum::{Curriculum, CurriculumState},
    error::LearnerError,
    progress_deadline::send_in_time,
    prompts::{PromptRow, PromptSet},
};

/// First id of evaluation prompts.
const EVALUATION_IDS: u64 = 1 << 63;

/// Bit in the ids of evaluation prompts that the average answers.
const AVERAGE_IDS: u64 = 1 << 61;

/// Bit in the ids of evaluation prompts that the current reference answers.
const REFERENCE_IDS: u64 = 1 << 60;

/// First id of APO prompts; evaluation prompts follow them.
const APO_IDS: u64 = 1 << 62;

/// Index of the first training prompt that APO reads, far from those that are trained on.
const APO_ROWS: u64 = 1 << 40;

/// State of a [`PromptScheduler`]; part of every checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PromptSchedulerState {
    /// Index of the next training prompt.
    cursor: u64,
    /// Outstanding training prompts.
    outstanding: Vec<(PromptId, PromptBatch)>,
    /// Signals and draws of the curriculum, if there is one.
    #[serde(default)]
    curriculum: CurriculumState,
}

/// Inputs of a [`PromptScheduler`].
pub(crate) struct PromptSchedulerParts {
    pub(crate) prompts: Sender<Prompt>,
    pub(crate) set: Arc<dyn PromptSet>,
    pub(crate) seed: Seed,
    pub(crate) pacing: Pacing,
    /// Number of credits: (max_staleness + 1) · train_batch_size.
    pub(crate) window: usize,
    /// Longest wait for room in the prompt stream.
    pub(crate) timeout: Duration,
    /// Registry of such waits.
    pub(crate) waits: Waits,
    /// Curriculum of training prompts; `None`: their order is that of the set.
    pub(crate) curriculum: Option<Curriculum>,
}

/// Sends prompts and tracks which are outstanding.
pub(crate) struct PromptScheduler {
    parts: PromptSchedulerParts,
    cursor: u64,
    outstanding: BTreeMap<PromptId, OutstandingPrompt>,
}

/// A prompt that was sent and has not come back.
struct OutstandingPrompt {
    prompt_batch: PromptBatch,
    content: Digest,
}

/// Whether an id is of an evaluation prompt.
pub(crate) fn is_evaluation(id: PromptId) -> bool {
    id.0 >= EVALUATION_IDS
}

/// Digest of what makes a prompt, however often it is sent: purpose, seed, tokens and golden answer.
fn content(prompt: &Prompt) -> Digest {
    let golden = prompt.golden.as_deref();
    let lengths = [prompt.ids.len(), golden.map_or(0, |ids| ids.len() + 1)];
    let numbers = [prompt.purpose as u64, prompt.seed.0].into_iter();
    let numbers = numbers.chain(lengths.map(|length| length as u64));
    let mut bytes: Vec<u8> = numbers.flat_map(u64::to_le_bytes).collect();
    let tokens = prompt.ids.iter().chain(golden.unwrap_or_default());
    bytes.extend(tokens.flat_map(|token| token.to_le_bytes()));
    Digest::of(&bytes)
}

/// Header of a prompt: everything but its text.
struct PromptHeader {
    id: PromptId,
    prompt_batch: PromptBatch,
    purpose: Purpose,
    seed: Seed,
}

impl PromptScheduler {
    /// A scheduler that has sent nothing.
    pub(crate) fn new(parts: PromptSchedulerParts) -> Self {
        Self {
            parts,
            cursor: 0,
            outstanding: BTreeMap::new(),
        }
    }

    pub(crate) fn pacing(&self) -> Pacing {
        self.parts.pacing
    }

    /// Number of distinct held-out prompts; `None` if every index is an independent draw.
    pub(crate) fn held_out_count(&self) -> Option<usize> {
        self.parts.set.held_out_count()
    }

    /// Marks a prompt as no longer outstanding; returns whether it was.
    pub(crate) fn mark_returned(&mut self, id: PromptId) -> bool {
        self.outstanding.remove(&id).is_some()
    }

    /// Checks that a prompt which came back is the one that was sent under its id, if that is outstanding.
    ///
    /// # Errors
    /// If it is another one.
    pub(crate) fn check_sent(&self, prompt: &Prompt) -> Result<(), InvalidMessage> {
        match self.outstanding.get(&prompt.id) {
            Some(sent) if sent.content != content(prompt) => {
                Err(InvalidMessage::Foreign(prompt.id))
            }
            _ => Ok(()),
        }
    }

    /// Number of outstanding training prompts.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding.keys().filter(|id| id.0 < APO_IDS).count()
    }

    /// Number of outstanding prompts that are not trained on: of an evaluation or of APO.
    pub(crate) fn eval_outstanding(&self) -> usize {
        self.outstanding.len() - self.outstanding()
    }

    /// Sends as many training prompts as there are credits: `buffered` pairs still hold one each, and at most
    /// `needed` more prompts will be trained on before the end of the run. Cancel-safe: of a batch that is sent in part
    /// the cursor is at the end, since it is sent again whole.
    ///
    /// # Errors
    /// If the prompt stream is closed or stays full.
    pub(crate) async fn refill(
        &mut self,
        version: WeightsVersion,
        buffered: usize,
        needed: usize,
    ) -> Result<(), LearnerError> {
        let outstanding = self.outstanding();
        let credits = self
            .parts
            .window
            .min(needed)
            .saturating_sub(buffered + outstanding);
        if credits == 0 || (self.pacing() == Pacing::Batched && outstanding > 0) {
            return Ok(());
        }
        self.forget_rows();
        let first = PromptId(self.cursor);
        for index in 0..credits as u64 {
            let id = PromptId(first.0 + index);
            let prompt_batch = match self.pacing() {
                Pacing::EachPrompt => PromptBatch::single(id),
                Pacing::Batched => PromptBatch {
                    first,
                    count: credits as u32,
                },
            };
            let end = prompt_batch.first.0 + u64::from(prompt_batch.count);
            self.cursor = self.cursor.max(end);
            self.send_training(id, prompt_batch, version).await?;
        }
        Ok(())
    }

    async fn send_training(
        &mut self,
        id: PromptId,
        prompt_batch: PromptBatch,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let header = PromptHeader {
            id,
            prompt_batch,
            purpose: Purpose::Train,
            seed: self.parts.seed.derive(id.0),
        };
        let index = match &mut self.parts.curriculum {
            Some(curriculum) => curriculum.row(id),
            None => id.0,
        };
        let row = self.parts.set.train(index);
        self.send(header, row, version).await
    }

    /// Tells the curriculum the labels of a training pair.
    pub(crate) fn measure(&mut self, labelled: &LabelledPair) {
        if let Some(curriculum) = &mut self.parts.curriculum {
            curriculum.measure(labelled);
        }
    }

    /// Tells the curriculum that a prompt's completions were identical.
    pub(crate) fn measure_identical(&mut self, id: PromptId) {
        if let Some(curriculum) = &mut self.parts.curriculum {
            curriculum.record(id, 0.0);
        }
    }

    /// Lets the curriculum forget the prompts of batches that have come back whole.
    fn forget_rows(&mut self) {
        let training = self.outstanding.range(..PromptId(APO_IDS));
        let batches = training.map(|(_, sent)| sent.prompt_batch.first);
        let first = batches.min().unwrap_or(PromptId(self.cursor));
        if let Some(curriculum) = &mut self.parts.curriculum {
            curriculum.forget_before(first);
        }
    }

    async fn send(
        &mut self,
        header: PromptHeader,
        row: PromptRow,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let PromptHeader {
            id,
            prompt_batch,
            purpose,
            seed,
        } = header;
        let prompt = Prompt {
            prompt_batch,
            purpose,
            version,
            ..row.held_out_prompt(id, seed)
        };
        let sent = OutstandingPrompt {
            prompt_batch,
            content: content(&prompt),
        };
        self.outstanding.insert(id, sent);
        let _wait = self.parts.waits.enter("room for prompts");
        let (prompts, allowed) = (&self.parts.prompts, self.parts.timeout);
        send_in_time(prompts, prompt, "a prompt", allowed).await
    }

    /// Sends the held-out prompt `index` of the evaluation at `version`, for a comparison of this purpose. Its seed is the
    /// same in every evaluation, so that they share the reference's completions and the sampling noise.
    ///
    /// # Errors
    /// If the prompt stream is closed or stays full.
    pub(crate) async fn send_held_out(
        &mut self,
        index: u64,
        purpose: Purpose,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let comparison = match purpose {
            Purpose::EvaluateAverage => AVERAGE_IDS,
            Purpose::EvaluateReference => REFERENCE_IDS,
            _ => 0,
        };
        let id = PromptId(EVALUATION_IDS | comparison | version.step << 24 | index);
        let header = PromptHeader {
            id,
            prompt_batch: PromptBatch::single(id),
            purpose,
            seed: self.parts.seed.derive(EVALUATION_IDS | index),
        };
        let row = self.parts.set.held_out(index);
        self.send(header, row, version).await
    }

    /// Sends the prompt `index` of the APO round at `version`: a training prompt, others in every round, with a seed
    /// of its own.
    ///
    /// # Errors
    /// If the prompt stream is closed or stays full.
    pub(crate) async fn send_apo(
        &mut self,
        index: u64,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let id = PromptId(APO_IDS | version.step << 24 | index);
        let header = PromptHeader {
            id,
            prompt_batch: PromptBatch::single(id),
            purpose: Purpose::Apo,
            seed: self.parts.seed.derive(id.0),
        };
        let row = self
            .parts
            .set
            .train(APO_ROWS + (version.step << 20) + index);
        self.send(header, row, version).await
    }

    /// State for a checkpoint. Outstanding evaluation and APO prompts are not part of it: those loops start over.
    pub(crate) fn state(&self) -> PromptSchedulerState {
        let outstanding = self
            .outstanding
            .iter()
            .filter(|(id, _)| id.0 < APO_IDS)
            .map(|(&id, sent)| (id, sent.prompt_batch));
        PromptSchedulerState {
            cursor: self.cursor,
            outstanding: outstanding.collect(),
            curriculum: (self.parts.curriculum.as_ref())
                .map_or_else(CurriculumState::default, Curriculum::state),
        }
    }

    /// Restores the state of a checkpoint: sends outstanding prompts again, with the same seeds. A batch with any
    /// outstanding prompt is sent again whole; `remove` is called with each of its prompts, so that pairs of it that
    /// had come back are not trained on twice.
    ///
    /// # Errors
    /// If the prompt stream is closed or stays full.
    pub(crate) async fn restore(
        &mut self,
        state: PromptSchedulerState,
        version: WeightsVersion,
        mut remove: impl FnMut(PromptId),
    ) -> Result<(), LearnerError> {
        self.cursor = state.cursor;
        if let Some(curriculum) = &mut self.parts.curriculum {
            curriculum.restore(state.curriculum);
        }
        let mut resent = BTreeMap::new();
        for (id, prompt_batch) in state.outstanding {
            let whole = prompt_batch.first.0..prompt_batch.first.0 + u64::from(prompt_batch.count);
            resent.extend(whole.map(|id| (PromptId(id), prompt_batch)));
            resent.insert(id, prompt_batch);
        }
        for (id, prompt_batch) in resent {
            remove(id);
            self.send_training(id, prompt_batch, version).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    struct Counting;

    impl PromptSet for Counting {
        fn train(&self, index: u64) -> PromptRow {
            PromptRow {
                ids: vec![index as u32],
                text: String::new(),
                dialogue: None,
                golden: None,
                answer: None,
                route: None,
            }
        }
        fn held_out(&self, index: u64) -> PromptRow {
            self.train(1000 + index)
        }
        fn held_out_count(&self) -> Option<usize> {
            None
        }
    }

    fn scheduler(pacing: Pacing) -> (PromptScheduler, transport::Receiver<Prompt>) {
        with_room(pacing, 64)
    }

    fn with_room(pacing: Pacing, room: usize) -> (PromptScheduler, transport::Receiver<Prompt>) {
        let (sender, receiver) = transport::stream("prompts", room);
        let scheduler = PromptScheduler::new(PromptSchedulerParts {
            prompts: sender,
            set: Arc::new(Counting),
            seed: Seed(1),
            pacing,
            window: 6,
            timeout: Duration::from_secs(60),
            waits: Waits::new("learner"),
            curriculum: None,
        });
        (scheduler, receiver)
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_room_in_the_stream_times_out() {
        let (mut scheduler, receiver) = with_room(Pacing::EachPrompt, 2);
        let waits = scheduler.parts.waits.clone();
        let mut refill = Box::pin(scheduler.refill(WeightsVersion::REFERENCE, 0, 9));
        assert!(timeout(Duration::from_secs(1), &mut refill).await.is_err());
        assert_eq!(waits.current()[0].reason, "room for prompts");
        let error = refill.await.expect_err("the stream stays full");
        assert!(
            matches!(error, LearnerError::NoRoom { seconds: 60, .. }),
            "{error}"
        );
        assert_eq!(sent(&receiver).len(), 2);
        assert!(waits.current().is_empty());
    }

    fn sent(receiver: &transport::Receiver<Prompt>) -> Vec<Prompt> {
        std::iter::from_fn(|| receiver.try_receive())
            .map(|delivery| {
                let prompt = delivery.message().clone();
                delivery.acknowledge();
                prompt
            })
            .collect()
    }

    fn ids(prompts: &[Prompt]) -> Vec<u64> {
        prompts.iter().map(|prompt| prompt.id.0).collect()
    }

    #[tokio::test]
    async fn credits_are_the_window_less_outstanding_and_buffered() {
        let (mut scheduler, receiver) = scheduler(Pacing::EachPrompt);
        let version = WeightsVersion::REFERENCE;
        scheduler.refill(version, 0, 100).await.expect("open");
        assert_eq!(ids(&sent(&receiver)), vec![0, 1, 2, 3, 4, 5]);
        assert!(scheduler.mark_returned(PromptId(3)) && !scheduler.mark_returned(PromptId(3)));
        scheduler.refill(version, 1, 100).await.expect("open");
        assert!(
            sent(&receiver).is_empty(),
            "the buffered pair still holds its credit"
        );
        scheduler.refill(version, 0, 100).await.expect("open");
        assert_eq!(ids(&sent(&receiver)), vec![6]);
        assert!(scheduler.mark_returned(PromptId(0)));
        scheduler.refill(version, 0, 5).await.expect("open");
        assert!(sent(&receiver).is_empty(), "no more than the run needs");
    }

    #[tokio::test]
    async fn a_prompt_comes_back_as_it_was_sent() {
        let (mut scheduler, receiver) = scheduler(Pacing::EachPrompt);
        let version = WeightsVersion::REFERENCE;
        scheduler.refill(version, 0, 100).await.expect("open");
        let [first, ..] = &sent(&receiver)[..] else {
            panic!("six were sent");
        };
        let check = |alter: fn(&mut Prompt)| {
            let mut prompt = first.clone();
            alter(&mut prompt);
            scheduler.check_sent(&prompt).is_ok()
        };
        // Another session sends the same prompt for newer weights, perhaps in another batch.
        assert!(check(|prompt| prompt.version.session = 1));
        assert!(check(|prompt| prompt.prompt_batch.count = 2));
        assert!(check(|prompt| prompt.id = PromptId(99)), "not outstanding");
        assert!(!check(|prompt| prompt.ids.push(1)));
        assert!(!check(|prompt| prompt.seed = Seed(0)));
        assert!(!check(|prompt| prompt.purpose = Purpose::Evaluate));
        assert!(!check(|prompt| prompt.golden = Some(Vec::new())));
        assert!(!check(|prompt| prompt.id = PromptId(1)));
    }

    #[tokio::test]
    async fn whole_batches_are_sent_when_nothing_is_outstanding() {
        let (mut scheduler, receiver) = scheduler(Pacing::Batched);
        scheduler
            .refill(WeightsVersion::REFERENCE, 0, 4)
            .await
            .expect("open");
        let prompt_batch = PromptBatch {
            first: PromptId(0),
            count: 4,
        };
        assert!(
            sent(&receiver)
                .iter()
                .all(|prompt| prompt.prompt_batch == prompt_batch)
        );
        for id in 0..3 {
            assert!(scheduler.mark_returned(PromptId(id)));
        }
        scheduler
            .refill(WeightsVersion::REFERENCE, 1, 4)
            .await
            .expect("open");
        assert!(sent(&receiver).is_empty());
        assert!(scheduler.mark_returned(PromptId(3)));
        scheduler
            .refill(WeightsVersion::REFERENCE, 1, 4)
            .await
            .expect("open");
        assert_eq!(ids(&sent(&receiver)), vec![4, 5, 6]);
    }

    #[tokio::test]
    async fn a_restored_scheduler_sends_an_unfinished_batch_again_with_the_same_seeds() {
        let (mut scheduler, receiver) = scheduler(Pacing::Batched);
        scheduler
            .refill(WeightsVersion::at(2), 0, 3)
            .await
            .expect("open");
        let before = sent(&receiver);
        assert!(scheduler.mark_returned(PromptId(1)));
        let state = scheduler.state();
        let (mut resumed, receiver) = self::scheduler(Pacing::Batched);
        let mut removed = Vec::new();
        resumed
            .restore(state, WeightsVersion::at(2), |id| removed.push(id.0))
            .await
            .expect("open");
        assert_eq!(sent(&receiver), before);
        assert_eq!((removed, resumed.outstanding()), (vec![0, 1, 2], 3));
    }

    /// A batch that was drawn before one of its prompts was measured, and is sent again whole.
    #[tokio::test]
    async fn a_restored_scheduler_sends_the_rows_that_the_curriculum_had_drawn() {
        let (mut scheduler, receiver) = scheduler(Pacing::Batched);
        let curriculum = || Some(Curriculum::new(3, 0.01, Seed(1)));
        scheduler.parts.curriculum = curriculum();
        let version = WeightsVersion::REFERENCE;
        scheduler.refill(version, 0, 3).await.expect("open");
        let first: Vec<u32> = sent(&receiver).iter().map(|prompt| prompt.ids[0]).collect();
        assert_eq!(first, [0, 1, 2]);
        for id in 0..3 {
            scheduler.mark_returned(PromptId(id));
            scheduler.measure_identical(PromptId(id));
        }
        scheduler.refill(version, 0, 6).await.expect("open");
        let drawn = sent(&receiver);
        assert!(scheduler.mark_returned(PromptId(4)));
        let mut labelled = crate::micro_batch::tests::labelled(Vec::new());
        labelled.pair.prompt = drawn[1].clone();
        scheduler.measure(&labelled);
        let state = scheduler.state();
        let json = serde_json::to_string(&state).expect("it serialises");
        let state: PromptSchedulerState = serde_json::from_str(&json).expect("it is what it was");
        let (mut resumed, receiver) = self::scheduler(Pacing::Batched);
        resumed.parts.curriculum = curriculum();
        let restored = resumed.restore(state, version, |_| {});
        restored.await.expect("open");
        assert_eq!(sent(&receiver), drawn);
    }
}
