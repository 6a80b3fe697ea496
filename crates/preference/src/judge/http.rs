//! Chat models behind endpoints in the manner of OpenAI as judges.
//!
//! Each URL is a replica that answers one question at a time, several side by side. What is sent and how the
//! answer is read is any chat judge's; log-probabilities may come back or not.

use std::sync::Arc;

use futures_util::future::{BoxFuture, try_join_all};
use messages::JudgeVersion;
use serde::Deserialize;
use serde_json::{Value, json};
use settings::{ChatSettings, EndpointSettings};

use super::chat::{ChatQuestion, Said};
use super::endpoint::Endpoint;
use super::verdict_text::ScoredToken;
use crate::bench::{Answer, Judges, Question, Replica};
use crate::{JudgeError, PreferenceError};

/// One endpoint.
struct RemoteChat {
    settings: Arc<EndpointSettings>,
    question: Arc<ChatQuestion>,
    endpoint: Endpoint,
    version: JudgeVersion,
}

/// As much of a chat completion as is read.
#[derive(Deserialize)]
struct ChatCompletion {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    logprobs: Option<LogProbs>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Deserialize)]
struct LogProbs {
    #[serde(default)]
    content: Option<Vec<ScoredToken>>,
}

impl Judges {
    /// Chat models behind the settings' URLs, one replica each, asked as `chat` says.
    ///
    /// # Errors
    /// When the API key cannot be read or no client can be made.
    pub fn chat(settings: &EndpointSettings, chat: &ChatSettings) -> Result<Self, PreferenceError> {
        let settings = Arc::new(settings.clone());
        let question = Arc::new(ChatQuestion::new(chat));
        let version = question.version(&settings.model);
        let replica = |url: &String| {
            let endpoint = Endpoint::new(url, "/chat/completions", &settings.api_key_path)?;
            let judge = RemoteChat {
                settings: Arc::clone(&settings),
                question: Arc::clone(&question),
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
    fn request(&self, question: &Question) -> Value {
        let chat = &self.question.settings;
        let messages = self.question.dialogue(&question.comparison());
        let turn =
            |message: &messages::Message| json!({"role": message.role, "content": message.content});
        let mut request = json!({
            "model": self.settings.model,
            "messages": messages.iter().map(turn).collect::<Vec<_>>(),
            "max_tokens": chat.max_tokens,
            "temperature": 0,
        });
        if chat.logprobs {
            request["logprobs"] = true.into();
            request["top_logprobs"] = self.question.alternatives().into();
        }
        request
    }

    async fn answer(&self, question: &Question) -> Result<Answer, JudgeError> {
        let completion: ChatCompletion = self.endpoint.post(&self.request(question)).await?;
        let choice = completion.choices.into_iter().next();
        let choice = choice.ok_or_else(|| JudgeError::new("it answered without a choice"))?;
        let tokens = choice.logprobs.and_then(|logprobs| logprobs.content);
        let said = Said {
            text: choice.message.content.unwrap_or_default(),
            tokens: tokens.unwrap_or_default(),
        };
        Ok(Answer::new(self.question.verdict(&said), self.version))
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

    fn ask<'a>(&'a self, batch: &'a [Question]) -> BoxFuture<'a, Result<Vec<Answer>, JudgeError>> {
        let answers = batch.iter().map(|question| self.answer(question));
        Box::pin(try_join_all(answers))
    }
}

#[cfg(test)]
mod tests;
