//! From labelled pairs to the tensors that an objective is given.

use messages::LabelledPair;
use model::{Device, Sequence, Tensor};

use crate::{LearnerError, objective::Labelling};

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

    /// log ref of every response token as the actors saw it, `[R]`.
    pub(crate) fn token_ref_logp(&self, device: &Device) -> Result<Tensor, LearnerError> {
        Ok(Tensor::new(self.collect(|c| &c.ref_logp), device)?)
    }

    /// log π of every response token as the actors saw it.
    pub(crate) fn actor_logp(&self) -> Vec<f32> {
        self.collect(|c| &c.logp)
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
