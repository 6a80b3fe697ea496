//! Record of what a run is made of, for its checkpoints: digests of files, and the settings that give them their
//! meaning.
//!
//! What may change on the way (the learning rate, the number of steps, addresses, paths of files that stay the same) is
//! not part of it.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::Context;
use learner::{InputRecord, PairFiles};
use messages::Digest;
use model::ModelFolder;
use settings::{JudgeSettings, PairsSettings, Settings, flat};

use crate::assembly::{JudgeSource, RunInputs, judge_digest};

/// Keys, or beginnings of keys, of the settings in the record.
const RECORDED: &[&str] = &[
    "run.seed",
    "model.dtype",
    "model.reference_probabilities",
    "model.lora_",
    "model.target_modules",
    "prompts.",
    "pairs.",
    "actor.temperature",
    "actor.top_",
    "actor.min_p",
    "actor.mixture_coef",
    "actor.num_generations",
    "actor.max_new_tokens",
    "preference.judge.",
    "preference.orders",
    "preference.missing_eos_penalty",
    "preference.length_",
    "preference.chat.",
    "learner.objective.",
    "learner.label",
    "learner.off_policy",
    "learner.max_ratio",
    "learner.pair_selection",
    "learner.min_margin",
    "learner.logp_reduction",
    "playground.",
    "reference.",
];

/// Keys among those that do not change what a run is: places, limits and speed.
const NOT_RECORDED: &[&str] = &[
    "prompts.path",
    "prompts.mix",
    "prompts.held_out_path",
    "prompts.max_",
    "pairs.path",
    "pairs.mix",
    "pairs.max_",
    "pairs.too_long",
    "pairs.epochs",
    "playground.base_dir",
    "preference.judge.path",
    "preference.judge.urls",
    "preference.judge.api_key_path",
    "preference.judge.token_path",
    "preference.judge.concurrency",
];

/// Length of the blocks that a file is read in, in bytes.
const BLOCK_BYTES: usize = 4 << 20;

impl RunInputs {
    /// Record of these inputs and of the settings `config`, a resolved configuration. `judge` is the run's judge, if
    /// this process has it.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(crate) fn record(
        &self,
        settings: &Settings,
        config: &str,
        judge: Option<&JudgeSource>,
    ) -> anyhow::Result<InputRecord> {
        let mut record = InputRecord::default();
        for (key, value) in flat(config).unwrap_or_default() {
            if is_recorded(&key) {
                record.insert(key, value);
            }
        }
        record_model(&self.model.folder, &mut record)?;
        let adapter = match &self.adapter_folder {
            Some(folder) => files_digest(&safetensors_in(folder)?)?,
            None => "none".into(),
        };
        record.insert("adapter of model.adapter", adapter);
        for (name, digest) in self.prompts.digests() {
            record.insert(name, digest.to_string());
        }
        if let Some(pairs) = &self.pairs {
            record_pairs(pairs, &mut record);
        }
        if let PairsSettings::Dataset(pairs) = &settings.preference.fit.pairs
            && is_fitted(settings)
        {
            let digest = files_digest(&dataset::files(&pairs.path)?)?;
            let source = format!("preference.fit.pairs.path = {}", pairs.path.display());
            record.insert_from("files of preference.fit.pairs", source, digest);
        }
        if let Some(judge) = judge.filter(|judge| !matches!(judge, JudgeSource::Plain(_))) {
            record.insert("model of the judge", judge_digest(judge)?.to_string());
        }
        Ok(record)
    }
}

fn is_recorded(key: &str) -> bool {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| key.starts_with(prefix));
    starts(RECORDED) && !starts(NOT_RECORDED)
}

/// Records the pairs: together, and of several files each, so that a change names the file.
fn record_pairs(pairs: &PairFiles, record: &mut InputRecord) {
    let files = pairs.files();
    let named: Vec<String> = files
        .iter()
        .map(|(path, _)| path.display().to_string())
        .collect();
    let key = match files.len() {
        1 => "pairs.path",
        _ => "pairs.mix",
    };
    let source = format!("{key} = {}", named.join(", "));
    record.insert_from("rows of the pairs", source, pairs.digest().to_string());
    for (number, (path, digest)) in (1..).zip(&files).filter(|_| files.len() > 1) {
        let name = format!("rows of file {number} of pairs.mix");
        record.insert_from(name, path.display().to_string(), digest.to_string());
    }
}

/// Records the reference model: its weights and what determines how it reads and writes.
fn record_model(folder: &ModelFolder, record: &mut InputRecord) -> anyhow::Result<()> {
    let path = &folder.path;
    record.insert(
        "weights of the reference model",
        files_digest(&safetensors_in(path)?)?,
    );
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ] {
        let files: Vec<PathBuf> = Some(path.join(name))
            .into_iter()
            .filter(|f| f.is_file())
            .collect();
        record.insert(
            format!("{name} of the reference model"),
            files_digest(&files)?,
        );
    }
    let stops = folder.tokenizer.stops();
    let ids: Vec<String> = stops.ids().map(|id| id.to_string()).collect();
    record.insert("stop tokens", ids.join(", "));
    let template = folder.tokenizer.chat_template_digest();
    let template = template.map_or_else(|| "none".to_owned(), |digest| digest.to_string());
    record.insert("chat template", template);
    Ok(())
}

/// Whether the run's judge is trained on the pairs of the settings.
fn is_fitted(settings: &Settings) -> bool {
    let preference = &settings.preference;
    let has_no_model = match &preference.judge {
        JudgeSettings::BradleyTerry { path } | JudgeSettings::Pairwise { path } => path.is_empty(),
        _ => false,
    };
    has_no_model || preference.apo.refresh_steps > 0
}

/// Files of weights in a folder, by name.
fn safetensors_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let unreadable = || format!("failed to read {}", folder.display());
    let entries = fs::read_dir(folder).with_context(unreadable)?;
    let paths = entries.map(|entry| Ok(entry?.path()));
    let paths: io::Result<Vec<PathBuf>> = paths.collect();
    let mut paths = paths.with_context(unreadable)?;
    paths.retain(|path| path.is_file() && path.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    Ok(paths)
}

/// Digest of the contents of files, in this order.
fn files_digest(paths: &[PathBuf]) -> anyhow::Result<String> {
    let mut digests = Vec::new();
    for path in paths {
        let digest = file_digest(path);
        digests.extend(
            digest
                .with_context(|| format!("failed to read {}", path.display()))?
                .0,
        );
    }
    Ok(Digest::of(&digests).to_string())
}

/// Digest of the digests of a file's blocks.
fn file_digest(path: &Path) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let (mut block, mut digests) = (Vec::with_capacity(BLOCK_BYTES), Vec::new());
    loop {
        block.clear();
        Read::by_ref(&mut file)
            .take(BLOCK_BYTES as u64)
            .read_to_end(&mut block)?;
        if block.is_empty() {
            return Ok(Digest::of(&digests));
        }
        digests.extend(Digest::of(&block).0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_change_a_runs_meaning_are_recorded() {
        for key in [
            "run.seed",
            "model.lora_rank",
            "prompts.kind",
            "preference.judge.kind",
            "learner.label_flip",
        ] {
            assert!(is_recorded(key), "{key}");
        }
        for key in [
            "learner.learning_rate",
            "learner.steps",
            "evaluation.prompts",
            "prompts.path",
            "prompts.max_file_bytes",
            "preference.judge.urls",
            "telemetry.page",
            "transport.url",
        ] {
            assert!(!is_recorded(key), "{key}");
        }
        let resolved = settings::resolve("", "the defaults", &[]).expect("the defaults are valid");
        let defaults = flat(&resolved.toml).expect("the defaults are TOML");
        for prefix in RECORDED
            .iter()
            .filter(|prefix| !prefix.starts_with("preference.judge"))
        {
            let is_known = defaults.keys().any(|key| key.starts_with(prefix));
            assert!(
                is_known || prefix.ends_with("reference_probabilities"),
                "{prefix}"
            );
        }
    }

    #[test]
    fn a_digest_is_of_contents_and_not_of_names() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, content).expect("a file");
            path
        };
        let long = vec![7; BLOCK_BYTES + 1];
        let (one, copy) = (file("one", &long), file("copy", &long));
        let mut other = long.clone();
        other[BLOCK_BYTES] = 8;
        let other = file("other", &other);
        let digest = |path: &PathBuf| file_digest(path).expect("a readable file");
        assert_eq!(digest(&one), digest(&copy));
        assert_ne!(digest(&one), digest(&other));
        assert!(files_digest(&[folder.path().join("missing")]).is_err());
    }
}
