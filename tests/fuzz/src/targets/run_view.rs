//! Untrusted run directories: metrics, samples, settings, reports, and a page of Prometheus metrics.

use std::{fs, hint::black_box, path::Path};

use serde_json::json;
use telemetry::{RunView, SampleQuery, SampleRow, TelemetryError, readings};

use crate::targets::{Input, Outcome};

const PAGE: &str = "# HELP agon_step the step\n# TYPE agon_step gauge\nagon_step{role=\"learner\",x=\"a\\\"b\"} 7\n\
                    agon_rate 1e-3 1700000000000\nagon_nan NaN\n";

/// Name of the run directory, which errors must contain.
const MUTANT: &str = "mutant-run";

pub(super) fn prepare(scratch: &Path) -> Input {
    let root = scratch.join(MUTANT);
    fs::create_dir(&root).expect("a folder in a temporary directory");
    let lines = [
        json!({"step": 1, "wall_seconds": 0.5, "loss": 0.25, "grad_norm": null, "nonfinite": ["grad_norm"]}),
        json!({"step": 2, "wall_seconds": 1.5, "eval/win_rate": 0.75, "eval/truncation_rate": 0.0,
            "conditions": {"prompts": 16, "temperature": 1.0, "stops": [1, 2]}}),
    ];
    let samples = serde_json::to_value(SampleRow {
        step: 1,
        prompt: "a prompt".into(),
        completions: vec!["one".into(), "two".into()],
        lengths: vec![1, 2],
        p: Some(0.75),
        ..SampleRow::default()
    });
    let samples = samples.expect("a row is JSON");
    let report = json!({"finished": true, "steps": 2, "stages": {"actor": {"received": 1}}, "rounds": [{"round": 1}]});
    let config = settings::resolve("", "the defaults", &[])
        .expect("they are valid")
        .toml;
    Box::new(move |mutator| {
        if mutator.below(8) == 0 {
            let page = mutator.text(PAGE, &["{", "}", "\"", "\\", "=", ",", "+Inf", "1e999"]);
            black_box(readings(&page, &|_| true));
            return Outcome::Accepted;
        }
        let mutated_lines: String = lines
            .iter()
            .map(|line| mutator.json_text(line) + "\n")
            .collect();
        let files = [
            ("metrics.jsonl", mutated_lines),
            (
                "samples.jsonl",
                format!("{samples}\n{}\n", mutator.json_text(&samples)),
            ),
            ("report.json", mutator.json_text(&report)),
            (
                "config.toml",
                mutator.text(&config, &["[", "]", "\"", "nan", "\n[["]),
            ),
        ];
        for (name, text) in files {
            fs::write(root.join(name), text).expect("a file in a temporary directory");
        }
        match view(&root) {
            Ok(()) => Outcome::Accepted,
            Err(error) => Outcome::Refused {
                message: error.to_string(),
                culprit: vec![MUTANT.into()],
            },
        }
    })
}

/// Reads everything that a view shows.
fn view(root: &Path) -> Result<(), TelemetryError> {
    let mut view = RunView::open(root)?;
    view.refresh()?;
    let shown = json!(view.status()).to_string().len()
        + view
            .curves()
            .names()
            .filter_map(|name| view.curves().get(name))
            .map(|c| c.steps.len())
            .sum::<usize>();
    assert!(shown > 0, "a status has text");
    black_box(view.evaluation());
    let query = SampleQuery {
        search: "one".into(),
        ..SampleQuery::default()
    };
    view.samples().page(&query)?;
    view.report()?;
    view.rounds()?;
    view.config()?;
    Ok(())
}
