//! How texts that come from elsewhere become what judges read: some read texts, some read tokens.

use messages::{Finish, PromptText};
use model::{Pooling, RewardConfig, Tokenizer};

/// The tokens that a judge reads for texts.
pub trait Texts: Send + Sync {
    /// A prompt as text and as ids, special tokens included.
    ///
    /// # Errors
    /// When it cannot be written so: a lowercase fragment that says why.
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String>;

    /// The ids of a response to `prompt`, whose own ids are `prompt_ids`; end-of-text included when it
    /// ended by itself.
    ///
    /// # Errors
    /// As [`Self::prompt`].
    fn response(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        response: &str,
        finish: Finish,
    ) -> Result<Vec<u32>, String>;

    /// Whether a response of these ids ended by itself.
    fn has_ended(&self, ids: &[u32]) -> bool;
}

/// For judges that read texts: there are no ids.
#[derive(Debug, Clone, Copy)]
pub struct TextsAlone;

/// Which responses are closed with the token that ends one, when texts become tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// Those that ended by themselves.
    WhenEnded,
    /// All: the score is read at that token, and a model was trained to be read nowhere else.
    Always,
}

impl Closing {
    /// What a preference model of this kind needs. One that reads its score at the last token, as the
    /// classifiers of transformers do, was trained on closed turns alone, and `apply_chat_template` closes a turn
    /// whether or not it was cut off; one that pools a response reads what there is.
    #[must_use]
    pub fn of(config: RewardConfig) -> Self {
        match config.pooling {
            Pooling::Last => Self::Always,
            Pooling::Mean | Pooling::Sum => Self::WhenEnded,
        }
    }

    /// Whether a response that ended so is closed.
    pub(crate) fn closes(self, finish: Finish) -> bool {
        self == Self::Always || finish == Finish::EndOfText
    }
}

/// For judges that read the tokens of a model.
pub struct Tokens {
    tokenizer: Tokenizer,
    closing: Closing,
}

impl Tokens {
    /// The tokens of `tokenizer`; a response is closed with the one that ends it where `closing` says.
    #[must_use]
    pub fn new(tokenizer: Tokenizer, closing: Closing) -> Self {
        Self { tokenizer, closing }
    }
}

/// The prompt as a model with this tokenizer can read it: without a chat template a dialogue is its
/// transcript, and the response follows as a turn of its own.
pub(crate) fn readable(tokenizer: &Tokenizer, prompt: PromptText) -> PromptText {
    match prompt {
        PromptText::Dialogue(dialogue) if !tokenizer.has_chat_template() => {
            let seam = match dialogue.continues_final_message() {
                true => "",
                false => "\n\n",
            };
            PromptText::Text(dialogue.transcript() + seam)
        }
        prompt => prompt,
    }
}

impl Texts for Tokens {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        let text = transcript(prompt);
        let prompt = readable(&self.tokenizer, prompt.clone());
        let ids = self.tokenizer.encode_prompt(&prompt);
        Ok((text, ids.map_err(|error| error.to_string())?))
    }

    fn response(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        response: &str,
        finish: Finish,
    ) -> Result<Vec<u32>, String> {
        let prompt = readable(&self.tokenizer, prompt.clone());
        let encoded = match self.closing.closes(finish) {
            true => self.tokenizer.encode_closed(&prompt, prompt_ids, response),
            false => self
                .tokenizer
                .encode_completion(&prompt, prompt_ids, response),
        };
        encoded.map_err(|error| error.to_string())
    }

    fn has_ended(&self, ids: &[u32]) -> bool {
        let stops = self.tokenizer.stops();
        ids.last().is_some_and(|&last| stops.contains(last))
    }
}

impl Texts for TextsAlone {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        Ok((transcript(prompt), Vec::new()))
    }

    fn response(&self, _: &PromptText, _: &[u32], _: &str, _: Finish) -> Result<Vec<u32>, String> {
        Ok(Vec::new())
    }

    fn has_ended(&self, _: &[u32]) -> bool {
        true
    }
}

/// A prompt as people read it.
fn transcript(prompt: &PromptText) -> String {
    match prompt {
        PromptText::Text(text) => text.clone(),
        PromptText::Dialogue(dialogue) => dialogue.transcript(),
    }
}

#[cfg(test)]
mod tests {
    use messages::{Dialogue, Message};

    use super::*;

    #[test]
    fn a_dialogue_is_written_turn_by_turn_for_judges_that_read_texts() {
        let dialogue = PromptText::Dialogue(Dialogue::new(vec![
            Message::new("system", "Be kind."),
            Message::new("user", "Hi"),
        ]));
        let plain = PromptText::Text("Hi".into());
        for (prompt, expected) in [(dialogue, "system: Be kind.\n\nuser: Hi"), (plain, "Hi")] {
            assert_eq!(TextsAlone.prompt(&prompt), Ok((expected.into(), vec![])));
        }
        assert!(TextsAlone.has_ended(&[]));
    }
}
