//! Tokenizer files of an adapter's folder.
//!
//! A run with a chat template of its own leaves it in the folder of the adapter, and the adapter has learned that
//! template's dialogues. Where it differs from the base's it is used by every reader of the folder and saved with every
//! copy of it, and so is `generation_config.json`. The vocabulary must be the base's, whose embeddings are used.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::lora::folder::{AdapterFolder, CONFIG};
use crate::{
    chat::{CHAT_TEMPLATE, TOOL_USE_TEMPLATE},
    config::{ModelConfig, ModelTask, tokens},
    error::ModelError,
    folder::{GENERATION, ModelFolder, create_folder, generation_config, write},
    input_file::{self, MAX_TOKENIZER_BYTES},
    special_tokens::optional_json,
    stop_tokens::StopTokens,
    tokenizer::Tokenizer,
};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Files that are taken from one folder together, since a template refers to the tokens that the others name.
const TOKENIZER_FILES: [&str; 5] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    TOOL_USE_TEMPLATE,
];

/// Source of the chat template of a base with an adapter.
#[derive(Debug, PartialEq, Eq)]
enum TemplateOrigin {
    /// The base's folder.
    Base,
    /// The adapter's folder, which has a whole tokenizer.
    Adapter,
    /// A template file in the adapter's folder, which has no tokenizer.
    File(PathBuf),
}

impl AdapterFolder {
    /// Opens the base in the folder `base` with the chat template and the stop tokens of this folder, where it has its
    /// own; `chat_template` overrides both templates. The base has the head of `task`.
    ///
    /// # Errors
    /// As [`ModelFolder::open`], and when the vocabulary or the template of this folder cannot be used with the base.
    pub(crate) fn open_base(
        &self,
        task: ModelTask,
        base: &Path,
        chat_template: Option<&Path>,
    ) -> Result<ModelFolder, ModelError> {
        self.check_vocabulary(base)?;
        let source = match chat_template {
            Some(_) => TemplateOrigin::Base,
            None => self.template_source(base)?,
        };
        let given = match &source {
            TemplateOrigin::File(file) => Some(file.as_path()),
            TemplateOrigin::Base | TemplateOrigin::Adapter => chat_template,
        };
        let mut folder = ModelFolder::open_for(task, base, given)?;
        let of_base = optional_json(&base.join(GENERATION))?;
        let generation = match optional_json(&self.path.join(GENERATION))? {
            Value::Null => of_base.clone(),
            own => own,
        };
        if source == TemplateOrigin::Adapter || generation != of_base {
            let config = with_declared_stops(&folder.config, &generation);
            let from = match source {
                TemplateOrigin::Adapter => &self.path,
                TemplateOrigin::Base | TemplateOrigin::File(_) => base,
            };
            folder.tokenizer = Tokenizer::load(from, &config, given)?;
            folder.config.stops = folder.tokenizer.stops().clone();
        }
        Ok(folder)
    }

    /// Replaces the tokenizer files and the generation configuration that a saved copy of `folder`, opened for this
    /// adapter without another template, has in the folder `to` by those of this folder that are in use.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn save_tokenizer_files(&self, to: &Path, folder: &ModelFolder) -> Result<(), ModelError> {
        if self.template_source(&folder.path)? == TemplateOrigin::Adapter {
            for name in TOKENIZER_FILES {
                copy_or_remove(&self.path.join(name), &to.join(name))?;
            }
        }
        let own = self.path.join(GENERATION);
        if own.exists() {
            let stored = input_file::read(&own, MAX_TOKENIZER_BYTES)?;
            let completed = generation_config(&own, folder)?;
            let bytes = completed.map_or(stored, |json| format!("{json:#}\n").into_bytes());
            write(&to.join(GENERATION), &bytes)?;
        }
        Ok(())
    }

    /// Whether a copy of `folder` that [`Self::save_tokenizer_files`] completed has the file `name`.
    ///
    /// # Errors
    /// When a file that shows it cannot be read.
    pub fn saves(&self, name: &str, folder: &ModelFolder) -> Result<bool, ModelError> {
        let own = self.path.join(name).exists();
        let of_base = folder.path.join(name).exists();
        if name == GENERATION {
            return Ok(own
                || of_base
                || generation_config(&folder.path.join(name), folder)?.is_some());
        }
        if !TOKENIZER_FILES.contains(&name) {
            return Ok(of_base);
        }
        Ok(match self.template_source(&folder.path)? {
            TemplateOrigin::Base => of_base,
            TemplateOrigin::Adapter => own,
            TemplateOrigin::File(_) => of_base || name == CHAT_TEMPLATE,
        })
    }

    /// Whether the chat template in use is this folder's own, and not the base's.
    ///
    /// # Errors
    /// When a file cannot be read, or the template is there without the tokenizer that it needs.
    pub(crate) fn has_own_template(&self, base: &Path) -> Result<bool, ModelError> {
        Ok(self.template_source(base)? != TemplateOrigin::Base)
    }

    /// The folder or file with the chat template in use.
    fn template_source(&self, base: &Path) -> Result<TemplateOrigin, ModelError> {
        let configured = |folder: &Path| -> Result<Value, ModelError> {
            Ok(optional_json(&folder.join(TOKENIZER_CONFIG))?["chat_template"].take())
        };
        let own = configured(&self.path)?;
        let file = self.path.join(CHAT_TEMPLATE);
        let same = |name: &str| -> Result<bool, ModelError> {
            Ok(bytes(&self.path.join(name))? == bytes(&base.join(name))?)
        };
        let is_base = match file.exists() {
            true => same(CHAT_TEMPLATE)? && same(TOOL_USE_TEMPLATE)?,
            false if own.is_null() => true,
            false => !base.join(CHAT_TEMPLATE).exists() && own == configured(base)?,
        };
        if is_base {
            return Ok(TemplateOrigin::Base);
        }
        if self.path.join(TOKENIZER).exists() {
            return Ok(TemplateOrigin::Adapter);
        }
        if file.exists() {
            return Ok(TemplateOrigin::File(file));
        }
        Err(ModelError::Malformed {
            path: self.path.join(TOKENIZER_CONFIG),
            reason: format!(
                "its chat_template is not that of the base {}, and {TOKENIZER} is missing beside it: save the template \
                 as {CHAT_TEMPLATE} in this folder, or remove the key to use the base's",
                base.display()
            ),
        })
    }

    /// Checks that the tokenizer of this folder, if any, has the tokens and ids of the base's.
    fn check_vocabulary(&self, base: &Path) -> Result<(), ModelError> {
        let (own, of_base) = (self.path.join(TOKENIZER), base.join(TOKENIZER));
        if !own.exists() || !of_base.exists() || bytes(&own)? == bytes(&of_base)? {
            return Ok(());
        }
        // Another release of the tokenizers library writes the same tokenizer in other words.
        if vocabulary(&parsed(&own)?) == vocabulary(&parsed(&of_base)?) {
            return Ok(());
        }
        Err(ModelError::Malformed {
            path: own,
            reason: format!(
                "its tokens are not those of the base's {}: name the model that the adapter was trained on as the \
                 base (base_model_name_or_path in {CONFIG}), or remove this file to use the base's tokenizer",
                of_base.display()
            ),
        })
    }
}

/// The configuration with the stop tokens that `config.json` and this `generation_config.json` declare.
fn with_declared_stops(config: &ModelConfig, generation: &Value) -> ModelConfig {
    let declared = |raw: &Value| -> Vec<u32> {
        let ids = tokens(&raw["eos_token_id"]).into_iter();
        ids.filter(|&id| (id as usize) < config.vocab_size)
            .collect()
    };
    ModelConfig {
        stops: StopTokens::declared(&declared(&config.raw)).and(&declared(generation)),
        ..config.clone()
    }
}

/// Content of a file; `None` when it does not exist.
fn bytes(path: &Path) -> Result<Option<Vec<u8>>, ModelError> {
    let exists = path.exists();
    exists
        .then(|| input_file::read(path, MAX_TOKENIZER_BYTES))
        .transpose()
}

/// Content of a `tokenizer.json`.
fn parsed(path: &Path) -> Result<Value, ModelError> {
    let content = input_file::read(path, MAX_TOKENIZER_BYTES)?;
    serde_json::from_slice(&content).map_err(|error| ModelError::Malformed {
        path: path.to_owned(),
        reason: format!("it is not JSON: {error}"),
    })
}

/// Copies a file, or removes the copy of one that does not exist.
fn copy_or_remove(from: &Path, to: &Path) -> Result<(), ModelError> {
    let Some(content) = bytes(from)? else {
        return match fs::remove_file(to) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                let path = to.to_owned();
                Err(ModelError::Unwritable { path, source })
            }
            _ => Ok(()),
        };
    };
    if let Some(folder) = to.parent() {
        create_folder(folder)?;
    }
    write(to, &content)
}

/// What determines the ids of a `tokenizer.json`: vocabulary, merges (as pairs, which older releases write as one
/// text) and added tokens.
fn vocabulary(tokenizer: &Value) -> (&Value, Vec<String>, Vec<(&Value, &Value)>) {
    let merge = |merge: &Value| match merge {
        Value::Array(pair) => {
            let parts: Vec<&str> = pair.iter().filter_map(Value::as_str).collect();
            parts.join(" ")
        }
        text => text.as_str().unwrap_or_default().to_owned(),
    };
    let model = &tokenizer["model"];
    let merges = model["merges"].as_array().into_iter().flatten();
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let added = added.map(|token| (&token["id"], &token["content"]));
    (
        &model["vocab"],
        merges.map(merge).collect(),
        added.collect(),
    )
}
