//! Judge for tests with recorded calls, and builders of prompts, completions and pairs.

use std::sync::{Arc, Mutex};

use messages::{
    Completion, CompletionCounts, Finish, JudgeVersion, MessageLimits, Pair, Probability, Prompt,
    PromptBatch, PromptId, Purpose, Seed, WeightsVersion,
};

use crate::error::JudgeError;
use crate::judge::{Comparison, Judge, Verdict};

type AnswerFn = dyn FnMut(&[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> + Send;

/// Answers with a closure.
pub(crate) struct FakeJudge {
    answer: Box<AnswerFn>,
    antisymmetric: bool,
    calls: Calls,
}

/// Batch size of every call of a [`FakeJudge`].
#[derive(Clone, Default)]
pub(crate) struct Calls(Arc<Mutex<Vec<usize>>>);

impl FakeJudge {
    /// Answers every batch with `answer`.
    pub(crate) fn new(
        answer: impl FnMut(&[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> + Send + 'static,
    ) -> Self {
        Self {
            answer: Box::new(answer),
            antisymmetric: false,
            calls: Calls::default(),
        }
    }

    /// Answers every comparison with `answer`.
    pub(crate) fn answering(
        mut answer: impl FnMut(&Comparison<'_>) -> Verdict + Send + 'static,
    ) -> Self {
        Self::new(move |batch| Ok(batch.iter().map(&mut answer).collect()))
    }

    /// The same, claiming antisymmetry.
    pub(crate) fn antisymmetric(self) -> Self {
        Self {
            antisymmetric: true,
            ..self
        }
    }

    /// Recorded calls; valid after the judge was moved.
    pub(crate) fn calls(&self) -> Calls {
        self.calls.clone()
    }
}

impl Calls {
    /// Batch sizes of all calls so far.
    pub(crate) fn recorded(&self) -> Vec<usize> {
        self.0.lock().unwrap().clone()
    }
}

impl Judge for FakeJudge {
    fn name(&self) -> &str {
        "fake"
    }

    fn version(&self) -> JudgeVersion {
        JudgeVersion(7)
    }

    fn is_antisymmetric(&self) -> bool {
        self.antisymmetric
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        self.calls.0.lock().unwrap().push(batch.len());
        (self.answer)(batch)
    }
}

/// The verdict of this probability.
pub(crate) fn preferred(p: f32) -> Verdict {
    Verdict::Preference(Probability::new(p).unwrap())
}

/// The abstention for this reason.
pub(crate) fn abstained(reason: &str) -> Verdict {
    Verdict::Abstained {
        reason: reason.into(),
    }
}

/// A completion with this text and these tokens that ended with end-of-text.
pub(crate) fn completion(text: &str, ids: &[u32]) -> Completion {
    Completion {
        ids: ids.to_vec(),
        finish: Finish::EndOfText,
        mixture_coef: 0.0,
        logp: vec![-1.0; ids.len()],
        ref_logp: vec![-1.0; ids.len()],
        behaviour_logp: vec![-1.0; ids.len()],
        text: text.into(),
    }
}

/// A training prompt with id 0.
pub(crate) fn prompt() -> Prompt {
    Prompt {
        id: PromptId(0),
        prompt_batch: PromptBatch::single(PromptId(0)),
        purpose: Purpose::Train,
        version: WeightsVersion::REFERENCE,
        seed: Seed(0),
        ids: vec![0],
        text: "say".into(),
        dialogue: None,
        golden: None,
        answer: None,
        route: None,
    }
}

/// Limits of a run whose training pairs have this number of completions.
pub(crate) fn message_limits(completions: usize) -> MessageLimits {
    MessageLimits {
        vocabulary: 8,
        prompt_tokens: 4,
        golden_tokens: None,
        completion_tokens: 4,
        file_tokens: None,
        completions: CompletionCounts {
            train: completions,
            evaluate: 2,
            apo: 2,
        },
        batch_prompts: 8,
        lead_steps: 8,
        newest: WeightsVersion::REFERENCE,
    }
}

/// A training pair whose completions have these texts.
pub(crate) fn pair(id: u64, texts: &[&str]) -> Pair {
    Pair {
        prompt: Prompt {
            id: PromptId(id),
            prompt_batch: PromptBatch::single(PromptId(id)),
            ..prompt()
        },
        version: WeightsVersion::REFERENCE,
        completions: texts.iter().map(|text| completion(text, &[1])).collect(),
        actor: "actor-0".into(),
    }
}
