//! `agon eval`: pairwise comparison of two models.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use hub::CancelToken;
use learner::{EvaluationConditions, PromptSet};
use messages::{Finish, Pair, Prompt, PromptBatch, PromptId, Purpose, Seed, WeightsVersion};
use model::{LanguageModel, MixtureSampler, ModelFolder, Request, Sampler as _};
use preference::{ComparisonError, ComparisonRequest, Orders, Preference, Verdict};
use serde_json::json;
use settings::{ModelSource, Settings, resolve_file};
use telemetry::{EvaluationRecord, Interval, RunView, evaluation_differences, printable_json};

use crate::{
    assembly::{self, CompletionOrigin, JudgeSource, LoadedModel, ModelLocation},
    cli::{config_args::Overrides, export},
    exit_code::UsageError,
    report::verdict::describe,
};

/// Compare two models on held-out prompts under a judge.
///
/// A and B are Hugging Face folders, models of the Hub (hf:ORG/NAME@REVISION), PEFT folders that name their base
/// model, checkpoints or run directories (their latest checkpoint). Prompts, sampling and judge come from
/// --config, or from the configuration of the first run directory. Each model answers every distinct held-out
/// prompt once, and every pair is judged in both orders; ties count one half. Stop tokens and chat template are
/// those of A: if B has others, or a run was evaluated with others, a warning names them.
///
/// Example: agon eval runs/quickstart runs/base/0123456789abcdef --prompts 1024
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The first model; the win rate is its.
    a: ModelSource,
    /// The second model.
    b: ModelSource,
    /// The configuration of prompts, sampling and judge.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    /// Number of held-out prompts; an error if there are fewer distinct ones. Default: evaluation.prompts, or all
    /// if there are fewer.
    #[arg(long, value_name = "N")]
    prompts: Option<usize>,
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
    let mut models = [
        load(&settings, &arguments.a)?,
        load(&settings, &arguments.b)?,
    ];
    if arguments.average {
        let checkpoint = model_folder(&hub::folder(&arguments.a, &CancelToken::never())?)?;
        models[0].model = export::average(&checkpoint, &models[0].model)?;
    }
    let [a, b] = &models;
    let base = LoadedModel::new(a.folder.clone(), a.model.weights().clone());
    let prompts = assembly::prompts(&settings, &base, &CancelToken::never())?;
    let count = prompt_count(arguments.prompts, &settings, prompts.as_ref())?;
    let pairs = sample(&settings, &models, prompts.as_ref(), count)?;
    let truncation_rates = [0, 1].map(|index| truncation_rate(&pairs, index));
    let conditions = assembly::conditions(&a.folder, &crate::run::sampling(&settings));
    let conditions_of_b = assembly::conditions(&b.folder, &crate::run::sampling(&settings));
    let differences = differences(arguments, &conditions, &conditions_of_b);
    for difference in &differences {
        tracing::warn!("evaluations that cannot be compared: {difference}");
    }
    let mut wins = Vec::new();
    let (mut abstained, mut last_reason) = (0, String::new());
    for preference in preferences(&settings, &a.folder, pairs)? {
        match preference?.verdict {
            Verdict::Preference(p) if p.get() > 0.5 => wins.push(1.0),
            Verdict::Preference(p) if p.get() < 0.5 => wins.push(0.0),
            Verdict::Preference(_) => wins.push(0.5),
            Verdict::Abstained { reason } => {
                abstained += 1;
                last_reason = reason;
            }
        }
    }
    anyhow::ensure!(
        !wins.is_empty(),
        "the judge abstained on all {abstained} prompts; the last reason: {last_reason}"
    );
    let rate = Interval::wilson(
        wins.iter().sum::<f64>() / wins.len().max(1) as f64,
        wins.len(),
    );
    print_result(&EvaluationResult {
        arguments,
        rate,
        prompts: wins.len(),
        abstained,
        conditions,
        truncation_rates,
        differences,
    })?;
    Ok(ExitCode::SUCCESS)
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

/// Share of the completions `index` of the pairs that were truncated at the limit of new tokens.
fn truncation_rate(pairs: &[Pair], index: usize) -> f64 {
    let is_truncated = |pair: &&Pair| pair.completions[index].finish == Finish::Length;
    pairs.iter().filter(is_truncated).count() as f64 / pairs.len().max(1) as f64
}

/// Differences between the conditions `used` here and B's own, or those recorded by runs that are compared.
fn differences(
    arguments: &Arguments,
    used: &EvaluationConditions,
    of_b: &EvaluationConditions,
) -> Vec<String> {
    let record = |name: String, conditions: &EvaluationConditions| EvaluationRecord {
        name,
        conditions: Some(json!(conditions)),
        truncation_rate: None,
    };
    let mut records = vec![
        record("this evaluation".into(), used),
        record(arguments.b.to_string(), of_b),
    ];
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

/// The configured judge's preference on every pair, in both orders; tokens are those of the model in `folder`.
fn preferences(
    settings: &Settings,
    folder: &ModelFolder,
    pairs: Vec<Pair>,
) -> anyhow::Result<Vec<Result<Preference, ComparisonError>>> {
    let requests: Vec<_> = pairs
        .into_iter()
        .map(|pair| ComparisonRequest::new(Arc::new(pair), 0, 1))
        .collect();
    crate::runtime()?.block_on(async {
        let origin = CompletionOrigin::Model(folder);
        let judge = JudgeSource::open(settings, origin, &CancelToken::never())?;
        let pool = assembly::pool(settings, &Arc::new(judge))?;
        Ok(pool.compare_all(&requests, Orders::Both).await)
    })
}

/// Result of the comparison.
struct EvaluationResult<'a> {
    arguments: &'a Arguments,
    rate: Interval,
    prompts: usize,
    abstained: usize,
    conditions: EvaluationConditions,
    /// Shares of A's and of B's completions that were truncated.
    truncation_rates: [f64; 2],
    differences: Vec<String>,
}

fn print_result(result: &EvaluationResult<'_>) -> std::io::Result<()> {
    let (rate, prompts, abstained) = (result.rate, result.prompts, result.abstained);
    let (a, b) = (&result.arguments.a, &result.arguments.b);
    let [truncated_a, truncated_b] = result.truncation_rates;
    if result.arguments.json {
        let row = json!({
            "a": a.to_string(), "b": b.to_string(), "average": result.arguments.average,
            "prompts": prompts, "abstained": abstained,
            "win_rate": rate.mean, "win_rate_ci_low": rate.low, "win_rate_ci_high": rate.high,
            "conditions": result.conditions, "truncation_rate_a": truncated_a,
            "truncation_rate_b": truncated_b, "differences": result.differences,
        });
        out!("{}", printable_json(&row.to_string()))?;
        return Ok(());
    }
    let of_a = match result.arguments.average {
        true => "the moving average of ",
        false => "",
    };
    out!(
        "{of_a}{a} is preferred to {b} on {:.1} % of {prompts} held-out prompts (95 % interval {:.1} to {:.1} %{}).",
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
        "Evaluated with {}; {:.1} % of {a}'s answers were truncated, {:.1} % of {b}'s.",
        describe(&result.conditions),
        100.0 * truncated_a,
        100.0 * truncated_b
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
    models: &[EvaluatedModel; 2],
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
        })?;
        pending.push(Some(Prompt {
            id,
            prompt_batch: PromptBatch::single(id),
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
