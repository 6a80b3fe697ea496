//! Methods of strings.

use std::borrow::Cow;

use crate::{
    arguments::{BoundArguments, CallArguments},
    error::TemplateError,
    format, limits,
    operators::{escaped, slice_indices},
    text::{self, is_space},
    value::{Text, Value},
};

/// `str.format_map`.
fn format_map(string: &Text, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("format_map", &["map"])?;
    let Value::Dict(dict) = args.required(0)? else {
        return Err(TemplateError::unsupported(
            "format_map of what is no dictionary",
        ));
    };
    let named = dict.pairs.iter();
    let named = named.filter_map(|(key, value)| Some((key.as_str()?.to_owned(), value.clone())));
    let args = CallArguments {
        positional: Vec::new(),
        named: named.collect(),
    };
    format::braces(string, &args)
}

/// Evaluates `string.name(…)`.
pub(super) fn call(
    string: &Text,
    name: &'static str,
    args: CallArguments,
) -> Result<Value, TemplateError> {
    let s: &str = &string.text;
    let plain = |args: CallArguments| args.bind(name, &[]).map(drop);
    match name {
        "format" => return format::braces(string, &args),
        "format_map" => return format_map(string, args),
        "join" => return join(string, args),
        "strip" | "lstrip" | "rstrip" => {
            let args = args.bind(name, &["chars"])?;
            return Ok(string.with(strip(s, name, args.some_text(0)?)));
        }
        "split" | "rsplit" => return split(string, name, args),
        "partition" | "rpartition" => return partition(string, name, args),
        "startswith" | "endswith" => return has_affix(string, name, args),
        "find" | "rfind" | "index" | "rindex" | "count" => return search(string, name, args),
        "center" | "ljust" | "rjust" => return justify(string, name, args),
        "replace" => return replace(string, args),
        "removeprefix" | "removesuffix" => {
            let args = args.bind(name, &["affix"])?;
            let affix = args.text(0)?;
            let cut = if name == "removeprefix" {
                s.strip_prefix(affix)
            } else {
                s.strip_suffix(affix)
            };
            return Ok(string.with(cut.unwrap_or(s)));
        }
        "splitlines" => {
            let args = args.bind(name, &["keepends"])?;
            let lines = limits::collect(text::lines(s, args.is_true(0)))?;
            let lines = lines.into_iter().map(|line| string.with(line));
            return Ok(Value::list(lines.collect()));
        }
        "zfill" => {
            let args = args.bind(name, &["width"])?;
            args.required(0)?;
            let width = usize::try_from(args.int(0, 0)?).unwrap_or(0);
            limits::text(width)?;
            return Ok(string.with(&zero_filled(s, width)));
        }
        "expandtabs" => {
            let args = args.bind(name, &["tabsize"])?;
            let size = usize::try_from(args.int(0, 8)?).unwrap_or(0);
            limits::text(s.len() + s.matches('\t').count().saturating_mul(size))?;
            return Ok(string.with(&expand_tabs(s, size)));
        }
        "encode" | "maketrans" | "translate" => {
            return Err(TemplateError::unsupported(&format!(
                "the method {name} of strings"
            )));
        }
        _ => plain(args)?,
    }
    match name {
        "lower" => Ok(string.with(&s.to_lowercase())),
        "casefold" => Ok(string.with(&s.to_lowercase().replace('ß', "ss").replace('ς', "σ"))),
        "upper" => Ok(string.with(&s.to_uppercase())),
        "capitalize" => Ok(string.with(&text::capitalize(s))),
        "title" => Ok(string.with(&text::title(s))),
        "swapcase" => Ok(string.with(&swap_case(s))),
        _ => is(s, name).map(Value::Bool),
    }
}

fn swap_case(s: &str) -> String {
    let swapped = |c: char| -> String {
        if c.is_uppercase() {
            c.to_lowercase().collect()
        } else {
            c.to_uppercase().collect()
        }
    };
    s.chars().map(swapped).collect()
}

/// Predicates of a string, such as `isdigit`.
fn is(s: &str, name: &str) -> Result<bool, TemplateError> {
    let all = |holds: fn(char) -> bool| !s.is_empty() && s.chars().all(holds);
    let (has_lower, has_upper) = (
        s.chars().any(char::is_lowercase),
        s.chars().any(char::is_uppercase),
    );
    let is_digits = || {
        let is_known = |c: char| c.is_ascii() || !c.is_numeric();
        if s.chars().all(is_known) {
            return Ok(all(|c| c.is_ascii_digit()));
        }
        Err(TemplateError::unsupported(&format!(
            "{name} of digits beyond ASCII"
        )))
    };
    Ok(match name {
        "isalnum" => all(char::is_alphanumeric),
        "isalpha" => all(char::is_alphabetic),
        "isascii" => s.is_ascii(),
        "isdecimal" | "isdigit" => is_digits()?,
        "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "islower" => has_lower && !has_upper,
        "isupper" => has_upper && !has_lower,
        "istitle" => text::is_title(s),
        "isprintable" => s.chars().all(text::is_printable),
        "isidentifier" => {
            let first = s
                .chars()
                .next()
                .is_some_and(|c| c.is_alphabetic() || c == '_');
            first && s.chars().all(|c| c.is_alphanumeric() || c == '_')
        }
        _ => {
            return Err(TemplateError::unsupported(&format!(
                "the method {name} of strings"
            )));
        }
    })
}

/// `strip`, `lstrip` or `rstrip` of `chars` or whitespace.
pub(crate) fn strip<'a>(s: &'a str, name: &str, chars: Option<&str>) -> &'a str {
    let goes = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => is_space(c),
    };
    match name {
        "lstrip" => s.trim_start_matches(goes),
        "rstrip" => s.trim_end_matches(goes),
        _ => s.trim_matches(goes),
    }
}

fn join(string: &Text, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("join", &["iterable"])?;
    let mut joined = String::new();
    for (position, item) in args.required(0)?.iterate()?.iter().enumerate() {
        let Value::Text(part) = item else {
            let name = item.type_name();
            let message = format!("sequence item {position}: expected str instance, {name} found");
            return Err(TemplateError::new(message));
        };
        limits::text(joined.len() + string.text.len() + part.text.len())?;
        if position > 0 {
            joined.push_str(&string.text);
        }
        match string.is_safe && !part.is_safe {
            true => joined.push_str(&escaped(&part.text)),
            false => joined.push_str(&part.text),
        }
    }
    Ok(string.with(&joined))
}

fn split(string: &Text, name: &'static str, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind(name, &["sep", "maxsplit"])?;
    let most = usize::try_from(args.int(1, -1)?).ok();
    let s: &str = &string.text;
    let most = most.unwrap_or(usize::MAX - 1);
    let parts: Vec<&str> = match (args.some_text(0)?, name) {
        (Some(""), _) => return Err(TemplateError::new("empty separator")),
        (Some(sep), "split") => limits::collect(s.splitn(most.saturating_add(1), sep))?,
        (Some(sep), _) => {
            let mut parts = limits::collect(s.rsplitn(most.saturating_add(1), sep))?;
            parts.reverse();
            parts
        }
        (None, "split") => split_at_space(s, most)?,
        (None, _) => rsplit_at_space(s, most)?,
    };
    Ok(Value::list(
        parts.into_iter().map(|part| string.with(part)).collect(),
    ))
}

/// Splits at whitespace at most `most` times, from the left.
fn split_at_space(s: &str, most: usize) -> Result<Vec<&str>, TemplateError> {
    let (mut parts, mut rest) = (Vec::new(), s.trim_start_matches(is_space));
    while !rest.is_empty() {
        let cut = rest.find(is_space).filter(|_| parts.len() < most);
        let Some(position) = cut else {
            // The rest keeps its inner whitespace.
            let last = if parts.len() < most {
                rest.trim_end_matches(is_space)
            } else {
                rest
            };
            parts.push(last);
            break;
        };
        parts.push(&rest[..position]);
        limits::items(parts.len())?;
        rest = rest[position..].trim_start_matches(is_space);
    }
    Ok(parts)
}

/// Splits at whitespace at most `most` times, from the right.
fn rsplit_at_space(s: &str, most: usize) -> Result<Vec<&str>, TemplateError> {
    let (mut parts, mut rest) = (Vec::new(), s.trim_end_matches(is_space));
    while !rest.is_empty() {
        let cut = rest.rfind(is_space).filter(|_| parts.len() < most);
        let Some(position) = cut else {
            parts.push(if parts.len() < most {
                rest.trim_start_matches(is_space)
            } else {
                rest
            });
            break;
        };
        let after = position + rest[position..].chars().next().map_or(1, char::len_utf8);
        parts.push(&rest[after..]);
        limits::items(parts.len())?;
        rest = rest[..position].trim_end_matches(is_space);
    }
    parts.reverse();
    Ok(parts)
}

fn partition(
    string: &Text,
    name: &'static str,
    args: CallArguments,
) -> Result<Value, TemplateError> {
    let args = args.bind(name, &["sep"])?;
    let (s, sep): (&str, _) = (&string.text, args.text(0)?);
    if sep.is_empty() {
        return Err(TemplateError::new("empty separator"));
    }
    let (before, found, after) = match name {
        "partition" => s
            .split_once(sep)
            .map_or((s, "", ""), |(before, after)| (before, sep, after)),
        _ => s
            .rsplit_once(sep)
            .map_or(("", "", s), |(before, after)| (before, sep, after)),
    };
    Ok(Value::tuple(
        [before, found, after]
            .into_iter()
            .map(|part| string.with(part))
            .collect(),
    ))
}

/// The substring `[start:stop]` given by the arguments from `position` on; `None` if it starts after the end.
fn part<'a>(
    s: &'a str,
    args: &BoundArguments,
    position: usize,
) -> Result<Option<(usize, Cow<'a, str>)>, TemplateError> {
    let (start, stop) = (args.some_int(position)?, args.some_int(position + 1)?);
    if (start, stop) == (None, None) {
        return Ok(Some((0, s.into())));
    }
    let chars: Vec<char> = s.chars().collect();
    if start.is_some_and(|start| start > chars.len() as i128) {
        return Ok(None);
    }
    let positions = slice_indices(chars.len(), start, stop, 1);
    let first = positions.first().copied();
    let first = first.or_else(|| slice_indices(chars.len(), start, None, 1).first().copied());
    let text: String = positions.iter().map(|&position| chars[position]).collect();
    Ok(Some((first.unwrap_or(chars.len()), text.into())))
}

fn has_affix(
    string: &Text,
    name: &'static str,
    args: CallArguments,
) -> Result<Value, TemplateError> {
    let args = args.bind(name, &["affix", "start", "end"])?;
    let part = part(&string.text, &args, 1)?;
    let has = |affix: &Value| {
        let Some(affix) = affix.as_str() else {
            let found = affix.type_name();
            let message = format!("{name} first arg must be str or a tuple of str, not {found}");
            return Err(TemplateError::new(message));
        };
        Ok(part.as_ref().is_some_and(|(_, part)| match name {
            "startswith" => part.starts_with(affix),
            _ => part.ends_with(affix),
        }))
    };
    let affix = args.required(0)?;
    affix.must_be_defined()?;
    let found = match affix {
        Value::Tuple(tuple) => {
            let found = tuple.items.iter().map(has).collect::<Result<Vec<_>, _>>()?;
            found.contains(&true)
        }
        affix => has(affix)?,
    };
    Ok(Value::Bool(found))
}

fn search(string: &Text, name: &'static str, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind(name, &["sub", "start", "end"])?;
    let sub = args.text(0)?;
    let part = part(&string.text, &args, 1)?;
    if name == "count" {
        let count = part.map_or(0, |(_, part)| part.matches(sub).count());
        return Ok(Value::Int(count as i128));
    }
    let found = part.and_then(|(first, part)| {
        let position = if name.starts_with('r') {
            part.rfind(sub)
        } else {
            part.find(sub)
        }?;
        Some(first + part[..position].chars().count())
    });
    match found {
        Some(position) => Ok(Value::Int(position as i128)),
        None if name.ends_with("find") => Ok(Value::Int(-1)),
        None => Err(TemplateError::new("substring not found")),
    }
}

fn justify(string: &Text, name: &'static str, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind(name, &["width", "fillchar"])?;
    args.required(0)?;
    let fill = args.some_text(1)?.unwrap_or(" ");
    if fill.chars().count() != 1 {
        return Err(TemplateError::new(
            "The fill character must be exactly one character long",
        ));
    }
    let width = usize::try_from(args.int(0, 0)?).unwrap_or(0);
    limits::text(width)?;
    let side = match name {
        "center" => Side::Both,
        "ljust" => Side::Right,
        _ => Side::Left,
    };
    Ok(string.with(&padded(&string.text, width, fill, side)))
}

/// Side of the padding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
    Both,
}

/// Pads the string with `fill` to `width`; centred as by Python's `center`.
pub(crate) fn padded(s: &str, width: usize, fill: &str, side: Side) -> String {
    let missing = width.saturating_sub(s.chars().count());
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        Side::Both => missing / 2 + (missing & width & 1),
    };
    format!("{}{s}{}", fill.repeat(left), fill.repeat(missing - left))
}

fn replace(string: &Text, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("replace", &["old", "new", "count"])?;
    let (old, new) = (args.text(0)?, args.text(1)?);
    limits::text(string.text.len() + string.text.matches(old).count().saturating_mul(new.len()))?;
    Ok(string.with(&match usize::try_from(args.int(2, -1)?) {
        Ok(count) => string.text.replacen(old, new, count),
        Err(_) => string.text.replace(old, new),
    }))
}

fn zero_filled(s: &str, width: usize) -> String {
    let (sign, digits) = match s.strip_prefix(['+', '-']) {
        Some(digits) => (&s[..1], digits),
        None => ("", s),
    };
    let filled = padded(digits, width.saturating_sub(sign.len()), "0", Side::Left);
    format!("{sign}{filled}")
}

fn expand_tabs(s: &str, size: usize) -> String {
    let (mut written, mut column) = (String::new(), 0usize);
    for c in s.chars() {
        match c {
            '\t' => {
                let spaces = column.checked_rem(size).map_or(0, |over| size - over);
                written.push_str(&" ".repeat(spaces));
                column += spaces;
            }
            c => {
                written.push(c);
                column = if c == '\n' || c == '\r' {
                    0
                } else {
                    column + 1
                };
            }
        }
    }
    written
}
