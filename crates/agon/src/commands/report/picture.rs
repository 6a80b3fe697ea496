//! Curves as SVG within a page.

use anyhow::anyhow;
use plotters::prelude::*;
use telemetry::Curve;

const SIZE: (u32, u32) = (560, 300);
const COLORS: [RGBColor; 3] = [
    RGBColor(0x2a, 0x6f, 0xb0),
    RGBColor(0xc7, 0x7b, 0x0a),
    RGBColor(0x1b, 0x7f, 0x4b),
];

/// A named line.
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    pub(super) curve: &'a Curve,
}

/// A picture of these lines over learner steps, the first with a band where it has one; `range` is shown
/// in any case.
pub(super) fn svg(
    lines: &[Line<'_>],
    band: Option<(&Curve, &Curve)>,
    range: Option<(f64, f64)>,
) -> anyhow::Result<String> {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        let (steps, values) = extent(lines, band, range);
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..steps, values.0..values.1)?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .x_desc("step")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .draw()?;
        if let Some((low, high)) = band {
            let back = points(low).into_iter().rev();
            let around: Vec<_> = points(high).into_iter().chain(back).collect();
            chart.draw_series([Polygon::new(around, COLORS[0].mix(0.18))])?;
        }
        for (line, color) in lines.iter().zip(COLORS) {
            let style = color.stroke_width(2);
            chart
                .draw_series(LineSeries::new(points(line.curve), style))?
                .label(line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(TRANSPARENT)
            .position(SeriesLabelPosition::UpperLeft)
            .draw()?;
        area.present()?;
        Ok(())
    };
    draw().map_err(|error| anyhow!("failed to draw a curve: {error}"))?;
    drop(area);
    Ok(text)
}

fn points(curve: &Curve) -> Vec<(f64, f64)> {
    let both = curve.steps.iter().zip(&curve.values);
    both.filter_map(|(&step, value)| Some((step as f64, (*value)?)))
        .collect()
}

fn extent(
    lines: &[Line<'_>],
    band: Option<(&Curve, &Curve)>,
    range: Option<(f64, f64)>,
) -> (f64, (f64, f64)) {
    let curves = lines.iter().map(|line| line.curve);
    let all = curves.chain(band.into_iter().flat_map(|(low, high)| [low, high]));
    let all: Vec<_> = all.flat_map(points).collect();
    let steps = all.iter().map(|point| point.0).fold(1.0, f64::max);
    let begun = range.unwrap_or((f64::INFINITY, f64::NEG_INFINITY));
    let wider = |(low, high): (f64, f64), y: f64| (low.min(y), high.max(y));
    let (low, high) = all.iter().map(|point| point.1).fold(begun, wider);
    if high > low {
        let room = 0.04 * (high - low);
        return (steps, (low - room, high + room));
    }
    let middle = if low.is_finite() { low } else { 0.0 };
    (steps, (middle - 1.0, middle + 1.0))
}
