//! Transcripts: dialogues as one text, with turns of a `Human:` and an `Assistant:` that each follow an empty line
//! (Anthropic's HH); and the implicit prompt of a pair of texts.

use messages::{Dialogue, Message, PromptText};

use crate::parsed_row::PreferencePair;

/// Between two turns.
const EMPTY_LINE: &str = "\n\n";
/// Start of a turn of the user.
const HUMAN: &str = "Human:";
/// Start of a turn of the assistant.
const ASSISTANT: &str = "Assistant:";

/// Whether a text is a transcript: it begins with a turn of the user, and has one of the assistant.
pub(super) fn is_transcript(text: &str) -> bool {
    begins_with_user(text) && has_assistant(text)
}

/// Whether a text has a turn of the assistant.
pub(super) fn has_assistant(text: &str) -> bool {
    let starts = turn_starts(&with_line_feeds(text));
    starts.iter().any(|(_, speaker)| *speaker == ASSISTANT)
}

/// Whether a line of a text begins with a speaker, as in a transcript or in something like one.
pub(super) fn has_speakers(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        line.starts_with(HUMAN) || line.starts_with(ASSISTANT)
    })
}

/// Whether a response has further turns after its own.
pub(super) fn has_later_turns(response: &str) -> bool {
    !turn_starts(&with_line_feeds(response)).is_empty()
}

/// The text of a response up to the next turn.
pub(super) fn first_turn(response: &str) -> String {
    let response = with_line_feeds(response);
    match turn_starts(&response).first() {
        Some((end, _)) => response[..*end].trim_end().to_owned(),
        None => response,
    }
}

/// A text prompt for a chat model, as `chat = true` reads it: the turns of a transcript, any other text as one turn of the
/// user.
#[must_use]
pub fn dialogue(text: &str) -> Dialogue {
    Dialogue::new(turns(text))
}

/// The turns of a text: those of a transcript, without the white space around them, two of one speaker as one; any other
/// text is one turn of the user. Of a last turn of the assistant, which is continued, the white space at its end stays; if
/// it has no text, it only says whose turn it is, and is left out.
pub(super) fn turns(text: &str) -> Vec<Message> {
    if !is_transcript(text) {
        return vec![Message::new("user", text)];
    }
    // The first turn of some texts is without the empty line before it.
    let text = EMPTY_LINE.to_owned() + trimmed_start(&with_line_feeds(text));
    let starts = turn_starts(&text);
    let ends = starts.iter().skip(1).map(|(start, _)| *start);
    let mut turns: Vec<(&str, String)> = Vec::new();
    for ((start, speaker), end) in starts.iter().zip(ends.chain([text.len()])) {
        let content = text[start + EMPTY_LINE.len() + speaker.len()..end].trim_start();
        match turns.last_mut() {
            Some((last, joined)) if last == speaker => {
                joined.truncate(joined.trim_end().len());
                joined.push_str(EMPTY_LINE);
                joined.push_str(content);
            }
            _ => turns.push((speaker, content.to_owned())),
        }
    }
    let continued = turns.pop_if(|(speaker, _)| *speaker == ASSISTANT);
    let continued = continued.filter(|(_, content)| !content.is_empty());
    let whole = turns.into_iter().map(|(speaker, content)| {
        let role = if speaker == HUMAN {
            "user"
        } else {
            "assistant"
        };
        Message::new(role, content.trim_end())
    });
    let continued = continued.map(|(_, content)| Message::new("assistant", content));
    whole.chain(continued).collect()
}

/// Splits two texts at the end of their common prompt: after the last `Assistant:` that they share (Anthropic's HH), or
/// for texts without turns at the end of the common prefix, without a trailing space (TRL: `extract_prompt`).
pub(super) fn implicit(chosen: &str, rejected: &str) -> Result<PreferencePair, String> {
    let pair = split(chosen, rejected)?;
    for response in [&pair.chosen, &pair.rejected] {
        if matches!(turn_starts(response).last(), Some((_, HUMAN))) {
            return Err(
                "the last turn of a dialogue is the Human's, not an answer of the Assistant".into(),
            );
        }
    }
    Ok(pair)
}

/// Two transcripts as a dialogue and its responses, without the white space around them.
pub(super) fn implicit_dialogue(
    chosen: &str,
    rejected: &str,
) -> Result<(Vec<Message>, PreferencePair), String> {
    let [chosen, rejected] = [chosen, rejected].map(with_line_feeds);
    let pair = split(trimmed_start(&chosen), trimmed_start(&rejected))?;
    match &pair.prompt {
        // A common prefix may end with "Assistant:" without a turn that begins there.
        PromptText::Text(prompt) if is_transcript(prompt) => {
            let turns = turns(prompt);
            let pair = PreferencePair {
                prompt: PromptText::Dialogue(Dialogue::new(turns.clone())),
                chosen: pair.chosen.trim().to_owned(),
                rejected: pair.rejected.trim().to_owned(),
                has_later_turns: pair.has_later_turns,
            };
            Ok((turns, pair))
        }
        _ => Err(format!(
            "the texts are no dialogue: one begins with {HUMAN:?}, and each {HUMAN:?} and {ASSISTANT:?} follows an empty line"
        )),
    }
}

fn split(chosen: &str, rejected: &str) -> Result<PreferencePair, String> {
    let assistant = |text: &str| -> Vec<usize> {
        let starts = turn_starts(text).into_iter();
        let of_assistant = starts.filter(|(_, speaker)| *speaker == ASSISTANT);
        let end = |(start, speaker): (usize, &str)| start + EMPTY_LINE.len() + speaker.len();
        of_assistant.map(end).collect()
    };
    let cuts = assistant(chosen);
    let last_shared = cuts
        .iter()
        .copied()
        .take_while(|&cut| rejected.get(..cut) == chosen.get(..cut))
        .last();
    let cut = match last_shared {
        Some(cut) => cut,
        None if !cuts.is_empty() || !assistant(rejected).is_empty() => {
            return Err("the dialogues share no turn of an \"Assistant:\"".into());
        }
        None => common_prefix(chosen, rejected),
    };
    if cut == 0 {
        return Err("the two texts have no common prefix that could be a prompt".into());
    }
    let (prompt, responses) = (&chosen[..cut], [&chosen[cut..], &rejected[cut..]]);
    Ok(PreferencePair {
        prompt: PromptText::Text(prompt.to_owned()),
        chosen: responses[0].to_owned(),
        rejected: responses[1].to_owned(),
        has_later_turns: responses.into_iter().any(has_later_turns),
    })
}

/// Offsets and speakers of the turns that follow an empty line, in their order.
fn turn_starts(text: &str) -> Vec<(usize, &'static str)> {
    let starts = |speaker: &'static str| {
        let found = text.match_indices(speaker).map(|(at, _)| &text[..at]);
        let after_empty_line = found.filter(|before| before.ends_with(EMPTY_LINE));
        after_empty_line.map(move |before| (before.len() - EMPTY_LINE.len(), speaker))
    };
    let mut all: Vec<_> = starts(HUMAN).chain(starts(ASSISTANT)).collect();
    all.sort_unstable();
    all
}

fn begins_with_user(text: &str) -> bool {
    trimmed_start(text).starts_with(HUMAN)
}

/// The text without white space and a byte order mark before it.
fn trimmed_start(text: &str) -> &str {
    text.trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}')
}

fn with_line_feeds(text: &str) -> String {
    text.replace("\r\n", "\n")
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
