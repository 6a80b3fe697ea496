//! Prompts, which the learner sends to actors; each requires a minimum weights version.

use serde::{Deserialize, Serialize};

use crate::{
    dialogue::Dialogue,
    id::{PromptId, Seed, WeightsVersion},
};

/// A prompt sent to an actor. It is also a credit: the learner sends only as many prompts as it has room to train
/// on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Index in the run's order.
    pub id: PromptId,
    /// Prompts that were sent together with it.
    pub prompt_batch: PromptBatch,
    /// Purpose of the completions.
    pub purpose: Purpose,
    /// Oldest weights that may sample its completions.
    pub version: WeightsVersion,
    /// Seed of its completions' random streams.
    pub seed: Seed,
    /// Prompt tokens, special tokens included.
    pub ids: Vec<u32>,
    /// Prompt text for display: the given text, or for a dialogue the decoded tokens without special tokens.
    /// Judges read [`Self::transcript`] or the dialogue instead.
    pub text: String,
    /// Dialogue that `ids` were rendered from; none if the prompt was text. Read by judges with a chat template of
    /// their own.
    #[serde(with = "crate::dialogue::as_json")]
    pub dialogue: Option<Dialogue>,
    /// Tokens of the golden answer, end-of-text included, if the prompt set has one.
    pub golden: Option<Vec<u32>>,
    /// Text of the golden answer, for exact-match rules.
    pub answer: Option<String>,
    /// Value of the column that decides which member of a routing judge compares the completions.
    pub route: Option<String>,
}

/// Purpose of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Training: completions are sampled from the configured behaviour policies.
    Train,
    /// Evaluation: the first completion is the policy's, the second that of the reference at the start of the run;
    /// these two are judged. If the settings temper or truncate, a third is sampled from the policy's full distribution
    /// at temperature 1, for the KL and entropy estimates.
    Evaluate,
    /// Adversarial preference optimisation (APO): policy samples, compared with the golden answer.
    Apo,
    /// Training on a pair from a file: its completions were not sampled in this run, so nothing was recorded of them.
    File,
    /// As [`Self::Evaluate`], with the moving average of the policy's weights in place of the policy.
    EvaluateAverage,
    /// As [`Self::Evaluate`], against the current reference, which has moved since the start.
    EvaluateReference,
}

impl Purpose {
    /// Whether the completions are compared to evaluate weights, and not trained on.
    #[must_use]
    pub fn is_evaluation(self) -> bool {
        match self {
            Self::Evaluate | Self::EvaluateAverage | Self::EvaluateReference => true,
            Self::Train | Self::Apo | Self::File => false,
        }
    }
}

/// Consecutive prompts that were sent together. A single strictly on-policy actor starts a batch only when all of
/// it has arrived, so that its decoding batches, and thus the last bit of every log-probability, do not depend on
/// timing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PromptBatch {
    /// First prompt of the batch.
    pub first: PromptId,
    /// Number of prompts in the batch.
    pub count: u32,
}

impl PromptBatch {
    /// A batch of one prompt.
    #[must_use]
    pub fn single(id: PromptId) -> Self {
        Self {
            first: id,
            count: 1,
        }
    }
}

/// Pacing of prompts: whether they are sent and started one by one or as whole batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pacing {
    /// The learner sends a prompt as soon as it has a credit; an actor starts it as soon as it has a free slot.
    EachPrompt,
    /// The learner sends all prompts that a step lacks as one [`PromptBatch`], and only when none is outstanding;
    /// an actor starts a batch when all of it has arrived. What is sampled together then does not depend on
    /// timing, so a strictly on-policy run with one actor is bit-reproducible.
    Batched,
}
