//! The report of a tournament as one HTML page without scripts.

use std::fmt::Write as _;

use settings::TournamentJudge;

use crate::{
    report::{
        charts::{ChartLine, LineChart, Point},
        markup::{escaped, page_start, table},
    },
    tournament::{
        results::{EvaluationMean, TournamentResults, Training},
        statistics::SeedMean,
        tables::{summary, tables},
    },
};

/// Reads a value of an evaluation.
type ValueOf = dyn Fn(&EvaluationMean) -> Option<SeedMean>;

/// The page as HTML.
pub(super) fn page(results: &TournamentResults) -> anyhow::Result<String> {
    let mut page = page_start(&results.name);
    writeln!(page, "<p>{}</p>", escaped(&summary(results)))?;
    page.push_str("<h2>Charts</h2>\n<div class=\"grid\">\n");
    charts(&mut page, results)?;
    page.push_str("</div>\n");
    for content in tables(results) {
        writeln!(
            page,
            "<h2>{}</h2>\n<p class=\"soft\">{}</p>",
            escaped(&content.title),
            escaped(&content.note)
        )?;
        let heads: Vec<String> = content.heads.iter().map(|head| escaped(head)).collect();
        let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
        let rows: Vec<Vec<String>> = content
            .rows
            .iter()
            .map(|row| {
                row.iter()
                    .map(|text| cell(text, content.is_matrix))
                    .collect()
            })
            .collect();
        table(&mut page, &heads, &rows)?;
    }
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

/// A cell's text; in a matrix on a colour, the bluer above .5 and the redder below.
fn cell(text: &str, is_matrix: bool) -> String {
    let rate = text.trim_end_matches('*').parse::<f64>();
    let Ok(rate) = rate else {
        return escaped(text);
    };
    if !is_matrix {
        return escaped(text);
    }
    let colour = if rate > 0.5 {
        "42,111,176"
    } else {
        "199,90,60"
    };
    let strength = (2.0 * (rate - 0.5)).abs().min(1.0) * 0.7;
    format!("<span class=\"rate\" style=\"background:rgba({colour},{strength:.2})\">{text}</span>")
}

fn charts(page: &mut String, results: &TournamentResults) -> anyhow::Result<()> {
    let training = &results.training;
    let judge = results.judge.to_string();
    let win_rate: &ValueOf = &|e| e.win_rate;
    let rates = Some((0.4, 1.0));
    over_steps(
        page,
        &format!("Win rate under {judge:?}"),
        training,
        win_rate,
        rates,
    )?;
    against(
        page,
        &format!("Win rate under {judge:?} against KL"),
        "KL, nats",
        training,
        &|e| e.kl,
    )?;
    if results.judge != TournamentJudge::Run {
        let proxy: &ValueOf = &|e| e.run_win_rate;
        let title = format!("Win rate under {judge:?} against that under the run's judge");
        against(
            page,
            &title,
            "win rate under the run's judge",
            training,
            proxy,
        )?;
    }
    over_steps(
        page,
        "KL from the reference, nats",
        training,
        &|e| e.kl,
        None,
    )?;
    over_steps(
        page,
        "Length of answers, tokens",
        training,
        &|e| e.length,
        None,
    )?;
    further_curves(page, training)
}

/// A chart of each further metric.
fn further_curves(page: &mut String, training: &[Training]) -> anyhow::Result<()> {
    let metrics = training.first().map_or(&[][..], |first| &first.curves);
    for (index, metric) in metrics.iter().enumerate() {
        let lines = training.iter().map(|training| {
            let points = training.curves[index].points.iter();
            line(
                &training.name,
                points.map(|point| (point.step as f64, point.value)),
            )
        });
        figure(page, &metric.metric, &LineChart::new(lines.collect(), None))?;
    }
    Ok(())
}

/// A chart of a value over the steps, with the t-intervals over the seeds as bands.
fn over_steps(
    page: &mut String,
    title: &str,
    training: &[Training],
    value: &ValueOf,
    range: Option<(f64, f64)>,
) -> anyhow::Result<()> {
    let lines = training.iter().map(|training| {
        let points = training.evaluations.iter();
        line(
            &training.name,
            points.filter_map(|e| Some((e.step as f64, value(e)?))),
        )
    });
    figure(page, title, &LineChart::new(lines.collect(), range))
}

/// A chart of the win rate against another value, a point an evaluation.
fn against(
    page: &mut String,
    title: &str,
    axis: &str,
    training: &[Training],
    value: &ValueOf,
) -> anyhow::Result<()> {
    let lines = training.iter().map(|training| {
        let points = training.evaluations.iter();
        let points = points.filter_map(|e| Some((value(e)?.mean, e.win_rate?.mean)));
        ChartLine::with_marks(&training.name, points.collect())
    });
    let chart = LineChart::new(lines.collect(), None).with_axis(axis);
    figure(page, title, &chart)
}

fn line(name: &str, points: impl Iterator<Item = (f64, SeedMean)>) -> ChartLine<'_> {
    let points: Vec<_> = points.collect();
    let of = |value: &dyn Fn(&SeedMean) -> Option<f64>| -> Vec<Point> {
        let known = points.iter();
        known
            .filter_map(|(x, mean)| Some((*x, value(mean)?)))
            .collect()
    };
    ChartLine::with_outline(
        name,
        of(&|mean| Some(mean.mean)),
        of(&|mean| mean.low),
        of(&|mean| mean.high),
    )
}

fn figure(page: &mut String, title: &str, chart: &LineChart<'_>) -> anyhow::Result<()> {
    let svg = chart.svg()?;
    writeln!(
        page,
        "<figure><figcaption>{}</figcaption>\n{svg}</figure>",
        escaped(title)
    )?;
    Ok(())
}
