//! Why a request is not answered, as HTTP has it.

use std::time::Duration;

use axum::http::StatusCode;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::response::{IntoResponse, Json, Response};

use crate::RulingError;
use crate::wire::{Refusal, RefusalReason};

/// A refusal: its status, a word for programs, a sentence for people, and when to come again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    status: StatusCode,
    code: &'static str,
    message: String,
    retry_after: Option<Duration>,
}

impl Refused {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    fn after(self, pause: Duration) -> Self {
        Self {
            retry_after: Some(pause),
            ..self
        }
    }

    /// What was sent is no JSON.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", message)
    }

    /// It is JSON, and not a request; `message` names the field.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message)
    }

    /// There are too many bytes.
    pub(super) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// The request did not arrive in time.
    pub(super) fn too_slow() -> Self {
        let message = "the request did not arrive within preference.timeout_seconds";
        Self::new(StatusCode::REQUEST_TIMEOUT, "too_slow", message)
    }

    pub(super) fn unauthorized() -> Self {
        let message = "show the token: Authorization: Bearer <token>";
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    pub(super) fn not_found() -> Self {
        let message = "there are POST /v1/preferences, GET /healthz and GET /readyz";
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(super) fn method() -> Self {
        let message = "there are POST /v1/preferences, GET /healthz and GET /readyz";
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            message,
        )
    }

    /// There is no room now.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        let refused = Self::new(StatusCode::TOO_MANY_REQUESTS, "busy", message);
        refused.after(Duration::from_secs(1))
    }

    /// There is no judge now.
    pub(super) fn unavailable(message: impl Into<String>, pause: Duration) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message).after(pause)
    }

    /// There is no ruling; `probe` is how long an open circuit stays so.
    pub(super) fn unruled(error: &RulingError, probe: Duration) -> Self {
        let message = error.to_string();
        match error {
            RulingError::Full { .. } => Self::busy(message),
            RulingError::Late { .. } | RulingError::NoJudge { .. } => {
                Self::unavailable(message, probe)
            }
            RulingError::Failed { .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "judge_failed", message)
            }
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let refusal = Refusal {
            error: RefusalReason {
                code: self.code.to_owned(),
                message: self.message,
            },
        };
        let mut response = (self.status, Json(refusal)).into_response();
        let headers = response.headers_mut();
        if let Some(pause) = self.retry_after {
            // Whole seconds, and never none: zero means at once.
            headers.insert(
                RETRY_AFTER,
                pause
                    .as_secs_f64()
                    .ceil()
                    .max(1.0)
                    .to_string()
                    .parse()
                    .expect("a number can be a header"),
            );
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = axum::http::HeaderValue::from_static("Bearer");
            headers.insert(WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_may_come_again_is_told_when() {
        let judge = || "fake".to_owned();
        let reason = || "oh".to_owned();
        let probe = Duration::from_millis(2500);
        for (error, status, retry_after) in [
            (RulingError::Full { waiting: 3 }, 429, Some("1")),
            (
                RulingError::Late {
                    patience: probe,
                    reason: None,
                },
                503,
                Some("3"),
            ),
            (
                RulingError::NoJudge {
                    judge: judge(),
                    reason: reason(),
                },
                503,
                Some("3"),
            ),
            (
                RulingError::Failed {
                    judge: judge(),
                    reason: reason(),
                },
                502,
                None,
            ),
        ] {
            let response = Refused::unruled(&error, probe).into_response();
            let header = response.headers().get(RETRY_AFTER);
            let told = header.map(|value| value.to_str().unwrap());
            assert_eq!(
                (response.status().as_u16(), told),
                (status, retry_after),
                "{error}"
            );
        }
    }
}
