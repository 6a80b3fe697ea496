//! Everything that a configuration names, opened before a run starts.
//!
//! `agon check` prints what was found, and `agon train` and `agon learner` refuse to start on the same grounds:
//! all of them call [`Preflight::of`], so what one refuses the others refuse, in the same words and with the
//! same exit code. Configurations, tokenizers, chat templates, rows of prompts and pairs, secrets and
//! addresses are opened. Weights are not read, nothing is fetched, fitted or left behind, and no other machine
//! than the hub is asked.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use learner::{LearnerError, PromptSet};
use model::{LoraConfig, ModelConfig, ModelFolder};
use playground::Bandit;
use settings::{
    DatasetPrompts, JetStreamSettings, PairsSettings, PlaygroundGolden, PromptsSettings, Settings,
    TransportSettings,
};
use tempfile::TempDir;

use super::{adapter_shape, base, fit_adapter, fits_positions, judges, pairs};
use crate::{
    failure::{Refused, Resource},
    launch,
    model_hub::{self, Look},
};

/// What was found of one thing that a configuration names.
#[derive(Debug)]
pub(crate) enum Finding {
    /// It can be used: what it is.
    Fits(String),
    /// It cannot be used, and the run does not open it: what it is and what would.
    Unused(String),
    /// The run cannot start with it.
    Refused(anyhow::Error),
}

/// The processes of a run that are asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All that `agon train` starts on this machine.
    Whole,
    /// The learner, where judges and actors join from elsewhere.
    Learner,
}

/// What was found of everything that a configuration names, in the order in which a run opens it.
#[derive(Default)]
pub(crate) struct Preflight {
    /// What was found.
    pub(crate) findings: Vec<Finding>,
    /// Shape of the policy; `None` when it is not known yet, or a bandit's.
    pub(crate) config: Option<ModelConfig>,
    /// Shape of the adapter that is trained beside it.
    adapter: Option<LoraConfig>,
    /// The prompts of files, where nothing that is fetched later can change their tokens.
    prompts: Option<Arc<dyn PromptSet>>,
}

/// The policy at the start, as far as it is known before weights are read or made.
struct Policy {
    /// `None`: it is the hub's, and not in its cache.
    folder: Option<ModelFolder>,
    /// Where the folder of a model that is yet to be made lies meanwhile.
    _scratch: Option<TempDir>,
}

impl Preflight {
    /// Opens everything that the settings name for this part of a run in the directory `run`.
    pub(crate) fn of(settings: &Settings, run: &Path, part: Part) -> Self {
        let mut preflight = Self::default();
        preflight.refuse("", super::is_built(settings));
        preflight.refuse("model.device", super::device(settings).map(drop));
        preflight.refuse("run.output_dir", can_hold(run));
        let policy = preflight.policy(settings);
        if let Some(folder) = &policy.folder {
            preflight.adapter(settings, folder);
            preflight.refuse(
                "",
                fits_positions(settings, &folder.config).map_err(Into::into),
            );
        }
        preflight.prompts(settings, policy.folder.as_ref());
        let judges_here = match &settings.transport {
            TransportSettings::Memory {} => true,
            TransportSettings::Jetstream(_) => {
                part == Part::Whole && settings.topology.preference > 0
            }
        };
        if judges_here {
            preflight.judge(settings, policy.folder.as_ref());
        }
        preflight.addresses(settings, part);
        if let TransportSettings::Jetstream(jetstream) = &settings.transport {
            preflight.transport(jetstream, part);
        }
        preflight.unused(settings, judges_here);
        preflight
    }

    /// The prompts of files, if they were read; logs what is not used.
    ///
    /// # Errors
    /// All that the run cannot start with.
    pub(crate) fn passed(self) -> Result<Option<Arc<dyn PromptSet>>, Refused> {
        let mut refused = Vec::new();
        for finding in self.findings {
            match finding {
                Finding::Fits(_) => {}
                Finding::Unused(what) => tracing::warn!("{what}"),
                Finding::Refused(error) => refused.push(error),
            }
        }
        match refused.is_empty() {
            true => Ok(self.prompts),
            false => Err(Refused(refused)),
        }
    }

    fn fits(&mut self, what: String) {
        self.findings.push(Finding::Fits(what));
    }

    /// Takes down what went wrong with the setting `key`; an error that names its key needs none.
    fn refuse<T>(&mut self, key: &str, opened: anyhow::Result<T>) -> Option<T> {
        match opened {
            Ok(opened) => Some(opened),
            Err(error) => {
                let error = match key {
                    "" => error,
                    key => error.context(key.to_owned()),
                };
                self.findings.push(Finding::Refused(error));
                None
            }
        }
    }

    fn policy(&mut self, settings: &Settings) -> Policy {
        let how = &settings.model;
        let template = how.chat_template.as_deref();
        let has_template = template.is_none_or(|path| {
            self.refuse("model.chat_template", is_template(path))
                .is_some()
        });
        if let Some(source) = &how.path {
            let folder = self.model("model.path", source, template.filter(|_| has_template));
            self.config = folder.as_ref().map(|folder| folder.config.clone());
            return Policy {
                folder,
                _scratch: None,
            };
        }
        self.refuse(
            "playground.base_dir",
            can_hold(&settings.playground.base_dir),
        );
        let made = self.refuse("model", made(settings));
        let Some((folder, scratch)) = made else {
            return Policy {
                folder: None,
                _scratch: None,
            };
        };
        if let PromptsSettings::Bandit {} = settings.prompts {
            let arms = folder.config.vocab_size;
            self.fits(format!(
                "model: a bandit of {arms} arms, made when the run starts; its memory is negligible"
            ));
        } else {
            self.fits(format!(
                "model: the playground's base, {}",
                shape(&folder.config)
            ));
            self.config = Some(folder.config.clone());
        }
        Policy {
            folder: Some(folder),
            _scratch: Some(scratch),
        }
    }

    /// The folder of the model that the setting `key` names; `None` when it cannot be used, or is not here yet.
    fn model(
        &mut self,
        key: &str,
        source: &settings::ModelSource,
        template: Option<&Path>,
    ) -> Option<ModelFolder> {
        let opened = model_hub::look(source)
            .map_err(anyhow::Error::from)
            .and_then(|look| Ok((opened(&look, template)?, look.origin)));
        let (folder, origin) = self.refuse(key, opened)?;
        let known = match &folder {
            Some(folder) => shape(&folder.config),
            None => "its shape is known then".into(),
        };
        self.fits(format!("{key}: {origin}, {known}"));
        folder
    }

    fn adapter(&mut self, settings: &Settings, policy: &ModelFolder) {
        let Some(source) = &settings.model.adapter else {
            let fresh = adapter_shape(settings, &policy.config, None);
            self.adapter = self.refuse("", fresh).flatten();
            if let Some(text) = self.adapter_text(&policy.config) {
                self.fits(format!("adapter: {text}"));
            }
            return;
        };
        let opened = model_hub::look(source)
            .map_err(anyhow::Error::from)
            .and_then(|look| {
                let folder = look.folder.as_deref();
                let shape = folder.map(|path| adapter_shape(settings, &policy.config, Some(path)));
                Ok((shape.transpose()?.flatten(), look.origin))
            });
        if let Some((adapter, origin)) = self.refuse("model.adapter", opened) {
            self.adapter = adapter;
            let text = self.adapter_text(&policy.config);
            let text = text.map(|text| format!(", {text}")).unwrap_or_default();
            self.fits(format!("model.adapter: {origin}{text}"));
        }
    }

    fn adapter_text(&self, base: &ModelConfig) -> Option<String> {
        let adapter = self.adapter.as_ref()?;
        let count = adapter.parameter_count(base).ok()?;
        Some(format!("rank {}, {count} parameters", adapter.rank))
    }

    fn prompts(&mut self, settings: &Settings, policy: Option<&ModelFolder>) {
        match (&settings.prompts, policy) {
            (PromptsSettings::Bandit {}, _) | (PromptsSettings::Playground { .. }, None) => {}
            (PromptsSettings::Playground { golden }, Some(policy)) => {
                self.refuse("model.path", super::fits_playground(policy));
                let pairs = &settings.preference.fit.pairs;
                if let (PlaygroundGolden::Chosen, PairsSettings::Playground(_)) = (golden, pairs) {
                    self.refuse(
                        "playground.base_dir",
                        can_hold(&settings.playground.base_dir),
                    );
                }
            }
            (PromptsSettings::Dataset(dataset), Some(policy)) => {
                let read = super::prompt_files(settings, dataset, policy);
                let read = read.map_err(|error| named(error, &prompt_files(dataset)));
                if let Some(set) = self.refuse("", read) {
                    for (key, path) in prompt_files(dataset) {
                        self.fits(format!("{key} = {}", path.display()));
                    }
                    let count = set.held_out_count().unwrap_or_default();
                    self.fits(format!("held-out prompts: {count} distinct ones"));
                    let is_settled = settings.model.path.as_ref().is_some_and(is_folder);
                    self.prompts = Some(Arc::new(set) as Arc<dyn PromptSet>).filter(|_| is_settled);
                }
            }
            (PromptsSettings::Dataset(dataset), None) => {
                for (key, path) in prompt_files(dataset) {
                    let read = dataset::read_rows(path).map_err(Into::into);
                    if self.refuse(key, read).is_some() {
                        self.fits(format!("{key} = {}", path.display()));
                    }
                }
            }
        }
    }

    fn judge(&mut self, settings: &Settings, policy: Option<&ModelFolder>) {
        let preference = &settings.preference;
        let name = preference.judge.name();
        let checked = judges::check(&preference.judge, &preference.chat);
        if self.refuse("preference.judge", checked).is_some() {
            self.fits(format!("judge {name}"));
        }
        if !fits_a_model(settings) {
            return;
        }
        self.refuse(
            "playground.base_dir",
            can_hold(&settings.playground.base_dir),
        );
        let how = &preference.fit;
        let template = settings.model.chat_template.as_deref();
        let template = template.filter(|path| is_template(path).is_ok());
        let named_trunk = how.path.as_ref();
        let named_trunk = named_trunk.map(|path| self.model("preference.fit.path", path, template));
        let trunk = match &named_trunk {
            Some(trunk) => trunk.as_ref(),
            None => policy,
        };
        if let Some(trunk) = trunk {
            self.refuse("", fit_adapter(how, &trunk.config).map_err(Into::into));
        }
        match &how.pairs {
            PairsSettings::Playground(_) => {
                let fits = policy.map_or(Ok(()), super::fits_playground);
                self.refuse("preference.fit.pairs.kind", fits);
            }
            PairsSettings::Dataset(files) => {
                let read = match trunk {
                    Some(trunk) => pairs::annotated_files(settings, files, trunk).map(drop),
                    None => dataset::read_rows(&files.path)
                        .map(drop)
                        .map_err(Into::into),
                };
                let read = read.map_err(|error| named(error, &pair_files(settings)));
                if self.refuse("", read).is_some() {
                    for (key, path) in pair_files(settings) {
                        self.fits(format!("{key} = {}", path.display()));
                    }
                }
            }
        }
    }

    /// The addresses that are listened on and the tokens that are asked for there.
    fn addresses(&mut self, settings: &Settings, part: Part) {
        let telemetry = &settings.telemetry;
        self.refuse(
            "",
            telemetry::Exporter::check(telemetry.listen).map_err(Into::into),
        );
        if let Some(listen) = telemetry.page_address() {
            let token = telemetry::page_token(&telemetry.token_path).map_err(Into::into);
            if let Some(token) = self.refuse("telemetry.token_path", token) {
                let page = telemetry::PageServer::check(listen, token.as_deref());
                self.refuse("", page.map_err(Into::into));
            }
        }
        let http = &settings.preference.http;
        if part == Part::Whole && !http.listen.is_empty() {
            let token = preference::read_key(&http.token_path).map_err(Into::into);
            self.refuse("preference.http.token_path", token);
            let listens = preference::Server::check(&http.listen).map_err(Into::into);
            self.refuse("", listens);
        }
    }

    fn transport(&mut self, jetstream: &JetStreamSettings, part: Part) {
        let opened = transport::check_files(jetstream).map_err(anyhow::Error::from);
        let opened = opened.map_err(|error| named(error, &transport_files(jetstream)));
        self.refuse("", opened);
        if jetstream.url.is_empty() && part == Part::Whole {
            let found = launch::find_server(&jetstream.server).map_err(Into::into);
            self.refuse("", found);
        }
    }

    /// Takes down files that are named, cannot be read, and are opened by other commands only.
    fn unused(&mut self, settings: &Settings, judges_here: bool) {
        let mut files: Vec<(&str, &Path, &str)> = Vec::new();
        if let Some(path) = &settings.sft.path {
            files.push(("sft.path", path, "agon sft"));
        }
        if !judges_here || !fits_a_model(settings) {
            let pairs = pair_files(settings).into_iter();
            files.extend(pairs.map(|(key, path)| (key, path, "agon fit-preference")));
            if let Some(settings::ModelSource::Folder(path)) = &settings.preference.fit.path {
                files.push(("preference.fit.path", path, "agon fit-preference"));
            }
        }
        for (key, path, reader) in files {
            if let Err(error) = File::open(path) {
                let path = path.display();
                self.findings.push(Finding::Unused(format!(
                    "{key} = {path}: {error}; only {reader} reads it"
                )));
            }
        }
    }
}

/// Whether a preference model is fitted in this run: before it judges, or in rounds of the adversarial game.
fn fits_a_model(settings: &Settings) -> bool {
    judges::is_fitted(&settings.preference.judge) || settings.preference.apo.refresh_steps > 0
}

/// The model in the folder that was looked at, if it is here.
fn opened(look: &Look, template: Option<&Path>) -> anyhow::Result<Option<ModelFolder>> {
    let Some(path) = &look.folder else {
        return Ok(None);
    };
    // The tokenizer is opened too: it must fit the model, and its chat template must compile.
    let folder = ModelFolder::open(path, template)?;
    folder.tokenizer.check_chat_template()?;
    folder.check_weights()?;
    Ok(Some(folder))
}

/// The model that a run makes for itself, without its weights, in a folder that goes with it.
fn made(settings: &Settings) -> anyhow::Result<(ModelFolder, TempDir)> {
    let scratch = tempfile::tempdir().context("failed to make a temporary folder")?;
    let folder = match &settings.model.reference_probabilities {
        Some(probabilities) => {
            Bandit::new(probabilities)?.write_model(scratch.path())?;
            ModelFolder::open(scratch.path(), None)?
        }
        None => base::base_shape(settings, scratch.path())?,
    };
    Ok((folder, scratch))
}

fn is_folder(source: &settings::ModelSource) -> bool {
    matches!(source, settings::ModelSource::Folder(_))
}

/// Whether `path` is a file that can be read.
fn is_file(path: &Path) -> anyhow::Result<()> {
    let unusable = |reason: String| Resource(format!("{}: {reason}", path.display()));
    let kind = File::open(path).and_then(|file| file.metadata());
    match kind {
        Ok(kind) if kind.is_dir() => Err(unusable("it is a folder, not a file".into()).into()),
        Ok(_) => Ok(()),
        Err(error) => Err(unusable(error.to_string()).into()),
    }
}

/// Whether `path` is a file with a chat template that compiles.
fn is_template(path: &Path) -> anyhow::Result<()> {
    is_file(path)?;
    Ok(model::check_chat_template(path)?)
}

/// Whether `path` is a folder, or one can be made there.
fn can_hold(path: &Path) -> anyhow::Result<()> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let nearest: Option<(PathBuf, fs::Metadata)> = absolute
        .ancestors()
        .find_map(|path| Some((path.to_owned(), fs::metadata(path).ok()?)));
    match nearest {
        Some((found, kind)) if !kind.is_dir() => Err(Resource(format!(
            "{} cannot be made: {} is a file, not a folder",
            path.display(),
            found.display()
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Files under their keys.
type Files<'a> = Vec<(&'static str, &'a Path)>;

fn prompt_files(dataset: &DatasetPrompts) -> Files<'_> {
    let alone = [
        ("prompts.path", dataset.path.as_path()),
        ("prompts.held_out_path", dataset.held_out_path.as_path()),
    ];
    let mixed = dataset
        .mix
        .iter()
        .map(|file| ("prompts.mix", file.path.as_path()));
    alone
        .into_iter()
        .chain(mixed)
        .filter(|(_, path)| !path.as_os_str().is_empty())
        .collect()
}

fn pair_files(settings: &Settings) -> Files<'_> {
    let PairsSettings::Dataset(files) = &settings.preference.fit.pairs else {
        return Vec::new();
    };
    let files = [
        ("preference.fit.pairs.path", files.path.as_path()),
        (
            "preference.fit.pairs.validation_path",
            files.validation_path.as_path(),
        ),
    ];
    files
        .into_iter()
        .filter(|(_, path)| !path.as_os_str().is_empty())
        .collect()
}

fn transport_files(jetstream: &JetStreamSettings) -> Files<'_> {
    let files: [(_, &Path); 7] = [
        ("transport.password_path", &jetstream.password_path),
        ("transport.token_path", &jetstream.token_path),
        ("transport.nkey_path", &jetstream.nkey_path),
        ("transport.credentials_path", &jetstream.credentials_path),
        ("transport.ca_path", &jetstream.ca_path),
        ("transport.certificate_path", &jetstream.certificate_path),
        ("transport.key_path", &jetstream.key_path),
    ];
    files
        .into_iter()
        .filter(|(_, path)| !path.as_os_str().is_empty())
        .collect()
}

/// The error with the key of the file that it is about.
fn named(error: anyhow::Error, files: &Files<'_>) -> anyhow::Error {
    let about = error.chain().find_map(path_of);
    let key = about.and_then(|about| files.iter().find(|(_, path)| about.starts_with(path)));
    match key {
        Some(&(key, _)) => error.context(key),
        None => error,
    }
}

/// The file that an error is about.
fn path_of<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a Path> {
    if let Some(LearnerError::Dataset(error)) = cause.downcast_ref::<LearnerError>() {
        return Some(error.path());
    }
    if let Some(transport::TransportError::Unreadable { path, .. }) = cause.downcast_ref() {
        return Some(path);
    }
    cause
        .downcast_ref::<dataset::DatasetError>()
        .map(dataset::DatasetError::path)
}

fn shape(config: &ModelConfig) -> String {
    format!(
        "{:?} of {} blocks of width {}, {} heads ({} of keys and values), {} tokens, {} positions: {} parameters",
        config.architecture,
        config.layers,
        config.hidden_size,
        config.heads,
        config.kv_heads,
        config.vocab_size,
        config.max_positions,
        config.parameter_count()
    )
}
