//! Conversion of HTTP requests to comparisons, within the configured limits.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use messages::{
    Completion, Dialogue, Finish, Pair, Prompt, PromptBatch, PromptId, PromptText, Purpose, Seed,
    WeightsVersion,
};
use serde_json::{Map, Value};
use settings::HttpServiceSettings;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::pool::ComparisonRequest;
use crate::prompt_encoder::PromptEncoder;
use crate::server::HttpError;
use crate::wire::{ComparisonInput, PreferencesRequest};

/// Number of largest requests whose bodies may be in memory at once.
const LARGEST_REQUESTS: usize = 64;

/// Unit in which the memory of bodies is counted, in bytes.
const UNIT_BYTES: usize = 1024;

/// Reads and validates requests.
pub(super) struct RequestReader {
    limits: HttpServiceSettings,
    encoder: Arc<dyn PromptEncoder>,
    /// Time limit for the arrival of a body.
    body_timeout: Duration,
    /// Units of memory for bodies.
    memory: Semaphore,
}

impl RequestReader {
    pub(super) fn new(
        limits: HttpServiceSettings,
        encoder: Arc<dyn PromptEncoder>,
        body_timeout: Duration,
    ) -> Self {
        let units = LARGEST_REQUESTS.saturating_mul(units(limits.max_bytes) as usize);
        Self {
            limits,
            encoder,
            body_timeout,
            memory: Semaphore::new(units.min(Semaphore::MAX_PERMITS)),
        }
    }

    /// Parses a request and checks its number of pairs.
    pub(super) async fn read(&self, request: Request) -> Result<PreferencesRequest, HttpError> {
        let body = self.body(request).await?;
        let parsed = parse(&body)?;
        let (count, max) = (parsed.pairs.len(), self.limits.max_pairs);
        if count == 0 {
            return Err(HttpError::invalid(
                "pairs: there are none; ask about at least one",
            ));
        }
        if count > max {
            return Err(HttpError::invalid(format!(
                "pairs: {count} are more than preference.http.max_pairs = {max}; ask in parts"
            )));
        }
        Ok(parsed)
    }

    async fn body(&self, request: Request) -> Result<Bytes, HttpError> {
        if !is_json(request.headers()) {
            return Err(HttpError::unsupported_media_type());
        }
        let max = self.limits.max_bytes;
        let too_large = || {
            HttpError::too_large(format!(
                "the request has more bytes than preference.http.max_bytes = {max}"
            ))
        };
        let length = request.headers().get(CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > max) {
            return Err(too_large());
        }
        let memory = self.memory.try_acquire_many(units(length.unwrap_or(max)));
        let _memory = memory.map_err(|_| {
            HttpError::too_many_requests(
                "too many bytes at once: the requests in progress fill the memory for them",
            )
        })?;
        match timeout(self.body_timeout, to_bytes(request.into_body(), max)).await {
            Ok(body) => body.map_err(|_| too_large()),
            Err(_elapsed) => Err(HttpError::too_slow()),
        }
    }

    /// One comparison for every pair. Tokenises on the blocking thread pool.
    pub(super) async fn comparisons(
        self: &Arc<Self>,
        pairs: Vec<ComparisonInput>,
    ) -> Result<Vec<ComparisonRequest>, HttpError> {
        let reader = Arc::clone(self);
        let convert = move || {
            let pairs = pairs.into_iter().enumerate();
            pairs.map(|(i, pair)| reader.comparison(i, pair)).collect()
        };
        let comparisons = tokio::task::spawn_blocking(convert).await;
        comparisons.unwrap_or_else(|_| Err(HttpError::invalid("pairs: they cannot be tokenised")))
    }

    fn comparison(
        &self,
        index: usize,
        input: ComparisonInput,
    ) -> Result<ComparisonRequest, HttpError> {
        let at = |field: &'static str| {
            move |reason: String| HttpError::invalid(format!("pairs[{index}].{field}: {reason}"))
        };
        let prompt = dataset::prompt(&input.prompt).map_err(at("prompt"))?;
        let prompt = with_tools(prompt, input.tools, input.template_kwargs).map_err(at("tools"))?;
        self.check_length(prompt_characters(&prompt))
            .map_err(at("prompt"))?;
        let encoded = self
            .prompt(prompt, input.prompt_ids)
            .map_err(at("prompt"))?;
        let [first, second] = [
            ("first", input.first, input.first_ids, input.first_finish),
            (
                "second",
                input.second,
                input.second_ids,
                input.second_finish,
            ),
        ]
        .map(|(field, text, ids, finish)| {
            let finish = finish.map(Finish::from);
            let response = SentResponse { text, ids, finish };
            self.completion(&encoded, response).map_err(at(field))
        });
        let completions = vec![first?, second?];
        let pair = Pair {
            prompt: encoded.into_prompt(index, input.answer),
            version: WeightsVersion::REFERENCE,
            completions,
            actor: "http".into(),
        };
        Ok(ComparisonRequest::new(Arc::new(pair), 0, 1))
    }

    /// The prompt with its ids: the given ones if they equal the judge's own encoding, or if the judge cannot encode a
    /// text.
    fn prompt(&self, prompt: PromptText, given: Option<Vec<u32>>) -> Result<EncodedPrompt, String> {
        let (text, ids, accepts_ids) = match (self.encoder.prompt(&prompt), given, &prompt) {
            (Err(_), Some(given), PromptText::Text(text)) => (text.clone(), given, true),
            (encoded, given, _) => {
                let (text, ids) = encoded?;
                let accepts_ids = ids.is_empty() || given.is_none_or(|given| given == ids);
                (text, ids, accepts_ids)
            }
        };
        Ok(EncodedPrompt {
            prompt,
            text,
            ids,
            accepts_ids,
        })
    }

    fn completion(
        &self,
        prompt: &EncodedPrompt,
        response: SentResponse,
    ) -> Result<Completion, String> {
        let SentResponse { text, ids, finish } = response;
        self.check_length(text.chars().count())?;
        let (ids, finish) = match ids.filter(|_| prompt.accepts_ids) {
            Some(ids) => {
                let has_ended = self.encoder.has_ended(&ids);
                let finish_by_ids = match has_ended {
                    true => Finish::EndOfText,
                    false => Finish::Length,
                };
                (ids, finish.unwrap_or(finish_by_ids))
            }
            None if text.is_empty() && finish.is_none() => return Err("it is empty".into()),
            None => {
                let finish = finish.unwrap_or(Finish::EndOfText);
                let encoded = self
                    .encoder
                    .response(&prompt.prompt, &prompt.ids, &text, finish)?;
                (encoded, finish)
            }
        };
        Ok(Completion::unrecorded(ids, finish, text))
    }

    fn check_length(&self, characters: usize) -> Result<(), String> {
        let max = self.limits.max_characters;
        if characters <= max {
            return Ok(());
        }
        Err(format!(
            "{characters} characters are more than preference.http.max_characters = {max}"
        ))
    }
}

/// Whether the body is declared to be JSON.
fn is_json(headers: &HeaderMap) -> bool {
    let value = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let essence = value.and_then(|value| value.split(';').next());
    essence.is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
}

/// Units of memory for this many bytes.
fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

fn parse(body: &[u8]) -> Result<PreferencesRequest, HttpError> {
    let json = &mut serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut *json);
    let parsed = parsed.map_err(|error| {
        let message = error.to_string();
        if error.inner().is_data() {
            HttpError::invalid(message)
        } else {
            HttpError::malformed(message)
        }
    })?;
    json.end()
        .map_err(|error| HttpError::malformed(error.to_string()))?;
    Ok(parsed)
}

/// Adds tools and template variables to the prompt, which must be a dialogue if there are any.
fn with_tools(
    prompt: PromptText,
    tools: Vec<Value>,
    template_kwargs: Map<String, Value>,
) -> Result<PromptText, String> {
    match prompt {
        PromptText::Dialogue(dialogue) => Ok(PromptText::Dialogue(Dialogue {
            tools,
            template_kwargs,
            ..dialogue
        })),
        PromptText::Text(_) if !tools.is_empty() || !template_kwargs.is_empty() => {
            Err("tools and template_kwargs go with a prompt of messages, not with text".into())
        }
        text @ PromptText::Text(_) => Ok(text),
    }
}

fn prompt_characters(prompt: &PromptText) -> usize {
    let of_value = |value: &Value| match value {
        Value::String(text) => text.chars().count(),
        other => other.to_string().chars().count(),
    };
    match prompt {
        PromptText::Text(text) => text.chars().count(),
        PromptText::Dialogue(dialogue) => {
            let turns = dialogue.messages.iter().map(|turn| turn.content());
            turns.chain(&dialogue.tools).map(of_value).sum()
        }
    }
}

/// A prompt encoded for the judge.
struct EncodedPrompt {
    prompt: PromptText,
    text: String,
    ids: Vec<u32>,
    /// Whether the ids of the responses can be used, because they are the judge's tokens.
    accepts_ids: bool,
}

/// A response as received.
struct SentResponse {
    text: String,
    ids: Option<Vec<u32>>,
    finish: Option<Finish>,
}

impl EncodedPrompt {
    fn into_prompt(self, index: usize, answer: Option<String>) -> Prompt {
        let id = PromptId(index as u64);
        Prompt {
            id,
            prompt_batch: PromptBatch::single(id),
            purpose: Purpose::Evaluate,
            version: WeightsVersion::REFERENCE,
            seed: Seed(0),
            ids: self.ids,
            text: self.text,
            dialogue: match self.prompt {
                PromptText::Dialogue(dialogue) => Some(dialogue),
                PromptText::Text(_) => None,
            },
            golden: None,
            answer,
            route: None,
        }
    }
}
