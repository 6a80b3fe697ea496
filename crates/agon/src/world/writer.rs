//! What writes completions of a policy and its reference.

use std::time::Duration;

use mistral::{Rollouts, RolloutsParts};
use model::{CompletionWriter, LanguageModel, ModelFolder, Sampler, SamplingSettings};
use settings::{EngineSettings, JudgeSettings, Settings};

/// What completions are made of.
pub(crate) struct WriterParts {
    /// The folder with the tokenizer and the configuration of both models.
    pub(crate) folder: ModelFolder,
    /// The policy at the start.
    pub(crate) policy: LanguageModel,
    /// The fixed reference, unless it is the policy itself.
    pub(crate) reference: Option<LanguageModel>,
    /// How tokens are drawn.
    pub(crate) sampling: SamplingSettings,
    /// Completions written at once.
    pub(crate) slots: usize,
    /// Tokens of the longest prompt with its completion.
    pub(crate) capacity: usize,
}

/// The writer of this engine.
pub(crate) fn writer(
    engine: &EngineSettings,
    parts: WriterParts,
) -> anyhow::Result<Box<dyn CompletionWriter>> {
    Ok(match *engine {
        EngineSettings::Own {} => Box::new(Sampler::new(
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
                patience: Duration::from_secs_f64(timeout_seconds),
            })?)
        }
    })
}

/// Whether this build has what the settings name.
///
/// # Errors
/// When they name mistral.rs and the build is without it.
pub(crate) fn is_built(settings: &Settings) -> anyhow::Result<()> {
    let writes = matches!(settings.actor.engine, EngineSettings::Mistral { .. });
    if writes || asks(&settings.preference.judge) {
        mistral::is_built()?;
    }
    Ok(())
}

/// Whether the judge, or a member of it, is a model of mistral.rs.
fn asks(judge: &JudgeSettings) -> bool {
    match judge {
        JudgeSettings::Mistral(_) => true,
        JudgeSettings::Ensemble { members, .. } => members.iter().any(asks),
        _ => false,
    }
}
