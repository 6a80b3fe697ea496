//! The LoRA adapter that a run trains: newly initialised, or read from a folder.

use std::path::{Path, PathBuf};

use hub::CancelToken;
use messages::Seed;
use model::{Adapter, AdapterFolder, LoraConfig, ModelConfig, ModelError};
use settings::Settings;

use crate::{assembly::LoadedModel, exit_code::UsageError};

/// RNG stream id for the initialisation of an adapter.
const INIT_STREAM: u64 = 0x107a;

/// The adapter of the settings for this base model: the one in the folder `saved`, or a newly initialised one. `None`
/// if all weights are trained.
pub(crate) fn adapter(
    settings: &Settings,
    base: &LoadedModel,
    saved: Option<&Path>,
) -> anyhow::Result<Option<Adapter>> {
    let Some(fresh) = fresh_adapter(settings) else {
        return Ok(None);
    };
    let model = base.language_model()?;
    let adapter = match saved {
        Some(path) => open(path, fresh.rank)?.adapter_of(&base.folder, &model)?,
        None => {
            let seed = Seed(settings.run.seed).derive(INIT_STREAM);
            Adapter::fresh(fresh, &base.folder.config, seed, model.device()).map_err(misfit)?
        }
    };
    let adapter = adapter.with_base_model(base.folder.base_model.clone());
    Ok(Some(adapter.with_dropout(settings.model.lora_dropout)))
}

/// Folder of the adapter that the settings start from, downloaded first if it is on the Hub; `None` if they name none.
pub(crate) fn saved_adapter(
    settings: &Settings,
    cancel: &CancelToken,
) -> anyhow::Result<Option<PathBuf>> {
    let source = settings.model.adapter.as_ref();
    let folder = source.map(|source| hub::folder(source, cancel));
    Ok(folder.transpose()?)
}

/// Opens the adapter folder `path` and checks its rank; tensors are not read.
fn open(path: &Path, rank: usize) -> anyhow::Result<AdapterFolder> {
    let opened = AdapterFolder::open(path)?;
    if opened.config.rank != rank {
        return Err(UsageError(format!(
            "model.lora_rank = {rank}, but the adapter {} has r = {}: set it to the same value",
            path.display(),
            opened.config.rank
        ))
        .into());
    }
    Ok(opened)
}

/// The adapter's configuration without reading tensors: that of the folder `saved`, or of a new one. `None` if all
/// weights are trained.
///
/// # Errors
/// As [`adapter`], as far as the shapes determine it.
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
    reason = "map_err passes errors by value"
)]
fn misfit(error: ModelError) -> UsageError {
    UsageError(format!("model.target_modules: {error}"))
}

/// Configuration of a newly initialised adapter; `None` if all weights are trained.
pub(crate) fn fresh_adapter(settings: &Settings) -> Option<LoraConfig> {
    let model = &settings.model;
    let (rank, alpha) = (model.lora_rank, model.lora_alpha);
    (rank > 0).then(|| LoraConfig::new(rank, alpha, model.lora_dropout, &model.target_modules))
}
