//! Grammar check by bigrams: the set of symbols that may follow one another.
//!
//! Slot words are mapped to their category, other words to themselves; start and end markers are added. A bigram is
//! legal if it occurs in a generated good, missing or long summary, so that word salad is penalised.

use std::collections::HashSet;
use std::sync::LazyLock;

use crate::post::Post;
use crate::seed::{RngStream, generator};
use crate::target::{TargetKind, draw_body};
use crate::vocabulary::{Vocabulary, WordCategory};

/// Symbol of the bigram grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum GrammarSymbol {
    Start,
    End,
    Category(WordCategory),
    Word(u32),
}

pub(crate) type Bigram = (GrammarSymbol, GrammarSymbol);

/// Kinds of target whose grammar is well-formed.
const WELL_FORMED: [TargetKind; 3] = [TargetKind::Good, TargetKind::Missing, TargetKind::Long];
const DRAWS: u64 = 3000;
const SEED: u64 = 0;

static LEGAL: LazyLock<HashSet<Bigram>> = LazyLock::new(|| legal_bigrams(SEED, DRAWS));

/// Number of illegal bigrams of a body, start and end markers included.
pub(crate) fn illegal_bigrams(body: &[u32]) -> usize {
    bigrams(body)
        .filter(|bigram| !LEGAL.contains(bigram))
        .count()
}

/// Bigrams of `draws` generated well-formed summaries.
fn legal_bigrams(seed: u64, draws: u64) -> HashSet<Bigram> {
    let mut legal = HashSet::new();
    for draw in 0..draws {
        let seed = seed.wrapping_add(draw);
        let mut rng = generator(seed, RngStream::Grammar);
        let kind = WELL_FORMED[(draw % WELL_FORMED.len() as u64) as usize];
        legal.extend(bigrams(&draw_body(&Post::generate(seed), kind, &mut rng)));
    }
    legal
}

fn bigrams(body: &[u32]) -> impl Iterator<Item = Bigram> + '_ {
    let symbols = || body.iter().map(|id| symbol(*id));
    let from = std::iter::once(GrammarSymbol::Start).chain(symbols());
    let to = symbols().chain(std::iter::once(GrammarSymbol::End));
    from.zip(to)
}

fn symbol(id: u32) -> GrammarSymbol {
    match Vocabulary::shared().tag(id) {
        None | Some(WordCategory::Special | WordCategory::Function) => GrammarSymbol::Word(id),
        Some(tag) => GrammarSymbol::Category(tag),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::word;

    #[test]
    fn another_seed_yields_the_same_grammar() {
        let other = legal_bigrams(1_000_000, 20_000);
        assert_eq!(*LEGAL, other);
        assert_eq!(other.len(), 47);
    }

    #[test]
    fn every_illegal_bigram_is_counted() {
        for (text, illegal) in [
            (
                "ana lost the hat at the zoo and asks if they should sell it .",
                0,
            ),
            ("someone lost something .", 0),
            (
                "on monday ana lost the hat and feels sad and ben was there too and wonders \
                 whether to sell it .",
                0,
            ),
            // "too .": a long summary still ends with its question.
            ("ana lost the hat and ben was there too .", 1),
            // "it" must not be followed by the end marker.
            ("ana lost the hat and asks if they should sell it", 1),
            // "hat the".
            ("ana lost the hat the hat .", 1),
            // "it and".
            (
                "ana lost the hat and wonders whether to sell it and wonders whether to sell it .",
                1,
            ),
            // start-lol, lol-comma, comma-that, that-idiot, idiot-ana.
            ("lol , that idiot ana lost the hat .", 5),
        ] {
            let body: Vec<u32> = text.split(' ').map(word).collect();
            assert_eq!(illegal_bigrams(&body), illegal, "{text}");
        }
        assert_eq!(illegal_bigrams(&[]), 1);
        assert_eq!(illegal_bigrams(&[9999]), 2);
    }
}
