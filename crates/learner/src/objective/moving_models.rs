//! Tests of what averages and moving references change in self-play, with the exact gradients of a bandit.
//!
//! Momentum makes the iterates orbit the equilibrium of a cyclic preference, and their average is near it. A moving
//! reference takes the regularisation away step by step (a proximal point method): the limit is the equilibrium of the
//! preference alone, whatever τ and the start.

use candle_core::Result;
use settings::IpoScale;

use crate::objective::{
    Ipo,
    bandit::{ActionPair, close, loss_and_gradient},
};

/// `BEATS[i][j]`: the probability that action i is preferred to j. Each beats another.
const BEATS: [[f64; 3]; 3] = [[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]];

/// The reference of the start.
const START: [f64; 3] = [0.5, 0.3, 0.2];

const TAU: f64 = 0.5;

/// Equilibrium at [`TAU`] with the reference [`START`].
const REGULARISED: [f64; 3] = [0.540314, 0.256488, 0.203198];

/// Equilibrium without regularisation: ∝ (P₂₃, P₃₁, P₁₂) − ½.
const NASH: [f64; 3] = [4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0];

/// Exact gradient of online IPO at the logits `theta`.
fn gradient(theta: &[f64], reference: &[f64]) -> Result<Vec<f64>> {
    let objective = Ipo {
        tau: TAU,
        scale: IpoScale::Square,
    };
    let policy = softmax(theta);
    let pairs = (0..9).map(|pair| (pair / 3, pair % 3));
    let rows = pairs.map(|(i, j)| ActionPair {
        first: i as u32,
        second: j as u32,
        p: BEATS[i][j],
        weight: policy[i] * policy[j],
    });
    let rows: Vec<ActionPair> = rows.collect();
    Ok(loss_and_gradient(&objective, theta, reference, &rows, None)?.1)
}

/// One step of gradient descent.
fn descend(theta: &mut [f64], reference: &[f64]) -> Result<()> {
    let gradient = gradient(theta, reference)?;
    theta
        .iter_mut()
        .zip(gradient)
        .for_each(|(z, g)| *z -= 0.3 * g);
    Ok(())
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|z| z.exp()).sum();
    logits.iter().map(|z| z.exp() / total).collect()
}

/// Largest difference of log π from the solution `π ∝ ref·exp(p(y ≻ π)/τ)` of the game with this reference.
fn residual(theta: &[f64], reference: &[f64]) -> f64 {
    let policy = softmax(theta);
    let answer = BEATS.iter().zip(reference).map(|(beats, reference)| {
        let wins: f64 = beats
            .iter()
            .zip(&policy)
            .map(|(p, weight)| p * weight)
            .sum();
        reference.ln() + wins / TAU
    });
    let answer = softmax(&answer.collect::<Vec<_>>());
    let differences = policy.iter().zip(answer).map(|(a, b)| (a / b).ln().abs());
    differences.fold(0.0, f64::max)
}

/// `decay·average + (1 − decay)·values`.
fn average(average: &mut [f64], values: &[f64], decay: f64) {
    for (average, value) in average.iter_mut().zip(values) {
        *average += (1.0 - decay) * (value - *average);
    }
}

fn logs(policy: &[f64]) -> Vec<f64> {
    policy.iter().map(|p| p.ln()).collect()
}

fn distance(theta: &[f64], policy: &[f64]) -> f64 {
    let both = softmax(theta).into_iter().zip(policy);
    both.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn the_average_is_near_the_equilibrium_that_the_last_iterate_orbits() -> Result<()> {
    let mut theta = logs(&START);
    let (mut velocity, mut mean) = (vec![0.0; 3], theta.clone());
    let (mut of_last, mut of_mean) = (0f64, 0f64);
    for iteration in 0..1400 {
        let gradient = gradient(&theta, &START)?;
        for (index, gradient) in gradient.into_iter().enumerate() {
            velocity[index] = 0.95 * velocity[index] + gradient;
            theta[index] -= 0.1 * velocity[index];
        }
        average(&mut mean, &theta, 0.99);
        if iteration >= 1000 {
            of_last = of_last.max(distance(&theta, &REGULARISED));
            of_mean = of_mean.max(distance(&mean, &REGULARISED));
        }
    }
    assert!(of_last > 0.02, "the last iterate: {of_last}");
    assert!(of_mean < 0.002, "the average: {of_mean}");
    Ok(())
}

/// Every copy begins another regularised game: the policy solves it, and copies of its solutions lead to the equilibrium
/// of the preference itself.
#[test]
fn a_copied_reference_leads_to_the_equilibrium_without_regularisation() -> Result<()> {
    let (mut theta, mut reference) = (logs(&START), START.to_vec());
    for copy in 0..60 {
        for _ in 0..40 {
            descend(&mut theta, &reference)?;
        }
        if copy == 0 {
            close(&softmax(&theta), &REGULARISED, 1e-4);
        }
        let residual = residual(&theta, &reference);
        assert!(residual < 1e-3, "copy {copy}: {residual:e}");
        reference = softmax(&theta);
    }
    close(&reference, &NASH, 0.01);
    Ok(())
}

#[test]
fn an_averaged_reference_leads_to_the_equilibrium_without_regularisation() -> Result<()> {
    let mut theta = logs(&START);
    let mut reference = theta.clone();
    for _ in 0..1500 {
        descend(&mut theta, &softmax(&reference))?;
        average(&mut reference, &theta, 0.9);
    }
    close(&softmax(&theta), &NASH, 1e-3);
    close(&softmax(&reference), &NASH, 1e-3);
    Ok(())
}
