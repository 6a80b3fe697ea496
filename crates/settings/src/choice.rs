//! Laying one table over another, where a `kind` decides which keys belong.
//!
//! The default file's `[choice.<path>.<kind>]` tables hold what a kind brings. A user who changes the
//! kind of a choice gets that kind's defaults and none of the former kind's keys.

use toml::{Table, Value};

/// Lays `upper` over `lower`. A table whose `kind` changes replaces the lower one.
pub(crate) fn lay_over(lower: &mut Table, upper: Table) {
    for (key, value) in upper {
        match (lower.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) if !changes_kind(below, &above) => {
                lay_over(below, above);
            }
            (_, value) => {
                lower.insert(key, value);
            }
        }
    }
}

fn changes_kind(below: &Table, above: &Table) -> bool {
    above
        .get("kind")
        .is_some_and(|kind| below.get("kind").is_some_and(|before| before != kind))
}

/// Takes `[choice]` out of `settings` and gives every choice the defaults of its kind.
pub(crate) fn fill_in(settings: &mut Table) {
    if let Some(Value::Table(choices)) = settings.remove("choice") {
        fill_in_from(&choices, settings);
    }
}

fn fill_in_from(choices: &Table, settings: &mut Table) {
    for (key, value) in settings.iter_mut() {
        if let (Some(choices), Value::Table(table)) =
            (choices.get(key).and_then(Value::as_table), value)
        {
            fill_in_choice(choices, table);
        }
    }
}

/// Gives one choice, and the members it may consist of, the defaults of their kinds.
fn fill_in_choice(choices: &Table, table: &mut Table) {
    let kind = table.get("kind").and_then(Value::as_str);
    if let Some(defaults) = kind
        .and_then(|kind| choices.get(kind))
        .and_then(Value::as_table)
    {
        for (key, default) in defaults {
            table.entry(key).or_insert_with(|| default.clone());
        }
    }
    let members = table.get_mut("members").and_then(Value::as_array_mut);
    for member in members.into_iter().flatten() {
        if let Value::Table(member) = member {
            fill_in_choice(choices, member);
        }
    }
    fill_in_from(choices, table);
}
