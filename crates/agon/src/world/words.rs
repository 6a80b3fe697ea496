//! What texts from elsewhere are for the judge of the settings.

use std::path::Path;
use std::sync::Arc;

use messages::PromptText;
use model::ModelFolder;
use playground::{BOS, EOS, SEP, Vocabulary};
use preference::{Texts, TextsAlone, Tokens};
use settings::{JudgeSettings, Settings};

/// The words of the judge: the playground's, a bandit's, those of a model that judges; for judges that
/// read texts, none.
pub(crate) fn texts(settings: &Settings) -> anyhow::Result<Arc<dyn Texts>> {
    texts_of(settings, &settings.preference.judge)
}

fn texts_of(settings: &Settings, judge: &JudgeSettings) -> anyhow::Result<Arc<dyn Texts>> {
    Ok(match judge {
        JudgeSettings::Gold { .. } => Arc::new(PlaygroundWords),
        JudgeSettings::Matrix { .. } => {
            let folder = ModelFolder::open(&super::bandit(settings)?, None)?;
            // An arm is one token, and nothing ends it.
            Arc::new(Tokens::new(folder.tokenizer, Vec::new()))
        }
        JudgeSettings::BradleyTerry { path } | JudgeSettings::Pairwise { path } => {
            let own = Some(path.as_path()).filter(|path| !path.as_os_str().is_empty());
            match own.or(settings.model.path.as_deref()) {
                Some(path) => tokens(settings, path)?,
                None => Arc::new(PlaygroundWords),
            }
        }
        JudgeSettings::Ensemble { members, .. } => {
            let reads_tokens = |judge: &&JudgeSettings| {
                !matches!(
                    judge,
                    JudgeSettings::Rule { .. } | JudgeSettings::Encoder { .. }
                )
            };
            match members.iter().find(reads_tokens) {
                Some(member) => texts_of(settings, member)?,
                None => Arc::new(TextsAlone),
            }
        }
        JudgeSettings::Rule { .. }
        | JudgeSettings::Encoder { .. }
        | JudgeSettings::Http(_)
        | JudgeSettings::Service { .. } => Arc::new(TextsAlone),
    })
}

fn tokens(settings: &Settings, path: &Path) -> anyhow::Result<Arc<dyn Texts>> {
    let folder = ModelFolder::open(path, settings.model.chat_template.as_deref())?;
    Ok(Arc::new(Tokens::new(folder.tokenizer, folder.config.eos)))
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
