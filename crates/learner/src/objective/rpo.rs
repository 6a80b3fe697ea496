//! Regularised preference optimisation: DPO plus a supervised term on a baseline distribution.
//!
//! Liu et al. 2024 (arXiv 2405.16436). The supervised term is the closed form of an adversarially chosen reward, and
//! keeps the policy near the data where the preference model errs. The baseline is the golden (offline: chosen) answer,
//! never the policy's own chosen sample, which would reinforce itself until the policy collapses.

use candle_core::{Result, Tensor, bail};
use settings::LogpReduction;

use crate::objective::dpo::dpo;
use crate::objective::reduction::reduce;
use crate::objective::{Baseline, Batch, Objective};

/// Form of the supervised term.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RpoBaseline {
    /// The paper's: `−η·β·log π(baseline)`, summed over tokens.
    Sum,
    /// `−c` times the mean log-probability of the baseline's tokens; η and β are not used.
    Mean {
        /// Weight c ≥ 0, for instance .2.
        coefficient: f64,
    },
}

/// RPO as an objective. The loss of a pair is [`dpo`] plus the supervised term, which counts once per pair whatever the
/// number of its label rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rpo {
    /// KL temperature β > 0.
    pub beta: f64,
    /// Weight η ≥ 0 of the supervised term with [`RpoBaseline::Sum`]; 0 is DPO.
    pub eta: f64,
    /// Form of the supervised term.
    pub nll: RpoBaseline,
}

impl Objective for Rpo {
    fn name(&self) -> &'static str {
        "rpo"
    }

    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        let Some(baseline) = &batch.baseline else {
            bail!(
                "rpo needs the baseline's log-probabilities: give a golden answer for every pair"
            );
        };
        let (weight, reduction) = match self.nll {
            RpoBaseline::Sum => (self.eta * self.beta, LogpReduction::Sum),
            RpoBaseline::Mean { coefficient } => (coefficient, LogpReduction::Mean),
        };
        let supervised = nll(baseline, reduction)?.sum_all()?;
        batch.sum_of(|h, p| dpo(h, p, self.beta))? + (supervised * weight)?
    }

    fn needs_baseline(&self) -> bool {
        true
    }
}

/// `−log π` of each golden answer: the sum or mean over its tokens.
///
/// # Errors
/// If the lengths do not add up to the tokens or an answer is empty.
pub fn nll(baseline: &Baseline<'_>, reduction: LogpReduction) -> Result<Tensor> {
    reduce(reduction, baseline.token_logp, baseline.lengths)?.neg()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::objective::Dpo;
    use crate::objective::bandit::{ActionPair, close, loss_and_gradient};

    const UNIFORM: [f64; 3] = [1.0 / 3.0; 3];
    const CHOSEN_0_REJECTED_1: [ActionPair; 1] = [ActionPair {
        first: 0,
        second: 1,
        p: 1.0,
        weight: 1.0,
    }];

    fn published(eta: f64) -> Rpo {
        Rpo {
            beta: 0.1,
            eta,
            nll: RpoBaseline::Sum,
        }
    }

    #[test]
    fn three_actions_by_hand() -> Result<()> {
        let (loss, gradient) = loss_and_gradient(
            &published(0.005),
            &[0.0; 3],
            &UNIFORM,
            &CHOSEN_0_REJECTED_1,
            Some(&[0]),
        )?;
        close(&[loss], &[0.693_696_487], 1e-9);
        close(
            &gradient,
            &[-0.050_333_333, 0.050_166_667, 0.000_166_667],
            1e-9,
        );
        Ok(())
    }

    #[test]
    fn without_eta_it_is_dpo_and_without_a_baseline_an_error() -> Result<()> {
        let theta = [0.3, -0.2, 0.1];
        let dpo = Dpo { beta: 0.1 };
        let expected = loss_and_gradient(&dpo, &theta, &UNIFORM, &CHOSEN_0_REJECTED_1, None)?;
        let found = loss_and_gradient(
            &published(0.0),
            &theta,
            &UNIFORM,
            &CHOSEN_0_REJECTED_1,
            Some(&[2]),
        )?;
        assert_eq!(found, expected);
        let failed = loss_and_gradient(
            &published(0.0),
            &theta,
            &UNIFORM,
            &CHOSEN_0_REJECTED_1,
            None,
        );
        assert!(
            failed
                .expect_err("no baseline")
                .to_string()
                .contains("golden answer")
        );
        Ok(())
    }

    #[test]
    fn the_baseline_counts_once_per_pair_whatever_its_rows() -> Result<()> {
        let rows = [(0, 1), (0, 2), (1, 2)].map(|(first, second)| ActionPair {
            first,
            second,
            p: 0.5,
            weight: 1.0 / 3.0,
        });
        let (loss, _) =
            loss_and_gradient(&published(0.005), &[0.0; 3], &UNIFORM, &rows, Some(&[0]))?;
        close(&[loss], &[0.693_696_487], 1e-9);
        Ok(())
    }

    #[test]
    fn both_variants_weigh_every_baseline_token_as_documented() -> Result<()> {
        // Two answers of one and three tokens, in the same batch as one flat pair.
        let flat = Tensor::new(&[-1.0, -1.0], &Device::Cpu)?;
        let tokens = Var::new(&[-0.5, -1.0, -2.0, -3.0], &Device::Cpu)?;
        let half = Tensor::new(&[0.5, 0.5], &Device::Cpu)?;
        let one = Tensor::new(&[1.0, 1.0], &Device::Cpu)?;
        let batch = Batch {
            token_logp: &flat,
            token_ref_logp: &flat,
            lengths: &[1, 1],
            logp: &flat,
            ref_logp: &flat,
            first: &[0, 1],
            second: &[1, 0],
            p: &half,
            pair_weight: &one,
            baseline: Some(Baseline {
                token_logp: &tokens,
                lengths: &[1, 3],
            }),
        };
        let two_ln2 = 2.0 * std::f64::consts::LN_2;
        let mean = RpoBaseline::Mean { coefficient: 0.3 };
        for (nll, loss_is, gradient_is) in [
            (RpoBaseline::Sum, two_ln2 + 0.5 * 0.2 * 6.5, [-0.1; 4]),
            (mean, two_ln2 + 0.3 * (0.5 + 2.0), [-0.3, -0.1, -0.1, -0.1]),
        ] {
            let loss = Rpo {
                beta: 0.2,
                eta: 0.5,
                nll,
            }
            .loss(&batch)?;
            close(&[loss.to_scalar::<f64>()?], &[loss_is], 1e-12);
            let gradients = loss.backward()?;
            let gradient = gradients
                .get(&tokens)
                .expect("the tokens are variables of the loss");
            close(&gradient.to_vec1::<f64>()?, &gradient_is, 1e-12);
        }
        Ok(())
    }
}
