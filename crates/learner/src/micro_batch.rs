//! Batches: labelled pairs split into passes, and the sequences and label rows of a pass.

use messages::{Completion, LabelledPair, Purpose};
use model::{Sequence, within_tokens};

use crate::{error::LearnerError, file_pairs::label_id, objective::Labelling};

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
        let parts = pairs.chunks(pairs.len().div_ceil(self.passes).max(1));
        parts
            .flat_map(|part| within_tokens(part, self.max_tokens, tokens))
            .collect()
    }
}

/// Number of tokens of a prompt, its compared completions and its golden answer.
fn tokens(labelled: &LabelledPair) -> usize {
    let pair = &labelled.pair;
    let completions = compared(labelled).map(|(_, c)| c.ids.len());
    let golden = pair.prompt.golden.as_ref().map_or(0, Vec::len);
    pair.prompt.ids.len() + completions.sum::<usize>() + golden
}

/// The completions of a pair that any of its labels compares, with their indices. The others are not scored.
pub(crate) fn compared(labelled: &LabelledPair) -> impl Iterator<Item = (u16, &Completion)> {
    let labels = &labelled.labels;
    let is_compared = |index: u16| labels.iter().any(|l| l.first == index || l.second == index);
    let completions = (0..).zip(&labelled.pair.completions);
    completions.filter(move |&(index, _)| is_compared(index))
}

/// The completions of a pair that none of its labels compares.
pub(crate) fn not_compared(labelled: &LabelledPair) -> impl Iterator<Item = &Completion> {
    let mut compared = compared(labelled).map(|(index, _)| index).peekable();
    let completions = (0..).zip(&labelled.pair.completions);
    completions
        .filter(move |&(index, _)| compared.next_if_eq(&index).is_none())
        .map(|(_, completion)| completion)
}

/// Records the learner's log ref where actors recorded none. `ref_logp` is that of every token of the compared completions
/// that actors sampled, in order.
pub(crate) fn record_ref_logp(pairs: &mut [LabelledPair], ref_logp: &[f32]) {
    let mut rest = ref_logp;
    for labelled in pairs {
        let sampled = compared(labelled).filter(|(_, completion)| completion.is_recorded());
        let indices: Vec<u16> = sampled.map(|(index, _)| index).collect();
        for index in indices {
            let completion = &mut labelled.pair.completions[usize::from(index)];
            let (logp, later) = rest.split_at(completion.ids.len());
            if completion.ref_logp.is_empty() {
                completion.ref_logp = logp.to_vec();
            }
            rest = later;
        }
    }
}

/// A completion of a pass, with its prompt's tokens.
struct ScoredCompletion<'a> {
    prompt: &'a [u32],
    completion: &'a Completion,
}

/// Pairs of one pass as sequences and label rows: all compared completions, pair by pair, then the golden answers.
pub(crate) struct MicroBatch<'a> {
    pairs: &'a [LabelledPair],
    scored: Vec<ScoredCompletion<'a>>,
    /// Token counts of the compared completions.
    pub(crate) lengths: Vec<usize>,
    /// Index of the first completion of every label row, among all compared completions.
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
            scored: Vec::new(),
            lengths: Vec::new(),
            first: Vec::new(),
            second: Vec::new(),
            p: Vec::new(),
            pair_weight: Vec::new(),
        };
        for labelled in pairs {
            let base = batch.lengths.len();
            let mut positions = vec![0; labelled.pair.completions.len()];
            for (position, (index, completion)) in (base as u32..).zip(compared(labelled)) {
                positions[usize::from(index)] = position;
                batch.lengths.push(completion.ids.len());
                batch.scored.push(ScoredCompletion {
                    prompt: &labelled.pair.prompt.ids,
                    completion,
                });
            }
            for row in &labelled.labels {
                batch.first.push(positions[usize::from(row.first)]);
                batch.second.push(positions[usize::from(row.second)]);
                let p = labelling.label(label_id(labelled.pair.id()), row);
                batch.p.push(p as f32);
                batch.pair_weight.push(1.0 / labelled.labels.len() as f32);
            }
        }
        batch
    }

    /// Sequences of all compared completions.
    pub(crate) fn completions(&self) -> Vec<Sequence<'a>> {
        let of = |scored: &ScoredCompletion<'a>| Sequence {
            prompt: scored.prompt,
            completion: &scored.completion.ids,
        };
        self.scored.iter().map(of).collect()
    }

    /// The pairs.
    pub(crate) fn pairs(&self) -> &'a [LabelledPair] {
        self.pairs
    }

    /// Sequences of the golden answers, one per prompt; of a pair from a file the preferred response.
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
                let golden = match prompt.purpose {
                    Purpose::File => preferred(labelled),
                    _ => prompt.golden.as_deref(),
                };
                let completion = golden.ok_or(missing)?;
                Ok(Sequence {
                    prompt: &prompt.ids,
                    completion,
                })
            })
            .collect()
    }

    /// log π of every recorded response token by the actors, under the weights and in the precision of sampling.
    pub(crate) fn recorded_logp(&self) -> Vec<f32> {
        self.collect(|c| &c.logp)
    }

    /// log ref of every recorded response token by the actors; NaN where they recorded none, and for pairs of weights before
    /// step `since`, which came with another reference.
    pub(crate) fn recorded_ref_logp(&self, since: u64) -> Vec<f32> {
        let of = |labelled: &LabelledPair| {
            let is_current = labelled.pair.version.step >= since;
            let of_completion = |(_, c): (u16, &Completion)| match is_current {
                true if c.ref_logp.len() == c.logp.len() => c.ref_logp.clone(),
                _ => vec![f32::NAN; c.logp.len()],
            };
            compared(labelled)
                .flat_map(of_completion)
                .collect::<Vec<_>>()
        };
        self.pairs.iter().flat_map(of).collect()
    }

    /// Whether each completion was sampled from the policy alone.
    pub(crate) fn is_of_policy(&self) -> impl Iterator<Item = bool> {
        self.scored()
            .map(|c| c.is_recorded() && c.mixture_coef == 0.0)
    }

    /// Whether log-probabilities were recorded of each compared completion.
    pub(crate) fn is_recorded(&self) -> impl Iterator<Item = bool> {
        self.scored().map(Completion::is_recorded)
    }

    /// All compared completions, in order.
    pub(crate) fn scored(&self) -> impl Iterator<Item = &'a Completion> {
        self.scored.iter().map(|scored| scored.completion)
    }

    fn collect(&self, of: impl Fn(&Completion) -> &Vec<f32>) -> Vec<f32> {
        let tokens = self.scored().flat_map(|c| of(c).iter().copied());
        tokens.collect()
    }
}

/// The preferred completion of a pair, the first of equal ones; `None` without a label.
fn preferred(labelled: &LabelledPair) -> Option<&[u32]> {
    let label = labelled.labels.first()?;
    let index = match label.p.get() >= 0.5 {
        true => label.first,
        false => label.second,
    };
    let completion = labelled.pair.completions.get(usize::from(index))?;
    Some(&completion.ids)
}

#[cfg(test)]
impl MicroBatch<'static> {
    /// Completions of these lengths; each even one is compared with the next and preferred with these probabilities.
    pub(crate) fn of_lengths(lengths: &[usize], p: &[f32]) -> Self {
        let rows = p.len() as u32;
        Self {
            pairs: &[],
            scored: Vec::new(),
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
        Finish, JudgeVersion, Label, Pair, Probability, Prompt, PromptBatch, PromptId, Purpose,
        Seed, WeightsVersion,
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
        labelled.labels = vec![label(0, 1)];
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

    fn label(first: u16, second: u16) -> Label {
        let p = Probability::new(0.75).unwrap();
        Label {
            first,
            second,
            p,
            judged: None,
        }
    }

    /// Of the first pair's compared completions one has a log ref; the second pair is from a file.
    #[test]
    fn the_learners_log_ref_is_recorded_where_actors_recorded_none() {
        let mut first = of_length(2);
        first.pair.completions[1].ref_logp.clear();
        let mut given = of_length(1);
        for completion in &mut given.pair.completions {
            completion.logp.clear();
            completion.ref_logp.clear();
            completion.behaviour_logp.clear();
        }
        let mut last = of_length(1);
        for completion in &mut last.pair.completions {
            completion.ref_logp.clear();
        }
        let labelling = Labelling {
            kind: settings::LabelKind::Soft,
            flip: 0.0,
            smoothing: 0.0,
            seed: Seed(0),
        };
        let mut pairs = [first, given, last];
        let recorded = MicroBatch::new(&pairs, &labelling).recorded_ref_logp(0);
        assert_eq!(recorded[..2], [-1.0, -1.0]);
        assert!(recorded.len() == 6 && recorded[2..].iter().all(|logp| logp.is_nan()));
        record_ref_logp(&mut pairs, &[-3.0, -4.0, -5.0, -6.0, -7.0, -8.0]);
        let of = |pair: usize| {
            pairs[pair]
                .pair
                .completions
                .iter()
                .map(|c| c.ref_logp.clone())
        };
        let found: Vec<Vec<f32>> = (0..3).flat_map(of).collect();
        let expected: [&[f32]; 6] = [&[-1.0, -1.0], &[-5.0, -6.0], &[], &[], &[-7.0], &[-8.0]];
        assert_eq!(found, expected);
    }

    /// Completions of 1, 2, 3, 4 tokens, of which the last and the second are compared.
    #[test]
    fn completions_that_no_label_compares_are_not_scored() {
        let mut selected = of_length(1);
        let completions = [1, 2, 3, 4].map(|length| of_length(length).pair.completions[0].clone());
        selected.pair.completions = completions.to_vec();
        selected.labels = vec![label(1, 3)];
        let pairs = [of_length(7), selected, of_length(5)];
        let labelling = Labelling {
            kind: settings::LabelKind::Soft,
            flip: 0.0,
            smoothing: 0.0,
            seed: Seed(0),
        };
        let batch = MicroBatch::new(&pairs, &labelling);
        assert_eq!(batch.lengths, [7, 7, 2, 4, 5, 5]);
        assert_eq!(
            (&batch.first[..], &batch.second[..]),
            (&[0, 2, 4][..], &[1, 3, 5][..])
        );
        assert_eq!(batch.pair_weight, [1.0; 3]);
        let lengths = batch.completions().into_iter().map(|s| s.completion.len());
        assert_eq!(lengths.collect::<Vec<_>>(), batch.lengths);
        assert_eq!(batch.recorded_logp().len(), 30);
        assert_eq!(tokens(&pairs[1]), 1 + 2 + 4);
        let rest: Vec<_> = not_compared(&pairs[1]).map(|c| c.ids.len()).collect();
        assert_eq!(rest, [1, 3]);
        assert_eq!(not_compared(&pairs[0]).count(), 0);
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
