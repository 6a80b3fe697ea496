//! The 200 words of the summarisation world.
//!
//! A word is a token: ids run through the categories in the order of [`CATEGORIES`], specials first. Every word
//! belongs to exactly one category, so a token id alone tells what a word can stand for. The vocabulary does not
//! know which sentences are made of its words.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::LazyLock;

/// Padding.
pub const PAD: u32 = 0;
/// Begin of the prompt.
pub const BOS: u32 = 1;
/// Between the post and its summary.
pub const SEP: u32 = 2;
/// End of the summary.
pub const EOS: u32 = 3;
/// Number of words, specials included.
pub const VOCABULARY_SIZE: usize = 200;

/// The category of a word. The letters are the slots of the templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tag {
    /// `<pad> <bos> <sep> <eos>`.
    Special,
    /// P: who it happened to (24).
    Person,
    /// V: what happened, a verb in the past tense (12).
    Verb,
    /// O: what it happened to (24).
    Object,
    /// L: where (16).
    Place,
    /// A: what might be done about it (12).
    Action,
    /// T: when, a day of the week (7).
    Weekday,
    /// F: how they feel now (10).
    Feeling,
    /// R: rude or rambling words, never found in a good summary (10).
    Rude,
    /// REL: who they are to the author (6).
    Relation,
    /// ADJ: of the object (6).
    Adjective,
    /// WEA: the weather, always beside the point (6).
    Weather,
    /// Everything that holds sentences together, punctuation included (63).
    Function,
}

const SPECIALS: &[&str] = &["<pad>", "<bos>", "<sep>", "<eos>"];

/// All words, in the order of their ids.
#[rustfmt::skip]
const CATEGORIES: [(Tag, &[&str]); 13] = [
    (Tag::Special, SPECIALS),
    (Tag::Person, &[
        "ana", "ben", "carla", "david", "emma", "felix", "grace", "henry", "iris", "jack", "kira", "leo",
        "maria", "noah", "olivia", "paul", "quinn", "rosa", "sam", "tina", "victor", "wendy", "yusuf", "zoe",
    ]),
    (Tag::Verb, &[
        "lost", "broke", "dropped", "damaged", "stained", "scratched",
        "cracked", "bent", "forgot", "ruined", "misplaced", "dented",
    ]),
    (Tag::Object, &[
        "wallet", "phone", "camera", "bicycle", "laptop", "guitar", "jacket", "backpack",
        "lamp", "vase", "watch", "book", "ticket", "suitcase", "kettle", "mirror",
        "necklace", "hat", "scarf", "drone", "tablet", "teapot", "violin", "skateboard",
    ]),
    (Tag::Place, &[
        "library", "museum", "beach", "market", "park", "station", "hotel", "restaurant",
        "gym", "school", "office", "airport", "cinema", "bakery", "hospital", "zoo",
    ]),
    (Tag::Action, &[
        "return", "repair", "replace", "sell", "keep", "clean",
        "report", "hide", "paint", "borrow", "donate", "recycle",
    ]),
    (Tag::Weekday, &["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]),
    (Tag::Feeling, &[
        "sad", "worried", "angry", "guilty", "embarrassed", "confused", "nervous", "upset", "tired", "ashamed",
    ]),
    (Tag::Rude, &["lol", "idiot", "ugh", "like", "honestly", "stupid", "dumb", "know", "mean", "whatever"]),
    (Tag::Relation, &["sister", "brother", "cousin", "friend", "neighbour", "colleague"]),
    (Tag::Adjective, &["red", "blue", "new", "small", "heavy", "green"]),
    (Tag::Weather, &["sunny", "rainy", "windy", "cloudy", "snowy", "foggy"]),
    (Tag::Function, &[
        ".", ",", "?", ":", "!",
        "my", "went", "to", "the", "on", "was", "at", "visited", "there", "they", "then", "a", "really",
        "now", "feel", "very", "about", "it", "should", "is", "fine", "can", "you", "tell", "us", "if",
        "i", "also", "saw", "with", "closed", "dog", "likes", "never", "goes",
        "and", "asks", "wonders", "whether", "someone", "something", "summary", "oops", "feels", "too",
        "that", "so", "what",
        // Spare words: no template uses them, so a summary that does is out of form.
        "in", "of", "for", "but", "not", "we", "are", "has", "today", "please",
    ]),
];

static SHARED: LazyLock<Vocabulary> = LazyLock::new(Vocabulary::build);

/// The words, their ids and their categories.
#[derive(Debug)]
pub struct Vocabulary {
    words: Vec<(&'static str, Tag)>,
    ids: HashMap<&'static str, u32>,
}

impl Vocabulary {
    /// The one vocabulary, built on first use.
    pub fn shared() -> &'static Self {
        &SHARED
    }

    fn build() -> Self {
        let words: Vec<_> = CATEGORIES
            .iter()
            .flat_map(|(tag, words)| words.iter().map(|word| (*word, *tag)))
            .collect();
        let ids = (0..)
            .zip(&words)
            .map(|(id, (word, _))| (*word, id))
            .collect();
        Self { words, ids }
    }

    /// The id of a word, if it is one of the 200.
    pub fn id(&self, word: &str) -> Option<u32> {
        self.ids.get(word).copied()
    }

    /// The word of an id, if the id is below [`VOCABULARY_SIZE`].
    pub fn word(&self, id: u32) -> Option<&'static str> {
        self.words.get(id as usize).map(|(word, _)| *word)
    }

    /// The category of an id, if the id is below [`VOCABULARY_SIZE`].
    pub fn tag(&self, id: u32) -> Option<Tag> {
        self.words.get(id as usize).map(|(_, tag)| *tag)
    }

    /// The ids of a category, which are contiguous.
    pub fn ids(&self, tag: Tag) -> Range<u32> {
        let before = CATEGORIES.iter().take_while(|(other, _)| *other != tag);
        let start: usize = before.map(|(_, words)| words.len()).sum();
        let count = self.words[start..]
            .iter()
            .take_while(|(_, other)| *other == tag)
            .count();
        start as u32..(start + count) as u32
    }

    /// All words in the order of their ids.
    pub fn words(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.words.iter().map(|(word, _)| *word)
    }

    /// The four special words in the order of their ids.
    pub fn specials(&self) -> &'static [&'static str] {
        SPECIALS
    }

    /// Ids as text, words joined by one space; an id outside the vocabulary reads `<unknown>`.
    pub fn text(&self, ids: &[u32]) -> String {
        let words: Vec<_> = ids
            .iter()
            .map(|id| self.word(*id).unwrap_or("<unknown>"))
            .collect();
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn categories_have_their_counts() {
        let vocabulary = Vocabulary::shared();
        let counts = CATEGORIES.map(|(tag, _)| vocabulary.ids(tag).len());
        assert_eq!(counts, [4, 24, 12, 24, 16, 12, 7, 10, 10, 6, 6, 6, 63]);
        assert_eq!(counts.iter().sum::<usize>(), VOCABULARY_SIZE);
    }

    #[test]
    fn every_word_belongs_to_exactly_one_category() {
        let vocabulary = Vocabulary::shared();
        // A word written twice would keep only one of its ids.
        assert_eq!(vocabulary.ids.len(), VOCABULARY_SIZE);
        for (tag, words) in CATEGORIES {
            let ids = vocabulary.ids(tag);
            for (id, word) in ids.zip(words) {
                assert_eq!(vocabulary.word(id), Some(*word));
                assert_eq!(vocabulary.id(word), Some(id));
                assert_eq!(vocabulary.tag(id), Some(tag));
            }
        }
    }

    #[test]
    fn specials_hold_the_first_four_ids() {
        let vocabulary = Vocabulary::shared();
        let ids = ["<pad>", "<bos>", "<sep>", "<eos>"].map(|word| vocabulary.id(word));
        assert_eq!(ids, [PAD, BOS, SEP, EOS].map(Some));
    }

    #[test]
    fn outside_the_vocabulary_there_is_nothing() {
        let vocabulary = Vocabulary::shared();
        assert_eq!((vocabulary.word(200), vocabulary.tag(200)), (None, None));
        assert_eq!(vocabulary.id("umbrella"), None);
        assert_eq!(vocabulary.text(&[BOS, 4, 200]), "<bos> ana <unknown>");
    }
}
