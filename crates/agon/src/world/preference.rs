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
use settings::{DtypeSetting, FitSettings, Head, Settings};
use telemetry::Progress;

use super::{annotated, base::kept};
use crate::{failure::Misuse, model_hub};

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
            .parameter_count(trunk)
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
    let recipe = (
        "preference model",
        &settings.preference.fit,
        trunk.model.weights().digest()?.to_string(),
        base.1.digest()?.to_string(),
        settings.run.seed,
        env!("CARGO_PKG_VERSION"),
    );
    kept(&settings.playground.base_dir, &recipe, |aside| {
        let pairs = annotated(&settings, &trunk.folder, base, stopped)?;
        let (model, calibration) = trunk.fit(&settings, &pairs, |_| !stopped())?;
        model.save(aside, &trunk.folder)?;
        let text = serde_json::to_vec_pretty(&calibration)?;
        std::fs::write(aside.join(CALIBRATION), text)
            .with_context(|| format!("failed to write into {}", aside.display()))
    })
}

/// The preference model in the folder `path`, its weights not read.
///
/// # Errors
/// When it cannot be opened, or is not what the settings call it.
pub(crate) fn reward_folder(path: &Path, kind: Head) -> anyhow::Result<RewardFolder> {
    let folder = RewardFolder::open(path, None)?;
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
    /// Whether the policy's tokens are its own.
    shares_tokens: bool,
    /// Of its products while it judges.
    precision: Precision,
}

impl Opened {
    /// Reads the weights of a folder, for this policy at the start, whose weights a model that was trained
    /// beside them shares; without one, tokens are taken to be the model's.
    pub(crate) fn open(
        folder: RewardFolder,
        policy: Option<(&ModelFolder, &Weights)>,
        (device, dtype): &(Device, DType),
    ) -> anyhow::Result<Self> {
        let model = folder.model(*dtype, device, policy.map(|(_, weights)| weights))?;
        let tokenizer = |of: &ModelFolder| std::fs::read(of.path.join("tokenizer.json")).ok();
        let is_own = |(policy, _)| tokenizer(&folder.folder) == tokenizer(policy);
        let shares_tokens = policy.is_none_or(is_own);
        Ok(Self {
            model,
            version: JudgeVersion(1),
            folder,
            shares_tokens,
            precision: Precision::F32,
        })
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

    /// Its tokenizer and the tokens that end its texts.
    pub(crate) fn tokens(&self) -> (Tokenizer, Vec<u32>) {
        let folder = &self.folder.folder;
        (folder.tokenizer.clone(), folder.config.eos.clone())
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
