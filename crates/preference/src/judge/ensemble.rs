//! An ensemble of judges.

use messages::{JudgeVersion, Probability};
use settings::Combine;

use crate::error::JudgeError;
use crate::judge::{Comparison, Judge, Verdict};

/// Combines the p of several judges. Members that abstain are skipped; if all abstain, so does the ensemble.
pub struct Ensemble {
    members: Vec<Box<dyn Judge>>,
    combine: Combine,
    deviations: f64,
}

impl Ensemble {
    /// An ensemble of `members`; [`Combine::LowerBound`] subtracts `deviations` standard deviations.
    #[must_use]
    pub fn new(members: Vec<Box<dyn Judge>>, combine: Combine, deviations: f64) -> Self {
        Self {
            members,
            combine,
            deviations,
        }
    }

    fn combined(&self, ps: &[Probability]) -> Option<Probability> {
        let count = ps.len() as f64;
        let p = match self.combine {
            _ if ps.is_empty() => return None,
            Combine::Mean => ps.iter().map(|p| f64::from(p.get())).sum::<f64>() / count,
            Combine::LowerBound => sigmoid(self.lower_bound(ps)),
        };
        Probability::new(p as f32).ok()
    }

    /// Mean of the log-odds, shrunk toward 0 by `deviations` standard deviations, at most to 0: p is ½ where the
    /// members disagree.
    fn lower_bound(&self, ps: &[Probability]) -> f64 {
        let odds: Vec<f64> = ps.iter().map(|p| log_odds(f64::from(p.get()))).collect();
        let count = odds.len() as f64;
        let mean = odds.iter().sum::<f64>() / count;
        let variance = odds.iter().map(|o| (o - mean).powi(2)).sum::<f64>() / count;
        mean.signum() * (mean.abs() - self.deviations * variance.sqrt()).max(0.0)
    }
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

    /// Sum of the members' versions: it grows with any of them.
    fn version(&self) -> JudgeVersion {
        JudgeVersion(self.members.iter().map(|member| member.version().0).sum())
    }

    fn is_antisymmetric(&self) -> bool {
        self.members.iter().all(|member| member.is_antisymmetric())
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let mut ps = vec![Vec::new(); batch.len()];
        let mut reasons = vec![String::new(); batch.len()];
        for member in &mut self.members {
            let verdicts = member.judge(batch)?;
            for (index, verdict) in verdicts.into_iter().enumerate() {
                match verdict {
                    Verdict::Preference(p) => ps[index].push(p),
                    Verdict::Abstained { reason } => reasons[index] = reason,
                }
            }
        }
        let verdict = |(ps, reason): (Vec<Probability>, String)| match self.combined(&ps) {
            Some(p) => Verdict::Preference(p),
            None => Verdict::Abstained { reason },
        };
        Ok(ps.into_iter().zip(reasons).map(verdict).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{FakeJudge, abstained, completion, preferred, prompt};

    fn verdict(answers: &[Verdict], combine: Combine) -> Verdict {
        let member = |answer: &Verdict| {
            let answer = answer.clone();
            Box::new(FakeJudge::answering(move |_| answer.clone()).antisymmetric())
                as Box<dyn Judge>
        };
        let mut ensemble = Ensemble::new(answers.iter().map(member).collect(), combine, 1.0);
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
