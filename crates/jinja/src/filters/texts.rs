//! Filters of strings; other values are converted to strings first.

use std::rc::Rc;

use crate::{
    arguments::CallArguments,
    error::TemplateError,
    format, limits,
    methods::{Side, padded, strip},
    operators::escaped,
    text,
    value::{Text, Value},
};

type Apply = fn(&Value, CallArguments) -> Result<Value, TemplateError>;

/// Applies the string filter of this name, if there is one.
pub(super) fn named(name: &str) -> Option<Apply> {
    Some(match name {
        "capitalize" => |value, args| plain(value, args, "capitalize", text::capitalize),
        "lower" => |value, args| plain(value, args, "lower", str::to_lowercase),
        "upper" => |value, args| plain(value, args, "upper", str::to_uppercase),
        "title" => |value, args| plain(value, args, "title", title),
        "string" => |value, args| {
            args.bind("string", &[])?;
            Ok(Value::Text(soft(value)?))
        },
        "safe" => |value, args| {
            args.bind("safe", &[])?;
            Ok(Value::safe(&value.to_text()?))
        },
        "e" | "escape" => |value, args| {
            args.bind("escape", &[])?;
            let text = soft(value)?;
            Ok(if text.is_safe {
                Value::Text(text)
            } else {
                Value::safe(&escaped(&text.text))
            })
        },
        "forceescape" => |value, args| {
            args.bind("forceescape", &[])?;
            Ok(Value::safe(&escaped(&value.to_text()?)))
        },
        "trim" => |value, args| {
            let args = args.bind("trim", &["chars"])?;
            let text = soft(value)?;
            Ok(text.with(strip(&text.text, "strip", args.some_text(0)?)))
        },
        "center" => |value, args| {
            let args = args.bind("center", &["width"])?;
            let width = usize::try_from(args.int(0, 80)?).unwrap_or(0);
            limits::text(width)?;
            let text = soft(value)?;
            Ok(text.with(&padded(&text.text, width, " ", Side::Both)))
        },
        "replace" => replace,
        "indent" => indent,
        "truncate" => truncate,
        "format" => |value, args| {
            let text = soft(value)?;
            if args.named.is_empty() {
                return format::percent(&text, &Value::tuple(args.positional));
            }
            if !args.positional.is_empty() {
                let message = "can't handle positional and keyword arguments at the same time";
                return Err(TemplateError::new(message));
            }
            format::percent(&text, &Value::dict(crate::methods::dictionary(args)?))
        },
        "wordcount" => |value, args| {
            args.bind("wordcount", &[])?;
            let text = value.to_text()?;
            let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
            Ok(Value::Int(
                words.filter(|word| !word.is_empty()).count() as i128
            ))
        },
        "urlencode" => |value, args| {
            args.bind("urlencode", &[])?;
            match value {
                Value::Text(_) | Value::Int(_) | Value::Float(_) | Value::Bool(_) | Value::None => {
                    Ok(quoted(&value.to_text()?).into())
                }
                _ => Err(TemplateError::unsupported(
                    "the filter urlencode of what is no string",
                )),
            }
        },
        _ => return None,
    })
}

/// A string unchanged, or the string form of any other value.
fn soft(value: &Value) -> Result<Text, TemplateError> {
    Ok(match value {
        Value::Text(text) => text.clone(),
        other => Text {
            text: other.to_text()?,
            is_safe: false,
        },
    })
}

fn plain(
    value: &Value,
    args: CallArguments,
    name: &'static str,
    apply: fn(&str) -> String,
) -> Result<Value, TemplateError> {
    args.bind(name, &[])?;
    let text = soft(value)?;
    Ok(text.with(&apply(&text.text)))
}

/// jinja2's `title`: words start after whitespace, a hyphen or an opening bracket.
fn title(text: &str) -> String {
    let mut written = String::new();
    let mut begins = true;
    for c in text.chars() {
        let separates = text::is_space(c) || "-({[<".contains(c);
        if begins && !separates {
            written.extend(c.to_uppercase());
        } else {
            written.extend(c.to_lowercase());
        }
        begins = separates;
    }
    written
}

fn replace(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("replace", &["old", "new", "count"])?;
    let (text, old, new) = (
        value.to_text()?,
        args.required(0)?.to_text()?,
        args.required(1)?.to_text()?,
    );
    limits::text(text.len() + text.matches(&*old).count().saturating_mul(new.len()))?;
    Ok(match args.some_int(2)?.map(usize::try_from) {
        Some(Ok(count)) => text.replacen(&*old, &new, count),
        _ => text.replace(&*old, &new),
    }
    .into())
}

fn indent(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("indent", &["width", "first", "blank"])?;
    let Value::Text(text) = value else {
        value.must_be_defined()?;
        let name = value.type_name();
        return Err(TemplateError::new(format!(
            "indent: a string is needed, not {name}"
        )));
    };
    let indentation = match args.get(0) {
        Some(Value::Text(indentation)) => indentation.text.to_string(),
        _ => {
            let width = usize::try_from(args.int(0, 4)?).unwrap_or(0);
            limits::text(width)?;
            " ".repeat(width)
        }
    };
    let whole = format!("{}\n", text.text);
    let mut written = String::new();
    for (position, line) in text::lines(&whole, false).enumerate() {
        let is_indented = if position == 0 {
            args.is_true(1)
        } else {
            written.push('\n');
            args.is_true(2) || !line.is_empty()
        };
        if is_indented {
            written.push_str(&indentation);
        }
        written.push_str(line);
        limits::text(written.len())?;
    }
    Ok(text.with(&written))
}

fn truncate(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("truncate", &["length", "killwords", "end", "leeway"])?;
    let text = match value {
        Value::Text(text) => text,
        Value::Undefined(_) => return Ok(value.clone()),
        _ => {
            return Err(TemplateError::unsupported(
                "the filter truncate of what is no string",
            ));
        }
    };
    let (length, leeway) = (args.int(0, 255)?, args.some_int(3)?.unwrap_or(5));
    let end: Rc<str> = args.get(2).map_or(Ok("...".into()), Value::to_text)?;
    let chars: Vec<char> = text.text.chars().collect();
    if (chars.len() as i128) <= length.saturating_add(leeway) {
        return Ok(value.clone());
    }
    let kept = usize::try_from(length.saturating_sub(end.chars().count() as i128));
    let kept =
        kept.map_err(|_| TemplateError::new("truncate: the length is shorter than the end"))?;
    let mut cut: String = chars[..kept.min(chars.len())].iter().collect();
    if !args.is_true(1)
        && let Some((words, _)) = cut.rsplit_once(' ')
    {
        cut = words.to_owned();
    }
    Ok(text.with(&(cut + &end)))
}

/// URL-encodes a text.
fn quoted(text: &str) -> String {
    let mut written = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"_.-~/".contains(&byte) {
            written.push(byte.into());
        } else {
            written.push_str(&format!("%{byte:02X}"));
        }
    }
    written
}
