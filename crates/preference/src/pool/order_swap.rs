//! Combination of both orders of a comparison: averaging p and 1 − p′ cancels position bias.

use messages::{JudgeVersion, Probability, Purpose};
use settings::OrdersSetting;

use crate::judge::Verdict;
use crate::pool::VersionedVerdict;

/// Orders in which two completions are compared. An antisymmetric judge always gets one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// The given order.
    One,
    /// Both orders, averaged.
    Both,
}

impl Orders {
    /// Orders for a pair of this purpose. With `auto`, training uses one: the first completion is drawn, so position
    /// bias averages out. Evaluation uses both: the first completion is always the policy's. Pairs from files too: the
    /// first is the chosen one.
    #[must_use]
    pub fn of(setting: OrdersSetting, purpose: Purpose) -> Self {
        match (setting, purpose) {
            (OrdersSetting::One, _) => Self::One,
            (OrdersSetting::Both, _) => Self::Both,
            // Pairs from files are judged once and trained on in every pass.
            (OrdersSetting::Auto, Purpose::File) => Self::Both,
            (OrdersSetting::Auto, purpose) if purpose.is_evaluation() => Self::Both,
            (OrdersSetting::Auto, _) => Self::One,
        }
    }

    /// Number of requests per comparison.
    pub(crate) fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Both => 2,
        }
    }
}

/// Verdict on two completions, combined over orders.
#[derive(Debug, Clone, PartialEq)]
pub struct Preference {
    /// Verdict in the order of the request: the mean of both orders if both were requested, an abstention if either
    /// abstained or they differ too much.
    pub verdict: Verdict,
    /// Version of the judge.
    pub version: JudgeVersion,
    /// Estimates of p(first ≻ second) from this order and from the swapped one, if both were answered.
    pub estimates: Option<[Probability; 2]>,
    /// Scores of the first and the second completion, where the judge has scores.
    pub scores: Option<[f32; 2]>,
}

/// Thresholds of the combination.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Margins {
    /// A p closer to ½ than this becomes ½.
    pub tie: f64,
    /// A larger gap between the orders is an abstention.
    pub max_order_gap: f64,
}

impl Preference {
    /// The preference for the second completion over the first.
    #[must_use]
    pub(crate) fn swapped(self) -> Self {
        Self {
            verdict: match self.verdict {
                Verdict::Preference(p) => Verdict::Preference(p.complement()),
                abstained @ Verdict::Abstained { .. } => abstained,
            },
            version: self.version,
            estimates: self.estimates.map(|both| both.map(Probability::complement)),
            scores: self.scores.map(|[first, second]| [second, first]),
        }
    }

    /// |p − (1 − p′)|, the difference between both orders, from 0 to 1.
    #[must_use]
    pub fn order_gap(&self) -> Option<f32> {
        self.estimates.map(|[p, q]| (p.get() - q.get()).abs())
    }

    /// Whether the orders disagree on the preferred completion, or on whether there is one.
    #[must_use]
    pub fn changes_with_order(&self) -> Option<bool> {
        let side = |p: Probability| p.partial_cmp(&Probability::HALF);
        self.estimates.map(|[p, q]| side(p) != side(q))
    }

    /// Preference from one order.
    pub(crate) fn one_sided(verdict: VersionedVerdict, margins: Margins) -> Self {
        Self {
            verdict: verdict.verdict.with_ties(margins.tie),
            version: verdict.version,
            estimates: None,
            scores: verdict.scores,
        }
    }

    /// Preference from both orders; `backward` is the verdict on the swapped request.
    pub(crate) fn two_sided(
        forward: VersionedVerdict,
        backward: VersionedVerdict,
        margins: Margins,
    ) -> Self {
        let version = forward.version.max(backward.version);
        let scores = forward.scores;
        let (p, q) = match (forward.verdict, backward.verdict) {
            (Verdict::Preference(p), Verdict::Preference(p_swapped)) => (p, p_swapped.complement()),
            (verdict @ Verdict::Abstained { .. }, _) | (_, verdict @ Verdict::Abstained { .. }) => {
                return Self {
                    verdict,
                    version,
                    estimates: None,
                    scores,
                };
            }
        };
        let mut preference = Self {
            verdict: Verdict::from_probability((f64::from(p.get()) + f64::from(q.get())) / 2.0)
                .with_ties(margins.tie),
            version,
            estimates: Some([p, q]),
            scores,
        };
        let gap = preference.order_gap().map_or(0.0, f64::from);
        if gap > margins.max_order_gap {
            let reason = format!(
                "the two orders differ by {gap:.3}, more than preference.max_order_gap = {}",
                margins.max_order_gap
            );
            preference.verdict = Verdict::Abstained { reason };
        }
        preference
    }
}

impl Verdict {
    fn with_ties(self, margin: f64) -> Self {
        match self {
            Self::Preference(p) if (f64::from(p.get()) - 0.5).abs() < margin => {
                Self::Preference(Probability::HALF)
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{abstained, preferred};

    const PLAIN: Margins = Margins {
        tie: 0.0,
        max_order_gap: 1.0,
    };

    fn answer(verdict: Verdict) -> VersionedVerdict {
        VersionedVerdict::new(verdict, JudgeVersion(3))
    }

    fn two_sided(p: f32, p_swapped: f32, margins: Margins) -> Preference {
        Preference::two_sided(answer(preferred(p)), answer(preferred(p_swapped)), margins)
    }

    #[test]
    fn averaging_both_orders_cancels_position_bias() {
        for (p, p_swapped, mean, gap, changes) in [
            (0.75, 0.75, 0.5, 0.5, true),
            (0.875, 0.125, 0.875, 0.0, false),
            (0.75, 0.375, 0.6875, 0.125, false),
            (0.5, 0.5, 0.5, 0.0, false),
            (0.5, 0.25, 0.625, 0.25, true),
            (1.0, 1.0, 0.5, 1.0, true),
        ] {
            let preference = two_sided(p, p_swapped, PLAIN);
            assert_eq!(preference.verdict, preferred(mean), "{p} {p_swapped}");
            assert_eq!(preference.order_gap(), Some(gap), "{p} {p_swapped}");
            assert_eq!(
                preference.changes_with_order(),
                Some(changes),
                "{p} {p_swapped}"
            );
            assert_eq!(preference.version, JudgeVersion(3));
        }
    }

    #[test]
    fn a_swapped_preference_is_the_other_completions() {
        let preference = Preference {
            scores: Some([1.0, 2.0]),
            ..two_sided(0.75, 0.375, PLAIN)
        };
        let swapped = preference.clone().swapped();
        assert_eq!(swapped.verdict, preferred(0.3125));
        assert_eq!(swapped.scores, Some([2.0, 1.0]));
        assert_eq!(swapped.order_gap(), preference.order_gap());
        assert_eq!(swapped.swapped(), preference);
        let abstention = Preference::one_sided(answer(abstained("no")), PLAIN);
        assert_eq!(abstention.clone().swapped(), abstention);
    }

    #[test]
    fn an_abstention_in_either_order_is_an_abstention() {
        let abstention = || answer(abstained("a question mark"));
        let sure = || answer(preferred(1.0));
        for preference in [
            Preference::two_sided(abstention(), sure(), PLAIN),
            Preference::two_sided(sure(), abstention(), PLAIN),
        ] {
            assert_eq!(preference.verdict, abstained("a question mark"));
            assert_eq!(preference.order_gap(), None);
            assert_eq!(preference.changes_with_order(), None);
        }
    }

    #[test]
    fn orders_that_differ_too_much_are_an_abstention_with_estimates() {
        let margins = Margins {
            max_order_gap: 0.25,
            ..PLAIN
        };
        assert_eq!(
            two_sided(0.75, 0.5, margins).verdict,
            preferred(0.625),
            "at the limit"
        );
        let preference = two_sided(0.75, 0.75, margins);
        let reason = "the two orders differ by 0.500, more than preference.max_order_gap = 0.25";
        assert_eq!(preference.verdict, abstained(reason));
        assert_eq!(preference.order_gap(), Some(0.5));
    }

    #[test]
    fn p_close_to_one_half_is_a_tie() {
        let margins = Margins {
            tie: 0.125,
            ..PLAIN
        };
        for (p, expected) in [(0.5625, 0.5), (0.4375, 0.5), (0.625, 0.625), (0.25, 0.25)] {
            let one = Preference::one_sided(answer(preferred(p)), margins);
            assert_eq!(one.verdict, preferred(expected), "{p}");
            let both = two_sided(p, 1.0 - p, margins);
            assert_eq!(both.verdict, preferred(expected), "{p} in both orders");
        }
        let tie = two_sided(0.75, 0.6875, margins);
        assert_eq!(tie.verdict, preferred(0.5), "the mean is what ties");
    }

    #[test]
    fn orders_follow_the_setting_or_the_purpose() {
        use OrdersSetting::{Auto, Both, One};
        for (setting, train, evaluate) in [
            (Auto, Orders::One, Orders::Both),
            (One, Orders::One, Orders::One),
            (Both, Orders::Both, Orders::Both),
        ] {
            assert_eq!(Orders::of(setting, Purpose::Train), train);
            assert_eq!(Orders::of(setting, Purpose::Evaluate), evaluate);
        }
    }
}
