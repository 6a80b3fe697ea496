//! An ensemble of judges.

use messages::{JudgeVersion, Probability};
use settings::Combine;

use crate::error::JudgeError;
use crate::judge::{Comparison, Judge, Verdict};

/// Combines the p of several judges. Members that abstain are skipped; if all abstain, so does the ensemble.
pub struct Ensemble {
    members: Vec<Box<dyn Judge>>,
    rule: EnsembleRule,
}

/// Combination of the verdicts of an ensemble's members.
#[derive(Debug, Clone, PartialEq)]
pub struct EnsembleRule {
    /// Weight of each member, above 0; empty: equal weights.
    pub weights: Vec<f64>,
    /// Aggregation of the members' probabilities.
    pub combine: Combine,
    /// Number of standard deviations that [`Combine::LowerBound`] subtracts.
    pub deviations: f64,
}

/// A member's p and its weight.
#[derive(Debug, Clone, Copy)]
struct WeightedP {
    p: Probability,
    weight: f64,
}

impl Ensemble {
    /// An ensemble of `members`.
    #[must_use]
    pub fn new(members: Vec<Box<dyn Judge>>, rule: EnsembleRule) -> Self {
        Self { members, rule }
    }
}

impl EnsembleRule {
    /// The verdict of members with these verdicts, in their order; with the last reason if all abstain.
    pub(crate) fn verdict(&self, verdicts: impl IntoIterator<Item = Verdict>) -> Verdict {
        let (mut ps, mut last) = (Vec::new(), String::new());
        for (index, verdict) in verdicts.into_iter().enumerate() {
            let weight = self.weights.get(index).copied().unwrap_or(1.0);
            match verdict {
                Verdict::Preference(p) => ps.push(WeightedP { p, weight }),
                Verdict::Abstained { reason } => last = reason,
            }
        }
        match self.combined(&ps) {
            Some(p) => Verdict::Preference(p),
            None => Verdict::Abstained { reason: last },
        }
    }

    fn combined(&self, ps: &[WeightedP]) -> Option<Probability> {
        let p = match self.combine {
            _ if ps.is_empty() => return None,
            Combine::Mean => weighted_mean(ps, f64::from),
            Combine::LowerBound => sigmoid(self.lower_bound(ps)),
        };
        Probability::new(p as f32).ok()
    }

    /// Mean of the log-odds, shrunk toward 0 by `deviations` standard deviations, at most to 0: p is ½ where the
    /// members disagree.
    fn lower_bound(&self, ps: &[WeightedP]) -> f64 {
        let odds = |p: f32| log_odds(f64::from(p));
        let mean = weighted_mean(ps, odds);
        let variance = weighted_mean(ps, |p| (odds(p) - mean).powi(2));
        mean.signum() * (mean.abs() - self.deviations * variance.sqrt()).max(0.0)
    }
}

/// Mean of `of` over all p, by weight.
fn weighted_mean(ps: &[WeightedP], of: impl Fn(f32) -> f64) -> f64 {
    let sum: f64 = ps.iter().map(|one| one.weight * of(one.p.get())).sum();
    sum / ps.iter().map(|one| one.weight).sum::<f64>()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// ln(p / (1 − p)), with p clamped to [ε, 1 − ε] of f32.
fn log_odds(p: f64) -> f64 {
    let p = p.clamp(f64::from(f32::EPSILON), 1.0 - f64::from(f32::EPSILON));
    (p / (1.0 - p)).ln()
}

impl Judge for Ensemble {
    fn name(&self) -> &'static str {
        "ensemble"
    }

    /// Sum of the members' versions: it changes with any of them.
    fn version(&self) -> JudgeVersion {
        sum_of_versions(self.members.iter().map(|member| member.version()))
    }

    fn is_antisymmetric(&self) -> bool {
        self.members.iter().all(|member| member.is_antisymmetric())
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let mut by_comparison = vec![Vec::new(); batch.len()];
        for member in &mut self.members {
            let verdicts = member.judge(batch)?;
            for (all, verdict) in by_comparison.iter_mut().zip(verdicts) {
                all.push(verdict);
            }
        }
        let verdicts = by_comparison.into_iter();
        Ok(verdicts.map(|all| self.rule.verdict(all)).collect())
    }
}

/// Version of a judge of several members. Versions may be digests, so the sum wraps around.
pub(crate) fn sum_of_versions(versions: impl IntoIterator<Item = JudgeVersion>) -> JudgeVersion {
    let versions = versions.into_iter();
    JudgeVersion(versions.fold(0, |sum, version| sum.wrapping_add(version.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{FakeJudge, abstained, completion, preferred, prompt};

    fn verdict(answers: &[Verdict], combine: Combine) -> Verdict {
        weighted(answers, &[], combine)
    }

    fn weighted(answers: &[Verdict], weights: &[f64], combine: Combine) -> Verdict {
        let member = |answer: &Verdict| {
            let answer = answer.clone();
            Box::new(FakeJudge::answering(move |_| answer.clone()).antisymmetric())
                as Box<dyn Judge>
        };
        let rule = EnsembleRule {
            weights: weights.to_vec(),
            combine,
            deviations: 1.0,
        };
        let mut ensemble = Ensemble::new(answers.iter().map(member).collect(), rule);
        assert!(ensemble.is_antisymmetric());
        let (prompt, a, b) = (prompt(), completion("a", &[]), completion("b", &[]));
        let comparison = Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        };
        ensemble.judge(&[comparison]).unwrap().remove(0)
    }

    fn p(verdict: &Verdict) -> f32 {
        match verdict {
            Verdict::Preference(p) => p.get(),
            Verdict::Abstained { reason } => panic!("{reason}"),
        }
    }

    #[test]
    fn the_mean_skips_members_that_abstain() {
        let mean = |answers: &[Verdict]| verdict(answers, Combine::Mean);
        assert_eq!(p(&mean(&[preferred(0.25), preferred(0.75)])), 0.5);
        assert_eq!(p(&mean(&[preferred(0.25), abstained("no")])), 0.25);
        assert_eq!(mean(&[abstained("a"), abstained("b")]), abstained("b"));
    }

    #[test]
    fn weights_are_of_the_members_that_answer() {
        let mean = |answers: &[Verdict]| p(&weighted(answers, &[3.0, 1.0, 4.0], Combine::Mean));
        // (3 · .25 + 1 · .75 + 4 · .5) / 8 and, without the first, (1 · .75 + 4 · .5) / 5.
        assert_eq!(
            mean(&[preferred(0.25), preferred(0.75), preferred(0.5)]),
            0.4375
        );
        assert_eq!(
            mean(&[abstained("no"), preferred(0.75), preferred(0.5)]),
            0.55
        );
        // Log-odds ln 3 and -ln 3 with weights 3 and 1: mean ½ ln 3, deviation ½·√3·ln 3, beyond it.
        let bound = weighted(
            &[preferred(0.75), preferred(0.25)],
            &[3.0, 1.0],
            Combine::LowerBound,
        );
        assert_eq!(p(&bound), 0.5);
    }

    #[test]
    fn the_lower_bound_shrinks_toward_one_half_with_disagreement() {
        let bound = |answers: &[Verdict]| p(&verdict(answers, Combine::LowerBound));
        assert!(
            (bound(&[preferred(0.8), preferred(0.8)]) - 0.8).abs() < 1e-6,
            "they agree"
        );
        // Log-odds ln 9 and ln 3: mean 1.647918, deviation 0.549306.
        let expected = 1.0 / (1.0 + (-1.098_612_f64).exp());
        assert!((f64::from(bound(&[preferred(0.9), preferred(0.75)])) - expected).abs() < 1e-5);
        assert_eq!(
            bound(&[preferred(0.9), preferred(0.2)]),
            0.5,
            "they disagree"
        );
        let swapped = bound(&[preferred(0.1), preferred(0.25)]);
        assert!(
            (1.0 - f64::from(swapped) - expected).abs() < 1e-5,
            "symmetric in the order"
        );
    }
}
