//! Whoever judges a run, opened once and made as often as there are replicas.

use std::sync::Arc;

use anyhow::Context;
use messages::JudgeVersion;
use model::{Encoder, ModelFolder, RewardModel, Weights};
use preference::{EncoderJudge, Ensemble, Judge, Judges, Matrix, Rules};
use settings::{ChatSettings, Combine, Head, JudgeSettings, ModelSource, Settings};

use super::{
    Gold, Opened, Start,
    local_chat::{self, LocalChat},
    preference_model, reward_folder,
};
use crate::{failure::Misuse, model_hub};

/// The judge of the settings. Models are read once; every replica shares their weights.
pub(crate) enum JudgeSource {
    /// It is all in the settings.
    Plain(JudgeSettings),
    /// A decoder that gives scores.
    Model(Box<Opened>),
    /// An encoder that gives scores, and what it reads.
    Encoder(Arc<Encoder>, String),
    /// A chat model of mistral.rs.
    Chat(Arc<LocalChat>),
    /// Several of these.
    Ensemble {
        members: Vec<JudgeSource>,
        combine: Combine,
        deviations: f64,
    },
}

impl JudgeSource {
    /// Opens the judge of the settings, for this policy at the start where there is one. A preference
    /// model without a path is fitted first, from that policy, which takes a while and ends early when
    /// `stopped` turns true.
    pub(crate) fn open(
        settings: &Settings,
        policy: Option<(&ModelFolder, &Weights)>,
        stopped: &dyn Fn() -> bool,
    ) -> anyhow::Result<Self> {
        Self::of(&settings.preference.judge, settings, policy, stopped)
    }

    fn of(
        judge: &JudgeSettings,
        settings: &Settings,
        policy: Option<(&ModelFolder, &Weights)>,
        stopped: &dyn Fn() -> bool,
    ) -> anyhow::Result<Self> {
        let model = |source: &ModelSource, head| {
            let path = match (source.is_empty(), policy) {
                (false, _) => model_hub::folder(source, stopped)?,
                (true, Some(policy)) => preference_model(settings, head, policy, stopped)?,
                (true, None) => {
                    let start = Start::open(settings, stopped)?;
                    preference_model(settings, head, start.policy(), stopped)?
                }
            };
            let folder = reward_folder(&path, head)?;
            let opened = Opened::open(folder, policy, &super::device(settings)?)?;
            let opened = opened.judging_in(settings.preference.precision);
            Ok(Self::Model(Box::new(opened)))
        };
        match judge {
            JudgeSettings::BradleyTerry { path } => model(path, Head::BradleyTerry),
            JudgeSettings::Pairwise { path } => model(path, Head::Pairwise),
            JudgeSettings::Encoder { path, template } => {
                let path = model_hub::folder(path, stopped)?;
                let encoder = Encoder::load(&path, &super::device(settings)?.0)?;
                Ok(Self::Encoder(Arc::new(encoder), template.clone()))
            }
            JudgeSettings::Ensemble {
                members,
                combine,
                deviations,
            } => {
                let member = |judge| Self::of(judge, settings, policy, stopped);
                Ok(Self::Ensemble {
                    members: members.iter().map(member).collect::<Result<_, _>>()?,
                    combine: *combine,
                    deviations: *deviations,
                })
            }
            JudgeSettings::Mistral(model) => {
                let chat = LocalChat::open(model, &settings.preference)?;
                Ok(Self::Chat(Arc::new(chat)))
            }
            plain => Ok(Self::Plain(plain.clone())),
        }
    }

    /// The model that may play the adversarial game, where the judge is one.
    pub(crate) fn model(&self) -> Option<&Opened> {
        match self {
            Self::Model(opened) => Some(opened),
            _ => None,
        }
    }

    /// The same judge with a model that was fitted since.
    ///
    /// # Errors
    /// When it is not a model.
    pub(crate) fn succeeded_by(
        &self,
        model: RewardModel,
        version: JudgeVersion,
    ) -> anyhow::Result<Self> {
        let before = self.model().context("the judge is not a model")?;
        Ok(Self::Model(Box::new(before.succeeded_by(model, version))))
    }

    /// Whether it reads tokens rather than texts.
    pub(crate) fn reads_tokens(&self) -> bool {
        match self {
            Self::Plain(JudgeSettings::Gold { .. } | JudgeSettings::Matrix { .. }) => true,
            Self::Model(_) => true,
            Self::Ensemble { members, .. } => members.iter().any(Self::reads_tokens),
            Self::Plain(_) | Self::Encoder(..) | Self::Chat(_) => false,
        }
    }

    /// A judge.
    pub(crate) fn make(&self) -> anyhow::Result<Box<dyn Judge>> {
        Ok(match self {
            Self::Plain(settings) => plain(settings)?,
            Self::Model(opened) => opened.judge(),
            Self::Encoder(encoder, template) => {
                Box::new(EncoderJudge::new(Arc::clone(encoder), template.clone()))
            }
            Self::Chat(chat) => chat.judge(),
            Self::Ensemble {
                members,
                combine,
                deviations,
            } => {
                let members = members.iter().map(Self::make).collect::<Result<_, _>>()?;
                Box::new(Ensemble::new(members, *combine, *deviations))
            }
        })
    }
}

/// Whether the judge can be opened, without reading weights, fitting a model or asking anyone but the hub for a
/// model that is not here.
///
/// # Errors
/// As [`JudgeSource::open`] and [`super::bench`], as far as that can be known.
pub(crate) fn check(judge: &JudgeSettings, chat: &ChatSettings) -> anyhow::Result<()> {
    let model = |path: &ModelSource, head| {
        if !path.is_empty()
            && let Some(folder) = model_hub::look(path)?.folder
        {
            let folder = reward_folder(&folder, head)?;
            super::has_weights(&folder.folder.path)?;
        }
        anyhow::Ok(())
    };
    match judge {
        JudgeSettings::BradleyTerry { path } => model(path, Head::BradleyTerry)?,
        JudgeSettings::Pairwise { path } => model(path, Head::Pairwise)?,
        JudgeSettings::Encoder { path, .. } => {
            if let Some(folder) = model_hub::look(path)?.folder {
                Encoder::check_folder(&folder)?;
                super::has_weights(&folder)?;
            }
        }
        JudgeSettings::Mistral(model) => {
            mistral::is_built()?;
            local_chat::source(model).check()?;
        }
        JudgeSettings::Ensemble { members, .. } => {
            members.iter().try_for_each(|member| check(member, chat))?;
        }
        JudgeSettings::Http(endpoints) => drop(Judges::chat(endpoints, chat)?),
        JudgeSettings::Service { urls, token_path } => drop(Judges::services(urls, token_path)?),
        simple => drop(plain(simple)?),
    }
    Ok(())
}

/// Whether a preference model is to be fitted before this judge can judge.
pub(crate) fn is_fitted(judge: &JudgeSettings) -> bool {
    match judge {
        JudgeSettings::BradleyTerry { path } | JudgeSettings::Pairwise { path } => path.is_empty(),
        JudgeSettings::Ensemble { members, .. } => members.iter().any(is_fitted),
        _ => false,
    }
}

/// A judge that needs no file.
fn plain(settings: &JudgeSettings) -> anyhow::Result<Box<dyn Judge>> {
    Ok(match settings {
        JudgeSettings::Gold { cycle } => Box::new(Gold::new(*cycle)),
        JudgeSettings::Matrix { matrix } => Box::new(Matrix::new(matrix.clone())?),
        JudgeSettings::Rule { temperature, rules } => Box::new(Rules::new(*temperature, rules)?),
        other => {
            let name = other.name();
            return Err(Misuse(format!(
                "a judge of the kind {name:?} does not compute in this process"
            ))
            .into());
        }
    })
}
