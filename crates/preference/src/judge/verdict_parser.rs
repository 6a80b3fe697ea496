//! Parsing of a chat model's reply: the probability that it prefers the first response, from the log-probabilities of
//! its verdict where they are given, else from the text. Reasoning in `<think>` tags is not part of the answer.

use settings::ChatSettings;

use crate::judge::Verdict;

/// Longest excerpt of a reply without a verdict, in characters.
const MAX_EXCERPT: usize = 80;
/// Largest log-probability: 0, and what rounding adds to it. A larger one is not a log-probability.
const MAX_LOGPROB: f64 = 0.01;
/// Begin and end of the reasoning that some models print before their answer.
const REASONING: [&str; 2] = ["<think>", "</think>"];

/// Verdict strings: for the first response, for the second, and for a tie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VerdictParser {
    markers: Vec<String>,
    /// Length of their common prefix in bytes: the next byte distinguishes them.
    common_prefix: usize,
}

/// A generated token with the most likely tokens at its position.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredToken {
    /// Text of the token.
    pub token: String,
    /// Log-probability, natural.
    pub logprob: f64,
    /// Most likely tokens at this position.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A candidate token at a position.
#[derive(Debug, Clone, PartialEq)]
pub struct TopLogprob {
    /// Text of the token.
    pub token: String,
    /// Log-probability, natural.
    pub logprob: f64,
}

impl VerdictParser {
    pub(super) fn new(settings: &ChatSettings) -> Self {
        let markers = [
            &settings.first_verdict,
            &settings.second_verdict,
            &settings.tie_verdict,
        ];
        let markers: Vec<_> = markers
            .into_iter()
            .filter(|marker| !marker.is_empty())
            .cloned()
            .collect();
        Self {
            common_prefix: common_prefix(&markers),
            markers,
        }
    }

    /// Verdict in `reply`; `tokens` are its tokens, or empty without log-probabilities.
    pub(super) fn parse(&self, reply: &str, tokens: &[ScoredToken]) -> Verdict {
        let Some((_, which)) = self.last_verdict(answer(reply)) else {
            return Verdict::Abstained {
                reason: format!("no verdict in {:?}", excerpt(reply)),
            };
        };
        let by_text = [1.0, 0.0, 0.5][which];
        Verdict::from_probability(self.probability(tokens).unwrap_or(by_text))
    }

    /// Start and index of the last verdict; the longest of several at one position.
    fn last_verdict(&self, reply: &str) -> Option<(usize, usize)> {
        let markers = self.markers.iter().enumerate();
        let found = markers.filter_map(|(which, marker)| Some((reply.rfind(marker)?, which)));
        found.max_by_key(|&(start, which)| (start, self.markers[which].len()))
    }

    /// p = (P(first) + ½·P(tie)) / (P(first) + P(second) + P(tie)) at the token that distinguishes the last verdict
    /// from the others.
    fn probability(&self, tokens: &[ScoredToken]) -> Option<f64> {
        let text: String = tokens.iter().map(|token| token.token.as_str()).collect();
        let (verdict_start, _) = self.last_verdict(&text)?;
        let distinguishing = verdict_start + self.common_prefix;
        let mut start = 0;
        let token = tokens.iter().find(|token| {
            start += token.token.len();
            start > distinguishing
        })?;
        let start = start - token.token.len();
        // The token may contain text before the verdict, or start within it.
        let (before, skipped) = if start < verdict_start {
            (&text[start..verdict_start], 0)
        } else {
            ("", start - verdict_start)
        };
        let expected: Vec<_> = self
            .markers
            .iter()
            .map(|marker| Some(format!("{before}{}", marker.get(skipped..)?)))
            .collect::<Option<_>>()?;
        let mass = if skipped == 0 && before.trim().is_empty() {
            // White space may precede a verdict: "A" and " A" are two tokens for one.
            self.mass(token, &self.markers, self.common_prefix, str::trim_start)
        } else {
            self.mass(token, &expected, distinguishing - start, |text| text)
        };
        let total: f64 = mass.iter().sum();
        let tie = mass.get(2).copied().unwrap_or(0.0);
        (total > 0.0).then(|| (mass[0] + tie / 2.0) / total)
    }

    /// Probability of each verdict at `token`, whose candidates are read through `normalized`. `expected` holds the
    /// text of each verdict from the token's start on, and `distinguishing` the index of the first byte in which they
    /// differ.
    fn mass(
        &self,
        token: &ScoredToken,
        expected: &[String],
        distinguishing: usize,
        normalized: impl Fn(&str) -> &str,
    ) -> Vec<f64> {
        let mut mass = vec![0.0; self.markers.len()];
        let is_listed = token.top_logprobs.iter().any(|a| a.token == token.token);
        let own = (!is_listed).then_some((&token.token, token.logprob));
        let all = token.top_logprobs.iter().map(|a| (&a.token, a.logprob));
        for (text, logprob) in all.chain(own) {
            let text = normalized(text);
            let matches = |marker: &String| marker.starts_with(text) || text.starts_with(marker);
            let mut matching = (0..expected.len()).filter(|&which| matches(&expected[which]));
            // A token that ends before the verdicts differ matches all of them.
            if let (Some(which), None, true) = (
                matching.next(),
                matching.next(),
                text.len() > distinguishing,
            ) && logprob <= MAX_LOGPROB
            {
                mass[which] += logprob.exp().min(1.0);
            }
        }
        mass
    }
}

/// Length in bytes of the longest proper prefix of the first marker that all markers share.
fn common_prefix(markers: &[String]) -> usize {
    let Some((first, others)) = markers.split_first() else {
        return 0;
    };
    let lengths = first.char_indices().map(|(start, _)| start);
    let is_common = |length: &usize| {
        let prefix = &first[..*length];
        others.iter().all(|marker| marker.starts_with(prefix))
    };
    lengths.take_while(is_common).last().unwrap_or(0)
}

/// The reply without the reasoning before it; empty if the reasoning does not end.
pub(super) fn answer(reply: &str) -> &str {
    let [begin, end] = REASONING;
    match reply.rsplit_once(end) {
        Some((_, answer)) => answer,
        None if reply.trim_start().starts_with(begin) => "",
        None => reply,
    }
}

/// End of a reply, for an abstention.
pub(super) fn excerpt(reply: &str) -> &str {
    let reply = reply.trim();
    match reply.char_indices().rev().nth(MAX_EXCERPT - 1) {
        Some((start, _)) => &reply[start..],
        None => reply,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{abstained, preferred};

    fn parser(first: &str, second: &str, tie: &str) -> VerdictParser {
        VerdictParser::new(&ChatSettings {
            first_verdict: first.into(),
            second_verdict: second.into(),
            tie_verdict: tie.into(),
            ..crate::judge::chat::tests::settings()
        })
    }

    fn brackets() -> VerdictParser {
        parser("[[A]]", "[[B]]", "[[C]]")
    }

    fn token(token: &str, candidates: &[(&str, f64)]) -> ScoredToken {
        let candidate = |&(token, p): &(&str, f64)| TopLogprob {
            token: token.to_owned(),
            logprob: p.ln(),
        };
        ScoredToken {
            token: token.into(),
            logprob: candidates.first().map_or(0.0, |(_, p)| p.ln()),
            top_logprobs: candidates.iter().map(candidate).collect(),
        }
    }

    #[test]
    fn without_logprobs_the_last_verdict_counts() {
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
            ("<think>[[A]]? No, [[B]].</think>\n\n[[A]]", preferred(1.0)),
            ("[[B]]?</think>[[A]]", preferred(1.0)),
            (
                "<think>Perhaps [[A]]",
                abstained("no verdict in \"<think>Perhaps [[A]]\""),
            ),
            ("", abstained("no verdict in \"\"")),
            (&long, abstained(&end)),
        ] {
            assert_eq!(brackets().parse(answer, &[]), expected, "{answer}");
        }
        let no_ties = parser("1", "2", "");
        assert_eq!(no_ties.parse("2", &[]), preferred(0.0));
        let nested = parser("good", "good not", "");
        assert_eq!(nested.parse("good not", &[]), preferred(0.0), "the longest");
    }

    #[test]
    fn the_distinguishing_token_gives_the_probability() {
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
                "with preceding text",
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
                "the last of several",
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
            let Verdict::Preference(p) = brackets().parse(&text, &tokens) else {
                panic!("{name}");
            };
            assert!((p.get() - expected).abs() < 1e-6, "{name}: {}", p.get());
        }
    }

    #[test]
    fn uninformative_logprobs_fall_back_to_the_text() {
        let odd = |logprob| ScoredToken {
            logprob,
            ..token("[[B]]", &[])
        };
        let positive = [("[[B]]", 1f64.exp()), ("[[A]]", 3f64.exp())];
        for tokens in [
            vec![odd(f64::NAN)],
            vec![odd(f64::NEG_INFINITY)],
            vec![odd(f64::INFINITY)],
            vec![token("[[B]]", &positive)],
            vec![token("nothing", &[])],
        ] {
            assert_eq!(brackets().parse("[[B]]", &tokens), preferred(0.0));
        }
    }

    #[test]
    fn white_space_before_a_verdict_does_not_part_its_probability() {
        let letters = parser("A", "B", "");
        let spaced = [
            ("A", 0.25),
            (" A", 0.25),
            ("B", 0.125),
            ("\nB", 0.125),
            ("b", 0.25),
        ];
        for own in ["A", " A"] {
            let tokens = [token(own, &spaced)];
            let Verdict::Preference(p) = letters.parse(own, &tokens) else {
                panic!("{own:?}");
            };
            assert!((p.get() - 2.0 / 3.0).abs() < 1e-6, "{own:?}: {}", p.get());
        }
        // Within brackets a space is another text.
        let tokens = [token("[[", &[]), token("A", &spaced), token("]]", &[])];
        let Verdict::Preference(p) = brackets().parse("[[A]]", &tokens) else {
            panic!("in brackets");
        };
        assert!((p.get() - 2.0 / 3.0).abs() < 1e-6, "{}", p.get());
    }

    #[test]
    fn the_common_prefix_of_verdicts_ends_where_they_differ() {
        for (first, second, tie, common) in [
            ("[[A]]", "[[B]]", "[[C]]", 2),
            ("A", "B", "", 0),
            ("good", "good not", "", 3),
            ("äb", "äc", "", 2),
            ("ä", "ö", "", 0),
        ] {
            assert_eq!(
                parser(first, second, tie).common_prefix,
                common,
                "{first} {second}"
            );
        }
    }
}
