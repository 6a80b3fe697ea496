//! Builds the configured judge: its models are loaded once, and every replica shares their weights.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use hub::CancelToken;
use messages::JudgeVersion;
use model::{Encoder, ModelFolder, RewardModel};
use preference::{
    Composition, EncoderJudge, Ensemble, EnsembleRule, Judge, JudgeReplicas, Matrix, Route,
    RouteRule, Rules,
};
use settings::{Head, JudgeSettings, ModelSource, Settings};

use crate::assembly::{
    JudgeFiles, JudgeUse, LoadedModel, LoadedRewardModel, ModelLocation,
    local_chat::{self, LocalChat},
    longest_sequence,
    playground::GoldJudge,
    preference_model, reads_tokens_of, reward_folder,
};
use crate::exit_code::UsageError;

/// A loaded judge, from which replicas are made.
pub(crate) enum JudgeSource {
    /// A judge without files: the settings determine it.
    Plain(JudgeSettings),
    /// A reward model on a decoder.
    Model(Box<LoadedRewardModel>),
    /// A reward model on an encoder.
    Encoder {
        /// The model.
        encoder: Arc<Encoder>,
        /// Folder of the model.
        folder: PathBuf,
        /// The template of its input.
        template: String,
    },
    /// A chat model of mistral.rs.
    Chat(Arc<LocalChat>),
    /// Several judges.
    Composed {
        /// The judges.
        members: Vec<Arc<JudgeSource>>,
        /// Combination of their verdicts.
        composition: Composition,
    },
}

/// Origin of the prompts and completions to judge; determines the tokens they come in.
#[derive(Clone, Copy)]
pub(crate) enum CompletionOrigin<'a> {
    /// The policy at the start of a run, from which a missing preference model is trained.
    Policy(&'a LoadedModel),
    /// A model with this folder; a missing preference model is trained from the settings' base model.
    Model(&'a ModelFolder),
    /// Clients over HTTP. The first judge that reads tokens determines the tokenizer.
    External,
}

/// Loads the judge of the settings, recursively for ensembles.
struct JudgeLoader<'a> {
    settings: &'a Settings,
    policy: Option<&'a LoadedModel>,
    /// Folder of the model whose tokens prompts and completions come in, once known.
    tokens: Option<PathBuf>,
    cancel: &'a CancelToken,
}

impl JudgeSource {
    /// Loads the judge of the settings. A preference model without a path is trained first, from the policy at the
    /// start. Blocks; ends early once `cancel` is cancelled.
    pub(crate) fn open(
        settings: &Settings,
        origin: CompletionOrigin<'_>,
        cancel: &CancelToken,
    ) -> anyhow::Result<Self> {
        Self::load(settings, &settings.preference.judge, origin, cancel)
    }

    /// Loads `judge`, as [`Self::open`] loads the run's.
    pub(crate) fn load(
        settings: &Settings,
        judge: &JudgeSettings,
        origin: CompletionOrigin<'_>,
        cancel: &CancelToken,
    ) -> anyhow::Result<Self> {
        let (policy, tokens) = match origin {
            CompletionOrigin::Policy(policy) => (Some(policy), Some(&*policy.folder)),
            CompletionOrigin::Model(folder) => (None, Some(folder)),
            CompletionOrigin::External => (None, None),
        };
        let mut loader = JudgeLoader {
            settings,
            policy,
            tokens: tokens.map(|folder| folder.path.clone()),
            cancel,
        };
        loader.judge(judge)
    }
}

impl JudgeLoader<'_> {
    fn judge(&mut self, judge: &JudgeSettings) -> anyhow::Result<JudgeSource> {
        match judge {
            JudgeSettings::BradleyTerry { path } => self.model(path, Head::BradleyTerry),
            JudgeSettings::Pairwise { path } => self.model(path, Head::Pairwise),
            JudgeSettings::Encoder { path, template } => {
                let folder = hub::folder(path, self.cancel)?;
                let encoder = Encoder::load(&folder, &crate::assembly::device(self.settings)?.0)?;
                Ok(JudgeSource::Encoder {
                    encoder: Arc::new(encoder),
                    folder,
                    template: template.clone(),
                })
            }
            JudgeSettings::Ensemble {
                members,
                weights,
                combine,
                deviations,
            } => self.composed(
                members,
                Composition::Ensemble(EnsembleRule {
                    weights: weights.clone(),
                    combine: *combine,
                    deviations: *deviations,
                }),
            ),
            JudgeSettings::Route { members, values } => self.composed(
                members,
                Composition::Route(RouteRule {
                    values: values.clone(),
                }),
            ),
            JudgeSettings::Mistral(model) => {
                let chat = LocalChat::open(model, &self.settings.preference)?;
                Ok(JudgeSource::Chat(Arc::new(chat)))
            }
            plain => Ok(JudgeSource::Plain(plain.clone())),
        }
    }

    fn composed(
        &mut self,
        members: &[JudgeSettings],
        composition: Composition,
    ) -> anyhow::Result<JudgeSource> {
        let members = members.iter().map(|judge| Ok(Arc::new(self.judge(judge)?)));
        Ok(JudgeSource::Composed {
            members: members.collect::<anyhow::Result<_>>()?,
            composition,
        })
    }

    fn model(&mut self, source: &ModelSource, head: Head) -> anyhow::Result<JudgeSource> {
        let settings = self.settings;
        let path = match (source.is_empty(), self.policy) {
            (false, _) => hub::folder(source, self.cancel)?,
            (true, Some(policy)) => preference_model(settings, head, policy, self.cancel)?,
            (true, None) => {
                let base = LoadedModel::open(settings, self.cancel)?;
                preference_model(settings, head, &base, self.cancel)?
            }
        };
        let tokens = self.tokens.get_or_insert_with(|| path.clone());
        let precision = model::training_precision(settings.preference.precision);
        let location = ModelLocation::of_folder(path, self.cancel)?;
        let folder = reward_folder(&location, head)?;
        let (device, dtype) = crate::assembly::device(settings)?;
        let trains_further = settings.preference.apo.refresh_steps > 0;
        let shared = match self.policy {
            Some(policy) if trains_further => Some(policy.weights.clone()),
            Some(policy) if folder.is_adapter_of(&policy.weights)? => {
                policy.judging_backbone(precision)?
            }
            _ => None,
        };
        let model = folder.model(dtype, &device, shared.as_ref())?;
        let given = settings.model.chat_template.as_deref();
        let model = LoadedRewardModel::new(folder, model, tokens, given)?;
        let purpose = match trains_further {
            true => JudgeUse::Training,
            false => JudgeUse::Judging,
        };
        let model = model.with_precision(settings.preference.precision, purpose)?;
        Ok(JudgeSource::Model(Box::new(model)))
    }
}

impl JudgeSource {
    /// The reward model that APO can replace; `None` for other judges.
    pub(crate) fn model(&self) -> Option<&LoadedRewardModel> {
        match self {
            Self::Model(model) => Some(model),
            _ => None,
        }
    }

    /// The same judge with other weights.
    ///
    /// # Errors
    /// When the judge is not a reward model.
    pub(crate) fn with_model(
        &self,
        model: RewardModel,
        version: JudgeVersion,
    ) -> anyhow::Result<Self> {
        let before = self.model().context("the judge is not a model")?;
        Ok(Self::Model(Box::new(before.with_model(model, version)?)))
    }

    /// Whether the judge reads the policy's tokens, rather than messages and text.
    pub(crate) fn reads_tokens(&self) -> bool {
        match self {
            Self::Plain(JudgeSettings::Gold { .. } | JudgeSettings::Matrix { .. }) => true,
            Self::Model(model) => model.shares_tokens(),
            Self::Composed { members, .. } => members.iter().any(|member| member.reads_tokens()),
            Self::Plain(_) | Self::Encoder { .. } | Self::Chat(_) => false,
        }
    }

    /// Whether the judge, or a member of it, is behind URLs.
    pub(crate) fn is_remote(&self) -> bool {
        match self {
            Self::Plain(judge) => {
                matches!(
                    judge,
                    JudgeSettings::Http(_) | JudgeSettings::Service { .. }
                )
            }
            Self::Composed { members, .. } => members.iter().any(|member| member.is_remote()),
            Self::Model(_) | Self::Encoder { .. } | Self::Chat(_) => false,
        }
    }

    /// A new replica of a judge without remote members.
    pub(crate) fn make(&self) -> anyhow::Result<Box<dyn Judge>> {
        Ok(match self {
            Self::Plain(settings) => plain(settings)?,
            Self::Model(model) => model.judge(),
            Self::Encoder {
                encoder, template, ..
            } => Box::new(EncoderJudge::new(Arc::clone(encoder), template.clone())),
            Self::Chat(chat) => chat.judge(),
            Self::Composed {
                members,
                composition,
            } => {
                let members = members
                    .iter()
                    .map(|member| member.make())
                    .collect::<Result<_, _>>()?;
                match composition {
                    Composition::Ensemble(rule) => Box::new(Ensemble::new(members, rule.clone())),
                    Composition::Route(rule) => Box::new(Route::new(members, rule.clone())?),
                }
            }
        })
    }
}

/// Checks that the judge can be loaded, without reading weights or training; the only requests are for metadata of
/// models of the Hub that are not cached.
pub(crate) struct JudgeCheck<'a> {
    settings: &'a Settings,
    /// Folder of the policy, where it is known.
    policy: Option<&'a ModelFolder>,
    /// Warnings about a run with the judge.
    pub(crate) warnings: Vec<String>,
}

impl<'a> JudgeCheck<'a> {
    /// A check for a run with this policy.
    pub(crate) fn new(settings: &'a Settings, policy: Option<&'a ModelFolder>) -> Self {
        Self {
            settings,
            policy,
            warnings: Vec::new(),
        }
    }

    /// Checks `judge`, recursively for ensembles.
    ///
    /// # Errors
    /// As [`JudgeSource::open`] and [`judge_replicas`](crate::assembly::judge_replicas), as far as can be known before;
    /// also when it reads the policy's tokens, but fewer than a prompt and its completion may have.
    pub(crate) fn judge(&mut self, judge: &JudgeSettings) -> anyhow::Result<()> {
        match judge {
            JudgeSettings::BradleyTerry { path } => self.model(path, Head::BradleyTerry)?,
            JudgeSettings::Pairwise { path } => self.model(path, Head::Pairwise)?,
            JudgeSettings::Encoder { path, .. } => {
                if let Some(folder) = hub::locate(path)?.folder {
                    let positions = Encoder::check_folder(&folder)?;
                    self.own_positions(&folder, positions);
                }
            }
            JudgeSettings::Mistral(model) => {
                mistral::is_built()?;
                local_chat::source(model).check()?;
            }
            JudgeSettings::Ensemble { members, .. } | JudgeSettings::Route { members, .. } => {
                for (index, member) in members.iter().enumerate() {
                    let checked = self.judge(member);
                    checked.with_context(|| format!("members[{index}]"))?;
                }
            }
            JudgeSettings::Http(endpoints) => {
                let chat = &self.settings.preference.chat;
                drop(JudgeReplicas::chat(endpoints, chat)?);
            }
            JudgeSettings::Service { urls, token_path } => {
                drop(JudgeReplicas::services(urls, token_path)?);
            }
            without_files => drop(plain(without_files)?),
        }
        Ok(())
    }

    fn model(&mut self, path: &ModelSource, head: Head) -> anyhow::Result<()> {
        if !path.is_empty()
            && let Some(folder) = hub::locate(path)?.folder
            && let Some(location) = ModelLocation::if_cached(folder)?
        {
            let reward = reward_folder(&location, head)?;
            reward.folder.tokenizer.check_chat_template()?;
            reward.check_weights()?;
            self.positions(&reward.folder, JudgeFiles::of(&reward)?)?;
        }
        Ok(())
    }

    /// Checks that the preference model in `folder`, or one that is trained from it, reads every pair.
    pub(crate) fn positions(
        &mut self,
        folder: &ModelFolder,
        files: JudgeFiles<'_>,
    ) -> anyhow::Result<()> {
        let positions = folder.config.max_positions;
        let given = self.settings.model.chat_template.as_deref();
        let is_shared = |policy: &ModelFolder| reads_tokens_of(files, &policy.path, given);
        if !self.policy.is_some_and(is_shared) {
            self.own_positions(&folder.path, positions);
            return Ok(());
        }
        match self.too_few_positions(&folder.path, positions) {
            Some(reason) => Err(UsageError(format!(
                "{reason}: lower actor.max_prompt_length or actor.max_new_tokens"
            ))
            .into()),
            None => Ok(()),
        }
    }

    /// Warns of a judge that may read too little: with a tokenizer of its own, the same text has another length.
    fn own_positions(&mut self, folder: &Path, positions: usize) {
        if let Some(reason) = self.too_few_positions(folder, positions) {
            self.warnings.push(format!(
                "{reason}: in its own tokens it may be less; a pair that is longer is dropped"
            ));
        }
    }

    fn too_few_positions(&self, folder: &Path, positions: usize) -> Option<String> {
        let longest = longest_sequence(self.settings);
        (positions < longest).then(|| {
            format!(
                "the judge {} reads {positions} tokens, a prompt and its completion have up to {longest}",
                folder.display()
            )
        })
    }
}

/// A judge without files.
fn plain(settings: &JudgeSettings) -> anyhow::Result<Box<dyn Judge>> {
    Ok(match settings {
        JudgeSettings::Gold { cycle } => Box::new(GoldJudge::new(*cycle)),
        JudgeSettings::Matrix { matrix } => Box::new(Matrix::new(matrix.clone())?),
        JudgeSettings::Rule { temperature, rules } => Box::new(Rules::new(*temperature, rules)?),
        other => {
            let name = other.name();
            return Err(UsageError(format!(
                "a judge of the kind {name:?} does not run in this process"
            ))
            .into());
        }
    })
}
