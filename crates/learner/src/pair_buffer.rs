//! Buffer of labelled pairs that wait for their step, and the staleness limit.

use messages::{JudgeVersion, LabelledPair, PromptId};
use transport::{Delivery, Receipt};

use crate::pair_selection::LabelSelection;

/// Labelled pairs that wait for their step, with the labels that are trained on.
pub(crate) struct PairBuffer {
    selection: LabelSelection,
    pairs: Vec<BufferedPair>,
    judge: JudgeVersionTracker,
}

/// Newest judge version seen, and the step at which it was first seen.
#[derive(Clone, Copy, Default)]
struct JudgeVersionTracker {
    newest: JudgeVersion,
    since: u64,
}

/// A pair and its receipt; none for a pair from a checkpoint, which was acknowledged before.
pub(crate) struct BufferedPair {
    pub(crate) labelled: LabelledPair,
    pub(crate) receipt: Option<Receipt>,
}

impl From<Delivery<LabelledPair>> for BufferedPair {
    fn from(delivery: Delivery<LabelledPair>) -> Self {
        let (labelled, receipt) = delivery.take();
        Self {
            labelled,
            receipt: Some(receipt),
        }
    }
}

impl PairBuffer {
    /// An empty buffer of pairs with these labels.
    pub(crate) fn new(selection: LabelSelection) -> Self {
        Self {
            selection,
            pairs: Vec::new(),
            judge: JudgeVersionTracker::default(),
        }
    }

    /// Removes the labels of a pair that are not trained on. Returns whether any remains: if not, there is nothing to
    /// buffer.
    pub(crate) fn select(&self, labelled: &mut LabelledPair) -> bool {
        self.selection.apply(labelled)
    }

    pub(crate) fn len(&self) -> usize {
        self.pairs.len()
    }

    pub(crate) fn push(&mut self, pair: BufferedPair) {
        self.pairs.push(pair);
    }

    /// Removes the pairs that are stale at learner step `step`: step − version > `max_staleness`, or labelled by a
    /// judge that was superseded more than `max_staleness` steps ago.
    pub(crate) fn remove_stale(&mut self, step: u64, max_staleness: u64) -> Vec<BufferedPair> {
        for pair in &self.pairs {
            self.judge.observe(pair.labelled.judge_version, step);
        }
        let judge = self.judge;
        let is_superseded = step.saturating_sub(judge.since) > max_staleness;
        let is_stale = |pair: &mut BufferedPair| {
            let labelled = &pair.labelled;
            staleness(labelled, step) > max_staleness
                || is_superseded && labelled.judge_version < judge.newest
        };
        self.pairs.extract_if(.., is_stale).collect()
    }

    /// Removes the first `count` pairs in order of their prompts; `None` if there are fewer.
    pub(crate) fn pop(&mut self, count: usize) -> Option<Vec<BufferedPair>> {
        if self.pairs.len() < count {
            return None;
        }
        self.pairs.sort_by_key(|pair| pair.labelled.pair.id());
        Some(self.pairs.drain(..count).collect())
    }

    /// Removes the pair of this prompt, if present.
    pub(crate) fn remove(&mut self, id: PromptId) {
        self.pairs.retain(|pair| pair.labelled.pair.id() != id);
    }

    /// Copies of all pairs, for a checkpoint.
    pub(crate) fn pairs(&self) -> Vec<LabelledPair> {
        let pairs = self.pairs.iter();
        pairs.map(|pair| pair.labelled.clone()).collect()
    }
}

impl JudgeVersionTracker {
    fn observe(&mut self, judge: JudgeVersion, step: u64) {
        if judge > self.newest {
            *self = Self {
                newest: judge,
                since: step,
            };
        }
    }
}

/// Staleness of a pair at learner step `step`: steps since its weights were published.
pub(crate) fn staleness(labelled: &LabelledPair, step: u64) -> u64 {
    step.saturating_sub(labelled.pair.version.step)
}
