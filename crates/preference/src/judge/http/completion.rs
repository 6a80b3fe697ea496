//! Reading of a chat completion, as OpenAI, vLLM, llama.cpp and gateways in front of them send it.
//!
//! A field that is null, missing or of another type is absent: without log-probabilities the text decides, without a
//! text the judge abstains. An error in place of a completion is classified as an error response is.

use reqwest::StatusCode;
use serde_json::Value;

use crate::error::JudgeError;
use crate::judge::chat::ChatReply;
use crate::judge::endpoint::{excerpt, status_error};
use crate::judge::verdict_parser::{ScoredToken, TopLogprob};

/// The parts of a chat completion that a judge reads.
#[derive(Debug, PartialEq)]
pub(super) struct ChatCompletion {
    /// Text and tokens of the first choice.
    pub(super) reply: ChatReply,
    /// Reason why the reply has no text, or may lack its end.
    pub(super) shortcoming: Option<Shortcoming>,
    /// The model that answered and its configuration, as the server names them.
    pub(super) identity: Option<String>,
}

/// Reason for a reply without a verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shortcoming {
    /// Cut off at the limit of tokens.
    Truncated,
    /// The server or the model refused to answer, with these words.
    Refused(String),
}

impl ChatCompletion {
    /// Reads the body of a successful response.
    ///
    /// # Errors
    /// When it holds an error or no choice.
    pub(super) fn read(body: &Value) -> Result<Self, JudgeError> {
        if let Some(error) = body.get("error").filter(|error| !error.is_null()) {
            return Err(error_of(error));
        }
        let choice = &body["choices"][0];
        let message = &choice["message"];
        if !message.is_object() {
            return Err(JudgeError::new(format!(
                "its response has no choice with a message: {}",
                excerpt(body.to_string().as_bytes())
            )));
        }
        let shortcoming = match (&message["refusal"], choice["finish_reason"].as_str()) {
            (Value::String(refusal), _) if !refusal.is_empty() => {
                Some(Shortcoming::Refused(excerpt(refusal.as_bytes())))
            }
            (_, Some("content_filter")) => Some(Shortcoming::Refused("content_filter".into())),
            (_, Some("length")) => Some(Shortcoming::Truncated),
            _ => None,
        };
        Ok(Self {
            reply: ChatReply {
                text: text(&message["content"]),
                tokens: tokens(&choice["logprobs"]).unwrap_or_default(),
            },
            shortcoming,
            identity: identity(body),
        })
    }
}

/// Error in the body of a response with a status of success, as gateways send it.
fn error_of(error: &Value) -> JudgeError {
    let message = error["message"].as_str().or(error.as_str());
    let message = message.map_or_else(|| error.to_string(), str::to_owned);
    let message = excerpt(message.as_bytes());
    let number = |code: &Value| code.as_u64().or_else(|| code.as_str()?.parse().ok());
    let code = [&error["code"], &error["status"]]
        .into_iter()
        .find_map(number);
    let status = code
        .and_then(|code| StatusCode::from_u16(u16::try_from(code).ok()?).ok())
        .filter(|status| status.is_client_error() || status.is_server_error());
    match status {
        Some(status) => status_error(status, None, &message),
        None => JudgeError::new(format!("it answered with an error: {message}")),
    }
}

/// Text of a message's content: a string, or parts with a text.
fn text(content: &Value) -> String {
    let part = |part: &Value| {
        part.as_str()
            .or_else(|| part["text"].as_str())
            .map(str::to_owned)
    };
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(part).collect(),
        _ => String::new(),
    }
}

/// Tokens with log-probabilities; `None` when there are none or they cannot be read.
fn tokens(logprobs: &Value) -> Option<Vec<ScoredToken>> {
    if let Some(content) = logprobs["content"].as_array() {
        return content.iter().map(scored_token).collect();
    }
    // The format of the older completions endpoint.
    let names = logprobs["tokens"].as_array()?.iter().enumerate();
    names
        .map(|(index, token)| {
            Some(ScoredToken {
                token: token.as_str()?.to_owned(),
                logprob: logprob(&logprobs["token_logprobs"][index]),
                top_logprobs: match &logprobs["top_logprobs"][index] {
                    Value::Object(top) => top
                        .iter()
                        .map(|(token, value)| TopLogprob {
                            token: token.clone(),
                            logprob: logprob(value),
                        })
                        .collect(),
                    _ => Vec::new(),
                },
            })
        })
        .collect()
}

fn scored_token(token: &Value) -> Option<ScoredToken> {
    let top = token["top_logprobs"].as_array().into_iter().flatten();
    let candidate = |candidate: &Value| {
        Some(TopLogprob {
            token: candidate["token"].as_str()?.to_owned(),
            logprob: logprob(&candidate["logprob"]),
        })
    };
    Some(ScoredToken {
        token: token["token"].as_str()?.to_owned(),
        logprob: logprob(&token["logprob"]),
        top_logprobs: top.filter_map(candidate).collect(),
    })
}

/// A log-probability; NaN, which the verdict ignores, when it is absent.
fn logprob(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn identity(body: &Value) -> Option<String> {
    let named = ["model", "system_fingerprint"].map(|key| Some((key, body[key].as_str()?)));
    let named = named.into_iter().flatten();
    let named: Vec<_> = named
        .map(|(key, name)| format!("{key} {}", excerpt(name.as_bytes())))
        .collect();
    (!named.is_empty()).then(|| named.join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::JudgeErrorKind;

    fn read(choice: &Value) -> ChatCompletion {
        ChatCompletion::read(&json!({"choices": [choice]})).expect("a completion")
    }

    #[test]
    fn null_and_missing_fields_are_absent() {
        let a = || "[[A]]".to_owned();
        for (message, expected) in [
            (json!({"content": "[[A]]"}), a()),
            (json!({"content": [{"type": "text", "text": "[[A]]"}]}), a()),
            (
                json!({"content": ["[[", {"text": "A]]"}, {"image": 1}, null]}),
                a(),
            ),
            (
                json!({"content": null, "reasoning_content": "[[B]]"}),
                String::new(),
            ),
            (json!({"content": {"text": "[[A]]"}}), String::new()),
            (json!({}), String::new()),
        ] {
            let actual = read(&json!({"message": message, "logprobs": null}));
            assert_eq!(actual.reply.text, expected, "{message}");
            assert_eq!((actual.shortcoming, actual.identity), (None, None));
        }
    }

    #[test]
    fn logprobs_are_read_where_they_are_given() {
        let top = |token: &str, logprob| TopLogprob {
            token: token.into(),
            logprob,
        };
        let token = |top_logprobs| ScoredToken {
            token: "A".into(),
            logprob: -0.5,
            top_logprobs,
        };
        let content =
            |top: Value| json!({"content": [{"token": "A", "logprob": -0.5, "top_logprobs": top}]});
        for (logprobs, expected) in [
            (content(Value::Null), vec![token(vec![])]),
            (content(json!([])), vec![token(vec![])]),
            (
                content(json!([{"token": "B", "logprob": -1}, {"token": null}, null])),
                vec![token(vec![top("B", -1.0)])],
            ),
            (
                json!({"content": [{"token": "A", "logprob": -0.5}]}),
                vec![token(vec![])],
            ),
            (
                json!({"tokens": ["A"], "token_logprobs": [-0.5], "top_logprobs": [{"B": -1}]}),
                vec![token(vec![top("B", -1.0)])],
            ),
            (
                json!({"tokens": ["A"], "token_logprobs": [-0.5], "top_logprobs": null}),
                vec![token(vec![])],
            ),
            (
                json!({"content": [{"token": null, "logprob": -0.5}]}),
                vec![],
            ),
            (json!({"content": null}), vec![]),
            (json!({}), vec![]),
            (json!("none"), vec![]),
        ] {
            let choice = json!({"message": {"content": "A"}, "logprobs": logprobs});
            assert_eq!(read(&choice).reply.tokens, expected, "{logprobs}");
        }
        let without = json!({"content": [{"token": "A", "logprob": null}]});
        let choice = json!({"message": {"content": "A"}, "logprobs": without});
        assert!(read(&choice).reply.tokens[0].logprob.is_nan());
    }

    #[test]
    fn the_cause_of_a_missing_verdict_is_read() {
        let refused = |text: &str| Some(Shortcoming::Refused(text.into()));
        for (finish, refusal, expected) in [
            (json!("stop"), Value::Null, None),
            (json!("length"), Value::Null, Some(Shortcoming::Truncated)),
            (
                json!("content_filter"),
                Value::Null,
                refused("content_filter"),
            ),
            (json!("stop"), json!("I cannot"), refused("I cannot")),
            (Value::Null, Value::Null, None),
        ] {
            let message = json!({"content": null, "refusal": refusal});
            let choice = json!({"message": message, "finish_reason": finish});
            assert_eq!(read(&choice).shortcoming, expected, "{choice}");
        }
    }

    #[test]
    fn an_error_in_place_of_a_completion_is_classified_and_named() {
        use JudgeErrorKind::{Permanent, RateLimited, Transient};
        for (body, kind, says) in [
            (
                json!({"error": {"message": "overloaded", "code": 502}}),
                Transient,
                "it answered 502 Bad Gateway: overloaded",
            ),
            (
                json!({"error": {"message": "slow down", "code": "429"}}),
                RateLimited,
                "it answered 429 Too Many Requests: slow down",
            ),
            (
                json!({"error": {"message": "too long", "code": 400}}),
                Permanent,
                "it answered 400 Bad Request: too long",
            ),
            (
                json!({"error": {"message": "no", "code": "server_error"}}),
                Transient,
                "it answered with an error: no",
            ),
            (
                json!({"error": "no"}),
                Transient,
                "it answered with an error: no",
            ),
            (
                json!({"error": {"code": 200}}),
                Transient,
                "it answered with an error: {",
            ),
            (
                json!({"choices": []}),
                Transient,
                "no choice with a message: {\"choices\":[]}",
            ),
            (json!({"choices": null}), Transient, "no choice"),
            (
                json!({"choices": [{"message": null}]}),
                Transient,
                "no choice",
            ),
            (json!({"id": "x"}), Transient, "no choice"),
            (json!([]), Transient, "no choice"),
            (json!("x"), Transient, "no choice"),
        ] {
            let error = ChatCompletion::read(&body).expect_err("no completion");
            assert_eq!(error.kind(), kind, "{body}");
            assert!(error.to_string().contains(says), "{body}: {error}");
        }
        let choice = json!({"message": {"content": "[[A]]"}});
        let with_null = json!({"error": null, "choices": [choice]});
        assert!(ChatCompletion::read(&with_null).is_ok());
    }

    #[test]
    fn the_identity_is_what_the_server_names() {
        let choices = json!([{"message": {"content": ""}}]);
        for (model, fingerprint, expected) in [
            (
                json!("m-1"),
                json!("fp"),
                Some("model m-1, system_fingerprint fp"),
            ),
            (json!("m-1"), Value::Null, Some("model m-1")),
            (Value::Null, Value::Null, None),
            (json!(7), json!("fp"), Some("system_fingerprint fp")),
        ] {
            let body =
                json!({"choices": choices, "model": model, "system_fingerprint": fingerprint});
            let actual = ChatCompletion::read(&body).expect("a completion").identity;
            assert_eq!(actual.as_deref(), expected, "{body}");
        }
    }
}
