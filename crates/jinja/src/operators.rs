//! Python's operators.

use std::{cmp::Ordering, rc::Rc};

use crate::{
    ast::{ArithmeticOperator, ComparisonOperator},
    error::TemplateError,
    format, limits, number,
    text::repr,
    value::{Text, Value, View, ViewKind},
};

impl ArithmeticOperator {
    fn written(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Subtract => "-",
            Self::Multiply => "*",
            Self::Divide => "/",
            Self::FloorDivide => "//",
            Self::Modulo => "%",
            Self::Power => "** or pow()",
        }
    }
}

/// A numeric operand.
#[derive(Clone, Copy)]
enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Float(number) => Some(Self::Float(*number)),
            other => other.as_int().map(Self::Int),
        }
    }

    fn as_float(self) -> f64 {
        match self {
            Self::Int(number) => number as f64,
            Self::Float(number) => number,
        }
    }
}

impl Value {
    /// `self operator right`.
    pub(crate) fn arithmetic(
        &self,
        operator: ArithmeticOperator,
        right: &Value,
    ) -> Result<Value, TemplateError> {
        self.must_be_defined()?;
        limits::work(self.work().saturating_add(right.work()))?;
        if let (ArithmeticOperator::Modulo, Value::Text(text)) = (operator, self) {
            return format::percent(text, right);
        }
        right.must_be_defined()?;
        if let (Some(left), Some(right)) = (Number::of(self), Number::of(right)) {
            return computed(operator, left, right);
        }
        match operator {
            ArithmeticOperator::Add => self.joined_with(right),
            ArithmeticOperator::Multiply => self.repeated(right),
            _ => None,
        }
        .unwrap_or_else(|| {
            let (left, right) = (self.type_name(), right.type_name());
            let operator = operator.written();
            let operands = format!("'{left}' and '{right}'");
            Err(TemplateError::new(format!(
                "unsupported operand type(s) for {operator}: {operands}"
            )))
        })
    }

    fn joined_with(&self, right: &Value) -> Option<Result<Value, TemplateError>> {
        Some(Ok(match (self, right) {
            (Value::Text(left), Value::Text(right)) => Value::Text(left.plus(right)),
            (Value::List(left), Value::List(right)) => {
                return Some(chained(&left.items, &right.items).map(Value::list));
            }
            (Value::Tuple(left), Value::Tuple(right)) => {
                return Some(chained(&left.items, &right.items).map(Value::tuple));
            }
            _ => return None,
        }))
    }

    fn repeated(&self, right: &Value) -> Option<Result<Value, TemplateError>> {
        let (items, times) = match (self.as_int(), right.as_int()) {
            (None, Some(times)) => (self, times),
            (Some(times), None) => (right, times),
            _ => return None,
        };
        let times = usize::try_from(times).unwrap_or(0);
        let length = items.len()?;
        let limit = match items {
            Value::Text(text) => limits::text(text.text.len().saturating_mul(times)),
            _ => limits::items(length.saturating_mul(times)),
        };
        if let Err(error) = limit {
            return Some(Err(error));
        }
        Some(Ok(match items {
            Value::Text(text) => text.with(&text.text.repeat(times)),
            Value::List(list) => Value::list(cycled(&list.items, times)),
            Value::Tuple(tuple) => Value::tuple(cycled(&tuple.items, times)),
            _ => return None,
        }))
    }

    /// `-self`.
    pub(crate) fn negated(&self) -> Result<Value, TemplateError> {
        self.must_be_defined()?;
        match Number::of(self) {
            Some(Number::Int(number)) => number.checked_neg().map(Value::Int).ok_or_else(too_large),
            Some(Number::Float(number)) => Ok(Value::Float(-number)),
            None => Err(self.bad_operand("-")),
        }
    }

    /// `+self`.
    pub(crate) fn plus(&self) -> Result<Value, TemplateError> {
        self.must_be_defined()?;
        match Number::of(self) {
            Some(Number::Int(number)) => Ok(Value::Int(number)),
            Some(Number::Float(number)) => Ok(Value::Float(number)),
            None => Err(self.bad_operand("+")),
        }
    }

    fn bad_operand(&self, operator: &str) -> TemplateError {
        let name = self.type_name();
        TemplateError::new(format!("bad operand type for unary {operator}: '{name}'"))
    }

    /// `self comparison right`.
    pub(crate) fn compare(
        &self,
        comparison: ComparisonOperator,
        right: &Value,
    ) -> Result<bool, TemplateError> {
        let is_ordered = |holds: fn(Ordering) -> bool, written: &str| {
            let order = self.order(right, written)?;
            Ok(order.is_some_and(holds))
        };
        match comparison {
            ComparisonOperator::Equal => Ok(self.equals(right)),
            ComparisonOperator::Unequal => Ok(!self.equals(right)),
            ComparisonOperator::Less => is_ordered(Ordering::is_lt, "<"),
            ComparisonOperator::AtMost => is_ordered(Ordering::is_le, "<="),
            ComparisonOperator::Greater => is_ordered(Ordering::is_gt, ">"),
            ComparisonOperator::AtLeast => is_ordered(Ordering::is_ge, ">="),
            ComparisonOperator::In => right.contains(self),
            ComparisonOperator::NotIn => right.contains(self).map(|is_in| !is_in),
        }
    }

    /// `self == right`. A value that contains another one several times is compared as often: once a limit is exceeded,
    /// nothing equals anything.
    pub(crate) fn equals(&self, right: &Value) -> bool {
        if !limits::spend(1) {
            return false;
        }
        if let (Some(left), Some(right)) = (Number::of(self), Number::of(right)) {
            return compare_numbers(left, right) == Some(Ordering::Equal);
        }
        let all = |left: &[Value], right: &[Value]| {
            left.len() == right.len() && left.iter().zip(right).all(|(l, r)| l.equals(r))
        };
        match (self, right) {
            (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
            (Value::Text(left), Value::Text(right)) => left.equals(right),
            (Value::List(left), Value::List(right)) => all(&left.items, &right.items),
            (Value::Tuple(left), Value::Tuple(right)) => all(&left.items, &right.items),
            (Value::Dict(left), Value::Dict(right)) => {
                let mut pairs = left.pairs.iter();
                left.pairs.len() == right.pairs.len()
                    && pairs
                        .all(|(key, value)| right.get(key).is_some_and(|other| value.equals(other)))
            }
            (Value::Range(left), Value::Range(right)) => {
                limits::spend(left.len().min(right.len()) as usize);
                left.len() == right.len() && all(&left.items(), &right.items())
            }
            (Value::View(left), Value::View(right)) => left.equals(right),
            _ => self.is_same_as(right),
        }
    }

    /// `self is right`, for values with an identity.
    pub(crate) fn is_same_as(&self, right: &Value) -> bool {
        match (self, right) {
            (Value::None, Value::None) => true,
            (Value::Bool(left), Value::Bool(right)) => left == right,
            (Value::List(left), Value::List(right)) => Rc::ptr_eq(left, right),
            (Value::Tuple(left), Value::Tuple(right)) => Rc::ptr_eq(left, right),
            (Value::Dict(left), Value::Dict(right)) => Rc::ptr_eq(left, right),
            (Value::View(left), Value::View(right)) => Rc::ptr_eq(left, right),
            (Value::Generator(left), Value::Generator(right)) => Rc::ptr_eq(left, right),
            (Value::Namespace(left), Value::Namespace(right)) => Rc::ptr_eq(left, right),
            (Value::Loop(left), Value::Loop(right)) => Rc::ptr_eq(left, right),
            (Value::Macro(left), Value::Macro(right)) => Rc::ptr_eq(left, right),
            (Value::Cycler(left), Value::Cycler(right)) => Rc::ptr_eq(left, right),
            (Value::Joiner(left), Value::Joiner(right)) => Rc::ptr_eq(left, right),
            (Value::Undefined(left), Value::Undefined(right)) => Rc::ptr_eq(left, right),
            (Value::Function(left), Value::Function(right)) => left == right,
            _ => false,
        }
    }

    /// Ordering of two values; `None` if one is NaN.
    pub(crate) fn order(
        &self,
        right: &Value,
        operator: &str,
    ) -> Result<Option<Ordering>, TemplateError> {
        self.must_be_defined()?;
        right.must_be_defined()?;
        limits::work(1)?;
        if let (Some(left), Some(right)) = (Number::of(self), Number::of(right)) {
            return Ok(compare_numbers(left, right));
        }
        match (self, right) {
            (Value::Text(l), Value::Text(r)) => {
                limits::work(self.work().min(right.work()))?;
                Ok(Some(l.text.cmp(&r.text)))
            }
            (Value::List(left), Value::List(right)) => {
                sequences(&left.items, &right.items, operator)
            }
            (Value::Tuple(left), Value::Tuple(right)) => {
                sequences(&left.items, &right.items, operator)
            }
            _ => {
                let (left, right) = (self.type_name(), right.type_name());
                let message = format!(
                    "'{operator}' not supported between instances of '{left}' and '{right}'"
                );
                Err(TemplateError::new(message))
            }
        }
    }

    /// `item in self`.
    pub(crate) fn contains(&self, item: &Value) -> Result<bool, TemplateError> {
        match self {
            Value::Text(text) => match item {
                Value::Text(part) => {
                    limits::work(self.work().saturating_add(item.work()))?;
                    Ok(text.text.contains(&*part.text))
                }
                other => {
                    let name = other.type_name();
                    let message =
                        format!("'in <string>' requires string as left operand, not {name}");
                    Err(TemplateError::new(message))
                }
            },
            Value::Dict(dict) => {
                item.check_hashable()?;
                Ok(dict.get(item).is_some())
            }
            Value::View(view) if view.kind == ViewKind::Keys => {
                item.check_hashable()?;
                Ok(view.dict.get(item).is_some())
            }
            other if other.is_iterable() => {
                Ok(other.iterate()?.iter().any(|element| element.equals(item)))
            }
            other => {
                let name = other.type_name();
                Err(TemplateError::new(format!(
                    "argument of type '{name}' is not iterable"
                )))
            }
        }
    }

    /// `self[item]`; `None` if there is no such element.
    pub(crate) fn item(&self, item: &Value) -> Result<Option<Value>, TemplateError> {
        let at = |length: usize| {
            let position = item.as_int()?;
            let length = i128::try_from(length).ok()?;
            let position = if position < 0 {
                position + length
            } else {
                position
            };
            usize::try_from(position).ok()
        };
        Ok(match self {
            Value::Undefined(_) => {
                self.must_be_defined()?;
                None
            }
            Value::List(list) => {
                let items = &list.items;
                at(items.len()).and_then(|position| items.get(position).cloned())
            }
            Value::Tuple(tuple) => {
                let items = &tuple.items;
                at(items.len()).and_then(|position| items.get(position).cloned())
            }
            Value::Text(text) => at(self.len().unwrap_or(0))
                .and_then(|position| text.text.chars().nth(position))
                .map(|c| text.with(&c.to_string())),
            Value::Range(range) => at(usize::try_from(range.len()).unwrap_or(usize::MAX))
                .filter(|&position| (position as i128) < range.len())
                .map(|position| Value::Int(range.start + position as i128 * range.step)),
            Value::Dict(dict) if item.check_hashable().is_ok() => dict.get(item).cloned(),
            _ => None,
        })
    }
}

fn chained(left: &[Value], right: &[Value]) -> Result<Vec<Value>, TemplateError> {
    limits::items(left.len() + right.len())?;
    Ok(left.iter().chain(right).cloned().collect())
}

fn cycled(items: &[Value], times: usize) -> Vec<Value> {
    let all = items.iter().cycle().take(items.len() * times);
    all.cloned().collect()
}

fn too_large() -> TemplateError {
    TemplateError::unsupported("an integer of more than 128 bits")
}

fn compare_numbers(left: Number, right: Number) -> Option<Ordering> {
    match (left, right) {
        (Number::Int(left), Number::Int(right)) => Some(left.cmp(&right)),
        (Number::Float(left), Number::Float(right)) => left.partial_cmp(&right),
        (Number::Int(left), Number::Float(right)) => number::compare_int(left, right),
        (Number::Float(left), Number::Int(right)) => {
            number::compare_int(right, left).map(Ordering::reverse)
        }
    }
}

fn sequences(
    left: &[Value],
    right: &[Value],
    operator: &str,
) -> Result<Option<Ordering>, TemplateError> {
    match left.iter().zip(right).find(|(l, r)| !l.equals(r)) {
        Some((left, right)) => left.order(right, operator),
        None => Ok(Some(left.len().cmp(&right.len()))),
    }
}

fn computed(
    operator: ArithmeticOperator,
    left: Number,
    right: Number,
) -> Result<Value, TemplateError> {
    if let (Number::Int(left), Number::Int(right)) = (left, right) {
        return integers(operator, left, right);
    }
    let (left, right) = (left.as_float(), right.as_float());
    let divides = [
        ArithmeticOperator::Divide,
        ArithmeticOperator::FloorDivide,
        ArithmeticOperator::Modulo,
    ];
    if right == 0.0 && divides.contains(&operator) {
        return Err(TemplateError::new("float division by zero"));
    }
    Ok(Value::Float(match operator {
        ArithmeticOperator::Add => left + right,
        ArithmeticOperator::Subtract => left - right,
        ArithmeticOperator::Multiply => left * right,
        ArithmeticOperator::Divide => left / right,
        ArithmeticOperator::FloorDivide => floor_divided(left, right),
        ArithmeticOperator::Modulo => modulo(left, right),
        ArithmeticOperator::Power => return power(left, right),
    }))
}

/// The remainder with the sign of the divisor.
fn modulo(left: f64, right: f64) -> f64 {
    let rest = left % right;
    if rest == 0.0 {
        0f64.copysign(right)
    } else if (rest < 0.0) == (right < 0.0) {
        rest
    } else {
        rest + right
    }
}

fn floor_divided(left: f64, right: f64) -> f64 {
    let quotient = (left - modulo(left, right)) / right;
    if quotient == 0.0 {
        return 0f64.copysign(left / right);
    }
    let floor = quotient.floor();
    if quotient - floor > 0.5 {
        floor + 1.0
    } else {
        floor
    }
}

fn power(left: f64, right: f64) -> Result<Value, TemplateError> {
    if left == 0.0 && right < 0.0 {
        return Err(TemplateError::new(
            "0.0 cannot be raised to a negative power",
        ));
    }
    if left < 0.0 && right.fract() != 0.0 && right.is_finite() {
        return Err(TemplateError::unsupported("a complex number"));
    }
    Ok(Value::Float(left.powf(right)))
}

fn integers(operator: ArithmeticOperator, left: i128, right: i128) -> Result<Value, TemplateError> {
    let is_zero = || match operator {
        ArithmeticOperator::Divide => TemplateError::new("division by zero"),
        _ => TemplateError::new("integer division or modulo by zero"),
    };
    let number = match operator {
        ArithmeticOperator::Add => left.checked_add(right),
        ArithmeticOperator::Subtract => left.checked_sub(right),
        ArithmeticOperator::Multiply => left.checked_mul(right),
        ArithmeticOperator::Divide
        | ArithmeticOperator::FloorDivide
        | ArithmeticOperator::Modulo
            if right == 0 =>
        {
            return Err(is_zero());
        }
        ArithmeticOperator::Divide => return Ok(Value::Float(divided(left, right))),
        ArithmeticOperator::FloorDivide => {
            let rest = left.checked_rem(right).unwrap_or(0);
            let is_inexact = rest != 0 && (left < 0) != (right < 0);
            left.checked_div(right)
                .map(|quotient| quotient - i128::from(is_inexact))
        }
        ArithmeticOperator::Modulo => left.checked_rem(right).map(|rest| {
            let is_off = rest != 0 && (rest < 0) != (right < 0);
            if is_off { rest + right } else { rest }
        }),
        ArithmeticOperator::Power if right < 0 => return power(left as f64, right as f64),
        ArithmeticOperator::Power => {
            let exponent = u32::try_from(right).map_err(|_| too_large())?;
            left.checked_pow(exponent)
        }
    };
    number.map(Value::Int).ok_or_else(too_large)
}

/// Quotient of integers that are not exactly representable as floats.
fn divided(left: i128, right: i128) -> f64 {
    let is_exact = |number: i128| number.unsigned_abs() <= 1 << 53;
    if is_exact(left) && is_exact(right) {
        return left as f64 / right as f64;
    }
    let (Some(whole), Some(rest)) = (left.checked_div(right), left.checked_rem(right)) else {
        return left as f64 / right as f64;
    };
    if is_exact(whole) {
        whole as f64 + rest as f64 / right as f64
    } else {
        left as f64 / right as f64
    }
}

impl View {
    fn equals(&self, other: &View) -> bool {
        if self.kind == ViewKind::Values || self.kind != other.kind {
            return false;
        }
        let (left, right) = (self.items(), other.items());
        left.len() == right.len()
            && left
                .iter()
                .all(|item| right.iter().any(|other| item.equals(other)))
    }
}

impl Text {
    /// A string with the same escaping state as this one.
    pub(crate) fn with(&self, text: &str) -> Value {
        Value::Text(Text::new(text, self.is_safe))
    }

    fn equals(&self, right: &Text) -> bool {
        if Rc::ptr_eq(&self.text, &right.text) {
            return true;
        }
        self.text.len() == right.text.len()
            && limits::spend(self.text.len() / 64)
            && self.text == right.text
    }

    /// `self + right`: if one operand is escaped, the other is escaped too.
    fn plus(&self, right: &Text) -> Text {
        let is_safe = self.is_safe || right.is_safe;
        let part = |text: &Text| match is_safe && !text.is_safe {
            true => escaped(&text.text),
            false => text.text.to_string(),
        };
        Text::new(&(part(self) + &part(right)), is_safe)
    }
}

/// Escapes the special characters of HTML.
pub(crate) fn escaped(text: &str) -> String {
    let mut written = String::new();
    for c in text.chars() {
        match c {
            '&' => written.push_str("&amp;"),
            '<' => written.push_str("&lt;"),
            '>' => written.push_str("&gt;"),
            '"' => written.push_str("&#34;"),
            '\'' => written.push_str("&#39;"),
            c => written.push(c),
        }
    }
    written
}

/// Indices of `[start:stop:step]` in a sequence of `length`, as in Python.
pub(crate) fn slice_indices(
    length: usize,
    start: Option<i128>,
    stop: Option<i128>,
    step: i128,
) -> Vec<usize> {
    let length = length as i128;
    let bound = |value: i128| {
        let value = if value < 0 { value + length } else { value };
        if step > 0 {
            value.clamp(0, length)
        } else {
            value.clamp(-1, length - 1)
        }
    };
    let (first, last) = if step > 0 {
        (0, length)
    } else {
        (length - 1, -1)
    };
    let (mut position, stop) = (start.map_or(first, bound), stop.map_or(last, bound));
    let mut positions = Vec::new();
    while if step > 0 {
        position < stop
    } else {
        position > stop
    } {
        positions.push(position as usize);
        position = position.saturating_add(step);
    }
    positions
}

/// Integer value of a slice bound.
pub(crate) fn bound(value: Option<Value>) -> Result<Option<i128>, TemplateError> {
    match value {
        None | Some(Value::None) => Ok(None),
        Some(value) => {
            value.must_be_defined()?;
            let number = value.as_int();
            let message = "slice indices must be integers or None or have an __index__ method";
            number.map(Some).ok_or_else(|| TemplateError::new(message))
        }
    }
}

/// The undefined value of an unknown name.
pub(crate) fn undefined_name(name: &str) -> Value {
    Value::undefined(format!("{} is undefined", repr(name)))
}
