//! Filters: the operator `|`.

mod sequences;
mod texts;

pub(crate) use sequences::sort_by;

use crate::{
    arguments::CallArguments,
    error::TemplateError,
    json, limits,
    number::{float_repr, parse_float, parse_int, round_float, round_int},
    value::Value,
};

/// Names of all filters of jinja2.
const NAMES: [&str; 53] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "items",
    "map",
    "min",
    "max",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

pub(crate) fn is_known(name: &str) -> bool {
    NAMES.contains(&name) || name == "tojson"
}

/// `value|name(…)`.
pub(crate) fn apply(
    name: &str,
    value: &Value,
    args: CallArguments,
) -> Result<Value, TemplateError> {
    // Those that go through a list are charged there.
    let text = matches!(value, Value::Text(_)).then(|| value.work());
    limits::work(text.unwrap_or(1).saturating_add(args.work()))?;
    if name == "tojson" {
        return json::to_json(value, args);
    }
    let known = NAMES.into_iter().find(|known| *known == name);
    let name = known.ok_or_else(|| TemplateError::new(format!("No filter named '{name}'.")))?;
    if let Some(filter) = texts::named(name) {
        return filter(value, args);
    }
    if let Some(filter) = sequences::named(name) {
        return filter(value, args);
    }
    match name {
        "abs" => {
            args.bind(name, &[])?;
            absolute(value)
        }
        "attr" => {
            let args = args.bind(name, &["name"])?;
            value.own_attribute(args.text(0)?)
        }
        "count" | "length" => {
            args.bind(name, &[])?;
            let name = value.type_name();
            let missing = || TemplateError::new(format!("object of type '{name}' has no len()"));
            Ok(Value::Int(value.len().ok_or_else(missing)? as i128))
        }
        "d" | "default" => {
            let args = args.bind(name, &["default_value", "boolean"])?;
            let is_missing =
                matches!(value, Value::Undefined(_)) || (args.is_true(1) && !value.is_true());
            let default = || args.get(0).cloned().unwrap_or_else(|| "".into());
            Ok(if is_missing { default() } else { value.clone() })
        }
        "filesizeformat" => file_size(value, args),
        "int" => int(value, args),
        "float" => float(value, args),
        "round" => round(value, args),
        _ => Err(TemplateError::unsupported(&format!("the filter {name}"))),
    }
}

fn absolute(value: &Value) -> Result<Value, TemplateError> {
    let zero = Value::Int(0);
    let is_negative = value.compare(crate::ast::ComparisonOperator::Less, &zero)?;
    if is_negative {
        value.negated()
    } else {
        value.plus()
    }
}

fn int(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("int", &["default", "base"])?;
    let base = u32::try_from(args.int(1, 10)?)
        .ok()
        .filter(|base| *base == 0 || (2..=36).contains(base));
    let base = base.ok_or_else(|| TemplateError::new("int() base must be >= 2 and <= 36, or 0"))?;
    value.must_be_defined()?;
    let of_float = |number: f64| {
        let whole = number.trunc();
        let fits = whole.abs() < 2f64.powi(126);
        // Beyond these bounds Python would return an exact integer.
        if fits || !number.is_finite() {
            return Ok(fits.then_some(Value::Int(whole as i128)));
        }
        Err(TemplateError::unsupported(
            "an integer of more than 128 bits",
        ))
    };
    let found = match value {
        Value::Float(number) if number.is_infinite() => {
            return Err(TemplateError::new(
                "cannot convert float infinity to integer",
            ));
        }
        Value::Float(number) => of_float(*number)?,
        Value::Text(text) => match parse_int(&text.text, base) {
            Some(number) => Some(Value::Int(number)),
            None => parse_float(&text.text).map(of_float).transpose()?.flatten(),
        },
        other => other.as_int().map(Value::Int),
    };
    Ok(found.unwrap_or_else(|| args.get(0).cloned().unwrap_or(Value::Int(0))))
}

/// jinja2's `filesizeformat`: a number of bytes with a decimal or binary prefix.
fn file_size(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("filesizeformat", &["binary"])?;
    value.must_be_defined()?;
    let bytes = match value {
        Value::Float(number) => Some(*number),
        Value::Text(text) => parse_float(&text.text),
        other => other.as_int().map(|number| number as f64),
    };
    let bytes = bytes.ok_or_else(|| {
        let name = value.type_name();
        TemplateError::new(format!("filesizeformat: a {name} that is no number"))
    })?;
    if bytes == f64::NEG_INFINITY {
        return Err(TemplateError::new(
            "cannot convert float infinity to integer",
        ));
    }
    Ok(with_prefix(bytes, args.is_true(0)).into())
}

/// A number of bytes with a decimal or binary prefix.
fn with_prefix(bytes: f64, is_binary: bool) -> String {
    let (base, prefixes, suffix) = if is_binary {
        (1024.0f64, "KMGTPEZY", "iB")
    } else {
        (1000.0, "kMGTPEZY", "B")
    };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{:.0} Bytes", bytes.trunc() + 0.0);
    }
    let mut unit = base;
    let mut chosen = 'k';
    for prefix in prefixes.chars() {
        chosen = prefix;
        unit *= base;
        if bytes < unit {
            break;
        }
    }
    let size = base * bytes / unit;
    match size.is_finite() {
        true => format!("{size:.1} {chosen}{suffix}"),
        false => format!("{} {chosen}{suffix}", float_repr(size)),
    }
}

fn float(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("float", &["default"])?;
    value.must_be_defined()?;
    let found = match value {
        Value::Float(number) => Some(*number),
        Value::Text(text) => parse_float(&text.text),
        other => other.as_int().map(|number| number as f64),
    };
    let default = || args.get(0).cloned().unwrap_or(Value::Float(0.0));
    Ok(found.map_or_else(default, Value::Float))
}

fn round(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("round", &["precision", "method"])?;
    let precision = i32::try_from(args.int(0, 0)?).unwrap_or(i32::MAX);
    value.must_be_defined()?;
    let number = match value {
        Value::Float(number) => *number,
        other => other.as_int().ok_or_else(|| {
            TemplateError::new(format!(
                "type {} doesn't define __round__ method",
                other.type_name()
            ))
        })? as f64,
    };
    let unit = 10f64.powi(precision);
    Ok(
        match (args.some_text(1)?.unwrap_or("common"), value.as_int()) {
            ("common", Some(number)) => {
                let rounded = round_int(number, precision);
                let too_large = || TemplateError::unsupported("an integer of more than 128 bits");
                Value::Int(rounded.ok_or_else(too_large)?)
            }
            ("common", None) => Value::Float(round_float(number, precision)),
            (_, _) if !unit.is_finite() => {
                return Err(TemplateError::unsupported(
                    "a precision of more than 308 digits",
                ));
            }
            ("ceil", _) => Value::Float((number * unit).ceil() / unit),
            ("floor", _) => Value::Float((number * unit).floor() / unit),
            _ => return Err(TemplateError::new("method must be common, ceil or floor")),
        },
    )
}
