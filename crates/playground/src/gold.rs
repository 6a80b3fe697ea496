//! The gold preference: the true utility of a summary and the preference probability it implies.
//!
//! Utility is an integer number of hundredths, so summaries with the same facts have exactly equal utility and a golden
//! summary has exactly 1. Style has no utility; it enters the preference as a cyclic term of given strength.

use std::collections::HashMap;

use crate::facts::Facts;
use crate::grammar::illegal_bigrams;
use crate::style::{Style, sigmoid, style_of};
use crate::vocabulary::{EOS, Vocabulary, WordCategory};

/// Maximum length of a summary in tokens, `<eos>` included.
pub const SUMMARY_CAP: usize = 28;

/// Utility of each key fact stated, in hundredths.
const KEY_FACTS: [(WordCategory, i64); 5] = [
    (WordCategory::Person, 20),
    (WordCategory::Verb, 25),
    (WordCategory::Object, 25),
    (WordCategory::Place, 10),
    (WordCategory::Action, 20),
];
/// Categories whose tokens are either true or false of a post.
const FACTUAL: [WordCategory; 7] = [
    WordCategory::Person,
    WordCategory::Verb,
    WordCategory::Object,
    WordCategory::Place,
    WordCategory::Action,
    WordCategory::Weekday,
    WordCategory::Feeling,
];
const MAX_UNPENALISED_WORDS: usize = 15;
const MIN_UNPENALISED_WORDS: usize = 5;
const MIN_HUNDREDTHS: i64 = -200;
/// Utility difference that corresponds to one logit of the preference.
const TEMPERATURE: f64 = 0.2;

/// Utility of a summary, with its terms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Utility {
    /// The utility: 1 for a golden summary, never below −2.
    pub value: f64,
    /// All key facts stated, none wrong, and valid.
    pub good: bool,
    /// Ended with `<eos>`, without illegal bigrams.
    pub valid: bool,
    /// Style of the summary; has no utility.
    pub style: Style,
    /// Number of words of the body, without style prefix and `<eos>`.
    pub words: usize,
    /// Number of key facts (of 5) that the body does not state.
    pub missing: usize,
    /// Number of distinct factual words of the body that are not true of the post.
    pub wrong: usize,
    /// Number of factual words that repeat an earlier one.
    pub repeated: usize,
    /// Number of rude or rambling words.
    pub rude: usize,
    /// Number of bigrams that do not occur in well-formed summaries.
    pub illegal: usize,
}

/// The utility of a summary for the post with these facts.
///
/// `summary_ids` are the sampled ids, with or without `<eos>`; ids after an `<eos>` are ignored. `ended` tells whether
/// the summary ended with `<eos>` within [`SUMMARY_CAP`] tokens.
pub fn utility(facts: &Facts, summary_ids: &[u32], ended: bool) -> Utility {
    let style = style_of(summary_ids);
    let body = body(summary_ids, style);
    let (wrong, repeated) = wrong_and_repeated(facts, body);
    let stated = |tag: &WordCategory| facts.value(*tag).is_some_and(|id| body.contains(&id));
    let missing = KEY_FACTS.iter().filter(|(tag, _)| !stated(tag)).count();
    let rude = body
        .iter()
        .filter(|id| Vocabulary::shared().tag(**id) == Some(WordCategory::Rude))
        .count();
    let illegal = illegal_bigrams(body);
    let valid = ended && illegal == 0;
    let words = body.len();

    let gain: i64 = KEY_FACTS
        .iter()
        .filter(|(tag, _)| stated(tag))
        .map(|(_, hundredths)| hundredths)
        .sum();
    let loss = 30 * capped(wrong, 3)
        + 20 * capped(repeated, 3)
        + 3 * capped(words.saturating_sub(MAX_UNPENALISED_WORDS), 20)
        + 25 * capped(rude, 2)
        + 10 * capped(illegal, 5)
        + if ended { 0 } else { 50 }
        + 15 * capped(
            MIN_UNPENALISED_WORDS.saturating_sub(words),
            MIN_UNPENALISED_WORDS,
        );
    Utility {
        value: (gain - loss).max(MIN_HUNDREDTHS) as f64 / 100.0,
        good: missing == 0 && wrong == 0 && valid,
        valid,
        style,
        words,
        missing,
        wrong,
        repeated,
        rude,
        illegal,
    }
}

/// The gold preference p*(a ≻ b) = σ((u_a − u_b)/0.2 + cycle · S\[style_a\]\[style_b\]).
///
/// `cycle` = 0 gives a transitive preference; larger values add a cyclic preference among styles.
pub fn preference(
    utility_a: f64,
    style_a: Style,
    utility_b: f64,
    style_b: Style,
    cycle: f64,
) -> f64 {
    sigmoid((utility_a - utility_b) / TEMPERATURE + cycle * style_a.beats(style_b))
}

fn capped(count: usize, cap: usize) -> i64 {
    count.min(cap) as i64
}

/// The ids between the style prefix and the first `<eos>`.
fn body(summary_ids: &[u32], style: Style) -> &[u32] {
    let words = &summary_ids[style.prefix().len()..];
    let end = words
        .iter()
        .position(|id| *id == EOS)
        .unwrap_or(words.len());
    &words[..end]
}

/// Numbers of distinct wrong factual words and of repeated factual words.
fn wrong_and_repeated(facts: &Facts, body: &[u32]) -> (usize, usize) {
    let mut counts: HashMap<u32, usize> = HashMap::new();
    let mut wrong = 0;
    for id in body {
        let Some(tag) = Vocabulary::shared()
            .tag(*id)
            .filter(|tag| FACTUAL.contains(tag))
        else {
            continue;
        };
        let count = counts.entry(*id).or_default();
        *count += 1;
        if *count == 1 && facts.value(tag) != Some(*id) {
            wrong += 1;
        }
    }
    (wrong, counts.values().map(|count| count - 1).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::post::Post;
    use crate::template::word;

    fn ids(text: &str) -> Vec<u32> {
        text.split_whitespace().map(word).collect()
    }

    fn facts() -> Facts {
        Facts::parse(&ids(
            "<bos> my sister ana went to the park on monday . there they lost the wallet . \
             the zoo was closed . should they sell it ? <sep>",
        ))
        .unwrap()
    }

    #[test]
    fn golden_summaries_have_utility_one_in_all_four_forms() {
        for seed in 0..1500 {
            let post = Post::generate(seed);
            for form in 0..16 {
                let utility = utility(post.facts(), &post.golden(form), true);
                assert_eq!(utility.value, 1.0, "{}", post.text());
                assert!(utility.good && utility.valid && (14..=15).contains(&utility.words));
            }
        }
    }

    /// Summaries of the post of [`facts`]: text, whether it ended, expected utility, and the penalties.
    #[rustfmt::skip]
    const WORKED_EXAMPLES: [(&str, bool, f64, &str); 16] = [
        ("ana lost the wallet at the park and asks if they should sell it . <eos>", true, 1.00, "golden"),
        ("ana lost the wallet at the park and asks if they should sell it .", false, 0.50, "no <eos> .50"),
        ("summary : at the park ana lost the wallet and wonders whether to sell it .", true, 1.00, "style has no utility"),
        ("ana lost the wallet at the park and asks if they should sell it . <eos> lol", true, 1.00, "ids after <eos> are ignored"),
        ("ana lost the hat at the park and asks if they should sell it .", true, 0.45, "missing .25, wrong .30"),
        ("ana lost the wallet at the zoo and asks if they should sell it .", true, 0.60, "missing .10, wrong .30"),
        ("ana lost something at the park and asks if they should sell it .", true, 0.75, "missing .25"),
        ("someone lost the wallet at the park and asks if they should sell it .", true, 0.80, "missing .20"),
        ("on monday ana lost the wallet at the park and asks if they should sell it .", true, 0.94, "2 over .06"),
        ("ana lost the wallet at the park and feels sad and asks if they should sell it .", true, 0.61,
         "a feeling not in the post .30, 3 over .09"),
        ("lol , that idiot ana lost the wallet at the park and asks if they should sell it .", true, -0.12,
         "2 rude .50, 4 over .12, 5 illegal .50"),
        ("ana lost the wallet the wallet at the park and asks if they should sell it .", true, 0.64,
         "1 repeated .20, 2 over .06, 1 illegal .10"),
        ("", true, -0.85, "5 short .75, 1 illegal .10"),
        ("", false, -1.35, "5 short .75, 1 illegal .10, no <eos> .50"),
        ("wallet", true, -0.55, "stated .25, 4 short .60, 2 illegal .20"),
        ("hat hat hat hat hat zoo zoo ben ben ben ugh ugh ugh ugh ugh ugh lol lol lol lol lol lol lol lol lol", false,
         -2.00, "wrong .90, repeated .60, 10 over .30, rude .50, illegal .50, no <eos> .50: clamped at -2"),
    ];

    #[test]
    fn worked_examples() {
        for (text, ended, expected, why) in WORKED_EXAMPLES {
            let actual = utility(&facts(), &ids(text), ended).value;
            assert_eq!(actual, expected, "{text}: {why}");
        }
    }

    #[test]
    fn each_term_is_counted() {
        let text = "oops ! ben ben lost the hat at the park , so stupid . <eos>";
        let actual = utility(&facts(), &ids(text), true);
        assert_eq!(actual.style, Style::Playful);
        assert_eq!(
            (actual.words, actual.missing, actual.wrong, actual.repeated),
            (12, 3, 2, 1)
        );
        // ben-ben, park-comma, comma-so, so-stupid, stupid-stop.
        assert_eq!((actual.rude, actual.illegal), (1, 5));
        assert!(!actual.good && !actual.valid);
        assert!(!utility(&facts(), &ids("ana lost the wallet ."), false).valid);
    }

    #[test]
    fn preference_is_antisymmetric_and_has_the_documented_slope() {
        for (a, b, cycle) in [
            (1.0, 0.75, 0.0),
            (0.3, 0.8, 1.0),
            (-2.0, 1.0, 2.0),
            (0.5, 0.5, 2.0),
        ] {
            for (s, t) in Style::ALL
                .into_iter()
                .flat_map(|s| Style::ALL.map(|t| (s, t)))
            {
                let sum = preference(a, s, b, t, cycle) + preference(b, t, a, s, cycle);
                assert!((sum - 1.0).abs() < 1e-15, "{a} {s:?} {b} {t:?}: {sum}");
            }
        }
        for (difference, cycle, style, expected) in [
            (0.20, 0.0, Style::Formal, 0.731_058_578_630_004_9),
            (0.50, 0.0, Style::Formal, 0.924_141_819_978_756_6),
            (0.00, 1.0, Style::Formal, 0.731_058_578_630_004_9),
            (0.20, 1.0, Style::Playful, 0.5),
        ] {
            let actual = preference(difference, style, 0.0, Style::Plain, cycle);
            assert!(
                (actual - expected).abs() < 1e-12,
                "{difference} {cycle}: {actual}"
            );
        }
    }
}
