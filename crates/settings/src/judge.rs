//! `[preference.judge]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ModelSource;

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
    /// A decoder with a scalar head.
    BradleyTerry {
        /// Where it comes from; empty: one is fitted at the start, by `[preference.fit]`.
        path: ModelSource,
    },
    /// A decoder with a general preference head.
    Pairwise {
        /// Where it comes from; empty: one is fitted at the start, by `[preference.fit]`.
        path: ModelSource,
    },
    /// A ready-made encoder classifier.
    Encoder {
        /// Where it comes from.
        path: ModelSource,
        /// What it reads, with `{prompt}` and `{response}`.
        template: String,
    },
    /// Several judges of which each gives p; they are combined.
    Ensemble {
        /// The members, written as judges are.
        members: Vec<JudgeSettings>,
        /// How their p become one.
        combine: Combine,
        /// Standard deviations that `lower-bound` takes off, toward ½.
        deviations: f64,
    },
    /// Chat endpoints in the manner of OpenAI; what they are asked is in `preference.chat`.
    Http(EndpointSettings),
    /// A chat model in this process, by mistral.rs; what it is asked is in `preference.chat`.
    Mistral(LocalChatSettings),
    /// Other Agon preference services.
    Service {
        /// Their addresses, as in `http://host:8000`.
        urls: Vec<String>,
        /// A file with the bearer token they ask for; empty: none.
        token_path: PathBuf,
    },
}

/// How the members of an ensemble become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// The mean of their p.
    Mean,
    /// The mean of their log-odds moved toward ½ by some of their standard deviations, never beyond it.
    LowerBound,
}

/// Chat endpoints in the manner of OpenAI.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSettings {
    /// Up to and without `/chat/completions`, as in `http://host:8000/v1`; each is a replica.
    pub urls: Vec<String>,
    /// The model's name there.
    pub model: String,
    /// A file with the API key; empty: none.
    pub api_key_path: PathBuf,
    /// Questions to one address at a time.
    pub concurrency: usize,
}

/// A chat model in this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalChatSettings {
    /// A Hugging Face folder, or a `.gguf` file.
    pub path: PathBuf,
    /// A `tokenizer.json` instead of the model's own; empty: its own.
    pub tokenizer_path: PathBuf,
    /// A `.jinja` file instead of the model's own; empty: its own.
    pub chat_template: PathBuf,
    /// How a folder's weights are quantised as they are loaded, as mistral.rs names it; empty: not at all.
    pub isq: String,
}

/// What chat models are asked that judge, and how they answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatSettings {
    /// What the system's turn says; empty: there is none.
    pub system: String,
    /// What is asked, with `{prompt}`, `{first}` and `{second}`.
    pub template: String,
    /// What stands for the first response in a verdict.
    pub first_verdict: String,
    /// What stands for the second.
    pub second_verdict: String,
    /// What stands for neither; empty: there are no ties.
    pub tie_verdict: String,
    /// Whether log-probabilities of the verdict are asked for, and used where they are given.
    pub logprobs: bool,
    /// The longest answer, in tokens.
    pub max_tokens: usize,
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

impl JudgeSettings {
    /// The kind, as the settings name it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Gold { .. } => "gold",
            Self::Matrix { .. } => "matrix",
            Self::Rule { .. } => "rule",
            Self::BradleyTerry { .. } => "bradley-terry",
            Self::Pairwise { .. } => "pairwise",
            Self::Encoder { .. } => "encoder",
            Self::Ensemble { .. } => "ensemble",
            Self::Http(_) => "http",
            Self::Mistral(_) => "mistral",
            Self::Service { .. } => "service",
        }
    }
}
