//! Python's values, as far as templates need them.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt,
    rc::Rc,
};

use serde_json::Value as Json;

use crate::{
    ast::Literal, error::TemplateError, functions::Function, limits, loops::Loop, methods::Method,
    render::MacroValue, repr::ReprWriter,
};

/// Bytes of text that an operation goes through for one unit of work.
const TEXT_BYTES_PER_UNIT: usize = 8;

/// A value of a template.
#[derive(Clone)]
pub(crate) enum Value {
    /// jinja2's `Undefined`: empty where that is meaningful, an error elsewhere.
    Undefined(Rc<Undefined>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Text),
    List(Rc<List>),
    Tuple(Rc<Tuple>),
    Dict(Rc<Dict>),
    /// Result of a dictionary's `keys`, `values` and `items`.
    View(Rc<View>),
    Range(Range),
    /// A one-pass iterator.
    Generator(Rc<Generator>),
    Namespace(Rc<RefCell<Dict>>),
    Loop(Rc<Loop>),
    Macro(Rc<MacroValue>),
    Method(Rc<Method>),
    Function(Function),
    /// Result of `cycler`.
    Cycler(Rc<Cycler>),
    /// Result of `joiner`: a separator and whether it was used.
    Joiner(Rc<(Value, Cell<bool>)>),
}

/// Reason for an undefined value.
#[derive(Debug, Clone)]
pub(crate) struct Undefined {
    /// Error message, as in jinja2.
    pub(crate) reason: String,
}

/// A string.
#[derive(Clone)]
pub(crate) struct Text {
    pub(crate) text: Rc<str>,
    /// Whether the string is marked as safe HTML; strings appended to it are then escaped.
    pub(crate) is_safe: bool,
}

/// A list.
pub(crate) struct List {
    pub(crate) items: Vec<Value>,
    depth: usize,
}

/// A tuple; those of `groupby` have named elements.
pub(crate) struct Tuple {
    pub(crate) items: Vec<Value>,
    pub(crate) names: &'static [&'static str],
    depth: usize,
}

/// The remaining items of a one-pass iterator.
pub(crate) struct Generator {
    pub(crate) rest: RefCell<VecDeque<Value>>,
    depth: usize,
}

/// Values that are repeated in turn.
pub(crate) struct Cycler {
    /// At least one.
    pub(crate) items: Vec<Value>,
    pub(crate) next: Cell<usize>,
    depth: usize,
}

impl Cycler {
    pub(crate) fn new(items: Vec<Value>) -> Self {
        let depth = deepest(&items);
        let next = Cell::new(0);
        Self { items, next, depth }
    }
}

/// Maximum depth of these values.
fn deepest<'a>(values: impl IntoIterator<Item = &'a Value>) -> usize {
    values.into_iter().map(Value::depth).max().unwrap_or(0)
}

/// A dictionary in insertion order.
#[derive(Clone, Default)]
pub(crate) struct Dict {
    pub(crate) pairs: Vec<(Value, Value)>,
    depth: usize,
}

/// Kind of a dictionary view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ViewKind {
    Keys,
    Values,
    Items,
}

/// A view of a dictionary.
pub(crate) struct View {
    pub(crate) kind: ViewKind,
    pub(crate) dict: Rc<Dict>,
}

/// `range(start, stop, step)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: i128,
    pub(crate) stop: i128,
    /// Non-zero.
    pub(crate) step: i128,
}

impl Range {
    /// Number of elements; `None` beyond 128 bits.
    pub(crate) fn checked_len(self) -> Option<i128> {
        let span = if self.step > 0 {
            self.stop.checked_sub(self.start)?
        } else {
            self.start.checked_sub(self.stop)?
        };
        if span <= 0 {
            return Some(0);
        }
        let steps = (span - 1).unsigned_abs() / self.step.unsigned_abs();
        i128::try_from(steps).ok()?.checked_add(1)
    }

    /// Number of elements, which the function `range` bounds.
    pub(crate) fn len(self) -> i128 {
        self.checked_len().unwrap_or(i128::MAX)
    }

    pub(crate) fn items(self) -> Vec<Value> {
        (0..self.len())
            .map(|position| Value::Int(self.start + position * self.step))
            .collect()
    }
}

impl Dict {
    pub(crate) fn get(&self, key: &Value) -> Option<&Value> {
        let found = self.pairs.iter().find(|(known, _)| known.equals(key));
        found.map(|(_, value)| value)
    }

    pub(crate) fn get_text(&self, key: &str) -> Option<&Value> {
        limits::spend(self.pairs.len() / 8);
        let is_key = |known: &Value| matches!(known, Value::Text(text) if *text.text == *key);
        let found = self.pairs.iter().find(|(known, _)| is_key(known));
        found.map(|(_, value)| value)
    }

    /// Sets a key; an existing key keeps its position.
    pub(crate) fn insert(&mut self, key: Value, value: Value) -> Result<(), TemplateError> {
        key.check_hashable()?;
        self.depth = self.depth.max(key.depth()).max(value.depth());
        if self.pairs.len() == limits::KEYS {
            return Err(TemplateError::new(format!(
                "a dictionary of more than {} keys",
                limits::KEYS
            )));
        }
        match self.pairs.iter_mut().find(|(known, _)| known.equals(&key)) {
            Some((_, old)) => *old = value,
            None => {
                limits::allocate(size_of::<(Value, Value)>());
                self.pairs.push((key, value));
            }
        }
        limits::check()
    }
}

impl View {
    pub(crate) fn items(&self) -> Vec<Value> {
        let pairs = self.dict.pairs.iter();
        let shown = pairs.map(|(key, value)| match self.kind {
            ViewKind::Keys => key.clone(),
            ViewKind::Values => value.clone(),
            ViewKind::Items => Value::tuple(vec![key.clone(), value.clone()]),
        });
        shown.collect()
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(Text::new(text, false))
    }
}

impl Text {
    pub(crate) fn new(text: &str, is_safe: bool) -> Self {
        limits::allocate_text(text.len());
        Self {
            text: text.into(),
            is_safe,
        }
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<&Literal> for Value {
    fn from(literal: &Literal) -> Self {
        match literal {
            Literal::None => Self::None,
            Literal::Bool(value) => Self::Bool(*value),
            Literal::Int(number) => Self::Int(*number),
            Literal::Float(number) => Self::Float(*number),
            Literal::Text(text) => Self::from(text.as_str()),
        }
    }
}

impl From<&Json> for Value {
    fn from(json: &Json) -> Self {
        match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(number), _) => Self::Int(number.into()),
                (None, Some(number)) => Self::Int(number.into()),
                (None, None) => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::from(text.as_str()),
            Json::Array(items) => Self::list(items.iter().map(Self::from).collect()),
            Json::Object(map) => {
                let pairs = map
                    .iter()
                    .map(|(key, value)| (key.as_str().into(), value.into()));
                let pairs: Vec<(Value, Value)> = pairs.collect();
                let depth = deepest(pairs.iter().map(|(_, value)| value));
                Self::Dict(Rc::new(Dict { pairs, depth }))
            }
        }
    }
}

impl Value {
    pub(crate) fn list(items: Vec<Value>) -> Self {
        limits::allocate_items(items.len(), size_of::<Value>());
        let depth = deepest(&items);
        Self::List(Rc::new(List { items, depth }))
    }

    pub(crate) fn tuple(items: Vec<Value>) -> Self {
        Self::named_tuple(items, &[])
    }

    pub(crate) fn named_tuple(items: Vec<Value>, names: &'static [&'static str]) -> Self {
        limits::allocate_items(items.len(), size_of::<Value>());
        let depth = deepest(&items);
        Self::Tuple(Rc::new(Tuple {
            items,
            names,
            depth,
        }))
    }

    pub(crate) fn dict(pairs: Dict) -> Self {
        limits::allocate_items(pairs.pairs.len(), size_of::<(Value, Value)>());
        Self::Dict(Rc::new(pairs))
    }

    pub(crate) fn generator(items: Vec<Value>) -> Self {
        limits::allocate_items(items.len(), size_of::<Value>());
        let depth = deepest(&items);
        let rest = RefCell::new(items.into());
        Self::Generator(Rc::new(Generator { rest, depth }))
    }

    /// Nesting depth. Namespaces do not count: the renderer owns them, so they are not dropped recursively.
    pub(crate) fn depth(&self) -> usize {
        1 + match self {
            Self::List(list) => list.depth,
            Self::Tuple(tuple) => tuple.depth,
            Self::Dict(dict) => dict.depth,
            Self::View(view) => view.dict.depth,
            Self::Generator(generator) => generator.depth,
            Self::Loop(around) => around.depth,
            Self::Method(method) => method.receiver.depth(),
            Self::Cycler(cycler) => cycler.depth,
            Self::Joiner(joiner) => joiner.0.depth(),
            _ => 0,
        }
    }

    /// Work units of an operation that goes through the value once, without nested values.
    pub(crate) fn work(&self) -> usize {
        match self {
            Self::Text(text) => text.text.len() / TEXT_BYTES_PER_UNIT,
            Self::Range(range) => usize::try_from(range.len()).unwrap_or(usize::MAX),
            Self::Generator(generator) => generator.rest.borrow().len(),
            other => other.len().unwrap_or(0),
        }
    }

    pub(crate) fn undefined(reason: impl Into<String>) -> Self {
        let reason = reason.into();
        limits::allocate(reason.len());
        Self::Undefined(Rc::new(Undefined { reason }))
    }

    /// A string marked as safe HTML.
    pub(crate) fn safe(text: &str) -> Self {
        Self::Text(Text::new(text, true))
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(&text.text),
            _ => None,
        }
    }

    /// The value as an integer; `True` is 1.
    pub(crate) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(value) => Some(i128::from(*value)),
            _ => None,
        }
    }

    /// Python's type name.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(Text { is_safe: true, .. }) => "Markup",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::View(view) => match view.kind {
                ViewKind::Keys => "dict_keys",
                ViewKind::Values => "dict_values",
                ViewKind::Items => "dict_items",
            },
            Self::Range(_) => "range",
            Self::Generator(_) => "generator",
            Self::Namespace(_) => "TemplateNamespace",
            Self::Loop(_) => "LoopContext",
            Self::Macro(_) => "Macro",
            Self::Method(_) => "builtin_function_or_method",
            Self::Function(_) => "function",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
        }
    }

    /// Error if the value is undefined.
    pub(crate) fn must_be_defined(&self) -> Result<(), TemplateError> {
        match self {
            Self::Undefined(undefined) => Err(TemplateError::new(undefined.reason.clone())),
            _ => Ok(()),
        }
    }

    /// Python's `bool`.
    pub(crate) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(number) => *number != 0,
            Self::Float(number) => *number != 0.0,
            Self::Text(text) => !text.text.is_empty(),
            _ => self.len().is_none_or(|length| length > 0),
        }
    }

    /// Python's `len`, if defined.
    pub(crate) fn len(&self) -> Option<usize> {
        Some(match self {
            Self::Undefined(_) => 0,
            Self::Text(text) => {
                limits::spend(self.work());
                text.text.chars().count()
            }
            Self::List(list) => list.items.len(),
            Self::Tuple(tuple) => tuple.items.len(),
            Self::Dict(dict) => dict.pairs.len(),
            Self::View(view) => view.dict.pairs.len(),
            Self::Range(range) => usize::try_from(range.len()).unwrap_or(usize::MAX),
            Self::Loop(around) => around.items.len(),
            _ => return None,
        })
    }

    /// Elements of an iterable. A one-pass iterator is exhausted.
    pub(crate) fn iterate(&self) -> Result<Vec<Value>, TemplateError> {
        let units = match self {
            Self::Text(text) => text.text.len(),
            other => other.work(),
        };
        limits::work(units)?;
        limits::allocate(units.saturating_mul(size_of::<Value>()));
        Ok(match self {
            Self::Undefined(_) => Vec::new(),
            Self::Text(text) => {
                let mut buffer = [0; 4];
                limits::items(text.text.len())?;
                text.text
                    .chars()
                    .map(|c| Self::from(&*c.encode_utf8(&mut buffer)))
                    .collect()
            }
            Self::List(list) => list.items.clone(),
            Self::Tuple(tuple) => tuple.items.clone(),
            Self::Dict(dict) => dict.pairs.iter().map(|(key, _)| key.clone()).collect(),
            Self::View(view) => view.items(),
            Self::Range(range) => range.items(),
            Self::Generator(generator) => generator.rest.borrow_mut().drain(..).collect(),
            Self::Loop(_) => {
                return Err(TemplateError::unsupported(
                    "going through a loop's own variable",
                ));
            }
            other => {
                return Err(TemplateError::new(format!(
                    "'{}' object is not iterable",
                    other.type_name()
                )));
            }
        })
    }

    pub(crate) fn is_iterable(&self) -> bool {
        matches!(
            self,
            Self::Undefined(_)
                | Self::Text(_)
                | Self::List(_)
                | Self::Tuple(_)
                | Self::Dict(_)
                | Self::View(_)
                | Self::Range(_)
                | Self::Generator(_)
                | Self::Loop(_)
        )
    }

    pub(crate) fn is_callable(&self) -> bool {
        matches!(
            self,
            Self::Macro(_)
                | Self::Method(_)
                | Self::Function(_)
                | Self::Loop(_)
                | Self::Joiner(_)
                // Calling it is an error, but `callable` only checks for the method.
                | Self::Undefined(_)
        )
    }

    /// Error if the value is not hashable.
    pub(crate) fn check_hashable(&self) -> Result<(), TemplateError> {
        limits::work(1)?;
        match self {
            Self::List(_) | Self::Dict(_) => Err(TemplateError::new(format!(
                "unhashable type: '{}'",
                self.type_name()
            ))),
            Self::Tuple(tuple) => tuple.items.iter().try_for_each(Self::check_hashable),
            _ => Ok(()),
        }
    }

    /// Python's `str`.
    pub(crate) fn to_text(&self) -> Result<Rc<str>, TemplateError> {
        Ok(match self {
            Self::Undefined(_) => "".into(),
            Self::Text(text) => Rc::clone(&text.text),
            other => {
                let text = other.repr()?;
                limits::allocate_text(text.len());
                text.into()
            }
        })
    }

    /// Python's `repr`.
    pub(crate) fn repr(&self) -> Result<String, TemplateError> {
        ReprWriter::written(self)
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.repr() {
            Ok(text) => f.write_str(&text),
            Err(_) => write!(f, "<{}>", self.type_name()),
        }
    }
}
