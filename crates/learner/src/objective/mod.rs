//! Training objectives: pair losses, the policy gradients Nash-MD-PG and RLOO, rejection sampling, and their labels and
//! reductions.
//!
//! Every loss is a pure function of tensors in its own file; the trainer sees it as an [`Objective`]. Losses work in
//! f32 and f64, check their shapes first, and stay finite with the right gradient for any log-ratio. The reference and
//! the labels carry no gradient, even if their tensors do; both completions of a pair carry one.
//!
//! Does not know models, token meanings, judges, optimisers, or where samples come from: [`Ipo`] on samples of the
//! policy is online IPO, on samples of the mixture IPO-MD, on a file of pairs offline IPO.
//!
//! Notation: `h = log π(y)/ref(y) − log π(y')/ref(y')` for a pair (y, y') = (first, second); `p` is the probability
//! that y is preferred.

mod batch;
pub mod dpo;
pub mod ipo;
mod labels;
pub mod nash_md;
pub mod reduction;
pub mod rejection_sampling;
pub mod rloo;
pub mod rpo;
pub mod slic;

#[cfg(test)]
mod bandit;
#[cfg(test)]
mod equilibrium;
#[cfg(test)]
mod finite_difference;
#[cfg(test)]
mod moving_models;

pub use batch::{Baseline, Batch};
pub use dpo::Dpo;
pub use ipo::Ipo;
pub use labels::Labelling;
pub use nash_md::NashMdPg;
pub use rejection_sampling::RejectionSampling;
pub use rloo::Rloo;
pub use rpo::{Rpo, RpoBaseline};
pub use slic::Slic;

use candle_core::{Result, Tensor};

/// A loss over labelled pairs.
pub trait Objective: Send {
    /// Name in the settings, in metrics and in reports.
    fn name(&self) -> &'static str;

    /// Loss of a micro-batch, a scalar: the SUM over pairs of each pair's loss. The caller divides by the number of
    /// pairs in the whole batch, so that accumulating micro-batches is exact.
    ///
    /// # Errors
    /// If the batch's shapes disagree, or it lacks the baseline that the objective needs.
    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor>;

    /// Whether [`Batch::baseline`] is required.
    fn needs_baseline(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};
    use settings::{IpoScale, LogpReduction};

    use super::bandit::{ActionPair, close, loss_and_gradient};
    use super::reduction::reduce;
    use super::*;

    /// Far enough from the reference that every pair is outside the margin of SLiC.
    const THETA: [f64; 3] = [2.5, -1.5, 0.2];
    const REFERENCE: [f64; 3] = [0.5, 0.3, 0.2];

    fn pair_objectives() -> Vec<Box<dyn Objective>> {
        vec![
            Box::new(Ipo {
                tau: 0.5,
                scale: IpoScale::Square,
            }),
            Box::new(Ipo {
                tau: 0.5,
                scale: IpoScale::Scaled,
            }),
            Box::new(Dpo { beta: 0.7 }),
            Box::new(Slic { beta: 2.0 }),
            Box::new(Rloo { beta: 0.4 }),
        ]
    }

    fn at(objective: &dyn Objective, row: ActionPair) -> Result<(f64, Vec<f64>)> {
        loss_and_gradient(objective, &THETA, &REFERENCE, &[row], None)
    }

    #[test]
    fn swapping_the_completions_and_the_label_changes_nothing() -> Result<()> {
        for objective in pair_objectives() {
            for p in [0.0, 0.3, 0.5, 0.9] {
                let row = ActionPair {
                    first: 0,
                    second: 2,
                    p,
                    weight: 1.0,
                };
                let swapped = ActionPair {
                    first: 2,
                    second: 0,
                    p: 1.0 - p,
                    weight: 1.0,
                };
                let (loss, gradient) = at(&*objective, row)?;
                let (loss_swapped, gradient_swapped) = at(&*objective, swapped)?;
                close(&[loss], &[loss_swapped], 1e-12);
                close(&gradient, &gradient_swapped, 1e-12);
                assert!(
                    gradient[0].abs() > 1e-2,
                    "{} p={p}: no gradient",
                    objective.name()
                );
            }
        }
        Ok(())
    }

    #[test]
    fn equal_completions_give_no_gradient() -> Result<()> {
        for objective in pair_objectives() {
            for p in [0.0, 0.3, 1.0] {
                let (_, gradient) = at(
                    &*objective,
                    ActionPair {
                        first: 1,
                        second: 1,
                        p,
                        weight: 1.0,
                    },
                )?;
                assert_eq!(gradient, vec![0.0; 3], "{} p={p}", objective.name());
            }
        }
        Ok(())
    }

    #[test]
    fn even_odds_drive_the_log_ratio_to_zero() -> Result<()> {
        for objective in pair_objectives() {
            for (first, second) in [(0, 2), (2, 1), (1, 0)] {
                let [of_first, of_second] =
                    [first, second].map(|action: usize| THETA[action] - REFERENCE[action].ln());
                let h = of_first - of_second;
                let row = ActionPair {
                    first: first as u32,
                    second: second as u32,
                    p: 0.5,
                    weight: 1.0,
                };
                let (_, gradient) = at(&*objective, row)?;
                // Descent lowers h where it is positive and raises it where it is negative.
                let slope = gradient[first] * h.signum();
                assert!(slope > 1e-2, "{} at h={h}: {slope}", objective.name());
            }
        }
        Ok(())
    }

    #[test]
    fn the_loss_is_a_weighted_sum_over_rows() -> Result<()> {
        let dpo = Dpo { beta: 0.7 };
        let rows = [
            ActionPair {
                first: 0,
                second: 1,
                p: 0.8,
                weight: 0.25,
            },
            ActionPair {
                first: 1,
                second: 2,
                p: 0.1,
                weight: 3.0,
            },
        ];
        let (both, gradient) = loss_and_gradient(&dpo, &THETA, &REFERENCE, &rows, None)?;
        let mut sum = 0.0;
        let mut gradient_sum = vec![0.0; 3];
        for row in rows {
            let (loss, gradient) = at(&dpo, ActionPair { weight: 1.0, ..row })?;
            sum += row.weight * loss;
            gradient_sum
                .iter_mut()
                .zip(gradient)
                .for_each(|(s, g)| *s += row.weight * g);
        }
        close(&[both], &[sum], 1e-12);
        close(&gradient, &gradient_sum, 1e-12);
        Ok(())
    }

    #[test]
    fn only_rpo_needs_a_baseline() {
        for objective in pair_objectives() {
            assert!(!objective.needs_baseline(), "{}", objective.name());
        }
        assert!(!NashMdPg { tau: 0.1 }.needs_baseline() && !RejectionSampling.needs_baseline());
        assert!(
            Rpo {
                beta: 0.1,
                eta: 0.005,
                nll: RpoBaseline::Sum
            }
            .needs_baseline()
        );
    }

    /// The loss of two pairs of longer completions, and its gradient in their tokens.
    fn in_precision(objective: &dyn Objective, dtype: DType) -> Result<Vec<f64>> {
        let vector = |values: &[f64]| Tensor::new(values, &Device::Cpu)?.to_dtype(dtype);
        let lengths = [2, 1, 3, 1];
        let token_logp = Var::from_tensor(&vector(&[-1.0, -0.3, -2.0, -0.7, -1.1, -3.0, -0.2])?)?;
        let token_ref_logp = vector(&[-1.4, -0.2, -1.0, -0.9, -1.6, -2.0, -0.8])?;
        let golden = vector(&[-0.4, -0.6, -2.5])?;
        let loss = objective.loss(&Batch {
            token_logp: &token_logp,
            token_ref_logp: &token_ref_logp,
            lengths: &lengths,
            logp: &reduce(LogpReduction::Sum, &token_logp, &lengths)?,
            ref_logp: &reduce(LogpReduction::Sum, &token_ref_logp, &lengths)?,
            first: &[0, 2],
            second: &[1, 3],
            p: &vector(&[0.9, 0.2])?,
            pair_weight: &vector(&[1.0, 1.0])?,
            baseline: Some(Baseline {
                token_logp: &golden,
                lengths: &[1, 2],
            }),
        })?;
        let gradients = loss.backward()?;
        let gradient = gradients
            .get(&token_logp)
            .expect("the tokens are variables of the loss");
        let all = Tensor::cat(&[&loss.unsqueeze(0)?, gradient], 0)?;
        all.to_dtype(DType::F64)?.to_vec1()
    }

    #[test]
    fn single_precision_agrees_with_double() -> Result<()> {
        let mut objectives = pair_objectives();
        objectives.push(Box::new(Rpo {
            beta: 0.7,
            eta: 0.1,
            nll: RpoBaseline::Sum,
        }));
        objectives.push(Box::new(NashMdPg { tau: 0.3 }));
        objectives.push(Box::new(RejectionSampling));
        for objective in objectives {
            let double = in_precision(&*objective, DType::F64)?;
            close(&in_precision(&*objective, DType::F32)?, &double, 1e-5);
            assert!(double[1].abs() > 1e-2, "{}: no gradient", objective.name());
        }
        Ok(())
    }
}
