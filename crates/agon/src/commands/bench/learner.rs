//! `agon bench learner`: how fast the policy is trained on pairs that are there.

use std::{collections::BTreeMap, sync::Arc};

use learner::{StepOutcome, Trainer};
use messages::{
    Completion, Finish, JudgeVersion, Label, LabelledPair, Pair, Probability, Prompt, PromptId,
    Purpose, Release, Seed, WeightsVersion,
};
use model::ModelConfig;
use model::roofline::Roofline;
use serde_json::{Value, json};
use settings::resolve;
use telemetry::Measurements;

use super::shape::{Cost, Subject, token};

/// How fast the policy is trained: whole optimiser steps of online IPO on pairs of random tokens, each pair's
/// prompt shared by its two completions.
///
/// Without further options 16 completions of 128 tokens, all of them scored. tokens_per_second counts the
/// tokens of completions; seconds are those of the last step's parts; roofline_share is the share of the rate
/// of f32 products, measured now, that the operations of forward and backward come to.
///
/// Example: agon bench learner --model DIR --batch 16 --prompt 16 --new-tokens 64 --json
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Arguments {
    #[command(flatten)]
    subject: Subject,
    /// Completions to a step, two to a pair.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 1)]
    prompt: usize,
    /// Tokens of a completion.
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// The numbers that products with weights are taken of: f32 or bf16.
    #[arg(long, value_parser = ["f32", "bf16"], default_value = "f32")]
    precision: String,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    let (folder, policy) = arguments.subject.open()?;
    let (config, cost) = (folder.config.clone(), Cost::of(&folder.config));
    let settings = format!("[learner]\nprecision = \"{}\"\n", arguments.precision);
    let settings = resolve(&settings, "the bench", &[])?.settings.learner;
    let mut trainer = Trainer::new(Arc::new(folder), &policy, &settings, Seed(0))?;
    let pairs: Vec<LabelledPair> = (0..arguments.batch / 2)
        .map(|index| pair(arguments, &config, index))
        .collect();
    let mut last = Measurements::default();
    let seconds = arguments
        .subject
        .measure(|step| match trainer.step(&pairs, step)? {
            StepOutcome::Taken(measurements, _) => {
                last = measurements;
                Ok(())
            }
            StepOutcome::Refused(_) => anyhow::bail!("a step was not finite"),
        })?;
    let parts = ["forward", "backward", "optimizer"];
    let parts = parts.map(|part| (part, last.get(&format!("time/{part}"))));
    let machine = Roofline::measure()?;
    let (pairs, new) = (pairs.len() as f64, arguments.new_tokens as f64);
    let prompt = arguments.prompt as f64;
    let read = pairs * (prompt + 2.0 * (new - 1.0));
    let seen = pairs * (prompt * prompt / 2.0 + 2.0 * new * (prompt + new / 2.0));
    let operations =
        3.0 * (read * cost.blocks + 2.0 * pairs * new * cost.head + seen * cost.attention);
    Ok(json!({
        "bench": "learner",
        "model_parameters": config.parameter_count(),
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "precision": arguments.precision,
        "tokens_per_second": 2.0 * pairs * new / seconds,
        "pairs_per_second": pairs / seconds,
        "seconds": BTreeMap::from(parts),
        "roofline_share": operations / machine.products / seconds,
        "peak_gib": super::peak_gib(),
        "machine_gflops": machine.products / 1e9,
    }))
}

fn pair(arguments: &Arguments, config: &ModelConfig, index: usize) -> LabelledPair {
    let id = PromptId(index as u64);
    let tokens = |first: usize, count: usize| -> Vec<u32> {
        let first = first * 1009 + index * 4001;
        (first..first + count).map(|i| token(config, i)).collect()
    };
    let completion = |first| Completion {
        ids: tokens(first, arguments.new_tokens),
        finish: Finish::Length,
        mixture_coef: 0.0,
        logp: vec![-10.0; arguments.new_tokens],
        ref_logp: vec![-10.0; arguments.new_tokens],
        behaviour_logp: vec![-10.0; arguments.new_tokens],
        text: String::new(),
    };
    let version = WeightsVersion::REFERENCE;
    LabelledPair {
        pair: Pair {
            prompt: Prompt {
                id,
                release: Release::single(id),
                purpose: Purpose::Train,
                version,
                seed: Seed(0),
                ids: tokens(0, arguments.prompt),
                text: String::new(),
                dialogue: None,
                golden: None,
                answer: None,
            },
            completions: vec![completion(1), completion(2)],
            version,
            actor: "bench".into(),
        },
        labels: vec![Label {
            first: 0,
            second: 1,
            p: Probability::HALF,
        }],
        judge: "bench".into(),
        judge_version: JudgeVersion(0),
        scores: None,
        gold: None,
    }
}
