//! Batches: labelled pairs split into passes, and the sequences and label rows of a pass.

use messages::LabelledPair;
use model::Sequence;

use crate::{error::LearnerError, objective::Labelling};

/// Split of a step's pairs into passes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchSplit {
    /// Minimum number of passes.
    pub(crate) passes: usize,
    /// Maximum number of tokens per pass, prompts and completions, unless a single prompt exceeds it; 0: no limit.
    pub(crate) max_tokens: usize,
}

impl BatchSplit {
    /// Pairs of every pass, in order.
    pub(crate) fn passes<'a>(&self, pairs: &'a [LabelledPair]) -> Vec<&'a [LabelledPair]> {
        let limit = match self.max_tokens {
            0 => usize::MAX,
            tokens => tokens,
        };
        let mut passes = Vec::new();
        for mut part in pairs.chunks(pairs.len().div_ceil(self.passes).max(1)) {
            while !part.is_empty() {
                let mut total = 0;
                let fits = |pair: &&LabelledPair| {
                    total += tokens(pair);
                    total <= limit
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

/// Number of tokens of a prompt, its completions and its golden answer.
fn tokens(labelled: &LabelledPair) -> usize {
    let pair = &labelled.pair;
    let completions = pair.completions.iter().map(|c| c.ids.len());
    let golden = pair.prompt.golden.as_ref().map_or(0, Vec::len);
    pair.prompt.ids.len() + completions.sum::<usize>() + golden
}

/// Pairs of one pass as sequences and label rows: all completions, pair by pair, then the golden answers.
pub(crate) struct MicroBatch<'a> {
    pairs: &'a [LabelledPair],
    /// Token counts of the completions.
    pub(crate) lengths: Vec<usize>,
    /// Index of the first completion of every label row, among all completions.
    pub(crate) first: Vec<u32>,
    /// Index of the second completion of every label row.
    pub(crate) second: Vec<u32>,
    /// Training labels.
    pub(crate) p: Vec<f32>,
    /// 1 / (number of label rows of the pair).
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

    /// Sequences of all completions.
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

    /// Sequences of the golden answers, one per prompt.
    ///
    /// # Errors
    /// If a prompt has none.
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

    /// log π of every response token as recorded by the actors, under the weights and in the precision of sampling.
    pub(crate) fn recorded_logp(&self) -> Vec<f32> {
        self.collect(|c| &c.logp)
    }

    /// log ref of every response token as recorded by the actors.
    pub(crate) fn recorded_ref_logp(&self) -> Vec<f32> {
        self.collect(|c| &c.ref_logp)
    }

    /// Whether each completion was sampled from the policy alone.
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
    /// Completions of these lengths; each even one is compared with the next and preferred with these probabilities.
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
        Completion, Finish, JudgeVersion, Pair, Prompt, PromptBatch, PromptId, Purpose, Seed,
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

    /// A prompt of one token with these completions, without a label.
    pub(crate) fn labelled(completions: Vec<Completion>) -> LabelledPair {
        let prompt = Prompt {
            id: PromptId(0),
            prompt_batch: PromptBatch::single(PromptId(0)),
            purpose: Purpose::Train,
            version: WeightsVersion::at(0),
            seed: Seed(0),
            ids: vec![1],
            text: String::new(),
            dialogue: None,
            golden: None,
            answer: None,
            route: None,
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
            verdicts: Vec::new(),
        }
    }

    #[test]
    fn passes_respect_their_number_and_the_token_limit() {
        // Of 9, 3, 3, 21, 5 and 5 tokens.
        let pairs = [4, 1, 1, 10, 2, 2].map(of_length);
        let split = |passes, max_tokens| {
            let split = BatchSplit { passes, max_tokens }.passes(&pairs);
            assert_eq!(split.concat(), pairs, "order or pairs are lost");
            split.iter().map(|pass| pass.len()).collect::<Vec<_>>()
        };
        assert_eq!(split(1, 0), [6]);
        assert_eq!(split(3, 0), [2, 2, 2]);
        assert_eq!(split(1, 46), [6]);
        assert_eq!(split(1, 45), [5, 1]);
        assert_eq!(split(1, 12), [2, 1, 1, 2]);
        assert_eq!(split(2, 12), [2, 1, 1, 2]);
        assert_eq!(split(1, 1), [1; 6]);
        assert!(
            BatchSplit {
                passes: 2,
                max_tokens: 9
            }
            .passes(&[])
            .is_empty()
        );
    }
}
