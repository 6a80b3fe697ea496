//! `agon bench`: throughput of single components on this machine.

mod cost;
mod learner;
mod preference;
mod rollout;
mod train;
mod transport;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use hub::CancelToken;
use model::{Device, LanguageModel, ModelFolder, Precision, StopTokens};
use serde_json::Value;
use settings::ModelSource;

use crate::{cli::model_args::DtypeArgument, exit_code::UsageError};

/// Measure the throughput of a component on this machine.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    benchmark: Benchmark,
    /// Print one line of JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum Benchmark {
    Rollout(rollout::Arguments),
    Learner(learner::Arguments),
    Train(train::Arguments),
    Preference(preference::Arguments),
    Transport(transport::Arguments),
}

// The options have no doc comment: clap would show it in place of the command's own.

// Model and size of the workload. Commands with other defaults or units change them with `mut_arg`.
#[derive(clap::Args)]
struct WorkloadOptions {
    /// The model: a Hugging Face folder, a GGUF file, or hf:ORG/NAME@REVISION.
    #[arg(long, value_name = "MODEL")]
    model: ModelSource,
    /// Completions sampled at once, each with its own prompt.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens per prompt.
    #[arg(long, default_value_t = 16)]
    prompt: usize,
    /// Tokens per completion.
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
}

// Device and dtype of the model.
#[derive(clap::Args)]
struct DeviceOptions {
    /// The device of the model: `cpu`, `cuda`, `cuda:N` or `metal`.
    #[arg(long, default_value = CPU)]
    device: String,
    /// Dtype of weights and activations.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeArgument,
}

#[derive(clap::Args)]
struct SamplingOptions {
    /// Precision of the weights for sampling.
    #[arg(long, value_enum, default_value = "f32")]
    precision: SamplingPrecision,
    /// The weight of the reference, a second model of the same shape, in the sampled mixture; 0: no reference.
    #[arg(long, default_value_t = 0.125)]
    mixture_coef: f32,
}

#[derive(clap::Args)]
struct TimingOptions {
    /// Seconds to measure, after a warm-up round.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

/// Name of the device whose matrix products have a precision of their own.
const CPU: &str = "cpu";

/// Precision of the weights for sampling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SamplingPrecision {
    F32,
    Bf16,
    Int8,
}

/// Precision of matrix products with weights in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TrainingPrecision {
    F32,
    Bf16,
}

impl TrainingPrecision {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl SamplingPrecision {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Precision of training to go with it: int8 is inference-only.
    fn training(self) -> TrainingPrecision {
        match self {
            Self::F32 => TrainingPrecision::F32,
            Self::Bf16 | Self::Int8 => TrainingPrecision::Bf16,
        }
    }

    /// Bytes per weight, as stored for sampling on the CPU.
    fn bytes(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::Bf16 => 2.0,
            Self::Int8 => 1.0,
        }
    }
}

impl From<SamplingPrecision> for Precision {
    fn from(precision: SamplingPrecision) -> Self {
        match precision {
            SamplingPrecision::F32 => Self::F32,
            SamplingPrecision::Bf16 => Self::Bf16,
            SamplingPrecision::Int8 => Self::Int8,
        }
    }
}

impl WorkloadOptions {
    /// The model's folder; it is downloaded or unpacked first.
    fn folder(&self) -> anyhow::Result<ModelFolder> {
        let path = hub::folder(&self.model, &CancelToken::never())?;
        Ok(ModelFolder::open(&path, None)?)
    }

    /// The model on its device, without stop tokens, so that all completions have the same length.
    fn open(&self, options: &DeviceOptions) -> anyhow::Result<(ModelFolder, LanguageModel)> {
        let device = model::device(&options.device)?;
        let mut folder = self.folder()?;
        folder.config.stops = StopTokens::default();
        let weights = folder.weights(options.dtype.into(), &device)?;
        let model = LanguageModel::new(folder.config.clone(), weights)?;
        Ok((folder, model))
    }
}

impl DeviceOptions {
    /// Checks that a precision other than f32, which is one of the CPU's kernels, is for the CPU.
    fn check_precision(&self, precision: &str) -> Result<(), UsageError> {
        let kind = self.device.split(':').next();
        if kind == Some(CPU) || precision == DtypeArgument::F32.name() {
            return Ok(());
        }
        Err(UsageError(format!(
            "--precision {precision} is for the CPU; on {} use --dtype bf16",
            self.device
        )))
    }
}

impl TimingOptions {
    /// Median seconds of a round, over at least three. A round ends when `device` has finished its work.
    fn measure(
        &self,
        device: &Device,
        mut round: impl FnMut(u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<f64> {
        let mut round = |index| {
            round(index)?;
            device
                .synchronize()
                .context("failed to wait for the device")
        };
        round(0)?;
        let (clock, mut durations) = (Instant::now(), Vec::new());
        let time = Duration::from_secs_f64(self.seconds);
        while durations.len() < 3 || clock.elapsed() < time {
            let started = Instant::now();
            round(1 + durations.len() as u64)?;
            durations.push(started.elapsed().as_secs_f64());
        }
        durations.sort_by(f64::total_cmp);
        Ok(durations[durations.len() / 2])
    }
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let report = match &arguments.benchmark {
        Benchmark::Rollout(arguments) => rollout::run(arguments)?,
        Benchmark::Learner(arguments) => learner::run(arguments)?,
        Benchmark::Train(arguments) => train::run(arguments)?,
        Benchmark::Preference(arguments) => preference::run(arguments)?,
        Benchmark::Transport(arguments) => transport::run(arguments)?,
    };
    if arguments.json {
        out!("{report}")?;
    } else {
        print(&report, "")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints one line per value; keys of nested objects are joined by dots.
fn print(report: &Value, name: &str) -> std::io::Result<()> {
    match report {
        Value::Object(entries) => {
            for (key, value) in entries {
                let inner = if name.is_empty() {
                    key.clone()
                } else {
                    format!("{name}.{key}")
                };
                print(value, &inner)?;
            }
        }
        Value::Number(number) if number.is_f64() => {
            out!("{name:32} {:.4}", number.as_f64().unwrap_or(f64::NAN))?;
        }
        Value::String(text) => out!("{name:32} {text}")?,
        other => out!("{name:32} {other}")?,
    }
    Ok(())
}

/// Peak memory of this process in GiB.
fn peak_gib() -> Option<f64> {
    telemetry::peak_memory_bytes().map(|bytes| bytes as f64 / f64::from(1 << 30))
}
