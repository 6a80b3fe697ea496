//! One prompt, a preferred response and another.

use messages::{Dialogue, Message, PromptText};
use serde_json::Value;

/// Where an assistant's turn begins in dialogues written as text (Anthropic's HH).
const ASSISTANT: &str = "\n\nAssistant:";

/// Which columns of a row hold what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// The prompt; a row without it has one implicitly: what both dialogues begin with.
    pub prompt: String,
    /// The preferred response, or the dialogue that ends with it.
    pub chosen: String,
    /// The other.
    pub rejected: String,
}

/// One prompt, a preferred response and another.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// What was asked.
    pub prompt: PromptText,
    /// The preferred response.
    pub chosen: String,
    /// The other.
    pub rejected: String,
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            prompt: "prompt".into(),
            chosen: "chosen".into(),
            rejected: "rejected".into(),
        }
    }
}

/// A response alone, or a dialogue that ends with one.
enum Side {
    Text(String),
    Messages(Vec<Message>),
}

impl Pair {
    /// Reads a row in one of these forms, each side as text or as messages (`role` and `content`, or
    /// ShareGPT's `from` and `value`):
    /// `{"prompt", "chosen", "rejected"}`; `{"chosen", "rejected"}`, whole dialogues, whose prompt is what
    /// both begin with, up to the last turn of the assistant; `{"conversations", "chosen", "rejected"}`. A
    /// response may be empty, as some in real data are.
    ///
    /// # Errors
    /// What is missing or malformed, in words.
    pub fn from_row(row: &Value, columns: &Columns) -> Result<Self, String> {
        let side = |column: &str| {
            let value = row
                .get(column)
                .ok_or_else(|| format!("there is no column {column:?}"))?;
            Side::read(value).map_err(|reason| format!("column {column:?}: {reason}"))
        };
        let (chosen, rejected) = (side(&columns.chosen)?, side(&columns.rejected)?);
        let prompt = row
            .get(&columns.prompt)
            .or_else(|| row.get("conversations"));
        match prompt {
            Some(prompt) => Ok(Self {
                prompt: prompt_of(prompt).map_err(|reason| format!("the prompt: {reason}"))?,
                chosen: chosen.response()?,
                rejected: rejected.response()?,
            }),
            None => implicit(chosen, rejected),
        }
    }
}

impl Side {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self::Text(text.clone())),
            Value::Array(turns) => Ok(Self::Messages(messages(turns)?)),
            Value::Object(_) => Ok(Self::Messages(vec![message(value)?])),
            other => Err(format!("{other} is neither text nor messages")),
        }
    }

    /// The response alone, where the prompt stands in a column of its own.
    fn response(self) -> Result<String, String> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Messages(mut turns) => said(&turns.pop().ok_or("there is no turn")?),
        }
    }
}

/// A response as text, or as messages that end with it.
pub(crate) fn response_of(value: &Value) -> Result<String, String> {
    Side::read(value)?.response()
}

/// The prompt that two dialogues share: all before the last turn of the assistant.
fn implicit(chosen: Side, rejected: Side) -> Result<Pair, String> {
    match (chosen, rejected) {
        (Side::Text(chosen), Side::Text(rejected)) => {
            let cut = chosen
                .match_indices(ASSISTANT)
                .map(|(place, _)| place + ASSISTANT.len())
                .take_while(|&cut| rejected.get(..cut) == chosen.get(..cut))
                .last()
                .ok_or(
                    "there is no \"prompt\", and the dialogues share no turn of an \"Assistant:\"",
                )?;
            Ok(Pair {
                prompt: PromptText::Text(chosen[..cut].to_owned()),
                chosen: chosen[cut..].to_owned(),
                rejected: rejected[cut..].to_owned(),
            })
        }
        (Side::Messages(mut chosen), Side::Messages(mut rejected)) => {
            let (good, bad) = (chosen.pop(), rejected.pop());
            if chosen.is_empty() || chosen != rejected {
                return Err(
                    "there is no \"prompt\", and the dialogues differ before their last turn"
                        .into(),
                );
            }
            let last = |turn: Option<Message>| said(&turn.ok_or("there is no turn")?);
            Ok(Pair {
                prompt: PromptText::Dialogue(Dialogue::new(chosen)),
                chosen: last(good)?,
                rejected: last(bad)?,
            })
        }
        _ => Err("one side is text and the other messages".into()),
    }
}

/// A prompt as text or as messages.
pub(crate) fn prompt_of(value: &Value) -> Result<PromptText, String> {
    match value {
        Value::Array(turns) if !turns.is_empty() => {
            Ok(PromptText::Dialogue(Dialogue::new(messages(turns)?)))
        }
        other => PromptText::try_from(other.clone()),
    }
}

pub(crate) fn messages(turns: &[Value]) -> Result<Vec<Message>, String> {
    turns.iter().map(message).collect()
}

fn message(turn: &Value) -> Result<Message, String> {
    if let (Some(from), Some(value)) = (turn.get("from"), turn.get("value")) {
        let role = match from.as_str() {
            Some("human" | "user") => "user",
            Some("gpt" | "assistant") => "assistant",
            Some("system") => "system",
            _ => return Err(format!("nobody knows who {from} is")),
        };
        let content = value
            .as_str()
            .ok_or_else(|| format!("{value} is not text"))?;
        return Ok(Message::new(role, content));
    }
    serde_json::from_value(turn.clone()).map_err(|error| error.to_string())
}

/// What a turn says.
pub(crate) fn said(turn: &Message) -> Result<String, String> {
    let text = turn.content.as_str();
    text.map(str::to_owned)
        .ok_or_else(|| format!("the last turn says {}, which is not text", turn.content))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(row: &Value) -> Result<(PromptText, String, String), String> {
        Pair::from_row(row, &Columns::default())
            .map(|pair| (pair.prompt, pair.chosen, pair.rejected))
    }

    fn text(prompt: &str, chosen: &str, rejected: &str) -> (PromptText, String, String) {
        (
            PromptText::Text(prompt.into()),
            chosen.into(),
            rejected.into(),
        )
    }

    #[test]
    fn every_form_of_the_field_is_read() {
        let asked = PromptText::Dialogue(Dialogue::of_user("q"));
        let user = json!({"role": "user", "content": "q"});
        let says = |what: &str| json!({"role": "assistant", "content": what});
        let dialogues = (asked, "a".to_owned(), "b".to_owned());
        let cases = [
            (
                json!({"prompt": "q", "chosen": "a", "rejected": "b"}),
                text("q", "a", "b"),
            ),
            (
                json!({"prompt": [user], "chosen": [says("a")], "rejected": [says("b")]}),
                dialogues.clone(),
            ),
            (
                json!({"chosen": [user, says("a")], "rejected": [user, says("b")]}),
                dialogues.clone(),
            ),
            (
                json!({"conversations": [{"from": "human", "value": "q"}],
                    "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}),
                dialogues,
            ),
            (
                json!({"chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
                    "rejected": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: b"}),
                text(
                    "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:",
                    " a",
                    " b",
                ),
            ),
            (
                json!({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b\n\nHuman: r\n\nAssistant: c"}),
                text(
                    "\n\nHuman: q\n\nAssistant:",
                    " a",
                    " b\n\nHuman: r\n\nAssistant: c",
                ),
            ),
        ];
        for (row, expected) in cases {
            assert_eq!(read(&row), Ok(expected), "{row}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (row, expected) in [
            (
                json!({"prompt": "q", "chosen": "a"}),
                "no column \"rejected\"",
            ),
            (
                json!({"prompt": 1, "chosen": "a", "rejected": "b"}),
                "a prompt is a string",
            ),
            (json!({"chosen": "a", "rejected": "b"}), "share no turn"),
            (
                json!({"chosen": [{"role": "user", "content": "q"}], "rejected": "b"}),
                "the other messages",
            ),
            (
                json!({"prompt": "q", "chosen": 3, "rejected": "b"}),
                "neither text nor messages",
            ),
        ] {
            let error = read(&row).expect_err(expected);
            assert!(error.contains(expected), "{row}: {error}");
        }
    }
}
