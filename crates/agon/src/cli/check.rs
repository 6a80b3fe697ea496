//! `agon check`: validation of a configuration without starting a run.
//!
//! The resolved configuration is written to standard output, as in the run directory; findings on models, memory and
//! files are written to standard error. Memory is estimated from shapes and settings, not measured.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;
use model::{ModelConfig, Precision, PublishedForm};
use settings::{
    DtypeSetting, EngineSettings, JudgeSettings, ObjectiveSettings, PrecisionSetting,
    ReferenceSettings, Settings, TransportSettings,
};

use crate::cli::config_args::Configuration;
use crate::{
    assembly::{self, Preflight, PreflightFinding, PreflightScope},
    exit_code::{Refused, sentence},
    run::weights_form,
};

/// Bytes of the program without a model: code, runtime, threads.
const PROGRAM_BYTES: u64 = 40 << 20;
/// Bytes of a tokenizer's tables for each token of its vocabulary.
const TOKEN_BYTES: usize = 1024;
/// Bytes of a weight in mistral.rs: f32 whatever the dtype.
const MISTRAL_BYTES: usize = 4;
/// Bytes of an element of Adam's moments: f32 whatever the dtype.
const MOMENT_BYTES: usize = 4;
/// Bytes of an adapter's weight: f32 whatever the dtype.
const ADAPTER_BYTES: usize = 4;
/// Bytes of a master weight: f32 whatever the dtype.
const MASTER_BYTES: usize = 4;
/// Bytes of a logit: f32.
const LOGIT_BYTES: usize = 4;

/// Resolve and validate a configuration without starting a run.
///
/// Prints the resolved configuration with every key to standard output, and to standard error the model's shape,
/// an estimate of the memory of a run, and a finding on everything that the configuration names: models,
/// adapters, templates, the rows of prompts and pairs, judges, secrets, addresses. `agon train` fails on the same
/// findings with the same messages: exit code 2 if the configuration holds mistakes, 3 if something is missing
/// or does not fit; all are listed. Writes no file and reads no weights. A model of the Hub (hf:ORG/NAME) must be
/// in the cache or exist on the Hub; it is not downloaded.
///
/// Example: agon check configs/quickstart.toml --set actor.slots=128 > resolved.toml
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let mut output = io::stdout().lock();
    output
        .write_all(resolved.toml.as_bytes())
        .and_then(|()| output.flush())
        .context("failed to write to standard output")?;
    let settings = &resolved.settings;
    let path = settings.run.output_dir.join(&settings.run.name);
    let report = CheckReport::of(settings, &path);
    note!("{}", telemetry::printable(report.text.trim_end()));
    Ok(match report.errors.0.as_slice() {
        [] => ExitCode::SUCCESS,
        _ => report.errors.code().into(),
    })
}

/// Findings on a configuration, as text and as errors.
struct CheckReport {
    text: String,
    errors: Refused,
}

impl CheckReport {
    /// Findings on a run in the directory `path`.
    fn of(settings: &Settings, path: &Path) -> Self {
        let mut report = Self {
            text: String::new(),
            errors: Refused(Vec::new()),
        };
        let preflight = Preflight::of(settings, path, PreflightScope::AllRoles);
        for finding in preflight.findings {
            match finding {
                PreflightFinding::Usable(description) => report.line("ok", &description),
                PreflightFinding::Doubtful(reason) | PreflightFinding::Unneeded(reason) => {
                    report.line("warn", &reason);
                }
                PreflightFinding::Failed(error) => {
                    report.line("fail", &sentence(&error));
                    report.errors.0.push(error);
                }
            }
        }
        if let Some(config) = &preflight.config {
            if config.stops.is_empty() {
                report.line("warn", &format!("model: {}", assembly::NO_STOP_TOKENS));
            }
            let available = telemetry::describe_machine().memory_bytes;
            report.memory(&memory(settings, config), available);
        }
        if path.join("config.toml").exists() {
            let path = path.display();
            report.line(
                "warn",
                &format!(
                    "{path} holds a run: continue it with --resume, or choose another run.name"
                ),
            );
        }
        report
    }

    fn line(&mut self, severity: &str, text: &str) {
        // Writing to a string does not fail.
        writeln!(self.text, "{severity:<5}{text}").ok();
    }

    /// Lists the parts; warns if they need more than is `available` to a process, in bytes.
    fn memory(&mut self, parts: &[MemoryPart], available: Option<u64>) {
        let bytes = parts
            .iter()
            .fold(0u64, |sum, part| sum.saturating_add(part.bytes));
        let total = mebibytes(bytes);
        if let Some(available) = available.filter(|&available| bytes > available) {
            let available = mebibytes(available);
            let reason = format!(
                "memory: {total} MiB are more than the {available} MiB that this machine, or its cgroup, has: lower what is \
                 largest below, with actor.slots, actor.max_new_tokens or learner.max_tokens_per_micro_batch, or set \
                 model.lora_rank"
            );
            self.line("warn", &reason);
        }
        self.line(
            "ok",
            &format!("memory: about {total} MiB with all sequences at maximum length, in MiB:"),
        );
        for part in parts {
            let (name, size) = (part.name, mebibytes(part.bytes));
            self.line("", &format!("  {size:>12}  {name}"));
        }
    }
}

/// One contribution to the memory of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MemoryPart {
    name: &'static str,
    bytes: u64,
}

/// Tokens of the longest prompt with a response of a pair from a file; 0 without such pairs.
fn longest_file_pair(settings: &Settings, config: &ModelConfig) -> usize {
    match settings.pairs.is_used() {
        true => settings.pairs.max_length.min(config.max_positions),
        false => 0,
    }
}

/// Prompts of a forward and backward pass of the learner.
fn prompts_per_pass(settings: &Settings) -> usize {
    let learner = &settings.learner;
    let passes = learner.gradient_accumulation_steps.max(1);
    learner.train_batch_size.div_ceil(passes)
}

/// Tokens of a prompt of a pass with its completions, whose sequences have at most `longest` tokens; the completions share
/// the prompt. A pair from a file may be all response.
fn tokens_per_prompt(settings: &Settings, config: &ModelConfig, longest: usize) -> usize {
    let new = settings.actor.max_new_tokens.min(longest);
    let sampled = completions_per_prompt(settings).saturating_mul(new);
    let sampled = sampled.saturating_add(longest - new);
    sampled.max(longest_file_pair(settings, config).saturating_mul(2))
}

/// Tokens of a pass of the learner, of which each prompt has this number.
fn pass_tokens(settings: &Settings, prompt_tokens: usize) -> usize {
    let limit = match settings.learner.max_tokens_per_micro_batch {
        0 => usize::MAX,
        limit => limit.max(prompt_tokens),
    };
    limit.min(prompts_per_pass(settings).saturating_mul(prompt_tokens))
}

/// Tokens of a pass whose log-probabilities enter the loss: those of the completions.
fn predicted_tokens(settings: &Settings) -> usize {
    let predicted = product(&[&[
        prompts_per_pass(settings),
        completions_per_prompt(settings),
        settings.actor.max_new_tokens,
    ]]);
    usize::try_from(predicted).unwrap_or(usize::MAX)
}

/// Estimated peak memory of a run of all roles in one process, by contribution.
fn memory(settings: &Settings, config: &ModelConfig) -> Vec<MemoryPart> {
    let bytes = element_bytes(settings);
    let weights = [config.parameter_count(), bytes];
    // An adapter is trained in f32 on weights that policy and reference share.
    let (trained, trained_parameters) = match adapter_parameters(settings, config) {
        Some(count) => ([count, ADAPTER_BYTES], count),
        None => (weights, config.parameter_count()),
    };
    // Trained bf16 weights have master weights in f32.
    let is_half = trained == weights && bytes == 2;
    let masters = if is_half { trained_parameters } else { 0 };
    let moments = product(&[&[2, trained_parameters, MOMENT_BYTES]]);
    let of_training = [
        ("program and tokenizer", program(config)),
        ("policy's weights", product(&[&trained])),
        ("gradients", product(&[&trained])),
        ("Adam's moments", moments),
        (
            "master weights in f32",
            product(&[&[masters, MASTER_BYTES]]),
        ),
        ("reference's weights", reference_weights(settings, config)),
    ];
    let parts = of_training
        .into_iter()
        .chain(sampling_memory(settings, config, trained, bytes))
        .chain(pass_memory(settings, config, bytes))
        .chain([(
            "preference models but their weights (rough)",
            judge_memory(settings, config),
        )])
        .chain(followers(settings, trained, trained_parameters));
    let parts = parts.filter(|&(_, bytes)| bytes > 0);
    parts
        .map(|(name, bytes)| MemoryPart { name, bytes })
        .collect()
}

/// The longest sequence of a sampler: none exceeds the model's positions.
fn longest_sample(settings: &Settings, config: &ModelConfig) -> usize {
    let actor = &settings.actor;
    let longest = actor.max_prompt_length.saturating_add(actor.max_new_tokens);
    longest.min(config.max_positions)
}

/// Memory of the weights that travel to actors, of size `trained`, and of those that sample, with elements of `bytes`.
fn sampling_memory(
    settings: &Settings,
    config: &ModelConfig,
    trained: [usize; 2],
    bytes: usize,
) -> [(&'static str, u64); 5] {
    let tables = config.rope_table_elements(longest_sample(settings, config));
    let mistral_copies = match settings.actor.engine {
        EngineSettings::Own {} => 0,
        EngineSettings::Mistral { .. } => settings.actor_count(),
    };
    let mistral = [config.parameter_count(), MISTRAL_BYTES, mistral_copies];
    [
        // One of the policy, one of the reference.
        ("RoPE tables", product(&[&[2, tables, bytes]])),
        (
            "actors' copies of the policy",
            product(&[&trained, &[copies_of_actors(settings)]]),
        ),
        ("mistral.rs's copies of the policy", product(&[&mistral])),
        (
            "weights packed for sampling",
            packed_weights(settings, config),
        ),
        (
            "published weights",
            published_weights(settings, config, trained)
                .saturating_mul(published_copies(settings) as u64),
        ),
    ]
}

/// Bytes of an element of activations, and of weights that are not packed: frozen weights in bf16 below an adapter are, and
/// the rest is f32.
fn element_bytes(settings: &Settings) -> usize {
    match settings.model.dtype {
        DtypeSetting::Bf16 if held_precision(settings).is_none() => 2,
        _ => 4,
    }
}

/// Precision in which the weights that nothing trains are packed, if they are.
fn held_precision(settings: &Settings) -> Option<Precision> {
    assembly::frozen_precision(settings, trains_adapter(settings))
}

fn trains_adapter(settings: &Settings) -> bool {
    assembly::fresh_adapter(settings).is_some()
}

/// Bytes of all weights packed in this precision: embeddings stay in f32, beside a head that is the same matrix too.
fn packed_bytes(config: &ModelConfig, precision: Precision) -> u64 {
    let embedding = config.vocab_size * config.hidden_size;
    let packed = match config.tied_head {
        true => config.parameter_count(),
        false => config.parameter_count() - embedding,
    };
    product(&[&[packed, weight_bytes(precision)]])
        .saturating_add(product(&[&[embedding, weight_bytes(Precision::F32)]]))
}

fn weight_bytes(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
        Precision::Int8 => 1,
    }
}

/// Bytes of the reference, which are also those of the weights below an adapter.
fn reference_weights(settings: &Settings, config: &ModelConfig) -> u64 {
    match held_precision(settings) {
        Some(precision) => packed_bytes(config, precision),
        None => product(&[&[config.parameter_count(), element_bytes(settings)]]),
    }
}

/// Bytes of weights that are published once, of size `trained` unless they are packed.
fn published_weights(settings: &Settings, config: &ModelConfig, trained: [usize; 2]) -> u64 {
    match weights_form(settings, trains_adapter(settings)) {
        PublishedForm::Packed(precision) => packed_bytes(config, precision),
        PublishedForm::Tensors(_) => product(&[&trained]),
    }
}

/// Copies of the published weights that are held during a pass. In one process: of the newest version, and of one that an
/// actor may still use where it may be older. Over a network the learner holds the blob of the newest, and of the one that is
/// being published a copy and its blob.
fn published_copies(settings: &Settings) -> usize {
    let learner = &settings.learner;
    let is_old_used = learner.max_staleness > learner.weight_sync_steps;
    match settings.transport {
        TransportSettings::Memory {} => 1 + usize::from(is_old_used),
        TransportSettings::Jetstream(_) => 3,
    }
}

/// Number of copies of the published weights that actors hold: in one process they share those of the weight store, else
/// each has the old one in use while the new one is loaded.
fn copies_of_actors(settings: &Settings) -> usize {
    match settings.transport {
        TransportSettings::Memory {} => 0,
        TransportSettings::Jetstream(_) => 2 * settings.actor_count(),
    }
}

/// Memory of caches, and of a forward and backward pass with elements of this size.
fn pass_memory(
    settings: &Settings,
    config: &ModelConfig,
    bytes: usize,
) -> [(&'static str, u64); 4] {
    let longest = longest_sample(settings, config);
    // On the CPU caches are in f32 beside weights in f32, and in bf16 beside coarser ones.
    let cached = match (settings.model.device.as_str(), settings.actor.precision) {
        ("cpu", PrecisionSetting::F32) => 4,
        ("cpu", PrecisionSetting::Bf16 | PrecisionSetting::Int8) => 2,
        _ => bytes,
    };
    let keys_and_values = [2, config.layers, config.kv_heads, config.head_dim, cached];
    // Every actor has one cache for the policy and one for the reference.
    let slots = [2, settings.actor_count(), settings.actor.slots, longest];
    let pass_tokens = pass_tokens(settings, tokens_per_prompt(settings, config, longest));
    let predicted = predicted_tokens(settings).min(pass_tokens);
    let replaced = gradients_in_place(settings, config, pass_tokens);
    [
        ("key-value caches", product(&[&slots, &keys_and_values])),
        (
            "activations of a pass, beyond gradients in their place",
            product(&[&[pass_tokens, activations(settings, config), bytes]])
                .saturating_sub(replaced),
        ),
        (
            "working memory of a pass (rough)",
            working_memory(settings, config),
        ),
        (
            "logits of a pass (rough)",
            logits(settings, config, predicted),
        ),
    ]
}

/// Bytes of the gradients that take the place of activations: where a step is one pass, a block's gradients are computed as
/// its activations are given up. Those of further passes are added to what is there.
fn gradients_in_place(settings: &Settings, config: &ModelConfig, pass_tokens: usize) -> u64 {
    let tokens = tokens_per_prompt(settings, config, longest_sample(settings, config));
    let prompts = settings.learner.train_batch_size;
    let has_one_pass = pass_tokens == prompts.saturating_mul(tokens);
    if !has_one_pass || trains_adapter(settings) {
        return 0;
    }
    let matrices = if config.tied_head { 1 } else { 2 };
    let outside = matrices * config.vocab_size * config.hidden_size;
    let blocks = config.parameter_count().saturating_sub(outside);
    product(&[&[blocks, element_bytes(settings)]])
}

/// Memory of the models that follow the policy, whose trained weights have these sizes: a moving average of it, which is
/// published to be evaluated, and a reference that moves, which is published with the policy.
fn followers(
    settings: &Settings,
    trained: [usize; 2],
    parameters: usize,
) -> [(&'static str, u64); 2] {
    let average = product(&[&[parameters, MASTER_BYTES]]);
    let when = |holds: bool, bytes: u64| if holds { bytes } else { 0 };
    // The learner's, and those that are published with the policy.
    let copies = 1 + published_copies(settings) + copies_of_actors(settings);
    let copies = product(&[&trained, &[copies]]);
    // An average is kept in f32; beside a copy there is the one before it, until the next step.
    let beside = match settings.reference {
        ReferenceSettings::Fixed {} => 0,
        ReferenceSettings::Every { .. } => copies,
        ReferenceSettings::Ema { .. } => average,
    };
    let moved = copies.saturating_add(beside);
    [
        (
            "moving average of the policy in f32",
            when(
                settings.learner.ema_decay > 0.0,
                average.saturating_add(product(&[&trained])),
            ),
        ),
        (
            "reference that moves",
            when(settings.reference.moves(), moved),
        ),
    ]
}

/// Bytes of the weights that actors pack for the CPU: of the policy and of the reference, which share them where they differ
/// by an adapter. Weights that are held packed as the actors read them are not packed again.
fn packed_weights(settings: &Settings, config: &ModelConfig) -> u64 {
    if !packs_for_sampling(settings) {
        return 0;
    }
    let precision = model::sampling_precision(settings.actor.precision);
    let shares_reference = held_precision(settings) == Some(precision);
    let form = weights_form(settings, trains_adapter(settings));
    let shares_policy = form == PublishedForm::Packed(precision);
    let models = match trains_adapter(settings) {
        true => usize::from(!shares_reference),
        false => usize::from(!shares_reference) + usize::from(!shares_policy),
    };
    let parts = [settings.actor_count(), models, config.parameter_count()];
    product(&[&parts, &[weight_bytes(precision)]])
}

/// Whether there are actors, and they pack weights for the CPU.
fn packs_for_sampling(settings: &Settings) -> bool {
    let is_own = matches!(settings.actor.engine, EngineSettings::Own {});
    settings.model.device == "cpu" && is_own && settings.actor_count() > 0
}

/// Bytes of preference models that judge in this process, taken to be of the policy's shape: of each a tokenizer, and of a
/// pass what a block computes, which is given up at its end.
fn judge_memory(settings: &Settings, config: &ModelConfig) -> u64 {
    let evaluation = &settings.evaluation;
    let evaluating = match evaluation.prompts {
        0 => 0,
        _ => evaluation.judge.values().map(preference_models).sum(),
    };
    let labelling = match settings.needs_judge() {
        true => preference_models(&settings.preference.judge),
        false => 0,
    };
    let count: usize = labelling + evaluating;
    let queries = config.heads * config.head_dim;
    let keys = config.kv_heads * config.head_dim;
    let block = 3 * config.hidden_size + 2 * queries + 2 * keys + 2 * config.intermediate_size;
    let pass = [preference::PASS_TOKENS, block, 4, count.min(1)];
    let tokenizers = [count, config.vocab_size, TOKEN_BYTES];
    product(&[&pass]).saturating_add(product(&[&tokenizers]))
}

/// Number of preference models of a judge.
fn preference_models(judge: &JudgeSettings) -> usize {
    match judge {
        JudgeSettings::BradleyTerry { .. } | JudgeSettings::Pairwise { .. } => 1,
        other => other.members().iter().map(preference_models).sum(),
    }
}

/// Bytes of the program itself, measured, and of the tokenizer's tables.
fn program(config: &ModelConfig) -> u64 {
    PROGRAM_BYTES + product(&[&[config.vocab_size, TOKEN_BYTES]])
}

/// Bytes of a pass's temporary tensors on the CPU, which grow with the head: once its size, as measured.
fn working_memory(settings: &Settings, config: &ModelConfig) -> u64 {
    match is_fused(settings) {
        true => product(&[&[config.vocab_size, config.hidden_size, 4]]),
        false => 0,
    }
}

/// Elements saved for the backward pass per token, in all blocks.
///
/// A fused block saves its input; queries, keys and values, before their norm too if they have one; the attention's output
/// and log-sums; the residual; gate and up projection. With gradient checkpointing only the inputs are kept, and one block's
/// activations exist at a time. Composed of single operations, a block saves the normalised inputs and the outputs too.
fn activations(settings: &Settings, config: &ModelConfig) -> usize {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    let has_dropout = settings.model.lora_rank > 0 && settings.model.lora_dropout > 0.0;
    if !is_fused(settings) || has_dropout {
        let block = 6 * width + 3 * queries + 3 * keys + 3 * inner;
        return config.layers * block;
    }
    let before_norm = if config.qk_norm { queries + keys } else { 0 };
    let block = 2 * width + 2 * queries + 2 * keys + before_norm + config.heads + 2 * inner;
    match settings.learner.gradient_checkpointing {
        true => config.layers * width + block,
        false => config.layers * block,
    }
}

/// Whether a block, and the head with the loss, are one operation each: on the CPU with activations in f32.
fn is_fused(settings: &Settings) -> bool {
    settings.model.device == "cpu" && element_bytes(settings) == 4
}

/// Number of parameters of the adapter; `None` if all weights are trained.
fn adapter_parameters(settings: &Settings, config: &ModelConfig) -> Option<usize> {
    assembly::fresh_adapter(settings)?
        .parameter_count(config)
        .ok()
}

/// Bytes of the logits and their log-softmax; 0 on the CPU in f32, where the head is fused with the loss.
fn logits(settings: &Settings, config: &ModelConfig, predicted: usize) -> u64 {
    if is_fused(settings) {
        return 0;
    }
    product(&[&[predicted, config.vocab_size, 2, LOGIT_BYTES]])
}

/// Completions per prompt: Nash-MD with policy gradients compares one of the policy with one of the mixture.
fn completions_per_prompt(settings: &Settings) -> usize {
    match settings.learner.objective {
        ObjectiveSettings::NashMdPg { .. } => 2,
        _ => settings.actor.num_generations,
    }
}

/// The product of all factors; saturates at `u64::MAX`.
fn product(factors: &[&[usize]]) -> u64 {
    let factors = factors.iter().copied().flatten();
    factors.fold(1, |product: u64, &factor| {
        product.saturating_mul(factor as u64)
    })
}

fn mebibytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    format!("{mebibytes:.1}")
}

#[cfg(test)]
mod tests {
    use playground::{Bandit, base_config_json};
    use settings::Override;

    use super::*;
    use crate::exit_code::Code;

    fn settings(sets: &[&str]) -> Settings {
        let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
        settings::resolve("", "test", &sets).unwrap().settings
    }

    fn report(sets: &[&str]) -> CheckReport {
        let folder = tempfile::tempdir().unwrap();
        CheckReport::of(&settings(sets), &folder.path().join("run"))
    }

    fn playground(settings: &Settings) -> ModelConfig {
        let inputs = &settings.playground;
        let raw = base_config_json(
            inputs.hidden_size,
            inputs.layers,
            inputs.heads,
            inputs.intermediate_size,
        );
        ModelConfig::from_json(raw, Path::new("[playground]")).unwrap()
    }

    /// A playground whose memory can be computed by hand.
    const SMALL: [&str; 10] = [
        "playground.hidden_size=8",
        "playground.layers=2",
        "playground.heads=2",
        "playground.intermediate_size=16",
        "actor.count=3",
        "actor.slots=4",
        "actor.max_prompt_length=10",
        "actor.max_new_tokens=6",
        "learner.train_batch_size=6",
        "learner.gradient_accumulation_steps=2",
    ];

    /// Parts of the memory of [`SMALL`] with further settings.
    fn small(more: &[&str]) -> Vec<u64> {
        let settings = settings(&[&SMALL[..], more].concat());
        let parts = memory(&settings, &playground(&settings));
        parts.into_iter().map(|part| part.bytes).collect()
    }

    /// Embedding and head 200 · 8; a block: 4 · 8² + 3 · 8 · 16 + 2 · 8; the last norm 8.
    const PARAMETERS: u64 = 2 * 200 * 8 + 2 * (256 + 384 + 16) + 8;
    /// 2 models · 3 actors · 4 slots · 16 tokens, of 2 · 2 blocks · 2 heads · 4 elements.
    const CACHED: u64 = 2 * 3 * 4 * 16 * 32;

    #[test]
    fn the_memory_of_a_small_playground_by_hand() {
        let (p, cached) = (PARAMETERS, CACHED);
        // 2 models · 128 positions · 4 elements.
        let rotary = 2 * 128 * 4;
        // 3 prompts · (10 + 2 · 6 tokens) · 2 blocks · (2·8 + 2·8 + 2·8 + 2 heads + 2·16).
        let active = 3 * 22 * 2 * 82;
        // Composed: 6·8 + 3·8 + 3·8 + 3·16.
        let composed = 3 * 22 * 2 * 144;
        // 40 MiB, and 1 KiB for each of 200 tokens.
        let program = 40 * 1024 * 1024 + 200 * 1024;
        let head = 200 * 8 * 4;
        let fused = [
            program,
            4 * p,
            4 * p,
            8 * p,
            // The reference is packed, and so is what is published: actors read both where they are.
            4 * p,
            4 * rotary,
            4 * p,
            4 * cached,
            4 * active,
            head,
        ];
        assert_eq!(small(&[]), fused);
        let mut sets = vec!["model.dtype=\"bf16\""];
        let logits = 3 * 2 * 6 * 200 * 2 * 4;
        let half = [
            program,
            2 * p,
            2 * p,
            8 * p,
            4 * p,
            2 * p,
            2 * rotary,
            // 3 actors · 2 models, which actors on the CPU pack in f32.
            3 * 2 * 4 * p,
            2 * p,
            // Actors on the CPU compute in f32.
            4 * cached,
            2 * composed,
            logits,
        ];
        assert_eq!(small(&sets), half);
        // An average in f32 and published; a reference that moves, in the learner and published, and its own average in f32.
        sets.extend([
            "learner.ema_decay=0.9",
            "reference.kind=ema",
            "reference.decay=0.5",
        ]);
        assert_eq!(
            small(&sets),
            [&half[..], &[4 * p + 2 * p, 2 * 2 * p + 4 * p]].concat()
        );
    }

    #[test]
    fn weights_are_counted_in_the_form_in_which_they_are_held() {
        let (p, cached, fused) = (PARAMETERS, CACHED, small(&[]));
        // 3 actors · 2 models, in bf16 and in f32.
        let packed = [3 * 2 * 2 * p, 3 * 2 * 4 * p];
        // Actors in another precision pack both.
        let mut apart = fused.clone();
        apart[7] = 2 * cached;
        apart.insert(6, packed[0]);
        let sampled = "actor.precision=\"bf16\"";
        assert_eq!(small(&[sampled]), apart);
        let moves = ["reference.kind=every", "reference.every_steps=5"];
        assert_eq!(small(&[&[sampled], &moves[..]].concat())[6], packed[0]);
        // Samples in f32 need the exact weights.
        let mut exact = fused.clone();
        exact.insert(6, packed[1]);
        let trained = "learner.precision=\"bf16\"";
        assert_eq!(small(&[trained]), exact);
        // Embeddings stay in f32.
        let embedding = 200 * 8;
        let rounded = 2 * (p - embedding) + 4 * embedding;
        let mut both = fused;
        (both[4], both[6], both[7]) = (rounded, rounded, 2 * cached);
        assert_eq!(small(&[sampled, trained]), both);
        // Actors may still sample with the version before the newest.
        both[6] += rounded;
        assert_eq!(small(&[sampled, trained, "learner.max_staleness=2"]), both);
    }

    #[test]
    fn gradients_of_one_pass_take_the_place_of_activations() {
        let passes = small(&[]);
        let whole = small(&["learner.gradient_accumulation_steps=1"]);
        // Twice the prompts, less two blocks of 4 · 8² + 3 · 8 · 16 + 2 · 8 and the last norm.
        let blocks = 2 * (256 + 384 + 16) + 8;
        assert_eq!(whole[8], 2 * passes[8] - 4 * blocks);
        let adapter = small(&["learner.gradient_accumulation_steps=1", "model.lora_rank=2"]);
        assert_eq!(adapter[8], 2 * passes[8]);
    }

    #[test]
    fn preference_models_have_a_tokenizer_each_and_one_pass_at_a_time() {
        let judge = "preference.judge={kind=\"ensemble\",members=[{kind=\"bradley-terry\",path=\"a\"},{kind=\"pairwise\",path=\"b\"}]}";
        let evaluating = "evaluation.judge.other={kind=\"bradley-terry\",path=\"c\"}";
        // 2048 tokens of 3·8 + 2·8 + 2·8 + 2·16, and 1 KiB for each of 200 tokens of three models.
        let expected = 2048 * 88 * 4 + 3 * 200 * 1024;
        assert_eq!(small(&[judge, evaluating]).last(), Some(&expected));
        let without = small(&[judge, evaluating, "evaluation.prompts=0"]);
        assert_eq!(without.last(), Some(&(expected - 200 * 1024)));
    }

    /// Each loads the next ones while the old ones are in use.
    #[test]
    fn only_over_a_network_do_actors_hold_weights_of_their_own() {
        let of_actors = |sets: &[&str]| {
            let settings = settings(sets);
            let config = playground(&settings);
            let parts = memory(&settings, &config);
            let copies = parts.iter().find(|part| part.name.starts_with("actors'"));
            copies.map(|part| part.bytes / (4 * config.parameter_count() as u64))
        };
        assert_eq!(of_actors(&["actor.count=3"]), None);
        let server = ["actor.count=3", "transport.kind=jetstream"];
        assert_eq!(of_actors(&server), Some(6));
    }

    #[test]
    fn a_cache_is_never_longer_than_the_models_positions() {
        let cache = |sets: &[&str]| {
            let settings = settings(sets);
            memory(&settings, &playground(&settings))
                .into_iter()
                .find(|part| part.name == "key-value caches")
                .unwrap()
        };
        // The playground's models have 128 positions; the defaults allow for 576.
        let short = cache(&["actor.max_prompt_length=64", "actor.max_new_tokens=64"]);
        assert_eq!(cache(&[]), short);
        assert_eq!(short.name, "key-value caches");
        assert_eq!(short.bytes, 2 * 64 * 128 * 2 * 2 * 96 * 4);
    }

    #[test]
    fn products_saturate() {
        assert_eq!(product(&[&[2, 3], &[7]]), 42);
        assert_eq!(product(&[&[usize::MAX, usize::MAX], &[2]]), u64::MAX);
        assert_eq!(mebibytes(3 << 19), "1.5");
    }

    #[test]
    fn more_memory_than_the_machine_has_is_warned_of() {
        let parts = [MemoryPart {
            name: "weights",
            bytes: 3 << 20,
        }];
        for (available, is_warned) in [(None, false), (Some(3 << 20), false), (Some(2 << 20), true)]
        {
            let mut report = CheckReport {
                text: String::new(),
                errors: Refused(Vec::new()),
            };
            report.memory(&parts, available);
            let text = report.text;
            assert!(text.contains("ok   memory: about 3.0 MiB"), "{text}");
            let warning = "warn memory: 3.0 MiB are more than the 2.0 MiB";
            assert_eq!(text.contains(warning), is_warned, "{text}");
        }
    }

    #[test]
    fn the_default_configuration_is_valid() {
        let report = report(&[]);
        assert!(report.errors.0.is_empty(), "{}", report.text);
        for expected in [
            "the playground's base",
            "Llama of 2 blocks of width 96",
            "ok   judge gold",
            "memory: about",
        ] {
            assert!(
                report.text.contains(expected),
                "{expected:?} in {}",
                report.text
            );
        }
    }

    #[test]
    fn a_bandit_is_known_by_its_arms() {
        let report = report(&[
            "prompts.kind=bandit",
            "actor.max_new_tokens=1",
            "model.reference_probabilities=[0.5, 0.3, 0.2]",
            "preference.judge.kind=matrix",
            "preference.judge.matrix=[[0.5,0.9,0.4],[0.1,0.5,0.8],[0.6,0.2,0.5]]",
        ]);
        assert!(report.errors.0.is_empty(), "{}", report.text);
        assert!(
            report.text.contains("a bandit of 3 arms"),
            "{}",
            report.text
        );
    }

    #[test]
    fn all_missing_files_are_reported_at_once() {
        let folder = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.5])
            .unwrap()
            .write_model(folder.path())
            .unwrap();
        let path = folder.path().display();
        let sets = [
            "prompts.kind=dataset".to_owned(),
            format!("prompts.path={path}/prompts.jsonl"),
            format!("model.path={path}"),
            format!("model.chat_template={path}"),
            format!("sft.path={path}/sft.jsonl"),
            format!("telemetry.token_path={path}/token"),
            "actor.max_prompt_length=8".to_owned(),
            "actor.max_new_tokens=8".to_owned(),
            "preference.judge.kind=rule".to_owned(),
            "preference.judge.rules=[{kind = \"regex\", pattern = \"(\", weight = 1.0}]".to_owned(),
        ];
        let report = report(&sets.each_ref().map(String::as_str));
        assert_eq!(report.errors.0.len(), 4, "{}", report.text);
        assert_eq!(report.errors.code(), Code::Configuration, "the rule's");
        for expected in [
            format!("fail model.chat_template: {path}: it is a folder"),
            format!("fail prompts.path: failed to read {path}/prompts.jsonl: No such file"),
            "fail preference.judge: ".to_owned(),
            format!("fail telemetry.token_path: failed to read the token in {path}/token"),
            format!("warn sft.path = {path}/sft.jsonl: No such file"),
        ] {
            assert!(
                report.text.contains(&expected),
                "{expected:?} in {}",
                report.text
            );
        }
    }

    #[test]
    fn errors_of_templates_and_adapters_name_their_settings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        Bandit::new(&[0.5, 0.5]).unwrap().write_model(path).unwrap();
        let adapter = path.join("adapter");
        std::fs::create_dir(&adapter).unwrap();
        let config = r#"{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}"#;
        std::fs::write(adapter.join("adapter_config.json"), config).unwrap();
        let header = r#"{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
        let mut tensors = (header.len() as u64).to_le_bytes().to_vec();
        tensors.extend(header.as_bytes());
        tensors.extend([0; 4]);
        std::fs::write(adapter.join("adapter_model.safetensors"), tensors).unwrap();
        let template = path.join("broken.jinja");
        std::fs::write(&template, "{% if %}").unwrap();
        let sets = [
            format!("model.path={}", path.display()),
            format!("model.adapter={}", adapter.display()),
            "model.lora_rank=2".to_owned(),
            format!("model.chat_template={}", template.display()),
        ];
        let report = report(&sets.each_ref().map(String::as_str));
        for expected in [
            format!(
                "fail model.chat_template: {} is not usable",
                template.display()
            ),
            "fail model.adapter: the adapter does not fit the model: base_model.model.".to_owned(),
            format!("ok   model.path: {}", path.display()),
        ] {
            let text = &report.text;
            assert!(text.contains(&expected), "{expected:?} in {text}");
        }
    }

    #[test]
    fn prompts_must_fit_the_models_positions() {
        let folder = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.5])
            .unwrap()
            .write_model(folder.path())
            .unwrap();
        let prompts = folder.path().join("prompts.jsonl");
        std::fs::write(&prompts, "{\"prompt\": \"arm0\"}\n{\"prompt\": \"arm1\"}\n").unwrap();
        let with = |length: usize| {
            let sets = [
                "prompts.kind=dataset".to_owned(),
                format!("prompts.path={}", prompts.display()),
                "prompts.held_out=1".to_owned(),
                format!("model.path={}", folder.path().display()),
                format!("actor.max_prompt_length={length}"),
                "actor.max_new_tokens=8".to_owned(),
                "preference.judge.kind=rule".to_owned(),
                "preference.judge.rules=[{kind = \"ended\", weight = 1.0}]".to_owned(),
            ];
            report(&sets.each_ref().map(String::as_str))
        };
        let fits = with(8);
        assert!(fits.errors.0.is_empty(), "{}", fits.text);
        let exceeds = with(9);
        assert_eq!(exceeds.errors.0.len(), 1, "{}", exceeds.text);
        assert!(
            exceeds.text.contains("exceed the model's 16 positions"),
            "{}",
            exceeds.text
        );

        std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let bare = with(8);
        assert!(
            bare.text.contains("model.safetensors: No such file"),
            "{}",
            bare.text
        );
        assert_eq!(bare.errors.code(), Code::MissingResource);
    }
}
