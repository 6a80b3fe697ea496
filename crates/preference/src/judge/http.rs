//! Chat models behind endpoints in the manner of OpenAI as judges.
//!
//! Each URL is a replica that answers one question at a time, several side by side. What is sent is the
//! template with the texts in it; what comes back is a verdict in words, with log-probabilities or
//! without.

use std::sync::Arc;

use futures_util::future::{BoxFuture, try_join_all};
use messages::{Digest, JudgeVersion};
use serde::Deserialize;
use serde_json::{Value, json};
use settings::ChatJudgeSettings;

use super::endpoint::Endpoint;
use super::verdict_text::{ScoredToken, VerdictWords};
use crate::bench::{Answer, Judges, Question, Replica};
use crate::{JudgeError, PreferenceError, Verdict};

/// How many likeliest tokens are asked for: the verdicts and some more, as few as every server grants.
const TOP_LOGPROBS: usize = 5;

/// One endpoint.
struct ChatJudge {
    settings: Arc<ChatJudgeSettings>,
    words: Arc<VerdictWords>,
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
    message: Said,
    #[serde(default)]
    logprobs: Option<LogProbs>,
}

#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Deserialize)]
struct LogProbs {
    #[serde(default)]
    content: Option<Vec<ScoredToken>>,
}

impl Judges {
    /// Chat models behind the settings' URLs, one replica each.
    ///
    /// # Errors
    /// When the API key cannot be read or no client can be made.
    pub fn chat(settings: &ChatJudgeSettings) -> Result<Self, PreferenceError> {
        let settings = Arc::new(settings.clone());
        let words = Arc::new(VerdictWords::new(&settings));
        let version = version(&settings);
        let replica = |url: &String| {
            let endpoint = Endpoint::new(url, "/chat/completions", &settings.api_key_path)?;
            let judge = ChatJudge {
                settings: Arc::clone(&settings),
                words: Arc::clone(&words),
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

/// Whatever changes what a model is asked, or how its answer is read, is another version.
fn version(settings: &ChatJudgeSettings) -> JudgeVersion {
    let asked = json!([
        settings.model,
        settings.system,
        settings.template,
        settings.first_verdict,
        settings.second_verdict,
        settings.tie_verdict,
        settings.logprobs,
        settings.max_tokens,
    ]);
    let Digest(digest) = Digest::of(asked.to_string().as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    JudgeVersion(u64::from_le_bytes(first))
}

impl ChatJudge {
    fn request(&self, question: &Question) -> Value {
        let settings = &self.settings;
        let comparison = question.comparison();
        let asked = fill(
            &settings.template,
            &[
                ("{prompt}", &comparison.prompt.text),
                ("{first}", &comparison.first.text),
                ("{second}", &comparison.second.text),
            ],
        );
        let system = (!settings.system.is_empty())
            .then(|| json!({"role": "system", "content": settings.system}));
        let messages: Vec<_> = system
            .into_iter()
            .chain([json!({"role": "user", "content": asked})])
            .collect();
        let mut request = json!({
            "model": settings.model,
            "messages": messages,
            "max_tokens": settings.max_tokens,
            "temperature": 0,
        });
        if settings.logprobs {
            request["logprobs"] = true.into();
            request["top_logprobs"] = TOP_LOGPROBS.into();
        }
        request
    }

    async fn answer(&self, question: &Question) -> Result<Answer, JudgeError> {
        let completion: ChatCompletion = self.endpoint.post(&self.request(question)).await?;
        let choice = completion.choices.into_iter().next();
        let choice = choice.ok_or_else(|| JudgeError::new("it answered without a choice"))?;
        Ok(Answer {
            verdict: self.verdict(choice),
            version: self.version,
        })
    }

    fn verdict(&self, choice: Choice) -> Verdict {
        let text = choice.message.content.unwrap_or_default();
        let tokens = choice.logprobs.and_then(|logprobs| logprobs.content);
        let tokens = tokens.filter(|_| self.settings.logprobs);
        self.words.read(&text, &tokens.unwrap_or_default())
    }
}

impl Replica for ChatJudge {
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

/// The template with every name replaced by its text. What a text says is never replaced again.
fn fill(template: &str, texts: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    let next = |rest: &str| {
        let found = texts
            .iter()
            .filter_map(|&(name, text)| Some((rest.find(name)?, name, text)));
        found.min_by_key(|&(place, ..)| place)
    };
    while let Some((place, name, text)) = next(rest) {
        filled.push_str(&rest[..place]);
        filled.push_str(text);
        rest = &rest[place + name.len()..];
    }
    filled + rest
}

#[cfg(test)]
pub(super) mod tests;
