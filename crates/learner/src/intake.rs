//! Labelled pairs in hand, and which of them a step may train on.

use messages::{DropReason, JudgeVersion, LabelledPair, PromptId};
use transport::Receipt;

/// Labelled pairs that wait for their step, in the order of their prompts.
#[derive(Default)]
pub(crate) struct Intake {
    pairs: Vec<InHand>,
    judge: Succession,
}

/// The newest judge whose labels were seen, and the step at which they were seen first.
#[derive(Clone, Copy, Default)]
struct Succession {
    newest: JudgeVersion,
    since: u64,
}

/// A pair and what acknowledges it; a pair from a checkpoint was acknowledged then.
pub(crate) struct InHand {
    pub(crate) labelled: LabelledPair,
    pub(crate) receipt: Option<Receipt>,
}

impl Intake {
    pub(crate) fn len(&self) -> usize {
        self.pairs.len()
    }

    pub(crate) fn add(&mut self, labelled: LabelledPair, receipt: Option<Receipt>) {
        self.pairs.push(InHand { labelled, receipt });
    }

    /// Takes out what is too old at learner step `step`: step − version > `max_staleness`, or labelled by
    /// a judge that a newer one took over from more than `max_staleness` steps ago.
    pub(crate) fn stale(&mut self, step: u64, max_staleness: u64) -> Vec<InHand> {
        for in_hand in &self.pairs {
            self.judge.see(in_hand.labelled.judge_version, step);
        }
        let judge = self.judge;
        let superseded = step.saturating_sub(judge.since) > max_staleness;
        let stale = |in_hand: &mut InHand| {
            let labelled = &in_hand.labelled;
            staleness(labelled, step) > max_staleness
                || superseded && labelled.judge_version < judge.newest
        };
        self.pairs.extract_if(.., stale).collect()
    }

    /// Takes out the first `count` pairs by prompt, when there are so many.
    pub(crate) fn batch(&mut self, count: usize) -> Option<Vec<InHand>> {
        if self.pairs.len() < count {
            return None;
        }
        self.pairs.sort_by_key(|in_hand| in_hand.labelled.pair.id());
        Some(self.pairs.drain(..count).collect())
    }

    /// Takes out the pair of this prompt, if it is there.
    pub(crate) fn forget(&mut self, id: PromptId) {
        self.pairs
            .retain(|in_hand| in_hand.labelled.pair.id() != id);
    }

    /// What a checkpoint keeps.
    pub(crate) fn pairs(&self) -> Vec<LabelledPair> {
        self.pairs
            .iter()
            .map(|in_hand| in_hand.labelled.clone())
            .collect()
    }
}

impl Succession {
    fn see(&mut self, judge: JudgeVersion, step: u64) {
        if judge > self.newest {
            *self = Self {
                newest: judge,
                since: step,
            };
        }
    }
}

/// How many steps ago the pair's weights were the newest.
pub(crate) fn staleness(labelled: &LabelledPair, step: u64) -> u64 {
    step.saturating_sub(labelled.pair.version.step)
}

/// Why a pair that has come cannot be trained on at all.
pub(crate) fn unsound(labelled: &LabelledPair) -> Option<DropReason> {
    let completions = &labelled.pair.completions;
    let sound = completions.len() > 1
        && completions
            .iter()
            .all(|c| !c.ids.is_empty() && c.is_sound());
    let rows = !labelled.labels.is_empty()
        && labelled
            .labels
            .iter()
            .all(|l| l.first < l.second && usize::from(l.second) < completions.len());
    let scores = labelled.scores.as_ref();
    let scored = scores.is_none_or(|scores| scores.len() == completions.len());
    (!sound || !rows || !scored).then_some(DropReason::Poisoned)
}
