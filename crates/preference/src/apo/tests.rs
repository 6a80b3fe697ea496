use std::sync::Mutex;

use messages::{Purpose, WeightsVersion};
use model::{DType, Device, RewardFolder};

use super::*;
use crate::judge::fake::{FakeJudge, completion, pair, preferred};
use crate::reward_training::tests::{TinyModel, compared, settings, tiny_model};
use crate::reward_training::{TrainingData, calibrate, fit};

/// An initial model that prefers token 6, and an output directory. Golden answers are token 5.
struct Harness {
    directory: tempfile::TempDir,
    tiny: TinyModel,
    initial: RewardModel,
}

impl Harness {
    fn new() -> Self {
        let tiny = tiny_model();
        let settings = settings(&["fit.epochs=20"]);
        let examples = compared(6, 5, 1.0);
        let data = TrainingData {
            examples: &examples,
            adversarial: &[],
            apo: &settings.apo,
        };
        let initial = fit(&tiny.model, &settings.fit, data, Seed(3), |_| true).unwrap();
        Self {
            directory: tempfile::tempdir().unwrap(),
            tiny,
            initial,
        }
    }

    fn apo(&self, changes: &[&str], annotated: Vec<PreferenceExample>) -> Apo {
        let settings = settings(changes);
        let gold = FakeJudge::answering(|comparison| {
            // The smaller token is better.
            preferred(if comparison.first.ids[0] < comparison.second.ids[0] {
                0.9
            } else {
                0.1
            })
        });
        Apo::new(ApoParts {
            settings: settings.apo,
            fit: settings.fit,
            backbone: self.tiny.model.clone(),
            folder: self.tiny.folder.clone(),
            initial: self.initial.clone(),
            current: self.initial.clone(),
            last: None,
            pairs: ApoPairs {
                held_out: annotated.clone(),
                annotated,
                human_verdicts: Box::new(Vec::new),
            },
            gold: Some(Box::new(gold)),
            directory: self.directory.path().to_owned(),
            seed: Seed(3),
        })
    }
}

/// Two samples of the policy: the tokens 6 and 7.
fn samples(id: u64, golden: Option<Vec<u32>>) -> Pair {
    let mut pair = pair(id, &["", ""]);
    pair.version = WeightsVersion::at(50);
    pair.prompt.version = pair.version;
    pair.prompt.purpose = Purpose::Apo;
    pair.prompt.ids = vec![0, 4 + id as u32, 2];
    pair.prompt.golden = golden;
    pair.completions = [6, 7].map(|token| completion("", &[token, 1])).to_vec();
    pair
}

fn version(session: u64, step: u64) -> WeightsVersion {
    WeightsVersion { session, step }
}

const ROUND: [&str; 3] = ["fit.epochs=20", "apo.prompts=4", "apo.coef=1.0"];

#[tokio::test]
async fn a_round_learns_to_prefer_golden_answers_and_writes_a_model_and_a_report() {
    let harness = Harness::new();
    let mut apo = harness.apo(&ROUND, compared(8, 9, 1.0));
    for id in 0..4 {
        assert!(!apo.is_training());
        apo.collect_samples(&samples(id, Some(vec![5, 1]))).unwrap();
    }
    assert!(apo.is_training());
    let RoundOutcome { report, model } = apo.outcome().await.unwrap();
    assert!(!apo.is_training());
    assert_eq!((report.round, report.step, report.pairs), (1, 50, 8));
    assert!(
        report.golden_wins.before < 0.6 && report.golden_wins.after == 1.0,
        "{report:?}"
    );
    assert_eq!(
        report.held_out.after.accuracy, 1.0,
        "the annotated pairs are still predicted"
    );
    assert!(report.drift > 0.0 && report.rejected.is_none());
    let policy = report.policy.expect("there is a gold judge");
    assert_eq!(
        policy.initial, policy.before,
        "the first round starts from the initial model"
    );

    let folder = RewardFolder::open(&harness.directory.path().join("round_1"), None).unwrap();
    let saved = folder.model(DType::F32, &Device::Cpu, None).unwrap();
    assert_eq!(
        saved.digest().unwrap(),
        model.expect("it was accepted").digest().unwrap()
    );
    let history = History::load(harness.directory.path(), version(1, 50)).unwrap();
    assert_eq!(
        (history.rounds.clone(), history.active_round()),
        (vec![report], 1)
    );
    assert_eq!(
        history.model(),
        Some(harness.directory.path().join("round_1"))
    );
    assert_eq!(history.last(), Some((1, WeightsVersion::at(50))));
    // Another service of the same session resumes from it, whatever the step of that session.
    let again = History::load(harness.directory.path(), version(0, 0)).unwrap();
    assert_eq!(again.active_round(), 1);
    let before = History::load(harness.directory.path(), version(1, 49)).unwrap();
    assert_eq!(
        (before.last(), before.model()),
        (None, None),
        "a run that was rolled back repeats it"
    );
    assert_eq!(
        History::load(harness.directory.path(), version(1, 50))
            .unwrap()
            .last(),
        None
    );
}

/// With a learning rate of almost nothing, a round ends with what it began with.
#[tokio::test]
async fn a_warm_start_trains_the_current_judge_further() {
    for (warm, is_near) in [
        ("apo.warm_start=true", true),
        ("apo.warm_start=false", false),
    ] {
        let harness = Harness::new();
        let changes = [
            &ROUND[..],
            &[
                "fit.learning_rate=1e-12",
                warm,
                "apo.min_accuracy=0.0",
                "apo.max_ece=1.0",
            ],
        ];
        let mut apo = harness.apo(&changes.concat(), compared(6, 5, 1.0));
        for id in 0..4 {
            apo.collect_samples(&samples(id, Some(vec![5, 1]))).unwrap();
        }
        let RoundOutcome { report, .. } = apo.outcome().await.unwrap();
        assert_eq!(report.drift < 1e-4, is_near, "{warm}: {report:?}");
    }
}

#[tokio::test]
async fn a_model_beyond_the_limits_is_rejected() {
    let harness = Harness::new();
    // Only the adversarial loss, evaluated on pairs with the opposite preference.
    let changes = [&ROUND[..], &["apo.annotated=false", "apo.min_accuracy=0.8"]].concat();
    let mut apo = harness.apo(&changes, compared(6, 5, 1.0));
    for id in 0..4 {
        apo.collect_samples(&samples(id, Some(vec![5, 1]))).unwrap();
    }
    let RoundOutcome { report, model } = apo.outcome().await.unwrap();
    assert!(model.is_none());
    let reason = report.rejected.expect("it is rejected");
    assert!(
        reason.contains("below preference.apo.min_accuracy = 0.8"),
        "{reason}"
    );
    assert_eq!(report.annotated_loss, None);
    let history = History::load(harness.directory.path(), version(1, 50)).unwrap();
    assert_eq!(
        (
            history.last().map(|(round, _)| round),
            history.active_round(),
            history.model()
        ),
        (Some(1), 0, None)
    );
}

#[tokio::test]
async fn duplicate_samples_and_samples_of_a_finished_round_are_ignored() {
    let harness = Harness::new();
    let mut apo = harness.apo(&ROUND, compared(8, 9, 1.0));
    for id in [0, 1, 1, 0, 2] {
        assert!(!apo.collect_samples(&samples(id, Some(vec![5, 1]))).unwrap());
    }
    assert!(apo.collect_samples(&samples(3, Some(vec![5, 1]))).unwrap());
    assert_eq!(apo.outcome().await.unwrap().report.pairs, 8);
    // Redelivered, as after a service that died before acknowledging them.
    for id in 0..4 {
        assert!(!apo.collect_samples(&samples(id, Some(vec![5, 1]))).unwrap());
    }
    assert!(!apo.is_training());
}

/// The annotated pairs say nothing about the tokens 8 and 9; people prefer 9.
#[tokio::test]
async fn a_round_trains_on_the_verdicts_that_stand_when_it_starts() {
    let harness = Harness::new();
    let mut apo = harness.apo(&ROUND, compared(10, 11, 1.0));
    let verdicts = Arc::new(Mutex::new(Vec::new()));
    let read = Arc::clone(&verdicts);
    let context = Arc::get_mut(&mut apo.context).unwrap();
    context.pairs.human_verdicts = Box::new(move || read.lock().unwrap().clone());
    *verdicts.lock().unwrap() = compared(9, 8, 1.0);
    for id in 0..4 {
        apo.collect_samples(&samples(id, Some(vec![5, 1]))).unwrap();
    }
    let outcome = apo.outcome().await.unwrap();
    assert_eq!(outcome.report.human_verdicts, compared(9, 8, 1.0).len());
    let quality = calibrate(&outcome.model.unwrap(), &compared(9, 8, 1.0)).unwrap();
    assert_eq!(quality.unwrap().accuracy, 1.0);
}

#[tokio::test]
async fn prompts_without_a_golden_answer_count_toward_the_round() {
    let harness = Harness::new();
    let mut apo = harness.apo(&ROUND, compared(8, 9, 1.0));
    for id in 0..4 {
        apo.collect_samples(&samples(id, (id > 0).then(|| vec![5, 1])))
            .unwrap();
    }
    let report = apo.outcome().await.unwrap().report;
    assert_eq!((report.without_golden, report.pairs), (1, 6));
}
