//! From text to token ids and back, for one model.
//!
//! A [`Tokenizer`] is the `tokenizer.json` of a Hugging Face folder together with its chat template. It
//! promises that every id it gives is one the model has, that a prompt and its completion are split
//! the same way here as when the model wrote them and are the text when they are put together, and that a text begins
//! with one `<s>`, not two, and is not ended. It knows which tokens end a completion ([`StopTokens`]). How long a sequence may be it does not know: that
//! is the configuration's.

use std::{
    borrow::Cow,
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
};

use messages::{Dialogue, Digest, PromptText};

use crate::{
    ModelConfig, ModelError,
    answered::{AnsweredIds, Seam, closed, is_plain, shared},
    chat::ChatTemplate,
    continuing::continuing,
    shards::{is_fetched, missing},
    special::SpecialTokens,
    stop_tokens::StopTokens,
};

/// The tokenizer of a model. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    tokenizer: tokenizers::Tokenizer,
    /// The same for text that goes on with another, made when it is first needed.
    continuing: OnceLock<tokenizers::Tokenizer>,
    /// How many tokens the post-processor puts behind a text.
    ending: usize,
    chat: Option<ChatTemplate>,
    /// The token that begins a text.
    bos: Option<u32>,
    vocab_size: usize,
    stops: StopTokens,
}

/// Who puts `<s>` and its like around a text.
#[derive(Clone, Copy)]
enum Framing {
    /// The tokenizer's post-processor.
    Added,
    /// Whoever wrote the text.
    Written,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of `folder`, with the chat template in the file `chat_template`, else in the
    /// folder's `chat_template.jinja`, else in its `tokenizer_config.json`. Limits on length and padding
    /// that `tokenizer.json` sets are ignored.
    ///
    /// # Errors
    /// When a file is missing or malformed, a template that is given does not compile, or the tokenizer is another
    /// model's: it has ids that the model of `config` does not. Added tokens beyond the vocabulary are no error but
    /// a warning: only a text that holds one cannot be encoded.
    pub fn load(
        folder: &Path,
        config: &ModelConfig,
        chat_template: Option<&Path>,
    ) -> Result<Self, ModelError> {
        let tokenizer = read_fitting(folder, config.vocab_size)?;
        let special = SpecialTokens::read(folder)?;
        let chat = ChatTemplate::load(folder, chat_template, &special)?;
        let declared = config.stops.clone();
        let known = (&tokenizer, config.vocab_size);
        let stops = declared.with_tokenizer(known, &special, chat.as_ref());
        let bos = special.get("bos_token");
        let bos = bos.and_then(|bos| tokenizer.token_to_id(bos));
        let bos = bos.filter(|&bos| (bos as usize) < config.vocab_size);
        Ok(Self {
            shared: Arc::new(Shared {
                ending: ending(&tokenizer),
                tokenizer,
                continuing: OnceLock::new(),
                chat,
                bos: bos.or(config.bos),
                vocab_size: config.vocab_size,
                stops,
            }),
        })
    }

    /// The ids of a prompt, at least one. Text gets the special tokens that the tokenizer puts before it, but no second
    /// one that begins it and none that ends it; a dialogue is rendered and has those that the template wrote. An empty text is the
    /// model's first token.
    ///
    /// # Errors
    /// When the template is missing or refuses the dialogue, or nothing is left to begin with.
    pub fn encode_prompt(&self, prompt: &PromptText) -> Result<Vec<u32>, ModelError> {
        let (text, framing) = self.written(prompt)?;
        let ids = self.encode(&text, framing)?;
        match self.shared.bos {
            _ if !ids.is_empty() => Ok(ids),
            Some(bos) => Ok(vec![bos]),
            None => Err(ModelError::Tokens {
                reason: "the prompt is empty and the model names no token to begin with (bos_token_id); \
                         give it some text"
                    .into(),
            }),
        }
    }

    /// The ids of `completion` where it follows `prompt`, whose own ids are `prompt_ids`: those of both
    /// together after the prompt's, or, where the seam would be split otherwise, those of `completion`
    /// alone, without the space that some tokenizers begin a text with. No token that ends a text is added.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_completion(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        completion: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let written = self.written(prompt)?;
        self.following(&written, prompt_ids, completion)
    }

    /// The ids of `completion` after a text of these ids.
    fn following(
        &self,
        (text, framing): &(Cow<'_, str>, Framing),
        text_ids: &[u32],
        completion: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let both = self.encode(&format!("{text}{completion}"), *framing)?;
        match both.strip_prefix(text_ids) {
            Some(following) if !text_ids.is_empty() => Ok(following.to_vec()),
            _ if text.is_empty() => self.encode(completion, Framing::Written),
            _ => self.in_vocabulary(split(self.continuing()?, completion, Framing::Written)?),
        }
    }

    /// The ids of `completion` where it follows `prompt`, closed with the token that ends it unless it is
    /// there already; empty when nothing closes it and the text is empty.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_closed(
        &self,
        prompt: &PromptText,
        prompt_ids: &[u32],
        completion: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let closing = self.shared.stops.closing(prompt);
        self.closed_after(&self.written(prompt)?, prompt_ids, completion, closing)
    }

    /// [`Self::following`], closed with this token unless it is there already.
    fn closed_after(
        &self,
        written: &(Cow<'_, str>, Framing),
        text_ids: &[u32],
        completion: &str,
        closing: Option<u32>,
    ) -> Result<Vec<u32>, ModelError> {
        let mut ids = self.following(written, text_ids, completion)?;
        ids.extend(closing.filter(|id| ids.last() != Some(id)));
        Ok(ids)
    }

    /// A prompt and answers to it that a file gives. To text they follow as they are, closed as by
    /// [`Self::encode_closed`]; to a dialogue as the chat template prints them as the assistant's turn (TRL's
    /// `apply_chat_template`), up to the token that closes the turn.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`], and when the template refuses the dialogue with an answer.
    pub fn encode_answered(
        &self,
        prompt: &PromptText,
        answers: &[&str],
    ) -> Result<AnsweredIds, ModelError> {
        if let PromptText::Dialogue(dialogue) = prompt
            && let Some(printed) = self.printed(dialogue, answers)?
        {
            return Ok(printed);
        }
        let ids = self.encode_prompt(prompt)?;
        let closed = |answer: &&str| self.encode_closed(prompt, &ids, answer);
        let answers = answers.iter().map(closed).collect::<Result<_, _>>()?;
        Ok(AnsweredIds {
            answers,
            seam: match prompt {
                PromptText::Text(_) => Seam::Asked,
                PromptText::Dialogue(_) => Seam::Given,
            },
            prompt: ids,
        })
    }

    /// A dialogue and answers to it as the template prints them; none when it prints one otherwise than it is.
    fn printed(
        &self,
        dialogue: &Dialogue,
        answers: &[&str],
    ) -> Result<Option<AnsweredIds>, ModelError> {
        let asked = self.render(dialogue)?;
        let Some(chat) = &self.shared.chat else {
            return Ok(None);
        };
        let wholes = answers.iter().map(|a| chat.render_answered(dialogue, a));
        let wholes = wholes.collect::<Result<Vec<_>, _>>()?;
        let begins = shared(&asked, &wholes);
        let end = self.shared.stops.turn_end();
        let closing = end.and_then(|id| self.token(id));
        let ended = wholes.iter().zip(answers);
        let ended =
            ended.map(|(whole, answer)| closed(&whole[begins..], answer, closing.as_deref()));
        let Some(mut ended) = ended.collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let plain = |(text, answer): (&&str, &&str)| is_plain(text, answer, closing.as_deref());
        if begins == asked.len() && ended.iter().zip(answers).all(plain) {
            // Space around an answer is the template's, and no sample has it.
            ended = answers.to_vec();
        }
        let written = (Cow::from(&asked[..begins]), Framing::Written);
        let prompt = self.encode(&written.0, written.1)?;
        if prompt.is_empty() {
            return Ok(None);
        }
        let ids = |text: &str| self.closed_after(&written, &prompt, text, end);
        Ok(Some(AnsweredIds {
            answers: ended.into_iter().map(ids).collect::<Result<_, _>>()?,
            seam: match begins == asked.len() {
                true => Seam::Asked,
                false => Seam::Shared,
            },
            prompt,
        }))
    }

    /// The tokens that end completions.
    #[must_use]
    pub fn stops(&self) -> &StopTokens {
        &self.shared.stops
    }

    /// The text of `ids` without special tokens, for people. Ids that do not exist are left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.shared
            .tokenizer
            .decode(ids, true)
            .unwrap_or_else(|_| self.pieces(ids))
    }

    /// The text of `ids` with special tokens, for people who look for a mistake.
    #[must_use]
    pub fn decode_all(&self, ids: &[u32]) -> String {
        self.shared
            .tokenizer
            .decode(ids, false)
            .unwrap_or_else(|_| self.pieces(ids))
    }

    /// The token of an id as the vocabulary writes it, which may be part of a character.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.shared.tokenizer.id_to_token(id)
    }

    /// Whether dialogues can be rendered.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.shared.chat.is_some()
    }

    /// Whether the chat template, where there is one, can be rendered at all. One of the folder that does not compile
    /// is an error of the first dialogue only: texts and ids need none.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn check_chat_template(&self) -> Result<(), ModelError> {
        self.shared
            .chat
            .as_ref()
            .map_or(Ok(()), ChatTemplate::check)
    }

    /// Digest of the chat template; `None` when there is none.
    #[must_use]
    pub fn chat_template_digest(&self) -> Option<Digest> {
        self.shared.chat.as_ref().map(ChatTemplate::digest)
    }

    /// The text of a dialogue, ending where the assistant's next turn begins or, where the last turn is the
    /// assistant's, where that is to be continued.
    ///
    /// # Errors
    /// When there is no template, or it refuses the dialogue.
    pub fn render(&self, dialogue: &Dialogue) -> Result<String, ModelError> {
        let Some(chat) = &self.shared.chat else {
            let reason = "the model has none; give the prompt as text, or name a template file";
            return Err(ModelError::ChatTemplate {
                reason: reason.into(),
            });
        };
        chat.render(dialogue)
    }

    /// The text of a prompt, and who writes its special tokens.
    fn written<'a>(&self, prompt: &'a PromptText) -> Result<(Cow<'a, str>, Framing), ModelError> {
        match prompt {
            PromptText::Text(text) => Ok((text.into(), Framing::Added)),
            PromptText::Dialogue(dialogue) => Ok((self.render(dialogue)?.into(), Framing::Written)),
        }
    }

    fn encode(&self, text: &str, framing: Framing) -> Result<Vec<u32>, ModelError> {
        let tokenizer = &self.shared.tokenizer;
        let mut ids = split(tokenizer, text, framing)?;
        let Framing::Added = framing else {
            return self.in_vocabulary(ids);
        };
        ids.truncate(ids.len().saturating_sub(self.shared.ending));
        let begins = |ids: &[u32]| {
            ids.iter()
                .take_while(|&&id| Some(id) == self.shared.bos)
                .count()
        };
        if begins(&ids) > 1 {
            // What the text begins with itself, and one that the tokenizer added.
            let written = begins(&split(tokenizer, text, Framing::Written)?);
            if written > 0 && written < begins(&ids) {
                ids.remove(0);
            }
        }
        self.in_vocabulary(ids)
    }

    /// The tokenizer for text that goes on with another.
    fn continuing(&self) -> Result<&tokenizers::Tokenizer, ModelError> {
        if let Some(made) = self.shared.continuing.get() {
            return Ok(made);
        }
        let copy = continuing(&self.shared.tokenizer);
        let copy = copy.map_err(|error| ModelError::Tokens {
            reason: format!(
                "failed to make a tokenizer for text that is continued ({error}); \
                 end the prompt with a whole word"
            ),
        })?;
        // Another thread was faster and made the same.
        Ok(self.shared.continuing.get_or_init(|| copy))
    }

    /// The ids, all of which the model has.
    fn in_vocabulary(&self, ids: Vec<u32>) -> Result<Vec<u32>, ModelError> {
        let vocab = self.shared.vocab_size;
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

    /// What is shown when the tokenizer's own decoder fails.
    fn pieces(&self, ids: &[u32]) -> String {
        ids.iter().filter_map(|&id| self.token(id)).collect()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("tokens", &self.shared.tokenizer.get_vocab_size(true))
            .field("has_chat_template", &self.has_chat_template())
            .finish_non_exhaustive()
    }
}

fn split(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    framing: Framing,
) -> Result<Vec<u32>, ModelError> {
    let encoding = tokenizer.encode_fast(text, matches!(framing, Framing::Added));
    match encoding {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(error) => Err(ModelError::Tokens {
            reason: format!("failed to split a text into tokens: {error}"),
        }),
    }
}

/// How many tokens the post-processor of `tokenizer` puts behind a text: one that ends a text has no place between a
/// prompt and its completion.
fn ending(tokenizer: &tokenizers::Tokenizer) -> usize {
    let marks = tokenizer.encode_fast("a", true);
    let marks = marks.map_or(Vec::new(), |encoding| {
        encoding.get_special_tokens_mask().to_vec()
    });
    let added = marks.iter().rev().take_while(|&&mark| mark == 1).count();
    // Of a text without tokens nothing tells what stands behind it.
    if added == marks.len() { 0 } else { added }
}

/// Reads `tokenizer.json` of `folder`, whose ids are to be below `vocab_size`; those of added tokens only where every
/// text gets them. No text is cut or padded.
pub(crate) fn read_fitting(
    folder: &Path,
    vocab_size: usize,
) -> Result<tokenizers::Tokenizer, ModelError> {
    let tokenizer = read(&folder.join("tokenizer.json"))?;
    let unfit = |reason: String| ModelError::Tokenizer {
        path: folder.to_owned(),
        reason,
    };
    let is_beyond = |id: u32| id as usize >= vocab_size;
    let added = tokenizer.get_added_tokens_decoder();
    let own = tokenizer.get_vocab(false).into_values();
    let largest = own.filter(|id| !added.contains_key(id)).max();
    if let Some(largest) = largest.filter(|&id| is_beyond(id)) {
        return Err(unfit(format!(
            "its largest token id is {largest} but the model's vocab_size is {vocab_size}; \
             use the tokenizer.json that the model was published with"
        )));
    }
    let empty = tokenizer.encode_fast("", true);
    let always = empty.map_or(Vec::new(), |encoding| encoding.get_ids().to_vec());
    if let Some(id) = always.into_iter().find(|&id| is_beyond(id)) {
        return Err(unfit(format!(
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

/// Reads `tokenizer.json` so that no text is cut or padded.
fn read(path: &Path) -> Result<tokenizers::Tokenizer, ModelError> {
    let bytes = std::fs::read(path).map_err(|source| missing(path, source))?;
    is_fetched(path, &bytes)?;
    let malformed = |error: tokenizers::Error| ModelError::Malformed {
        path: path.to_owned(),
        reason: format!("it is not a tokenizer.json of the tokenizers library ({error})"),
    };
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(malformed)?;
    tokenizer
        .with_padding(None)
        .with_truncation(None)
        .map_err(malformed)?;
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;
    use crate::fixtures::{WORDS, config, shared};

    const RAISING: &str = "{{ raise_exception('roles must alternate') }}";

    fn words(template: &str) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), WORDS).unwrap();
        fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        Tokenizer::load(folder.path(), &config(8), None).unwrap()
    }

    fn real(folder: &str, vocab_size: usize) -> Option<Tokenizer> {
        Some(Tokenizer::load(&shared(folder)?, &config(vocab_size), None).unwrap())
    }

    fn text(text: &str) -> PromptText {
        PromptText::Text(text.into())
    }

    #[test]
    fn a_template_that_does_not_compile_is_an_error_of_dialogues_alone() {
        let tokenizer = words("{% if %}");
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
        words("{{ messages }}").check_chat_template().unwrap();
    }

    #[test]
    fn templates_that_render_otherwise_have_other_digests() {
        let digest = |template: &str| words(template).chat_template_digest();
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
    fn real_tokenizers_round_trip() {
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
        for (folder, vocab_size, words, expected) in cases {
            let Some(tokenizer) = real(folder, vocab_size) else {
                continue;
            };
            let ids = tokenizer.encode_prompt(&text(words)).unwrap();
            assert_eq!(tokenizer.decode(&ids), words, "{folder}");
            if !expected.is_empty() {
                assert_eq!(ids, expected, "{folder}");
            }
        }
    }

    #[test]
    fn a_real_dialogue_has_the_special_tokens_of_its_template() {
        let Some(tokenizer) = real("data/tokenizers/phi-3-mini", 32064) else {
            return;
        };
        let prompt: PromptText =
            serde_json::from_value(json!([{"role": "user", "content": "Hello world"}])).unwrap();
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        // <|user|> Hello world <|end|> <|assistant|>: the first three special tokens swallow the newline.
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
    fn a_completion_is_split_as_it_follows_its_prompt() {
        let Some(tokenizer) = real("data/models/stories260K", 512) else {
            return;
        };
        let whole = tokenizer
            .encode_prompt(&text("Once upon a time, there was a little girl"))
            .unwrap();
        let prompt = text("Once upon a time");
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        let completion = tokenizer
            .encode_completion(&prompt, &ids, ", there was a little girl")
            .unwrap();
        assert_eq!(completion, whole[5..]);
        assert_eq!(completion[..2], [432, 383]);
        let empty = tokenizer.encode_completion(&prompt, &ids, "").unwrap();
        assert!(empty.is_empty());
    }

    #[test]
    fn a_seam_that_would_be_split_otherwise_leaves_the_prompt_alone() {
        let Some(tokenizer) = real("data/tokenizers/gpt2", 50257) else {
            return;
        };
        let prompt = text("Hello wor");
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        let completion = tokenizer.encode_completion(&prompt, &ids, "ld").unwrap();
        let both = tokenizer.encode_prompt(&text("Hello world")).unwrap();
        assert!(
            !both.starts_with(&ids),
            "the seam must fall inside a token: {ids:?}"
        );
        assert_eq!(tokenizer.decode(&[ids, completion].concat()), "Hello world");
    }

    #[test]
    fn words_are_encoded_with_what_the_tokenizer_adds() {
        let tokenizer = words("<s> {{ messages[0].content }}");
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
    fn a_text_begins_with_one_token_that_begins_texts() {
        let tokenizer = words("{{ bos_token }} {{ messages[0].content }}");
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
        let Some(real) = real("data/models/stories260K", 512) else {
            return;
        };
        let once = real.encode_prompt(&text("Once upon a time")).unwrap();
        assert_eq!(
            real.encode_prompt(&text("<s>Once upon a time")).unwrap()[0],
            once[0]
        );
        assert_ne!(
            real.encode_prompt(&text("<s>Once upon a time")).unwrap()[1],
            once[0]
        );
    }

    /// A folder with the tokenizer [`WORDS`] after `change`, and this template.
    fn changed(template: &str, change: impl Fn(&mut Value)) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let mut json: Value = serde_json::from_str(WORDS).unwrap();
        change(&mut json);
        fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        Tokenizer::load(folder.path(), &config(16), None).unwrap()
    }

    #[test]
    fn a_seam_within_a_token_gets_no_space() {
        let letters = json!({"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6, "▁a": 7,
            "Ġ": 8, "Ġa": 9}, "merges": [["a", "b"], ["▁", "ab"], ["▁", "a"], ["Ġ", "a"]], "unk_token": "<unk>"});
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        let llama = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        for (normalizer, pre, space, begun) in [
            (llama, Value::Null, 2, 7),
            (Value::Null, metaspace("always"), 2, 7),
            (Value::Null, metaspace("first"), 2, 7),
            (Value::Null, bytes, 8, 9),
        ] {
            let tokenizer = changed("x", |json| {
                json["model"] = letters.clone();
                json["normalizer"] = normalizer.clone();
                json["pre_tokenizer"] = pre.clone();
            });
            let prompt = text("a");
            let ids = tokenizer.encode_prompt(&prompt).unwrap();
            assert_eq!(ids, [1, begun], "{normalizer} {pre}");
            let following = |completion| {
                tokenizer
                    .encode_completion(&prompt, &ids, completion)
                    .unwrap()
            };
            assert_eq!(following("b"), [4], "{normalizer} {pre}");
            assert_eq!(following(" b"), [space, 4], "{normalizer} {pre}");
            // A text that follows nothing is begun as every text.
            let alone = tokenizer.encode_completion(&text(""), &[3], "a").unwrap();
            assert_eq!(alone, [begun], "{normalizer} {pre}");
        }
    }

    #[test]
    fn no_token_that_ends_a_text_stands_behind_a_prompt() {
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

    /// Templates whose generation prompt is not all that they print before an answer, or whose turns do not end with
    /// the token that closes them.
    #[test]
    fn answers_of_files_are_what_the_template_prints() {
        let ends =
            "{% for m in messages %}{% if m.role == 'user' %}<|u|> {{ m.content }} {% else %}";
        let asks = "{% endif %}{% endfor %}{% if add_generation_prompt %}";
        let tagged = |turn: &str, ask: &str| format!("{ends}{turn}{asks}{ask}{{% endif %}}");
        let turn = "<|a|> {{ m.content }} <|e|>";
        // A template, the prompt, the answer, and how they were come by.
        let cases: [(String, &[u32], &[u32], Seam); 6] = [
            (
                tagged(&format!("{turn} <|u|>"), "<|a|>"),
                &[8, 2, 9],
                &[4, 10],
                Seam::Asked,
            ),
            (tagged(turn, ""), &[8, 2], &[9, 4, 10], Seam::Asked),
            (
                tagged("<|a|> mat {{ m.content }} <|e|>", "<|a|>"),
                &[8, 2, 9],
                &[7, 4, 10],
                Seam::Asked,
            ),
            (
                tagged("<|a|> {{ m.content }}", "<|a|>"),
                &[8, 2, 9],
                &[4, 1],
                Seam::Asked,
            ),
            (tagged(turn, "<|a|> on"), &[8, 2, 9], &[4, 10], Seam::Shared),
            (
                tagged("<|a|> mat <|e|>", "<|a|>"),
                &[8, 2, 9],
                &[4, 1],
                Seam::Given,
            ),
        ];
        for (template, prompt, answer, seam) in cases {
            let tokenizer = changed(&template, |json| {
                for (id, name) in (8..).zip(["<|u|>", "<|a|>", "<|e|>"]) {
                    let mut token = json["added_tokens"][1].clone();
                    token["id"] = json!(id);
                    token["content"] = json!(name);
                    json["added_tokens"].as_array_mut().unwrap().push(token);
                }
            });
            let asked = PromptText::Dialogue(Dialogue::of_user("the"));
            let read = tokenizer.encode_answered(&asked, &["sat"]).unwrap();
            assert_eq!(
                (read.prompt.as_slice(), read.answers[0].as_slice()),
                (prompt, answer),
                "{template}"
            );
            assert_eq!(read.seam, seam, "{template}");
        }
        let read = words("x")
            .encode_answered(&text("the cat"), &[" sat", " on"])
            .unwrap();
        assert_eq!(read.answers, [[4, 1], [5, 1]]);
        assert_eq!((read.prompt, read.seam), (vec![1, 2, 3], Seam::Asked));
    }

    #[test]
    fn a_completion_is_closed_once() {
        let tokenizer = words("{{ messages[0].content }}");
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
    fn an_empty_prompt_needs_a_token_to_begin_with() {
        let folder = tempfile::tempdir().unwrap();
        let mut bare: Value = serde_json::from_str(WORDS).unwrap();
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
    fn a_template_that_raises_is_heard() {
        let tokenizer = words(RAISING);
        let prompt = PromptText::Dialogue(Dialogue::of_user("the cat"));
        let error = tokenizer.encode_prompt(&prompt).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        assert_eq!(
            tokenizer.encode_prompt(&text("the cat")).unwrap(),
            [1, 2, 3]
        );
    }

    #[test]
    fn unusable_folders_are_refused_by_name() {
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
        fs::write(folder.path().join("tokenizer.json"), WORDS).unwrap();
        let large = load(7);
        assert!(
            large.contains("largest token id is 7") && large.contains("vocab_size is 7"),
            "{large}"
        );
        assert!(Tokenizer::load(folder.path(), &config(8), None).is_ok());
    }

    #[test]
    fn added_tokens_beyond_the_vocabulary_matter_where_a_text_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut more: Value = serde_json::from_str(WORDS).unwrap();
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
        let always = write(&more).unwrap_err().to_string();
        assert!(always.contains("every text gets the token 8"), "{always}");
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
            (messages[0].role.as_str(), &messages[0].extra["name"]),
            ("user", &json!("Ann"))
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
}
