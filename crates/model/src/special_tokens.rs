//! Named special tokens of a tokenizer (`bos_token`, `eos_token`, …), from the files that transformers keeps beside
//! `tokenizer.json`.

use std::path::Path;

use serde_json::Value;

use crate::{config::read_json, error::ModelError};

/// Special tokens by name (`bos_token`), as text (`<s>`).
#[derive(Debug, Default)]
pub(crate) struct SpecialTokens {
    named: Vec<(String, String)>,
}

impl SpecialTokens {
    /// Reads the tokens from `tokenizer_config.json` in `folder`; those it lacks from `special_tokens_map.json`.
    ///
    /// # Errors
    /// When a file exists and is not JSON.
    pub(crate) fn read(folder: &Path) -> Result<Self, ModelError> {
        let sources = ["tokenizer_config.json", "special_tokens_map.json"]
            .map(|file| optional_json(&folder.join(file)));
        let [settings, map] = sources;
        Ok(Self::named_by(&[settings?, map?]))
    }

    /// Collects the tokens under keys that end in `_token` and those in the extra and model-specific maps, each from
    /// the first of `sources` that has it. Unnamed lists of further tokens are ignored, since transformers 5 does not
    /// pass them to templates.
    pub(crate) fn named_by(sources: &[Value]) -> Self {
        let mut special = Self::default();
        for source in sources {
            special.add(source, |name| name.ends_with("_token"));
            special.add(&source["extra_special_tokens"], |_| true);
            special.add(&source["model_specific_special_tokens"], |_| true);
        }
        special
    }

    fn add(&mut self, source: &Value, is_token: impl Fn(&str) -> bool) {
        for (name, token) in source.as_object().into_iter().flatten() {
            // A token is a string, or an object with its content.
            let text = token.as_str().or(token["content"].as_str());
            if let Some(text) = text.filter(|_| is_token(name) && self.get(name).is_none()) {
                self.named.push((name.clone(), text.to_owned()));
            }
        }
    }

    /// Names and texts, as template variables.
    pub(crate) fn variables(&self) -> &[(String, String)] {
        &self.named
    }

    /// Text of the token with this name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.named.iter().find(|(known, _)| known == name);
        found.map(|(_, text)| text.as_str())
    }
}

/// Content of a JSON file; null when the file does not exist.
pub(crate) fn optional_json(path: &Path) -> Result<Value, ModelError> {
    if path.exists() {
        read_json(path)
    } else {
        Ok(Value::Null)
    }
}
