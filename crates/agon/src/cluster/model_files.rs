//! Files of the initial model and adapter: uploaded by the leader to the weight store, so that other processes need
//! nothing but the server, and fetched by processes that do not have them.

use std::{
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, ensure};
use messages::{Digest, FileName};
use model::{ModelFolder, PublishedWeights};
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
    fn includes(self, name: &FileName) -> bool {
        let name = name.as_str();
        match self {
            Self::Model => ["json", "safetensors", "jinja", "model"]
                .iter()
                .any(|extension| name.rsplit('.').next() == Some(extension)),
            Self::Adapter => ["adapter_config.json", "adapter_model.safetensors"].contains(&name),
        }
    }
}

/// Largest number of files of a model or an adapter: its shards and some others.
const MAX_FILES: usize = 4096;

/// Uploads a folder's files of this kind, except those that are `uploaded` already. Returns all of them, by name.
pub(super) async fn upload(
    folder: &Path,
    kind: ModelFileKind,
    weight_store: &WeightStore<PublishedWeights>,
    uploaded: &[ModelFile],
) -> anyhow::Result<Vec<ModelFile>> {
    let mut files = Vec::new();
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .with_context(|| format!("failed to read {}", folder.display()))?
        .filter_map(|entry| FileName::new(entry.ok()?.file_name().into_string().ok()?).ok())
        .filter(|name| kind.includes(name))
        .collect();
    names.sort();
    for name in names {
        let path = folder.join(&name);
        let bytes =
            std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let file = ModelFile {
            name,
            digest: Digest::of(&bytes),
            bytes: bytes.len() as u64,
        };
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
        weight_store: &WeightStore<PublishedWeights>,
    ) -> anyhow::Result<Self> {
        let (device, dtype) = assembly::device(settings)?;
        let source = &settings.model;
        let kind = ModelFileKind::Model;
        let source_path = source.path.as_ref();
        let files = FileFolder::find(source_path, &record.model, kind, weight_store).await?;
        let adapter = match record.adapter.as_slice() {
            [] => None,
            files => {
                let (source, kind) = (source.adapter.as_ref(), ModelFileKind::Adapter);
                Some(FileFolder::find(source, files, kind, weight_store).await?)
            }
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

    /// The model as actors hold it.
    pub(super) fn packed(self, settings: &Settings) -> anyhow::Result<Self> {
        let saved = self.adapter.as_ref().map(FileFolder::path);
        let has_adapter = assembly::adapter(settings, &self.base, saved)?.is_some();
        let precision = assembly::frozen_precision(settings, has_adapter);
        Ok(Self {
            base: self.base.packed(precision)?,
            ..self
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
        kind: ModelFileKind,
        weight_store: &WeightStore<PublishedWeights>,
    ) -> anyhow::Result<Self> {
        check(files, kind)?;
        let local = source.and_then(hub::cached_folder);
        if let Some(local) = local.filter(|local| files.iter().all(|file| has(local, file))) {
            return Ok(Self::Local(local));
        }
        let folder = tempfile::tempdir().context("failed to make a folder for the model")?;
        let needed: u64 = files.iter().map(|file| file.bytes).sum();
        let free = telemetry::free_bytes(folder.path());
        ensure!(
            free.is_none_or(|free| free >= needed),
            "failed to fetch the run's model: its {needed} bytes do not fit into {}; set TMPDIR to a folder with room",
            folder.path().display()
        );
        for file in files {
            let bytes = weight_store
                .get_file(&stored_name(file), file.bytes)
                .await?;
            let bytes = bytes.context("a server stores the files of the run")?;
            if Digest::of(&bytes) != file.digest {
                return Err(anyhow!("{} from the server is corrupt", file.name));
            }
            write_new(&folder.path().join(&file.name), &bytes)?;
        }
        Ok(Self::Fetched(folder))
    }
}

/// Whether `folder` has this file: a regular one of its length, with its digest.
fn has(folder: &Path, file: &ModelFile) -> bool {
    let path = folder.join(&file.name);
    let metadata = std::fs::metadata(&path);
    let is_candidate = metadata.is_ok_and(|found| found.is_file() && found.len() == file.bytes);
    is_candidate && std::fs::read(path).is_ok_and(|bytes| Digest::of(&bytes) == file.digest)
}

/// Checks what a run's record says of its files: only files of the kind, each once, and not too many.
fn check(files: &[ModelFile], kind: ModelFileKind) -> anyhow::Result<()> {
    ensure!(
        files.len() <= MAX_FILES,
        "the run's record names {} files of a model: at most {MAX_FILES} are fetched",
        files.len()
    );
    let total = files
        .iter()
        .try_fold(0u64, |total, file| total.checked_add(file.bytes));
    ensure!(
        total.is_some(),
        "the run's record names files of more bytes than there are"
    );
    let mut seen = std::collections::BTreeSet::new();
    for file in files {
        ensure!(
            kind.includes(&file.name) && seen.insert(file.name.as_str()),
            "the run's record names the file {:?}, which is no file of {kind:?} or is there twice",
            file.name.as_str()
        );
    }
    Ok(())
}

/// Writes a file that does not exist yet, for its owner only.
fn write_new(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let failed = || format!("failed to write {}", path.display());
    let mut options = std::fs::OpenOptions::new();
    let created = options.write(true).create_new(true).mode(0o600).open(path);
    let mut file = created.with_context(failed)?;
    file.write_all(bytes).with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, bytes: u64) -> ModelFile {
        ModelFile {
            name: FileName::new(name).expect("a plain name"),
            digest: Digest::of(b"x"),
            bytes,
        }
    }

    #[test]
    fn a_record_names_only_files_of_a_model_each_once() {
        let model =
            |files: &[ModelFile]| check(files, ModelFileKind::Model).map_err(|e| e.to_string());
        assert_eq!(
            model(&[file("config.json", 3), file("a.safetensors", 9)]),
            Ok(())
        );
        let cases = [
            (vec![file(".bashrc", 3)], ".bashrc"),
            (vec![file("a.json", 3), file("a.json", 3)], "twice"),
            (
                vec![file("a.json", u64::MAX), file("b.json", 1)],
                "more bytes",
            ),
            (vec![file("a.json", 0); MAX_FILES + 1], "at most"),
        ];
        for (files, expected) in cases {
            let error = model(&files).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
        let adapter = check(&[file("config.json", 3)], ModelFileKind::Adapter);
        assert!(adapter.is_err());
    }

    #[test]
    fn a_file_is_written_once_and_for_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config.json");
        write_new(&path, b"{}").expect("it is new");
        let mode = std::fs::metadata(&path)
            .expect("a file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = write_new(&path, b"[]").expect_err("it exists").to_string();
        assert!(error.contains("config.json"), "{error}");
        assert_eq!(std::fs::read(&path).expect("a file"), b"{}");
    }

    #[test]
    fn a_local_file_is_regular_and_has_its_digest() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("a.json"), "x").expect("a file");
        std::fs::create_dir(folder.path().join("b.json")).expect("a folder");
        assert!(has(folder.path(), &file("a.json", 1)));
        assert!(!has(folder.path(), &file("a.json", 2)));
        assert!(!has(folder.path(), &file("b.json", 1)));
    }
}
