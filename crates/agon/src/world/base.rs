//! The playground's base policy: made once by supervised fine-tuning, kept, and found again.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use learner::sft::{self, ExampleIds};
use messages::{Digest, Seed};
use model::{LanguageModel, ModelConfig, ModelFolder, Weights};
use playground::{base_config_json, sft_target, train_post, train_seed};
use serde::Serialize;
use settings::Settings;

/// Fine-tuning reads other posts than any run that follows it.
const WORLD: u64 = 0x5f7;

/// A base policy, and what it cost if it was made just now.
pub(crate) struct Base {
    /// Its folder.
    pub(crate) path: PathBuf,
    /// Seconds of fine-tuning; `None` when it was found.
    pub(crate) seconds: Option<f64>,
}

/// The base of these settings: found under the digest of everything that decides it, or made, unless
/// `stopped` turns true meanwhile.
pub(crate) fn playground_base(
    settings: &Settings,
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<Base> {
    let world = &settings.playground;
    let shape = (
        world.hidden_size,
        world.layers,
        world.heads,
        world.intermediate_size,
    );
    let recipe = (
        shape,
        settings.model.dtype,
        &settings.sft,
        settings.run.seed,
        env!("CARGO_PKG_VERSION"),
    );
    let mut seconds = None;
    let path = kept(&world.base_dir, &recipe, |aside| {
        tracing::info!("making the base policy by supervised fine-tuning");
        seconds = Some(make(settings, aside, stopped)?);
        Ok(())
    })?;
    Ok(Base { path, seconds })
}

/// The folder in `base_dir` that belongs to `recipe`: found, or made by `make` under another name and
/// then renamed, so that what is found is whole.
pub(crate) fn kept(
    base_dir: &Path,
    recipe: &impl Serialize,
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let recipe = serde_json::to_string(recipe)?;
    let name = Digest::of(recipe.as_bytes()).to_string();
    let path = base_dir.join(&name[..16]);
    if path.exists() {
        tracing::info!(path = %path.display(), "the model is there already");
        return Ok(path);
    }
    let aside = base_dir.join(format!(".{}.{}", &name[..16], std::process::id()));
    fs::create_dir_all(&aside).with_context(|| format!("failed to make {}", aside.display()))?;
    let placed = make(&aside).and_then(|()| match fs::rename(&aside, &path) {
        // Another run made the same meanwhile: theirs is as good.
        Err(_) if path.exists() => Ok(()),
        renamed => renamed.with_context(|| format!("failed to make {}", path.display())),
    });
    if aside.exists() {
        fs::remove_dir_all(&aside)
            .with_context(|| format!("failed to remove {}", aside.display()))?;
    }
    placed.map(|()| path)
}

/// Writes configuration and tokenizer of the playground's base into the folder `to`, and opens it; the weights
/// are made later.
pub(crate) fn base_shape(settings: &Settings, to: &Path) -> anyhow::Result<ModelFolder> {
    let world = &settings.playground;
    let config = base_config_json(
        world.hidden_size,
        world.layers,
        world.heads,
        world.intermediate_size,
    );
    fs::write(to.join("config.json"), serde_json::to_vec_pretty(&config)?)
        .with_context(|| format!("failed to write into {}", to.display()))?;
    playground::write_tokenizer(to)?;
    Ok(ModelFolder::open(to, None)?)
}

fn make(settings: &Settings, aside: &Path, stopped: &dyn Fn() -> bool) -> anyhow::Result<f64> {
    let folder = base_shape(settings, aside)?;
    let (device, dtype) = super::device(settings)?;
    let seed = Seed(settings.run.seed);
    let model = random_model(&folder.config, seed, dtype, &device)?;
    let batch = settings.sft.train_batch_size as u64;
    let (trained, summary) = sft::train(&model, &settings.sft, "making the base", seed, |step| {
        let indices = step * batch..(step + 1) * batch;
        (!stopped()).then(|| {
            indices
                .map(|index| playground_example(seed, index))
                .collect()
        })
    })?;
    model::save_policy(aside, &folder, &trained)?;
    Ok(summary.seconds)
}

fn random_model(
    config: &ModelConfig,
    seed: Seed,
    dtype: model::DType,
    device: &model::Device,
) -> anyhow::Result<LanguageModel> {
    let weights = Weights::initialise(config, seed, dtype, device)?;
    Ok(LanguageModel::new(config.clone(), weights)?)
}

/// The playground's example `index` for fine-tuning.
fn playground_example(seed: Seed, index: u64) -> ExampleIds {
    let world = seed.derive(WORLD).0;
    let post = train_post(world, index);
    let target = sft_target(&post, train_seed(world, index));
    ExampleIds {
        prompt: post.prompt_ids(),
        completion: target.ids,
    }
}
