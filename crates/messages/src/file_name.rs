//! Names of files that come from outside: a registry, an object store, the Hub, the index of a sharded model.

use std::{fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest name that file systems take, in bytes.
const MAX_BYTES: usize = 255;

/// A plain file name: one path component that names a file in a folder and nothing else. Joined to a folder it gives a
/// path directly in that folder, whatever the name's source. That the path is no symbolic link is not promised.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);

/// A text that is not a plain file name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{name:?} is not a plain file name: {reason}")]
pub struct InvalidFileName {
    /// The text, shortened to what a message can show.
    name: String,
    /// Reason.
    reason: &'static str,
}

impl FileName {
    /// Validates a name.
    ///
    /// # Errors
    /// When it is empty, longer than 255 bytes, `.` or `..`, or has a path separator or a control character.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidFileName> {
        let name = name.into();
        match fault(&name) {
            None => Ok(Self(name)),
            Some(reason) => Err(InvalidFileName {
                name: name.chars().take(MAX_BYTES).collect(),
                reason,
            }),
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Reason why a text is no plain file name.
fn fault(name: &str) -> Option<&'static str> {
    let is_separator = |c: char| ['/', '\\'].contains(&c);
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > MAX_BYTES {
        Some("it is longer than 255 bytes")
    } else if name == "." || name == ".." {
        Some("it names a folder")
    } else if name.contains(is_separator) {
        Some("it has a path separator")
    } else if name.contains(char::is_control) {
        Some("it has a control character")
    } else {
        None
    }
}

impl FromStr for FileName {
    type Err = InvalidFileName;

    fn from_str(name: &str) -> Result<Self, InvalidFileName> {
        Self::new(name)
    }
}

impl TryFrom<String> for FileName {
    type Error = InvalidFileName;

    fn try_from(name: String) -> Result<Self, InvalidFileName> {
        Self::new(name)
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> Self {
        name.0
    }
}

impl AsRef<str> for FileName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl AsRef<Path> for FileName {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Component;

    use proptest::{prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn only_one_plain_path_component_is_a_file_name() {
        let longest = "x".repeat(MAX_BYTES);
        for good in [
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            ".hidden",
            "...",
            "-x",
            "Größe 1.json",
            "~",
            &longest,
        ] {
            let name = FileName::new(good).expect(good);
            assert_eq!((name.as_str(), name.to_string().as_str()), (good, good));
        }
        let too_long = "x".repeat(MAX_BYTES + 1);
        for (bad, reason) in [
            ("", "empty"),
            (".", "names a folder"),
            ("..", "names a folder"),
            ("/etc/passwd", "separator"),
            ("../x", "separator"),
            ("a/b", "separator"),
            ("a/", "separator"),
            ("..\\x", "separator"),
            ("C:\\x", "separator"),
            ("a\0b", "control character"),
            ("a\nb", "control character"),
            ("a\u{9b}b", "control character"),
            (too_long.as_str(), "255 bytes"),
        ] {
            let error = FileName::new(bad).expect_err(bad).to_string();
            assert!(error.contains(reason), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn deserialising_a_name_validates_it() {
        let read = |json: &str| serde_json::from_str::<FileName>(json);
        let name = read("\"config.json\"").expect("a plain name");
        assert_eq!(
            serde_json::to_string(&name).expect("a name"),
            "\"config.json\""
        );
        let refused = read("\"../config.json\"").expect_err("a path").to_string();
        assert!(refused.contains("not a plain file name"), "{refused}");
        let bytes = postcard::to_stdvec("/etc/passwd").expect("a text");
        assert!(postcard::from_bytes::<FileName>(&bytes).is_err());
    }

    proptest! {
        #[test]
        fn a_name_is_a_path_directly_in_its_folder(text: String) {
            if let Ok(name) = FileName::new(text) {
                let path = Path::new("/folder").join(&name);
                let parts: Vec<Component<'_>> = path.components().skip(2).collect();
                prop_assert_eq!(parts, vec![Component::Normal(name.as_str().as_ref())]);
            }
        }
    }
}
