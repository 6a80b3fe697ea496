//! Tests: the operator `is`.

use crate::{
    arguments::CallArguments, ast::ComparisonOperator, error::TemplateError, filters, limits,
    number::parse_int, value::Value,
};

/// Names of all tests.
const NAMES: [&str; 39] = [
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "escaped",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

pub(crate) fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// Whether `value is name(…)`.
pub(crate) fn holds(name: &str, value: &Value, args: CallArguments) -> Result<bool, TemplateError> {
    let known = NAMES.into_iter().find(|known| *known == name);
    let Some(name) = known else {
        return Err(TemplateError::new(format!("No test named '{name}'.")));
    };
    limits::work(1)?;
    if let Some(comparison) = comparison(name) {
        let args = args.bind(name, &["other"])?;
        return value.compare(comparison, args.required(0)?);
    }
    match name {
        "divisibleby" => {
            let args = args.bind(name, &["num"])?;
            let rest =
                value.arithmetic(crate::ast::ArithmeticOperator::Modulo, args.required(0)?)?;
            return Ok(rest.equals(&Value::Int(0)));
        }
        "sameas" => {
            let args = args.bind(name, &["other"])?;
            let other = args.required(0)?;
            let by_value = matches!(value, Value::Int(_) | Value::Float(_) | Value::Text(_));
            if by_value && value.type_name() == other.type_name() {
                return Err(TemplateError::unsupported(
                    "the test sameas of numbers and strings",
                ));
            }
            return Ok(value.is_same_as(other));
        }
        _ => args.bind(name, &[])?,
    };
    is(name, value)
}

fn comparison(name: &str) -> Option<ComparisonOperator> {
    Some(match name {
        "==" | "eq" | "equalto" => ComparisonOperator::Equal,
        "!=" | "ne" => ComparisonOperator::Unequal,
        ">" | "gt" | "greaterthan" => ComparisonOperator::Greater,
        ">=" | "ge" => ComparisonOperator::AtLeast,
        "<" | "lt" | "lessthan" => ComparisonOperator::Less,
        "<=" | "le" => ComparisonOperator::AtMost,
        "in" => ComparisonOperator::In,
        _ => return None,
    })
}

/// Tests without arguments.
fn is(name: &str, value: &Value) -> Result<bool, TemplateError> {
    let all_cased = |is_case: fn(char) -> bool, is_other: fn(char) -> bool| {
        let text = value.to_text()?;
        limits::work(value.work())?;
        Ok(text.chars().any(is_case) && !text.chars().any(is_other))
    };
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => matches!(value, Value::Text(_)),
        "escaped" => matches!(value, Value::Text(text) if text.is_safe),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => matches!(
            value,
            Value::Undefined(_)
                | Value::Text(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(_)
        ),
        "iterable" => value.is_iterable(),
        "callable" => value.is_callable(),
        "lower" => return all_cased(char::is_lowercase, char::is_uppercase),
        "upper" => return all_cased(char::is_uppercase, char::is_lowercase),
        "filter" => value.as_str().is_some_and(filters::is_known),
        "test" => value.as_str().is_some_and(is_known),
        "odd" => remainder(value)?.equals(&Value::Int(1)),
        "even" => remainder(value)?.equals(&Value::Int(0)),
        _ => return Err(TemplateError::new(format!("No test named '{name}'."))),
    })
}

fn remainder(value: &Value) -> Result<Value, TemplateError> {
    value.arithmetic(crate::ast::ArithmeticOperator::Modulo, &Value::Int(2))
}

/// Whether the name of an attribute is an integer, which is an index.
pub(crate) fn position(name: &str) -> Option<i128> {
    let is_digits = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    is_digits.then(|| parse_int(name, 10)).flatten()
}
