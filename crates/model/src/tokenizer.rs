//! Conversion between text and token ids for one model.
//!
//! A [`Tokenizer`] combines the `tokenizer.json` of a Hugging Face folder with its chat template. It promises that
//! every id is in the model's vocabulary, that prompt and completion are tokenised as during generation and decode to
//! the concatenated text, and that a text starts with exactly one BOS token and has no EOS token. It knows the stop
//! tokens ([`StopTokens`]). A `tokenizer.json` that makes the tokenizers library panic, hang or use memory beyond measure
//! is an error that names the file. Does not know the maximum sequence length.

use std::{
    borrow::Cow,
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
};

use messages::{Dialogue, Digest, PromptText};
use serde_json::Value;

use crate::{
    chat::{
        ChatTemplate,
        continuation_tokenizer::without_prefix_space,
        given_answers::{AnswerBoundary, EncodedAnswers, closed, common_prefix_length, is_plain},
    },
    config::ModelConfig,
    error::ModelError,
    guarded_tokenizer::GuardedTokenizer,
    special_tokens::{SpecialTokens, optional_json},
    stop_tokens::StopTokens,
};

/// Tokenizer of a model. Clones share the data.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<TokenizerInner>,
}

struct TokenizerInner {
    tokenizer: GuardedTokenizer,
    /// Variant for text that continues a prompt, created on first use.
    continuation: OnceLock<GuardedTokenizer>,
    /// Number of tokens that the post-processor appends to a text.
    suffix_length: usize,
    chat: Option<ChatTemplate>,
    /// Beginning-of-sequence token.
    bos: Option<u32>,
    vocab_size: usize,
    stops: StopTokens,
}

/// Source of the special tokens around a text.
#[derive(Clone, Copy)]
enum SpecialTokenSource {
    /// Added by the tokenizer's post-processor.
    Tokenizer,
    /// Already in the text, if any.
    Text,
}

/// Text of a prompt, ready to be tokenised.
struct RenderedPrompt<'a> {
    text: Cow<'a, str>,
    specials: SpecialTokenSource,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of `folder`, with the chat template from the file `chat_template`, the folder's
    /// `chat_template.jinja` or its `tokenizer_config.json`, in this order. Truncation and padding settings of
    /// `tokenizer.json` are ignored.
    ///
    /// # Errors
    /// When a file is missing or malformed, the given template does not compile, or the tokenizer has ids outside the
    /// vocabulary of `config`. Added tokens outside it only give a warning, since only a text that contains one cannot
    /// be encoded.
    pub fn load(
        folder: &Path,
        config: &ModelConfig,
        chat_template: Option<&Path>,
    ) -> Result<Self, ModelError> {
        let tokenizer = load_tokenizer(folder, config.vocab_size)?;
        let tokenizer = as_configured(tokenizer, folder)?;
        let special = SpecialTokens::read(folder)?;
        let chat = ChatTemplate::load(folder, chat_template, &special)?;
        let declared = config.stops.clone();
        let stops = declared.with_tokenizer(&tokenizer, config.vocab_size, &special, chat.as_ref());
        let bos = special.get("bos_token");
        let bos = bos.and_then(|bos| tokenizer.token_to_id(bos));
        let bos = bos.filter(|&bos| (bos as usize) < config.vocab_size);
        Ok(Self {
            inner: Arc::new(TokenizerInner {
                suffix_length: suffix_length(&tokenizer),
                tokenizer,
                continuation: OnceLock::new(),
                chat,
                bos: bos.or(config.bos),
                vocab_size: config.vocab_size,
                stops,
            }),
        })
    }

    /// Token ids of a prompt, at least one. Plain text gets the tokenizer's special tokens at its start, without a
    /// duplicate BOS and without EOS; a dialogue is rendered with the template, which writes its own. An empty text
    /// gives the BOS token.
    ///
    /// # Errors
    /// When the template is missing or fails, or the prompt is empty and there is no BOS token.
    pub fn encode_prompt(&self, prompt: &PromptText) -> Result<Vec<u32>, ModelError> {
        let rendered = self.rendered(prompt)?;
        let ids = self.encode(&rendered.text, rendered.specials)?;
        match self.inner.bos {
            _ if !ids.is_empty() => Ok(ids),
            Some(bos) => Ok(vec![bos]),
            None => Err(ModelError::Tokens {
                reason: "the prompt is empty and the model names no token to begin with (bos_token_id); \
                         give it some text"
                    .into(),
            }),
        }
    }

    /// Token ids of `completion` after `prompt`, whose ids are `prompt_ids`. They are the tail of the tokenised
    /// concatenation if that starts with `prompt_ids`; otherwise `completion` is tokenised alone, without the prefix
    /// space that some tokenizers add. No EOS token is added.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_completion(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        completion: &str,
    ) -> Result<Vec<u32>, ModelError> {
        self.following(&self.rendered(prompt)?, prompt_ids, completion)
    }

    /// Token ids of `completion` after a text with these ids.
    fn following(
        &self,
        prompt: &RenderedPrompt<'_>,
        text_ids: &[u32],
        completion: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let text = &prompt.text;
        let both = self.encode(&format!("{text}{completion}"), prompt.specials)?;
        match both.strip_prefix(text_ids) {
            Some(following) if !text_ids.is_empty() => Ok(following.to_vec()),
            _ if text.is_empty() => self.encode(completion, SpecialTokenSource::Text),
            _ => self.in_vocabulary(tokenize(
                self.continuation_tokenizer()?,
                completion,
                SpecialTokenSource::Text,
            )?),
        }
    }

    /// Token ids of `completion` after `prompt`, terminated with the stop token of [`StopTokens::closing`] unless it is
    /// already last.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_closed(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        completion: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let closing = self.inner.stops.closing(prompt);
        self.closed_after(&self.rendered(prompt)?, prompt_ids, completion, closing)
    }

    /// [`Self::following`], terminated with this token unless it is already last.
    fn closed_after(
        &self,
        prompt: &RenderedPrompt<'_>,
        text_ids: &[u32],
        completion: &str,
        closing: Option<u32>,
    ) -> Result<Vec<u32>, ModelError> {
        let mut ids = self.following(prompt, text_ids, completion)?;
        ids.extend(closing.filter(|id| ids.last() != Some(id)));
        Ok(ids)
    }

    /// Token ids of a prompt and of given answers, as in supervised fine-tuning. After plain text, answers are encoded
    /// by [`Self::encode_closed`]; in a dialogue, as the chat template renders them as the assistant's turn (TRL's
    /// `apply_chat_template`), up to the end-of-turn token.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`], and when the template fails on the dialogue with an answer.
    pub fn encode_answers(
        &self,
        prompt: &PromptText,
        answers: &[&str],
    ) -> Result<EncodedAnswers, ModelError> {
        if let PromptText::Dialogue(dialogue) = prompt
            && let Some(encoded) = self.rendered_answers(dialogue, answers)?
        {
            return Ok(encoded);
        }
        let ids = self.encode_prompt(prompt)?;
        let closed = |answer: &&str| self.encode_closed(prompt, &ids, answer);
        let answers = answers.iter().map(closed).collect::<Result<_, _>>()?;
        Ok(EncodedAnswers {
            answers,
            boundary: match prompt {
                PromptText::Text(_) => AnswerBoundary::GenerationPrompt,
                PromptText::Dialogue(_) => AnswerBoundary::Verbatim,
            },
            prompt: ids,
        })
    }

    /// A dialogue and answers as the template renders them; `None` when it does not render an answer verbatim.
    fn rendered_answers(
        &self,
        dialogue: &Dialogue,
        answers: &[&str],
    ) -> Result<Option<EncodedAnswers>, ModelError> {
        let generation_prompt = self.render(dialogue)?;
        let Some(chat) = &self.inner.chat else {
            return Ok(None);
        };
        let texts = answers.iter().map(|a| chat.render_answered(dialogue, a));
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        let prefix_length = common_prefix_length(&generation_prompt, &texts);
        let turn_end = self.inner.stops.turn_end();
        let closing = turn_end.and_then(|id| self.token(id));
        let ended = texts.iter().zip(answers);
        let ended =
            ended.map(|(text, answer)| closed(&text[prefix_length..], answer, closing.as_deref()));
        let Some(mut ended) = ended.collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let plain = |(text, answer): (&&str, &&str)| is_plain(text, answer, closing.as_deref());
        if prefix_length == generation_prompt.len() && ended.iter().zip(answers).all(plain) {
            // White space around an answer comes from the template and is not in samples.
            ended = answers.to_vec();
        }
        let rendered = RenderedPrompt {
            text: Cow::from(&generation_prompt[..prefix_length]),
            specials: SpecialTokenSource::Text,
        };
        let prompt = self.encode(&rendered.text, rendered.specials)?;
        if prompt.is_empty() {
            return Ok(None);
        }
        let ids = |text: &str| self.closed_after(&rendered, &prompt, text, turn_end);
        Ok(Some(EncodedAnswers {
            answers: ended.into_iter().map(ids).collect::<Result<_, _>>()?,
            boundary: match prefix_length == generation_prompt.len() {
                true => AnswerBoundary::GenerationPrompt,
                false => AnswerBoundary::CommonPrefix,
            },
            prompt,
        }))
    }

    /// Stop tokens.
    #[must_use]
    pub fn stops(&self) -> &StopTokens {
        &self.inner.stops
    }

    /// Text of `ids` without special tokens, for display. Unknown ids are skipped.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner
            .tokenizer
            .decode(ids, true)
            .unwrap_or_else(|| self.pieces(ids))
    }

    /// Text of `ids` with special tokens, for debugging.
    #[must_use]
    pub fn decode_all(&self, ids: &[u32]) -> String {
        self.inner
            .tokenizer
            .decode(ids, false)
            .unwrap_or_else(|| self.pieces(ids))
    }

    /// Vocabulary entry of an id, which may be part of a character.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// Whether there is a chat template.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.inner.chat.is_some()
    }

    /// Checks that the chat template, if any, compiles. Without this check, a template of the folder that does not
    /// compile fails only when the first dialogue is rendered.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn check_chat_template(&self) -> Result<(), ModelError> {
        self.inner.chat.as_ref().map_or(Ok(()), ChatTemplate::check)
    }

    /// The chat template, if the settings gave it in place of the folder's own.
    #[must_use]
    pub fn given_chat_template(&self) -> Option<&str> {
        self.inner.chat.as_ref().and_then(ChatTemplate::given)
    }

    /// Digest of the chat template; `None` when there is none.
    #[must_use]
    pub fn chat_template_digest(&self) -> Option<Digest> {
        self.inner.chat.as_ref().map(ChatTemplate::digest)
    }

    /// Renders a dialogue with the generation prompt or, if the last turn is the assistant's, up to where that turn is
    /// continued.
    ///
    /// # Errors
    /// When there is no template, or it fails.
    pub fn render(&self, dialogue: &Dialogue) -> Result<String, ModelError> {
        let Some(chat) = &self.inner.chat else {
            let reason = "the model has none; give prompts as text without chat = true (--chat), or name a template file";
            return Err(ModelError::ChatTemplate {
                reason: reason.into(),
            });
        };
        chat.render(dialogue)
    }

    /// Text of a prompt and the source of its special tokens.
    fn rendered<'a>(&self, prompt: &'a PromptText) -> Result<RenderedPrompt<'a>, ModelError> {
        let (text, specials) = match prompt {
            PromptText::Text(text) => (text.into(), SpecialTokenSource::Tokenizer),
            PromptText::Dialogue(dialogue) => {
                (self.render(dialogue)?.into(), SpecialTokenSource::Text)
            }
        };
        Ok(RenderedPrompt { text, specials })
    }

    fn encode(&self, text: &str, specials: SpecialTokenSource) -> Result<Vec<u32>, ModelError> {
        let tokenizer = &self.inner.tokenizer;
        let mut ids = tokenize(tokenizer, text, specials)?;
        let SpecialTokenSource::Tokenizer = specials else {
            return self.in_vocabulary(ids);
        };
        ids.truncate(ids.len().saturating_sub(self.inner.suffix_length));
        let bos_count = |ids: &[u32]| {
            ids.iter()
                .take_while(|&&id| Some(id) == self.inner.bos)
                .count()
        };
        if bos_count(&ids) > 1 {
            // BOS tokens of the text itself, in addition to the one that the tokenizer added.
            let in_text = bos_count(&tokenize(tokenizer, text, SpecialTokenSource::Text)?);
            if in_text > 0 && in_text < bos_count(&ids) {
                ids.remove(0);
            }
        }
        self.in_vocabulary(ids)
    }

    /// The tokenizer variant for text that continues a prompt.
    fn continuation_tokenizer(&self) -> Result<&GuardedTokenizer, ModelError> {
        if let Some(tokenizer) = self.inner.continuation.get() {
            return Ok(tokenizer);
        }
        let copy = self.inner.tokenizer.changed(without_prefix_space);
        let copy = copy.map_err(|error| ModelError::Tokens {
            reason: format!(
                "failed to make a tokenizer for text that is continued ({error}); \
                 end the prompt with a whole word"
            ),
        })?;
        // If another thread was first, its identical copy is used.
        Ok(self.inner.continuation.get_or_init(|| copy))
    }

    /// Checks that all ids are in the model's vocabulary.
    fn in_vocabulary(&self, ids: Vec<u32>) -> Result<Vec<u32>, ModelError> {
        let vocab = self.inner.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            None => Ok(ids),
            Some(&id) => Err(ModelError::Tokens {
                reason: format!(
                    "a text has the token {:?} ({id}), which is not in the model's vocabulary of {vocab}",
                    self.token(id).unwrap_or_default()
                ),
            }),
        }
    }

    /// Fallback when the tokenizer's decoder fails.
    fn pieces(&self, ids: &[u32]) -> String {
        ids.iter().filter_map(|&id| self.token(id)).collect()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("tokens", &self.inner.tokenizer.token_count())
            .field("has_chat_template", &self.has_chat_template())
            .finish_non_exhaustive()
    }
}

fn tokenize(
    tokenizer: &GuardedTokenizer,
    text: &str,
    specials: SpecialTokenSource,
) -> Result<Vec<u32>, ModelError> {
    tokenizer.ids(text, matches!(specials, SpecialTokenSource::Tokenizer))
}

/// Number of tokens that the post-processor of `tokenizer` appends to a text. They are removed from prompts, which
/// completions follow.
fn suffix_length(tokenizer: &GuardedTokenizer) -> usize {
    let marks = tokenizer.encode("a", true);
    let marks = marks.map_or(Vec::new(), |encoding| {
        encoding.get_special_tokens_mask().to_vec()
    });
    let added = marks.iter().rev().take_while(|&&mark| mark == 1).count();
    // The sample text has no tokens of its own, so prefix and suffix cannot be told apart.
    if added == marks.len() { 0 } else { added }
}

/// Follows `add_prefix_space: false` in the `tokenizer_config.json` of `folder`, which transformers applies to Llama's
/// tokenizers whatever their `tokenizer.json` says. Other classes ignore it.
fn as_configured(
    tokenizer: GuardedTokenizer,
    folder: &Path,
) -> Result<GuardedTokenizer, ModelError> {
    let path = folder.join("tokenizer_config.json");
    let settings = optional_json(&path)?;
    let is_llama = ["LlamaTokenizer", "LlamaTokenizerFast"].map(Value::from);
    if settings["add_prefix_space"] != false || !is_llama.contains(&settings["tokenizer_class"]) {
        return Ok(tokenizer);
    }
    let changed = tokenizer.changed(without_prefix_space);
    changed.map_err(|error| ModelError::Malformed {
        path,
        reason: format!("its add_prefix_space = false cannot be applied: {error}"),
    })
}

/// Longest token in bytes; a completion of thousands of tokens decodes to a text of that many times its length.
const MAX_TOKEN_BYTES: usize = 1 << 14;

/// Loads `tokenizer.json` of `folder` and checks that its ids are below `vocab_size`; those of added tokens only where
/// every text gets them. Truncation and padding are disabled.
pub(crate) fn load_tokenizer(
    folder: &Path,
    vocab_size: usize,
) -> Result<GuardedTokenizer, ModelError> {
    let tokenizer = GuardedTokenizer::load(&folder.join("tokenizer.json"))?;
    let mismatch = |reason: String| ModelError::Tokenizer {
        path: folder.to_owned(),
        reason,
    };
    let is_beyond = |id: u32| id as usize >= vocab_size;
    let added = tokenizer.added_tokens();
    let vocabulary = tokenizer.vocabulary();
    let texts = added.iter().map(|(id, token)| (*id, &token.content));
    let mut texts = texts.chain(vocabulary.iter().map(|(text, id)| (*id, text)));
    if let Some((id, text)) = texts.find(|(_, text)| text.len() > MAX_TOKEN_BYTES) {
        let length = text.len();
        return Err(mismatch(format!(
            "its token {id} has {length} bytes, more than {MAX_TOKEN_BYTES}"
        )));
    }
    let own = vocabulary.into_values();
    let largest = own.filter(|id| !added.contains_key(id)).max();
    if let Some(largest) = largest.filter(|&id| is_beyond(id)) {
        return Err(mismatch(format!(
            "its largest token id is {largest} but the model's vocab_size is {vocab_size}; \
             use the tokenizer.json that the model was published with"
        )));
    }
    let always = tokenizer.ids("", true).unwrap_or_default();
    if let Some(id) = always.into_iter().find(|&id| is_beyond(id)) {
        return Err(mismatch(format!(
            "every text gets the token {id} but the model's vocab_size is {vocab_size}; \
             use the tokenizer.json that the model was published with"
        )));
    }
    let mut unknown: Vec<_> = added.iter().filter(|(id, _)| is_beyond(**id)).collect();
    unknown.sort_by_key(|(id, _)| **id);
    if let Some((id, token)) = unknown.first() {
        let (path, count, token) = (folder.display(), unknown.len(), &token.content);
        tracing::warn!(
            %path, vocab_size, count, id, token,
            "the tokenizer has added tokens that the model has no embedding of: a text with one is refused"
        );
    }
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::fixtures::{WORD_TOKENIZER, config, shared};

    const RAISING: &str = "{{ raise_exception('roles must alternate') }}";

    fn word_tokenizer(template: &str) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), WORD_TOKENIZER).unwrap();
        fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        Tokenizer::load(folder.path(), &config(8), None).unwrap()
    }

    fn pretrained(folder: &str, vocab_size: usize) -> Option<Tokenizer> {
        Some(Tokenizer::load(&shared(folder)?, &config(vocab_size), None).unwrap())
    }

    fn text(text: &str) -> PromptText {
        PromptText::Text(text.into())
    }

    #[test]
    fn a_template_that_does_not_compile_fails_for_dialogues_only() {
        let tokenizer = word_tokenizer("{% if %}");
        assert_eq!(
            tokenizer.encode_prompt(&text("the cat")).unwrap(),
            [1, 2, 3]
        );
        let dialogue = PromptText::Dialogue(Dialogue::of_user("the cat"));
        let errors = [
            tokenizer.encode_prompt(&dialogue).map(drop),
            tokenizer.check_chat_template(),
        ];
        for error in errors {
            let error = error.unwrap_err().to_string();
            for part in ["chat_template.jinja", "does not compile"] {
                assert!(error.contains(part), "{part:?} is not in {error}");
            }
        }
        word_tokenizer("{{ messages }}")
            .check_chat_template()
            .unwrap();
    }

    #[test]
    fn different_templates_have_different_digests() {
        let digest = |template: &str| word_tokenizer(template).chat_template_digest();
        assert_eq!(
            digest("{{ messages[0].content }}"),
            digest("{{ messages[0].content }}")
        );
        assert_ne!(
            digest("{{ messages[0].content }}"),
            digest("{{ messages[0].role }}")
        );
    }

    #[test]
    fn pretrained_tokenizers_round_trip() {
        let cases: [(&str, usize, &str, &[u32]); 5] = [
            ("data/tokenizers/gpt2", 50257, "Hello world", &[15496, 995]),
            ("data/tokenizers/gpt2", 50257, "  naïve 日本\n\tend ", &[]),
            (
                "data/tokenizers/phi-3-mini",
                32064,
                "Hello world",
                &[15043, 3186],
            ),
            (
                "data/models/stories260K",
                512,
                "Once upon a time",
                &[1, 403, 407, 261, 378],
            ),
            (
                "data/models/stories260K",
                512,
                "Lily wanted a red ball.",
                &[1, 317, 391, 266, 261, 352, 266, 268, 388, 426],
            ),
        ];
        for (folder, vocab_size, sample, expected) in cases {
            let Some(tokenizer) = pretrained(folder, vocab_size) else {
                continue;
            };
            let ids = tokenizer.encode_prompt(&text(sample)).unwrap();
            assert_eq!(tokenizer.decode(&ids), sample, "{folder}");
            if !expected.is_empty() {
                assert_eq!(ids, expected, "{folder}");
            }
        }
    }

    #[test]
    fn a_rendered_dialogue_has_the_special_tokens_of_its_template() {
        let Some(tokenizer) = pretrained("data/tokenizers/phi-3-mini", 32064) else {
            return;
        };
        let prompt: PromptText =
            serde_json::from_value(json!([{"role": "user", "content": "Hello world"}])).unwrap();
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        // <|user|> Hello world <|end|> <|assistant|>: the special tokens absorb the newlines.
        assert_eq!(ids, [32010, 15043, 3186, 32007, 32001]);
        assert_eq!(tokenizer.decode_all(&ids[3..]), "<|end|><|assistant|>");
        assert_eq!(tokenizer.token(32007).as_deref(), Some("<|end|>"));
        assert_eq!(
            tokenizer
                .encode_completion(&prompt, &ids, "Hello world")
                .unwrap(),
            [15043, 3186]
        );
    }

    #[test]
    fn a_completion_is_tokenised_in_the_context_of_its_prompt() {
        let Some(tokenizer) = pretrained("data/models/stories260K", 512) else {
            return;
        };
        let both = tokenizer
            .encode_prompt(&text("Once upon a time, there was a little girl"))
            .unwrap();
        let prompt = text("Once upon a time");
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        let completion = tokenizer
            .encode_completion(&prompt, &ids, ", there was a little girl")
            .unwrap();
        assert_eq!(completion, both[5..]);
        assert_eq!(completion[..2], [432, 383]);
        let empty = tokenizer.encode_completion(&prompt, &ids, "").unwrap();
        assert!(empty.is_empty());
    }

    #[test]
    fn prompt_ids_are_unchanged_when_a_token_spans_the_boundary() {
        let Some(tokenizer) = pretrained("data/tokenizers/gpt2", 50257) else {
            return;
        };
        let prompt = text("Hello wor");
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        let completion = tokenizer.encode_completion(&prompt, &ids, "ld").unwrap();
        let both = tokenizer.encode_prompt(&text("Hello world")).unwrap();
        assert!(
            !both.starts_with(&ids),
            "a token must span the boundary: {ids:?}"
        );
        assert_eq!(tokenizer.decode(&[ids, completion].concat()), "Hello world");
    }

    #[test]
    fn text_is_encoded_with_the_tokens_that_the_tokenizer_adds() {
        let tokenizer = word_tokenizer("<s> {{ messages[0].content }}");
        let dialogue: PromptText =
            serde_json::from_value(json!([{"role": "user", "content": "the cat"}])).unwrap();
        let cases: [(&PromptText, &[u32]); 4] = [
            (&text("the cat sat on a mat"), &[1, 2, 3, 4, 5, 6, 7]),
            (&text(""), &[1]),
            (&text("the dog"), &[1, 2, 0]),
            (&dialogue, &[1, 2, 3]),
        ];
        for (prompt, expected) in cases {
            assert_eq!(
                tokenizer.encode_prompt(prompt).unwrap(),
                expected,
                "{prompt:?}"
            );
        }
        assert_eq!(
            tokenizer
                .encode_completion(&text("the cat"), &[1, 2, 3], " sat")
                .unwrap(),
            [4]
        );
        assert_eq!(
            tokenizer
                .encode_completion(&text("the cat"), &[], "sat")
                .unwrap(),
            [4]
        );
        assert_eq!(
            tokenizer
                .encode_completion(&dialogue, &[1, 2, 3], " sat")
                .unwrap(),
            [4]
        );
        assert_eq!(tokenizer.decode(&[1, 2, 3]), "the cat");
        assert_eq!(tokenizer.decode_all(&[1, 2, 3, 99]), "<s> the cat");
        assert_eq!(
            (tokenizer.token(7).as_deref(), tokenizer.token(8)),
            (Some("mat"), None)
        );
    }

    #[test]
    fn a_text_starts_with_one_bos_token() {
        let tokenizer = word_tokenizer("{{ bos_token }} {{ messages[0].content }}");
        let dialogue = |content: &str| PromptText::Dialogue(Dialogue::of_user(content));
        let cases: [(PromptText, &[u32]); 6] = [
            (text("the cat"), &[1, 2, 3]),
            (text("<s>the cat"), &[1, 2, 3]),
            (text("<s> the cat"), &[1, 2, 3]),
            (text("<s><s>the cat"), &[1, 1, 2, 3]),
            (text("the <s> cat"), &[1, 2, 1, 3]),
            (dialogue("<s>the"), &[1, 2]),
        ];
        for (prompt, expected) in cases {
            let ids = tokenizer.encode_prompt(&prompt).unwrap();
            assert_eq!(ids, expected, "{prompt:?}");
            let following = tokenizer.encode_completion(&prompt, &ids, " sat").unwrap();
            assert_eq!(following, [4], "{prompt:?}");
        }
        let Some(pretrained) = pretrained("data/models/stories260K", 512) else {
            return;
        };
        let once = pretrained.encode_prompt(&text("Once upon a time")).unwrap();
        assert_eq!(
            pretrained
                .encode_prompt(&text("<s>Once upon a time"))
                .unwrap()[0],
            once[0]
        );
        assert_ne!(
            pretrained
                .encode_prompt(&text("<s>Once upon a time"))
                .unwrap()[1],
            once[0]
        );
    }

    /// [`WORD_TOKENIZER`] after `change`, with this template.
    fn changed(template: &str, change: impl Fn(&mut Value)) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let mut json: Value = serde_json::from_str(WORD_TOKENIZER).unwrap();
        change(&mut json);
        fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        Tokenizer::load(folder.path(), &config(16), None).unwrap()
    }

    #[test]
    fn a_completion_within_a_word_gets_no_prefix_space() {
        let bpe = json!({"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6, "▁a": 7,
            "Ġ": 8, "Ġa": 9}, "merges": [["a", "b"], ["▁", "ab"], ["▁", "a"], ["Ġ", "a"]], "unk_token": "<unk>"});
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        let llama = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        for (normalizer, pre, space, prefixed) in [
            (llama, Value::Null, 2, 7),
            (Value::Null, metaspace("always"), 2, 7),
            (Value::Null, metaspace("first"), 2, 7),
            (Value::Null, bytes, 8, 9),
        ] {
            let tokenizer = changed("x", |json| {
                json["model"] = bpe.clone();
                json["normalizer"] = normalizer.clone();
                json["pre_tokenizer"] = pre.clone();
            });
            let prompt = text("a");
            let ids = tokenizer.encode_prompt(&prompt).unwrap();
            assert_eq!(ids, [1, prefixed], "{normalizer} {pre}");
            let following = |completion| {
                tokenizer
                    .encode_completion(&prompt, &ids, completion)
                    .unwrap()
            };
            assert_eq!(following("b"), [4], "{normalizer} {pre}");
            assert_eq!(following(" b"), [space, 4], "{normalizer} {pre}");
            // A text after an empty prompt is tokenised like any text.
            let alone = tokenizer.encode_completion(&text(""), &[3], "a").unwrap();
            assert_eq!(alone, [prefixed], "{normalizer} {pre}");
        }
    }

    #[test]
    fn a_prompt_has_no_eos_token() {
        for single in [
            json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]),
            json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}]),
        ] {
            let tokenizer = changed("x", |json| {
                let mut end = json["added_tokens"][1].clone();
                end["id"] = json!(8);
                end["content"] = json!("</s>");
                json["added_tokens"].as_array_mut().unwrap().push(end);
                json["post_processor"]["single"] = single.clone();
                json["post_processor"]["special_tokens"]["</s>"] =
                    json!({"id": "</s>", "ids": [8], "tokens": ["</s>"]});
            });
            for (prompt, expected) in [
                ("the cat", &[1, 2, 3][..]),
                ("", &[1]),
                ("the </s>", &[1, 2, 8]),
            ] {
                let ids = tokenizer.encode_prompt(&text(prompt)).unwrap();
                assert_eq!(ids, expected, "{prompt}");
                let following = tokenizer.encode_completion(&text(prompt), &ids, " sat");
                assert_eq!(following.unwrap(), [4], "{prompt}");
            }
        }
    }

    /// Templates that print more before an answer than the generation prompt, or after it than the end-of-turn token.
    #[test]
    fn given_answers_are_tokenised_as_the_template_renders_them() {
        let ends =
            "{% for m in messages %}{% if m.role == 'user' %}<|u|> {{ m.content }} {% else %}";
        let asks = "{% endif %}{% endfor %}{% if add_generation_prompt %}";
        let tagged = |turn: &str, ask: &str| format!("{ends}{turn}{asks}{ask}{{% endif %}}");
        let turn = "<|a|> {{ m.content }} <|e|>";
        // Template, prompt ids, answer ids, boundary.
        let cases: [(String, &[u32], &[u32], AnswerBoundary); 6] = [
            (
                tagged(&format!("{turn} <|u|>"), "<|a|>"),
                &[8, 2, 9],
                &[4, 10],
                AnswerBoundary::GenerationPrompt,
            ),
            (
                tagged(turn, ""),
                &[8, 2],
                &[9, 4, 10],
                AnswerBoundary::GenerationPrompt,
            ),
            (
                tagged("<|a|> mat {{ m.content }} <|e|>", "<|a|>"),
                &[8, 2, 9],
                &[7, 4, 10],
                AnswerBoundary::GenerationPrompt,
            ),
            (
                tagged("<|a|> {{ m.content }}", "<|a|>"),
                &[8, 2, 9],
                &[4, 1],
                AnswerBoundary::GenerationPrompt,
            ),
            (
                tagged(turn, "<|a|> on"),
                &[8, 2, 9],
                &[4, 10],
                AnswerBoundary::CommonPrefix,
            ),
            (
                tagged("<|a|> mat <|e|>", "<|a|>"),
                &[8, 2, 9],
                &[4, 1],
                AnswerBoundary::Verbatim,
            ),
        ];
        for (template, prompt, answer, boundary) in cases {
            let tokenizer = changed(&template, |json| {
                for (id, name) in (8..).zip(["<|u|>", "<|a|>", "<|e|>"]) {
                    let mut token = json["added_tokens"][1].clone();
                    token["id"] = json!(id);
                    token["content"] = json!(name);
                    json["added_tokens"].as_array_mut().unwrap().push(token);
                }
            });
            let dialogue = PromptText::Dialogue(Dialogue::of_user("the"));
            let read = tokenizer.encode_answers(&dialogue, &["sat"]).unwrap();
            assert_eq!(
                (read.prompt.as_slice(), read.answers[0].as_slice()),
                (prompt, answer),
                "{template}"
            );
            assert_eq!(read.boundary, boundary, "{template}");
        }
        let read = word_tokenizer("x")
            .encode_answers(&text("the cat"), &[" sat", " on"])
            .unwrap();
        assert_eq!(read.answers, [[4, 1], [5, 1]]);
        assert_eq!(
            (read.prompt, read.boundary),
            (vec![1, 2, 3], AnswerBoundary::GenerationPrompt)
        );
    }

    #[test]
    fn a_completion_is_terminated_once() {
        let tokenizer = word_tokenizer("{{ messages[0].content }}");
        let prompt = text("the cat");
        let closed = |completion| {
            tokenizer
                .encode_closed(&prompt, &[1, 2, 3], completion)
                .unwrap()
        };
        assert_eq!(closed(" sat"), [4, 1]);
        assert_eq!(closed(" sat<s>"), [4, 1]);
        assert_eq!(closed(""), [1]);
    }

    #[test]
    fn an_empty_prompt_needs_a_bos_token() {
        let folder = tempfile::tempdir().unwrap();
        let mut bare: Value = serde_json::from_str(WORD_TOKENIZER).unwrap();
        bare["post_processor"] = Value::Null;
        fs::write(folder.path().join("tokenizer.json"), bare.to_string()).unwrap();
        let mut config = config(8);
        let tokenizer = Tokenizer::load(folder.path(), &config, None).unwrap();
        assert_eq!(tokenizer.encode_prompt(&text(" ")).unwrap(), [1]);
        config.bos = None;
        let tokenizer = Tokenizer::load(folder.path(), &config, None).unwrap();
        assert!(matches!(
            tokenizer.encode_prompt(&text(" ")),
            Err(ModelError::Tokens { .. })
        ));
        assert!(!tokenizer.has_chat_template());
        let error = tokenizer.render(&Dialogue::of_user("the cat")).unwrap_err();
        assert!(error.to_string().contains("the model has none"), "{error}");
    }

    #[test]
    fn an_exception_raised_by_a_template_is_reported() {
        let tokenizer = word_tokenizer(RAISING);
        let prompt = PromptText::Dialogue(Dialogue::of_user("the cat"));
        let error = tokenizer.encode_prompt(&prompt).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        assert_eq!(
            tokenizer.encode_prompt(&text("the cat")).unwrap(),
            [1, 2, 3]
        );
    }

    #[test]
    fn errors_name_the_unusable_file() {
        let folder = tempfile::tempdir().unwrap();
        let load = |vocab_size| {
            Tokenizer::load(folder.path(), &config(vocab_size), None)
                .unwrap_err()
                .to_string()
        };
        let missing = load(8);
        assert!(
            missing.contains("tokenizer.json") && missing.contains("No such file"),
            "{missing}"
        );
        fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        assert!(
            load(8).contains("is not usable: it is not a tokenizer.json"),
            "{}",
            load(8)
        );
        fs::write(folder.path().join("tokenizer.json"), WORD_TOKENIZER).unwrap();
        let large = load(7);
        assert!(
            large.contains("largest token id is 7") && large.contains("vocab_size is 7"),
            "{large}"
        );
        assert!(Tokenizer::load(folder.path(), &config(8), None).is_ok());
    }

    #[test]
    fn added_tokens_outside_the_vocabulary_are_refused_in_texts() {
        let folder = tempfile::tempdir().unwrap();
        let mut more: Value = serde_json::from_str(WORD_TOKENIZER).unwrap();
        let pad = json!({
            "id": 8, "content": "<pad>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false
        });
        more["added_tokens"].as_array_mut().unwrap().push(pad);
        let write = |content: &Value| {
            fs::write(folder.path().join("tokenizer.json"), content.to_string()).unwrap();
            Tokenizer::load(folder.path(), &config(8), None)
        };
        let tokenizer = write(&more).unwrap();
        assert_eq!(
            tokenizer.encode_prompt(&text("the cat")).unwrap(),
            [1, 2, 3]
        );
        let refused = tokenizer.encode_prompt(&text("the <pad>")).unwrap_err();
        let refused = refused.to_string();
        assert!(
            refused.contains("the token \"<pad>\" (8)") && refused.contains("vocabulary of 8"),
            "{refused}"
        );
        more["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([8]);
        let refused = write(&more).unwrap_err().to_string();
        assert!(refused.contains("every text gets the token 8"), "{refused}");
    }

    #[test]
    fn prompts_are_read_from_json() {
        let read = |json: Value| {
            serde_json::from_value::<PromptText>(json).map_err(|error| error.to_string())
        };
        assert_eq!(read(json!("Once")), Ok(text("Once")));
        let named = read(json!([{"role": "user", "content": "Hi", "name": "Ann"}])).unwrap();
        let PromptText::Dialogue(Dialogue { messages, .. }) = named else {
            panic!("a list is a dialogue")
        };
        assert_eq!(
            (messages[0].role(), messages[0].get("name")),
            ("user", Some(&json!("Ann")))
        );
        let refused = [
            (
                json!(3),
                "a prompt is a string or a list of messages, not 3",
            ),
            (json!([]), "the list of messages is empty"),
            (
                json!([{"role": "user"}, {"content": "Hi"}]),
                "message 1: missing field `role`",
            ),
        ];
        for (value, expected) in refused {
            assert_eq!(read(value), Err(expected.to_owned()));
        }
    }

    /// The ids are those of transformers 5.23, whose `LlamaTokenizer` follows the key; without it they begin with 403.
    #[test]
    fn add_prefix_space_of_llama_tokenizers_is_followed() {
        let Some(source) = shared("data/models/stories260K") else {
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let path = |file: &str| folder.path().join(file);
        fs::copy(source.join("tokenizer.json"), path("tokenizer.json")).unwrap();
        let ids = |class: &str, adds: Value| {
            let settings = json!({"tokenizer_class": class, "add_prefix_space": adds});
            fs::write(path("tokenizer_config.json"), settings.to_string()).unwrap();
            let tokenizer = Tokenizer::load(folder.path(), &config(512), None).unwrap();
            tokenizer
                .encode_prompt(&PromptText::Text("Once upon a time".into()))
                .unwrap()
        };
        let prefixed = [1, 403, 407, 261, 378];
        let plain = [1, 441, 416, 331, 407, 261, 378];
        assert_eq!(ids("LlamaTokenizer", json!(false)), plain);
        assert_eq!(ids("LlamaTokenizerFast", json!(false)), plain);
        assert_eq!(ids("LlamaTokenizer", json!(true)), prefixed);
        assert_eq!(ids("LlamaTokenizer", Value::Null), prefixed);
        assert_eq!(ids("PreTrainedTokenizerFast", json!(false)), prefixed);
    }
}
