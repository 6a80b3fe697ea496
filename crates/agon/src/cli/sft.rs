//! `agon sft`: supervised fine-tuning.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use hub::CancelToken;
use learner::sft::{self, ExampleIds};
use messages::Seed;
use settings::Settings;

use crate::cli::config_args::Configuration;
use crate::{
    assembly::{self, LoadedModel},
    exit_code::UsageError,
};

/// Fine-tune a model on prompts and completions, the step before alignment.
///
/// Reads rows with an answer from sft.path, in any form of docs/data.md ({"prompt", "completion"},
/// {"messages"}, ShareGPT, Alpaca, text or messages), and trains model.path on them with the settings of
/// [sft]; without sft.path it trains the playground's base. The result is a Hugging Face folder, or with
/// model.lora_rank above 0 the PEFT folder of an adapter. Prints the path of the folder.
///
/// Example: agon sft my.toml --set sft.path=rows.jsonl --output models/base
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    /// The folder of the fine-tuned model; required with sft.path.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.configuration.resolve()?.settings;
    if settings.sft.path.is_none() {
        let base = assembly::base_model(&settings, &CancelToken::never())?;
        out!("{}", base.path.display())?;
        return Ok(ExitCode::SUCCESS);
    }
    let output = arguments.output.as_ref().ok_or_else(|| {
        UsageError("name the folder of the fine-tuned model: --output DIR".into())
    })?;
    if output.exists() {
        return Err(UsageError(format!(
            "{} is there already; name another --output",
            output.display()
        ))
        .into());
    }
    fine_tune(&settings, output)?;
    out!("{}", output.display())?;
    Ok(ExitCode::SUCCESS)
}

fn fine_tune(settings: &Settings, output: &Path) -> anyhow::Result<()> {
    let source = settings.model.path.as_ref().ok_or_else(|| {
        UsageError(
            "model.path must name the model to fine-tune, a Hugging Face folder or hf:ORG/NAME"
                .into(),
        )
    })?;
    let rows = settings.sft.path.as_ref().context("sft.path is set")?;
    let never = CancelToken::never();
    let base = LoadedModel::read(settings, &hub::folder(source, &never)?)?;
    let folder = &base.folder;
    assembly::warn_without_stop_tokens(folder);
    let longest = settings.sft.max_length.min(folder.config.max_positions);
    let examples = sft::read_examples(rows, &settings.sft, &folder.tokenizer, longest)?;
    let saved = assembly::saved_adapter(settings, &never)?;
    let adapter = assembly::adapter(settings, &base, saved.as_deref())?;
    let model = base.policy(adapter)?;
    let seed = Seed(settings.run.seed);
    let batch = settings.sft.train_batch_size as u64;
    let (trained, summary) = sft::train(&model, &settings.sft, "fine-tuning", seed, |step| {
        let indices = step * batch..(step + 1) * batch;
        let examples = indices.map(|index| shuffled_example(&examples, seed, index));
        Some(examples.collect())
    })?;
    model::save_policy(output, folder, &trained)?;
    tracing::info!(loss = summary.loss, seconds = summary.seconds, "fine-tuned");
    Ok(())
}

/// Example `index` of an endless sequence that shuffles the examples anew in every epoch.
fn shuffled_example(examples: &[ExampleIds], seed: Seed, index: u64) -> ExampleIds {
    let position = dataset::shuffled(index, examples.len() as u64, seed);
    examples[position as usize].clone()
}
