//! Merging of TOML tables in which a `kind` determines the valid keys.
//!
//! The `[choice.<path>.<kind>]` tables of the default file have the keys of each kind. Changing the kind of a table
//! brings that kind's defaults and removes the keys of the previous kind.

use toml::{Table, Value};

/// Merges `upper` into `lower`. A table with a different `kind` replaces the lower one.
pub(crate) fn merge(lower: &mut Table, upper: Table) {
    for (key, value) in upper {
        match (lower.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) if !changes_kind(below, &above) => {
                merge(below, above);
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

/// Removes `[choice]` from `settings` and adds the defaults of its kind to every table with a kind.
pub(crate) fn apply_defaults(settings: &mut Table) {
    if let Some(Value::Table(choices)) = settings.remove("choice") {
        apply_choices(&choices, settings);
        apply_judge_choices(&choices, settings);
    }
}

/// Adds the defaults of `[choice.preference.judge]` to every judge of `[evaluation.judge]`.
fn apply_judge_choices(choices: &Table, settings: &mut Table) {
    let section = |key: &str| choices.get(key).and_then(Value::as_table);
    let choices = section("preference").and_then(|preference| preference.get("judge")?.as_table());
    let evaluation = settings.get_mut("evaluation").and_then(Value::as_table_mut);
    let judges = evaluation.and_then(|evaluation| evaluation.get_mut("judge")?.as_table_mut());
    let (Some(choices), Some(judges)) = (choices, judges) else {
        return;
    };
    for (_, judge) in judges.iter_mut() {
        if let Value::Table(judge) = judge {
            apply_choice(choices, judge);
        }
    }
}

fn apply_choices(choices: &Table, settings: &mut Table) {
    for (key, value) in settings.iter_mut() {
        if let (Some(choices), Value::Table(table)) =
            (choices.get(key).and_then(Value::as_table), value)
        {
            apply_choice(choices, table);
        }
    }
}

/// Adds the defaults of their kinds to a table, its nested tables and its members.
fn apply_choice(choices: &Table, table: &mut Table) {
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
            apply_choice(choices, member);
        }
    }
    apply_choices(choices, table);
}
