//! What both orders of a comparison say together: half of a preference for whatever stands first
//! cancels against the other half.

use messages::{JudgeVersion, Probability, Purpose};
use settings::OrdersSetting;

use super::Answer;
use crate::Verdict;

/// In how many orders a comparison is asked. A judge that is antisymmetric by construction is asked
/// once whatever is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// As given.
    One,
    /// Both, and the mean is taken.
    Both,
}

impl Orders {
    /// The orders for a pair that is for `purpose`. Left to itself, training asks once: which
    /// completion stands first is chance there, and a preference for the first averages out.
    /// Evaluations, whose first completion is always the policy's, ask both ways.
    #[must_use]
    pub fn of(setting: OrdersSetting, purpose: Purpose) -> Self {
        match (setting, purpose) {
            (OrdersSetting::One, _) | (OrdersSetting::Auto, Purpose::Train | Purpose::Contest) => {
                Self::One
            }
            (OrdersSetting::Both, _) | (OrdersSetting::Auto, Purpose::Evaluate) => Self::Both,
        }
    }

    /// How many questions a comparison is.
    pub(crate) fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Both => 2,
        }
    }
}

/// A verdict about two completions, and how much of it depended on their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Ruling {
    /// The verdict about the completions in the order of the question: the mean of both orders when
    /// both were asked, an abstention when either was one or they are too far apart.
    pub verdict: Verdict,
    /// The version of the judge that gave it.
    pub version: JudgeVersion,
    /// The two estimates of p(first ≻ second), from this order and from the other, where both orders
    /// were asked and answered.
    pub estimates: Option<[Probability; 2]>,
    /// The scores of the first and the second completion, where the judge has scores.
    pub scores: Option<[f32; 2]>,
}

/// What is made of a judge's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Margins {
    /// A p nearer to ½ than this is ½.
    pub tie: f64,
    /// Orders further apart than this are no answer.
    pub max_order_gap: f64,
}

impl Ruling {
    /// |p − (1 − p′)|: how far the two orders are apart, from 0 to 1.
    #[must_use]
    pub fn order_gap(&self) -> Option<f32> {
        self.estimates.map(|[p, q]| (p.get() - q.get()).abs())
    }

    /// Whether another completion, or none, is the likelier winner when the order changes.
    #[must_use]
    pub fn changes_with_order(&self) -> Option<bool> {
        let side = |p: Probability| p.partial_cmp(&Probability::HALF);
        self.estimates.map(|[p, q]| side(p) != side(q))
    }

    /// What one order says.
    pub(super) fn one_sided(answer: Answer, margins: Margins) -> Self {
        Self {
            verdict: answer.verdict.with_ties(margins.tie),
            version: answer.version,
            estimates: None,
            scores: answer.scores,
        }
    }

    /// What both orders say together; `backward` is about the swapped question.
    pub(super) fn two_sided(forward: Answer, backward: Answer, margins: Margins) -> Self {
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
        let mut ruling = Self {
            verdict: Verdict::from_probability((f64::from(p.get()) + f64::from(q.get())) / 2.0)
                .with_ties(margins.tie),
            version,
            estimates: Some([p, q]),
            scores,
        };
        let gap = ruling.order_gap().map_or(0.0, f64::from);
        if gap > margins.max_order_gap {
            let reason = format!(
                "the two orders differ by {gap:.3}, more than preference.max_order_gap = {}",
                margins.max_order_gap
            );
            ruling.verdict = Verdict::Abstained { reason };
        }
        ruling
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

    fn answer(verdict: Verdict) -> Answer {
        Answer::new(verdict, JudgeVersion(3))
    }

    fn two_sided(p: f32, p_swapped: f32, margins: Margins) -> Ruling {
        Ruling::two_sided(answer(preferred(p)), answer(preferred(p_swapped)), margins)
    }

    #[test]
    fn the_mean_of_both_orders_has_no_side() {
        for (p, p_swapped, mean, gap, changes) in [
            (0.75, 0.75, 0.5, 0.5, true),
            (0.875, 0.125, 0.875, 0.0, false),
            (0.75, 0.375, 0.6875, 0.125, false),
            (0.5, 0.5, 0.5, 0.0, false),
            (0.5, 0.25, 0.625, 0.25, true),
            (1.0, 1.0, 0.5, 1.0, true),
        ] {
            let ruling = two_sided(p, p_swapped, PLAIN);
            assert_eq!(ruling.verdict, preferred(mean), "{p} {p_swapped}");
            assert_eq!(ruling.order_gap(), Some(gap), "{p} {p_swapped}");
            assert_eq!(
                ruling.changes_with_order(),
                Some(changes),
                "{p} {p_swapped}"
            );
            assert_eq!(ruling.version, JudgeVersion(3));
        }
    }

    #[test]
    fn an_abstention_in_either_order_is_one_of_both() {
        let abstention = || answer(abstained("a question mark"));
        let sure = || answer(preferred(1.0));
        for ruling in [
            Ruling::two_sided(abstention(), sure(), PLAIN),
            Ruling::two_sided(sure(), abstention(), PLAIN),
        ] {
            assert_eq!(ruling.verdict, abstained("a question mark"));
            assert_eq!(ruling.order_gap(), None);
            assert_eq!(ruling.changes_with_order(), None);
        }
    }

    #[test]
    fn orders_that_are_too_far_apart_are_no_answer_but_are_measured() {
        let margins = Margins {
            max_order_gap: 0.25,
            ..PLAIN
        };
        assert_eq!(
            two_sided(0.75, 0.5, margins).verdict,
            preferred(0.625),
            "at the limit"
        );
        let ruling = two_sided(0.75, 0.75, margins);
        let reason = "the two orders differ by 0.500, more than preference.max_order_gap = 0.25";
        assert_eq!(ruling.verdict, abstained(reason));
        assert_eq!(ruling.order_gap(), Some(0.5));
    }

    #[test]
    fn what_is_near_to_even_odds_is_a_tie() {
        let margins = Margins {
            tie: 0.125,
            ..PLAIN
        };
        for (p, expected) in [(0.5625, 0.5), (0.4375, 0.5), (0.625, 0.625), (0.25, 0.25)] {
            let one = Ruling::one_sided(answer(preferred(p)), margins);
            assert_eq!(one.verdict, preferred(expected), "{p}");
            let both = two_sided(p, 1.0 - p, margins);
            assert_eq!(both.verdict, preferred(expected), "{p} both ways");
        }
        let tie = two_sided(0.75, 0.6875, margins);
        assert_eq!(tie.verdict, preferred(0.5), "the mean is what ties");
    }

    #[test]
    fn orders_follow_the_setting_and_else_the_purpose() {
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
