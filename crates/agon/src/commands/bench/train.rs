//! `agon bench train`: the whole loop, sampling, judging and training side by side.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use model::ModelFolder;
use model::roofline::Roofline;
use serde_json::{Value, json};

use super::shape::{Cost, Numbers, token};

/// Steps that do not count: everything is started and the first weights are on their way.
const WARM_UP: u64 = 2;

/// Completions written at once, at most: the default of actor.slots.
const SLOTS: usize = 64;

/// The whole loop: `agon train` in a process of its own on this model, prompts of random tokens and a judge
/// that costs nothing.
///
/// pairs_per_second is trained pairs from the third step to the last. roofline_share is the share of the rate
/// of f32 products, measured when the run is over, that the operations of sampling and training come to.
/// peak_gib is the largest memory of the run.
///
/// Example: agon bench train --model DIR --batch 16 --mixture-coef 0.125 --json
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Arguments {
    /// The model: a Hugging Face folder.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Pairs to a step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of a prompt, about.
    #[arg(long, default_value_t = 16)]
    prompt: usize,
    /// Tokens of a completion, at most.
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
    /// How numbers are kept while completions are written, and which are multiplied in training.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Numbers,
    /// The weight on the reference: 0 is online IPO, above it IPO-MD.
    #[arg(long, default_value_t = 0.125)]
    mixture_coef: f32,
    /// Optimiser steps.
    #[arg(long, default_value_t = 12)]
    steps: u64,
    /// Change one setting of the run, VALUE being TOML; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    ensure!(
        arguments.steps > WARM_UP + 1,
        "--steps must be at least {}: the first {WARM_UP} do not count",
        WARM_UP + 2
    );
    let folder = ModelFolder::open(&arguments.model, None)?;
    let place = tempfile::tempdir().context("failed to make a folder for the run")?;
    let prompts = place.path().join("prompts.jsonl");
    std::fs::write(&prompts, rows(arguments, &folder)?).context("failed to write the prompts")?;
    let config = place.path().join("bench.toml");
    std::fs::write(&config, configuration(arguments, &prompts)?)
        .context("failed to write the configuration")?;
    let run = place.path().join("run");
    train(arguments, &config, &run)?;
    let measured = Measured::read(&run.join("metrics.jsonl"))?;
    let machine = Roofline::measure()?;
    let cost = Cost::of(&folder.config);
    Ok(json!({
        "bench": "train",
        "model_parameters": folder.config.parameter_count(),
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "precision": arguments.precision.name(),
        "mixture_coef": arguments.mixture_coef,
        "pairs_per_second": measured.pairs_per_second,
        "tokens_per_second": measured.pairs_per_second * measured.tokens_per_pair,
        "mean_length": measured.tokens_per_pair / 2.0,
        "idle_ratio": measured.idle_ratio,
        "roofline_share": measured.pairs_per_second
            * operations(arguments, &cost, measured.tokens_per_pair) / machine.products,
        "peak_gib": measured.peak_gib,
        "machine_gflops": machine.products / 1e9,
    }))
}

/// Of a pair: its prompt read by both models and in training, its completions written by both and trained on.
fn operations(arguments: &Arguments, cost: &Cost, tokens: f64) -> f64 {
    let prompt = arguments.prompt as f64;
    let all = cost.blocks + cost.head + cost.attention * (prompt + tokens / 4.0);
    let written = 2.0 * (prompt * cost.blocks + tokens * all);
    let trained = 3.0 * (prompt * cost.blocks + tokens * all);
    written + trained
}

/// Prompts of random tokens, as text; the tokenizer may cut it otherwise.
fn rows(arguments: &Arguments, folder: &ModelFolder) -> anyhow::Result<String> {
    let mut rows = String::new();
    for row in 0..256 {
        let ids: Vec<u32> = (0..arguments.prompt)
            .map(|i| token(&folder.config, row * arguments.prompt + i))
            .collect();
        let text = folder.tokenizer.decode(&ids);
        writeln!(rows, "{}", json!({ "prompt": text }))?;
    }
    Ok(rows)
}

fn configuration(arguments: &Arguments, prompts: &Path) -> anyhow::Result<String> {
    let path = |path: &Path| -> anyhow::Result<Value> {
        let path = std::path::absolute(path).context("failed to find where the model lies")?;
        Ok(json!(path.display().to_string()))
    };
    let Arguments {
        batch,
        prompt,
        new_tokens,
        mixture_coef,
        steps,
        ..
    } = arguments;
    Ok(format!(
        "[run]\nname = \"bench\"\n\
         [model]\npath = {model}\n\
         [prompts]\nkind = \"dataset\"\npath = {prompts}\nheld_out = 2\ntoo_long = \"drop\"\n\
         [actor]\nslots = {slots}\nmixture_coef = {mixture_coef}\nmax_new_tokens = {new_tokens}\n\
         max_prompt_length = {longest}\nprecision = \"{precision}\"\n\
         [preference.judge]\nkind = \"rule\"\nrules = [{{ kind = \"length\", min = 0, max = 10, weight = 1.0 }}]\n\
         [learner]\nsteps = {steps}\ntrain_batch_size = {batch}\nmax_staleness = 1\nsave_steps = 0\n\
         precision = \"{trained}\"\n\
         [learner.objective]\nkind = \"ipo\"\ntau = 0.1\n\
         [evaluation]\neval_steps = 0\nprompts = 2\n\
         [telemetry]\nlisten = \"127.0.0.1:0\"\n",
        model = path(&arguments.model)?,
        prompts = path(prompts)?,
        slots = (2 * batch).min(SLOTS),
        longest = 4 * prompt,
        precision = arguments.precision.name(),
        trained = arguments.precision.of_training(),
    ))
}

fn train(arguments: &Arguments, config: &Path, run: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::current_exe().context("failed to find this binary")?);
    command.arg("train").arg(config).arg("--run-dir").arg(run);
    for set in &arguments.set {
        command.arg("--set").arg(set);
    }
    let ended = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output();
    let ended = ended.context("failed to start the run")?;
    ensure!(
        ended.status.success(),
        "the run failed:\n{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    Ok(())
}

/// What a run's metrics say of its steady part.
struct Measured {
    pairs_per_second: f64,
    tokens_per_pair: f64,
    idle_ratio: f64,
    peak_gib: f64,
}

impl Measured {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).context("failed to read the run's metrics")?;
        let rows: Vec<Value> = text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        let steps: Vec<&Value> = rows
            .iter()
            .filter(|row| row["time/step"].is_number())
            .collect();
        let steady = steps.get(WARM_UP as usize..).unwrap_or_default();
        ensure!(!steady.is_empty(), "the run has no steady part");
        let sum = |key: &str| -> f64 { steady.iter().filter_map(|row| row[key].as_f64()).sum() };
        let seconds = sum("time/step");
        let count = steady.len() as f64;
        let pairs: f64 = steady
            .iter()
            .filter_map(|row| {
                Some(row["perf/pairs_per_second"].as_f64()? * row["time/step"].as_f64()?)
            })
            .sum();
        let bytes = steady
            .iter()
            .filter_map(|row| row["perf/peak_memory_bytes"].as_f64());
        Ok(Self {
            pairs_per_second: pairs / seconds,
            tokens_per_pair: 2.0 * sum("completions/mean_length") / count,
            idle_ratio: sum("idle_ratio") / count,
            peak_gib: bytes.fold(0.0, f64::max) / f64::from(1 << 30),
        })
    }
}
