//! What travels over HTTP between preference services and those who ask them.
//!
//! `POST /v1/preferences` with [`PreferencesRequest`] is answered by [`Preferences`]:
//!
//! ```json
//! {"pairs": [{"prompt": "What is 2 + 2?", "first": "4", "second": "5"}], "orders": "both"}
//! {"judge": "rule", "version": 0, "results": [{"p": 0.98, "version": 0, "order_gap": 0.02}]}
//! ```
//!
//! `prompt` is text, or a dialogue as a list of messages with `role` and `content`, as rows have it; `tools` and
//! `template_kwargs` may go with it. A judge with a chat template renders messages with its own.
//! `first_finish` and `second_finish` are `"stop"` or `"length"`: a response that was cut off gets no
//! end-of-text unless the judge's score is read there; without them it ended as its ids say, and where there are none by itself. The ids of
//! prompt and responses may be given besides the texts, for judges that read tokens: they are read where
//! the prompt's are what the judge's own tokenizer makes of the prompt, and where they are not, or none
//! are given, the service makes them. `answer` is the golden answer, for `exact-match`. `orders` is `"one"`, `"both"` or `"auto"`; without it the service's own setting holds. A result
//! has `p`, the probability that `first` is preferred to `second`, or `abstained` with the reason.
//!
//! Whatever goes wrong is answered by a [`Refusal`]: `{"error": {"code": "invalid", "message":
//! "pairs[3].first: it is empty"}}`.

use messages::Finish;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use settings::OrdersSetting;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with pairs")]
pub(crate) struct PreferencesRequest {
    /// The comparisons.
    pub pairs: Vec<AskedPair>,
    /// In how many orders each is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orders: Option<OrdersSetting>,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an object with prompt, first and second"
)]
pub(crate) struct AskedPair {
    /// Text or messages.
    pub prompt: Value,
    /// The tools of the dialogue, as JSON schemas.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Value>,
    /// Further variables of its chat template.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub template_kwargs: Map<String, Value>,
    /// The golden answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// The response whose preference is asked for.
    pub first: String,
    /// The one it is compared with.
    pub second: String,
    /// How the first response ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_finish: Option<AskedFinish>,
    /// How the second ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_finish: Option<AskedFinish>,
    /// The prompt's tokens, special tokens included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_ids: Option<Vec<u32>>,
    /// The first response's, end-of-text included where it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_ids: Option<Vec<u32>>,
    /// The second's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_ids: Option<Vec<u32>>,
}

/// Why a response ended, in the words of OpenAI's `finish_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AskedFinish {
    /// By itself.
    Stop,
    /// It was cut off.
    Length,
}

impl From<Finish> for AskedFinish {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::EndOfText => Self::Stop,
            Finish::Length => Self::Length,
        }
    }
}

impl From<AskedFinish> for Finish {
    fn from(finish: AskedFinish) -> Self {
        match finish {
            AskedFinish::Stop => Self::EndOfText,
            AskedFinish::Length => Self::Length,
        }
    }
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Preferences {
    /// The judge's name.
    pub judge: String,
    /// The judge's version; 0 when only a verdict tells it and there is none.
    pub version: u64,
    /// One for every pair, in their order.
    pub results: Vec<Ruled>,
}

/// What is said of one comparison: either `p` or `abstained`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ruled {
    /// The probability that the first is preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p: Option<f32>,
    /// The version of the judge that gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// How far the two orders are apart, where both were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order_gap: Option<f32>,
    /// Why there is no p.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abstained: Option<String>,
}

/// Why nothing is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    pub error: RefusalReason,
}

/// The reason, for programs and for people.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RefusalReason {
    /// One word.
    pub code: String,
    /// A lowercase fragment that names the field.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_wire_is_as_it_is_written_down() {
        let request = json!({
            "pairs": [{"prompt": "What is 2 + 2?", "first": "4", "second": "5"}],
            "orders": "both",
        });
        let read: PreferencesRequest = serde_json::from_value(request.clone()).unwrap();
        assert_eq!(read.orders, Some(OrdersSetting::Both));
        assert_eq!(serde_json::to_value(&read).unwrap(), request);
        let answer = Preferences {
            judge: "rule".into(),
            version: 3,
            results: vec![
                Ruled {
                    p: Some(0.75),
                    version: Some(3),
                    order_gap: Some(0.5),
                    abstained: None,
                },
                Ruled {
                    abstained: Some("too long".into()),
                    ..Ruled::default()
                },
            ],
        };
        let written = json!({
            "judge": "rule",
            "version": 3,
            "results": [{"p": 0.75, "version": 3, "order_gap": 0.5}, {"abstained": "too long"}],
        });
        assert_eq!(serde_json::to_value(&answer).unwrap(), written);
        assert_eq!(
            serde_json::from_value::<Preferences>(written).unwrap(),
            answer
        );
    }
}
