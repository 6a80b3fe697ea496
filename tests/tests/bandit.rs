//! Convergence of self-play on a bandit to the theoretical fixed point.
//!
//! The expected policies of three arms are the regularised Nash equilibrium, derived by hand and checked with an
//! independent program; those of two and five arms are computed by `playground::fixed_point`. The tolerance of 0.02 per
//! probability covers sampling noise and the finite number of steps.

use serde_json::Value;
use system_tests::{ProcessOutput, Sandbox, config, number, report, shared};

/// Tolerance per probability.
const TOLERANCE: f64 = 0.02;

/// Minimum distance from the fixed point without mixture, which is at least .12 away from the one with mixture.
const MIN_DISTANCE: f64 = 0.1;

/// Number of steps: fewer than the 500 of `configs/bandit.toml`, but enough for the tolerance.
const STEPS: &str = "learner.steps=350";

/// Runs `agon train configs/bandit.toml` with these settings and returns the report.
fn train(sets: &[String]) -> Value {
    let sandbox = Sandbox::new();
    let (config, run) = (config("bandit.toml"), sandbox.path("run"));
    let mut arguments = vec!["train".to_owned(), config.display().to_string()];
    arguments.extend(["--run-dir".to_owned(), run.display().to_string()]);
    arguments.extend(["--set", STEPS].map(str::to_owned));
    arguments.extend(
        sets.iter()
            .flat_map(|set| ["--set".to_owned(), set.clone()]),
    );
    let _: ProcessOutput = sandbox.run(&arguments).succeeded();
    report(&run)
}

/// The probabilities under `key` of a report, and their largest absolute difference from `expected`.
fn distance(report: &Value, key: &str, expected: &[f64]) -> (Vec<f64>, f64) {
    let actual: Vec<f64> = (0..expected.len())
        .map(|arm| number(report, &format!("/{key}/{arm}")))
        .collect();
    let differences = actual.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let largest = differences.fold(0.0, f64::max);
    (actual, largest)
}

#[track_caller]
fn assert_close(report: &Value, key: &str, expected: &[f64]) {
    let (actual, largest) = distance(report, key, expected);
    eprintln!("{key} {actual:.4?}, expected {expected:.4?}: largest difference {largest:.4}");
    assert!(
        largest <= TOLERANCE,
        "{key} {actual:.4?} differs by {largest:.4} from {expected:.4?}"
    );
}

/// Checks policy and mixture on the three arms of `configs/bandit.toml`.
fn check_three_arms(sets: &[&str], policy: [f64; 3], mixture: [f64; 3]) {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    let report = train(&sets);
    assert_close(&report, "policy", &policy);
    assert_close(&report, "mixture", &mixture);
    let win_rate = number(&report, "/win_rate");
    assert!((0.0..=1.0).contains(&win_rate), "{win_rate}");
    for reference in [0.5, 0.3, 0.2]
        .iter()
        .zip(report["reference"].as_array().into_iter().flatten())
    {
        let (expected, actual) = reference;
        assert!(
            (expected - actual.as_f64().unwrap_or(f64::NAN)).abs() < 1e-5,
            "{report:#}"
        );
    }
}

/// Checks policy and mixture of a matrix game against the exact fixed point.
fn check_matrix_game(matrix: &[&[f64]], reference: &[f64], tau: f64, mixture_coef: f64) {
    let matrix: Vec<Vec<f64>> = matrix.iter().map(|row| row.to_vec()).collect();
    let policy =
        playground::fixed_point(&matrix, reference, tau, mixture_coef).expect("a valid game");
    let mixture = playground::mixture(&policy, reference, mixture_coef);
    let report = train(&[
        format!("model.reference_probabilities={reference:?}"),
        format!("preference.judge.matrix={matrix:?}"),
        format!("learner.objective.tau={tau}"),
        format!("actor.mixture_coef={mixture_coef}"),
    ]);
    assert_close(&report, "policy", &policy);
    assert_close(&report, "mixture", &mixture);
}

/// Matrix games whose fixed point with mixture (`policy`) is at least .12 away from the one without
/// (`without_mixture`).
fn mixture_games(test: &str) -> Option<Vec<Value>> {
    let file = shared(test, "data/bandits/mixture_matters.json")?;
    let text = std::fs::read_to_string(&file);
    let text = text.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    Some(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display())))
}

/// Checks that training on these games of `mixture_matters.json` converges to the fixed point with mixture and not to
/// the one without.
fn check_mixture_games(test: &str, indices: &[usize], sets: &[&str]) {
    let Some(games) = mixture_games(test) else {
        return;
    };
    for game in indices.iter().map(|&index| &games[index]) {
        let arms = |key: &str| -> Vec<f64> {
            let all = game[key].as_array().expect("a list").iter();
            all.map(|p| p.as_f64().expect("a number")).collect()
        };
        let mut all: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        all.extend([
            format!("model.reference_probabilities={}", game["ref"]),
            format!("preference.judge.matrix={}", game["P"]),
            format!("actor.mixture_coef={}", game["mixture_coef"]),
            format!("learner.objective.tau={}", game["tau"]),
        ]);
        let report = train(&all);
        assert_close(&report, "policy", &arms("policy"));
        assert_close(&report, "mixture", &arms("mixture"));
        let (actual, difference) = distance(&report, "policy", &arms("without_mixture"));
        eprintln!("difference from the fixed point without mixture: {difference:.4}");
        assert!(
            difference > MIN_DISTANCE,
            "{actual:.4?} is the fixed point without mixture: {game}"
        );
    }
}

#[test]
fn ipo_md_converges_to_the_fixed_point_with_mixture() {
    check_mixture_games(
        "ipo_md_converges_to_the_fixed_point_with_mixture",
        &[0, 1, 2, 3, 4],
        &[],
    );
}

#[test]
fn nash_md_pg_converges_to_the_fixed_point_with_mixture() {
    let kind = ["learner.objective={ kind = \"nash-md-pg\" }"];
    check_mixture_games(
        "nash_md_pg_converges_to_the_fixed_point_with_mixture",
        &[0, 3],
        &kind,
    );
}

/// SLiC's hinge has zero gradient for h ≥ 1/β, and a preference p > ½ drives h there: arm 0 beats two equal arms, so
/// that π ∝ ref · (exp(1/β), 1, 1).
#[test]
fn slic_converges_to_its_margin() {
    let (reference, beta) = ([0.2, 0.5, 0.3], 0.5_f64);
    let lifted = reference[0] * (1.0 / beta).exp();
    let total = lifted + reference[1] + reference[2];
    let policy = [lifted / total, reference[1] / total, reference[2] / total];
    let report = train(&[
        format!("model.reference_probabilities={reference:?}"),
        "preference.judge.matrix=[[0.5,0.9,0.9],[0.1,0.5,0.5],[0.1,0.5,0.5]]".into(),
        format!("learner.objective={{ kind = \"slic\", beta = {beta:?} }}"),
    ]);
    assert_close(&report, "policy", &policy);
    assert_eq!(report["objective"]["kind"], "slic");
}

/// Rewards (1, ½, 0) as Bradley–Terry preferences: RLOO converges to π ∝ ref · exp(r/β).
#[test]
fn rloo_converges_to_the_optimum_of_the_reward() {
    let (reference, rewards, beta) = ([0.2, 0.5, 0.3], [1.0, 0.5, 0.0], 0.5_f64);
    let win = |i: usize, j: usize| 1.0 / (1.0 + f64::exp(rewards[j] - rewards[i]));
    let matrix: Vec<Vec<f64>> = (0..3)
        .map(|i| (0..3).map(|j| win(i, j)).collect())
        .collect();
    let weights = [0, 1, 2].map(|i| reference[i] * f64::exp(rewards[i] / beta));
    let total: f64 = weights.iter().sum();
    let report = train(&[
        format!("model.reference_probabilities={reference:?}"),
        format!("preference.judge.matrix={matrix:?}"),
        format!("learner.objective={{ kind = \"rloo\", beta = {beta:?} }}"),
    ]);
    assert_close(&report, "policy", &weights.map(|weight| weight / total));
}

#[test]
fn online_ipo_converges_with_tau_1() {
    let nash = [0.523000, 0.278052, 0.198948];
    check_three_arms(&["learner.objective.tau=1"], nash, nash);
}

#[test]
fn online_ipo_converges_with_tau_one_half() {
    let nash = [0.540314, 0.256488, 0.203198];
    check_three_arms(&["learner.objective.tau=0.5"], nash, nash);
}

#[test]
fn online_ipo_converges_with_tau_one_tenth() {
    let nash = [0.530186, 0.192368, 0.277445];
    check_three_arms(&["learner.objective.tau=0.1"], nash, nash);
}

#[test]
fn the_mixture_of_ipo_md_is_the_equilibrium_at_twice_the_temperature() {
    check_three_arms(
        &["learner.objective.tau=0.5", "actor.mixture_coef=0.5"],
        [0.545601, 0.257024, 0.197375],
        [0.523000, 0.278052, 0.198948],
    );
}

#[test]
fn ipo_md_with_mixture_coef_1_is_the_best_response_to_the_reference() {
    check_three_arms(
        &["learner.objective.tau=0.5", "actor.mixture_coef=1"],
        [0.549535, 0.259368, 0.191097],
        [0.5, 0.3, 0.2],
    );
}

#[test]
fn online_dpo_converges_to_its_own_fixed_point() {
    let fixed_point = [0.541511, 0.195309, 0.263181];
    check_three_arms(
        &["learner.objective.kind=dpo", "learner.objective.beta=0.5"],
        fixed_point,
        fixed_point,
    );
}

#[test]
fn ipo_md_converges_on_two_arms() {
    check_matrix_game(&[&[0.5, 0.9], &[0.1, 0.5]], &[0.35, 0.65], 0.4, 0.25);
}

#[test]
fn ipo_md_converges_on_five_cyclic_arms() {
    // Cyclic: every arm beats the next two and loses to the previous two, by unequal amounts.
    check_matrix_game(
        &[
            &[0.5, 0.8, 0.7, 0.2, 0.4],
            &[0.2, 0.5, 0.75, 0.6, 0.3],
            &[0.3, 0.25, 0.5, 0.9, 0.65],
            &[0.8, 0.4, 0.1, 0.5, 0.7],
            &[0.6, 0.7, 0.35, 0.3, 0.5],
        ],
        &[0.3, 0.25, 0.2, 0.15, 0.1],
        0.5,
        0.125,
    );
}

/// The fixed point of IPO on pairs of the policy at another temperature: `π ∝ ref·exp(p(y ≻ π^(1/T))/τ)`, by damped
/// iteration.
fn tempered_fixed_point(game: &MatrixGame, tau: f64, temperature: f64) -> Vec<f64> {
    let softmax = |logits: &[f64]| -> Vec<f64> {
        let total: f64 = logits.iter().map(|z| z.exp()).sum();
        logits.iter().map(|z| z.exp() / total).collect()
    };
    let mut logits: Vec<f64> = game.reference.iter().map(|p| p.ln()).collect();
    for _ in 0..20_000 {
        let tempered: Vec<f64> = logits.iter().map(|z| z / temperature).collect();
        let opponent = softmax(&tempered);
        let arms = game.matrix.iter().zip(game.reference).zip(&mut logits);
        for ((row, reference), logit) in arms {
            let wins: f64 = row.iter().zip(&opponent).map(|(p, q)| p * q).sum();
            *logit += 0.02 * (reference.ln() + (wins - 0.5) / tau - *logit);
        }
    }
    softmax(&logits)
}

struct MatrixGame {
    matrix: [[f64; 3]; 3],
    reference: [f64; 3],
}

/// Pairs are sampled at temperature 2, as the actors record: the importance weights of the labels correct it.
#[test]
fn importance_weights_lead_tempered_samples_to_the_on_policy_fixed_point() {
    let game = MatrixGame {
        matrix: [[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]],
        reference: [0.5, 0.3, 0.2],
    };
    let matrix = game.matrix.map(|row| row.to_vec());
    let (tau, temperature) = (0.1, 2.0);
    let of = |mixture_coef: f64, off_policy: &[&str]| {
        let sets = [
            format!("learner.objective.tau={tau}"),
            format!("actor.temperature={temperature:?}"),
            format!("actor.mixture_coef={mixture_coef}"),
        ];
        let more = off_policy.iter().map(|&set| set.to_owned());
        train(&sets.into_iter().chain(more).collect::<Vec<_>>())
    };
    let truncate = ["learner.off_policy=truncate", "learner.max_ratio=1000.0"];
    for mixture_coef in [0.0, 0.5] {
        let policy = playground::fixed_point(&matrix, &game.reference, tau, mixture_coef);
        let policy = policy.expect("a valid game");
        assert_close(&of(mixture_coef, &truncate), "policy", &policy);
    }
    let uncorrected = of(0.0, &[]);
    let elsewhere = tempered_fixed_point(&game, tau, temperature);
    assert_close(&uncorrected, "policy", &elsewhere);
    let on_policy = [0.530186, 0.192368, 0.277445];
    let (actual, difference) = distance(&uncorrected, "policy", &on_policy);
    assert!(
        difference > 0.08,
        "{actual:.4?} is the on-policy fixed point"
    );
}
