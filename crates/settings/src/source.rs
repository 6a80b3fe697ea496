//! Source of a model: a folder or the Hugging Face hub.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::checks::Checks;

/// Prefix of a model on the hub.
const HUB_PREFIX: &str = "hf:";

/// Source of a model: a folder, a GGUF file, or the Hugging Face hub as `hf:ORG/NAME@REVISION`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ModelSource {
    /// A Hugging Face folder, or a GGUF file. Some settings allow the empty path, which means none.
    Folder(PathBuf),
    /// A model on the hub.
    Hub(HubModel),
}

/// Requires that an optional model source, if given, is not the empty path.
pub(crate) fn check_source(path: &str, source: Option<&ModelSource>, checks: &mut Checks) {
    checks.require(
        source.is_none_or(|source| !source.is_empty()),
        path,
        "it is empty: name a folder, a GGUF file or hf:ORG/NAME@REVISION, or leave the key out",
    );
}

/// A model on the Hugging Face hub. Its parts are valid hub names, which are safe as path components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    repository: String,
    revision: String,
}

/// Error of parsing a model on the hub.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is not hf:ORG/NAME or hf:ORG/NAME@REVISION, the revision being a branch, a tag or a commit"
)]
pub struct InvalidHubModel(String);

impl ModelSource {
    /// Whether it is the empty path.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Folder(path) if path.as_os_str().is_empty())
    }
}

impl HubModel {
    /// Repository, `ORG/NAME`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Branch, tag or commit; default `main`.
    #[must_use]
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

impl FromStr for ModelSource {
    type Err = InvalidHubModel;

    fn from_str(text: &str) -> Result<Self, InvalidHubModel> {
        let Some(name) = text.strip_prefix(HUB_PREFIX) else {
            return Ok(Self::Folder(text.into()));
        };
        let (repository, revision) = name.split_once('@').unwrap_or((name, "main"));
        let is_repository = repository
            .split_once('/')
            .is_some_and(|(org, name)| is_name(org) && is_name(name));
        if !is_repository || !revision.split('/').all(is_name) {
            return Err(InvalidHubModel(text.to_owned()));
        }
        Ok(Self::Hub(HubModel {
            repository: repository.to_owned(),
            revision: revision.to_owned(),
        }))
    }
}

/// Whether it is a valid hub name. Names do not begin with a dot, which prevents path traversal.
fn is_name(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && !text.starts_with('.') && text.chars().all(is_allowed)
}

impl TryFrom<String> for ModelSource {
    type Error = InvalidHubModel;

    fn try_from(text: String) -> Result<Self, InvalidHubModel> {
        text.parse()
    }
}

impl From<ModelSource> for String {
    fn from(source: ModelSource) -> Self {
        source.to_string()
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Hub(model) => model.fmt(f),
        }
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{HUB_PREFIX}{}@{}", self.repository, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resolve::resolve;

    #[test]
    fn sources_are_parsed_and_displayed() {
        let cases = [
            ("models/base", "models/base"),
            ("./hf:odd", "./hf:odd"),
            ("", ""),
            ("hf:org/name", "hf:org/name@main"),
            ("hf:org-1/na_me.2@v1.0", "hf:org-1/na_me.2@v1.0"),
            ("hf:org/name@refs/pr/1", "hf:org/name@refs/pr/1"),
        ];
        for (text, written) in cases {
            let source: ModelSource = text.parse().unwrap();
            assert_eq!(source.to_string(), written);
            assert_eq!(written.parse(), Ok(source.clone()), "{text}");
            assert_eq!(
                matches!(source, ModelSource::Hub(_)),
                text.starts_with("hf:")
            );
            assert_eq!(source.is_empty(), text.is_empty());
        }
    }

    #[test]
    fn invalid_hub_names_are_reported_with_their_key() {
        for text in [
            "hf:",
            "hf:name",
            "hf:/name",
            "hf:a/b/c",
            "hf:org/name@",
            "hf:org/..",
            "hf:org/name@a/../../b",
            "hf:org/na me",
        ] {
            let toml = format!("[model]\npath = {text:?}\n");
            let refused = resolve(&toml, "test.toml", &[])
                .expect_err(text)
                .to_string();
            assert!(
                refused.contains("model.path") && refused.contains("hf:ORG/NAME@REVISION"),
                "{refused}"
            );
        }
    }
}
