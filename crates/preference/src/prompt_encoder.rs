//! Encoding of external prompts and responses for a judge, which reads either texts or tokens.

use messages::{Finish, PromptText};
use model::{Pooling, RewardConfig, Tokenizer};

/// Encodes texts as the judge reads them.
pub trait PromptEncoder: Send + Sync {
    /// Text and token ids of a prompt, special tokens included.
    ///
    /// # Errors
    /// When it cannot be encoded, with a lowercase reason.
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String>;

    /// Token ids of a response to `prompt`, whose ids are `prompt_ids`; with end-of-text if it finished with it.
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

    /// Whether a response with these ids finished with end-of-text.
    fn has_ended(&self, ids: &[u32]) -> bool;
}

/// Encoder for judges that read texts: produces no ids.
#[derive(Debug, Clone, Copy)]
pub struct NoEncoding;

/// Rule for appending end-of-text to the tokens of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EosPolicy {
    /// If the response finished with it.
    WhenFinished,
    /// Always: the model was trained to be scored at that token.
    Always,
}

impl EosPolicy {
    /// Policy for a preference model. With last-token pooling, as in transformers' sequence classifiers, it was trained
    /// on complete turns, since `apply_chat_template` ends every turn; a model that pools over a response reads any
    /// text.
    #[must_use]
    pub fn of(config: RewardConfig) -> Self {
        match config.pooling {
            Pooling::Last => Self::Always,
            Pooling::Mean | Pooling::Sum => Self::WhenFinished,
        }
    }

    /// Whether end-of-text is appended to a response that finished like this.
    pub(crate) fn appends_eos(self, finish: Finish) -> bool {
        self == Self::Always || finish == Finish::EndOfText
    }
}

/// Encoder for judges that read the tokens of a model.
pub struct TokenEncoder {
    tokenizer: Tokenizer,
    eos_policy: EosPolicy,
}

impl TokenEncoder {
    /// An encoder with `tokenizer` that appends end-of-text as `eos_policy` says.
    #[must_use]
    pub fn new(tokenizer: Tokenizer, eos_policy: EosPolicy) -> Self {
        Self {
            tokenizer,
            eos_policy,
        }
    }
}

/// The prompt, with a dialogue replaced by its plain transcript if the tokenizer has no chat template. The response
/// then follows as another turn.
pub(crate) fn plain_if_no_template(tokenizer: &Tokenizer, prompt: PromptText) -> PromptText {
    match prompt {
        PromptText::Dialogue(dialogue) if !tokenizer.has_chat_template() => {
            let separator = match dialogue.continues_final_message() {
                true => "",
                false => "\n\n",
            };
            PromptText::Text(dialogue.transcript() + separator)
        }
        prompt => prompt,
    }
}

impl PromptEncoder for TokenEncoder {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        let text = transcript(prompt);
        let prompt = plain_if_no_template(&self.tokenizer, prompt.clone());
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
        let prompt = plain_if_no_template(&self.tokenizer, prompt.clone());
        let encoded = match self.eos_policy.appends_eos(finish) {
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

impl PromptEncoder for NoEncoding {
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

/// Plain text of a prompt.
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
    fn no_encoding_renders_dialogues_turn_by_turn() {
        let dialogue = PromptText::Dialogue(Dialogue::new(vec![
            Message::new("system", "Be kind."),
            Message::new("user", "Hi"),
        ]));
        let plain = PromptText::Text("Hi".into());
        for (prompt, expected) in [(dialogue, "system: Be kind.\n\nuser: Hi"), (plain, "Hi")] {
            assert_eq!(NoEncoding.prompt(&prompt), Ok((expected.into(), vec![])));
        }
        assert!(NoEncoding.has_ended(&[]));
    }
}
