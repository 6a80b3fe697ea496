//! Encodes posts and summaries as tokens of the playground's vocabulary.

use messages::{Finish, PromptText};
use playground::{BOS, EOS, SEP, Vocabulary};
use preference::PromptEncoder;

/// Encoder of the playground: tokens are separated by white space.
pub(crate) struct PostEncoder;

impl PostEncoder {
    fn ids(text: &str) -> Result<Vec<u32>, String> {
        let vocabulary = Vocabulary::shared();
        let id = |token| {
            let unknown = || format!("{token:?} is not in the playground's vocabulary");
            vocabulary.id(token).ok_or_else(unknown)
        };
        text.split_whitespace().map(id).collect()
    }
}

impl PromptEncoder for PostEncoder {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        let PromptText::Text(text) = prompt else {
            return Err("the playground's posts are text, not messages".into());
        };
        let post = Self::ids(text)?;
        Ok((text.clone(), [&[BOS], post.as_slice(), &[SEP]].concat()))
    }

    fn response(
        &self,
        _: &PromptText,
        _: &[u32],
        response: &str,
        finish: Finish,
    ) -> Result<Vec<u32>, String> {
        let mut ids = Self::ids(response)?;
        if finish == Finish::EndOfText {
            ids.push(EOS);
        }
        Ok(ids)
    }

    fn has_ended(&self, ids: &[u32]) -> bool {
        ids.last() == Some(&EOS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn posts_and_summaries_have_the_tokens_of_the_policys_prompts() {
        let post = playground::train_post(0, 3);
        let text = PromptText::Text(post.text());
        let encoded = PostEncoder.prompt(&text);
        assert_eq!(encoded, Ok((post.text(), post.prompt_ids())));
        let golden = post.golden(5);
        let summary = Vocabulary::shared().text(&golden[..golden.len() - 1]);
        let response = |summary, finish| PostEncoder.response(&text, &[], summary, finish);
        let finished = response(&summary, Finish::EndOfText);
        assert_eq!(finished, Ok(golden.clone()), "end-of-text included");
        let truncated = response(&summary, Finish::Length);
        assert_eq!(truncated.as_deref(), Ok(&golden[..golden.len() - 1]));
        assert!(PostEncoder.has_ended(&golden));
        assert!(!PostEncoder.has_ended(&golden[..3]));
        let unknown = response("my xylophone", Finish::EndOfText);
        let reason = "\"xylophone\" is not in the playground's vocabulary";
        assert_eq!(unknown, Err(reason.into()));
    }
}
