//! Error responses of the HTTP API.

use std::time::Duration;

use axum::http::StatusCode;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::response::{IntoResponse, Json, Response};
use telemetry::http::AccessRefusal;

use crate::error::ComparisonError;
use crate::wire::{ErrorBody, ErrorDetail};

/// An error response: status, code, message, and when to retry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HttpError {
    status: StatusCode,
    code: &'static str,
    message: String,
    retry_after: Option<Duration>,
}

impl HttpError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    fn with_retry_after(self, delay: Duration) -> Self {
        Self {
            retry_after: Some(delay),
            ..self
        }
    }

    /// The body is not JSON.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", message)
    }

    /// The body is JSON but not a valid request; `message` names the field.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message)
    }

    /// The body is too large.
    pub(super) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// The request did not arrive in time.
    pub(super) fn too_slow() -> Self {
        let message = "the request did not arrive within preference.timeout_seconds";
        Self::new(StatusCode::REQUEST_TIMEOUT, "too_slow", message)
    }

    /// The body is not declared to be JSON, as a page of another site would send it without asking first.
    pub(super) fn unsupported_media_type() -> Self {
        let message = "send JSON with the header Content-Type: application/json";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            message,
        )
    }

    /// The access control refuses the request.
    pub(super) fn refused(refusal: AccessRefusal) -> Self {
        let code = match refusal {
            AccessRefusal::Unauthorized => "unauthorized",
            AccessRefusal::Host => "foreign_host",
            AccessRefusal::Origin => "foreign_origin",
        };
        Self::new(refusal.status(), code, refusal.message())
    }

    pub(super) fn not_found() -> Self {
        let message = "there are POST /v1/preferences, GET /healthz and GET /readyz";
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(super) fn method_not_allowed() -> Self {
        let message = "there are POST /v1/preferences, GET /healthz and GET /readyz";
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            message,
        )
    }

    /// The queue is full.
    pub(super) fn too_many_requests(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "busy", message);
        error.with_retry_after(Duration::from_secs(1))
    }

    /// No judge is available.
    pub(super) fn unavailable(message: impl Into<String>, delay: Duration) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message).with_retry_after(delay)
    }

    /// Response to a failed comparison; `probe_after` is the time that a circuit breaker stays open.
    pub(super) fn from_comparison(error: &ComparisonError, probe_after: Duration) -> Self {
        let message = error.to_string();
        match error {
            ComparisonError::QueueFull { .. } => Self::too_many_requests(message),
            ComparisonError::TimedOut { .. } | ComparisonError::NoJudge { .. } => {
                Self::unavailable(message, probe_after)
            }
            ComparisonError::JudgeFailed { .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "judge_failed", message)
            }
        }
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: ErrorDetail {
                code: self.code.to_owned(),
                message: self.message,
            },
        };
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(delay) = self.retry_after {
            // Whole seconds, at least one.
            headers.insert(
                RETRY_AFTER,
                delay
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
    fn retryable_errors_have_a_retry_after_header() {
        let judge = || "fake".to_owned();
        let reason = || "oh".to_owned();
        let probe = Duration::from_millis(2500);
        for (error, status, retry_after) in [
            (ComparisonError::QueueFull { waiting: 3 }, 429, Some("1")),
            (
                ComparisonError::TimedOut {
                    timeout: probe,
                    reason: None,
                },
                503,
                Some("3"),
            ),
            (
                ComparisonError::NoJudge {
                    judge: judge(),
                    reason: reason(),
                },
                503,
                Some("3"),
            ),
            (
                ComparisonError::JudgeFailed {
                    judge: judge(),
                    reason: reason(),
                },
                502,
                None,
            ),
        ] {
            let response = HttpError::from_comparison(&error, probe).into_response();
            let header = response.headers().get(RETRY_AFTER);
            let value = header.map(|value| value.to_str().unwrap());
            assert_eq!(
                (response.status().as_u16(), value),
                (status, retry_after),
                "{error}"
            );
        }
    }
}
