//! A judge for tests that writes down how it is called, and what it is asked about.

use std::sync::{Arc, Mutex};

use messages::{
    Completion, Finish, JudgeVersion, Pair, Probability, Prompt, PromptId, Purpose, Release, Seed,
    WeightsVersion,
};

use super::{Comparison, Judge, Verdict};
use crate::JudgeError;

type Answer = dyn FnMut(&[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> + Send;

/// Answers as it is told to.
pub(crate) struct FakeJudge {
    answer: Box<Answer>,
    antisymmetric: bool,
    calls: Calls,
}

/// How many comparisons each call of a [`FakeJudge`] had.
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

    /// What it writes down, also when the judge itself has gone elsewhere.
    pub(crate) fn calls(&self) -> Calls {
        self.calls.clone()
    }
}

impl Calls {
    /// The sizes of all calls so far.
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

/// A completion of this text and these tokens that ended by itself.
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

/// A prompt for training, number 0.
pub(crate) fn prompt() -> Prompt {
    Prompt {
        id: PromptId(0),
        release: Release::single(PromptId(0)),
        purpose: Purpose::Train,
        version: WeightsVersion::REFERENCE,
        seed: Seed(0),
        ids: vec![0],
        text: "say".into(),
        dialogue: None,
        golden: None,
        answer: None,
    }
}

/// A pair for training with completions of these texts.
pub(crate) fn pair(id: u64, texts: &[&str]) -> Pair {
    Pair {
        prompt: Prompt {
            id: PromptId(id),
            ..prompt()
        },
        version: WeightsVersion::REFERENCE,
        completions: texts.iter().map(|text| completion(text, &[1])).collect(),
        actor: "actor-0".into(),
    }
}
