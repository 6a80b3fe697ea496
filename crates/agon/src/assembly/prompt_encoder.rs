//! Encodes prompts and responses that come over HTTP as the tokens that the configured judge reads.

use std::sync::Arc;

use model::ModelFolder;
use preference::{EosPolicy, NoEncoding, PromptEncoder, TokenEncoder};
use settings::{JudgeSettings, Settings};

use crate::assembly::{JudgeSource, playground};

/// The encoder that the judge needs: the playground's vocabulary, a bandit's, or a reward model's tokenizer; none for
/// judges that read text.
pub(crate) fn prompt_encoder(
    settings: &Settings,
    judge: &JudgeSource,
) -> anyhow::Result<Arc<dyn PromptEncoder>> {
    Ok(match judge {
        JudgeSource::Plain(JudgeSettings::Gold { .. }) => Arc::new(playground::PostEncoder),
        JudgeSource::Plain(JudgeSettings::Matrix { .. }) => {
            let folder = ModelFolder::open(&playground::bandit_model(settings)?, None)?;
            // An arm is a single token without an end-of-text token.
            Arc::new(TokenEncoder::new(folder.tokenizer, EosPolicy::WhenFinished))
        }
        JudgeSource::Model(model) if model.has_playground_vocabulary() => {
            Arc::new(playground::PostEncoder)
        }
        JudgeSource::Model(model) if model.shares_tokens() => {
            let eos_policy = EosPolicy::of(model.model.config());
            Arc::new(TokenEncoder::new(model.tokenizer(), eos_policy))
        }
        JudgeSource::Composed { members, .. } => match members.iter().find(|m| m.reads_tokens()) {
            Some(member) => prompt_encoder(settings, member)?,
            None => Arc::new(NoEncoding),
        },
        JudgeSource::Model(_)
        | JudgeSource::Plain(_)
        | JudgeSource::Encoder { .. }
        | JudgeSource::Chat(_) => Arc::new(NoEncoding),
    })
}
