//! Tests of what averages and moving references change in self-play, with the exact gradients of a bandit.
//!
//! Momentum makes the iterates orbit the equilibrium of a cyclic preference, and their average is near it. A moving
//! reference takes the regularisation away step by step (a proximal point method): the limit is the equilibrium of the
//! preference alone, whatever τ and the start.

use candle_core::Result;

use crate::objective::bandit::{close, loss_and_gradient};
use crate::objective::equilibrium::{Bandit, Samples, ipo, softmax};

/// Equilibrium of [`Bandit::cycle`] without regularisation: ∝ (P₂₃, P₃₁, P₁₂) − ½.
const NASH: [f64; 3] = [4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0];

const TAU: f64 = 0.5;

fn step(bandit: &Bandit, theta: &[f64], reference: &[f64]) -> Result<Vec<f64>> {
    let rows = bandit.rows(theta, Samples::Both(0.0));
    let (_, gradient) = loss_and_gradient(&ipo(TAU), theta, reference, &rows, None)?;
    Ok(gradient)
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
    let bandit = Bandit::cycle();
    let equilibrium = softmax(&bandit.converge(&ipo(TAU), Samples::Both(0.0), 0.3)?);
    let mut theta = logs(&bandit.reference);
    let (mut velocity, mut mean) = (vec![0.0; 3], theta.clone());
    let (mut of_last, mut of_mean) = (0f64, 0f64);
    for iteration in 0..1400 {
        let gradient = step(&bandit, &theta, &bandit.reference)?;
        for (index, gradient) in gradient.into_iter().enumerate() {
            velocity[index] = 0.95 * velocity[index] + gradient;
            theta[index] -= 0.1 * velocity[index];
        }
        average(&mut mean, &theta, 0.99);
        if iteration >= 1000 {
            of_last = of_last.max(distance(&theta, &equilibrium));
            of_mean = of_mean.max(distance(&mean, &equilibrium));
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
    let mut bandit = Bandit::cycle();
    let mut theta = logs(&bandit.reference);
    for copy in 0..60 {
        for _ in 0..40 {
            let gradient = step(&bandit, &theta, &bandit.reference)?;
            theta
                .iter_mut()
                .zip(gradient)
                .for_each(|(z, g)| *z -= 0.3 * g);
        }
        if copy % 20 == 0 {
            let residual = bandit.residual(&theta, TAU, 0.0);
            assert!(residual < 1e-4, "copy {copy}: {residual:e}");
        }
        bandit.reference = softmax(&theta);
    }
    close(&softmax(&theta), &NASH, 0.01);
    Ok(())
}

#[test]
fn an_averaged_reference_leads_to_the_equilibrium_without_regularisation() -> Result<()> {
    let bandit = Bandit::cycle();
    let fixed = softmax(&bandit.converge(&ipo(TAU), Samples::Both(0.0), 0.3)?);
    let mut theta = logs(&bandit.reference);
    let mut reference = theta.clone();
    for _ in 0..1500 {
        let gradient = step(&bandit, &theta, &softmax(&reference))?;
        theta
            .iter_mut()
            .zip(gradient)
            .for_each(|(z, g)| *z -= 0.3 * g);
        average(&mut reference, &theta, 0.9);
    }
    close(&softmax(&theta), &NASH, 1e-3);
    close(&softmax(&reference), &NASH, 1e-3);
    assert!(
        distance(&theta, &fixed) > 0.1,
        "with a fixed reference it is elsewhere"
    );
    Ok(())
}
