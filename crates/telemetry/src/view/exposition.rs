//! Parser of the Prometheus text exposition format.
//!
//! The live page reads local and remote processes alike through the text that Prometheus scrapes. Only plain
//! samples are read; histogram buckets and quantiles are skipped.

use std::collections::BTreeMap;

use serde::Serialize;

/// One sample of an exposition.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reading {
    /// Name of the metric.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value; null when not finite.
    pub value: Option<f64>,
}

/// The samples of an exposition whose metric name `is_wanted` accepts; malformed lines are skipped.
#[must_use]
pub fn readings(page: &str, is_wanted: &dyn Fn(&str) -> bool) -> Vec<Reading> {
    let is_sample = |line: &&str| !line.starts_with('#') && !line.trim().is_empty();
    let read = |line: &str| {
        let end = line.find(['{', ' '])?;
        is_wanted(&line[..end])
            .then(|| reading(line, end))
            .flatten()
    };
    page.lines().filter(is_sample).filter_map(read).collect()
}

fn reading(line: &str, name_end: usize) -> Option<Reading> {
    let (name, rest) = line.split_at(name_end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
    let is_part = labels.contains_key("le") || labels.contains_key("quantile");
    (!is_part).then(|| Reading {
        name: name.to_owned(),
        labels,
        value: value.is_finite().then_some(value),
    })
}

/// Parses labels up to the closing brace; returns them and the rest.
fn labels(mut text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        text = text.trim_start_matches([',', ' ']);
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (key, rest) = text.split_once("=\"")?;
        let (value, rest) = quoted(rest)?;
        labels.insert(key.to_owned(), value);
        text = rest;
    }
}

/// Parses a string up to its closing quotation mark and unescapes it; returns it and the rest.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            plain => value.push(plain),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_parsed_with_their_labels() {
        let page = "# HELP agon_loss the loss\n# TYPE agon_loss gauge\nagon_loss{role=\"learner\"} NaN\n\
                    agon_beta 0.5\n\nagon_in_flight{stage=\"actor\",why=\"a \\\"b\\\\ c}\\n\"} 3\n\
                    agon_wait_seconds_bucket{le=\"0.1\"} 4\nother 1\nbroken{x=\"1 2\nagon_empty \n";
        let seen = readings(page, &|name| name.starts_with("agon_"));
        let of = |name: &str, labels: &[(&str, &str)], value| Reading {
            name: name.into(),
            labels: labels.iter().map(|&(k, v)| (k.into(), v.into())).collect(),
            value,
        };
        let expected = [
            of("agon_loss", &[("role", "learner")], None),
            of("agon_beta", &[], Some(0.5)),
            of(
                "agon_in_flight",
                &[("stage", "actor"), ("why", "a \"b\\ c}\n")],
                Some(3.0),
            ),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn the_exporters_output_can_be_parsed() {
        let recording = crate::Exporter::recorder_only();
        recording.during(|| {
            crate::publish(
                &[("tau", 0.25)].into_iter().collect(),
                &[("role", "learner")],
            );
        });
        let seen = readings(&recording.render(), &|name| name == "agon_tau");
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!(seen[0].value, Some(0.25));
        assert_eq!(seen[0].labels["role"], "learner");
    }
}
