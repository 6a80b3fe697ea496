//! Access token of the Hub, found as Python's `huggingface_hub` finds it.
//!
//! `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the file that `hf auth login` writes: `HF_TOKEN_PATH`, else
//! `token` in `HF_HOME`. With `HF_HUB_DISABLE_IMPLICIT_TOKEN` none is sent. A token never appears in a message.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::{
    environment::{expand_tilde, is_true},
    error::HubError,
};

/// The variables that may hold a token, by precedence.
const VARIABLES: [&str; 2] = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];

/// Access token, or why there is none.
#[derive(Clone)]
pub(super) enum Token {
    /// A token was found.
    Known {
        /// The token itself.
        secret: String,
        /// Source of the token.
        source: TokenSource,
    },
    /// No variable is set, and this file does not exist or is empty.
    Missing(PathBuf),
    /// Sending a token is disabled.
    Disabled,
}

/// Source of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TokenSource {
    /// In this variable.
    Variable(&'static str),
    /// In this file.
    File(PathBuf),
}

impl Token {
    /// Token of these variables and the files they name; `home` is the value of `HF_HOME` or its default. An empty
    /// variable counts as unset.
    ///
    /// # Errors
    /// When the file cannot be read, or the value found is no valid HTTP header.
    pub(super) fn find(
        variable: impl Fn(&str) -> Option<String>,
        home: &Path,
    ) -> Result<Self, HubError> {
        let is_disabled = variable("HF_HUB_DISABLE_IMPLICIT_TOKEN");
        if is_disabled.as_deref().is_some_and(is_true) {
            return Ok(Self::Disabled);
        }
        for name in VARIABLES {
            if let Some(secret) = variable(name) {
                return Self::known(&secret, TokenSource::Variable(name));
            }
        }
        let file = variable("HF_TOKEN_PATH").map(|path| expand_tilde(&path, &variable));
        let file = file.unwrap_or_else(|| home.join("token"));
        match std::fs::read_to_string(&file) {
            Ok(secret) if secret.trim().is_empty() => Ok(Self::Missing(file)),
            Ok(secret) => Self::known(&secret, TokenSource::File(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Missing(file)),
            Err(error) => Err(HubError::TokenFile {
                path: file,
                reason: error.to_string(),
            }),
        }
    }

    /// Validates a token: the HTTP client's error for an invalid header would quote it.
    fn known(secret: &str, source: TokenSource) -> Result<Self, HubError> {
        let secret = secret.trim().to_owned();
        match secret.chars().all(|c| c.is_ascii_graphic()) {
            true => Ok(Self::Known { secret, source }),
            false => Err(HubError::Token(source.to_string())),
        }
    }

    /// The token to send, if any.
    pub(super) fn secret(&self) -> Option<String> {
        match self {
            Self::Known { secret, .. } => Some(secret.clone()),
            Self::Missing(_) | Self::Disabled => None,
        }
    }

    /// Explanation of a response with status 401 or 403.
    pub(super) fn no_access_reason(&self) -> String {
        match self {
            Self::Known { source, .. } => format!("the token in {source} gives no access"),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known { source, .. } => write!(f, "token from {source}"),
            Self::Missing(file) => {
                write!(
                    f,
                    "HF_TOKEN is not set and {} does not exist or is empty",
                    file.display()
                )
            }
            Self::Disabled => write!(f, "HF_HUB_DISABLE_IMPLICIT_TOKEN is set: no token is sent"),
        }
    }
}

impl fmt::Display for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(name) => f.write_str(name),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The token found with these variables, and its source.
    fn found(home: &Path, variables: &[(&str, &str)]) -> Option<(String, String)> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let token = Token::find(variable, home).map_err(|error| error.to_string());
        match token.expect("a token or none") {
            Token::Known { secret, source } => Some((secret, source.to_string())),
            Token::Missing(_) | Token::Disabled => None,
        }
    }

    #[test]
    fn tokens_are_found_by_the_precedence_of_huggingface_hub() {
        let home = tempfile::tempdir().expect("a folder");
        let write = |name: &str, token: &str| {
            let path = home.path().join(name);
            std::fs::write(&path, token).expect("it is written");
            path.display().to_string()
        };
        let elsewhere = write("elsewhere", "hf_elsewhere");
        assert_eq!(found(home.path(), &[]), None, "there is no token file");
        let login = write("token", "hf_login\n");
        let named = [
            ("HF_TOKEN", "hf_new"),
            ("HUGGING_FACE_HUB_TOKEN", "hf_old"),
            ("HF_TOKEN_PATH", elsewhere.as_str()),
        ];
        for (variables, secret, source) in [
            (&named[..], "hf_new", "HF_TOKEN"),
            (&named[1..], "hf_old", "HUGGING_FACE_HUB_TOKEN"),
            (&named[2..], "hf_elsewhere", &elsewhere),
            (&[], "hf_login", &login),
        ] {
            let expected = Some((secret.to_owned(), source.to_owned()));
            assert_eq!(found(home.path(), variables), expected, "{variables:?}");
        }
        for (value, is_disabled) in [("1", true), ("true", true), ("0", false)] {
            let disabled = [("HF_HUB_DISABLE_IMPLICIT_TOKEN", value), named[0]];
            assert_eq!(found(home.path(), &disabled).is_none(), is_disabled);
        }
        write("token", " \n");
        assert_eq!(found(home.path(), &[]), None, "an empty file holds none");
    }

    #[test]
    fn errors_do_not_quote_a_malformed_token() {
        let home = tempfile::tempdir().expect("a folder");
        let file = home.path().join("token");
        std::fs::write(&file, "hf_sec ret").expect("it is written");
        let broken = Token::find(|_| None, home.path()).err().expect("no token");
        let message = broken.to_string();
        assert!(
            message.contains(&file.display().to_string()) && !message.contains("sec"),
            "{message}"
        );
    }
}
