//! What flows through a run: nothing too old is trained on, nothing is lost, all of it is told while it
//! happens, and every objective learns from it.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
};

use house::{Workplace, column, number, report, shared, steps, tiny_bandit, tiny_playground};
use serde_json::Value;

const ASYNCHRONOUS: [&str; 6] = [
    "learner.max_staleness=2",
    "learner.weight_sync_steps=2",
    "actor.count=2",
    "actor.slots=8",
    "learner.save_steps=4",
    "evaluation.eval_steps=5",
];

/// That at every station what was taken was given, dropped or is in hand, all counted apart.
#[track_caller]
fn conserved(report: &Value) {
    for station in ["actor", "preference", "learner"] {
        let books = &report["stations"][station];
        let dropped: f64 = books["dropped"]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(_, n)| n.as_f64())
            .sum();
        let [taken, given, in_hand] =
            ["/taken", "/given", "/in_hand"].map(|key| number(books, key));
        assert_eq!(taken, given + dropped + in_hand, "{station}: {books:#}");
        assert!(given > 0.0, "{station} gave nothing: {books:#}");
        assert_eq!(books["conserved"], true, "{station}: {books:#}");
    }
}

/// That what a station gave, the next one took: nothing is left in a stream when a run is finished.
#[track_caller]
fn nothing_on_the_way(report: &Value) {
    let of = |station: &str, what: &str| number(report, &format!("/stations/{station}/{what}"));
    let books = &report["stations"];
    assert_eq!(of("preference", "taken"), of("actor", "given"), "{books:#}");
    assert_eq!(
        of("learner", "taken"),
        of("preference", "given"),
        "{books:#}"
    );
    for station in ["actor", "preference", "learner"] {
        assert_eq!(of(station, "in_hand"), 0.0, "{books:#}");
    }
}

#[track_caller]
fn finite_losses(run: &Path, expected: usize) {
    let losses = column(run, "loss");
    assert_eq!(losses.len(), expected, "{losses:?}");
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
}

/// The page of metrics at `address`, when it answers.
fn scrape(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: agon\r\nConnection: close\r\n\r\n")
        .ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    page.starts_with("HTTP/1.1 200").then_some(page)
}

/// The value of the first series of a metric on a page.
fn series(page: &str, name: &str) -> Option<f64> {
    let of = |line: &str| {
        let rest = line.strip_prefix(name)?;
        (rest.starts_with(' ') || rest.starts_with('{'))
            .then(|| rest.rsplit(' ').next()?.parse().ok())?
    };
    page.lines().find_map(of)
}

#[test]
fn an_asynchronous_run_loses_nothing_and_trains_on_nothing_too_old() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    workplace
        .run(&tiny_playground(&run, &ASYNCHRONOUS))
        .succeeded();
    finite_losses(&run, 12);
    let oldest = column(&run, "staleness/max");
    assert!(
        oldest.iter().all(|&age| (0.0..=2.0).contains(&age)),
        "{oldest:?}"
    );
    // Weights that are published every other step make some pairs at least a step old.
    assert!(oldest.iter().any(|&age| age >= 1.0), "{oldest:?}");
    for (mean, oldest) in column(&run, "staleness/mean").iter().zip(&oldest) {
        assert!(mean <= oldest, "mean age {mean} above the oldest {oldest}");
    }
    let report = report(&run);
    conserved(&report);
    nothing_on_the_way(&report);
    assert_eq!(number(&report, "/pairs"), 12.0 * 8.0);
}

#[test]
fn books_balance_in_every_kind_of_run() {
    let workplace = Workplace::new();
    let synchronous = workplace.path("synchronous");
    workplace
        .run(&tiny_playground(&synchronous, &[]))
        .succeeded();
    conserved(&report(&synchronous));
    nothing_on_the_way(&report(&synchronous));
    // On a bandit many pairs are identical, and are dropped.
    let bandit = workplace.path("bandit");
    workplace
        .run(&tiny_bandit(
            &bandit,
            &["learner.max_staleness=3", "actor.count=2"],
        ))
        .succeeded();
    let report = report(&bandit);
    conserved(&report);
    nothing_on_the_way(&report);
    assert!(
        number(&report, "/stations/actor/dropped/identical") > 0.0,
        "{:#}",
        report["stations"]
    );
}

#[test]
fn books_balance_after_an_interruption_and_a_resume() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let mut arguments = tiny_playground(&run, &ASYNCHRONOUS);
    arguments.extend(["--set".into(), "learner.steps=30".into()]);
    let mut running = workplace.start(&arguments);
    running.until("six steps", || (steps(&run).len() >= 6).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    conserved(&report(&run));
    arguments.push("--resume".into());
    workplace.run(&arguments).succeeded();
    conserved(&report(&run));
    finite_losses(&run, 30);
}

#[test]
fn prometheus_finds_the_run_while_it_lasts_and_not_after() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
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
    let mut running = workplace.start(&arguments);
    let awaited = [
        "agon_station_taken_total",
        "agon_loss",
        "agon_staleness_max",
        "agon_policy_version",
        "agon_eval_win_rate",
    ];
    let page = running.until("all metrics at once", || {
        let page = scrape(free)?;
        awaited
            .iter()
            .all(|name| series(&page, name).is_some())
            .then_some(page)
    });
    let staleness = series(&page, "agon_staleness_max").expect("it was awaited");
    assert!((0.0..=2.0).contains(&staleness), "{staleness}");
    assert!(
        series(&page, "agon_loss").is_some_and(f64::is_finite),
        "{page}"
    );
    for series in [
        "agon_station_taken_total{station=\"actor\"}",
        "agon_station_given_total{station=\"preference\"}",
        "agon_station_dropped_total{station=\"learner\",reason=\"stale\"}",
        "agon_station_in_hand{station=\"learner\"}",
        "# TYPE agon_station_taken_total counter",
        "# HELP agon_loss",
    ] {
        assert!(
            page.contains(series),
            "{series} is not on the page:\n{page}"
        );
    }
    running.terminate();
    running.wait().check(5, &[]);
    assert_eq!(scrape(free), None, "the endpoint outlives the run");
}

/// Arm 0 beats the others, which the reference likes better.
const DOMINATED: [&str; 6] = [
    "model.reference_probabilities=[0.2, 0.5, 0.3]",
    "preference.judge.matrix=[[0.5,0.9,0.8],[0.1,0.5,0.5],[0.2,0.5,0.5]]",
    "actor.mixture_coef=0.125",
    "learner.steps=40",
    "learner.learning_rate=4e-3",
    "learner.train_batch_size=32",
];

/// How much more often than not the policy of a bandit beats its reference, exactly: p(policy ≻ reference) − ½.
fn gain(report: &Value) -> f64 {
    let matrix = [[0.5, 0.9, 0.8], [0.1, 0.5, 0.5], [0.2, 0.5, 0.5]];
    let of = |key: &str, arm: usize| number(report, &format!("/{key}/{arm}"));
    let against = |i: usize| -> f64 { (0..3).map(|j| matrix[i][j] * of("reference", j)).sum() };
    (0..3).map(|i| of("policy", i) * against(i)).sum::<f64>() - 0.5
}

/// Of the best arm alone the gain is .29, of the reference it is 0; every case below gains at least .19.
const GAIN: f64 = 0.15;

#[test]
fn every_objective_and_every_way_to_label_learns() {
    let workplace = Workplace::new();
    for (number, sets) in [
        &["learner.objective={ kind = \"ipo\", tau = 0.1, scale = \"square\" }"][..],
        &["learner.objective={ kind = \"ipo\", tau = 0.1, scale = \"scaled\" }"],
        &["learner.objective={ kind = \"dpo\" }"],
        &["learner.objective={ kind = \"slic\" }"],
        &["learner.objective={ kind = \"nash-md-pg\", tau = 0.1 }"],
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
        let run = workplace.path(&format!("run-{number}"));
        let sets = [&DOMINATED[..], sets].concat();
        workplace
            .run(&tiny_bandit(&run, &sets))
            .without_panic()
            .succeeded();
        finite_losses(&run, 40);
        let report = report(&run);
        conserved(&report);
        assert_eq!(report["nonfinite_steps"], 0, "{sets:?}");
        let gain = gain(&report);
        eprintln!("{gain:.3} by {:?}", &sets[DOMINATED.len()..]);
        assert!(gain > GAIN, "{sets:?}: {gain}, {}", report["policy"]);
    }
}

#[test]
fn a_run_in_which_nothing_is_learned_any_more_ends_with_the_reason() {
    let workplace = Workplace::new();
    let ends = |name: &str, sets: &[&str], says: &[&str]| {
        let sets = [&["learner.batch_timeout_seconds=1"], sets].concat();
        let ended = workplace.run(&tiny_playground(&workplace.path(name), &sets));
        ended.without_panic().check(1, says);
    };
    ends(
        "identical",
        &["actor.temperature=1e-6"],
        &[
            "no step for 1 s",
            "identical",
            "learner.batch_timeout_seconds",
        ],
    );
    if let Some(short) = shared("nothing_is_learned", "data/models/random-llama-reward") {
        // A judge that reads eight tokens.
        let short = workplace.copy_of(&short, "short");
        let config = short.join("config.json");
        let text = fs::read_to_string(&config).expect("it was copied");
        let of_eight = text.replace(
            "\"max_position_embeddings\": 256",
            "\"max_position_embeddings\": 8",
        );
        fs::write(&config, of_eight).expect("it is written");
        let judge = format!("preference.judge={{ kind = \"bradley-terry\", path = {short:?} }}");
        ends(
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
fn rpo_takes_the_sum_or_the_mean_of_a_golden_answer() {
    let workplace = Workplace::new();
    let first_loss = |nll: &str| {
        let run = workplace.path(nll);
        let objective =
            format!("learner.objective={{ kind = \"rpo\", eta = 1.0, nll = \"{nll}\" }}");
        let sets = ["learner.steps=2", "evaluation.prompts=8", &objective];
        workplace.run(&tiny_playground(&run, &sets)).succeeded();
        finite_losses(&run, 2);
        column(&run, "loss")[0]
    };
    // Both begin with the same pairs at h = 0, and golden answers have several tokens.
    let (sum, mean) = (first_loss("sum"), first_loss("mean"));
    eprintln!("{sum} by the sum, {mean} by the mean");
    assert!(sum > 2.0 * mean, "{sum} {mean}");
}

#[test]
fn accumulated_gradients_are_the_gradient_of_the_whole_batch() {
    let workplace = Workplace::new();
    let first_step = |passes: u32| {
        let run = workplace.path(&format!("passes-{passes}"));
        let passes = format!("learner.gradient_accumulation_steps={passes}");
        workplace
            .run(&tiny_playground(&run, &["learner.steps=3", &passes]))
            .succeeded();
        ["loss", "grad_norm"].map(|name| column(&run, name))
    };
    let [whole_loss, whole_norm] = first_step(1);
    let [loss, norm] = first_step(4);
    assert!(
        (whole_loss[0] - loss[0]).abs() < 1e-4,
        "{whole_loss:?} {loss:?}"
    );
    let relative = (whole_norm[0] - norm[0]).abs() / whole_norm[0];
    assert!(relative < 1e-3, "{whole_norm:?} {norm:?}");
}
