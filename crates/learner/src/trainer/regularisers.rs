//! Regularisers of hidden states within one optimiser step: GANPO's generator loss, and the plain distance between the
//! hidden states of policy and reference.

use candle_core::{DType, Tensor};
use model::TokenLogprobs;
use telemetry::Measurements;

use crate::{error::LearnerError, ganpo::regulariser::GanpoStep, micro_batch::MicroBatch};

/// State of the regularisers within one step.
pub(super) struct StepRegularisers {
    pub(super) ganpo: GanpoStep,
    /// Weight of the distance; 0: off.
    weight: f64,
    /// Response tokens of the batch.
    tokens: usize,
    /// Distance, summed over the passes so far.
    distance: f64,
}

impl StepRegularisers {
    pub(super) fn new(ganpo: GanpoStep, weight: f64, micros: &[MicroBatch<'_>]) -> Self {
        Self {
            ganpo,
            weight,
            tokens: micros.iter().flat_map(|micro| &micro.lengths).sum(),
            distance: 0.0,
        }
    }

    /// Loss of a pass with the weighted distance of its hidden states.
    pub(super) fn add_distance(
        &mut self,
        loss: Tensor,
        micro: &MicroBatch<'_>,
        policy: &TokenLogprobs,
        reference: &TokenLogprobs,
    ) -> Result<Tensor, LearnerError> {
        if self.weight <= 0.0 {
            return Ok(loss);
        }
        let response = micro.lengths.iter().sum();
        let [policy, reference] =
            [policy, reference].map(|logprobs| logprobs.hidden.narrow(0, 0, response));
        let distance = hidden_distance(&policy?, &reference?, self.tokens)?;
        self.distance += f64::from(distance.to_scalar::<f32>()?);
        Ok((loss + (distance * self.weight)?)?)
    }

    /// Adds the metrics of the step.
    pub(super) fn add_metrics(&self, m: &mut Measurements) {
        self.ganpo.add_metrics(m);
        if self.weight > 0.0 {
            m.set("loss/hidden_l2", self.weight * self.distance);
        }
    }
}

/// Contribution of a pass to the mean of `(h_π − h_ref)²` over the response tokens of a batch and the features of a hidden
/// state: a scalar with gradient in `policy`, `[R, d]`. `tokens` are those of the batch.
fn hidden_distance(
    policy: &Tensor,
    reference: &Tensor,
    tokens: usize,
) -> Result<Tensor, LearnerError> {
    let width = policy.dim(1)?;
    let difference = (policy.to_dtype(DType::F32)? - reference.detach().to_dtype(DType::F32)?)?;
    Ok((difference.sqr()?.sum_all()? / (tokens.max(1) * width) as f64)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Two of a batch's four tokens, of width 2: (1² + 2² + 0² + 1²) / (4·2), with the gradient (h − ref) / 4.
    #[test]
    fn the_distance_of_hidden_states_is_a_mean_over_tokens_and_features() {
        let device = Device::Cpu;
        let policy = Var::new(&[[1f32, 2.0], [3.0, 4.0]], &device).unwrap();
        let reference = Var::new(&[[0f32, 0.0], [3.0, 3.0]], &device).unwrap();
        let distance = hidden_distance(policy.as_tensor(), reference.as_tensor(), 4).unwrap();
        assert_eq!(distance.to_scalar::<f32>().unwrap(), 0.75);
        let gradients = distance.backward().unwrap();
        let of_policy = gradients.get(&policy).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(of_policy, [[0.25, 0.5], [0.0, 0.25]]);
        assert!(gradients.get(&reference).is_none());
    }
}
