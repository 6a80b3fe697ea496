//! What the learner minimises: pair losses, the policy-gradient form of Nash-MD, and the labels and
//! reductions they are fed with.
//!
//! Every loss is a pure function of tensors in its own file; [`Objective`] is the thin seam that the
//! training loop sees. Losses work in f32 and f64, check their shapes first, and stay finite with the
//! right gradient however far a log-ratio runs. The reference and the labels carry no gradient, even
//! when the tensors given for them do; both completions of a pair carry one.
//!
//! Nothing here knows models, tokens' meaning, judges or optimisers. Where the samples come from is
//! decided elsewhere too: [`Ipo`] on samples of the policy is online IPO, on samples of the mixture it
//! is IPO-MD, on a file of pairs it is offline IPO.
//!
//! Notation: `h = log π(y)/ref(y) − log π(y')/ref(y')` for a pair (y, y') = (first, second), and `p` is
//! the probability that y is preferred.

mod batch;
pub mod dpo;
pub mod ipo;
mod labels;
pub mod nash_md;
mod reduction;
pub mod rpo;
pub mod slic;

#[cfg(test)]
mod bandit;
#[cfg(test)]
mod equilibrium;
#[cfg(test)]
mod finite_difference;

pub use batch::{Baseline, Batch};
pub use dpo::Dpo;
pub use ipo::{Ipo, IpoScale};
pub use labels::{LabelKind, Labelling};
pub use nash_md::NashMdPg;
pub use reduction::LogpReduction;
pub use rpo::{Rpo, RpoBaseline};
pub use slic::Slic;

use candle_core::{Result, Tensor};

/// A loss over labelled pairs.
pub trait Objective: Send {
    /// The name in the settings, in metrics and in reports.
    fn name(&self) -> &'static str;

    /// The loss of a micro-batch, a scalar: the SUM over pairs of each pair's loss. The caller divides
    /// by the number of pairs in the whole batch, so that accumulating micro-batches is exact.
    ///
    /// # Errors
    /// When the batch's shapes disagree, or it lacks the baseline that the objective needs.
    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor>;

    /// Whether [`Batch::baseline`] must be there.
    fn needs_baseline(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::bandit::{Row, close, loss_and_gradient};
    use super::*;

    /// Far enough from the reference that SLiC, too, is outside its margin for every pair.
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
        ]
    }

    fn at(objective: &dyn Objective, row: Row) -> Result<(f64, Vec<f64>)> {
        loss_and_gradient(objective, &THETA, &REFERENCE, &[row], None)
    }

    #[test]
    fn swapping_the_completions_and_the_label_changes_nothing() -> Result<()> {
        for objective in pair_objectives() {
            for p in [0.0, 0.3, 0.5, 0.9] {
                let row = Row {
                    first: 0,
                    second: 2,
                    p,
                    weight: 1.0,
                };
                let swapped = Row {
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
                    "{} p={p}: a flat place",
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
                    Row {
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
    fn even_odds_pull_the_log_ratio_to_zero() -> Result<()> {
        for objective in pair_objectives() {
            for (first, second) in [(0, 2), (2, 1), (1, 0)] {
                let [of_first, of_second] =
                    [first, second].map(|action: usize| THETA[action] - REFERENCE[action].ln());
                let h = of_first - of_second;
                let row = Row {
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
            Row {
                first: 0,
                second: 1,
                p: 0.8,
                weight: 0.25,
            },
            Row {
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
            let (loss, gradient) = at(&dpo, Row { weight: 1.0, ..row })?;
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
    fn only_rpo_asks_for_a_baseline() {
        for objective in pair_objectives() {
            assert!(!objective.needs_baseline(), "{}", objective.name());
        }
        assert!(!NashMdPg { tau: 0.1 }.needs_baseline());
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
            logp: &LogpReduction::Sum.reduce(&token_logp, &lengths)?,
            ref_logp: &LogpReduction::Sum.reduce(&token_ref_logp, &lengths)?,
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
        for objective in objectives {
            let double = in_precision(&*objective, DType::F64)?;
            close(&in_precision(&*objective, DType::F32)?, &double, 1e-5);
            assert!(double[1].abs() > 1e-2, "{}: a flat place", objective.name());
        }
        Ok(())
    }
}
