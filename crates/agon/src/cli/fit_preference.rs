//! `agon fit-preference`: training of a preference model on annotated pairs.

use std::{fmt::Write as _, path::Path, process::ExitCode, time::Instant};

use messages::Seed;
use preference::Calibration;
use serde_json::json;
use settings::{PairsSettings, Settings};
use telemetry::{Journal, Measurements, RunDirectory, printable, write_atomically};

use crate::cli::config_args::{Configuration, RunDirectoryArgument};
use crate::{
    assembly::{self, Backbone, LoadedModel, SkippedPairs, StyleComparison},
    report::charts,
    signals,
};

/// Train a preference model on annotated pairs and measure its accuracy and calibration.
///
/// Reads the pairs of preference.fit.pairs (the playground's own, labelled by a noisy annotator, or rows
/// {"prompt", "chosen", "rejected"} in any form of docs/data.md), holds out those of a share of the prompts, and
/// trains a head on the backbone. The run directory receives the model, metrics.jsonl, report.json, report.md and
/// reliability.svg: accuracy, calibration error over 10 bins in both orders, Brier score, and the preference for
/// longer responses. To judge with the model:
/// --set preference.judge.kind=bradley-terry --set preference.judge.path=RUN/model.
///
/// The model is a folder in Hugging Face's layout. transformers loads it, and computes the same scores, with
/// preference.fit.head=bradley-terry, pooling=last and likelihood=false; all other heads, including the default,
/// are specific to Agon and have an architecture name that other programs reject.
///
/// Example: agon fit-preference configs/quickstart.toml --run-dir runs/rm
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    #[command(flatten)]
    directory: RunDirectoryArgument,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let settings = &resolved.settings;
    let path = arguments.directory.path(settings);
    if path.join("config.toml").exists() {
        // Fails: the directory holds another run.
        RunDirectory::create(&path, &resolved.toml)?;
    }
    // Its threads handle signals while this one computes.
    let runtime = crate::runtime()?;
    let shutdown = runtime.block_on(async { signals::on_signal() })?;
    let cancel = signals::cancel_token(&shutdown);
    let base = LoadedModel::open(settings, &cancel)?;
    let backbone = Backbone::open(settings, &base, &cancel)?;
    let pairs = assembly::annotated_pairs(settings, &backbone.folder, &base, &cancel)?;
    let directory = RunDirectory::create(&path, &resolved.toml)?;
    let mut journal = Journal::open(&directory.metrics())?;
    tracing::info!(
        run = %path.display(),
        backbone = %backbone.folder.path.display(),
        pairs = pairs.fitting.len(),
        validation = pairs.validation.len(),
        skipped = pairs.skipped.total(),
        "training a preference model"
    );
    let started = Instant::now();
    let mut written = Ok(());
    let (model, calibration) = backbone.fit(settings, &pairs, |step| {
        let mut m = Measurements::new();
        m.set("loss/preference", step.annotated.unwrap_or(f64::NAN));
        m.set("grad_norm", step.grad_norm);
        written = journal.append(step.step, started.elapsed().as_secs_f64(), &m);
        written.is_ok() && !cancel.is_cancelled()
    })?;
    written?;
    let to = directory.root().join("model");
    model.save(&to, &backbone.folder)?;
    let styles = match &settings.preference.fit.pairs {
        PairsSettings::Playground(pairs) => {
            assembly::style_comparisons(&model, Seed(settings.run.seed), pairs.cycle)?
        }
        PairsSettings::Dataset(_) => Vec::new(),
    };
    let report = TrainingReport {
        calibration: &calibration,
        styles: &styles,
        fitting: pairs.fitting.len(),
        skipped: pairs.skipped,
        duplicates: pairs.duplicates,
        seconds: started.elapsed().as_secs_f64(),
        model: &to,
        compatibility: match model.config().is_transformers() {
            true => "a Hugging Face folder; transformers computes the same scores",
            false => "for Agon: other programs cannot compute its scores, and reject it",
        },
    };
    write_report(settings, &report, &directory)?;
    Ok(ExitCode::SUCCESS)
}

/// Results of the training.
struct TrainingReport<'a> {
    calibration: &'a Calibration,
    styles: &'a [StyleComparison],
    fitting: usize,
    skipped: SkippedPairs,
    duplicates: usize,
    seconds: f64,
    model: &'a Path,
    /// Programs that can compute the model's scores.
    compatibility: &'static str,
}

/// Writes report.json, report.md and the reliability diagram, and prints the text.
fn write_report(
    settings: &Settings,
    report: &TrainingReport<'_>,
    directory: &RunDirectory,
) -> anyhow::Result<()> {
    let diagram = directory.root().join("reliability.svg");
    charts::write_reliability(&diagram, report.calibration)?;
    let json = json!({
        "head": settings.preference.fit.head,
        "pairs": report.fitting,
        "left_out": report.skipped.total(),
        "left_out_by_reason": report.skipped,
        "repeated": report.duplicates,
        "seconds": report.seconds,
        "model": report.model,
        "validation": report.calibration,
        "styles": report.styles,
        "peak_memory_bytes": telemetry::peak_memory_bytes(),
    });
    let mut bytes = serde_json::to_vec_pretty(&json)?;
    bytes.push(b'\n');
    write_atomically(&directory.report_json(), &bytes)?;
    let text = markdown(report)?;
    let text = printable(&text);
    write_atomically(&directory.report_markdown(), text.as_bytes())?;
    out!("{text}")?;
    out!("Report: {}", directory.report_markdown().display())?;
    Ok(())
}

fn markdown(report: &TrainingReport<'_>) -> Result<String, std::fmt::Error> {
    let calibration = report.calibration;
    let mut text = String::new();
    writeln!(text, "# A preference model\n")?;
    writeln!(
        text,
        "Trained on {} pairs in {:.0} s, of which {} repeat an earlier one; left out: {}.\n",
        report.fitting, report.seconds, report.duplicates, report.skipped
    )?;
    writeln!(text, "| on {} held-out pairs | | |", calibration.pairs)?;
    writeln!(text, "|---|---|---|")?;
    for (name, value, meaning) in [
        (
            "accuracy",
            calibration.accuracy,
            "share of pairs on which it prefers the preferred response",
        ),
        (
            "ECE",
            calibration.ece,
            "expected calibration error of p, both orders",
        ),
        (
            "Brier score",
            calibration.brier,
            "mean squared error of p; 0.25 at p = 0.5",
        ),
        ("log loss", calibration.log_loss, "nats; 0.693 at p = 0.5"),
        (
            "length bias",
            calibration.length_bias,
            "preference for the longer response beyond the annotators' own",
        ),
    ] {
        writeln!(text, "| {name} | {value:.3} | {meaning} |")?;
    }
    writeln!(
        text,
        "\n| length difference up to (tokens) | longer preferred: model | annotators |"
    )?;
    writeln!(text, "|---|---|---|")?;
    for quarter in &calibration.length_quarters {
        writeln!(
            text,
            "| {} | {:.3} | {:.3} |",
            quarter.up_to, quarter.mean_p, quarter.mean_label
        )?;
    }
    if !report.styles.is_empty() {
        writeln!(
            text,
            "\n| style, all else equal | model | true preference |\n|---|---|---|"
        )?;
    }
    for s in report.styles {
        writeln!(
            text,
            "| {} over {} | {:.3} | {:.3} |",
            s.style, s.over, s.mean_p, s.gold
        )?;
    }
    writeln!(text, "\n![reliability](reliability.svg)\n")?;
    writeln!(
        text,
        "Model: `{}` ({}).",
        report.model.display(),
        report.compatibility
    )?;
    Ok(text)
}
