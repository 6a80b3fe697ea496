//! Inspection of a `tokenizer.json` before the library reads it: what would need memory or time out of proportion.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::guarded_tokenizer::linear_regex::is_linear;

/// Largest factor by which normalisation or decoding may lengthen a text.
const MAX_EXPANSION: usize = 4096;
/// Longest text that is added once to a text, or to each part of it, in bytes.
const MAX_AFFIX_BYTES: usize = 1024;
/// Largest number of special tokens that the post-processor adds to a text.
const MAX_ADDED_TOKENS: usize = 1024;
/// Longest word that WordPiece splits in quadratic time, in characters.
const MAX_WORD_CHARS: u64 = 1000;

/// Facts about a tokenizer from its file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Inspection {
    /// Whether every use takes time linear in the text, up to a logarithm.
    pub(super) is_linear: bool,
}

/// Parts of the file that are inspected.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: ModelPart,
}

/// Settings of the model, without its vocabulary.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ModelPart {
    max_input_chars_per_word: Option<u64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

impl Inspection {
    /// Inspects the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// When it is not JSON, or would need memory out of proportion, with the part that does.
    pub(super) fn of(bytes: &[u8]) -> Result<Self, String> {
        let parts: Parts = serde_json::from_slice(bytes).map_err(|error| {
            format!("it is not a tokenizer.json of the tokenizers library ({error})")
        })?;
        let normalizers = objects(&parts.normalizer);
        let decoders = objects(&parts.decoder);
        check_expansion("normalizer", &normalizers)?;
        check_expansion("decoder", &decoders)?;
        let added = added_tokens(&objects(&parts.post_processor))?;
        if added > MAX_ADDED_TOKENS {
            return Err(format!(
                "its post_processor adds {added} special tokens to every text, more than {MAX_ADDED_TOKENS}"
            ));
        }
        let model = &parts.model;
        for (key, affix) in [
            (
                "continuing_subword_prefix",
                &model.continuing_subword_prefix,
            ),
            ("end_of_word_suffix", &model.end_of_word_suffix),
        ] {
            check_affix(key, affix.as_deref())?;
        }
        let pre_tokenizers = objects(&parts.pre_tokenizer);
        let mut patterns = [normalizers, pre_tokenizers, decoders]
            .into_iter()
            .flatten();
        let longest_word = model.max_input_chars_per_word.unwrap_or_default();
        let has_linear_pattern = |object: &Map<String, Value>| {
            object
                .get("Regex")
                .and_then(Value::as_str)
                .is_none_or(is_linear)
        };
        Ok(Self {
            is_linear: longest_word <= MAX_WORD_CHARS && patterns.all(has_linear_pattern),
        })
    }
}

/// All objects in a value, the value itself included.
fn objects(value: &Value) -> Vec<&Map<String, Value>> {
    let mut found = Vec::new();
    let mut rest = vec![value];
    while let Some(value) = rest.pop() {
        match value {
            Value::Object(object) => {
                found.push(object);
                rest.extend(object.values());
            }
            Value::Array(values) => rest.extend(values),
            _ => {}
        }
    }
    found
}

/// Checks that the replacements of a part lengthen no text beyond measure.
fn check_expansion(part: &str, objects: &[&Map<String, Value>]) -> Result<(), String> {
    let mut total = 1_usize;
    for object in objects {
        let text = |key: &str| object.get(key).and_then(Value::as_str);
        check_affix("prepend", text("prepend"))?;
        let factor = match (object.get("pattern"), text("content")) {
            (Some(pattern), Some(content)) => replacement_factor(pattern, content),
            _ => 1,
        };
        let table = text("precompiled_charsmap").map_or(Ok(1), longest_entry)?;
        total = total.saturating_mul(factor).saturating_mul(table.max(1));
    }
    match total > MAX_EXPANSION {
        true => Err(format!(
            "its {part} can make a text {total} times as long, more than {MAX_EXPANSION}"
        )),
        false => Ok(()),
    }
}

/// Factor by which replacing a pattern by `content` can lengthen a text.
fn replacement_factor(pattern: &Value, content: &str) -> usize {
    match pattern["String"].as_str().map(str::len) {
        Some(length) if length > 0 => content.len().div_ceil(length).max(1),
        // It may match a single character, or between two.
        _ => content.len() + 1,
    }
}

fn check_affix(key: &str, affix: Option<&str>) -> Result<(), String> {
    match affix.map(str::len) {
        Some(length) if length > MAX_AFFIX_BYTES => Err(format!(
            "its {key} has {length} bytes, more than {MAX_AFFIX_BYTES}"
        )),
        _ => Ok(()),
    }
}

/// Length of the longest replacement in SentencePiece's table of normalisations: the size of a trie in four bytes, the
/// trie, and texts that end with a zero byte.
fn longest_entry(table: &str) -> Result<usize, String> {
    let broken = |reason: &str| format!("its precompiled_charsmap is not usable ({reason})");
    let table = BASE64_STANDARD.decode(table);
    let table = table.map_err(|error| broken(&error.to_string()))?;
    let (size, rest) = table
        .split_first_chunk::<4>()
        .ok_or_else(|| broken("it has no size"))?;
    let size = usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX);
    let texts = rest
        .get(size..)
        .ok_or_else(|| broken("its trie is longer than the table"))?;
    Ok(texts
        .split(|&byte| byte == 0)
        .map(<[u8]>::len)
        .max()
        .unwrap_or(0))
}

/// Number of special tokens that templates of the post-processor add to a single text.
fn added_tokens(objects: &[&Map<String, Value>]) -> Result<usize, String> {
    let mut total = 0_usize;
    for object in objects {
        let Some(Value::Array(pieces)) = object.get("single") else {
            continue;
        };
        let known = object.get("special_tokens").unwrap_or(&Value::Null);
        for name in pieces
            .iter()
            .filter_map(|piece| piece["SpecialToken"]["id"].as_str())
        {
            let ids = known[name]["ids"].as_array().ok_or_else(|| {
                format!(
                    "its post_processor adds the special token {name:?}, whose ids it does not have"
                )
            })?;
            total = total.saturating_add(ids.len());
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn inspected(parts: &Value) -> Result<Inspection, String> {
        Inspection::of(parts.to_string().as_bytes())
    }

    fn table(trie_bytes: u32, rest: &[u8]) -> String {
        BASE64_STANDARD.encode([&trie_bytes.to_le_bytes(), rest].concat())
    }

    #[test]
    fn texts_are_not_lengthened_beyond_measure() {
        let replace = |content: &str| json!({"type": "Replace", "pattern": {"String": "a"}, "content": content});
        let doubling = vec![replace("aa"); 13];
        let ids: Vec<u32> = vec![1; 2000];
        for (parts, expected) in [
            (
                json!({"normalizer": replace(&"b".repeat(5000))}),
                "its normalizer can make",
            ),
            (
                json!({"normalizer": {"type": "Sequence", "normalizers": doubling}}),
                "8192 times",
            ),
            (
                json!({"decoder": {"type": "Sequence", "decoders": doubling}}),
                "its decoder can make",
            ),
            (
                json!({"normalizer": {"type": "Prepend", "prepend": "b".repeat(5000)}}),
                "its prepend has 5000",
            ),
            (
                json!({"model": {"end_of_word_suffix": "b".repeat(5000)}}),
                "its end_of_word_suffix has",
            ),
            (
                json!({"normalizer": {"precompiled_charsmap": "////////"}}),
                "its trie is longer",
            ),
            (
                json!({"normalizer": {"precompiled_charsmap": "AA=="}}),
                "it has no size",
            ),
            (
                json!({"normalizer": {"precompiled_charsmap": table(4, &[b'x'; 9000])}}),
                "8996 times as long",
            ),
            (
                json!({"post_processor": {"single": [{"SpecialToken": {"id": "zz"}}], "special_tokens": {}}}),
                "\"zz\", whose ids",
            ),
            (
                json!({"post_processor": {"single": [{"SpecialToken": {"id": "s"}}],
                                          "special_tokens": {"s": {"ids": ids}}}}),
                "adds 2000 special tokens",
            ),
            (json!("text"), "not a tokenizer.json"),
        ] {
            let refused = inspected(&parts).unwrap_err();
            assert!(
                refused.contains(expected),
                "{expected:?} is not in {refused}"
            );
        }
        let plain = json!({"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            {"type": "Precompiled", "precompiled_charsmap": table(4, b"trieab\0c\0")}]},
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
        assert_eq!(inspected(&plain), Ok(Inspection { is_linear: true }));
    }

    #[test]
    fn what_may_take_long_is_recognised() {
        let split = |pattern: &str| json!({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}}});
        for (parts, is_linear) in [
            (split(r"\s+(?!\S)|\s+"), true),
            (split(r"(a+)+(?!b)"), false),
            (json!({"model": {"max_input_chars_per_word": 100}}), true),
            (
                json!({"model": {"max_input_chars_per_word": 1_000_000}}),
                false,
            ),
        ] {
            assert_eq!(inspected(&parts), Ok(Inspection { is_linear }), "{parts}");
        }
    }
}
