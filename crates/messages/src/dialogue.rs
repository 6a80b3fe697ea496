//! Prompts and dialogues in their JSON form.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

const ROLE: &str = "role";
const CONTENT: &str = "content";

/// One message of a dialogue: a JSON object with a role and a content, whose keys stay in the order in which they were
/// given, since a chat template may print the whole object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct Message {
    /// `role` is a string; `content` is always there, null if the message has none.
    fields: Map<String, Value>,
}

impl Message {
    /// A message with a role and a content, usually a string.
    #[must_use]
    pub fn new(role: &str, content: impl Into<Value>) -> Self {
        let fields = [(ROLE, role.into()), (CONTENT, content.into())];
        let named = fields.map(|(name, value)| (name.to_owned(), value));
        Self {
            fields: Map::from_iter(named),
        }
    }

    /// The message with this key in addition.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(key.to_owned(), value.into());
        self
    }

    /// Role of the author, such as `user`; the chat template decides which roles are valid.
    #[must_use]
    pub fn role(&self) -> &str {
        self.fields[ROLE].as_str().unwrap_or_default()
    }

    /// Content, usually a string; null for a message without any, such as one that only calls a tool.
    #[must_use]
    pub fn content(&self) -> &Value {
        &self.fields[CONTENT]
    }

    /// The content, to be changed.
    pub fn content_mut(&mut self) -> &mut Value {
        &mut self.fields[CONTENT]
    }

    /// The value of a key, if not null.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// All keys with their values, in the order in which they were given.
    #[must_use]
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }
}

impl TryFrom<Map<String, Value>> for Message {
    type Error = String;

    fn try_from(mut fields: Map<String, Value>) -> Result<Self, String> {
        match fields.get(ROLE) {
            Some(Value::String(_)) => {
                fields.entry(CONTENT).or_insert(Value::Null);
                Ok(Self { fields })
            }
            Some(other) => Err(format!("the role {other} is not text")),
            None => Err("missing field `role`".into()),
        }
    }
}

impl From<Message> for Map<String, Value> {
    fn from(message: Message) -> Self {
        message.fields
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
        last.is_some_and(|message| message.role() == "assistant")
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
