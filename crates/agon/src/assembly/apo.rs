//! Adversarial preference optimisation of a run: restores the newest judge and prepares the next round.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use hub::CancelToken;
use messages::{JudgeVersion, Seed, WeightsVersion};
use preference::apo::{Apo, ApoPairs, ApoParts, History};
use settings::{JudgeSettings, Settings};

use crate::assembly::{
    Backbone, JudgeSource, LoadedModel, ModelLocation, annotated_pairs, gold_judge,
    human_verdict_pairs, same_tokenizer,
};
use crate::exit_code::UsageError;

/// Directory of the rounds of the run in `run`.
pub(crate) fn rounds_directory(run: &Path) -> PathBuf {
    run.join("preference")
}

/// The preference model that judges a session of a run with APO, and the rounds so far.
pub(crate) struct ApoJudge {
    model: model::RewardModel,
    /// Increases by one with every round that was accepted, see [`judge_version`].
    version: JudgeVersion,
    history: History,
    run_dir: PathBuf,
}

impl ApoJudge {
    /// Loads the newest model that was accepted in this run directory, or takes the initial one. Rounds of earlier
    /// sessions count up to the step of `before`, those of its session all.
    pub(crate) fn load(
        settings: &Settings,
        judge: &JudgeSource,
        run_dir: &Path,
        before: WeightsVersion,
    ) -> anyhow::Result<Self> {
        let history = History::load(&rounds_directory(run_dir), before)?;
        let initial = judge.model().context("the judge is a model")?;
        let model = match history.model() {
            Some(path) => {
                let (device, dtype) = crate::assembly::device(settings)?;
                let shared = initial.model.backbone().weights();
                let location = ModelLocation::of_folder(path, &CancelToken::never())?;
                location.reward()?.model(dtype, &device, Some(shared))?
            }
            None => initial.model.clone(),
        };
        Ok(Self {
            model,
            version: judge_version(history.active_round()),
            history,
            run_dir: run_dir.to_owned(),
        })
    }

    /// The configured judge with this model.
    pub(crate) fn source(&self, judge: &JudgeSource) -> anyhow::Result<Arc<JudgeSource>> {
        let source = judge.with_model(self.model.clone(), self.version)?;
        Ok(Arc::new(source))
    }

    /// The state of APO before its next round. Blocks; ends early once `cancel` is cancelled.
    pub(crate) fn apo(
        self,
        settings: &Settings,
        policy: &LoadedModel,
        judge: &JudgeSource,
        cancel: &CancelToken,
    ) -> anyhow::Result<Apo> {
        let initial = judge.model().context("the judge is a model")?;
        let mut settings = settings.clone();
        let fit = &mut settings.preference.fit;
        if let JudgeSettings::Pairwise { .. } = settings.preference.judge {
            fit.head = settings::Head::Pairwise;
        } else {
            fit.head = settings::Head::BradleyTerry;
        }
        let backbone = Backbone::open(&settings, policy, cancel)?;
        for folder in [initial.path(), &backbone.folder.path] {
            check_tokenizer(&policy.folder.path, folder)?;
        }
        let pairs = annotated_pairs(&settings, &backbone.folder, policy, cancel)?;
        let (fit, folder) = (&settings.preference.fit, backbone.folder.clone());
        let human_verdicts = human_verdict_pairs(&self.run_dir, fit, folder, &pairs.validation);
        Ok(Apo::new(ApoParts {
            backbone: backbone.model,
            folder: backbone.folder,
            initial: initial.model.clone(),
            current: self.model,
            last: self.history.last(),
            pairs: ApoPairs {
                annotated: pairs.fitting,
                held_out: pairs.validation,
                human_verdicts,
            },
            gold: gold_judge(&settings),
            directory: rounds_directory(&self.run_dir),
            seed: Seed(settings.run.seed),
            settings: settings.preference.apo,
            fit: settings.preference.fit,
        }))
    }
}

/// Checks that a preference model in `folder` reads the policy's samples, which are tokens.
fn check_tokenizer(policy: &Path, folder: &Path) -> Result<(), UsageError> {
    if same_tokenizer(policy, folder) {
        return Ok(());
    }
    Err(UsageError(format!(
        "{} has another tokenizer.json than the policy {}: adversarial preference optimisation (APO) trains \
         preference models on the policy's tokens; name models with the policy's tokenizer in \
         preference.judge.path and preference.fit.path",
        folder.display(),
        policy.display()
    )))
}

/// Version of the judge after a round; round 0 is the initial model.
pub(crate) fn judge_version(round: u64) -> JudgeVersion {
    JudgeVersion(round + 1)
}
