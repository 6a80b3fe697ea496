//! From the bytes of a request to questions, within the limits.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
use messages::{
    Completion, Dialogue, Finish, Pair, Prompt, PromptId, PromptText, Purpose, Release, Seed,
    WeightsVersion,
};
use serde_json::{Map, Value};
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
        let prompt = dataset::prompt(&asked.prompt).map_err(at("prompt"))?;
        let prompt = with_tools(prompt, asked.tools, asked.template_kwargs).map_err(at("tools"))?;
        self.within(prompt_characters(&prompt))
            .map_err(at("prompt"))?;
        let read = self
            .prompt(prompt, asked.prompt_ids)
            .map_err(at("prompt"))?;
        let [first, second] = [
            ("first", asked.first, asked.first_ids, asked.first_finish),
            (
                "second",
                asked.second,
                asked.second_ids,
                asked.second_finish,
            ),
        ]
        .map(|(field, text, ids, finish)| {
            let finish = finish.map(Finish::from);
            let response = Response { text, ids, finish };
            self.completion(&read, response).map_err(at(field))
        });
        let completions = vec![first?, second?];
        let pair = Pair {
            prompt: read.into_prompt(index, asked.answer),
            version: WeightsVersion::REFERENCE,
            completions,
            actor: "http".into(),
        };
        Ok(Question::new(Arc::new(pair), 0, 1))
    }

    /// The prompt with its ids: the given ones where the judge's tokenizer makes the same of it, or cannot
    /// make any.
    fn prompt(&self, prompt: PromptText, given: Option<Vec<u32>>) -> Result<ReadPrompt, String> {
        let (text, ids, takes_ids) = match (self.texts.prompt(&prompt), given, &prompt) {
            (Err(_), Some(given), PromptText::Text(text)) => (text.clone(), given, true),
            (made, given, _) => {
                let (text, ids) = made?;
                let takes_ids = ids.is_empty() || given.is_none_or(|given| given == ids);
                (text, ids, takes_ids)
            }
        };
        Ok(ReadPrompt {
            prompt,
            text,
            ids,
            takes_ids,
        })
    }

    fn completion(&self, prompt: &ReadPrompt, response: Response) -> Result<Completion, String> {
        let Response { text, ids, finish } = response;
        self.within(text.chars().count())?;
        let (ids, finish) = match ids.filter(|_| prompt.takes_ids) {
            Some(ids) => {
                let has_ended = self.texts.has_ended(&ids);
                let as_ids_say = match has_ended {
                    true => Finish::EndOfText,
                    false => Finish::Length,
                };
                (ids, finish.unwrap_or(as_ids_say))
            }
            None if text.is_empty() && finish.is_none() => return Err("it is empty".into()),
            None => {
                let finish = finish.unwrap_or(Finish::EndOfText);
                let made = self
                    .texts
                    .response(&prompt.prompt, &prompt.ids, &text, finish)?;
                (made, finish)
            }
        };
        Ok(Completion {
            ids,
            finish,
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

/// The prompt with the tools and variables of its template, which only a dialogue has.
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
            let turns = dialogue.messages.iter().map(|turn| &turn.content);
            turns.chain(&dialogue.tools).map(of_value).sum()
        }
    }
}

/// A prompt as the judge reads it.
struct ReadPrompt {
    prompt: PromptText,
    text: String,
    ids: Vec<u32>,
    /// Whether ids that come with responses are the judge's tokens.
    takes_ids: bool,
}

/// A response as it was sent.
struct Response {
    text: String,
    ids: Option<Vec<u32>>,
    finish: Option<Finish>,
}

impl ReadPrompt {
    fn into_prompt(self, index: usize, answer: Option<String>) -> Prompt {
        let id = PromptId(index as u64);
        Prompt {
            id,
            release: Release::single(id),
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
        }
    }
}
