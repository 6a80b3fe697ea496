//! What a post truly says, and how to read it back from the prompt alone.
//!
//! A judge sees token ids, not the generator's memory. [`Post::parse`] recovers every slot from the sentences:
//! only the introduction names a relation, only the problem has a verb of harm, only the last sentence asks.

use crate::error::Error;
use crate::post::Post;
use crate::template::word;
use crate::vocabulary::{BOS, PAD, SEP, Tag, Vocabulary};

/// The true slots of a post, as token ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// P: who it happened to.
    pub person: u32,
    /// V: what happened.
    pub verb: u32,
    /// O: what it happened to.
    pub object: u32,
    /// L: where.
    pub place: u32,
    /// A: what might be done about it.
    pub action: u32,
    /// T: when.
    pub weekday: u32,
    /// F: how they feel, if the post says so.
    pub feeling: Option<u32>,
}

impl Facts {
    /// The post's own word of a category; none for categories that are no slot and for an unspoken feeling.
    pub fn value(&self, tag: Tag) -> Option<u32> {
        match tag {
            Tag::Person => Some(self.person),
            Tag::Verb => Some(self.verb),
            Tag::Object => Some(self.object),
            Tag::Place => Some(self.place),
            Tag::Action => Some(self.action),
            Tag::Weekday => Some(self.weekday),
            Tag::Feeling => self.feeling,
            _ => None,
        }
    }
}

impl Post {
    /// Recovers the true slots from the ids of a prompt, `<bos> post <sep>`; padding on the left is passed over.
    ///
    /// # Errors
    /// An id outside the vocabulary, a missing frame, or a post without one of its slots.
    pub fn parse(prompt_ids: &[u32]) -> Result<Facts, Error> {
        let vocabulary = Vocabulary::shared();
        if let Some(id) = prompt_ids.iter().find(|id| vocabulary.tag(**id).is_none()) {
            return Err(Error::UnknownToken { id: *id });
        }
        let padding = prompt_ids.iter().take_while(|id| **id == PAD).count();
        let [BOS, post @ .., SEP] = &prompt_ids[padding..] else {
            return Err(Error::PromptFrame);
        };
        let sentences = sentences(post);
        let last = sentences.last().copied().unwrap_or_default();
        let intro = sentence_with(&sentences, Tag::Relation);
        let problem = sentence_with(&sentences, Tag::Verb);
        let feel = word("feel");
        let feeling = sentences.iter().find(|sentence| sentence.contains(&feel));
        Ok(Facts {
            person: named(intro, Tag::Person)?,
            verb: named(problem, Tag::Verb)?,
            object: named(problem, Tag::Object)?,
            place: named(intro, Tag::Place)?,
            action: named(last, Tag::Action)?,
            weekday: named(intro, Tag::Weekday)?,
            feeling: feeling
                .map(|sentence| named(sentence, Tag::Feeling))
                .transpose()?,
        })
    }
}

/// The sentences of a post, each with its full stop or question mark.
fn sentences(post: &[u32]) -> Vec<&[u32]> {
    let (stop, question) = (word("."), word("?"));
    post.split_inclusive(|id| *id == stop || *id == question)
        .collect()
}

/// The first sentence that has a word of the category; empty if there is none.
fn sentence_with<'a>(sentences: &[&'a [u32]], tag: Tag) -> &'a [u32] {
    let found = sentences
        .iter()
        .find(|sentence| named(sentence, tag).is_ok());
    found.copied().unwrap_or_default()
}

fn named(sentence: &[u32], slot: Tag) -> Result<u32, Error> {
    let vocabulary = Vocabulary::shared();
    let found = sentence
        .iter()
        .find(|id| vocabulary.tag(**id) == Some(slot));
    found.copied().ok_or(Error::MissingFact { slot })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Vec<u32> {
        text.split(' ').map(word).collect()
    }

    #[test]
    fn reads_every_slot_and_no_distractor() {
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
        assert_eq!(Post::parse(&prompt).unwrap(), expected);
    }

    #[test]
    fn refuses_what_is_no_prompt() {
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
            let error = Post::parse(&prompt).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
