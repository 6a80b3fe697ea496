//! The report of a run as one HTML page. All text from the run is escaped.

use std::collections::HashMap;
use std::fmt::Write as _;

use serde_json::Value;
use telemetry::{Curves, RunView};

use crate::report::charts::{ChartLine, LineChart};
use crate::report::markup::{MAX_ROWS, escaped, list, number, page_start, short, table};

/// A chart of the page: title, names of its curves, curves of a band around the first, and a range of values that is
/// shown in any case.
struct PageChart {
    title: &'static str,
    curves: &'static [&'static str],
    band: Option<[&'static str; 2]>,
    range: Option<(f64, f64)>,
    /// Beginning of the names of further curves.
    prefix: Option<&'static str>,
}

impl PageChart {
    const fn new(title: &'static str, curves: &'static [&'static str]) -> Self {
        Self {
            title,
            curves,
            band: None,
            range: None,
            prefix: None,
        }
    }
}

const CHARTS: [PageChart; 8] = [
    PageChart {
        title: "Win rate against the reference",
        curves: &[
            "eval/win_rate",
            "eval/gold_win_rate",
            "eval/win_rate_lc",
            "eval/average_win_rate",
            "eval/average_gold_win_rate",
        ],
        band: Some(["eval/win_rate_ci_low", "eval/win_rate_ci_high"]),
        range: Some((0.0, 1.0)),
        prefix: Some("eval/judge_win_rate/"),
    },
    PageChart::new(
        "KL from the reference and log-ratio of the samples, nats",
        &["objective/kl", "eval/kl", "objective/log_ratio"],
    ),
    PageChart::new("Loss", &["loss"]),
    PageChart::new(
        "Implicit rewards, nats",
        &["rewards/margins", "rewards/chosen", "rewards/rejected"],
    ),
    PageChart::new(
        "Lengths, tokens",
        &[
            "completions/mean_length",
            "completions/min_length",
            "completions/max_length",
        ],
    ),
    PageChart::new("Entropy, nats a token", &["objective/entropy"]),
    PageChart::new("Pairs per second", &["perf/pairs_per_second"]),
    PageChart::new("Staleness, steps", &["staleness/mean", "staleness/max"]),
];

/// The page as HTML.
pub(crate) fn page(view: &RunView) -> anyhow::Result<String> {
    let status = view.status();
    let report = view.report()?.unwrap_or_default();
    let mut page = page_start(&status.name);
    figures(&mut page, view, &report)?;
    charts(&mut page, view.curves())?;
    evaluations(&mut page, &report)?;
    examples(&mut page, &report)?;
    rounds(&mut page, view)?;
    stages(&mut page, &report)?;
    environment(&mut page, &report)?;
    settings(&mut page, view)?;
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

fn figures(page: &mut String, view: &RunView, report: &Value) -> std::fmt::Result {
    let status = view.status();
    if report.is_null() {
        writeln!(
            page,
            "<p class=\"note\">This run has no report yet; this page shows its state at step {}.</p>",
            status.step
        )?;
    }
    if status.unreadable > 0 || status.ignored > 0 {
        writeln!(
            page,
            "<p class=\"note\">metrics.jsonl has {} malformed lines, and {} values of more metrics than this page \
             shows.</p>",
            status.unreadable, status.ignored
        )?;
    }
    let last = |name: &str| {
        let value = view.curves().get(name).and_then(|curve| curve.last);
        value.map_or("–".into(), |value| number(value, 3))
    };
    let (low, high) = (last("eval/win_rate_ci_low"), last("eval/win_rate_ci_high"));
    let evaluated = view.curves().get("eval/win_rate");
    let evaluated = evaluated.and_then(|curve| curve.steps.last());
    let last_whole = |name: &str| {
        let value = view.curves().get(name).and_then(|curve| curve.last);
        value.map_or("–".into(), |value| number(value, 0))
    };
    let figures = [
        ("win rate", last("eval/win_rate")),
        ("95 % interval", format!("{low} to {high}")),
        (
            "evaluated at step",
            evaluated.map_or("–".into(), u64::to_string),
        ),
        ("held-out prompts", last_whole("eval/prompts")),
        ("truncated, share", last("eval/truncation_rate")),
        ("length-controlled win rate", last("eval/win_rate_lc")),
        ("gold win rate", last("eval/gold_win_rate")),
        ("KL, nats", last("eval/kl")),
        ("steps", status.step.to_string()),
        ("pairs", short(&report["pairs"])),
        ("pairs per second", short(&report["pairs_per_second"])),
        ("seconds", number(status.wall_seconds, 0)),
    ];
    page.push_str("<dl>\n");
    for (name, value) in figures.iter().filter(|(_, value)| value != "–") {
        writeln!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>")?;
    }
    page.push_str("</dl>\n");
    Ok(())
}

fn charts(page: &mut String, curves: &Curves) -> anyhow::Result<()> {
    page.push_str("<h2>Curves</h2>\n<div class=\"grid\">\n");
    for chart in CHARTS {
        let prefix = chart.prefix;
        let is_of_prefix = |name: &&str| prefix.is_some_and(|prefix| name.starts_with(prefix));
        let more = curves.names().filter(is_of_prefix).take(MAX_ROWS);
        let known = chart.curves.iter().copied().chain(more);
        let known: Vec<_> = known
            .filter_map(|name| Some((name, curves.get(name)?)))
            .collect();
        if known.is_empty() {
            continue;
        }
        let last: Vec<_> = known
            .iter()
            .map(|(name, curve)| {
                let value = curve.last.map_or("–".into(), |v| number(v, 3));
                format!("{name} {value}")
            })
            .collect();
        let mut lines: Vec<_> = known
            .iter()
            .map(|(name, curve)| ChartLine::of_curve(name, curve))
            .collect();
        let band = chart.band;
        if let Some((low, high)) =
            band.and_then(|[low, high]| Some((curves.get(low)?, curves.get(high)?)))
        {
            let first = lines.remove(0).with_band(low, high);
            lines.insert(0, first);
        }
        writeln!(
            page,
            "<figure><figcaption>{}<br><span>at the end: {}</span></figcaption>\n{}</figure>",
            chart.title,
            last.join(", "),
            LineChart::new(lines, chart.range).svg()?
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
            of("/win_rate_lc"),
            of("/gold_win_rate/mean"),
            judges(e),
            of("/kl"),
            of("/response_length"),
            of("/truncation_rate"),
            of("/entropy"),
        ]
    };
    page.push_str("<h2>Evaluations</h2>\n");
    let heads = [
        "step",
        "win rate",
        "95 % interval",
        "length-controlled",
        "gold",
        "other judges",
        "KL",
        "length",
        "truncated",
        "entropy",
    ];
    table(
        page,
        &heads,
        &evaluations.iter().map(row).collect::<Vec<_>>(),
    )
}

/// Win rates of an evaluation under the judges that give no labels.
fn judges(evaluation: &Value) -> String {
    let judges = list(&evaluation["judges"]).iter().take(MAX_ROWS);
    let texts: Vec<_> = judges
        .map(|judge| {
            let rate = match judge["win_rate"].is_null() {
                true => "without a verdict".into(),
                false => short(&judge["win_rate"]["mean"]),
            };
            format!("{} {rate}", short(&judge["judge"]))
        })
        .collect();
    match texts.is_empty() {
        true => "–".into(),
        false => texts.join(", "),
    }
}

/// Completions of the same prompts at the first and the last evaluation.
fn examples(page: &mut String, report: &Value) -> std::fmt::Result {
    let evaluations = list(&report["evaluations"]);
    let (Some(first), Some(last)) = (evaluations.first(), evaluations.last()) else {
        return Ok(());
    };
    let before: HashMap<_, _> = list(&first["examples"])
        .iter()
        .filter_map(|example| Some((example["prompt"].as_str()?, example)))
        .collect();
    page.push_str("<h2>Samples before and after</h2>\n");
    for example in list(&last["examples"]) {
        let prompt = example["prompt"].as_str();
        let before = prompt.and_then(|prompt| before.get(prompt));
        let before = before.filter(|_| evaluations.len() > 1);
        let mut sides = vec![("reference", &example["reference"])];
        sides.extend(before.map(|before| ("policy before", &before["policy"])));
        sides.push(("policy after", &example["policy"]));
        writeln!(
            page,
            "<article><p class=\"prompt\">{}</p><div class=\"sides\">",
            short(&example["prompt"])
        )?;
        for (side, text) in sides {
            writeln!(
                page,
                "<section><h3>{side}</h3><p>{}</p></section>",
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
        let before_after = |measure: &str, key: &str| {
            format!(
                "{} → {}",
                of(&format!("/{measure}/before{key}")),
                of(&format!("/{measure}/after{key}"))
            )
        };
        vec![
            of("/round"),
            of("/step"),
            before_after("golden_wins", ""),
            before_after("held_out", "/accuracy"),
            before_after("held_out", "/ece"),
            before_after("policy", "/accuracy"),
            r["rejected"].as_str().map_or("accepted".into(), escaped),
        ]
    };
    page.push_str("<h2>APO rounds of the preference model</h2>\n");
    let heads = [
        "round",
        "step",
        "golden answer wins",
        "accuracy",
        "calibration error",
        "accuracy on the policy's samples",
        "",
    ];
    let rows: Vec<_> = rounds.iter().take(MAX_ROWS).map(row).collect();
    table(page, &heads, &rows)?;
    Ok(())
}

fn stages(page: &mut String, report: &Value) -> std::fmt::Result {
    let Some(stages) = report["stages"].as_object() else {
        return Ok(());
    };
    let row = |(name, stage_counters): (&String, &Value)| {
        let dropped = stage_counters["dropped"].as_object().into_iter().flatten();
        let dropped: Vec<_> = dropped
            .take(MAX_ROWS)
            .map(|(reason, n)| format!("{} {}", short(n), escaped(reason)))
            .collect();
        let dropped = if dropped.is_empty() {
            "0".into()
        } else {
            dropped.join(", ")
        };
        vec![
            escaped(name),
            short(&stage_counters["received"]),
            short(&stage_counters["emitted"]),
            dropped,
            short(&stage_counters["in_flight"]),
        ]
    };
    page.push_str("<h2>Flow</h2>\n");
    let heads = ["stage", "received", "emitted", "dropped", "in flight"];
    let rows: Vec<_> = stages.iter().take(MAX_ROWS).map(row).collect();
    table(page, &heads, &rows)
}

fn environment(page: &mut String, report: &Value) -> std::fmt::Result {
    page.push_str("<h2>Environment</h2>\n");
    let Some(environment) = report["environment"].as_object() else {
        page.push_str("<p class=\"soft\">Available once the run has ended.</p>\n");
        return Ok(());
    };
    let text = |value: &Value| match value {
        Value::Array(_) => list(value).iter().map(short).collect::<Vec<_>>().join(" "),
        other => short(other),
    };
    let row = |(name, value): (&String, &Value)| vec![escaped(name).replace('_', " "), text(value)];
    table(
        page,
        &["what", "value"],
        &environment
            .iter()
            .take(MAX_ROWS)
            .map(row)
            .collect::<Vec<_>>(),
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
    fn a_report_is_self_contained_and_escapes_text() {
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
            "stages": {"actor": {"received": 5, "emitted": 3, "dropped": {"identical": 2}, "in_flight": 0}},
            "evaluations": [
                {"step": 0, "examples": [example("young")]}, {"step": 2, "examples": [example("old")]}],
        });
        write("report.json", &report.to_string());
        let mut view = RunView::open(directory.path()).unwrap();
        view.refresh().unwrap();
        let page = super::page(&view).unwrap();
        for expected in [
            "&lt;script&gt;alert(1)&lt;/script&gt;",
            "policy before</h3><p>young",
            "policy after</h3><p>old",
            "<dd>0.800</dd>",
            "<dt>evaluated at step</dt><dd>2</dd>",
            "<td>2 identical</td>",
            "name = &quot;&lt;b&gt;&quot;",
            "at the end: loss 0.250",
        ] {
            assert!(page.contains(expected), "no {expected:?} in\n{page}");
        }
        assert_eq!(page.matches("<svg").count(), 2, "win rate and loss");
        for foreign in ["<script", "<img", "<link", "src=", "@import"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn an_unfinished_run_is_reported_at_its_current_step() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(
            directory.path().join("metrics.jsonl"),
            "{\"step\":3,\"wall_seconds\":1,\"loss\":1}\n",
        )
        .unwrap();
        let mut view = RunView::open(directory.path()).unwrap();
        view.refresh().unwrap();
        let page = super::page(&view).unwrap();
        assert!(page.contains("shows its state at step 3"), "{page}");
        assert!(!page.contains("<h2>Settings"), "{page}");
    }

    #[test]
    fn a_hostile_run_is_reported_within_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("config.toml", "[run]\nname = \"</pre><script>\"\n");
        let names: String = (0..200_000).map(|n| format!(",\"m{n}\":1e308")).collect();
        write(
            "metrics.jsonl",
            &format!(
                "{{\"step\":1,\"loss\":1e308{names}}}\n{{\"step\":2,\"loss\":-1e308}}\n{{\"step\":3,\"loss\":NaN}}\n"
            ),
        );
        let example = serde_json::json!({"prompt": "p", "policy": "x".repeat(1 << 20)});
        let mut evaluations = vec![serde_json::json!({"step": 1e308}); 5000];
        evaluations.push(serde_json::json!({"step": 1e308, "examples": vec![&example; 3]}));
        let report = serde_json::json!({
            "pairs": -1e308, "pairs_per_second": [[["<img src=x>"]]], "stages": {"<b>": 1},
            "environment": {"<i>": ["\u{1b}[31m", {}]}, "evaluations": evaluations,
        });
        write("report.json", &report.to_string());
        let mut view = RunView::open(directory.path()).unwrap();
        view.refresh().unwrap();
        let page = super::page(&view).unwrap();
        for expected in [
            "1 malformed lines, and 199",
            "loss -1.000e308",
            "&lt;img src=x&gt;",
            "&lt;b&gt;",
        ] {
            assert!(page.contains(expected), "no {expected:?}");
        }
        for foreign in ["<script", "<img", "<b>", "<i>", "\u{1b}"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert!(page.len() < 2 << 20, "{} bytes", page.len());
    }
}
