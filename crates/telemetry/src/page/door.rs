//! Who is let in.
//!
//! Without a token: who asks under a name of this machine, so that a foreign site whose name was bent to
//! this machine reads nothing. With one: who shows it, in the address once, in a cookie from then on, or
//! in the header of a program.

use axum::http::header::{AUTHORIZATION, COOKIE, HOST};
use axum::http::{HeaderMap, Uri};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The cookie that holds the token.
pub(super) const TOKEN_COOKIE: &str = "agon_token";

pub(super) struct Door {
    /// The token's digest: comparing digests in constant time tells neither the token nor its length.
    token: Option<[u8; 32]>,
}

/// What the door says to a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Come in.
    Enter,
    /// Come in, and take the token out of the address into a cookie.
    Remember(String),
    /// The token is missing or wrong.
    Unknown,
    /// The request is for a host that this is not.
    Elsewhere,
}

impl Door {
    pub(super) fn new(token: Option<&str>) -> Self {
        Self {
            token: token.map(|token| Sha256::digest(token.as_bytes()).into()),
        }
    }

    pub(super) fn answer(&self, uri: &Uri, headers: &HeaderMap) -> Answer {
        let Some(token) = &self.token else {
            let host = headers.get(HOST).and_then(|host| host.to_str().ok());
            return if host.is_some_and(is_this_machine) {
                Answer::Enter
            } else {
                Answer::Elsewhere
            };
        };
        let is_right = |shown: &str| {
            let shown: [u8; 32] = Sha256::digest(shown.as_bytes()).into();
            bool::from(shown.ct_eq(token))
        };
        if let Some(shown) = in_address(uri).filter(|shown| is_right(shown)) {
            return Answer::Remember(shown.to_owned());
        }
        let shown = in_cookie(headers).or_else(|| in_header(headers));
        if shown.is_some_and(is_right) {
            Answer::Enter
        } else {
            Answer::Unknown
        }
    }
}

fn in_address(uri: &Uri) -> Option<&str> {
    let mut parts = uri.query()?.split('&');
    parts.find_map(|part| part.strip_prefix("token="))
}

fn in_cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let mut cookies = cookies.flat_map(|value| value.split(';'));
    cookies.find_map(|cookie| cookie.trim().strip_prefix(TOKEN_COOKIE)?.strip_prefix('='))
}

fn in_header(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

/// Whether a Host header names this machine as only this machine is named.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let is_loopback = |ip: std::net::IpAddr| ip.is_loopback();
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(is_loopback)
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn asked(door: &Door, path: &str, headers: &[(HeaderName, &str)]) -> Answer {
        let pairs = headers
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()));
        door.answer(&path.parse().unwrap(), &pairs.collect())
    }

    #[test]
    fn without_a_token_only_this_machines_own_names_are_answered() {
        let door = Door::new(None);
        for (host, answer) in [
            ("127.0.0.1:8000", Answer::Enter),
            ("localhost", Answer::Enter),
            ("LOCALHOST:1", Answer::Enter),
            ("[::1]:8000", Answer::Enter),
            ("127.9.9.9", Answer::Enter),
            ("evil.example:8000", Answer::Elsewhere),
            ("localhost.evil.example", Answer::Elsewhere),
            ("10.0.0.1", Answer::Elsewhere),
            ("", Answer::Elsewhere),
        ] {
            assert_eq!(asked(&door, "/", &[(HOST, host)]), answer, "{host}");
        }
        assert_eq!(asked(&door, "/", &[]), Answer::Elsewhere);
    }

    #[test]
    fn a_token_is_taken_from_the_address_a_cookie_or_a_header() {
        let door = Door::new(Some("sesame"));
        let cases = [
            ("/?token=sesame", None, Answer::Remember("sesame".into())),
            (
                "/?a=1&token=sesame",
                None,
                Answer::Remember("sesame".into()),
            ),
            ("/?token=sesam", None, Answer::Unknown),
            ("/", None, Answer::Unknown),
            ("/", Some((COOKIE, "a=b; agon_token=sesame")), Answer::Enter),
            ("/", Some((COOKIE, "agon_token=Sesame")), Answer::Unknown),
            ("/", Some((COOKIE, "agon_tokens=sesame")), Answer::Unknown),
            ("/", Some((AUTHORIZATION, "bearer sesame")), Answer::Enter),
            ("/", Some((AUTHORIZATION, "Basic sesame")), Answer::Unknown),
        ];
        for (path, header, answer) in cases {
            let headers: Vec<_> = header.clone().into_iter().collect();
            assert_eq!(asked(&door, path, &headers), answer, "{path} {header:?}");
        }
    }
}
