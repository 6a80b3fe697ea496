//! Quantisation error check: compares reduced-precision log-probabilities with those that the learner computes.
//!
//! For every version of the weights, the completions of one prompt are scored again in the learner's precision. If their
//! log-probabilities differ from the recorded ones by more than the limit, the next version is loaded in that precision.
//! Samples in the learner's precision, or in f32, are not checked.

use messages::Completion;
use model::{Finished, LanguageModel, ModelError, Precision, Request, Sequence};

/// Weight precision used for sampling, and the quantisation error up to which it is used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionLimit {
    /// Weight precision used for sampling.
    pub precision: Precision,
    /// Precision of the learner's products, with which samples are compared.
    pub learner: Precision,
    /// Largest mean absolute difference of log-probabilities from the learner's precision, in nats per token; above it
    /// sampling falls back to that. 0: unlimited.
    pub max_error: f64,
}

/// Checks the quantisation error of one prompt per version of the weights.
#[derive(Debug)]
pub(crate) struct QuantizationCheck {
    limit: PrecisionLimit,
    state: CheckState,
}

/// Measured quantisation error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QuantizationError {
    /// Mean absolute difference of log-probabilities, in nats per token.
    pub(crate) nats: f64,
    /// Whether it exceeds the limit, so that the next version is loaded in the learner's precision.
    pub(crate) is_too_large: bool,
}

#[derive(Debug)]
enum CheckState {
    /// No prompt of this version has been admitted.
    Ready,
    /// The completions of this prompt are being sampled.
    Waiting { key: u64 },
    /// This version has been checked.
    Done,
}

impl QuantizationCheck {
    pub(crate) fn new(limit: PrecisionLimit) -> Self {
        Self {
            limit,
            state: CheckState::Ready,
        }
    }

    /// Starts the check of a new version; returns the precision to load it in.
    pub(crate) fn start_version(&mut self) -> Precision {
        self.state = CheckState::Ready;
        self.limit.precision
    }

    /// Precision of the loaded version.
    pub(crate) fn precision(&self) -> Precision {
        self.limit.precision
    }

    /// Selects the first prompt of a version for the check.
    pub(crate) fn admit(&mut self, request: &Request) {
        let is_coarser = ![Precision::F32, self.limit.learner].contains(&self.limit.precision);
        let is_checked = is_coarser && self.limit.max_error > 0.0;
        if is_checked && matches!(self.state, CheckState::Ready) {
            self.state = CheckState::Waiting { key: request.key };
        }
    }

    /// Deselects a prompt that the sampler rejected.
    pub(crate) fn reject(&mut self, key: u64) {
        if matches!(&self.state, CheckState::Waiting { key: selected } if *selected == key) {
            self.state = CheckState::Ready;
        }
    }

    /// The quantisation error of these completions; `None` unless their prompt is the selected one.
    ///
    /// # Errors
    /// If scoring fails.
    pub(crate) fn check(
        &mut self,
        policy: &LanguageModel,
        finished: &Finished,
    ) -> Result<Option<QuantizationError>, ModelError> {
        if !matches!(self.state, CheckState::Waiting { key } if key == finished.key) {
            return Ok(None);
        }
        let policy = policy.with_precision(self.limit.learner);
        let nats = mean_difference(&policy, &finished.prompt, &finished.completions)?;
        self.state = CheckState::Done;
        let is_too_large = nats.is_nan() || nats > self.limit.max_error;
        if is_too_large {
            self.limit.precision = self.limit.learner;
        }
        Ok(Some(QuantizationError { nats, is_too_large }))
    }
}

/// Mean over tokens of |log-probability − recorded log-probability|.
fn mean_difference(
    policy: &LanguageModel,
    prompt: &[u32],
    completions: &[Completion],
) -> Result<f64, ModelError> {
    let sequences: Vec<_> = completions
        .iter()
        .map(|completion| Sequence {
            prompt,
            completion: &completion.ids,
        })
        .collect();
    let exact: Vec<f32> = policy.logprobs(&sequences)?.logp.to_vec1()?;
    let recorded = completions.iter().flat_map(|completion| &completion.logp);
    let differences = exact
        .iter()
        .zip(recorded)
        .map(|(a, b)| f64::from((a - b).abs()));
    Ok(differences.sum::<f64>() / exact.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use messages::Seed;

    use super::*;

    /// Whether the first prompt of a version is selected.
    fn is_checked(precision: Precision, learner: Precision, max_error: f64) -> bool {
        let mut check = QuantizationCheck::new(PrecisionLimit {
            precision,
            learner,
            max_error,
        });
        check.start_version();
        check.admit(&Request {
            key: 7,
            ids: vec![0],
            seed: Seed(1),
            mixture_coefs: vec![0.0],
            exact: 0,
            max_new_tokens: 1,
            records_reference: false,
        });
        matches!(check.state, CheckState::Waiting { key: 7 })
    }

    #[test]
    fn samples_that_are_coarser_than_the_learner_are_checked() {
        use Precision::{Bf16, F32, Int8};
        for (precision, learner, expected) in [
            (F32, F32, false),
            (F32, Bf16, false),
            (Bf16, F32, true),
            (Bf16, Bf16, false),
            (Int8, Bf16, true),
            (Int8, F32, true),
        ] {
            let found = is_checked(precision, learner, 0.1);
            assert_eq!(found, expected, "{precision:?} beside {learner:?}");
            assert!(!is_checked(precision, learner, 0.0));
        }
    }
}
