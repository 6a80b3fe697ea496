//! The token that is shown to the hub: found as Python's `huggingface_hub` finds it.
//!
//! `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the file that `hf auth login` writes: `HF_TOKEN_PATH`, else
//! `token` in `HF_HOME`. With `HF_HUB_DISABLE_IMPLICIT_TOKEN` none is shown. A token never appears in a message.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use super::HubError;

/// The variables that hold a token, in their order.
const VARIABLES: [&str; 2] = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];

/// What is shown to the hub and to nobody else, or why nothing is.
#[derive(Clone)]
pub(super) enum Token {
    /// This secret.
    Known {
        /// The token itself.
        secret: String,
        /// Where it was found.
        source: Source,
    },
    /// There is none; the file was looked for here.
    Missing(PathBuf),
    /// None is to be shown.
    Withheld,
}

/// Where a token was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// In this variable.
    Variable(&'static str),
    /// In this file.
    File(PathBuf),
}

impl Token {
    /// The token of these variables and of the files that they name, `home` being the folder of Hugging Face. An
    /// empty variable is none.
    ///
    /// # Errors
    /// When the file cannot be read, or what was found cannot be a token.
    pub(super) fn find(
        variable: impl Fn(&str) -> Option<String>,
        home: &Path,
    ) -> Result<Self, HubError> {
        let is_withheld = variable("HF_HUB_DISABLE_IMPLICIT_TOKEN");
        if is_withheld.as_deref().is_some_and(super::is_true) {
            return Ok(Self::Withheld);
        }
        for name in VARIABLES {
            if let Some(secret) = variable(name) {
                return Self::known(&secret, Source::Variable(name));
            }
        }
        let file = variable("HF_TOKEN_PATH").map(|path| super::without_tilde(&path, &variable));
        let file = file.unwrap_or_else(|| home.join("token"));
        match std::fs::read_to_string(&file) {
            Ok(secret) if secret.trim().is_empty() => Ok(Self::Missing(file)),
            Ok(secret) => Self::known(&secret, Source::File(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Missing(file)),
            Err(error) => Err(HubError::TokenFile {
                path: file,
                reason: error.to_string(),
            }),
        }
    }

    /// A token that is no header would be told in the error of the request.
    fn known(secret: &str, source: Source) -> Result<Self, HubError> {
        let secret = secret.trim().to_owned();
        match secret.chars().all(|c| c.is_ascii_graphic()) {
            true => Ok(Self::Known { secret, source }),
            false => Err(HubError::Token(source.to_string())),
        }
    }

    /// What is shown to the hub.
    pub(super) fn secret(&self) -> Option<String> {
        match self {
            Self::Known { secret, .. } => Some(secret.clone()),
            Self::Missing(_) | Self::Withheld => None,
        }
    }

    /// Why the hub does not give what it was asked for.
    pub(super) fn lacks_access(&self) -> String {
        match self {
            Self::Known { source, .. } => format!("the token in {source} has none"),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known { source, .. } => write!(f, "the token is that of {source}"),
            Self::Missing(file) => {
                write!(
                    f,
                    "HF_TOKEN is not set and {} does not exist or is empty",
                    file.display()
                )
            }
            Self::Withheld => write!(f, "HF_HUB_DISABLE_IMPLICIT_TOKEN is set: no token is shown"),
        }
    }
}

impl fmt::Display for Source {
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

    /// The token that is found, with its source; the home holds `token` and `elsewhere`.
    fn found(home: &Path, variables: &[(&str, &str)]) -> Option<(String, String)> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let token = Token::find(variable, home).map_err(|error| error.to_string());
        match token.expect("a token or none") {
            Token::Known { secret, source } => Some((secret, source.to_string())),
            Token::Missing(_) | Token::Withheld => None,
        }
    }

    #[test]
    fn a_token_is_found_where_huggingface_hub_finds_it() {
        let home = tempfile::tempdir().expect("a folder");
        let of = |name: &str, token: &str| {
            let path = home.path().join(name);
            std::fs::write(&path, token).expect("it is written");
            path.display().to_string()
        };
        let elsewhere = of("elsewhere", "hf_elsewhere");
        assert_eq!(found(home.path(), &[]), None, "nobody has logged in");
        let login = of("token", "hf_login\n");
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
        for (value, is_withheld) in [("1", true), ("true", true), ("0", false)] {
            let withheld = [("HF_HUB_DISABLE_IMPLICIT_TOKEN", value), named[0]];
            assert_eq!(found(home.path(), &withheld).is_none(), is_withheld);
        }
        of("token", " \n");
        assert_eq!(found(home.path(), &[]), None, "an empty file holds none");
    }

    #[test]
    fn what_cannot_be_a_token_is_refused_without_its_words() {
        let home = tempfile::tempdir().expect("a folder");
        let file = home.path().join("token");
        std::fs::write(&file, "hf_sec ret").expect("it is written");
        let broken = Token::find(|_| None, home.path()).err().expect("no token");
        let said = broken.to_string();
        assert!(
            said.contains(&file.display().to_string()) && !said.contains("sec"),
            "{said}"
        );
    }
}
