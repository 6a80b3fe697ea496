//! What a chat model meant: the probability that it prefers the first response, from the
//! log-probabilities of its verdict where they are given, else from the verdict's words.

use serde::Deserialize;
use settings::ChatSettings;

use crate::Verdict;

/// The longest end of an answer that is told when there is no verdict in it.
const TOLD: usize = 80;

/// What stands for the first response, for the second, and for neither.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VerdictWords {
    words: Vec<String>,
    /// How many bytes the words have in common at their beginning: the next tells them apart.
    common: usize,
}

/// One token of an answer and what might have stood in its place.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ScoredToken {
    /// Its text.
    pub token: String,
    /// Its natural log-probability.
    pub logprob: f64,
    /// The likeliest tokens in its place.
    #[serde(default)]
    pub top_logprobs: Vec<Alternative>,
}

/// What might have stood in a token's place.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Alternative {
    /// Its text.
    pub token: String,
    /// Its natural log-probability.
    pub logprob: f64,
}

impl VerdictWords {
    pub(super) fn new(settings: &ChatSettings) -> Self {
        let words = [
            &settings.first_verdict,
            &settings.second_verdict,
            &settings.tie_verdict,
        ];
        let words: Vec<_> = words
            .into_iter()
            .filter(|word| !word.is_empty())
            .cloned()
            .collect();
        let common = common_beginning(&words);
        Self { words, common }
    }

    /// The verdict in `answer`; `tokens` are the answer's, where they were given.
    pub(super) fn read(&self, answer: &str, tokens: &[ScoredToken]) -> Verdict {
        if let Some(p) = self.weigh(tokens) {
            return Verdict::from_probability(p);
        }
        match self.last(answer) {
            Some((_, 0)) => Verdict::from_probability(1.0),
            Some((_, 1)) => Verdict::from_probability(0.0),
            Some(_) => Verdict::from_probability(0.5),
            None => Verdict::Abstained {
                reason: format!("no verdict in {:?}", end_of(answer)),
            },
        }
    }

    /// Where the last verdict begins, and which it is; of several at one place the longest.
    fn last(&self, answer: &str) -> Option<(usize, usize)> {
        let places = self.words.iter().enumerate();
        let found = places.filter_map(|(which, word)| Some((answer.rfind(word)?, which)));
        found.max_by_key(|&(place, which)| (place, self.words[which].len()))
    }

    /// p = (P(first) + ½·P(tie)) / (P(first) + P(second) + P(tie)) of the token that tells the last
    /// verdict from the others.
    fn weigh(&self, tokens: &[ScoredToken]) -> Option<f64> {
        let text: String = tokens.iter().map(|token| token.token.as_str()).collect();
        let (place, _) = self.last(&text)?;
        let telling = place + self.common;
        let mut start = 0;
        let token = tokens.iter().find(|token| {
            start += token.token.len();
            start > telling
        })?;
        let start = start - token.token.len();
        // From the token's beginning: what precedes a verdict in it, or what of the verdict is left.
        let (before, skipped) = if start < place {
            (&text[start..place], 0)
        } else {
            ("", start - place)
        };
        let expected: Vec<_> = self
            .words
            .iter()
            .map(|word| Some(format!("{before}{}", word.get(skipped..)?)))
            .collect::<Option<_>>()?;
        let mass = self.mass(token, &expected, telling - start);
        let total: f64 = mass.iter().sum();
        let tie = mass.get(2).copied().unwrap_or(0.0);
        (total > 0.0).then(|| (mass[0] + tie / 2.0) / total)
    }

    /// The probability of each verdict at `token`, where verdicts read `expected` from its beginning
    /// and `telling` is the byte that tells them apart.
    fn mass(&self, token: &ScoredToken, expected: &[String], telling: usize) -> Vec<f64> {
        let mut mass = vec![0.0; self.words.len()];
        let is_told = token.top_logprobs.iter().any(|a| a.token == token.token);
        let own = (!is_told).then_some((&token.token, token.logprob));
        let all = token.top_logprobs.iter().map(|a| (&a.token, a.logprob));
        for (text, logprob) in all.chain(own) {
            let fits = |word: &String| word.starts_with(text) || text.starts_with(word);
            let mut fitting = (0..expected.len()).filter(|&which| fits(&expected[which]));
            // A token that ends before the verdicts differ fits them all, and tells nothing.
            if let (Some(which), None, true) =
                (fitting.next(), fitting.next(), text.len() > telling)
                && logprob.is_finite()
            {
                mass[which] += logprob.exp();
            }
        }
        mass
    }
}

fn common_beginning(words: &[String]) -> usize {
    let Some((first, others)) = words.split_first() else {
        return 0;
    };
    let places = first.char_indices().map(|(place, _)| place);
    let is_common = |end: &usize| {
        let beginning = &first[..*end];
        others.iter().all(|word| word.starts_with(beginning))
    };
    places.take_while(is_common).last().unwrap_or(0)
}

fn end_of(answer: &str) -> &str {
    let answer = answer.trim();
    match answer.char_indices().rev().nth(TOLD - 1) {
        Some((start, _)) => &answer[start..],
        None => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{abstained, preferred};

    fn words(first: &str, second: &str, tie: &str) -> VerdictWords {
        VerdictWords::new(&ChatSettings {
            first_verdict: first.into(),
            second_verdict: second.into(),
            tie_verdict: tie.into(),
            ..crate::judge::chat::tests::settings()
        })
    }

    fn brackets() -> VerdictWords {
        words("[[A]]", "[[B]]", "[[C]]")
    }

    fn token(token: &str, alternatives: &[(&str, f64)]) -> ScoredToken {
        let alternative = |&(token, p): &(&str, f64)| Alternative {
            token: token.to_owned(),
            logprob: p.ln(),
        };
        ScoredToken {
            token: token.into(),
            logprob: alternatives.first().map_or(0.0, |(_, p)| p.ln()),
            top_logprobs: alternatives.iter().map(alternative).collect(),
        }
    }

    #[test]
    fn without_log_probabilities_the_last_verdict_counts() {
        let long = format!("{} nothing", "ä".repeat(100));
        let end = format!("no verdict in {:?}", format!("{} nothing", "ä".repeat(72)));
        for (answer, expected) in [
            ("[[A]]", preferred(1.0)),
            ("B is longer. My final verdict is: [[B]].", preferred(0.0)),
            ("[[C]]\n", preferred(0.5)),
            ("I would say [[A]], but no: [[B]]", preferred(0.0)),
            ("Either [[A]] or [[B]]: [[A]]", preferred(1.0)),
            (
                "[A] is better",
                abstained("no verdict in \"[A] is better\""),
            ),
            ("", abstained("no verdict in \"\"")),
            (&long, abstained(&end)),
        ] {
            assert_eq!(brackets().read(answer, &[]), expected, "{answer}");
        }
        let no_ties = words("1", "2", "");
        assert_eq!(no_ties.read("2", &[]), preferred(0.0));
        let nested = words("good", "good not", "");
        assert_eq!(nested.read("good not", &[]), preferred(0.0), "the longest");
    }

    #[test]
    fn the_token_that_tells_the_verdicts_apart_gives_the_probability() {
        let ab = [("A", 0.75), ("B", 0.25)];
        let abc = [("A", 0.5), ("B", 0.125), ("C", 0.25), ("The", 0.125)];
        let cases: [(&str, Vec<ScoredToken>, f32); 6] = [
            (
                "alone",
                vec![token("[[", &[]), token("A", &ab), token("]]", &[])],
                0.75,
            ),
            (
                "with a tie",
                vec![token("[[", &[]), token("A", &abc), token("]]", &[])],
                5.0 / 7.0,
            ),
            (
                "one token",
                vec![token("[[B]]", &[("[[B]]", 0.5), ("[[A]]", 0.25)])],
                1.0 / 3.0,
            ),
            (
                "with what precedes",
                vec![
                    token(": [[A", &[(": [[A", 0.5), (": [[B", 0.5)]),
                    token("]]", &[]),
                ],
                0.5,
            ),
            (
                "without alternatives",
                vec![token("[[", &[]), token("B", &[]), token("]]", &[])],
                0.0,
            ),
            (
                "the last one",
                vec![
                    token("[[", &[]),
                    token("A", &[("A", 1.0)]),
                    token("]]", &[]),
                    token(" no ", &[]),
                    token("[[", &[]),
                    token("B", &[("B", 0.75), ("A", 0.25)]),
                    token("]]", &[]),
                ],
                0.25,
            ),
        ];
        for (name, tokens, expected) in cases {
            let text: String = tokens.iter().map(|t| t.token.as_str()).collect();
            let Verdict::Preference(p) = brackets().read(&text, &tokens) else {
                panic!("{name}");
            };
            assert!((p.get() - expected).abs() < 1e-6, "{name}: {}", p.get());
        }
    }

    #[test]
    fn log_probabilities_that_tell_nothing_leave_it_to_the_words() {
        let odd = |logprob| ScoredToken {
            logprob,
            ..token("[[B]]", &[])
        };
        for tokens in [
            vec![odd(f64::NAN)],
            vec![odd(f64::NEG_INFINITY)],
            vec![token("nothing", &[])],
        ] {
            assert_eq!(brackets().read("[[B]]", &tokens), preferred(0.0));
        }
    }

    #[test]
    fn verdicts_differ_where_their_common_beginning_ends() {
        for (first, second, tie, common) in [
            ("[[A]]", "[[B]]", "[[C]]", 2),
            ("A", "B", "", 0),
            ("good", "good not", "", 3),
            ("äb", "äc", "", 2),
            ("ä", "ö", "", 0),
        ] {
            assert_eq!(words(first, second, tie).common, common, "{first} {second}");
        }
    }
}
