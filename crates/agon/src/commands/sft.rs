//! `agon sft`: supervised fine-tuning.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use learner::sft::{self, ExampleIds};
use messages::Seed;
use model::ModelFolder;
use settings::Settings;

use super::configuration::Configuration;
use crate::{failure::Misuse, model_hub, world};

/// Fine-tune a model on prompts and completions, the step before alignment.
///
/// Reads rows with an answer from sft.path, in any form of docs/data.md ({"prompt", "completion"},
/// {"messages"}, ShareGPT, Alpaca, text or messages), and trains model.path on them with the settings of
/// [sft]; without sft.path it makes the playground's base. The result is a Hugging Face folder, or with model.lora_rank above 0 the PEFT folder of an adapter.
///
/// Example: agon sft my.toml --set sft.path=rows.jsonl --output models/base
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    /// Where the fine-tuned model goes; needed with sft.path.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.configuration.resolve()?.settings;
    if settings.sft.path.is_none() {
        let base = world::playground_base(&settings, &|| false)?;
        out!("{}", base.path.display())?;
        return Ok(ExitCode::SUCCESS);
    }
    let output = arguments
        .output
        .as_ref()
        .ok_or_else(|| Misuse("name the folder of the fine-tuned model: --output DIR".into()))?;
    if output.exists() {
        return Err(Misuse(format!(
            "{} is there already; name another --output",
            output.display()
        ))
        .into());
    }
    fine_tune(&settings, output)?;
    out!("{}", output.display())?;
    Ok(ExitCode::SUCCESS)
}

fn fine_tune(settings: &Settings, output: &std::path::Path) -> anyhow::Result<()> {
    let source = settings.model.path.as_ref().ok_or_else(|| {
        Misuse(
            "model.path must name the model to fine-tune, a Hugging Face folder or hf:ORG/NAME"
                .into(),
        )
    })?;
    let rows = settings.sft.path.as_ref().context("sft.path is set")?;
    let (device, dtype) = world::device(settings)?;
    let path = model_hub::folder(source, &|| false)?;
    let folder = ModelFolder::open(&path, settings.model.chat_template.as_deref())?;
    let weights = folder.weights(dtype, &device)?;
    let longest = settings.sft.max_length.min(folder.config.max_positions);
    let examples = sft::read_examples(rows, &settings.sft, &folder.tokenizer, longest)?;
    let mut model = world::language_model(&folder, &weights)?;
    let saved = world::adapter_folder(settings, &|| false)?;
    if let Some(adapter) = world::adapter(settings, (&folder, &weights), saved.as_deref())? {
        model = model.with_adapter(adapter)?;
    }
    let (seed, batch) = (
        Seed(settings.run.seed),
        settings.sft.train_batch_size as u64,
    );
    let (trained, summary) = sft::train(&model, &settings.sft, "fine-tuning", seed, |step| {
        let places = step * batch..(step + 1) * batch;
        Some(places.map(|index| pick(&examples, seed, index)).collect())
    })?;
    model::save_policy(output, &folder, &trained)?;
    tracing::info!(loss = summary.loss, seconds = summary.seconds, "fine-tuned");
    Ok(())
}

/// The example at place `index` of an endless shuffled reading.
fn pick(examples: &[ExampleIds], seed: Seed, index: u64) -> ExampleIds {
    let place = dataset::shuffled(index, examples.len() as u64, seed);
    examples[place as usize].clone()
}
