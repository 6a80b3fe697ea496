//! Rendering of dialogues whose last turn is continued: transformers' `continue_final_message`.
//!
//! A marker is appended to the last turn's text, and the rendered dialogue is cut at the marker.

use serde_json::Value;

/// The marker of transformers; its trailing space shows whether the template strips messages.
const MARKER: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Renders `messages` up to the end of the last one, with `render` and the template `source`.
///
/// # Errors
/// When the last message has no text, or the template does not render it verbatim.
pub(super) fn rendered(
    source: &str,
    mut messages: Vec<Value>,
    render: impl FnOnce(Vec<Value>) -> Result<String, String>,
) -> Result<String, String> {
    let last = messages.last_mut().map(|message| &mut message["content"]);
    let text = last.and_then(last_text);
    let text = text.ok_or("the last turn, which is to be continued, has no text as its content")?;
    if !source.contains("content") {
        return Err("the last turn is to be continued, but the template reads no content".into());
    }
    let final_text = strip(text).to_owned();
    text.push_str(MARKER);
    let rendered = render(messages)?;
    let end = rendered.rfind(MARKER.trim_end());
    let Some(end) = end.filter(|_| rendered.contains(&final_text)) else {
        return Err(format!(
            "the last turn is to be continued, but the template does not print it as it is: {final_text:?}"
        ));
    };
    let before = &rendered[..end];
    Ok(if rendered[end..].starts_with(MARKER) {
        before.to_owned()
    } else {
        // The template strips messages, so trailing white space is stripped here too.
        before.trim_end_matches(is_space).to_owned()
    })
}

/// Text of a message's content: the content itself or its last text part.
fn last_text(content: &mut Value) -> Option<&mut String> {
    match content {
        Value::String(text) => Some(text),
        Value::Array(parts) => {
            let mut parts = parts.iter_mut().rev();
            match parts
                .find(|part| part.get("text").is_some())?
                .get_mut("text")?
            {
                Value::String(text) => Some(text),
                _ => None,
            }
        }
        _ => None,
    }
}

/// White space as defined by Python.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}
