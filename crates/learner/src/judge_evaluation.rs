//! Results of an evaluation under the evaluation judges, which give no labels.

use std::collections::BTreeSet;

use messages::{GOLD, LabelledPair};
use serde::{Deserialize, Serialize};
use telemetry::{Interval, Measurements};

use crate::win_rates::{agreement, length_controlled, win};

/// An evaluation under one evaluation judge: over the prompts that it judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgeEvaluation {
    /// The judge's name.
    pub judge: String,
    /// Number of prompts that it judged.
    pub prompts: usize,
    /// Number of prompts that only the run's judge judged.
    pub unjudged: usize,
    /// Share of the judged prompts on which it prefers the policy's completion; ties count one half. `None` if it judged
    /// none.
    pub win_rate: Option<Interval>,
    /// Length-controlled `win_rate`.
    pub win_rate_lc: Option<f64>,
    /// Share of the prompts on which it prefers the same completion as the run's judge, ties of either excluded.
    pub agreement: Option<f64>,
}

/// Outcomes of an evaluation that are independent of each other, and so counted in its intervals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndependentUnit {
    /// Every pair.
    Pair,
    /// Every distinct prompt: pairs of the same one (the turns of a dialogue, a question that occurs twice) count once.
    Prompt,
}

/// The evaluations of `pairs` under the judges of these names except the gold judge, in their order; one without a verdict
/// is among them.
#[must_use]
pub fn judge_evaluations<'a>(
    judges: impl IntoIterator<Item = &'a String>,
    pairs: &[LabelledPair],
    unit: IndependentUnit,
) -> Vec<JudgeEvaluation> {
    let others = judges.into_iter().filter(|&judge| judge != GOLD);
    others.map(|judge| under(judge, pairs, unit)).collect()
}

/// Share of pairs on which the run's judge prefers the first completion; ties, and pairs without a label, count one half.
#[must_use]
pub fn win_rate(pairs: &[LabelledPair], unit: IndependentUnit) -> Interval {
    let wins = wins(pairs);
    let mean = wins.iter().sum::<f64>() / wins.len().max(1) as f64;
    Interval::wilson(mean, unit.count(pairs.iter()))
}

/// Length-controlled [`win_rate`].
#[must_use]
pub fn length_controlled_win_rate(pairs: &[LabelledPair]) -> f64 {
    length_controlled(pairs, &wins(pairs))
}

fn wins(pairs: &[LabelledPair]) -> Vec<f64> {
    let p = |labelled: &LabelledPair| labelled.labels.first().map_or(0.5, |label| label.p.get());
    pairs
        .iter()
        .map(|labelled| win(f64::from(p(labelled))))
        .collect()
}

impl IndependentUnit {
    /// Number of independent outcomes of `pairs`.
    #[must_use]
    pub fn count<'a>(self, pairs: impl Iterator<Item = &'a LabelledPair>) -> usize {
        match self {
            Self::Pair => pairs.count(),
            Self::Prompt => {
                let prompts = pairs.map(|labelled| labelled.pair.prompt.ids.as_slice());
                prompts.collect::<BTreeSet<&[u32]>>().len()
            }
        }
    }
}

fn under(judge: &str, pairs: &[LabelledPair], unit: IndependentUnit) -> JudgeEvaluation {
    let judged = |labelled: &&LabelledPair| labelled.verdict_of(judge).is_some();
    let judged: Vec<&LabelledPair> = pairs.iter().filter(judged).collect();
    let verdict = |labelled: &LabelledPair| labelled.verdict_of(judge);
    let wins: Vec<f64> = judged
        .iter()
        .map(|&labelled| verdict(labelled).map_or(0.5, |p| win(f64::from(p.get()))))
        .collect();
    let mean = wins.iter().sum::<f64>() / wins.len().max(1) as f64;
    let has_judged = !judged.is_empty();
    let interval = || Interval::wilson(mean, unit.count(judged.iter().copied()));
    JudgeEvaluation {
        judge: judge.to_owned(),
        prompts: judged.len(),
        unjudged: pairs.len() - judged.len(),
        win_rate: has_judged.then(interval),
        win_rate_lc: has_judged.then(|| length_controlled(&judged, &wins)),
        agreement: agreement(judged.iter().copied(), &verdict),
    }
}

impl JudgeEvaluation {
    /// Adds the metrics of the judge, with its name.
    pub(crate) fn measure(&self, measurements: &mut Measurements) {
        let mut set = |metric: &str, value: f64| {
            measurements.set(format!("eval/{metric}/{}", self.judge), value);
        };
        if let Some(Interval { mean, low, high }) = self.win_rate {
            set("judge_win_rate", mean);
            set("judge_win_rate_ci_low", low);
            set("judge_win_rate_ci_high", high);
        }
        if let Some(rate) = self.win_rate_lc {
            set("judge_win_rate_lc", rate);
        }
        #[expect(clippy::cast_precision_loss, reason = "no evaluation has 2^53 prompts")]
        set("judge_prompts", self.prompts as f64);
        if let Some(agreement) = self.agreement {
            set("judge_agreement", agreement);
        }
    }
}

#[cfg(test)]
mod tests {
    use messages::{Completion, EvaluationVerdict, Finish, Label, Probability};

    use super::*;

    /// A pair with completions of these lengths, under the run's judge and under others.
    fn pair(lengths: [usize; 2], p: f32, verdicts: &[(&str, f32)]) -> LabelledPair {
        let completion = |length: usize| Completion {
            ids: vec![0; length],
            finish: Finish::EndOfText,
            mixture_coef: 0.0,
            logp: vec![0.0; length],
            ref_logp: vec![0.0; length],
            behaviour_logp: vec![0.0; length],
            text: String::new(),
        };
        let mut labelled = crate::micro_batch::tests::labelled(lengths.map(completion).to_vec());
        let probability = |p| Probability::new(p).expect("a probability");
        labelled.labels = vec![Label {
            first: 0,
            second: 1,
            p: probability(p),
            judged: None,
        }];
        labelled.verdicts = verdicts
            .iter()
            .map(|&(judge, p)| EvaluationVerdict {
                judge: judge.into(),
                p: probability(p),
            })
            .collect();
        labelled
    }

    #[test]
    fn every_judge_has_its_own_win_rate_over_what_it_judged() {
        let pairs = [
            pair([3, 3], 0.9, &[("strict", 0.75), ("gold", 1.0)]),
            pair([3, 3], 0.8, &[("strict", 0.25), ("lenient", 0.5)]),
            pair([3, 3], 0.2, &[("strict", 0.0)]),
            pair([3, 3], 0.5, &[("strict", 0.5)]),
            pair([3, 3], 0.6, &[("lenient", 1.0)]),
        ];
        let judges = ["away", "gold", "lenient", "strict"].map(str::to_owned);
        let judged = judge_evaluations(&judges, &pairs, IndependentUnit::Pair);
        let [away, lenient, strict] = &judged[..] else {
            panic!("three judges besides gold");
        };
        assert_eq!(
            (away.judge.as_str(), away.prompts, away.unjudged),
            ("away", 0, 5)
        );
        assert_eq!(
            (away.win_rate, away.win_rate_lc, away.agreement),
            (None, None, None)
        );
        assert_eq!(
            (lenient.judge.as_str(), strict.judge.as_str()),
            ("lenient", "strict")
        );
        assert_eq!((strict.prompts, strict.unjudged), (4, 1));
        // Wins 1, 0, 0 and a tie; it agrees on the first and the third of three without ties.
        assert_eq!(strict.win_rate, Some(Interval::wilson(0.375, 4)));
        assert_eq!(strict.agreement, Some(2.0 / 3.0));
        assert_eq!(
            (lenient.prompts, lenient.win_rate),
            (2, Some(Interval::wilson(0.75, 2)))
        );
        assert_eq!(lenient.agreement, Some(1.0));
        // Equal lengths: the ridge penalty moves .375 a little towards ½.
        let rate = strict.win_rate_lc.unwrap_or_default();
        assert!((rate - 0.375).abs() < 1e-2, "{strict:?}");
        let mut measurements = Measurements::new();
        strict.measure(&mut measurements);
        away.measure(&mut measurements);
        assert_eq!(measurements.get("eval/judge_win_rate/away"), None);
        assert_eq!(measurements.get("eval/judge_prompts/away"), Some(0.0));
        assert_eq!(measurements.get("eval/judge_win_rate/strict"), Some(0.375));
        assert_eq!(measurements.get("eval/judge_prompts/strict"), Some(4.0));
        assert_eq!(
            measurements.get("eval/judge_agreement/strict"),
            Some(2.0 / 3.0)
        );
    }

    #[test]
    fn pairs_of_one_prompt_count_once_in_an_interval() {
        let with_prompt = |prompt: u32, p: f32| {
            let mut labelled = pair([3, 3], p, &[("strict", p)]);
            labelled.pair.prompt.ids = vec![prompt];
            labelled
        };
        let pairs = [(1, 0.9), (1, 0.8), (2, 0.1), (3, 0.7)];
        let pairs = pairs.map(|(prompt, p)| with_prompt(prompt, p));
        assert_eq!(
            win_rate(&pairs, IndependentUnit::Pair),
            Interval::wilson(0.75, 4)
        );
        let by_prompt = Interval::wilson(0.75, 3);
        assert_eq!(win_rate(&pairs, IndependentUnit::Prompt), by_prompt);
        let judges = judge_evaluations(&["strict".to_owned()], &pairs, IndependentUnit::Prompt);
        assert_eq!(judges[0].win_rate, Some(by_prompt));
    }

    #[test]
    fn a_judge_of_lengths_alone_has_a_length_controlled_win_rate_of_one_half() {
        // It prefers the longer one four times of five, and the policy's is the longer on three of four.
        let judged = |index: usize| {
            let lengths = [[8, 3], [3, 8], [9, 4], [7, 2]][index % 4];
            let prefers_longer = !(index / 4).is_multiple_of(5);
            let p = if (lengths[0] > lengths[1]) == prefers_longer {
                1.0
            } else {
                0.0
            };
            pair(lengths, 0.5, &[("length", p)])
        };
        let pairs: Vec<_> = (0..400).map(judged).collect();
        let under = under("length", &pairs, IndependentUnit::Pair);
        let rate = under.win_rate.map(|rate| rate.mean).unwrap_or_default();
        assert!((rate - 0.65).abs() < 1e-12, "{under:?}");
        let rate = under.win_rate_lc.unwrap_or_default();
        assert!((rate - 0.5).abs() < 0.01, "{under:?}");
    }
}
