//! Prompts and dialogues as people write them, in JSON.

use serde::Deserialize;
use serde_json::{Map, Value};

/// One turn of a dialogue.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Message {
    /// Who speaks; which names are known is the template's affair.
    pub role: String,
    /// What is said: mostly a string. Null when the turn has none, as one that only calls a tool.
    #[serde(default)]
    pub content: Value,
    /// Whatever else the turn carries (`tool_calls`, `name`, `reasoning_content`), for the template.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn that only says something.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Self {
        Self {
            role: role.to_owned(),
            content: content.into(),
            extra: Map::new(),
        }
    }
}

/// A prompt as people write it: in JSON a string, or a list of objects with `role` and `content`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub enum PromptText {
    /// Text that the model continues as it stands.
    Text(String),
    /// A dialogue whose next turn is the assistant's; it needs a chat template.
    Messages(Vec<Message>),
}

impl TryFrom<Value> for PromptText {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(turns) if turns.is_empty() => Err("the list of messages is empty".into()),
            Value::Array(turns) => turns
                .into_iter()
                .enumerate()
                .map(|(index, turn)| {
                    serde_json::from_value(turn)
                        .map_err(|error| format!("message {index}: {error}"))
                })
                .collect::<Result<_, _>>()
                .map(Self::Messages),
            other => Err(format!(
                "a prompt is a string or a list of messages, not {other}"
            )),
        }
    }
}
