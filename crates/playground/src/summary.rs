//! Summaries built clause by clause: golden ones and flawed variants.
//!
//! A [`Draft`] starts golden; [`crate::target`] then drops, corrupts, adds or repeats clauses. The draft knows the
//! order of clauses and nothing of their utility.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::post::{Post, pick};
use crate::seed::{RngStream, generator};
use crate::template::SlotValues;
use crate::vocabulary::EOS;

const TAILS: [&str; 2] = [
    "and asks if they should A it",
    "and wonders whether to A it",
];

/// Position of the clause that states the place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlaceClause {
    First,
    AfterObject,
    Absent,
}

/// The clause that is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RepeatedClause {
    Object,
    Tail,
}

/// Rude words in the summary: before its first word or before its full stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rudeness {
    Prefix(&'static str),
    Suffix(&'static str),
}

/// A summary under construction: `[at the L] P V the O [at the L] [extras] [tail] .`
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) slots: SlotValues,
    pub(crate) subject: &'static str,
    pub(crate) object: &'static str,
    pub(crate) place: PlaceClause,
    pub(crate) tail: Option<&'static str>,
    /// Optional first clause, `on T`.
    pub(crate) opening: Option<&'static str>,
    /// Clauses between the event and the closing question.
    pub(crate) extras: Vec<&'static str>,
    pub(crate) repeat: Option<RepeatedClause>,
    pub(crate) rudeness: Option<Rudeness>,
}

impl Draft {
    /// Draws one of the four golden forms uniformly.
    pub(crate) fn golden(post: &Post, rng: &mut ChaCha8Rng) -> Self {
        Self {
            slots: post.slots().clone(),
            subject: "P",
            object: "the O",
            place: if rng.random_bool(0.5) {
                PlaceClause::First
            } else {
                PlaceClause::AfterObject
            },
            tail: Some(pick(&TAILS, rng)),
            opening: None,
            extras: Vec::new(),
            repeat: None,
            rudeness: None,
        }
    }

    /// Token ids of the body: no style prefix, no `<eos>`.
    pub(crate) fn body(&self) -> Vec<u32> {
        let mut ids = Vec::new();
        for clause in self.clauses() {
            self.slots.fill(clause, &mut ids);
        }
        ids
    }

    fn clauses(&self) -> Vec<&'static str> {
        let mut clauses = Vec::new();
        if let Some(Rudeness::Prefix(words)) = self.rudeness {
            clauses.push(words);
        }
        clauses.extend(self.opening);
        if self.place == PlaceClause::First {
            clauses.push("at the L");
        }
        clauses.extend([self.subject, "V", self.object]);
        if self.repeat == Some(RepeatedClause::Object) {
            clauses.push(self.object);
        }
        if self.place == PlaceClause::AfterObject {
            clauses.push("at the L");
        }
        clauses.extend(&self.extras);
        clauses.extend(self.tail);
        if self.repeat == Some(RepeatedClause::Tail) {
            clauses.extend(self.tail);
        }
        if let Some(Rudeness::Suffix(words)) = self.rudeness {
            clauses.push(words);
        }
        clauses.push(".");
        clauses
    }
}

impl Post {
    /// A golden summary, `<eos>` included: one of four forms chosen by the seed, each of utility exactly 1.
    pub fn golden(&self, seed: u64) -> Vec<u32> {
        let mut ids = Draft::golden(self, &mut generator(seed, RngStream::Golden)).body();
        ids.push(EOS);
        ids
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::vocabulary::Vocabulary;

    #[test]
    fn golden_summaries_have_exactly_four_forms() {
        let post = Post::generate(5);
        let text = |slot: u32| Vocabulary::shared().word(slot).unwrap();
        let facts = post.facts();
        let (p, v, o) = (text(facts.person), text(facts.verb), text(facts.object));
        let (l, a) = (text(facts.place), text(facts.action));
        let mut expected = HashSet::new();
        for tail in [
            format!("and asks if they should {a} it"),
            format!("and wonders whether to {a} it"),
        ] {
            expected.insert(format!("at the {l} {p} {v} the {o} {tail} . <eos>"));
            expected.insert(format!("{p} {v} the {o} at the {l} {tail} . <eos>"));
        }
        let observed: HashSet<String> = (0..100)
            .map(|seed| Vocabulary::shared().text(&post.golden(seed)))
            .collect();
        assert_eq!(observed, expected);
    }
}
