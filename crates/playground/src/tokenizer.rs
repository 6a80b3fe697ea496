//! Word-level tokenizers as Hugging Face files: whitespace pre-tokenisation, one token per word.
//!
//! No special tokens are added and no spaces are cleaned up, so encoding and decoding are exact inverses. A word
//! outside the vocabulary is an encoding error, never an unknown token.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::PlaygroundError;
use crate::vocabulary::Vocabulary;

/// Maximum sequence length of the playground's models, in tokens.
const MODEL_MAX_LENGTH: u32 = 128;

impl Vocabulary {
    /// The `tokenizer.json` of the summarisation task.
    pub fn tokenizer_json(&self) -> String {
        word_level(self.words(), self.specials()).to_string()
    }

    /// The `tokenizer_config.json` of the summarisation task.
    pub fn tokenizer_config_json(&self) -> String {
        let [pad, bos, sep, eos] = ["<pad>", "<bos>", "<sep>", "<eos>"];
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "bos_token": bos,
            "sep_token": sep,
            "eos_token": eos,
            "add_bos_token": false,
            "add_eos_token": false,
            "clean_up_tokenization_spaces": false,
            "model_max_length": MODEL_MAX_LENGTH,
        });
        config.to_string()
    }
}

/// Writes `tokenizer.json` and `tokenizer_config.json` of the summarisation task into an existing folder.
///
/// # Errors
/// If a file cannot be written.
pub fn write_tokenizer(folder: &Path) -> Result<(), PlaygroundError> {
    let vocabulary = Vocabulary::shared();
    write(
        folder,
        "tokenizer.json",
        vocabulary.tokenizer_json().as_bytes(),
    )?;
    write(
        folder,
        "tokenizer_config.json",
        vocabulary.tokenizer_config_json().as_bytes(),
    )
}

/// A WordLevel `tokenizer.json`: ids in the order of `words`, whose first entries, `specials`, are added tokens.
pub(crate) fn word_level<'a>(words: impl Iterator<Item = &'a str>, specials: &[&str]) -> Value {
    let vocabulary: Map<String, Value> = (0u32..)
        .zip(words)
        .map(|(id, word)| (word.to_owned(), json!(id)))
        .collect();
    let added: Vec<Value> = (0u32..)
        .zip(specials)
        .map(|(id, word)| special_token(id, word))
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    })
}

fn special_token(id: u32, word: &str) -> Value {
    json!({
        "id": id,
        "content": word,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": true,
    })
}

/// Writes a file of a model folder.
pub(crate) fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), PlaygroundError> {
    let path = folder.join(name);
    std::fs::write(&path, bytes).map_err(|source| PlaygroundError::Write { path, source })
}

#[cfg(test)]
mod tests {
    use tokenizers::Tokenizer;

    use super::*;
    use crate::post::Post;

    fn load() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        write_tokenizer(folder.path()).unwrap();
        Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap()
    }

    #[test]
    fn encoding_and_decoding_posts_round_trips() {
        let tokenizer = load();
        assert_eq!(tokenizer.get_vocab_size(true), 200);
        for seed in 0..200 {
            let post = Post::generate(seed);
            let prompt = Vocabulary::shared().text(&post.prompt_ids());
            let encoding = tokenizer.encode(prompt.as_str(), true).unwrap();
            assert_eq!(encoding.get_ids(), post.prompt_ids());
            assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), prompt);
            assert_eq!(
                tokenizer.decode(encoding.get_ids(), true).unwrap(),
                post.text()
            );
        }
    }

    #[test]
    fn every_word_encodes_to_its_id_without_special_tokens() {
        let tokenizer = load();
        for (id, word) in (0u32..).zip(Vocabulary::shared().words()) {
            assert_eq!(
                tokenizer.encode(word, true).unwrap().get_ids(),
                [id],
                "{word}"
            );
        }
    }

    #[test]
    fn an_unknown_word_is_an_error() {
        assert!(load().encode("my umbrella", true).is_err());
    }

    #[test]
    fn the_config_lists_the_special_tokens() {
        let config: Value =
            serde_json::from_str(&Vocabulary::shared().tokenizer_config_json()).unwrap();
        let specials =
            ["pad_token", "bos_token", "sep_token", "eos_token"].map(|key| config[key].as_str());
        assert_eq!(
            specials.map(Option::unwrap),
            Vocabulary::shared().specials()
        );
    }

    #[test]
    fn a_write_error_names_the_path() {
        let error = write_tokenizer(Path::new("/nowhere/at/all"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nowhere/at/all/tokenizer.json"), "{error}");
    }
}
