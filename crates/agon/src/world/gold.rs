//! The playground's own preference as a judge.

use messages::{Completion, Finish, JudgeVersion, Probability};
use playground::{Facts, Post, Utility, utility};
use preference::{Comparison, Judge, JudgeError, Verdict};

/// Judges summaries by what the post really says.
pub(crate) struct Gold {
    cycle: f64,
}

impl Gold {
    /// `cycle` is the strength of the cyclic preference between styles.
    pub(crate) fn new(cycle: f64) -> Self {
        Self { cycle }
    }

    fn verdict(&self, comparison: &Comparison<'_>) -> Verdict {
        let facts = match Post::parse(&comparison.prompt.ids) {
            Ok(facts) => facts,
            Err(error) => {
                return Verdict::Abstained {
                    reason: error.to_string(),
                };
            }
        };
        let [a, b] = [comparison.first, comparison.second].map(|c| judged(&facts, c));
        let p = playground::preference(a.value, a.style, b.value, b.style, self.cycle);
        match Probability::new(p as f32) {
            Ok(p) => Verdict::Preference(p),
            Err(error) => Verdict::Abstained {
                reason: error.to_string(),
            },
        }
    }
}

fn judged(facts: &Facts, completion: &Completion) -> Utility {
    utility(
        facts,
        &completion.ids,
        completion.finish == Finish::EndOfText,
    )
}

impl Judge for Gold {
    fn name(&self) -> &'static str {
        "gold"
    }

    fn version(&self) -> JudgeVersion {
        JudgeVersion(1)
    }

    fn is_antisymmetric(&self) -> bool {
        true
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        Ok(batch
            .iter()
            .map(|comparison| self.verdict(comparison))
            .collect())
    }
}
