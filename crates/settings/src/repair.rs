//! Reports all mistakes of a configuration at once: deserialise, record the error, replace the faulty value with
//! its default, and repeat.

use toml::{Table, Value};

use crate::{error::Problem, settings::Settings};

/// Maximum number of mistakes reported.
const MAX_MISTAKES: usize = 100;

/// Deserialises `table`, or returns all its mistakes. `defaults` is a table without mistakes.
pub(crate) fn read(mut table: Table, defaults: &Table) -> Result<Settings, Vec<Problem>> {
    let mut problems = Vec::new();
    while problems.len() < MAX_MISTAKES {
        let error = match serde_path_to_error::deserialize(Value::Table(table.clone())) {
            Ok(settings) if problems.is_empty() => return Ok(settings),
            Ok(_) => return Err(problems),
            Err(error) => error,
        };
        let path = error.path().to_string();
        let reason = error.into_inner().message().trim().to_owned();
        let Some((problem, key)) = explain(&path, &reason) else {
            problems.push(Problem::new(&path, reason));
            return Err(problems);
        };
        problems.push(problem);
        if !repair(&mut table, defaults, &key) {
            return Err(problems);
        }
    }
    Err(problems)
}

/// The problem of a deserialisation error, and the dotted key to replace.
fn explain(path: &str, reason: &str) -> Option<(Problem, String)> {
    if let Some(rest) = reason.strip_prefix("unknown field `") {
        let (field, valid) = rest.split_once('`')?;
        let valid: Vec<&str> = valid.split('`').skip(1).step_by(2).collect();
        let parent = path
            .strip_suffix(field)
            .map_or(path, |p| p.trim_end_matches('.'));
        let parent = parent.trim_start_matches('.');
        let key = if parent.is_empty() {
            field.to_owned()
        } else {
            format!("{parent}.{field}")
        };
        return Some((Problem::new(&key, unknown_key(parent, field, &valid)), key));
    }
    if let Some(rest) = reason.strip_prefix("unknown variant `") {
        let (variant, valid) = rest.split_once('`')?;
        let valid: Vec<&str> = valid.split('`').skip(1).step_by(2).collect();
        let message = match nearest(variant, &valid) {
            Some(candidate) => format!("no `{variant}` here; did you mean `{candidate}`? "),
            None => format!("no `{variant}` here. "),
        };
        let message = format!("{message}It is one of {}", valid.join(", "));
        let choice = path.strip_suffix(".kind").unwrap_or(path).to_owned();
        return Some((Problem::new(path, message), choice));
    }
    let message = match reason.strip_prefix("missing field ") {
        Some(field) => format!("{field} is missing here"),
        None => reason.to_owned(),
    };
    Some((Problem::new(path, message), path.to_owned()))
}

fn unknown_key(parent: &str, field: &str, valid: &[&str]) -> String {
    let listed = valid.join(", ");
    let section = if parent.is_empty() {
        "the file"
    } else {
        parent
    };
    match nearest(field, valid) {
        Some(candidate) => {
            format!("unknown key; did you mean `{candidate}`?")
        }
        None if listed.is_empty() => format!("unknown key; {section} has no further keys"),
        None => format!("unknown key; the keys of {section} are {listed}"),
    }
}

/// The valid name with the smallest edit distance, if it is similar enough.
fn nearest<'a>(name: &str, valid: &[&'a str]) -> Option<&'a str> {
    valid
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), *candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(name.len()) / 2)
        .map(|(_, candidate)| candidate)
}

/// Replaces the value of `key` with its default, or removes the key if there is none. Returns whether the table
/// changed.
fn repair(table: &mut Table, defaults: &Table, key: &str) -> bool {
    let (first, rest) = key.split_once('.').unwrap_or((key, ""));
    let (first, in_array) = first
        .split_once('[')
        .map_or((first, false), |(name, _)| (name, true));
    let default = defaults.get(first);
    if rest.is_empty() || in_array {
        let before = match default {
            Some(default) => table.insert(first.to_owned(), default.clone()),
            None => table.remove(first),
        };
        return before.as_ref() != default;
    }
    match (table.get_mut(first), default.and_then(Value::as_table)) {
        (Some(Value::Table(below)), Some(defaults)) => {
            repair(below, defaults, rest) || replace(table, first, default)
        }
        (Some(Value::Table(below)), None) => repair(below, &Table::new(), rest),
        _ => false,
    }
}

fn replace(table: &mut Table, key: &str, default: Option<&Value>) -> bool {
    default.is_some_and(|default| {
        table.insert(key.to_owned(), default.clone()).as_ref() != Some(default)
    })
}
