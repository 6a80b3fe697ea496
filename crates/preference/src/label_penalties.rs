//! Penalties of labels: for completions that did not end, and for their length.
//!
//! Promises: without penalties a verdict is unchanged to the bit; a label for the second completion is the complement
//! of that for the first. Does not know which judge gave a verdict.

use messages::{Completion, Finish};
use settings::PreferenceSettings;

use crate::judge::{Comparison, Verdict};

/// Largest log-odds of a verdict that a penalty can turn: those of the p next to 0 and 1 in f32.
const MAX_LOG_ODDS: f64 = 15.942_385;

/// Penalties in log-odds, subtracted from what the judge says for a completion.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LabelPenalties {
    /// Of a completion that did not end with an end-of-turn token.
    pub missing_eos: f64,
    /// Of every token of a completion.
    pub per_token: f64,
    /// Temperature of the difference of the scores per token, which then replaces the judge's verdict; `None`: the
    /// verdict counts.
    pub score_temperature: Option<f64>,
}

impl From<&PreferenceSettings> for LabelPenalties {
    fn from(settings: &PreferenceSettings) -> Self {
        let normalized = settings.length_normalization;
        Self {
            missing_eos: settings.missing_eos_penalty,
            per_token: settings.length_penalty,
            score_temperature: normalized
                .then(|| settings.judge.score_temperature(&settings.chat))
                .flatten(),
        }
    }
}

impl LabelPenalties {
    /// The verdict of a label: the judge's `verdict`, or the one of its `scores` per token, less the penalties.
    pub(crate) fn apply(
        self,
        verdict: Verdict,
        scores: Option<[f32; 2]>,
        comparison: &Comparison<'_>,
    ) -> Verdict {
        let Verdict::Preference(p) = verdict else {
            return verdict;
        };
        let both = [comparison.first, comparison.second];
        let normalized = (self.score_temperature.zip(scores))
            .map(|(temperature, scores)| normalized(scores, both) / temperature);
        let [first, second] = both.map(|completion| self.penalty(completion));
        let penalty = first - second;
        if normalized.is_none() && penalty == 0.0 {
            return Verdict::Preference(p);
        }
        let given = || {
            let p = f64::from(p.get());
            (p / (1.0 - p)).ln().clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)
        };
        Verdict::from_log_odds(normalized.unwrap_or_else(given) - penalty)
    }

    fn penalty(self, completion: &Completion) -> f64 {
        let missing_eos = match completion.finish {
            Finish::EndOfText => 0.0,
            Finish::Length => self.missing_eos,
        };
        missing_eos + self.per_token * completion.ids.len() as f64
    }
}

/// Difference of the scores per token.
fn normalized(scores: [f32; 2], completions: [&Completion; 2]) -> f64 {
    let per_token = |index: usize| {
        let tokens = completions[index].ids.len().max(1);
        f64::from(scores[index]) / tokens as f64
    };
    per_token(0) - per_token(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{abstained, completion, preferred, prompt};

    fn of_length(length: usize, finish: Finish) -> Completion {
        Completion {
            ids: vec![0; length],
            finish,
            ..completion("x", &[])
        }
    }

    /// The label for completions of these lengths, of which the second did not end.
    fn label(penalties: LabelPenalties, verdict: Verdict, scores: Option<[f32; 2]>) -> Verdict {
        let (prompt, first) = (prompt(), of_length(4, Finish::EndOfText));
        let second = of_length(10, Finish::Length);
        let comparison = Comparison {
            prompt: &prompt,
            first: &first,
            second: &second,
        };
        let label = penalties.apply(verdict.clone(), scores, &comparison);
        let swapped = penalties.apply(
            match verdict {
                Verdict::Preference(p) => Verdict::Preference(p.complement()),
                other => other,
            },
            scores.map(|[a, b]| [b, a]),
            &comparison.swapped(),
        );
        if let (Verdict::Preference(p), Verdict::Preference(q)) = (&label, &swapped) {
            assert!((p.get() + q.get() - 1.0).abs() < 1e-6, "{p:?} {q:?}");
        }
        label
    }

    fn p(verdict: &Verdict) -> f64 {
        match verdict {
            Verdict::Preference(p) => f64::from(p.get()),
            Verdict::Abstained { reason } => panic!("{reason}"),
        }
    }

    #[test]
    fn without_penalties_a_verdict_is_unchanged_to_the_bit() {
        let none = LabelPenalties::default();
        for p in [0.0, 1e-7, 0.3, 0.5, 1.0] {
            assert_eq!(label(none, preferred(p), Some([1.0, 2.0])), preferred(p));
        }
        let all = LabelPenalties {
            missing_eos: 1.0,
            per_token: 1.0,
            score_temperature: Some(1.0),
        };
        assert_eq!(label(all, abstained("no"), None), abstained("no"));
    }

    #[test]
    fn penalties_are_subtracted_from_the_log_odds() {
        let close = |penalties: LabelPenalties, verdict: f32, expected: f64| {
            let found = p(&label(penalties, preferred(verdict), None));
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        };
        let missing_eos = LabelPenalties {
            missing_eos: 3f64.ln(),
            ..LabelPenalties::default()
        };
        // Odds 1 and 1/3 for the first; the second loses a factor of 3.
        close(missing_eos, 0.5, 0.75);
        close(missing_eos, 0.25, 0.5);
        // Six more tokens at ln(2)/6 each: a factor of 2; both together of 6.
        let per_token = LabelPenalties {
            per_token: 2f64.ln() / 6.0,
            ..LabelPenalties::default()
        };
        close(per_token, 0.5, 2.0 / 3.0);
        let both = LabelPenalties {
            missing_eos: 3f64.ln(),
            ..per_token
        };
        close(both, 0.5, 6.0 / 7.0);
        // A certain verdict has finite log-odds: a large penalty turns it.
        let large = LabelPenalties {
            missing_eos: 2.0 * MAX_LOG_ODDS,
            ..LabelPenalties::default()
        };
        assert!(p(&label(large, preferred(0.0), None)) > 0.999);
    }

    #[test]
    fn normalised_scores_are_compared_per_token() {
        let per_token = LabelPenalties {
            score_temperature: Some(0.5),
            ..LabelPenalties::default()
        };
        // 2/4 - 4/10 = .1, at temperature ½: log-odds .2.
        let found = p(&label(per_token, preferred(0.1), Some([2.0, 4.0])));
        assert!(
            (found - 1.0 / (1.0 + (-0.2f64).exp())).abs() < 1e-6,
            "{found}"
        );
        let without = label(per_token, preferred(0.125), None);
        assert_eq!(
            without,
            preferred(0.125),
            "a judge without scores keeps its verdict"
        );
    }
}
