use std::{collections::BTreeSet, fs, path::PathBuf, sync::Arc};

use messages::{DropReason, Dropped, Stage};
use model::DType;
use serde_json::{Value, json};
use telemetry::Waits;
use tempfile::TempDir;
use transport::Receiver;

use super::*;
use crate::trainer::tests::{TinyModel, tiny};

/// Files of pairs in a temporary folder, and a tokenizer of the words w0 to w11.
struct Files {
    folder: TempDir,
    model: TinyModel,
}

impl Files {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            model: tiny(DType::F32),
        }
    }

    fn write(&self, name: &str, rows: &[Value]) -> PathBuf {
        let path = self.folder.path().join(name);
        let lines = rows.iter().map(|row| format!("{row}\n"));
        fs::write(&path, lines.collect::<String>()).unwrap();
        path
    }

    /// Writes `count` pairs with chosen answers of their own.
    fn write_pairs(&self, name: &str, count: u32) -> PathBuf {
        let word = |i: u32| format!("w{}", 3 + i % 9);
        let row = |i: u32| {
            json!({
                "prompt": format!("w3 {}", word(i)), "rejected": "w2",
                "chosen": format!("w4 {} {}", word(i), word(i / 9)),
            })
        };
        self.write(name, &(0..count).map(row).collect::<Vec<_>>())
    }

    fn load(&self, sets: &[String]) -> Result<PairFiles, String> {
        let sets: Vec<_> = sets
            .iter()
            .map(|set| match set.starts_with("learner.") {
                true => set.parse().unwrap(),
                false => format!("pairs.{set}").parse().unwrap(),
            })
            .collect();
        let settings = settings::resolve("", "test", &sets).unwrap().settings;
        let margin = settings.learner.min_margin;
        PairFiles::load(
            &settings.pairs,
            margin,
            Seed(5),
            64,
            &self.model.folder.tokenizer,
        )
        .map_err(|error| error.to_string())
    }
}

fn path_of(path: &Path) -> String {
    format!("path={:?}", path.display().to_string())
}

#[test]
fn every_pass_has_every_pair_once_in_an_order_of_its_own() {
    let files = Files::new();
    let path = files.write_pairs("a.jsonl", 40);
    let pairs = files.load(&[path_of(&path)]).unwrap();
    assert_eq!(pairs.count(), 40);
    let pass = |pass: u64| -> Vec<PromptId> {
        let cursors = 40 * pass..40 * (pass + 1);
        cursors
            .map(|c| pairs.message(pairs.place(c), 3).pair.id())
            .collect()
    };
    let (first, second) = (pass(0), pass(1));
    let indices = |ids: &[PromptId]| ids.iter().map(|&id| index_of(id)).collect::<Vec<_>>();
    let all: BTreeSet<u64> = indices(&first).into_iter().collect();
    assert_eq!(all, (0..40).collect());
    assert_ne!(indices(&first), indices(&second));
    let distinct: BTreeSet<PromptId> = first.iter().chain(&second).copied().collect();
    assert_eq!(distinct.len(), 80);
    assert!(distinct.iter().all(|&id| is_from_file(id)));
    assert_eq!(label_id(first[0]).0, FILE_IDS | index_of(first[0]));
    assert_eq!(label_id(PromptId(7)), PromptId(7));
    let in_order = files
        .load(&[path_of(&path), "shuffle=false".into()])
        .unwrap();
    let ids: Vec<u64> = (0..80).map(|c| in_order.place(c).index).collect();
    assert_eq!(ids, (0..40).chain(0..40).collect::<Vec<_>>());
    let message = in_order.message(in_order.place(41), 3);
    assert_eq!(message.pair.completions[0].text, "w4 w4 w3");
    // The end-of-text token is last.
    assert_eq!(message.pair.completions[0].ids, [4, 4, 3, 1]);
    assert_eq!(
        (message.pair.prompt.ids, message.labels[0].p.get()),
        (vec![3, 4], 1.0)
    );
}

#[test]
fn several_files_are_mixed_by_weight_and_have_indices_of_their_own() {
    let files = Files::new();
    let (a, b) = (
        files.write_pairs("a.jsonl", 30),
        files.write_pairs("b.jsonl", 10),
    );
    let mix = |weight: f64| {
        format!(
            "mix=[{{ path = {:?}, weight = {weight:?} }}, {{ path = {:?} }}]",
            a.display().to_string(),
            b.display().to_string()
        )
    };
    let pairs = files.load(&[mix(3.0)]).unwrap();
    let places: Vec<FilePlace> = (0..1000).map(|cursor| pairs.place(cursor)).collect();
    let of_b = places.iter().filter(|place| place.index >= 30).count();
    assert_eq!((pairs.count(), of_b), (40, 250));
    let distinct: BTreeSet<PromptId> = places.iter().map(|place| place.id()).collect();
    assert_eq!(distinct.len(), 1000);
    assert_ne!(pairs.digest(), files.load(&[mix(2.0)]).unwrap().digest());
}

#[test]
fn labels_are_part_of_the_digest_and_of_the_messages() {
    let files = Files::new();
    let row =
        |p: f64| json!({"prompt": "w3", "chosen": "w4", "rejected": "w5", "p": p, "s": 4, "t": 2});
    let path = files.write("a.jsonl", &[row(0.25), row(0.75)]);
    let of = |more: &[&str]| {
        let sets = [
            &[path_of(&path), "shuffle=false".into()][..],
            &more.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>(),
        ]
        .concat();
        let pairs = files.load(&sets).unwrap();
        let first = pairs.message(pairs.place(0), 0);
        (first.labels[0].p.get(), first.scores, pairs.digest())
    };
    let hard = of(&[]);
    let soft = of(&["label_column=p"]);
    let columns = ["chosen_score_column=s", "rejected_score_column=t"];
    let scored = of(&columns);
    let tempered = of(&[&columns[..], &["score_temperature=2.0"]].concat());
    assert_eq!((hard.0, hard.1, soft.0), (1.0, None, 0.25));
    assert_eq!((scored.0, scored.1), (1.0, Some(vec![4.0, 2.0])));
    // sigma(1).
    assert!((tempered.0 - 0.731_058_6).abs() < 1e-6);
    assert_ne!(hard.2, soft.2);
    assert_ne!(scored.2, tempered.2);
}

/// What a judge by exact match and one by routes read of a row; both are part of the digest.
#[test]
fn golden_answers_and_routes_reach_the_judge() {
    let files = Files::new();
    let row = |golden: &str| json!({"prompt": "w3", "chosen": "w4", "rejected": "w5", "answer": golden, "task": 2});
    let load = |golden: &str, columns: &[&str]| {
        let path = files.write("a.jsonl", &[row(golden), row("w4")]);
        let columns = columns.iter().map(|set| (*set).to_owned());
        let sets: Vec<String> = [path_of(&path)].into_iter().chain(columns).collect();
        files.load(&sets).unwrap()
    };
    let columns = [
        "label=judge",
        "golden_column=answer",
        "route_column=task",
        "shuffle=false",
    ];
    let pairs = load("w5", &columns);
    let Prompt {
        answer,
        route,
        golden,
        ..
    } = pairs.message(pairs.place(0), 0).pair.prompt;
    assert_eq!(
        (answer.as_deref(), route.as_deref(), golden),
        (Some("w5"), Some("2"), None)
    );
    assert_ne!(pairs.digest(), load("w6", &columns).digest());
    let without = load("w5", &columns[..1]);
    let Prompt { answer, route, .. } = without.message(without.place(0), 0).pair.prompt;
    assert_eq!((answer, route), (None, None));
}

#[test]
fn pairs_without_the_margin_are_left_out() {
    let files = Files::new();
    let row = |p: f64| json!({"prompt": "w3", "chosen": "w4", "rejected": "w5", "p": p});
    let path = files.write("a.jsonl", &[0.5, 0.4, 0.6, 0.25, 1.0].map(row));
    let of = |label: &str, margin: f64| {
        let margin = format!("learner.min_margin={margin}");
        files.load(&[path_of(&path), label.into(), margin])
    };
    let count = |label: &str, margin: f64| of(label, margin).unwrap().count();
    let p = "label_column=p";
    assert_eq!(
        [0.0, 0.1, 0.2, 0.5].map(|margin| count(p, margin)),
        [5, 4, 2, 1]
    );
    // The judge's labels are not known yet; hard ones have the largest margin.
    assert_eq!(count("label=judge", 0.5), 5);
    assert_eq!(count("too_long=drop", 0.5), 5);
    let none = files.write("b.jsonl", &[row(0.5)]);
    let sets = [path_of(&none), p.into(), "learner.min_margin=0.1".into()];
    let error = files.load(&sets).unwrap_err();
    for says in ["b.jsonl", "all 1 have", "learner.min_margin = 0.1"] {
        assert!(error.contains(says), "no {says:?} in {error}");
    }
}

#[test]
fn pairs_with_held_out_prompts_are_left_out() {
    /// Holds out one prompt.
    struct OneHeldOut(PromptRow);
    impl PromptSet for OneHeldOut {
        fn train(&self, _: u64) -> PromptRow {
            self.0.clone()
        }
        fn held_out(&self, _: u64) -> PromptRow {
            self.0.clone()
        }
        fn held_out_count(&self) -> Option<usize> {
            Some(1)
        }
    }
    let files = Files::new();
    let path = files.write_pairs("a.jsonl", 18);
    let mut pairs = files
        .load(&[path_of(&path), "shuffle=false".into()])
        .unwrap();
    let before = pairs.digest();
    let third = pairs.message(pairs.place(2), 0).pair.prompt;
    let held_out = OneHeldOut(PromptRow {
        ids: third.ids.clone(),
        text: third.text,
        dialogue: None,
        golden: None,
        answer: None,
        route: None,
    });
    let sets = [format!("pairs.{}", path_of(&path)).parse().unwrap()];
    let settings = settings::resolve("", "test", &sets).unwrap().settings;
    pairs.remove_held_out(&settings.pairs, &held_out).unwrap();
    // Prompts repeat after nine rows.
    assert_eq!(pairs.count(), 16);
    let prompts = (0..16).map(|cursor| pairs.message(pairs.place(cursor), 0).pair.prompt.ids);
    assert!(prompts.into_iter().all(|ids| ids != third.ids));
    assert_ne!(pairs.digest(), before);
    let only = files.write_pairs("b.jsonl", 1);
    let mut pairs = files.load(&[path_of(&only)]).unwrap();
    let first = pairs.message(pairs.place(0), 0).pair.prompt;
    let held_out = OneHeldOut(PromptRow {
        ids: first.ids,
        text: first.text,
        ..held_out.0
    });
    let error = pairs
        .remove_held_out(&settings.pairs, &held_out)
        .unwrap_err();
    assert!(
        error.to_string().contains("all its pairs are held out"),
        "{error}"
    );
}

#[test]
fn unusable_rows_are_left_out_or_refused_with_the_remedy() {
    let files = Files::new();
    let row = |chosen: &str, rejected: &str| json!({"prompt": "w3", "chosen": chosen, "rejected": rejected, "p": 1.5});
    let long = "w4 ".repeat(70);
    let mixed = files.write(
        "mixed.jsonl",
        &[
            row("w4", "w5"),
            row("w4", " w4 "),
            row("", "w5"),
            row("w4", &long),
        ],
    );
    let drop = files
        .load(&[path_of(&mixed), "too_long=drop".into()])
        .unwrap();
    assert_eq!(drop.count(), 1);
    let nothing = files.write("nothing.jsonl", &[row("w4", "w4"), row("w4", "")]);
    for (path, more, expected) in [
        (
            &mixed,
            "max_length=512",
            "mixed.jsonl, line 4: the prompt and its longer response have 1 + 71 tokens, more than 64",
        ),
        (&mixed, "too_long=refuse", "pairs.too_long = \"drop\""),
        (
            &mixed,
            "label_column=p",
            "line 1: column \"p\" is 1.5, which is no probability",
        ),
        (&mixed, "label_column=q", "set pairs.label_column"),
        (&mixed, "chosen_column=good", "set pairs.chosen_column"),
        (
            &nothing,
            "too_long=drop",
            "of 2 rows 0 are too long, 1 have an empty response, 1 have two equal ones and 0 have",
        ),
        (
            &files.folder.path().join("none.jsonl"),
            "too_long=drop",
            "none.jsonl",
        ),
    ] {
        let error = files
            .load(&[path_of(path), more.into()])
            .expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
}

/// Pairs of a file that a judge labels, and the judge's end of their stream.
struct Judged {
    pairs: FilePairs,
    sent: Receiver<Pair>,
}

impl Judged {
    fn new(files: &Arc<PairFiles>) -> Self {
        Self::with_margin(files, 0.0)
    }

    fn with_margin(files: &Arc<PairFiles>, min_margin: f64) -> Self {
        let (sender, sent) = transport::stream("pairs", 64);
        let settings = "[pairs]\npath = \"x\"\n[learner]\ntrain_batch_size = 4\n";
        let settings = settings::resolve(settings, "test", &[]).unwrap().settings;
        let pairs = FilePairs::new(FilePairsParts {
            files: Arc::clone(files),
            share: BatchShare::new(&settings.learner, &settings.pairs),
            session: 0,
            steps: 100,
            judging: Some(Judging {
                name: "http",
                pairs: sender,
                timeout: std::time::Duration::from_secs(60),
                waits: Waits::new("learner"),
                min_margin,
            }),
        });
        Self { pairs, sent }
    }

    /// The pairs that were sent, in the order in which they were.
    fn asked(&self) -> Vec<Pair> {
        let deliveries = std::iter::from_fn(|| self.sent.try_receive());
        let take = |delivery: transport::Delivery<Pair>| {
            let (pair, receipt) = delivery.take();
            receipt.acknowledge();
            pair
        };
        deliveries.map(take).collect()
    }
}

/// The judge's label of a pair.
fn judged(pair: Pair, p: f32) -> LabelledPair {
    LabelledPair {
        labels: vec![Label {
            first: 0,
            second: 1,
            p: Probability::new(p).unwrap(),
            judged: Some(Probability::new(p).unwrap()),
        }],
        pair,
        judge: "judge".into(),
        judge_version: JudgeVersion(2),
        scores: None,
        verdicts: Vec::new(),
    }
}

fn dropped(pair: &Pair, reason: DropReason) -> Dropped {
    Dropped {
        prompt: pair.id(),
        session: 0,
        stage: Stage::Preference,
        reason,
        log_ratio: None,
        detail: String::new(),
    }
}

fn ids(pairs: &[LabelledPair]) -> Vec<u64> {
    pairs
        .iter()
        .map(|labelled| index_of(labelled.pair.id()))
        .collect()
}

#[tokio::test]
async fn judged_pairs_keep_their_order_and_are_judged_once() {
    let files = Files::new();
    let path = files.write_pairs("a.jsonl", 10);
    let sets = [path_of(&path), "label=judge".into(), "shuffle=false".into()];
    let set = Arc::new(files.load(&sets).unwrap());
    let mut source = Judged::new(&set);
    source.pairs.refill(0).await.unwrap();
    let asked = source.asked();
    assert_eq!(asked.len(), 8, "those of two steps");
    assert!(!source.pairs.is_ready(0));
    // Backwards, one without a verdict and one that failed.
    for pair in asked.iter().rev() {
        match index_of(pair.id()) {
            1 => source.pairs.forget(&dropped(pair, DropReason::Abstained)),
            2 => source.pairs.forget(&dropped(pair, DropReason::Failed)),
            index => {
                let labelled = judged(pair.clone(), 0.1 * index as f32);
                assert_eq!(source.pairs.accept(&labelled), LabelArrival::Accepted);
                assert_eq!(source.pairs.accept(&labelled), LabelArrival::Duplicate);
            }
        }
    }
    assert_eq!((source.pairs.awaited(), source.pairs.received()), (0, 6));
    let before = source.pairs.state();
    let batch = source.pairs.take(0);
    assert_eq!((ids(&batch.pairs), batch.received), (vec![0, 3, 4, 5], 4));
    assert!((batch.pairs[1].labels[0].p.get() - 0.3).abs() < 1e-6);
    assert_eq!(batch.pairs[1].judge, "judge");
    let label = batch.pairs[1].labels[0];
    assert_eq!(label.judged, Some(label.p), "a checkpoint keeps it too");
    // Resumed before that step: the labels are known, the failed pair is asked for again.
    let mut resumed = Judged::new(&set);
    resumed
        .pairs
        .restore(serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap());
    resumed.pairs.refill(0).await.unwrap();
    let again = resumed.asked();
    assert_eq!(
        again
            .iter()
            .map(|pair| index_of(pair.id()))
            .collect::<Vec<_>>(),
        [2, 8]
    );
    assert_eq!(
        resumed.pairs.accept(&judged(again[0].clone(), 0.5)),
        LabelArrival::Accepted
    );
    assert!(resumed.pairs.is_ready(0));
    assert_eq!(ids(&resumed.pairs.take(0).pairs), [0, 2, 3, 4]);
    // The second pass asks for nothing that was judged, and leaves out what has no verdict.
    source.pairs.refill(1).await.unwrap();
    let asked = source.asked();
    let indices: Vec<u64> = asked.iter().map(|pair| index_of(pair.id())).collect();
    assert_eq!(indices, [8, 9, 2], "the last had failed");
    for pair in asked {
        assert_eq!(
            source.pairs.accept(&judged(pair, 1.0)),
            LabelArrival::Accepted
        );
    }
    assert_eq!(ids(&source.pairs.take(1).pairs), [6, 7, 8, 9]);
    source.pairs.refill(2).await.unwrap();
    assert_eq!(ids(&source.pairs.take(2).pairs), [0, 2, 3, 4]);
    assert!(source.asked().is_empty());
}

#[tokio::test]
async fn a_judged_pair_without_the_margin_is_left_out_of_every_pass() {
    let files = Files::new();
    let path = files.write_pairs("a.jsonl", 3);
    let sets = [path_of(&path), "label=judge".into(), "shuffle=false".into()];
    let mut source = Judged::with_margin(&Arc::new(files.load(&sets).unwrap()), 0.25);
    source.pairs.refill(0).await.unwrap();
    let asked = source.asked();
    for (pair, p) in asked.iter().zip([0.25, 0.6, 0.75]) {
        let arrival = match p == 0.6 {
            true => LabelArrival::WithoutSignal,
            false => LabelArrival::Accepted,
        };
        assert_eq!(source.pairs.accept(&judged(pair.clone(), p)), arrival);
    }
    assert_eq!(ids(&source.pairs.take(0).pairs), [0, 2, 0, 2]);
    source.pairs.refill(1).await.unwrap();
    assert_eq!(ids(&source.pairs.take(1).pairs), [0, 2, 0, 2]);
    assert!(source.asked().is_empty(), "it is not judged again");
}

#[tokio::test]
async fn a_pair_of_two_passes_is_with_the_judge_once() {
    let files = Files::new();
    let path = files.write_pairs("a.jsonl", 3);
    let sets = [path_of(&path), "label=judge".into(), "shuffle=false".into()];
    let mut source = Judged::new(&Arc::new(files.load(&sets).unwrap()));
    source.pairs.refill(0).await.unwrap();
    let asked = source.asked();
    assert_eq!((asked.len(), source.pairs.awaited()), (3, 8));
    source.pairs.forget(&dropped(&asked[1], DropReason::Failed));
    for pair in [&asked[2], &asked[0]] {
        assert_eq!(
            source.pairs.accept(&judged(pair.clone(), 0.75)),
            LabelArrival::Accepted
        );
    }
    let batch = source.pairs.take(0);
    assert_eq!(batch.received, 2);
    // In order of pass and index.
    assert_eq!(ids(&batch.pairs), [0, 2, 0, 2]);
    assert!(batch.pairs.iter().all(|l| l.labels[0].p.get() == 0.75));
}

#[tokio::test]
async fn a_judge_without_any_verdict_ends_the_draws() {
    let files = Files::new();
    let path = files.write_pairs("a.jsonl", 10);
    let set = Arc::new(files.load(&[path_of(&path), "label=judge".into()]).unwrap());
    let mut source = Judged::new(&set);
    for _ in 0..2 {
        assert!(source.pairs.refill(0).await.unwrap());
        for pair in source.asked() {
            source.pairs.forget(&dropped(&pair, DropReason::Abstained));
        }
    }
    assert!(!source.pairs.refill(0).await.unwrap());
    assert!(!source.pairs.is_ready(0) && source.pairs.awaited() == 0);
    let error = source.pairs.without_labels(String::new()).to_string();
    assert!(
        error.contains("the judge http gave none of the 10 pairs of"),
        "{error}"
    );
    assert!(error.contains("a.jsonl"), "{error}");
}
