//! Charts as self-contained SVG: line charts over learner steps or another value, and reliability diagrams.

use std::{collections::BTreeSet, error::Error, path::Path};

use anyhow::anyhow;
use learner::Evaluation;
use plotters::{coord::Shift, prelude::*};
use preference::Calibration;
use telemetry::{Curve, Interval, write_atomically};

/// Size of an image, in pixels.
#[derive(Debug, Clone, Copy)]
struct ImageSize {
    width: u32,
    height: u32,
}

/// Size of a chart in a file of its own, in pixels.
const FILE_SIZE: ImageSize = ImageSize {
    width: 640,
    height: 480,
};
/// Size of a chart within a page, in pixels.
const PAGE_SIZE: ImageSize = ImageSize {
    width: 560,
    height: 300,
};
/// Colours of lines, in their order; further lines repeat them.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0x2a, 0x6f, 0xb0),
    RGBColor(0xc7, 0x7b, 0x0a),
    RGBColor(0x1b, 0x7f, 0x4b),
    RGBColor(0x8e, 0x44, 0x9c),
    RGBColor(0xb0, 0x3a, 0x3a),
    RGBColor(0x4a, 0x4a, 0x4a),
    RGBColor(0x17, 0x9c, 0xa8),
    RGBColor(0xd1, 0x4f, 0x92),
    RGBColor(0x7a, 0x5c, 0x2e),
    RGBColor(0x6f, 0x8f, 0x1a),
];
/// Share of the width and of the height of a chart that a legend may cover.
const LEGEND_SHARE: f64 = 0.45;
/// Radius of the marks of a line, in pixels.
const MARK_RADIUS: i32 = 3;
/// Name of the axis of learner steps.
const STEPS: &str = "step";
/// Margin above and below the values, as a share of their range.
const MARGIN: f64 = 0.04;
/// Values beyond this are drawn at it: differences of the largest numbers are infinite.
const MAX_VALUE: f64 = 1e100;
/// Least share of a value that an axis shows: its marks cannot be told apart below the precision of numbers.
const MIN_SHARE: f64 = 1e-6;

/// A point: step, or another value on the horizontal axis, and value.
pub(crate) type Point = (f64, f64);

/// A line with a legend entry.
pub(crate) struct ChartLine<'a> {
    name: &'a str,
    points: Vec<Point>,
    /// Outline of the shaded band; empty for none.
    band: Vec<Point>,
    /// Whether every point has a mark.
    is_marked: bool,
}

impl<'a> ChartLine<'a> {
    /// A recorded curve; missing values are left out.
    pub(crate) fn of_curve(name: &'a str, curve: &Curve) -> Self {
        Self {
            name,
            points: points(curve),
            band: Vec::new(),
            is_marked: false,
        }
    }

    /// A line through `means`, with a band between `low` and `high` where there are such.
    pub(crate) fn with_outline(
        name: &'a str,
        means: Vec<Point>,
        low: Vec<Point>,
        high: Vec<Point>,
    ) -> Self {
        Self {
            name,
            points: drawable(means.into_iter()),
            band: drawable(low.into_iter().chain(high.into_iter().rev())),
            is_marked: false,
        }
    }

    /// A line through points in any order, each with a mark.
    pub(crate) fn with_marks(name: &'a str, points: Vec<Point>) -> Self {
        Self {
            name,
            points: drawable(points.into_iter()),
            band: Vec::new(),
            is_marked: true,
        }
    }

    /// The line with a band between two curves.
    pub(crate) fn with_band(mut self, low: &Curve, high: &Curve) -> Self {
        let back = points(low).into_iter().rev();
        self.band = points(high).into_iter().chain(back).collect();
        self
    }

    /// Means of intervals by step, with the intervals as band.
    fn of_intervals(name: &'a str, intervals: &[(f64, Interval)]) -> Self {
        let of = |value: &dyn Fn(&Interval) -> f64| -> Vec<Point> {
            let both = intervals.iter();
            both.map(|(step, interval)| (*step, value(interval)))
                .collect()
        };
        Self::with_outline(name, of(&|i| i.mean), of(&|i| i.low), of(&|i| i.high))
    }
}

/// A line chart, over learner steps unless it has another axis.
pub(crate) struct LineChart<'a> {
    lines: Vec<ChartLine<'a>>,
    /// Name of the horizontal axis.
    axis: &'a str,
    /// Range of values that is shown in any case.
    range: Option<(f64, f64)>,
    caption: Option<&'a str>,
    /// A horizontal grey line at this value.
    baseline: Option<f64>,
    size: ImageSize,
}

impl<'a> LineChart<'a> {
    /// A chart within a page. `range` is shown in any case.
    pub(crate) fn new(lines: Vec<ChartLine<'a>>, range: Option<(f64, f64)>) -> Self {
        Self {
            lines,
            axis: STEPS,
            range,
            caption: None,
            baseline: None,
            size: PAGE_SIZE,
        }
    }

    /// The same chart with another horizontal axis, from 0 on.
    pub(crate) fn with_axis(self, axis: &'a str) -> Self {
        Self { axis, ..self }
    }

    /// The chart as SVG.
    ///
    /// # Errors
    /// When it cannot be drawn.
    pub(crate) fn svg(&self) -> anyhow::Result<String> {
        draw_svg(self.size, |area| {
            let (last, (low, high)) = self.extent();
            let decimals = if self.axis == STEPS { 0 } else { 2 };
            let mut builder = ChartBuilder::on(area);
            builder
                .margin(8)
                .x_label_area_size(28)
                .y_label_area_size(52);
            if let Some(caption) = self.caption {
                builder.caption(caption, ("sans-serif", 18));
            }
            let mut chart = builder.build_cartesian_2d(0.0..last, low..high)?;
            chart
                .configure_mesh()
                .max_light_lines(0)
                .x_desc(self.axis)
                .x_label_formatter(&|value| format!("{value:.decimals$}"))
                .draw()?;
            if let Some(value) = self.baseline {
                let ends = [(0.0, value), (last, value)];
                chart.draw_series(LineSeries::new(ends, BLACK.mix(0.4)))?;
            }
            for (line, colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
                if !line.band.is_empty() {
                    chart.draw_series([Polygon::new(line.band.clone(), colour.mix(0.18))])?;
                }
                let style = colour.stroke_width(2);
                chart
                    .draw_series(LineSeries::new(line.points.iter().copied(), style))?
                    .label(line.name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
                if line.is_marked {
                    let mark = |&point: &Point| Circle::new(point, MARK_RADIUS, colour.filled());
                    chart.draw_series(line.points.iter().map(mark))?;
                }
            }
            chart
                .configure_series_labels()
                .background_style(WHITE.mix(0.8))
                .border_style(TRANSPARENT)
                .position(self.emptiest_corner(last, low, high))
                .draw()?;
            Ok(())
        })
    }

    /// The corner of the legend: the first in which the fewest points lie.
    fn emptiest_corner(&self, last: f64, low: f64, high: f64) -> SeriesLabelPosition {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let count = |is_left: bool, is_upper: bool| {
            let is_near = |share: f64, is_low: bool| match is_low {
                true => share < LEGEND_SHARE,
                false => share > 1.0 - LEGEND_SHARE,
            };
            let is_within = |point: &&Point| {
                let height = (point.1 / 2.0 - low / 2.0) / (high / 2.0 - low / 2.0);
                is_near(point.0 / last, is_left) && is_near(height, !is_upper)
            };
            points().filter(is_within).count()
        };
        let corners = [
            (SeriesLabelPosition::UpperLeft, count(true, true)),
            (SeriesLabelPosition::LowerRight, count(false, false)),
            (SeriesLabelPosition::UpperRight, count(false, true)),
            (SeriesLabelPosition::LowerLeft, count(true, false)),
        ];
        let best = corners.into_iter().min_by_key(|corner| corner.1);
        best.map_or(SeriesLabelPosition::UpperLeft, |corner| corner.0)
    }

    /// The end of the horizontal axis, and the range of the values with margins.
    fn extent(&self) -> (f64, (f64, f64)) {
        let lines = self.lines.iter();
        let all: Vec<Point> = lines
            .flat_map(|line| line.points.iter().chain(&line.band).copied())
            .collect();
        let least = if self.axis == STEPS { 1.0 } else { 0.1 };
        let last = all.iter().map(|point| point.0).fold(least, f64::max);
        let initial = self.range.unwrap_or((f64::INFINITY, f64::NEG_INFINITY));
        let (low, high) = all.iter().fold(initial, |(low, high), point| {
            (low.min(point.1), high.max(point.1))
        });
        (last, axis(low, high))
    }
}

/// Range of an axis that shows these values with margins; `low` above `high` means that there are none.
fn axis(low: f64, high: f64) -> (f64, f64) {
    if low > high {
        return (-1.0, 1.0);
    }
    let middle = low / 2.0 + high / 2.0;
    let half = match high > low {
        true => (high - low) * (0.5 + MARGIN),
        false => 1.0,
    };
    let half = half.max(MIN_SHARE * low.abs().max(high.abs())).max(1e-12);
    (middle - half, middle + half)
}

fn points(curve: &Curve) -> Vec<Point> {
    let both = curve.steps.iter().zip(&curve.values);
    drawable(both.filter_map(|(&step, value)| Some((step as f64, (*value)?))))
}

/// The points that can be drawn, within bounds.
fn drawable(points: impl Iterator<Item = Point>) -> Vec<Point> {
    points
        .filter(|point| !point.0.is_nan() && !point.1.is_nan())
        .map(|(x, y)| (x.clamp(0.0, MAX_VALUE), y.clamp(-MAX_VALUE, MAX_VALUE)))
        .collect()
}

/// Writes a chart of the win rates over steps: under the run's judge, where known under the gold preference, and under
/// the other evaluation judges. If the first rises while the others fall, the policy exploits its judge.
pub(crate) fn write_win_rates(path: &Path, evaluations: &[Evaluation]) -> anyhow::Result<()> {
    let intervals = |of: &dyn Fn(&Evaluation) -> Option<Interval>| -> Vec<(f64, Interval)> {
        let known = evaluations.iter();
        known
            .filter_map(|e| Some((e.step as f64, of(e)?)))
            .collect()
    };
    let mut lines = vec![
        ("the run's judge", intervals(&|e| Some(e.win_rate))),
        ("gold", intervals(&|e| e.gold_win_rate)),
    ];
    for judge in judge_names(evaluations) {
        lines.push((judge, intervals(&|e| e.under(judge)?.win_rate)));
    }
    let lines = lines.iter().filter(|(_, known)| !known.is_empty());
    let chart = LineChart {
        lines: lines
            .map(|(name, known)| ChartLine::of_intervals(name, known))
            .collect(),
        axis: STEPS,
        range: Some((0.0, 1.0)),
        caption: Some("win rate against the reference"),
        baseline: Some(0.5),
        size: FILE_SIZE,
    };
    Ok(write_atomically(path, chart.svg()?.as_bytes())?)
}

/// Names of the judges of these evaluations besides the run's and gold, sorted.
pub(crate) fn judge_names(evaluations: &[Evaluation]) -> BTreeSet<&str> {
    let judges = evaluations.iter().flat_map(|e| &e.judges);
    judges.map(|judge| judge.judge.as_str()).collect()
}

/// Writes a reliability diagram: the share of comparisons in which the first response was preferred, against the
/// probability p that the model gives it. A calibrated model is on the diagonal.
pub(crate) fn write_reliability(path: &Path, calibration: &Calibration) -> anyhow::Result<()> {
    let svg = draw_svg(FILE_SIZE, |area| {
        let caption = format!(
            "accuracy {:.3}, ECE {:.3}, {} pairs",
            calibration.accuracy, calibration.ece, calibration.pairs
        );
        let mut chart = ChartBuilder::on(area)
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
        let bins: Vec<_> = calibration.bins.iter().filter(|b| b.count > 0).collect();
        let colour = COLOURS[0];
        chart.draw_series(LineSeries::new(
            bins.iter().map(|bin| (bin.mean_p, bin.mean_label)),
            colour,
        ))?;
        let largest = bins.iter().map(|bin| bin.count).max().unwrap_or(1) as f64;
        chart.draw_series(bins.iter().map(|bin| {
            let radius = 3.0 + 9.0 * (bin.count as f64 / largest).sqrt();
            let centre = (bin.mean_p, bin.mean_label);
            Circle::new(centre, radius as i32, colour.mix(0.6).filled())
        }))?;
        Ok(())
    })?;
    Ok(write_atomically(path, svg.as_bytes())?)
}

type SvgArea<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws on a white area of this size; the result as SVG.
fn draw_svg(
    size: ImageSize,
    draw: impl FnOnce(&SvgArea<'_>) -> Result<(), Box<dyn Error>>,
) -> anyhow::Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (size.width, size.height)).into_drawing_area();
    let drawn = area
        .fill(&WHITE)
        .map_err(Into::into)
        .and_then(|()| draw(&area))
        .and_then(|()| area.present().map_err(Into::into));
    drawn.map_err(|error| anyhow!("failed to draw a chart: {error}"))?;
    drop(area);
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_of_extreme_values_are_drawn() {
        let cases: [&[f64]; 11] = [
            &[],
            &[1e308],
            &[-1e308, 1e308],
            &[1e308, 1e308 * (1.0 - f64::EPSILON)],
            &[f64::MAX, f64::INFINITY, f64::NEG_INFINITY, f64::NAN],
            &[1e16, 1e16 + 2.0],
            &[9.007e15, 9.007e15 + 1.0],
            &[5e-324, 0.0],
            &[1e-300, 2e-300],
            &[1.0, 1.0 + f64::EPSILON],
            &[-0.0, 0.0],
        ];
        for values in cases {
            let steps = (0..u64::MAX).rev();
            let points = drawable(steps.map(|step| step as f64).zip(values.iter().copied()));
            let lines = vec![ChartLine {
                name: "loss",
                band: points.clone(),
                points,
                is_marked: true,
            }];
            let svg = LineChart::new(lines, None).svg().unwrap();
            assert!(svg.contains("</svg>"), "{values:?}");
            assert!(!svg.contains("NaN"), "{values:?}: {svg}");
        }
    }

    #[test]
    fn an_axis_has_margins_and_a_resolvable_range() {
        let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
        let (low, high) = axis(0.0, 1.0);
        assert!(close(low, -0.04) && close(high, 1.04), "{low} {high}");
        let (low, high) = axis(2.0, 2.0);
        assert!(close(low, 1.0) && close(high, 3.0), "{low} {high}");
        let (low, high) = axis(1e16, 1e16 + 2.0);
        assert!(high - low >= 1e10, "{low} {high}");
        assert_eq!(axis(f64::INFINITY, f64::NEG_INFINITY), (-1.0, 1.0));
    }
}
