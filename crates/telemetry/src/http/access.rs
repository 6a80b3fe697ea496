//! Access control of a listener.
//!
//! Without a token a request must name a loopback address in its `Host` header, which protects against DNS
//! rebinding. With a token it must show it. In both cases a request that a browser sends for the page of another
//! origin is refused.

use std::net::IpAddr;
use std::path::Path;

use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::TelemetryError;
use crate::regular_file::read_bounded;

/// Maximum size of a token file in bytes.
const MAX_TOKEN_BYTES: u64 = 4096;

/// Decides which requests are answered.
#[derive(Debug, Clone)]
pub struct AccessControl {
    /// Digest of the token: comparing digests in constant time reveals neither the token nor its length.
    token: Option<[u8; 32]>,
}

/// Reason to refuse a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessRefusal {
    /// The token is missing or wrong.
    Unauthorized,
    /// The `Host` header does not name this machine.
    Host,
    /// The `Origin` header names another site.
    Origin,
}

impl AccessRefusal {
    /// Status of the response.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Host | Self::Origin => StatusCode::FORBIDDEN,
        }
    }

    /// The reason and the remedy, as one line.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::Unauthorized => "show the token: Authorization: Bearer <token>",
            Self::Host => "without a token this service is used as 127.0.0.1 or localhost only",
            Self::Origin => "requests from pages of other origins are refused",
        }
    }
}

impl AccessControl {
    /// Access with this token; without one, from this machine.
    #[must_use]
    pub fn new(token: Option<&str>) -> Self {
        Self {
            token: token.map(digest),
        }
    }

    /// Whether requests must show a token.
    #[must_use]
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Checks origin, host and the token in the `Authorization` header.
    ///
    /// # Errors
    /// The reason to refuse the request.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), AccessRefusal> {
        self.check_source(headers)?;
        match bearer_token(headers) {
            _ if !self.has_token() => Ok(()),
            Some(given) if self.accepts(given) => Ok(()),
            _ => Err(AccessRefusal::Unauthorized),
        }
    }

    /// Checks origin and host, not the token.
    ///
    /// # Errors
    /// The reason to refuse the request.
    pub fn check_source(&self, headers: &HeaderMap) -> Result<(), AccessRefusal> {
        let host = only(headers, &HOST);
        if !self.has_token() && !host.is_some_and(is_loopback_host) {
            return Err(AccessRefusal::Host);
        }
        let is_foreign = match only(headers, &ORIGIN) {
            Some(origin) => !is_same_origin(origin, host),
            None => headers.contains_key(ORIGIN),
        };
        match is_foreign {
            true => Err(AccessRefusal::Origin),
            false => Ok(()),
        }
    }

    /// Whether this is the token.
    pub(crate) fn accepts(&self, given: &str) -> bool {
        let is_equal = |token: &[u8; 32]| bool::from(digest(given).ct_eq(token));
        self.token.as_ref().is_some_and(is_equal)
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// The value of a header that occurs once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    values.next().is_none().then(|| first.to_str().ok())?
}

/// The token of an `Authorization: Bearer` header.
pub(crate) fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = only(headers, &AUTHORIZATION)?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

/// Whether an origin is that of the host to which the request was sent.
fn is_same_origin(origin: &str, host: Option<&str>) -> bool {
    let authority = origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"));
    match (authority, host) {
        (Some(authority), Some(host)) => authority.eq_ignore_ascii_case(host),
        _ => false,
    }
}

/// Whether a `Host` header is `localhost` or a loopback address.
fn is_loopback_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let is_loopback = |ip: IpAddr| ip.is_loopback();
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(is_loopback)
}

/// Whether other machines can reach a listener at this address that has no token.
#[must_use]
pub fn is_exposed(address: IpAddr, has_token: bool) -> bool {
    !has_token && !address.to_canonical().is_loopback()
}

/// Least length of a token: one that is guessed in a day is none.
const MIN_TOKEN_BYTES: usize = 16;

/// Reads the token that clients of a server must send from a file; `None` for an empty path.
///
/// # Errors
/// When the file cannot be read or contains no valid token.
pub fn read_token(path: &Path) -> Result<Option<String>, TelemetryError> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let error = |source| TelemetryError::Token {
        path: path.to_owned(),
        source,
    };
    let bytes = read_bounded(path, MAX_TOKEN_BYTES).map_err(|source| error(Some(source)))?;
    let text = String::from_utf8_lossy(&bytes);
    let token = text.trim();
    // Restricted to characters that need no escaping in URLs and cookies.
    let is_unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let is_valid = token.len() >= MIN_TOKEN_BYTES && token.bytes().all(is_unreserved);
    is_valid
        .then(|| Some(token.to_owned()))
        .ok_or_else(|| error(None))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    type Given<'a> = &'a [(HeaderName, &'a str)];

    fn check(token: Option<&str>, given: Given<'_>) -> Result<(), AccessRefusal> {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            headers.append(name, HeaderValue::from_str(value).unwrap());
        }
        AccessControl::new(token).check(&headers)
    }

    #[test]
    fn without_a_token_only_loopback_hosts_are_allowed() {
        let cases: [(Given<'_>, bool); 12] = [
            (&[(HOST, "127.0.0.1:8000")], true),
            (&[(HOST, "localhost")], true),
            (&[(HOST, "LOCALHOST:1")], true),
            (&[(HOST, "[::1]:8000")], true),
            (&[(HOST, "127.9.9.9")], true),
            (&[(HOST, "evil.example:8000")], false),
            (&[(HOST, "localhost.evil.example")], false),
            (&[(HOST, "10.0.0.1")], false),
            (&[(HOST, "0.0.0.0:80")], false),
            (&[(HOST, "")], false),
            (&[(HOST, "localhost"), (HOST, "localhost")], false),
            (&[], false),
        ];
        for (given, is_allowed) in cases {
            let expected = if is_allowed {
                Ok(())
            } else {
                Err(AccessRefusal::Host)
            };
            assert_eq!(check(None, given), expected, "{given:?}");
        }
    }

    #[test]
    fn requests_for_pages_of_other_origins_are_refused() {
        let local = (HOST, "127.0.0.1:8000");
        let token = (AUTHORIZATION, "Bearer sesame");
        for (origin, is_same) in [
            ("http://127.0.0.1:8000", true),
            ("HTTP://127.0.0.1:8000", false),
            ("http://127.0.0.1:8001", false),
            ("http://localhost:8000", false),
            ("https://evil.example", false),
            ("null", false),
            ("", false),
        ] {
            let expected = if is_same {
                Ok(())
            } else {
                Err(AccessRefusal::Origin)
            };
            let given = [local.clone(), (ORIGIN, origin)];
            assert_eq!(check(None, &given), expected, "{origin:?}");
            let given = [local.clone(), (ORIGIN, origin), token.clone()];
            assert_eq!(
                check(Some("sesame"), &given),
                expected,
                "{origin:?} with a token"
            );
        }
        let twice = [local, (ORIGIN, "http://127.0.0.1:8000"), (ORIGIN, "null")];
        assert_eq!(check(None, &twice), Err(AccessRefusal::Origin));
    }

    #[test]
    fn only_the_token_is_accepted() {
        for (given, is_accepted) in [
            (Some("Bearer sesame"), true),
            (Some("bearer sesame"), true),
            (Some("Bearer Sesame"), false),
            (Some("Bearer "), false),
            (Some("Bearer  sesame"), false),
            (Some("Basic sesame"), false),
            (Some("sesame"), false),
            (None, false),
        ] {
            let headers: Vec<_> = given
                .map(|value| (AUTHORIZATION, value))
                .into_iter()
                .collect();
            let expected = if is_accepted {
                Ok(())
            } else {
                Err(AccessRefusal::Unauthorized)
            };
            assert_eq!(check(Some("sesame"), &headers), expected, "{given:?}");
        }
    }

    #[test]
    fn an_address_beyond_loopback_is_exposed_without_a_token() {
        for (address, has_token, expected) in [
            ("127.0.0.1", false, false),
            ("::1", false, false),
            ("::ffff:127.0.0.1", false, false),
            ("0.0.0.0", false, true),
            ("::", false, true),
            ("192.168.0.7", false, true),
            ("0.0.0.0", true, false),
        ] {
            let ip = address.parse().unwrap();
            assert_eq!(is_exposed(ip, has_token), expected, "{address}");
        }
    }

    #[test]
    fn a_token_file_contains_one_line_of_unreserved_characters() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        assert_eq!(read_token(Path::new("")).unwrap(), None);
        for (text, expected) in [
            (" se-same_1.x~0123\n", Some("se-same_1.x~0123")),
            ("", None),
            ("fifteen-letters", None),
            ("two words, twenty letters", None),
            ("a&b-and-many-letters-more", None),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(
                read_token(&path).ok().flatten().as_deref(),
                expected,
                "{text:?}"
            );
        }
        for unreadable in [directory.path().join("none"), "/dev/zero".into()] {
            let message = read_token(&unreadable).unwrap_err().to_string();
            assert!(message.contains(unreadable.to_str().unwrap()), "{message}");
        }
    }
}
