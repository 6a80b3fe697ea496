//! The training pipeline: bounded staleness, conservation of pairs, live metrics, and learning with every objective.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
};

use serde_json::Value;
use system_tests::{Sandbox, column, number, report, shared, steps, tiny_bandit, tiny_playground};

const ASYNCHRONOUS: [&str; 6] = [
    "learner.max_staleness=2",
    "learner.weight_sync_steps=2",
    "actor.count=2",
    "actor.slots=8",
    "learner.save_steps=4",
    "evaluation.eval_steps=5",
];

/// Asserts received = emitted + dropped + in flight at every stage.
#[track_caller]
fn assert_conserved(report: &Value) {
    for stage in ["actor", "preference", "learner"] {
        let counters = &report["stages"][stage];
        let dropped: f64 = counters["dropped"]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(_, n)| n.as_f64())
            .sum();
        let [received, emitted, in_flight] =
            ["/received", "/emitted", "/in_flight"].map(|key| number(counters, key));
        assert_eq!(
            received,
            emitted + dropped + in_flight,
            "{stage}: {counters:#}"
        );
        assert!(emitted > 0.0, "{stage} emitted nothing: {counters:#}");
        assert_eq!(counters["conserved"], true, "{stage}: {counters:#}");
    }
}

/// Asserts that every stage received what the previous one emitted: the streams of a finished run are empty.
#[track_caller]
fn assert_drained(report: &Value) {
    let of = |stage: &str, what: &str| number(report, &format!("/stages/{stage}/{what}"));
    let counters = &report["stages"];
    assert_eq!(
        of("preference", "received"),
        of("actor", "emitted"),
        "{counters:#}"
    );
    assert_eq!(
        of("learner", "received"),
        of("preference", "emitted"),
        "{counters:#}"
    );
    for stage in ["actor", "preference", "learner"] {
        assert_eq!(of(stage, "in_flight"), 0.0, "{counters:#}");
    }
}

#[track_caller]
fn assert_finite_losses(run: &Path, expected: usize) {
    let losses = column(run, "loss");
    assert_eq!(losses.len(), expected, "{losses:?}");
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
}

/// The metrics page at `address`, or `None` if it does not respond with 200.
fn scrape(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    page.starts_with("HTTP/1.1 200").then_some(page)
}

/// The value of the first series of a metric on a page.
fn series(page: &str, name: &str) -> Option<f64> {
    let value_of = |line: &str| {
        let rest = line.strip_prefix(name)?;
        (rest.starts_with(' ') || rest.starts_with('{'))
            .then(|| rest.rsplit(' ').next()?.parse().ok())?
    };
    page.lines().find_map(value_of)
}

#[test]
fn an_asynchronous_run_conserves_pairs_and_bounds_staleness() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox
        .run(&tiny_playground(&run, &ASYNCHRONOUS))
        .succeeded();
    assert_finite_losses(&run, 12);
    let oldest = column(&run, "staleness/max");
    assert!(
        oldest.iter().all(|&age| (0.0..=2.0).contains(&age)),
        "{oldest:?}"
    );
    // Weights are published every other step, so some pairs are at least one version old.
    assert!(oldest.iter().any(|&age| age >= 1.0), "{oldest:?}");
    for (mean, oldest) in column(&run, "staleness/mean").iter().zip(&oldest) {
        assert!(
            mean <= oldest,
            "mean staleness {mean} above the maximum {oldest}"
        );
    }
    let report = report(&run);
    assert_conserved(&report);
    assert_drained(&report);
    assert_eq!(number(&report, "/pairs"), 12.0 * 8.0);
}

#[test]
fn counters_balance_in_every_kind_of_run() {
    let sandbox = Sandbox::new();
    let synchronous = sandbox.path("synchronous");
    sandbox.run(&tiny_playground(&synchronous, &[])).succeeded();
    assert_conserved(&report(&synchronous));
    assert_drained(&report(&synchronous));
    // A bandit produces many identical pairs, which are dropped.
    let bandit = sandbox.path("bandit");
    sandbox
        .run(&tiny_bandit(
            &bandit,
            &["learner.max_staleness=3", "actor.count=2"],
        ))
        .succeeded();
    let report = report(&bandit);
    assert_conserved(&report);
    assert_drained(&report);
    assert!(
        number(&report, "/stages/actor/dropped/identical") > 0.0,
        "{:#}",
        report["stages"]
    );
}

#[test]
fn counters_balance_after_an_interruption_and_a_resume() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let mut arguments = tiny_playground(&run, &ASYNCHRONOUS);
    arguments.extend(["--set".into(), "learner.steps=30".into()]);
    let mut running = sandbox.start(&arguments);
    running.until("six steps", || (steps(&run).len() >= 6).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    assert_conserved(&report(&run));
    arguments.push("--resume".into());
    sandbox.run(&arguments).succeeded();
    assert_conserved(&report(&run));
    assert_finite_losses(&run, 30);
}

#[test]
fn metrics_are_served_while_the_run_lasts() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let free = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port");
    let mut arguments = tiny_playground(&run, &ASYNCHRONOUS);
    for set in [
        format!("telemetry.listen={free}"),
        "learner.steps=100000".into(),
    ] {
        arguments.extend(["--set".into(), set]);
    }
    let mut running = sandbox.start(&arguments);
    let expected = [
        "agon_stage_received_total",
        "agon_loss",
        "agon_staleness_max",
        "agon_policy_version",
        "agon_eval_win_rate",
    ];
    let page = running.until("all metrics", || {
        let page = scrape(free)?;
        expected
            .iter()
            .all(|name| series(&page, name).is_some())
            .then_some(page)
    });
    let staleness = series(&page, "agon_staleness_max").expect("the metric is on the page");
    assert!((0.0..=2.0).contains(&staleness), "{staleness}");
    assert!(
        series(&page, "agon_loss").is_some_and(f64::is_finite),
        "{page}"
    );
    for series in [
        "agon_stage_received_total{stage=\"actor\"}",
        "agon_stage_emitted_total{stage=\"preference\"}",
        "agon_stage_dropped_total{stage=\"learner\",reason=\"stale\"}",
        "agon_stage_in_flight{stage=\"learner\"}",
        "# TYPE agon_stage_received_total counter",
        "# HELP agon_loss",
    ] {
        assert!(
            page.contains(series),
            "{series} is not on the page:\n{page}"
        );
    }
    running.terminate();
    running.wait().check(5, &[]);
    assert_eq!(scrape(free), None, "the endpoint is closed after the run");
}

/// A bandit in which arm 0 beats the others, while the reference prefers them.
const DOMINATED: [&str; 6] = [
    "model.reference_probabilities=[0.2, 0.5, 0.3]",
    "preference.judge.matrix=[[0.5,0.9,0.8],[0.1,0.5,0.5],[0.2,0.5,0.5]]",
    "actor.mixture_coef=0.125",
    "learner.steps=40",
    "learner.learning_rate=4e-3",
    "learner.train_batch_size=32",
];

/// Exact advantage of a bandit policy over its reference: p(policy ≻ reference) − ½.
fn gain(report: &Value) -> f64 {
    let matrix = [[0.5, 0.9, 0.8], [0.1, 0.5, 0.5], [0.2, 0.5, 0.5]];
    let of = |key: &str, arm: usize| number(report, &format!("/{key}/{arm}"));
    let against = |i: usize| -> f64 { (0..3).map(|j| matrix[i][j] * of("reference", j)).sum() };
    (0..3).map(|i| of("policy", i) * against(i)).sum::<f64>() - 0.5
}

/// Required gain. The best arm alone gains .29, the reference 0; every case below gains at least .19.
const MIN_GAIN: f64 = 0.15;

#[test]
fn every_objective_and_label_kind_improves_the_policy() {
    let sandbox = Sandbox::new();
    for (number, sets) in [
        &["learner.objective={ kind = \"ipo\", tau = 0.1, scale = \"square\" }"][..],
        &["learner.objective={ kind = \"ipo\", tau = 0.1, scale = \"scaled\" }"],
        &["learner.objective={ kind = \"dpo\" }"],
        &["learner.objective={ kind = \"slic\" }"],
        &["learner.objective={ kind = \"nash-md-pg\", tau = 0.1 }"],
        &[
            "learner.objective={ kind = \"rloo\", beta = 0.1 }",
            "actor.mixture_coef=0",
        ],
        &[
            "learner.objective={ kind = \"rejection-sampling\" }",
            "learner.label=hard",
            "actor.num_generations=4",
            "learner.pair_selection=best-worst",
        ],
        &["learner.objective.tau=0.1", "actor.num_generations=4"],
        &["learner.objective.tau=0.1", "learner.label=sampled"],
        &[
            "learner.objective.tau=0.1",
            "learner.label=hard",
            "learner.label_smoothing=0.1",
        ],
        &["learner.objective.tau=0.1", "learner.logp_reduction=mean"],
        &[
            "learner.objective.tau=0.1",
            "learner.gradient_accumulation_steps=2",
        ],
        &["learner.objective.tau=0.1", "actor.mixture_coef=1"],
        &[
            "learner.objective.tau=0.1",
            "actor.temperature=0.7",
            "actor.top_k=20",
            "actor.top_p=0.95",
            "actor.min_p=0.01",
        ],
        &[
            "learner.objective.tau=0.1",
            "learner.lr_scheduler_type=cosine",
            "learner.weight_decay=0.01",
        ],
    ]
    .into_iter()
    .enumerate()
    {
        let run = sandbox.path(&format!("run-{number}"));
        let sets = [&DOMINATED[..], sets].concat();
        sandbox
            .run(&tiny_bandit(&run, &sets))
            .without_panic()
            .succeeded();
        assert_finite_losses(&run, 40);
        let report = report(&run);
        assert_conserved(&report);
        assert_eq!(report["nonfinite_steps"], 0, "{sets:?}");
        let gain = gain(&report);
        eprintln!("gain {gain:.3} with {:?}", &sets[DOMINATED.len()..]);
        assert!(gain > MIN_GAIN, "{sets:?}: {gain}, {}", report["policy"]);
    }
}

#[test]
fn a_run_without_progress_ends_with_the_reason() {
    let sandbox = Sandbox::new();
    let fails = |name: &str, sets: &[&str], says: &[&str]| {
        let sets = [&["learner.batch_timeout_seconds=1"], sets].concat();
        let output = sandbox.run(&tiny_playground(&sandbox.path(name), &sets));
        output.without_panic().check(1, says);
    };
    fails(
        "identical",
        &["actor.temperature=1e-6"],
        &[
            "no step for 1 s",
            "identical",
            "learner.batch_timeout_seconds",
        ],
    );
    if let Some(short) = shared(
        "a_run_without_progress_ends_with_the_reason",
        "data/models/random-llama-reward",
    ) {
        // A judge with a context of eight tokens abstains on every pair.
        let short = sandbox.copy_of(&short, "short");
        let config = short.join("config.json");
        let text = fs::read_to_string(&config).expect("the file was copied");
        let limited = text.replace(
            "\"max_position_embeddings\": 256",
            "\"max_position_embeddings\": 8",
        );
        fs::write(&config, limited).expect("the file is writable");
        let judge = format!("preference.judge={{ kind = \"bradley-terry\", path = {short:?} }}");
        fails(
            "without verdicts",
            &[&judge],
            &[
                "no step for 1 s",
                "abstained (the last:",
                "a pair got no label",
            ],
        );
    }
}

#[test]
fn rpo_supports_sum_and_mean_of_the_golden_nll() {
    let sandbox = Sandbox::new();
    let first_loss = |nll: &str| {
        let run = sandbox.path(nll);
        let objective =
            format!("learner.objective={{ kind = \"rpo\", eta = 1.0, nll = \"{nll}\" }}");
        let sets = ["learner.steps=2", "evaluation.prompts=8", &objective];
        sandbox.run(&tiny_playground(&run, &sets)).succeeded();
        assert_finite_losses(&run, 2);
        column(&run, "loss")[0]
    };
    // Both start with the same pairs at h = 0, and golden answers have several tokens.
    let (sum, mean) = (first_loss("sum"), first_loss("mean"));
    eprintln!("loss {sum} with sum, {mean} with mean");
    assert!(sum > 2.0 * mean, "{sum} {mean}");
}

#[test]
fn accumulated_gradients_equal_the_full_batch_gradient() {
    let sandbox = Sandbox::new();
    let train = |micro_batches: u32| {
        let run = sandbox.path(&format!("micro-batches-{micro_batches}"));
        let accumulation = format!("learner.gradient_accumulation_steps={micro_batches}");
        sandbox
            .run(&tiny_playground(&run, &["learner.steps=3", &accumulation]))
            .succeeded();
        ["loss", "grad_norm"].map(|name| column(&run, name))
    };
    let [full_loss, full_norm] = train(1);
    let [loss, norm] = train(4);
    assert!(
        (full_loss[0] - loss[0]).abs() < 1e-4,
        "{full_loss:?} {loss:?}"
    );
    let relative = (full_norm[0] - norm[0]).abs() / full_norm[0];
    assert!(relative < 1e-3, "{full_norm:?} {norm:?}");
}
