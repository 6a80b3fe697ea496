//! `agon fit-preference`: a preference model from annotated pairs.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use messages::Seed;
use preference::Calibration;
use serde_json::json;
use settings::{PairsSettings, Settings};
use telemetry::{Journal, Measurements, RunDirectory, printable, write_atomically};

use super::configuration::Configuration;
use crate::{
    interrupt, plot,
    world::{self, LeftOut, StyleComparison},
};

/// Fit a preference model to annotated pairs, and measure how far it can be trusted.
///
/// Reads the pairs of preference.fit.pairs (the playground's own, made by a noisy annotator, or rows
/// {"prompt", "chosen", "rejected"} in any form of docs/data.md), holds those of a share of the prompts out,
/// and trains a head on the trunk. The run directory gets the model, metrics.jsonl, report.json, report.md and
/// reliability.svg: accuracy, calibration error over 10 bins in both orders, Brier score, and how much the
/// model likes length. Judge with it by
/// --set preference.judge.kind=bradley-terry --set preference.judge.path=RUN/model.
///
/// The model is a folder in Hugging Face's layout. transformers loads it, and computes the same scores, with
/// preference.fit.head=bradley-terry, pooling=last and likelihood=false; every other head, the default among
/// them, is Agon's own and has an architecture name that other programs refuse.
///
/// Example: agon fit-preference configs/quickstart.toml --run-dir runs/rm
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    /// The run directory, in place of <run.output_dir>/<run.name>.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let settings = &resolved.settings;
    let run = &settings.run;
    let path = arguments
        .run_dir
        .clone()
        .unwrap_or_else(|| run.output_dir.join(&run.name));
    if path.join("config.toml").exists() {
        RunDirectory::create(&path, &resolved.toml)?;
    }
    // Its threads hear signals while this one computes.
    let runtime = crate::runtime()?;
    let stop = runtime.block_on(async { interrupt::on_signal() })?;
    let stopped = || *stop.borrow();
    let start = world::Start::open(settings, &stopped)?;
    let trunk = world::Trunk::open(settings, start.policy(), &stopped)?;
    let pairs = world::annotated(settings, &trunk.folder, start.policy(), &stopped)?;
    let directory = RunDirectory::create(&path, &resolved.toml)?;
    let mut journal = Journal::open(&directory.metrics())?;
    tracing::info!(
        run = %path.display(),
        trunk = %trunk.folder.path.display(),
        pairs = pairs.fitting.len(),
        validation = pairs.validation.len(),
        left_out = pairs.left_out.total(),
        "fitting a preference model"
    );
    let started = Instant::now();
    let mut written = Ok(());
    let (model, calibration) = trunk.fit(settings, &pairs, |step| {
        let mut m = Measurements::new();
        m.set("loss/preference", step.annotated.unwrap_or(f64::NAN));
        m.set("grad_norm", step.grad_norm);
        written = journal.append(step.step, started.elapsed().as_secs_f64(), &m);
        written.is_ok() && !stopped()
    })?;
    written?;
    let to = directory.root().join("model");
    model.save(&to, &trunk.folder)?;
    let styles = match &settings.preference.fit.pairs {
        PairsSettings::Playground(how) => {
            world::styles(&model, Seed(settings.run.seed), how.cycle)?
        }
        PairsSettings::Dataset(_) => Vec::new(),
    };
    let fitted = Fitted {
        calibration: &calibration,
        styles: &styles,
        fitting: pairs.fitting.len(),
        left_out: pairs.left_out,
        repeated: pairs.repeated,
        seconds: started.elapsed().as_secs_f64(),
        model: &to,
        readers: match model.config().is_transformers() {
            true => "a Hugging Face folder; transformers computes the same scores",
            false => "for Agon: other programs cannot compute its scores, and refuse it",
        },
    };
    tell(settings, &fitted, &directory)?;
    Ok(ExitCode::SUCCESS)
}

/// What there is to tell.
struct Fitted<'a> {
    calibration: &'a Calibration,
    styles: &'a [StyleComparison],
    fitting: usize,
    left_out: LeftOut,
    repeated: usize,
    seconds: f64,
    model: &'a Path,
    /// Who can use it.
    readers: &'static str,
}

fn tell(settings: &Settings, fitted: &Fitted<'_>, directory: &RunDirectory) -> anyhow::Result<()> {
    let picture = directory.root().join("reliability.svg");
    plot::reliability(&picture, fitted.calibration)?;
    let report = json!({
        "head": settings.preference.fit.head,
        "pairs": fitted.fitting,
        "left_out": fitted.left_out.total(),
        "left_out_by_reason": fitted.left_out,
        "repeated": fitted.repeated,
        "seconds": fitted.seconds,
        "model": fitted.model,
        "validation": fitted.calibration,
        "styles": fitted.styles,
        "peak_memory_bytes": telemetry::peak_memory_bytes(),
    });
    let mut bytes = serde_json::to_vec_pretty(&report)?;
    bytes.push(b'\n');
    write_atomically(&directory.report_json(), &bytes)?;
    let text = in_words(fitted)?;
    let text = printable(&text);
    write_atomically(&directory.report_markdown(), text.as_bytes())?;
    out!("{text}")?;
    out!("Report: {}", directory.report_markdown().display())?;
    Ok(())
}

fn in_words(fitted: &Fitted<'_>) -> Result<String, std::fmt::Error> {
    let found = fitted.calibration;
    let mut text = String::new();
    writeln!(text, "# A preference model\n")?;
    writeln!(
        text,
        "Fitted to {} pairs in {:.0} s, of which {} repeat an earlier one; left out: {}.\n",
        fitted.fitting, fitted.seconds, fitted.repeated, fitted.left_out
    )?;
    writeln!(text, "| on {} held-out pairs | | |", found.pairs)?;
    writeln!(text, "|---|---|---|")?;
    for (name, value, meaning) in [
        (
            "accuracy",
            found.accuracy,
            "how often it prefers the response that was preferred",
        ),
        (
            "ECE",
            found.ece,
            "how far its p is from the share that it stands for, both orders",
        ),
        (
            "Brier score",
            found.brier,
            "mean squared error of p; 0.25 for a coin",
        ),
        ("log loss", found.log_loss, "nats; 0.693 for a coin"),
        (
            "length bias",
            found.length_bias,
            "how much more than the annotators it prefers the longer one",
        ),
    ] {
        writeln!(text, "| {name} | {value:.3} | {meaning} |")?;
    }
    writeln!(
        text,
        "\n| difference in length up to (tokens) | longer preferred: model | annotators |"
    )?;
    writeln!(text, "|---|---|---|")?;
    for quarter in &found.length_quarters {
        writeln!(
            text,
            "| {} | {:.3} | {:.3} |",
            quarter.up_to, quarter.mean_p, quarter.mean_label
        )?;
    }
    if !fitted.styles.is_empty() {
        writeln!(
            text,
            "\n| style, all else equal | model | true preference |\n|---|---|---|"
        )?;
    }
    for s in fitted.styles {
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
        fitted.model.display(),
        fitted.readers
    )?;
    Ok(text)
}
