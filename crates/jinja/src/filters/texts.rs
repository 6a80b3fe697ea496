//! Filters of strings; another value is printed first.

use std::rc::Rc;

use crate::{
    Error,
    arguments::Given,
    format, limits,
    methods::{Side, padded, strip},
    operators::escaped,
    text,
    value::{Text, Value},
};

type Apply = fn(&Value, Given) -> Result<Value, Error>;

/// The filter of this name, if it is one of strings.
pub(super) fn named(name: &str) -> Option<Apply> {
    Some(match name {
        "capitalize" => |value, given| plain(value, given, "capitalize", text::capitalize),
        "lower" => |value, given| plain(value, given, "lower", str::to_lowercase),
        "upper" => |value, given| plain(value, given, "upper", str::to_uppercase),
        "title" => |value, given| plain(value, given, "title", title),
        "string" => |value, given| {
            given.bind("string", &[])?;
            Ok(Value::Text(soft(value)?))
        },
        "safe" => |value, given| {
            given.bind("safe", &[])?;
            Ok(Value::safe(&value.to_text()?))
        },
        "e" | "escape" => |value, given| {
            given.bind("escape", &[])?;
            let text = soft(value)?;
            Ok(if text.is_safe {
                Value::Text(text)
            } else {
                Value::safe(&escaped(&text.text))
            })
        },
        "forceescape" => |value, given| {
            given.bind("forceescape", &[])?;
            Ok(Value::safe(&escaped(&value.to_text()?)))
        },
        "trim" => |value, given| {
            let given = given.bind("trim", &["chars"])?;
            let text = soft(value)?;
            Ok(text.with(strip(&text.text, "strip", given.some_text(0)?)))
        },
        "center" => |value, given| {
            let given = given.bind("center", &["width"])?;
            let width = usize::try_from(given.int(0, 80)?).unwrap_or(0);
            limits::text(width)?;
            let text = soft(value)?;
            Ok(text.with(&padded(&text.text, width, " ", Side::Both)))
        },
        "replace" => replace,
        "indent" => indent,
        "truncate" => truncate,
        "format" => |value, given| {
            let text = soft(value)?;
            if given.named.is_empty() {
                return format::percent(&text, &Value::tuple(given.positional));
            }
            if !given.positional.is_empty() {
                let message = "can't handle positional and keyword arguments at the same time";
                return Err(Error::new(message));
            }
            format::percent(&text, &Value::dict(crate::methods::dictionary(given)?))
        },
        "wordcount" => |value, given| {
            given.bind("wordcount", &[])?;
            let text = value.to_text()?;
            let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
            Ok(Value::Int(
                words.filter(|word| !word.is_empty()).count() as i128
            ))
        },
        "urlencode" => |value, given| {
            given.bind("urlencode", &[])?;
            match value {
                Value::Text(_) | Value::Int(_) | Value::Float(_) | Value::Bool(_) | Value::None => {
                    Ok(quoted(&value.to_text()?).into())
                }
                _ => Err(Error::unsupported(
                    "the filter urlencode of what is no string",
                )),
            }
        },
        _ => return None,
    })
}

/// A string as it is, and anything else printed.
fn soft(value: &Value) -> Result<Text, Error> {
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
    given: Given,
    name: &'static str,
    apply: fn(&str) -> String,
) -> Result<Value, Error> {
    given.bind(name, &[])?;
    let text = soft(value)?;
    Ok(text.with(&apply(&text.text)))
}

/// Jinja's own titles: a word begins after white space, a hyphen or an opening bracket.
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

fn replace(value: &Value, given: Given) -> Result<Value, Error> {
    let given = given.bind("replace", &["old", "new", "count"])?;
    let (text, old, new) = (
        value.to_text()?,
        given.required(0)?.to_text()?,
        given.required(1)?.to_text()?,
    );
    limits::text(text.len() + text.matches(&*old).count().saturating_mul(new.len()))?;
    Ok(match given.some_int(2)?.map(usize::try_from) {
        Some(Ok(count)) => text.replacen(&*old, &new, count),
        _ => text.replace(&*old, &new),
    }
    .into())
}

fn indent(value: &Value, given: Given) -> Result<Value, Error> {
    let given = given.bind("indent", &["width", "first", "blank"])?;
    let Value::Text(text) = value else {
        value.must_be_defined()?;
        let name = value.type_name();
        return Err(Error::new(format!(
            "indent: a string is needed, not {name}"
        )));
    };
    let indentation = match given.get(0) {
        Some(Value::Text(indentation)) => indentation.text.to_string(),
        _ => {
            let width = usize::try_from(given.int(0, 4)?).unwrap_or(0);
            limits::text(width)?;
            " ".repeat(width)
        }
    };
    let lines = text::lines(&format!("{}\n", text.text), false);
    limits::text(text.text.len() + lines.len().saturating_mul(indentation.len()))?;
    let written = lines.iter().enumerate().map(|(place, line)| {
        let is_indented = if place == 0 {
            given.is_true(1)
        } else {
            given.is_true(2) || !line.is_empty()
        };
        if is_indented {
            format!("{indentation}{line}")
        } else {
            line.clone()
        }
    });
    let written: Vec<String> = written.collect();
    Ok(text.with(&written.join("\n")))
}

fn truncate(value: &Value, given: Given) -> Result<Value, Error> {
    let given = given.bind("truncate", &["length", "killwords", "end", "leeway"])?;
    let text = match value {
        Value::Text(text) => text,
        Value::Undefined(_) => return Ok(value.clone()),
        _ => {
            return Err(Error::unsupported(
                "the filter truncate of what is no string",
            ));
        }
    };
    let (length, leeway) = (given.int(0, 255)?, given.some_int(3)?.unwrap_or(5));
    let end: Rc<str> = given.get(2).map_or(Ok("...".into()), Value::to_text)?;
    let chars: Vec<char> = text.text.chars().collect();
    if (chars.len() as i128) <= length + leeway {
        return Ok(value.clone());
    }
    let kept = usize::try_from(length - end.chars().count() as i128);
    let kept = kept.map_err(|_| Error::new("truncate: the length is shorter than the end"))?;
    let mut cut: String = chars[..kept.min(chars.len())].iter().collect();
    if !given.is_true(1)
        && let Some((words, _)) = cut.rsplit_once(' ')
    {
        cut = words.to_owned();
    }
    Ok(text.with(&(cut + &end)))
}

/// The text as part of an address.
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
