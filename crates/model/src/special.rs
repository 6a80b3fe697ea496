//! The names of a tokenizer's special tokens, as transformers keeps them beside `tokenizer.json`.

use std::path::Path;

use serde_json::Value;

use crate::{ModelError, config::read_json};

/// Special tokens by name (`bos_token`), as text (`<s>`).
#[derive(Debug, Default)]
pub(crate) struct SpecialTokens {
    named: Vec<(String, String)>,
}

impl SpecialTokens {
    /// The tokens that `tokenizer_config.json` of `folder` names, else its `special_tokens_map.json`.
    ///
    /// # Errors
    /// When a file is there and is not JSON.
    pub(crate) fn read(folder: &Path) -> Result<Self, ModelError> {
        let sources = ["tokenizer_config.json", "special_tokens_map.json"]
            .map(|file| optional_json(&folder.join(file)));
        let [settings, map] = sources;
        Ok(Self::named_by(&[settings?, map?]))
    }

    /// The tokens under keys that end in `_token` and those that a model names itself, each from the first
    /// of `sources` that has it. Lists of further tokens have no names: transformers 5 passes none of them
    /// to templates.
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

    /// Names and texts, for templates that print them.
    pub(crate) fn variables(&self) -> &[(String, String)] {
        &self.named
    }

    /// The text of the token of this name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.named.iter().find(|(known, _)| known == name);
        found.map(|(_, text)| text.as_str())
    }
}

/// The JSON of a file that may be missing; then null.
pub(crate) fn optional_json(path: &Path) -> Result<Value, ModelError> {
    if path.exists() {
        read_json(path)
    } else {
        Ok(Value::Null)
    }
}
