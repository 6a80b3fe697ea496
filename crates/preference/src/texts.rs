//! How texts that come from elsewhere become what judges read: some read texts, some read tokens.

use messages::{Message, PromptText};
use model::Tokenizer;
use serde_json::Value;

/// The words that a judge's tokens stand for.
pub trait Texts: Send + Sync {
    /// A prompt as text and as ids, special tokens included.
    ///
    /// # Errors
    /// When it cannot be written so: a lowercase fragment that says why.
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String>;

    /// The ids of a whole response to `prompt`, whose own ids are `prompt_ids`; end-of-text included.
    ///
    /// # Errors
    /// As [`Self::prompt`].
    fn response(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        response: &str,
    ) -> Result<Vec<u32>, String>;

    /// Whether a response of these ids ended by itself.
    fn has_ended(&self, ids: &[u32]) -> bool;
}

/// For judges that read texts: there are no ids.
#[derive(Debug, Clone, Copy)]
pub struct TextsAlone;

/// For judges that read the tokens of a model.
pub struct Tokens {
    tokenizer: Tokenizer,
}

impl Tokens {
    /// The tokens of `tokenizer`; a response is closed with the one that ends it.
    #[must_use]
    pub fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer }
    }
}

impl Texts for Tokens {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        let encoded = self.tokenizer.encode_prompt(prompt);
        let ids = encoded.map_err(|error| error.to_string())?;
        let text = match prompt {
            PromptText::Text(text) => text.clone(),
            PromptText::Dialogue(_) => self.tokenizer.decode(&ids),
        };
        Ok((text, ids))
    }

    fn response(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        response: &str,
    ) -> Result<Vec<u32>, String> {
        let encoded = self.tokenizer.encode_closed(prompt, prompt_ids, response);
        encoded.map_err(|error| error.to_string())
    }

    fn has_ended(&self, ids: &[u32]) -> bool {
        let stops = self.tokenizer.stops();
        ids.last().is_some_and(|&last| stops.contains(last))
    }
}

impl Texts for TextsAlone {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        let text = match prompt {
            PromptText::Text(text) => text.clone(),
            PromptText::Dialogue(dialogue) => dialogue
                .messages
                .iter()
                .map(turn)
                .collect::<Vec<_>>()
                .join("\n\n"),
        };
        Ok((text, Vec::new()))
    }

    fn response(&self, _: &PromptText, _: &[u32], _: &str) -> Result<Vec<u32>, String> {
        Ok(Vec::new())
    }

    fn has_ended(&self, _: &[u32]) -> bool {
        true
    }
}

/// A turn as people read it.
fn turn(message: &Message) -> String {
    let content = match &message.content {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    format!("{}: {content}", message.role)
}

#[cfg(test)]
mod tests {
    use messages::Dialogue;

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
