//! A page of metrics, read back: what a process says of itself at this moment.
//!
//! The page is the text that Prometheus scrapes, so a process can be looked at from within and from
//! afar in the same way. Only plain numbers are read; the parts of histograms are left out.

use std::collections::BTreeMap;

use serde::Serialize;

/// One number of a page.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reading {
    /// The metric's name in Prometheus.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value; null when it is not finite.
    pub value: Option<f64>,
}

/// The numbers of a page whose metric `wanted` names; lines that say nothing readable are passed over.
#[must_use]
pub fn readings(page: &str, wanted: &dyn Fn(&str) -> bool) -> Vec<Reading> {
    let is_number = |line: &&str| !line.starts_with('#') && !line.trim().is_empty();
    let read = |line: &str| {
        let end = line.find(['{', ' '])?;
        wanted(&line[..end]).then(|| reading(line, end)).flatten()
    };
    page.lines().filter(is_number).filter_map(read).collect()
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

/// Labels up to the closing brace, and what follows it.
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

/// A text up to its closing quotation mark, its escapes undone, and what follows it.
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
    fn a_page_is_read_back_with_its_labels() {
        let page = "# HELP agon_loss the loss\n# TYPE agon_loss gauge\nagon_loss{role=\"learner\"} NaN\n\
                    agon_beta 0.5\n\nagon_in_hand{station=\"actor\",why=\"a \\\"b\\\\ c}\\n\"} 3\n\
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
                "agon_in_hand",
                &[("station", "actor"), ("why", "a \"b\\ c}\n")],
                Some(3.0),
            ),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_the_exporter_writes_can_be_read() {
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
