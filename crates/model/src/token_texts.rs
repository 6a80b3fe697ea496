//! The text of tokens that follow others: of a completion, and of each of its tokens.
//!
//! What a token says depends on its neighbours: the first token of a text may lose its space, and a
//! character may need several tokens. So the text of a completion is what prompt and completion together
//! have beyond the prompt, and the text of a token is what the decoder's answer gains by it.

use messages::{Completion, Finish};

use crate::Tokenizer;

/// What a decoder writes for bytes that are no character yet.
const UNFINISHED: char = '\u{fffd}';

impl Tokenizer {
    /// The text of `ids` where they follow the tokens of `prompt`, without special tokens. The space
    /// that parts it from the prompt's text is kept; a character that the prompt began is whole.
    #[must_use]
    pub fn continuation(&self, prompt: &[u32], ids: &[u32]) -> String {
        let (before, whole) = (self.decode(prompt), self.decode(&[prompt, ids].concat()));
        let seam = common_prefix(&before, &whole);
        whole[seam..].to_owned()
    }

    /// The text of a completion of the tokens of `prompt`, as [`Self::continuation`]; the token that
    /// ended it is not part of it.
    #[must_use]
    pub fn completion_text(&self, prompt: &[u32], completion: &Completion) -> String {
        let ids = match (completion.finish, completion.ids.split_last()) {
            (Finish::EndOfText, Some((_end, said))) => said,
            _ => &completion.ids,
        };
        self.continuation(prompt, ids)
    }

    /// The texts of `ids`, one each, special tokens included, where they follow the tokens of `prompt`;
    /// joined they are [`Self::continuation`] with its special tokens wherever the decoder adds text at
    /// the end only. A token that is a part of a character is empty, and the one that completes it is the
    /// whole.
    #[must_use]
    pub fn token_texts(&self, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        // At the start of a text there is no space to keep.
        let prompt = match self.decode(prompt).is_empty() {
            true => &[],
            false => prompt,
        };
        let context = prompt.last().copied();
        let ids: Vec<u32> = context.into_iter().chain(ids.iter().copied()).collect();
        let mut texts = Vec::with_capacity(ids.len());
        let (mut start, mut told) = (0, usize::from(context.is_some()));
        for end in told + 1..=ids.len() {
            let mut before = self.decode_all(&ids[start..told]);
            let now = self.decode_all(&ids[start..end]);
            if !now.starts_with(&before) {
                // What the prompt left unfinished is finished now.
                before.truncate(before.trim_end_matches(UNFINISHED).len());
            }
            let is_last = end == ids.len();
            if now.len() <= before.len() || (now.ends_with(UNFINISHED) && !is_last) {
                texts.push(String::new());
                continue;
            }
            texts.push(now[common_prefix(&before, &now)..].to_owned());
            (start, told) = (told, end);
        }
        texts
    }
}

/// How many bytes the two begin with alike, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let alike = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    alike.map(|(c, _)| c.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use messages::{Completion, Finish};
    use serde_json::{Value, json};

    use crate::{Tokenizer, fixtures::config};

    /// Words with a space before them, and the bytes of an é.
    fn tokenizer() -> Tokenizer {
        let vocabulary = json!({"<s>": 0, "\u{120}a": 1, "b": 2, "\u{c3}": 3, "\u{a9}": 4, ".": 5});
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                             "use_regex": true});
        of(&vocabulary, &decoder)
    }

    /// The same as Llama 2 writes them: a text's first space is none.
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
            assert_eq!(tokenizer.token_texts(&[], ids), expected, "{ids:?}");
            assert_eq!(expected.concat(), tokenizer.decode_all(ids), "{ids:?}");
        }
    }

    #[test]
    fn a_completion_is_what_follows_its_prompt() {
        let cases: [(&[u32], &[u32], &[&str]); 6] = [
            (&[0, 1], &[1, 2, 5], &[" a", "b", "."]),
            (&[0, 2], &[5, 1], &[".", " a"]),
            (&[0], &[1, 1], &["a", " a"]),
            (&[], &[1, 1], &["a", " a"]),
            // The prompt ends within a character.
            (&[2, 3], &[4, 1], &["é", " a"]),
            (&[1], &[], &[]),
        ];
        let tokenizer = sentencepiece();
        for (prompt, ids, expected) in cases {
            let seen = tokenizer.token_texts(prompt, ids);
            assert_eq!(seen, expected, "{prompt:?} {ids:?}");
            let text = tokenizer.continuation(prompt, ids);
            assert_eq!(text, expected.concat(), "{prompt:?} {ids:?}");
        }
        let of_bytes = super::tests::tokenizer();
        assert_eq!(of_bytes.continuation(&[1], &[1, 5]), " a.");
    }

    #[test]
    fn the_token_that_ends_a_completion_is_not_said() {
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
