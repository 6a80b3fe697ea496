//! The adapter that a run trains beside its model: fresh, or read from a folder.

use std::path::Path;

use messages::Seed;
use model::{
    Adapter, AdapterFolder, LanguageModel, LoraConfig, ModelConfig, ModelError, ModelFolder,
    Weights,
};
use settings::Settings;

use crate::failure::Misuse;

/// The stream of a fresh adapter's numbers, among those of the run's seed.
const FRESH: u64 = 0x107a;

/// The adapter of the settings, if they want one, beside these weights: the one in the folder `saved`, or a fresh
/// one.
pub(crate) fn adapter(
    settings: &Settings,
    (folder, weights): (&ModelFolder, &Weights),
    saved: Option<&Path>,
) -> anyhow::Result<Option<Adapter>> {
    let how = &settings.model;
    let Some(fresh) = fresh_adapter(settings) else {
        return Ok(None);
    };
    let base = super::language_model(folder, weights)?;
    let adapter = match saved {
        Some(path) => read(path, fresh.rank, &base)?,
        None => {
            let seed = Seed(settings.run.seed).derive(FRESH);
            Adapter::fresh(fresh, &folder.config, seed, base.device()).map_err(misfit)?
        }
    };
    let adapter = adapter.with_base_model(folder.base_model.clone());
    Ok(Some(adapter.with_dropout(how.lora_dropout)))
}

/// The adapter in the folder `path`, which must have this rank.
fn read(path: &Path, rank: usize, base: &LanguageModel) -> anyhow::Result<Adapter> {
    Ok(open(path, rank)?.adapter(base)?)
}

/// The folder `path` of an adapter of this rank, its tensors not read.
fn open(path: &Path, rank: usize) -> anyhow::Result<AdapterFolder> {
    let opened = AdapterFolder::open(path)?;
    if opened.config.rank != rank {
        return Err(Misuse(format!(
            "model.lora_rank = {rank}, but the adapter {} has r = {}: set it to that",
            path.display(),
            opened.config.rank
        ))
        .into());
    }
    Ok(opened)
}

/// The shape of the adapter that the settings train beside a model of this shape, if they want one: that of
/// the folder `saved`, or of a fresh one. Tensors are not read.
///
/// # Errors
/// As [`adapter`], as far as shapes say.
pub(crate) fn adapter_shape(
    settings: &Settings,
    base: &ModelConfig,
    saved: Option<&Path>,
) -> anyhow::Result<Option<LoraConfig>> {
    let Some(fresh) = fresh_adapter(settings) else {
        return Ok(None);
    };
    let Some(path) = saved else {
        fresh.check_targets(base).map_err(misfit)?;
        return Ok(Some(fresh));
    };
    let opened = open(path, fresh.rank)?;
    opened.check(base)?;
    Ok(Some(opened.config))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "map_err gives errors by value"
)]
fn misfit(error: ModelError) -> Misuse {
    Misuse(format!("model.target_modules: {error}"))
}

/// The shape of a fresh adapter, if the settings want an adapter.
pub(crate) fn fresh_adapter(settings: &Settings) -> Option<LoraConfig> {
    let how = &settings.model;
    let (rank, alpha) = (how.lora_rank, how.lora_alpha);
    (rank > 0).then(|| LoraConfig::new(rank, alpha, how.lora_dropout, &how.target_modules))
}
