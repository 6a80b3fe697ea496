//! Chat models behind OpenAI-compatible endpoints as judges.
//!
//! Each URL is a replica that accepts single requests, several concurrently. The prompt and the parsing are shared with
//! local chat judges; log-probabilities are optional. The version of a verdict is of the settings; the model behind the
//! URLs is watched by what it calls itself.

mod completion;

use std::sync::Arc;

use futures_util::future::{BoxFuture, try_join_all};
use messages::JudgeVersion;
use serde_json::{Value, json};
use settings::{ChatSettings, EndpointSettings};

use crate::error::{JudgeError, PreferenceError};
use crate::judge::Verdict;
use crate::judge::chat::ChatPrompt;
use crate::judge::endpoint::Endpoint;
use crate::judge::identity::IdentityMonitor;
use crate::pool::{ComparisonRequest, JudgeReplicas, Replica, VersionedVerdict};
use completion::{ChatCompletion, Shortcoming};

/// An endpoint.
struct RemoteChat {
    settings: Arc<EndpointSettings>,
    prompt: Arc<ChatPrompt>,
    endpoint: Endpoint,
    identity: Arc<IdentityMonitor>,
    version: JudgeVersion,
}

impl JudgeReplicas {
    /// Chat models at the URLs of the settings, one replica each, prompted as `chat` says.
    ///
    /// # Errors
    /// When the API key cannot be read or a URL is not valid.
    pub fn chat(settings: &EndpointSettings, chat: &ChatSettings) -> Result<Self, PreferenceError> {
        let settings = Arc::new(settings.clone());
        let prompt = Arc::new(ChatPrompt::new(chat));
        let version = prompt.version(&settings.model);
        let identity = Arc::new(IdentityMonitor::new("http"));
        let replica = |url: &String| {
            let endpoint = Endpoint::new(url, "/chat/completions", &settings.api_key_path)?;
            let judge = RemoteChat {
                settings: Arc::clone(&settings),
                prompt: Arc::clone(&prompt),
                endpoint,
                identity: Arc::clone(&identity),
                version,
            };
            Ok(Arc::new(judge) as Arc<dyn Replica>)
        };
        let replicas = settings.urls.iter().map(replica);
        Ok(Self {
            name: "http".into(),
            version: Some(version),
            is_antisymmetric: false,
            digest: None,
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
        let body: Value = self.endpoint.post(&self.body(request)).await?;
        let completion = ChatCompletion::read(&body)?;
        if let Some(identity) = completion.identity {
            self.identity.observe(self.endpoint.url(), identity);
        }
        let verdict = match (
            self.prompt.verdict(&completion.reply),
            completion.shortcoming,
        ) {
            (Verdict::Abstained { reason }, Some(shortcoming)) => Verdict::Abstained {
                reason: self.explain(&reason, &shortcoming),
            },
            (verdict, _) => verdict,
        };
        Ok(VersionedVerdict::new(verdict, self.version))
    }

    fn explain(&self, reason: &str, shortcoming: &Shortcoming) -> String {
        let max_tokens = self.prompt.settings.max_tokens;
        match shortcoming {
            Shortcoming::Truncated => {
                format!("{reason}: it was cut off, raise preference.chat.max_tokens = {max_tokens}")
            }
            Shortcoming::Refused(words) => format!("{reason}: the model refused ({words})"),
        }
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

    fn revision(&self) -> u64 {
        self.identity.revision()
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
