//! Files of a model: a Hugging Face folder or a `.gguf` file. Nothing is downloaded.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use messages::Digest;
use serde_json::{Map, Value};
#[cfg(any(test, feature = "engine"))]
use tempfile::NamedTempFile;

use crate::error::MistralError;

/// Size of the chunks in which a file is hashed, in bytes.
const CHUNK: u64 = 1 << 26;

/// Location of a model and how it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// A Hugging Face folder, or a `.gguf` file.
    pub path: PathBuf,
    /// A `tokenizer.json` that replaces the model's own.
    pub tokenizer: Option<PathBuf>,
    /// A `.jinja` file that replaces the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// In-situ quantisation of a folder's weights, by its mistral.rs name.
    pub isq: Option<String>,
}

impl ModelFiles {
    /// A folder loaded without overrides.
    #[must_use]
    pub fn folder(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            tokenizer: None,
            chat_template: None,
            isq: None,
        }
    }

    /// Whether the model is a `.gguf` file.
    #[must_use]
    pub fn is_gguf(&self) -> bool {
        self.path.is_file()
    }

    /// Checks that all files exist and match the settings, without reading weights.
    ///
    /// # Errors
    /// The first missing file or mismatch.
    pub fn check(&self) -> Result<(), MistralError> {
        self.files().map(drop)
    }

    /// Digest of all files and of the quantisation.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn digest(&self) -> Result<Digest, MistralError> {
        let mut parts = format!("{:?}", self.isq).into_bytes();
        for path in self.files()? {
            parts.extend(chunk_digests(&path).map_err(|source| unreadable(&path, source))?);
        }
        Ok(Digest::of(&parts))
    }

    /// Paths of the weight files.
    pub(crate) fn weights(&self) -> Result<Vec<PathBuf>, MistralError> {
        if self.is_gguf() {
            return Ok(vec![self.path.clone()]);
        }
        let index = self.path.join("model.safetensors.index.json");
        let files = if index.exists() {
            shards(&index)?
        } else {
            vec!["model.safetensors".to_owned()]
        };
        let files = files.iter().map(|name| existing(self.path.join(name)));
        files.collect()
    }

    /// A rewritten `config.json` for mistral.rs 0.8.1, or `None` if it can read the original: transformers 5 writes the
    /// rotary embedding parameters into `rope_parameters` instead of the top level.
    #[cfg(any(test, feature = "engine"))]
    pub(crate) fn config(&self) -> Result<Option<NamedTempFile>, MistralError> {
        if self.is_gguf() {
            return Ok(None);
        }
        let path = self.path.join("config.json");
        let text = fs::read_to_string(&path).map_err(|source| unreadable(&path, source))?;
        let Some(rewritten) = with_top_level_rope(&text) else {
            return Ok(None);
        };
        let file = NamedTempFile::with_suffix(".json").and_then(|mut file| {
            io::Write::write_all(&mut file, rewritten.as_bytes())?;
            Ok(file)
        });
        Ok(Some(file.map_err(|source| unreadable(&path, source))?))
    }

    /// Path of an optional file of the folder, if it exists.
    pub(crate) fn optional(&self, name: &str) -> Option<PathBuf> {
        Some(self.path.join(name)).filter(|path| !self.is_gguf() && path.exists())
    }

    /// Paths of all files that are read; each exists.
    fn files(&self) -> Result<Vec<PathBuf>, MistralError> {
        existing(self.path.clone())?;
        let unusable = |path: &Path, reason: &str| MistralError::Unusable {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        if let Some(template) = &self.chat_template
            && template.extension().is_none_or(|end| end != "jinja")
        {
            let reason = "mistral.rs reads chat templates from files whose name ends in .jinja";
            return Err(unusable(template, reason));
        }
        if self.is_gguf() && self.isq.is_some() {
            let reason = "a .gguf file is quantised already: leave out isq";
            return Err(unusable(&self.path, reason));
        }
        let mut files = self.weights()?;
        if !self.is_gguf() {
            let config = existing(self.path.join("config.json"))?;
            check_scaling(&config).map_err(|reason| unusable(&config, &reason))?;
            files.push(config);
            if self.tokenizer.is_none() {
                files.push(existing(self.path.join("tokenizer.json"))?);
            }
            let optional = [
                "generation_config.json",
                "tokenizer_config.json",
                "chat_template.jinja",
            ];
            files.extend(optional.iter().filter_map(|name| self.optional(name)));
        }
        for given in [&self.tokenizer, &self.chat_template] {
            files.extend(given.clone().map(existing).transpose()?);
        }
        Ok(files)
    }
}

/// Rotary embedding parameters of a configuration. As in transformers, a non-empty `rope_scaling` takes precedence over
/// `rope_parameters`.
fn rope_parameters(config: &Map<String, Value>) -> Option<&Map<String, Value>> {
    let mut found = ["rope_scaling", "rope_parameters"]
        .into_iter()
        .filter_map(|key| config.get(key)?.as_object());
    found.find(|keys| !keys.is_empty())
}

/// Type of rotary scaling of a configuration.
fn rope_type(config: &Map<String, Value>) -> &str {
    let kind = rope_parameters(config)
        .and_then(|keys| keys.get("rope_type").or(keys.get("type"))?.as_str());
    kind.unwrap_or("default")
}

/// Types of rotary scaling that mistral.rs 0.8.1 implements for the architectures of `model`; it silently ignores
/// others.
fn supported_scalings(architecture: &str) -> Option<&'static [&'static str]> {
    match architecture {
        "LlamaForCausalLM" => Some(&["default", "linear", "llama3"]),
        "MistralForCausalLM" | "Qwen2ForCausalLM" | "Qwen3ForCausalLM" => Some(&["default"]),
        _ => None,
    }
}

/// Checks that mistral.rs implements the rotary scaling of the configuration in `path`.
fn check_scaling(path: &Path) -> Result<(), String> {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(());
    };
    let config: Map<String, Value> = serde_json::from_str(&text).unwrap_or_default();
    let architecture = config
        .get("architectures")
        .and_then(|names| names[0].as_str());
    let Some(supported) = architecture.and_then(supported_scalings) else {
        return Ok(());
    };
    let kind = rope_type(&config);
    match supported.contains(&kind) {
        true => Ok(()),
        false => Err(format!(
            "mistral.rs does not support the rotary scaling {kind:?} of a {}; use Agon's own engine",
            architecture.unwrap_or_default()
        )),
    }
}

/// Copies `rope_theta` and `rope_scaling` from `rope_parameters` to the top level. `None` if nothing changes.
#[cfg(any(test, feature = "engine"))]
fn with_top_level_rope(text: &str) -> Option<String> {
    let config: Map<String, Value> = serde_json::from_str(text).ok()?;
    let rope = rope_parameters(&config)?.clone();
    let mut rewritten = config.clone();
    if let Some(theta) = rope.get("rope_theta") {
        rewritten.insert("rope_theta".into(), theta.clone());
    }
    if rope_type(&config) != "default" {
        rewritten.insert("rope_scaling".into(), rope.into());
    }
    (rewritten != config).then(|| Value::from(rewritten).to_string())
}

/// Distinct shard names of an index.
fn shards(index: &Path) -> Result<Vec<String>, MistralError> {
    let text = fs::read_to_string(index).map_err(|source| unreadable(index, source))?;
    let read: Option<Value> = serde_json::from_str(&text).ok();
    let names = read
        .as_ref()
        .and_then(|read| read["weight_map"].as_object());
    let names = names.ok_or_else(|| MistralError::Unusable {
        path: index.to_owned(),
        reason: "it has no \"weight_map\"".into(),
    })?;
    let names: BTreeSet<&str> = names.values().filter_map(Value::as_str).collect();
    Ok(names.into_iter().map(str::to_owned).collect())
}

/// Returns `path` if it exists.
fn existing(path: PathBuf) -> Result<PathBuf, MistralError> {
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(unreadable(&path, source)),
    }
}

fn unreadable(path: &Path, source: io::Error) -> MistralError {
    MistralError::Unreadable {
        path: path.to_owned(),
        source,
    }
}

/// Concatenated digests of a file's chunks.
fn chunk_digests(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let (mut digests, mut chunk) = (Vec::new(), Vec::new());
    loop {
        chunk.clear();
        if Read::by_ref(&mut file)
            .take(CHUNK)
            .read_to_end(&mut chunk)?
            == 0
        {
            return Ok(digests);
        }
        digests.extend(Digest::of(&chunk).0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files, each containing `{}`.
    fn folder(names: &[&str]) -> (tempfile::TempDir, ModelFiles) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in names {
            fs::write(folder.path().join(name), "{}").expect("a file");
        }
        let source = ModelFiles::folder(folder.path());
        (folder, source)
    }

    const COMPLETE: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

    #[test]
    fn missing_files_are_reported() {
        for missing in COMPLETE {
            let (_folder, source) = folder(&COMPLETE);
            source.check().expect("all files are there");
            fs::remove_file(source.path.join(missing)).expect("it was there");
            let refused = source.check().expect_err(missing).to_string();
            assert!(refused.contains(missing), "{refused}");
        }
        let nowhere = ModelFiles::folder(Path::new("/nowhere/model"));
        let refused = nowhere.check().expect_err("it is not there").to_string();
        assert!(refused.contains("/nowhere/model"), "{refused}");
        assert!(refused.contains("name a Hugging Face folder"), "{refused}");
    }

    #[test]
    fn mismatched_settings_are_rejected() {
        let (folder, source) = folder(&["model.gguf", "template.txt"]);
        let gguf = folder.path().join("model.gguf");
        for (refused, says) in [
            (
                ModelFiles {
                    isq: Some("q4k".into()),
                    ..ModelFiles::folder(&gguf)
                },
                "leave out isq",
            ),
            (
                ModelFiles {
                    chat_template: Some(folder.path().join("template.txt")),
                    ..source.clone()
                },
                "ends in .jinja",
            ),
        ] {
            let refused = refused.check().expect_err(says).to_string();
            assert!(refused.contains(says), "{refused}");
        }
        ModelFiles::folder(&gguf).check().expect("a file is enough");
    }

    #[test]
    fn shards_are_listed_by_the_index() {
        let (_folder, source) = folder(&["config.json", "tokenizer.json", "a.safetensors"]);
        let index = source.path.join("model.safetensors.index.json");
        let map =
            r#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}"#;
        fs::write(&index, map).expect("a file");
        let refused = source.check().expect_err("b is missing").to_string();
        assert!(refused.contains("b.safetensors"), "{refused}");
        fs::write(source.path.join("b.safetensors"), "").expect("a file");
        let names = ["a.safetensors", "b.safetensors"].map(|name| source.path.join(name));
        assert_eq!(source.weights().expect("both are there"), names);
        fs::write(&index, "[]").expect("a file");
        let refused = source.check().expect_err("no index").to_string();
        assert!(refused.contains("weight_map"), "{refused}");
    }

    #[test]
    fn rope_parameters_are_copied_to_the_top_level() {
        let config =
            r#"{"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8}}"#;
        let read: Value =
            serde_json::from_str(&with_top_level_rope(config).expect("rewritten")).expect("JSON");
        assert_eq!(read["rope_theta"], 5e5);
        assert_eq!(read["rope_scaling"]["factor"], 8);
        let plain = r#"{"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}"#;
        let read: Value =
            serde_json::from_str(&with_top_level_rope(plain).expect("rewritten")).expect("JSON");
        assert_eq!(
            (&read["rope_theta"], &read["rope_scaling"]),
            (&1e4.into(), &Value::Null)
        );
        for unchanged in [
            r#"{"rope_theta": 1e4}"#,
            r#"{"rope_theta": 1, "rope_parameters": {"rope_theta": 1}}"#,
            "no JSON",
        ] {
            assert_eq!(with_top_level_rope(unchanged), None);
        }
        let both = r#"{"rope_theta": 7, "rope_parameters": {"rope_type": "linear", "factor": 2}}"#;
        let read: Value =
            serde_json::from_str(&with_top_level_rope(both).expect("rewritten")).expect("JSON");
        assert_eq!(
            (&read["rope_theta"], &read["rope_scaling"]["factor"]),
            (&7.into(), &2.into())
        );
        let (_folder, source) = folder(&COMPLETE);
        assert!(source.config().expect("it is there").is_none());
    }

    #[test]
    fn unsupported_rotary_scalings_are_rejected() {
        let (_folder, source) = folder(&COMPLETE);
        let check = |architecture: &str, kind: &str| {
            let config = serde_json::json!({
                "architectures": [architecture], "rope_scaling": {"type": kind, "factor": 2}
            });
            fs::write(source.path.join("config.json"), config.to_string()).expect("a file");
            source.check().map_err(|error| error.to_string())
        };
        for (architecture, kind) in [
            ("LlamaForCausalLM", "llama3"),
            ("Qwen3ForCausalLM", "default"),
            ("Phi3ForCausalLM", "longrope"),
        ] {
            check(architecture, kind).expect(kind);
        }
        for (architecture, kind) in [
            ("LlamaForCausalLM", "yarn"),
            ("Qwen2ForCausalLM", "llama3"),
            ("MistralForCausalLM", "linear"),
        ] {
            let refused = check(architecture, kind).expect_err(kind);
            assert!(
                refused.contains(kind) && refused.contains(architecture),
                "{refused}"
            );
        }
    }

    #[test]
    fn the_digest_covers_every_file_and_the_quantisation() {
        let (_folder, source) = folder(&COMPLETE);
        let digest = source.digest().expect("readable files");
        assert_eq!(source.digest().expect("the same files"), digest);
        let quantised = ModelFiles {
            isq: Some("q8_0".into()),
            ..source.clone()
        };
        assert_ne!(quantised.digest().expect("the same files"), digest);
        for name in COMPLETE {
            let before = source.digest().expect("readable files");
            fs::write(source.path.join(name), name).expect("a file");
            assert_ne!(source.digest().expect("readable files"), before, "{name}");
        }
    }
}
