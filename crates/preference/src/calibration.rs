//! Evaluation of a preference model's p: accuracy, calibration and length bias.

use serde::{Deserialize, Serialize};

/// Number of bins of the calibration error, over p from 0 to 1.
pub const BINS: usize = 10;

/// A model's p and the annotated label of one comparison.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Model probability that the first response is preferred.
    pub p: f64,
    /// Annotated probability: 0 or 1, or any p of a known preference.
    pub label: f64,
    /// Tokens of the first response minus those of the second.
    pub length_difference: i64,
}

/// Calibration on a set of comparisons. Every comparison counts in both orders, so that the order of the responses does
/// not matter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Number of comparisons.
    pub pairs: usize,
    /// Number of comparisons whose label is not ½.
    pub decided: usize,
    /// Rate at which the model and the label prefer the same response, of decided comparisons; a p of ½ counts one half.
    pub accuracy: f64,
    /// Expected calibration error (Naeini et al. 2015): the mean over comparisons of
    /// |mean p − mean label| of the bin that p falls in.
    pub ece: f64,
    /// Brier score, the mean of (p − label)² (Brier 1950); a constant ½ has 0.25 on labels of 0 and 1.
    pub brier: f64,
    /// Mean negative log-likelihood of the labels, in nats; a constant ½ has 0.693.
    pub log_loss: f64,
    /// Mean p − mean label of the longer response, where lengths differ; positive when the model favours length more
    /// than the labels do.
    pub length_bias: f64,
    /// p and label of the longer response by quartile of the length difference, smallest first.
    pub length_quarters: Vec<LengthQuarter>,
    /// Bins from p = 0 to p = 1.
    pub bins: Vec<Bin>,
}

/// One of [`BINS`] equal intervals of p.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Bin {
    /// Comparisons, in both orders, whose p falls into the bin.
    pub count: usize,
    /// Mean p; 0 for an empty bin.
    pub mean_p: f64,
    /// Mean label; 0 for an empty bin.
    pub mean_label: f64,
}

/// Comparisons in one quartile of the length difference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LengthQuarter {
    /// Largest difference in the quartile, in tokens.
    pub up_to: u64,
    /// Mean p of the longer response.
    pub mean_p: f64,
    /// Mean label of the longer response.
    pub mean_label: f64,
}

impl Calibration {
    /// Calibration on these comparisons; `None` when there are none.
    #[must_use]
    pub fn of(predictions: &[Prediction]) -> Option<Self> {
        if predictions.is_empty() {
            return None;
        }
        let n = predictions.len() as f64;
        let mean = |of: &dyn Fn(&Prediction) -> f64| predictions.iter().map(of).sum::<f64>() / n;
        let bins = bins(predictions);
        let gap = |bin: &Bin| bin.count as f64 * (bin.mean_p - bin.mean_label).abs();
        let quarters = length_quarters(predictions);
        let longer_first: Vec<Prediction> = predictions
            .iter()
            .filter_map(Prediction::longer_first)
            .collect();
        let bias = longer_first.iter().map(|j| j.p - j.label).sum::<f64>()
            / longer_first.len().max(1) as f64;
        Some(Self {
            pairs: predictions.len(),
            decided: predictions.iter().filter(|j| j.is_decided()).count(),
            accuracy: accuracy(predictions),
            ece: bins.iter().map(gap).sum::<f64>() / (2.0 * n),
            brier: mean(&|j| (j.p - j.label).powi(2)),
            log_loss: mean(&Prediction::log_loss),
            length_bias: bias,
            length_quarters: quarters,
            bins,
        })
    }
}

impl Prediction {
    fn is_decided(&self) -> bool {
        self.label != 0.5
    }

    fn swapped(&self) -> Self {
        Self {
            p: 1.0 - self.p,
            label: 1.0 - self.label,
            length_difference: -self.length_difference,
        }
    }

    /// The comparison with the longer response first; `None` for equal lengths.
    fn longer_first(&self) -> Option<Self> {
        match self.length_difference.signum() {
            0 => None,
            1 => Some(*self),
            _ => Some(self.swapped()),
        }
    }

    fn log_loss(&self) -> f64 {
        // f32 probabilities reach 0 and 1: clamps them to the smallest normal number.
        let log = |p: f64| p.max(f64::from(f32::MIN_POSITIVE)).ln();
        -(self.label * log(self.p) + (1.0 - self.label) * log(1.0 - self.p))
    }
}

fn accuracy(predictions: &[Prediction]) -> f64 {
    let right = |j: &Prediction| match (j.p - 0.5) * (j.label - 0.5) {
        product if product > 0.0 => 1.0,
        product if product < 0.0 => 0.0,
        _ => 0.5,
    };
    let decided: Vec<f64> = predictions
        .iter()
        .filter(|j| j.is_decided())
        .map(right)
        .collect();
    if decided.is_empty() {
        return 0.5;
    }
    decided.iter().sum::<f64>() / decided.len() as f64
}

fn bins(predictions: &[Prediction]) -> Vec<Bin> {
    let mut sums = [Bin::default(); BINS];
    for j in predictions.iter().flat_map(|j| [*j, j.swapped()]) {
        let index = ((j.p * BINS as f64) as usize).min(BINS - 1);
        let bin = &mut sums[index];
        bin.count += 1;
        bin.mean_p += j.p;
        bin.mean_label += j.label;
    }
    for bin in &mut sums {
        let count = bin.count.max(1) as f64;
        bin.mean_p /= count;
        bin.mean_label /= count;
    }
    sums.to_vec()
}

fn length_quarters(predictions: &[Prediction]) -> Vec<LengthQuarter> {
    let mut longer_first: Vec<Prediction> = predictions
        .iter()
        .filter_map(Prediction::longer_first)
        .collect();
    longer_first.sort_by_key(|j| j.length_difference);
    let quarter = longer_first.len().div_ceil(4).max(1);
    longer_first
        .chunks(quarter)
        .map(|chunk| {
            let mean = |of: &dyn Fn(&Prediction) -> f64| {
                chunk.iter().map(of).sum::<f64>() / chunk.len() as f64
            };
            LengthQuarter {
                up_to: chunk
                    .last()
                    .map_or(0, |j| j.length_difference.unsigned_abs()),
                mean_p: mean(&|j| j.p),
                mean_label: mean(&|j| j.label),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(p: f64, label: f64, length_difference: i64) -> Prediction {
        Prediction {
            p,
            label,
            length_difference,
        }
    }

    #[test]
    fn calibration_of_a_hand_worked_set() {
        let set = [
            prediction(0.75, 1.0, 2),
            prediction(0.75, 0.0, -1),
            prediction(0.35, 0.0, 0),
            prediction(0.5, 1.0, 4),
        ];
        let calibration = Calibration::of(&set).expect("there are comparisons");
        assert_eq!((calibration.pairs, calibration.decided), (4, 4));
        assert_eq!(calibration.accuracy, 2.5 / 4.0);
        // Both orders: .75 twice with labels 1, 0; .25 twice with 0, 1; .35 with 0; .65 with 1; .5 with 1
        // and with 0, in the same bin.
        let expected = (2.0 * 0.25 + 2.0 * 0.25 + 0.35 + 0.35 + 0.0) / 8.0;
        assert!(
            (calibration.ece - expected).abs() < 1e-12,
            "{}",
            calibration.ece
        );
        let brier = (0.0625 + 0.5625 + 0.1225 + 0.25) / 4.0;
        assert!(
            (calibration.brier - brier).abs() < 1e-12,
            "{}",
            calibration.brier
        );
        let log_loss = -(0.75f64.ln() + 0.25f64.ln() + 0.65f64.ln() + 0.5f64.ln()) / 4.0;
        assert!((calibration.log_loss - log_loss).abs() < 1e-12);
        // The longer response: p .75 label 1, p .25 label 1, p .5 label 1.
        assert!((calibration.length_bias - (1.5 - 3.0) / 3.0).abs() < 1e-12);
        assert_eq!(
            calibration
                .length_quarters
                .iter()
                .map(|q| q.up_to)
                .collect::<Vec<_>>(),
            [1, 2, 4]
        );
    }

    #[test]
    fn calibration_is_invariant_to_order_and_zero_for_exact_frequencies() {
        let set: Vec<Prediction> = (0..100)
            .map(|i| prediction(0.7, f64::from(u8::from(i % 10 < 7)), i % 5 - 2))
            .collect();
        let swapped: Vec<Prediction> = set.iter().map(Prediction::swapped).collect();
        let (one, other) = (Calibration::of(&set), Calibration::of(&swapped));
        let (one, other) = (one.expect("some"), other.expect("some"));
        assert!(
            one.ece < 1e-12 && other.ece < 1e-12,
            "{} {}",
            one.ece,
            other.ece
        );
        assert!((one.accuracy - 0.7).abs() < 1e-12 && (other.accuracy - 0.7).abs() < 1e-12);
        assert!((one.length_bias - other.length_bias).abs() < 1e-12);
    }

    #[test]
    fn p_of_zero_and_one_are_counted() {
        let calibration =
            Calibration::of(&[prediction(1.0, 1.0, 0), prediction(0.0, 1.0, 0)]).expect("some");
        assert_eq!(calibration.bins.iter().map(|b| b.count).sum::<usize>(), 4);
        assert!(calibration.log_loss.is_finite() && calibration.length_quarters.is_empty());
        assert_eq!(Calibration::of(&[]), None);
    }
}
