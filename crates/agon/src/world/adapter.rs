//! The adapter that a run trains beside its model: fresh, or read from a folder.

use std::path::Path;

use messages::Seed;
use model::{Adapter, AdapterFolder, LanguageModel, LoraConfig, ModelFolder, Weights};
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
            Adapter::fresh(fresh, &folder.config, seed, base.device())
                .map_err(|error| Misuse(format!("model.target_modules: {error}")))?
        }
    };
    let adapter = adapter.with_base_model(folder.base_model.clone());
    Ok(Some(adapter.with_dropout(how.lora_dropout)))
}

/// The adapter in the folder `path`, which must have this rank.
fn read(path: &Path, rank: usize, base: &LanguageModel) -> anyhow::Result<Adapter> {
    let opened = AdapterFolder::open(path)?;
    if opened.config.rank != rank {
        return Err(Misuse(format!(
            "model.lora_rank = {rank}, but the adapter {} has r = {}: set it to that",
            path.display(),
            opened.config.rank
        ))
        .into());
    }
    Ok(opened.adapter(base)?)
}

/// The shape of a fresh adapter, if the settings want an adapter.
pub(crate) fn fresh_adapter(settings: &Settings) -> Option<LoraConfig> {
    let how = &settings.model;
    let (rank, alpha) = (how.lora_rank, how.lora_alpha);
    (rank > 0).then(|| LoraConfig::new(rank, alpha, how.lora_dropout, &how.target_modules))
}
