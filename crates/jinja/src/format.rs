//! Python's string formatting: `'{}'.format(…)` and `'%s' % …`.

use crate::{
    arguments::CallArguments,
    error::TemplateError,
    limits,
    methods::{Side, padded},
    number::float_repr,
    operators::escaped,
    text::repr,
    value::{Text, Value},
};

/// A format specification: `[[fill]align][sign][#][0][width][grouping][.precision][kind]`.
#[derive(Debug, Default, Clone)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    is_alternate: bool,
    is_zero_filled: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Spec {
    fn parse(spec: &str) -> Result<Self, TemplateError> {
        let chars: Vec<char> = spec.chars().collect();
        let mut parsed = Self::default();
        let mut position = 0;
        let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
        if is_align(chars.get(1)) {
            (parsed.fill, parsed.align, position) =
                (chars.first().copied(), chars.get(1).copied(), 2);
        } else if is_align(chars.first()) {
            (parsed.align, position) = (chars.first().copied(), 1);
        }
        let takes = |position: &mut usize, wanted: &str| {
            let found = chars
                .get(*position)
                .copied()
                .filter(|c| wanted.contains(*c));
            *position += usize::from(found.is_some());
            found
        };
        parsed.sign = takes(&mut position, "+- ");
        parsed.is_alternate = takes(&mut position, "#").is_some();
        parsed.is_zero_filled = takes(&mut position, "0").is_some();
        let number = |position: &mut usize| {
            let rest = &chars[(*position).min(chars.len())..];
            let digits: String = rest.iter().take_while(|c| c.is_ascii_digit()).collect();
            *position += digits.len();
            width(&digits)
        };
        parsed.width = number(&mut position)?.unwrap_or(0);
        parsed.grouping = takes(&mut position, ",_");
        if takes(&mut position, ".").is_some() {
            let missing = || TemplateError::new("Format specifier missing precision");
            parsed.precision = Some(number(&mut position)?.ok_or_else(missing)?);
        }
        parsed.kind = chars.get(position).copied();
        if position + usize::from(parsed.kind.is_some()) < chars.len() {
            return Err(TemplateError::new(format!(
                "Invalid format specifier '{spec}'"
            )));
        }
        Ok(parsed)
    }

    /// Pads the text to the width; `default` is used without an explicit alignment.
    fn fill(&self, text: &str, default: char) -> String {
        let zero = self.is_zero_filled && self.align.is_none();
        let fill = self
            .fill
            .unwrap_or(if zero { '0' } else { ' ' })
            .to_string();
        let align = self.align.unwrap_or(if zero { '=' } else { default });
        let side = match align {
            '<' => Side::Right,
            '^' => {
                let missing = self.width.saturating_sub(text.chars().count());
                let (left, right) = (missing / 2, missing - missing / 2);
                return format!("{}{text}{}", fill.repeat(left), fill.repeat(right));
            }
            _ => Side::Left,
        };
        if align == '=' {
            let signs = text.chars().take_while(|c| "+- ".contains(*c)).count();
            let (sign, digits) = text.split_at(signs);
            return sign.to_owned()
                + &padded(digits, self.width.saturating_sub(signs), &fill, side);
        }
        padded(text, self.width, &fill, side)
    }

    fn with_sign(&self, is_negative: bool, digits: &str) -> String {
        let sign = match (is_negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        };
        format!("{sign}{digits}")
    }
}

/// Maximum field width.
const WIDEST: usize = 10_000;

/// Parses digits; `None` if there are none.
fn width(digits: &str) -> Result<Option<usize>, TemplateError> {
    if digits.is_empty() {
        return Ok(None);
    }
    let number = digits.parse().ok().filter(|&number| number <= WIDEST);
    let too_wide = || TemplateError::new(format!("a width or precision of more than {WIDEST}"));
    number.ok_or_else(too_wide).map(Some)
}

/// Python's `format(value, spec)`.
fn formatted(value: &Value, spec: &str) -> Result<String, TemplateError> {
    value.must_be_defined()?;
    if spec.is_empty() {
        return Ok(value.to_text()?.to_string());
    }
    let parsed = Spec::parse(spec)?;
    match value {
        Value::Text(text) => match parsed.kind {
            None | Some('s') if parsed.sign.is_none() && parsed.align != Some('=') => {
                let most = parsed.precision.unwrap_or(usize::MAX);
                let cut: String = text.text.chars().take(most).collect();
                Ok(parsed.fill(&cut, '<'))
            }
            _ => Err(TemplateError::new(format!(
                "Invalid format specifier '{spec}' for object of type 'str'"
            ))),
        },
        Value::Int(_) | Value::Bool(_) => {
            let number = value.as_int().unwrap_or(0);
            match parsed.kind {
                None | Some('d' | 'b' | 'o' | 'x' | 'X') if parsed.precision.is_none() => {
                    Ok(parsed.fill(&integer(number, &parsed)?, '>'))
                }
                _ => Ok(parsed.fill(&float(number as f64, &parsed)?, '>')),
            }
        }
        Value::Float(number) => Ok(parsed.fill(&float(*number, &parsed)?, '>')),
        other => {
            let name = other.type_name();
            Err(TemplateError::new(format!(
                "unsupported format string passed to {name}.__format__"
            )))
        }
    }
}

fn integer(number: i128, spec: &Spec) -> Result<String, TemplateError> {
    let magnitude = number.unsigned_abs();
    let (prefix, digits) = match spec.kind {
        Some('b') => ("0b", format!("{magnitude:b}")),
        Some('o') => ("0o", format!("{magnitude:o}")),
        Some('x') => ("0x", format!("{magnitude:x}")),
        Some('X') => ("0X", format!("{magnitude:X}")),
        _ => ("", magnitude.to_string()),
    };
    let prefix = if spec.is_alternate { prefix } else { "" };
    let digits = grouped(&digits, spec)?;
    Ok(spec.with_sign(number < 0, &format!("{prefix}{digits}")))
}

/// Groups the digits of the integer part.
fn grouped(digits: &str, spec: &Spec) -> Result<String, TemplateError> {
    let Some(separator) = spec.grouping else {
        return Ok(digits.to_owned());
    };
    if spec.is_zero_filled {
        return Err(TemplateError::unsupported(
            "a format with both zeros and grouping",
        ));
    }
    let group = if matches!(spec.kind, Some('b' | 'o' | 'x' | 'X')) {
        4
    } else {
        3
    };
    let mut written = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(group) {
            written.push(separator);
        }
        written.push(digit);
    }
    Ok(written)
}

fn float(number: f64, spec: &Spec) -> Result<String, TemplateError> {
    let magnitude = number.abs();
    let precision = spec.precision.unwrap_or(6);
    let is_finite = number.is_finite();
    let digits = match spec.kind {
        Some('f' | 'F' | 'e' | 'E' | '%') if !is_finite => float_repr(magnitude),
        Some('f' | 'F') => fixed(magnitude, precision, spec)?,
        Some('e') => exponential(magnitude, precision),
        Some('E') => exponential(magnitude, precision).to_uppercase(),
        Some('%') => fixed(magnitude * 100.0, precision, spec)? + "%",
        None if spec.precision.is_none() && spec.grouping.is_none() => float_repr(magnitude),
        kind => {
            let kind = kind.map_or("none".to_owned(), |kind| format!("'{kind}'"));
            return Err(TemplateError::unsupported(&format!(
                "the format code {kind} of this number"
            )));
        }
    };
    Ok(spec.with_sign(number.is_sign_negative() && !number.is_nan(), &digits))
}

fn fixed(magnitude: f64, precision: usize, spec: &Spec) -> Result<String, TemplateError> {
    let written = format!("{magnitude:.precision$}");
    let (whole, fraction) = match written.split_once('.') {
        Some((whole, fraction)) => (whole, format!(".{fraction}")),
        None => (
            written.as_str(),
            if spec.is_alternate {
                ".".into()
            } else {
                String::new()
            },
        ),
    };
    Ok(grouped(whole, spec)? + &fraction)
}

fn exponential(magnitude: f64, precision: usize) -> String {
    let written = format!("{magnitude:.precision$e}");
    let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Python's `str.format`.
pub(crate) fn braces(text: &Text, args: &CallArguments) -> Result<Value, TemplateError> {
    let mut fields = Fields {
        args,
        next: 0,
        is_safe: text.is_safe,
    };
    let written = fields.written(&text.text, 2)?;
    Ok(text.with(&written))
}

struct Fields<'a> {
    args: &'a CallArguments,
    /// Index of the next automatic field.
    next: usize,
    is_safe: bool,
}

impl Fields<'_> {
    /// Formats the text; fields may be nested up to `depth`.
    fn written(&mut self, format: &str, depth: usize) -> Result<String, TemplateError> {
        let mut written = String::new();
        let mut rest = format;
        while let Some(position) = rest.find(['{', '}']) {
            written.push_str(&rest[..position]);
            let brace = &rest[position..=position];
            rest = &rest[position + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                written.push_str(brace);
                rest = after;
                continue;
            }
            if brace == "}" {
                return Err(TemplateError::new(
                    "Single '}' encountered in format string",
                ));
            }
            let end = closing(rest)
                .ok_or_else(|| TemplateError::new("expected '}' before end of string"))?;
            if depth == 0 {
                return Err(TemplateError::new("Max string recursion exceeded"));
            }
            written.push_str(&self.field(&rest[..end], depth)?);
            limits::text(written.len())?;
            rest = &rest[end + 1..];
        }
        written.push_str(rest);
        Ok(written)
    }

    fn field(&mut self, field: &str, depth: usize) -> Result<String, TemplateError> {
        let (named, spec) = match field.find([':', '!']) {
            Some(position) if field[position..].starts_with(':') => {
                (&field[..position], &field[position + 1..])
            }
            Some(position) => {
                let (conversion, spec) = field[position + 1..]
                    .split_once(':')
                    .unwrap_or((&field[position + 1..], ""));
                let value = self.value(&field[..position])?;
                let text = match conversion {
                    "s" => value.to_text()?.to_string(),
                    "r" => value.repr()?,
                    _ => {
                        return Err(TemplateError::unsupported(&format!(
                            "the conversion !{conversion}"
                        )));
                    }
                };
                let spec = self.written(spec, depth - 1)?;
                return formatted(&Value::from(text), &spec);
            }
            None => (field, ""),
        };
        let value = self.value(named)?;
        let spec = self.written(spec, depth - 1)?;
        let text = formatted(&value, &spec)?;
        let is_escaped = matches!(&value, Value::Text(text) if text.is_safe);
        Ok(if self.is_safe && !is_escaped {
            escaped(&text)
        } else {
            text
        })
    }

    /// Resolves a field name such as `0.name[key]`.
    fn value(&mut self, named: &str) -> Result<Value, TemplateError> {
        let end = named.find(['.', '[']).unwrap_or(named.len());
        let (first, mut rest) = named.split_at(end);
        let mut value = if first.is_empty() || first.bytes().all(|b| b.is_ascii_digit()) {
            let position = if first.is_empty() {
                self.next
            } else {
                first.parse().unwrap_or(usize::MAX)
            };
            self.next += usize::from(first.is_empty());
            let found = self.args.positional.get(position).cloned();
            found.ok_or_else(|| {
                TemplateError::new(format!(
                    "Replacement index {position} out of range for positional args tuple"
                ))
            })?
        } else {
            let found = self.args.named.iter().find(|(name, _)| name == first);
            found
                .ok_or_else(|| TemplateError::new(format!("KeyError: {}", repr(first))))?
                .1
                .clone()
        };
        while !rest.is_empty() {
            if let Some(attribute) = rest.strip_prefix('.') {
                let end = attribute.find(['.', '[']).unwrap_or(attribute.len());
                value = value.attribute(&attribute[..end])?;
                rest = &attribute[end..];
            } else {
                let (key, after) = rest[1..]
                    .split_once(']')
                    .ok_or_else(|| TemplateError::new("Missing ']' in format string"))?;
                let key = key.parse().map_or_else(|_| Value::from(key), Value::Int);
                value = value.subscript(&key)?;
                rest = after;
            }
        }
        Ok(value)
    }
}

/// Position of the matching closing brace.
fn closing(text: &str) -> Option<usize> {
    let mut open = 0usize;
    for (position, c) in text.char_indices() {
        match c {
            '{' => open += 1,
            '}' if open == 0 => return Some(position),
            '}' => open -= 1,
            _ => {}
        }
    }
    None
}

/// Python's `text % values`.
pub(crate) fn percent(text: &Text, values: &Value) -> Result<Value, TemplateError> {
    let positional = match values {
        Value::Tuple(tuple) => {
            limits::work(tuple.items.len())?;
            tuple.items.clone()
        }
        other => vec![other.clone()],
    };
    let mut directives = Directives {
        values,
        positional: positional.into_iter(),
        is_safe: text.is_safe,
    };
    let (mut written, mut rest) = (String::new(), &*text.text);
    while let Some((before, after)) = rest.split_once('%') {
        written.push_str(before);
        rest = directives.write(after, &mut written)?;
        limits::text(written.len())?;
    }
    written.push_str(rest);
    if directives.positional.next().is_some() && !matches!(values, Value::Dict(_)) {
        return Err(TemplateError::new(
            "not all arguments converted during string formatting",
        ));
    }
    Ok(text.with(&written))
}

struct Directives<'a> {
    values: &'a Value,
    positional: std::vec::IntoIter<Value>,
    is_safe: bool,
}

impl Directives<'_> {
    /// Formats the directive at the start of `text` and returns the rest.
    fn write<'t>(&mut self, text: &'t str, written: &mut String) -> Result<&'t str, TemplateError> {
        let incomplete = || TemplateError::new("incomplete format");
        let (key, rest) = match text.strip_prefix('(') {
            Some(after) => {
                let (key, rest) = after.split_once(')').ok_or_else(incomplete)?;
                (Some(key), rest)
            }
            None => (None, text),
        };
        let end = rest
            .find(|c: char| !"#0- +.0123456789*".contains(c))
            .ok_or_else(incomplete)?;
        let kind = rest[end..].chars().next().ok_or_else(incomplete)?;
        let after = &rest[end + kind.len_utf8()..];
        if kind == '%' {
            written.push('%');
            return Ok(after);
        }
        let value = match key {
            Some(key) => {
                let Value::Dict(dict) = self.values else {
                    return Err(TemplateError::new("format requires a mapping"));
                };
                let found = dict.get_text(key).cloned();
                found.ok_or_else(|| TemplateError::new(format!("KeyError: {}", repr(key))))?
            }
            None => {
                let missing = || TemplateError::new("not enough arguments for format string");
                self.positional.next().ok_or_else(missing)?
            }
        };
        let text = directive(&value, &rest[..end], kind)?;
        let is_escaped = matches!(&value, Value::Text(text) if text.is_safe);
        match self.is_safe && !is_escaped {
            true => written.push_str(&escaped(&text)),
            false => written.push_str(&text),
        }
        Ok(after)
    }
}

fn directive(value: &Value, flags: &str, kind: char) -> Result<String, TemplateError> {
    if flags.contains('*') {
        return Err(TemplateError::unsupported("a width of * in %"));
    }
    let end = flags
        .find(|c: char| !"#0- +".contains(c))
        .unwrap_or(flags.len());
    let (signs, numbers) = flags.split_at(end);
    let (whole, precision) = match numbers.split_once('.') {
        Some((whole, precision)) => (whole, Some(width(precision)?.unwrap_or(0))),
        None => (numbers, None),
    };
    let is_left = signs.contains('-');
    let mut spec = Spec {
        align: is_left.then_some('<'),
        sign: ['+', ' '].into_iter().find(|sign| signs.contains(*sign)),
        is_alternate: signs.contains('#'),
        is_zero_filled: signs.contains('0') && !is_left,
        width: width(whole)?.unwrap_or(0),
        precision,
        kind: Some(kind),
        ..Spec::default()
    };
    let number = || {
        let (name, wanted) = (value.type_name(), "a real number is required");
        TemplateError::new(format!("%{kind} format: {wanted}, not {name}"))
    };
    match kind {
        's' | 'r' => {
            let text = if kind == 's' {
                value.to_text()?.to_string()
            } else {
                value.repr()?
            };
            spec.is_zero_filled = false;
            let cut: String = text
                .chars()
                .take(spec.precision.unwrap_or(usize::MAX))
                .collect();
            Ok(spec.fill(&cut, '>'))
        }
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let whole = match value {
                Value::Float(number) if !"xXo".contains(kind) && number.is_finite() => {
                    *number as i128
                }
                other => other.as_int().ok_or_else(number)?,
            };
            if spec.precision.is_some() {
                return Err(TemplateError::unsupported("a precision of integers in %"));
            }
            Ok(spec.fill(&integer(whole, &spec)?, '>'))
        }
        'f' | 'F' | 'e' | 'E' => {
            let number = match value {
                Value::Float(number) => *number,
                other => other.as_int().ok_or_else(number)? as f64,
            };
            Ok(spec.fill(&float(number, &spec)?, '>'))
        }
        'c' if value.as_str().is_some_and(|text| text.chars().count() == 1) => {
            Ok(spec.fill(&value.to_text()?, '>'))
        }
        _ => Err(TemplateError::unsupported(&format!(
            "the format code '{kind}' of %"
        ))),
    }
}
