//! The page of a report: what there is of a run, section by section. Every text is escaped.

use std::fmt::Write as _;

use serde_json::Value;
use telemetry::{Curves, RunView};

use super::markup::{escaped, list, short, table};
use super::picture::{self, Line};

const STYLE: &str = include_str!("page.css");

/// The pictures: title, names, the ends of a band, a range.
type Picture = (
    &'static str,
    &'static [&'static str],
    Option<[&'static str; 2]>,
    Option<(f64, f64)>,
);

const PICTURES: [Picture; 8] = [
    (
        "Win rate against the reference",
        &["eval/win_rate", "eval/gold_win_rate"],
        Some(["eval/win_rate_ci_low", "eval/win_rate_ci_high"]),
        Some((0.0, 1.0)),
    ),
    (
        "KL from the reference and log-ratio of the samples, nats",
        &["objective/kl", "eval/kl", "objective/log_ratio"],
        None,
        None,
    ),
    ("Loss", &["loss"], None, None),
    (
        "Implicit rewards, nats",
        &["rewards/margins", "rewards/chosen", "rewards/rejected"],
        None,
        None,
    ),
    (
        "Lengths, tokens",
        &[
            "completions/mean_length",
            "completions/min_length",
            "completions/max_length",
        ],
        None,
        None,
    ),
    ("Entropy, nats a token", &["objective/entropy"], None, None),
    ("Pairs per second", &["perf/pairs_per_second"], None, None),
    (
        "Staleness, steps",
        &["staleness/mean", "staleness/max"],
        None,
        None,
    ),
];

/// The whole page.
pub(super) fn html(view: &RunView) -> anyhow::Result<String> {
    let status = view.status();
    let report = view.report()?.unwrap_or_default();
    let name = escaped(&status.name);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
    );
    verdict(&mut page, view, &report)?;
    pictures(&mut page, view.curves())?;
    evaluations(&mut page, &report)?;
    examples(&mut page, &report)?;
    rounds(&mut page, view)?;
    stations(&mut page, &report)?;
    environment(&mut page, &report)?;
    settings(&mut page, view)?;
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

fn verdict(page: &mut String, view: &RunView, report: &Value) -> std::fmt::Result {
    let status = view.status();
    if report.is_null() {
        writeln!(
            page,
            "<p class=\"note\">This run has no report yet: what follows is what it wrote by step {}.</p>",
            status.step
        )?;
    }
    let last = |name: &str| {
        let value = view.curves().get(name).and_then(|curve| curve.last);
        value.map_or("–".into(), |value| format!("{value:.3}"))
    };
    let (low, high) = (last("eval/win_rate_ci_low"), last("eval/win_rate_ci_high"));
    let figures = [
        ("win rate", last("eval/win_rate")),
        ("95 % interval", format!("{low} to {high}")),
        ("gold win rate", last("eval/gold_win_rate")),
        ("KL, nats", last("eval/kl")),
        ("steps", status.step.to_string()),
        ("pairs", short(&report["pairs"])),
        ("pairs per second", short(&report["pairs_per_second"])),
        ("seconds", format!("{:.0}", status.wall_seconds)),
    ];
    page.push_str("<dl>\n");
    for (name, value) in figures.iter().filter(|(_, value)| value != "–") {
        writeln!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>")?;
    }
    page.push_str("</dl>\n");
    Ok(())
}

fn pictures(page: &mut String, curves: &Curves) -> anyhow::Result<()> {
    page.push_str("<h2>Curves</h2>\n<div class=\"grid\">\n");
    for (title, names, band, range) in PICTURES {
        let known = names
            .iter()
            .filter_map(|&name| Some((name, curves.get(name)?)));
        let lines: Vec<_> = known.map(|(name, curve)| Line { name, curve }).collect();
        if lines.is_empty() {
            continue;
        }
        let band = band.and_then(|[low, high]| Some((curves.get(low)?, curves.get(high)?)));
        let last: Vec<_> = lines
            .iter()
            .map(|line| {
                format!(
                    "{} {}",
                    line.name,
                    line.curve.last.map_or("–".into(), |v| format!("{v:.3}"))
                )
            })
            .collect();
        let picture = picture::svg(&lines, band, range)?;
        writeln!(
            page,
            "<figure><figcaption>{title}<br><span>at the end: {}</span></figcaption>\n{picture}</figure>",
            last.join(", ")
        )?;
    }
    page.push_str("</div>\n");
    Ok(())
}

fn evaluations(page: &mut String, report: &Value) -> std::fmt::Result {
    let evaluations = list(&report["evaluations"]);
    if evaluations.is_empty() {
        return Ok(());
    }
    let row = |e: &Value| {
        let of = |pointer: &str| short(e.pointer(pointer).unwrap_or(&Value::Null));
        vec![
            of("/step"),
            of("/win_rate/mean"),
            format!("{}–{}", of("/win_rate/low"), of("/win_rate/high")),
            of("/gold_win_rate/mean"),
            of("/kl"),
            of("/response_length"),
            of("/entropy"),
        ]
    };
    page.push_str("<h2>Evaluations</h2>\n");
    let heads = [
        "step",
        "win rate",
        "95 % interval",
        "gold",
        "KL",
        "length",
        "entropy",
    ];
    table(
        page,
        &heads,
        &evaluations.iter().map(row).collect::<Vec<_>>(),
    )
}

/// What the policy wrote at the first evaluation and at the last, to the same prompts.
fn examples(page: &mut String, report: &Value) -> std::fmt::Result {
    let evaluations = list(&report["evaluations"]);
    let (Some(first), Some(last)) = (evaluations.first(), evaluations.last()) else {
        return Ok(());
    };
    page.push_str("<h2>Samples before and after</h2>\n");
    for example in list(&last["examples"]) {
        let same = |other: &&Value| other["prompt"] == example["prompt"];
        let before = list(&first["examples"]).iter().find(same);
        let before = before.filter(|_| evaluations.len() > 1);
        let mut sides = vec![("reference", &example["reference"])];
        sides.extend(before.map(|before| ("policy before", &before["policy"])));
        sides.push(("policy after", &example["policy"]));
        writeln!(
            page,
            "<article><p class=\"prompt\">{}</p><div class=\"sides\">",
            short(&example["prompt"])
        )?;
        for (whose, text) in sides {
            writeln!(
                page,
                "<section><h3>{whose}</h3><p>{}</p></section>",
                short(text)
            )?;
        }
        writeln!(
            page,
            "</div><p class=\"soft\">p(policy after ≻ reference) = {}</p></article>",
            short(&example["p"])
        )?;
    }
    Ok(())
}

fn rounds(page: &mut String, view: &RunView) -> anyhow::Result<()> {
    let rounds = view.rounds()?;
    if rounds.is_empty() {
        return Ok(());
    }
    let row = |r: &Value| {
        let of = |pointer: &str| short(r.pointer(pointer).unwrap_or(&Value::Null));
        let both = |of_what: &str, key: &str| {
            format!(
                "{} → {}",
                of(&format!("/{of_what}/before{key}")),
                of(&format!("/{of_what}/after{key}"))
            )
        };
        vec![
            of("/round"),
            of("/step"),
            both("golden_wins", ""),
            both("held_out", "/accuracy"),
            both("held_out", "/ece"),
            both("policy", "/accuracy"),
            r["refused"].as_str().map_or("accepted".into(), escaped),
        ]
    };
    page.push_str("<h2>The preference model's rounds</h2>\n");
    let heads = [
        "round",
        "step",
        "golden answer wins",
        "accuracy",
        "calibration error",
        "accuracy on the policy's samples",
        "",
    ];
    table(page, &heads, &rounds.iter().map(row).collect::<Vec<_>>())?;
    Ok(())
}

fn stations(page: &mut String, report: &Value) -> std::fmt::Result {
    let Some(stations) = report["stations"].as_object() else {
        return Ok(());
    };
    let row = |(name, books): (&String, &Value)| {
        let dropped = books["dropped"].as_object().into_iter().flatten();
        let dropped: Vec<_> = dropped
            .map(|(why, n)| format!("{} {}", short(n), escaped(why)))
            .collect();
        let dropped = if dropped.is_empty() {
            "0".into()
        } else {
            dropped.join(", ")
        };
        vec![
            escaped(name),
            short(&books["taken"]),
            short(&books["given"]),
            dropped,
            short(&books["in_hand"]),
        ]
    };
    page.push_str("<h2>Flow</h2>\n");
    let heads = ["station", "taken", "given", "dropped", "in hand"];
    table(page, &heads, &stations.iter().map(row).collect::<Vec<_>>())
}

fn environment(page: &mut String, report: &Value) -> std::fmt::Result {
    page.push_str("<h2>Environment</h2>\n");
    let Some(environment) = report["environment"].as_object() else {
        page.push_str("<p class=\"soft\">It stands in the report of a run that has ended.</p>\n");
        return Ok(());
    };
    let words = |value: &Value| match value {
        Value::Array(all) => all.iter().map(short).collect::<Vec<_>>().join(" "),
        other => short(other),
    };
    let row =
        |(name, value): (&String, &Value)| vec![escaped(name).replace('_', " "), words(value)];
    table(
        page,
        &["what", "value"],
        &environment.iter().map(row).collect::<Vec<_>>(),
    )
}

fn settings(page: &mut String, view: &RunView) -> anyhow::Result<()> {
    let Some(config) = view.config()? else {
        return Ok(());
    };
    let text = toml::to_string(&config)?;
    writeln!(
        page,
        "<h2>Settings</h2>\n<details><summary>Every setting, as resolved</summary><pre>{}</pre></details>",
        escaped(&text)
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_report_needs_nothing_beside_it_and_shows_hostile_texts() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("config.toml", "[run]\nname = \"<b>\"\n");
        write(
            "metrics.jsonl",
            "{\"step\":0,\"wall_seconds\":1,\"eval/win_rate\":0.5,\"eval/win_rate_ci_low\":0.4,\"eval/win_rate_ci_high\":0.6}\n\
             {\"step\":1,\"wall_seconds\":2,\"loss\":0.5}\n{\"step\":2,\"wall_seconds\":3,\"loss\":0.25}\n\
             {\"step\":2,\"wall_seconds\":3,\"eval/win_rate\":0.8,\"eval/win_rate_ci_low\":0.7,\"eval/win_rate_ci_high\":0.9}\n",
        );
        let example = |policy: &str| {
            serde_json::json!({"prompt": "<script>alert(1)</script>", "policy": policy,
                               "reference": "ref", "p": 0.75})
        };
        let report = serde_json::json!({
            "finished": true, "win_rate": 0.8, "environment": {"version": "1"},
            "stations": {"actor": {"taken": 5, "given": 3, "dropped": {"identical": 2}, "in_hand": 0}},
            "evaluations": [
                {"step": 0, "examples": [example("young")]}, {"step": 2, "examples": [example("old")]}],
        });
        write("report.json", &report.to_string());
        let mut view = RunView::open(directory.path()).unwrap();
        view.refresh().unwrap();
        let page = html(&view).unwrap();
        for part in [
            "&lt;script&gt;alert(1)&lt;/script&gt;",
            "policy before</h3><p>young",
            "policy after</h3><p>old",
            "<dd>0.800</dd>",
            "<td>2 identical</td>",
            "name = &quot;&lt;b&gt;&quot;",
            "at the end: loss 0.250",
        ] {
            assert!(page.contains(part), "no {part:?} in\n{page}");
        }
        assert_eq!(page.matches("<svg").count(), 2, "win rate and loss");
        for foreign in ["<script", "<img", "<link", "src=", "@import"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_run_that_goes_on_is_told_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(
            directory.path().join("metrics.jsonl"),
            "{\"step\":3,\"wall_seconds\":1,\"loss\":1}\n",
        )
        .unwrap();
        let mut view = RunView::open(directory.path()).unwrap();
        view.refresh().unwrap();
        let page = html(&view).unwrap();
        assert!(page.contains("what it wrote by step 3"), "{page}");
        assert!(!page.contains("<h2>Settings"), "{page}");
    }
}
