//! `agon bench rollout`: throughput of sampling.

use messages::Seed;
use model::{
    Adapter, LanguageModel, LoraConfig, MixtureSampler, Precision, Request, Sampler,
    SamplingSettings, roofline::Roofline,
};
use serde_json::{Value, json};

use crate::cli::bench::{
    DeviceOptions, SamplingOptions, TimingOptions, WorkloadOptions,
    cost::{TokenCost, token},
    peak_gib,
};

/// Measure sampling: prompts of random tokens, all completions in one batch and of full length.
///
/// tokens_per_second counts new tokens. roofline_share is the share of the device's limit: the operations at
/// the measured throughput of matrix multiplication in --dtype on --device, or reading the weights once per token
/// at that device's measured memory bandwidth, whichever is slower. On the CPU --precision decides the bytes of a
/// weight, elsewhere --dtype does. peak_gib is the peak memory of this process, without that of the device.
///
/// Example: agon bench rollout --model DIR --batch 32 --mixture-coef 0.125 --json
///
/// Example: agon bench rollout --model DIR --device cuda --dtype bf16 --batch 256 --json
#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Arguments {
    #[command(flatten)]
    workload: WorkloadOptions,
    #[command(flatten)]
    placement: DeviceOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    timing: TimingOptions,
    /// Rank of the policy's adapter (LoRA), beside which the reference is the policy without it; 0: none.
    #[arg(long, default_value_t = 0)]
    lora_rank: usize,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    let Arguments {
        workload,
        placement,
        sampling: options,
        timing,
        lora_rank,
    } = arguments;
    placement.check_precision(options.precision.name())?;
    let (folder, base) = workload.open(placement)?;
    let base = base.packed(Precision::from(options.precision))?;
    let (device, dtype) = (base.device().clone(), base.dtype());
    let config = &folder.config;
    let is_mixture = options.mixture_coef > 0.0;
    let policy = match lora_rank {
        0 => base.clone(),
        rank => adapted(&base, *rank)?,
    };
    let sampling = SamplingSettings {
        precision: Precision::from(options.precision),
        ..SamplingSettings::plain(workload.new_tokens)
    };
    let capacity = workload.prompt + workload.new_tokens;
    let reference = is_mixture.then_some(base);
    let mut sampler = MixtureSampler::new(policy, reference, sampling, workload.batch, capacity)?;
    let seconds = timing.measure(&device, |round| {
        for key in 0..workload.batch {
            let ids = (0..workload.prompt).map(|i| token(config, key * workload.prompt + i));
            sampler.admit(Request {
                key: key as u64,
                ids: ids.collect(),
                seed: Seed(round).derive(key as u64),
                mixture_coefs: vec![options.mixture_coef],
                exact: 0,
                max_new_tokens: workload.new_tokens,
                records_reference: false,
            })?;
        }
        while !sampler.is_idle() {
            sampler.step()?;
        }
        Ok(())
    })?;
    let machine = Roofline::measure(&device, dtype)?;
    let cost = TokenCost::of(config);
    let tokens = (workload.batch * workload.new_tokens) as f64;
    let bytes = match device.is_cpu() {
        true => options.precision.bytes(),
        false => dtype.size_in_bytes() as f64,
    };
    let min_seconds = min_seconds(arguments, &cost, machine, bytes);
    Ok(json!({
        "bench": "rollout",
        "model_parameters": config.parameter_count(),
        "batch": workload.batch,
        "prompt": workload.prompt,
        "new_tokens": workload.new_tokens,
        "device": placement.device,
        "dtype": placement.dtype.name(),
        "precision": options.precision.name(),
        "mixture_coef": options.mixture_coef,
        "lora_rank": lora_rank,
        "tokens_per_second": tokens / seconds,
        "roofline_share": min_seconds / seconds,
        "peak_gib": peak_gib(),
        "machine_gflops": machine.flops / 1e9,
        "machine_gb_per_second": machine.bandwidth / 1e9,
    }))
}

/// The model with a fresh adapter of this rank on all linear layers.
fn adapted(base: &LanguageModel, rank: usize) -> anyhow::Result<LanguageModel> {
    let config = LoraConfig::new(rank, rank as f64, 0.0, &["all-linear".to_owned()]);
    let adapter = Adapter::fresh(config, base.config(), Seed(0), base.device())?;
    Ok(base.with_adapter(adapter)?)
}

/// Lower bound on the seconds of a batch, by the roofline model. A policy with an adapter and its reference read the same
/// weights once; the operations of the adapter are left out.
fn min_seconds(
    arguments: &Arguments,
    cost: &TokenCost,
    machine: Roofline,
    weight_bytes: f64,
) -> f64 {
    let (workload, sampling) = (&arguments.workload, &arguments.sampling);
    let models = if sampling.mixture_coef > 0.0 {
        2.0
    } else {
        1.0
    };
    let copies = if arguments.lora_rank > 0 { 1.0 } else { models };
    let (batch, prompt, new) = (
        workload.batch as f64,
        workload.prompt as f64,
        workload.new_tokens as f64,
    );
    let attended = |first: f64, last: f64| (last - first) * (first + last) / 2.0;
    // The last token is sampled but not read.
    let prefill = models * batch * (prompt * cost.blocks + attended(0.0, prompt) * cost.attention);
    let step = models * batch * (cost.blocks + cost.head);
    let attention = models * batch * attended(prompt, prompt + new) * cost.attention;
    let bytes = copies * cost.weights() * weight_bytes;
    machine.min_seconds(prefill + attention, bytes) + new * machine.min_seconds(step, bytes)
}
