//! Position bias: the preference of a judge for the completion that it is shown first.
//!
//! Over comparisons whose order says nothing about which completion is better, p − ½ is as likely positive as negative,
//! whatever the completions are worth. Its mean is the bias. Σ(p − ½) / √Σ(p − ½)² tells a bias from chance: without
//! one it exceeds z with probability at most 2·exp(−z²/2) (Efron, "Student's t-test under symmetry conditions", 1969).

use std::sync::{Mutex, PoisonError};

use messages::Probability;

use crate::judge::Verdict;

/// Number of recent preferences over which the bias is taken, at most; at least half of it.
const WINDOW: f64 = 1000.0;
/// Fewest preferences that show a bias.
const MIN_COUNT: f64 = 30.0;
/// Statistic beyond which a bias is no chance: probability below 1e-5 in a window.
const SIGNIFICANT: f64 = 5.0;

/// The position bias of one judge over its recent preferences; warns once when it is significant.
#[derive(Default)]
pub(crate) struct PositionBiasMonitor(Mutex<PositionBias>);

/// Sums over recent preferences.
#[derive(Debug, Default)]
struct PositionBias {
    count: f64,
    /// Σ(p − ½), with p for the completion shown first.
    sum: f64,
    /// Σ(p − ½)².
    squares: f64,
    was_reported: bool,
}

impl PositionBiasMonitor {
    /// Records verdicts of `judge` on comparisons in a random order, or on both orders of one comparison. Returns the
    /// mean bias, from −½ (always the second) to ½ (always the first); `None` before the first preference.
    pub(crate) fn observe(&self, judge: &str, verdicts: &[&Verdict]) -> Option<f64> {
        let mut bias = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for verdict in verdicts {
            if let Verdict::Preference(p) = verdict {
                bias.add(*p);
            }
        }
        if bias.is_significant() && !bias.was_reported {
            bias.was_reported = true;
            let prefers = if bias.sum > 0.0 { "first" } else { "second" };
            let (p_first, comparisons) = (0.5 + bias.mean()?, bias.count);
            tracing::warn!(
                judge,
                prefers,
                p_first,
                comparisons,
                "the judge has a significant position bias; compare in both orders \
                 (preference.orders = \"both\") or change the judge"
            );
        }
        bias.mean()
    }
}

impl PositionBias {
    fn add(&mut self, p: Probability) {
        let difference = f64::from(p.get()) - 0.5;
        self.count += 1.0;
        self.sum += difference;
        self.squares += difference * difference;
        if self.count > WINDOW {
            self.count /= 2.0;
            self.sum /= 2.0;
            self.squares /= 2.0;
        }
    }

    fn mean(&self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }

    fn is_significant(&self) -> bool {
        self.count >= MIN_COUNT && self.sum.abs() > SIGNIFICANT * self.squares.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use messages::Seed;

    use super::*;
    use crate::judge::fake::{abstained, preferred};

    /// The mean after these p, and the number of them after which the bias is significant.
    fn bias(ps: impl IntoIterator<Item = f32>) -> (f64, Option<usize>) {
        let mut bias = PositionBias::default();
        let mut significant_at = None;
        for (index, p) in ps.into_iter().enumerate() {
            bias.add(Probability::new(p).unwrap());
            if bias.is_significant() {
                significant_at = significant_at.or(Some(index + 1));
            }
        }
        (bias.mean().expect("a preference"), significant_at)
    }

    #[test]
    fn a_judge_that_always_says_the_first_is_found_and_chance_is_not() {
        assert_eq!(bias([1.0; 400]), (0.5, Some(30)));
        assert_eq!(bias([0.0; 400]), (-0.5, Some(30)));
        let (mean, at) = bias([0.75; 400]);
        assert_eq!((mean, at), (0.25, Some(30)), "however weak");
        assert_eq!(bias([0.5; 400]), (0.0, None), "ties");
        // Three of four: the mean is ¼, the statistic √n / 2, which exceeds 5 after 100.
        let (mean, at) = bias([1.0, 1.0, 0.0, 1.0].into_iter().cycle().take(400));
        assert_eq!(mean, 0.25);
        assert!(at.is_some_and(|at| (95..=110).contains(&at)), "{at:?}");
        let coin = |toss| {
            if Seed(7).derive(toss).0.is_multiple_of(2) {
                0.0
            } else {
                1.0
            }
        };
        let (mean, at) = bias((0..100_000).map(coin));
        assert_eq!(at, None, "chance");
        assert!(mean.abs() < 0.1, "{mean}");
    }

    #[test]
    fn abstentions_are_not_counted() {
        let monitor = PositionBiasMonitor::default();
        let (first, no) = (preferred(1.0), abstained("no"));
        assert_eq!(monitor.observe("http", &[&no]), None);
        assert_eq!(monitor.observe("http", &[&first, &no]), Some(0.5));
        assert_eq!(monitor.observe("http", &[&preferred(0.0), &no]), Some(0.0));
    }
}
