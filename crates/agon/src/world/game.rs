//! The adversarial game of a run, ready for its next round.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use messages::{JudgeVersion, Seed, WeightsVersion};
use model::{ModelFolder, Weights};
use preference::apo::{Game, GameParts, History};
use settings::{JudgeSettings, Settings};

use super::{JudgeSource, Trunk, annotated, share_tokenizer};
use crate::{failure::Misuse, model_hub::Located};

/// Where the rounds of a run lie.
pub(crate) fn rounds(run: &Path) -> PathBuf {
    run.join("preference")
}

/// The model that judges in a session of a run that has a game, and its version.
pub(crate) struct Judging {
    model: model::RewardModel,
    /// 1 for the initial one, one more for every round.
    version: JudgeVersion,
    /// The rounds so far, and where they lie.
    history: History,
    rounds: PathBuf,
}

impl Judging {
    /// Finds it: the newest that was accepted, or the initial one. The session began at `since`.
    pub(crate) fn find(
        settings: &Settings,
        judge: &JudgeSource,
        rounds: PathBuf,
        since: WeightsVersion,
    ) -> anyhow::Result<Self> {
        let history = History::take_up(&rounds, since)?;
        let initial = judge.model().context("the judge is a model")?;
        let model = match history.model() {
            Some(path) => {
                let (device, dtype) = super::device(settings)?;
                let at_hand = initial.model.trunk().weights();
                let folder = Located::at(path, &|| false)?.reward()?;
                folder.model(dtype, &device, Some(at_hand))?
            }
            None => initial.model.clone(),
        };
        Ok(Self {
            model,
            version: version(history.judging_round()),
            history,
            rounds,
        })
    }

    /// The judge of the run with this model.
    pub(crate) fn source(&self, judge: &JudgeSource) -> anyhow::Result<Arc<JudgeSource>> {
        let source = judge.succeeded_by(self.model.clone(), self.version)?;
        Ok(Arc::new(source))
    }

    /// The game, before its next round.
    pub(crate) fn game(
        self,
        settings: &Settings,
        policy: (&ModelFolder, &Weights),
        judge: &JudgeSource,
        stopped: &dyn Fn() -> bool,
    ) -> anyhow::Result<Game> {
        let initial = judge.model().context("the judge is a model")?;
        let mut settings = settings.clone();
        let fit = &mut settings.preference.fit;
        if let JudgeSettings::Pairwise { .. } = settings.preference.judge {
            fit.head = settings::Head::Pairwise;
        } else {
            fit.head = settings::Head::BradleyTerry;
        }
        let trunk = Trunk::open(&settings, policy, stopped)?;
        for folder in [initial.path(), &trunk.folder.path] {
            plays_in_tokens_of(&policy.0.path, folder)?;
        }
        let pairs = annotated(&settings, &trunk.folder, policy, stopped)?;
        Ok(Game::new(GameParts {
            trunk: trunk.model,
            folder: trunk.folder,
            initial: initial.model.clone(),
            current: self.model,
            last: self.history.last(),
            annotated: pairs.fitting,
            held_out: pairs.validation,
            gold: super::gold(&settings),
            directory: self.rounds,
            seed: Seed(settings.run.seed),
            settings: settings.preference.apo,
            fit: settings.preference.fit,
        }))
    }
}

/// Whether a preference model in `folder` can be fitted on the policy's own samples, which are tokens.
fn plays_in_tokens_of(policy: &Path, folder: &Path) -> Result<(), Misuse> {
    if share_tokenizer(policy, folder) {
        return Ok(());
    }
    Err(Misuse(format!(
        "{} has another tokenizer.json than the policy {}: the adversarial game fits preference models on the \
         policy's tokens; name models with the policy's tokenizer in preference.judge.path and preference.fit.path",
        folder.display(),
        policy.display()
    )))
}

/// The version of the model of a round; round 0 is the initial one.
pub(crate) fn version(round: u64) -> JudgeVersion {
    JudgeVersion(round + 1)
}
