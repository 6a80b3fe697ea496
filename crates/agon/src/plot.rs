//! Pictures for reports, as SVG: they need no font, no display and no other file.

use std::path::Path;

use anyhow::anyhow;
use learner::Evaluation;
use plotters::prelude::*;
use preference::Calibration;

const SIZE: (u32, u32) = (640, 480);
const PROXY: RGBColor = RGBColor(0x2a, 0x6f, 0xb0);
const GOLD: RGBColor = RGBColor(0xc7, 0x7b, 0x0a);

/// A reliability diagram: of the comparisons a model gives p, the share in which the first response was
/// preferred, against p. A model on the diagonal means what it says.
pub(crate) fn reliability(path: &Path, calibration: &Calibration) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        area.fill(&WHITE)?;
        let caption = format!(
            "accuracy {:.3}, ECE {:.3}, {} pairs",
            calibration.accuracy, calibration.ece, calibration.pairs
        );
        let mut chart = ChartBuilder::on(&area)
            .caption(caption, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .x_desc("p of the model")
            .y_desc("share preferred")
            .draw()?;
        chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 1.0)], BLACK.mix(0.4)))?;
        let filled = calibration.bins.iter().filter(|bin| bin.count > 0);
        let points: Vec<_> = filled
            .map(|bin| (bin.mean_p, bin.mean_label, bin.count))
            .collect();
        chart.draw_series(LineSeries::new(
            points.iter().map(|&(x, y, _)| (x, y)),
            PROXY,
        ))?;
        let most = points.iter().map(|point| point.2).max().unwrap_or(1) as f64;
        chart.draw_series(points.iter().map(|&(x, y, count)| {
            let radius = 3.0 + 9.0 * (count as f64 / most).sqrt();
            Circle::new((x, y), radius as i32, PROXY.mix(0.6).filled())
        }))?;
        area.present()?;
        Ok(())
    };
    draw().map_err(|error| failed(path, &*error))
}

/// The win rate under the run's judge, and under the gold preference where there is one, over steps: where
/// the first rises and the second falls, the policy exploits its judge.
pub(crate) fn win_rates(path: &Path, evaluations: &[Evaluation]) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        area.fill(&WHITE)?;
        let last = evaluations.last().map_or(1.0, |e| e.step.max(1) as f64);
        let mut chart = ChartBuilder::on(&area)
            .caption("win rate against the reference", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..last, 0.0..1.0)?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .x_desc("step")
            .y_desc("win rate")
            .draw()?;
        chart.draw_series(LineSeries::new([(0.0, 0.5), (last, 0.5)], BLACK.mix(0.4)))?;
        let judge = |e: &Evaluation| Some(e.win_rate);
        let gold = |e: &Evaluation| e.gold_win_rate;
        type Of<'a> = &'a dyn Fn(&Evaluation) -> Option<learner::Interval>;
        let series: [(&str, RGBColor, Of<'_>); 2] =
            [("the run's judge", PROXY, &judge), ("gold", GOLD, &gold)];
        for (name, colour, of) in series {
            let points: Vec<_> = evaluations
                .iter()
                .filter_map(|e| of(e).map(|interval| (e.step as f64, interval)))
                .collect();
            if points.is_empty() {
                continue;
            }
            let low = points.iter().map(|(x, i)| (*x, i.low));
            let high = points.iter().rev().map(|(x, i)| (*x, i.high));
            let band = Polygon::new(low.chain(high).collect::<Vec<_>>(), colour.mix(0.15));
            chart.draw_series(std::iter::once(band))?;
            let line = LineSeries::new(
                points.iter().map(|(x, i)| (*x, i.mean)),
                colour.stroke_width(2),
            );
            chart.draw_series(line)?.label(name).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
            });
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .position(SeriesLabelPosition::LowerRight)
            .draw()?;
        area.present()?;
        Ok(())
    };
    draw().map_err(|error| failed(path, &*error))
}

fn failed(path: &Path, error: &dyn std::error::Error) -> anyhow::Error {
    anyhow!("failed to draw {}: {error}", path.display())
}
