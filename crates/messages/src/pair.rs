//! Completions, pairs and labels: the output of actors and preference services.

use serde::{Deserialize, Serialize};

use crate::{
    id::{JudgeVersion, PromptId, WeightsVersion},
    probability::Probability,
    prompt::Prompt,
};

/// One completion of a prompt, with the log-probabilities recorded while sampling.
///
/// The three log-probabilities have one entry per token of `ids`, in nats; a completion from a file has none of them, and
/// one of the policy alone may lack `ref_logp`, which the learner computes anyway. `logp` and `ref_logp` are under the
/// full distribution at temperature 1; `behaviour_logp` is under the sampling distribution: mixed, tempered, truncated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Response tokens, end-of-text included if it was sampled.
    pub ids: Vec<u32>,
    /// Reason why the completion ended.
    pub finish: Finish,
    /// Weight of the reference in the behaviour policy's mixture: 0 is the policy, 1 the reference.
    pub mixture_coef: f32,
    /// log π of each token under the pair's weights version.
    pub logp: Vec<f32>,
    /// log ref of each token, under the reference of the pair's weights version; empty if no actor computed it. The learner
    /// fills it in, under its own reference, once it has taken a step on the pair.
    pub ref_logp: Vec<f32>,
    /// Log-probability of each token under the distribution it was sampled from.
    pub behaviour_logp: Vec<f32>,
    /// Text without special tokens, as it follows the prompt's text (any space between them included); for
    /// display and for judges that read text.
    pub text: String,
}

/// Reason why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Finish {
    /// The end-of-text token was sampled.
    EndOfText,
    /// `max_new_tokens` was reached.
    Length,
}

/// A prompt with its completions: two, or `num_generations`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The prompt.
    pub prompt: Prompt,
    /// Version of the weights that sampled the completions: of the policy, and of the reference that is published with
    /// it.
    pub version: WeightsVersion,
    /// Completions, at least two.
    pub completions: Vec<Completion>,
    /// Name of the actor that sampled them.
    pub actor: String,
}

/// A judge's preference between two completions of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// Index of the first completion.
    pub first: u16,
    /// Index of the second completion; larger than `first`.
    pub second: u16,
    /// Probability that the first is preferred to the second, as it is trained on.
    pub p: Probability,
    /// The judge's own probability, before penalties of labels; `None` if no judge gave the label, but a file.
    pub judged: Option<Probability>,
}

/// A pair with the labels of a preference service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelledPair {
    /// The pair.
    pub pair: Pair,
    /// One label for each pair of completions i < j, in lexicographic order; in the learner those that are trained on.
    pub labels: Vec<Label>,
    /// Name of the judge.
    pub judge: String,
    /// Version of the judge.
    pub judge_version: JudgeVersion,
    /// Score of each completion, if the judge scores completions individually.
    pub scores: Option<Vec<f32>>,
    /// Verdicts of the evaluation judges, by name; only of evaluation pairs.
    pub verdicts: Vec<EvaluationVerdict>,
}

/// Verdict of an evaluation judge, which gives no labels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationVerdict {
    /// The judge's name; [`GOLD`] is the playground's known preference.
    pub judge: String,
    /// Probability that the first completion is preferred to the second.
    pub p: Probability,
}

/// Name of the judge with the true preference, where that is known.
pub const GOLD: &str = "gold";

/// A pipeline stage. Messages received, emitted and dropped are counted per stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Turns prompts into pairs.
    Actor,
    /// Turns pairs into labelled pairs.
    Preference,
    /// Turns labelled pairs into weights.
    Learner,
}

/// Reason why a stage dropped a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// All completions are identical: no preference to learn.
    Identical,
    /// The stage failed to process the message.
    Failed,
    /// The judge abstained.
    Abstained,
    /// The pair's weights are more than `max_staleness` steps old, or its judge was superseded by an APO round that long
    /// ago.
    Stale,
    /// The pair was trained on before.
    Duplicate,
    /// The message does not fit the run, or the step on it was not finite.
    Invalid,
    /// The prompt, or the weights that sampled its completions, came from an abandoned session.
    Superseded,
    /// No label of the pair is far enough from even odds.
    NoSignal,
}

/// The note that returns a dropped prompt's credit to the learner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// Id of the prompt.
    pub prompt: PromptId,
    /// Session that sent the prompt.
    pub session: u64,
    /// Stage that dropped it.
    pub stage: Stage,
    /// Reason for the drop.
    pub reason: DropReason,
    /// log π/ref in nats, as the actor recorded it under the weights and the reference that it had, for a prompt whose
    /// completions were identical. Without it the mean over the remaining pairs would be biased.
    pub log_ratio: Option<f32>,
    /// Human-readable explanation.
    pub detail: String,
}

impl LabelledPair {
    /// Gold probability that the first completion is preferred to the second, where it is known.
    #[must_use]
    pub fn gold(&self) -> Option<Probability> {
        self.verdict_of(GOLD)
    }

    /// The verdict of this evaluation judge, where it gave one.
    #[must_use]
    pub fn verdict_of(&self, judge: &str) -> Option<Probability> {
        let verdict = self.verdicts.iter().find(|verdict| verdict.judge == judge);
        verdict.map(|verdict| verdict.p)
    }
}

impl Dropped {
    /// Longest explanation in bytes.
    pub const MAX_DETAIL_BYTES: usize = 4096;

    /// The explanation `detail`, cut to [`Self::MAX_DETAIL_BYTES`].
    #[must_use]
    pub fn shortened(mut detail: String) -> String {
        detail.truncate(detail.floor_char_boundary(Self::MAX_DETAIL_BYTES));
        detail
    }
}

impl Stage {
    /// Name in metrics and reports.
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
    /// Name in metrics and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Identical => "identical",
            Self::Failed => "failed",
            Self::Abstained => "abstained",
            Self::Stale => "stale",
            Self::Duplicate => "duplicate",
            Self::Invalid => "invalid",
            Self::Superseded => "superseded",
            Self::NoSignal => "no_signal",
        }
    }
}

impl Completion {
    /// Whether all of these completions have the same tokens.
    #[must_use]
    pub fn are_identical(completions: &[Self]) -> bool {
        completions.windows(2).all(|two| two[0].ids == two[1].ids)
    }

    /// log π(y|x) in nats: the sum over response tokens, end-of-text included.
    #[must_use]
    pub fn sum_logp(&self) -> f64 {
        self.logp.iter().map(|&l| f64::from(l)).sum()
    }

    /// log ref(y|x) in nats, summed like [`Self::sum_logp`]; `None` if it was not recorded.
    #[must_use]
    pub fn sum_ref_logp(&self) -> Option<f64> {
        let sum = || self.ref_logp.iter().map(|&l| f64::from(l)).sum();
        (!self.ref_logp.is_empty()).then(sum)
    }

    /// log π(y|x) − log ref(y|x) in nats, both as recorded; `None` if log ref was not.
    #[must_use]
    pub fn log_ratio(&self) -> Option<f64> {
        Some(self.sum_logp() - self.sum_ref_logp()?)
    }

    /// A completion that was not sampled in the run, so that nothing was recorded of it.
    #[must_use]
    pub fn unrecorded(ids: Vec<u32>, finish: Finish, text: String) -> Self {
        Self {
            ids,
            finish,
            mixture_coef: 0.0,
            logp: Vec::new(),
            ref_logp: Vec::new(),
            behaviour_logp: Vec::new(),
            text,
        }
    }

    /// Whether log-probabilities were recorded: not those of a completion from a file.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        [&self.logp, &self.ref_logp, &self.behaviour_logp]
            .iter()
            .any(|recorded| !recorded.is_empty())
    }

    /// Whether all log-probabilities are finite and there is one of each kind per token; of the policy's own completions
    /// those under the reference may be missing.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let lacks_reference = self.ref_logp.is_empty() && self.mixture_coef == 0.0;
        let is_complete =
            |l: &Vec<f32>| l.len() == self.ids.len() && l.iter().all(|x| x.is_finite());
        is_complete(&self.logp)
            && is_complete(&self.behaviour_logp)
            && (lacks_reference || is_complete(&self.ref_logp))
    }
}

impl Pair {
    /// Id of the pair's prompt, which is also the pair's.
    #[must_use]
    pub fn id(&self) -> PromptId {
        self.prompt.id
    }

    /// All i < j of its completions in lexicographic order; of an evaluation pair only the policy's and the
    /// reference's completion. Empty for fewer than two completions, and for more than `u16` can index.
    pub fn compared(&self) -> impl Iterator<Item = (u16, u16)> {
        let count = match self.prompt.purpose {
            purpose if purpose.is_evaluation() => self.completions.len().min(2),
            _ => self.completions.len(),
        };
        let count = u16::try_from(count).unwrap_or(0);
        (0..count).flat_map(move |i| (i + 1..count).map(move |j| (i, j)))
    }

    /// Whether all completions have the same tokens.
    #[must_use]
    pub fn is_identical(&self) -> bool {
        Completion::are_identical(&self.completions)
    }
}
