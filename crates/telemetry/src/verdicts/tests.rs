use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use messages::Message;
use serde_json::{Value, json};

use super::*;
use crate::interval::Interval;
use crate::view::SampleIndex;

/// A pair that only this prompt has.
fn row_of(prompt_id: u64, p: f32) -> SampleRow {
    SampleRow {
        prompt: format!("{prompt_id}: 2 + 2 ="),
        ..row(p)
    }
}

fn row(p: f32) -> SampleRow {
    SampleRow {
        prompt: "2 + 2 =".into(),
        completions: vec![" 4".into(), " 5".into()],
        p: Some(p),
        judge_p: Some(p),
        judge: "rule".into(),
        ..SampleRow::default()
    }
}

fn given(prompt_id: u64, verdict: HumanVerdict) -> GivenVerdict {
    GivenVerdict {
        step: 3,
        prompt_id,
        verdict,
        swapped: prompt_id.is_multiple_of(2),
        choice: match prompt_id {
            0..=2 => PairChoice::Uncertain,
            _ => PairChoice::Random,
        },
    }
}

fn pairs(root: &Path) -> Vec<Value> {
    let text = fs::read_to_string(root.join(HUMAN_VERDICT_PAIRS_FILE)).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

#[test]
fn verdicts_are_kept_withdrawn_and_written_as_pairs() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let verdicts = RunVerdicts::new(root);
    assert!(verdicts.read().unwrap().is_empty());
    let kinds = [
        HumanVerdict::First,
        HumanVerdict::Second,
        HumanVerdict::Tie,
        HumanVerdict::BothBad,
    ];
    for (id, verdict) in (1..).zip(kinds) {
        let rows = verdicts.add(given(id, verdict), row_of(id, 0.8)).unwrap();
        assert_eq!(rows.last().map(|row| row.id), Some(id));
    }
    let four = json!({"prompt": "1: 2 + 2 =", "chosen": " 4", "rejected": " 5"});
    let five = json!({"prompt": "2: 2 + 2 =", "chosen": " 5", "rejected": " 4"});
    assert_eq!(pairs(root), [four.clone(), five]);
    let again = verdicts.add(given(4, HumanVerdict::First), row_of(4, 0.8));
    assert!(matches!(again, Err(VerdictError::Judged)));
    for id in [4, 3, 2] {
        assert!(matches!(verdicts.withdraw(1), Err(VerdictError::NotLast)));
        verdicts.withdraw(id).unwrap();
    }
    assert_eq!(pairs(root), [four]);
    // Numbers are not used twice, and a withdrawn pair can be judged again.
    let rows = verdicts
        .add(given(4, HumanVerdict::Second), row_of(4, 0.8))
        .unwrap();
    assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), [1, 5]);
    assert_eq!(RunVerdicts::new(root).read().unwrap(), rows);
    for file in ["verdicts.jsonl", HUMAN_VERDICT_PAIRS_FILE] {
        let mode = fs::metadata(root.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let mut same = row(0.8);
    same.completions[1] = " 4".into();
    let nothing = verdicts.add(given(9, HumanVerdict::First), same);
    assert!(matches!(nothing, Err(VerdictError::NoPair)));
}

#[test]
fn dialogues_are_written_as_messages() {
    let directory = tempfile::tempdir().unwrap();
    let verdicts = RunVerdicts::new(directory.path());
    let mut chat = row(0.2);
    let mut dialogue = Dialogue::new(vec![Message::new("user", "2 + 2?")]);
    dialogue.tools = vec![json!({"name": "add"})];
    chat.dialogue = Some(dialogue);
    verdicts.add(given(1, HumanVerdict::Second), chat).unwrap();
    let expected = json!({
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "chosen": [{"role": "assistant", "content": " 5"}],
        "rejected": [{"role": "assistant", "content": " 4"}],
        "tools": [{"name": "add"}],
    });
    assert_eq!(pairs(directory.path()), [expected]);
}

#[test]
fn a_truncated_line_is_removed_and_a_damaged_one_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("verdicts.jsonl");
    let verdicts = RunVerdicts::new(directory.path());
    let first = verdicts
        .add(given(1, HumanVerdict::First), row(0.8))
        .unwrap();
    let whole = fs::read_to_string(&path).unwrap();
    for cut in [1, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, format!("{whole}{}", &whole[..cut])).unwrap();
        assert_eq!(verdicts.read().unwrap(), first);
        let rows = verdicts
            .add(given(2, HumanVerdict::Tie), row_of(2, 0.8))
            .unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(verdicts.read().unwrap(), rows);
    }
    fs::write(&path, format!("{whole}{{\"line\":\"other\"}}\n")).unwrap();
    let error = verdicts
        .add(given(3, HumanVerdict::Tie), row(0.8))
        .unwrap_err();
    let VerdictError::File(error) = error else {
        panic!("{error:?}")
    };
    assert!(error.to_string().contains("line 2"), "{error}");
}

#[test]
fn links_and_pipes_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (root, outside) = (directory.path().join("run"), directory.path().join("other"));
    fs::create_dir(&root).unwrap();
    fs::write(&outside, "kept").unwrap();
    let verdicts = RunVerdicts::new(&root);
    symlink(&outside, root.join("verdicts.jsonl")).unwrap();
    assert!(verdicts.read().is_err());
    let refused = verdicts.add(given(1, HumanVerdict::First), row(0.8));
    assert!(matches!(refused, Err(VerdictError::File(_))));
    fs::remove_file(root.join("verdicts.jsonl")).unwrap();
    // The file of pairs is replaced, not followed.
    symlink(&outside, root.join(HUMAN_VERDICT_PAIRS_FILE)).unwrap();
    verdicts
        .add(given(1, HumanVerdict::First), row(0.8))
        .unwrap();
    assert_eq!(fs::read_to_string(&outside).unwrap(), "kept");
}

#[test]
fn writers_do_not_overwrite_one_another() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            scope.spawn(move || {
                for index in 0..10 {
                    let id = writer * 10 + index;
                    let given = given(id, HumanVerdict::First);
                    RunVerdicts::new(root).add(given, row_of(id, 0.8)).unwrap();
                }
            });
        }
    });
    let rows = RunVerdicts::new(root).read().unwrap();
    let ids: Vec<_> = rows.iter().map(|row| row.id).collect();
    assert_eq!(ids, (1..=40).collect::<Vec<_>>());
    assert_eq!(pairs(root).len(), 40);
}

#[test]
fn agreement_counts_the_pairs_that_both_decide() {
    let directory = tempfile::tempdir().unwrap();
    let verdicts = RunVerdicts::new(directory.path());
    // Of six, the judge decides five and the person four; they agree on two of the three that both decide.
    let cases = [
        (HumanVerdict::First, 0.9),
        (HumanVerdict::Second, 0.9),
        (HumanVerdict::Second, 0.1),
        (HumanVerdict::First, 0.5),
        (HumanVerdict::Tie, 0.9),
        (HumanVerdict::BothBad, 0.9),
    ];
    let mut rows = Vec::new();
    for (id, (verdict, p)) in (1..).zip(cases) {
        rows = verdicts.add(given(id, verdict), row_of(id, p)).unwrap();
    }
    let summary = VerdictSummary::of(&rows);
    let counts = [
        summary.verdicts,
        summary.decided,
        summary.ties,
        summary.both_bad,
    ];
    assert_eq!(counts, [6, 4, 1, 1]);
    // Verdicts 1 and 4 are for the first completion, 2 and 3 for the second; 2 and 4 were shown swapped.
    assert_eq!(summary.first_shown, 2);
    assert_eq!(summary.last, Some(6));
    assert_eq!(
        (summary.agreement.pairs, summary.random_agreement.pairs),
        (3, 1)
    );
    assert!((summary.agreement.rate.mean - 2.0 / 3.0).abs() < 1e-12);
    assert_eq!(summary.agreement.rate, Interval::wilson(2.0 / 3.0, 3));
    let measurements = summary.measurements();
    assert_eq!(measurements.get("judge/human_verdicts"), Some(6.0));
    let none = VerdictSummary::of(&[]).measurements();
    assert_eq!(none.get("judge/human_agreement"), None);
}

#[test]
fn agreement_is_with_the_judge_before_penalties_and_not_with_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let verdicts = RunVerdicts::new(directory.path());
    // Penalties turned the label of the first; the second is a label of a file.
    let turned = SampleRow {
        judge_p: Some(0.9),
        ..row_of(1, 0.2)
    };
    let of_a_file = SampleRow {
        judge_p: None,
        judge: "file".into(),
        ..row_of(2, 1.0)
    };
    verdicts.add(given(1, HumanVerdict::First), turned).unwrap();
    let rows = verdicts.add(given(2, HumanVerdict::Second), of_a_file);
    let agreement = VerdictSummary::of(&rows.unwrap()).agreement;
    assert_eq!((agreement.pairs, agreement.rate.mean), (1, 1.0));
}

#[test]
fn a_pair_that_is_logged_again_has_its_verdict() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let verdicts = RunVerdicts::new(root);
    let mut log = String::new();
    let mut swapped = row(0.5);
    swapped.completions.reverse();
    // The first pair in two passes, and another one of which the judge is more certain.
    for (step, row) in (1..).zip([row(0.5), swapped.clone(), row_of(7, 0.9)]) {
        let row = SampleRow {
            step,
            prompt_id: step << 32,
            ..row
        };
        log += &(serde_json::to_string(&row).unwrap() + "\n");
    }
    fs::write(root.join("samples.jsonl"), log).unwrap();
    let mut index = SampleIndex::new(root);
    index.refresh().unwrap();
    let step = |rows: &[VerdictRow]| {
        let found = index.candidate(PairChoice::Uncertain, 0, &judged(rows));
        found.unwrap().map(|(key, _)| key.step)
    };
    assert_eq!(step(&[]), Some(1));
    let rows = verdicts
        .add(given(1, HumanVerdict::First), row(0.5))
        .unwrap();
    assert_eq!(step(&rows), Some(3), "the second pass is not offered");
    let again = verdicts.add(given(2, HumanVerdict::First), swapped);
    assert!(matches!(again, Err(VerdictError::Judged)));
}

#[test]
fn lost_and_stale_pairs_are_restored_from_the_journal() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let verdicts = RunVerdicts::new(root);
    verdicts.restore_pairs().unwrap();
    assert!(
        fs::read_dir(root).unwrap().next().is_none(),
        "nothing is created"
    );
    for id in 1..=2 {
        let given = given(id, HumanVerdict::First);
        verdicts.add(given, row_of(id, 0.8)).unwrap();
    }
    let (path, journal) = (
        root.join(HUMAN_VERDICT_PAIRS_FILE),
        root.join("verdicts.jsonl"),
    );
    let whole = fs::read_to_string(&path).unwrap();
    let first = whole.lines().next().unwrap().to_owned() + "\n";
    // A crash left half a line.
    let lines = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, format!("{lines}{}", &lines[..40])).unwrap();
    fs::remove_file(&path).unwrap();
    verdicts.restore_pairs().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    assert_eq!(fs::read_to_string(&journal).unwrap(), lines);
    fs::write(&path, first).unwrap();
    restore_human_verdict_pairs(root).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
}
