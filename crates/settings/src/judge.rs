//! `[preference.judge]` and `[preference.chat]`: judges, and the prompt of judges that are chat models.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    checks::Checks, prompts::PromptsSettings, settings::Settings, source::ModelSource, url,
};

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
        /// Weight of each member; empty: equal weights.
        weights: Vec<f64>,
        /// Aggregation of the members' probabilities.
        combine: Combine,
        /// Number of standard deviations of `lower-bound`.
        deviations: f64,
    },
    /// A judge for each value of the prompts' column `prompts.route_column`, and one for the rest.
    Route {
        /// The judges: one for each of `values`, and last the one of all other prompts.
        members: Vec<JudgeSettings>,
        /// Values of the column; `*` is any.
        values: Vec<String>,
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
    /// Form of its answers.
    pub form: VerdictForm,
    /// Criteria: the text of `{rubric}` in the template, or the end of the system message; empty: none.
    pub rubric: String,
    /// Number of sampled replies, over which the mean is taken; 1: one greedy reply.
    pub votes: usize,
}

/// Form of the answers of a chat model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictForm {
    /// A verdict on two responses.
    Pairwise,
    /// A score of one response.
    Pointwise,
}

/// Request to a chat model: form, criteria and number of replies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RubricSettings {
    /// Form of its answers.
    pub form: VerdictForm,
    /// Criteria; empty: none.
    pub rubric: String,
    /// Number of replies.
    pub votes: usize,
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
    /// Form of its answers.
    pub form: VerdictForm,
    /// Criteria: the text of `{rubric}` in the template, or the end of the system message; empty: none.
    pub rubric: String,
    /// Number of sampled replies, over which the mean is taken; 1: one greedy reply.
    pub votes: usize,
}

/// Prompt and verdict format of judges that are chat models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatSettings {
    /// System message; empty: none.
    pub system: String,
    /// User message template with `{prompt}`, `{first}` and `{second}`, and `{rubric}` if it has a place for it.
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
    /// Sampling temperature of replies where a judge has several votes.
    pub vote_temperature: f64,
    /// Prompt and scale of scores.
    pub pointwise: PointwiseSettings,
}

/// Prompt and scale of chat models that score one response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointwiseSettings {
    /// User message template with `{prompt}` and `{response}`, and `{rubric}` if it has a place for it.
    pub template: String,
    /// Lowest score.
    pub min: f64,
    /// Highest score.
    pub max: f64,
    /// Difference of the scores at which the log-odds are 1.
    pub temperature: f64,
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
            Self::Route { .. } => "route",
            Self::Http(_) => "http",
            Self::Mistral(_) => "mistral",
            Self::Service { .. } => "service",
        }
    }

    /// Checks the judge at the key `path`.
    pub(crate) fn check(&self, path: &str, settings: &Settings, checks: &mut Checks) {
        let key = |key: &str| format!("{path}.{key}");
        match self {
            Self::Gold { cycle } => {
                checks.require(
                    matches!(settings.prompts, PromptsSettings::Playground { .. }),
                    &key("kind"),
                    "\"gold\" judges the playground's summaries only; use \"rule\" for other prompts",
                );
                checks.finite(*cycle, &key("cycle"));
            }
            Self::Matrix { matrix } => check_matrix(&key("matrix"), matrix, settings, checks),
            Self::Rule { temperature, rules } => {
                checks.non_negative(*temperature, &key("temperature"));
                check_rules(&key("rules"), rules, settings, checks);
            }
            Self::BradleyTerry { .. } | Self::Pairwise { .. } => {}
            Self::Encoder {
                path: source,
                template,
            } => check_encoder(path, source, template, checks),
            Self::Ensemble {
                members,
                weights,
                deviations,
                ..
            } => {
                checks.non_negative(*deviations, &key("deviations"));
                check_weights(&key("weights"), weights, members.len(), checks);
                let message = "an ensemble has at least two members";
                checks.require(members.len() >= 2, &key("members"), message);
                check_members(&key("members"), members, settings, checks);
            }
            Self::Route { members, values } => {
                check_routes(path, members.len(), values, settings, checks);
                check_members(&key("members"), members, settings, checks);
            }
            Self::Http(endpoints) => endpoints.check(path, checks),
            Self::Mistral(model) => model.check(path, checks),
            Self::Service { urls, .. } => {
                let remedy = format!("the token goes into a file that {path}.token_path names");
                check_urls(&key("urls"), urls, &remedy, checks);
            }
        }
    }

    /// Whether the run trains the judge's model, or a member's, at its start.
    #[must_use]
    pub fn is_trained_by_the_run(&self) -> bool {
        match self {
            Self::BradleyTerry { path } | Self::Pairwise { path } => path.is_empty(),
            other => other.members().iter().any(Self::is_trained_by_the_run),
        }
    }

    /// The member judges, of a judge that has some.
    #[must_use]
    pub fn members(&self) -> &[JudgeSettings] {
        match self {
            Self::Ensemble { members, .. } | Self::Route { members, .. } => members,
            _ => &[],
        }
    }

    /// Whether the judge, or a member of it, fulfils `is`.
    pub fn any(&self, is: &dyn Fn(&JudgeSettings) -> bool) -> bool {
        is(self) || self.members().iter().any(|member| member.any(is))
    }

    /// Units of score per unit of log-odds, of a judge that scores every completion; `None` for other judges.
    #[must_use]
    pub fn score_temperature(&self, chat: &ChatSettings) -> Option<f64> {
        match self {
            Self::Rule { temperature, .. } => Some(*temperature).filter(|&t| t > 0.0),
            Self::BradleyTerry { .. } | Self::Encoder { .. } => Some(1.0),
            Self::Http(EndpointSettings { form, .. })
            | Self::Mistral(LocalChatSettings { form, .. }) => match form {
                VerdictForm::Pairwise => None,
                VerdictForm::Pointwise => Some(chat.pointwise.temperature),
            },
            _ => None,
        }
    }
}

fn check_encoder(path: &str, source: &ModelSource, template: &str, checks: &mut Checks) {
    checks.require(
        !source.is_empty(),
        &format!("{path}.path"),
        "name the folder of the encoder",
    );
    checks.require(
        template.contains("{response}"),
        &format!("{path}.template"),
        "it must contain {response}",
    );
}

fn check_weights(path: &str, weights: &[f64], members: usize, checks: &mut Checks) {
    checks.require(
        weights.is_empty() || weights.len() == members,
        path,
        format!(
            "{} weights for {members} members: give one for each, or none",
            weights.len()
        ),
    );
    for (index, &weight) in weights.iter().enumerate() {
        checks.positive(weight, &format!("{path}[{index}]"));
    }
}

fn check_routes(
    path: &str,
    members: usize,
    values: &[String],
    settings: &Settings,
    checks: &mut Checks,
) {
    checks.require(
        settings.prompts.has_routes(),
        &format!("{path}.kind"),
        "\"route\" chooses a judge by a column of the prompts: name prompts.route_column",
    );
    let key = format!("{path}.values");
    checks.require(
        !values.is_empty() && members == values.len() + 1,
        &key,
        format!(
            "{} values for {members} members: give one for each but the last, which judges all other prompts",
            values.len()
        ),
    );
    for (index, value) in values.iter().enumerate() {
        let before = &values[..index];
        checks.require(
            !value.is_empty() && !before.contains(value) && !before.iter().any(|v| v == "*"),
            &key,
            format!("{value:?} is empty, or an earlier value has its prompts"),
        );
    }
}

fn check_matrix(path: &str, matrix: &[Vec<f64>], settings: &Settings, checks: &mut Checks) {
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

impl JudgeSettings {
    /// Whether it, or a member of it, compares with golden answers.
    pub(crate) fn reads_golden(&self) -> bool {
        let reads = |rules: &[RuleSettings]| rules.iter().any(RuleSettings::reads_golden);
        self.any(&|judge| matches!(judge, Self::Rule { rules, .. } if reads(rules)))
    }

    /// Whether it, or a member of it, chooses a judge by the route of a prompt.
    pub(crate) fn reads_route(&self) -> bool {
        self.any(&|judge| matches!(judge, Self::Route { .. }))
    }
}

impl RuleSettings {
    /// Whether it compares with golden answers.
    fn reads_golden(&self) -> bool {
        matches!(self, Self::ExactMatch { .. })
    }
}

fn check_rules(path: &str, rules: &[RuleSettings], settings: &Settings, checks: &mut Checks) {
    checks.require(!rules.is_empty(), path, "name at least one rule");
    checks.require(
        !rules.iter().any(RuleSettings::reads_golden) || settings.prompts.may_have_golden(),
        path,
        "\"exact-match\" compares with a golden answer: name prompts.golden_column",
    );
}

fn check_members(path: &str, members: &[JudgeSettings], settings: &Settings, checks: &mut Checks) {
    for (index, member) in members.iter().enumerate() {
        member.check(&format!("{path}[{index}]"), settings, checks);
    }
}

/// Checks the URLs of a judge at the key `path`; `remedy` says where a secret belongs.
fn check_urls(path: &str, urls: &[String], remedy: &str, checks: &mut Checks) {
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
    fn check(&self, path: &str, checks: &mut Checks) {
        let key = |key: &str| format!("{path}.{key}");
        let remedy = format!("the API key goes into a file that {path}.api_key_path names");
        check_urls(&key("urls"), &self.urls, &remedy, checks);
        checks.require(!self.model.is_empty(), &key("model"), "name the model");
        checks.at_least(self.concurrency as u64, 1, &key("concurrency"));
        checks.at_least(self.votes as u64, 1, &key("votes"));
    }
}

impl LocalChatSettings {
    fn check(&self, path: &str, checks: &mut Checks) {
        checks.require(
            !self.path.as_os_str().is_empty(),
            &format!("{path}.path"),
            "name a Hugging Face folder or a .gguf file",
        );
        checks.at_least(self.votes as u64, 1, &format!("{path}.votes"));
    }
}

impl EndpointSettings {
    /// Request to the model.
    #[must_use]
    pub fn rubric(&self) -> RubricSettings {
        RubricSettings {
            form: self.form,
            rubric: self.rubric.clone(),
            votes: self.votes,
        }
    }
}

impl LocalChatSettings {
    /// Request to the model.
    #[must_use]
    pub fn rubric(&self) -> RubricSettings {
        RubricSettings {
            form: self.form,
            rubric: self.rubric.clone(),
            votes: self.votes,
        }
    }
}

impl PointwiseSettings {
    fn check(&self, checks: &mut Checks) {
        let path = |key: &str| format!("preference.chat.pointwise.{key}");
        let has_response = self.template.contains("{response}");
        checks.require(
            has_response,
            &path("template"),
            "it must contain {response}",
        );
        checks.finite(self.min, &path("min"));
        checks.finite(self.max, &path("max"));
        let message = format!(
            "{} must be above preference.chat.pointwise.min = {}",
            self.max, self.min
        );
        checks.require(self.max > self.min, &path("max"), message);
        checks.positive(self.temperature, &path("temperature"));
    }
}

impl ChatSettings {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let path = |key: &str| format!("preference.chat.{key}");
        self.pointwise.check(checks);
        checks.positive(self.vote_temperature, &path("vote_temperature"));
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

    #[test]
    fn mistakes_of_members_weights_routes_and_rubrics_are_named() {
        let dataset = "[model]\npath = \"m\"\n[prompts]\nkind = \"dataset\"\npath = \"p\"\n";
        let members = "members = [{ kind = \"gold\" }, { kind = \"gold\" }]";
        let judge = |text: &str| format!("[preference.judge]\n{text}");
        let ensemble = |keys: &str| judge(&format!("kind = \"ensemble\"\n{members}\n{keys}"));
        let rules = "{ kind = \"rule\", rules = [{ kind = \"ended\", weight = 1 }] }";
        let route = |values: &str| {
            let members = format!("members = [{rules}, {rules}]");
            let judge = judge(&format!("kind = \"route\"\n{members}\nvalues = {values}"));
            format!("{dataset}route_column = \"task\"\n{judge}")
        };
        assert_eq!(
            problems(&ensemble("weights = [1.0, 2]")),
            Vec::<String>::new()
        );
        assert_eq!(problems(&route("[\"math\"]")), Vec::<String>::new());
        assert_reported(&[
            (
                &ensemble("weights = [1.0]"),
                "preference.judge.weights: 1 weights for 2 members",
            ),
            (
                &ensemble("weights = [1.0, -1]"),
                "preference.judge.weights[1]: -1 must be greater",
            ),
            (
                &judge(&format!(
                    "kind = \"ensemble\"\nmembers = [{{ kind = \"http\" }}, {rules}]"
                )),
                "preference.judge.members[0].urls: name at least one URL",
            ),
            (
                &judge(&format!("kind = \"route\"\n{members}\nvalues = [\"a\"]")),
                "preference.judge.kind: \"route\" chooses a judge by a column",
            ),
            (
                &route("[]"),
                "preference.judge.values: 0 values for 2 members",
            ),
            (&route("[\"\"]"), "preference.judge.values: \"\" is empty"),
            (
                &judge("kind = \"http\"\nurls = [\"http://h\"]\nmodel = \"m\"\nvotes = 0"),
                "preference.judge.votes: 0 must be at least 1",
            ),
            (
                "[preference.chat.pointwise]\ntemplate = \"{prompt}\"\nmin = 5\nmax = 5",
                "preference.chat.pointwise.template: it must contain {response}",
            ),
            (
                "[preference.chat.pointwise]\nmin = 5.0\nmax = 5.0",
                "preference.chat.pointwise.max: 5 must be above",
            ),
            (
                "[preference.chat]\nvote_temperature = 0.0",
                "preference.chat.vote_temperature",
            ),
        ]);
    }
}
