//! Checks of received messages against the limits of the run.
//!
//! Promises that a message which passes fits the run: its tokens are in the vocabulary, its lengths and counts are
//! those of the settings, its numbers are finite, and its weights were announced. Does not know where a message comes from,
//! what the stages know of one another, or what follows an invalid message.

use std::collections::HashSet;

use thiserror::Error;

use crate::{
    id::{PromptId, WeightsVersion},
    pair::{Completion, DropReason, Dropped, LabelledPair, Pair, Stage},
    prompt::{Prompt, Purpose},
};

/// Longest name of an actor or a judge in bytes. A judge may be named by a path.
const MAX_NAME_BYTES: usize = 4096;

/// Limits of a run's messages; the same at all its stages, except `newest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MessageLimits {
    /// Size of the policy's vocabulary: all token ids are below it.
    pub vocabulary: usize,
    /// Longest prompt in tokens.
    pub prompt_tokens: usize,
    /// Longest prompt together with its golden answer in tokens; `None` if no model reads golden answers.
    pub golden_tokens: Option<usize>,
    /// Longest completion in tokens.
    pub completion_tokens: usize,
    /// Longest prompt together with a completion, in tokens, of a pair from a file; `None` if no pairs are read.
    pub file_tokens: Option<usize>,
    /// Completions per prompt.
    pub completions: CompletionCounts,
    /// Largest number of prompts of a batch.
    pub batch_prompts: usize,
    /// Largest number of steps by which a prompt's weights may be ahead of the announced ones.
    pub lead_steps: u64,
    /// Newest announced weights, as the stage that checks knows them.
    pub newest: WeightsVersion,
}

/// Number of completions per prompt, by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompletionCounts {
    /// Of training prompts.
    pub train: usize,
    /// Of evaluation prompts.
    pub evaluate: usize,
    /// Of prompts for adversarial preference optimisation (APO).
    pub apo: usize,
}

/// Reason why a message does not fit the run.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidMessage {
    /// A token outside the vocabulary.
    #[error("{what} has token {token}, which is not in the vocabulary of {vocabulary} tokens")]
    Token {
        /// Part of the message.
        what: &'static str,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// Too few or too many tokens.
    #[error("{what} has {found} tokens; from 1 to {most} are possible")]
    Length {
        /// Part of the message.
        what: &'static str,
        /// Number of tokens.
        found: usize,
        /// Largest number of tokens.
        most: usize,
    },
    /// Another number of completions than the settings ask for.
    #[error("the pair has {found} completions; the settings ask for {expected}")]
    Completions {
        /// Number of completions.
        found: usize,
        /// Number of completions that the settings ask for.
        expected: usize,
    },
    /// Numbers that are not finite, out of range, or not one per token or completion.
    #[error("{what} must be finite numbers, one per {of}")]
    Numbers {
        /// Part of the message.
        what: &'static str,
        /// Unit for which there is one number.
        of: &'static str,
    },
    /// Log-probabilities, or a mixture, of a completion that was not sampled in the run.
    #[error("a completion from a file has recorded log-probabilities or a mixture coefficient")]
    Recorded,
    /// A mixture coefficient that is not a weight.
    #[error("the mixture coefficient of a completion is {0}; it is from 0 to 1")]
    Mixture(String),
    /// Labels that are not those of the completions.
    #[error("the labels are not one for each compared pair of completions, in order")]
    Labels,
    /// Verdicts of evaluation judges that are not one a judge, or not of an evaluation pair.
    #[error("the verdicts are not one for each evaluation judge of an evaluation pair")]
    Verdicts,
    /// A prompt outside its own batch.
    #[error("{id} is not one of the {count} prompts from {first} of its batch")]
    Batch {
        /// The prompt.
        id: PromptId,
        /// First prompt of the batch.
        first: PromptId,
        /// Number of prompts in the batch.
        count: u32,
    },
    /// More prompts in a batch than are ever sent together: an actor would wait for the rest for ever.
    #[error("its batch has {count} prompts; at most {most} are sent together")]
    BatchSize {
        /// Number of prompts in the batch.
        count: u32,
        /// Largest number of prompts.
        most: usize,
    },
    /// A pair from a file in a run without files of pairs.
    #[error("it is a pair from a file, and the run reads no files of pairs")]
    NoFiles,
    /// A prompt to answer whose pair is in a file.
    #[error("it is the prompt of a pair from a file, which has its completions")]
    Answered,
    /// Weights, or a session, that no announcement has named.
    #[error("it names weights {found}; the newest announced weights are {newest}")]
    Unannounced {
        /// The named weights.
        found: WeightsVersion,
        /// The newest announced weights.
        newest: WeightsVersion,
    },
    /// Completions sampled with weights that are older than the prompt requires.
    #[error("its completions are of weights {found}; its prompt requires {required} or newer")]
    Outdated {
        /// Weights that sampled the completions.
        found: WeightsVersion,
        /// Oldest weights that may sample them.
        required: WeightsVersion,
    },
    /// A name or an explanation that is too long.
    #[error("{what} has {bytes} bytes; at most {most} are possible")]
    Text {
        /// Part of the message.
        what: &'static str,
        /// Length of the text in bytes.
        bytes: usize,
        /// Longest length in bytes.
        most: usize,
    },
    /// A drop note with a reason that its stage does not have.
    #[error("the stage {} does not drop messages as {}", .stage.name(), .reason.name())]
    Reason {
        /// The stage.
        stage: Stage,
        /// The reason.
        reason: DropReason,
    },
    /// A pair whose prompt is not the one that was sent under its id.
    #[error("its prompt is not the one that was sent as {0}")]
    Foreign(PromptId),
}

impl MessageLimits {
    fn check_tokens(&self, what: &'static str, ids: &[u32]) -> Result<(), InvalidMessage> {
        let vocabulary = self.vocabulary;
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            None => Ok(()),
            Some(&token) => Err(InvalidMessage::Token {
                what,
                token,
                vocabulary,
            }),
        }
    }

    /// Checks the weights that a prompt requires. Prompts are sent while their weights are being uploaded, so the step
    /// may be ahead of the announced one; the session may not.
    fn check_required(&self, found: WeightsVersion) -> Result<(), InvalidMessage> {
        let newest = self.newest;
        let ahead = found.step.saturating_sub(newest.step);
        if found.session < newest.session
            || found.session == newest.session && ahead <= self.lead_steps
        {
            return Ok(());
        }
        Err(InvalidMessage::Unannounced { found, newest })
    }

    /// Checks weights that were loaded, so that they must have been announced.
    fn check_loaded(&self, found: WeightsVersion) -> Result<(), InvalidMessage> {
        let newest = self.newest;
        match found <= newest {
            true => Ok(()),
            false => Err(InvalidMessage::Unannounced { found, newest }),
        }
    }

    fn completions_of(&self, purpose: Purpose) -> usize {
        match purpose {
            Purpose::Train => self.completions.train,
            Purpose::Evaluate | Purpose::EvaluateAverage | Purpose::EvaluateReference => {
                self.completions.evaluate
            }
            Purpose::Apo => self.completions.apo,
            Purpose::File => 2,
        }
    }

    /// Longest prompt of this purpose, in tokens.
    fn prompt_tokens_of(&self, purpose: Purpose) -> Result<usize, InvalidMessage> {
        match purpose {
            Purpose::File => self.file_tokens.ok_or(InvalidMessage::NoFiles),
            _ => Ok(self.prompt_tokens),
        }
    }
}

impl Prompt {
    /// Checks the prompt against the limits of the run.
    ///
    /// # Errors
    /// The first limit that it exceeds.
    pub fn check(&self, limits: &MessageLimits) -> Result<(), InvalidMessage> {
        let length = self.ids.len();
        let most = limits.prompt_tokens_of(self.purpose)?;
        check_length("the prompt", length, most)?;
        limits.check_tokens("the prompt", &self.ids)?;
        if let Some(golden) = &self.golden {
            limits.check_tokens("the golden answer", golden)?;
            let most = limits.golden_tokens.unwrap_or(usize::MAX);
            let both = length.saturating_add(golden.len());
            check_length("the prompt with its golden answer", both, most)?;
        }
        self.check_batch(limits.batch_prompts)?;
        limits.check_required(self.version)
    }

    /// As [`Self::check`], for a prompt that an actor is to answer.
    ///
    /// # Errors
    /// As there, and when its pair is in a file.
    pub fn check_open(&self, limits: &MessageLimits) -> Result<(), InvalidMessage> {
        match self.purpose {
            Purpose::File => Err(InvalidMessage::Answered),
            _ => self.check(limits),
        }
    }

    fn check_batch(&self, most: usize) -> Result<(), InvalidMessage> {
        let (id, batch) = (self.id, self.prompt_batch);
        let count = batch.count;
        if count as usize > most {
            return Err(InvalidMessage::BatchSize { count, most });
        }
        match id.0.checked_sub(batch.first.0) {
            Some(place) if place < u64::from(count) => Ok(()),
            _ => Err(InvalidMessage::Batch {
                id,
                first: batch.first,
                count,
            }),
        }
    }
}

impl Pair {
    /// Checks the pair and its prompt against the limits of the run.
    ///
    /// # Errors
    /// The first limit that it exceeds.
    pub fn check(&self, limits: &MessageLimits) -> Result<(), InvalidMessage> {
        self.prompt.check(limits)?;
        limits.check_loaded(self.version)?;
        let (found, required) = (self.version, self.prompt.version);
        if found < required {
            return Err(InvalidMessage::Outdated { found, required });
        }
        let expected = limits.completions_of(self.prompt.purpose);
        let found = self.completions.len();
        if found != expected {
            return Err(InvalidMessage::Completions { found, expected });
        }
        check_text("the name of the actor", &self.actor, MAX_NAME_BYTES)?;
        let mut completions = self.completions.iter();
        match self.prompt.purpose {
            Purpose::File => completions.try_for_each(|c| c.check_given(&self.prompt, limits)),
            purpose => completions.try_for_each(|c| c.check(purpose, limits)),
        }
    }
}

impl Completion {
    fn check(&self, purpose: Purpose, limits: &MessageLimits) -> Result<(), InvalidMessage> {
        check_length("a completion", self.ids.len(), limits.completion_tokens)?;
        limits.check_tokens("a completion", &self.ids)?;
        if !(0.0..=1.0).contains(&self.mixture_coef) {
            return Err(InvalidMessage::Mixture(self.mixture_coef.to_string()));
        }
        // An evaluation measures the distance from the reference.
        let lacks_reference = purpose.is_evaluation() && self.ref_logp.is_empty();
        match self.is_valid() && !lacks_reference {
            true => Ok(()),
            false => Err(InvalidMessage::Numbers {
                what: "the log-probabilities of a completion",
                of: "token",
            }),
        }
    }

    /// Checks a completion from a file: it has no log-probabilities, and its length is limited with its prompt's.
    fn check_given(&self, prompt: &Prompt, limits: &MessageLimits) -> Result<(), InvalidMessage> {
        let most = limits.file_tokens.ok_or(InvalidMessage::NoFiles)?;
        let most = most.saturating_sub(prompt.ids.len());
        check_length("a completion from a file", self.ids.len(), most)?;
        limits.check_tokens("a completion", &self.ids)?;
        match self.is_recorded() || self.mixture_coef != 0.0 {
            false => Ok(()),
            true => Err(InvalidMessage::Recorded),
        }
    }
}

impl LabelledPair {
    /// Checks the pair, its labels and its scores against the limits of the run.
    ///
    /// # Errors
    /// The first limit that it exceeds.
    pub fn check(&self, limits: &MessageLimits) -> Result<(), InvalidMessage> {
        self.pair.check(limits)?;
        check_text("the name of the judge", &self.judge, MAX_NAME_BYTES)?;
        let labels = self.labels.iter().map(|label| (label.first, label.second));
        let is_labelled = match self.pair.prompt.purpose {
            Purpose::Apo => self.labels.is_empty(),
            _ => labels.eq(self.pair.compared()),
        };
        if !is_labelled {
            return Err(InvalidMessage::Labels);
        }
        self.check_verdicts()?;
        let completions = self.pair.completions.len();
        let are_numbers = |scores: &Vec<f32>| {
            scores.len() == completions && scores.iter().all(|score| score.is_finite())
        };
        match self.scores.as_ref().is_none_or(are_numbers) {
            true => Ok(()),
            false => Err(InvalidMessage::Numbers {
                what: "the scores",
                of: "completion",
            }),
        }
    }
}

impl LabelledPair {
    /// Checks the verdicts of the evaluation judges: at most one a judge, and only of an evaluation pair.
    fn check_verdicts(&self) -> Result<(), InvalidMessage> {
        let mut judges = HashSet::new();
        for verdict in &self.verdicts {
            check_text("the name of a judge", &verdict.judge, MAX_NAME_BYTES)?;
            if !self.pair.prompt.purpose.is_evaluation() || !judges.insert(&verdict.judge) {
                return Err(InvalidMessage::Verdicts);
            }
        }
        Ok(())
    }
}

impl Dropped {
    /// Checks the drop note against the limits of the run.
    ///
    /// # Errors
    /// The first limit that it exceeds.
    pub fn check(&self, limits: &MessageLimits) -> Result<(), InvalidMessage> {
        // The note of an invalid message names whatever session that message named.
        if self.reason != DropReason::Invalid {
            limits.check_loaded(WeightsVersion {
                session: self.session,
                step: 0,
            })?;
        }
        if !self.stage.has_reason(self.reason) {
            return Err(InvalidMessage::Reason {
                stage: self.stage,
                reason: self.reason,
            });
        }
        if self.log_ratio.is_some_and(|ratio| !ratio.is_finite()) {
            return Err(InvalidMessage::Numbers {
                what: "the log-ratios",
                of: "completion",
            });
        }
        check_text("the explanation", &self.detail, Self::MAX_DETAIL_BYTES)
    }
}

impl Stage {
    /// Whether the stage sends drop notes with this reason.
    fn has_reason(self, reason: DropReason) -> bool {
        use DropReason::{Abstained, Failed, Identical, Invalid, Superseded};
        match self {
            Self::Actor => [Identical, Failed, Invalid, Superseded].contains(&reason),
            Self::Preference => [Abstained, Failed, Invalid].contains(&reason),
            Self::Learner => false,
        }
    }
}

fn check_length(what: &'static str, found: usize, most: usize) -> Result<(), InvalidMessage> {
    match (1..=most).contains(&found) {
        true => Ok(()),
        false => Err(InvalidMessage::Length { what, found, most }),
    }
}

fn check_text(what: &'static str, text: &str, most: usize) -> Result<(), InvalidMessage> {
    let bytes = text.len();
    match bytes <= most {
        true => Ok(()),
        false => Err(InvalidMessage::Text { what, bytes, most }),
    }
}

#[cfg(test)]
mod tests;
