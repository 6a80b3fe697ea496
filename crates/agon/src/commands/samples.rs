//! `agon samples`: what a policy wrote and how it was judged, on the terminal.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use telemetry::{RunView, SampleQuery, SampleRow, printable, printable_json};

/// Show pairs that a run logged, side by side with their labels: the newest first.
///
/// How many pairs of a step are logged, telemetry.samples_per_step says.
///
/// Example: agon samples runs/quickstart --search happy --limit 3
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The run directory.
    run: PathBuf,
    /// Only pairs of this learner step.
    #[arg(long, value_name = "STEP")]
    step: Option<u64>,
    /// Only pairs that hold this text, in upper or lower case.
    #[arg(long, value_name = "TEXT", default_value = "")]
    search: String,
    /// Only pairs whose label is this sure: |2p - 1|, from 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    confidence: f32,
    /// How many pairs.
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    limit: usize,
    /// One JSON object a line, as the run logged it.
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
    // A search looks at a part of the rows at a time.
    loop {
        query.limit = arguments.limit - shown;
        let page = view.samples().page(&query)?;
        for (_, row) in &page.rows {
            if arguments.json {
                writeln!(out, "{}", printable_json(&serde_json::to_string(row)?))?;
            } else {
                writeln!(out, "{}", told(row))?;
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
            "none of the {all} samples of {} is such",
            arguments.run.display()
        );
    } else if !arguments.json {
        writeln!(out, "{shown} of {all} samples")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A pair for people.
fn told(row: &SampleRow) -> String {
    let p = row.p.map_or("no label".into(), |p| format!("p = {p:.3}"));
    let gold = row.gold.map_or(String::new(), |p| format!(", gold {p:.3}"));
    let mut text = format!(
        "step {}, prompt {}, policy version {}, {} {}: {p}{gold}\n  > {}\n",
        row.step,
        row.prompt_id,
        row.version,
        row.judge,
        row.judge_version,
        shown(&row.asked()),
    );
    for (i, completion) in row.completions.iter().enumerate() {
        let won = match (i, row.p) {
            (0, Some(p)) if p > 0.5 => "+",
            (1, Some(p)) if p < 0.5 => "+",
            _ => " ",
        };
        let length = row.lengths.get(i).copied().unwrap_or_default();
        let ratio = row.sum_logp.get(i).copied().flatten();
        let ratio = ratio.zip(row.sum_ref_logp.get(i).copied().flatten());
        let ratio = ratio.map_or(String::new(), |(p, r)| format!(", log π/ref {:.2}", p - r));
        text += &format!(
            "{won} {}. {} [{length} tokens{ratio}]\n",
            i + 1,
            shown(completion)
        );
    }
    text
}

/// A text on lines of its own, without what would drive the terminal.
fn shown(text: &str) -> String {
    printable(text).replace('\n', "\n    ").replace('\t', " ")
}

#[cfg(test)]
mod tests {
    use messages::Dialogue;

    use super::*;

    #[test]
    fn a_pair_is_told_with_its_label_and_cannot_drive_the_terminal() {
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
        let asked = SampleRow {
            dialogue: Some(Dialogue::of_user("what was asked")),
            ..row.clone()
        };
        assert!(told(&asked).contains("\n  > what was asked\n"));
        assert_eq!(
            told(&row),
            "step 3, prompt 7, policy version 2, gold 1: p = 0.250\n  > one\n    two\n  \
             1. \\u{1b}[2Jgone [4 tokens, log π/ref 0.50]\n+ 2. good [1 tokens]\n"
        );
    }
}
