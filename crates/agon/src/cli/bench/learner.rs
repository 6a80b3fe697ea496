//! `agon bench learner`: throughput of training on given pairs.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context;
use learner::{ReferenceLogprobs, StepOutcome, Trainer, file_pair_id};
use messages::{
    Completion, Digest, Finish, JudgeVersion, Label, LabelledPair, Pair, Probability, Prompt,
    PromptBatch, PromptId, Purpose, Seed, WeightsVersion,
};
use model::roofline::Roofline;
use model::{DType, ModelConfig};
use serde_json::{Value, json};
use settings::resolve;
use telemetry::Measurements;

use crate::cli::bench::{
    DeviceOptions, TimingOptions, TrainingPrecision, WorkloadOptions,
    cost::{TokenCost, token},
    peak_gib,
};

/// Measure training: optimiser steps of online IPO on pairs of random tokens; the two completions of a pair share
/// their prompt.
///
/// By default 16 completions of 128 tokens. tokens_per_second counts the tokens of completions; seconds are those
/// of the phases of the last step; roofline_share is the operations of forward and backward pass as a share of
/// the measured throughput of matrix multiplication in --dtype on --device. peak_gib is the peak memory of this
/// process, without that of the device.
///
/// Example: agon bench learner --model DIR --batch 16 --prompt 16 --new-tokens 64 --json
///
/// Example: agon bench learner --model DIR --device cuda --dtype bf16 --batch 64 --json
#[derive(clap::Args)]
#[group(skip)]
#[command(
    mut_arg("batch", |arg| arg.help("Completions per optimiser step, two per pair")),
    mut_arg("prompt", |arg| arg.default_value("1")),
    mut_arg("new_tokens", |arg| arg.default_value("128"))
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    workload: WorkloadOptions,
    #[command(flatten)]
    placement: DeviceOptions,
    #[command(flatten)]
    timing: TimingOptions,
    /// Precision of matrix products with weights on the CPU.
    #[arg(long, value_enum, default_value = "f32")]
    precision: TrainingPrecision,
    /// Train on pairs of a file: the reference's log-probabilities are computed in the first step and kept, and the
    /// other steps compute the policy alone.
    #[arg(long)]
    file_pairs: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    let Arguments {
        workload,
        placement,
        timing,
        precision,
        file_pairs,
    } = arguments;
    let precision = precision.name();
    placement.check_precision(precision)?;
    let (folder, policy) = workload.open(placement)?;
    let (config, cost) = (folder.config.clone(), TokenCost::of(&folder.config));
    let (device, dtype) = (policy.device().clone(), policy.dtype());
    let settings = format!("[learner]\nprecision = \"{precision}\"\n");
    let settings = resolve(&settings, "agon bench", &[])?.settings.learner;
    // As in a run: beside a policy in bf16 the reference has all roundings in common with it.
    let start = match dtype {
        DType::F32 => policy.packed(model::training_precision(settings.precision))?,
        _ => policy.clone(),
    };
    let trainer = Trainer::new(Arc::new(folder), &policy, &settings, Seed(0))?;
    let mut trainer = trainer.with_start(&start);
    drop(policy);
    let mut pairs: Vec<LabelledPair> = (0..workload.batch / 2)
        .map(|index| pair(workload, &config, index))
        .collect();
    let directory = tempfile::tempdir().context("failed to make a folder")?;
    if *file_pairs {
        for (index, pair) in (0..).zip(&mut pairs) {
            pair.pair.prompt.id = file_pair_id(index);
        }
        // Nothing saves them: the file is never written.
        trainer.keep_reference_logprobs(ReferenceLogprobs {
            path: directory.path().join("reference_logprobs.bin"),
            key: Digest::of(&[]),
        });
    }
    let mut last = Measurements::default();
    let seconds = timing.measure(&device, |step| match trainer.step(&pairs, step)? {
        StepOutcome::Applied(measurements, _) => {
            last = measurements;
            Ok(())
        }
        StepOutcome::Rejected(_) => anyhow::bail!("a step was not finite"),
    })?;
    let phases = ["forward", "backward", "optimizer"];
    let phases = phases.map(|phase| (phase, last.get(&format!("time/{phase}"))));
    let machine = Roofline::measure(&device, dtype)?;
    let (pairs, new) = (pairs.len() as f64, workload.new_tokens as f64);
    let prompt = workload.prompt as f64;
    let read = pairs * (prompt + 2.0 * (new - 1.0));
    let attended = pairs * (prompt * prompt / 2.0 + 2.0 * new * (prompt + new / 2.0));
    let operations =
        3.0 * (read * cost.blocks + 2.0 * pairs * new * cost.head + attended * cost.attention);
    Ok(json!({
        "bench": "learner",
        "model_parameters": config.parameter_count(),
        "batch": workload.batch,
        "prompt": workload.prompt,
        "new_tokens": workload.new_tokens,
        "device": placement.device,
        "dtype": placement.dtype.name(),
        "precision": precision,
        "file_pairs": file_pairs,
        "tokens_per_second": 2.0 * pairs * new / seconds,
        "pairs_per_second": pairs / seconds,
        "seconds": BTreeMap::from(phases),
        "roofline_share": operations / machine.flops / seconds,
        "peak_gib": peak_gib(),
        "machine_gflops": machine.flops / 1e9,
    }))
}

fn pair(workload: &WorkloadOptions, config: &ModelConfig, index: usize) -> LabelledPair {
    let id = PromptId(index as u64);
    let tokens = |first: usize, count: usize| -> Vec<u32> {
        let first = first * 1009 + index * 4001;
        (first..first + count).map(|i| token(config, i)).collect()
    };
    let completion = |first| Completion {
        ids: tokens(first, workload.new_tokens),
        finish: Finish::Length,
        mixture_coef: 0.0,
        logp: vec![-10.0; workload.new_tokens],
        ref_logp: vec![-10.0; workload.new_tokens],
        behaviour_logp: vec![-10.0; workload.new_tokens],
        text: String::new(),
    };
    let version = WeightsVersion::REFERENCE;
    LabelledPair {
        pair: Pair {
            prompt: Prompt {
                id,
                prompt_batch: PromptBatch::single(id),
                purpose: Purpose::Train,
                version,
                seed: Seed(0),
                ids: tokens(0, workload.prompt),
                text: String::new(),
                dialogue: None,
                golden: None,
                answer: None,
                route: None,
            },
            completions: vec![completion(1), completion(2)],
            version,
            actor: "bench".into(),
        },
        labels: vec![Label {
            first: 0,
            second: 1,
            p: Probability::HALF,
            judged: None,
        }],
        judge: "bench".into(),
        judge_version: JudgeVersion(0),
        scores: None,
        verdicts: Vec::new(),
    }
}
