//! From labelled pairs to the tensors that an objective is given.

use messages::LabelledPair;
use model::Sequence;

use crate::{LearnerError, objective::Labelling};

/// How a step's pairs are cut into passes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Passes, at least.
    pub(crate) passes: usize,
    /// Tokens of a pass, prompts and completions, unless a single prompt's are more; 0: any number.
    pub(crate) max_tokens: usize,
}

impl Cut {
    /// The pairs of every pass, in order.
    pub(crate) fn passes<'a>(&self, pairs: &'a [LabelledPair]) -> Vec<&'a [LabelledPair]> {
        let most = match self.max_tokens {
            0 => usize::MAX,
            tokens => tokens,
        };
        let mut passes = Vec::new();
        for mut part in pairs.chunks(pairs.len().div_ceil(self.passes).max(1)) {
            while !part.is_empty() {
                let mut read = 0;
                let fits = |pair: &&LabelledPair| {
                    read += tokens(pair);
                    read <= most
                };
                let count = part.iter().take_while(fits).count().max(1);
                let (pass, rest) = part.split_at(count);
                passes.push(pass);
                part = rest;
            }
        }
        passes
    }
}

/// What is read of a prompt and its completions. A golden answer, where there is one, counts for every loss.
fn tokens(labelled: &LabelledPair) -> usize {
    let pair = &labelled.pair;
    let completions = pair.completions.iter().map(|c| c.ids.len());
    let golden = pair.prompt.golden.as_ref().map_or(0, Vec::len);
    pair.prompt.ids.len() + completions.sum::<usize>() + golden
}

/// Pairs of one pass, laid out for scoring: all completions, pair by pair, then the golden answers.
pub(crate) struct MicroBatch<'a> {
    pairs: &'a [LabelledPair],
    /// Token counts of the completions.
    pub(crate) lengths: Vec<usize>,
    /// Index of the first completion of every label row, among all completions.
    pub(crate) first: Vec<u32>,
    /// Index of the second.
    pub(crate) second: Vec<u32>,
    /// The labels to train on.
    pub(crate) p: Vec<f32>,
    /// 1 / (label rows of the pair).
    pub(crate) pair_weight: Vec<f32>,
}

impl<'a> MicroBatch<'a> {
    pub(crate) fn new(pairs: &'a [LabelledPair], labelling: &Labelling) -> Self {
        let mut batch = Self {
            pairs,
            lengths: Vec::new(),
            first: Vec::new(),
            second: Vec::new(),
            p: Vec::new(),
            pair_weight: Vec::new(),
        };
        for labelled in pairs {
            let base = batch.lengths.len() as u32;
            batch
                .lengths
                .extend(labelled.pair.completions.iter().map(|c| c.ids.len()));
            for row in &labelled.labels {
                batch.first.push(base + u32::from(row.first));
                batch.second.push(base + u32::from(row.second));
                batch
                    .p
                    .push(labelling.label(labelled.pair.id(), row) as f32);
                batch.pair_weight.push(1.0 / labelled.labels.len() as f32);
            }
        }
        batch
    }

    /// What is to be scored: every completion after its prompt.
    pub(crate) fn completions(&self) -> Vec<Sequence<'a>> {
        let of = |labelled: &'a LabelledPair| {
            let prompt = labelled.pair.prompt.ids.as_slice();
            labelled.pair.completions.iter().map(move |c| Sequence {
                prompt,
                completion: &c.ids,
            })
        };
        self.pairs.iter().flat_map(of).collect()
    }

    /// Every prompt's golden answer after its prompt.
    ///
    /// # Errors
    /// When a prompt has none.
    pub(crate) fn golden(
        &self,
        objective: &'static str,
    ) -> Result<Vec<Sequence<'a>>, LearnerError> {
        self.pairs
            .iter()
            .map(|labelled| {
                let prompt = &labelled.pair.prompt;
                let missing = LearnerError::NoGolden {
                    objective,
                    prompt: prompt.id,
                };
                let completion = prompt.golden.as_deref().ok_or(missing)?;
                Ok(Sequence {
                    prompt: &prompt.ids,
                    completion,
                })
            })
            .collect()
    }

    /// log π of every response token as the actors recorded it, under the weights and in the precision that
    /// wrote it.
    pub(crate) fn recorded_logp(&self) -> Vec<f32> {
        self.collect(|c| &c.logp)
    }

    /// log ref of every response token as the actors recorded it.
    pub(crate) fn recorded_ref_logp(&self) -> Vec<f32> {
        self.collect(|c| &c.ref_logp)
    }

    /// Whether each completion was drawn from the policy alone, without the reference.
    pub(crate) fn is_of_policy(&self) -> impl Iterator<Item = bool> {
        let completions = self
            .pairs
            .iter()
            .flat_map(|labelled| &labelled.pair.completions);
        completions.map(|c| c.mixture_coef == 0.0)
    }

    fn collect(&self, of: impl Fn(&messages::Completion) -> &Vec<f32>) -> Vec<f32> {
        let completions = self
            .pairs
            .iter()
            .flat_map(|labelled| &labelled.pair.completions);
        completions.flat_map(|c| of(c).iter().copied()).collect()
    }
}

#[cfg(test)]
impl MicroBatch<'static> {
    /// Completions of these lengths, the even ones against the odd ones, preferred with these
    /// probabilities.
    pub(crate) fn of_lengths(lengths: &[usize], p: &[f32]) -> Self {
        let rows = p.len() as u32;
        Self {
            pairs: &[],
            lengths: lengths.to_vec(),
            first: (0..rows).map(|row| 2 * row).collect(),
            second: (0..rows).map(|row| 2 * row + 1).collect(),
            p: p.to_vec(),
            pair_weight: vec![1.0; p.len()],
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use messages::{
        Completion, Finish, JudgeVersion, Pair, Prompt, PromptId, Purpose, Release, Seed,
        WeightsVersion,
    };

    use super::*;

    /// A prompt of one token, and two completions of this length.
    fn of_length(length: usize) -> LabelledPair {
        let completion = Completion {
            ids: vec![1; length],
            finish: Finish::Length,
            mixture_coef: 0.0,
            logp: vec![-1.0; length],
            ref_logp: vec![-1.0; length],
            behaviour_logp: vec![-1.0; length],
            text: String::new(),
        };
        let mut labelled = labelled(vec![completion.clone(), completion]);
        labelled.pair.prompt.id = PromptId(length as u64);
        labelled
    }

    /// These completions of a prompt of one token, without a label.
    pub(crate) fn labelled(completions: Vec<Completion>) -> LabelledPair {
        let prompt = Prompt {
            id: PromptId(0),
            release: Release::single(PromptId(0)),
            purpose: Purpose::Train,
            version: WeightsVersion::at(0),
            seed: Seed(0),
            ids: vec![1],
            text: String::new(),
            dialogue: None,
            golden: None,
            answer: None,
        };
        LabelledPair {
            pair: Pair {
                prompt,
                version: WeightsVersion::at(0),
                completions,
                actor: String::new(),
            },
            labels: Vec::new(),
            judge: String::new(),
            judge_version: JudgeVersion(0),
            scores: None,
            gold: None,
        }
    }

    #[test]
    fn passes_are_as_many_as_asked_and_none_reads_too_much() {
        // Of 9, 3, 3, 21, 5 and 5 tokens.
        let pairs = [4, 1, 1, 10, 2, 2].map(of_length);
        let cut = |passes, max_tokens| {
            let cut = Cut { passes, max_tokens }.passes(&pairs);
            assert_eq!(cut.concat(), pairs, "in order, and nothing is lost");
            cut.iter().map(|pass| pass.len()).collect::<Vec<_>>()
        };
        assert_eq!(cut(1, 0), [6]);
        assert_eq!(cut(3, 0), [2, 2, 2]);
        assert_eq!(cut(1, 46), [6]);
        assert_eq!(cut(1, 45), [5, 1]);
        assert_eq!(cut(1, 12), [2, 1, 1, 2]);
        assert_eq!(cut(2, 12), [2, 1, 1, 2]);
        assert_eq!(cut(1, 1), [1; 6]);
        assert!(
            Cut {
                passes: 2,
                max_tokens: 9
            }
            .passes(&[])
            .is_empty()
        );
    }
}
