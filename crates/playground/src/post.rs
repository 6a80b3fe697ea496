//! Synthetic posts to be summarised: a small accident in 21 to 51 words, with irrelevant sentences in between.
//!
//! A post is a pure function of its seed. It stores its slot values; [`Facts::parse`] recovers them from the token ids
//! alone.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::facts::Facts;
use crate::seed::{RngStream, generator};
use crate::template::{SlotValues, TemplateSlot};
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
/// Numbers of distractor sentences, one chosen uniformly.
const DISTRACTOR_COUNTS: [usize; 4] = [0, 1, 1, 2];
const FEELING_RATE: f64 = 0.7;

/// Maximum length of a prompt, in tokens.
pub const LONGEST_PROMPT: usize = 53;

/// A post to be summarised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Post {
    ids: Vec<u32>,
    facts: Facts,
    slots: SlotValues,
}

impl Post {
    /// Generates the post of a seed.
    pub fn generate(seed: u64) -> Self {
        let mut rng = generator(seed, RngStream::Post);
        let slots = SlotValues::draw(&mut rng);
        let mut sentences = vec![pick(&INTRODUCTIONS, &mut rng), pick(&PROBLEMS, &mut rng)];
        let has_feeling = rng.random_bool(FEELING_RATE);
        if has_feeling {
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
            facts: facts(&slots, has_feeling),
            slots,
        }
    }

    /// Token ids, without `<bos>` and `<sep>`: 21 to 51 of them.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The words of the post, one per token.
    pub fn words(&self) -> Vec<&'static str> {
        let vocabulary = Vocabulary::shared();
        self.ids
            .iter()
            .filter_map(|id| vocabulary.word(*id))
            .collect()
    }

    /// The post as text, words joined by one space.
    pub fn text(&self) -> String {
        Vocabulary::shared().text(&self.ids)
    }

    /// Prompt of the model: `<bos> post <sep>`, at most [`LONGEST_PROMPT`] ids.
    pub fn prompt_ids(&self) -> Vec<u32> {
        [&[BOS], self.ids.as_slice(), &[SEP]].concat()
    }

    /// True values of the key slots.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    pub(crate) fn slots(&self) -> &SlotValues {
        &self.slots
    }

    pub(crate) fn mentions(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }
}

fn facts(slots: &SlotValues, has_feeling: bool) -> Facts {
    Facts {
        person: slots.get(TemplateSlot::Person),
        verb: slots.get(TemplateSlot::Verb),
        object: slots.get(TemplateSlot::Object),
        place: slots.get(TemplateSlot::Place),
        action: slots.get(TemplateSlot::Action),
        weekday: slots.get(TemplateSlot::Weekday),
        feeling: has_feeling.then(|| slots.get(TemplateSlot::Feeling)),
    }
}

/// Draws zero to two distinct distractor sentences.
fn draw_distractors(rng: &mut ChaCha8Rng) -> Vec<&'static str> {
    let mut remaining = DISTRACTORS.to_vec();
    let count = pick(&DISTRACTOR_COUNTS, rng);
    (0..count)
        .map(|_| remaining.swap_remove(rng.random_range(0..remaining.len())))
        .collect()
}

/// Draws one of `choices` uniformly.
pub(crate) fn pick<T: Copy>(choices: &[T], rng: &mut ChaCha8Rng) -> T {
    choices[rng.random_range(0..choices.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_recovers_every_slot_from_the_prompt() {
        for seed in 0..4000 {
            let post = Post::generate(seed);
            assert_eq!(
                Facts::parse(&post.prompt_ids()).unwrap(),
                *post.facts(),
                "{}",
                post.text()
            );
        }
    }

    #[test]
    fn post_lengths_and_sentence_rates_match_their_specification() {
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
    fn a_post_is_a_function_of_its_seed() {
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
