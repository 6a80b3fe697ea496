//! Regular expressions of an `adapter_config.json`, with the semantics of Python's `re` as used by PEFT.

use fancy_regex::{Regex, RegexBuilder};

use crate::error::ModelError;

/// Largest number of backtracking steps of one match. Module names are short; an expression that needs more is refused.
const MAX_BACKTRACKING: usize = 10_000;

/// A regular expression over module names, with its source text for saving.
#[derive(Debug, Clone)]
pub(super) struct NamePattern {
    source: String,
    regex: Regex,
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &Self) -> bool {
        (&self.source, self.regex.as_str()) == (&other.source, other.regex.as_str())
    }
}

impl NamePattern {
    /// Matches whole names: `re.fullmatch(source, name)`, as `target_modules` and `exclude_modules` do.
    pub(super) fn whole(source: &str) -> Result<Self, String> {
        Self::compile(source, &format!(r"\A(?:{source})\z"))
    }

    /// Matches name suffixes: `re.match(rf"(.*\.)?({source})$", name)`, as the keys of `rank_pattern` and
    /// `alpha_pattern` do.
    pub(super) fn at_end(source: &str) -> Result<Self, String> {
        Self::compile(source, &format!(r"\A(?:.*\.)?(?:{source})\z"))
    }

    /// Captures the layer index after `source` in a name, as `layers_pattern` does; after any name part when `source`
    /// is empty.
    pub(super) fn layer(source: &str) -> Result<Self, String> {
        let regex = match source {
            "" => r"\A.*?\.[^.]*\.(?<index>[0-9]+)\.".to_owned(),
            named => format!(r"\A(?:.*?\.)?{named}\.(?<index>[0-9]+)\."),
        };
        Self::compile(source, &regex)
    }

    fn compile(source: &str, regex: &str) -> Result<Self, String> {
        // The source is compiled alone first: when wrapped, an unbalanced bracket could close the wrapping group.
        let regex = RegexBuilder::new(regex)
            .backtrack_limit(MAX_BACKTRACKING)
            .build();
        let compiled = Regex::new(source).and(regex);
        let regex = compiled
            .map_err(|error| format!("{source:?} is not a valid regular expression: {error}"))?;
        Ok(Self {
            source: source.to_owned(),
            regex,
        })
    }

    /// Source text of the expression.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Whether the name matches.
    pub(super) fn matches(&self, name: &str) -> Result<bool, ModelError> {
        self.regex
            .is_match(name)
            .map_err(|error| self.match_error(&error))
    }

    /// Layer index captured by a pattern of [`Self::layer`].
    pub(super) fn layer_index(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let found = self.regex.captures(name);
        let found = found.map_err(|error| self.match_error(&error))?;
        let index = found.and_then(|found| found.name("index")?.as_str().parse().ok());
        Ok(index)
    }

    fn match_error(&self, error: &fancy_regex::Error) -> ModelError {
        ModelError::Adapter {
            reason: format!("{:?} cannot be matched: {error}", self.source),
        }
    }
}
