//! The prompt set of a run: rows of files as tokens of the policy, the playground's posts, or a bandit's prompt.

use std::sync::Arc;

use hub::CancelToken;
use learner::{PromptFiles, PromptLimits, PromptSet};
use messages::Seed;
use model::{ModelConfig, ModelFolder};
use settings::{
    DatasetPrompts, ObjectiveSettings, PairsSettings, PlaygroundGolden, PromptsSettings, Settings,
};

use crate::{
    assembly::{LoadedModel, playground},
    exit_code::UsageError,
};

/// The prompts of the settings, as tokens of the policy that starts from `model`.
pub(crate) fn prompts(
    settings: &Settings,
    model: &LoadedModel,
    cancel: &CancelToken,
) -> anyhow::Result<Arc<dyn PromptSet>> {
    Ok(match &settings.prompts {
        PromptsSettings::Playground { golden } => {
            playground::check_vocabulary(&model.folder)?;
            let pairs = &settings.preference.fit.pairs;
            let chosen = match (golden, pairs) {
                (PlaygroundGolden::Chosen, PairsSettings::Playground(pairs)) => {
                    let pairs = playground::generated_pairs(settings, *pairs, model, cancel)?;
                    pairs.into_iter().map(|pair| pair.into_prompt()).collect()
                }
                _ => Vec::new(),
            };
            Arc::new(playground::PostPrompts::new(settings.run.seed, chosen))
        }
        PromptsSettings::Bandit {} => Arc::new(playground::BanditPrompt),
        PromptsSettings::Dataset(dataset) => {
            Arc::new(prompt_files(settings, dataset, &model.folder)?)
        }
    })
}

/// Whether a model reads the golden answers of prompts: RPO scores them under the policy, and the preference model of APO
/// is trained on them.
pub(crate) fn reads_golden(settings: &Settings) -> bool {
    matches!(settings.learner.objective, ObjectiveSettings::Rpo { .. })
        || settings.preference.apo.refresh_steps > 0
}

/// The prompts of files, as tokens of the policy in this folder.
pub(super) fn prompt_files(
    settings: &Settings,
    dataset: &DatasetPrompts,
    folder: &ModelFolder,
) -> anyhow::Result<PromptFiles> {
    let limits = PromptLimits {
        prompt: settings.actor.max_prompt_length,
        with_golden: reads_golden(settings).then_some(folder.config.max_positions),
    };
    let seed = Seed(settings.run.seed);
    Ok(PromptFiles::load(dataset, seed, limits, &folder.tokenizer)?)
}

/// Checks that the longest prompt and completion together fit the model's positions, and that the playground's
/// prompts fit `actor.max_prompt_length`. A run that samples nothing has neither: [`check_run_positions`].
///
/// # Errors
/// When they do not fit.
pub(crate) fn check_positions(settings: &Settings, config: &ModelConfig) -> Result<(), UsageError> {
    let (actor, positions) = (&settings.actor, config.max_positions);
    let longest_post = ::playground::LONGEST_PROMPT;
    if let PromptsSettings::Playground { .. } = settings.prompts
        && actor.max_prompt_length < longest_post
    {
        return Err(UsageError(format!(
            "actor.max_prompt_length = {} is less than the {longest_post} tokens of the playground's longest post: raise it",
            actor.max_prompt_length,
        )));
    }
    let prompt = max_prompt_length(settings);
    if longest_sample(settings) <= positions {
        return Ok(());
    }
    Err(UsageError(format!(
        "actor.max_prompt_length = {prompt} and actor.max_new_tokens = {} exceed the model's {} positions: lower one of them",
        actor.max_new_tokens, config.max_positions,
    )))
}

/// As [`check_positions`], where the run samples.
///
/// # Errors
/// As [`check_positions`].
pub(crate) fn check_run_positions(
    settings: &Settings,
    config: &ModelConfig,
) -> Result<(), UsageError> {
    match settings.needs_samples() {
        true => check_positions(settings, config),
        false => Ok(()),
    }
}

/// Tokens of the longest prompt that the settings allow; 0 where the generated prompts are always shorter.
fn max_prompt_length(settings: &Settings) -> usize {
    match settings.prompts {
        PromptsSettings::Dataset(_) => settings.actor.max_prompt_length,
        PromptsSettings::Playground { .. } | PromptsSettings::Bandit {} => 0,
    }
}

/// Tokens of the longest prompt with its completion that the settings allow: sampled, or of a file where all are.
pub(crate) fn longest_sequence(settings: &Settings) -> usize {
    match settings.needs_samples() {
        true => longest_sample(settings),
        false => settings.pairs.max_length,
    }
}

/// Tokens of the longest prompt with a sampled completion that the settings allow.
fn longest_sample(settings: &Settings) -> usize {
    max_prompt_length(settings).saturating_add(settings.actor.max_new_tokens)
}
