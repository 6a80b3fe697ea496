//! Checks of everything that a configuration names, before a run starts.
//!
//! `agon check` prints the findings; `agon train` and `agon learner` fail on the same ones. All call
//! [`Preflight::of`], so that they report the same errors with the same exit code. Model configurations, tokenizers,
//! chat templates, rows of prompts and pairs, secrets and addresses are opened. Weights are not read; nothing is
//! downloaded, trained or written; the only requests to other machines are for metadata of the Hub.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use ::playground::Bandit;
use anyhow::Context;
use hub::ModelLookup;
use learner::{BatchShare, LearnerError, PairFiles, PromptSet, planned_steps};
use model::{LoraConfig, ModelConfig, ModelFolder};
use settings::{
    DatasetPrompts, JetStreamSettings, PairsSettings, PlaygroundGolden, PromptsSettings, Settings,
    TransportSettings,
};
use tempfile::TempDir;

use crate::assembly::{
    JudgeFiles, adapter_shape, check_fit_adapter, check_run_positions, file_pairs::read_pair_files,
    judge::JudgeCheck, nats_program::find_nats_server, playground, preference_pairs,
    prompts::prompt_files,
};
use crate::exit_code::{Refused, Resource};

/// Finding on one item of a configuration.
#[derive(Debug)]
pub(crate) enum PreflightFinding {
    /// The item is usable; a description.
    Usable(String),
    /// The item is usable, with a risk to the run.
    Doubtful(String),
    /// The item is not usable, but the run does not need it; the reason and the command that does.
    Unneeded(String),
    /// The run cannot start with the item.
    Failed(anyhow::Error),
}

/// Processes of a run to check for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PreflightScope {
    /// All roles, as `agon train` starts them on this machine.
    AllRoles,
    /// The learner alone; actors and preference services run elsewhere.
    Learner,
}

/// Findings on everything that a configuration names, in the order in which a run opens it.
#[derive(Default)]
pub(crate) struct Preflight {
    /// The findings.
    pub(crate) findings: Vec<PreflightFinding>,
    /// Configuration of the policy; `None` if it is not known yet, or a bandit's.
    pub(crate) config: Option<ModelConfig>,
    /// Configuration of the policy's adapter.
    adapter: Option<LoraConfig>,
    read: ReadInputs,
}

/// Prompts and pairs of files that were read, unless a later download may change their tokens.
#[derive(Default)]
pub(crate) struct ReadInputs {
    /// The prompts.
    pub(crate) prompts: Option<Arc<dyn PromptSet>>,
    /// The pairs.
    pub(crate) pairs: Option<Arc<PairFiles>>,
}

/// A model, as far as it is known before its weights are read, unpacked or trained.
#[derive(Default)]
struct KnownModel {
    /// `None` if the model is unusable, or on the Hub and not cached.
    folder: Option<ModelFolder>,
    /// Holds the folder of a model that the run will make or unpack, without its weights.
    _scratch: Option<TempDir>,
}

impl KnownModel {
    /// Opens and checks a model of which this machine has a folder or a GGUF file.
    fn open(lookup: &ModelLookup, template: Option<&Path>) -> anyhow::Result<Self> {
        let (folder, scratch) = match (&lookup.folder, &lookup.gguf) {
            (Some(path), _) => {
                let folder = ModelFolder::open(path, template)?;
                folder.check_weights()?;
                (folder, None)
            }
            (None, Some(gguf)) => {
                let scratch = scratch()?;
                gguf.describe(scratch.path())?;
                let folder = ModelFolder::open(scratch.path(), template);
                let folder = folder.with_context(|| lookup.origin.clone())?;
                (folder, Some(scratch))
            }
            (None, None) => return Ok(Self::default()),
        };
        // The tokenizer was opened too, which must fit the model; its chat template must compile.
        folder.tokenizer.check_chat_template()?;
        Ok(Self {
            folder: Some(folder),
            _scratch: scratch,
        })
    }
}

impl Preflight {
    /// Checks everything that the settings name for these roles of a run in the directory `run`.
    pub(crate) fn of(settings: &Settings, run: &Path, scope: PreflightScope) -> Self {
        let mut preflight = Self::default();
        preflight.require("", crate::assembly::check_engines(settings));
        preflight.require("model.device", crate::assembly::device(settings).map(drop));
        preflight.require("run.output_dir", check_directory(run));
        let policy = preflight.policy(settings);
        if let Some(folder) = &policy.folder {
            preflight.adapter(settings, folder);
            preflight.require(
                "",
                check_run_positions(settings, &folder.config).map_err(Into::into),
            );
        }
        if settings.needs_samples() {
            preflight.prompts(settings, policy.folder.as_ref());
        }
        if settings.pairs.is_used() {
            preflight.pairs(settings, policy.folder.as_ref());
        }
        let judges_here = settings.needs_judge()
            && match &settings.transport {
                TransportSettings::Memory {} => true,
                TransportSettings::Jetstream(_) => {
                    scope == PreflightScope::AllRoles && settings.topology.preference > 0
                }
            };
        if judges_here {
            preflight.judge(settings, policy.folder.as_ref());
        }
        preflight.addresses(settings, scope);
        if let TransportSettings::Jetstream(jetstream) = &settings.transport {
            preflight.transport(jetstream, scope);
        }
        preflight.unneeded(settings, judges_here);
        preflight
    }

    /// The prompts and pairs of files, if they were read; logs the items that are not needed.
    ///
    /// # Errors
    /// All findings with which the run cannot start.
    pub(crate) fn into_result(self) -> Result<ReadInputs, Refused> {
        let mut errors = Vec::new();
        for finding in self.findings {
            match finding {
                PreflightFinding::Usable(_) => {}
                PreflightFinding::Doubtful(reason) | PreflightFinding::Unneeded(reason) => {
                    tracing::warn!("{reason}");
                }
                PreflightFinding::Failed(error) => errors.push(error),
            }
        }
        match errors.is_empty() {
            true => Ok(self.read),
            false => Err(Refused(errors)),
        }
    }

    fn doubtful(&mut self, check: JudgeCheck<'_>) {
        let warnings = check.warnings.into_iter();
        self.findings
            .extend(warnings.map(PreflightFinding::Doubtful));
    }

    fn usable(&mut self, description: String) {
        self.findings.push(PreflightFinding::Usable(description));
    }

    /// The value, or `None` after recording the error under the setting `key`; empty if the error names its key.
    fn require<T>(&mut self, key: &str, result: anyhow::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let error = match key {
                    "" => error,
                    key => error.context(key.to_owned()),
                };
                self.findings.push(PreflightFinding::Failed(error));
                None
            }
        }
    }

    fn policy(&mut self, settings: &Settings) -> KnownModel {
        let template = settings.model.chat_template.as_deref();
        let has_template = template.is_none_or(|path| {
            self.require("model.chat_template", check_template(path))
                .is_some()
        });
        if let Some(source) = &settings.model.path {
            let model = self.model("model.path", source, template.filter(|_| has_template));
            self.config = model.folder.as_ref().map(|folder| folder.config.clone());
            return model;
        }
        self.require(
            "playground.base_dir",
            check_directory(&settings.playground.base_dir),
        );
        let generated = self.require("model", generated_model(settings));
        let Some((folder, scratch)) = generated else {
            return KnownModel::default();
        };
        if let PromptsSettings::Bandit {} = settings.prompts {
            let arms = folder.config.vocab_size;
            self.usable(format!(
                "model: a bandit of {arms} arms, generated when the run starts; its memory is negligible"
            ));
        } else {
            self.usable(format!(
                "model: the playground's base, {}",
                shape(&folder.config)
            ));
            self.config = Some(folder.config.clone());
        }
        KnownModel {
            folder: Some(folder),
            _scratch: Some(scratch),
        }
    }

    /// The model that the setting `key` names.
    fn model(
        &mut self,
        key: &str,
        source: &settings::ModelSource,
        template: Option<&Path>,
    ) -> KnownModel {
        let opened = hub::locate(source)
            .map_err(anyhow::Error::from)
            .and_then(|lookup| Ok((KnownModel::open(&lookup, template)?, lookup.origin)));
        let Some((model, origin)) = self.require(key, opened) else {
            return KnownModel::default();
        };
        let shape = match &model.folder {
            Some(folder) => shape(&folder.config),
            None => "its shape is not known before".into(),
        };
        self.usable(format!("{key}: {origin}, {shape}"));
        model
    }

    fn adapter(&mut self, settings: &Settings, policy: &ModelFolder) {
        let Some(source) = &settings.model.adapter else {
            let fresh = adapter_shape(settings, &policy.config, None);
            self.adapter = self.require("", fresh).flatten();
            if let Some(text) = self.adapter_text(&policy.config) {
                self.usable(format!("adapter: {text}"));
            }
            return;
        };
        let opened = hub::locate(source)
            .map_err(anyhow::Error::from)
            .and_then(|lookup| {
                let folder = lookup.folder.as_deref();
                let shape = folder.map(|path| adapter_shape(settings, &policy.config, Some(path)));
                Ok((shape.transpose()?.flatten(), lookup.origin))
            });
        if let Some((adapter, origin)) = self.require("model.adapter", opened) {
            self.adapter = adapter;
            let text = self.adapter_text(&policy.config);
            let text = text.map(|text| format!(", {text}")).unwrap_or_default();
            self.usable(format!("model.adapter: {origin}{text}"));
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
                self.require("model.path", playground::check_vocabulary(policy));
                let pairs = &settings.preference.fit.pairs;
                if let (PlaygroundGolden::Chosen, PairsSettings::Playground(_)) = (golden, pairs) {
                    self.require(
                        "playground.base_dir",
                        check_directory(&settings.playground.base_dir),
                    );
                }
            }
            (PromptsSettings::Dataset(dataset), Some(policy)) => {
                let read = prompt_files(settings, dataset, policy);
                let read = read.map_err(|error| with_key(error, &prompt_paths(dataset)));
                if let Some(set) = self.require("", read) {
                    for (key, path) in prompt_paths(dataset) {
                        self.usable(format!("{key} = {}", path.display()));
                    }
                    let count = set.held_out_count().unwrap_or_default();
                    self.usable(format!("held-out prompts: {count} distinct ones"));
                    let is_final = settings.model.path.as_ref().is_some_and(is_folder);
                    self.read.prompts =
                        Some(Arc::new(set) as Arc<dyn PromptSet>).filter(|_| is_final);
                }
            }
            (PromptsSettings::Dataset(dataset), None) => {
                self.rows_without_tokenizer(&prompt_paths(dataset));
            }
        }
    }

    /// Reads the rows of files whose forms cannot be checked, for want of the model's tokenizer.
    fn rows_without_tokenizer(&mut self, paths: &PathsByKey<'_>) {
        for (key, path) in paths {
            let read = dataset::check(path).map_err(Into::into);
            if self.require(key, read).is_some() {
                let path = path.display();
                self.findings.push(PreflightFinding::Doubtful(format!(
                    "{key} = {path}: read, but its columns are only checked once the model's tokenizer can be opened"
                )));
            }
        }
    }

    fn pairs(&mut self, settings: &Settings, policy: Option<&ModelFolder>) {
        let pairs = &settings.pairs;
        if pairs.playground_pairs > 0 {
            let base_dir = check_directory(&settings.playground.base_dir);
            self.require("playground.base_dir", base_dir);
            let checked = policy.map_or(Ok(()), playground::check_vocabulary);
            self.require("pairs.playground_pairs", checked);
            return;
        }
        let named = pairs.files();
        let key = match pairs.mix.is_empty() {
            true => "pairs.path",
            false => "pairs.mix",
        };
        let paths: PathsByKey<'_> = named
            .iter()
            .map(|file| (key, file.path.as_path()))
            .collect();
        let Some(policy) = policy else {
            self.rows_without_tokenizer(&paths);
            return;
        };
        let read = read_pair_files(settings, pairs, policy);
        let read = read.map_err(|error| {
            let error = with_key(error, &paths);
            match settings.model.path {
                Some(_) => error,
                None => error.context(
                    "model.path names no model, so that the pairs are read as words of the playground's",
                ),
            }
        });
        if let Some(read) = self.require("", read) {
            for (key, path) in paths {
                self.usable(format!("{key} = {}", path.display()));
            }
            let (count, steps) = (read.count(), settings.learner.steps);
            let planned = planned_steps(&settings.learner, pairs, count);
            self.usable(match planned < steps {
                true => format!(
                    "{count} pairs: pairs.epochs ends the run after {planned} of {steps} steps"
                ),
                false => format!("{count} pairs"),
            });
            let each = BatchShare::new(&settings.learner, pairs).most_per_step();
            if count < each {
                self.findings.push(PreflightFinding::Doubtful(format!(
                    "a batch has {each} pairs from files, and there are {count}: pairs repeat within a batch; lower \
                     learner.train_batch_size"
                )));
            }
            let is_final = settings.model.path.as_ref().is_none_or(is_folder);
            self.read.pairs = Some(Arc::new(read)).filter(|_| is_final);
        }
    }

    fn evaluation_judges(&mut self, settings: &Settings, policy: Option<&ModelFolder>) {
        for (name, judge) in &settings.evaluation.judge {
            let key = format!("evaluation.judge.{name}");
            let mut check = JudgeCheck::new(settings, policy);
            let checked = check.judge(judge);
            if self.require(&key, checked).is_some() {
                self.usable(format!("evaluation judge {name}: {}", judge.name()));
            }
            self.doubtful(check);
        }
    }

    fn judge(&mut self, settings: &Settings, policy: Option<&ModelFolder>) {
        let preference = &settings.preference;
        let name = preference.judge.name();
        let mut check = JudgeCheck::new(settings, policy);
        let checked = check.judge(&preference.judge);
        if self.require("preference.judge", checked).is_some() {
            self.usable(format!("judge {name}"));
        }
        self.doubtful(check);
        self.evaluation_judges(settings, policy);
        if !trains_preference_model(settings) {
            return;
        }
        self.require(
            "playground.base_dir",
            check_directory(&settings.playground.base_dir),
        );
        let fit = &preference.fit;
        let template = settings.model.chat_template.as_deref();
        let template = template.filter(|path| check_template(path).is_ok());
        let own_backbone = fit.path.as_ref();
        let own_backbone =
            own_backbone.map(|path| self.model("preference.fit.path", path, template));
        let backbone = match &own_backbone {
            Some(backbone) => backbone.folder.as_ref(),
            None => policy,
        };
        if let Some(backbone) = backbone {
            let checked = check_fit_adapter(fit, &backbone.config);
            self.require("", checked.map_err(Into::into));
            if own_backbone.is_some() {
                let mut check = JudgeCheck::new(settings, policy);
                let files = JudgeFiles::in_one(&backbone.path);
                let checked = check.positions(backbone, files);
                self.require("preference.fit.path", checked);
                self.doubtful(check);
            }
        }
        match &fit.pairs {
            PairsSettings::Playground(_) => {
                let checked = policy.map_or(Ok(()), playground::check_vocabulary);
                self.require("preference.fit.pairs.kind", checked);
            }
            PairsSettings::Dataset(files) => {
                let Some(backbone) = backbone else {
                    self.rows_without_tokenizer(&pair_paths(settings));
                    return;
                };
                let read = preference_pairs::read_pairs(settings, files, backbone);
                let read = read.map_err(|error| with_key(error, &pair_paths(settings)));
                if self.require("", read).is_some() {
                    for (key, path) in pair_paths(settings) {
                        self.usable(format!("{key} = {}", path.display()));
                    }
                }
            }
        }
    }

    /// Checks the addresses to listen on and the files with their tokens.
    fn addresses(&mut self, settings: &Settings, scope: PreflightScope) {
        let telemetry = &settings.telemetry;
        let token = telemetry::http::read_token(&telemetry.token_path).map_err(Into::into);
        if let Some(token) = self.require("telemetry.token_path", token) {
            let exporter = telemetry::Exporter::check(telemetry.listen, token.as_deref());
            self.require("", exporter.map_err(Into::into));
            if let Some(listen) = telemetry.page_address() {
                let page = telemetry::PageServer::check(listen, token.as_deref());
                self.require("", page.map_err(Into::into));
            }
        }
        let http = &settings.preference.http;
        if scope == PreflightScope::AllRoles && !http.listen.is_empty() {
            let token = telemetry::http::read_token(&http.token_path).map_err(Into::into);
            if let Some(token) = self.require("preference.http.token_path", token) {
                let listens = preference::Server::check(&http.listen, token.as_deref());
                self.require("", listens.map_err(Into::into));
            }
        }
    }

    fn transport(&mut self, jetstream: &JetStreamSettings, scope: PreflightScope) {
        let checked = transport::check_files(jetstream).map_err(anyhow::Error::from);
        let checked = checked.map_err(|error| with_key(error, &transport_paths(jetstream)));
        self.require("", checked);
        if jetstream.url.is_empty() && scope == PreflightScope::AllRoles {
            let found = find_nats_server(&jetstream.server).map_err(Into::into);
            self.require("", found);
        }
    }

    /// Records what only other commands need: files that cannot be read, and judges that the run does not ask.
    fn unneeded(&mut self, settings: &Settings, judges_here: bool) {
        let mut files: Vec<(&str, &Path, &str)> = Vec::new();
        if let Some(path) = &settings.sft.path {
            files.push(("sft.path", path, "agon sft"));
        }
        if !judges_here || !trains_preference_model(settings) {
            let pairs = pair_paths(settings).into_iter();
            files.extend(pairs.map(|(key, path)| (key, path, "agon fit-preference")));
            if let Some(settings::ModelSource::Folder(path)) = &settings.preference.fit.path {
                files.push(("preference.fit.path", path, "agon fit-preference"));
            }
        }
        for (key, path, reader) in files {
            if let Err(error) = File::open(path) {
                let path = path.display();
                self.findings.push(PreflightFinding::Unneeded(format!(
                    "{key} = {path}: {error}; only {reader} reads it"
                )));
            }
        }
        if settings.evaluation.prompts == 0 && !settings.evaluation.judge.is_empty() {
            self.findings.push(PreflightFinding::Unneeded(
                "evaluation.judge: evaluation.prompts = 0 turns evaluations off, and only agon eval asks these judges; raise \
                 evaluation.prompts to have the run evaluated by them"
                    .into(),
            ));
        }
    }
}

/// Whether this run trains a preference model: before it judges, or in rounds of APO.
fn trains_preference_model(settings: &Settings) -> bool {
    settings.preference.judge.is_trained_by_the_run() || settings.preference.apo.refresh_steps > 0
}

/// The bandit or playground base that the run will make, without its weights, in a temporary folder.
fn generated_model(settings: &Settings) -> anyhow::Result<(ModelFolder, TempDir)> {
    let scratch = scratch()?;
    let folder = match &settings.model.reference_probabilities {
        Some(probabilities) => {
            Bandit::new(probabilities)?.write_model(scratch.path())?;
            ModelFolder::open(scratch.path(), None)?
        }
        None => playground::base_folder(settings, scratch.path())?,
    };
    Ok((folder, scratch))
}

fn scratch() -> anyhow::Result<TempDir> {
    tempfile::tempdir().context("failed to make a temporary folder")
}

fn is_folder(source: &settings::ModelSource) -> bool {
    matches!(source, settings::ModelSource::Folder(_))
}

/// Checks that `path` is a readable file.
fn check_file(path: &Path) -> anyhow::Result<()> {
    let unusable = |reason: String| Resource(format!("{}: {reason}", path.display()));
    let kind = File::open(path).and_then(|file| file.metadata());
    match kind {
        Ok(kind) if kind.is_dir() => Err(unusable("it is a folder, not a file".into()).into()),
        Ok(_) => Ok(()),
        Err(error) => Err(unusable(error.to_string()).into()),
    }
}

/// Checks that `path` is a file with a chat template that compiles.
fn check_template(path: &Path) -> anyhow::Result<()> {
    check_file(path)?;
    Ok(model::check_chat_template(path)?)
}

/// Checks that `path` is a folder, or that one can be made there.
fn check_directory(path: &Path) -> anyhow::Result<()> {
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

/// Paths by the settings that name them.
type PathsByKey<'a> = Vec<(&'static str, &'a Path)>;

fn prompt_paths(dataset: &DatasetPrompts) -> PathsByKey<'_> {
    let single = [
        ("prompts.path", dataset.path.as_path()),
        ("prompts.held_out_path", dataset.held_out_path.as_path()),
    ];
    let mixed = dataset
        .mix
        .iter()
        .map(|file| ("prompts.mix", file.path.as_path()));
    single
        .into_iter()
        .chain(mixed)
        .filter(|(_, path)| !path.as_os_str().is_empty())
        .collect()
}

fn pair_paths(settings: &Settings) -> PathsByKey<'_> {
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

fn transport_paths(jetstream: &JetStreamSettings) -> PathsByKey<'_> {
    let files: [(_, &Path); 8] = [
        ("transport.password_path", &jetstream.password_path),
        ("transport.token_path", &jetstream.token_path),
        ("transport.nkey_path", &jetstream.nkey_path),
        ("transport.credentials_path", &jetstream.credentials_path),
        ("transport.ca_path", &jetstream.ca_path),
        ("transport.certificate_path", &jetstream.certificate_path),
        ("transport.key_path", &jetstream.key_path),
        ("transport.run_key_path", &jetstream.run_key_path),
    ];
    files
        .into_iter()
        .filter(|(_, path)| !path.as_os_str().is_empty())
        .collect()
}

/// Adds the key of the setting whose file caused the error.
fn with_key(error: anyhow::Error, paths: &PathsByKey<'_>) -> anyhow::Error {
    let cause = error.chain().find_map(path_of);
    let key = cause.and_then(|cause| {
        paths
            .iter()
            .find(|(_, path)| dataset::is_part_of(cause, path))
    });
    match key {
        Some(&(key, _)) => error.context(key),
        None => error,
    }
}

/// The path in an error.
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
        "{:?} of {} blocks of width {}, {} heads ({} key-value heads), {} tokens, {} positions: {} parameters",
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
