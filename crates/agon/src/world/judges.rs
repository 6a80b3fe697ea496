//! Whoever judges a run, opened once and made as often as there are replicas.

use std::{path::PathBuf, sync::Arc};

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
use crate::{
    failure::Misuse,
    model_hub::{self, Located, look_for_base},
};

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

/// Whose prompts and completions are judged.
#[derive(Clone, Copy)]
pub(crate) enum Judged<'a> {
    /// Those of this policy at the start of a run.
    Policy(&'a ModelFolder, &'a Weights),
    /// Those of a model with this folder, which is not what a missing preference model is fitted from.
    Model(&'a ModelFolder),
    /// Anyone's, as they come over HTTP: of several judges the first that reads tokens says which.
    Anyone,
}

/// A judge of the settings being opened.
struct Opening<'a> {
    settings: &'a Settings,
    policy: Option<(&'a ModelFolder, &'a Weights)>,
    /// Whose tokens prompts and completions come in, as far as that is known.
    tokens: Option<PathBuf>,
    stopped: &'a dyn Fn() -> bool,
}

impl JudgeSource {
    /// Opens the judge of the settings. A preference model without a path is fitted first, from the policy
    /// at the start, which takes a while and ends early when `stopped` turns true.
    pub(crate) fn open(
        settings: &Settings,
        judged: Judged<'_>,
        stopped: &dyn Fn() -> bool,
    ) -> anyhow::Result<Self> {
        let (policy, tokens) = match judged {
            Judged::Policy(folder, weights) => (Some((folder, weights)), Some(folder)),
            Judged::Model(folder) => (None, Some(folder)),
            Judged::Anyone => (None, None),
        };
        let mut opening = Opening {
            settings,
            policy,
            tokens: tokens.map(|folder| folder.path.clone()),
            stopped,
        };
        opening.judge(&settings.preference.judge)
    }
}

impl Opening<'_> {
    fn judge(&mut self, judge: &JudgeSettings) -> anyhow::Result<JudgeSource> {
        match judge {
            JudgeSettings::BradleyTerry { path } => self.model(path, Head::BradleyTerry),
            JudgeSettings::Pairwise { path } => self.model(path, Head::Pairwise),
            JudgeSettings::Encoder { path, template } => {
                let path = model_hub::folder(path, self.stopped)?;
                let encoder = Encoder::load(&path, &super::device(self.settings)?.0)?;
                Ok(JudgeSource::Encoder(Arc::new(encoder), template.clone()))
            }
            JudgeSettings::Ensemble {
                members,
                combine,
                deviations,
            } => Ok(JudgeSource::Ensemble {
                members: members
                    .iter()
                    .map(|judge| self.judge(judge))
                    .collect::<Result<_, _>>()?,
                combine: *combine,
                deviations: *deviations,
            }),
            JudgeSettings::Mistral(model) => {
                let chat = LocalChat::open(model, &self.settings.preference)?;
                Ok(JudgeSource::Chat(Arc::new(chat)))
            }
            plain => Ok(JudgeSource::Plain(plain.clone())),
        }
    }

    fn model(&mut self, source: &ModelSource, head: Head) -> anyhow::Result<JudgeSource> {
        let settings = self.settings;
        let path = match (source.is_empty(), self.policy) {
            (false, _) => model_hub::folder(source, self.stopped)?,
            (true, Some(policy)) => preference_model(settings, head, policy, self.stopped)?,
            (true, None) => {
                let start = Start::open(settings, self.stopped)?;
                preference_model(settings, head, start.policy(), self.stopped)?
            }
        };
        let tokens = self.tokens.get_or_insert_with(|| path.clone());
        let weights = self.policy.map(|(_, weights)| weights);
        let located = Located::at(path, self.stopped)?;
        let folder = reward_folder(&located, head)?;
        let opened = Opened::open(folder, weights, tokens, &super::device(settings)?)?;
        let opened = opened.judging_in(settings.preference.precision);
        Ok(JudgeSource::Model(Box::new(opened)))
    }
}

impl JudgeSource {
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

    /// Whether it reads tokens as they come, rather than messages and texts.
    pub(crate) fn reads_tokens(&self) -> bool {
        match self {
            Self::Plain(JudgeSettings::Gold { .. } | JudgeSettings::Matrix { .. }) => true,
            Self::Model(opened) => opened.shares_tokens(),
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
/// As [`JudgeSource::open`] and `bench`, as far as that can be known.
pub(crate) fn check(judge: &JudgeSettings, chat: &ChatSettings) -> anyhow::Result<()> {
    let model = |path: &ModelSource, head| {
        if !path.is_empty()
            && let Some(folder) = model_hub::look(path)?.folder
            && let Some(located) = look_for_base(folder)?
        {
            let reward = reward_folder(&located, head)?;
            reward.folder.tokenizer.check_chat_template()?;
            reward.check_weights()?;
        }
        anyhow::Ok(())
    };
    match judge {
        JudgeSettings::BradleyTerry { path } => model(path, Head::BradleyTerry)?,
        JudgeSettings::Pairwise { path } => model(path, Head::Pairwise)?,
        JudgeSettings::Encoder { path, .. } => {
            if let Some(folder) = model_hub::look(path)?.folder {
                Encoder::check_folder(&folder)?;
            }
        }
        JudgeSettings::Mistral(model) => {
            mistral::is_built()?;
            local_chat::source(model).check()?;
        }
        JudgeSettings::Ensemble { members, .. } => {
            for (place, member) in members.iter().enumerate() {
                check(member, chat).with_context(|| format!("members[{place}]"))?;
            }
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
