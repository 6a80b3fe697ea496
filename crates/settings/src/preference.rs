//! `[preference]`.

use serde::{Deserialize, Serialize};

/// How pairs are judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreferenceSettings {
    /// Pairs judged at once.
    pub max_batch: usize,
    /// How long a batch waits for company, in milliseconds.
    pub max_wait_ms: u64,
    /// Who judges.
    pub judge: JudgeSettings,
}

/// Who judges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum JudgeSettings {
    /// The playground's own preference.
    Gold {
        /// Strength of the cyclic preference between styles.
        cycle: f64,
    },
    /// A bandit's matrix.
    Matrix {
        /// `matrix[i][j]`: the probability that arm i beats arm j.
        matrix: Vec<Vec<f64>>,
    },
    /// A weighted sum of rules.
    Rule {
        /// Divides the difference of two scores; 0: the higher score wins.
        temperature: f64,
        /// What scores.
        rules: Vec<RuleSettings>,
    },
}

/// One rule and its weight in the score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RuleSettings {
    /// Per match of a pattern.
    Regex {
        /// The pattern, in the syntax of the regex crate.
        pattern: String,
        /// Its weight.
        weight: f64,
    },
    /// Per word that occurs at least once.
    Keyword {
        /// The words; upper and lower case are one.
        words: Vec<String>,
        /// Its weight.
        weight: f64,
    },
    /// Per word missing from `min` or in excess of `max`, taken off.
    Length {
        /// The fewest words that cost nothing.
        min: usize,
        /// The most words that cost nothing.
        max: usize,
        /// Its weight.
        weight: f64,
    },
    /// When the completion is a JSON document.
    JsonValid {
        /// Its weight.
        weight: f64,
    },
    /// When the completion is the prompt's golden answer, white space at the ends aside.
    ExactMatch {
        /// Its weight.
        weight: f64,
    },
    /// When the completion ended by itself.
    Ended {
        /// Its weight.
        weight: f64,
    },
}
