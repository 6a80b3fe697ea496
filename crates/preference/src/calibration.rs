//! How far a preference model's p can be trusted: accuracy, calibration, and its liking for length.

use serde::{Deserialize, Serialize};

/// Bins of the calibration error, over p from 0 to 1.
pub const BINS: usize = 10;

/// One comparison as a model sees it and as it was annotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    /// The model's probability that the first response is preferred.
    pub p: f64,
    /// The annotator's: 0, 1 or, of a known preference, anything between.
    pub label: f64,
    /// Tokens of the first response less those of the second.
    pub longer: i64,
}

/// What was found on a set of comparisons. Every comparison counts in both orders, so that nothing
/// depends on which response stood first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Comparisons.
    pub pairs: usize,
    /// How often the model and the label prefer the same response; labels of ½ are left out, a p of ½
    /// counts one half.
    pub accuracy: f64,
    /// Expected calibration error (Naeini et al. 2015): the mean over comparisons of
    /// |mean p − mean label| of the bin that p falls in.
    pub ece: f64,
    /// The mean of (p − label)² (Brier 1950); a constant ½ has 0.25 on labels of 0 and 1.
    pub brier: f64,
    /// Mean −log-likelihood of the labels, in nats; a constant ½ has 0.693.
    pub log_loss: f64,
    /// How much more the model prefers the longer response than the labels do, where lengths differ:
    /// mean p − mean label; 0 is none, positive too much.
    pub length_bias: f64,
    /// The same by quarter of the difference in length, the smallest quarter first.
    pub length_quarters: Vec<LengthQuarter>,
    /// The bins, from p = 0 to p = 1.
    pub bins: Vec<Bin>,
}

/// A tenth of the range of p.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Bin {
    /// Comparisons, in both orders, whose p falls into it.
    pub count: usize,
    /// Their mean p; 0 when there are none.
    pub mean_p: f64,
    /// Their mean label.
    pub mean_label: f64,
}

/// The comparisons whose difference in length is in one quarter of all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LengthQuarter {
    /// The largest difference in it, in tokens.
    pub up_to: u64,
    /// Mean p of the longer response.
    pub mean_p: f64,
    /// Its mean label.
    pub mean_label: f64,
}

impl Calibration {
    /// Measures these comparisons. `None` when there are none.
    #[must_use]
    pub fn of(judged: &[Judged]) -> Option<Self> {
        if judged.is_empty() {
            return None;
        }
        let n = judged.len() as f64;
        let mean = |of: &dyn Fn(&Judged) -> f64| judged.iter().map(of).sum::<f64>() / n;
        let bins = bins(judged);
        let gap = |bin: &Bin| bin.count as f64 * (bin.mean_p - bin.mean_label).abs();
        let quarters = length_quarters(judged);
        let longer: Vec<Judged> = judged.iter().filter_map(Judged::longer_first).collect();
        let bias = longer.iter().map(|j| j.p - j.label).sum::<f64>() / longer.len().max(1) as f64;
        Some(Self {
            pairs: judged.len(),
            accuracy: accuracy(judged),
            ece: bins.iter().map(gap).sum::<f64>() / (2.0 * n),
            brier: mean(&|j| (j.p - j.label).powi(2)),
            log_loss: mean(&Judged::log_loss),
            length_bias: bias,
            length_quarters: quarters,
            bins,
        })
    }
}

impl Judged {
    fn swapped(&self) -> Self {
        Self {
            p: 1.0 - self.p,
            label: 1.0 - self.label,
            longer: -self.longer,
        }
    }

    /// The comparison with the longer response first; none when they are of one length.
    fn longer_first(&self) -> Option<Self> {
        match self.longer.signum() {
            0 => None,
            1 => Some(*self),
            _ => Some(self.swapped()),
        }
    }

    fn log_loss(&self) -> f64 {
        // f32 probabilities reach 0 and 1; their logarithm is taken as that of the nearest number.
        let log = |p: f64| p.max(f64::from(f32::MIN_POSITIVE)).ln();
        -(self.label * log(self.p) + (1.0 - self.label) * log(1.0 - self.p))
    }
}

fn accuracy(judged: &[Judged]) -> f64 {
    let right = |j: &Judged| match (j.p - 0.5) * (j.label - 0.5) {
        product if product > 0.0 => 1.0,
        product if product < 0.0 => 0.0,
        _ => 0.5,
    };
    let decided: Vec<f64> = judged
        .iter()
        .filter(|j| j.label != 0.5)
        .map(right)
        .collect();
    if decided.is_empty() {
        return 0.5;
    }
    decided.iter().sum::<f64>() / decided.len() as f64
}

fn bins(judged: &[Judged]) -> Vec<Bin> {
    let mut sums = [Bin::default(); BINS];
    for j in judged.iter().flat_map(|j| [*j, j.swapped()]) {
        let place = ((j.p * BINS as f64) as usize).min(BINS - 1);
        let bin = &mut sums[place];
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

fn length_quarters(judged: &[Judged]) -> Vec<LengthQuarter> {
    let mut longer: Vec<Judged> = judged.iter().filter_map(Judged::longer_first).collect();
    longer.sort_by_key(|j| j.longer);
    let quarter = longer.len().div_ceil(4).max(1);
    longer
        .chunks(quarter)
        .map(|chunk| {
            let mean = |of: &dyn Fn(&Judged) -> f64| {
                chunk.iter().map(of).sum::<f64>() / chunk.len() as f64
            };
            LengthQuarter {
                up_to: chunk.last().map_or(0, |j| j.longer.unsigned_abs()),
                mean_p: mean(&|j| j.p),
                mean_label: mean(&|j| j.label),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(p: f64, label: f64, longer: i64) -> Judged {
        Judged { p, label, longer }
    }

    #[test]
    fn a_hand_worked_set() {
        let set = [
            judged(0.75, 1.0, 2),
            judged(0.75, 0.0, -1),
            judged(0.35, 0.0, 0),
            judged(0.5, 1.0, 4),
        ];
        let found = Calibration::of(&set).expect("there are comparisons");
        assert_eq!(found.pairs, 4);
        assert_eq!(found.accuracy, 2.5 / 4.0);
        // Both orders: .75 twice with labels 1, 0; .25 twice with 0, 1; .35 with 0; .65 with 1; .5 with 1
        // and with 0, which fall into one bin.
        let expected = (2.0 * 0.25 + 2.0 * 0.25 + 0.35 + 0.35 + 0.0) / 8.0;
        assert!((found.ece - expected).abs() < 1e-12, "{}", found.ece);
        let brier = (0.0625 + 0.5625 + 0.1225 + 0.25) / 4.0;
        assert!((found.brier - brier).abs() < 1e-12, "{}", found.brier);
        let log_loss = -(0.75f64.ln() + 0.25f64.ln() + 0.65f64.ln() + 0.5f64.ln()) / 4.0;
        assert!((found.log_loss - log_loss).abs() < 1e-12);
        // The longer response: p .75 label 1, p .25 label 1, p .5 label 1.
        assert!((found.length_bias - (1.5 - 3.0) / 3.0).abs() < 1e-12);
        assert_eq!(
            found
                .length_quarters
                .iter()
                .map(|q| q.up_to)
                .collect::<Vec<_>>(),
            [1, 2, 4]
        );
    }

    #[test]
    fn order_changes_nothing_and_perfect_calibration_has_no_error() {
        let set: Vec<Judged> = (0..100)
            .map(|i| judged(0.7, f64::from(u8::from(i % 10 < 7)), i % 5 - 2))
            .collect();
        let swapped: Vec<Judged> = set.iter().map(Judged::swapped).collect();
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
    fn ends_of_the_range_are_inside() {
        let found = Calibration::of(&[judged(1.0, 1.0, 0), judged(0.0, 1.0, 0)]).expect("some");
        assert_eq!(found.bins.iter().map(|b| b.count).sum::<usize>(), 4);
        assert!(found.log_loss.is_finite() && found.length_quarters.is_empty());
        assert_eq!(Calibration::of(&[]), None);
    }
}
