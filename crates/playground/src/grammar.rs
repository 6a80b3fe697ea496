//! A grammar check that fits on a page: which kinds of words may follow one another.
//!
//! Words that fill a slot are taken by category, other words as themselves, with a start and an end around. A
//! bigram is legal if some good, missing or long summary has it; that defeats word salad.

use std::collections::HashSet;
use std::sync::LazyLock;

use crate::post::Post;
use crate::seed::{Purpose, generator};
use crate::target::{Kind, draw_body};
use crate::vocabulary::{Tag, Vocabulary};

/// What the grammar sees of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Symbol {
    Start,
    End,
    Category(Tag),
    Word(u32),
}

pub(crate) type Bigram = (Symbol, Symbol);

/// Kinds of target whose form is beyond reproach.
const WELL_FORMED: [Kind; 3] = [Kind::Good, Kind::Missing, Kind::Long];
const DRAWS: u64 = 3000;
const SEED: u64 = 0;

static LEGAL: LazyLock<HashSet<Bigram>> = LazyLock::new(|| legal_bigrams(SEED, DRAWS));

/// How many bigrams of a body, `<start>` and `<end>` included, no well-formed summary has.
pub(crate) fn illegal_bigrams(body: &[u32]) -> usize {
    bigrams(body)
        .filter(|bigram| !LEGAL.contains(bigram))
        .count()
}

/// The bigrams of this many well-formed summaries.
fn legal_bigrams(seed: u64, draws: u64) -> HashSet<Bigram> {
    let mut legal = HashSet::new();
    for draw in 0..draws {
        let seed = seed.wrapping_add(draw);
        let mut rng = generator(seed, Purpose::Grammar);
        let kind = WELL_FORMED[(draw % WELL_FORMED.len() as u64) as usize];
        legal.extend(bigrams(&draw_body(&Post::generate(seed), kind, &mut rng)));
    }
    legal
}

fn bigrams(body: &[u32]) -> impl Iterator<Item = Bigram> + '_ {
    let symbols = || body.iter().map(|id| symbol(*id));
    let from = std::iter::once(Symbol::Start).chain(symbols());
    let to = symbols().chain(std::iter::once(Symbol::End));
    from.zip(to)
}

fn symbol(id: u32) -> Symbol {
    match Vocabulary::shared().tag(id) {
        None | Some(Tag::Special | Tag::Function) => Symbol::Word(id),
        Some(tag) => Symbol::Category(tag),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::word;

    #[test]
    fn another_seed_gives_the_same_grammar() {
        let other = legal_bigrams(1_000_000, 20_000);
        assert_eq!(*LEGAL, other);
        assert_eq!(other.len(), 47);
    }

    #[test]
    fn counts_each_illegal_bigram() {
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
            // "too ." : whoever says more than was asked for still asks.
            ("ana lost the hat and ben was there too .", 1),
            // The end is missing: "it" is followed by nothing.
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
