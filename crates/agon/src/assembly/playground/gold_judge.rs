//! The playground's true preference as a judge.

use messages::{Completion, Finish, JudgeVersion, Probability};
use playground::{Facts, Utility, utility};
use preference::{Comparison, Judge, JudgeError, Verdict};
use settings::{JudgeSettings, PromptsSettings, Settings};

/// The gold judge of a playground run, with the cycle of `evaluation.judge.gold`, or of the configured judge if that
/// is a gold judge; `None` for other prompts.
pub(crate) fn gold_judge(settings: &Settings) -> Option<Box<dyn Judge>> {
    let configured = settings.evaluation.judge.get(messages::GOLD);
    let cycle = match configured.unwrap_or(&settings.preference.judge) {
        JudgeSettings::Gold { cycle } => *cycle,
        _ => 0.0,
    };
    matches!(settings.prompts, PromptsSettings::Playground { .. })
        .then(|| Box::new(GoldJudge::new(cycle)) as _)
}

/// Prefers the summary of higher utility, given the facts of the post.
pub(crate) struct GoldJudge {
    cycle: f64,
}

impl GoldJudge {
    /// A judge whose cyclic preference between styles has the strength `cycle`.
    pub(crate) fn new(cycle: f64) -> Self {
        Self { cycle }
    }

    fn verdict(&self, comparison: &Comparison<'_>) -> Verdict {
        let facts = match Facts::parse(&comparison.prompt.ids) {
            Ok(facts) => facts,
            Err(error) => {
                return Verdict::Abstained {
                    reason: error.to_string(),
                };
            }
        };
        let [a, b] = [comparison.first, comparison.second].map(|c| utility_of(&facts, c));
        let p = playground::preference(a.value, a.style, b.value, b.style, self.cycle);
        match Probability::new(p as f32) {
            Ok(p) => Verdict::Preference(p),
            Err(error) => Verdict::Abstained {
                reason: error.to_string(),
            },
        }
    }
}

fn utility_of(facts: &Facts, completion: &Completion) -> Utility {
    utility(
        facts,
        &completion.ids,
        completion.finish == Finish::EndOfText,
    )
}

impl Judge for GoldJudge {
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
