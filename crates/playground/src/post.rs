//! Posts: somebody's small misfortune in 21 to 51 words, with things said beside the point.
//!
//! A seed gives a post, for ever. The post knows its slots; that a reader can recover them from the words alone is
//! promised by [`Post::parse`].

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::facts::Facts;
use crate::seed::{Purpose, generator};
use crate::template::{Slot, Slots};
use crate::vocabulary::{BOS, SEP, Vocabulary};

const INTRODUCTIONS: [&str; 3] = [
    "my REL P went to the L on T .",
    "on T my REL P was at the L .",
    "P , my REL , visited the L on T .",
];
const PROBLEMS: [&str; 3] = [
    "there they V the O .",
    "then they V a ADJ O there .",
    "they really V the ADJ O .",
];
const FEELINGS: [&str; 2] = ["now they feel F .", "they feel very F about it ."];
const QUESTIONS: [&str; 3] = [
    "should they A it ?",
    "is it fine to A it ?",
    "can you tell us if they should A it ?",
];
const DISTRACTORS: [&str; 5] = [
    "i also saw P2 with a O2 .",
    "the L2 was closed .",
    "it was WEA .",
    "my dog likes the O2 .",
    "P2 never goes to the L2 .",
];
/// How many distractors, uniformly.
const DISTRACTOR_COUNTS: [usize; 4] = [0, 1, 1, 2];
const FEELING_RATE: f64 = 0.7;

/// Number of ids of the longest prompt there can be.
pub const LONGEST_PROMPT: usize = 53;

/// A post to be summarised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Post {
    ids: Vec<u32>,
    facts: Facts,
    slots: Slots,
}

impl Post {
    /// The post of a seed.
    pub fn generate(seed: u64) -> Self {
        let mut rng = generator(seed, Purpose::Post);
        let slots = Slots::draw(&mut rng);
        let mut sentences = vec![pick(&INTRODUCTIONS, &mut rng), pick(&PROBLEMS, &mut rng)];
        let feels = rng.random_bool(FEELING_RATE);
        if feels {
            sentences.push(pick(&FEELINGS, &mut rng));
        }
        for distractor in draw_distractors(&mut rng) {
            let position = rng.random_range(0..=sentences.len());
            sentences.insert(position, distractor);
        }
        sentences.push(pick(&QUESTIONS, &mut rng));
        let mut ids = Vec::new();
        for sentence in sentences {
            slots.fill(sentence, &mut ids);
        }
        Self {
            ids,
            facts: facts(&slots, feels),
            slots,
        }
    }

    /// The words' ids, without `<bos>` and `<sep>`: 21 to 51 of them.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The words.
    pub fn words(&self) -> Vec<&'static str> {
        let vocabulary = Vocabulary::shared();
        self.ids
            .iter()
            .filter_map(|id| vocabulary.word(*id))
            .collect()
    }

    /// The words as text, joined by one space.
    pub fn text(&self) -> String {
        Vocabulary::shared().text(&self.ids)
    }

    /// What a model is given: `<bos> post <sep>`, at most [`LONGEST_PROMPT`] ids.
    pub fn prompt_ids(&self) -> Vec<u32> {
        [&[BOS], self.ids.as_slice(), &[SEP]].concat()
    }

    /// The true slots.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    pub(crate) fn slots(&self) -> &Slots {
        &self.slots
    }

    pub(crate) fn mentions(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }
}

fn facts(slots: &Slots, feels: bool) -> Facts {
    Facts {
        person: slots.get(Slot::Person),
        verb: slots.get(Slot::Verb),
        object: slots.get(Slot::Object),
        place: slots.get(Slot::Place),
        action: slots.get(Slot::Action),
        weekday: slots.get(Slot::Weekday),
        feeling: feels.then(|| slots.get(Slot::Feeling)),
    }
}

/// Zero to two different distractors.
fn draw_distractors(rng: &mut ChaCha8Rng) -> Vec<&'static str> {
    let mut left = DISTRACTORS.to_vec();
    let count = pick(&DISTRACTOR_COUNTS, rng);
    (0..count)
        .map(|_| left.swap_remove(rng.random_range(0..left.len())))
        .collect()
}

/// One of a few, uniformly.
pub(crate) fn pick<T: Copy>(choices: &[T], rng: &mut ChaCha8Rng) -> T {
    choices[rng.random_range(0..choices.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_recovered_from_the_prompt() {
        for seed in 0..4000 {
            let post = Post::generate(seed);
            assert_eq!(
                Post::parse(&post.prompt_ids()).unwrap(),
                *post.facts(),
                "{}",
                post.text()
            );
        }
    }

    #[test]
    fn lengths_and_rates_are_those_of_the_world() {
        let posts: Vec<Post> = (0..4000).map(Post::generate).collect();
        let lengths: Vec<usize> = posts.iter().map(|post| post.ids().len()).collect();
        assert_eq!(
            (lengths.iter().min(), lengths.iter().max()),
            (Some(&21), Some(&(LONGEST_PROMPT - 2)))
        );
        let mean = lengths.iter().sum::<usize>() as f64 / 4000.0;
        assert!((mean - 35.0).abs() < 1.0, "mean length {mean}");
        let feeling = posts
            .iter()
            .filter(|post| post.facts().feeling.is_some())
            .count() as f64
            / 4000.0;
        assert!((feeling - 0.7).abs() < 0.03, "feeling rate {feeling}");
    }

    #[test]
    fn a_seed_is_a_post_and_seeds_differ() {
        assert_eq!(Post::generate(11), Post::generate(11));
        assert_ne!(Post::generate(11), Post::generate(12));
    }

    #[test]
    fn words_text_and_prompt_agree() {
        let post = Post::generate(3);
        assert_eq!(post.words().join(" "), post.text());
        let prompt = Vocabulary::shared().text(&post.prompt_ids());
        assert_eq!(prompt, format!("<bos> {} <sep>", post.text()));
    }
}
