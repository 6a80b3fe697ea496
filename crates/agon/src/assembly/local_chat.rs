//! A chat model of mistral.rs as a judge, loaded once for all replicas.

use std::{path::Path, sync::Arc, time::Duration};

use messages::{Dialogue, PromptText};
use mistral::{Chat, MistralError, ModelFiles};
use model::SamplingSettings;
use preference::{
    ChatJudge, ChatModel, ChatReply, ChatRequest, Judge, JudgeError, ReplySettings, ScoredToken,
    TopLogprob,
};
use settings::{ChatSettings, LocalChatSettings, PreferenceSettings, RubricSettings};

/// A loaded chat model and the settings of its judge.
pub(crate) struct LocalChat {
    chat: Chat,
    version: u64,
    settings: ChatSettings,
    rubric: RubricSettings,
}

/// The model's files that the settings name.
pub(crate) fn source(settings: &LocalChatSettings) -> ModelFiles {
    let non_empty = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    ModelFiles {
        path: settings.path.clone(),
        tokenizer: non_empty(&settings.tokenizer_path),
        chat_template: non_empty(&settings.chat_template),
        isq: (!settings.isq.is_empty()).then(|| settings.isq.clone()),
    }
}

impl LocalChat {
    /// Loads the model; its version is a digest of its files.
    pub(crate) fn open(
        model: &LocalChatSettings,
        settings: &PreferenceSettings,
    ) -> Result<Self, MistralError> {
        let source = source(model);
        let timeout = Duration::from_secs_f64(settings.timeout_seconds);
        let chat = Chat::open(&source, timeout)?;
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
            settings: settings.chat.clone(),
            rubric: model.rubric(),
        })
    }

    /// Digest of the model's files.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// A replica of the judge, which shares the model.
    pub(crate) fn judge(self: &Arc<Self>) -> Box<dyn Judge> {
        let client = Box::new(LocalChatClient(Arc::clone(self)));
        Box::new(ChatJudge::new(client, &self.settings, &self.rubric))
    }
}

/// Client of the shared model.
struct LocalChatClient(Arc<LocalChat>);

impl ChatModel for LocalChatClient {
    fn name(&self) -> &str {
        "mistral"
    }

    fn version(&self) -> u64 {
        self.0.version
    }

    fn reply(
        &mut self,
        requests: &[ChatRequest],
        settings: ReplySettings,
    ) -> Result<Vec<ChatReply>, JudgeError> {
        let plain = SamplingSettings::plain(settings.max_tokens);
        let sampling = if settings.temperature > 0.0 {
            SamplingSettings {
                temperature: settings.temperature,
                ..plain
            }
        } else {
            SamplingSettings { top_k: 1, ..plain }
        };
        let answer = |request: &ChatRequest| {
            let prompt = PromptText::Dialogue(Dialogue::new(request.messages.clone()));
            let chat = &self.0.chat;
            let answer = chat.answer(&prompt, &sampling, request.seed, settings.top_logprobs);
            answer.map(reply).map_err(|error| match error {
                MistralError::Prompt { .. } => JudgeError::permanent(error.to_string()),
                other => JudgeError::new(other.to_string()),
            })
        };
        requests.iter().map(answer).collect()
    }
}

fn reply(answer: mistral::GeneratedText) -> ChatReply {
    let top_logprob = |candidate: mistral::CandidateToken| TopLogprob {
        token: candidate.text,
        logprob: candidate.logprob,
    };
    let token = |token: mistral::GeneratedToken| ScoredToken {
        token: token.text,
        logprob: token.logprob,
        top_logprobs: token.top_logprobs.into_iter().map(top_logprob).collect(),
    };
    ChatReply {
        text: answer.text,
        tokens: answer.tokens.into_iter().map(token).collect(),
    }
}
