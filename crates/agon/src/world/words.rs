//! What texts from elsewhere are for the judge of the settings.

use std::sync::Arc;

use messages::PromptText;
use model::ModelFolder;
use playground::{BOS, EOS, SEP, Vocabulary};
use preference::{Texts, TextsAlone, Tokens};
use settings::{JudgeSettings, PromptsSettings, Settings};

use super::JudgeSource;

/// The words of the judge: the playground's, a bandit's, those of a model that judges; for judges that
/// read texts, none.
pub(crate) fn texts(settings: &Settings, judge: &JudgeSource) -> anyhow::Result<Arc<dyn Texts>> {
    Ok(match judge {
        JudgeSource::Plain(JudgeSettings::Gold { .. }) => Arc::new(PlaygroundWords),
        JudgeSource::Plain(JudgeSettings::Matrix { .. }) => {
            let folder = ModelFolder::open(&super::bandit(settings)?, None)?;
            Arc::new(Tokens::new(folder.tokenizer))
        }
        JudgeSource::Model(_) if matches!(settings.prompts, PromptsSettings::Playground { .. }) => {
            Arc::new(PlaygroundWords)
        }
        JudgeSource::Model(opened) => Arc::new(Tokens::new(opened.tokenizer())),
        JudgeSource::Ensemble { members, .. } => match members.iter().find(|m| m.reads_tokens()) {
            Some(member) => texts(settings, member)?,
            None => Arc::new(TextsAlone),
        },
        JudgeSource::Plain(_) | JudgeSource::Encoder(..) | JudgeSource::Chat(_) => {
            Arc::new(TextsAlone)
        }
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

    fn response(&self, _: &PromptText, _: &[u32], response: &str) -> Result<Vec<u32>, String> {
        let mut ids = Self::ids(response)?;
        ids.push(EOS);
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
        let response = PlaygroundWords.response(&text, &[], &words);
        assert_eq!(response, Ok(golden.clone()), "end-of-text included");
        assert!(PlaygroundWords.has_ended(&golden));
        assert!(!PlaygroundWords.has_ended(&golden[..3]));
        let stranger = PlaygroundWords.response(&text, &[], "my xylophone");
        let told = "\"xylophone\" is not one of the playground's words";
        assert_eq!(stranger, Err(told.into()));
    }
}
