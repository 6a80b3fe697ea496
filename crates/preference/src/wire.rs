//! Messages of the HTTP API between preference services and their clients.
//!
//! `POST /v1/preferences` accepts [`PreferencesRequest`] and returns [`Preferences`]:
//!
//! ```json
//! {"pairs": [{"prompt": "What is 2 + 2?", "first": "4", "second": "5"}], "orders": "both"}
//! {"judge": "rule", "version": 0, "digest": "2ab3…", "results": [{"p": 0.98, "version": 0, "order_gap": 0.02}]}
//! ```
//!
//! - `prompt`: a text, or a dialogue as a list of messages with `role` and `content`, optionally with `tools` and
//!   `template_kwargs`. A judge with a chat template renders messages with its own.
//! - `first_finish`, `second_finish`: `"stop"` or `"length"`. A truncated response gets no end-of-text unless the judge
//!   is scored at that token. The default follows from the ids, or is `"stop"` without ids.
//! - `prompt_ids`, `first_ids`, `second_ids`: token ids, for judges that read tokens. They are used if the prompt's ids
//!   equal those of the judge's own tokenizer; otherwise the service encodes the texts.
//! - `answer`: the golden answer, for `exact-match`.
//! - `orders`: `"one"`, `"both"` or `"auto"`; the default is the service's setting.
//!
//! A result has either `p`, the probability that `first` is preferred to `second`, or `abstained` with the reason.
//!
//! Every error is an [`ErrorBody`]: `{"error": {"code": "invalid", "message": "pairs[3].first: it is empty"}}`.

use messages::Finish;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use settings::OrdersSetting;

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with pairs")]
pub(crate) struct PreferencesRequest {
    /// Comparisons.
    pub pairs: Vec<ComparisonInput>,
    /// Orders in which each pair is compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orders: Option<OrdersSetting>,
}

/// A comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an object with prompt, first and second"
)]
pub(crate) struct ComparisonInput {
    /// Text, or list of messages.
    pub prompt: Value,
    /// Tools of the dialogue, as JSON schemas.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Value>,
    /// Additional variables of the chat template.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub template_kwargs: Map<String, Value>,
    /// Golden answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Response whose probability of being preferred is returned.
    pub first: String,
    /// Response that it is compared with.
    pub second: String,
    /// Finish reason of the first response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_finish: Option<FinishReason>,
    /// Finish reason of the second response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_finish: Option<FinishReason>,
    /// Token ids of the prompt, special tokens included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_ids: Option<Vec<u32>>,
    /// Token ids of the first response, with end-of-text if it finished with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_ids: Option<Vec<u32>>,
    /// Token ids of the second response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_ids: Option<Vec<u32>>,
}

/// Finish reason, as OpenAI's `finish_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FinishReason {
    /// End-of-text.
    Stop,
    /// Truncated at the length limit.
    Length,
}

impl From<Finish> for FinishReason {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::EndOfText => Self::Stop,
            Finish::Length => Self::Length,
        }
    }
}

impl From<FinishReason> for Finish {
    fn from(finish: FinishReason) -> Self {
        match finish {
            FinishReason::Stop => Self::EndOfText,
            FinishReason::Length => Self::Length,
        }
    }
}

/// A response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Preferences {
    /// Name of the judge.
    pub judge: String,
    /// Version of the judge; 0 when it is known only from verdicts and all of them are abstentions.
    pub version: u64,
    /// Digest of what determines the verdicts of this version: settings, weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// One result for every pair, in their order.
    pub results: Vec<PreferenceResult>,
}

/// Result of a comparison: either `p` or `abstained`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PreferenceResult {
    /// Probability that the first response is preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p: Option<f32>,
    /// Version of the judge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// |p − (1 − p′)| between both orders, if both were used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order_gap: Option<f32>,
    /// Reason of the abstention.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abstained: Option<String>,
}

/// Body of an error response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    pub error: ErrorDetail,
}

/// Machine-readable code and message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ErrorDetail {
    /// Error code.
    pub code: String,
    /// Lowercase fragment that names the field or the limit.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_round_trip_as_documented() {
        let request = json!({
            "pairs": [{"prompt": "What is 2 + 2?", "first": "4", "second": "5"}],
            "orders": "both",
        });
        let parsed: PreferencesRequest = serde_json::from_value(request.clone()).unwrap();
        assert_eq!(parsed.orders, Some(OrdersSetting::Both));
        assert_eq!(serde_json::to_value(&parsed).unwrap(), request);
        let response = Preferences {
            judge: "rule".into(),
            version: 3,
            digest: Some("2ab3".into()),
            results: vec![
                PreferenceResult {
                    p: Some(0.75),
                    version: Some(3),
                    order_gap: Some(0.5),
                    abstained: None,
                },
                PreferenceResult {
                    abstained: Some("too long".into()),
                    ..PreferenceResult::default()
                },
            ],
        };
        let written = json!({
            "judge": "rule",
            "version": 3,
            "digest": "2ab3",
            "results": [{"p": 0.75, "version": 3, "order_gap": 0.5}, {"abstained": "too long"}],
        });
        assert_eq!(serde_json::to_value(&response).unwrap(), written);
        assert_eq!(
            serde_json::from_value::<Preferences>(written).unwrap(),
            response
        );
    }
}
