//! A judge's address: how questions travel there over HTTP, and what its refusals mean.
//!
//! It knows no judge's language, only HTTP. Nothing is retried here: the bench does that.

use std::fs;
use std::path::Path;
use std::time::Duration;

use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{JudgeError, PreferenceError};

/// How long whoever says nothing of it is left alone after "too many requests".
const REST: Duration = Duration::from_secs(1);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;
/// The longest part of an answer that is told.
const TOLD: usize = 200;

/// Where questions are posted.
pub(super) struct Endpoint {
    client: Client,
    url: String,
    key: Option<String>,
}

impl Endpoint {
    /// `path` below `url`; with the key in `key_path`, unless that is empty.
    pub(super) fn new(url: &str, path: &str, key_path: &Path) -> Result<Self, PreferenceError> {
        let client = Client::builder().build();
        Ok(Self {
            client: client.map_err(|source| PreferenceError::Client {
                url: url.to_owned(),
                source,
            })?,
            url: format!("{}{path}", url.trim_end_matches('/')),
            key: key(key_path)?,
        })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Posts `question` as JSON and reads the answer.
    pub(super) async fn post<A: DeserializeOwned>(
        &self,
        question: &impl Serialize,
    ) -> Result<A, JudgeError> {
        let mut request = self.client.post(&self.url).json(question);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(|error| unreachable(&error))?;
        let status = response.status();
        let rest = retry_after(response.headers());
        let body = read(response).await?;
        if !status.is_success() {
            return Err(refusal(status, rest, &body));
        }
        serde_json::from_slice(&body).map_err(|error| {
            let body = told(&body);
            JudgeError::new(format!("it answered what cannot be read ({error}): {body}"))
        })
    }
}

/// The secret in a file: its one line; `None` when the path is empty.
///
/// # Errors
/// When the file cannot be read, or what it holds cannot be a header.
pub fn key(path: &Path) -> Result<Option<String>, PreferenceError> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let refuse = |source| PreferenceError::Key {
        path: path.to_owned(),
        source,
    };
    let key = fs::read_to_string(path).map_err(|source| refuse(Some(source)))?;
    let key = key.trim();
    let is_sound = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
    is_sound
        .then(|| Some(key.to_owned()))
        .ok_or_else(|| refuse(None))
}

/// What a status says: whether the question, the moment or the judge is at fault. A key or an address
/// that is refused is the judge's fault: no question is lost by it, and its circuit shows it.
fn refusal(status: StatusCode, rest: Option<Duration>, body: &[u8]) -> JudgeError {
    let reason = format!("it answered {status}: {}", told(body));
    match status {
        StatusCode::TOO_MANY_REQUESTS => JudgeError::busy(reason, rest.unwrap_or(REST)),
        StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::METHOD_NOT_ALLOWED
        | StatusCode::PROXY_AUTHENTICATION_REQUIRED
        | StatusCode::REQUEST_TIMEOUT => transient(reason, rest),
        status if status.is_client_error() => JudgeError::permanent(reason),
        _ => transient(reason, rest),
    }
}

fn transient(reason: String, rest: Option<Duration>) -> JudgeError {
    let error = JudgeError::new(reason);
    match rest {
        Some(rest) => error.after(rest),
        None => error,
    }
}

/// `Retry-After` in seconds; a date is not read.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers
        .get(RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// The whole body, if it is not too long.
async fn read(mut response: Response) -> Result<Vec<u8>, JudgeError> {
    let mut body = Vec::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|error| unreachable(&error))?
    {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ANSWER {
            return Err(JudgeError::new(format!(
                "it answered more than {MAX_ANSWER} bytes"
            )));
        }
    }
    Ok(body)
}

/// The failure with its causes, without the address: that is the replica's name already.
fn unreachable(error: &reqwest::Error) -> JudgeError {
    let mut reason = if error.is_connect() {
        "it cannot be reached".to_owned()
    } else {
        "its answer did not arrive".to_owned()
    };
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        reason = format!("{reason}: {error}");
        cause = error.source();
    }
    JudgeError::new(reason)
}

/// As much of an answer as people want to see.
pub(super) fn told(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    match text.char_indices().nth(TOLD) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::JudgeErrorKind;

    #[test]
    fn a_refusal_says_who_is_at_fault_and_for_how_long() {
        use JudgeErrorKind::{Busy, Permanent, Transient};
        let second = Some(Duration::from_secs(1));
        let three = Some(Duration::from_secs(3));
        for (status, rest, kind, expected) in [
            (429, None, Busy, second),
            (429, three, Busy, three),
            (500, None, Transient, None),
            (503, three, Transient, three),
            (408, None, Transient, None),
            (401, None, Transient, None),
            (404, None, Transient, None),
            (400, three, Permanent, None),
            (413, None, Permanent, None),
            (422, None, Permanent, None),
        ] {
            let error = refusal(StatusCode::from_u16(status).unwrap(), rest, b" no \n");
            assert_eq!(
                (error.kind(), error.retry_after()),
                (kind, expected),
                "{status}"
            );
            let reason = error.to_string();
            assert!(
                reason.starts_with(&format!("it answered {status}")) && reason.ends_with(": no"),
                "{reason}"
            );
        }
    }

    #[test]
    fn retry_after_is_read_in_seconds() {
        for (value, expected) in [
            ("3", Some(Duration::from_secs(3))),
            ("0.25", Some(Duration::from_millis(250))),
            ("-1", None),
            ("inf", None),
            ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            assert_eq!(retry_after(&headers), expected, "{value}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn a_key_is_one_line_of_visible_characters() {
        let folder = std::env::temp_dir().join(format!("agon-key-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("key");
        for (content, expected) in [
            ("sk-123\n", Some("sk-123")),
            ("  sk-123  ", Some("sk-123")),
            ("", None),
            ("two words", None),
            ("two\nlines", None),
        ] {
            fs::write(&path, content).unwrap();
            let seen = key(&path).ok().flatten();
            assert_eq!(seen.as_deref(), expected, "{content:?}");
        }
        fs::remove_dir_all(&folder).unwrap();
        let missing = key(&path).expect_err("it is gone").to_string();
        assert!(missing.contains("read the key in"), "{missing}");
        assert_eq!(key(Path::new("")).unwrap(), None, "none is asked for");
    }

    #[test]
    fn of_a_long_answer_the_beginning_is_told() {
        assert_eq!(told(b"  short "), "short");
        let long = told("ü".repeat(300).as_bytes());
        assert_eq!(long.chars().count(), 201);
        assert!(long.ends_with("ü…"));
    }
}
