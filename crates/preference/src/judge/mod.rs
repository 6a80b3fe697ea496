//! Who says which of two completions is better: the [`Judge`] trait, one judge a file, and how a judge
//! is asked in both orders.
//!
//! A judge knows one prompt and two completions at a time. It does not know pairs, streams or what its
//! answers are used for.

mod encoder;
mod ensemble;
mod learned;
mod matrix;
mod rule;

#[cfg(test)]
pub(crate) mod fake;

use messages::{Completion, JudgeVersion, Probability, Prompt};

use crate::JudgeError;

pub use encoder::EncoderJudge;
pub use ensemble::Ensemble;
pub use learned::{Learned, Reads};
pub use matrix::Matrix;
pub use rule::Rules;

/// Says which of two completions is better, many at a time. It is asked from one thread, one batch
/// after the other.
pub trait Judge: Send {
    /// Its name in labels and metrics; always the same.
    fn name(&self) -> &str;

    /// Its version, which changes whenever the same question may be answered differently.
    fn version(&self) -> JudgeVersion;

    /// Whether p(first ≻ second) = 1 − p(second ≻ first) by construction, so that asking in the other
    /// order tells nothing new. `false` unless a judge says otherwise.
    fn is_antisymmetric(&self) -> bool {
        false
    }

    /// One verdict for every comparison of `batch`, in its order.
    ///
    /// # Errors
    /// When the batch as a whole cannot be answered: all of it is given up, and is not asked again. A
    /// judge that cannot answer one comparison abstains from that one.
    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError>;
}

/// Two completions of one prompt, in the order in which the judge sees them.
#[derive(Debug, Clone, Copy)]
pub struct Comparison<'a> {
    /// What was asked.
    pub prompt: &'a Prompt,
    /// The completion whose preference is asked for.
    pub first: &'a Completion,
    /// The one it is compared with.
    pub second: &'a Completion,
}

/// A judge's answer to one comparison.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The probability that the first completion is preferred to the second.
    Preference(Probability),
    /// The judge declines to answer.
    Abstained {
        /// Why, for people.
        reason: String,
    },
}

/// A verdict, and how much of it depended on the order of the completions.
#[derive(Debug, Clone, PartialEq)]
pub struct Ruling {
    /// The verdict about the completions in the order of the comparison: the mean of both orders when
    /// both were asked, an abstention when either was one.
    pub verdict: Verdict,
    /// The two estimates of p(first ≻ second), from this order and from the other, where both orders
    /// were asked and answered.
    pub estimates: Option<[Probability; 2]>,
}

impl<'a> Comparison<'a> {
    /// The same two completions in the other order.
    #[must_use]
    pub fn swapped(self) -> Comparison<'a> {
        Comparison {
            prompt: self.prompt,
            first: self.second,
            second: self.first,
        }
    }
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
    fn one_sided(verdict: Verdict) -> Self {
        Self {
            verdict,
            estimates: None,
        }
    }

    /// What both orders say together; `backward` is about the swapped comparison.
    fn two_sided(forward: Verdict, backward: Verdict) -> Self {
        let (p, q) = match (forward, backward) {
            (Verdict::Preference(p), Verdict::Preference(p_swapped)) => (p, p_swapped.complement()),
            (abstained @ Verdict::Abstained { .. }, _)
            | (_, abstained @ Verdict::Abstained { .. }) => return Self::one_sided(abstained),
        };
        let mean = Probability::new((p.get() + q.get()) / 2.0)
            .expect("the mean of two numbers from 0 to 1 is from 0 to 1");
        Self {
            verdict: Verdict::Preference(mean),
            estimates: Some([p, q]),
        }
    }
}

/// Asks `judge` in the given order alone.
pub(crate) fn one_order(
    judge: &mut dyn Judge,
    comparisons: &[Comparison<'_>],
) -> Result<Vec<Ruling>, JudgeError> {
    let verdicts = ask(judge, comparisons)?;
    Ok(verdicts.into_iter().map(Ruling::one_sided).collect())
}

/// Asks `judge` about every comparison in both orders, in one batch of twice as many, and takes the
/// mean of p and 1 − p′: half of a preference for whatever stands first cancels against the other half.
/// A judge that is antisymmetric by construction is asked once.
///
/// # Errors
/// When the judge fails, or answers another number of comparisons than it was asked.
pub fn both_orders(
    judge: &mut dyn Judge,
    comparisons: &[Comparison<'_>],
) -> Result<Vec<Ruling>, JudgeError> {
    if judge.is_antisymmetric() {
        return one_order(judge, comparisons);
    }
    let swapped = comparisons.iter().map(|comparison| comparison.swapped());
    let batch: Vec<_> = comparisons.iter().copied().chain(swapped).collect();
    let mut forward = ask(judge, &batch)?;
    let backward = forward.split_off(comparisons.len());
    let both = forward.into_iter().zip(backward);
    Ok(both.map(|(p, q)| Ruling::two_sided(p, q)).collect())
}

/// One call of the judge, with its answers counted.
fn ask(judge: &mut dyn Judge, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
    let verdicts = judge.judge(batch)?;
    if verdicts.len() == batch.len() {
        return Ok(verdicts);
    }
    Err(JudgeError::new(format!(
        "it gave {} verdicts on {} comparisons",
        verdicts.len(),
        batch.len()
    )))
}

#[cfg(test)]
mod tests {
    use super::fake::{FakeJudge, abstained, completion, preferred, prompt};
    use super::*;

    /// A judge of one-letter texts that adds `bias` to whatever stands first; it abstains from "?".
    fn biased(bias: f32) -> FakeJudge {
        FakeJudge::answering(move |comparison| {
            let (first, second) = (&*comparison.first.text, &*comparison.second.text);
            match (first, second) {
                ("?", _) => abstained("a question mark"),
                ("a", "b") => preferred(0.5 + bias),
                ("b", "a") => preferred(0.5 + bias),
                _ => preferred(if first < second { 0.875 } else { 0.125 }),
            }
        })
    }

    #[test]
    fn both_orders_are_one_batch_and_their_mean_has_no_side() {
        let prompt = prompt();
        let texts = ["a", "b", "c", "?"].map(|text| completion(text, &[]));
        let [a, b, c, question] = &texts;
        let about = |first, second| Comparison {
            prompt: &prompt,
            first,
            second,
        };
        let batch = [about(a, b), about(a, c), about(c, a), about(c, question)];
        let mut judge = biased(0.25);
        let rulings = both_orders(&mut judge, &batch).expect("it answers");

        let seen: Vec<_> = rulings
            .iter()
            .map(|r| (r.verdict.clone(), r.order_gap(), r.changes_with_order()))
            .collect();
        let expected = [
            (preferred(0.5), Some(0.5), Some(true)),
            (preferred(0.875), Some(0.0), Some(false)),
            (preferred(0.125), Some(0.0), Some(false)),
            (abstained("a question mark"), None, None),
        ];
        assert_eq!(seen, expected);
        assert_eq!(judge.calls().recorded(), [8], "one batch");
    }

    #[test]
    fn a_tie_in_one_order_alone_changes_with_the_order() {
        let ruling = |p: f32, p_swapped: f32| {
            Ruling::two_sided(preferred(p), preferred(p_swapped)).changes_with_order()
        };
        assert_eq!(ruling(0.5, 0.5), Some(false));
        assert_eq!(ruling(0.5, 0.25), Some(true));
        assert_eq!(
            ruling(0.75, 0.375),
            Some(false),
            "the gap alone does not change the winner"
        );
    }

    #[test]
    fn an_antisymmetric_judge_is_asked_once() {
        let (prompt, a, b) = (prompt(), completion("a", &[]), completion("b", &[]));
        let batch = [Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        }];
        let mut judge = biased(0.25).antisymmetric();
        let rulings = both_orders(&mut judge, &batch).expect("it answers");
        assert_eq!(rulings, [Ruling::one_sided(preferred(0.75))]);
        assert_eq!(judge.calls().recorded(), [1]);
    }

    #[test]
    fn a_judge_that_miscounts_has_failed() {
        let (prompt, a) = (prompt(), completion("a", &[]));
        let comparison = Comparison {
            prompt: &prompt,
            first: &a,
            second: &a,
        };
        let mut judge = FakeJudge::new(|_| Ok(vec![preferred(0.5)]));
        for (asked, reason) in [
            (2, Some("it gave 1 verdicts on 2 comparisons")),
            (1, None),
            (0, Some("it gave 1 verdicts on 0 comparisons")),
        ] {
            let seen = one_order(&mut judge, &vec![comparison; asked]).err();
            assert_eq!(seen.map(|e| e.to_string()).as_deref(), reason, "{asked}");
        }
    }
}
