//! `agon generate`: completions of given prompts, from a policy or from its mixture with a reference.
//!
//! The same prompts, settings and seed give the same completions. Which slot a completion is written in,
//! and when, is the sampler's affair; they are told in the order of prompts and completions.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use messages::{Completion, Dialogue, Finish, PromptText, Seed};
use model::{CompletionWriter, LanguageModel, ModelFolder, Request, SamplingSettings, Tokenizer};
use serde::Serialize;
use settings::{EngineSettings, ModelSource};
use telemetry::{printable, printable_json};

use super::score::ModelArguments;
use crate::{
    failure::Misuse,
    model_hub::Located,
    world::{self, WriterParts},
};

/// Completions written at once.
const SLOTS: usize = 64;

/// How long mistral.rs may take for one completion, in seconds.
const TIMEOUT: f64 = 600.0;

/// Completions of prompts, sampled from a model or from its mixture with a reference.
///
/// Every --prompt is continued --num times. The text is continued as it stands; with --chat it is one
/// message of a user, sent through the model's chat template. With --reference, or with --adapter, whose
/// model is then the reference, every completion is also scored under the reference, and --mixture-coef
/// draws from the two models' geometric mixture, as the actors of Nash-MD and IPO-MD do. With --json there is one line a completion: prompt, completion, ids,
/// finish ("eos" or "length"), the sums logp, ref_logp and behaviour_logp, and logprobs, one a token.
///
/// Example: agon generate --model runs/base --prompt "Once upon a time" --num 2 --seed 7
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// A prompt; may be given again.
    #[arg(long = "prompt", value_name = "TEXT", required = true)]
    prompts: Vec<String>,
    /// Send each prompt as a user's message through the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Completions of each prompt.
    #[arg(long, value_name = "N", default_value_t = 4)]
    num: usize,
    /// The longest completion, in tokens.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_new_tokens: usize,
    /// Divides the logits: below 1 likelier tokens gain, above 1 they lose.
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f64,
    /// Only so many of the likeliest tokens; 0: all. 1 always takes the likeliest.
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1: all.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Only tokens with this share of the likeliest one's probability; 0: all.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// Repeats the same completions.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A second model with the same vocabulary, in the same layout.
    #[arg(long, value_name = "MODEL")]
    reference: Option<ModelSource>,
    /// The weight ON THE REFERENCE in the mixture that tokens are drawn from: 0 is the model alone (when
    /// not given), 1 the reference alone; the papers use 0.125. Needs --reference or --adapter.
    #[arg(long, value_name = "WEIGHT")]
    mixture_coef: Option<f32>,
    /// What computes: `mistral` is mistral.rs for the model, in f32 on the CPU, in a build with
    /// `--features mistral`; the reference is Agon's own in either.
    #[arg(long, value_enum, default_value = "own")]
    engine: EngineName,
    /// JSON for programs, one line a completion.
    #[arg(long)]
    json: bool,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum EngineName {
    /// Agon's own sampler.
    Own,
    /// mistral.rs.
    Mistral,
}

impl From<EngineName> for EngineSettings {
    fn from(name: EngineName) -> Self {
        match name {
            EngineName::Own => Self::Own {},
            EngineName::Mistral => Self::Mistral {
                timeout_seconds: TIMEOUT,
            },
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    arguments.check()?;
    let (folder, policy) = arguments.model.find()?.open()?;
    world::warn_of_endless(&folder);
    let reference = match &arguments.reference {
        Some(source) => {
            let numbers = (policy.dtype(), policy.device());
            Some(Located::find(source, &|| false)?.policy(None, numbers)?.1)
        }
        // Beside an adapter its base; else the policy itself.
        None => policy.adapter().map(|_| policy.without_adapter()),
    };
    if arguments.engine == EngineName::Mistral && !policy.device().is_cpu() {
        let message = "--engine mistral computes on the CPU: leave out --device";
        return Err(Misuse(message.into()).into());
    }
    let prompts = arguments.encode(&folder)?;
    let longest = prompts
        .iter()
        .map(|prompt| prompt.ids.len())
        .max()
        .unwrap_or(0);
    let capacity = longest + arguments.max_new_tokens;
    let models: Vec<&LanguageModel> = std::iter::once(&policy).chain(&reference).collect();
    fits(capacity, longest, &models)?;

    let parts = WriterParts {
        folder: folder.clone(),
        policy,
        reference,
        sampling: arguments.sampling(),
        slots: SLOTS.min(prompts.len().saturating_mul(arguments.num)),
        capacity,
    };
    let mut writer = world::writer(&arguments.engine.into(), parts)?;
    let mut output = io::stdout().lock();
    for told in tell(arguments, &prompts, &folder.tokenizer, writer.as_mut())? {
        output
            .write_all(told?.as_bytes())
            .and_then(|()| output.flush())
            .context("failed to write to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks `writer` for everything. Gives what there is to tell after every step, most often nothing, until
/// all completions have ended.
fn tell<'a>(
    arguments: &'a Arguments,
    prompts: &'a [Prompt],
    tokenizer: &'a Tokenizer,
    writer: &'a mut dyn CompletionWriter,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<String>> + 'a> {
    let parts = parts(prompts.len(), arguments.num);
    for (key, part) in (0..).zip(&parts) {
        writer.admit(arguments.request(key, *part, &prompts[part.prompt]))?;
    }
    let mut teller = Teller {
        prompts,
        tokenizer,
        arguments,
        parts,
        next: 0,
        ended: BTreeMap::new(),
    };
    Ok(std::iter::from_fn(move || {
        (!writer.is_idle()).then(|| teller.step(writer))
    }))
}

/// A prompt as it was given, and its tokens.
struct Prompt {
    text: String,
    ids: Vec<u32>,
}

/// Completions of one prompt that are asked for together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    /// Which prompt.
    prompt: usize,
    /// The number of its first completion.
    first: usize,
    /// How many completions.
    count: usize,
}

impl Part {
    /// Depends on prompt and completion only, so that asking for more leaves the former ones as they were.
    fn seed(self, seed: u64) -> Seed {
        let chunk = (self.first / SLOTS) as u64;
        Seed(seed).derive(chunk << 32 | self.prompt as u64)
    }
}

/// Every prompt's completions in parts that fit the slots, in the order in which they are told.
fn parts(prompts: usize, num: usize) -> Vec<Part> {
    let of = |prompt| {
        (0..num).step_by(SLOTS).map(move |first| Part {
            prompt,
            first,
            count: SLOTS.min(num - first),
        })
    };
    (0..prompts).flat_map(of).collect()
}

/// That both models can hold a sequence of `capacity` tokens, `longest` of them a prompt's.
fn fits(capacity: usize, longest: usize, models: &[&LanguageModel]) -> Result<(), Misuse> {
    let configs = models.iter().map(|model| model.config());
    match configs.min_by_key(|config| config.max_positions) {
        Some(config) if capacity > config.max_positions => Err(Misuse(format!(
            "a prompt of {longest} tokens and --max-new-tokens {} exceed the model's {} positions: lower one of them",
            capacity - longest,
            config.max_positions
        ))),
        _ => Ok(()),
    }
}

impl Arguments {
    /// What no type can say.
    fn check(&self) -> Result<(), Misuse> {
        let share = |p: f64| (0.0..=1.0).contains(&p);
        let mixture = f64::from(self.mixture_coef.unwrap_or(0.0));
        let requirements = [
            (self.num > 0, "--num must be at least 1"),
            (
                self.max_new_tokens > 0,
                "--max-new-tokens must be at least 1",
            ),
            (
                self.temperature > 0.0 && self.temperature.is_finite(),
                "--temperature must be above 0; --top-k 1 always takes the likeliest token",
            ),
            (
                self.top_p > 0.0 && share(self.top_p),
                "--top-p must be above 0 and at most 1",
            ),
            (
                self.min_p < 1.0 && share(self.min_p),
                "--min-p must be from 0 to below 1",
            ),
            (share(mixture), "--mixture-coef must be from 0 to 1"),
            (
                self.mixture_coef.is_none() || self.has_reference(),
                "--mixture-coef is the weight on the reference: name one with --reference, or an --adapter, whose base it is",
            ),
        ];
        match requirements.into_iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err(Misuse(message.into())),
            None => Ok(()),
        }
    }

    /// Whether there is a second model to tell of.
    fn has_reference(&self) -> bool {
        self.reference.is_some() || self.model.has_adapter()
    }

    fn encode(&self, folder: &ModelFolder) -> anyhow::Result<Vec<Prompt>> {
        if self.chat && !folder.tokenizer.has_chat_template() {
            let path = folder.path.display();
            let message = format!(
                "--chat needs a chat template and {path} has none: leave out --chat to continue the text as it stands"
            );
            return Err(Misuse(message).into());
        }
        let encode = |text: &String| {
            let prompt = if self.chat {
                PromptText::Dialogue(Dialogue::of_user(text))
            } else {
                PromptText::Text(text.clone())
            };
            let ids = folder.tokenizer.encode_prompt(&prompt)?;
            Ok(Prompt {
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

    fn request(&self, key: u64, part: Part, prompt: &Prompt) -> Request {
        Request {
            key,
            ids: prompt.ids.clone(),
            seed: part.seed(self.seed),
            mixture_coefs: vec![self.mixture_coef.unwrap_or(0.0); part.count],
            exact: 0,
            max_new_tokens: self.max_new_tokens,
        }
    }
}

/// Puts completions into words as soon as all before them have been told.
struct Teller<'a> {
    prompts: &'a [Prompt],
    tokenizer: &'a Tokenizer,
    arguments: &'a Arguments,
    parts: Vec<Part>,
    /// The part that is to be told next.
    next: u64,
    /// Parts that have ended and wait for their turn.
    ended: BTreeMap<u64, Vec<Completion>>,
}

/// A line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    prompt: &'a str,
    completion: &'a str,
    ids: &'a [u32],
    finish: &'static str,
    logp: f64,
    ref_logp: f64,
    behaviour_logp: f64,
    logprobs: &'a [f32],
}

impl Teller<'_> {
    /// Lets `writer` go on for a moment.
    fn step(&mut self, writer: &mut dyn CompletionWriter) -> anyhow::Result<String> {
        for finished in writer.step()? {
            self.ended.insert(finished.key, finished.completions);
        }
        let mut told = String::new();
        while let Some(completions) = self.ended.remove(&self.next) {
            let part = self.parts[usize::try_from(self.next)?];
            self.next += 1;
            for (number, completion) in (part.first..).zip(&completions) {
                let place = Place {
                    number,
                    prompt: part.prompt,
                };
                told.push_str(&self.one(place, completion)?);
            }
        }
        Ok(told)
    }

    fn one(&self, place: Place, completion: &Completion) -> anyhow::Result<String> {
        let prompt = &self.prompts[place.prompt];
        let text = self.tokenizer.completion_text(&prompt.ids, completion);
        let line = Line {
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
        let sums = [line.logp, line.ref_logp, line.behaviour_logp];
        ensure!(
            sums.iter().all(|sum| sum.is_finite()),
            "a completion of {:?} has a log-probability that is not finite; are the weights?",
            prompt.text
        );
        if self.arguments.json {
            return Ok(format!(
                "{}\n",
                printable_json(&serde_json::to_string(&line)?)
            ));
        }
        Ok(self.in_words(place, &line))
    }

    fn in_words(&self, place: Place, line: &Line<'_>) -> String {
        let Arguments { num, prompts, .. } = self.arguments;
        let mut text = String::new();
        if place.number == 0 {
            text += &format!(
                "=== prompt {} of {}\n{}\n",
                place.prompt + 1,
                prompts.len(),
                printable(line.prompt)
            );
        }
        let ended = if line.finish == "eos" {
            "ended"
        } else {
            "cut off"
        };
        text += &format!(
            "--- completion {} of {num}: {ended} after {} tokens, logp {:.2}",
            place.number + 1,
            line.ids.len(),
            line.logp
        );
        if self.arguments.has_reference() {
            text += &format!(", under the reference {:.2}", line.ref_logp);
        }
        text += &format!("\n{}\n", printable(line.completion));
        text
    }
}

/// Which completion of which prompt, from 0.
#[derive(Debug, Clone, Copy)]
struct Place {
    number: usize,
    prompt: usize,
}

fn sum(logps: &[f32]) -> f64 {
    logps.iter().copied().map(f64::from).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use clap::Parser;
    use model::Sampler;
    use playground::Bandit;

    use super::*;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn arguments(extra: &[&str]) -> Arguments {
        let given = ["generate", "--model", "m", "--prompt", "arm0"];
        CommandLine::try_parse_from(given.iter().chain(extra))
            .unwrap()
            .arguments
    }

    #[test]
    fn what_cannot_be_sampled_is_refused_by_the_option() {
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
            let Misuse(message) = arguments(extra).check().unwrap_err();
            assert!(message.contains(expected), "{message:?} for {extra:?}");
        }
        for second in ["--reference", "--adapter"] {
            let given = [second, "r", "--mixture-coef", "1"];
            arguments(&given).check().unwrap();
        }
    }

    #[test]
    fn completions_are_asked_for_in_parts_that_fit_the_slots() {
        let part = |prompt, first, count| Part {
            prompt,
            first,
            count,
        };
        assert_eq!(parts(2, 3), [part(0, 0, 3), part(1, 0, 3)]);
        assert_eq!(parts(1, 64), [part(0, 0, 64)]);
        assert_eq!(
            parts(1, 130),
            [part(0, 0, 64), part(0, 64, 64), part(0, 128, 2)]
        );
    }

    #[test]
    fn a_completion_has_its_own_seed_whatever_else_is_asked_for() {
        let seeds: HashSet<u64> = parts(40, 1000).iter().map(|part| part.seed(7).0).collect();
        assert_eq!(seeds.len(), 40 * 16);
        assert_eq!(parts(3, 1000)[16].seed(7), parts(2, 4)[1].seed(7));
        assert_eq!(parts(3, 4)[2].seed(7), Seed(7).derive(2));
    }

    /// What the command tells of a bandit with these probabilities.
    fn told(probabilities: &[f64], extra: &[&str]) -> String {
        let directory = tempfile::tempdir().unwrap();
        Bandit::new(probabilities)
            .unwrap()
            .write_model(directory.path())
            .unwrap();
        let device = model::Device::Cpu;
        let numbers = (model::DType::F32, &device);
        let (folder, model) = model::open_policy(directory.path(), None, None, numbers).unwrap();
        let arguments = arguments(extra);
        let prompts = arguments.encode(&folder).unwrap();
        let sampling = arguments.sampling();
        let mut sampler = Sampler::new(model, None, sampling, SLOTS, 4).unwrap();
        tell(&arguments, &prompts, &folder.tokenizer, &mut sampler)
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    #[test]
    fn arms_are_drawn_as_often_as_they_are_likely() {
        let extra = [
            "--num",
            "1000",
            "--max-new-tokens",
            "1",
            "--json",
            "--seed",
            "3",
        ];
        let told = told(&[0.5, 0.3, 0.2], &extra);
        let mut counts = [0usize; 3];
        for line in told.lines() {
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
    fn a_seed_repeats_and_a_longer_list_begins_with_the_shorter_one() {
        let of = |num: &str, seed: &str| {
            let extra = [
                "--num",
                num,
                "--seed",
                seed,
                "--max-new-tokens",
                "2",
                "--json",
            ];
            told(&[0.5, 0.5], &extra)
        };
        assert_eq!(of("12", "1"), of("12", "1"));
        assert_ne!(of("12", "1"), of("12", "2"));
        let ids = |told: &str| -> Vec<String> {
            told.lines()
                .map(|line| {
                    serde_json::from_str::<serde_json::Value>(line).unwrap()["ids"].to_string()
                })
                .collect()
        };
        assert_eq!(ids(&of("80", "1"))[..12], ids(&of("12", "1")));
    }

    #[test]
    fn for_people_there_is_a_heading_and_a_separator() {
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
        let told = told(&[0.9, 0.1], &extra);
        let headings: Vec<&str> = told
            .lines()
            .filter(|line| line.starts_with("==="))
            .collect();
        assert_eq!(headings, ["=== prompt 1 of 2", "=== prompt 2 of 2"]);
        let separators = told
            .lines()
            .filter(|line| line.starts_with("--- completion"))
            .count();
        assert_eq!(separators, 4);
        let first = "--- completion 1 of 2: cut off after 1 tokens, logp -0.11\n";
        assert!(told.contains(first), "{told}");
    }

    #[test]
    fn a_chat_needs_a_template() {
        let directory = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.5])
            .unwrap()
            .write_model(directory.path())
            .unwrap();
        let folder = ModelFolder::open(directory.path(), None).unwrap();
        let refused = arguments(&["--chat"]).encode(&folder).err().unwrap();
        assert!(refused.is::<Misuse>() && refused.to_string().contains("leave out --chat"));
    }
}
