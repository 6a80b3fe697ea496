//! Annotated pairs: generated in the playground, with a noisy annotator, or read from a file.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use anyhow::Context;
use dataset::{Columns, DatasetError, Pair, read_rows, shuffled};
use learner::PromptRow;
use messages::{Completion, Finish, Seed};
use model::{
    CompletionWriter as _, LanguageModel, ModelFolder, Request, Sampler, SamplingSettings, Weights,
};
use playground::{Post, noisy_label, preference, train_post, train_seed, utility};
use preference::fit::Example;
use serde::{Deserialize, Serialize};
use settings::{DatasetPairs, FitSettings, PairsSettings, PlaygroundPairs, Settings};

use super::base::kept;

/// Annotated posts are none that a run trains or evaluates on.
const WORLD: u64 = 0xa110;

/// The seeds of the annotator's labels, apart from those of the completions.
const LABELS: u64 = 1;

/// Pairs whose order is drawn for the split into fitting and validation.
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
    /// Pairs that were longer than `preference.fit.max_length`, or had an empty response.
    pub(crate) left_out: usize,
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
        .map(|(line, row)| {
            serde_json::from_value(row).with_context(|| {
                format!(
                    "{}, line {line}: remove the folder to make the pairs again",
                    path.display()
                )
            })
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
        left_out: 0,
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
    if !files.validation_path.as_os_str().is_empty() {
        let (validation, longer) = examples(&files.validation_path, files, longest, folder)?;
        return Ok(Annotated {
            fitting,
            validation,
            left_out: left_out + longer,
        });
    }
    let count = fitting.len() as u64;
    let seed = seed.derive(SPLIT);
    let places = (0..count).map(|place| shuffled(place, count, seed));
    let mut drawn: Vec<_> = places.zip(fitting).collect();
    drawn.sort_by_key(|(place, _)| *place);
    let mut fitting: Vec<_> = drawn.into_iter().map(|(_, example)| example).collect();
    let validation = fitting.split_off(fitting.len() - held_out(fitting.len(), fit.validation));
    Ok(Annotated {
        fitting,
        validation,
        left_out,
    })
}

/// The pairs of a file that are neither too long nor empty, and how many are.
fn examples(
    path: &Path,
    files: &DatasetPairs,
    longest: usize,
    folder: &ModelFolder,
) -> anyhow::Result<(Vec<Example>, usize)> {
    let columns = Columns {
        prompt: files.prompt_column.clone(),
        chosen: files.chosen_column.clone(),
        rejected: files.rejected_column.clone(),
    };
    let refused = |line: usize, reason: String| DatasetError::Row {
        path: path.to_owned(),
        line,
        reason,
    };
    let (mut kept, mut left_out) = (Vec::new(), 0);
    for (line, row) in read_rows(path)? {
        let pair = Pair::from_row(&row, &columns).map_err(|reason| refused(line, reason))?;
        let example = tokens(&pair, folder).map_err(|error| refused(line, error.to_string()))?;
        let length = example.prompt.len() + example.first.len().max(example.second.len());
        let empty = [&pair.chosen, &pair.rejected].map(|response| response.trim().is_empty());
        if length > longest || empty.contains(&true) {
            left_out += 1;
        } else {
            kept.push(example);
        }
    }
    if kept.len() < 2 {
        let reason = format!(
            "{} pairs are left of {}: the others have more than {longest} tokens or an empty response; see preference.fit.max_length",
            kept.len(),
            kept.len() + left_out
        );
        return Err(refused(1, reason).into());
    }
    Ok((kept, left_out))
}

fn tokens(pair: &Pair, folder: &ModelFolder) -> Result<Example, model::ModelError> {
    let tokenizer = &folder.tokenizer;
    let prompt = tokenizer.encode_prompt(&pair.prompt)?;
    let eos = folder.config.eos.first().copied();
    let response = |text: &str| {
        let ids = tokenizer.encode_completion(&pair.prompt, &prompt, text)?;
        Ok::<_, model::ModelError>(ids.into_iter().chain(eos).collect())
    };
    Ok(Example {
        first: response(&pair.chosen)?,
        second: response(&pair.rejected)?,
        label: 1.0,
        prompt,
    })
}
