//! Filters: what `|` applies.

mod sequences;
mod texts;

pub(crate) use sequences::sort_by;

use crate::{
    Error,
    arguments::Given,
    json,
    number::{parse_float, parse_int, round_float, round_int},
    value::Value,
};

/// The names of all filters of jinja2.
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
pub(crate) fn apply(name: &str, value: &Value, given: Given) -> Result<Value, Error> {
    if name == "tojson" {
        return json::to_json(value, given);
    }
    let known = NAMES.into_iter().find(|known| *known == name);
    let name = known.ok_or_else(|| Error::new(format!("No filter named '{name}'.")))?;
    if let Some(filter) = texts::named(name) {
        return filter(value, given);
    }
    if let Some(filter) = sequences::named(name) {
        return filter(value, given);
    }
    match name {
        "abs" => {
            given.bind(name, &[])?;
            let zero = Value::Int(0);
            let is_negative = value.compare(crate::ast::Comparison::Less, &zero)?;
            if is_negative {
                value.negated()
            } else {
                value.plus()
            }
        }
        "attr" => {
            let given = given.bind(name, &["name"])?;
            value.own_attribute(given.text(0)?)
        }
        "count" | "length" => {
            given.bind(name, &[])?;
            let name = value.type_name();
            let missing = || Error::new(format!("object of type '{name}' has no len()"));
            Ok(Value::Int(value.len().ok_or_else(missing)? as i128))
        }
        "d" | "default" => {
            let given = given.bind(name, &["default_value", "boolean"])?;
            let is_missing =
                matches!(value, Value::Undefined(_)) || (given.is_true(1) && !value.is_true());
            let default = || given.get(0).cloned().unwrap_or_else(|| "".into());
            Ok(if is_missing { default() } else { value.clone() })
        }
        "int" => int(value, given),
        "float" => float(value, given),
        "round" => round(value, given),
        _ => Err(Error::unsupported(&format!("the filter {name}"))),
    }
}

fn int(value: &Value, given: Given) -> Result<Value, Error> {
    let given = given.bind("int", &["default", "base"])?;
    let base = u32::try_from(given.int(1, 10)?)
        .ok()
        .filter(|base| *base == 0 || (2..=36).contains(base));
    let base = base.ok_or_else(|| Error::new("int() base must be >= 2 and <= 36, or 0"))?;
    value.must_be_defined()?;
    let of_float = |number: f64| {
        let whole = number.trunc();
        let fits = whole.abs() < 2f64.powi(126);
        // Beyond them an integer of Python would be exact.
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
    Ok(found.unwrap_or_else(|| given.get(0).cloned().unwrap_or(Value::Int(0))))
}

fn float(value: &Value, given: Given) -> Result<Value, Error> {
    let given = given.bind("float", &["default"])?;
    value.must_be_defined()?;
    let found = match value {
        Value::Float(number) => Some(*number),
        Value::Text(text) => parse_float(&text.text),
        other => other.as_int().map(|number| number as f64),
    };
    let default = || given.get(0).cloned().unwrap_or(Value::Float(0.0));
    Ok(found.map_or_else(default, Value::Float))
}

fn round(value: &Value, given: Given) -> Result<Value, Error> {
    let given = given.bind("round", &["precision", "method"])?;
    let precision = i32::try_from(given.int(0, 0)?).unwrap_or(i32::MAX);
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
        match (given.some_text(1)?.unwrap_or("common"), value.as_int()) {
            ("common", Some(number)) => Value::Int(round_int(number, precision)),
            ("common", None) => Value::Float(round_float(number, precision)),
            ("ceil", _) => Value::Float((number * unit).ceil() / unit),
            ("floor", _) => Value::Float((number * unit).floor() / unit),
            _ => return Err(Error::new("method must be common, ceil or floor")),
        },
    )
}
