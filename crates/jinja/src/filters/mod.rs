//! Filters: the operator `|`.

mod sequences;
mod texts;

pub(crate) use sequences::sort_by;

use crate::{
    arguments::CallArguments,
    error::Error,
    json,
    number::{parse_float, parse_int, round_float, round_int},
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
pub(crate) fn apply(name: &str, value: &Value, args: CallArguments) -> Result<Value, Error> {
    if name == "tojson" {
        return json::to_json(value, args);
    }
    let known = NAMES.into_iter().find(|known| *known == name);
    let name = known.ok_or_else(|| Error::new(format!("No filter named '{name}'.")))?;
    if let Some(filter) = texts::named(name) {
        return filter(value, args);
    }
    if let Some(filter) = sequences::named(name) {
        return filter(value, args);
    }
    match name {
        "abs" => {
            args.bind(name, &[])?;
            let zero = Value::Int(0);
            let is_negative = value.compare(crate::ast::ComparisonOperator::Less, &zero)?;
            if is_negative {
                value.negated()
            } else {
                value.plus()
            }
        }
        "attr" => {
            let args = args.bind(name, &["name"])?;
            value.own_attribute(args.text(0)?)
        }
        "count" | "length" => {
            args.bind(name, &[])?;
            let name = value.type_name();
            let missing = || Error::new(format!("object of type '{name}' has no len()"));
            Ok(Value::Int(value.len().ok_or_else(missing)? as i128))
        }
        "d" | "default" => {
            let args = args.bind(name, &["default_value", "boolean"])?;
            let is_missing =
                matches!(value, Value::Undefined(_)) || (args.is_true(1) && !value.is_true());
            let default = || args.get(0).cloned().unwrap_or_else(|| "".into());
            Ok(if is_missing { default() } else { value.clone() })
        }
        "int" => int(value, args),
        "float" => float(value, args),
        "round" => round(value, args),
        _ => Err(Error::unsupported(&format!("the filter {name}"))),
    }
}

fn int(value: &Value, args: CallArguments) -> Result<Value, Error> {
    let args = args.bind("int", &["default", "base"])?;
    let base = u32::try_from(args.int(1, 10)?)
        .ok()
        .filter(|base| *base == 0 || (2..=36).contains(base));
    let base = base.ok_or_else(|| Error::new("int() base must be >= 2 and <= 36, or 0"))?;
    value.must_be_defined()?;
    let of_float = |number: f64| {
        let whole = number.trunc();
        let fits = whole.abs() < 2f64.powi(126);
        // Beyond these bounds Python would return an exact integer.
        if fits || !number.is_finite() {
            return Ok(fits.then_some(Value::Int(whole as i128)));
        }
        Err(Error::unsupported("an integer of more than 128 bits"))
    };
    let found = match value {
        Value::Float(number) if number.is_infinite() => {
            return Err(Error::new("cannot convert float infinity to integer"));
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

fn float(value: &Value, args: CallArguments) -> Result<Value, Error> {
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

fn round(value: &Value, args: CallArguments) -> Result<Value, Error> {
    let args = args.bind("round", &["precision", "method"])?;
    let precision = i32::try_from(args.int(0, 0)?).unwrap_or(i32::MAX);
    value.must_be_defined()?;
    let number = match value {
        Value::Float(number) => *number,
        other => other.as_int().ok_or_else(|| {
            Error::new(format!(
                "type {} doesn't define __round__ method",
                other.type_name()
            ))
        })? as f64,
    };
    let unit = 10f64.powi(precision);
    Ok(
        match (args.some_text(1)?.unwrap_or("common"), value.as_int()) {
            ("common", Some(number)) => Value::Int(round_int(number, precision)),
            ("common", None) => Value::Float(round_float(number, precision)),
            ("ceil", _) => Value::Float((number * unit).ceil() / unit),
            ("floor", _) => Value::Float((number * unit).floor() / unit),
            _ => return Err(Error::new("method must be common, ceil or floor")),
        },
    )
}
