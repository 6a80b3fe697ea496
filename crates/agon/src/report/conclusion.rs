//! The result of a run's last evaluation, in sentences.

use std::fmt::{self, Write as _};

use learner::{
    Ending, Evaluation, EvaluationConditions, FurtherComparison, JudgeEvaluation, Summary,
};
use settings::{PromptsSettings, Settings};
use telemetry::Interval;

/// Writes the result of the evaluation `last` of the run in `summary`.
///
/// An evaluation of step 0 makes no statement about training, and an evaluation before the last step is marked as
/// such.
pub(super) fn write(
    text: &mut String,
    settings: &Settings,
    summary: &Summary,
    last: &Evaluation,
) -> fmt::Result {
    write_ending(text, summary)?;
    write_evaluated_step(text, summary, last)?;
    let rate = &last.win_rate;
    writeln!(
        text,
        "{}: its answer is preferred on {:.1} % of {} (95 % interval {:.1} to {:.1} %).",
        comparison(last),
        100.0 * rate.mean,
        prompts(settings, last),
        100.0 * rate.low,
        100.0 * rate.high
    )?;
    if let Some(gold) = last.gold_win_rate {
        writeln!(
            text,
            "Under the gold preference: {:.1} % ({:.1} to {:.1} %).",
            100.0 * gold.mean,
            100.0 * gold.low,
            100.0 * gold.high
        )?;
    }
    write_judges(text, last)?;
    writeln!(
        text,
        "It moved {:.2} nats (KL) from {}; answers have {:.1} tokens, the reference's {:.1}.",
        last.kl,
        match last.reference_version {
            Some(_) => "the reference of the start",
            None => "the reference",
        },
        last.response_length,
        last.reference_length
    )?;
    write_further(text, settings, last)?;
    write_prompts(text, settings, last)?;
    write_conditions(text, last)
}

/// Writes the comparisons with the moving average and with a reference that has moved.
fn write_further(text: &mut String, settings: &Settings, last: &Evaluation) -> fmt::Result {
    let percent = |rate: &Interval| {
        let [mean, low, high] = [rate.mean, rate.low, rate.high].map(|rate| 100.0 * rate);
        format!("{mean:.1} % ({low:.1} to {high:.1} %)")
    };
    let result = |comparison: &FurtherComparison| {
        let gold = comparison.gold_win_rate.as_ref();
        let gold = gold.map_or(String::new(), |gold| {
            format!(", {} under the gold preference", percent(gold))
        });
        let (rate, kl) = (percent(&comparison.win_rate), comparison.kl);
        format!("{rate}{gold}; KL {kl:.2} nats")
    };
    if let Some(average) = &last.average {
        writeln!(
            text,
            "The moving average of its weights (learner.ema_decay = {}) against the same reference: {}.",
            settings.learner.ema_decay,
            result(average)
        )?;
    }
    if let (Some(version), Some(current)) = (last.reference_version, &last.current_reference) {
        writeln!(
            text,
            "The policy against the current reference, of step {version}: {}.",
            result(current)
        )?;
    }
    Ok(())
}

/// Win rates under the judges that give no labels, and at equal lengths.
fn write_judges(text: &mut String, last: &Evaluation) -> fmt::Result {
    for judge in &last.judges {
        let name = &judge.judge;
        writeln!(
            text,
            "Under the evaluation judge {name}, which gives no labels: {} prompts.",
            judge_result(judge)
        )?;
    }
    if let Some(rate) = last.win_rate_lc {
        writeln!(
            text,
            "At equal lengths of both answers (length-controlled): {:.1} %.",
            100.0 * rate
        )?;
    }
    Ok(())
}

/// Win rate under an evaluation judge with the number of prompts that it judged, as a phrase.
pub(crate) fn judge_result(judge: &JudgeEvaluation) -> String {
    let Some(rate) = judge.win_rate else {
        return format!("without a verdict on any of {}", judge.unjudged);
    };
    let [mean, low, high] = [rate.mean, rate.low, rate.high].map(|rate| 100.0 * rate);
    format!("{mean:.1} % ({low:.1} to {high:.1} %) of {}", judge.prompts)
}

/// Step of the last evaluation, where it is not the last step.
fn write_evaluated_step(text: &mut String, summary: &Summary, last: &Evaluation) -> fmt::Result {
    if last.step == 0 {
        writeln!(
            text,
            "Not evaluated since training began: the last evaluation is of step 0, before the first of {} steps.",
            summary.steps
        )
    } else if last.step < summary.steps {
        writeln!(
            text,
            "The last evaluation is of step {}, {} steps before the end.",
            last.step,
            summary.steps - last.step
        )
    } else {
        Ok(())
    }
}

/// Writes the result of a run without an evaluation.
pub(super) fn write_unevaluated(
    text: &mut String,
    settings: &Settings,
    summary: &Summary,
) -> fmt::Result {
    write_ending(text, summary)?;
    match settings.evaluation.prompts {
        0 => writeln!(text, "Not evaluated: evaluation.prompts is 0."),
        _ => writeln!(text, "The run ended before its first evaluation."),
    }
}

fn write_ending(text: &mut String, summary: &Summary) -> fmt::Result {
    match summary.ending {
        Ending::Interrupted => writeln!(
            text,
            "**Interrupted and saved after step {}.** Continue with `--resume`.\n",
            summary.steps
        ),
        Ending::Finished => Ok(()),
    }
}

/// The comparison that the interval of the win rate supports.
fn comparison(last: &Evaluation) -> String {
    let rate = &last.win_rate;
    let subject = match last.step {
        0 => "At the start, before any training, the policy",
        _ => "The policy",
    };
    let predicate = if last.step == 0 {
        "was compared with"
    } else if rate.low > 0.5 {
        "beats"
    } else if rate.high < 0.5 {
        "loses against"
    } else {
        "is not distinguishable from"
    };
    let reference = match last.reference_version {
        Some(_) => "the reference of the start",
        None => "its reference",
    };
    format!("{subject} {predicate} {reference}")
}

/// The prompts of the win rate.
fn prompts(settings: &Settings, last: &Evaluation) -> String {
    match settings.prompts {
        PromptsSettings::Bandit {} => {
            format!("{} pairs of answers to the one prompt", last.prompts)
        }
        PromptsSettings::Playground { .. } | PromptsSettings::Dataset(_) => {
            format!("{} held-out prompts", last.prompts)
        }
    }
}

/// Explains why fewer prompts count than `evaluation.prompts`.
fn write_prompts(text: &mut String, settings: &Settings, last: &Evaluation) -> fmt::Result {
    let (requested, evaluated) = (settings.evaluation.prompts, last.prompts + last.unjudged);
    if evaluated < requested {
        writeln!(
            text,
            "There are {evaluated} distinct held-out prompts, and each was used once (evaluation.prompts = {requested})."
        )?;
    }
    if last.unjudged > 0 {
        writeln!(
            text,
            "Of {evaluated} prompts {} have no verdict and are not counted.",
            last.unjudged
        )?;
    }
    Ok(())
}

fn write_conditions(text: &mut String, last: &Evaluation) -> fmt::Result {
    let Some(conditions) = &last.conditions else {
        return Ok(());
    };
    let share =
        |rate: Option<f64>| rate.map_or("–".into(), |rate| format!("{:.1} %", 100.0 * rate));
    writeln!(
        text,
        "Evaluated with {}; {} of the policy's answers were truncated there, {} of the reference's.",
        describe(conditions),
        share(last.truncation_rate),
        share(last.reference_truncation_rate)
    )
}

/// Evaluation conditions as a phrase.
pub(crate) fn describe(conditions: &EvaluationConditions) -> String {
    let stops = match conditions.stop_ids.as_slice() {
        [] => "no stop token".into(),
        ids => format!("stop tokens {ids:?}"),
    };
    let template = match &conditions.chat_template {
        None => "no chat template".into(),
        Some(digest) => format!("chat template {digest}"),
    };
    format!(
        "{stops}, {template}, at most {} tokens",
        conditions.max_new_tokens
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use messages::Digest;

    use super::*;

    fn settings(sets: &[&str]) -> Settings {
        let sets: Vec<settings::Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
        settings::resolve("", "test", &sets).unwrap().settings
    }

    fn evaluation(step: u64) -> Evaluation {
        Evaluation {
            step,
            prompts: 128,
            unjudged: 0,
            conditions: Some(EvaluationConditions {
                stop_ids: vec![1, 2],
                chat_template: None,
                max_new_tokens: 64,
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
            }),
            win_rate: Interval::wilson(0.8, 128),
            soft_win_rate: 0.8,
            gold_win_rate: None,
            judges: Vec::new(),
            judge_accuracy: None,
            win_rate_lc: None,
            kl: 0.5,
            response_length: 10.0,
            reference_length: 11.0,
            entropy: 1.0,
            ended: 0.75,
            truncation_rate: Some(0.25),
            reference_truncation_rate: Some(0.125),
            examples: Vec::new(),
            average: None,
            reference_version: None,
            current_reference: None,
        }
    }

    fn text_of(ending: Ending, last: &Evaluation, sets: &[&str]) -> String {
        let summary = Summary {
            ending,
            steps: 40,
            pairs: 0,
            file_pairs: 0,
            tokens: 0,
            wall_seconds: 1.0,
            weights_digest: Digest::of(b""),
            evaluations: Vec::new(),
            recovery: learner::RecoveryCounts::default(),
            clipped_share: None,
            checkpoint: PathBuf::new(),
        };
        let mut text = String::new();
        write(&mut text, &settings(sets), &summary, last).unwrap();
        text
    }

    #[test]
    fn the_step_of_the_evaluation_is_stated() {
        let early = text_of(Ending::Interrupted, &evaluation(0), &[]);
        assert!(!early.contains("beats"), "{early}");
        assert!(
            early.contains("of step 0, before the first of 40 steps"),
            "{early}"
        );
        assert!(early.contains("saved after step 40"), "{early}");
        let later = text_of(Ending::Interrupted, &evaluation(25), &[]);
        assert!(later.contains("The policy beats its reference"), "{later}");
        assert!(
            later.contains("is of step 25, 15 steps before the end"),
            "{later}"
        );
        let finished = text_of(Ending::Finished, &evaluation(40), &[]);
        assert!(
            finished.starts_with("The policy beats its reference: "),
            "{finished}"
        );
        assert!(!finished.contains("last evaluation"), "{finished}");
    }

    #[test]
    fn missing_and_unjudged_prompts_are_stated() {
        let mut last = evaluation(40);
        let fewer = text_of(Ending::Finished, &last, &["evaluation.prompts=512"]);
        assert!(fewer.contains("of 128 held-out prompts"), "{fewer}");
        assert!(
            fewer.contains("There are 128 distinct held-out prompts"),
            "{fewer}"
        );
        last.unjudged = 28;
        last.prompts = 100;
        let abstained = text_of(Ending::Finished, &last, &["evaluation.prompts=128"]);
        assert!(
            abstained.contains("Of 128 prompts 28 have no verdict"),
            "{abstained}"
        );
        assert!(!abstained.contains("distinct"), "{abstained}");
    }

    #[test]
    fn the_reference_and_the_model_of_each_comparison_are_named() {
        let mut last = evaluation(40);
        let plain = text_of(Ending::Finished, &last, &[]);
        assert!(plain.contains("The policy beats its reference:"), "{plain}");
        last.reference_version = Some(30);
        let further = FurtherComparison::from(evaluation(40));
        last.current_reference = Some(FurtherComparison {
            kl: 0.25,
            ..further.clone()
        });
        last.average = Some(FurtherComparison {
            win_rate: Interval::wilson(0.5, 128),
            ..further
        });
        let text = text_of(Ending::Finished, &last, &["learner.ema_decay=0.9"]);
        for expected in [
            "The policy beats the reference of the start:",
            "from the reference of the start; answers",
            "(learner.ema_decay = 0.9) against the same reference: 50.0 % (41.5 to 58.5 %); KL 0.50 nats.",
            "against the current reference, of step 30: 80.0 %",
            "KL 0.25 nats.",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in {text}");
        }
    }

    #[test]
    fn a_judge_without_a_verdict_is_stated() {
        let mut last = evaluation(40);
        last.judges.push(JudgeEvaluation {
            judge: "away".into(),
            prompts: 0,
            unjudged: 128,
            win_rate: None,
            win_rate_lc: None,
            agreement: None,
        });
        let text = text_of(Ending::Finished, &last, &[]);
        let expected =
            "judge away, which gives no labels: without a verdict on any of 128 prompts.";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn the_evaluation_conditions_are_stated() {
        let text = text_of(Ending::Finished, &evaluation(40), &[]);
        let expected = "Evaluated with stop tokens [1, 2], no chat template, at most 64 tokens; \
                    25.0 % of the policy's answers were truncated there, 12.5 % of the reference's.";
        assert!(text.contains(expected), "{text}");
    }
}
