//! HTTP endpoint of a remote judge, and the classification of its errors.
//!
//! Does not know a judge's request format, and does not retry: the pool does.

use std::fs;
use std::path::Path;
use std::time::Duration;

use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{JudgeError, PreferenceError};

/// Pause after "too many requests" without a `Retry-After`.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);
/// Longest response body, in bytes.
const MAX_BODY: usize = 16 << 20;
/// Longest excerpt of a body in an error, in characters.
const MAX_EXCERPT: usize = 200;

/// A URL that accepts POST requests with JSON.
pub(super) struct Endpoint {
    client: Client,
    url: String,
    key: Option<String>,
}

impl Endpoint {
    /// The endpoint at `path` below `url`; sends the key in `key_path` as a bearer token, unless that path is empty.
    pub(super) fn new(url: &str, path: &str, key_path: &Path) -> Result<Self, PreferenceError> {
        let client = Client::builder().build();
        Ok(Self {
            client: client.map_err(|source| PreferenceError::Client {
                url: url.to_owned(),
                source,
            })?,
            url: format!("{}{path}", url.trim_end_matches('/')),
            key: read_key(key_path)?,
        })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Posts `request` as JSON and parses the JSON response.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        request: &impl Serialize,
    ) -> Result<T, JudgeError> {
        let mut builder = self.client.post(&self.url).json(request);
        if let Some(key) = &self.key {
            builder = builder.bearer_auth(key);
        }
        let response = builder.send().await.map_err(|error| unreachable(&error))?;
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let body = read_body(response).await?;
        if !status.is_success() {
            return Err(status_error(status, retry_after, &body));
        }
        serde_json::from_slice(&body).map_err(|error| {
            let body = excerpt(&body);
            JudgeError::new(format!("its response cannot be parsed ({error}): {body}"))
        })
    }
}

/// Reads an API key or token from a file with one line; `None` when the path is empty.
///
/// # Errors
/// When the file cannot be read, or its content cannot be a header value.
pub fn read_key(path: &Path) -> Result<Option<String>, PreferenceError> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let invalid = |source| PreferenceError::Key {
        path: path.to_owned(),
        source,
    };
    let key = fs::read_to_string(path).map_err(|source| invalid(Some(source)))?;
    let key = key.trim();
    let is_valid = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
    is_valid
        .then(|| Some(key.to_owned()))
        .ok_or_else(|| invalid(None))
}

/// Error of a status code. A rejected key or URL is transient, a failure of the judge: no request is lost by it, and
/// the circuit breaker opens.
fn status_error(status: StatusCode, retry_after: Option<Duration>, body: &[u8]) -> JudgeError {
    let reason = format!("it answered {status}: {}", excerpt(body));
    match status {
        StatusCode::TOO_MANY_REQUESTS => {
            JudgeError::rate_limited(reason, retry_after.unwrap_or(DEFAULT_RETRY_AFTER))
        }
        StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::METHOD_NOT_ALLOWED
        | StatusCode::PROXY_AUTHENTICATION_REQUIRED
        | StatusCode::REQUEST_TIMEOUT => transient(reason, retry_after),
        status if status.is_client_error() => JudgeError::permanent(reason),
        _ => transient(reason, retry_after),
    }
}

fn transient(reason: String, retry_after: Option<Duration>) -> JudgeError {
    let error = JudgeError::new(reason);
    match retry_after {
        Some(delay) => error.with_retry_after(delay),
        None => error,
    }
}

/// `Retry-After` in seconds; `None` for the date form.
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

/// Reads the body, up to [`MAX_BODY`].
async fn read_body(mut response: Response) -> Result<Vec<u8>, JudgeError> {
    let mut body = Vec::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|error| unreachable(&error))?
    {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_BODY {
            return Err(JudgeError::new(format!(
                "its response has more than {MAX_BODY} bytes"
            )));
        }
    }
    Ok(body)
}

/// The failure with its causes, without the URL, which is the name of the replica.
fn unreachable(error: &reqwest::Error) -> JudgeError {
    let mut reason = if error.is_connect() {
        "it cannot be reached".to_owned()
    } else {
        "its response did not arrive".to_owned()
    };
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        reason = format!("{reason}: {error}");
        cause = error.source();
    }
    JudgeError::new(reason)
}

/// Beginning of a body, for an error.
fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    match text.char_indices().nth(MAX_EXCERPT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::JudgeErrorKind;

    #[test]
    fn status_codes_map_to_error_kinds_and_pauses() {
        use JudgeErrorKind::{Permanent, RateLimited, Transient};
        let second = Some(Duration::from_secs(1));
        let three = Some(Duration::from_secs(3));
        for (status, retry_after, kind, expected) in [
            (429, None, RateLimited, second),
            (429, three, RateLimited, three),
            (500, None, Transient, None),
            (503, three, Transient, three),
            (408, None, Transient, None),
            (401, None, Transient, None),
            (404, None, Transient, None),
            (400, three, Permanent, None),
            (413, None, Permanent, None),
            (422, None, Permanent, None),
        ] {
            let error = status_error(
                StatusCode::from_u16(status).unwrap(),
                retry_after,
                b" no \n",
            );
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
            let actual = read_key(&path).ok().flatten();
            assert_eq!(actual.as_deref(), expected, "{content:?}");
        }
        fs::remove_dir_all(&folder).unwrap();
        let missing = read_key(&path).expect_err("it is deleted").to_string();
        assert!(missing.contains("read the key in"), "{missing}");
        assert_eq!(
            read_key(Path::new("")).unwrap(),
            None,
            "an empty path means no key"
        );
    }

    #[test]
    fn long_bodies_are_truncated() {
        assert_eq!(excerpt(b"  short "), "short");
        let long = excerpt("ü".repeat(300).as_bytes());
        assert_eq!(long.chars().count(), 201);
        assert!(long.ends_with("ü…"));
    }
}
