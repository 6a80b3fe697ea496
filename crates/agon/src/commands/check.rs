//! `agon check`: what a configuration means, without starting anything.
//!
//! The resolved configuration goes to standard output, as the run directory would hold it; what can be
//! known of model, memory and files goes to standard error. Memory is what the settings make certain:
//! arithmetic on shapes, not a measurement.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;
use dataset::DatasetError;
use model::{AdapterFolder, LoraConfig, ModelConfig, ModelFolder};
use playground::{Bandit, base_config_json};
use settings::{DtypeSetting, EngineSettings, ObjectiveSettings, PromptsSettings, Settings};

use super::configuration::Configuration;
use crate::{
    failure::Code,
    model_hub::{self, Look},
    world,
};

/// mistral.rs computes in f32 whatever the weights are.
const MISTRAL_BYTES: usize = 4;
/// Adam's moments are kept in f32 whatever the weights are.
const MOMENT_BYTES: usize = 4;
/// An adapter is f32 whatever the weights are.
const ADAPTER_BYTES: usize = 4;
/// Logits are computed in f32.
const LOGIT_BYTES: usize = 4;

/// Resolve a configuration, say what it needs, start nothing.
///
/// Prints the resolved configuration, every key of it, to standard output, and to standard error the
/// model's shape, an estimate of the memory a run needs and whether the files it names are there.
/// Writes no file. Exit code 2 when the configuration holds mistakes (all are named), 3 when a file is
/// missing or does not fit. A model of the hub (hf:ORG/NAME) is looked for in its cache, and else at the
/// hub; it is not fetched.
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
    let summary = Summary::of(&resolved.settings);
    eprint!("{}", telemetry::printable(&summary.text));
    Ok(if summary.problems == 0 {
        ExitCode::SUCCESS
    } else {
        Code::MissingResource.into()
    })
}

/// What is told of a configuration.
#[derive(Debug, Default)]
struct Summary {
    text: String,
    problems: usize,
}

impl Summary {
    fn of(settings: &Settings) -> Self {
        let mut summary = Self::default();
        if let Some(config) = summary.model(settings) {
            summary.adapter(settings, &config);
            summary.memory(&memory(settings, &config));
            if let Err(reason) = world::fits_positions(settings, &config) {
                summary.problem(&reason.to_string());
            }
        }
        for (key, path) in rows(settings) {
            summary.rows(key, path);
        }
        if let Some(path) = &settings.model.chat_template {
            summary.file("model.chat_template", path);
        }
        let judge = &settings.preference.judge;
        match world::check_judge(judge) {
            Ok(()) => summary.line("ok", &format!("judge {}", judge.name())),
            Err(error) => summary.problem(&format!("judge: {error:#}")),
        }
        summary
    }

    fn line(&mut self, grade: &str, text: &str) {
        // Writing to a string does not fail.
        writeln!(self.text, "{grade:<5}{text}").ok();
    }

    fn problem(&mut self, text: &str) {
        self.problems += 1;
        self.line("fail", text);
    }

    /// Tells of the model; its shape when that can be known without making it.
    fn model(&mut self, settings: &Settings) -> Option<ModelConfig> {
        match subject(settings) {
            Ok(Subject::Bandit { arms }) => {
                self.line("ok", &format!("model: a bandit of {arms} arms, made when the run starts; its memory is negligible"));
                None
            }
            Ok(Subject::Unfetched { origin }) => {
                self.line("ok", &format!("model: {origin}; its shape is known then"));
                None
            }
            Ok(Subject::Decoder { origin, config }) => {
                self.line("ok", &format!("model: {origin}, {}", shape(&config)));
                if config.stops.is_empty() {
                    self.line("warn", &format!("model: {}", world::ENDLESS));
                }
                Some(*config)
            }
            Err(error) => {
                self.problem(&format!("model: {error:#}"));
                None
            }
        }
    }

    /// Tells of the adapter, where one is trained.
    fn adapter(&mut self, settings: &Settings, config: &ModelConfig) {
        let told = adapter_of(settings).and_then(|(origin, adapter)| {
            let Some(adapter) = adapter else {
                return Ok(origin);
            };
            if settings.model.adapter.is_none() {
                adapter.check_targets(config)?;
            }
            let count = adapter.parameter_count(config)?;
            Ok(format!("{origin}rank {}, {count} parameters", adapter.rank))
        });
        match told {
            Ok(told) if told.is_empty() => {}
            Ok(told) => self.line("ok", &format!("adapter: {told}")),
            Err(error) => self.problem(&format!("adapter: {error:#}")),
        }
    }

    fn memory(&mut self, parts: &[Part]) {
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

    /// Tells of the files of rows that `path` names.
    fn rows(&mut self, key: &str, path: &Path) {
        let text = format!("{key} = {}", path.display());
        match dataset::files(path) {
            Ok(files) if files.len() > 1 => {
                self.line("ok", &format!("{text}: {} files", files.len()));
            }
            Ok(_) => self.line("ok", &text),
            Err(DatasetError::Unreadable { source, .. }) => {
                self.problem(&format!("{text}: {source}"));
            }
            Err(DatasetError::File { reason, .. }) => self.problem(&format!("{text}: {reason}")),
            Err(error) => self.problem(&format!("{text}: {error}")),
        }
    }

    fn file(&mut self, key: &str, path: &Path) {
        let text = format!("{key} = {}", path.display());
        match File::open(path).and_then(|file| file.metadata()) {
            Ok(metadata) if metadata.is_dir() => {
                self.problem(&format!("{text}: it is a folder, not a file"));
            }
            Ok(_) => self.line("ok", &text),
            Err(error) => self.problem(&format!("{text}: {error}")),
        }
    }
}

/// What a run would train.
enum Subject {
    Bandit {
        arms: usize,
    },
    /// A model of the hub that is not here.
    Unfetched {
        origin: String,
    },
    Decoder {
        origin: String,
        config: Box<ModelConfig>,
    },
}

fn subject(settings: &Settings) -> anyhow::Result<Subject> {
    if let Some(source) = &settings.model.path {
        let Look { folder, origin } = model_hub::look(source)?;
        let Some(path) = folder else {
            return Ok(Subject::Unfetched { origin });
        };
        // The tokenizer is opened too: it must fit the model, and its chat template must compile.
        let folder = ModelFolder::open(&path, settings.model.chat_template.as_deref())?;
        folder.check_weights()?;
        return Ok(Subject::Decoder {
            origin,
            config: Box::new(folder.config),
        });
    }
    if let Some(probabilities) = &settings.model.reference_probabilities {
        let arms = Bandit::new(probabilities)?.probabilities().len();
        return Ok(Subject::Bandit { arms });
    }
    let world = &settings.playground;
    let raw = base_config_json(
        world.hidden_size,
        world.layers,
        world.heads,
        world.intermediate_size,
    );
    let config = ModelConfig::from_json(raw, Path::new("[playground]"))?;
    Ok(Subject::Decoder {
        origin: "the playground's base".into(),
        config: Box::new(config),
    })
}

/// Where the adapter of the settings comes from, in words that may be empty, and its shape where it is known.
fn adapter_of(settings: &Settings) -> anyhow::Result<(String, Option<LoraConfig>)> {
    let Some(source) = &settings.model.adapter else {
        return Ok((String::new(), world::fresh_adapter(settings)));
    };
    let Look { folder, origin } = model_hub::look(source)?;
    let opened = folder
        .map(|folder| AdapterFolder::open(&folder))
        .transpose()?;
    if let Some(opened) = &opened {
        opened.check_file()?;
    }
    Ok(match opened {
        Some(opened) => (format!("{origin}, "), Some(opened.config)),
        None => (origin, None),
    })
}

fn shape(config: &ModelConfig) -> String {
    format!(
        "{:?} of {} blocks of width {}, {} heads ({} of keys and values), {} tokens, {} positions: {} parameters",
        config.architecture,
        config.layers,
        config.hidden_size,
        config.heads,
        config.kv_heads,
        config.vocab_size,
        config.max_positions,
        config.parameter_count()
    )
}

/// The rows that the settings name, under their keys.
fn rows(settings: &Settings) -> Vec<(&'static str, &Path)> {
    let mut files = Vec::new();
    if let PromptsSettings::Dataset(dataset) = &settings.prompts {
        let mixed = dataset.mix.iter().map(|file| file.path.as_path());
        files.extend(mixed.map(|path| ("prompts.mix", path)));
        let alone = [
            ("prompts.path", &dataset.path),
            ("prompts.held_out_path", &dataset.held_out_path),
        ];
        for (key, path) in alone {
            files.extend((!path.as_os_str().is_empty()).then_some((key, path.as_path())));
        }
    }
    if let Some(path) = &settings.sft.path {
        files.push(("sft.path", path.as_path()));
    }
    files
}

/// A part of the memory that a run needs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    name: &'static str,
    bytes: u64,
}

/// What a run of all roles in one process holds at its height, by part.
fn memory(settings: &Settings, config: &ModelConfig) -> Vec<Part> {
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
        ("reference's weights", product(&[&weights])),
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
    parts.map(|(name, bytes)| Part { name, bytes }).collect()
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
    use settings::Override;

    use super::*;

    fn settings(sets: &[&str]) -> Settings {
        let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
        settings::resolve("", "test", &sets).unwrap().settings
    }

    fn playground(settings: &Settings) -> ModelConfig {
        match subject(settings).unwrap() {
            Subject::Decoder { config, .. } => *config,
            Subject::Bandit { .. } | Subject::Unfetched { .. } => panic!("it has a shape"),
        }
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
        // 3 prompts · 2 completions · 16 tokens · 2 blocks · (6·8 + 3·8 + 3·8 + 3·16).
        let active = 3 * 2 * 16 * 2 * 144;
        let fused = [
            4 * p,
            4 * p,
            8 * p,
            4 * p,
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
            2 * p,
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
            memory(&settings, &playground(&settings))[6].clone()
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
        let summary = Summary::of(&settings(&[]));
        assert_eq!(summary.problems, 0, "{}", summary.text);
        for expected in [
            "the playground's base",
            "Llama of 2 blocks of width 96",
            "ok   judge gold",
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
        let summary = Summary::of(&settings(&[
            "prompts.kind=bandit",
            "actor.max_new_tokens=1",
            "model.reference_probabilities=[0.5, 0.3, 0.2]",
            "preference.judge.kind=matrix",
            "preference.judge.matrix=[[0.5,0.9,0.4],[0.1,0.5,0.8],[0.6,0.2,0.5]]",
        ]));
        assert_eq!(summary.problems, 0, "{}", summary.text);
        assert!(
            summary.text.contains("a bandit of 3 arms"),
            "{}",
            summary.text
        );
    }

    #[test]
    fn everything_that_is_missing_is_named_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let sets = [
            "prompts.kind=dataset".to_owned(),
            format!("prompts.path={path}"),
            format!("prompts.held_out_path={path}/held.jsonl"),
            format!("model.path={path}/base"),
            format!("sft.path={path}/sft.jsonl"),
            "preference.judge.kind=rule".to_owned(),
            "preference.judge.rules=[{kind = \"regex\", pattern = \"(\", weight = 1.0}]".to_owned(),
        ];
        let summary = Summary::of(&settings(&sets.each_ref().map(String::as_str)));
        assert_eq!(summary.problems, 5, "{}", summary.text);
        for expected in [
            format!("fail prompts.path = {path}: the folder holds no file of rows"),
            format!("fail prompts.held_out_path = {path}/held.jsonl: No such file"),
            format!("fail model: failed to read {path}/base"),
            format!("fail sft.path = {path}/sft.jsonl: No such file"),
            "fail judge: ".to_owned(),
        ] {
            assert!(
                summary.text.contains(&expected),
                "{expected:?} in {}",
                summary.text
            );
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
        std::fs::write(&prompts, "{\"prompt\": \"arm0\"}\n").unwrap();
        let with = |length: usize| {
            let sets = [
                "prompts.kind=dataset".to_owned(),
                format!("prompts.path={}", prompts.display()),
                format!("model.path={}", folder.path().display()),
                format!("actor.max_prompt_length={length}"),
                "actor.max_new_tokens=8".to_owned(),
                "preference.judge.kind=rule".to_owned(),
                "preference.judge.rules=[{kind = \"ended\", weight = 1.0}]".to_owned(),
            ];
            Summary::of(&settings(&sets.each_ref().map(String::as_str)))
        };
        let fits = with(8);
        assert_eq!(fits.problems, 0, "{}", fits.text);
        let exceeds = with(9);
        assert_eq!(exceeds.problems, 1, "{}", exceeds.text);
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
        assert_eq!(bare.problems, 1);
    }
}
