//! The report of a tournament as tables of text cells, and as Markdown.

use std::fmt::{self, Write as _};

use settings::TOURNAMENT_REFERENCE;

use crate::tournament::{
    results::{Standings, TournamentResults},
    statistics::SeedMean,
};

/// A table.
pub(super) struct TextTable {
    pub(super) title: String,
    /// Meaning of the cells.
    pub(super) note: String,
    pub(super) heads: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
    /// Whether the cells are win rates of the row against the column.
    pub(super) is_matrix: bool,
}

/// All tables of a report.
pub(super) fn tables(results: &TournamentResults) -> Vec<TextTable> {
    let mut tables = Vec::new();
    let several = results.standings.len() > 1;
    for standings in &results.standings {
        let at = match several {
            true => format!(", temperature {}", standings.temperature),
            false => String::new(),
        };
        tables.push(policies(results, standings, &at));
        if standings.policies.len() > 2 {
            tables.push(matrix(standings, &at));
            tables.push(comparisons(standings, &at));
        }
        tables.extend(styles(standings, &at));
    }
    tables.push(training(results));
    tables.extend(rounds(results));
    tables.extend(selection(results));
    tables
}

/// Mean and interval with this many decimals.
pub(super) fn interval(value: Option<&SeedMean>, decimals: usize) -> String {
    let Some(value) = value else {
        return "–".to_owned();
    };
    let mean = format!("{:.decimals$}", value.mean);
    match (value.low, value.high) {
        (Some(low), Some(high)) => format!("{mean} ({low:.decimals$} to {high:.decimals$})"),
        _ => mean,
    }
}

fn p_value(p: Option<f64>) -> String {
    match p {
        None => "–".to_owned(),
        Some(p) if p < 0.001 => "< .001".to_owned(),
        Some(p) => format!("{p:.3}"),
    }
}

fn heads(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn policies(results: &TournamentResults, standings: &Standings, at: &str) -> TextTable {
    let rows = standings.policies.iter().map(|policy| {
        let chosen = results
            .selected
            .iter()
            .find(|chosen| chosen.method == policy.name);
        let label = chosen.map_or("", |chosen| chosen.label.as_str());
        let diverged: Vec<_> = policy.diverged.iter().map(u64::to_string).collect();
        vec![
            policy.name.clone(),
            label.to_owned(),
            interval(policy.win_rate.as_ref(), 3),
            interval(policy.kl.as_ref(), 2),
            interval(policy.length.as_ref(), 1),
            interval(policy.truncated.as_ref(), 3),
            diverged.join(", "),
        ]
    });
    TextTable {
        title: format!("Against the reference{at}"),
        note: format!(
            "Win rate under the judge {:?} on {} prompts a seed; mean over {} seeds with its 95 % t-interval. KL and \
             length of fresh samples.{}",
            results.judge.to_string(),
            results.prompts,
            results.seeds.len(),
            match standings.unjudged {
                0 => String::new(),
                count =>
                    format!(" {count} comparisons of all meetings got no verdict and are left out."),
            }
        ),
        heads: heads(&[
            "method",
            "settings",
            "win rate",
            "KL, nats",
            "length, tokens",
            "truncated",
            "diverged seeds",
        ]),
        rows: rows.collect(),
        is_matrix: false,
    }
}

fn matrix(standings: &Standings, at: &str) -> TextTable {
    let names: Vec<&str> = standings
        .policies
        .iter()
        .map(|policy| policy.name.as_str())
        .collect();
    let row = |a: &&str| {
        let cells = names.iter().map(|b| match a == b {
            true => String::new(),
            false => standings.win_rate(a, b).map_or("–".to_owned(), |rate| {
                match standings.differs(a, b) {
                    true => format!("{rate:.3}*"),
                    false => format!("{rate:.3}"),
                }
            }),
        });
        std::iter::once((*a).to_owned()).chain(cells).collect()
    };
    let mut heads = vec![String::new()];
    heads.extend(names.iter().map(|&name| name.to_owned()));
    TextTable {
        title: format!("Row against column{at}"),
        note: "Mean win rate of the row's policy against the column's over the seeds; *: apart from .5, corrected p below .05."
            .to_owned(),
        rows: names.iter().map(row).collect(),
        is_matrix: true,
        heads,
    }
}

fn comparisons(standings: &Standings, at: &str) -> TextTable {
    let rows = standings.comparisons.iter().map(|found| {
        vec![
            format!("{} against {}", found.a, found.b),
            interval(Some(&found.win_rate), 3),
            p_value(found.p),
            interval(found.difference.as_ref(), 3),
            p_value(found.difference_p),
        ]
    });
    TextTable {
        title: format!("Comparisons{at}"),
        note: "The difference is that of both win rates against the reference, paired by seed. P-values are two-sided \
               t-tests over the seeds, corrected for all rows of their column by Holm's method."
            .to_owned(),
        heads: heads(&["methods", "win rate", "p", "difference", "p of the difference"]),
        rows: rows.collect(),
        is_matrix: false,
    }
}

fn styles(standings: &Standings, at: &str) -> Option<TextTable> {
    let rows = standings.policies.iter().filter_map(|policy| {
        let styles = policy.styles.as_ref()?;
        let mix = styles.mix.map(|share| format!("{share:.3}"));
        Some(vec![
            policy.name.clone(),
            mix.join(" / "),
            interval(Some(&styles.exploitability), 3),
            interval(styles.distance.as_ref(), 3),
        ])
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then(|| TextTable {
        title: format!("Styles under the cyclic preference{at}"),
        note: "Exploitability: the best win rate of a single style against the mix, .5 at the Nash equilibrium. Distance: \
               total variation from the regularised equilibrium of the styles at the method's own tau or beta."
            .to_owned(),
        heads: heads(&["method", "plain / formal / playful", "exploitability", "distance"]),
        rows,
        is_matrix: false,
    })
}

fn training(results: &TournamentResults) -> TextTable {
    let rows = results.training.iter().map(|training| {
        vec![
            training.name.clone(),
            interval(training.pairs.as_ref(), 0),
            interval(training.seconds.as_ref(), 0),
            interval(training.memory_gib.as_ref(), 2),
        ]
    });
    TextTable {
        title: "Training".to_owned(),
        note: "Seconds of a run without its base policy; peak memory of the process.".to_owned(),
        heads: heads(&["method", "pairs", "seconds", "memory, GiB"]),
        rows: rows.collect(),
        is_matrix: false,
    }
}

fn rounds(results: &TournamentResults) -> Option<TextTable> {
    let rows = results.training.iter().flat_map(|training| {
        training.rounds.iter().map(|round| {
            vec![
                training.name.clone(),
                round.round.to_string(),
                interval(round.accuracy.as_ref(), 3),
                interval(round.ece.as_ref(), 3),
            ]
        })
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then(|| TextTable {
        title: "APO rounds".to_owned(),
        note: "Preference model on held-out annotated pairs; round 0 is before the first."
            .to_owned(),
        heads: heads(&["method", "round", "accuracy", "calibration error"]),
        rows,
        is_matrix: false,
    })
}

fn selection(results: &TournamentResults) -> Option<TextTable> {
    let rows = results.selected.iter().flat_map(|chosen| {
        chosen.candidates.iter().map(|candidate| {
            vec![
                chosen.method.clone(),
                candidate.label.clone(),
                candidate
                    .score
                    .map_or("diverged".to_owned(), |score| format!("{score:.3}")),
                match candidate.label == chosen.label {
                    true => "chosen".to_owned(),
                    false => String::new(),
                },
            ]
        })
    });
    let rows: Vec<_> = rows.collect();
    let seeds: Vec<_> = results.selection_seeds.iter().map(u64::to_string).collect();
    (!rows.is_empty()).then(|| TextTable {
        title: "Selection".to_owned(),
        note: format!(
            "Mean win rate against the reference at the end of the runs with seeds {}, on the prompts of evaluations.",
            seeds.join(", ")
        ),
        heads: heads(&["method", "settings", "win rate", ""]),
        rows,
        is_matrix: false,
    })
}

/// The report as Markdown.
pub(super) fn markdown(results: &TournamentResults) -> Result<String, fmt::Error> {
    let mut text = format!("# {}\n\n{}\n", results.name, summary(results));
    for table in tables(results) {
        writeln!(text, "\n## {}\n\n{}\n", table.title, table.note)?;
        writeln!(text, "| {} |", table.heads.join(" | "))?;
        writeln!(text, "|{}", "---|".repeat(table.heads.len()))?;
        for row in &table.rows {
            let cells: Vec<_> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            writeln!(text, "| {} |", cells.join(" | "))?;
        }
    }
    Ok(text)
}

/// Summary in sentences: what was done, and the winner.
pub(super) fn summary(results: &TournamentResults) -> String {
    let standings = results.standings.first();
    let policies = standings.map_or(&[][..], |standings| &standings.policies);
    let rate = |index: usize| {
        policies[index]
            .win_rate
            .map_or(f64::NEG_INFINITY, |rate| rate.mean)
    };
    let entrants =
        (0..policies.len()).filter(|&index| policies[index].name != TOURNAMENT_REFERENCE);
    let best = entrants.reduce(|best, next| if rate(next) > rate(best) { next } else { best });
    let best = best.map_or(String::new(), |best| {
        format!(
            " The highest win rate against the reference is that of {}: {}.",
            policies[best].name,
            interval(policies[best].win_rate.as_ref(), 3)
        )
    });
    let seeds: Vec<_> = results.seeds.iter().map(u64::to_string).collect();
    format!(
        "{} methods, seeds {}; {}, {} cores; agon {}.{best}",
        policies.len().saturating_sub(1),
        seeds.join(", "),
        results
            .machine
            .cpu_model
            .as_deref()
            .unwrap_or("unknown processor"),
        results.machine.cores,
        results.version
    )
}
