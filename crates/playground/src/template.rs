//! Sentence templates with slots: `my REL P went to the L on T .`
//!
//! Capitals name a slot, everything else is a word of the vocabulary. Templates are constants of this crate, so an
//! unknown word in a template is a bug and panics.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::vocabulary::{Vocabulary, WordCategory};

/// A placeholder of a template. The `Other…` slots belong to distractor sentences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TemplateSlot {
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

/// Each slot with its name in templates and its word category, in the order of [`TemplateSlot`].
const SLOTS: [(TemplateSlot, &str, WordCategory); 13] = [
    (TemplateSlot::Person, "P", WordCategory::Person),
    (TemplateSlot::Verb, "V", WordCategory::Verb),
    (TemplateSlot::Object, "O", WordCategory::Object),
    (TemplateSlot::Place, "L", WordCategory::Place),
    (TemplateSlot::Action, "A", WordCategory::Action),
    (TemplateSlot::Weekday, "T", WordCategory::Weekday),
    (TemplateSlot::Feeling, "F", WordCategory::Feeling),
    (TemplateSlot::Relation, "REL", WordCategory::Relation),
    (TemplateSlot::Adjective, "ADJ", WordCategory::Adjective),
    (TemplateSlot::Weather, "WEA", WordCategory::Weather),
    (TemplateSlot::OtherPerson, "P2", WordCategory::Person),
    (TemplateSlot::OtherObject, "O2", WordCategory::Object),
    (TemplateSlot::OtherPlace, "L2", WordCategory::Place),
];

/// A token id for every slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlotValues {
    ids: [u32; SLOTS.len()],
}

impl SlotValues {
    /// Draws every slot uniformly; distractor slots differ from their true counterparts.
    pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Self {
        let mut slots = Self {
            ids: SLOTS.map(|(_, _, tag)| uniform(tag, rng)),
        };
        for (other, of) in [
            (TemplateSlot::OtherPerson, TemplateSlot::Person),
            (TemplateSlot::OtherObject, TemplateSlot::Object),
            (TemplateSlot::OtherPlace, TemplateSlot::Place),
        ] {
            slots.set(other, another(slots.get(of), of.tag(), rng));
        }
        slots
    }

    pub(crate) fn get(&self, slot: TemplateSlot) -> u32 {
        self.ids[slot as usize]
    }

    pub(crate) fn set(&mut self, slot: TemplateSlot, id: u32) {
        self.ids[slot as usize] = id;
    }

    /// Appends the token ids of a template with its slots filled.
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

impl TemplateSlot {
    pub(crate) fn tag(self) -> WordCategory {
        SLOTS[self as usize].2
    }
}

/// The id of a word used in a template.
pub(crate) fn word(text: &str) -> u32 {
    Vocabulary::shared()
        .id(text)
        .expect("templates are written with words of the vocabulary")
}

/// Draws a token of the category uniformly.
pub(crate) fn uniform(tag: WordCategory, rng: &mut ChaCha8Rng) -> u32 {
    rng.random_range(Vocabulary::shared().ids(tag))
}

/// Draws a token of the category other than `id` uniformly.
pub(crate) fn another(id: u32, tag: WordCategory, rng: &mut ChaCha8Rng) -> u32 {
    let ids = Vocabulary::shared().ids(tag);
    let drawn = rng.random_range(ids.start..ids.end - 1);
    if drawn >= id { drawn + 1 } else { drawn }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::seed::{RngStream, generator};

    #[test]
    fn the_slot_table_is_in_declaration_order() {
        for (index, (slot, _, _)) in SLOTS.iter().enumerate() {
            assert_eq!(*slot as usize, index);
        }
    }

    #[test]
    fn another_never_returns_the_given_word() {
        let mut rng = generator(1, RngStream::Post);
        for given in Vocabulary::shared().ids(WordCategory::Weekday) {
            let observed: HashSet<u32> = (0..300)
                .map(|_| another(given, WordCategory::Weekday, &mut rng))
                .collect();
            let mut expected: HashSet<u32> =
                Vocabulary::shared().ids(WordCategory::Weekday).collect();
            expected.remove(&given);
            assert_eq!(observed, expected);
        }
    }

    #[test]
    fn fill_replaces_slots_and_keeps_words() {
        let mut slots = SlotValues::draw(&mut generator(1, RngStream::Post));
        slots.set(TemplateSlot::Person, word("ana"));
        slots.set(TemplateSlot::OtherPlace, word("zoo"));
        let mut ids = vec![word("so")];
        slots.fill("P never goes to the L2 .", &mut ids);
        assert_eq!(
            Vocabulary::shared().text(&ids),
            "so ana never goes to the zoo ."
        );
    }
}
