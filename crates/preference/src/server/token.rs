//! The bearer token that clients must show.

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::server::HttpError;

/// Digest of a token. Comparing digests in constant time leaks neither the token nor its length.
pub(super) struct BearerToken([u8; 32]);

impl BearerToken {
    pub(super) fn new(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// Checks the `Authorization` header.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), HttpError> {
        let given = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let given = given.and_then(|value| {
            let (scheme, token) = value.split_at_checked("Bearer ".len())?;
            scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
        });
        let given: Option<[u8; 32]> = given.map(|token| Sha256::digest(token).into());
        if given.is_some_and(|given| bool::from(given.ct_eq(&self.0))) {
            Ok(())
        } else {
            Err(HttpError::unauthorized())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_is_accepted() {
        let token = BearerToken::new("sesame");
        for (given, is_accepted) in [
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
            if let Some(given) = given {
                headers.insert(AUTHORIZATION, given.parse().unwrap());
            }
            assert_eq!(token.check(&headers).is_ok(), is_accepted, "{given:?}");
        }
    }
}
