//! Test fixture: a softmax policy over a few actions, for which the loss over any pairs can be computed exactly.

use candle_core::{Device, Result, Tensor, Var};
use messages::Seed;

use crate::objective::{Baseline, Batch, Objective};

/// A labelled comparison of two actions.
#[derive(Debug, Clone, Copy)]
pub struct ActionPair {
    /// y.
    pub first: u32,
    /// y'.
    pub second: u32,
    /// The label.
    pub p: f64,
    /// Weight; for an expectation, the pair's probability.
    pub weight: f64,
}

/// Loss over `rows` and its gradient in the logits `theta`. Samples, labels and weights carry no gradient. `golden` are
/// the baseline's actions.
pub fn loss_and_gradient(
    objective: &dyn Objective,
    theta: &[f64],
    reference: &[f64],
    rows: &[ActionPair],
    golden: Option<&[u32]>,
) -> Result<(f64, Vec<f64>)> {
    let device = &Device::Cpu;
    let theta = Var::new(theta, device)?;
    let logp = theta.broadcast_sub(&theta.exp()?.sum_all()?.log()?)?;
    let ref_logp = Tensor::new(reference, device)?.log()?;
    let golden_logp = golden
        .map(|actions| logp.index_select(&Tensor::new(actions, device)?, 0))
        .transpose()?;
    let golden_lengths = vec![1; golden.map_or(0, <[u32]>::len)];
    let column = |of: fn(&ActionPair) -> f64| -> Result<Tensor> {
        Tensor::new(rows.iter().map(of).collect::<Vec<_>>(), device)
    };
    let loss = objective.loss(&Batch {
        token_logp: &logp,
        token_ref_logp: &ref_logp,
        lengths: &vec![1; reference.len()],
        logp: &logp,
        ref_logp: &ref_logp,
        first: &rows.iter().map(|row| row.first).collect::<Vec<_>>(),
        second: &rows.iter().map(|row| row.second).collect::<Vec<_>>(),
        p: &column(|row| row.p)?,
        pair_weight: &column(|row| row.weight)?,
        baseline: golden_logp.as_ref().map(|token_logp| Baseline {
            token_logp,
            lengths: &golden_lengths,
        }),
    })?;
    let gradients = loss.backward()?;
    let gradient = gradients
        .get(&theta)
        .expect("the logits are variables of the loss");
    Ok((loss.to_scalar()?, gradient.to_vec1()?))
}

/// Infinite sequence of values uniform in [0, 1).
pub fn uniforms(seed: Seed) -> impl Iterator<Item = f64> {
    (0..).map(move |i| (seed.derive(i).0 >> 11) as f64 / (1u64 << 53) as f64)
}

/// Random `beats[y][z]`, the probability that y is preferred to z, for `count` actions.
pub fn random_preferences(count: usize, seed: Seed) -> Vec<Vec<f64>> {
    let mut beats = vec![vec![0.5; count]; count];
    let pairs = (0..count).flat_map(|y| (0..y).map(move |z| (y, z)));
    for ((y, z), p) in pairs.zip(uniforms(seed)) {
        beats[y][z] = p;
        beats[z][y] = 1.0 - p;
    }
    beats
}

/// Asserts that `found` and `expected` differ by at most `tolerance` in every element.
#[track_caller]
pub fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let near = found
        .iter()
        .zip(expected)
        .all(|(a, b)| (a - b).abs() <= tolerance);
    assert!(near, "{found:?} is not {expected:?} to {tolerance:e}");
}
