//! Annotated pairs: generated in the playground, with a noisy annotator, or read from a file.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use anyhow::Context;
use dataset::{Column, Columns, DatasetError, Pair, Sourced, read_rows, shuffled};
use learner::{PromptRow, Seams, say_how_dialogues_are_used};
use messages::{Completion, Digest, Finish, Seed};
use model::{
    CompletionWriter as _, LanguageModel, ModelFolder, Request, Sampler, SamplingSettings, Seam,
    Tokenizer, Weights,
};
use playground::{Post, noisy_label, preference, train_post, train_seed, utility};
use preference::fit::Example;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use settings::{DatasetPairs, FitSettings, PairsSettings, PlaygroundPairs, Settings};

use super::base::kept;

/// Annotated posts are none that a run trains or evaluates on.
const WORLD: u64 = 0xa110;

/// The seeds of the annotator's labels, apart from those of the completions.
const LABELS: u64 = 1;

/// The seed of the order of prompts, whose last share is for validation.
const SPLIT: u64 = 0x5917;

/// Completions written at once.
const SLOTS: usize = 64;

/// Annotated pairs, as tokens of the trunk.
#[derive(Debug)]
pub(crate) struct Annotated {
    /// Those to fit to.
    pub(crate) fitting: Vec<Example>,
    /// Those to measure on; in the playground their labels are the true preference, without the
    /// annotator's noise.
    pub(crate) validation: Vec<Example>,
    /// Pairs that are in neither.
    pub(crate) left_out: LeftOut,
    /// Pairs to fit to that repeat an earlier one, word for word.
    pub(crate) repeated: usize,
}

impl Annotated {
    /// Digest of all tokens and labels: what is fitted to other pairs is another model.
    pub(crate) fn digest(&self) -> Digest {
        let of = |part: &[Example]| {
            let each = part.iter().map(|pair| {
                let Example {
                    prompt,
                    first,
                    second,
                    label,
                } = pair;
                let text = format!("{prompt:?} {first:?} {second:?} {label}");
                Digest::of(text.as_bytes()).to_string()
            });
            each.collect::<String>()
        };
        let whole = format!("{} {}", of(&self.fitting), of(&self.validation));
        Digest::of(whole.as_bytes())
    }
}

/// How many pairs are not used, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct LeftOut {
    /// Longer than `preference.fit.max_length`.
    pub(crate) too_long: usize,
    /// An empty response.
    pub(crate) empty: usize,
    /// Two equal responses, of which none can be preferred.
    pub(crate) equal: usize,
    /// A prompt that the validation file has too.
    pub(crate) held_out: usize,
}

impl LeftOut {
    /// All of them.
    pub(crate) fn total(self) -> usize {
        self.too_long + self.empty + self.equal + self.held_out
    }
}

impl std::ops::Add for LeftOut {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            too_long: self.too_long + other.too_long,
            empty: self.empty + other.empty,
            equal: self.equal + other.equal,
            held_out: self.held_out + other.held_out,
        }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reasons = [
            (self.too_long, "too long"),
            (self.empty, "with an empty response"),
            (self.equal, "with two equal responses"),
            (self.held_out, "with a prompt of the validation file"),
        ];
        let said = reasons.iter().filter(|(count, _)| *count > 0);
        let said: Vec<String> = said.map(|(count, why)| format!("{count} {why}")).collect();
        match said.as_slice() {
            [] => f.write_str("0 pairs"),
            said => f.write_str(&said.join(", ")),
        }
    }
}

/// A generated pair, as it lies in its file: one JSON object a line, in the columns of the field and with
/// its tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct GeneratedPair {
    prompt: String,
    chosen: String,
    rejected: String,
    /// The true probability that the chosen one is preferred.
    gold: f64,
    prompt_ids: Vec<u32>,
    chosen_ids: Vec<u32>,
    rejected_ids: Vec<u32>,
}

impl GeneratedPair {
    /// The post with its chosen answer.
    pub(crate) fn chosen(self) -> PromptRow {
        PromptRow {
            ids: self.prompt_ids,
            text: self.prompt,
            dialogue: None,
            golden: Some(self.chosen_ids),
            answer: Some(self.chosen),
        }
    }
}

/// The annotated pairs of `[preference.fit]`, for a trunk with this folder; `base` is the policy that the
/// playground's pairs are samples of.
pub(crate) fn annotated(
    settings: &Settings,
    folder: &ModelFolder,
    base: (&ModelFolder, &Weights),
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<Annotated> {
    let fit = &settings.preference.fit;
    match &fit.pairs {
        PairsSettings::Playground(how) => {
            let pairs = generated(settings, *how, base, stopped)?;
            Ok(split_generated(&pairs, fit))
        }
        PairsSettings::Dataset(files) => annotated_files(settings, files, folder),
    }
}

/// The playground's annotated pairs: found, or made and kept.
pub(crate) fn generated(
    settings: &Settings,
    how: PlaygroundPairs,
    (folder, weights): (&ModelFolder, &Weights),
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<Vec<GeneratedPair>> {
    super::fits_playground(folder)?;
    let recipe = (
        "pairs",
        how,
        settings.actor.max_new_tokens,
        weights.digest()?.to_string(),
        settings.run.seed,
        env!("CARGO_PKG_VERSION"),
    );
    let path = kept(&settings.playground.base_dir, &recipe, |aside| {
        tracing::info!(
            "making annotated pairs: samples of the base, labelled by a noisy annotator"
        );
        let made = make(settings, how, (folder, weights), stopped)?;
        write(&aside.join("pairs.jsonl"), &made)
    })?;
    read(&path.join("pairs.jsonl"))
}

fn write(path: &Path, pairs: &[GeneratedPair]) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("failed to write {}", path.display()))?;
    let mut file = BufWriter::new(file);
    for pair in pairs {
        serde_json::to_writer(&mut file, pair)?;
        file.write_all(b"\n")?;
    }
    file.flush()
        .with_context(|| format!("failed to write {}", path.display()))
}

fn read(path: &Path) -> anyhow::Result<Vec<GeneratedPair>> {
    let rows = read_rows(path)?;
    rows.into_iter()
        .map(|row| {
            let advice = row
                .source
                .refuse("remove the folder to make the pairs again");
            serde_json::from_value(Value::Object(row.columns)).context(advice)
        })
        .collect()
}

fn make(
    settings: &Settings,
    PlaygroundPairs { count, flip, cycle }: PlaygroundPairs,
    (folder, weights): (&ModelFolder, &Weights),
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<Vec<GeneratedPair>> {
    let world = Seed(settings.run.seed).derive(WORLD);
    let posts: Vec<Post> = (0..count as u64)
        .map(|index| train_post(world.0, index))
        .collect();
    let model = super::language_model(folder, weights)?;
    let completions = sample_twice(
        &model,
        &posts,
        world,
        settings.actor.max_new_tokens,
        stopped,
    )?;
    let annotate = |(index, (post, two)): (u64, (&Post, Vec<Completion>))| {
        let [a, b] = [&two[0], &two[1]]
            .map(|c| utility(post.facts(), &c.ids, c.finish == Finish::EndOfText));
        let p = preference(a.value, a.style, b.value, b.style, cycle);
        let seed = Seed(train_seed(world.0, index)).derive(LABELS);
        let first = noisy_label(p, seed.0, flip);
        let (chosen, rejected) = if first {
            (&two[0], &two[1])
        } else {
            (&two[1], &two[0])
        };
        GeneratedPair {
            prompt: post.text(),
            chosen: folder.tokenizer.decode(&chosen.ids),
            rejected: folder.tokenizer.decode(&rejected.ids),
            gold: if first { p } else { 1.0 - p },
            prompt_ids: post.prompt_ids(),
            chosen_ids: chosen.ids.clone(),
            rejected_ids: rejected.ids.clone(),
        }
    };
    Ok((0..)
        .zip(posts.iter().zip(completions))
        .map(annotate)
        .collect())
}

/// Two completions of every post at temperature 1.
fn sample_twice(
    model: &LanguageModel,
    posts: &[Post],
    seed: Seed,
    max_new_tokens: usize,
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<Vec<Vec<Completion>>> {
    let sampling = SamplingSettings::plain(max_new_tokens);
    let longest = posts
        .iter()
        .map(|post| post.prompt_ids().len())
        .max()
        .unwrap_or(0);
    let mut sampler = Sampler::new(
        model.clone(),
        None,
        sampling,
        SLOTS,
        longest + max_new_tokens,
    )?;
    for (key, post) in (0..).zip(posts) {
        sampler.admit(Request {
            key,
            ids: post.prompt_ids(),
            seed: seed.derive(key),
            mixture_coefs: vec![0.0; 2],
            exact: 0,
            max_new_tokens,
        })?;
    }
    let mut ended = BTreeMap::new();
    while !sampler.is_idle() {
        anyhow::ensure!(
            !stopped(),
            "interrupted while making annotated pairs; begin again"
        );
        ended.extend(sampler.step()?.into_iter().map(|f| (f.key, f.completions)));
    }
    Ok(ended.into_values().collect())
}

/// The last share of generated pairs is for validation, where the true preference is the label.
fn split_generated(pairs: &[GeneratedPair], fit: &FitSettings) -> Annotated {
    let validation = held_out(pairs.len(), fit.validation);
    let (fitting, validation) = pairs.split_at(pairs.len() - validation);
    let example = |pair: &GeneratedPair, label: f32| Example {
        prompt: pair.prompt_ids.clone(),
        first: pair.chosen_ids.clone(),
        second: pair.rejected_ids.clone(),
        label,
    };
    Annotated {
        fitting: fitting.iter().map(|pair| example(pair, 1.0)).collect(),
        validation: validation
            .iter()
            .map(|pair| example(pair, pair.gold as f32))
            .collect(),
        left_out: LeftOut::default(),
        repeated: 0,
    }
}

fn held_out(count: usize, share: f64) -> usize {
    ((count as f64 * share).round() as usize).clamp(1, count.saturating_sub(1).max(1))
}

/// The annotated pairs of files, for a trunk with this folder.
pub(crate) fn annotated_files(
    settings: &Settings,
    files: &DatasetPairs,
    trunk: &ModelFolder,
) -> anyhow::Result<Annotated> {
    let seed = Seed(settings.run.seed);
    from_files(files, &settings.preference.fit, trunk, seed)
}

fn from_files(
    files: &DatasetPairs,
    fit: &FitSettings,
    folder: &ModelFolder,
    seed: Seed,
) -> anyhow::Result<Annotated> {
    let longest = fit.max_length.min(folder.config.max_positions);
    let (fitting, left_out) = examples(&files.path, files, longest, folder)?;
    let annotated = match files.validation_path.as_os_str().is_empty() {
        true => {
            let (fitting, validation) = split_by_prompt(fitting, fit.validation, seed)
                .map_err(|reason| unusable(&files.path, reason))?;
            Annotated {
                repeated: repeated(&fitting),
                fitting,
                validation,
                left_out,
            }
        }
        false => {
            let (validation, more) = examples(&files.validation_path, files, longest, folder)?;
            let (fitting, held_out) = without_prompts_of(fitting, &validation);
            if fitting.is_empty() {
                let reason = "all of its prompts are those of the validation file".into();
                return Err(unusable(&files.path, reason).into());
            }
            let held_out = LeftOut {
                held_out,
                ..LeftOut::default()
            };
            Annotated {
                repeated: repeated(&fitting),
                fitting,
                validation,
                left_out: left_out + more + held_out,
            }
        }
    };
    say_what_is_left_out(&files.path, &annotated);
    Ok(annotated)
}

fn say_what_is_left_out(path: &Path, annotated: &Annotated) {
    let left_out = annotated.left_out;
    if left_out.total() > 0 || annotated.repeated > 0 {
        tracing::warn!(
            path = %path.display(),
            too_long = left_out.too_long,
            empty = left_out.empty,
            equal_responses = left_out.equal,
            held_out = left_out.held_out,
            repeated = annotated.repeated,
            "pairs were left out, or repeat earlier ones"
        );
    }
}

fn unusable(path: &Path, reason: String) -> DatasetError {
    DatasetError::File {
        path: path.to_owned(),
        reason,
    }
}

/// The pairs of a drawn share of the prompts are for validation, at least one prompt's, and all others for fitting:
/// what is measured on is never what was fitted to, however often a prompt occurs.
fn split_by_prompt(
    pairs: Vec<Example>,
    share: f64,
    seed: Seed,
) -> Result<(Vec<Example>, Vec<Example>), String> {
    let mut number: HashMap<&[u32], u64> = HashMap::new();
    let numbers: Vec<u64> = pairs
        .iter()
        .map(|pair| {
            let next = number.len() as u64;
            *number.entry(pair.prompt.as_slice()).or_insert(next)
        })
        .collect();
    let prompts = number.len();
    if prompts < 2 {
        return Err("all pairs have the same prompt, and none can be held out: name preference.fit.pairs.validation_path".into());
    }
    let seed = seed.derive(SPLIT);
    let places = numbers
        .into_iter()
        .map(|number| shuffled(number, prompts as u64, seed));
    let mut drawn: Vec<(u64, Example)> = places.zip(pairs).collect();
    drawn.sort_by_key(|(place, _)| *place);
    let fitted = (prompts - held_out(prompts, share)) as u64;
    let at = drawn.partition_point(|(place, _)| *place < fitted);
    let mut fitting: Vec<Example> = drawn.into_iter().map(|(_, pair)| pair).collect();
    let validation = fitting.split_off(at);
    Ok((fitting, validation))
}

/// The pairs whose prompts no pair of `others` has, and how many are not.
fn without_prompts_of(mut pairs: Vec<Example>, others: &[Example]) -> (Vec<Example>, usize) {
    let held_out: HashSet<&Vec<u32>> = others.iter().map(|pair| &pair.prompt).collect();
    let before = pairs.len();
    pairs.retain(|pair| !held_out.contains(&pair.prompt));
    let taken = before - pairs.len();
    (pairs, taken)
}

/// How many pairs are the same as an earlier one.
fn repeated(pairs: &[Example]) -> usize {
    let distinct: HashSet<[&Vec<u32>; 3]> = pairs
        .iter()
        .map(|pair| [&pair.prompt, &pair.first, &pair.second])
        .collect();
    pairs.len() - distinct.len()
}

/// Where the settings say that prompts and responses are.
fn columns(files: &DatasetPairs) -> Columns {
    Columns {
        prompt: Column::named(&files.prompt_column, "preference.fit.pairs.prompt_column"),
        chosen: Column::named(&files.chosen_column, "preference.fit.pairs.chosen_column"),
        rejected: Column::named(
            &files.rejected_column,
            "preference.fit.pairs.rejected_column",
        ),
        ..Columns::default()
    }
}

/// The pairs of a file that can be used, and how many cannot.
fn examples(
    path: &Path,
    files: &DatasetPairs,
    longest: usize,
    folder: &ModelFolder,
) -> anyhow::Result<(Vec<Example>, LeftOut)> {
    let pairs = dataset::read(path, &columns(files), |form| form.pair())?;
    let prompts: Vec<_> = pairs.iter().map(|pair| &pair.value.prompt).collect();
    say_how_dialogues_are_used(path, &prompts, &folder.tokenizer);
    let (mut kept, mut left_out) = (Vec::new(), LeftOut::default());
    let mut seams = Seams::default();
    for Sourced { source, value } in &pairs {
        let read = tokens(value, &folder.tokenizer);
        let (example, seam) = read.map_err(|error| source.refuse(error.to_string()))?;
        seams.count(seam);
        let length = example.prompt.len() + example.first.len().max(example.second.len());
        let responses = [&value.chosen, &value.rejected].map(|response| response.trim());
        if responses[0] == responses[1] {
            left_out.equal += 1;
        } else if responses.contains(&"") {
            left_out.empty += 1;
        } else if length > longest {
            left_out.too_long += 1;
        } else {
            kept.push(example);
        }
    }
    seams.say(path);
    if kept.len() < 2 {
        let reason = format!(
            "{} pairs are left of {}: {left_out} are left out; a pair has at most {longest} tokens, see preference.fit.max_length",
            kept.len(),
            pairs.len(),
        );
        return Err(unusable(path, reason).into());
    }
    Ok((kept, left_out))
}

/// A pair in tokens, and how its responses follow its prompt.
fn tokens(pair: &Pair, tokenizer: &Tokenizer) -> Result<(Example, Seam), model::ModelError> {
    let read = tokenizer.encode_answered(&pair.prompt, &[&pair.chosen, &pair.rejected])?;
    let mut answers = read.answers.into_iter();
    let example = Example {
        prompt: read.prompt,
        first: answers.next().unwrap_or_default(),
        second: answers.next().unwrap_or_default(),
        label: 1.0,
    };
    Ok((example, read.seam))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: u32, first: u32) -> Example {
        Example {
            prompt: vec![prompt],
            first: vec![first],
            second: vec![0],
            label: 1.0,
        }
    }

    #[test]
    fn pairs_are_split_by_prompt() {
        let pairs: Vec<Example> = (0..40).map(|index| pair(index % 10, index)).collect();
        let (fitting, validation) = split_by_prompt(pairs, 0.2, Seed(3)).expect("ten prompts");
        assert_eq!((fitting.len(), validation.len()), (32, 8));
        let (_, shared) = without_prompts_of(fitting, &validation);
        assert_eq!(shared, 0, "no prompt is on both sides");
        let one = split_by_prompt(vec![pair(1, 2), pair(1, 3)], 0.5, Seed(3));
        assert!(one.is_err_and(|why| why.contains("validation_path")));
    }

    #[test]
    fn every_token_and_label_is_in_the_digest_of_pairs() {
        let of = |fitting: &[Example], validation: &[Example]| {
            let annotated = Annotated {
                fitting: fitting.to_vec(),
                validation: validation.to_vec(),
                left_out: LeftOut::default(),
                repeated: 0,
            };
            annotated.digest()
        };
        let [a, b, c] = [pair(1, 2), pair(3, 4), pair(5, 6)];
        let swapped = Example {
            first: a.second.clone(),
            second: a.first.clone(),
            ..a.clone()
        };
        let unsure = Example {
            label: 0.75,
            ..a.clone()
        };
        let list = |pairs: [&Example; 2]| pairs.map(Clone::clone);
        let last = [c.clone()];
        let all = [
            of(&list([&a, &b]), &last),
            of(&list([&b, &a]), &last),
            of(&list([&a, &b])[..1], &list([&b, &c])),
            of(&list([&swapped, &b]), &last),
            of(&list([&unsure, &b]), &last),
        ];
        let distinct: HashSet<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(all[0], of(&list([&a, &b]), &last));
    }

    #[test]
    fn what_a_validation_file_asks_is_not_fitted_to() {
        let pairs = vec![pair(1, 2), pair(2, 2), pair(1, 3)];
        let (kept, taken) = without_prompts_of(pairs, &[pair(1, 9)]);
        assert_eq!((kept, taken), (vec![pair(2, 2)], 2));
        assert_eq!(repeated(&[pair(1, 2), pair(1, 2), pair(1, 3)]), 1);
    }
}
