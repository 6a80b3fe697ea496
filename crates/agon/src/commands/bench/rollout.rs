//! `agon bench rollout`: how fast completions are written.

use messages::Seed;
use model::{CompletionWriter, Precision, Request, Sampler, SamplingSettings, roofline::Roofline};
use serde_json::{Value, json};

use super::shape::{Cost, Numbers, Subject, token};

/// How fast completions are written: prompts of random tokens, all completions at once and of full length.
///
/// tokens_per_second counts new tokens. roofline_share is the share of what the machine could do at most:
/// the operations at the rate of f32 products, or reading the weights once a token, whichever is slower, both
/// measured now. peak_gib is the largest memory of this process.
///
/// Example: agon bench rollout --model DIR --batch 32 --mixture-coef 0.125 --json
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Arguments {
    #[command(flatten)]
    subject: Subject,
    /// Completions written at once, each of a prompt of its own.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 16)]
    prompt: usize,
    /// Tokens of a completion.
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
    /// How weights are kept while completions are written.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Numbers,
    /// The weight on the reference, a second model of the same shape; 0: there is none.
    #[arg(long, default_value_t = 0.125)]
    mixture_coef: f32,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    let (folder, policy) = arguments.subject.open()?;
    let config = &folder.config;
    let mixed = arguments.mixture_coef > 0.0;
    let sampling = SamplingSettings {
        precision: Precision::from(arguments.precision),
        ..SamplingSettings::plain(arguments.new_tokens)
    };
    let capacity = arguments.prompt + arguments.new_tokens;
    let reference = mixed.then(|| policy.clone());
    let mut sampler = Sampler::new(policy, reference, sampling, arguments.batch, capacity)?;
    let seconds = arguments.subject.measure(|round| {
        for key in 0..arguments.batch {
            let ids = (0..arguments.prompt).map(|i| token(config, key * arguments.prompt + i));
            sampler.admit(Request {
                key: key as u64,
                ids: ids.collect(),
                seed: Seed(round).derive(key as u64),
                mixture_coefs: vec![arguments.mixture_coef],
                exact: 0,
                max_new_tokens: arguments.new_tokens,
            })?;
        }
        while !sampler.is_idle() {
            sampler.step()?;
        }
        Ok(())
    })?;
    let machine = Roofline::measure()?;
    let cost = Cost::of(config);
    let tokens = (arguments.batch * arguments.new_tokens) as f64;
    let least = least(arguments, &cost, machine);
    Ok(json!({
        "bench": "rollout",
        "model_parameters": config.parameter_count(),
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "precision": arguments.precision.name(),
        "mixture_coef": arguments.mixture_coef,
        "tokens_per_second": tokens / seconds,
        "roofline_share": least / seconds,
        "peak_gib": super::peak_gib(),
        "machine_gflops": machine.products / 1e9,
        "machine_gb_per_second": machine.bandwidth / 1e9,
    }))
}

/// The seconds that a batch takes at least.
fn least(arguments: &Arguments, cost: &Cost, machine: Roofline) -> f64 {
    let models = if arguments.mixture_coef > 0.0 {
        2.0
    } else {
        1.0
    };
    let (batch, prompt, new) = (
        arguments.batch as f64,
        arguments.prompt as f64,
        arguments.new_tokens as f64,
    );
    let seen = |first: f64, last: f64| (last - first) * (first + last) / 2.0;
    // The last token is drawn and not read.
    let read = batch * (prompt * cost.blocks + seen(0.0, prompt) * cost.attention);
    let step = batch * (cost.blocks + cost.head);
    let attention = batch * seen(prompt, prompt + new) * cost.attention;
    let weights = cost.weights() * arguments.precision.bytes();
    let steps = new * machine.least(step, weights);
    models * (machine.least(read + attention, weights) + steps)
}
