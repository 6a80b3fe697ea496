//! Prompts and dialogues in their JSON form.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One message of a dialogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Role of the author, such as `user`; the chat template decides which roles are valid.
    pub role: String,
    /// Content, usually a string; null for a message without any, such as one that only calls a tool.
    #[serde(default)]
    pub content: Value,
    /// Other fields (`tool_calls`, `name`, `reasoning_content`), passed on to the template.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message with text content only.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Self {
        Self {
            role: role.to_owned(),
            content: content.into(),
            extra: Map::new(),
        }
    }
}

/// A dialogue with the other inputs of its chat template.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dialogue {
    /// Messages, oldest first; at least one.
    pub messages: Vec<Message>,
    /// Tools that the assistant may call, as JSON schemas; empty means the template's `tools` is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Value>,
    /// Further template variables, as transformers' `chat_template_kwargs`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub template_kwargs: Map<String, Value>,
}

impl Dialogue {
    /// A dialogue without tools.
    #[must_use]
    pub fn new(messages: Vec<Message>) -> Self {
        Self {
            messages,
            ..Self::default()
        }
    }

    /// A dialogue of one user message.
    #[must_use]
    pub fn of_user(content: &str) -> Self {
        Self::new(vec![Message::new("user", content)])
    }

    /// Whether the last message is the assistant's: the completion then continues it instead of starting a new
    /// message, as transformers' `continue_final_message`.
    #[must_use]
    pub fn continues_final_message(&self) -> bool {
        let last = self.messages.last();
        last.is_some_and(|message| message.role == "assistant")
    }
}

/// A prompt before tokenization: in JSON a string, or a list of objects with `role` and `content`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub enum PromptText {
    /// Text that the model continues, without a chat template.
    Text(String),
    /// A dialogue whose next message is the assistant's; needs a chat template.
    Dialogue(Dialogue),
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
                .map(|messages| Self::Dialogue(Dialogue::new(messages))),
            other => Err(format!(
                "a prompt is a string or a list of messages, not {other}"
            )),
        }
    }
}

/// Serialises a dialogue as one JSON string: postcard is not self-describing and cannot hold JSON values.
pub(crate) mod as_json {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

    use super::Dialogue;

    pub(crate) fn serialize<S: Serializer>(
        dialogue: &Option<Dialogue>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let json = dialogue.as_ref().map(serde_json::to_string).transpose();
        json.map_err(ser::Error::custom)?.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Dialogue>, D::Error> {
        let json = Option::<String>::deserialize(deserializer)?;
        let read = |json: String| serde_json::from_str(&json).map_err(de::Error::custom);
        json.map(read).transpose()
    }
}
