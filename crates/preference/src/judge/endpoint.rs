//! HTTP endpoint of a remote judge, and the classification of its errors.
//!
//! Promises: a body beyond a bound is not read; the key and the request go to no other origin than the URL's; every
//! failure says what the server answered. Does not know a judge's request format, and does not retry: the pool does.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use reqwest::header::{CONTENT_ENCODING, DATE, HeaderMap, HeaderName, LOCATION, RETRY_AFTER};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{JudgeError, PreferenceError};

/// Time limit for a connection. The limit of the whole call is `preference.timeout_seconds`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest response body, in bytes.
const MAX_BODY: usize = 16 << 20;
/// Longest excerpt of a body in an error, in characters.
const MAX_EXCERPT: usize = 200;
/// Largest number of redirects within an origin.
const MAX_REDIRECTS: usize = 3;

/// A URL that accepts POST requests with JSON.
pub(super) struct Endpoint {
    client: Client,
    url: String,
    key: Option<String>,
}

impl Endpoint {
    /// The endpoint at `path` below `url`; sends the key in `key_path` as a bearer token, unless that path is empty.
    ///
    /// # Errors
    /// When the URL is not valid or the key cannot be read.
    pub(super) fn new(url: &str, path: &str, key_path: &Path) -> Result<Self, PreferenceError> {
        let client_error = |source| PreferenceError::Client {
            url: url.to_owned(),
            source,
        };
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(Policy::custom(|attempt| match is_same_request(&attempt) {
                true => attempt.follow(),
                false => attempt.stop(),
            }))
            .referer(false)
            .build()
            .map_err(client_error)?;
        let url = format!("{}{path}", url.trim_end_matches('/'));
        client.post(&url).build().map_err(client_error)?;
        Ok(Self {
            client,
            url,
            key: read_key(key_path)?,
        })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Posts `request` as JSON and parses the JSON response.
    ///
    /// # Errors
    /// When there is no response, or it is an error or no valid JSON. The reason does not contain the key.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        request: &impl Serialize,
    ) -> Result<T, JudgeError> {
        let result = self.send(request).await;
        result.map_err(|error| match &self.key {
            Some(key) => error.without_secret(key),
            None => error,
        })
    }

    async fn send<T: DeserializeOwned>(&self, request: &impl Serialize) -> Result<T, JudgeError> {
        let mut builder = self.client.post(&self.url).json(request);
        if let Some(key) = &self.key {
            builder = builder.bearer_auth(key);
        }
        let response = builder.send().await.map_err(|error| unreachable(&error))?;
        let (status, headers) = (response.status(), response.headers().clone());
        if status.is_redirection() {
            return Err(redirect_error(status, &headers));
        }
        let body = read_body(response).await?;
        if !status.is_success() {
            let retry_after = retry_after(&headers, SystemTime::now());
            return Err(status_error(status, retry_after, &excerpt(&body)));
        }
        parse(&headers, &body)
    }
}

/// Reads an API key or token from a file with one line; `None` when the path is empty.
///
/// # Errors
/// When the file cannot be read, or its content cannot be a header value.
fn read_key(path: &Path) -> Result<Option<String>, PreferenceError> {
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

/// Whether a redirect repeats the request at the same origin: prompts, completions and the key stay with the server
/// that the settings name.
fn is_same_request(attempt: &Attempt<'_>) -> bool {
    let repeats = [
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ];
    let origin = |url: &Url| url.origin();
    let previous = attempt.previous();
    repeats.contains(&attempt.status())
        && previous.len() <= MAX_REDIRECTS
        && previous.first().map(origin) == Some(origin(attempt.url()))
}

/// Error of a redirect that is not followed: transient, as the circuit breaker names it until the address is mended.
fn redirect_error(status: StatusCode, headers: &HeaderMap) -> JudgeError {
    let location = header(headers, &LOCATION).unwrap_or_default();
    let location = excerpt(location.as_bytes());
    JudgeError::new(format!(
        "it answered {status} to {location:?}, which is not followed: name the final address in the judge's urls"
    ))
}

/// Error of a status code. A rejected key or URL is transient, a failure of the judge: no request is lost by it, and
/// the circuit breaker opens.
pub(super) fn status_error(
    status: StatusCode,
    retry_after: Option<Duration>,
    body: &str,
) -> JudgeError {
    let reason = match body {
        "" => format!("it answered {status}"),
        body => format!("it answered {status}: {body}"),
    };
    let error = match status {
        StatusCode::TOO_MANY_REQUESTS => JudgeError::rate_limited(reason),
        StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::METHOD_NOT_ALLOWED
        | StatusCode::PROXY_AUTHENTICATION_REQUIRED
        | StatusCode::REQUEST_TIMEOUT => JudgeError::new(reason),
        status if status.is_client_error() => return JudgeError::permanent(reason),
        _ => JudgeError::new(reason),
    };
    match retry_after {
        Some(delay) => error.with_retry_after(delay),
        None => error,
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// `Retry-After` as seconds or as a date (RFC 9110, section 10.2.3). A date counts from the server's own clock where
/// the response has its `Date`, else from `now`; one that has passed is 0.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = header(headers, &RETRY_AFTER)?;
    if let Ok(seconds) = value.parse::<f64>() {
        let is_valid = seconds.is_finite() && seconds >= 0.0;
        return is_valid.then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
    }
    let date = |value| httpdate::parse_http_date(value).ok();
    let server_now = header(headers, &DATE).and_then(date).unwrap_or(now);
    let retry_at = date(value)?;
    Some(retry_at.duration_since(server_now).unwrap_or_default())
}

/// Reads the body, up to [`MAX_BODY`].
async fn read_body(mut response: Response) -> Result<Vec<u8>, JudgeError> {
    let too_large = || JudgeError::new(format!("its response has more than {MAX_BODY} bytes"));
    if response.content_length() > Some(MAX_BODY as u64) {
        return Err(too_large());
    }
    let mut body = Vec::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|error| unreachable(&error))?
    {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_BODY {
            return Err(too_large());
        }
    }
    Ok(body)
}

fn parse<T: DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, JudgeError> {
    if let Some(encoding) = header(headers, &CONTENT_ENCODING).filter(|&name| name != "identity") {
        return Err(JudgeError::new(format!(
            "its response has the content encoding {encoding:?}, which was not asked for"
        )));
    }
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    if body.trim_ascii().is_empty() {
        return Err(JudgeError::new("its response is empty"));
    }
    serde_json::from_slice(body).map_err(|error| {
        let body = excerpt(body);
        JudgeError::new(format!("its response cannot be parsed ({error}): {body}"))
    })
}

/// The failure with its causes, without the URL, which is the name of the replica.
fn unreachable(error: &reqwest::Error) -> JudgeError {
    let mut causes = Vec::new();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        causes.push(error.to_string());
        cause = error.source();
    }
    let causes = causes.join(": ");
    let what = if causes.contains("invalid peer certificate") {
        "its TLS certificate is not accepted".to_owned()
    } else if ["InvalidContentType", "tls handshake eof"]
        .iter()
        .any(|cause| causes.contains(cause))
    {
        "it does not speak TLS, try http:// for https://".to_owned()
    } else if error.is_connect() && error.is_timeout() {
        let seconds = CONNECT_TIMEOUT.as_secs();
        format!("it cannot be reached within {seconds} s")
    } else if error.is_connect() {
        "it cannot be reached".to_owned()
    } else {
        "its response did not arrive".to_owned()
    };
    match causes.as_str() {
        "" => JudgeError::new(what),
        causes => JudgeError::new(format!("{what}: {causes}")),
    }
}

/// Beginning of a text from outside, for an error; control characters are escaped.
pub(super) fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    let (text, rest) = match text.char_indices().nth(MAX_EXCERPT) {
        Some((end, _)) => (&text[..end], "…"),
        None => (text, ""),
    };
    let escaped = text.chars().flat_map(|c| {
        let (plain, escape) = match c.is_control() {
            true => (None, Some(c.escape_default())),
            false => (Some(c), None),
        };
        plain.into_iter().chain(escape.into_iter().flatten())
    });
    escaped.chain(rest.chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::JudgeErrorKind;

    #[test]
    fn status_codes_map_to_error_kinds_and_pauses() {
        use JudgeErrorKind::{Permanent, RateLimited, Transient};
        let three = Some(Duration::from_secs(3));
        for (status, retry_after, kind, expected) in [
            (429, None, RateLimited, None),
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
            let status = StatusCode::from_u16(status).unwrap();
            let error = status_error(status, retry_after, "no");
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
    fn retry_after_is_read_in_seconds_and_as_a_date() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let skewed = Some("Wed, 21 Oct 2015 09:00:00 GMT");
        for (value, date, expected) in [
            ("3", None, seconds(3)),
            (" 0.25 ", None, Some(Duration::from_millis(250))),
            ("0", None, seconds(0)),
            ("1e300", None, Some(Duration::MAX)),
            ("-1", None, None),
            ("inf", None, None),
            ("NaN", None, None),
            ("soon", None, None),
            ("Wed, 21 Oct 2015 07:28:30 GMT", None, seconds(30)),
            ("Wednesday, 21-Oct-15 07:28:30 GMT", None, seconds(30)),
            ("Wed Oct 21 07:28:30 2015", None, seconds(30)),
            ("Wed, 21 Oct 2015 07:27:00 GMT", None, seconds(0)),
            ("Wed, 21 Oct 2015 09:00:05 GMT", skewed, seconds(5)),
            ("Wed, 21 Oct 2015 07:28:30 GMT", Some("now"), seconds(30)),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            if let Some(date) = date {
                headers.insert(DATE, date.parse().unwrap());
            }
            assert_eq!(retry_after(&headers, now), expected, "{value}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
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
        assert_eq!(excerpt(b"a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }
}
