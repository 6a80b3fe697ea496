//! Regular expressions of an `adapter_config.json`, which Python's `re` matches in PEFT.

use fancy_regex::Regex;

use crate::ModelError;

/// A regular expression with the key's own text, which is what is saved again.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    source: String,
    regex: Regex,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        (&self.source, self.regex.as_str()) == (&other.source, other.regex.as_str())
    }
}

impl Pattern {
    /// Matches whole names: `re.fullmatch(source, name)`, as `target_modules` and `exclude_modules` do.
    pub(super) fn whole(source: &str) -> Result<Self, String> {
        Self::compile(source, &format!(r"\A(?:{source})\z"))
    }

    /// Matches names by their end: `re.match(rf"(.*\.)?({source})$", name)`, as the keys of `rank_pattern` and
    /// `alpha_pattern` do.
    pub(super) fn at_end(source: &str) -> Result<Self, String> {
        Self::compile(source, &format!(r"\A(?:.*\.)?(?:{source})\z"))
    }

    /// Finds the number after `source` in a name, as `layers_pattern` does; after any part of a name where `source`
    /// is empty.
    pub(super) fn layer(source: &str) -> Result<Self, String> {
        let regex = match source {
            "" => r"\A.*?\.[^.]*\.(?<index>[0-9]+)\.".to_owned(),
            named => format!(r"\A(?:.*?\.)?{named}\.(?<index>[0-9]+)\."),
        };
        Self::compile(source, &regex)
    }

    fn compile(source: &str, regex: &str) -> Result<Self, String> {
        // Alone first: wrapped, one bracket too many might close what the wrapping has opened.
        let compiled = Regex::new(source).and_then(|_| Regex::new(regex));
        let regex = compiled.map_err(|error| {
            format!("{source:?} is not a regular expression that can be read: {error}")
        })?;
        Ok(Self {
            source: source.to_owned(),
            regex,
        })
    }

    /// The key's own text.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    pub(super) fn matches(&self, name: &str) -> Result<bool, ModelError> {
        self.regex
            .is_match(name)
            .map_err(|error| self.too_hard(&error))
    }

    /// Number of the layer that a pattern of [`Self::layer`] finds.
    pub(super) fn layer_of(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let found = self.regex.captures(name);
        let found = found.map_err(|error| self.too_hard(&error))?;
        let index = found.and_then(|found| found.name("index")?.as_str().parse().ok());
        Ok(index)
    }

    fn too_hard(&self, error: &fancy_regex::Error) -> ModelError {
        ModelError::Adapter {
            reason: format!("{:?} cannot be matched: {error}", self.source),
        }
    }
}
