//! `agon bench train`: throughput of a whole run: sampling, judging and training.

use std::{
    fmt::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use model::roofline::Roofline;
use model::{DType, Device, ModelFolder};
use serde_json::{Value, json};
use settings::resolve;

use crate::cli::{
    bench::{
        SamplingOptions, WorkloadOptions,
        cost::{TokenCost, token},
    },
    config_args::Overrides,
};

/// Number of steps before the measurement: roles start and the first weights are published.
const WARM_UP_STEPS: u64 = 2;

/// Largest number of completions sampled at once: the default of actor.slots.
const MAX_SLOTS: usize = 64;

/// Measure a whole run: `agon train` in a separate process with this model, prompts of random tokens and a rule
/// as the judge.
///
/// pairs_per_second is the rate of trained pairs from the third step to the last. roofline_share is the operations
/// of sampling and training as a share of the throughput of f32 matrix multiplication, measured after the run.
/// peak_gib is the peak memory of the run.
///
/// Example: agon bench train --model DIR --batch 16 --mixture-coef 0.125 --json
#[derive(clap::Args)]
#[group(skip)]
#[command(
    mut_arg("batch", |arg| arg.help("Pairs per optimiser step")),
    mut_arg("prompt", |arg| arg.help("Approximate number of tokens per prompt")),
    mut_arg("new_tokens", |arg| arg.help("Largest number of tokens per completion")),
    mut_arg("precision", |arg| arg.help("Precision of sampling and training; int8 is trained in bf16")),
    mut_arg("mixture_coef", |arg| arg.help("The weight of the reference: 0 is online IPO, above it IPO-MD"))
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    workload: WorkloadOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    /// Optimiser steps.
    #[arg(long, default_value_t = 12)]
    steps: u64,
    #[command(flatten)]
    overrides: Overrides,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    ensure!(
        arguments.steps > WARM_UP_STEPS + 1,
        "--steps must be at least {}: the first {WARM_UP_STEPS} are not measured",
        WARM_UP_STEPS + 2
    );
    let Arguments {
        workload, sampling, ..
    } = arguments;
    let folder = workload.folder()?;
    let directory = tempfile::tempdir().context("failed to make a folder for the run")?;
    let prompts = directory.path().join("prompts.jsonl");
    std::fs::write(&prompts, rows(workload, &folder)?).context("failed to write the prompts")?;
    let config = directory.path().join("bench.toml");
    let text = configuration(arguments, &folder.path, &prompts)?;
    let resolved = resolve(&text, "agon bench train", &arguments.overrides.set)?;
    std::fs::write(&config, resolved.toml).context("failed to write the configuration")?;
    let run = directory.path().join("run");
    train(&config, &run)?;
    let measured = RunThroughput::read(&run.join("metrics.jsonl"))?;
    let machine = Roofline::measure(&Device::Cpu, DType::F32)?;
    let cost = TokenCost::of(&folder.config);
    let operations = operations(workload, &cost, measured.tokens_per_pair);
    Ok(json!({
        "bench": "train",
        "model_parameters": folder.config.parameter_count(),
        "batch": workload.batch,
        "prompt": workload.prompt,
        "new_tokens": workload.new_tokens,
        "precision": sampling.precision.name(),
        "mixture_coef": sampling.mixture_coef,
        "pairs_per_second": measured.pairs_per_second,
        "tokens_per_second": measured.pairs_per_second * measured.tokens_per_pair,
        "mean_length": measured.tokens_per_pair / 2.0,
        "idle_ratio": measured.idle_ratio,
        "roofline_share": measured.pairs_per_second * operations / machine.flops,
        "peak_gib": measured.peak_gib,
        "machine_gflops": machine.flops / 1e9,
    }))
}

/// Operations of a pair with this many completion tokens: sampling with both models, forward and backward pass.
fn operations(workload: &WorkloadOptions, cost: &TokenCost, tokens: f64) -> f64 {
    let prompt = workload.prompt as f64;
    let per_token = cost.blocks + cost.head + cost.attention * (prompt + tokens / 4.0);
    let sampling = 2.0 * (prompt * cost.blocks + tokens * per_token);
    let training = 3.0 * (prompt * cost.blocks + tokens * per_token);
    sampling + training
}

/// Prompts of random tokens, as text; the tokenizer may split it into other tokens.
fn rows(workload: &WorkloadOptions, folder: &ModelFolder) -> anyhow::Result<String> {
    let mut rows = String::new();
    for row in 0..256 {
        let ids: Vec<u32> = (0..workload.prompt)
            .map(|i| token(&folder.config, row * workload.prompt + i))
            .collect();
        let text = folder.tokenizer.decode(&ids);
        writeln!(rows, "{}", json!({ "prompt": text }))?;
    }
    Ok(rows)
}

fn configuration(arguments: &Arguments, model: &Path, prompts: &Path) -> anyhow::Result<String> {
    let path = |path: &Path| -> anyhow::Result<Value> {
        let path = std::path::absolute(path).context("failed to make the path absolute")?;
        Ok(json!(path.display().to_string()))
    };
    let WorkloadOptions {
        batch,
        prompt,
        new_tokens,
        ..
    } = &arguments.workload;
    let SamplingOptions {
        precision,
        mixture_coef,
    } = &arguments.sampling;
    let steps = arguments.steps;
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
        model = path(model)?,
        prompts = path(prompts)?,
        slots = (2 * batch).min(MAX_SLOTS),
        longest = 4 * prompt,
        precision = precision.name(),
        trained = precision.training().name(),
    ))
}

fn train(config: &Path, run: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::current_exe().context("failed to find this binary")?);
    command.arg("train").arg(config).arg("--run-dir").arg(run);
    let output = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output();
    let output = output.context("failed to start the run")?;
    ensure!(
        output.status.success(),
        "the run failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Throughput of a run after its warm-up, from its metrics.
struct RunThroughput {
    pairs_per_second: f64,
    tokens_per_pair: f64,
    idle_ratio: f64,
    peak_gib: f64,
}

impl RunThroughput {
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
        let steady = steps.get(WARM_UP_STEPS as usize..).unwrap_or_default();
        ensure!(!steady.is_empty(), "the run ended during the warm-up");
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
