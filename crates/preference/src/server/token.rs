//! The bearer token that clients must show.

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::Refused;

/// A token's digest: comparing digests in constant time tells neither the token nor its length.
pub(super) struct Token([u8; 32]);

impl Token {
    pub(super) fn new(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// Whether the request shows it.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), Refused> {
        let shown = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let shown = shown.and_then(|value| {
            let (scheme, token) = value.split_at_checked("Bearer ".len())?;
            scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
        });
        let shown: Option<[u8; 32]> = shown.map(|token| Sha256::digest(token).into());
        if shown.is_some_and(|shown| bool::from(shown.ct_eq(&self.0))) {
            Ok(())
        } else {
            Err(Refused::unauthorized())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_is_let_in() {
        let token = Token::new("sesame");
        for (shown, is_let_in) in [
            (Some("Bearer sesame"), true),
            (Some("bearer sesame"), true),
            (Some("Bearer sesame "), false),
            (Some("Bearer Sesame"), false),
            (Some("Bearer "), false),
            (Some("Basic sesame"), false),
            (Some("sesame"), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(shown) = shown {
                headers.insert(AUTHORIZATION, shown.parse().unwrap());
            }
            assert_eq!(token.check(&headers).is_ok(), is_let_in, "{shown:?}");
        }
    }
}
