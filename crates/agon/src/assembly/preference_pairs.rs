//! Annotated pairs as tokens: read from files and split into training and validation pairs, or generated in the
//! playground.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::Path,
};

use dataset::{Column, Columns, DatasetError, FileLimits, shuffled};
use hub::CancelToken;
use learner::{PairCounts, PairLimit, PairRow, visit_pairs};
use messages::{Digest, Seed};
use model::ModelFolder;
use preference::{apo::HumanVerdictPairs, reward_training::PreferenceExample};
use serde::Serialize;
use settings::{DatasetPairs, FitSettings, PairsSettings, Settings};
use telemetry::HUMAN_VERDICT_PAIRS_FILE;

use crate::assembly::{LoadedModel, playground};

/// RNG stream id of the order of prompts, whose last share is for validation.
const SPLIT_STREAM: u64 = 0x5917;

/// Annotated pairs, as tokens of the backbone.
#[derive(Debug)]
pub(crate) struct AnnotatedPairs {
    /// Pairs for training.
    pub(crate) fitting: Vec<PreferenceExample>,
    /// Held-out pairs; in the playground their labels are the true preference, without the annotator's noise.
    pub(crate) validation: Vec<PreferenceExample>,
    /// Pairs that are in neither.
    pub(crate) skipped: SkippedPairs,
    /// Training pairs that are equal to an earlier one.
    pub(crate) duplicates: usize,
}

impl AnnotatedPairs {
    /// Digest of all tokens and labels; part of the cache key of a trained model.
    pub(crate) fn digest(&self) -> Digest {
        let digests = |pairs: &[PreferenceExample]| {
            let each = pairs.iter().map(|pair| {
                let PreferenceExample {
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
        let both = format!("{} {}", digests(&self.fitting), digests(&self.validation));
        Digest::of(both.as_bytes())
    }
}

/// Number of skipped pairs, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct SkippedPairs {
    /// Longer than `preference.fit.max_length`.
    pub(crate) too_long: usize,
    /// An empty response.
    pub(crate) empty: usize,
    /// Two equal responses.
    pub(crate) equal: usize,
    /// A response with further turns in it.
    pub(crate) later_turns: usize,
    /// A prompt that is also in the validation file.
    pub(crate) held_out: usize,
}

impl SkippedPairs {
    /// Sum over all reasons.
    pub(crate) fn total(self) -> usize {
        self.too_long + self.empty + self.equal + self.later_turns + self.held_out
    }
}

impl std::ops::Add for SkippedPairs {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            too_long: self.too_long + other.too_long,
            empty: self.empty + other.empty,
            equal: self.equal + other.equal,
            later_turns: self.later_turns + other.later_turns,
            held_out: self.held_out + other.held_out,
        }
    }
}

impl fmt::Display for SkippedPairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reasons = [
            (self.too_long, "too long"),
            (self.empty, "with an empty response"),
            (self.equal, "with two equal responses"),
            (self.later_turns, "with further turns in a response"),
            (self.held_out, "with a prompt of the validation file"),
        ];
        let reasons = reasons.iter().filter(|(count, _)| *count > 0);
        let reasons = reasons.map(|(count, reason)| format!("{count} {reason}"));
        match reasons.collect::<Vec<String>>().as_slice() {
            [] => f.write_str("0 pairs"),
            reasons => f.write_str(&reasons.join(", ")),
        }
    }
}

/// The annotated pairs of `[preference.fit]`, as tokens of the backbone in `folder`. The playground's pairs are samples
/// of `base`. Blocks; ends early once `cancel` is cancelled.
pub(crate) fn annotated_pairs(
    settings: &Settings,
    folder: &ModelFolder,
    base: &LoadedModel,
    cancel: &CancelToken,
) -> anyhow::Result<AnnotatedPairs> {
    let fit = &settings.preference.fit;
    match &fit.pairs {
        PairsSettings::Playground(pairs) => {
            let pairs = playground::generated_pairs(settings, *pairs, base, cancel)?;
            Ok(playground::split(&pairs, fit))
        }
        PairsSettings::Dataset(files) => read_pairs(settings, files, folder),
    }
}

/// Number of validation pairs or prompts of `count`: this share, but at least one, and one is left for training.
pub(super) fn validation_count(count: usize, share: f64) -> usize {
    ((count as f64 * share).round() as usize).clamp(1, count.saturating_sub(1).max(1))
}

/// The annotated pairs of files, as tokens of the backbone with this folder.
pub(super) fn read_pairs(
    settings: &Settings,
    files: &DatasetPairs,
    backbone: &ModelFolder,
) -> anyhow::Result<AnnotatedPairs> {
    let fit: &FitSettings = &settings.preference.fit;
    let longest = fit.max_length.min(backbone.config.max_positions);
    let (fitting, skipped) = examples(&files.path, files, longest, backbone)?;
    let annotated = match files.validation_path.as_os_str().is_empty() {
        true => {
            let seed = Seed(settings.run.seed);
            let (fitting, validation) = split_by_prompt(fitting, fit.validation, seed)
                .map_err(|reason| unusable(&files.path, reason))?;
            AnnotatedPairs {
                duplicates: duplicates(&fitting),
                fitting,
                validation,
                skipped,
            }
        }
        false => {
            let (validation, more) = examples(&files.validation_path, files, longest, backbone)?;
            let (fitting, held_out) = without_prompts_of(fitting, &validation);
            if fitting.is_empty() {
                let reason = "all of its prompts are in the validation file too".into();
                return Err(unusable(&files.path, reason).into());
            }
            let held_out = SkippedPairs {
                held_out,
                ..SkippedPairs::default()
            };
            AnnotatedPairs {
                duplicates: duplicates(&fitting),
                fitting,
                validation,
                skipped: skipped + more + held_out,
            }
        }
    };
    log_skipped(&files.path, &annotated);
    Ok(annotated)
}

fn log_skipped(path: &Path, annotated: &AnnotatedPairs) {
    let skipped = annotated.skipped;
    if skipped.total() > 0 || annotated.duplicates > 0 {
        tracing::warn!(
            path = %path.display(),
            too_long = skipped.too_long,
            empty = skipped.empty,
            equal_responses = skipped.equal,
            later_turns = skipped.later_turns,
            held_out = skipped.held_out,
            duplicates = annotated.duplicates,
            "some pairs are skipped or duplicates"
        );
    }
}

fn unusable(path: &Path, reason: String) -> DatasetError {
    DatasetError::File {
        path: path.to_owned(),
        reason,
    }
}

/// Splits pairs into training and validation by prompt: the pairs of a random share of the prompts, at least one, are
/// held out, so that no prompt is on both sides however often it occurs.
fn split_by_prompt(
    pairs: Vec<PreferenceExample>,
    share: f64,
    seed: Seed,
) -> Result<(Vec<PreferenceExample>, Vec<PreferenceExample>), String> {
    let mut indices: HashMap<&[u32], u64> = HashMap::new();
    let prompt_indices: Vec<u64> = pairs
        .iter()
        .map(|pair| {
            let next = indices.len() as u64;
            *indices.entry(pair.prompt.as_slice()).or_insert(next)
        })
        .collect();
    let prompts = indices.len();
    if prompts < 2 {
        return Err("all pairs have the same prompt, and none can be held out: name preference.fit.pairs.validation_path".into());
    }
    let seed = seed.derive(SPLIT_STREAM);
    let positions = prompt_indices
        .into_iter()
        .map(|index| shuffled(index, prompts as u64, seed));
    let mut ordered: Vec<(u64, PreferenceExample)> = positions.zip(pairs).collect();
    ordered.sort_by_key(|(position, _)| *position);
    let training_prompts = (prompts - validation_count(prompts, share)) as u64;
    let at = ordered.partition_point(|(position, _)| *position < training_prompts);
    let mut fitting: Vec<PreferenceExample> = ordered.into_iter().map(|(_, pair)| pair).collect();
    let validation = fitting.split_off(at);
    Ok((fitting, validation))
}

/// The pairs whose prompts do not occur in `others`, and the number of removed ones.
fn without_prompts_of(
    mut pairs: Vec<PreferenceExample>,
    others: &[PreferenceExample],
) -> (Vec<PreferenceExample>, usize) {
    let held_out: HashSet<&Vec<u32>> = others.iter().map(|pair| &pair.prompt).collect();
    let before = pairs.len();
    pairs.retain(|pair| !held_out.contains(&pair.prompt));
    let removed = before - pairs.len();
    (pairs, removed)
}

/// Number of pairs that are equal to an earlier one.
fn duplicates(pairs: &[PreferenceExample]) -> usize {
    let distinct: HashSet<[&Vec<u32>; 3]> = pairs
        .iter()
        .map(|pair| [&pair.prompt, &pair.first, &pair.second])
        .collect();
    pairs.len() - distinct.len()
}

/// The columns of prompts and responses.
fn columns(files: &DatasetPairs) -> Columns {
    Columns {
        prompt: Column::named(&files.prompt_column, "preference.fit.pairs.prompt_column"),
        chosen: Column::named(&files.chosen_column, "preference.fit.pairs.chosen_column"),
        rejected: Column::named(
            &files.rejected_column,
            "preference.fit.pairs.rejected_column",
        ),
        chat: files.chat,
        limits: FileLimits {
            max_file_bytes: files.max_file_bytes,
            max_rows: files.max_rows,
            section: Some("preference.fit.pairs"),
        },
        ..Columns::default()
    }
}

/// The usable pairs of a file, and the number of skipped ones.
fn examples(
    path: &Path,
    files: &DatasetPairs,
    longest: usize,
    folder: &ModelFolder,
) -> anyhow::Result<(Vec<PreferenceExample>, SkippedPairs)> {
    let (examples, counts) = all_examples(path, &columns(files), longest, folder)?;
    let skipped = SkippedPairs {
        too_long: counts.too_long,
        empty: counts.empty,
        equal: counts.equal,
        later_turns: counts.later_turns,
        held_out: 0,
    };
    if examples.len() < 2 {
        let reason = format!(
            "at least two pairs are needed, to train on and to hold out, and {} of {} are left: {skipped} are skipped; a pair has at \
             most {longest} tokens, see preference.fit.max_length",
            examples.len(),
            counts.read,
        );
        return Err(unusable(path, reason).into());
    }
    Ok((examples, skipped))
}

/// All pairs of a file that are not skipped, and the counts of the others.
fn all_examples(
    path: &Path,
    columns: &Columns,
    longest: usize,
    folder: &ModelFolder,
) -> Result<(Vec<PreferenceExample>, PairCounts), DatasetError> {
    let limit = PairLimit {
        tokens: longest,
        setting: "preference.fit.max_length",
        refuses: false,
    };
    let mut examples = Vec::new();
    let each = |row: PairRow| {
        examples.push(PreferenceExample {
            prompt: row.prompt,
            first: row.chosen.ids,
            second: row.rejected.ids,
            label: 1.0,
        });
    };
    let counts = visit_pairs(path, columns, limit, &folder.tokenizer, each)?;
    Ok((examples, counts))
}

/// Reads the pairs of people's verdicts in a run directory, but for prompts of the `held_out` pairs. A file that cannot be
/// read is named in a warning: it does not end the run.
pub(crate) fn human_verdict_pairs(
    run_dir: &Path,
    fit: &FitSettings,
    backbone: ModelFolder,
    held_out: &[PreferenceExample],
) -> HumanVerdictPairs {
    let path = run_dir.join(HUMAN_VERDICT_PAIRS_FILE);
    let longest = fit.max_length.min(backbone.config.max_positions);
    let held_out = held_out.to_vec();
    Box::new(move || {
        if !path.exists() {
            return Vec::new();
        }
        match all_examples(&path, &Columns::default(), longest, &backbone) {
            Ok((examples, counts)) => {
                let (examples, held_out) = without_prompts_of(examples, &held_out);
                let (read, kept) = (counts.read, examples.len());
                tracing::info!(read, kept, held_out, "pairs of people's verdicts");
                examples
            }
            Err(error) => {
                tracing::warn!(
                    path = %path.display(),
                    %error,
                    "failed to read the pairs of people's verdicts: the round trains without them"
                );
                Vec::new()
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: u32, first: u32) -> PreferenceExample {
        PreferenceExample {
            prompt: vec![prompt],
            first: vec![first],
            second: vec![0],
            label: 1.0,
        }
    }

    #[test]
    fn pairs_are_split_by_prompt() {
        let pairs: Vec<PreferenceExample> = (0..40).map(|index| pair(index % 10, index)).collect();
        let (fitting, validation) = split_by_prompt(pairs, 0.2, Seed(3)).expect("ten prompts");
        assert_eq!((fitting.len(), validation.len()), (32, 8));
        let (_, shared) = without_prompts_of(fitting, &validation);
        assert_eq!(shared, 0, "no prompt is on both sides");
        let one = split_by_prompt(vec![pair(1, 2), pair(1, 3)], 0.5, Seed(3));
        assert!(one.is_err_and(|reason| reason.contains("validation_path")));
    }

    #[test]
    fn the_digest_covers_every_token_and_label() {
        let digest = |fitting: &[PreferenceExample], validation: &[PreferenceExample]| {
            let annotated = AnnotatedPairs {
                fitting: fitting.to_vec(),
                validation: validation.to_vec(),
                skipped: SkippedPairs::default(),
                duplicates: 0,
            };
            annotated.digest()
        };
        let [a, b, c] = [pair(1, 2), pair(3, 4), pair(5, 6)];
        let swapped = PreferenceExample {
            first: a.second.clone(),
            second: a.first.clone(),
            ..a.clone()
        };
        let unsure = PreferenceExample {
            label: 0.75,
            ..a.clone()
        };
        let list = |pairs: [&PreferenceExample; 2]| pairs.map(Clone::clone);
        let last = [c.clone()];
        let all = [
            digest(&list([&a, &b]), &last),
            digest(&list([&b, &a]), &last),
            digest(&list([&a, &b])[..1], &list([&b, &c])),
            digest(&list([&swapped, &b]), &last),
            digest(&list([&unsure, &b]), &last),
        ];
        let distinct: HashSet<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(all[0], digest(&list([&a, &b]), &last));
    }

    #[test]
    fn prompts_of_the_validation_file_are_not_trained_on() {
        let pairs = vec![pair(1, 2), pair(2, 2), pair(1, 3)];
        let (fitting, removed) = without_prompts_of(pairs, &[pair(1, 9)]);
        assert_eq!((fitting, removed), (vec![pair(2, 2)], 2));
        assert_eq!(duplicates(&[pair(1, 2), pair(1, 2), pair(1, 3)]), 1);
    }
}
