//! `agon generate`: completions of given prompts, from a policy or from its mixture with a reference.
//!
//! The same prompts, settings and seed give the same completions, printed in the order of prompts and completions
//! whatever the order in which the sampler finishes them.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use hub::CancelToken;
use messages::{Completion, Finish, PromptText, Seed};
use model::{LanguageModel, ModelFolder, Request, Sampler, SamplingSettings, Tokenizer};
use serde::Serialize;
use settings::{EngineSettings, ModelSource};
use telemetry::{printable, printable_json};

use crate::cli::model_args::ModelArguments;
use crate::{
    assembly::{self, ModelLocation, SamplerParts},
    exit_code::UsageError,
};

/// Number of completions sampled at once.
const SLOTS: usize = 64;

/// Timeout of one completion of mistral.rs, in seconds.
const TIMEOUT_SECONDS: f64 = 600.0;

/// Sample completions of prompts from a model or from its mixture with a reference.
///
/// Every --prompt is continued --num times. The text is continued as it is; with --chat it is rendered by the model's
/// chat template: the turns of a text "Human: ... Assistant: ...", each after an empty line, any other text as a
/// user's message. With --reference, or with --adapter, whose base model is then the
/// reference, every completion is also scored under the reference, and --mixture-coef samples from the geometric
/// mixture of both models, as the actors of Nash-MD and IPO-MD do. With --json there is one line per completion:
/// prompt, completion, ids, finish ("eos" or "length"), the sums logp, ref_logp and behaviour_logp, and logprobs
/// with one entry per token.
///
/// Example: agon generate --model runs/base --prompt "Once upon a time" --num 2 --seed 7
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// A prompt. May be repeated.
    #[arg(long = "prompt", value_name = "TEXT", required = true)]
    prompts: Vec<String>,
    /// Render each prompt as a dialogue with the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Number of completions per prompt.
    #[arg(long, value_name = "N", default_value_t = 4)]
    num: usize,
    /// The longest completion, in tokens.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_new_tokens: usize,
    /// Sampling temperature: divides the logits.
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f64,
    /// Sample from the N most likely tokens; 0: all, 1: greedy decoding.
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Nucleus sampling: the most likely tokens whose probabilities sum to P; 1: all.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Only tokens with at least P times the probability of the most likely one; 0: all.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// Random seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The reference model; needs the same vocabulary.
    #[arg(long, value_name = "MODEL")]
    reference: Option<ModelSource>,
    /// Weight of THE REFERENCE in the mixture to sample from: 0 (the default) is the model alone, 1 the reference
    /// alone; the papers use 0.125. Needs --reference or --adapter.
    #[arg(long, value_name = "WEIGHT")]
    mixture_coef: Option<f32>,
    /// Inference engine of the model. `mistral` is mistral.rs in f32 on the CPU, in a build with
    /// `--features mistral`; the reference always uses Agon's own.
    #[arg(long, value_enum, default_value = "own")]
    engine: EngineArgument,
    /// Print one line of JSON per completion.
    #[arg(long)]
    json: bool,
}

/// Inference engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum EngineArgument {
    /// Agon's own sampler.
    Own,
    /// mistral.rs.
    Mistral,
}

impl From<EngineArgument> for EngineSettings {
    fn from(name: EngineArgument) -> Self {
        match name {
            EngineArgument::Own => Self::Own {},
            EngineArgument::Mistral => Self::Mistral {
                timeout_seconds: TIMEOUT_SECONDS,
            },
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    arguments.check()?;
    let (folder, policy) = arguments.model.locate()?.open()?;
    assembly::warn_without_stop_tokens(&folder);
    let reference = match &arguments.reference {
        Some(source) => {
            let location = ModelLocation::resolve(source, &CancelToken::never())?;
            Some(location.policy(None, policy.dtype(), policy.device())?.1)
        }
        // The base of an adapter; else the policy itself.
        None => policy.adapter().map(|_| policy.without_adapter()),
    };
    if arguments.engine == EngineArgument::Mistral && !policy.device().is_cpu() {
        let message = "--engine mistral runs on the CPU: leave out --device";
        return Err(UsageError(message.into()).into());
    }
    let prompts = arguments.encode(&folder)?;
    let longest = prompts
        .iter()
        .map(|prompt| prompt.ids.len())
        .max()
        .unwrap_or(0);
    let capacity = longest + arguments.max_new_tokens;
    let models: Vec<&LanguageModel> = std::iter::once(&policy).chain(&reference).collect();
    check_capacity(capacity, longest, &models)?;

    let parts = SamplerParts {
        folder: folder.clone(),
        policy,
        reference,
        sampling: arguments.sampling(),
        slots: SLOTS.min(prompts.len().saturating_mul(arguments.num)),
        capacity,
    };
    let mut sampler = assembly::sampler(&arguments.engine.into(), parts)?;
    let mut output = io::stdout().lock();
    for text in sample(arguments, &prompts, &folder.tokenizer, sampler.as_mut())? {
        output
            .write_all(text?.as_bytes())
            .and_then(|()| output.flush())
            .context("failed to write to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Submits all requests to `sampler`; the iterator runs it until it is idle and yields the output after every step,
/// which is often empty.
fn sample<'a>(
    arguments: &'a Arguments,
    prompts: &'a [TokenizedPrompt],
    tokenizer: &'a Tokenizer,
    sampler: &'a mut dyn Sampler,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<String>> + 'a> {
    let groups = sample_groups(prompts.len(), arguments.num);
    for (key, group) in (0..).zip(&groups) {
        sampler.admit(arguments.request(key, *group, &prompts[group.prompt]))?;
    }
    let mut output = OrderedOutput {
        prompts,
        tokenizer,
        arguments,
        groups,
        next: 0,
        finished: BTreeMap::new(),
    };
    Ok(std::iter::from_fn(move || {
        (!sampler.is_idle()).then(|| output.step(sampler))
    }))
}

/// A prompt's text and its tokens.
struct TokenizedPrompt {
    text: String,
    ids: Vec<u32>,
}

/// Completions of one prompt that are requested together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SampleGroup {
    /// Index of the prompt.
    prompt: usize,
    /// Index of the first completion among the prompt's.
    first: usize,
    /// Number of completions.
    count: usize,
}

impl SampleGroup {
    /// Depends on prompt and completion only, so that a larger `--num` repeats the same first completions.
    fn seed(self, seed: u64) -> Seed {
        let chunk = (self.first / SLOTS) as u64;
        Seed(seed).derive(chunk << 32 | self.prompt as u64)
    }
}

/// Every prompt's completions in groups that fit the slots, in output order.
fn sample_groups(prompts: usize, num: usize) -> Vec<SampleGroup> {
    let groups = |prompt| {
        (0..num).step_by(SLOTS).map(move |first| SampleGroup {
            prompt,
            first,
            count: SLOTS.min(num - first),
        })
    };
    (0..prompts).flat_map(groups).collect()
}

/// Checks that all models have positions for a sequence of `capacity` tokens, `longest` of them a prompt's.
fn check_capacity(
    capacity: usize,
    longest: usize,
    models: &[&LanguageModel],
) -> Result<(), UsageError> {
    let configs = models.iter().map(|model| model.config());
    match configs.min_by_key(|config| config.max_positions) {
        Some(config) if capacity > config.max_positions => Err(UsageError(format!(
            "a prompt of {longest} tokens and --max-new-tokens {} exceed the model's {} positions: lower one of them",
            capacity - longest,
            config.max_positions
        ))),
        _ => Ok(()),
    }
}

impl Arguments {
    /// Checks what the argument parser cannot.
    fn check(&self) -> Result<(), UsageError> {
        let is_share = |p: f64| (0.0..=1.0).contains(&p);
        let mixture = f64::from(self.mixture_coef.unwrap_or(0.0));
        let requirements = [
            (self.num > 0, "--num must be at least 1"),
            (
                self.max_new_tokens > 0,
                "--max-new-tokens must be at least 1",
            ),
            (
                self.temperature > 0.0 && self.temperature.is_finite(),
                "--temperature must be above 0; --top-k 1 is greedy decoding",
            ),
            (
                self.top_p > 0.0 && is_share(self.top_p),
                "--top-p must be above 0 and at most 1",
            ),
            (
                self.min_p < 1.0 && is_share(self.min_p),
                "--min-p must be from 0 to below 1",
            ),
            (is_share(mixture), "--mixture-coef must be from 0 to 1"),
            (
                self.mixture_coef.is_none() || self.has_reference(),
                "--mixture-coef is the weight on the reference: name one with --reference, or an --adapter, whose base it is",
            ),
        ];
        match requirements.into_iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err(UsageError(message.into())),
            None => Ok(()),
        }
    }

    /// Whether there is a reference model.
    fn has_reference(&self) -> bool {
        self.reference.is_some() || self.model.has_adapter()
    }

    fn encode(&self, folder: &ModelFolder) -> anyhow::Result<Vec<TokenizedPrompt>> {
        if self.chat && !folder.tokenizer.has_chat_template() {
            let path = folder.path.display();
            let message = format!(
                "--chat needs a chat template and {path} has none: leave out --chat to continue the text as it is"
            );
            return Err(UsageError(message).into());
        }
        let encode = |text: &String| {
            let prompt = match self.chat {
                true => PromptText::Dialogue(dataset::dialogue(text)),
                false => PromptText::Text(text.clone()),
            };
            let ids = folder.tokenizer.encode_prompt(&prompt)?;
            Ok(TokenizedPrompt {
                text: text.clone(),
                ids,
            })
        };
        self.prompts.iter().map(encode).collect()
    }

    fn sampling(&self) -> SamplingSettings {
        SamplingSettings {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            ..SamplingSettings::plain(self.max_new_tokens)
        }
    }

    fn request(&self, key: u64, group: SampleGroup, prompt: &TokenizedPrompt) -> Request {
        Request {
            key,
            ids: prompt.ids.clone(),
            seed: group.seed(self.seed),
            mixture_coefs: vec![self.mixture_coef.unwrap_or(0.0); group.count],
            exact: 0,
            max_new_tokens: self.max_new_tokens,
            records_reference: true,
        }
    }
}

/// Formats completions in output order, as soon as all before them are formatted.
struct OrderedOutput<'a> {
    prompts: &'a [TokenizedPrompt],
    tokenizer: &'a Tokenizer,
    arguments: &'a Arguments,
    groups: Vec<SampleGroup>,
    /// Index of the group to format next.
    next: u64,
    /// Finished groups that wait for earlier ones.
    finished: BTreeMap<u64, Vec<Completion>>,
}

/// A completion as a line of JSON.
#[derive(Serialize)]
struct CompletionRow<'a> {
    prompt: &'a str,
    completion: &'a str,
    ids: &'a [u32],
    finish: &'static str,
    logp: f64,
    ref_logp: f64,
    behaviour_logp: f64,
    logprobs: &'a [f32],
}

impl OrderedOutput<'_> {
    /// Runs one step of `sampler`; returns the output that has become ready.
    fn step(&mut self, sampler: &mut dyn Sampler) -> anyhow::Result<String> {
        for finished in sampler.step()? {
            self.finished.insert(finished.key, finished.completions);
        }
        let mut output = String::new();
        while let Some(completions) = self.finished.remove(&self.next) {
            let group = self.groups[usize::try_from(self.next)?];
            self.next += 1;
            for (completion_index, completion) in (group.first..).zip(&completions) {
                let index = CompletionIndex {
                    prompt: group.prompt,
                    completion: completion_index,
                };
                output.push_str(&self.format(index, completion)?);
            }
        }
        Ok(output)
    }

    fn format(&self, index: CompletionIndex, completion: &Completion) -> anyhow::Result<String> {
        let prompt = &self.prompts[index.prompt];
        let text = self.tokenizer.completion_text(&prompt.ids, completion);
        let row = CompletionRow {
            prompt: &prompt.text,
            completion: &text,
            ids: &completion.ids,
            finish: match completion.finish {
                Finish::EndOfText => "eos",
                Finish::Length => "length",
            },
            logp: sum(&completion.logp),
            ref_logp: sum(&completion.ref_logp),
            behaviour_logp: sum(&completion.behaviour_logp),
            logprobs: &completion.logp,
        };
        let sums = [row.logp, row.ref_logp, row.behaviour_logp];
        ensure!(
            sums.iter().all(|sum| sum.is_finite()),
            "a completion of {:?} has a log-probability that is not finite; check the model's weights",
            prompt.text
        );
        if self.arguments.json {
            return Ok(format!(
                "{}\n",
                printable_json(&serde_json::to_string(&row)?)
            ));
        }
        Ok(self.text(index, &row))
    }

    fn text(&self, index: CompletionIndex, row: &CompletionRow<'_>) -> String {
        let Arguments { num, prompts, .. } = self.arguments;
        let mut text = String::new();
        if index.completion == 0 {
            text += &format!(
                "=== prompt {} of {}\n{}\n",
                index.prompt + 1,
                prompts.len(),
                printable(row.prompt)
            );
        }
        let finish = if row.finish == "eos" {
            "finished"
        } else {
            "truncated"
        };
        text += &format!(
            "--- completion {} of {num}: {finish} after {} tokens, logp {:.2}",
            index.completion + 1,
            row.ids.len(),
            row.logp
        );
        if self.arguments.has_reference() {
            text += &format!(", under the reference {:.2}", row.ref_logp);
        }
        text += &format!("\n{}\n", printable(row.completion));
        text
    }
}

/// Indices of a prompt and of one of its completions, from 0.
#[derive(Debug, Clone, Copy)]
struct CompletionIndex {
    prompt: usize,
    completion: usize,
}

fn sum(logps: &[f32]) -> f64 {
    logps.iter().copied().map(f64::from).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use clap::Parser;
    use model::MixtureSampler;
    use playground::Bandit;

    use super::*;

    #[derive(Parser)]
    struct TestCommandLine {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn arguments(extra: &[&str]) -> Arguments {
        let required = ["generate", "--model", "m", "--prompt", "arm0"];
        TestCommandLine::try_parse_from(required.iter().chain(extra))
            .unwrap()
            .arguments
    }

    #[test]
    fn invalid_options_are_errors_that_name_the_option() {
        let cases: [(&[&str], &str); 9] = [
            (&["--num", "0"], "--num"),
            (&["--max-new-tokens", "0"], "--max-new-tokens"),
            (&["--temperature", "0"], "--top-k 1"),
            (&["--temperature", "NaN"], "--temperature"),
            (&["--top-p", "0"], "--top-p"),
            (&["--top-p", "1.5"], "--top-p"),
            (&["--min-p", "1"], "--min-p"),
            (&["--mixture-coef", "0.125"], "name one with --reference"),
            (
                &["--reference", "r", "--mixture-coef", "1.1"],
                "from 0 to 1",
            ),
        ];
        for (extra, expected) in cases {
            let UsageError(message) = arguments(extra).check().unwrap_err();
            assert!(message.contains(expected), "{message:?} for {extra:?}");
        }
        for option in ["--reference", "--adapter"] {
            let valid = [option, "r", "--mixture-coef", "1"];
            arguments(&valid).check().unwrap();
        }
    }

    #[test]
    fn groups_of_completions_fit_the_slots() {
        let group = |prompt, first, count| SampleGroup {
            prompt,
            first,
            count,
        };
        assert_eq!(sample_groups(2, 3), [group(0, 0, 3), group(1, 0, 3)]);
        assert_eq!(sample_groups(1, 64), [group(0, 0, 64)]);
        assert_eq!(
            sample_groups(1, 130),
            [group(0, 0, 64), group(0, 64, 64), group(0, 128, 2)]
        );
    }

    #[test]
    fn seeds_depend_on_prompt_and_completion_only() {
        let groups = sample_groups(40, 1000);
        let seeds: HashSet<u64> = groups.iter().map(|group| group.seed(7).0).collect();
        assert_eq!(seeds.len(), 40 * 16);
        let [many, few] = [sample_groups(3, 1000), sample_groups(2, 4)];
        assert_eq!(many[16].seed(7), few[1].seed(7));
        assert_eq!(sample_groups(3, 4)[2].seed(7), Seed(7).derive(2));
    }

    /// Output of the command for a bandit with these probabilities.
    fn output(probabilities: &[f64], extra: &[&str]) -> String {
        let directory = tempfile::tempdir().unwrap();
        Bandit::new(probabilities)
            .unwrap()
            .write_model(directory.path())
            .unwrap();
        let device = model::Device::Cpu;
        let opened = model::open_policy(directory.path(), None, None, model::DType::F32, &device);
        let (folder, model) = opened.unwrap();
        let arguments = arguments(extra);
        let prompts = arguments.encode(&folder).unwrap();
        let sampling = arguments.sampling();
        let mut sampler = MixtureSampler::new(model, None, sampling, SLOTS, 4).unwrap();
        sample(&arguments, &prompts, &folder.tokenizer, &mut sampler)
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    #[test]
    fn arms_are_sampled_by_their_probabilities() {
        let extra = [
            "--num",
            "1000",
            "--max-new-tokens",
            "1",
            "--json",
            "--seed",
            "3",
        ];
        let output = output(&[0.5, 0.3, 0.2], &extra);
        let mut counts = [0usize; 3];
        for line in output.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let arm = line["ids"][0].as_u64().unwrap() as usize;
            counts[arm] += 1;
            let p = [0.5f64, 0.3, 0.2][arm];
            for key in ["logp", "ref_logp", "behaviour_logp"] {
                assert!(
                    (line[key].as_f64().unwrap() - p.ln()).abs() < 1e-5,
                    "{line}"
                );
            }
            assert_eq!(line["logprobs"].as_array().unwrap().len(), 1);
            assert_eq!(
                (&line["prompt"], &line["finish"]),
                (&"arm0".into(), &"length".into())
            );
            assert_eq!(
                line["completion"].as_str().unwrap().trim(),
                format!("arm{arm}")
            );
        }
        assert_eq!(counts.iter().sum::<usize>(), 1000);
        // Five standard deviations of a binomial count.
        for (count, p) in counts.into_iter().zip([0.5f64, 0.3, 0.2]) {
            let deviation = (1000.0 * p * (1.0 - p)).sqrt();
            assert!(
                (count as f64 - 1000.0 * p).abs() < 5.0 * deviation,
                "{counts:?}"
            );
        }
    }

    #[test]
    fn a_seed_repeats_and_a_larger_num_repeats_the_first_completions() {
        let run = |num: &str, seed: &str| {
            let extra = [
                "--num",
                num,
                "--seed",
                seed,
                "--max-new-tokens",
                "2",
                "--json",
            ];
            output(&[0.5, 0.5], &extra)
        };
        assert_eq!(run("12", "1"), run("12", "1"));
        assert_ne!(run("12", "1"), run("12", "2"));
        let ids = |output: &str| -> Vec<String> {
            output
                .lines()
                .map(|line| {
                    serde_json::from_str::<serde_json::Value>(line).unwrap()["ids"].to_string()
                })
                .collect()
        };
        assert_eq!(ids(&run("80", "1"))[..12], ids(&run("12", "1")));
    }

    #[test]
    fn text_output_has_headings_and_separators() {
        let extra = [
            "--num",
            "2",
            "--max-new-tokens",
            "1",
            "--top-k",
            "1",
            "--prompt",
            "arm1",
        ];
        let output = output(&[0.9, 0.1], &extra);
        let headings: Vec<&str> = output
            .lines()
            .filter(|line| line.starts_with("==="))
            .collect();
        assert_eq!(headings, ["=== prompt 1 of 2", "=== prompt 2 of 2"]);
        let separators = output
            .lines()
            .filter(|line| line.starts_with("--- completion"))
            .count();
        assert_eq!(separators, 4);
        let first = "--- completion 1 of 2: truncated after 1 tokens, logp -0.11\n";
        assert!(output.contains(first), "{output}");
    }

    #[test]
    fn chat_needs_a_template() {
        let directory = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.5])
            .unwrap()
            .write_model(directory.path())
            .unwrap();
        let folder = ModelFolder::open(directory.path(), None).unwrap();
        let refused = arguments(&["--chat"]).encode(&folder).err().unwrap();
        assert!(refused.is::<UsageError>() && refused.to_string().contains("leave out --chat"));
    }
}
