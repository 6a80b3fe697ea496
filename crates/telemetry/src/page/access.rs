//! Access control of the page: a browser shows its token once in the URL, then in a cookie. Other clients send it in an
//! `Authorization` header.

use axum::http::header::COOKIE;
use axum::http::{HeaderMap, Uri};

use crate::http::{AccessControl, AccessRefusal};

/// The cookie that holds the token.
pub(super) const TOKEN_COOKIE: &str = "agon_token";

/// Access decision for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AccessDecision {
    /// Answer the request.
    Allow,
    /// Redirect to the URL without the token and set the cookie.
    SetCookie(String),
    /// Refuse the request.
    Refuse(AccessRefusal),
}

/// Decides whether a request for this URL is answered.
pub(super) fn decide(access: &AccessControl, uri: &Uri, headers: &HeaderMap) -> AccessDecision {
    if let Err(refusal) = access.check_source(headers) {
        return AccessDecision::Refuse(refusal);
    }
    if let Some(given) = token_in_url(uri).filter(|given| access.accepts(given)) {
        return AccessDecision::SetCookie(given.to_owned());
    }
    if token_in_cookie(headers).is_some_and(|given| access.accepts(given)) {
        return AccessDecision::Allow;
    }
    match access.check(headers) {
        Ok(()) => AccessDecision::Allow,
        Err(refusal) => AccessDecision::Refuse(refusal),
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

#[cfg(test)]
mod tests {
    use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    type Given<'a> = &'a [(HeaderName, &'a str)];

    fn decision(token: Option<&str>, path: &str, given: Given<'_>) -> AccessDecision {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            headers.append(name, HeaderValue::from_str(value).unwrap());
        }
        decide(&AccessControl::new(token), &path.parse().unwrap(), &headers)
    }

    #[test]
    fn a_token_is_read_from_the_url_a_cookie_or_a_header() {
        let unauthorized = || AccessDecision::Refuse(AccessRefusal::Unauthorized);
        let set_cookie = || AccessDecision::SetCookie("sesame".into());
        let cases: [(&str, Given<'_>, AccessDecision); 8] = [
            ("/?token=sesame", &[], set_cookie()),
            ("/?a=1&token=sesame", &[], set_cookie()),
            ("/?token=sesam", &[], unauthorized()),
            ("/", &[], unauthorized()),
            (
                "/",
                &[(COOKIE, "a=b; agon_token=sesame")],
                AccessDecision::Allow,
            ),
            ("/", &[(COOKIE, "agon_token=Sesame")], unauthorized()),
            ("/", &[(COOKIE, "agon_tokens=sesame")], unauthorized()),
            (
                "/",
                &[(AUTHORIZATION, "bearer sesame")],
                AccessDecision::Allow,
            ),
        ];
        for (path, given, expected) in cases {
            assert_eq!(
                decision(Some("sesame"), path, given),
                expected,
                "{path} {given:?}"
            );
        }
        let foreign = [
            (COOKIE, "agon_token=sesame"),
            (ORIGIN, "http://evil.example"),
        ];
        assert_eq!(
            decision(Some("sesame"), "/", &foreign),
            AccessDecision::Refuse(AccessRefusal::Origin)
        );
        let local = [(HOST, "127.0.0.1:1")];
        assert_eq!(decision(None, "/?token=x", &local), AccessDecision::Allow);
        assert_eq!(
            decision(None, "/", &[(HOST, "evil.example")]),
            AccessDecision::Refuse(AccessRefusal::Host)
        );
    }
}
