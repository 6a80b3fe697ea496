//! `agon eval`: pairwise comparison of two models.

mod answer_files;
mod answers;
mod judging;
mod questions;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use hub::CancelToken;
use learner::{EvaluationConditions, IndependentUnit, JudgeEvaluation, PromptSet};
use messages::{Finish, Pair, Prompt, PromptId, Seed, WeightsVersion};
use model::{LanguageModel, MixtureSampler, ModelFolder, Request, Sampler as _};
use serde_json::{Value, json};
use settings::{ModelSource, Settings, resolve_file};
use telemetry::{EvaluationRecord, Interval, RunView, evaluation_differences, printable_json};

use crate::{
    assembly::{self, LoadedModel, ModelLocation},
    cli::{
        config_args::Overrides,
        eval::{
            answer_files::{AnswerFiles, Judgement},
            answers::{Answer, AnswerSampler, PairPlace},
            judging::{JudgedPair, judged},
            questions::{Form, GivenAnswers, Question, Questions},
        },
        export,
    },
    exit_code::UsageError,
    report::conclusion::{describe, judge_result},
};

/// Compare two models on held-out prompts, or on the questions of AlpacaEval or MT-Bench, under a judge.
///
/// A and B are Hugging Face folders, models of the Hub (hf:ORG/NAME@REVISION), PEFT folders that name their base
/// model, checkpoints or run directories (their latest checkpoint). Prompts, sampling and judge come from
/// --config, or from the configuration of the first run directory. Each model answers every distinct held-out
/// prompt once, and every pair is judged in both orders; ties count one half. The judges of [evaluation.judge] are
/// asked too. Stop tokens and chat template are those of A: if B has others, or a run was evaluated with others, a
/// warning names them.
///
/// With --questions both answer the questions of a file, as a user's message where A has a chat template. B may also
/// be a file of answers that were written earlier: AlpacaEval's model outputs, or MT-Bench's model answers. With
/// --answers the answers and judgements are written for graders outside, each with stop tokens, chat template,
/// sampling settings and whether it was truncated.
///
/// Example: agon eval runs/quickstart runs/base/0123456789abcdef --prompts 1024
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The first model; the win rate is its.
    a: ModelSource,
    /// The second model, or a file of its answers.
    b: ModelSource,
    /// The configuration of prompts, sampling and judge.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    /// Number of held-out prompts; an error if there are fewer distinct ones. Default: evaluation.prompts, or all
    /// if there are fewer.
    #[arg(long, value_name = "N", conflicts_with = "questions")]
    prompts: Option<usize>,
    /// Questions instead of held-out prompts: a list of instructions (AlpacaEval) or question.jsonl (MT-Bench).
    /// Default with a file of AlpacaEval's answers for B: the instructions in it.
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Write answers and judgements to this folder, in the form of the questions; of held-out prompts in AlpacaEval's.
    #[arg(long, value_name = "FOLDER")]
    answers: Option<PathBuf>,
    /// Take the moving average of A's weights, which runs with learner.ema_decay keep, instead of the last ones.
    #[arg(long)]
    average: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// A model and its folder.
struct EvaluatedModel {
    folder: ModelFolder,
    model: LanguageModel,
}

/// A comparison of two models: questions, answers and judgements.
struct ModelComparison {
    form: Form,
    /// Name of B.
    b: String,
    questions: Vec<Question>,
    answers: Vec<[Answer; 2]>,
    judged: Vec<JudgedPair>,
    /// Number of turns of each judged pair.
    turns: Vec<PairTurns>,
    /// Unit that counts once in the intervals: a question, however many turns it has.
    unit: IndependentUnit,
    /// Conditions of B's answers; `None` if they were read from a file.
    conditions_of_b: Option<EvaluationConditions>,
}

/// Question and number of turns of a judged pair.
#[derive(Debug, Clone, Copy)]
struct PairTurns {
    question: usize,
    turns: usize,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config = arguments
        .config
        .clone()
        .or_else(|| {
            let models = [&arguments.a, &arguments.b];
            models.into_iter().find_map(run_config)
        })
        .ok_or_else(|| {
            UsageError(
                "neither model is a run directory: name a configuration with --config FILE".into(),
            )
        })?;
    let settings = resolve_file(&config, &arguments.overrides.set)?.settings;
    let mut a = load(&settings, &arguments.a)?;
    if arguments.average {
        let checkpoint = model_folder(&hub::folder(&arguments.a, &CancelToken::never())?)?;
        a.model = export::average(&checkpoint, &a.model)?;
    }
    let comparison = match questions(arguments)? {
        Some(questions) => compare_answers(&settings, arguments, &a, questions)?,
        None => compare_held_out(&settings, arguments, &a)?,
    };
    let conditions = assembly::conditions(&a.folder, &crate::run::sampling(&settings));
    let differences = differences(arguments, &conditions, comparison.conditions_of_b.as_ref());
    for difference in &differences {
        tracing::warn!(difference, "evaluations that cannot be compared");
    }
    if let Some(folder) = &arguments.answers {
        write_answers(arguments, &settings, &comparison, &conditions, folder)?;
    }
    print_result(&EvaluationResult::new(
        arguments,
        &comparison,
        settings.evaluation.judge.keys(),
        conditions,
        differences,
    )?)?;
    Ok(ExitCode::SUCCESS)
}

/// The questions to answer; `None` for held-out prompts.
fn questions(arguments: &Arguments) -> anyhow::Result<Option<Questions>> {
    let path = match (&arguments.questions, answers_file(&arguments.b)) {
        (Some(path), _) => path.as_path(),
        (None, Some(path)) => path,
        (None, None) => return Ok(None),
    };
    Ok(Some(Questions::read(path)?))
}

/// The file of answers that B is; `None` for a model.
fn answers_file(source: &ModelSource) -> Option<&Path> {
    match source {
        ModelSource::Folder(path) if path.is_file() && !model::is_gguf(path) => Some(path),
        _ => None,
    }
}

fn compare_held_out(
    settings: &Settings,
    arguments: &Arguments,
    a: &EvaluatedModel,
) -> anyhow::Result<ModelComparison> {
    let b = load(settings, &arguments.b)?;
    let base = LoadedModel::new(a.folder.clone(), a.model.weights().clone());
    let prompts = assembly::prompts(settings, &base, &CancelToken::never())?;
    let count = prompt_count(arguments.prompts, settings, prompts.as_ref())?;
    let pairs = sample(settings, [a, &b], prompts.as_ref(), count)?;
    let question = |pair: &Pair| Question {
        id: pair.prompt.id.0.into(),
        category: "agon".into(),
        turns: vec![pair.prompt.transcript().into_owned()],
    };
    let answers = |pair: &Pair| {
        [0, 1].map(|index| {
            let completion = &pair.completions[index];
            Answer {
                turns: vec![completion.text.trim().to_owned()],
                truncated: vec![Some(completion.finish == Finish::Length)],
            }
        })
    };
    let turns = (0..pairs.len()).map(|question| PairTurns { question, turns: 1 });
    Ok(ModelComparison {
        form: Form::AlpacaEval,
        b: arguments.b.to_string(),
        questions: pairs.iter().map(question).collect(),
        answers: pairs.iter().map(answers).collect(),
        turns: turns.collect(),
        unit: IndependentUnit::Pair,
        judged: judged(settings, &a.folder, pairs)?,
        conditions_of_b: Some(assembly::conditions(
            &b.folder,
            &crate::run::sampling(settings),
        )),
    })
}

fn compare_answers(
    settings: &Settings,
    arguments: &Arguments,
    a: &EvaluatedModel,
    questions: Questions,
) -> anyhow::Result<ModelComparison> {
    let given = answers_file(&arguments.b)
        .map(|path| GivenAnswers::read(path, questions.form))
        .transpose()?;
    let b = match &given {
        Some(_) => None,
        None => Some(load(settings, &arguments.b)?),
    };
    let given_answers = given
        .as_ref()
        .map(|given| given.of(&questions))
        .transpose()?;
    assembly::check_positions(settings, &a.folder.config)?;
    let sampler = AnswerSampler {
        settings,
        tokenizer: &a.folder.tokenizer,
        a: &a.model,
        b: b.as_ref().map(|b| &b.model),
    };
    let answers = sampler.answers(&questions.rows, given_answers)?;
    let (mut pairs, mut turns) = (Vec::new(), Vec::new());
    for (question, (row, answers)) in questions.rows.iter().zip(&answers).enumerate() {
        for count in 1..=row.turns.len() {
            let place = PairPlace {
                index: pairs.len(),
                turns: count,
            };
            pairs.push(answers::pair(&a.folder.tokenizer, row, answers, place)?);
            turns.push(PairTurns {
                question,
                turns: count,
            });
        }
    }
    let sampling = crate::run::sampling(settings);
    Ok(ModelComparison {
        form: questions.form,
        b: given.map_or_else(|| arguments.b.to_string(), |given| given.generator),
        questions: questions.rows,
        answers,
        turns,
        unit: IndependentUnit::Prompt,
        judged: judged(settings, &a.folder, pairs)?,
        conditions_of_b: b.map(|b| assembly::conditions(&b.folder, &sampling)),
    })
}

fn write_answers(
    arguments: &Arguments,
    settings: &Settings,
    comparison: &ModelComparison,
    conditions: &EvaluationConditions,
    folder: &Path,
) -> anyhow::Result<()> {
    let judgement = |(pair, turns): (&JudgedPair, &PairTurns)| Judgement {
        question: turns.question,
        turns: turns.turns,
        preference: pair.preference.clone(),
    };
    let judgements: Vec<_> = comparison
        .judged
        .iter()
        .zip(&comparison.turns)
        .map(judgement)
        .collect();
    let sampled_b = comparison.conditions_of_b.as_ref().map(|_| conditions);
    let files = AnswerFiles {
        form: comparison.form,
        names: names(&arguments.a.to_string(), &comparison.b),
        judge: settings.preference.judge.name().to_owned(),
        // B's answers are sampled with A's stop tokens and template.
        conditions: [Some(conditions), sampled_b],
        questions: &comparison.questions,
        answers: &comparison.answers,
        judgements: &judgements,
    };
    files.write(folder)?;
    note!("wrote the answers and judgements to {}", folder.display());
    Ok(())
}

/// File names of two models: the last parts of theirs, told apart if they are the same.
fn names(a: &str, b: &str) -> [String; 2] {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let short = |name: &str| {
        let last = name.trim_end_matches('/').rsplit('/').next();
        let last = last.unwrap_or_default().trim_start_matches('.');
        let plain = |c: char| if is_plain(c) { c } else { '_' };
        let name: String = last.chars().map(plain).collect();
        if name.is_empty() {
            "model".to_owned()
        } else {
            name
        }
    };
    match [short(a), short(b)] {
        [a, b] if a == b => [format!("{a}-a"), format!("{b}-b")],
        both => both,
    }
}

/// Number of held-out prompts: that of the command line, else the lower of `evaluation.prompts` and what there is, which
/// is all of it where `evaluation.prompts` is 0.
///
/// # Errors
/// When the command line requests more distinct prompts than there are, or nobody names a number.
fn prompt_count(
    requested: Option<usize>,
    settings: &Settings,
    prompts: &dyn PromptSet,
) -> Result<usize, UsageError> {
    let of_settings = Some(settings.evaluation.prompts).filter(|&count| count > 0);
    let count = requested.or(of_settings).or(prompts.held_out_count());
    let count = count.ok_or_else(|| {
        UsageError("evaluation.prompts is 0: name the number of prompts with --prompts".into())
    })?;
    if prompts.held_out_count() == Some(0) {
        return Err(UsageError(
            "no prompts are held out: set prompts.held_out or prompts.held_out_path, or name --questions".into(),
        ));
    }
    let Some(distinct) = prompts
        .held_out_count()
        .filter(|&distinct| distinct < count)
    else {
        return Ok(count);
    };
    if requested.is_some() {
        return Err(UsageError(format!(
            "--prompts {count} exceeds the {distinct} distinct held-out prompts there are: choose fewer, or hold \
             out more (prompts.held_out, prompts.held_out_path)"
        )));
    }
    tracing::warn!(
        "evaluation.prompts = {count}, but there are {distinct} distinct held-out prompts: each is used once"
    );
    Ok(distinct)
}

/// Differences between the conditions `used` here and B's own, or those recorded by runs that are compared.
fn differences(
    arguments: &Arguments,
    used: &EvaluationConditions,
    of_b: Option<&EvaluationConditions>,
) -> Vec<String> {
    let record = |name: String, conditions: &EvaluationConditions| EvaluationRecord {
        name,
        conditions: Some(json!(conditions)),
        truncation_rate: None,
    };
    let mut records = vec![record("this evaluation".into(), used)];
    records.extend(of_b.map(|of_b| record(arguments.b.to_string(), of_b)));
    for source in [&arguments.a, &arguments.b] {
        let last = run_config(source).and_then(|config| last_evaluation(config.parent()?));
        // The truncation rate differs between policies: it is a result, not a condition.
        records.extend(last.map(|last| EvaluationRecord {
            name: format!("the run {source}"),
            truncation_rate: None,
            ..last
        }));
    }
    evaluation_differences(&records)
}

/// Conditions of the last evaluation of the run in this directory.
fn last_evaluation(run: &Path) -> Option<EvaluationRecord> {
    let mut view = RunView::open(run).ok()?;
    view.refresh().ok()?;
    view.evaluation()
}

/// Result of the comparison.
struct EvaluationResult<'a> {
    arguments: &'a Arguments,
    /// Name of B.
    b: &'a str,
    rate: Interval,
    /// Length-controlled `rate`.
    rate_lc: f64,
    /// Results under the evaluation judges.
    judges: Vec<JudgeEvaluation>,
    prompts: usize,
    unit: IndependentUnit,
    /// Number of independent outcomes, over which the intervals are.
    independent: usize,
    abstained: usize,
    conditions: EvaluationConditions,
    /// Shares of A's and of B's completions that were truncated; `None` where a file of answers does not say.
    truncation_rates: [Option<f64>; 2],
    differences: Vec<String>,
}

impl<'a> EvaluationResult<'a> {
    /// # Errors
    /// When the judge abstained on every pair.
    fn new(
        arguments: &'a Arguments,
        comparison: &'a ModelComparison,
        judges: impl Iterator<Item = &'a String>,
        conditions: EvaluationConditions,
        differences: Vec<String>,
    ) -> anyhow::Result<Self> {
        let pairs = &comparison.judged;
        let labelled: Vec<_> = pairs.iter().filter_map(JudgedPair::labelled).collect();
        let abstained = pairs.len() - labelled.len();
        let last_reason = pairs.iter().rev().find_map(JudgedPair::reason);
        anyhow::ensure!(
            !labelled.is_empty(),
            "the judge abstained on all {abstained} prompts; the last reason: {}",
            last_reason.unwrap_or_default()
        );
        let answers = &comparison.answers;
        let truncated = |model: usize| truncation_rate(answers.iter().map(|both| &both[model]));
        let unit = comparison.unit;
        Ok(Self {
            arguments,
            b: &comparison.b,
            rate: learner::win_rate(&labelled, unit),
            rate_lc: learner::length_controlled_win_rate(&labelled),
            judges: learner::judge_evaluations(judges, &labelled, unit),
            prompts: labelled.len(),
            unit,
            independent: unit.count(labelled.iter()),
            abstained,
            conditions,
            truncation_rates: [truncated(0), truncated(1)],
            differences,
        })
    }

    fn json(&self) -> Value {
        let rate = self.rate;
        let [truncated_a, truncated_b] = self.truncation_rates;
        json!({
            "a": self.arguments.a.to_string(), "b": self.b, "prompts": self.prompts,
            "independent": self.independent,
            "average": self.arguments.average,
            "abstained": self.abstained, "win_rate": rate.mean, "win_rate_ci_low": rate.low,
            "win_rate_ci_high": rate.high, "win_rate_lc": self.rate_lc, "judges": self.judges,
            "conditions": self.conditions, "truncation_rate_a": truncated_a,
            "truncation_rate_b": truncated_b, "differences": self.differences,
        })
    }
}

/// Share of the answers' turns that were truncated; `None` if it is not known of all.
fn truncation_rate<'a>(answers: impl Iterator<Item = &'a Answer>) -> Option<f64> {
    let turns = answers.flat_map(|answer| answer.truncated.iter().copied());
    let turns: Vec<bool> = turns.collect::<Option<_>>()?;
    let count = turns.iter().filter(|&&truncated| truncated).count();
    Some(count as f64 / turns.len().max(1) as f64)
}

fn print_result(result: &EvaluationResult<'_>) -> std::io::Result<()> {
    if result.arguments.json {
        out!("{}", printable_json(&result.json().to_string()))?;
        return Ok(());
    }
    let (rate, prompts, abstained) = (result.rate, result.prompts, result.abstained);
    let (a, b) = (&result.arguments.a, result.b);
    let [truncated_a, truncated_b] = result.truncation_rates;
    let share = |rate: Option<f64>| {
        rate.map_or_else(
            || "an unknown share".to_owned(),
            |rate| format!("{:.1} %", 100.0 * rate),
        )
    };
    let of_a = match result.arguments.average {
        true => "the moving average of ",
        false => "",
    };
    let what = match result.unit {
        IndependentUnit::Prompt => format!("answered turns of {} questions", result.independent),
        IndependentUnit::Pair => "held-out prompts".to_owned(),
    };
    out!(
        "{of_a}{a} is preferred to {b} on {:.1} % of {prompts} {what} (95 % interval {:.1} to {:.1} %{}).",
        100.0 * rate.mean,
        100.0 * rate.low,
        100.0 * rate.high,
        if abstained > 0 {
            format!("; the judge abstained {abstained} times")
        } else {
            String::new()
        }
    )?;
    out!(
        "At equal lengths of both answers (length-controlled): {:.1} %.",
        100.0 * result.rate_lc
    )?;
    for judge in &result.judges {
        let (name, judged) = (&judge.judge, judge_result(judge));
        out!("Under the evaluation judge {name}: {judged}.")?;
    }
    out!(
        "Evaluated with {}; {} of {a}'s answers were truncated, {} of {b}'s.",
        describe(&result.conditions),
        share(truncated_a),
        share(truncated_b)
    )?;
    Ok(())
}

/// The configuration of a run directory; `None` for other models.
fn run_config(source: &ModelSource) -> Option<PathBuf> {
    let ModelSource::Folder(path) = source else {
        return None;
    };
    Some(path.join("config.toml")).filter(|config| config.exists())
}

/// The latest checkpoint of the run in `path`; `path` itself if it is a model's folder.
fn model_folder(path: &Path) -> anyhow::Result<PathBuf> {
    if !path.join("config.toml").exists() || !path.join("checkpoints").exists() {
        return Ok(path.to_owned());
    }
    learner::newest_checkpoint_model(&path.join("checkpoints"))?.ok_or_else(|| {
        UsageError(format!(
            "the run {} holds no checkpoint yet",
            path.display()
        ))
        .into()
    })
}

fn load(settings: &Settings, source: &ModelSource) -> anyhow::Result<EvaluatedModel> {
    let never = CancelToken::never();
    let (device, dtype) = assembly::device(settings)?;
    let template = settings.model.chat_template.as_deref();
    let path = model_folder(&hub::folder(source, &never)?)?;
    let location = ModelLocation::of_folder(path, &never)?;
    let (folder, model) = location.policy(template, dtype, &device)?;
    Ok(EvaluatedModel { folder, model })
}

/// Samples one completion of each model for every held-out prompt.
fn sample(
    settings: &Settings,
    models: [&EvaluatedModel; 2],
    prompts: &dyn PromptSet,
    count: usize,
) -> anyhow::Result<Vec<Pair>> {
    let [a, b] = models;
    assembly::check_positions(settings, &a.folder.config)?;
    let capacity = settings.actor.max_prompt_length + settings.actor.max_new_tokens;
    let sampling = crate::run::sampling(settings);
    let mut sampler = MixtureSampler::new(
        a.model.clone(),
        Some(b.model.clone()),
        sampling,
        settings.actor.slots,
        capacity,
    )?;
    let mut pending: Vec<Option<Prompt>> = Vec::new();
    for index in 0..count as u64 {
        let row = prompts.held_out(index);
        let id = PromptId(index);
        let seed = Seed(settings.run.seed).derive(1 << 63 | index);
        sampler.admit(Request {
            key: index,
            ids: row.ids.clone(),
            seed,
            mixture_coefs: vec![0.0, 1.0],
            exact: 0,
            max_new_tokens: sampling.max_new_tokens,
            records_reference: true,
        })?;
        pending.push(Some(row.held_out_prompt(id, seed)));
    }
    let mut pairs = Vec::new();
    while !sampler.is_idle() {
        for finished in sampler.step()? {
            let Some(prompt) = pending[finished.key as usize].take() else {
                continue;
            };
            let mut completions = finished.completions;
            for completion in &mut completions {
                completion.text = a.folder.tokenizer.completion_text(&prompt.ids, completion);
            }
            pairs.push(Pair {
                prompt,
                version: WeightsVersion::REFERENCE,
                completions,
                actor: "eval".into(),
            });
        }
    }
    pairs.sort_by_key(Pair::id);
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncation_rate_is_known_if_that_of_every_turn_is() {
        let answer = |truncated: &[Option<bool>]| Answer {
            turns: Vec::new(),
            truncated: truncated.to_vec(),
        };
        let known = answer(&[Some(true), Some(false)]);
        let both = [known.clone(), answer(&[Some(false), Some(false)])];
        assert_eq!(truncation_rate(both.iter()), Some(0.25));
        assert_eq!(truncation_rate([known, answer(&[None])].iter()), None);
    }

    #[test]
    fn models_have_distinct_file_names() {
        for (a, b, expected) in [
            ("runs/one", "hf:ORG/two@main", ["one", "two_main"]),
            ("runs/one/", "old/one", ["one-a", "one-b"]),
            ("..", "/", ["model-a", "model-b"]),
        ] {
            assert_eq!(names(a, b), expected, "{a} {b}");
        }
    }
}
