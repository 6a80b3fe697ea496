//! Nash-MD as a policy gradient: y from the policy is compared with y' from the mixture.
//!
//! Munos et al. 2023 (arXiv 2312.00886), the algorithm Nash-MD-PG. Descends `J = −E[p(y ≻ y') − ½] + τ·KL(π‖ref)` over
//! y ~ π, with the distribution of y' fixed.
//!
//! Does not know how y' was sampled. It reads log π token by token, whatever the run's
//! [`LogpReduction`](settings::LogpReduction): a policy gradient is defined for the sum.

use candle_core::{Result, Tensor, bail};

use crate::objective::{Batch, Objective};

/// Nash-MD-PG as an objective. The first completion of every row must be from the policy itself and the second from the
/// mixture, in pairs of exactly two completions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NashMdPg {
    /// KL temperature τ ≥ 0.
    pub tau: f64,
}

impl Objective for NashMdPg {
    fn name(&self) -> &'static str {
        "nash-md-pg"
    }

    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        let logp = batch.tokens_of_first(batch.token_logp)?;
        let ref_logp = batch.tokens_of_first(batch.token_ref_logp)?;
        batch.weighted_sum(&surrogate(&logp, &ref_logp, batch.p, self.tau)?)
    }
}

/// The loss per pair, `[B]`: `logp` and `ref_logp` are `[B, L]`, the tokens of y with zeros in both
/// after its end; `p` is `[B]`.
///
/// The *gradient* of the loss is, with SG the stop-gradient,
/// `Σₙ ∇log π(yₙ)·SG[τ·Σ_{k≥n} log(π(y_k)/ref(y_k)) − (p − ½)]`:
/// the score of y times the negative advantage, and the KL token by token with its reward-to-go. The log-ratios before
/// token n are left out: they do not depend on it and only add variance.
///
/// The *value* of the loss is `τ·log(π(y)/ref(y)) − (p − ½)`, one sample of `J`: its mean over pairs is an unbiased estimate of the
/// objective. The gradient is not the derivative of that value, since the value's distribution changes with the policy;
/// do not compare the two by finite differences of one sample, nor use the value in a line search.
///
/// # Errors
/// If the shapes disagree.
pub fn surrogate(logp: &Tensor, ref_logp: &Tensor, p: &Tensor, tau: f64) -> Result<Tensor> {
    let (rows, tokens) = logp.dims2()?;
    if ref_logp.dims() != logp.dims() || p.dims() != [rows] {
        bail!(
            "log π has shape {:?}, log ref {:?} and p {:?}, expected [B, L], [B, L] and [B]",
            logp.dims(),
            ref_logp.dims(),
            p.dims()
        );
    }
    let detached = logp.detach();
    let ratio = (&detached - ref_logp.detach())?;
    let advantage = (p.detach() - 0.5)?;

    // Row k, column n of the lower triangle is 1 where k ≥ n.
    let to_go = ratio.matmul(&Tensor::tril2(tokens, logp.dtype(), logp.device())?)?;
    let cost = (to_go * tau)?.broadcast_sub(&advantage.unsqueeze(1)?)?;
    // Zero in value, the score in gradient.
    let score = ((logp - &detached)? * cost)?.sum(1)?;

    ((ratio.sum(1)? * tau)? - advantage)? + score
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use messages::Seed;

    use super::*;
    use crate::objective::bandit::{close, random_preferences, uniforms};

    #[test]
    fn one_completion_by_hand() -> Result<()> {
        let logp = Var::new(&[[-1.0, -2.0, 0.0]], &Device::Cpu)?;
        let ref_logp = Tensor::new(&[[-1.5, -1.0, 0.0]], &Device::Cpu)?;
        let p = Tensor::new(&[0.8], &Device::Cpu)?;
        // Log-ratios .5 and −1 (and padding): to go −.5 and −1; times τ = .1, less the advantage .3.
        let loss = surrogate(&logp, &ref_logp, &p, 0.1)?;
        close(&loss.to_vec1::<f64>()?, &[-0.35], 1e-12);
        let gradients = loss.backward()?;
        let gradient = gradients
            .get(&logp)
            .expect("log π is a variable of the loss");
        close(&gradient.to_vec2::<f64>()?[0][..2], &[-0.35, -0.4], 1e-12);
        Ok(())
    }

    #[test]
    fn shapes_that_disagree_are_rejected() -> Result<()> {
        let two = Tensor::new(&[[0.0, 0.0]], &Device::Cpu)?;
        let three = Tensor::new(&[[0.0, 0.0, 0.0]], &Device::Cpu)?;
        let p = Tensor::new(&[0.5], &Device::Cpu)?;
        assert!(surrogate(&two, &three, &p, 0.1).is_err());
        assert!(surrogate(&two, &two, &Tensor::new(&[0.5, 0.5], &Device::Cpu)?, 0.1).is_err());
        Ok(())
    }

    /// A vocabulary of three tokens, of which 0 is end-of-text, and at most two tokens: seven texts. Nine logits: three
    /// for the first token, then three after token 1 and three after token 2.
    struct TwoTokenBandit {
        ref_logits: [f64; 9],
        /// `beats[y][z]`: the probability that y is preferred to z.
        beats: Vec<Vec<f64>>,
        /// The distribution of y'.
        opponent: [f64; 7],
    }

    /// Each text as indices of the nine token log-probabilities.
    const TEXTS: [&[u32]; 7] = [&[0], &[1, 3], &[1, 4], &[1, 5], &[2, 6], &[2, 7], &[2, 8]];

    impl TwoTokenBandit {
        fn new() -> Self {
            let mut draws = uniforms(Seed(11));
            let mut draw = || draws.next().expect("the draws do not end");
            let opponent: [f64; 7] = std::array::from_fn(|_| draw());
            let total: f64 = opponent.iter().sum();
            Self {
                ref_logits: std::array::from_fn(|_| 2.0 * draw() - 1.0),
                beats: random_preferences(7, Seed(12)),
                opponent: opponent.map(|weight| weight / total),
            }
        }

        /// `J` by enumeration, in plain arithmetic.
        fn exact(&self, logits: &[f64; 9], tau: f64) -> f64 {
            let (logp, ref_logp) = (log_softmax(logits), log_softmax(&self.ref_logits));
            let of = |table: &[f64; 9], y: usize| -> f64 {
                TEXTS[y].iter().map(|&index| table[index as usize]).sum()
            };
            let cost = |y: usize| {
                let wins: f64 = (0..7).map(|z| self.opponent[z] * self.beats[y][z]).sum();
                tau * (of(&logp, y) - of(&ref_logp, y)) - (wins - 0.5)
            };
            (0..7).map(|y| of(&logp, y).exp() * cost(y)).sum()
        }

        /// The expectation of the loss and of its gradient, over all 49 pairs.
        fn expected(&self, logits: &[f64; 9], tau: f64) -> Result<(f64, Vec<f64>)> {
            let device = &Device::Cpu;
            let theta = Var::new(logits, device)?;
            let table = theta.reshape((3, 3))?;
            let table = table
                .broadcast_sub(&table.exp()?.sum_keepdim(1)?.log()?)?
                .flatten_all()?;
            let indices = Tensor::new(TEXTS.concat(), device)?;
            let token_logp = table.index_select(&indices, 0)?;
            let token_ref_logp =
                Tensor::new(&log_softmax(&self.ref_logits), device)?.index_select(&indices, 0)?;

            let (mut first, mut second, mut p, mut weight) = (vec![], vec![], vec![], vec![]);
            let logp = log_softmax(logits);
            for (y, text) in TEXTS.iter().enumerate() {
                let probability = text
                    .iter()
                    .map(|&index| logp[index as usize])
                    .sum::<f64>()
                    .exp();
                for z in 0..7 {
                    first.push(y as u32);
                    second.push(z as u32);
                    p.push(self.beats[y][z]);
                    weight.push(probability * self.opponent[z]);
                }
            }
            // Zeros where the reduced log-probabilities go: they must not be read.
            let unread = Tensor::zeros(7, candle_core::DType::F64, device)?;
            let loss = NashMdPg { tau }.loss(&Batch {
                token_logp: &token_logp,
                token_ref_logp: &token_ref_logp,
                lengths: &TEXTS.map(<[u32]>::len),
                logp: &unread,
                ref_logp: &unread,
                first: &first,
                second: &second,
                p: &Tensor::new(p, device)?,
                pair_weight: &Tensor::new(weight, device)?,
                baseline: None,
            })?;
            let gradients = loss.backward()?;
            let gradient = gradients
                .get(&theta)
                .expect("the logits are variables of the loss");
            Ok((loss.to_scalar()?, gradient.to_vec1()?))
        }
    }

    fn log_softmax(logits: &[f64; 9]) -> [f64; 9] {
        let total = |row: usize| {
            logits[3 * row..][..3]
                .iter()
                .map(|z| z.exp())
                .sum::<f64>()
                .ln()
        };
        std::array::from_fn(|i| logits[i] - total(i / 3))
    }

    #[test]
    fn the_expected_gradient_is_that_of_the_exact_objective() -> Result<()> {
        let bandit = TwoTokenBandit::new();
        let logits = [0.4, -0.3, 0.2, 1.0, 0.0, -1.0, -0.5, 0.7, 0.1];
        for tau in [0.0, 0.008, 0.5, 3.0] {
            let (value, gradient) = bandit.expected(&logits, tau)?;
            close(&[value], &[bandit.exact(&logits, tau)], 1e-12);
            let step = 1e-5;
            let numeric: Vec<f64> = (0..9)
                .map(|i| {
                    let at = |by: f64| {
                        let mut logits = logits;
                        logits[i] += by;
                        bandit.exact(&logits, tau)
                    };
                    (at(step) - at(-step)) / (2.0 * step)
                })
                .collect();
            close(&gradient, &numeric, 1e-8);
            assert!(
                gradient.iter().any(|g| g.abs() > 1e-2),
                "τ={tau}: no gradient"
            );
        }
        Ok(())
    }

    #[test]
    fn at_the_reference_the_kl_has_no_gradient() -> Result<()> {
        let bandit = TwoTokenBandit::new();
        let (without, with) = (
            bandit.expected(&bandit.ref_logits, 0.0)?,
            bandit.expected(&bandit.ref_logits, 5.0)?,
        );
        close(&[without.0], &[with.0], 1e-12);
        close(&without.1, &with.1, 1e-12);
        Ok(())
    }
}
