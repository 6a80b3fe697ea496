//! The tokenizer for text that goes on with another: without the space that some put before every text.
//!
//! SentencePiece-like tokenizers (Llama 2, Mistral, T5) and some of bytes begin a text with a space that is not in
//! it. Where a text is continued there is none; [`continuing`] gives the same tokenizer without it.

use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// A copy of `tokenizer` that puts nothing before a text.
///
/// # Errors
/// When the copy cannot be written or read.
pub(crate) fn continuing(tokenizer: &Tokenizer) -> Result<Tokenizer, tokenizers::Error> {
    let mut json: Value = serde_json::from_str(&tokenizer.to_string(false)?)?;
    for part in ["normalizer", "pre_tokenizer"] {
        let kept = without_prefix(json[part].take());
        json[part] = kept.unwrap_or(Value::Null);
    }
    Tokenizer::from_bytes(serde_json::to_vec(&json)?)
}

/// A normalizer or pre-tokenizer that adds no space; none when it does nothing else.
fn without_prefix(mut part: Value) -> Option<Value> {
    match part["type"].as_str() {
        Some("Prepend") => return None,
        Some("Metaspace") => {
            part["prepend_scheme"] = json!("never");
            if part.get("add_prefix_space").is_some() {
                part["add_prefix_space"] = json!(false);
            }
        }
        Some("ByteLevel") => part["add_prefix_space"] = json!(false),
        Some("Sequence") => {
            for list in ["normalizers", "pretokenizers"] {
                if let Some(Value::Array(parts)) = part.get_mut(list) {
                    let kept = parts.drain(..).filter_map(without_prefix).collect();
                    *parts = kept;
                }
            }
        }
        _ => {}
    }
    Some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_before_every_text_is_taken_out() {
        let split = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": false});
        for (part, expected) in [
            (json!({"type": "Prepend", "prepend": "▁"}), Value::Null),
            (
                json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFC"}]}),
                json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
            ),
            (
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}),
            ),
            (
                json!({"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": true}]}),
                json!({"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": false}]}),
            ),
            (split.clone(), split.clone()),
        ] {
            assert_eq!(without_prefix(part).unwrap_or_default(), expected);
        }
    }
}
