//! Preference models: loaded from a folder, or trained on annotated pairs and cached.

use std::path::{Path, PathBuf};

use anyhow::Context;
use hub::CancelToken;
use messages::{JudgeVersion, Seed};
use model::{
    LanguageModel, ModelConfig, ModelFolder, Precision, RewardFolder, RewardKind, RewardModel,
    Tokenizer,
};
use preference::{
    Calibration, Judge, JudgeTokenizer, RewardModelJudge,
    reward_training::{self, StepMetrics, TrainingData, calibrate, fit},
};
use serde_json::Value;
use settings::{DtypeSetting, FitSettings, Head, Settings};
use telemetry::Progress;

use crate::assembly::{
    AnnotatedPairs, LoadedModel, ModelLocation, annotated_pairs, cache::cached, playground,
};
use crate::exit_code::UsageError;

/// File with the calibration, in the folder of a trained model.
const CALIBRATION_FILE: &str = "calibration.json";

/// The backbone that preference models are trained from.
pub(crate) struct Backbone {
    /// Configuration and tokenizer.
    pub(crate) folder: ModelFolder,
    /// The language model.
    pub(crate) model: LanguageModel,
}

/// Checks that the adapter of `[preference.fit]`, if there is one, fits a backbone of this shape.
pub(crate) fn check_fit_adapter(
    fit: &FitSettings,
    backbone: &ModelConfig,
) -> Result<(), UsageError> {
    if let Some(adapter) = reward_training::adapter(fit) {
        adapter
            .check_targets(backbone)
            .and_then(|()| adapter.parameter_count(backbone))
            .map_err(|error| UsageError(format!("preference.fit.target_modules: {error}")))?;
    }
    Ok(())
}

impl Backbone {
    /// The backbone of `[preference.fit]`: the model it names, or else the base model of the policy.
    pub(crate) fn open(
        settings: &Settings,
        base: &LoadedModel,
        cancel: &CancelToken,
    ) -> anyhow::Result<Self> {
        let fit = &settings.preference.fit;
        let backbone = match &fit.path {
            None => base.clone(),
            Some(source) => LoadedModel::read(settings, &hub::folder(source, cancel)?)?,
        };
        check_fit_adapter(fit, &backbone.folder.config)?;
        Ok(Self {
            model: backbone.language_model()?,
            folder: (*backbone.folder).clone(),
        })
    }

    /// Trains a preference model on these pairs and calibrates it on the held-out ones. `on_step` returns whether to
    /// go on.
    pub(crate) fn fit(
        &self,
        settings: &Settings,
        pairs: &AnnotatedPairs,
        mut on_step: impl FnMut(StepMetrics) -> bool,
    ) -> anyhow::Result<(RewardModel, Calibration)> {
        let data = TrainingData {
            examples: &pairs.fitting,
            adversarial: &[],
            apo: &settings.preference.apo,
        };
        let mut progress: Option<Progress> = None;
        let model = fit(
            &self.model,
            &settings.preference.fit,
            data,
            Seed(settings.run.seed),
            |step| {
                let progress = progress
                    .get_or_insert_with(|| Progress::new("fitting a preference model", step.steps));
                progress.advance_to(
                    step.step,
                    &format!("loss {:.3}", step.annotated.unwrap_or(f64::NAN)),
                );
                on_step(step)
            },
        )?;
        if model
            .config()
            .ignores_end_of_text(model.backbone().config())
        {
            tracing::warn!(
                "pad_token_id of the backbone is also an end-of-text token: the head reads the token before it, as \
                 transformers does (preference.fit.pooling = \"sum\" reads all tokens)"
            );
        }
        // As it will judge.
        let precision = model::training_precision(settings.preference.precision);
        let calibration = calibrate(&model.packed(precision)?, &pairs.validation)?
            .context("there are no held-out pairs; see preference.fit.validation")?;
        if let Some(progress) = progress {
            progress.finish(&format!(
                "accuracy {:.3}, ECE {:.3}",
                calibration.accuracy, calibration.ece
            ));
        }
        Ok((model, calibration))
    }
}

/// Folder of a preference model with this head, trained with `[preference.fit]`; cached under the digest of
/// everything that determines it. Blocks; ends early once `cancel` is cancelled.
pub(crate) fn preference_model(
    settings: &Settings,
    head: Head,
    base: &LoadedModel,
    cancel: &CancelToken,
) -> anyhow::Result<PathBuf> {
    let mut settings = settings.clone();
    settings.preference.fit.head = head;
    let backbone = Backbone::open(&settings, base, cancel)?;
    let pairs = annotated_pairs(&settings, &backbone.folder, base, cancel)?;
    let cache_key = (
        "preference model",
        &settings.preference.fit,
        pairs.digest().to_string(),
        backbone.model.weights().digest()?.to_string(),
        base.weights.digest()?.to_string(),
        settings.run.seed,
        env!("CARGO_PKG_VERSION"),
    );
    cached(&settings.playground.base_dir, &cache_key, |tmp| {
        let on_step = |_| !cancel.is_cancelled();
        let (model, calibration) = backbone.fit(&settings, &pairs, on_step)?;
        model.save(tmp, &backbone.folder)?;
        let text = serde_json::to_vec_pretty(&calibration)?;
        std::fs::write(tmp.join(CALIBRATION_FILE), text)
            .with_context(|| format!("failed to write into {}", tmp.display()))
    })
}

/// Folders of a judge's tokenizer and of its chat template, which an adapter may have in a folder of its own.
#[derive(Clone, Copy)]
pub(crate) struct JudgeFiles<'a> {
    /// Folder with `tokenizer.json`.
    pub(crate) tokenizer: &'a Path,
    /// Folder with the template.
    pub(crate) template: &'a Path,
}

impl<'a> JudgeFiles<'a> {
    /// Files of a model that has all of them in one folder.
    pub(crate) fn in_one(folder: &'a Path) -> Self {
        Self {
            tokenizer: folder,
            template: folder,
        }
    }

    /// Files of the reward model in `folder`.
    pub(crate) fn of(folder: &'a RewardFolder) -> anyhow::Result<Self> {
        Ok(Self {
            tokenizer: &folder.folder.path,
            template: folder.template_folder()?,
        })
    }
}

/// Whether the judge can read the tokens of the model in `policy`, whose chat template is `given`
/// unless that is its own: it has the same tokenizer and the same chat template, or no template.
pub(crate) fn reads_tokens_of(judge: JudgeFiles<'_>, policy: &Path, given: Option<&Path>) -> bool {
    let template = chat_template(judge.template);
    let of_policy = match given {
        // Unreadable, it is refused elsewhere.
        Some(given) => std::fs::read_to_string(given).ok().map(Value::from),
        None => chat_template(policy),
    };
    let same_template = template.is_none() || template == of_policy;
    same_template && same_tokenizer(judge.tokenizer, policy)
}

/// Whether two folders hold the same `tokenizer.json`.
pub(crate) fn same_tokenizer(a: &Path, b: &Path) -> bool {
    let tokenizer = |folder: &Path| std::fs::read(folder.join("tokenizer.json")).ok();
    tokenizer(a) == tokenizer(b)
}

/// The chat template of a folder: a string, or several by name.
fn chat_template(folder: &Path) -> Option<Value> {
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    if let Some(template) = text("chat_template.jinja") {
        return Some(template.into());
    }
    let config: Value = serde_json::from_str(&text("tokenizer_config.json")?).ok()?;
    Some(config["chat_template"].clone()).filter(|template| !template.is_null())
}

/// Opens the preference model at `location`; weights are not read.
///
/// # Errors
/// When it cannot be opened, or its head is of another kind.
pub(crate) fn reward_folder(location: &ModelLocation, kind: Head) -> anyhow::Result<RewardFolder> {
    let folder = location.reward()?;
    let fits = match folder.config.kind {
        RewardKind::BradleyTerry => kind == Head::BradleyTerry,
        RewardKind::Pairwise { .. } => kind == Head::Pairwise,
    };
    if fits {
        return Ok(folder);
    }
    let (found, configured) = match kind {
        Head::BradleyTerry => ("pairwise", "bradley-terry"),
        Head::Pairwise => ("bradley-terry", "pairwise"),
    };
    Err(UsageError(format!(
        "{} holds a {found} model, not a {configured} one: set preference.judge.kind = {found:?}",
        folder.path().display()
    ))
    .into())
}

/// A reward model in memory, with what a judge needs beside it.
pub(crate) struct LoadedRewardModel {
    /// The model from which others may be trained.
    pub(crate) model: RewardModel,
    /// The same as it judges, packed for all replicas.
    judging: RewardModel,
    /// Version as a judge.
    version: JudgeVersion,
    folder: RewardFolder,
    /// Whether tokenizer and chat template are those of the policy.
    shares_tokens: bool,
    /// Precision of matrix products while it judges.
    precision: Precision,
}

/// What a judge's weights are for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum JudgeUse {
    /// To judge: no copy is kept but the packed one.
    Judging,
    /// To be trained further too.
    Training,
}

impl LoadedRewardModel {
    /// The initial judge with this model of `folder`. It reads tokens directly if they come from the tokenizer and
    /// chat template in the folder `tokens`, or from the template `given` in its place, and these are its own.
    pub(crate) fn new(
        folder: RewardFolder,
        model: RewardModel,
        tokens: &Path,
        given: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let shares_tokens = reads_tokens_of(JudgeFiles::of(&folder)?, tokens, given);
        Ok(Self {
            judging: model.clone(),
            model,
            version: JudgeVersion(1),
            folder,
            shares_tokens,
            precision: Precision::F32,
        })
    }

    /// The model's folder.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Whether its tokens are the playground's vocabulary.
    pub(crate) fn has_playground_vocabulary(&self) -> bool {
        playground::check_vocabulary(&self.folder.folder).is_ok()
    }

    /// Whether it reads the policy's tokens; otherwise it encodes messages and text with its own tokenizer.
    pub(crate) fn shares_tokens(&self) -> bool {
        self.shares_tokens
    }

    /// The same judge with matrix products in this precision.
    pub(crate) fn with_precision(
        mut self,
        precision: DtypeSetting,
        purpose: JudgeUse,
    ) -> anyhow::Result<Self> {
        self.precision = model::training_precision(precision);
        self.judging = self.model.packed(self.precision)?;
        if purpose == JudgeUse::Judging {
            self.model = self.judging.clone();
        }
        Ok(self)
    }

    /// The same judge with another model of the same folder layout.
    pub(crate) fn with_model(
        &self,
        model: RewardModel,
        version: JudgeVersion,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            judging: model.packed(self.precision)?,
            model,
            version,
            folder: self.folder.clone(),
            shares_tokens: self.shares_tokens,
            precision: self.precision,
        })
    }

    /// The model's tokenizer.
    pub(crate) fn tokenizer(&self) -> Tokenizer {
        self.folder.folder.tokenizer.clone()
    }

    /// A new replica, which shares the weights.
    pub(crate) fn judge(&self) -> Box<dyn Judge> {
        let tokens = if self.shares_tokens {
            JudgeTokenizer::Shared
        } else {
            JudgeTokenizer::Own(Box::new(self.folder.folder.tokenizer.clone()))
        };
        Box::new(RewardModelJudge::new(
            self.judging.clone(),
            self.version,
            tokens,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_shared_by_models_with_the_same_tokenizer_and_template() {
        let directory = tempfile::tempdir().unwrap();
        let folder = |name: &str, files: &[(&str, &str)]| {
            let folder = directory.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            for (file, text) in files {
                std::fs::write(folder.join(file), text).unwrap();
            }
            folder
        };
        let (own, other) = (("tokenizer.json", "a"), ("tokenizer.json", "b"));
        let template = |text| ("chat_template.jinja", text);
        let in_config = ("tokenizer_config.json", "{\"chat_template\": \"x\"}");
        let policy = folder("policy", &[own, template("x")]);
        let bare = folder("bare", &[own]);
        for (name, files, reads) in [
            ("same", &[own, template("x")][..], true),
            ("in tokenizer_config.json", &[own, in_config], true),
            ("none", &[own], true),
            ("another template", &[own, template("y")], false),
            ("another tokenizer", &[other, template("x")], false),
        ] {
            let judge = folder(name, files);
            let judge = JudgeFiles::in_one(&judge);
            assert_eq!(reads_tokens_of(judge, &policy, None), reads, "{name}");
            let reads_bare = name == "none";
            assert_eq!(
                reads_tokens_of(judge, &bare, None),
                reads_bare,
                "{name}, without a template"
            );
            // In place of the policy's own.
            let given = directory.path().join("given.jinja");
            std::fs::write(&given, "y").unwrap();
            let reads_given = ["none", "another template"].contains(&name);
            assert_eq!(
                reads_tokens_of(judge, &policy, Some(&given)),
                reads_given,
                "{name}, with another template of the policy"
            );
        }
    }
}
