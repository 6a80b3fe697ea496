//! Model and prompt of a multi-armed bandit: one prompt, whose answers are single tokens.

use std::path::PathBuf;

use learner::{PromptRow, PromptSet};
use playground::Bandit;
use settings::Settings;

use crate::assembly::cache::cached;

/// Folder of a model whose probabilities over the arms are those of the settings; cached in `playground.base_dir`.
pub(crate) fn bandit_model(settings: &Settings) -> anyhow::Result<PathBuf> {
    let probabilities = settings
        .model
        .reference_probabilities
        .as_deref()
        .unwrap_or_default();
    let bandit = Bandit::new(probabilities)?;
    cached(
        &settings.playground.base_dir,
        &("bandit", probabilities),
        |tmp| {
            bandit.write_model(tmp)?;
            Ok(())
        },
    )
}

/// The bandit's single prompt.
pub(crate) struct BanditPrompt;

impl PromptSet for BanditPrompt {
    fn train(&self, _index: u64) -> PromptRow {
        PromptRow {
            ids: vec![0],
            text: "which arm?".into(),
            dialogue: None,
            golden: None,
            answer: None,
            route: None,
        }
    }

    fn held_out(&self, index: u64) -> PromptRow {
        self.train(index)
    }

    /// Unlimited: an evaluation samples answers to the one prompt, each with its own seed.
    fn held_out_count(&self) -> Option<usize> {
        None
    }
}
