//! The playground's base policy: a small model, trained once by supervised fine-tuning and cached.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use hub::CancelToken;
use learner::sft::{self, ExampleIds};
use messages::Seed;
use model::{LanguageModel, ModelFolder, Weights};
use playground::{base_config_json, sft_target, train_post, train_seed};
use settings::Settings;

use crate::assembly::cache::cached;

/// RNG stream id of the posts for fine-tuning; no run trains on the same posts.
const SFT_STREAM: u64 = 0x5f7;

/// The playground's base policy.
pub(crate) struct PlaygroundBase {
    /// Folder of the model.
    pub(crate) path: PathBuf,
    /// Seconds of fine-tuning; `None` if it was cached.
    pub(crate) seconds: Option<f64>,
}

/// The base policy of these settings, cached under the digest of everything that determines it. Blocks while it is
/// trained; ends early once `cancel` is cancelled.
pub(crate) fn base_model(
    settings: &Settings,
    cancel: &CancelToken,
) -> anyhow::Result<PlaygroundBase> {
    let inputs = &settings.playground;
    let shape = (
        inputs.hidden_size,
        inputs.layers,
        inputs.heads,
        inputs.intermediate_size,
    );
    let cache_key = (
        shape,
        settings.model.dtype,
        &settings.sft,
        settings.run.seed,
        env!("CARGO_PKG_VERSION"),
    );
    let mut seconds = None;
    let path = cached(&inputs.base_dir, &cache_key, |tmp| {
        tracing::info!("training the base policy by supervised fine-tuning");
        seconds = Some(train(settings, tmp, cancel)?);
        Ok(())
    })?;
    Ok(PlaygroundBase { path, seconds })
}

/// Writes configuration and tokenizer of the base policy into the folder `to` and opens it; there are no weights yet.
pub(crate) fn base_folder(settings: &Settings, to: &Path) -> anyhow::Result<ModelFolder> {
    let inputs = &settings.playground;
    let config = base_config_json(
        inputs.hidden_size,
        inputs.layers,
        inputs.heads,
        inputs.intermediate_size,
    );
    fs::write(to.join("config.json"), serde_json::to_vec_pretty(&config)?)
        .with_context(|| format!("failed to write into {}", to.display()))?;
    playground::write_tokenizer(to)?;
    Ok(ModelFolder::open(to, None)?)
}

/// Trains the base policy and saves it in the folder `to`; returns the seconds it took.
fn train(settings: &Settings, to: &Path, cancel: &CancelToken) -> anyhow::Result<f64> {
    let folder = base_folder(settings, to)?;
    let (device, dtype) = crate::assembly::device(settings)?;
    let seed = Seed(settings.run.seed);
    let weights = Weights::initialise(&folder.config, seed, dtype, &device)?;
    let model = LanguageModel::new(folder.config.clone(), weights)?;
    let batch = settings.sft.train_batch_size as u64;
    let examples = |step| {
        let indices = step * batch..(step + 1) * batch;
        (!cancel.is_cancelled()).then(|| indices.map(|index| example(seed, index)).collect())
    };
    let (trained, summary) = sft::train(&model, &settings.sft, "making the base", seed, examples)?;
    model::save_policy(to, &folder, &trained)?;
    Ok(summary.seconds)
}

/// Example `index` for fine-tuning: a post and its summary.
fn example(seed: Seed, index: u64) -> ExampleIds {
    let stream = seed.derive(SFT_STREAM).0;
    let post = train_post(stream, index);
    let target = sft_target(&post, train_seed(stream, index));
    ExampleIds {
        prompt: post.prompt_ids(),
        completion: target.ids,
    }
}
