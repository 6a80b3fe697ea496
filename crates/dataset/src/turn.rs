//! Parser of a dialogue turn in the common formats.

use messages::{Dialogue, Message, PromptText};
use serde_json::{Map, Value, json};

/// Keys of an assistant turn whose content is part of the answer in addition to its text.
const NON_TEXT_KEYS: [&str; 4] = [
    "tool_calls",
    "function_call",
    "reasoning_content",
    "thinking",
];

/// Keys of a turn that say whether it is trained on: OpenAI's `weight`, 0 or 1, and `train` of ShareGPT's form (axolotl).
const TRAINING_KEYS: [&str; 2] = ["weight", "train"];

/// Parses the turns of a list, or the single turn of an object.
pub(crate) fn turns(value: &Value) -> Result<Vec<Message>, String> {
    match value {
        Value::Array(turns) if turns.is_empty() => Err("the list of messages is empty".into()),
        Value::Array(turns) => {
            let numbered = (1..).zip(turns);
            let read =
                |(number, value)| turn(value).map_err(|reason| format!("turn {number}: {reason}"));
            numbered.map(read).collect()
        }
        Value::Object(_) => Ok(vec![turn(value)?]),
        other => Err(format!("{} is neither text nor messages", shortened(other))),
    }
}

/// Whether a value has the type of messages.
pub(crate) fn is_messages(value: &Value) -> bool {
    value.is_array() || value.is_object()
}

/// Role of the first turn and number of turns of a value with the type of messages.
pub(crate) fn first_role(value: &Value) -> Option<(String, usize)> {
    let (first, count) = match value {
        Value::Array(turns) => (turns.first()?, turns.len()),
        Value::Object(_) => (value, 1),
        _ => return None,
    };
    role(first.as_object()?).ok().map(|role| (role, count))
}

fn turn(value: &Value) -> Result<Message, String> {
    let Value::Object(turn) = value else {
        return Err(format!(
            "{} is not a message, as in {{\"role\": \"user\", \"content\": \"...\"}}",
            shortened(value)
        ));
    };
    let role = role(turn)?;
    let content = present(turn, "content").or_else(|| present(turn, "value"));
    let content = content.cloned().unwrap_or_default();
    if is_function_call(turn) {
        return Ok(function_call(&content));
    }
    // Keys stay in their order, which templates print; ShareGPT's come last under their new names, as in TRL. Null keys
    // of the turn are removed, as in transformers; nulls nested in a call are kept.
    let mut fields = turn.clone();
    fields.retain(|key, value| match key.as_str() {
        "from" | "value" => false,
        "content" => true,
        _ => !value.is_null(),
    });
    fields.insert("role".into(), role.into());
    fields.insert("content".into(), checked(content)?);
    let message = Message::try_from(fields)?;
    let has_other_content = NON_TEXT_KEYS.iter().any(|key| message.get(key).is_some());
    match message.content().is_null() && !has_other_content {
        true => Err(format!("the turn of the {} has no content", message.role())),
        false => Ok(message),
    }
}

/// The value of `key`, if not null.
pub(crate) fn present<'a>(row: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    row.get(key).filter(|value| !value.is_null())
}

/// The role: `role` unchanged, or ShareGPT's `from` mapped to the role names of chat templates.
fn role(turn: &Map<String, Value>) -> Result<String, String> {
    let text = |value: &Value| {
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| format!("the role {} is not text", shortened(value)))
    };
    match (present(turn, "role"), present(turn, "from")) {
        (Some(role), _) => text(role),
        (None, Some(from)) => role_of_sharegpt(&text(from)?).map(str::to_owned),
        (None, None) => {
            Err("a message needs \"role\" and \"content\", or \"from\" and \"value\"".into())
        }
    }
}

/// Maps ShareGPT's names to roles as LLaMA-Factory and axolotl do.
fn role_of_sharegpt(from: &str) -> Result<&'static str, String> {
    Ok(match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" | "function-response" => "tool",
        "function_call" | "function-call" | "tool_call" => "assistant",
        other => {
            return Err(format!(
                "unknown speaker {other:?}: \"from\" must be human, gpt, system, function_call, observation or tool"
            ));
        }
    })
}

fn is_function_call(turn: &Map<String, Value>) -> bool {
    let from = present(turn, "from").and_then(Value::as_str);
    present(turn, "role").is_none()
        && matches!(from, Some("function_call" | "function-call" | "tool_call"))
}

/// Converts ShareGPT's function call, JSON `{"name", "arguments"}` or a list of such, to `tool_calls`; anything else is
/// the assistant's text.
fn function_call(content: &Value) -> Message {
    let text = match content {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
    let calls = match parsed {
        Value::Array(calls) => calls,
        other => vec![other],
    };
    let tool_calls: Option<Vec<Value>> = calls.iter().map(call).collect();
    match tool_calls {
        Some(calls) if !calls.is_empty() => Message::new("assistant", "").with("tool_calls", calls),
        _ => Message::new("assistant", text),
    }
}

fn call(value: &Value) -> Option<Value> {
    let name = value.get("name")?.as_str()?;
    let arguments = match value.get("arguments") {
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
        Some(other) => other.clone(),
        None => json!({}),
    };
    Some(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// Validates content as text, a list of text parts, or none; removes nulls from parts.
fn checked(mut content: Value) -> Result<Value, String> {
    without_nulls(&mut content);
    match &content {
        Value::Null | Value::String(_) => {}
        Value::Array(parts) => parts.iter().try_for_each(text_part)?,
        other => return Err(format!("the content {} is not text", shortened(other))),
    }
    Ok(content)
}

fn text_part(part: &Value) -> Result<(), String> {
    let kind = part.get("type").and_then(Value::as_str);
    let text = part.get("text").and_then(Value::as_str);
    match (kind, text) {
        (Some("text"), Some(_)) => Ok(()),
        (Some(kind), _) if kind != "text" => Err(format!(
            "the content has a part of type {kind:?}, and only text is supported: remove such rows"
        )),
        _ => Err(format!(
            "the content has the part {}, which is not {{\"type\": \"text\", \"text\": \"...\"}}",
            shortened(part)
        )),
    }
}

/// Removes nulls from objects: Arrow gives all objects of a column the same keys (TRL: `remove_none_values`).
pub(crate) fn without_nulls(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(without_nulls),
        Value::Object(values) => {
            values.retain(|_, value| !value.is_null());
            values.values_mut().for_each(without_nulls);
        }
        _ => {}
    }
}

/// The text of an answer: an assistant turn that consists of text only.
pub(crate) fn answer(turn: &Message) -> Result<String, String> {
    if turn.role() != "assistant" {
        return Err(format!(
            "the last turn is the {}'s ({}), not an answer of the assistant: remove the turns after the answer",
            turn.role(),
            shortened(turn.content())
        ));
    }
    let is_filled =
        |value: &Value| !matches!(value, Value::Array(all) if all.is_empty()) && *value != "";
    let non_text = NON_TEXT_KEYS
        .iter()
        .find(|key| turn.get(key).is_some_and(is_filled));
    if let Some(key) = non_text {
        return Err(format!(
            "the answer has {key:?} in addition to its text, and only text is supported: include it in the content, or remove such rows"
        ));
    }
    match turn.content() {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
            Ok(texts.collect())
        }
        other => Err(format!("the content {other} of the answer is not text")),
    }
}

/// Checks that the last turn of messages, the answer, is not marked as one that is not trained on.
pub(crate) fn check_trained_on(value: &Value) -> Result<(), String> {
    let (number, last) = match value {
        Value::Array(turns) => (turns.len(), turns.last()),
        single => (1, Some(single)),
    };
    let mark = |key: &&'static str| {
        let mark = last?.get(key)?;
        let is_off = mark == &Value::Bool(false) || mark.as_f64() == Some(0.0);
        is_off.then_some((*key, mark))
    };
    match TRAINING_KEYS.iter().find_map(mark) {
        None => Ok(()),
        Some((key, mark)) => Err(format!(
            "turn {number} is the answer, and its {key:?} is {mark}: it is not to be trained on; remove the row, or the key \
             {key:?}"
        )),
    }
}

/// Parses a prompt outside a row: text, or messages in any of the formats.
///
/// # Errors
/// When it is neither, or a turn is malformed or not text.
pub fn prompt(value: &Value) -> Result<PromptText, String> {
    match value {
        Value::String(text) => Ok(PromptText::Text(text.clone())),
        Value::Array(_) => prompt_of(turns(value)?),
        other => Err(format!(
            "a prompt is a string or a list of messages, not {}",
            shortened(other)
        )),
    }
}

/// A prompt of these turns.
///
/// # Errors
/// When there are no turns, or the last is the system's.
pub(crate) fn prompt_of(turns: Vec<Message>) -> Result<PromptText, String> {
    match turns.last().map(Message::role) {
        None => Err("there is no turn before the answer".into()),
        Some(role @ ("system" | "developer")) => Err(format!(
            "the last turn of the prompt is the {role}'s: it must be a user's, a tool's or the assistant's"
        )),
        Some(_) => Ok(PromptText::Dialogue(Dialogue::new(turns))),
    }
}

/// The value, truncated for an error message.
pub(crate) fn shortened(value: &Value) -> String {
    const MAX_CHARACTERS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(value: &Value) -> Result<Message, String> {
        turns(value).map(|mut turns| turns.remove(0))
    }

    #[test]
    fn sharegpt_names_are_mapped_to_roles() {
        for (from, role) in [
            ("human", "user"),
            ("user", "user"),
            ("gpt", "assistant"),
            ("assistant", "assistant"),
            ("system", "system"),
            ("tool", "tool"),
            ("observation", "tool"),
            ("function_response", "tool"),
        ] {
            let turn = one(&json!({"from": from, "value": "x"}));
            assert_eq!(turn, Ok(Message::new(role, "x")), "{from}");
        }
        let error = one(&json!({"from": "gtp", "value": "x"})).expect_err("an unknown speaker");
        assert!(error.contains("unknown speaker \"gtp\""), "{error}");
        // Mixed keys, as TRL's maybe_convert_to_chatml takes them; a role is left as it is.
        assert_eq!(
            one(&json!({"role": "ipython", "value": "x"})),
            Ok(Message::new("ipython", "x"))
        );
    }

    #[test]
    fn function_calls_are_converted_to_tool_calls() {
        let expected = json!([{"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}]);
        for value in [
            json!("{\"name\": \"now\", \"arguments\": {\"zone\": \"UTC\"}}"),
            json!("[{\"name\": \"now\", \"arguments\": \"{\\\"zone\\\": \\\"UTC\\\"}\"}]"),
        ] {
            let turn = one(&json!({"from": "function_call", "value": value})).expect("a call");
            assert_eq!(
                (turn.role(), turn.get("tool_calls")),
                ("assistant", Some(&expected))
            );
        }
        let turn = one(&json!({"from": "function_call", "value": "{}"}));
        assert_eq!(turn, Ok(Message::new("assistant", "{}")));
    }

    #[test]
    fn null_keys_of_a_turn_are_removed() {
        let turn =
            one(&json!({"role": "assistant", "content": "x", "tool_calls": null, "name": null}));
        assert_eq!(turn, Ok(Message::new("assistant", "x")));
        let calls = json!([{"function": {"name": "f", "arguments": {"a": 1, "b": null}}}]);
        let turn = one(&json!({"role": "assistant", "content": null, "tool_calls": calls}))
            .expect("a call");
        assert_eq!(
            turn.get("tool_calls"),
            Some(&calls),
            "an argument may be null"
        );
    }

    #[test]
    fn a_prompt_is_text_or_messages() {
        let dialogue = PromptText::Dialogue(Dialogue::of_user("hi"));
        for (value, expected) in [
            (json!("hi"), Ok(PromptText::Text("hi".into()))),
            (
                json!([{"role": "user", "content": "hi"}]),
                Ok(dialogue.clone()),
            ),
            (json!([{"from": "human", "value": "hi"}]), Ok(dialogue)),
            (
                json!([{"role": "user", "content": [{"type": "image"}]}]),
                Err("type \"image\""),
            ),
            (
                json!([{"role": "system", "content": "hi"}]),
                Err("the system's"),
            ),
            (json!([]), Err("the list of messages is empty")),
            (json!(3), Err("a prompt is a string or a list")),
        ] {
            match (prompt(&value), expected) {
                (Err(error), Err(text)) => assert!(error.contains(text), "{error}"),
                (read, expected) => assert_eq!(read, expected.map_err(str::to_owned), "{value}"),
            }
        }
    }

    #[test]
    fn only_text_content_is_accepted() {
        let text = json!({"type": "text", "text": "x", "image": null});
        let turn = one(&json!({"role": "assistant", "content": [text, text]})).expect("text");
        assert_eq!(turn.content()[0], json!({"type": "text", "text": "x"}));
        assert_eq!(answer(&turn), Ok("xx".into()));
        for (turn, expected) in [
            (
                json!({"role": "user", "content": [{"type": "image"}]}),
                "type \"image\"",
            ),
            (
                json!({"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": "x"}}]}),
                "type \"image_url\"",
            ),
            (json!({"role": "user", "content": ["x"]}), "the part \"x\""),
            (
                json!({"role": "user", "content": 3}),
                "the content 3 is not text",
            ),
            (
                json!({"role": "user"}),
                "the turn of the user has no content",
            ),
            (json!({"content": "x"}), "needs \"role\""),
            (json!(["x"]), "\"x\" is not a message"),
            (json!([]), "the list of messages is empty"),
        ] {
            let error = one(&turn).expect_err(expected);
            assert!(error.contains(expected), "{turn}: {error}");
        }
    }

    #[test]
    fn an_answer_consists_of_text_only() {
        for (turn, expected) in [
            (
                json!({"role": "user", "content": "thanks"}),
                "the last turn is the user's (\"thanks\")",
            ),
            (
                json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}),
                "\"tool_calls\" in addition to its text",
            ),
            (
                json!({"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}),
                "\"reasoning_content\" in addition",
            ),
        ] {
            let error = answer(&one(&turn).expect("a turn")).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
        let plain =
            json!({"role": "assistant", "content": "4", "tool_calls": [], "reasoning_content": ""});
        assert_eq!(answer(&one(&plain).expect("a turn")), Ok("4".into()));
    }
}
