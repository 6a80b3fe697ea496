//! Where a model comes from.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a model of the hub is written with.
const HUB: &str = "hf:";

/// Where a model comes from: a folder, or the Hugging Face hub, written `hf:ORG/NAME@REVISION`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ModelSource {
    /// A Hugging Face folder. The empty path stands for none, where a setting allows it.
    Folder(PathBuf),
    /// A model of the hub.
    Hub(HubModel),
}

/// A model of the hub. Its parts are names of the hub, and safe as parts of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    repository: String,
    revision: String,
}

/// A text that begins as a model of the hub and is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is not hf:ORG/NAME or hf:ORG/NAME@REVISION, the revision being a branch, a tag or a commit"
)]
pub struct NotAHubModel(String);

impl ModelSource {
    /// Whether it names nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Folder(path) if path.as_os_str().is_empty())
    }
}

impl HubModel {
    /// Its repository, `ORG/NAME`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The branch, tag or commit; `main` where none was written.
    #[must_use]
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

impl FromStr for ModelSource {
    type Err = NotAHubModel;

    fn from_str(text: &str) -> Result<Self, NotAHubModel> {
        let Some(named) = text.strip_prefix(HUB) else {
            return Ok(Self::Folder(text.into()));
        };
        let (repository, revision) = named.split_once('@').unwrap_or((named, "main"));
        let is_repository = repository
            .split_once('/')
            .is_some_and(|(org, name)| is_name(org) && is_name(name));
        if !is_repository || !revision.split('/').all(is_name) {
            return Err(NotAHubModel(text.to_owned()));
        }
        Ok(Self::Hub(HubModel {
            repository: repository.to_owned(),
            revision: revision.to_owned(),
        }))
    }
}

/// Whether it is a name of the hub. None begins with a dot, so none leads out of a folder.
fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && !text.starts_with('.') && text.chars().all(plain)
}

impl TryFrom<String> for ModelSource {
    type Error = NotAHubModel;

    fn try_from(text: String) -> Result<Self, NotAHubModel> {
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
        write!(f, "{HUB}{}@{}", self.repository, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resolve;

    #[test]
    fn a_folder_is_a_folder_and_a_hub_model_has_a_revision() {
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
    fn what_is_no_name_of_the_hub_is_refused_with_its_key() {
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
