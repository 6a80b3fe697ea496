//! `agon eval`: two models head to head.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use learner::{EvaluationConditions, Interval, PromptSet};
use messages::{Finish, Pair, Prompt, PromptId, Purpose, Release, Seed, WeightsVersion};
use model::{CompletionWriter as _, LanguageModel, ModelFolder, Request, Sampler};
use preference::{Orders, Question, Ruling, RulingError, Verdict};
use serde_json::json;
use settings::{ModelSource, Override, Settings, resolve_file};
use telemetry::{EvaluationRecord, RunView, evaluation_differences, printable_json};

use crate::{
    failure::Misuse,
    model_hub::{self, Located},
    report::verdict::sampled_with,
    roles, world,
};

/// Compare two models on held-out prompts under a judge.
///
/// A and B are Hugging Face folders, models of the hub (hf:ORG/NAME@REVISION), PEFT folders that name their
/// model, checkpoints or run directories (their latest checkpoint). Prompts, sampling and judge come from
/// --config, or from the configuration of the first run directory. Every distinct held-out prompt is asked
/// once and every pair is judged in both orders; ties count one half. Stop tokens and chat template are those
/// of A: where B has others, or a run was evaluated under others, a warning names them.
///
/// Example: agon eval runs/quickstart runs/base/0123456789abcdef --prompts 1024
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The first model, whose win rate is told.
    a: ModelSource,
    /// The second.
    b: ModelSource,
    /// The configuration that names prompts, sampling and judge.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Change one setting, VALUE being TOML; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<Override>,
    /// How many held-out prompts, refused when there are fewer distinct ones; evaluation.prompts, or as many
    /// as there are, when not given.
    #[arg(long, value_name = "N")]
    prompts: Option<usize>,
    /// One JSON object in place of words.
    #[arg(long)]
    json: bool,
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
            Misuse(
                "neither model is a run directory: name a configuration with --config FILE".into(),
            )
        })?;
    let settings = resolve_file(&config, &arguments.set)?.settings;
    let (a, b) = (
        load(&settings, &arguments.a)?,
        load(&settings, &arguments.b)?,
    );
    let set = world::prompts(&settings, (&a.0, a.1.weights()), &|| false)?;
    let count = count(arguments.prompts, &settings, set.as_ref())?;
    let pairs = answer(&settings, (&a, &b), set.as_ref(), count)?;
    let truncated = [0, 1].map(|index| truncation_rate(&pairs, index));
    let conditions = world::conditions(&a.0, &roles::sampling(&settings));
    let differences = differences(arguments, &settings, (&conditions, &b.0));
    for difference in &differences {
        tracing::warn!("evaluations that cannot be compared: {difference}");
    }
    let mut wins = Vec::new();
    let (mut abstained, mut last) = (0, String::new());
    for ruling in rulings(&settings, &a.0, pairs)? {
        match ruling?.verdict {
            Verdict::Preference(p) if p.get() > 0.5 => wins.push(1.0),
            Verdict::Preference(p) if p.get() < 0.5 => wins.push(0.0),
            Verdict::Preference(_) => wins.push(0.5),
            Verdict::Abstained { reason } => {
                abstained += 1;
                last = reason;
            }
        }
    }
    anyhow::ensure!(
        !wins.is_empty(),
        "the judge gave no verdict on any of {abstained} prompts, and nothing is measured; the last reason: {last}"
    );
    let rate = Interval::wilson(
        wins.iter().sum::<f64>() / wins.len().max(1) as f64,
        wins.len(),
    );
    tell(&Told {
        arguments,
        rate,
        prompts: wins.len(),
        abstained,
        conditions,
        truncated,
        differences,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The number of held-out prompts to ask: what was asked for on the command line, else what the settings want
/// and there is.
///
/// # Errors
/// When the command line asks for more distinct prompts than there are.
fn count(
    asked: Option<usize>,
    settings: &Settings,
    prompts: &dyn PromptSet,
) -> Result<usize, Misuse> {
    let wanted = asked.unwrap_or(settings.evaluation.prompts);
    let Some(distinct) = prompts.held_out_count().filter(|&count| count < wanted) else {
        return Ok(wanted);
    };
    if asked.is_some() {
        return Err(Misuse(format!(
            "--prompts {wanted} asks for more than the {distinct} distinct held-out prompts there are: ask for \
             fewer, or hold out more (prompts.held_out, prompts.held_out_path)"
        )));
    }
    tracing::warn!(
        "evaluation.prompts = {wanted}, but there are {distinct} distinct held-out prompts: each is asked once"
    );
    Ok(distinct)
}

/// Share of the completions at place `index` of their pairs that were cut off at the longest allowed.
fn truncation_rate(pairs: &[Pair], index: usize) -> f64 {
    let cut_off = |pair: &&Pair| pair.completions[index].finish == Finish::Length;
    pairs.iter().filter(cut_off).count() as f64 / pairs.len().max(1) as f64
}

/// Why this evaluation cannot be compared with how the two models are sampled elsewhere: B's own stop tokens
/// and chat template against those in use, and what the runs among them recorded.
fn differences(
    arguments: &Arguments,
    settings: &Settings,
    (used, b): (&EvaluationConditions, &ModelFolder),
) -> Vec<String> {
    let record = |name: String, conditions: &EvaluationConditions| EvaluationRecord {
        name,
        conditions: Some(json!(conditions)),
        truncation_rate: None,
    };
    let own = world::conditions(b, &roles::sampling(settings));
    let mut records = vec![
        record("this evaluation".into(), used),
        record(arguments.b.to_string(), &own),
    ];
    for source in [&arguments.a, &arguments.b] {
        let recorded = run_config(source).and_then(|config| recorded(config.parent()?));
        // Truncation differs between policies: it is a result here, not a condition.
        records.extend(recorded.map(|recorded| EvaluationRecord {
            name: format!("the run {source}"),
            truncation_rate: None,
            ..recorded
        }));
    }
    evaluation_differences(&records)
}

/// What the last evaluation of the run in this directory was made under.
fn recorded(run: &Path) -> Option<EvaluationRecord> {
    let mut view = RunView::open(run).ok()?;
    view.refresh().ok()?;
    view.evaluation()
}

/// What the judge of the settings says of every pair, in both orders; their tokens are those of the model
/// in the folder `of`.
fn rulings(
    settings: &Settings,
    of: &ModelFolder,
    pairs: Vec<Pair>,
) -> anyhow::Result<Vec<Result<Ruling, RulingError>>> {
    let questions: Vec<_> = pairs
        .into_iter()
        .map(|pair| Question::new(Arc::new(pair), 0, 1))
        .collect();
    crate::runtime()?.block_on(async {
        let judge = world::JudgeSource::open(settings, world::Judged::Model(of), &|| false)?;
        let bench = world::bench(settings, &Arc::new(judge))?;
        Ok(bench.rule_all(&questions, Orders::Both).await)
    })
}

/// What there is to say of an evaluation.
struct Told<'a> {
    arguments: &'a Arguments,
    rate: Interval,
    prompts: usize,
    abstained: usize,
    conditions: EvaluationConditions,
    /// Shares of A's and of B's completions that were cut off.
    truncated: [f64; 2],
    differences: Vec<String>,
}

fn tell(told: &Told<'_>) -> std::io::Result<()> {
    let (rate, prompts, abstained) = (told.rate, told.prompts, told.abstained);
    let (a, b) = (&told.arguments.a, &told.arguments.b);
    let [truncated_a, truncated_b] = told.truncated;
    if told.arguments.json {
        let row = json!({
            "a": a.to_string(), "b": b.to_string(), "prompts": prompts, "abstained": abstained,
            "win_rate": rate.mean, "win_rate_ci_low": rate.low, "win_rate_ci_high": rate.high,
            "conditions": told.conditions, "truncation_rate_a": truncated_a,
            "truncation_rate_b": truncated_b, "differences": told.differences,
        });
        out!("{}", printable_json(&row.to_string()))?;
        return Ok(());
    }
    out!(
        "{a} is preferred to {b} on {:.1} % of {prompts} held-out prompts (95 % interval {:.1} to {:.1} %{}).",
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
        "Evaluated with {}; {:.1} % of {a}'s answers were cut off there, {:.1} % of {b}'s.",
        sampled_with(&told.conditions),
        100.0 * truncated_a,
        100.0 * truncated_b
    )?;
    Ok(())
}

/// The configuration of a run directory.
fn run_config(source: &ModelSource) -> Option<PathBuf> {
    let ModelSource::Folder(path) = source else {
        return None;
    };
    Some(path.join("config.toml")).filter(|config| config.exists())
}

/// The folder of a model: itself, or the latest checkpoint of a run.
fn folder(path: &Path) -> anyhow::Result<PathBuf> {
    if !path.join("config.toml").exists() || !path.join("checkpoints").exists() {
        return Ok(path.to_owned());
    }
    learner::latest_checkpoint(&path.join("checkpoints"))?.ok_or_else(|| {
        Misuse(format!(
            "the run {} holds no checkpoint yet",
            path.display()
        ))
        .into()
    })
}

fn load(settings: &Settings, source: &ModelSource) -> anyhow::Result<(ModelFolder, LanguageModel)> {
    let (device, dtype) = world::device(settings)?;
    let template = settings.model.chat_template.as_deref();
    let path = folder(&model_hub::folder(source, &|| false)?)?;
    Ok(Located::at(path, &|| false)?.policy(template, (dtype, &device))?)
}

/// One completion of each model to every held-out prompt.
fn answer(
    settings: &Settings,
    (a, b): (&(ModelFolder, LanguageModel), &(ModelFolder, LanguageModel)),
    prompts: &dyn PromptSet,
    count: usize,
) -> anyhow::Result<Vec<Pair>> {
    world::fits_positions(settings, &a.0.config)?;
    let capacity = settings.actor.max_prompt_length + settings.actor.max_new_tokens;
    let sampling = roles::sampling(settings);
    let mut sampler = Sampler::new(
        a.1.clone(),
        Some(b.1.clone()),
        sampling,
        settings.actor.slots,
        capacity,
    )?;
    let mut asked: Vec<Option<Prompt>> = Vec::new();
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
        })?;
        asked.push(Some(Prompt {
            id,
            release: Release::single(id),
            purpose: Purpose::Evaluate,
            version: WeightsVersion::REFERENCE,
            seed,
            ids: row.ids,
            text: row.text,
            dialogue: row.dialogue,
            golden: row.golden,
            answer: row.answer,
        }));
    }
    let mut answered = Vec::new();
    while !sampler.is_idle() {
        for finished in sampler.step()? {
            let Some(prompt) = asked[finished.key as usize].take() else {
                continue;
            };
            let mut completions = finished.completions;
            for completion in &mut completions {
                completion.text = a.0.tokenizer.completion_text(&prompt.ids, completion);
            }
            answered.push(Pair {
                prompt,
                version: WeightsVersion::REFERENCE,
                completions,
                actor: "eval".into(),
            });
        }
    }
    answered.sort_by_key(Pair::id);
    Ok(answered)
}
