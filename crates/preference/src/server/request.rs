//! From the bytes of a request to questions, within the limits.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
use messages::{
    Completion, Finish, Pair, Prompt, PromptId, PromptText, Purpose, Release, Seed, WeightsVersion,
};
use serde_json::Value;
use settings::HttpServiceSettings;
use tokio::time::timeout;

use super::Refused;
use crate::Texts;
use crate::bench::Question;
use crate::wire::{AskedPair, PreferencesRequest};

/// Reads requests.
pub(super) struct Reader {
    limits: HttpServiceSettings,
    texts: Arc<dyn Texts>,
    /// How long a request may take to arrive.
    patience: Duration,
}

impl Reader {
    pub(super) fn new(
        limits: HttpServiceSettings,
        texts: Arc<dyn Texts>,
        patience: Duration,
    ) -> Self {
        Self {
            limits,
            texts,
            patience,
        }
    }

    /// What a request asks.
    pub(super) async fn read(&self, request: Request) -> Result<PreferencesRequest, Refused> {
        let body = self.body(request).await?;
        let asked = parse(&body)?;
        let (count, max) = (asked.pairs.len(), self.limits.max_pairs);
        if count == 0 {
            return Err(Refused::invalid(
                "pairs: there are none; ask about at least one",
            ));
        }
        if count > max {
            return Err(Refused::invalid(format!(
                "pairs: {count} are more than preference.http.max_pairs = {max}; ask in parts"
            )));
        }
        Ok(asked)
    }

    async fn body(&self, request: Request) -> Result<Bytes, Refused> {
        let max = self.limits.max_bytes;
        let refused = || {
            Refused::too_large(format!(
                "the request has more bytes than preference.http.max_bytes = {max}"
            ))
        };
        let told = request.headers().get(CONTENT_LENGTH);
        let told = told.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if told.is_some_and(|length| length > max) {
            return Err(refused());
        }
        match timeout(self.patience, to_bytes(request.into_body(), max)).await {
            Ok(body) => body.map_err(|_| refused()),
            Err(_elapsed) => Err(Refused::too_slow()),
        }
    }

    /// One question for every pair. Tokenising takes a while: it is done off the runtime's threads.
    pub(super) async fn questions(
        self: &Arc<Self>,
        pairs: Vec<AskedPair>,
    ) -> Result<Vec<Question>, Refused> {
        let reader = Arc::clone(self);
        let read = move || {
            let pairs = pairs.into_iter().enumerate();
            pairs.map(|(i, pair)| reader.question(i, pair)).collect()
        };
        let read = tokio::task::spawn_blocking(read).await;
        read.unwrap_or_else(|_| Err(Refused::invalid("pairs: they cannot be tokenised")))
    }

    fn question(&self, index: usize, asked: AskedPair) -> Result<Question, Refused> {
        let at = |field: &'static str| {
            move |reason: String| Refused::invalid(format!("pairs[{index}].{field}: {reason}"))
        };
        let prompt = PromptText::try_from(asked.prompt).map_err(at("prompt"))?;
        self.within(prompt_characters(&prompt))
            .map_err(at("prompt"))?;
        let (text, ids) = self
            .prompt(&prompt, asked.prompt_ids)
            .map_err(at("prompt"))?;
        let response = |text, given| self.completion((&prompt, &ids), text, given);
        let first = response(asked.first, asked.first_ids).map_err(at("first"))?;
        let second = response(asked.second, asked.second_ids).map_err(at("second"))?;
        let pair = Pair {
            prompt: of_text(index, text, ids),
            version: WeightsVersion::REFERENCE,
            completions: vec![first, second],
            actor: "http".into(),
        };
        Ok(Question::new(Arc::new(pair), 0, 1))
    }

    fn prompt(
        &self,
        prompt: &PromptText,
        given: Option<Vec<u32>>,
    ) -> Result<(String, Vec<u32>), String> {
        match (prompt, given) {
            (PromptText::Text(text), Some(ids)) => Ok((text.clone(), ids)),
            (prompt, given) => {
                let (text, made) = self.texts.prompt(prompt)?;
                Ok((text, given.unwrap_or(made)))
            }
        }
    }

    fn completion(
        &self,
        (prompt, prompt_ids): (&PromptText, &[u32]),
        text: String,
        given: Option<Vec<u32>>,
    ) -> Result<Completion, String> {
        self.within(text.chars().count())?;
        let (ids, has_ended) = match given {
            Some(ids) => {
                let has_ended = self.texts.has_ended(&ids);
                (ids, has_ended)
            }
            None if text.is_empty() => return Err("it is empty".into()),
            None => (self.texts.response(prompt, prompt_ids, &text)?, true),
        };
        Ok(Completion {
            ids,
            finish: if has_ended {
                Finish::EndOfText
            } else {
                Finish::Length
            },
            mixture_coef: 0.0,
            logp: Vec::new(),
            ref_logp: Vec::new(),
            behaviour_logp: Vec::new(),
            text,
        })
    }

    fn within(&self, characters: usize) -> Result<(), String> {
        let max = self.limits.max_characters;
        if characters <= max {
            return Ok(());
        }
        Err(format!(
            "{characters} characters are more than preference.http.max_characters = {max}"
        ))
    }
}

fn parse(body: &[u8]) -> Result<PreferencesRequest, Refused> {
    let json = &mut serde_json::Deserializer::from_slice(body);
    let asked = serde_path_to_error::deserialize(&mut *json);
    let asked = asked.map_err(|error| {
        let message = error.to_string();
        if error.inner().is_data() {
            Refused::invalid(message)
        } else {
            Refused::malformed(message)
        }
    })?;
    json.end()
        .map_err(|error| Refused::malformed(error.to_string()))?;
    Ok(asked)
}

fn prompt_characters(prompt: &PromptText) -> usize {
    let of_value = |value: &Value| match value {
        Value::String(text) => text.chars().count(),
        other => other.to_string().chars().count(),
    };
    match prompt {
        PromptText::Text(text) => text.chars().count(),
        PromptText::Dialogue(dialogue) => dialogue
            .messages
            .iter()
            .map(|turn| of_value(&turn.content))
            .sum(),
    }
}

fn of_text(index: usize, text: String, ids: Vec<u32>) -> Prompt {
    let id = PromptId(index as u64);
    Prompt {
        id,
        release: Release::single(id),
        purpose: Purpose::Evaluate,
        version: WeightsVersion::REFERENCE,
        seed: Seed(0),
        ids,
        text,
        dialogue: None,
        golden: None,
        answer: None,
    }
}
