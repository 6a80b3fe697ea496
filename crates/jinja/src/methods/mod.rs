//! Attributes and methods of Python's values, as available in jinja2's sandbox.

mod strings;

pub(crate) use strings::{Side, padded, strip};

use std::{cell::RefCell, rc::Rc};

use crate::{
    arguments::CallArguments,
    error::TemplateError,
    functions::Function,
    limits,
    text::{repr, shortened},
    value::{Dict, Value, View, ViewKind},
};

/// A method of a value.
pub(crate) struct Method {
    pub(crate) receiver: Value,
    pub(crate) name: &'static str,
}

const OF_TEXT: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
const OF_DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const OF_LIST: [&str; 3] = ["copy", "count", "index"];
const OF_TUPLE: [&str; 2] = ["count", "index"];
const OF_INT: [&str; 7] = [
    "as_integer_ratio",
    "bit_count",
    "bit_length",
    "conjugate",
    "denominator",
    "numerator",
    "to_bytes",
];
const OF_FLOAT: [&str; 4] = ["as_integer_ratio", "conjugate", "hex", "is_integer"];
/// Mutating methods, which the sandbox forbids.
const CHANGES_DICT: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const CHANGES_LIST: [&str; 8] = [
    "append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort",
];

impl Value {
    /// `self.name`: the attribute, otherwise the element with this key.
    pub(crate) fn attribute(&self, name: &str) -> Result<Value, TemplateError> {
        self.must_be_defined()?;
        if let Some(found) = self.python_attribute(name) {
            return Ok(found);
        }
        let name = Value::from(name);
        Ok(self.item(&name)?.unwrap_or_else(|| self.lacks(&name)))
    }

    /// `self[item]`: the element, otherwise the attribute of this name.
    pub(crate) fn subscript(&self, item: &Value) -> Result<Value, TemplateError> {
        if let Some(found) = self.item(item)? {
            return Ok(found);
        }
        let attribute = item.as_str().and_then(|name| self.python_attribute(name));
        Ok(attribute.unwrap_or_else(|| self.lacks(item)))
    }

    /// Like [`Self::attribute`], without elements.
    pub(crate) fn own_attribute(&self, name: &str) -> Result<Value, TemplateError> {
        self.must_be_defined()?;
        let found = self.python_attribute(name);
        Ok(found.unwrap_or_else(|| self.lacks(&name.into())))
    }

    fn lacks(&self, item: &Value) -> Value {
        let object = match self {
            Value::None => "'None'".to_owned(),
            other => format!("'{} object'", other.type_name()),
        };
        match item.as_str() {
            Some(name) => {
                let name = repr(&shortened(name));
                Value::undefined(format!("{object} has no attribute {name}"))
            }
            None => {
                let object = object.trim_matches('\'');
                Value::undefined(format!("{object} has no element {}", shown(item)))
            }
        }
    }

    fn python_attribute(&self, name: &str) -> Option<Value> {
        let (methods, changing): (&[&'static str], &[&str]) = match self {
            Value::Text(_) => (&OF_TEXT, &[]),
            Value::Dict(_) => (&OF_DICT, &CHANGES_DICT),
            Value::List(_) => (&OF_LIST, &CHANGES_LIST),
            Value::Tuple(_) => (&OF_TUPLE, &[]),
            Value::Int(_) | Value::Bool(_) => (&OF_INT, &[]),
            Value::Float(_) => (&OF_FLOAT, &[]),
            Value::Cycler(_) => (&["next", "reset"], &[]),
            Value::Loop(_) => (&["cycle", "changed"], &[]),
            Value::Function(Function::Dict) => (&["fromkeys"], &[]),
            _ => (&[], &[]),
        };
        if changing.contains(&name) {
            let object = self.type_name();
            let reason = format!("access to attribute '{name}' of '{object}' object is unsafe.");
            return Some(Value::undefined(reason));
        }
        if let Some(&name) = methods.iter().find(|method| **method == name) {
            let receiver = self.clone();
            return Some(Value::Method(Rc::new(Method { receiver, name })));
        }
        self.field(name)
    }

    /// An attribute that is not a method.
    fn field(&self, name: &str) -> Option<Value> {
        match (self, name) {
            (Value::Namespace(namespace), _) => namespace.borrow().get_text(name).cloned(),
            (Value::Loop(around), _) => around.attribute(name),
            (Value::Tuple(tuple), _) => {
                let position = tuple.names.iter().position(|known| *known == name)?;
                tuple.items.get(position).cloned()
            }
            (Value::Macro(defined), "name") => Some(defined.definition.name.as_str().into()),
            (Value::Macro(defined), "arguments") => {
                let names = defined
                    .definition
                    .parameters
                    .iter()
                    .map(|(name, _)| name.as_str().into());
                Some(Value::tuple(names.collect()))
            }
            (Value::Macro(defined), "catch_kwargs") => {
                Some(Value::Bool(defined.definition.takes.kwargs))
            }
            (Value::Macro(defined), "catch_varargs") => {
                Some(Value::Bool(defined.definition.takes.varargs))
            }
            (Value::Macro(defined), "caller") => Some(Value::Bool(defined.definition.takes.caller)),
            (Value::Cycler(cycler), "current") => cycler.items.get(cycler.next.get()).cloned(),
            (Value::Int(_) | Value::Bool(_), "real") => self.as_int().map(Value::Int),
            (Value::Int(_) | Value::Bool(_), "imag") => Some(Value::Int(0)),
            (Value::Float(_), "real") => Some(self.clone()),
            (Value::Float(_), "imag") => Some(Value::Float(0.0)),
            (Value::Range(range), "start") => Some(Value::Int(range.start)),
            (Value::Range(range), "stop") => Some(Value::Int(range.stop)),
            (Value::Range(range), "step") => Some(Value::Int(range.step)),
            _ => None,
        }
    }
}

impl Method {
    /// Calls the method.
    pub(crate) fn call(&self, args: CallArguments) -> Result<Value, TemplateError> {
        let receiver = match &self.receiver {
            // Lookups are charged by the keys that they compare.
            Value::Dict(_) => 1,
            other => other.work(),
        };
        limits::work(receiver.saturating_add(args.work()))?;
        match &self.receiver {
            Value::Text(text) => strings::call(text, self.name, args),
            Value::Dict(dict) => of_dict(dict, self.name, args),
            Value::List(list) if self.name == "copy" => {
                args.bind("copy", &[])?;
                Ok(Value::list(list.items.clone()))
            }
            Value::List(list) => of_sequence(&list.items, self.name, args),
            Value::Tuple(tuple) => of_sequence(&tuple.items, self.name, args),
            Value::Loop(around) if self.name == "changed" => {
                Ok(Value::Bool(around.changed(args.positional)))
            }
            Value::Loop(around) => {
                let values = args.positional;
                let missing = || TemplateError::new("no items for cycling given");
                let position = around
                    .index0
                    .checked_rem(values.len())
                    .ok_or_else(missing)?;
                Ok(values[position].clone())
            }
            Value::Cycler(cycler) => {
                args.bind(self.name, &[])?;
                if self.name == "reset" {
                    cycler.next.set(0);
                    return Ok(Value::None);
                }
                let now = cycler.next.get();
                cycler.next.set((now + 1) % cycler.items.len());
                Ok(cycler.items[now].clone())
            }
            Value::Function(Function::Dict) => from_keys(args),
            Value::Float(number) if self.name == "is_integer" => {
                Ok(Value::Bool(number.is_finite() && number.fract() == 0.0))
            }
            other => {
                let name = other.type_name();
                Err(TemplateError::unsupported(&format!(
                    "the method {} of {name}",
                    self.name
                )))
            }
        }
    }
}

/// A value for messages: containers by their type, since they may be of any size.
fn shown(value: &Value) -> String {
    match value {
        Value::Text(text) => repr(&shortened(&text.text)),
        Value::Int(_) | Value::Float(_) | Value::Bool(_) | Value::None => format!("{value:?}"),
        other => format!("of type {}", other.type_name()),
    }
}

fn of_dict(
    dict: &Rc<Dict>,
    name: &'static str,
    args: CallArguments,
) -> Result<Value, TemplateError> {
    let view = |kind| {
        let dict = Rc::clone(dict);
        Value::View(Rc::new(View { kind, dict }))
    };
    match name {
        "get" => {
            let args = args.bind(name, &["key", "default"])?;
            let key = args.required(0)?;
            key.check_hashable()?;
            let default = || args.get(1).cloned().unwrap_or(Value::None);
            Ok(dict.get(key).cloned().unwrap_or_else(default))
        }
        "fromkeys" => from_keys(args),
        _ => {
            args.bind(name, &[])?;
            Ok(match name {
                "items" => view(ViewKind::Items),
                "keys" => view(ViewKind::Keys),
                "values" => view(ViewKind::Values),
                _ => Value::dict(dict.as_ref().clone()),
            })
        }
    }
}

fn from_keys(args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("fromkeys", &["iterable", "value"])?;
    let mut dict = Dict::default();
    for key in args.required(0)?.iterate()? {
        dict.insert(key, args.get(1).cloned().unwrap_or(Value::None))?;
    }
    Ok(Value::dict(dict))
}

fn of_sequence(
    items: &[Value],
    name: &'static str,
    args: CallArguments,
) -> Result<Value, TemplateError> {
    if name == "count" {
        let args = args.bind(name, &["value"])?;
        let value = args.required(0)?;
        let count = items.iter().filter(|item| item.equals(value)).count();
        return Ok(Value::Int(count as i128));
    }
    let args = args.bind(name, &["value", "start", "stop"])?;
    let value = args.required(0)?;
    let bounds = (args.some_int(1)?, args.some_int(2)?);
    let mut positions =
        crate::operators::slice_indices(items.len(), bounds.0, bounds.1, 1).into_iter();
    let position = positions.find(|&position| items[position].equals(value));
    let position =
        position.ok_or_else(|| TemplateError::new(format!("{} is not in list", shown(value))))?;
    Ok(Value::Int(position as i128))
}

/// A namespace with these attributes.
pub(crate) fn namespace(args: CallArguments) -> Result<Value, TemplateError> {
    let dict = dictionary(args)?;
    let hidden = dict
        .pairs
        .iter()
        .find_map(|(key, _)| key.as_str().filter(|key| key.starts_with('_')));
    if let Some(name) = hidden {
        let message =
            format!("namespaces cannot store underscore-prefixed attributes, but got '{name}'");
        return Err(TemplateError::new(message));
    }
    Ok(Value::Namespace(Rc::new(RefCell::new(dict))))
}

/// Python's `dict` of a mapping or pairs, and of keyword arguments.
pub(crate) fn dictionary(args: CallArguments) -> Result<Dict, TemplateError> {
    let CallArguments { positional, named } = args;
    let mut dict = Dict::default();
    if positional.len() > 1 {
        return Err(TemplateError::new(format!(
            "dict expected at most 1 argument, got {}",
            positional.len()
        )));
    }
    match positional.into_iter().next() {
        Some(Value::Dict(other)) => dict = other.as_ref().clone(),
        Some(pairs) => {
            for pair in pairs.iterate()? {
                let [key, value] = <[Value; 2]>::try_from(pair.iterate()?).map_err(|_| {
                    TemplateError::new("dictionary update sequence element has not length 2")
                })?;
                dict.insert(key, value)?;
            }
        }
        None => {}
    }
    for (name, value) in named {
        dict.insert(name.into(), value)?;
    }
    Ok(dict)
}

/// A group of `groupby`.
pub(crate) fn group(grouper: Value, items: Vec<Value>) -> Value {
    Value::named_tuple(vec![grouper, Value::list(items)], &["grouper", "list"])
}
