//! Tokenizer variant for text that continues another, without the prefix space that some tokenizers add.
//!
//! SentencePiece-like tokenizers (Llama 2, Mistral, T5) and some byte-level ones prepend a space to every text, which
//! is wrong for a continuation.

use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// Copies `tokenizer` without its prefix space.
///
/// # Errors
/// When the tokenizer cannot be serialised or parsed.
pub(crate) fn without_prefix_space(tokenizer: &Tokenizer) -> Result<Tokenizer, tokenizers::Error> {
    let mut json: Value = serde_json::from_str(&tokenizer.to_string(false)?)?;
    for part in ["normalizer", "pre_tokenizer"] {
        let stripped = without_prefix(json[part].take());
        json[part] = stripped.unwrap_or(Value::Null);
    }
    Tokenizer::from_bytes(serde_json::to_vec(&json)?)
}

/// Removes the prefix space from a normalizer or pre-tokenizer; `None` when nothing remains.
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
                    let stripped = parts.drain(..).filter_map(without_prefix).collect();
                    *parts = stripped;
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
    fn the_prefix_space_is_removed() {
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
