//! Report of `agon fit-preference`.

use std::{fmt::Write as _, path::Path};

use preference::Calibration;
use serde_json::json;
use settings::Head;
use telemetry::{Interval, RunDirectory};

use crate::{
    assembly::{SkippedPairs, StyleComparison},
    report::charts,
};

/// Results of training a preference model.
pub(crate) struct FitReport<'a> {
    /// Accuracy and calibration on the held-out pairs.
    pub(crate) calibration: &'a Calibration,
    /// Preferences between styles of the playground.
    pub(crate) styles: &'a [StyleComparison],
    /// Number of training pairs.
    pub(crate) fitting: usize,
    /// Pairs that were left out.
    pub(crate) skipped: SkippedPairs,
    /// Training pairs that repeat an earlier one.
    pub(crate) duplicates: usize,
    /// Duration in seconds.
    pub(crate) seconds: f64,
    /// The model's folder.
    pub(crate) model: &'a Path,
    /// Programs that can compute the model's scores.
    pub(crate) compatibility: &'static str,
}

impl FitReport<'_> {
    /// Writes report.json, report.md and the reliability diagram of a model with this `head`, and prints the text.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn write(&self, head: Head, directory: &RunDirectory) -> anyhow::Result<()> {
        let diagram = directory.root().join("reliability.svg");
        charts::write_reliability(&diagram, self.calibration)?;
        let accuracy = accuracy(self.calibration);
        if accuracy.low <= 0.5 {
            let Interval { mean, low, high } = accuracy;
            tracing::warn!(
                "the held-out pairs do not show that the preference model is better than chance: accuracy {mean:.3}, 95 % \
                 interval {low:.3} to {high:.3}, which must be above 0.5"
            );
        }
        let json = json!({
            "head": head,
            "pairs": self.fitting,
            "left_out": self.skipped.total(),
            "left_out_by_reason": self.skipped,
            "repeated": self.duplicates,
            "seconds": self.seconds,
            "model": self.model,
            "validation": self.calibration,
            "accuracy": accuracy,
            "styles": self.styles,
            "peak_memory_bytes": telemetry::peak_memory_bytes(),
        });
        super::write(directory, &json, &markdown(self)?)
    }
}

fn accuracy(calibration: &Calibration) -> Interval {
    Interval::wilson(calibration.accuracy, calibration.decided)
}

fn markdown(report: &FitReport<'_>) -> Result<String, std::fmt::Error> {
    let calibration = report.calibration;
    let mut text = String::new();
    writeln!(text, "# A preference model\n")?;
    writeln!(
        text,
        "Trained on {} pairs in {:.0} s, of which {} repeat an earlier one; left out: {}.\n",
        report.fitting, report.seconds, report.duplicates, report.skipped
    )?;
    writeln!(text, "| on {} held-out pairs | | |", calibration.pairs)?;
    writeln!(text, "|---|---|---|")?;
    let accuracy = accuracy(calibration);
    writeln!(
        text,
        "| accuracy | {:.3} ({:.3} to {:.3}) | share of pairs on which it prefers the preferred response, 95 % interval |",
        accuracy.mean, accuracy.low, accuracy.high
    )?;
    for (name, value, meaning) in [
        (
            "ECE",
            calibration.ece,
            "expected calibration error of p, both orders",
        ),
        (
            "Brier score",
            calibration.brier,
            "mean squared error of p; 0.25 at p = 0.5",
        ),
        ("log loss", calibration.log_loss, "nats; 0.693 at p = 0.5"),
        (
            "length bias",
            calibration.length_bias,
            "preference for the longer response beyond the annotators' own",
        ),
    ] {
        writeln!(text, "| {name} | {value:.3} | {meaning} |")?;
    }
    writeln!(
        text,
        "\n| length difference up to (tokens) | longer preferred: model | annotators |"
    )?;
    writeln!(text, "|---|---|---|")?;
    for quarter in &calibration.length_quarters {
        writeln!(
            text,
            "| {} | {:.3} | {:.3} |",
            quarter.up_to, quarter.mean_p, quarter.mean_label
        )?;
    }
    if !report.styles.is_empty() {
        writeln!(
            text,
            "\n| style, all else equal | model | true preference |\n|---|---|---|"
        )?;
    }
    for s in report.styles {
        writeln!(
            text,
            "| {} over {} | {:.3} | {:.3} |",
            s.style, s.over, s.mean_p, s.gold
        )?;
    }
    writeln!(text, "\n![reliability](reliability.svg)\n")?;
    writeln!(
        text,
        "Model: `{}` ({}).",
        report.model.display(),
        report.compatibility
    )?;
    Ok(text)
}
