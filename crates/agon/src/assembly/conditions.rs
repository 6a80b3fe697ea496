//! Conditions of an evaluation that its win rates depend on besides the weights: stop tokens, chat template, sampling.

use learner::EvaluationConditions;
use model::{ModelFolder, SamplingSettings};

/// Hexadecimal digits kept of a chat template's digest.
const DIGEST_DIGITS: usize = 16;

/// Conditions under which completions of the model in `folder` are sampled.
pub(crate) fn conditions(
    folder: &ModelFolder,
    sampling: &SamplingSettings,
) -> EvaluationConditions {
    let digest = folder.tokenizer.chat_template_digest();
    EvaluationConditions {
        stop_ids: folder.config.stops.ids().collect(),
        chat_template: digest.map(|digest| digest.to_string()[..DIGEST_DIGITS].to_owned()),
        max_new_tokens: sampling.max_new_tokens,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
    }
}
