//! Preference models: read from a folder, or fitted to annotated pairs, kept and found again.

use std::path::{Path, PathBuf};

use anyhow::Context;
use messages::{JudgeVersion, Seed};
use model::{
    DType, Device, LanguageModel, ModelConfig, ModelFolder, Precision, RewardFolder, RewardKind,
    RewardModel, Tokenizer, Weights,
};
use preference::{
    Calibration, Judge, Learned, Reads,
    fit::{self, FitStep, Material, calibrate, fit},
};
use serde_json::Value;
use settings::{DtypeSetting, FitSettings, Head, Settings};
use telemetry::Progress;

use super::{annotated, base::kept};
use crate::{
    failure::Misuse,
    model_hub::{self, Located},
};

/// What a fit leaves in the model's folder beside the model.
pub(crate) const CALIBRATION: &str = "calibration.json";

/// The trunk that preference models are fitted from.
pub(crate) struct Trunk {
    /// Its folder.
    pub(crate) folder: ModelFolder,
    /// Its weights.
    pub(crate) model: LanguageModel,
}

/// Whether the adapter of `[preference.fit]`, if it wants one, fits a trunk of this shape.
pub(crate) fn fit_adapter(how: &FitSettings, trunk: &ModelConfig) -> Result<(), Misuse> {
    if let Some(adapter) = fit::adapter(how) {
        adapter
            .check_targets(trunk)
            .and_then(|()| adapter.parameter_count(trunk))
            .map_err(|error| Misuse(format!("preference.fit.target_modules: {error}")))?;
    }
    Ok(())
}

impl Trunk {
    /// The trunk of `[preference.fit]`: the model it names, or else the policy at the start.
    pub(crate) fn open(
        settings: &Settings,
        (folder, weights): (&ModelFolder, &Weights),
        stopped: &dyn Fn() -> bool,
    ) -> anyhow::Result<Self> {
        let how = &settings.preference.fit;
        let (folder, weights) = match &how.path {
            None => (folder.clone(), weights.clone()),
            Some(source) => {
                let path = model_hub::folder(source, stopped)?;
                let folder = ModelFolder::open(&path, settings.model.chat_template.as_deref())?;
                let (device, dtype) = super::device(settings)?;
                let weights = folder.weights(dtype, &device)?;
                (folder, weights)
            }
        };
        fit_adapter(how, &folder.config)?;
        let model = super::language_model(&folder, &weights)?;
        Ok(Self { folder, model })
    }

    /// A model of these pairs on this trunk, and how it does on the held-out ones.
    pub(crate) fn fit(
        &self,
        settings: &Settings,
        pairs: &super::Annotated,
        mut watch: impl FnMut(FitStep) -> bool,
    ) -> anyhow::Result<(RewardModel, Calibration)> {
        let material = Material {
            examples: &pairs.fitting,
            contests: &[],
            apo: &settings.preference.apo,
        };
        let how = &settings.preference.fit;
        let mut progress: Option<Progress> = None;
        let model = fit(
            &self.model,
            how,
            material,
            Seed(settings.run.seed),
            |step| {
                let progress = progress
                    .get_or_insert_with(|| Progress::new("fitting a preference model", step.steps));
                progress.advance_to(
                    step.step,
                    &format!("loss {:.3}", step.annotated.unwrap_or(f64::NAN)),
                );
                watch(step)
            },
        )?;
        if model.config().passes_over_the_end(model.trunk().config()) {
            tracing::warn!(
                "pad_token_id of the trunk is also a token that ends its texts: the head reads the token before it, \
                 as transformers does (preference.fit.pooling = \"sum\" reads all)"
            );
        }
        let calibration = calibrate(&model, &pairs.validation)?
            .context("there are no pairs to validate on; see preference.fit.validation")?;
        if let Some(progress) = progress {
            progress.finish(&format!(
                "accuracy {:.3}, ECE {:.3}",
                calibration.accuracy, calibration.ece
            ));
        }
        Ok((model, calibration))
    }
}

/// The folder of a preference model that is fitted by `[preference.fit]` with this head, kept, and found
/// again.
pub(crate) fn preference_model(
    settings: &Settings,
    head: Head,
    base: (&ModelFolder, &Weights),
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<PathBuf> {
    let mut settings = settings.clone();
    settings.preference.fit.head = head;
    let trunk = Trunk::open(&settings, base, stopped)?;
    let pairs = annotated(&settings, &trunk.folder, base, stopped)?;
    let recipe = (
        "preference model",
        &settings.preference.fit,
        pairs.digest().to_string(),
        trunk.model.weights().digest()?.to_string(),
        base.1.digest()?.to_string(),
        settings.run.seed,
        env!("CARGO_PKG_VERSION"),
    );
    kept(&settings.playground.base_dir, &recipe, |aside| {
        let (model, calibration) = trunk.fit(&settings, &pairs, |_| !stopped())?;
        model.save(aside, &trunk.folder)?;
        let text = serde_json::to_vec_pretty(&calibration)?;
        std::fs::write(aside.join(CALIBRATION), text)
            .with_context(|| format!("failed to write into {}", aside.display()))
    })
}

/// Whether the model in the folder `judge` reads prompts and completions as the model in `policy` writes
/// them: with the same tokenizer and, unless it has none, the same chat template.
fn reads_as(judge: &Path, policy: &Path) -> bool {
    let template = template_of(judge);
    let renders_alike = template.is_none() || template == template_of(policy);
    renders_alike && share_tokenizer(judge, policy)
}

/// Whether two folders hold the same tokenizer.
pub(crate) fn share_tokenizer(a: &Path, b: &Path) -> bool {
    let tokenizer = |folder: &Path| std::fs::read(folder.join("tokenizer.json")).ok();
    tokenizer(a) == tokenizer(b)
}

/// The chat template that a folder holds: a text, or several by name.
fn template_of(folder: &Path) -> Option<Value> {
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    if let Some(template) = text("chat_template.jinja") {
        return Some(template.into());
    }
    let config: Value = serde_json::from_str(&text("tokenizer_config.json")?).ok()?;
    Some(config["chat_template"].clone()).filter(|template| !template.is_null())
}

/// The preference model located at `located`, its weights not read.
///
/// # Errors
/// When it cannot be opened, or is not what the settings call it.
pub(crate) fn reward_folder(located: &Located, kind: Head) -> anyhow::Result<RewardFolder> {
    let folder = located.reward()?;
    let fits = match folder.config.kind {
        RewardKind::BradleyTerry => kind == Head::BradleyTerry,
        RewardKind::Pairwise { .. } => kind == Head::Pairwise,
    };
    if fits {
        return Ok(folder);
    }
    let (is, says) = match kind {
        Head::BradleyTerry => ("pairwise", "bradley-terry"),
        Head::Pairwise => ("bradley-terry", "pairwise"),
    };
    Err(Misuse(format!(
        "{} holds a {is} model, not a {says} one: set preference.judge.kind = {is:?}",
        folder.path().display()
    ))
    .into())
}

/// A preference model of a folder, ready to judge a policy.
pub(crate) struct Opened {
    /// The model.
    pub(crate) model: RewardModel,
    /// Its version as a judge.
    version: JudgeVersion,
    folder: RewardFolder,
    /// Whether the policy's tokens are its own, and its chat template too.
    shares_tokens: bool,
    /// Of its products while it judges.
    precision: Precision,
}

impl Opened {
    /// Reads the weights of a folder. A model that was trained beside a policy's `weights` shares them. It reads
    /// tokens as they come when the tokens of the model in the folder `tokens` are its own.
    pub(crate) fn open(
        folder: RewardFolder,
        weights: Option<&Weights>,
        tokens: &Path,
        (device, dtype): &(Device, DType),
    ) -> anyhow::Result<Self> {
        let model = folder.model(*dtype, device, weights)?;
        let shares_tokens = reads_as(&folder.folder.path, tokens);
        Ok(Self {
            model,
            version: JudgeVersion(1),
            folder,
            shares_tokens,
            precision: Precision::F32,
        })
    }

    /// Its folder.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Whether its tokens are the playground's words.
    pub(crate) fn is_of_playground(&self) -> bool {
        super::fits_playground(&self.folder.folder).is_ok()
    }

    /// Whether it reads tokens as they come; else messages and texts, through its own tokenizer.
    pub(crate) fn shares_tokens(&self) -> bool {
        self.shares_tokens
    }

    /// The same, its products taken in this precision while it judges.
    pub(crate) fn judging_in(self, precision: DtypeSetting) -> Self {
        let precision = precision.into();
        Self { precision, ..self }
    }

    /// The judge that takes its place with a model that was fitted since.
    pub(crate) fn succeeded_by(&self, model: RewardModel, version: JudgeVersion) -> Self {
        Self {
            model,
            version,
            folder: self.folder.clone(),
            shares_tokens: self.shares_tokens,
            precision: self.precision,
        }
    }

    /// Its tokenizer.
    pub(crate) fn tokenizer(&self) -> Tokenizer {
        self.folder.folder.tokenizer.clone()
    }

    /// A judge of this model.
    pub(crate) fn judge(&self) -> Box<dyn Judge> {
        let reads = if self.shares_tokens {
            Reads::Tokens
        } else {
            Reads::Text(Box::new(self.folder.folder.tokenizer.clone()))
        };
        let model = self.model.with_products_in(self.precision);
        Box::new(Learned::new(model, self.version, reads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_as_they_come_only_by_a_model_with_the_same_tokenizer_and_template() {
        let place = tempfile::tempdir().unwrap();
        let folder = |name: &str, files: &[(&str, &str)]| {
            let folder = place.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            for (file, text) in files {
                std::fs::write(folder.join(file), text).unwrap();
            }
            folder
        };
        let (own, other) = (("tokenizer.json", "a"), ("tokenizer.json", "b"));
        let template = |text| ("chat_template.jinja", text);
        let within = ("tokenizer_config.json", "{\"chat_template\": \"x\"}");
        let policy = folder("policy", &[own, template("x")]);
        let bare = folder("bare", &[own]);
        for (name, files, reads) in [
            ("same", &[own, template("x")][..], true),
            ("in tokenizer_config.json", &[own, within], true),
            ("none", &[own], true),
            ("another template", &[own, template("y")], false),
            ("another tokenizer", &[other, template("x")], false),
        ] {
            let judge = folder(name, files);
            assert_eq!(reads_as(&judge, &policy), reads, "{name}");
            let of_bare = name == "none";
            assert_eq!(
                reads_as(&judge, &bare),
                of_bare,
                "{name}, without a template"
            );
        }
    }
}
