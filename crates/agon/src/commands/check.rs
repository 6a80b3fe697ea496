//! `agon check`: what a configuration means, without starting anything.
//!
//! The resolved configuration goes to standard output, as the run directory would hold it; what can be
//! known of model, memory and files goes to standard error. Memory is what the settings make certain:
//! arithmetic on shapes, not a measurement.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;
use model::ModelConfig;
use settings::{DtypeSetting, EngineSettings, ObjectiveSettings, Settings};

use super::configuration::Configuration;
use crate::{
    failure::{Refused, sentence},
    world::{self, Finding, Part, Preflight},
};

/// mistral.rs computes in f32 whatever the weights are.
const MISTRAL_BYTES: usize = 4;
/// Adam's moments are kept in f32 whatever the weights are.
const MOMENT_BYTES: usize = 4;
/// An adapter is f32 whatever the weights are.
const ADAPTER_BYTES: usize = 4;
/// A master weight is f32 whatever the dtype of the weights.
const MASTER_BYTES: usize = 4;
/// Logits are computed in f32.
const LOGIT_BYTES: usize = 4;

/// Resolve a configuration, say what it needs, start nothing.
///
/// Prints the resolved configuration, every key of it, to standard output, and to standard error the
/// model's shape, an estimate of the memory a run needs and what was found of everything that the
/// configuration names: models, adapters, templates, the rows of prompts and pairs, judges, secrets,
/// addresses. What it refuses `agon train` refuses, in the same words: exit code 2 when the configuration
/// holds mistakes, 3 when something is missing or does not fit; all are named. Writes no file and reads no
/// weights. A model of the hub (hf:ORG/NAME) is looked for in its cache, and else at the hub; it is not
/// fetched.
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
    let summary = Summary::of(settings, &path);
    note!("{}", telemetry::printable(summary.text.trim_end()));
    Ok(match summary.refused.0.as_slice() {
        [] => ExitCode::SUCCESS,
        _ => summary.refused.code().into(),
    })
}

/// What is told of a configuration.
struct Summary {
    text: String,
    refused: Refused,
}

impl Summary {
    /// Summary of a run in the directory `path`.
    fn of(settings: &Settings, path: &Path) -> Self {
        let mut summary = Self {
            text: String::new(),
            refused: Refused(Vec::new()),
        };
        let preflight = Preflight::of(settings, path, Part::Whole);
        for finding in preflight.findings {
            match finding {
                Finding::Fits(what) => summary.line("ok", &what),
                Finding::Unused(what) => summary.line("warn", &what),
                Finding::Refused(error) => {
                    summary.line("fail", &sentence(&error));
                    summary.refused.0.push(error);
                }
            }
        }
        if let Some(config) = &preflight.config {
            if config.stops.is_empty() {
                summary.line("warn", &format!("model: {}", world::ENDLESS));
            }
            summary.memory(&memory(settings, config));
        }
        if path.join("config.toml").exists() {
            let path = path.display();
            summary.line(
                "warn",
                &format!("{path} holds a run: go on with --resume, or choose another run.name"),
            );
        }
        summary
    }

    fn line(&mut self, grade: &str, text: &str) {
        // Writing to a string does not fail.
        writeln!(self.text, "{grade:<5}{text}").ok();
    }

    fn memory(&mut self, parts: &[MemoryPart]) {
        let total = parts
            .iter()
            .fold(0u64, |sum, part| sum.saturating_add(part.bytes));
        let total = mebibytes(total);
        self.line(
            "ok",
            &format!("memory: about {total} MiB with every sequence at its longest, in MiB:"),
        );
        for part in parts {
            let (name, size) = (part.name, mebibytes(part.bytes));
            self.line("", &format!("  {size:>12}  {name}"));
        }
    }
}

/// A part of the memory that a run needs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MemoryPart {
    name: &'static str,
    bytes: u64,
}

/// What a run of all roles in one process holds at its height, by part.
fn memory(settings: &Settings, config: &ModelConfig) -> Vec<MemoryPart> {
    let (actor, learner) = (&settings.actor, &settings.learner);
    let bytes = match settings.model.dtype {
        DtypeSetting::F32 => 4,
        DtypeSetting::Bf16 => 2,
    };
    let weights = [config.parameter_count(), bytes];
    // An adapter is trained in f32 beside weights that the policy and its reference share.
    let (trained, of_trained) = match adapter_parameters(settings, config) {
        Some(count) => ([count, ADAPTER_BYTES], count),
        None => (weights, config.parameter_count()),
    };
    // Weights in half precision that are trained have a master copy in f32.
    let is_half = trained == weights && settings.model.dtype == DtypeSetting::Bf16;
    let masters = if is_half { of_trained } else { 0 };
    // As the sampler's caches: no sequence outgrows the model's positions.
    let longest = actor
        .max_prompt_length
        .saturating_add(actor.max_new_tokens)
        .min(config.max_positions);
    let keys_and_values = [2, config.layers, config.kv_heads, config.head_dim, bytes];
    // A cache of the policy and one of the reference in each actor.
    let slots = [2, actor.count, actor.slots, longest];
    let beside = match actor.engine {
        EngineSettings::Own {} => 0,
        EngineSettings::Mistral { .. } => actor.count,
    };
    let beside = [config.parameter_count(), MISTRAL_BYTES, beside];
    let of_a_prompt = completions_per_prompt(settings).saturating_mul(longest);
    let prompts = learner
        .train_batch_size
        .div_ceil(learner.gradient_accumulation_steps.max(1));
    let in_a_pass = match learner.max_tokens_per_pass {
        0 => usize::MAX,
        most => most.max(of_a_prompt),
    };
    let in_a_pass = in_a_pass.min(prompts.saturating_mul(of_a_prompt));
    let predicted = product(&[&[
        prompts,
        completions_per_prompt(settings),
        actor.max_new_tokens,
    ]]);
    let predicted = usize::try_from(predicted).unwrap_or(usize::MAX);
    let parts = [
        ("policy's weights", product(&[&trained])),
        ("gradients", product(&[&trained])),
        ("Adam's moments", product(&[&[2, of_trained, MOMENT_BYTES]])),
        (
            "master weights in f32",
            product(&[&[masters, MASTER_BYTES]]),
        ),
        ("reference's weights", product(&[&weights])),
        // Of the policy and of its reference.
        (
            "tables of rotary positions",
            product(&[&[2, config.rotary_numbers(), bytes]]),
        ),
        (
            "actors' copies of the policy",
            product(&[&trained, &[actor.count]]),
        ),
        ("mistral.rs's copies of the policy", product(&[&beside])),
        ("weights on the shelf", product(&[&trained])),
        (
            "caches of keys and values",
            product(&[&slots, &keys_and_values]),
        ),
        (
            "activations of a pass (rough)",
            product(&[&[in_a_pass, activations(config), bytes]]),
        ),
        (
            "logits of a pass (rough)",
            logits(settings, config, predicted.min(in_a_pass)),
        ),
    ];
    let parts = parts.into_iter().filter(|&(_, bytes)| bytes > 0);
    parts
        .map(|(name, bytes)| MemoryPart { name, bytes })
        .collect()
}

/// Numbers that the backward pass keeps for a token, in all blocks: two residuals, two normed inputs and
/// two outputs; queries before and after rotation and what was attended to; keys so too, and values; the
/// gate, what it lets through, and their product.
fn activations(config: &ModelConfig) -> usize {
    let (queries, keys) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    let block = 6 * config.hidden_size + 3 * queries + 3 * keys + 3 * config.intermediate_size;
    config.layers * block
}

/// How many numbers an adapter trains, where one is; `None` where the whole weights are trained.
fn adapter_parameters(settings: &Settings, config: &ModelConfig) -> Option<usize> {
    world::fresh_adapter(settings)?.parameter_count(config).ok()
}

/// On the processor in f32 the head is fused and its logits never exist; elsewhere they and their
/// logarithmic softmax do.
fn logits(settings: &Settings, config: &ModelConfig, predicted: usize) -> u64 {
    let fused = settings.model.device == "cpu" && settings.model.dtype == DtypeSetting::F32;
    if fused {
        return 0;
    }
    product(&[&[predicted, config.vocab_size, 2, LOGIT_BYTES]])
}

/// Nash-MD by policy gradient compares one completion of the policy with one of the mixture.
fn completions_per_prompt(settings: &Settings) -> usize {
    match settings.learner.objective {
        ObjectiveSettings::NashMdPg { .. } => 2,
        _ => settings.actor.num_generations,
    }
}

/// The product of all factors; the largest number there is when it is larger still.
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
    use crate::failure::Code;

    fn settings(sets: &[&str]) -> Settings {
        let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
        settings::resolve("", "test", &sets).unwrap().settings
    }

    fn summary(sets: &[&str]) -> Summary {
        let folder = tempfile::tempdir().unwrap();
        Summary::of(&settings(sets), &folder.path().join("run"))
    }

    fn playground(settings: &Settings) -> ModelConfig {
        let world = &settings.playground;
        let raw = base_config_json(
            world.hidden_size,
            world.layers,
            world.heads,
            world.intermediate_size,
        );
        ModelConfig::from_json(raw, Path::new("[playground]")).unwrap()
    }

    #[test]
    fn the_memory_of_a_small_world_by_hand() {
        let mut sets = vec![
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
        let of = |sets: &[&str]| {
            let settings = settings(sets);
            let parts = memory(&settings, &playground(&settings));
            parts.into_iter().map(|part| part.bytes).collect::<Vec<_>>()
        };
        // Embedding and head 200 · 8; a block: 4 · 8² + 3 · 8 · 16 + 2 · 8; the last norm 8.
        let p = 2 * 200 * 8 + 2 * (256 + 384 + 16) + 8;
        // 2 models · 3 actors · 4 slots · 16 tokens, of 2 · 2 blocks · 2 heads · 4 numbers.
        let cached = 2 * 3 * 4 * 16 * 32;
        // 2 models · 128 positions · 4 numbers.
        let rotary = 2 * 128 * 4;
        // 3 prompts · 2 completions · 16 tokens · 2 blocks · (6·8 + 3·8 + 3·8 + 3·16).
        let active = 3 * 2 * 16 * 2 * 144;
        let fused = [
            4 * p,
            4 * p,
            8 * p,
            4 * p,
            4 * rotary,
            12 * p,
            4 * p,
            4 * cached,
            4 * active,
        ];
        assert_eq!(of(&sets), fused);
        sets.push("model.dtype=\"bf16\"");
        let logits = 3 * 2 * 6 * 200 * 2 * 4;
        let half = [
            2 * p,
            2 * p,
            8 * p,
            4 * p,
            2 * p,
            2 * rotary,
            6 * p,
            2 * p,
            2 * cached,
            2 * active,
            logits,
        ];
        assert_eq!(of(&sets), half);
    }

    #[test]
    fn a_cache_is_never_longer_than_the_models_positions() {
        let cache = |sets: &[&str]| {
            let settings = settings(sets);
            memory(&settings, &playground(&settings))[7].clone()
        };
        // The playground's models have 128 positions; the defaults allow for 576.
        let short = cache(&["actor.max_prompt_length=64", "actor.max_new_tokens=64"]);
        assert_eq!(cache(&[]), short);
        assert_eq!(short.name, "caches of keys and values");
        assert_eq!(short.bytes, 2 * 64 * 128 * 2 * 2 * 96 * 4);
    }

    #[test]
    fn a_product_that_is_too_large_stays_the_largest() {
        assert_eq!(product(&[&[2, 3], &[7]]), 42);
        assert_eq!(product(&[&[usize::MAX, usize::MAX], &[2]]), u64::MAX);
        assert_eq!(mebibytes(3 << 19), "1.5");
    }

    #[test]
    fn the_defaults_are_the_playground_and_nothing_is_missing() {
        let summary = summary(&[]);
        assert!(summary.refused.0.is_empty(), "{}", summary.text);
        for expected in [
            "the playground's base",
            "Llama of 2 blocks of width 96",
            "ok   judge gold",
            "memory: about",
        ] {
            assert!(
                summary.text.contains(expected),
                "{expected:?} in {}",
                summary.text
            );
        }
    }

    #[test]
    fn a_bandit_is_known_by_its_arms() {
        let summary = summary(&[
            "prompts.kind=bandit",
            "actor.max_new_tokens=1",
            "model.reference_probabilities=[0.5, 0.3, 0.2]",
            "preference.judge.kind=matrix",
            "preference.judge.matrix=[[0.5,0.9,0.4],[0.1,0.5,0.8],[0.6,0.2,0.5]]",
        ]);
        assert!(summary.refused.0.is_empty(), "{}", summary.text);
        assert!(
            summary.text.contains("a bandit of 3 arms"),
            "{}",
            summary.text
        );
    }

    #[test]
    fn everything_that_is_missing_is_named_at_once() {
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
        let summary = summary(&sets.each_ref().map(String::as_str));
        assert_eq!(summary.refused.0.len(), 4, "{}", summary.text);
        assert_eq!(summary.refused.code(), Code::Configuration, "the rule's");
        for expected in [
            format!("fail model.chat_template: {path}: it is a folder"),
            format!("fail prompts.path: failed to read {path}/prompts.jsonl: No such file"),
            "fail preference.judge: ".to_owned(),
            format!("fail telemetry.token_path: read the page's token from {path}/token"),
            format!("warn sft.path = {path}/sft.jsonl: No such file"),
        ] {
            assert!(
                summary.text.contains(&expected),
                "{expected:?} in {}",
                summary.text
            );
        }
    }

    #[test]
    fn a_template_and_an_adapter_are_named_by_their_settings() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        Bandit::new(&[0.5, 0.5])
            .unwrap()
            .write_model(place)
            .unwrap();
        let adapter = place.join("adapter");
        std::fs::create_dir(&adapter).unwrap();
        let config = r#"{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}"#;
        std::fs::write(adapter.join("adapter_config.json"), config).unwrap();
        let header = r#"{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
        let mut tensors = (header.len() as u64).to_le_bytes().to_vec();
        tensors.extend(header.as_bytes());
        tensors.extend([0; 4]);
        std::fs::write(adapter.join("adapter_model.safetensors"), tensors).unwrap();
        let template = place.join("broken.jinja");
        std::fs::write(&template, "{% if %}").unwrap();
        let sets = [
            format!("model.path={}", place.display()),
            format!("model.adapter={}", adapter.display()),
            "model.lora_rank=2".to_owned(),
            format!("model.chat_template={}", template.display()),
        ];
        let summary = summary(&sets.each_ref().map(String::as_str));
        for expected in [
            format!(
                "fail model.chat_template: {} is not usable",
                template.display()
            ),
            "fail model.adapter: the adapter does not fit the model: base_model.model.".to_owned(),
            format!("ok   model.path: {}", place.display()),
        ] {
            let text = &summary.text;
            assert!(text.contains(&expected), "{expected:?} in {text}");
        }
    }

    #[test]
    fn a_folder_is_opened_and_prompts_must_fit_its_positions() {
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
            summary(&sets.each_ref().map(String::as_str))
        };
        let fits = with(8);
        assert!(fits.refused.0.is_empty(), "{}", fits.text);
        let exceeds = with(9);
        assert_eq!(exceeds.refused.0.len(), 1, "{}", exceeds.text);
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
        assert_eq!(bare.refused.code(), Code::MissingResource);
    }
}
