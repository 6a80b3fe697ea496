//! Where self-play arrives on a bandit, against where the theory says it must.
//!
//! The numbers of the three arms are those of the regularised Nash equilibrium, worked out by hand and
//! by another program; those of two and five arms are the playground's exact fixed point. Sampling
//! noise and a finite number of steps leave a distance, and 0.02 in every probability is all of it.

use house::{Ended, Workplace, config, number, report, shared};
use serde_json::Value;

const CLOSE: f64 = 0.02;

/// Where a method arrives that ignores the mixture is at least .12 away, and found no nearer than this.
const FAR: f64 = 0.1;

/// Steps of a run here: the 500 of `configs/bandit.toml` arrive nearer, these near enough.
const STEPS: &str = "learner.steps=350";

/// `agon train configs/bandit.toml` with these settings: its report.
fn converge(sets: &[String]) -> Value {
    let workplace = Workplace::new();
    let (config, run) = (config("bandit.toml"), workplace.path("run"));
    let mut arguments = vec!["train".to_owned(), config.display().to_string()];
    arguments.extend(["--run-dir".to_owned(), run.display().to_string()]);
    arguments.extend(["--set", STEPS].map(str::to_owned));
    arguments.extend(
        sets.iter()
            .flat_map(|set| ["--set".to_owned(), set.clone()]),
    );
    let _: Ended = workplace.run(&arguments).succeeded();
    report(&run)
}

/// The probabilities of a run's arms under `key` of its report, and their largest distance from these.
fn distance(report: &Value, key: &str, from: &[f64]) -> (Vec<f64>, f64) {
    let found: Vec<f64> = (0..from.len())
        .map(|arm| number(report, &format!("/{key}/{arm}")))
        .collect();
    let apart = found.iter().zip(from).map(|(a, b)| (a - b).abs());
    let furthest = apart.fold(0.0, f64::max);
    (found, furthest)
}

#[track_caller]
fn close(report: &Value, key: &str, expected: &[f64]) {
    let (found, furthest) = distance(report, key, expected);
    eprintln!("{key} {found:.4?}, expected {expected:.4?}: {furthest:.4} apart");
    assert!(
        furthest <= CLOSE,
        "{key} {found:.4?} is {furthest:.4} from {expected:.4?}"
    );
}

/// The three arms of `configs/bandit.toml`.
fn three_arms(sets: &[&str], policy: [f64; 3], mixture: [f64; 3]) {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    let report = converge(&sets);
    close(&report, "policy", &policy);
    close(&report, "mixture", &mixture);
    let win_rate = number(&report, "/win_rate");
    assert!((0.0..=1.0).contains(&win_rate), "{win_rate}");
    for reference in [0.5, 0.3, 0.2]
        .iter()
        .zip(report["reference"].as_array().into_iter().flatten())
    {
        let (expected, found) = reference;
        assert!(
            (expected - found.as_f64().unwrap_or(f64::NAN)).abs() < 1e-5,
            "{report:#}"
        );
    }
}

/// A game of our own, against the playground's exact solution.
fn own_game(matrix: &[&[f64]], reference: &[f64], tau: f64, mixture_coef: f64) {
    let matrix: Vec<Vec<f64>> = matrix.iter().map(|row| row.to_vec()).collect();
    let policy = playground::fixed_point(&matrix, reference, tau, mixture_coef)
        .expect("a game with a solution");
    let mixture = playground::mixture(&policy, reference, mixture_coef);
    let report = converge(&[
        format!("model.reference_probabilities={reference:?}"),
        format!("preference.judge.matrix={matrix:?}"),
        format!("learner.objective.tau={tau}"),
        format!("actor.mixture_coef={mixture_coef}"),
    ]);
    close(&report, "policy", &policy);
    close(&report, "mixture", &mixture);
}

/// Games in which where a method arrives shows whether it plays against the mixture: at `policy`, or at least .12
/// away at `without_mixture`.
fn mixture_matters(test: &str) -> Option<Vec<Value>> {
    let file = shared(test, "data/bandits/mixture_matters.json")?;
    let text = std::fs::read_to_string(&file);
    let text = text.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    Some(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display())))
}

/// Plays the games of `mixture_matters.json` at these places by this objective: it must arrive where the mixture
/// leads, and nowhere near where it would arrive without.
fn mixture_is_felt(test: &str, places: &[usize], sets: &[&str]) {
    let Some(games) = mixture_matters(test) else {
        return;
    };
    for game in places.iter().map(|&place| &games[place]) {
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
        let report = converge(&all);
        close(&report, "policy", &arms("policy"));
        close(&report, "mixture", &arms("mixture"));
        let (found, apart) = distance(&report, "policy", &arms("without_mixture"));
        eprintln!("without the mixture: {apart:.4} apart");
        assert!(apart > FAR, "{found:.4?} is where no mixture leads: {game}");
    }
}

#[test]
fn ipo_md_arrives_where_the_mixture_leads() {
    mixture_is_felt(
        "ipo_md_arrives_where_the_mixture_leads",
        &[0, 1, 2, 3, 4],
        &[],
    );
}

#[test]
fn nash_md_by_policy_gradient_arrives_there_too() {
    let kind = ["learner.objective={ kind = \"nash-md-pg\" }"];
    mixture_is_felt(
        "nash_md_by_policy_gradient_arrives_there_too",
        &[0, 3],
        &kind,
    );
}

/// SLiC's hinge is flat from h = 1/β on, and one of two answers that are preferred with p > ½ goes there: arm 0
/// beats two equal ones, so that π ∝ ref · (exp(1/β), 1, 1).
#[test]
fn slic_stops_at_its_margin() {
    let (reference, beta) = ([0.2, 0.5, 0.3], 0.5_f64);
    let lifted = reference[0] * (1.0 / beta).exp();
    let total = lifted + reference[1] + reference[2];
    let policy = [lifted / total, reference[1] / total, reference[2] / total];
    let report = converge(&[
        format!("model.reference_probabilities={reference:?}"),
        "preference.judge.matrix=[[0.5,0.9,0.9],[0.1,0.5,0.5],[0.1,0.5,0.5]]".into(),
        format!("learner.objective={{ kind = \"slic\", beta = {beta:?} }}"),
    ]);
    close(&report, "policy", &policy);
    assert_eq!(report["objective"]["kind"], "slic");
}

#[test]
fn online_ipo_with_tau_1() {
    let nash = [0.523000, 0.278052, 0.198948];
    three_arms(&["learner.objective.tau=1"], nash, nash);
}

#[test]
fn online_ipo_with_tau_one_half() {
    let nash = [0.540314, 0.256488, 0.203198];
    three_arms(&["learner.objective.tau=0.5"], nash, nash);
}

#[test]
fn online_ipo_with_tau_one_tenth() {
    let nash = [0.530186, 0.192368, 0.277445];
    three_arms(&["learner.objective.tau=0.1"], nash, nash);
}

#[test]
fn the_mixture_of_ipo_md_is_the_equilibrium_at_twice_the_temperature() {
    three_arms(
        &["learner.objective.tau=0.5", "actor.mixture_coef=0.5"],
        [0.545601, 0.257024, 0.197375],
        [0.523000, 0.278052, 0.198948],
    );
}

#[test]
fn ipo_md_with_all_weight_on_the_reference_answers_the_reference() {
    three_arms(
        &["learner.objective.tau=0.5", "actor.mixture_coef=1"],
        [0.549535, 0.259368, 0.191097],
        [0.5, 0.3, 0.2],
    );
}

#[test]
fn online_dpo_arrives_elsewhere() {
    let elsewhere = [0.541511, 0.195309, 0.263181];
    three_arms(
        &["learner.objective.kind=dpo", "learner.objective.beta=0.5"],
        elsewhere,
        elsewhere,
    );
}

#[test]
fn two_arms_of_our_own() {
    own_game(&[&[0.5, 0.9], &[0.1, 0.5]], &[0.35, 0.65], 0.4, 0.25);
}

#[test]
fn five_arms_of_our_own() {
    // A wheel: every arm beats the next two and loses to the last two, by unequal amounts.
    own_game(
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
