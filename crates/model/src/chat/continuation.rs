//! Dialogues whose last turn is to be continued: transformers' `continue_final_message`.
//!
//! A mark goes to the end of the last turn's text; the rendered dialogue is cut where it stands.

use serde_json::Value;

/// As in transformers; the space shows whether the template strips its messages.
const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The text of `messages` up to the end of the last one, as `render` renders them with the template
/// `source`.
///
/// # Errors
/// When the last message has no text, or the template does not print it.
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
    text.push_str(MARK);
    let rendered = render(messages)?;
    let place = rendered.rfind(MARK.trim_end());
    let Some(place) = place.filter(|_| rendered.contains(&final_text)) else {
        return Err(format!(
            "the last turn is to be continued, but the template does not print it as it is: {final_text:?}"
        ));
    };
    let before = &rendered[..place];
    Ok(if rendered[place..].starts_with(MARK) {
        before.to_owned()
    } else {
        // The template strips its messages: so must the cut.
        before.trim_end_matches(is_space).to_owned()
    })
}

/// The text of a message's content: the content itself, or that of its last part with a text.
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

/// Python's white space.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}
