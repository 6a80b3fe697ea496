//! The implicit prompt of a pair of texts: their common prefix.

use messages::PromptText;

use crate::parsed_row::PreferencePair;

/// Start of an assistant's turn in dialogues written as text (Anthropic's HH).
pub(super) const ASSISTANT: &str = "\n\nAssistant:";
/// Start of a user's turn in such dialogues.
const HUMAN: &str = "\n\nHuman:";

/// Whether a response in such a dialogue goes on after the user's next turn.
#[must_use]
pub fn has_later_turn(response: &str) -> bool {
    response.contains(HUMAN)
}

/// Splits two texts at the end of their common prompt: after the last `Assistant:` that they share (Anthropic's HH), or
/// for texts without turns at the end of the common prefix, without a trailing space (TRL: `extract_prompt`).
pub(super) fn implicit(chosen: &str, rejected: &str) -> Result<PreferencePair, String> {
    let turn_starts = chosen
        .match_indices(ASSISTANT)
        .map(|(offset, _)| offset + ASSISTANT.len());
    let last_shared = turn_starts
        .take_while(|&cut| rejected.get(..cut) == chosen.get(..cut))
        .last();
    let cut = match last_shared {
        Some(cut) => cut,
        None if chosen.contains(ASSISTANT) || rejected.contains(ASSISTANT) => {
            return Err("the dialogues share no turn of an \"Assistant:\"".into());
        }
        None => common_prefix(chosen, rejected),
    };
    if cut == 0 {
        return Err("the two texts have no common prefix that could be a prompt".into());
    }
    let answer = |text: &str| match text[cut..].rfind(HUMAN) > text[cut..].rfind(ASSISTANT) {
        true => Err("the last turn of a dialogue is the Human's, not an answer of the Assistant"),
        false => Ok(text[cut..].to_owned()),
    };
    Ok(PreferencePair {
        prompt: PromptText::Text(chosen[..cut].to_owned()),
        chosen: answer(chosen)?,
        rejected: answer(rejected)?,
    })
}

/// Length of the common prefix in bytes, without a trailing space.
fn common_prefix(chosen: &str, rejected: &str) -> usize {
    let both = chosen.char_indices().zip(rejected.chars());
    let mut last = 0;
    for ((offset, a), b) in both {
        last = offset;
        if a != b {
            let before = &chosen[..offset];
            return offset - usize::from(before.ends_with(' '));
        }
    }
    last
}
