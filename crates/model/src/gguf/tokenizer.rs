//! The `tokenizer.json` and `tokenizer_config.json` that say what a GGUF file's metadata says.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::gguf::{
    config::SpecialIds,
    header::{GgufHeader, MERGES, MetadataValue, SCORES, TOKEN_TYPES, TOKENS},
};

/// Kinds of tokens.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// The space of SentencePiece.
const SPACE: &str = "▁";

/// Splits of texts before byte-level BPE, as the models' own `tokenizer.json` have them.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The files of a tokenizer.
pub(super) struct TokenizerFiles {
    /// `tokenizer.json`.
    pub(super) tokenizer: Value,
    /// `tokenizer_config.json`.
    pub(super) settings: Value,
}

/// Vocabulary of a file.
struct GgufVocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<u64>,
    /// `None` if the file has none.
    scores: Option<Vec<f64>>,
}

impl<'a> GgufVocabulary<'a> {
    fn of(header: &'a GgufHeader) -> Result<Self, String> {
        let texts = array(header, TOKENS, MetadataValue::as_text)?;
        let tokens = texts.ok_or_else(|| format!("it has no {TOKENS}"))?;
        let kinds = array(header, TOKEN_TYPES, MetadataValue::as_u64)?;
        let kinds = kinds.ok_or_else(|| {
            format!("it has no {TOKEN_TYPES}, which says what tokens are no text: convert the model again")
        })?;
        let scores = array(header, SCORES, MetadataValue::as_f64)?;
        let count = scores.as_ref().map_or(tokens.len(), Vec::len);
        if kinds.len() != tokens.len() || count != tokens.len() {
            return Err("its tokens, their types and their scores are not of one number".into());
        }
        let mut ids = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(*token, id) {
                return Err(format!(
                    "its tokens {first} and {id} have the same text, {token:?}"
                ));
            }
        }
        Ok(Self {
            tokens,
            kinds,
            scores,
        })
    }

    fn ids(&self) -> Value {
        let ids = self.tokens.iter().zip(0u32..);
        let ids: Map<String, Value> = ids.map(|(text, id)| ((*text).into(), id.into())).collect();
        Value::Object(ids)
    }

    /// Special tokens and those that users have defined, as `tokenizer.json` lists them.
    fn added(&self) -> Vec<Value> {
        let tokens = self.tokens.iter().zip(&self.kinds).zip(0u32..);
        tokens
            .filter(|((_, kind), _)| is_added(**kind))
            .map(|((text, kind), id)| {
                json!({
                    "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind != USER_DEFINED,
                })
            })
            .collect()
    }

    fn text(&self, id: Option<u32>) -> Option<&'a str> {
        self.tokens.get(id? as usize).copied()
    }

    /// Checks that the special tokens are in the vocabulary, and that those that end a text or a turn are no text.
    fn check_special(&self, special: SpecialIds) -> Result<(), String> {
        let count = self.tokens.len();
        for (name, id) in special.named() {
            let Some(id) = id else { continue };
            let Some(&kind) = self.kinds.get(id as usize) else {
                return Err(format!(
                    "tokenizer.ggml.{name}_token_id is {id}, and its vocabulary has {count} tokens"
                ));
            };
            if ["eos", "eot"].contains(&name) && !is_added(kind) {
                return Err(format!(
                    "tokenizer.ggml.{name}_token_id is {id}, which is a text by {TOKEN_TYPES} ({kind}): convert the model \
                     again"
                ));
            }
        }
        Ok(())
    }
}

/// Whether a token of this kind is found in a text before the text is split.
fn is_added(kind: u64) -> bool {
    [UNKNOWN, CONTROL, USER_DEFINED].contains(&kind)
}

/// Keys that are read here, after [`TOKENIZER`].
const READ: [&str; 9] = [
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
];
/// What the keys of a tokenizer begin with.
const TOKENIZER: &str = "tokenizer.ggml.";

/// Checks that every key of the tokenizer is read, or changes nothing: the id of a token, or what is not done.
fn check_keys(header: &GgufHeader) -> Result<(), String> {
    for (key, value) in &header.metadata {
        let Some(name) = key.strip_prefix(TOKENIZER) else {
            continue;
        };
        let is_harmless = name.contains("token_id")
            || name == "token_type_count"
            || *value == MetadataValue::Bool(false);
        if !READ.contains(&name) && !is_harmless {
            return Err(format!(
                "it has {key}, which is not supported: it may change how texts are read; use the model's own \
                 tokenizer.json with its Hugging Face folder"
            ));
        }
    }
    Ok(())
}

/// The elements of an array; `None` if the file does not have it.
fn array<'a, T>(
    header: &'a GgufHeader,
    key: &str,
    element: impl Fn(&'a MetadataValue) -> Option<T>,
) -> Result<Option<Vec<T>>, String> {
    header.get(key, "the list that it should be", |value| {
        value.as_array()?.iter().map(&element).collect()
    })
}

/// The tokenizer of a file.
///
/// # Errors
/// The reason why it is incomplete or not supported, with its key.
pub(super) fn tokenizer(
    header: &GgufHeader,
    special: SpecialIds,
) -> Result<TokenizerFiles, String> {
    let kind = header.text("tokenizer.ggml.model")?;
    let kind = kind.ok_or("it has no tokenizer.ggml.model")?;
    let pre = header.text("tokenizer.ggml.pre")?;
    check_keys(header)?;
    let vocabulary = GgufVocabulary::of(header)?;
    vocabulary.check_special(special)?;
    if special.ends().is_empty() {
        return Err("it has no tokenizer.ggml.eos_token_id: no completion would end".into());
    }
    let adds_bos = header.flag("tokenizer.ggml.add_bos_token")?;
    if header.flag("tokenizer.ggml.add_eos_token")? == Some(true) {
        return Err(
            "tokenizer.ggml.add_eos_token is true: an end after every text is not supported".into(),
        );
    }
    let (parts, adds_bos) = match kind {
        "gpt2" => (
            byte_level(header, &vocabulary, pre)?,
            adds_bos.unwrap_or(pre == Some("llama-bpe")),
        ),
        "llama" => {
            let adds_space = header.flag("tokenizer.ggml.add_space_prefix")?;
            (
                sentence_piece(&vocabulary, special, adds_space.unwrap_or(true))?,
                adds_bos.unwrap_or(true),
            )
        }
        other => {
            return Err(format!(
                "its tokenizer.ggml.model is {other:?}; supported are \"gpt2\" and \"llama\""
            ));
        }
    };
    if adds_bos && special.bos.is_none() {
        return Err("it has no tokenizer.ggml.bos_token_id, and texts begin with that token: set the key, or \
                    tokenizer.ggml.add_bos_token to false"
            .into());
    }
    let bos = vocabulary.text(special.bos).filter(|_| adds_bos);
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": vocabulary.added(),
        "normalizer": parts.normalizer, "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(bos, special.bos), "decoder": parts.decoder, "model": parts.model,
    });
    Ok(TokenizerFiles {
        tokenizer,
        settings: settings(header, &vocabulary, special)?,
    })
}

/// Parts of a `tokenizer.json`.
struct TokenizerParts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
}

/// Puts the beginning-of-text token before a text.
fn post_processor(bos: Option<&str>, id: Option<u32>) -> Value {
    let Some((bos, id)) = bos.zip(id) else {
        return Value::Null;
    };
    let special = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let text = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    let second = json!({"SpecialToken": {"id": bos, "type_id": 1}});
    json!({
        "type": "TemplateProcessing",
        "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), second, text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    })
}

/// Byte-level BPE, as in GPT-2.
fn byte_level(
    header: &GgufHeader,
    vocabulary: &GgufVocabulary<'_>,
    pre: Option<&str>,
) -> Result<TokenizerParts, String> {
    let supported = "supported are \"gpt-2\", \"llama-bpe\", \"qwen2\" and \"smollm\": use the model's own tokenizer.json with its \
                     Hugging Face folder";
    let pre = pre.ok_or_else(|| format!("it has no tokenizer.ggml.pre; {supported}"))?;
    let bytes = |splits: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": splits});
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let sequence =
        |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
    let pre_tokenizer = match pre {
        "gpt-2" => bytes(true),
        "smollm" => sequence(
            json!({"type": "Digits", "individual_digits": true}),
            bytes(true),
        ),
        "llama-bpe" => sequence(split(LLAMA3_SPLIT), bytes(false)),
        "qwen2" => sequence(split(QWEN2_SPLIT), bytes(false)),
        other => {
            return Err(format!("its tokenizer.ggml.pre is {other:?}; {supported}"));
        }
    };
    let merges = array(header, MERGES, MetadataValue::as_text)?;
    let merges = merges.ok_or_else(|| format!("it has no {MERGES}"))?;
    let normalizer = match pre {
        "qwen2" => json!({"type": "NFC"}),
        _ => Value::Null,
    };
    Ok(TokenizerParts {
        normalizer,
        pre_tokenizer,
        decoder: bytes(true),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre == "llama-bpe", "vocab": vocabulary.ids(), "merges": merges,
        }),
    })
}

/// SentencePiece BPE, as in Llama 2 and Mistral.
fn sentence_piece(
    vocabulary: &GgufVocabulary<'_>,
    special: SpecialIds,
    adds_space: bool,
) -> Result<TokenizerParts, String> {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let prepend = json!({"type": "Prepend", "prepend": SPACE});
    let normalizers = match adds_space {
        true => vec![prepend, replace],
        false => vec![replace],
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if adds_space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(TokenizerParts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": vocabulary.text(special.unknown),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": vocabulary.ids(), "merges": merges(vocabulary)?,
        }),
    })
}

/// A pair of tokens that are merged.
struct Merge<'a> {
    left: &'a str,
    right: &'a str,
    /// Score of the merged token.
    score: f64,
}

/// The merges of a SentencePiece vocabulary, best first, as transformers derives them from the scores.
fn merges(vocabulary: &GgufVocabulary<'_>) -> Result<Vec<Value>, String> {
    let scores = vocabulary.scores.as_ref();
    let scores = scores.ok_or_else(|| format!("it has no {SCORES}"))?;
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(format!("{SCORES}: that of token {id} is not finite"));
    }
    let is_piece = |kind: u64| ![UNKNOWN, CONTROL, BYTE].contains(&kind);
    let pieces = vocabulary.tokens.iter().zip(&vocabulary.kinds);
    let ids: HashMap<&str, usize> = pieces
        .enumerate()
        .filter(|(_, (_, kind))| is_piece(**kind))
        .map(|(id, (text, _))| (*text, id))
        .collect();
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if !ids.contains_key(token) {
            continue;
        }
        let places = token.char_indices().map(|(place, _)| place).skip(1);
        let halves = places.map(|place| token.split_at(place));
        let mut of_token: Vec<_> = halves
            .filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, left, right)))
            .collect();
        of_token.sort_by_key(|&(left, right, ..)| (left, right));
        merges.extend(of_token.into_iter().map(|(_, _, left, right)| Merge {
            left,
            right,
            score: scores[id],
        }));
    }
    let length = |text: &str| text.chars().count();
    // Python's `sorted` with `reverse` keeps the order of equal elements.
    merges.sort_by(|a, b| {
        let by_score = b.score.total_cmp(&a.score);
        let by_left = || length(b.left).cmp(&length(a.left));
        let by_right = || length(b.right).cmp(&length(a.right));
        by_score.then_with(by_left).then_with(by_right)
    });
    let merges = merges.into_iter();
    Ok(merges
        .map(|merge| json!([merge.left, merge.right]))
        .collect())
}

/// The `tokenizer_config.json`: special tokens and chat templates.
fn settings(
    header: &GgufHeader,
    vocabulary: &GgufVocabulary<'_>,
    special: SpecialIds,
) -> Result<Value, String> {
    let mut settings = Map::new();
    settings.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    for (name, id) in [
        ("bos_token", special.bos),
        ("eos_token", special.eos),
        ("unk_token", special.unknown),
        ("pad_token", special.padding),
    ] {
        if let Some(text) = vocabulary.text(id) {
            settings.insert(name.into(), text.into());
        }
    }
    let mut templates = Vec::new();
    for (name, key) in [
        ("default", "tokenizer.chat_template"),
        ("tool_use", "tokenizer.chat_template.tool_use"),
    ] {
        let template = header.text(key)?;
        templates.extend(template.map(|text| json!({"name": name, "template": text})));
    }
    match templates.as_slice() {
        [] => {}
        [only] if only["name"] == "default" => {
            settings.insert("chat_template".into(), only["template"].clone());
        }
        _ => {
            settings.insert("chat_template".into(), templates.into());
        }
    }
    Ok(Value::Object(settings))
}
