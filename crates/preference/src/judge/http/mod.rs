//! Chat models behind OpenAI-compatible endpoints as judges.
//!
//! Each URL is a replica that accepts single requests, several concurrently. The prompt and the parsing are shared with
//! local chat judges; log-probabilities are optional. The version of a verdict is of the settings; a change of the
//! model behind the URLs is detected from the `model` of its responses.

mod completion;

use std::sync::Arc;

use futures_util::future::{BoxFuture, try_join_all};
use messages::JudgeVersion;
use serde_json::{Value, json};
use settings::{ChatSettings, EndpointSettings};

use crate::error::{JudgeError, PreferenceError};
use crate::judge::ScoredVerdict;
use crate::judge::chat::{ChatPrompt, ChatRequest};
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
        let prompt = Arc::new(ChatPrompt::new(chat, &settings.rubric()));
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
            is_antisymmetric: prompt.is_pointwise(),
            digest: None,
            replicas: replicas.collect::<Result<_, PreferenceError>>()?,
        })
    }
}

impl RemoteChat {
    fn body(&self, request: &ChatRequest) -> Value {
        let settings = self.prompt.reply_settings();
        let turn = |message: &messages::Message| json!({"role": message.role(), "content": message.content()});
        let mut body = json!({
            "model": self.settings.model,
            "messages": request.messages.iter().map(turn).collect::<Vec<_>>(),
            "max_tokens": settings.max_tokens,
            "temperature": 0,
        });
        if settings.temperature > 0.0 {
            body["temperature"] = settings.temperature.into();
            // Servers read it as a signed number of 32 or 64 bits.
            body["seed"] = (request.seed.0 >> 33).into();
        }
        if settings.top_logprobs > 0 {
            body["logprobs"] = true.into();
            body["top_logprobs"] = settings.top_logprobs.into();
        }
        body
    }

    async fn verdict(&self, request: &ComparisonRequest) -> Result<VersionedVerdict, JudgeError> {
        let requests = self.prompt.requests(&request.comparison());
        let opinions = requests.iter().map(|request| self.opinion(request));
        let opinions = try_join_all(opinions).await?;
        let ScoredVerdict { verdict, scores } = self.prompt.verdict(&opinions);
        Ok(VersionedVerdict {
            verdict,
            version: self.version,
            scores,
        })
    }

    /// Verdict in the reply to one request, or the reason why there is none.
    async fn opinion(&self, request: &ChatRequest) -> Result<Result<f64, String>, JudgeError> {
        let body: Value = self.endpoint.post(&self.body(request)).await?;
        let completion = ChatCompletion::read(&body)?;
        if let Some(identity) = completion.identity {
            self.identity.observe(self.endpoint.url(), identity);
        }
        let opinion = self.prompt.opinion(&completion.reply);
        Ok(opinion.map_err(|reason| match completion.shortcoming {
            Some(shortcoming) => self.explain(&reason, &shortcoming),
            None => reason,
        }))
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
