//! The gold preference: what the people of this world truly like.
//!
//! Utility is a sum of hundredths, so equal summaries of facts have exactly equal utility and a golden summary has
//! exactly 1. Styles weigh nothing in utility; they enter the preference through a cycle of given strength.

use std::collections::HashMap;

use crate::facts::Facts;
use crate::grammar::illegal_bigrams;
use crate::style::{Style, sigmoid, style_of};
use crate::vocabulary::{EOS, Tag, Vocabulary};

/// The most tokens a summary may have, `<eos>` included.
pub const SUMMARY_CAP: usize = 28;

/// Hundredths of utility for each key fact told.
const KEY_FACTS: [(Tag, i64); 5] = [
    (Tag::Person, 20),
    (Tag::Verb, 25),
    (Tag::Object, 25),
    (Tag::Place, 10),
    (Tag::Action, 20),
];
/// The categories in which a word is true or false of a post.
const FACTUAL: [Tag; 7] = [
    Tag::Person,
    Tag::Verb,
    Tag::Object,
    Tag::Place,
    Tag::Action,
    Tag::Weekday,
    Tag::Feeling,
];
const LONGEST_FREE: usize = 15;
const SHORTEST_FREE: usize = 5;
const LEAST: i64 = -200;
/// The difference of utilities that moves the preference by one logit.
const TEMPERATURE: f64 = 0.2;

/// What a summary is worth, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Utility {
    /// The utility: 1 for a golden summary, never below −2.
    pub value: f64,
    /// All key facts told, nothing false, and valid.
    pub good: bool,
    /// Ended, and no illegal bigram.
    pub valid: bool,
    /// The summary's style, which carries no utility.
    pub style: Style,
    /// Words of the body: no style prefix, no `<eos>`.
    pub words: usize,
    /// Key facts (of 5) that the body does not tell.
    pub missing: usize,
    /// Different category words of the body that are not the post's own.
    pub wrong: usize,
    /// Category words beyond the first telling of each.
    pub repeated: usize,
    /// Rude or rambling words.
    pub rude: usize,
    /// Bigrams that no well-formed summary has.
    pub illegal: usize,
}

/// The utility of a summary for the post with these facts.
///
/// `summary_ids` are the sampled ids, with or without `<eos>`; whatever follows an `<eos>` is not read. `ended`
/// says whether the summary closed with `<eos>` before the cap of [`SUMMARY_CAP`] tokens.
pub fn utility(facts: &Facts, summary_ids: &[u32], ended: bool) -> Utility {
    let style = style_of(summary_ids);
    let body = body(summary_ids, style);
    let (wrong, repeated) = untrue_and_repeated(facts, body);
    let told = |tag: &Tag| facts.value(*tag).is_some_and(|id| body.contains(&id));
    let missing = KEY_FACTS.iter().filter(|(tag, _)| !told(tag)).count();
    let rude = body
        .iter()
        .filter(|id| Vocabulary::shared().tag(**id) == Some(Tag::Rude))
        .count();
    let illegal = illegal_bigrams(body);
    let valid = ended && illegal == 0;
    let words = body.len();

    let gain: i64 = KEY_FACTS
        .iter()
        .filter(|(tag, _)| told(tag))
        .map(|(_, hundredths)| hundredths)
        .sum();
    let loss = 30 * capped(wrong, 3)
        + 20 * capped(repeated, 3)
        + 3 * capped(words.saturating_sub(LONGEST_FREE), 20)
        + 25 * capped(rude, 2)
        + 10 * capped(illegal, 5)
        + if ended { 0 } else { 50 }
        + 15 * capped(SHORTEST_FREE.saturating_sub(words), SHORTEST_FREE);
    Utility {
        value: (gain - loss).max(LEAST) as f64 / 100.0,
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
/// `cycle` 0 is transitive; 1 and 2 make the styles beat one another in a circle.
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

/// The words between the style prefix and the first `<eos>`.
fn body(summary_ids: &[u32], style: Style) -> &[u32] {
    let words = &summary_ids[style.prefix().len()..];
    let end = words
        .iter()
        .position(|id| *id == EOS)
        .unwrap_or(words.len());
    &words[..end]
}

/// How many different category words are not the post's own, and how many category words are said again.
fn untrue_and_repeated(facts: &Facts, body: &[u32]) -> (usize, usize) {
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
        Post::parse(&ids(
            "<bos> my sister ana went to the park on monday . there they lost the wallet . \
             the zoo was closed . should they sell it ? <sep>",
        ))
        .unwrap()
    }

    #[test]
    fn golden_is_worth_exactly_one_in_all_four_forms() {
        for seed in 0..1500 {
            let post = Post::generate(seed);
            for form in 0..16 {
                let utility = utility(post.facts(), &post.golden(form), true);
                assert_eq!(utility.value, 1.0, "{}", post.text());
                assert!(utility.good && utility.valid && (14..=15).contains(&utility.words));
            }
        }
    }

    /// Summaries of the post of [`facts`]: text, whether it ended, its utility, and the sum by hand.
    #[rustfmt::skip]
    const WORKED_EXAMPLES: [(&str, bool, f64, &str); 16] = [
        ("ana lost the wallet at the park and asks if they should sell it . <eos>", true, 1.00, "golden"),
        ("ana lost the wallet at the park and asks if they should sell it .", false, 0.50, "no <eos> .50"),
        ("summary : at the park ana lost the wallet and wonders whether to sell it .", true, 1.00, "style is free"),
        ("ana lost the wallet at the park and asks if they should sell it . <eos> lol", true, 1.00, "<eos> ends it"),
        ("ana lost the hat at the park and asks if they should sell it .", true, 0.45, "lost .25, untrue .30"),
        ("ana lost the wallet at the zoo and asks if they should sell it .", true, 0.60, "lost .10, untrue .30"),
        ("ana lost something at the park and asks if they should sell it .", true, 0.75, "lost .25"),
        ("someone lost the wallet at the park and asks if they should sell it .", true, 0.80, "lost .20"),
        ("on monday ana lost the wallet at the park and asks if they should sell it .", true, 0.94, "2 over .06"),
        ("ana lost the wallet at the park and feels sad and asks if they should sell it .", true, 0.61,
         "a feeling the post does not tell .30, 3 over .09"),
        ("lol , that idiot ana lost the wallet at the park and asks if they should sell it .", true, -0.12,
         "2 rude .50, 4 over .12, 5 illegal .50"),
        ("ana lost the wallet the wallet at the park and asks if they should sell it .", true, 0.64,
         "1 repeated .20, 2 over .06, 1 illegal .10"),
        ("", true, -0.85, "5 short .75, 1 illegal .10"),
        ("", false, -1.35, "5 short .75, 1 illegal .10, no <eos> .50"),
        ("wallet", true, -0.55, "told .25, 4 short .60, 2 illegal .20"),
        ("hat hat hat hat hat zoo zoo ben ben ben ugh ugh ugh ugh ugh ugh lol lol lol lol lol lol lol lol lol", false,
         -2.00, "untrue .90, repeated .60, 10 over .30, rude .50, illegal .50, no <eos> .50: held at -2"),
    ];

    #[test]
    fn worked_examples() {
        for (text, ended, expected, why) in WORKED_EXAMPLES {
            let seen = utility(&facts(), &ids(text), ended).value;
            assert_eq!(seen, expected, "{text}: {why}");
        }
    }

    #[test]
    fn the_parts_are_counted() {
        let text = "oops ! ben ben lost the hat at the park , so stupid . <eos>";
        let seen = utility(&facts(), &ids(text), true);
        assert_eq!(seen.style, Style::Playful);
        assert_eq!(
            (seen.words, seen.missing, seen.wrong, seen.repeated),
            (12, 3, 2, 1)
        );
        // ben-ben, park-comma, comma-so, so-stupid, stupid-stop.
        assert_eq!((seen.rude, seen.illegal), (1, 5));
        assert!(!seen.good && !seen.valid);
        assert!(!utility(&facts(), &ids("ana lost the wallet ."), false).valid);
    }

    #[test]
    fn preference_is_antisymmetric_and_sloped() {
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
            let seen = preference(difference, style, 0.0, Style::Plain, cycle);
            assert!(
                (seen - expected).abs() < 1e-12,
                "{difference} {cycle}: {seen}"
            );
        }
    }
}
