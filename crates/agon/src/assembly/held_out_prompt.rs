//! Prompts of an evaluation outside of a run.

use learner::PromptRow;
use messages::{Prompt, PromptBatch, PromptId, Purpose, Seed, WeightsVersion};

/// The prompt of a row, for one pair of completions.
pub(crate) fn held_out_prompt(id: PromptId, seed: Seed, row: PromptRow) -> Prompt {
    Prompt {
        id,
        prompt_batch: PromptBatch::single(id),
        purpose: Purpose::Evaluate,
        version: WeightsVersion::REFERENCE,
        seed,
        ids: row.ids,
        text: row.text,
        dialogue: row.dialogue,
        golden: row.golden,
        answer: row.answer,
        route: row.route,
    }
}
