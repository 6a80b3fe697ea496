//! A judge for each value of a prompt's column, and one for the rest.

use messages::{JudgeVersion, Prompt};

use crate::error::JudgeError;
use crate::judge::ensemble::sum_of_versions;
use crate::judge::{Comparison, Judge, ScoredVerdict, Verdict};

/// Asks the member that the prompt's route names.
pub struct Route {
    members: Vec<Box<dyn Judge>>,
    rule: RouteRule,
}

/// Choice of the member that compares the completions of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteRule {
    /// Values of the column, one for each member but the last, which has all other prompts; `*` is any.
    pub values: Vec<String>,
}

impl Route {
    /// A judge of `members`, one more than `rule` has values.
    ///
    /// # Errors
    /// When there is another number of members.
    pub fn new(members: Vec<Box<dyn Judge>>, rule: RouteRule) -> Result<Self, JudgeError> {
        rule.check(members.len())?;
        Ok(Self { members, rule })
    }
}

impl RouteRule {
    /// Checks the number of members.
    pub(crate) fn check(&self, members: usize) -> Result<(), JudgeError> {
        match members == self.values.len() + 1 {
            true => Ok(()),
            false => Err(JudgeError::permanent(format!(
                "{members} members for {} values: one more is needed",
                self.values.len()
            ))),
        }
    }

    /// Index of the member for this prompt: of the first value that is its own, else of the last member.
    pub(crate) fn member(&self, prompt: &Prompt) -> usize {
        let route = prompt.route.as_deref().map(str::trim);
        let is_own = |value: &String| route.is_some_and(|route| value == "*" || value == route);
        let found = self.values.iter().position(is_own);
        found.unwrap_or(self.values.len())
    }
}

impl Judge for Route {
    fn name(&self) -> &'static str {
        "route"
    }

    /// Sum of the members' versions: it changes with any of them.
    fn version(&self) -> JudgeVersion {
        sum_of_versions(self.members.iter().map(|member| member.version()))
    }

    fn is_antisymmetric(&self) -> bool {
        self.members.iter().all(|member| member.is_antisymmetric())
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let scored = self.judge_scored(batch)?.into_iter();
        Ok(scored.map(|scored| scored.verdict).collect())
    }

    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<ScoredVerdict>, JudgeError> {
        let mut verdicts: Vec<Option<ScoredVerdict>> = vec![None; batch.len()];
        for (index, member) in self.members.iter_mut().enumerate() {
            let is_own = |comparison: &Comparison<'_>| self.rule.member(comparison.prompt) == index;
            let own: Vec<Comparison<'_>> = batch.iter().copied().filter(is_own).collect();
            if own.is_empty() {
                continue;
            }
            let places = verdicts.iter_mut().zip(batch);
            let places = places.filter(|(_, comparison)| is_own(comparison));
            for ((place, _), verdict) in places.zip(member.judge_scored(&own)?) {
                *place = Some(verdict);
            }
        }
        let verdicts: Option<Vec<_>> = verdicts.into_iter().collect();
        verdicts
            .ok_or_else(|| JudgeError::new("a member gave fewer verdicts than it was asked for"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{FakeJudge, completion, preferred, prompt};

    #[test]
    fn every_prompt_has_the_member_of_its_value_and_the_last_has_the_rest() {
        let member = |p: f32| {
            let judge = FakeJudge::answering(move |_| preferred(p));
            Box::new(judge.antisymmetric()) as Box<dyn Judge>
        };
        let rule = RouteRule {
            values: vec!["math".into(), "*".into()],
        };
        let members = || vec![member(0.125), member(0.25), member(0.5)];
        assert!(Route::new(vec![member(0.5)], rule.clone()).is_err());
        let mut route = Route::new(members(), rule).unwrap();
        assert!(route.is_antisymmetric());
        let routes = [Some("code"), None, Some(" math"), Some("math"), Some("")];
        let prompts = routes.map(|route| Prompt {
            route: route.map(str::to_owned),
            ..prompt()
        });
        let (first, second) = (completion("a", &[]), completion("b", &[]));
        let comparisons = prompts.each_ref().map(|prompt| Comparison {
            prompt,
            first: &first,
            second: &second,
        });
        let expected = [0.25, 0.5, 0.125, 0.125, 0.25].map(preferred);
        assert_eq!(route.judge(&comparisons).unwrap(), expected);
    }
}
