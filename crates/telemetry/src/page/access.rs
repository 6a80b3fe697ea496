//! Access control of the live page.
//!
//! Without a token a request must have a loopback `Host` header, which protects against DNS rebinding. With a token
//! the request must present it: once in the URL, then in a cookie, or in an `Authorization` header.

use axum::http::header::{AUTHORIZATION, COOKIE, HOST};
use axum::http::{HeaderMap, Uri};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The cookie that holds the token.
pub(crate) const TOKEN_COOKIE: &str = "agon_token";

/// Decides which requests are answered.
pub(crate) struct AccessControl {
    /// Digest of the token: comparing digests in constant time reveals neither the token nor its length.
    token: Option<[u8; 32]>,
}

/// Access decision for a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AccessDecision {
    /// Answer the request.
    Allow,
    /// Redirect to the URL without the token and set the cookie.
    SetCookie(String),
    /// The token is missing or wrong.
    Unauthorized,
    /// The `Host` header does not name this machine.
    WrongHost,
}

impl AccessControl {
    pub(crate) fn new(token: Option<&str>) -> Self {
        Self {
            token: token.map(|token| Sha256::digest(token.as_bytes()).into()),
        }
    }

    pub(crate) fn decide(&self, uri: &Uri, headers: &HeaderMap) -> AccessDecision {
        let Some(token) = &self.token else {
            let host = headers.get(HOST).and_then(|host| host.to_str().ok());
            return if host.is_some_and(is_loopback) {
                AccessDecision::Allow
            } else {
                AccessDecision::WrongHost
            };
        };
        let is_valid = |given: &str| {
            let digest: [u8; 32] = Sha256::digest(given.as_bytes()).into();
            bool::from(digest.ct_eq(token))
        };
        if let Some(given) = token_in_url(uri).filter(|given| is_valid(given)) {
            return AccessDecision::SetCookie(given.to_owned());
        }
        let given = token_in_cookie(headers).or_else(|| token_in_header(headers));
        if given.is_some_and(is_valid) {
            AccessDecision::Allow
        } else {
            AccessDecision::Unauthorized
        }
    }
}

fn token_in_url(uri: &Uri) -> Option<&str> {
    let mut parts = uri.query()?.split('&');
    parts.find_map(|part| part.strip_prefix("token="))
}

fn token_in_cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let mut cookies = cookies.flat_map(|value| value.split(';'));
    cookies.find_map(|cookie| cookie.trim().strip_prefix(TOKEN_COOKIE)?.strip_prefix('='))
}

fn token_in_header(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

/// Whether a `Host` header is `localhost` or a loopback address.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let is_loopback_ip = |ip: std::net::IpAddr| ip.is_loopback();
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(is_loopback_ip)
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn decision(
        access: &AccessControl,
        path: &str,
        headers: &[(HeaderName, &str)],
    ) -> AccessDecision {
        let pairs = headers
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()));
        access.decide(&path.parse().unwrap(), &pairs.collect())
    }

    #[test]
    fn without_a_token_only_loopback_hosts_are_allowed() {
        let access = AccessControl::new(None);
        for (host, expected) in [
            ("127.0.0.1:8000", AccessDecision::Allow),
            ("localhost", AccessDecision::Allow),
            ("LOCALHOST:1", AccessDecision::Allow),
            ("[::1]:8000", AccessDecision::Allow),
            ("127.9.9.9", AccessDecision::Allow),
            ("evil.example:8000", AccessDecision::WrongHost),
            ("localhost.evil.example", AccessDecision::WrongHost),
            ("10.0.0.1", AccessDecision::WrongHost),
            ("", AccessDecision::WrongHost),
        ] {
            assert_eq!(decision(&access, "/", &[(HOST, host)]), expected, "{host}");
        }
        assert_eq!(decision(&access, "/", &[]), AccessDecision::WrongHost);
    }

    #[test]
    fn a_token_is_read_from_the_url_a_cookie_or_a_header() {
        let access = AccessControl::new(Some("sesame"));
        let cases = [
            (
                "/?token=sesame",
                None,
                AccessDecision::SetCookie("sesame".into()),
            ),
            (
                "/?a=1&token=sesame",
                None,
                AccessDecision::SetCookie("sesame".into()),
            ),
            ("/?token=sesam", None, AccessDecision::Unauthorized),
            ("/", None, AccessDecision::Unauthorized),
            (
                "/",
                Some((COOKIE, "a=b; agon_token=sesame")),
                AccessDecision::Allow,
            ),
            (
                "/",
                Some((COOKIE, "agon_token=Sesame")),
                AccessDecision::Unauthorized,
            ),
            (
                "/",
                Some((COOKIE, "agon_tokens=sesame")),
                AccessDecision::Unauthorized,
            ),
            (
                "/",
                Some((AUTHORIZATION, "bearer sesame")),
                AccessDecision::Allow,
            ),
            (
                "/",
                Some((AUTHORIZATION, "Basic sesame")),
                AccessDecision::Unauthorized,
            ),
        ];
        for (path, header, expected) in cases {
            let headers: Vec<_> = header.clone().into_iter().collect();
            assert_eq!(
                decision(&access, path, &headers),
                expected,
                "{path} {header:?}"
            );
        }
    }
}
