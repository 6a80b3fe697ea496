//! Model folders in the Hugging Face layout: opening and saving.
//!
//! Saving promises that each file is replaced atomically and is on disk when the call returns. It does not promise that
//! the folder as a whole changes atomically: a caller that needs that saves to a temporary folder and renames it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    DType, Device,
    chat::{CHAT_TEMPLATE, TOOL_USE_TEMPLATE},
    config::{ModelConfig, ModelTask, tokens},
    error::ModelError,
    gguf::origin_of,
    input_file::{self, InputFile},
    lora::BaseModel,
    shards::Shards,
    special_tokens::optional_json,
    tokenizer::Tokenizer,
    weights::Weights,
};

/// File in which transformers, vLLM and others look for the tokens that end a completion.
pub(crate) const GENERATION: &str = "generation_config.json";

/// Files copied from the base model's folder into a saved model, where they exist, in addition to licences.
const COPIED: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    GENERATION,
    CHAT_TEMPLATE,
];

/// Prefixes of licence file names, compared without regard to case.
const LICENCES: [&str; 5] = ["license", "licence", "copying", "notice", "use_policy"];

/// Whether a file of this name is a licence or use policy, such as `LICENSE.txt` or `USE_POLICY.md`. They are copied
/// into fine-tuned models. A README is not among them: it describes the base model.
#[must_use]
pub fn is_licence(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let rest = LICENCES
        .iter()
        .filter_map(|prefix| name.strip_prefix(prefix));
    let ends_word = |rest: &str| !rest.starts_with(|next: char| next.is_ascii_alphanumeric());
    rest.into_iter().any(ends_word)
}

/// A model on disk: configuration and tokenizer, with weights loaded on request.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    /// Path of the folder.
    pub path: PathBuf,
    /// Model configuration.
    pub config: ModelConfig,
    /// Tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// Name under which an adapter refers to it as its base.
    pub base_model: BaseModel,
}

impl ModelFolder {
    /// Opens the model in the folder `path`; `chat_template` overrides its chat template.
    ///
    /// # Errors
    /// When the folder or a file in it is missing, or files contradict one another.
    pub fn open(path: &Path, chat_template: Option<&Path>) -> Result<Self, ModelError> {
        Self::open_for(ModelTask::Language, path, chat_template)
    }

    /// As [`Self::open`], for a model with the head of `task`.
    pub(crate) fn open_for(
        task: ModelTask,
        path: &Path,
        chat_template: Option<&Path>,
    ) -> Result<Self, ModelError> {
        // The user has named the GGUF file.
        Self::open_files(task, path, chat_template).map_err(|error| match origin_of(path) {
            Some(file) => ModelError::Unpacked {
                file,
                source: Box::new(error),
            },
            None => error,
        })
    }

    fn open_files(
        task: ModelTask,
        path: &Path,
        chat_template: Option<&Path>,
    ) -> Result<Self, ModelError> {
        let metadata = fs::metadata(path).map_err(|source| ModelError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        if !metadata.is_dir() {
            let reason = "it is a file; a model is a folder with config.json, tokenizer.json and model.safetensors, or a \
                          GGUF file whose name ends in .gguf";
            return Err(ModelError::Malformed {
                path: path.to_owned(),
                reason: reason.into(),
            });
        }
        if let (Some(base), false) = (
            BaseModel::of_adapter(path)?,
            path.join("config.json").exists(),
        ) {
            let reason = format!(
                "it holds an adapter and no model: name its base, {:?}, as the model and this folder as the adapter",
                base.name
            );
            return Err(ModelError::Malformed {
                path: path.to_owned(),
                reason,
            });
        }
        // They are copied into checkpoints: better refused now than after the training.
        for licence in licences(path)? {
            InputFile::open(&path.join(licence))?;
        }
        let mut config = ModelConfig::load_for(task, path)?;
        let tokenizer = Tokenizer::load(path, &config, chat_template)?;
        config.stops = tokenizer.stops().clone();
        Ok(Self {
            path: path.to_owned(),
            config,
            tokenizer,
            base_model: BaseModel::of_folder(path),
        })
    }

    /// Validates the weights by the headers of their files alone: fails where [`Self::weights`] would.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn check_weights(&self) -> Result<(), ModelError> {
        Shards::open(&self.path)?.check(&self.config.expected_tensors())
    }

    /// Loads the weights as `dtype` onto `device`.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn weights(&self, dtype: DType, device: &Device) -> Result<Weights, ModelError> {
        Weights::load(&self.path, &self.config, dtype, device)
    }
}

/// Saves `weights` in the folder `to`, created if missing, with the configuration and tokenizer files of `from`.
/// Existing files of the same names are replaced, others kept.
///
/// # Errors
/// When a file cannot be read or written, or a tensor cannot be read from its device.
pub fn save_folder(to: &Path, from: &ModelFolder, weights: &Weights) -> Result<(), ModelError> {
    create_folder(to)?;
    write(&to.join("model.safetensors"), &weights.to_blob()?)?;
    copy_tokenizer_files(to, from)?;
    let config = format!("{:#}\n", config_for(from, weights));
    write(&to.join("config.json"), config.as_bytes())?;
    sync(to)
}

/// Creates the folder `to` if it does not exist.
pub(crate) fn create_folder(to: &Path) -> Result<(), ModelError> {
    fs::create_dir_all(to).map_err(|source| ModelError::Unwritable {
        path: to.to_owned(),
        source,
    })
}

/// Copies tokenizer files and licences of `from`, and writes its generation configuration.
pub(crate) fn copy_tokenizer_files(to: &Path, from: &ModelFolder) -> Result<(), ModelError> {
    let copied = COPIED.map(str::to_owned).into_iter();
    for file in copied.chain(licences(&from.path)?) {
        let source = from.path.join(&file);
        if source.exists() {
            let bytes = input_file::read(&source, input_file::MAX_TOKENIZER_BYTES)?;
            write(&to.join(file), &bytes)?;
        }
    }
    copy_chat_templates(to, from)?;
    match generation_config(&from.path.join(GENERATION), from)? {
        Some(generation) => write(&to.join(GENERATION), format!("{generation:#}\n").as_bytes()),
        None => Ok(()),
    }
}

/// Writes the chat template in use, if the settings gave it in place of the folder's own; else copies the folder's
/// additional ones.
fn copy_chat_templates(to: &Path, from: &ModelFolder) -> Result<(), ModelError> {
    if let Some(template) = from.tokenizer.given_chat_template() {
        return write(&to.join(CHAT_TEMPLATE), template.as_bytes());
    }
    let source = from.path.join(TOOL_USE_TEMPLATE);
    if !source.exists() {
        return Ok(());
    }
    let bytes = input_file::read(&source, input_file::MAX_TOKENIZER_BYTES)?;
    let target = to.join(TOOL_USE_TEMPLATE);
    if let Some(folder) = target.parent() {
        create_folder(folder)?;
    }
    write(&target, &bytes)
}

/// The `generation_config.json` at `path`, if there is one, with all stop tokens of the model `from` as `eos_token_id`,
/// so that other programs stop there too; `None` when it and the model's configuration declare them already.
pub(crate) fn generation_config(
    path: &Path,
    from: &ModelFolder,
) -> Result<Option<Value>, ModelError> {
    let stops = &from.config.stops;
    let mut generation = optional_json(path)?;
    let mut declared = tokens(&generation["eos_token_id"]);
    if declared.is_empty() {
        declared = tokens(&from.config.raw["eos_token_id"]);
    }
    let count = declared.len();
    for closing in [stops.turn_end(), stops.text_end()].into_iter().flatten() {
        if !declared.contains(&closing) {
            declared.push(closing);
        }
    }
    if declared.len() == count {
        return Ok(None);
    }
    generation["eos_token_id"] = declared.into();
    Ok(Some(generation))
}

/// Names of the licence files in a folder, sorted.
fn licences(folder: &Path) -> Result<Vec<String>, ModelError> {
    let unreadable = |source| ModelError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(unreadable)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(unreadable)?.file_name();
        let name = name.to_string_lossy().into_owned();
        if is_licence(&name) && folder.join(&name).is_file() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Syncs a directory, which makes renames in it durable.
pub(crate) fn sync(to: &Path) -> Result<(), ModelError> {
    File::open(to)
        .and_then(|folder| folder.sync_all())
        .map_err(|source| ModelError::Unwritable {
            path: to.to_owned(),
            source,
        })
}

/// Configuration of `from` with the dtype of `weights` under both keys in use: `dtype` and the older `torch_dtype`.
fn config_for(from: &ModelFolder, weights: &Weights) -> Value {
    let mut config = from.config.raw.clone();
    if let Some(tensor) = weights.tensors.values().next() {
        let name = dtype_name(tensor.dtype());
        config["torch_dtype"] = name.into();
        config["dtype"] = name.into();
    }
    config
}

/// PyTorch's name of a dtype, as in `config.json`.
#[must_use]
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F32 => "float32",
        DType::F64 => "float64",
        other => other.as_str(),
    }
}

/// Writes a file atomically: to a temporary name, synced, then renamed.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let tmp_path = path.with_added_extension("partial");
    let written = || -> io::Result<()> {
        let mut file = File::create(&tmp_path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&tmp_path, path)
    };
    written().map_err(|source| ModelError::Unwritable {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use messages::PromptText;
    use serde_json::json;

    use super::*;
    use crate::{
        config::read_json,
        fixtures::{folder, shared},
    };

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_saved_model_round_trips() {
        let source = folder();
        fs::write(
            source.path().join("generation_config.json"),
            r#"{"eos_token_id": [1, 2]}"#,
        )
        .unwrap();
        let from = ModelFolder::open(source.path(), None).unwrap();
        let weights = from.weights(DType::F32, &Device::Cpu).unwrap();
        let target = tempfile::tempdir().unwrap();
        let to = target.path().join("created/on/demand");
        save_folder(&to, &from, &weights).unwrap();

        let files = [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        ];
        assert_eq!(names(&to), files);
        for file in &files[1..] {
            assert_eq!(
                fs::read(to.join(file)).unwrap(),
                fs::read(source.path().join(file)).unwrap(),
                "{file}"
            );
        }
        let saved = ModelFolder::open(&to, None).unwrap();
        let mut raw = from.config.raw.clone();
        raw["dtype"] = json!("float32");
        assert_eq!(saved.config.raw, raw);
        assert_eq!(saved.config.stops.ids().collect::<Vec<_>>(), [1, 2]);
        let again = saved.weights(DType::F32, &Device::Cpu).unwrap();
        assert_eq!(again.digest().unwrap(), weights.digest().unwrap());
    }

    #[test]
    fn a_saved_model_has_the_chat_template_in_use() {
        let source = folder();
        let own = "{{ messages[0].content }}";
        fs::write(source.path().join(CHAT_TEMPLATE), own).unwrap();
        let tool_use = source.path().join(TOOL_USE_TEMPLATE);
        fs::create_dir(tool_use.parent().unwrap()).unwrap();
        fs::write(&tool_use, "tools").unwrap();
        let given = source.path().join("given.jinja");
        fs::write(&given, "given {{ messages[0].content }}").unwrap();
        for given in [None, Some(given.as_path())] {
            let from = ModelFolder::open(source.path(), given).unwrap();
            let weights = from.weights(DType::F32, &Device::Cpu).unwrap();
            let target = tempfile::tempdir().unwrap();
            save_folder(target.path(), &from, &weights).unwrap();
            let saved = ModelFolder::open(target.path(), None).unwrap();
            assert_eq!(
                saved.tokenizer.chat_template_digest(),
                from.tokenizer.chat_template_digest(),
                "{given:?}"
            );
            let has_tool_use = target.path().join(TOOL_USE_TEMPLATE).exists();
            assert_eq!(has_tool_use, given.is_none());
        }
    }

    #[test]
    fn saving_replaces_files_and_updates_the_dtype() {
        let expected = json!({"torch_dtype": "bfloat16", "dtype": "bfloat16"});
        for before in [
            json!({"torch_dtype": "float32"}),
            json!({"dtype": "float32"}),
            json!({}),
        ] {
            let source = folder();
            let mut from = ModelFolder::open(source.path(), None).unwrap();
            from.config.raw = before;
            let weights = from.weights(DType::BF16, &Device::Cpu).unwrap();
            fs::write(source.path().join("notes.txt"), "mine").unwrap();
            save_folder(source.path(), &from, &weights).unwrap();
            assert_eq!(
                read_json(&source.path().join("config.json")).unwrap(),
                expected
            );
            assert_eq!(
                fs::read(source.path().join("model.safetensors")).unwrap(),
                weights.to_blob().unwrap()
            );
            // That configuration no longer declares an EOS token, so generation_config.json does.
            let files = [
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "notes.txt",
                "tokenizer.json",
            ];
            assert_eq!(names(source.path()), files);
        }
    }

    #[test]
    fn a_saved_model_keeps_its_licences() {
        let source = folder();
        let kept = ["COPYING", "LICENSE.txt", "Notice", "USE_POLICY.md"];
        for name in kept
            .iter()
            .chain(&["README.md", "licensed.py", "noticeable"])
        {
            fs::write(source.path().join(name), *name).unwrap();
        }
        fs::create_dir(source.path().join("LICENSES")).unwrap();
        let from = ModelFolder::open(source.path(), None).unwrap();
        let weights = from.weights(DType::F32, &Device::Cpu).unwrap();
        let target = tempfile::tempdir().unwrap();
        save_folder(target.path(), &from, &weights).unwrap();
        let others = ["config.json", "model.safetensors", "tokenizer.json"];
        let mut expected = [&kept[..], &others].concat();
        expected.sort_unstable();
        assert_eq!(names(target.path()), expected);
        let text = fs::read_to_string(target.path().join("LICENSE.txt")).unwrap();
        assert_eq!(text, "LICENSE.txt");
    }

    #[test]
    fn errors_name_the_file_that_cannot_be_written() {
        let source = folder();
        let from = ModelFolder::open(source.path(), None).unwrap();
        let weights = from.weights(DType::F32, &Device::Cpu).unwrap();
        let target = tempfile::tempdir().unwrap();
        let blocked = target.path().join("tokenizer.json");
        fs::create_dir(&blocked).unwrap();
        let error = save_folder(target.path(), &from, &weights).unwrap_err();
        assert!(
            matches!(&error, ModelError::Unwritable { path, .. } if *path == blocked),
            "{error}"
        );

        let file = target.path().join("a_file");
        fs::write(&file, "").unwrap();
        let error = save_folder(&file, &from, &weights).unwrap_err();
        assert!(
            matches!(&error, ModelError::Unwritable { path, .. } if *path == file),
            "{error}"
        );
    }

    #[test]
    fn errors_name_what_is_not_a_model() {
        let source = folder();
        let open = |path: &Path| ModelFolder::open(path, None).unwrap_err().to_string();
        let missing = open(&source.path().join("nowhere"));
        assert!(
            missing.contains("failed to read") && missing.contains("nowhere"),
            "{missing}"
        );
        let file = open(&source.path().join("config.json"));
        assert!(
            file.contains("config.json") && file.contains("it is a file"),
            "{file}"
        );
        fs::remove_file(source.path().join("tokenizer.json")).unwrap();
        let bare = open(source.path());
        assert!(bare.contains("tokenizer.json"), "{bare}");
        let adapter = tempfile::tempdir().unwrap();
        let raw = json!({"base_model_name_or_path": "org/base"}).to_string();
        fs::write(adapter.path().join("adapter_config.json"), raw).unwrap();
        let adapter = open(adapter.path());
        assert!(
            adapter.contains("an adapter and no model") && adapter.contains("\"org/base\""),
            "{adapter}"
        );
    }

    #[test]
    fn a_pretrained_model_opens() {
        let Some(path) = shared("data/models/stories260K") else {
            return;
        };
        let model = ModelFolder::open(&path, None).unwrap();
        assert_eq!((model.config.vocab_size, model.config.layers), (512, 5));
        assert!(!model.tokenizer.has_chat_template());
        let ids = model
            .tokenizer
            .encode_prompt(&PromptText::Text("Tom and his dog".into()))
            .unwrap();
        assert_eq!(ids, [1, 274, 287, 269, 345, 400, 428]);
        let weights = model.weights(DType::F32, &Device::Cpu).unwrap();
        assert!(weights.is_finite().unwrap());
    }
}
