//! A chat model of this process that judges, loaded once for all replicas.

use std::{path::Path, sync::Arc, time::Duration};

use messages::{Dialogue, Message, PromptText, Seed};
use mistral::{Chat, MistralError, Source};
use model::SamplingSettings;
use preference::{Alternative, ChatJudge, ChatModel, Judge, JudgeError, Said, ScoredToken};
use settings::{ChatSettings, LocalChatSettings, PreferenceSettings};

/// Loaded, with what it is asked.
pub(crate) struct LocalChat {
    chat: Chat,
    version: u64,
    asked: ChatSettings,
}

/// The files that the settings name.
pub(crate) fn source(settings: &LocalChatSettings) -> Source {
    let named = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    Source {
        path: settings.path.clone(),
        tokenizer: named(&settings.tokenizer_path),
        chat_template: named(&settings.chat_template),
        isq: (!settings.isq.is_empty()).then(|| settings.isq.clone()),
    }
}

impl LocalChat {
    /// Loads it.
    pub(crate) fn open(
        model: &LocalChatSettings,
        settings: &PreferenceSettings,
    ) -> Result<Self, MistralError> {
        let source = source(model);
        let patience = Duration::from_secs_f64(settings.timeout_seconds);
        let chat = Chat::open(&source, patience)?;
        if !chat.has_chat_template() {
            return Err(MistralError::NoTemplate {
                path: source.path,
                setting: "preference.judge.chat_template",
            });
        }
        let mut version = [0; 8];
        version.copy_from_slice(&source.digest()?.0[..8]);
        Ok(Self {
            chat,
            version: u64::from_le_bytes(version),
            asked: settings.chat.clone(),
        })
    }

    /// A judge that asks it.
    pub(crate) fn judge(self: &Arc<Self>) -> Box<dyn Judge> {
        let asking = Box::new(Asking(Arc::clone(self)));
        Box::new(ChatJudge::new(asking, &self.asked))
    }
}

/// One of those who ask the model.
struct Asking(Arc<LocalChat>);

impl ChatModel for Asking {
    fn name(&self) -> &str {
        "mistral"
    }

    fn version(&self) -> u64 {
        self.0.version
    }

    fn answer(
        &mut self,
        dialogues: &[Vec<Message>],
        max_tokens: usize,
        alternatives: usize,
    ) -> Result<Vec<Said>, JudgeError> {
        let likeliest = SamplingSettings {
            top_k: 1,
            ..SamplingSettings::plain(max_tokens)
        };
        let answer = |dialogue: &Vec<Message>| {
            let prompt = PromptText::Dialogue(Dialogue::new(dialogue.clone()));
            let chat = &self.0.chat;
            let answer = chat.answer(&prompt, (&likeliest, Seed(0)), alternatives);
            answer.map(said).map_err(|error| match error {
                MistralError::Prompt { .. } => JudgeError::permanent(error.to_string()),
                other => JudgeError::new(other.to_string()),
            })
        };
        dialogues.iter().map(answer).collect()
    }
}

fn said(answer: mistral::Answer) -> Said {
    let alternative = |likely: mistral::Alternative| Alternative {
        token: likely.text,
        logprob: likely.logprob,
    };
    let token = |token: mistral::SaidToken| ScoredToken {
        token: token.text,
        logprob: token.logprob,
        top_logprobs: token.likeliest.into_iter().map(alternative).collect(),
    };
    Said {
        text: answer.text,
        tokens: answer.tokens.into_iter().map(token).collect(),
    }
}
