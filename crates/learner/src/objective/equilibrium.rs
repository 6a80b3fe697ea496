//! Tests of the fixed points of self-play.
//!
//! A bandit's samples are enumerated with their probabilities, so the gradients are exact. Online IPO must converge to
//! `π ∝ ref·exp(p(y ≻ π)/τ)`, IPO-MD and Nash-MD-PG to `π ∝ ref·exp(p(y ≻ mixture)/τ)`, the regularised Nash
//! equilibrium of the preference model; online DPO converges elsewhere.

use candle_core::Result;
use messages::Seed;
use settings::{IpoScale, OffPolicy};

use crate::objective::bandit::{
    ActionPair, close, loss_and_gradient, random_preferences, uniforms,
};
use crate::objective::{Dpo, Ipo, NashMdPg, Objective, RejectionSampling, Rloo, Slic};
use crate::trainer::off_policy::Correction;

/// A preference model over actions and the reference policy.
struct ArmPreferences {
    /// `beats[i][j]`: the probability that i is preferred to j.
    beats: Vec<Vec<f64>>,
    reference: Vec<f64>,
}

/// Distributions of the two completions.
#[derive(Debug, Clone, Copy)]
enum Samples {
    /// Both from the mixture with this weight on the reference; 0 is the policy.
    Both(f64),
    /// The first from the policy, the second from the mixture.
    SecondOnly(f64),
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|z| z.exp()).sum();
    logits.iter().map(|z| z.exp() / total).collect()
}

impl ArmPreferences {
    /// Each action beats another: no scalar reward explains it.
    fn cycle() -> Self {
        Self {
            beats: vec![
                vec![0.5, 0.8, 0.3],
                vec![0.2, 0.5, 0.9],
                vec![0.7, 0.1, 0.5],
            ],
            reference: vec![0.5, 0.3, 0.2],
        }
    }

    fn random(arms: usize, seed: Seed) -> Self {
        let logits: Vec<f64> = uniforms(seed.derive(1))
            .take(arms)
            .map(|u| 2.0 * u)
            .collect();
        Self {
            beats: random_preferences(arms, seed.derive(0)),
            reference: softmax(&logits),
        }
    }

    /// `softmax((1−m)·z_π + m·z_ref)`.
    fn mixture(&self, theta: &[f64], mixture_coef: f64) -> Vec<f64> {
        let log_policy = softmax(theta).into_iter().map(f64::ln);
        let mixed = log_policy.zip(&self.reference).map(|(policy, reference)| {
            (1.0 - mixture_coef) * policy + mixture_coef * reference.ln()
        });
        softmax(&mixed.collect::<Vec<_>>())
    }

    /// All pairs of actions with their probabilities at `theta` and soft labels.
    fn rows(&self, theta: &[f64], samples: Samples) -> Vec<ActionPair> {
        let (first, second) = match samples {
            Samples::Both(m) => (self.mixture(theta, m), self.mixture(theta, m)),
            Samples::SecondOnly(m) => (softmax(theta), self.mixture(theta, m)),
        };
        let mut rows = Vec::new();
        for (i, of_first) in first.iter().enumerate() {
            for (j, of_second) in second.iter().enumerate() {
                let weight = of_first * of_second;
                rows.push(ActionPair {
                    first: i as u32,
                    second: j as u32,
                    p: self.beats[i][j],
                    weight,
                });
            }
        }
        rows
    }

    /// All pairs of actions with their probabilities under a fixed `behaviour`, times what each counts as at `theta`.
    fn off_policy_rows(
        &self,
        theta: &[f64],
        behaviour: &[f64],
        correction: &Correction,
    ) -> Vec<ActionPair> {
        let policy = softmax(theta);
        let log_ratio = |action: u32| {
            let action = action as usize;
            (policy[action] / behaviour[action]).ln()
        };
        let fixed: Vec<f64> = behaviour.iter().map(|p| p.ln()).collect();
        let mut rows = self.rows(&fixed, Samples::Both(0.0));
        for row in &mut rows {
            let log_weight = log_ratio(row.first) + log_ratio(row.second);
            row.weight *= correction.factor(Some(log_weight));
        }
        rows
    }

    /// Logits to which gradient descent from the reference converges.
    fn converge(&self, objective: &dyn Objective, samples: Samples, rate: f64) -> Result<Vec<f64>> {
        self.descend(objective, rate, |theta| self.rows(theta, samples))
    }

    /// Logits to which gradient descent from the reference on these rows converges.
    fn descend(
        &self,
        objective: &dyn Objective,
        rate: f64,
        rows: impl Fn(&[f64]) -> Vec<ActionPair>,
    ) -> Result<Vec<f64>> {
        let mut theta: Vec<f64> = self.reference.iter().map(|r| r.ln()).collect();
        for _ in 0..5000 {
            let rows = rows(&theta);
            let (_, gradient) = loss_and_gradient(objective, &theta, &self.reference, &rows, None)?;
            theta
                .iter_mut()
                .zip(&gradient)
                .for_each(|(z, g)| *z -= rate * g);
            if gradient.iter().all(|g| (rate * g).abs() < 1e-9) {
                return Ok(theta);
            }
        }
        panic!(
            "{} does not converge: {:?}",
            objective.name(),
            softmax(&theta)
        );
    }

    /// Distance of `theta` from `π ∝ ref·exp(p(y ≻ mixture)/τ)`: the largest difference in log π.
    fn residual(&self, theta: &[f64], tau: f64, mixture_coef: f64) -> f64 {
        self.residual_against(&self.mixture(theta, mixture_coef), theta, tau)
    }

    /// Distance of `theta` from `π ∝ ref·exp(p(y ≻ opponent)/τ)`.
    fn residual_against(&self, opponent: &[f64], theta: &[f64], tau: f64) -> f64 {
        let answer = self
            .beats
            .iter()
            .zip(&self.reference)
            .map(|(beats, reference)| {
                let wins: f64 = beats
                    .iter()
                    .zip(opponent)
                    .map(|(p, weight)| p * weight)
                    .sum();
                reference.ln() + wins / tau
            });
        let answer = softmax(&answer.collect::<Vec<_>>());
        let differences = softmax(theta)
            .into_iter()
            .zip(answer)
            .map(|(a, b)| (a / b).ln().abs());
        differences.fold(0.0, f64::max)
    }
}

fn ipo(tau: f64) -> Ipo {
    Ipo {
        tau,
        scale: IpoScale::Square,
    }
}

/// (τ, m, policy, mixture) for [`ArmPreferences::cycle`].
const TABLE: [(f64, f64, [f64; 3], [f64; 3]); 5] = [
    (
        1.0,
        0.0,
        [0.523000, 0.278052, 0.198948],
        [0.523000, 0.278052, 0.198948],
    ),
    (
        0.5,
        0.0,
        [0.540314, 0.256488, 0.203198],
        [0.540314, 0.256488, 0.203198],
    ),
    (
        0.1,
        0.0,
        [0.530186, 0.192368, 0.277445],
        [0.530186, 0.192368, 0.277445],
    ),
    (
        0.5,
        0.5,
        [0.545601, 0.257024, 0.197375],
        [0.523000, 0.278052, 0.198948],
    ),
    (0.5, 1.0, [0.549535, 0.259368, 0.191097], [0.5, 0.3, 0.2]),
];

#[test]
fn the_exact_expected_gradient_of_ipo() -> Result<()> {
    let bandit = ArmPreferences::cycle();
    let theta = [0.3, -0.2, 0.1];
    for (m, expected) in [
        (0.0, [-0.4280536, -0.2564531, 0.6845067]),
        (0.5, [-0.4643973, -0.1278198, 0.5922172]),
    ] {
        let rows = bandit.rows(&theta, Samples::Both(m));
        let (_, gradient) = loss_and_gradient(&ipo(0.5), &theta, &bandit.reference, &rows, None)?;
        close(&gradient, &expected, 1e-7);
    }
    Ok(())
}

#[test]
fn ipo_converges_to_the_equilibrium_of_the_cycle() -> Result<()> {
    let bandit = ArmPreferences::cycle();
    for (tau, m, policy, mixture) in TABLE {
        for (scale, rate) in [(IpoScale::Square, 0.3), (IpoScale::Scaled, 0.3 / tau)] {
            let theta = bandit.converge(&Ipo { tau, scale }, Samples::Both(m), rate)?;
            close(&softmax(&theta), &policy, 1e-6);
            close(&bandit.mixture(&theta, m), &mixture, 1e-6);
        }
    }
    Ok(())
}

#[test]
fn nash_md_pg_converges_to_the_same_policy() -> Result<()> {
    let bandit = ArmPreferences::cycle();
    for (tau, m, policy, _) in TABLE {
        let theta = bandit.converge(&NashMdPg { tau }, Samples::SecondOnly(m), 1.0 / tau)?;
        close(&softmax(&theta), &policy, 1e-6);
    }
    Ok(())
}

/// Of a reward model, that is where RLHF's optimum and the fixed point of DPO with the same β are.
#[test]
fn rloo_maximises_the_reward_less_the_kl() -> Result<()> {
    let (rewards, beta) = ([0.4, -0.3, 1.1], 0.5);
    let win = |i: usize, j: usize| 1.0 / (1.0 + f64::exp(rewards[j] - rewards[i]));
    let bandit = ArmPreferences {
        beats: (0..3)
            .map(|i| (0..3).map(|j| win(i, j)).collect())
            .collect(),
        ..ArmPreferences::cycle()
    };
    let theta = bandit.converge(&Rloo { beta }, Samples::Both(0.0), 1.0)?;
    let optimum = (0..3).map(|i| bandit.reference[i].ln() + rewards[i] / beta);
    close(
        &softmax(&theta),
        &softmax(&optimum.collect::<Vec<_>>()),
        1e-6,
    );
    let dpo = bandit.converge(&Dpo { beta }, Samples::Both(0.0), 10.0)?;
    close(&softmax(&theta), &softmax(&dpo), 1e-5);
    Ok(())
}

/// Of a cycle, which no reward explains, RLOO solves `π ∝ ref·exp(E[log-odds of y against π]/β)`: not the equilibrium.
#[test]
fn rloo_solves_another_fixed_point_on_a_cycle() -> Result<()> {
    let (bandit, beta) = (ArmPreferences::cycle(), 0.5);
    let theta = bandit.converge(&Rloo { beta }, Samples::Both(0.0), 1.0)?;
    let policy = softmax(&theta);
    let answer = (0..3).map(|i| {
        let log_odds = bandit.beats[i].iter().map(|p| (p / (1.0 - p)).ln());
        let mean: f64 = log_odds
            .zip(&policy)
            .map(|(odds, weight)| odds * weight)
            .sum();
        bandit.reference[i].ln() + mean / beta
    });
    close(&policy, &softmax(&answer.collect::<Vec<_>>()), 1e-6);
    assert!(bandit.residual(&theta, beta, 0.0) > 0.1);
    Ok(())
}

/// Of the reference's samples: `π(y) = 2·ref(y)·p(y ≻ ref)`, of a cycle too.
#[test]
fn rejection_sampling_learns_the_distribution_of_the_preferred_sample() -> Result<()> {
    for bandit in [ArmPreferences::cycle(), ArmPreferences::random(5, Seed(3))] {
        let theta = bandit.converge(&RejectionSampling, Samples::Both(1.0), 1.0)?;
        let win = |arm: usize| -> f64 {
            let others = bandit.beats[arm].iter().zip(&bandit.reference);
            others.map(|(p, weight)| p * weight).sum()
        };
        let arms = bandit.reference.iter().enumerate();
        let expected: Vec<f64> = arms.map(|(arm, weight)| 2.0 * weight * win(arm)).collect();
        close(&[expected.iter().sum()], &[1.0], 1e-12);
        close(&softmax(&theta), &expected, 1e-6);
    }
    Ok(())
}

#[test]
fn online_dpo_converges_elsewhere() -> Result<()> {
    let bandit = ArmPreferences::cycle();
    let theta = bandit.converge(&Dpo { beta: 0.5 }, Samples::Both(0.0), 10.0)?;
    close(&softmax(&theta), &[0.541511, 0.195309, 0.263181], 1e-6);
    assert!(bandit.residual(&theta, 0.5, 0.0) > 0.1);
    Ok(())
}

/// A bound that no weight of these games reaches.
const TRUNCATED: Correction = Correction {
    kind: OffPolicy::Truncate,
    max_ratio: 1e6,
};
const UNCORRECTED: Correction = Correction {
    kind: OffPolicy::None,
    max_ratio: 1e6,
};

#[test]
fn the_expected_gradient_of_weighted_off_policy_pairs_is_the_on_policy_one() -> Result<()> {
    let bandit = ArmPreferences::cycle();
    let (theta, behaviour) = ([0.3, -0.2, 0.1], [0.2, 0.3, 0.5]);
    let gradient = |correction: &Correction| {
        let rows = bandit.off_policy_rows(&theta, &behaviour, correction);
        let found = loss_and_gradient(&ipo(0.5), &theta, &bandit.reference, &rows, None);
        found.map(|(_, gradient)| gradient)
    };
    let on_policy = [-0.4280536, -0.2564531, 0.6845067];
    close(&gradient(&TRUNCATED)?, &on_policy, 1e-7);
    // Outside the bounds of masks and truncations it is not, nor without weights.
    let masked = Correction {
        kind: OffPolicy::Mask,
        max_ratio: 1e6,
    };
    assert_eq!(gradient(&masked)?, gradient(&UNCORRECTED)?);
    for correction in [
        UNCORRECTED,
        Correction {
            max_ratio: 1.1,
            ..TRUNCATED
        },
        Correction {
            max_ratio: 2.0,
            ..masked
        },
    ] {
        let biased = gradient(&correction)?;
        assert!(
            (biased[0] - on_policy[0]).abs() > 0.01,
            "{correction:?} {biased:?}"
        );
    }
    Ok(())
}

/// Policy-gradient and regression objectives alike; the policy's own pairs would give the same.
#[test]
fn weighted_pairs_of_any_behaviour_lead_to_the_on_policy_fixed_point() -> Result<()> {
    let bandit = ArmPreferences::cycle();
    let behaviour = [0.2, 0.3, 0.5];
    for (tau, m, policy, _) in TABLE {
        if m > 0.0 {
            continue;
        }
        let rows = |theta: &[f64]| bandit.off_policy_rows(theta, &behaviour, &TRUNCATED);
        let theta = bandit.descend(&ipo(tau), 0.3, rows)?;
        close(&softmax(&theta), &policy, 1e-6);
        let theta = bandit.descend(&NashMdPg { tau }, 1.0 / tau, rows)?;
        close(&softmax(&theta), &policy, 1e-6);
    }
    let rows = |theta: &[f64]| bandit.off_policy_rows(theta, &behaviour, &TRUNCATED);
    let theta = bandit.descend(&Dpo { beta: 0.5 }, 10.0, rows)?;
    close(&softmax(&theta), &[0.541511, 0.195309, 0.263181], 1e-6);
    for (arms, seed) in [(4, 1), (5, 3)] {
        let bandit = ArmPreferences::random(arms, Seed(seed));
        let behaviour = ArmPreferences::random(arms, Seed(seed + 10)).reference;
        let rows = |theta: &[f64]| bandit.off_policy_rows(theta, &behaviour, &TRUNCATED);
        let theta = bandit.descend(&ipo(0.3), 0.3, rows)?;
        let residual = bandit.residual(&theta, 0.3, 0.0);
        assert!(residual < 1e-6, "{arms} arms: {residual:e}");
    }
    Ok(())
}

/// Without weights, IPO regresses on `p(y ≻ μ)/τ`: the weights of least squares are a product.
#[test]
fn pairs_of_another_behaviour_lead_elsewhere_without_weights() -> Result<()> {
    for (bandit, behaviour) in [
        (ArmPreferences::cycle(), vec![0.2, 0.3, 0.5]),
        (
            ArmPreferences::random(4, Seed(1)),
            ArmPreferences::random(4, Seed(11)).reference,
        ),
    ] {
        let rows = |theta: &[f64]| bandit.off_policy_rows(theta, &behaviour, &UNCORRECTED);
        let theta = bandit.descend(&ipo(0.3), 0.3, rows)?;
        let residual = bandit.residual_against(&behaviour, &theta, 0.3);
        assert!(residual < 1e-6, "{residual:e}");
        let on_policy = bandit.residual(&theta, 0.3, 0.0);
        assert!(on_policy > 0.05, "{on_policy}");
    }
    Ok(())
}

#[test]
fn ipo_solves_the_fixed_point_of_any_preference_model() -> Result<()> {
    for (arms, seed) in [(4, 1), (4, 2), (5, 3), (5, 4)] {
        let bandit = ArmPreferences::random(arms, Seed(seed));
        for (tau, m) in [(1.0, 0.0), (0.3, 0.0), (0.3, 0.5), (0.5, 0.125)] {
            let theta = bandit.converge(&ipo(tau), Samples::Both(m), 0.3)?;
            let residual = bandit.residual(&theta, tau, m);
            assert!(residual < 1e-6, "{arms} arms, τ={tau}, m={m}: {residual:e}");
            // The mixture is the equilibrium at temperature τ/(1−m).
            let mixture: Vec<f64> = bandit.mixture(&theta, m).into_iter().map(f64::ln).collect();
            let residual = bandit.residual(&mixture, tau / (1.0 - m), 0.0);
            assert!(
                residual < 1e-6,
                "{arms} arms, τ={tau}, m={m}, mixture: {residual:e}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_preference_model_of_ties_leaves_the_policy_at_the_reference() -> Result<()> {
    let bandit = ArmPreferences {
        beats: vec![vec![0.5; 3]; 3],
        ..ArmPreferences::cycle()
    };
    let theta: [f64; 3] = [0.3, -0.2, 0.1];
    let objectives: [(&dyn Objective, f64); 3] = [
        (&ipo(0.5), 0.3),
        (&Dpo { beta: 0.5 }, 5.0),
        (&Slic { beta: 5.0 }, 0.005),
    ];
    for (objective, rate) in objectives {
        let mut theta = theta.to_vec();
        for _ in 0..2000 {
            let rows = bandit.rows(&theta, Samples::Both(0.0));
            let (_, gradient) =
                loss_and_gradient(objective, &theta, &bandit.reference, &rows, None)?;
            theta
                .iter_mut()
                .zip(gradient)
                .for_each(|(z, g)| *z -= rate * g);
        }
        // SLiC requires only |h| < 1/β.
        let tolerance = if objective.name() == "slic" {
            0.06
        } else {
            1e-6
        };
        close(&softmax(&theta), &bandit.reference, tolerance);
    }
    Ok(())
}
