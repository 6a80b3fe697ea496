//! `[preference.judge]` and `[preference.chat]`: judges, and the prompt of judges that are chat models.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Settings, checks::Checks, prompts::PromptsSettings, source::ModelSource, url};

/// The judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum JudgeSettings {
    /// The playground's known preference.
    Gold {
        /// Strength of the cyclic preference between styles.
        cycle: f64,
    },
    /// The preference matrix of a bandit.
    Matrix {
        /// `matrix[i][j]`: the probability that arm i beats arm j.
        matrix: Vec<Vec<f64>>,
    },
    /// A weighted sum of rules.
    Rule {
        /// Temperature of the score difference; 0: the higher score wins.
        temperature: f64,
        /// Rules and weights.
        rules: Vec<RuleSettings>,
    },
    /// A reward model with a scalar head.
    BradleyTerry {
        /// Source of the model; empty: one is trained at the start, by `[preference.fit]`.
        path: ModelSource,
    },
    /// A reward model with a general preference head.
    Pairwise {
        /// Source of the model; empty: one is trained at the start, by `[preference.fit]`.
        path: ModelSource,
    },
    /// A pretrained encoder classifier.
    Encoder {
        /// Source of the model.
        path: ModelSource,
        /// Input template with `{prompt}` and `{response}`.
        template: String,
    },
    /// A combination of several judges.
    Ensemble {
        /// The member judges.
        members: Vec<JudgeSettings>,
        /// Aggregation of the members' probabilities.
        combine: Combine,
        /// Number of standard deviations of `lower-bound`.
        deviations: f64,
    },
    /// OpenAI-compatible chat endpoints; their prompt is `preference.chat`.
    Http(EndpointSettings),
    /// A chat model in this process, run by mistral.rs; its prompt is `preference.chat`.
    Mistral(LocalChatSettings),
    /// Other Agon preference services.
    Service {
        /// Base URLs, such as `http://host:8000`.
        urls: Vec<String>,
        /// File with the bearer token; empty: none.
        token_path: PathBuf,
    },
}

/// Aggregation of an ensemble's probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// Mean probability.
    Mean,
    /// Mean log-odds, moved towards 0 by a multiple of their standard deviation, at most to 0.
    LowerBound,
}

/// OpenAI-compatible chat endpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSettings {
    /// Base URLs without `/chat/completions`, such as `http://host:8000/v1`; one replica each.
    pub urls: Vec<String>,
    /// Name of the model at the endpoints.
    pub model: String,
    /// File with the API key; empty: none.
    pub api_key_path: PathBuf,
    /// Concurrent requests per URL.
    pub concurrency: usize,
}

/// A chat model in this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalChatSettings {
    /// A Hugging Face folder, or a `.gguf` file.
    pub path: PathBuf,
    /// A `tokenizer.json` that replaces the model's own; empty: its own.
    pub tokenizer_path: PathBuf,
    /// A `.jinja` chat template that replaces the model's own; empty: its own.
    pub chat_template: PathBuf,
    /// In-situ quantisation of a folder's weights, by mistral.rs' name; empty: none.
    pub isq: String,
}

/// Prompt and verdict format of judges that are chat models.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatSettings {
    /// System message; empty: none.
    pub system: String,
    /// User message template with `{prompt}`, `{first}` and `{second}`.
    pub template: String,
    /// Verdict for the first response.
    pub first_verdict: String,
    /// Verdict for the second response.
    pub second_verdict: String,
    /// Verdict for a tie; empty: no ties.
    pub tie_verdict: String,
    /// Whether log-probabilities of the verdict are requested, and used if available.
    pub logprobs: bool,
    /// Maximum length of the reply in tokens.
    pub max_tokens: usize,
}

/// A scoring rule and its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RuleSettings {
    /// Number of matches of a pattern.
    Regex {
        /// The pattern, in the syntax of the regex crate.
        pattern: String,
        /// Weight in the score.
        weight: f64,
    },
    /// Number of listed words that occur at least once.
    Keyword {
        /// The words, matched case-insensitively.
        words: Vec<String>,
        /// Weight in the score.
        weight: f64,
    },
    /// Penalty per word below `min` or above `max`.
    Length {
        /// Minimum number of words without a penalty.
        min: usize,
        /// Maximum number of words without a penalty.
        max: usize,
        /// Weight in the score.
        weight: f64,
    },
    /// Whether the completion is valid JSON.
    JsonValid {
        /// Weight in the score.
        weight: f64,
    },
    /// Whether the completion equals the prompt's golden answer, ignoring surrounding white space.
    ExactMatch {
        /// Weight in the score.
        weight: f64,
    },
    /// Whether the completion ended with an end-of-text token.
    Ended {
        /// Weight in the score.
        weight: f64,
    },
}

impl JudgeSettings {
    /// The name of the kind in the settings.
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
    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        match self {
            Self::Gold { cycle } => {
                checks.require(
                    matches!(settings.prompts, PromptsSettings::Playground { .. }),
                    "preference.judge.kind",
                    "\"gold\" judges the playground's summaries only; use \"rule\" for other prompts",
                );
                checks.finite(*cycle, "preference.judge.cycle");
            }
            Self::Matrix { matrix } => check_matrix(matrix, settings, checks),
            Self::Rule { temperature, rules } => {
                checks.non_negative(*temperature, "preference.judge.temperature");
                check_rules(rules, settings, checks);
            }
            Self::BradleyTerry { .. } | Self::Pairwise { .. } => {}
            Self::Encoder { path, template } => check_encoder(path, template, checks),
            Self::Ensemble {
                members,
                deviations,
                ..
            } => {
                checks.non_negative(*deviations, "preference.judge.deviations");
                check_members(members, settings, checks);
            }
            Self::Http(endpoints) => endpoints.check(checks),
            Self::Mistral(model) => model.check(checks),
            Self::Service { urls, .. } => {
                let remedy = "the token goes into a file that preference.judge.token_path names";
                check_urls(urls, remedy, checks);
            }
        }
    }

    /// Whether the judge runs in this process and can be a member of an ensemble.
    fn can_be_member(&self) -> bool {
        !matches!(
            self,
            Self::Ensemble { .. } | Self::Http(_) | Self::Service { .. }
        )
    }
}

fn check_matrix(matrix: &[Vec<f64>], settings: &Settings, checks: &mut Checks) {
    let path = "preference.judge.matrix";
    let arms = matrix.len();
    let probabilities = settings.model.reference_probabilities.as_ref();
    let expected = probabilities.map_or(arms, Vec::len);
    checks.require(
        probabilities.is_some(),
        path,
        "a matrix judges a bandit's arms: set prompts.kind = \"bandit\"",
    );
    if arms == 0 || arms != expected || matrix.iter().any(|row| row.len() != arms) {
        let message = format!("it must have {expected} rows of {expected} numbers, one per arm");
        checks.require(false, path, message);
        return;
    }
    for (i, row) in matrix.iter().enumerate() {
        for (j, &p) in row.iter().enumerate().skip(i) {
            checks.require(
                (0.0..=1.0).contains(&p) && (p + matrix[j][i] - 1.0).abs() < 1e-6,
                path,
                format!(
                    "[{i}][{j}] = {p} and [{j}][{i}] = {} must add up to 1",
                    matrix[j][i]
                ),
            );
        }
    }
}

fn check_rules(rules: &[RuleSettings], settings: &Settings, checks: &mut Checks) {
    let path = "preference.judge.rules";
    checks.require(!rules.is_empty(), path, "name at least one rule");
    let needs_golden = |rule: &RuleSettings| matches!(rule, RuleSettings::ExactMatch { .. });
    checks.require(
        !rules.iter().any(needs_golden) || settings.prompts.has_golden(),
        path,
        "\"exact-match\" compares with a golden answer: name prompts.golden_column",
    );
}

fn check_encoder(path: &ModelSource, template: &str, checks: &mut Checks) {
    checks.require(
        !path.is_empty(),
        "preference.judge.path",
        "name the folder of the encoder",
    );
    checks.require(
        template.contains("{response}"),
        "preference.judge.template",
        "it must contain {response}",
    );
}

fn check_members(members: &[JudgeSettings], settings: &Settings, checks: &mut Checks) {
    let path = "preference.judge.members";
    checks.require(
        members.len() >= 2,
        path,
        "an ensemble has at least two members",
    );
    for member in members {
        checks.require(
            member.can_be_member(),
            path,
            format!(
                "{:?} cannot be a member: members run in this process",
                member.name()
            ),
        );
        member.check(settings, checks);
    }
}

/// Checks the URLs of a judge; `remedy` says where a secret belongs.
fn check_urls(urls: &[String], remedy: &str, checks: &mut Checks) {
    let path = "preference.judge.urls";
    checks.require(!urls.is_empty(), path, "name at least one URL");
    for url in urls {
        if url::check(url, path, remedy, checks) {
            checks.require(
                url.starts_with("http://") || url.starts_with("https://"),
                path,
                format!("{url:?} does not begin with http:// or https://"),
            );
        }
    }
}

impl EndpointSettings {
    fn check(&self, checks: &mut Checks) {
        let remedy = "the API key goes into a file that preference.judge.api_key_path names";
        check_urls(&self.urls, remedy, checks);
        checks.require(
            !self.model.is_empty(),
            "preference.judge.model",
            "name the model",
        );
        checks.at_least(self.concurrency as u64, 1, "preference.judge.concurrency");
    }
}

impl LocalChatSettings {
    fn check(&self, checks: &mut Checks) {
        checks.require(
            !self.path.as_os_str().is_empty(),
            "preference.judge.path",
            "name a Hugging Face folder or a .gguf file",
        );
    }
}

impl ChatSettings {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let path = |key: &str| format!("preference.chat.{key}");
        checks.at_least(self.max_tokens as u64, 1, &path("max_tokens"));
        for placeholder in ["{first}", "{second}"] {
            checks.require(
                self.template.contains(placeholder),
                &path("template"),
                format!("it must contain {placeholder}"),
            );
        }
        let verdicts = [&self.first_verdict, &self.second_verdict, &self.tie_verdict];
        let distinct = verdicts[0] != verdicts[1] && !verdicts[..2].contains(&verdicts[2]);
        checks.require(
            distinct && !verdicts[0].is_empty() && !verdicts[1].is_empty(),
            &path("first_verdict"),
            "first_verdict, second_verdict and tie_verdict must differ, and the first two must not be empty",
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::{assert_reported, problems};

    #[test]
    fn contradictions_of_judges_are_reported() {
        assert_reported(&[
            (
                "[preference.judge]\nkind = \"matrix\"\nmatrix = [[0.5]]",
                "a matrix judges a bandit's arms",
            ),
            (
                "[model]\npath = \"m\"\n[prompts]\nkind = \"dataset\"\npath = \"p\"\n\
                 [preference.judge]\nkind = \"rule\"\nrules = [{ kind = \"exact-match\", weight = 1 }]",
                "preference.judge.rules: \"exact-match\" compares with a golden answer",
            ),
        ]);
    }

    #[test]
    fn urls_with_secrets_are_refused_without_repeating_them() {
        for (kind, remedy) in [
            ("http", "preference.judge.api_key_path"),
            ("service", "preference.judge.token_path"),
        ] {
            for url in [
                "http://ann:SESAME@host/v1",
                "ann:SESAME@host",
                "https://host/v1?key=SESAME",
                "https://host/v1#SESAME",
            ] {
                let problems = problems(&format!(
                    "[preference.judge]\nkind = {kind:?}\nurls = [\"http://host\", {url:?}]"
                ));
                let problem = problems.iter().find(|problem| problem.contains("urls: "));
                let problem = problem.map_or("", String::as_str);
                assert!(problem.contains(remedy), "{kind} {url}: {problems:?}");
                assert!(!problems.concat().contains("SESAME"), "{problems:?}");
            }
        }
    }

    #[test]
    fn a_bandit_needs_a_matrix_of_preference_probabilities() {
        let bandit = |matrix: &str| {
            problems(&format!(
                "[prompts]\nkind = \"bandit\"\n[model]\nreference_probabilities = [0.4, 0.6]\n\
                 [actor]\nmax_new_tokens = 1\n[preference.judge]\nkind = \"matrix\"\nmatrix = {matrix}"
            ))
        };
        assert_eq!(bandit("[[0.5, 0.7], [0.3, 0.5]]"), Vec::<String>::new());
        assert!(bandit("[[0.5, 0.7], [0.4, 0.5]]")[0].contains("[0][1] = 0.7 and [1][0] = 0.4"));
        assert!(bandit("[[0.5]]")[0].contains("2 rows of 2 numbers"));
    }
}
