//! Inputs of playground and bandit runs: the base policy, prompts, annotated pairs, and the gold judge.

mod annotated_pairs;
mod bandit;
mod base_model;
mod gold_judge;
mod post_encoder;
mod posts;
mod styles;

use model::{ModelError, ModelFolder};

pub(super) use annotated_pairs::{generated_pairs, pairs_file, split};
pub(super) use bandit::{BanditPrompt, bandit_model};
pub(super) use base_model::base_folder;
pub(crate) use base_model::base_model;
pub(super) use gold_judge::GoldJudge;
pub(crate) use gold_judge::gold_judge;
pub(super) use post_encoder::PostEncoder;
pub(super) use posts::PostPrompts;
pub(crate) use styles::{StyleComparison, style_comparisons};

/// Checks that the model's tokenizer maps the playground's vocabulary to the same ids, which the gold judge reads.
pub(super) fn check_vocabulary(folder: &ModelFolder) -> anyhow::Result<()> {
    let vocabulary = playground::Vocabulary::shared();
    let mismatch = (0..playground::VOCABULARY_SIZE as u32)
        .find(|&id| folder.tokenizer.token(id).as_deref() != vocabulary.word(id));
    match mismatch {
        None => Ok(()),
        Some(id) => Err(ModelError::Tokenizer {
            path: folder.path.clone(),
            reason: format!(
                "token {id} is not the playground's {:?}; prompts.kind = \"playground\" needs a model with its vocabulary",
                vocabulary.word(id).unwrap_or_default()
            ),
        }
        .into()),
    }
}
