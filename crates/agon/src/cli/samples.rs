//! `agon samples`: sampled pairs and their labels, on the terminal.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use telemetry::{RunView, SampleQuery, SampleRow, printable, printable_json};

/// Show the pairs that a run logged with their labels, newest first.
///
/// The number of logged pairs per step is telemetry.samples_per_step.
///
/// Example: agon samples runs/quickstart --search happy --limit 3
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The run directory.
    run: PathBuf,
    /// Only pairs of this learner step.
    #[arg(long, value_name = "STEP")]
    step: Option<u64>,
    /// Only pairs that contain this text, ignoring case.
    #[arg(long, value_name = "TEXT", default_value = "")]
    search: String,
    /// Only pairs whose label has at least this confidence: |2p - 1|, from 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    confidence: f32,
    /// The largest number of pairs.
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    limit: usize,
    /// Print one JSON object per line, as the run logged it.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut view = RunView::open(&arguments.run)?;
    view.refresh()?;
    let mut query = SampleQuery {
        limit: arguments.limit,
        first_step: arguments.step,
        last_step: arguments.step,
        least_confidence: arguments.confidence,
        search: arguments.search.clone(),
        ..SampleQuery::default()
    };
    let mut out = io::stdout().lock();
    let mut shown = 0;
    // A page of a search covers only a part of the rows.
    loop {
        query.limit = arguments.limit - shown;
        let page = view.samples().page(&query)?;
        for (_, row) in &page.rows {
            if arguments.json {
                writeln!(out, "{}", printable_json(&serde_json::to_string(row)?))?;
            } else {
                writeln!(out, "{}", text_of(row))?;
            }
        }
        shown += page.rows.len();
        query.before = page.next;
        if shown >= arguments.limit || page.next.is_none() {
            break;
        }
    }
    let all = view.samples().len();
    if shown == 0 {
        note!(
            "none of the {all} samples of {} matches",
            arguments.run.display()
        );
    } else if !arguments.json {
        writeln!(out, "{shown} of {all} samples")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A pair as text for the terminal.
fn text_of(row: &SampleRow) -> String {
    let p = row.p.map_or("no label".into(), |p| format!("p = {p:.3}"));
    let gold = row.gold.map_or(String::new(), |p| format!(", gold {p:.3}"));
    let mut text = format!(
        "step {}, prompt {}, policy version {}, {} {}: {p}{gold}\n  > {}\n",
        row.step,
        row.prompt_id,
        row.version,
        shown(&row.judge),
        row.judge_version,
        shown(&row.prompt_transcript()),
    );
    for (i, completion) in row.completions.iter().enumerate() {
        let mark = match (i, row.p) {
            (0, Some(p)) if p > 0.5 => "+",
            (1, Some(p)) if p < 0.5 => "+",
            _ => " ",
        };
        let length = row.lengths.get(i).copied().unwrap_or_default();
        let ratio = row.sum_logp.get(i).copied().flatten();
        let ratio = ratio.zip(row.sum_ref_logp.get(i).copied().flatten());
        let ratio = ratio.map_or(String::new(), |(p, r)| format!(", log π/ref {:.2}", p - r));
        text += &format!(
            "{mark} {}. {} [{length} tokens{ratio}]\n",
            i + 1,
            shown(completion)
        );
    }
    text
}

/// An indented text without terminal control characters.
fn shown(text: &str) -> String {
    printable(text).replace('\n', "\n    ").replace('\t', " ")
}

#[cfg(test)]
mod tests {
    use messages::Dialogue;

    use super::*;

    #[test]
    fn pairs_are_printed_with_labels_and_without_control_characters() {
        let row = SampleRow {
            step: 3,
            prompt_id: 7,
            version: 2,
            prompt: "one\ntwo".into(),
            completions: vec!["\u{1b}[2Jgone".into(), "good".into()],
            lengths: vec![4, 1],
            p: Some(0.25),
            judge: "gold".into(),
            judge_version: 1,
            sum_logp: vec![Some(-1.0), None],
            sum_ref_logp: vec![Some(-1.5), Some(-1.0)],
            ..SampleRow::default()
        };
        let with_dialogue = SampleRow {
            dialogue: Some(Dialogue::of_user("a question")),
            ..row.clone()
        };
        assert!(text_of(&with_dialogue).contains("\n  > a question\n"));
        assert_eq!(
            text_of(&row),
            "step 3, prompt 7, policy version 2, gold 1: p = 0.250\n  > one\n    two\n  \
             1. \\u{1b}[2Jgone [4 tokens, log π/ref 0.50]\n+ 2. good [1 tokens]\n"
        );
    }
}
