use messages::{Purpose, WeightsVersion};
use model::{DType, Device, RewardFolder};

use super::*;
use crate::fit::tests::{Tiny, against, settings, tiny};
use crate::fit::{Material, fit};
use crate::judge::fake::{FakeJudge, completion, pair, preferred};

/// An initial model for which token 6 is best, and a game whose golden answers say 5.
struct Table {
    place: tempfile::TempDir,
    tiny: Tiny,
    initial: RewardModel,
}

impl Table {
    fn set() -> Self {
        let tiny = tiny();
        let settings = settings(&["fit.epochs=20"]);
        let examples = against(6, 5, 1.0);
        let material = Material {
            examples: &examples,
            contests: &[],
            apo: &settings.apo,
        };
        let initial = fit(&tiny.model, &settings.fit, material, Seed(3), |_| true).unwrap();
        Self {
            place: tempfile::tempdir().unwrap(),
            tiny,
            initial,
        }
    }

    fn game(&self, changes: &[&str], annotated: Vec<Example>) -> Game {
        let settings = settings(changes);
        let gold = FakeJudge::answering(|asked| {
            // 5 is truly better than 6.
            preferred(if asked.first.ids[0] < asked.second.ids[0] {
                0.9
            } else {
                0.1
            })
        });
        Game::new(GameParts {
            settings: settings.apo,
            fit: settings.fit,
            trunk: self.tiny.model.clone(),
            folder: self.tiny.folder.clone(),
            initial: self.initial.clone(),
            current: self.initial.clone(),
            last: None,
            held_out: annotated.clone(),
            annotated,
            gold: Some(Box::new(gold)),
            directory: self.place.path().to_owned(),
            seed: Seed(3),
        })
    }
}

/// Two samples of the policy: 6, and 7.
fn samples(id: u64, golden: Option<Vec<u32>>) -> Pair {
    let mut pair = pair(id, &["", ""]);
    pair.version = WeightsVersion::at(50);
    pair.prompt.version = pair.version;
    pair.prompt.purpose = Purpose::Contest;
    pair.prompt.ids = vec![0, 4 + id as u32, 2];
    pair.prompt.golden = golden;
    pair.completions = [6, 7].map(|token| completion("", &[token, 1])).to_vec();
    pair
}

fn after(session: u64, step: u64) -> WeightsVersion {
    WeightsVersion { session, step }
}

const ROUND: [&str; 3] = ["fit.epochs=20", "apo.prompts=4", "apo.coef=1.0"];

#[tokio::test]
async fn a_round_puts_golden_answers_first_and_leaves_a_model_and_a_report() {
    let table = Table::set();
    let mut game = table.game(&ROUND, against(8, 9, 1.0));
    for id in 0..4 {
        assert!(!game.is_fitting());
        game.take(&samples(id, Some(vec![5, 1]))).unwrap();
    }
    assert!(game.is_fitting());
    let Outcome { report, model } = game.outcome().await.unwrap();
    assert!(!game.is_fitting());
    assert_eq!((report.round, report.step, report.pairs), (1, 50, 8));
    assert!(
        report.golden_wins.before < 0.6 && report.golden_wins.after == 1.0,
        "{report:?}"
    );
    assert_eq!(
        report.held_out.after.accuracy, 1.0,
        "the annotated pairs are kept to"
    );
    assert!(report.drift > 0.0 && report.refused.is_none());
    let known = report.policy.expect("there is a gold judge");
    assert_eq!(
        known.initial, known.before,
        "the first round starts from the initial model"
    );

    let folder = RewardFolder::open(&table.place.path().join("round_1"), None).unwrap();
    let kept = folder.model(DType::F32, &Device::Cpu, None).unwrap();
    assert_eq!(
        kept.digest().unwrap(),
        model.expect("it was accepted").digest().unwrap()
    );
    let history = History::take_up(table.place.path(), after(1, 50)).unwrap();
    assert_eq!(
        (history.rounds.clone(), history.judging_round()),
        (vec![report], 1)
    );
    assert_eq!(history.model(), Some(table.place.path().join("round_1")));
    assert_eq!(history.last(), Some((1, WeightsVersion::at(50))));
    // Another service of the same session, whichever step that began at, goes on from it.
    let again = History::take_up(table.place.path(), after(0, 0)).unwrap();
    assert_eq!(again.judging_round(), 1);
    let before = History::take_up(table.place.path(), after(1, 49)).unwrap();
    assert_eq!(
        (before.last(), before.model()),
        (None, None),
        "a run that went back forgets it"
    );
    assert_eq!(
        History::take_up(table.place.path(), after(1, 50))
            .unwrap()
            .last(),
        None
    );
}

#[tokio::test]
async fn a_model_beyond_the_bounds_is_refused_and_the_old_one_judges_on() {
    let table = Table::set();
    // The golden answers' term alone, held against pairs that say the opposite.
    let changes = [&ROUND[..], &["apo.annotated=false", "apo.min_accuracy=0.8"]].concat();
    let mut game = table.game(&changes, against(6, 5, 1.0));
    for id in 0..4 {
        game.take(&samples(id, Some(vec![5, 1]))).unwrap();
    }
    let Outcome { report, model } = game.outcome().await.unwrap();
    assert!(model.is_none());
    let refused = report.refused.expect("it is refused");
    assert!(
        refused.contains("below preference.apo.min_accuracy = 0.8"),
        "{refused}"
    );
    assert_eq!(report.annotated_loss, None);
    let history = History::take_up(table.place.path(), after(1, 50)).unwrap();
    assert_eq!(
        (
            history.last().map(|(round, _)| round),
            history.judging_round(),
            history.model()
        ),
        (Some(1), 0, None)
    );
}

#[tokio::test]
async fn samples_that_come_twice_or_of_a_round_that_was_played_are_passed_over() {
    let table = Table::set();
    let mut game = table.game(&ROUND, against(8, 9, 1.0));
    for id in [0, 1, 1, 0, 2] {
        assert!(!game.take(&samples(id, Some(vec![5, 1]))).unwrap());
    }
    assert!(game.take(&samples(3, Some(vec![5, 1]))).unwrap());
    assert_eq!(game.outcome().await.unwrap().report.pairs, 8);
    // As after its service died before it could acknowledge them.
    for id in 0..4 {
        assert!(!game.take(&samples(id, Some(vec![5, 1]))).unwrap());
    }
    assert!(!game.is_fitting());
}

#[tokio::test]
async fn prompts_without_a_golden_answer_are_counted() {
    let table = Table::set();
    let mut game = table.game(&ROUND, against(8, 9, 1.0));
    for id in 0..4 {
        game.take(&samples(id, (id > 0).then(|| vec![5, 1])))
            .unwrap();
    }
    let report = game.outcome().await.unwrap().report;
    assert_eq!((report.without_golden, report.pairs), (1, 6));
}
