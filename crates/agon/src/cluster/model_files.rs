//! Files of the initial model and adapter: uploaded by the leader to the weight store, so that other processes need
//! nothing but the server, and fetched by processes that do not have them.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use messages::Digest;
use model::ModelFolder;
use settings::{ModelSource, Settings};
use tempfile::TempDir;
use transport::WeightStore;

use crate::{
    assembly::{self, LoadedModel},
    cluster::membership::{ModelFile, RunRecord},
    run::InitialActorPolicy,
};

/// Kind of a folder's files.
#[derive(Debug, Clone, Copy)]
pub(super) enum ModelFileKind {
    /// Configuration, tokenizer, chat template and weights of a model.
    Model,
    /// Configuration and weights of a PEFT adapter.
    Adapter,
}

impl ModelFileKind {
    fn includes(self, name: &str) -> bool {
        match self {
            Self::Model => ["json", "safetensors", "jinja", "model"]
                .iter()
                .any(|extension| name.rsplit('.').next() == Some(extension)),
            Self::Adapter => ["adapter_config.json", "adapter_model.safetensors"].contains(&name),
        }
    }
}

/// Uploads a folder's files of this kind, except those that are `uploaded` already. Returns all of them, by name.
pub(super) async fn upload(
    folder: &Path,
    kind: ModelFileKind,
    weight_store: &WeightStore,
    uploaded: &[ModelFile],
) -> anyhow::Result<Vec<ModelFile>> {
    let mut files = Vec::new();
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .with_context(|| format!("failed to read {}", folder.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| kind.includes(name))
        .collect();
    names.sort();
    for name in names {
        let path = folder.join(&name);
        let bytes =
            std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let digest = Digest::of(&bytes);
        let file = ModelFile { name, digest };
        if !uploaded.contains(&file) {
            weight_store.put_file(&stored_name(&file), bytes).await?;
        }
        files.push(file);
    }
    Ok(files)
}

/// Name of a file in the weight store.
fn stored_name(file: &ModelFile) -> String {
    format!("{}-{}", file.digest, file.name)
}

/// The initial model of a run that this process has joined.
pub(super) struct FetchedModel {
    /// The base model, which is the reference policy.
    pub(super) base: LoadedModel,
    /// Folder of the initial adapter; `None` if it is newly initialised or none is trained.
    adapter: Option<FileFolder>,
    /// Folder of the model's files, which is kept while the model is used.
    _folder: FileFolder,
}

impl FetchedModel {
    /// Loads the initial model: from this machine's files if they are the run's, else from the weight store.
    pub(super) async fn fetch(
        settings: &Settings,
        record: &RunRecord,
        weight_store: &WeightStore,
    ) -> anyhow::Result<Self> {
        let (device, dtype) = assembly::device(settings)?;
        let source = &settings.model;
        let files = FileFolder::find(source.path.as_ref(), &record.model, weight_store).await?;
        let adapter = match record.adapter.as_slice() {
            [] => None,
            files => Some(FileFolder::find(source.adapter.as_ref(), files, weight_store).await?),
        };
        let mut folder = ModelFolder::open(files.path(), source.chat_template.as_deref())?;
        folder.base_model = record.base_model.clone();
        let weights = folder.weights(dtype, &device)?;
        Ok(Self {
            base: LoadedModel::new(folder, weights),
            adapter,
            _folder: files,
        })
    }

    /// The policy at the start, with an adapter if one is trained.
    pub(super) fn policy(&self, settings: &Settings) -> anyhow::Result<InitialActorPolicy<'_>> {
        let saved = self.adapter.as_ref().map(FileFolder::path);
        let adapter = assembly::adapter(settings, &self.base, saved)?;
        Ok(InitialActorPolicy {
            reference: &self.base,
            policy: self.base.policy(adapter)?,
        })
    }
}

/// A folder with files of the run.
enum FileFolder {
    /// The folder that the settings name.
    Local(PathBuf),
    /// A temporary folder with files from the weight store.
    Fetched(TempDir),
}

impl FileFolder {
    fn path(&self) -> &Path {
        match self {
            Self::Local(path) => path,
            Self::Fetched(folder) => folder.path(),
        }
    }

    /// The local folder of `source` if it has exactly these files, else a temporary one with files from the weight
    /// store.
    async fn find(
        source: Option<&ModelSource>,
        files: &[ModelFile],
        weight_store: &WeightStore,
    ) -> anyhow::Result<Self> {
        let has_file = |folder: &Path, file: &ModelFile| {
            let bytes = std::fs::read(folder.join(&file.name));
            bytes.is_ok_and(|bytes| Digest::of(&bytes) == file.digest)
        };
        let local = source.and_then(hub::cached_folder);
        if let Some(local) = local.filter(|local| files.iter().all(|file| has_file(local, file))) {
            return Ok(Self::Local(local));
        }
        let folder = tempfile::tempdir().context("failed to make a folder for the model")?;
        for file in files {
            let bytes = weight_store.get_file(&stored_name(file)).await?;
            let bytes = bytes.context("a server stores the files of the run")?;
            if Digest::of(&bytes) != file.digest {
                return Err(anyhow!("{} from the server is corrupt", file.name));
            }
            std::fs::write(folder.path().join(&file.name), bytes)
                .with_context(|| format!("failed to write into {}", folder.path().display()))?;
        }
        Ok(Self::Fetched(folder))
    }
}
