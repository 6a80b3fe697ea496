//! Sentences with slots: `my REL P went to the L on T .`
//!
//! Capitals name a slot, everything else is a word of the vocabulary. Templates are constants of this crate; a
//! template with an unknown word is a mistake in the crate, not of its user.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::vocabulary::{Tag, Vocabulary};

/// A place in a template that a post fills. The `Other…` slots belong to distractors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Person,
    Verb,
    Object,
    Place,
    Action,
    Weekday,
    Feeling,
    Relation,
    Adjective,
    Weather,
    OtherPerson,
    OtherObject,
    OtherPlace,
}

/// Each slot with its name in templates and the category that fills it, in the order of [`Slot`].
const SLOTS: [(Slot, &str, Tag); 13] = [
    (Slot::Person, "P", Tag::Person),
    (Slot::Verb, "V", Tag::Verb),
    (Slot::Object, "O", Tag::Object),
    (Slot::Place, "L", Tag::Place),
    (Slot::Action, "A", Tag::Action),
    (Slot::Weekday, "T", Tag::Weekday),
    (Slot::Feeling, "F", Tag::Feeling),
    (Slot::Relation, "REL", Tag::Relation),
    (Slot::Adjective, "ADJ", Tag::Adjective),
    (Slot::Weather, "WEA", Tag::Weather),
    (Slot::OtherPerson, "P2", Tag::Person),
    (Slot::OtherObject, "O2", Tag::Object),
    (Slot::OtherPlace, "L2", Tag::Place),
];

/// A word for every slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slots {
    ids: [u32; SLOTS.len()],
}

impl Slots {
    /// Draws every slot uniformly; the distractors' words differ from the true ones.
    pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Self {
        let mut slots = Self {
            ids: SLOTS.map(|(_, _, tag)| uniform(tag, rng)),
        };
        for (other, of) in [
            (Slot::OtherPerson, Slot::Person),
            (Slot::OtherObject, Slot::Object),
            (Slot::OtherPlace, Slot::Place),
        ] {
            slots.set(other, another(slots.get(of), of.tag(), rng));
        }
        slots
    }

    pub(crate) fn get(&self, slot: Slot) -> u32 {
        self.ids[slot as usize]
    }

    pub(crate) fn set(&mut self, slot: Slot, id: u32) {
        self.ids[slot as usize] = id;
    }

    /// Appends the ids of a template, its slots filled.
    pub(crate) fn fill(&self, template: &str, ids: &mut Vec<u32>) {
        ids.extend(
            template
                .split_whitespace()
                .map(|symbol| self.resolve(symbol)),
        );
    }

    fn resolve(&self, symbol: &str) -> u32 {
        match SLOTS.iter().find(|(_, name, _)| *name == symbol) {
            Some((slot, _, _)) => self.get(*slot),
            None => word(symbol),
        }
    }
}

impl Slot {
    pub(crate) fn tag(self) -> Tag {
        SLOTS[self as usize].2
    }
}

/// The id of a word that the crate itself writes.
pub(crate) fn word(text: &str) -> u32 {
    Vocabulary::shared()
        .id(text)
        .expect("templates are written with words of the vocabulary")
}

/// A word of the category, uniformly.
pub(crate) fn uniform(tag: Tag, rng: &mut ChaCha8Rng) -> u32 {
    rng.random_range(Vocabulary::shared().ids(tag))
}

/// A word of the category other than this one, uniformly.
pub(crate) fn another(id: u32, tag: Tag, rng: &mut ChaCha8Rng) -> u32 {
    let ids = Vocabulary::shared().ids(tag);
    let drawn = rng.random_range(ids.start..ids.end - 1);
    if drawn >= id { drawn + 1 } else { drawn }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::seed::{Purpose, generator};

    #[test]
    fn the_table_is_in_the_order_of_the_slots() {
        for (index, (slot, _, _)) in SLOTS.iter().enumerate() {
            assert_eq!(*slot as usize, index);
        }
    }

    #[test]
    fn another_word_is_any_but_the_given_one() {
        let mut rng = generator(1, Purpose::Post);
        for given in Vocabulary::shared().ids(Tag::Weekday) {
            let seen: HashSet<u32> = (0..300)
                .map(|_| another(given, Tag::Weekday, &mut rng))
                .collect();
            let mut expected: HashSet<u32> = Vocabulary::shared().ids(Tag::Weekday).collect();
            expected.remove(&given);
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn fill_replaces_slots_and_keeps_words() {
        let mut slots = Slots::draw(&mut generator(1, Purpose::Post));
        slots.set(Slot::Person, word("ana"));
        slots.set(Slot::OtherPlace, word("zoo"));
        let mut ids = vec![word("so")];
        slots.fill("P never goes to the L2 .", &mut ids);
        assert_eq!(
            Vocabulary::shared().text(&ids),
            "so ana never goes to the zoo ."
        );
    }
}
