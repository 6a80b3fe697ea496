//! The playground's annotated pairs: samples of the base policy, labelled by a noisy annotator, and cached.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
};

use anyhow::Context;
use dataset::read_rows;
use hub::CancelToken;
use learner::PromptRow;
use messages::{Completion, Digest, Finish, Seed};
use model::{LanguageModel, MixtureSampler, Request, Sampler as _, SamplingSettings};
use playground::{
    EOS, Post, Utility, Vocabulary, noisy_label, preference, train_post, train_seed, utility,
};
use preference::reward_training::PreferenceExample;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use settings::{FitSettings, PlaygroundPairs, Settings};

use crate::assembly::{
    AnnotatedPairs, LoadedModel, SkippedPairs, cache::cached, preference_pairs::validation_count,
};

/// RNG stream id of the annotated posts; no run trains or evaluates on the same posts.
const POST_STREAM: u64 = 0xa110;

/// RNG stream id of the annotator's labels, apart from those of the completions.
const LABEL_STREAM: u64 = 1;

/// Number of completions sampled at once.
const SLOTS: usize = 64;

/// File of the pairs in their cached folder.
const PAIRS_FILE: &str = "pairs.jsonl";

/// A generated pair, as a line of JSON in its file: text, tokens and the true preference.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct GeneratedPair {
    prompt: String,
    chosen: String,
    rejected: String,
    /// True probability that `chosen` is preferred.
    gold: f64,
    prompt_ids: Vec<u32>,
    chosen_ids: Vec<u32>,
    rejected_ids: Vec<u32>,
}

impl GeneratedPair {
    /// The post as a prompt whose golden answer is the chosen completion.
    pub(crate) fn into_prompt(self) -> PromptRow {
        PromptRow {
            ids: self.prompt_ids,
            text: self.prompt,
            dialogue: None,
            golden: Some(self.chosen_ids),
            answer: Some(self.chosen),
            route: None,
        }
    }

    fn example(&self, label: f32) -> PreferenceExample {
        PreferenceExample {
            prompt: self.prompt_ids.clone(),
            first: self.chosen_ids.clone(),
            second: self.rejected_ids.clone(),
            label,
        }
    }
}

/// The annotated pairs of these settings with completions of `base`, cached under the digest of everything that
/// determines them. Blocks while they are sampled; ends early once `cancel` is cancelled.
pub(crate) fn generated_pairs(
    settings: &Settings,
    pairs: PlaygroundPairs,
    base: &LoadedModel,
    cancel: &CancelToken,
) -> anyhow::Result<Vec<GeneratedPair>> {
    super::check_vocabulary(&base.folder)?;
    let cache_key = (
        "pairs",
        pairs,
        settings.actor.max_new_tokens,
        base.weights.digest()?.to_string(),
        settings.run.seed,
        env!("CARGO_PKG_VERSION"),
    );
    let path = cached(&settings.playground.base_dir, &cache_key, |tmp| {
        tracing::info!(
            "generating annotated pairs: samples of the base, labelled by a noisy annotator"
        );
        let generated = generate(settings, pairs, base, cancel)?;
        write(&tmp.join(PAIRS_FILE), &generated)
    })?;
    read(&path.join(PAIRS_FILE))
}

/// A file of the annotated pairs in the row form of data sets, text with the prompt's special tokens, beside the base
/// policies of `playground.base_dir`; cached like [`generated_pairs`]. Blocks while they are sampled.
pub(crate) fn pairs_file(
    settings: &Settings,
    pairs: PlaygroundPairs,
    base: &LoadedModel,
    cancel: &CancelToken,
) -> anyhow::Result<PathBuf> {
    let generated = generated_pairs(settings, pairs, base, cancel)?;
    let rows: Vec<TextPair> = generated.iter().map(TextPair::of).collect();
    let mut digests = Vec::new();
    for row in &rows {
        digests.extend(Digest::of(&serde_json::to_vec(row)?).0);
    }
    let cache_key = ("pairs file", Digest::of(&digests).to_string());
    let path = cached(&settings.playground.base_dir, &cache_key, |tmp| {
        write(&tmp.join(PAIRS_FILE), &rows)
    })?;
    Ok(path.join(PAIRS_FILE))
}

/// A generated pair as a row of text.
#[derive(Debug, Serialize)]
struct TextPair {
    prompt: String,
    chosen: String,
    rejected: String,
}

impl TextPair {
    fn of(pair: &GeneratedPair) -> Self {
        let vocabulary = Vocabulary::shared();
        // An answer that reached its limit is closed by the reader like any other.
        let answer = |ids: &[u32]| {
            let end = ids.iter().position(|&id| id == EOS).unwrap_or(ids.len());
            vocabulary.text(&ids[..end])
        };
        Self {
            prompt: vocabulary.text(&pair.prompt_ids),
            chosen: answer(&pair.chosen_ids),
            rejected: answer(&pair.rejected_ids),
        }
    }
}

/// Splits off the last share of the pairs for validation, labelled with the true preference.
pub(crate) fn split(pairs: &[GeneratedPair], fit: &FitSettings) -> AnnotatedPairs {
    let validation = validation_count(pairs.len(), fit.validation);
    let (fitting, validation) = pairs.split_at(pairs.len() - validation);
    let with_gold = |pair: &GeneratedPair| pair.example(pair.gold as f32);
    AnnotatedPairs {
        fitting: fitting.iter().map(|pair| pair.example(1.0)).collect(),
        validation: validation.iter().map(with_gold).collect(),
        skipped: SkippedPairs::default(),
        duplicates: 0,
    }
}

fn write(path: &Path, pairs: &[impl Serialize]) -> anyhow::Result<()> {
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
                .refuse("remove the folder to generate the pairs again");
            serde_json::from_value(Value::Object(row.columns)).context(advice)
        })
        .collect()
}

fn generate(
    settings: &Settings,
    pairs: PlaygroundPairs,
    base: &LoadedModel,
    cancel: &CancelToken,
) -> anyhow::Result<Vec<GeneratedPair>> {
    let seed = Seed(settings.run.seed).derive(POST_STREAM);
    let posts: Vec<Post> = (0..pairs.count as u64)
        .map(|index| train_post(seed.0, index))
        .collect();
    let sampling = SamplingSettings::plain(settings.actor.max_new_tokens);
    let completions = sample_pairs(&base.language_model()?, &posts, seed, sampling, cancel)?;
    let text = |completion: &Completion| base.folder.tokenizer.decode(&completion.ids);
    let rows = (0..).zip(posts.iter().zip(&completions));
    let rows = rows.map(|(index, (post, completions))| {
        let [a, b] = completions.each_ref().map(|c| utility_of(post, c));
        let p = preference(a.value, a.style, b.value, b.style, pairs.cycle);
        let label_seed = Seed(train_seed(seed.0, index)).derive(LABEL_STREAM);
        let is_first = noisy_label(p, label_seed.0, pairs.flip);
        let [first, second] = completions;
        let (chosen, rejected) = if is_first {
            (first, second)
        } else {
            (second, first)
        };
        GeneratedPair {
            prompt: post.text(),
            chosen: text(chosen),
            rejected: text(rejected),
            gold: if is_first { p } else { 1.0 - p },
            prompt_ids: post.prompt_ids(),
            chosen_ids: chosen.ids.clone(),
            rejected_ids: rejected.ids.clone(),
        }
    });
    Ok(rows.collect())
}

fn utility_of(post: &Post, completion: &Completion) -> Utility {
    let is_finished = completion.finish == Finish::EndOfText;
    utility(post.facts(), &completion.ids, is_finished)
}

/// Two completions of every post.
fn sample_pairs(
    model: &LanguageModel,
    posts: &[Post],
    seed: Seed,
    sampling: SamplingSettings,
    cancel: &CancelToken,
) -> anyhow::Result<Vec<[Completion; 2]>> {
    let max_new_tokens = sampling.max_new_tokens;
    let longest = posts.iter().map(|post| post.prompt_ids().len()).max();
    let capacity = longest.unwrap_or(0) + max_new_tokens;
    let mut sampler = MixtureSampler::new(model.clone(), None, sampling, SLOTS, capacity)?;
    for (key, post) in (0..).zip(posts) {
        sampler.admit(Request {
            key,
            ids: post.prompt_ids(),
            seed: seed.derive(key),
            mixture_coefs: vec![0.0; 2],
            exact: 0,
            max_new_tokens,
            records_reference: false,
        })?;
    }
    let mut finished = BTreeMap::new();
    while !sampler.is_idle() {
        anyhow::ensure!(
            !cancel.is_cancelled(),
            "interrupted while generating annotated pairs; start again"
        );
        for group in sampler.step()? {
            let [first, second] = <[Completion; 2]>::try_from(group.completions)
                .map_err(|_| anyhow::anyhow!("the sampler returned other than two completions"))?;
            finished.insert(group.key, [first, second]);
        }
    }
    Ok(finished.into_values().collect())
}

#[cfg(test)]
mod tests {
    use messages::PromptText;

    use super::*;
    use crate::assembly::playground::base_folder;

    #[test]
    fn the_text_of_a_generated_pair_has_its_tokens() {
        let settings = settings::resolve("", "test", &[]).expect("the defaults");
        let folder = tempfile::tempdir().expect("a folder");
        let folder = base_folder(&settings.settings, folder.path()).expect("a tokenizer");
        for index in 0..20 {
            let post = train_post(7, index);
            let golden = post.golden(index);
            // One that ended, and one that was cut off, which the reader closes.
            let cut = golden[..golden.len() / 2].to_vec();
            let pair = GeneratedPair {
                prompt: post.text(),
                chosen: String::new(),
                rejected: String::new(),
                gold: 1.0,
                prompt_ids: post.prompt_ids(),
                chosen_ids: golden.clone(),
                rejected_ids: cut.clone(),
            };
            let text = TextPair::of(&pair);
            let prompt = PromptText::Text(text.prompt);
            let answers = [text.chosen.as_str(), text.rejected.as_str()];
            let encoded = folder.tokenizer.encode_answers(&prompt, &answers);
            let encoded = encoded.expect("words of the vocabulary");
            assert_eq!(encoded.prompt, post.prompt_ids());
            assert_eq!(encoded.answers, [golden, [cut, vec![EOS]].concat()]);
        }
    }
}
