//! What a learner asks for: one prompt, to be answered under given weights or newer ones.

use serde::{Deserialize, Serialize};

use crate::{Dialogue, PromptId, Seed, WeightsVersion};

/// A prompt on its way to an actor. It is also a credit: the learner sends no more of them than it is
/// ready to train on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Its place in the run's order.
    pub id: PromptId,
    /// Which prompts were sent together with it.
    pub release: Release,
    /// What the answers are for.
    pub purpose: Purpose,
    /// The oldest weights that may answer it.
    pub version: WeightsVersion,
    /// The seed of its completions' random streams.
    pub seed: Seed,
    /// The prompt's tokens, special tokens included.
    pub ids: Vec<u32>,
    /// The same for people: a text as it was given, of a dialogue what its tokens say, without special
    /// tokens. What judges read is [`Self::transcript`] or the dialogue itself.
    pub text: String,
    /// The dialogue that `ids` are the rendering of; none when the prompt was text. Judges with a chat
    /// template of their own read this.
    #[serde(with = "crate::dialogue::as_json")]
    pub dialogue: Option<Dialogue>,
    /// A golden answer's tokens, end-of-text included, when the prompt set has one.
    pub golden: Option<Vec<u32>>,
    /// The same as text: what an exact-match rule compares with.
    pub answer: Option<String>,
}

/// What a pair is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Training: completions from the behaviour policies of the settings.
    Train,
    /// Evaluation: the first completion from the policy, the second from the reference; these two are judged.
    /// Where the settings temper or truncate, a third one is the policy's from the whole distribution at
    /// temperature 1: the sample by which KL and entropy are estimated.
    Evaluate,
    /// A round of the adversarial game: the policy's own samples, to be held against the golden answer.
    Contest,
}

/// A run of consecutive prompts that were sent at one moment. An actor that works alone and strictly
/// on-policy starts a release only when it has all of it, which makes its batches, and so the last bit
/// of every logarithm, independent of timing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Release {
    /// The first prompt of the release.
    pub first: PromptId,
    /// How many prompts it holds.
    pub count: u32,
}

impl Release {
    /// The release of a prompt that waits for no other.
    #[must_use]
    pub fn single(id: PromptId) -> Self {
        Self {
            first: id,
            count: 1,
        }
    }
}
