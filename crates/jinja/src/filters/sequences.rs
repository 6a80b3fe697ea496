//! Filters of sequences and dictionaries.

use std::cmp::Ordering;

use crate::{
    arguments::CallArguments, ast::ArithmeticOperator, error::TemplateError, limits, methods,
    tests, value::Value,
};

type Apply = fn(&Value, CallArguments) -> Result<Value, TemplateError>;

/// Applies the sequence filter of this name, if there is one.
pub(super) fn named(name: &str) -> Option<Apply> {
    Some(match name {
        "batch" => batch,
        "dictsort" => dictsort,
        "first" => first,
        "groupby" => groupby,
        "items" => items,
        "join" => join,
        "last" => last,
        "list" => |value, args| {
            args.bind("list", &[])?;
            value.iterate().map(Value::list)
        },
        "map" => map,
        "max" => |value, args| extreme(value, args, "max", Ordering::Greater),
        "min" => |value, args| extreme(value, args, "min", Ordering::Less),
        "reject" => |value, args| select(value, args, Selection::of_items(false)),
        "rejectattr" => |value, args| select(value, args, Selection::of_attributes(false)),
        "reverse" => reverse,
        "select" => |value, args| select(value, args, Selection::of_items(true)),
        "selectattr" => |value, args| select(value, args, Selection::of_attributes(true)),
        "slice" => slice,
        "sort" => sort,
        "sum" => sum,
        "unique" => unique,
        _ => return None,
    })
}

fn first(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    args.bind("first", &[])?;
    let found = match value {
        // The remaining items stay available.
        Value::Generator(generator) => generator.rest.borrow_mut().pop_front(),
        Value::List(list) => list.items.first().cloned(),
        Value::Tuple(tuple) => tuple.items.first().cloned(),
        other => other.iterate()?.into_iter().next(),
    };
    Ok(found.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
}

fn last(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    args.bind("last", &[])?;
    let found = match value {
        Value::List(list) => list.items.last().cloned(),
        Value::Tuple(tuple) => tuple.items.last().cloned(),
        other => reversed(other)?.into_iter().next(),
    };
    Ok(found.unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
}

fn items(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    args.bind("items", &[])?;
    match value {
        Value::Undefined(_) => Ok(Value::generator(Vec::new())),
        Value::Dict(dict) => {
            let pairs = dict.pairs.iter();
            let pairs = pairs.map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()]));
            Ok(Value::generator(pairs.collect()))
        }
        _ => Err(TemplateError::new(
            "Can only get item pairs from a mapping.",
        )),
    }
}

fn reverse(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    args.bind("reverse", &[])?;
    match value {
        Value::Text(text) => Ok(text.with(&text.text.chars().rev().collect::<String>())),
        Value::Generator(_) => {
            let mut items = value.iterate()?;
            items.reverse();
            Ok(Value::list(items))
        }
        other => reversed(other).map(Value::generator),
    }
}

/// Reversed elements of a sequence that Python can reverse.
fn reversed(value: &Value) -> Result<Vec<Value>, TemplateError> {
    if matches!(value, Value::Generator(_)) || !value.is_iterable() {
        let name = value.type_name();
        return Err(TemplateError::new(format!(
            "'{name}' object is not reversible"
        )));
    }
    let mut items = value.iterate()?;
    items.reverse();
    Ok(items)
}

/// Path to an attribute of an element: names and indices separated by dots, or an index.
struct Path(Vec<Value>);

/// Maximum number of parts of a path, and of attributes to sort by.
const MAX_PARTS: usize = 100;

/// Splits names at a separator.
fn parts(names: &str, separator: char) -> Result<Vec<&str>, TemplateError> {
    let parts: Vec<&str> = names.split(separator).take(MAX_PARTS + 1).collect();
    if parts.len() > MAX_PARTS {
        let message = format!("more than {MAX_PARTS} attributes in one argument");
        return Err(TemplateError::new(message));
    }
    Ok(parts)
}

impl Path {
    fn of(attribute: Option<&Value>) -> Result<Self, TemplateError> {
        Ok(match attribute {
            None | Some(Value::None) => Self(Vec::new()),
            Some(Value::Text(text)) => Self::named(&text.text)?,
            Some(other) => Self(vec![other.clone()]),
        })
    }

    fn named(names: &str) -> Result<Self, TemplateError> {
        let part = |part: &str| tests::position(part).map_or_else(|| part.into(), Value::Int);
        let names = parts(names, '.')?;
        Ok(Self(names.into_iter().map(part).collect()))
    }

    /// Resolves the path in `item`; `default` replaces each missing part.
    fn find(&self, item: &Value, default: Option<&Value>) -> Result<Value, TemplateError> {
        let mut found = item.clone();
        limits::work(self.0.len())?;
        for part in &self.0 {
            found = found.subscript(part)?;
            if let (Value::Undefined(_), Some(default)) = (&found, default) {
                found = default.clone();
            }
        }
        Ok(found)
    }
}

/// Lower-cases strings, for case-insensitive comparisons.
fn folded(value: Value, is_case_sensitive: bool) -> Value {
    match &value {
        Value::Text(text) if !is_case_sensitive => text.text.to_lowercase().into(),
        _ => value,
    }
}

/// Stable merge sort by a key; the standard library's requires an order that cannot fail.
///
/// # Errors
/// If Python cannot order two of the keys, or one is NaN, whose place depends on Python's algorithm.
pub(crate) fn sort_by<T>(
    mut items: Vec<T>,
    key: impl Fn(&T) -> &Value + Copy,
) -> Result<Vec<T>, TemplateError> {
    if items.len() < 2 {
        return Ok(items);
    }
    let right = items.split_off(items.len() / 2);
    let mut left = sort_by(items, key)?.into_iter().peekable();
    let mut right = sort_by(right, key)?.into_iter().peekable();
    let mut sorted = Vec::with_capacity(left.len() + right.len());
    while let (Some(first), Some(second)) = (left.peek(), right.peek()) {
        let order = key(second).order(key(first), "<")?;
        let order = order.ok_or_else(|| TemplateError::unsupported("sorting NaN"))?;
        let next = if order == Ordering::Less {
            &mut right
        } else {
            &mut left
        };
        sorted.extend(next.next());
    }
    sorted.extend(left);
    sorted.extend(right);
    Ok(sorted)
}

/// Elements sorted by a key.
fn sorted(
    keyed: Vec<(Value, Value)>,
    is_reversed: bool,
) -> Result<Vec<(Value, Value)>, TemplateError> {
    let mut keyed = keyed;
    if is_reversed {
        keyed.reverse();
    }
    keyed = sort_by(keyed, |(key, _)| key)?;
    if is_reversed {
        keyed.reverse();
    }
    Ok(keyed)
}

fn sort(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("sort", &["reverse", "case_sensitive", "attribute"])?;
    let paths: Vec<Path> = match args.get(2) {
        Some(Value::Text(text)) => {
            let names = parts(&text.text, ',')?.into_iter();
            names.map(Path::named).collect::<Result<_, _>>()?
        }
        other => vec![Path::of(other)?],
    };
    let key = |item: &Value| {
        let parts = paths
            .iter()
            .map(|path| Ok(folded(path.find(item, None)?, args.is_true(1))));
        parts.collect::<Result<_, TemplateError>>().map(Value::list)
    };
    let keyed = value
        .iterate()?
        .into_iter()
        .map(|item| Ok((key(&item)?, item)));
    let keyed = sorted(
        keyed.collect::<Result<_, TemplateError>>()?,
        args.is_true(0),
    )?;
    Ok(Value::list(
        keyed.into_iter().map(|(_, item)| item).collect(),
    ))
}

fn dictsort(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("dictsort", &["case_sensitive", "by", "reverse"])?;
    let by_value = match args.some_text(1)?.unwrap_or("key") {
        "key" => false,
        "value" => true,
        _ => {
            return Err(TemplateError::new(
                "You can only sort by either \"key\" or \"value\"",
            ));
        }
    };
    value.must_be_defined()?;
    let Value::Dict(dict) = value else {
        let name = value.type_name();
        return Err(TemplateError::new(format!(
            "'{name}' object has no attribute 'items'"
        )));
    };
    let keyed = dict.pairs.iter().map(|(key, value)| {
        let by = if by_value { value } else { key };
        let pair = Value::tuple(vec![key.clone(), value.clone()]);
        (folded(by.clone(), args.is_true(0)), pair)
    });
    let keyed = sorted(keyed.collect(), args.is_true(2))?;
    Ok(Value::list(
        keyed.into_iter().map(|(_, pair)| pair).collect(),
    ))
}

fn groupby(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("groupby", &["attribute", "default", "case_sensitive"])?;
    let path = Path::of(Some(args.required(0)?))?;
    let (default, is_case_sensitive) = (args.some(1), args.is_true(2));
    let key = |item: &Value| Ok(folded(path.find(item, default)?, is_case_sensitive));
    let keyed = value
        .iterate()?
        .into_iter()
        .map(|item| Ok((key(&item)?, item)));
    let keyed = sorted(keyed.collect::<Result<_, TemplateError>>()?, false)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in keyed {
        match groups.last_mut() {
            Some((last, items)) if last.equals(&key) => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let named = groups.into_iter().map(|(key, items)| {
        let grouper = if is_case_sensitive {
            key
        } else {
            path.find(&items[0], default)?
        };
        Ok(methods::group(grouper, items))
    });
    named.collect::<Result<_, TemplateError>>().map(Value::list)
}

fn unique(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("unique", &["case_sensitive", "attribute"])?;
    let path = Path::of(args.get(1))?;
    let (mut seen, mut kept): (Vec<Value>, Vec<Value>) = (Vec::new(), Vec::new());
    for item in value.iterate()? {
        let key = folded(path.find(&item, None)?, args.is_true(0));
        key.check_hashable()?;
        if seen.len() == limits::KEYS {
            return Err(TemplateError::new(format!(
                "unique of more than {} elements",
                limits::KEYS
            )));
        }
        if !seen.iter().any(|known| known.equals(&key)) {
            seen.push(key);
            kept.push(item);
        }
    }
    Ok(Value::generator(kept))
}

fn extreme(
    value: &Value,
    args: CallArguments,
    name: &'static str,
    wanted: Ordering,
) -> Result<Value, TemplateError> {
    let args = args.bind(name, &["case_sensitive", "attribute"])?;
    let path = Path::of(args.get(1))?;
    let mut best: Option<(Value, Value)> = None;
    for item in value.iterate()? {
        let key = folded(path.find(&item, None)?, args.is_true(0));
        let operator = if wanted == Ordering::Less { "<" } else { ">" };
        let is_better = match &best {
            None => true,
            Some((known, _)) => key.order(known, operator)? == Some(wanted),
        };
        if is_better {
            best = Some((key, item));
        }
    }
    let none = || Value::undefined("No aggregated item, sequence was empty.");
    Ok(best.map_or_else(none, |(_, item)| item))
}

fn join(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("join", &["d", "attribute"])?;
    let path = Path::of(args.get(1))?;
    let separator = args.get(0).map(Value::to_text).transpose()?;
    let separator = separator.as_deref().unwrap_or("");
    let texts = value
        .iterate()?
        .into_iter()
        .map(|item| path.find(&item, None)?.to_text());
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    let length = texts.iter().map(|text| text.len() + separator.len());
    limits::text(length.fold(0, usize::saturating_add))?;
    Ok(texts.join(separator).into())
}

fn sum(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("sum", &["attribute", "start"])?;
    let path = Path::of(args.get(0))?;
    let start = args.get(1).cloned().unwrap_or(Value::Int(0));
    if matches!(start, Value::Text(_)) {
        return Err(TemplateError::new(
            "sum() can't sum strings [use ''.join(seq) instead]",
        ));
    }
    let mut items = value.iterate()?.into_iter();
    items.try_fold(start, |sum, item| {
        sum.arithmetic(ArithmeticOperator::Add, &path.find(&item, None)?)
    })
}

fn batch(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("batch", &["linecount", "fill_with"])?;
    args.required(0)?;
    let count = usize::try_from(args.int(0, 1)?)
        .ok()
        .filter(|&count| count > 0);
    let count = count.ok_or_else(|| TemplateError::unsupported("batch of less than 1"))?;
    limits::items(count)?;
    let rows = value.iterate()?;
    let rows = rows.chunks(count).map(|row| {
        let mut row = row.to_vec();
        if let Some(fill) = args.some(1) {
            row.resize(count, fill.clone());
        }
        Value::list(row)
    });
    Ok(Value::generator(rows.collect()))
}

fn slice(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("slice", &["slices", "fill_with"])?;
    args.required(0)?;
    let slices = usize::try_from(args.int(0, 1)?)
        .ok()
        .filter(|&slices| slices > 0);
    let slices = slices.ok_or_else(|| TemplateError::new("integer division or modulo by zero"))?;
    limits::items(slices)?;
    let items = value.iterate()?;
    let (each, longer) = (items.len() / slices, items.len() % slices);
    let mut rest = items.as_slice();
    let parts = (0..slices).map(|number| {
        let (part, after) = rest.split_at(each + usize::from(number < longer));
        rest = after;
        let mut part = part.to_vec();
        part.extend(args.some(1).filter(|_| number >= longer).cloned());
        Value::list(part)
    });
    Ok(Value::generator(parts.collect()))
}

fn map(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let items = || value.iterate();
    if args.positional.is_empty() {
        let args = args.bind("map", &["attribute", "default"])?;
        let missing = |_| TemplateError::new("map requires a filter argument");
        let path = Path::of(Some(args.required(0).map_err(missing)?))?;
        let found = items()?
            .into_iter()
            .map(|item| path.find(&item, args.some(1)));
        return found.collect::<Result<_, _>>().map(Value::generator);
    }
    let CallArguments {
        mut positional,
        named,
    } = args;
    let filter = positional.remove(0);
    let filter = filter
        .as_str()
        .ok_or_else(|| TemplateError::new("map requires the name of a filter"))?;
    let mapped = items()?.into_iter().map(|item| {
        limits::work(positional.len() + named.len())?;
        let args = CallArguments {
            positional: positional.clone(),
            named: named.clone(),
        };
        super::apply(filter, &item, args)
    });
    mapped.collect::<Result<_, _>>().map(Value::generator)
}

/// Selection criterion of `select`, `reject`, `selectattr` and `rejectattr`.
#[derive(Clone, Copy)]
struct Selection {
    /// Whether the test applies to an attribute, which is the first argument.
    by_attribute: bool,
    /// Whether elements that pass the test are kept.
    keeps: bool,
}

impl Selection {
    fn of_items(keeps: bool) -> Self {
        Self {
            by_attribute: false,
            keeps,
        }
    }

    fn of_attributes(keeps: bool) -> Self {
        Self {
            by_attribute: true,
            keeps,
        }
    }
}

fn select(value: &Value, args: CallArguments, how: Selection) -> Result<Value, TemplateError> {
    if !value.is_true() {
        return Ok(Value::generator(Vec::new()));
    }
    let CallArguments {
        mut positional,
        named,
    } = args;
    let path = match (how.by_attribute, positional.is_empty()) {
        (true, true) => return Err(TemplateError::new("Missing parameter for attribute name")),
        (true, false) => Path::of(Some(&positional.remove(0)))?,
        (false, _) => Path::of(None)?,
    };
    let test = (!positional.is_empty()).then(|| positional.remove(0));
    let test = test.as_ref().map(|test| {
        test.as_str()
            .ok_or_else(|| TemplateError::new("a test is named by a string"))
    });
    let test = test.transpose()?;
    let mut kept = Vec::new();
    for item in value.iterate()? {
        let found = path.find(&item, None)?;
        let holds = match test {
            Some(test) => {
                limits::work(positional.len() + named.len())?;
                let args = CallArguments {
                    positional: positional.clone(),
                    named: named.clone(),
                };
                tests::holds(test, &found, args)?
            }
            None => found.is_true(),
        };
        if holds == how.keeps {
            kept.push(item);
        }
    }
    Ok(Value::generator(kept))
}
