//! `agon fit-preference`: training of a preference model on annotated pairs.

use std::{process::ExitCode, time::Instant};

use messages::Seed;
use settings::PairsSettings;
use telemetry::{Journal, Measurements, RunDirectory};

use crate::cli::config_args::{Configuration, RunDirectoryArgument};
use crate::{
    assembly::{self, Backbone, LoadedModel},
    report::fit::FitReport,
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
    let report = FitReport {
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
    report.write(settings.preference.fit.head, &directory)?;
    Ok(ExitCode::SUCCESS)
}
