//! Facts of a post, and a parser that recovers them from the prompt.
//!
//! A judge sees token ids, not the generator's state. [`Facts::parse`] recovers every slot from the sentences: only the
//! introduction contains a relation, only the problem contains a verb of damage, only the last sentence is a question.

use crate::error::PlaygroundError;
use crate::template::word;
use crate::vocabulary::{BOS, PAD, SEP, Vocabulary, WordCategory};

/// True slot values of a post, as token ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// P: the person concerned.
    pub person: u32,
    /// V: the event, a verb in the past tense.
    pub verb: u32,
    /// O: the object damaged or lost.
    pub object: u32,
    /// L: the place.
    pub place: u32,
    /// A: the action under consideration.
    pub action: u32,
    /// T: the day of the week.
    pub weekday: u32,
    /// F: the feeling, if the post states one.
    pub feeling: Option<u32>,
}

impl Facts {
    /// The true token of a category; `None` for categories without a key slot and for a feeling that is not stated.
    pub fn value(&self, tag: WordCategory) -> Option<u32> {
        match tag {
            WordCategory::Person => Some(self.person),
            WordCategory::Verb => Some(self.verb),
            WordCategory::Object => Some(self.object),
            WordCategory::Place => Some(self.place),
            WordCategory::Action => Some(self.action),
            WordCategory::Weekday => Some(self.weekday),
            WordCategory::Feeling => self.feeling,
            _ => None,
        }
    }

    /// Recovers the slot values from the ids of a prompt, `<bos> post <sep>`; left padding is skipped.
    ///
    /// # Errors
    /// An id outside the vocabulary, missing `<bos>` or `<sep>`, or a post without one of its slots.
    pub fn parse(prompt_ids: &[u32]) -> Result<Self, PlaygroundError> {
        let vocabulary = Vocabulary::shared();
        if let Some(id) = prompt_ids.iter().find(|id| vocabulary.tag(**id).is_none()) {
            return Err(PlaygroundError::UnknownToken { id: *id });
        }
        let padding = prompt_ids.iter().take_while(|id| **id == PAD).count();
        let [BOS, post @ .., SEP] = &prompt_ids[padding..] else {
            return Err(PlaygroundError::PromptFrame);
        };
        let sentences = sentences(post);
        let last = sentences.last().copied().unwrap_or_default();
        let intro = sentence_with(&sentences, WordCategory::Relation);
        let problem = sentence_with(&sentences, WordCategory::Verb);
        let feel = word("feel");
        let feeling = sentences.iter().find(|sentence| sentence.contains(&feel));
        Ok(Self {
            person: find_category(intro, WordCategory::Person)?,
            verb: find_category(problem, WordCategory::Verb)?,
            object: find_category(problem, WordCategory::Object)?,
            place: find_category(intro, WordCategory::Place)?,
            action: find_category(last, WordCategory::Action)?,
            weekday: find_category(intro, WordCategory::Weekday)?,
            feeling: feeling
                .map(|sentence| find_category(sentence, WordCategory::Feeling))
                .transpose()?,
        })
    }
}

/// Splits a post into sentences, each with its full stop or question mark.
fn sentences(post: &[u32]) -> Vec<&[u32]> {
    let (stop, question) = (word("."), word("?"));
    post.split_inclusive(|id| *id == stop || *id == question)
        .collect()
}

/// The first sentence that contains a token of the category; empty if there is none.
fn sentence_with<'a>(sentences: &[&'a [u32]], tag: WordCategory) -> &'a [u32] {
    let found = sentences
        .iter()
        .find(|sentence| find_category(sentence, tag).is_ok());
    found.copied().unwrap_or_default()
}

fn find_category(sentence: &[u32], slot: WordCategory) -> Result<u32, PlaygroundError> {
    let vocabulary = Vocabulary::shared();
    let found = sentence
        .iter()
        .find(|id| vocabulary.tag(**id) == Some(slot));
    found.copied().ok_or(PlaygroundError::MissingFact { slot })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Vec<u32> {
        text.split(' ').map(word).collect()
    }

    #[test]
    fn parse_reads_every_slot_and_ignores_distractors() {
        let prompt = ids(
            "<pad> <bos> zoe never goes to the zoo . on monday my sister ana was at the park . \
             my dog likes the hat . then they lost a red wallet there . they feel very sad about it . \
             should they sell it ? <sep>",
        );
        let expected = Facts {
            person: word("ana"),
            verb: word("lost"),
            object: word("wallet"),
            place: word("park"),
            action: word("sell"),
            weekday: word("monday"),
            feeling: Some(word("sad")),
        };
        assert_eq!(Facts::parse(&prompt).unwrap(), expected);
    }

    #[test]
    fn malformed_prompts_are_rejected() {
        let intro = "my sister ana went to the park on monday .";
        let cases = [
            (vec![BOS, 200, SEP], "token id 200 is not a playground word"),
            (vec![], "not framed"),
            (vec![BOS], "not framed"),
            (ids(&format!("{intro} <sep>")), "not framed"),
            (ids(&format!("<bos> {intro}")), "not framed"),
            (vec![BOS, SEP], "names no Person"),
            (
                ids(&format!("<bos> {intro} should they sell it ? <sep>")),
                "names no Verb",
            ),
            (
                ids(&format!(
                    "<bos> {intro} they lost the hat . it was sunny . <sep>"
                )),
                "names no Action",
            ),
        ];
        for (prompt, message) in cases {
            let error = Facts::parse(&prompt).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
