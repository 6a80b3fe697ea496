//! Vocabulary of the summarisation task: 200 words, one token each.
//!
//! Ids follow the order of [`CATEGORIES`], special tokens first. Every word belongs to exactly one category, so a token
//! id alone determines which slots it can fill. The vocabulary knows nothing of sentences.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::LazyLock;

/// Id of the padding token.
pub const PAD: u32 = 0;
/// Id of the token that begins the prompt.
pub const BOS: u32 = 1;
/// Id of the separator between the post and its summary.
pub const SEP: u32 = 2;
/// Id of the token that ends the summary.
pub const EOS: u32 = 3;
/// Number of tokens, special ones included.
pub const VOCABULARY_SIZE: usize = 200;

/// Category of a word. The letters are the names of template slots; the counts are in parentheses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WordCategory {
    /// `<pad> <bos> <sep> <eos>`.
    Special,
    /// P: the person concerned (24).
    Person,
    /// V: the event, a verb in the past tense (12).
    Verb,
    /// O: the object damaged or lost (24).
    Object,
    /// L: the place (16).
    Place,
    /// A: the action under consideration (12).
    Action,
    /// T: the day of the week (7).
    Weekday,
    /// F: the feeling (10).
    Feeling,
    /// R: rude or rambling words, absent from good summaries (10).
    Rude,
    /// REL: relation of the person to the author (6).
    Relation,
    /// ADJ: adjective of the object (6).
    Adjective,
    /// WEA: the weather, always irrelevant (6).
    Weather,
    /// Function words and punctuation (63).
    Function,
}

const SPECIALS: &[&str] = &["<pad>", "<bos>", "<sep>", "<eos>"];

/// All words, in order of their ids.
#[rustfmt::skip]
const CATEGORIES: [(WordCategory, &[&str]); 13] = [
    (WordCategory::Special, SPECIALS),
    (WordCategory::Person, &[
        "ana", "ben", "carla", "david", "emma", "felix", "grace", "henry", "iris", "jack", "kira", "leo",
        "maria", "noah", "olivia", "paul", "quinn", "rosa", "sam", "tina", "victor", "wendy", "yusuf", "zoe",
    ]),
    (WordCategory::Verb, &[
        "lost", "broke", "dropped", "damaged", "stained", "scratched",
        "cracked", "bent", "forgot", "ruined", "misplaced", "dented",
    ]),
    (WordCategory::Object, &[
        "wallet", "phone", "camera", "bicycle", "laptop", "guitar", "jacket", "backpack",
        "lamp", "vase", "watch", "book", "ticket", "suitcase", "kettle", "mirror",
        "necklace", "hat", "scarf", "drone", "tablet", "teapot", "violin", "skateboard",
    ]),
    (WordCategory::Place, &[
        "library", "museum", "beach", "market", "park", "station", "hotel", "restaurant",
        "gym", "school", "office", "airport", "cinema", "bakery", "hospital", "zoo",
    ]),
    (WordCategory::Action, &[
        "return", "repair", "replace", "sell", "keep", "clean",
        "report", "hide", "paint", "borrow", "donate", "recycle",
    ]),
    (WordCategory::Weekday, &["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]),
    (WordCategory::Feeling, &[
        "sad", "worried", "angry", "guilty", "embarrassed", "confused", "nervous", "upset", "tired", "ashamed",
    ]),
    (WordCategory::Rude, &["lol", "idiot", "ugh", "like", "honestly", "stupid", "dumb", "know", "mean", "whatever"]),
    (WordCategory::Relation, &["sister", "brother", "cousin", "friend", "neighbour", "colleague"]),
    (WordCategory::Adjective, &["red", "blue", "new", "small", "heavy", "green"]),
    (WordCategory::Weather, &["sunny", "rainy", "windy", "cloudy", "snowy", "foggy"]),
    (WordCategory::Function, &[
        ".", ",", "?", ":", "!",
        "my", "went", "to", "the", "on", "was", "at", "visited", "there", "they", "then", "a", "really",
        "now", "feel", "very", "about", "it", "should", "is", "fine", "can", "you", "tell", "us", "if",
        "i", "also", "saw", "with", "closed", "dog", "likes", "never", "goes",
        "and", "asks", "wonders", "whether", "someone", "something", "summary", "oops", "feels", "too",
        "that", "so", "what",
        // Unused by templates: any bigram with one of these is illegal.
        "in", "of", "for", "but", "not", "we", "are", "has", "today", "please",
    ]),
];

static SHARED: LazyLock<Vocabulary> = LazyLock::new(Vocabulary::build);

/// Words, their token ids and their categories.
#[derive(Debug)]
pub struct Vocabulary {
    words: Vec<(&'static str, WordCategory)>,
    ids: HashMap<&'static str, u32>,
}

impl Vocabulary {
    /// The shared vocabulary, built on first use.
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

    /// The id of a word, or `None` outside the vocabulary.
    pub fn id(&self, word: &str) -> Option<u32> {
        self.ids.get(word).copied()
    }

    /// The word of an id, or `None` from [`VOCABULARY_SIZE`] on.
    pub fn word(&self, id: u32) -> Option<&'static str> {
        self.words.get(id as usize).map(|(word, _)| *word)
    }

    /// The category of an id, or `None` from [`VOCABULARY_SIZE`] on.
    pub fn tag(&self, id: u32) -> Option<WordCategory> {
        self.words.get(id as usize).map(|(_, tag)| *tag)
    }

    /// The contiguous range of ids of a category.
    pub fn ids(&self, tag: WordCategory) -> Range<u32> {
        let before = CATEGORIES.iter().take_while(|(other, _)| *other != tag);
        let start: usize = before.map(|(_, words)| words.len()).sum();
        let count = self.words[start..]
            .iter()
            .take_while(|(_, other)| *other == tag)
            .count();
        start as u32..(start + count) as u32
    }

    /// All words in order of their ids.
    pub fn words(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.words.iter().map(|(word, _)| *word)
    }

    /// The four special tokens in order of their ids.
    pub fn specials(&self) -> &'static [&'static str] {
        SPECIALS
    }

    /// Decodes ids into words joined by one space; an id outside the vocabulary becomes `<unknown>`.
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
    fn categories_have_the_documented_sizes() {
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
    fn special_tokens_have_the_first_four_ids() {
        let vocabulary = Vocabulary::shared();
        let ids = ["<pad>", "<bos>", "<sep>", "<eos>"].map(|word| vocabulary.id(word));
        assert_eq!(ids, [PAD, BOS, SEP, EOS].map(Some));
    }

    #[test]
    fn lookups_outside_the_vocabulary_return_none() {
        let vocabulary = Vocabulary::shared();
        assert_eq!((vocabulary.word(200), vocabulary.tag(200)), (None, None));
        assert_eq!(vocabulary.id("umbrella"), None);
        assert_eq!(vocabulary.text(&[BOS, 4, 200]), "<bos> ana <unknown>");
    }
}
