//! The text that each token of a sequence adds, for people who look at tokens one by one.
//!
//! What a token says depends on its neighbours: a first word may lose its space, and a character may need
//! several tokens. So the text of a token is what the decoder's answer gains by it.

use crate::Tokenizer;

/// What a decoder writes for bytes that are no character yet.
const UNFINISHED: char = '\u{fffd}';

impl Tokenizer {
    /// The texts of `ids`, one each, special tokens included; joined they are [`Self::decode_all`] wherever
    /// the decoder adds text at the end only. A token that is a part of a character is empty, and the one
    /// that completes it is the whole.
    #[must_use]
    pub fn token_texts(&self, ids: &[u32]) -> Vec<String> {
        let mut texts = Vec::with_capacity(ids.len());
        // Decoded are the tokens from `start`; those before `told` have been told.
        let (mut start, mut told) = (0, 0);
        for end in 1..=ids.len() {
            let before = self.decode_all(&ids[start..told]);
            let now = self.decode_all(&ids[start..end]);
            let is_last = end == ids.len();
            if now.len() <= before.len() || (now.ends_with(UNFINISHED) && !is_last) {
                texts.push(String::new());
                continue;
            }
            let gained = now.strip_prefix(before.as_str()).unwrap_or(&now);
            texts.push(gained.to_owned());
            (start, told) = (told, end);
        }
        texts
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{Tokenizer, fixtures::config};

    /// Words with a space before them, and the bytes of an é.
    fn tokenizer() -> Tokenizer {
        let vocabulary = json!({"<s>": 0, "\u{120}a": 1, "b": 2, "\u{c3}": 3, "\u{a9}": 4, ".": 5});
        let file = json!({
            "version": "1.0",
            "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
                              "rstrip": false, "normalized": false, "special": true}],
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "."}
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        Tokenizer::load(folder.path(), &config(8), None).unwrap()
    }

    #[test]
    fn each_token_has_what_the_text_gains_by_it() {
        let tokenizer = tokenizer();
        let cases: [(&[u32], &[&str]); 5] = [
            (&[], &[]),
            (&[0, 1, 2, 5], &["<s>", " a", "b", "."]),
            (&[2, 3, 4, 5], &["b", "", "é", "."]),
            (&[2, 3], &["b", "\u{fffd}"]),
            (&[1, 99, 2], &[" a", "", "b"]),
        ];
        for (ids, expected) in cases {
            assert_eq!(tokenizer.token_texts(ids), expected, "{ids:?}");
            assert_eq!(expected.concat(), tokenizer.decode_all(ids), "{ids:?}");
        }
    }
}
