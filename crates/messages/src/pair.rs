//! What actors and preference services make: completions, pairs of them, and their labels.

use serde::{Deserialize, Serialize};

use crate::{JudgeVersion, Probability, Prompt, PromptId, WeightsVersion};

/// One answer to a prompt, with what the actor saw while it wrote it.
///
/// The three log-probabilities have one entry per token of `ids`, natural logarithms. `logp` and
/// `ref_logp` are those of the full distribution at temperature 1; `behaviour_logp` is that of the
/// distribution the token was drawn from: mixed, tempered, truncated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// The response tokens, end-of-text included when the model wrote it.
    pub ids: Vec<u32>,
    /// Why the completion ended.
    pub finish: Finish,
    /// The weight on the reference in the policy that wrote it: 0 the policy, 1 the reference.
    pub mixture_coef: f32,
    /// log π of each token under the pair's weights version.
    pub logp: Vec<f32>,
    /// log ref of each token.
    pub ref_logp: Vec<f32>,
    /// The log-probability of each token under the distribution it was drawn from.
    pub behaviour_logp: Vec<f32>,
    /// The text without special tokens, for people and for judges that read text: what follows the
    /// prompt's text, a space between them included.
    pub text: String,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Finish {
    /// The model wrote its end-of-text token.
    EndOfText,
    /// It reached `max_new_tokens`.
    Length,
}

/// A prompt and its completions: two, or `num_generations`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// What was asked.
    pub prompt: Prompt,
    /// The weights that answered.
    pub version: WeightsVersion,
    /// The answers, at least two.
    pub completions: Vec<Completion>,
    /// Which actor wrote them.
    pub actor: String,
}

/// A judge's answer about two completions of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// The index of the first completion.
    pub first: u16,
    /// The index of the second; larger than `first`.
    pub second: u16,
    /// The probability that the first is preferred to the second.
    pub p: Probability,
}

/// A pair that a preference service has judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelledPair {
    /// What was judged.
    pub pair: Pair,
    /// One label for every two completions, i < j, in lexicographic order.
    pub labels: Vec<Label>,
    /// The judge's name.
    pub judge: String,
    /// The judge's version.
    pub judge_version: JudgeVersion,
    /// Every completion's score, where the judge gives completions scores of their own.
    pub scores: Option<Vec<f32>>,
    /// The known gold preference for the first completion over the second, where a world has one and
    /// the pair is for evaluation.
    pub gold: Option<Probability>,
}

/// A place where messages are taken, given and dropped, and all three are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Station {
    /// Where prompts become pairs.
    Actor,
    /// Where pairs become labelled pairs.
    Preference,
    /// Where labelled pairs become weights.
    Learner,
}

/// Why a station gave nothing for what it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// All completions are the same: nothing to prefer.
    Identical,
    /// The station could not do its work on this message.
    Failed,
    /// The judge declined to answer.
    Abstained,
    /// The pair is older than `max_staleness` allows.
    Stale,
    /// The pair has been trained on already.
    Duplicate,
    /// The pair holds a number that is not finite.
    Poisoned,
    /// A session that was given up had sent the prompt, or had published the weights that answered.
    Superseded,
}

/// The note that takes a dropped prompt's credit back to the learner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// What was dropped.
    pub prompt: PromptId,
    /// The session that had sent it.
    pub session: u64,
    /// Where.
    pub station: Station,
    /// Why.
    pub reason: DropReason,
    /// Of a prompt whose completions were all the same: their log π/ref in nats, as the actor recorded it.
    /// Without it a mean over the pairs that were not dropped would be biased.
    pub log_ratio: Option<f32>,
    /// For people: what happened.
    pub detail: String,
}

impl Station {
    /// The name in metrics and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Actor => "actor",
            Self::Preference => "preference",
            Self::Learner => "learner",
        }
    }
}

impl DropReason {
    /// The name in metrics and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Identical => "identical",
            Self::Failed => "failed",
            Self::Abstained => "abstained",
            Self::Stale => "stale",
            Self::Duplicate => "duplicate",
            Self::Poisoned => "poisoned",
            Self::Superseded => "superseded",
        }
    }
}

impl Completion {
    /// log π(y|x): the sum over response tokens, end-of-text included.
    #[must_use]
    pub fn sum_logp(&self) -> f64 {
        self.logp.iter().map(|&l| f64::from(l)).sum()
    }

    /// log ref(y|x), summed like [`Self::sum_logp`].
    #[must_use]
    pub fn sum_ref_logp(&self) -> f64 {
        self.ref_logp.iter().map(|&l| f64::from(l)).sum()
    }

    /// log π(y|x) − log ref(y|x) in nats, both as recorded.
    #[must_use]
    pub fn log_ratio(&self) -> f32 {
        (self.sum_logp() - self.sum_ref_logp()) as f32
    }

    /// Whether every recorded number is finite and there is one of each per token.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        [&self.logp, &self.ref_logp, &self.behaviour_logp]
            .iter()
            .all(|l| l.len() == self.ids.len() && l.iter().all(|x| x.is_finite()))
    }
}

impl Pair {
    /// The id of everything made from this pair's prompt.
    #[must_use]
    pub fn id(&self) -> PromptId {
        self.prompt.id
    }

    /// Whether all completions have the same tokens.
    #[must_use]
    pub fn is_identical(&self) -> bool {
        self.completions
            .windows(2)
            .all(|two| two[0].ids == two[1].ids)
    }
}
