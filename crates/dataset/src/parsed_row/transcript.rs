//! Texts with turns of `Human:` and `Assistant:` (Anthropic's HH), and the implicit prompt of a pair of texts.

use messages::{Dialogue, Message, PromptText};

use crate::parsed_row::PreferencePair;

/// Start of an assistant's turn.
const ASSISTANT: &str = "\n\nAssistant:";
/// Start of a user's turn.
const HUMAN: &str = "\n\nHuman:";

/// Whether a text has a turn of the assistant.
pub(super) fn has_assistant(text: &str) -> bool {
    text.contains(ASSISTANT)
}

/// Whether a text is a transcript: it has a turn of the user.
pub(super) fn is_transcript(text: &str) -> bool {
    text.contains(HUMAN) || text.starts_with(HUMAN.trim_start())
}

/// The text of a response up to the user's next turn.
pub(super) fn first_turn(response: &str) -> &str {
    response.split(HUMAN).next().unwrap_or(response)
}

/// The turns of a text: those of a transcript without the white space around them, what stands before the first one as
/// the system's; any other text is one turn of the user. A last turn of the assistant without text, which only says whose
/// turn it is, is left out.
pub(super) fn turns(text: &str) -> Vec<Message> {
    if !is_transcript(text) {
        return vec![Message::new("user", text)];
    }
    // The first turn of some texts is without the empty line before it.
    let text = format!("\n\n{text}");
    let mut turns = Vec::new();
    let (mut role, mut rest) = ("system", text.as_str());
    loop {
        let next = [(HUMAN, "user"), (ASSISTANT, "assistant")]
            .into_iter()
            .filter_map(|(start, role)| Some((rest.find(start)?, start, role)))
            .min();
        let end = next.map_or(rest.len(), |(at, ..)| at);
        let content = rest[..end].trim();
        let is_left_out = match role {
            "system" => content.is_empty(),
            "assistant" => content.is_empty() && next.is_none(),
            _ => false,
        };
        if !is_left_out {
            turns.push(Message::new(role, content));
        }
        match next {
            Some((at, start, next_role)) => (role, rest) = (next_role, &rest[at + start.len()..]),
            None => return turns,
        }
    }
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
        None if has_assistant(chosen) || has_assistant(rejected) => {
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
        has_later_turns: [chosen, rejected]
            .iter()
            .any(|text| text[cut..].contains(HUMAN)),
    })
}

/// A pair that was split by [`implicit`] as a dialogue: its prompt as turns, its responses without the white space around
/// them.
pub(super) fn as_dialogue(pair: PreferencePair) -> Result<PreferencePair, String> {
    let trimmed = |text: &str| text.trim().to_owned();
    match pair.prompt {
        PromptText::Text(prompt) if is_transcript(&prompt) => Ok(PreferencePair {
            prompt: PromptText::Dialogue(Dialogue::new(turns(&prompt))),
            chosen: trimmed(&pair.chosen),
            rejected: trimmed(&pair.rejected),
            has_later_turns: pair.has_later_turns,
        }),
        _ => Err("the texts do not begin with a turn of a \"Human:\", as a dialogue does".into()),
    }
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
