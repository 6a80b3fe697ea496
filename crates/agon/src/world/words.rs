//! What texts from elsewhere are for the judge of the settings.

use std::sync::Arc;

use messages::{Finish, PromptText};
use model::ModelFolder;
use playground::{BOS, EOS, SEP, Vocabulary};
use preference::{Closing, Texts, TextsAlone, Tokens};
use settings::{JudgeSettings, Settings};

use super::JudgeSource;

/// The words of the judge: the playground's, a bandit's, those of a model that judges; for judges that
/// read texts, none.
pub(crate) fn texts(settings: &Settings, judge: &JudgeSource) -> anyhow::Result<Arc<dyn Texts>> {
    Ok(match judge {
        JudgeSource::Plain(JudgeSettings::Gold { .. }) => Arc::new(PlaygroundWords),
        JudgeSource::Plain(JudgeSettings::Matrix { .. }) => {
            let folder = ModelFolder::open(&super::bandit(settings)?, None)?;
            // An arm is one token, and nothing ends it.
            Arc::new(Tokens::new(folder.tokenizer, Closing::WhenEnded))
        }
        JudgeSource::Model(opened) if opened.is_of_playground() => Arc::new(PlaygroundWords),
        JudgeSource::Model(opened) if opened.shares_tokens() => {
            let closing = Closing::of(opened.model.config());
            Arc::new(Tokens::new(opened.tokenizer(), closing))
        }
        JudgeSource::Ensemble { members, .. } => match members.iter().find(|m| m.reads_tokens()) {
            Some(member) => texts(settings, member)?,
            None => Arc::new(TextsAlone),
        },
        JudgeSource::Model(_)
        | JudgeSource::Plain(_)
        | JudgeSource::Encoder(..)
        | JudgeSource::Chat(_) => Arc::new(TextsAlone),
    })
}

/// The playground's words, of which every token is one.
struct PlaygroundWords;

impl PlaygroundWords {
    fn ids(text: &str) -> Result<Vec<u32>, String> {
        let vocabulary = Vocabulary::shared();
        let id = |word| {
            let unknown = || format!("{word:?} is not one of the playground's words");
            vocabulary.id(word).ok_or_else(unknown)
        };
        text.split_whitespace().map(id).collect()
    }
}

impl Texts for PlaygroundWords {
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
    fn a_post_becomes_the_prompt_that_the_policy_sees() {
        let post = playground::train_post(0, 3);
        let text = PromptText::Text(post.text());
        let read = PlaygroundWords.prompt(&text);
        assert_eq!(read, Ok((post.text(), post.prompt_ids())));
        let golden = post.golden(5);
        let words = Vocabulary::shared().text(&golden[..golden.len() - 1]);
        let response = |words, finish| PlaygroundWords.response(&text, &[], words, finish);
        let ended = response(&words, Finish::EndOfText);
        assert_eq!(ended, Ok(golden.clone()), "end-of-text included");
        let cut = response(&words, Finish::Length);
        assert_eq!(cut.as_deref(), Ok(&golden[..golden.len() - 1]));
        assert!(PlaygroundWords.has_ended(&golden));
        assert!(!PlaygroundWords.has_ended(&golden[..3]));
        let stranger = response("my xylophone", Finish::EndOfText);
        let told = "\"xylophone\" is not one of the playground's words";
        assert_eq!(stranger, Err(told.into()));
    }
}
