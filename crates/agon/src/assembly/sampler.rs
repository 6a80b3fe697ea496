//! Builds the sampler of completions from a policy and its reference: Agon's own, or mistral.rs.

use std::time::Duration;

use mistral::{Rollouts, RolloutsParts};
use model::{LanguageModel, MixtureSampler, ModelFolder, Sampler, SamplingSettings};
use settings::{EngineSettings, JudgeSettings, Settings};

/// Models and limits of a sampler.
pub(crate) struct SamplerParts {
    /// Tokenizer and configuration of both models.
    pub(crate) folder: ModelFolder,
    /// The policy at the start.
    pub(crate) policy: LanguageModel,
    /// The fixed reference; `None` if it is the policy itself.
    pub(crate) reference: Option<LanguageModel>,
    /// Temperature, truncation and limit of new tokens.
    pub(crate) sampling: SamplingSettings,
    /// Number of completions sampled at once.
    pub(crate) slots: usize,
    /// Tokens of the longest prompt with its completion.
    pub(crate) capacity: usize,
}

/// The sampler of this engine.
pub(crate) fn sampler(
    engine: &EngineSettings,
    parts: SamplerParts,
) -> anyhow::Result<Box<dyn Sampler>> {
    Ok(match *engine {
        EngineSettings::Own {} => Box::new(MixtureSampler::new(
            parts.policy,
            parts.reference,
            parts.sampling,
            parts.slots,
            parts.capacity,
        )?),
        EngineSettings::Mistral { timeout_seconds } => {
            mistral::is_built()?;
            Box::new(Rollouts::new(RolloutsParts {
                folder: parts.folder,
                policy: parts.policy,
                reference: parts.reference,
                sampling: parts.sampling,
                slots: parts.slots,
                timeout: Duration::from_secs_f64(timeout_seconds),
            })?)
        }
    })
}

/// Checks that this build includes the engines that the settings name.
///
/// # Errors
/// When they name mistral.rs and the build is without it.
pub(crate) fn check_engines(settings: &Settings) -> anyhow::Result<()> {
    let samples = matches!(settings.actor.engine, EngineSettings::Mistral { .. });
    let mut judges = settings.evaluation.judge.values();
    let judges = judges.any(judges_with_mistral) || judges_with_mistral(&settings.preference.judge);
    if samples || judges {
        mistral::is_built()?;
    }
    Ok(())
}

/// Whether the judge, or a member of it, is a model of mistral.rs.
fn judges_with_mistral(judge: &JudgeSettings) -> bool {
    judge.any(&|judge| matches!(judge, JudgeSettings::Mistral(_)))
}
