//! Chat models behind OpenAI-compatible endpoints as judges.
//!
//! Each URL is a replica that accepts single requests, several concurrently. The prompt and the parsing are shared with
//! local chat judges; log-probabilities are optional.

use std::sync::Arc;

use futures_util::future::{BoxFuture, try_join_all};
use messages::JudgeVersion;
use serde::Deserialize;
use serde_json::{Value, json};
use settings::{ChatSettings, EndpointSettings};

use crate::error::{JudgeError, PreferenceError};
use crate::judge::chat::{ChatPrompt, ChatReply};
use crate::judge::endpoint::Endpoint;
use crate::judge::verdict_parser::ScoredToken;
use crate::pool::{ComparisonRequest, JudgeReplicas, Replica, VersionedVerdict};

/// An endpoint.
struct RemoteChat {
    settings: Arc<EndpointSettings>,
    prompt: Arc<ChatPrompt>,
    endpoint: Endpoint,
    version: JudgeVersion,
}

/// The parsed part of a chat completion.
#[derive(Deserialize)]
struct ChatCompletion {
    choices: Vec<ChatChoice>,
}

#[derive(Deserialize)]
struct ChatChoice {
    message: ChatMessage,
    #[serde(default)]
    logprobs: Option<ChatLogprobs>,
}

#[derive(Deserialize)]
struct ChatMessage {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Deserialize)]
struct ChatLogprobs {
    #[serde(default)]
    content: Option<Vec<ScoredToken>>,
}

impl JudgeReplicas {
    /// Chat models at the URLs of the settings, one replica each, prompted as `chat` says.
    ///
    /// # Errors
    /// When the API key cannot be read or a client cannot be built.
    pub fn chat(settings: &EndpointSettings, chat: &ChatSettings) -> Result<Self, PreferenceError> {
        let settings = Arc::new(settings.clone());
        let prompt = Arc::new(ChatPrompt::new(chat));
        let version = prompt.version(&settings.model);
        let replica = |url: &String| {
            let endpoint = Endpoint::new(url, "/chat/completions", &settings.api_key_path)?;
            let judge = RemoteChat {
                settings: Arc::clone(&settings),
                prompt: Arc::clone(&prompt),
                endpoint,
                version,
            };
            Ok(Arc::new(judge) as Arc<dyn Replica>)
        };
        let replicas = settings.urls.iter().map(replica);
        Ok(Self {
            name: "http".into(),
            version: Some(version),
            is_antisymmetric: false,
            replicas: replicas.collect::<Result<_, PreferenceError>>()?,
        })
    }
}

impl RemoteChat {
    fn body(&self, request: &ComparisonRequest) -> Value {
        let chat = &self.prompt.settings;
        let messages = self.prompt.dialogue(&request.comparison());
        let turn =
            |message: &messages::Message| json!({"role": message.role, "content": message.content});
        let mut body = json!({
            "model": self.settings.model,
            "messages": messages.iter().map(turn).collect::<Vec<_>>(),
            "max_tokens": chat.max_tokens,
            "temperature": 0,
        });
        if chat.logprobs {
            body["logprobs"] = true.into();
            body["top_logprobs"] = self.prompt.top_logprobs().into();
        }
        body
    }

    async fn verdict(&self, request: &ComparisonRequest) -> Result<VersionedVerdict, JudgeError> {
        let completion: ChatCompletion = self.endpoint.post(&self.body(request)).await?;
        let choice = completion.choices.into_iter().next();
        let choice = choice.ok_or_else(|| JudgeError::new("its response has no choice"))?;
        let tokens = choice.logprobs.and_then(|logprobs| logprobs.content);
        let reply = ChatReply {
            text: choice.message.content.unwrap_or_default(),
            tokens: tokens.unwrap_or_default(),
        };
        Ok(VersionedVerdict::new(
            self.prompt.verdict(&reply),
            self.version,
        ))
    }
}

impl Replica for RemoteChat {
    fn name(&self) -> &str {
        self.endpoint.url()
    }

    fn concurrency(&self) -> usize {
        self.settings.concurrency
    }

    fn max_batch(&self) -> usize {
        1
    }

    fn judge<'a>(
        &'a self,
        batch: &'a [ComparisonRequest],
    ) -> BoxFuture<'a, Result<Vec<VersionedVerdict>, JudgeError>> {
        let verdicts = batch.iter().map(|request| self.verdict(request));
        Box::pin(try_join_all(verdicts))
    }
}

#[cfg(test)]
mod tests;
