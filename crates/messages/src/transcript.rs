//! Dialogues as plain text, for display and for judges that read text without a chat template.

use std::borrow::Cow;

use serde_json::Value;

use crate::{
    dialogue::{Dialogue, Message, PromptText},
    prompt::Prompt,
};

impl Dialogue {
    /// The dialogue as plain text. A single user message without tools is its content; otherwise the tools as
    /// JSON, then each message as `role: content` with its tool calls as JSON, separated by empty lines.
    #[must_use]
    pub fn transcript(&self) -> String {
        if let ([only], true) = (self.messages.as_slice(), self.tools.is_empty())
            && only.role() == "user"
        {
            return only.text();
        }
        let tools = (!self.tools.is_empty()).then(|| {
            let tools = Value::from(self.tools.clone());
            format!("tools: {tools}")
        });
        let turns = self.messages.iter().map(Message::with_role);
        tools
            .into_iter()
            .chain(turns)
            .collect::<Vec<_>>()
            .join("\n\n")
    }
}

impl Message {
    /// Text of the content: text parts concatenated, other parts as JSON.
    #[must_use]
    pub fn text(&self) -> String {
        match self.content() {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            Value::Array(parts) => parts.iter().map(part_text).collect(),
            other => other.to_string(),
        }
    }

    /// The message as `role: content`, with its tool calls.
    fn with_role(&self) -> String {
        let calls = self.get("tool_calls").map(Value::to_string);
        let text = Some(self.text()).filter(|text| !text.is_empty());
        let parts: Vec<String> = text.into_iter().chain(calls).collect();
        format!("{}: {}", self.role(), parts.join("\n"))
    }
}

fn part_text(part: &Value) -> String {
    let text = part.as_str().or_else(|| part["text"].as_str());
    text.map_or_else(|| part.to_string(), str::to_owned)
}

impl Prompt {
    /// The prompt as plain text: the transcript of its dialogue, or the given text.
    #[must_use]
    pub fn transcript(&self) -> Cow<'_, str> {
        match &self.dialogue {
            Some(dialogue) => dialogue.transcript().into(),
            None => self.text.as_str().into(),
        }
    }
}

impl From<&Prompt> for PromptText {
    /// The prompt in its original form.
    fn from(prompt: &Prompt) -> Self {
        match &prompt.dialogue {
            Some(dialogue) => Self::Dialogue(dialogue.clone()),
            None => Self::Text(prompt.text.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_single_user_message_is_its_text_and_other_dialogues_show_roles() {
        let call = json!([{"function": {"name": "look", "arguments": {"at": "it"}}}]);
        let cases = [
            (
                json!([{"role": "user", "content": " Hi"}]),
                json!([]),
                " Hi",
            ),
            (
                json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]),
                json!([]),
                "system: Be kind.\n\nuser: Hi",
            ),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "image"}]}]),
                json!([]),
                "ab{\"type\":\"image\"}",
            ),
            (
                json!([
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": null, "tool_calls": call},
                    {"role": "assistant", "content": "So"},
                ]),
                json!([{"name": "look"}]),
                "tools: [{\"name\":\"look\"}]\n\nuser: Hi\n\n\
                 assistant: [{\"function\":{\"arguments\":{\"at\":\"it\"},\"name\":\"look\"}}]\n\n\
                 assistant: So",
            ),
        ];
        for (messages, tools, expected) in cases {
            let dialogue: Dialogue =
                serde_json::from_value(json!({"messages": messages, "tools": tools})).unwrap();
            let transcript = dialogue.transcript();
            // Key order depends on features of serde_json.
            let transcript = transcript.replace(
                "\"name\":\"look\",\"arguments\":{\"at\":\"it\"}",
                "\"arguments\":{\"at\":\"it\"},\"name\":\"look\"",
            );
            assert_eq!(transcript, expected);
        }
    }
}
