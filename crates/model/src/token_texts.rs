//! Text of completions and of their single tokens, in the context of the prompt.
//!
//! The text of a token depends on its neighbours: the first token of a text may lose its space, and a character may
//! span several tokens. The text of a completion is therefore the decoded prompt and completion minus the decoded
//! prompt, and the text of a token is what it adds to the decoded text.

use messages::{Completion, Finish};

use crate::tokenizer::Tokenizer;

/// Replacement character that decoders emit for incomplete UTF-8.
const INCOMPLETE: char = '\u{fffd}';

impl Tokenizer {
    /// Text of `ids` after the tokens of `prompt`, without special tokens. A leading space is kept, and a character
    /// that starts in the prompt is complete.
    #[must_use]
    pub fn continuation(&self, prompt: &[u32], ids: &[u32]) -> String {
        let (before, both) = (self.decode(prompt), self.decode(&[prompt, ids].concat()));
        let start = common_prefix(&before, &both);
        both[start..].to_owned()
    }

    /// Text of a completion of `prompt`, as [`Self::continuation`], without its stop token.
    #[must_use]
    pub fn completion_text(&self, prompt: &[u32], completion: &Completion) -> String {
        let ids = match (completion.finish, completion.ids.split_last()) {
            (Finish::EndOfText, Some((_stop, rest))) => rest,
            _ => &completion.ids,
        };
        self.continuation(prompt, ids)
    }

    /// Text of each of `ids` after the tokens of `prompt`, special tokens included. Concatenated they are
    /// [`Self::continuation`] with its special tokens, wherever the decoder only appends text. A token that is part of
    /// a character is empty, and the one that completes it has the whole character.
    #[must_use]
    pub fn token_texts(&self, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        // At the start of a text there is no space to preserve.
        let prompt = match self.decode(prompt).is_empty() {
            true => &[],
            false => prompt,
        };
        let context = prompt.last().copied();
        let ids: Vec<u32> = context.into_iter().chain(ids.iter().copied()).collect();
        let mut texts = Vec::with_capacity(ids.len());
        let (mut start, mut done) = (0, usize::from(context.is_some()));
        for end in done + 1..=ids.len() {
            let mut before = self.decode_all(&ids[start..done]);
            let now = self.decode_all(&ids[start..end]);
            if !now.starts_with(&before) {
                // A character that was incomplete in the prompt is complete now.
                before.truncate(before.trim_end_matches(INCOMPLETE).len());
            }
            let is_last = end == ids.len();
            if now.len() <= before.len() || (now.ends_with(INCOMPLETE) && !is_last) {
                texts.push(String::new());
                continue;
            }
            texts.push(now[common_prefix(&before, &now)..].to_owned());
            (start, done) = (done, end);
        }
        texts
    }
}

/// Length of the common prefix in bytes, at a character boundary.
fn common_prefix(a: &str, b: &str) -> usize {
    let equal = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    equal.map(|(c, _)| c.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use messages::{Completion, Finish};
    use serde_json::{Value, json};

    use crate::{fixtures::config, tokenizer::Tokenizer};

    /// A byte-level vocabulary with the two bytes of é.
    fn tokenizer() -> Tokenizer {
        let vocabulary = json!({"<s>": 0, "\u{120}a": 1, "b": 2, "\u{c3}": 3, "\u{a9}": 4, ".": 5});
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                             "use_regex": true});
        of(&vocabulary, &decoder)
    }

    /// The same vocabulary in the style of Llama 2, whose decoder strips a text's first space.
    fn sentencepiece() -> Tokenizer {
        let vocabulary = json!({"<s>": 0, "▁a": 1, "b": 2, "<0xC3>": 3, "<0xA9>": 4, ".": 5});
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        of(&vocabulary, &decoder)
    }

    fn of(vocabulary: &Value, decoder: &Value) -> Tokenizer {
        let file = json!({
            "version": "1.0",
            "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
                              "rstrip": false, "normalized": false, "special": true}],
            "decoder": decoder,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "."}
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        Tokenizer::load(folder.path(), &config(8), None).unwrap()
    }

    #[test]
    fn each_token_has_the_text_that_it_adds() {
        let tokenizer = tokenizer();
        let cases: [(&[u32], &[&str]); 5] = [
            (&[], &[]),
            (&[0, 1, 2, 5], &["<s>", " a", "b", "."]),
            (&[2, 3, 4, 5], &["b", "", "é", "."]),
            (&[2, 3], &["b", "\u{fffd}"]),
            (&[1, 99, 2], &[" a", "", "b"]),
        ];
        for (ids, expected) in cases {
            assert_eq!(tokenizer.token_texts(&[], ids), expected, "{ids:?}");
            assert_eq!(expected.concat(), tokenizer.decode_all(ids), "{ids:?}");
        }
    }

    #[test]
    fn a_completion_text_is_the_text_after_the_prompt() {
        let cases: [(&[u32], &[u32], &[&str]); 6] = [
            (&[0, 1], &[1, 2, 5], &[" a", "b", "."]),
            (&[0, 2], &[5, 1], &[".", " a"]),
            (&[0], &[1, 1], &["a", " a"]),
            (&[], &[1, 1], &["a", " a"]),
            // The prompt ends inside a character.
            (&[2, 3], &[4, 1], &["é", " a"]),
            (&[1], &[], &[]),
        ];
        let tokenizer = sentencepiece();
        for (prompt, ids, expected) in cases {
            let texts = tokenizer.token_texts(prompt, ids);
            assert_eq!(texts, expected, "{prompt:?} {ids:?}");
            let text = tokenizer.continuation(prompt, ids);
            assert_eq!(text, expected.concat(), "{prompt:?} {ids:?}");
        }
        let byte_level = super::tests::tokenizer();
        assert_eq!(byte_level.continuation(&[1], &[1, 5]), " a.");
    }

    #[test]
    fn the_stop_token_is_not_part_of_the_text() {
        let tokenizer = sentencepiece();
        let completion = |finish| Completion {
            ids: vec![1, 5],
            finish,
            mixture_coef: 0.0,
            logp: Vec::new(),
            ref_logp: Vec::new(),
            behaviour_logp: Vec::new(),
            text: String::new(),
        };
        for (finish, expected) in [(Finish::EndOfText, " a"), (Finish::Length, " a.")] {
            let text = tokenizer.completion_text(&[2], &completion(finish));
            assert_eq!(text, expected, "{finish:?}");
        }
    }
}
