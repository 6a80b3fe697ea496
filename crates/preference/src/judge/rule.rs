//! Rule-based judge: every rule measures a completion, the weighted sum is the completion's score, and the difference
//! of two scores is the log-odds of the preference.

use messages::{Completion, Finish, JudgeVersion, Probability, Prompt};
use regex::Regex;
use settings::RuleSettings;

use crate::error::{JudgeError, PreferenceError};
use crate::judge::{Comparison, Judge, ScoredVerdict, Verdict};

/// A weighted sum of rules with p(first ≻ second) = σ((score − score′) / temperature) (Bradley & Terry 1952).
#[derive(Debug, Clone)]
pub struct Rules {
    temperature: f64,
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
struct Rule {
    weight: f64,
    measure: Measure,
}

/// Measurement of a completion by a rule.
#[derive(Debug, Clone)]
enum Measure {
    /// Number of matches of a pattern.
    Matches(Regex),
    /// Number of distinct listed words that occur.
    Words(Vec<Regex>),
    /// Minus the number of words below `min` or above `max`.
    Length { min: usize, max: usize },
    /// 1 for a JSON document.
    JsonValid,
    /// 1 for the golden answer.
    ExactMatch,
    /// 1 for a completion that ended with end-of-text.
    Ended,
}

impl Rules {
    /// A judge by these rules. `temperature` divides the difference of two scores; at 0 the higher score wins with p =
    /// 1, and equal scores tie.
    ///
    /// # Errors
    /// When a pattern is not a regular expression, a weight is not finite, or the temperature is negative or not
    /// finite.
    pub fn new(temperature: f64, rules: &[RuleSettings]) -> Result<Self, PreferenceError> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(PreferenceError::Temperature(temperature));
        }
        let rules = rules.iter().enumerate().map(|(i, rule)| Rule::new(i, rule));
        Ok(Self {
            temperature,
            rules: rules.collect::<Result<_, _>>()?,
        })
    }

    /// Score of `completion`: the weighted sum of the rules' measurements.
    #[must_use]
    pub fn score(&self, prompt: &Prompt, completion: &Completion) -> f64 {
        let terms = self.rules.iter().map(|rule| rule.score(prompt, completion));
        terms.sum()
    }

    fn verdict(&self, comparison: &Comparison<'_>) -> ScoredVerdict {
        let [first, second] = [comparison.first, comparison.second]
            .map(|completion| self.score(comparison.prompt, completion));
        let difference = first - second;
        // Avoids 0/0 at temperature 0.
        let log_odds = if difference == 0.0 {
            0.0
        } else {
            difference / self.temperature
        };
        let verdict = match Probability::from_log_odds(log_odds) {
            Ok(p) => Verdict::Preference(p),
            Err(_) => Verdict::Abstained {
                reason: "the scores are too large to compare; lower the rules' weights".to_owned(),
            },
        };
        ScoredVerdict {
            verdict,
            scores: Some([first as f32, second as f32]),
        }
    }
}

impl Rule {
    fn new(rule: usize, settings: &RuleSettings) -> Result<Self, PreferenceError> {
        let compile = |pattern: &str| {
            Regex::new(pattern).map_err(|source| PreferenceError::Pattern { rule, source })
        };
        let (weight, measure) = match settings {
            RuleSettings::Regex { pattern, weight } => {
                (weight, Measure::Matches(compile(pattern)?))
            }
            RuleSettings::Keyword { words, weight } => (weight, Measure::words(words)),
            &RuleSettings::Length {
                min,
                max,
                ref weight,
            } => (weight, Measure::Length { min, max }),
            RuleSettings::JsonValid { weight } => (weight, Measure::JsonValid),
            RuleSettings::ExactMatch { weight } => (weight, Measure::ExactMatch),
            RuleSettings::Ended { weight } => (weight, Measure::Ended),
        };
        if !weight.is_finite() {
            let weight = *weight;
            return Err(PreferenceError::Weight { rule, weight });
        }
        Ok(Self {
            weight: *weight,
            measure,
        })
    }

    fn score(&self, prompt: &Prompt, completion: &Completion) -> f64 {
        self.weight * self.measure.of(prompt, completion)
    }
}

impl Measure {
    /// Patterns of the words, deduplicated regardless of case.
    fn words(words: &[String]) -> Self {
        let mut seen = std::collections::BTreeSet::new();
        let distinct = words
            .iter()
            .filter(|word| !word.is_empty() && seen.insert(word.to_lowercase()));
        Self::Words(distinct.map(|word| whole_word(word)).collect())
    }

    #[expect(clippy::cast_precision_loss, reason = "no completion has 2^53 words")]
    fn of(&self, prompt: &Prompt, completion: &Completion) -> f64 {
        let text = completion.text.as_str();
        match self {
            Self::Matches(pattern) => matches(pattern, text) as f64,
            Self::Words(words) => words.iter().filter(|word| word.is_match(text)).count() as f64,
            Self::Length { min, max } => {
                let words = text.split_whitespace().count();
                -((min.saturating_sub(words) + words.saturating_sub(*max)) as f64)
            }
            Self::JsonValid => indicator(is_json(text)),
            Self::ExactMatch => {
                let answer = prompt.answer.as_deref();
                indicator(answer.is_some_and(|answer| answer.trim() == text.trim()))
            }
            Self::Ended => indicator(completion.finish == Finish::EndOfText),
        }
    }
}

/// Number of matches of the pattern. A leading space may only separate the text from the prompt: returns the larger
/// count of those with and without it.
fn matches(pattern: &Regex, text: &str) -> usize {
    let count = |text| pattern.find_iter(text).count();
    let within = text.strip_prefix(' ').map_or(0, count);
    count(text).max(within)
}

/// Case-insensitive pattern of a whole word. An end that is not a letter, digit or underscore needs no word boundary.
fn whole_word(word: &str) -> Regex {
    let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let boundary = |c| if is_word(c) { r"\b" } else { "" };
    let (before, after) = (
        boundary(word.chars().next()),
        boundary(word.chars().next_back()),
    );
    Regex::new(&format!("(?i){before}{}{after}", regex::escape(word)))
        .expect("an escaped word is a small valid pattern")
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(text.trim()).is_ok()
}

fn indicator(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

impl Judge for Rules {
    fn name(&self) -> &str {
        "rule"
    }

    fn version(&self) -> JudgeVersion {
        JudgeVersion::default()
    }

    fn is_antisymmetric(&self) -> bool {
        true
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let scored = self.judge_scored(batch)?.into_iter();
        Ok(scored.map(|scored| scored.verdict).collect())
    }

    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<ScoredVerdict>, JudgeError> {
        Ok(batch
            .iter()
            .map(|comparison| self.verdict(comparison))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;
    use crate::judge::fake::{abstained, completion, preferred, prompt};

    fn regex(pattern: &str) -> RuleSettings {
        RuleSettings::Regex {
            pattern: pattern.into(),
            weight: 0.5,
        }
    }

    fn keyword(words: &[&str]) -> RuleSettings {
        RuleSettings::Keyword {
            words: words.iter().map(|&word| word.into()).collect(),
            weight: 2.0,
        }
    }

    const LENGTH: RuleSettings = RuleSettings::Length {
        min: 2,
        max: 3,
        weight: 0.25,
    };
    const JSON: RuleSettings = RuleSettings::JsonValid { weight: 3.0 };
    const EXACT: RuleSettings = RuleSettings::ExactMatch { weight: 1.5 };
    const ENDED: RuleSettings = RuleSettings::Ended { weight: -1.0 };

    #[test]
    fn rules_measure_texts() {
        let golden = Prompt {
            answer: Some(" forty two\n".into()),
            ..prompt()
        };
        for (rule, text, score) in [
            (regex("a+"), "aa b a", 1.0),
            (regex("(?i)x"), "none", 0.0),
            (regex("^a"), " a a", 0.5),
            (regex("^ a"), " a a", 0.5),
            (regex(" a"), " a a", 1.0),
            (regex("^a"), "  a a", 0.0),
            (keyword(&["happy"]), "Happy, happy unhappy", 2.0),
            (keyword(&["happy"]), "unhappy happyness", 0.0),
            (keyword(&["happy", "HAPPY", "sad"]), "sad happy", 4.0),
            (
                keyword(&["c++", "don't", "thank you"]),
                "Don't use C++. Thank you!",
                6.0,
            ),
            (keyword(&["a.b"]), "acb", 0.0),
            (keyword(&["über"]), "ÜBER alles", 2.0),
            (keyword(&[""]), "anything", 0.0),
            (LENGTH, "one", -0.25),
            (LENGTH, " one\ttwo ", 0.0),
            (keyword(&["happy"]), " happy", 2.0),
            (LENGTH, "one two three", 0.0),
            (LENGTH, "one two three four five", -0.5),
            (LENGTH, "", -0.5),
            (JSON, "\n {\"a\": [1, null]} ", 3.0),
            (JSON, "{\"a\": 1} and more", 0.0),
            (JSON, "", 0.0),
            (EXACT, "forty two ", 1.5),
            (EXACT, "forty  two", 0.0),
            (ENDED, "x", -1.0),
        ] {
            let rules = Rules::new(1.0, std::slice::from_ref(&rule)).unwrap();
            let actual = rules.score(&golden, &completion(text, &[]));
            assert_eq!(actual, score, "{rule:?} on {text:?}");
        }
    }

    #[test]
    fn rules_measure_the_answer_and_the_finish_reason() {
        let rules = Rules::new(1.0, &[EXACT, ENDED]).unwrap();
        let cut = Completion {
            finish: Finish::Length,
            ..completion("", &[])
        };
        assert_eq!(rules.score(&prompt(), &cut), 0.0, "no answer, not ended");
        assert_eq!(rules.score(&prompt(), &completion("", &[])), -1.0);
    }

    #[test]
    fn the_difference_of_scores_is_the_log_odds() {
        let sigmoid = |x: f64| preferred((1.0 / (1.0 + (-x).exp())) as f32);
        let cases = [
            (1.0, "a a a", "a", sigmoid(1.0)),
            (0.5, "a a a", "a", sigmoid(2.0)),
            (2.0, "a", "a a a", sigmoid(-0.5)),
            (1.0, "a b", "b a", preferred(0.5)),
            (0.0, "a a", "a", preferred(1.0)),
            (0.0, "a", "a a", preferred(0.0)),
            (0.0, "a", "a", preferred(0.5)),
        ];
        for (temperature, first, second, expected) in cases {
            let mut rules = Rules::new(temperature, &[regex("a")]).unwrap();
            let comparison = Comparison {
                prompt: &prompt(),
                first: &completion(first, &[]),
                second: &completion(second, &[]),
            };
            let actual = rules.judge(&[comparison]).unwrap();
            assert_eq!(actual, [expected], "{temperature} {first:?} {second:?}");
        }
    }

    #[test]
    fn infinite_scores_are_an_abstention() {
        let rule = RuleSettings::Regex {
            pattern: "a".into(),
            weight: f64::MAX,
        };
        let mut rules = Rules::new(1.0, &[rule]).unwrap();
        let huge = completion("a a", &[]);
        let comparison = Comparison {
            prompt: &prompt(),
            first: &huge,
            second: &huge,
        };
        let reason = "the scores are too large to compare; lower the rules' weights";
        assert_eq!(rules.judge(&[comparison]).unwrap(), [abstained(reason)]);
    }

    #[test]
    fn invalid_settings_are_reported_by_path() {
        let infinite = RuleSettings::Ended {
            weight: f64::INFINITY,
        };
        let cases: [(f64, Vec<RuleSettings>, &str); 5] = [
            (
                1.0,
                vec![ENDED, regex("(")],
                "failed to compile preference.judge.rules[1].pattern: ",
            ),
            (
                1.0,
                vec![infinite],
                "preference.judge.rules[0].weight is inf: ",
            ),
            (-1.0, vec![], "preference.judge.temperature is -1: "),
            (f64::NAN, vec![], "preference.judge.temperature is NaN: "),
            (
                f64::INFINITY,
                vec![],
                "preference.judge.temperature is inf: ",
            ),
        ];
        for (temperature, rules, start) in cases {
            let message = Rules::new(temperature, &rules).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
        let error = Rules::new(1.0, &[regex("(")]).unwrap_err();
        let cause = error
            .source()
            .expect("the regex crate says why")
            .to_string();
        assert!(cause.contains("unclosed group"), "{cause}");
    }
}
