//! Stop tokens of generation.
//!
//! The set contains the `eos_token_id` of `generation_config.json` and `config.json`, the tokenizer's `eos_token`, and
//! the token with which the chat template ends the assistant's turn. A completion given as text is terminated with one
//! of them: in a dialogue with the template's, otherwise with the tokenizer's, as in TRL.

use std::collections::BTreeSet;

use messages::{Dialogue, Message, PromptText};

use crate::{
    chat::ChatTemplate, guarded_tokenizer::GuardedTokenizer, special_tokens::SpecialTokens,
};

/// Set of stop tokens, possibly empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopTokens {
    ids: BTreeSet<u32>,
    turn_end: Option<u32>,
    text_end: Option<u32>,
}

impl StopTokens {
    /// Stop tokens declared by configuration files; the first terminates plain text.
    pub(crate) fn declared(ids: &[u32]) -> Self {
        Self {
            ids: ids.iter().copied().collect(),
            turn_end: None,
            text_end: ids.first().copied(),
        }
    }

    /// Adds the tokens of `generation_config.json`, whose first then terminates plain text, as in transformers.
    pub(crate) fn and(mut self, ids: &[u32]) -> Self {
        self.ids.extend(ids);
        self.text_end = ids.first().copied().or(self.text_end);
        self
    }

    /// Adds the tokenizer's `eos_token` and the chat template's end-of-turn token, where they are below `vocab_size`.
    pub(crate) fn with_tokenizer(
        mut self,
        tokenizer: &GuardedTokenizer,
        vocab_size: usize,
        special: &SpecialTokens,
        chat: Option<&ChatTemplate>,
    ) -> Self {
        let in_vocabulary = |id: &u32| (*id as usize) < vocab_size;
        let named = special.get("eos_token");
        let eos = named.and_then(|eos| tokenizer.token_to_id(eos));
        let eos = eos.filter(in_vocabulary);
        if let (Some(named), None) = (named, eos) {
            tracing::warn!(
                eos_token = named,
                vocab_size,
                "the tokenizer's eos_token is not in the model's vocabulary: it is not a stop token"
            );
        }
        self.text_end = eos.or(self.text_end);
        self.ids.extend(self.text_end);
        self.turn_end = chat.and_then(|chat| {
            let delimiters = TurnDelimiters::of(chat);
            if delimiters.is_none() {
                tracing::warn!(
                    token = named.unwrap_or("none"),
                    "the chat template does not print a short dialogue, so that it does not show the token that ends a \
                     turn: the tokenizer's eos_token is taken"
                );
            }
            let end = delimiters.as_ref().and_then(|delimiters| {
                let end = delimiters.end_token(tokenizer, &self.ids);
                end.filter(in_vocabulary)
            });
            let spelt_out = delimiters.as_ref().and_then(TurnDelimiters::printed_end);
            if let (None, Some(text)) = (end, spelt_out) {
                tracing::warn!(
                    text,
                    token = named.unwrap_or("none"),
                    "the chat template ends a turn with a text that is no token of the model's vocabulary: generation \
                     does not stop there, and the tokenizer's eos_token is taken"
                );
            }
            end.or(self.text_end)
        });
        self.ids.extend(self.turn_end);
        self
    }

    /// Whether generation stops at this token.
    #[must_use]
    pub fn contains(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// All stop tokens, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.ids.iter().copied()
    }

    /// Whether there is no stop token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Token that ends the assistant's turn; `None` without a chat template.
    #[must_use]
    pub fn turn_end(&self) -> Option<u32> {
        self.turn_end
    }

    /// Token that terminates plain text.
    #[must_use]
    pub fn text_end(&self) -> Option<u32> {
        self.text_end
    }

    /// Token that terminates a completion of `prompt`.
    #[must_use]
    pub fn closing(&self, prompt: &PromptText) -> Option<u32> {
        match prompt {
            PromptText::Text(_) => self.text_end,
            PromptText::Dialogue(_) => self.turn_end.or(self.text_end),
        }
    }
}

/// Text that a chat template prints around an assistant's turn.
struct TurnDelimiters {
    /// After the last turn of a dialogue.
    last: String,
    /// Between the assistant's turn and the user's next.
    between: String,
    /// Before the dialogue's first turn, including what opens a turn.
    before: String,
}

const SYSTEM: &str = "You answer in one sentence.";
const QUESTION: &str = "Which colour has grass?";
const ANSWER: &str = "Grass is green, mostly.";
const THANKS: &str = "And which the sky?";

impl TurnDelimiters {
    /// Renders a short dialogue with `chat`, without a system turn or, if the template needs one, with it; `None` when
    /// the template fails or does not print the messages verbatim.
    fn of(chat: &ChatTemplate) -> Option<Self> {
        let system = Message::new("system", SYSTEM);
        Self::after(chat, &[]).or_else(|| Self::after(chat, &[system]))
    }

    /// Renders a short dialogue that begins with `opening`.
    fn after(chat: &ChatTemplate, opening: &[Message]) -> Option<Self> {
        let turns = [("user", QUESTION), ("assistant", ANSWER), ("user", THANKS)];
        let render = |turns: &[(&str, &str)]| {
            let messages = turns.iter().map(|(role, text)| Message::new(role, *text));
            let messages = opening.iter().cloned().chain(messages);
            chat.render_closed(&Dialogue::new(messages.collect())).ok()
        };
        let finished = render(&turns[..2])?;
        let (before, after) = finished.split_once(QUESTION)?;
        let (_, last) = after.rsplit_once(ANSWER)?;
        let longer = render(&turns);
        let between = longer.as_deref().and_then(|text| {
            let (_, after) = text.split_once(ANSWER)?;
            Some(after.split_once(THANKS)?.0)
        });
        Some(Self {
            last: last.to_owned(),
            between: between.unwrap_or_default().to_owned(),
            before: before.to_owned(),
        })
    }

    /// Text that the template prints after a final answer, without white space around it.
    fn printed_end(&self) -> Option<&str> {
        Some(self.last.trim()).filter(|text| !text.is_empty())
    }

    /// The last special token of those that follow every answer, final or not; else the first special token after a final
    /// answer; else the first one between turns that does not open a turn; else the first added token after a final
    /// answer.
    fn end_token(&self, tokenizer: &GuardedTokenizer, stops: &BTreeSet<u32>) -> Option<u32> {
        let added = tokenizer.added_tokens();
        // Tokens that occur in the text literally, unlike the `<unk>` of text that cannot be tokenised.
        let ids = |text: &str| {
            let ids = tokenizer.ids(text, false).unwrap_or_default();
            let is_literal = |id: &u32| {
                added
                    .get(id)
                    .is_none_or(|token| text.contains(&token.content))
            };
            ids.into_iter().filter(is_literal).collect::<Vec<u32>>()
        };
        let is_special = |id: &u32| stops.contains(id) || added.get(id).is_some_and(|t| t.special);
        let (last, between, opening) = (ids(&self.last), ids(&self.between), ids(&self.before));
        let closes = |id: &&u32| is_special(id) && !opening.contains(id);
        let both = last.iter().zip(&between).take_while(|(a, b)| a == b);
        let common = both.map(|(id, _)| id).filter(closes).last();
        let found = common.or_else(|| last.iter().find(|id| is_special(id)));
        let found = found.or_else(|| between.iter().find(closes));
        found
            .or_else(|| last.iter().find(|id| added.contains_key(id)))
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        config::ModelConfig,
        fixtures::{WORD_TOKENIZER, config_json, shared},
        folder::ModelFolder,
        tokenizer::Tokenizer,
    };

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                          {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    /// A folder whose tokenizer has special tokens from id 8 on, and `<plain>`, an added token that is not special.
    fn folder(files: &[(&str, &Value)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut tokenizer: Value = serde_json::from_str(WORD_TOKENIZER).unwrap();
        let names = ["<|im_start|>", "<|im_end|>", "</s>", "<|eot|>", "<plain>"];
        for (id, name) in (8..).zip(names) {
            let mut token = tokenizer["added_tokens"][1].clone();
            token["id"] = json!(id);
            token["content"] = json!(name);
            token["special"] = json!(name != "<plain>");
            tokenizer["added_tokens"]
                .as_array_mut()
                .unwrap()
                .push(token);
        }
        let mut config = config_json(13);
        config["eos_token_id"] = Value::Null;
        let written = [("tokenizer.json", &tokenizer), ("config.json", &config)];
        for (file, json) in written.iter().chain(files) {
            fs::write(folder.path().join(file), json.to_string()).unwrap();
        }
        folder
    }

    fn stops(files: &[(&str, &Value)]) -> StopTokens {
        let folder = folder(files);
        let config = ModelConfig::load(folder.path()).unwrap();
        let tokenizer = Tokenizer::load(folder.path(), &config, None).unwrap();
        tokenizer.stops().clone()
    }

    fn named(template: &str, eos: &str) -> Value {
        json!({"chat_template": template, "eos_token": eos})
    }

    #[test]
    fn the_template_determines_the_turn_end_and_the_tokenizer_the_text_end() {
        let last = "{% for m in messages %}<|im_start|>{{ m.content }}{% if not loop.last %}<|eot|>{% endif %}{% endfor %}";
        let open = "{% for m in messages %}<|im_start|>{{ m.content }}\n{% endfor %}";
        let plain = "{% for m in messages %}{{ m.content }}<plain>{% endfor %}";
        let raising = "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}";
        let altering = "{% for m in messages %}{{ m.content|upper }}<|eot|>{% endfor %}";
        let own = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}";
        let with_system = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}\
                           {% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}";
        let parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|eot|>{% endfor %}";
        // An answer has a closing token of its own before that of every turn.
        let nested = "{% for m in messages %}<|im_start|>{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}<|eot|>\
                      {% endfor %}";
        // The text's end follows the last turn's.
        let both = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{{ eos_token }}";
        // Template, the tokenizer's eos_token, turn end, text end.
        let cases = [
            (nested, "</s>", 11, 10),
            (both, "</s>", 9, 10),
            (CHATML, "</s>", 9, 10),
            (CHATML, "<|im_end|>", 9, 9),
            (last, "</s>", 11, 10),
            (open, "</s>", 10, 10),
            (plain, "</s>", 12, 10),
            (raising, "</s>", 10, 10),
            (altering, "</s>", 10, 10),
            (own, "<s>", 1, 1),
            (with_system, "</s>", 9, 10),
            (parts, "</s>", 11, 10),
        ];
        for (template, eos, turn, text) in cases {
            let generation = json!({"eos_token_id": [11, 2]});
            let files = [
                ("tokenizer_config.json", &named(template, eos)),
                ("generation_config.json", &generation),
            ];
            let stops = stops(&files);
            assert_eq!(
                (stops.turn_end(), stops.text_end()),
                (Some(turn), Some(text)),
                "{template}"
            );
            let all = BTreeSet::from([2, 11, turn, text]);
            assert_eq!(stops.ids().collect::<BTreeSet<_>>(), all, "{template}");
            let dialogue = PromptText::Dialogue(Dialogue::of_user("the cat"));
            assert_eq!(stops.closing(&dialogue), Some(turn));
            assert_eq!(
                stops.closing(&PromptText::Text("the cat".into())),
                Some(text)
            );
        }
    }

    #[test]
    fn stop_tokens_are_read_from_every_file() {
        let config = |eos: Value| {
            let mut config = config_json(13);
            config["eos_token_id"] = eos;
            config
        };
        let generation = json!({"eos_token_id": [11, 9]});
        let eos = json!({"eos_token": {"content": "</s>"}});
        let both = [
            ("config.json", &config(json!(3))),
            ("generation_config.json", &generation),
        ];
        let of_config = stops(&both);
        assert_eq!(of_config.ids().collect::<Vec<_>>(), [3, 9, 11]);
        assert_eq!(
            (of_config.text_end(), of_config.turn_end()),
            (Some(11), None)
        );
        let of_generation = stops(&[("generation_config.json", &generation)]);
        assert_eq!(of_generation.text_end(), Some(11));
        let of_tokenizer = stops(&[
            ("config.json", &config(json!(3))),
            ("tokenizer_config.json", &eos),
        ]);
        assert_eq!(of_tokenizer.ids().collect::<Vec<_>>(), [3, 10]);
        assert_eq!(of_tokenizer.text_end(), Some(10));
        let map = stops(&[("special_tokens_map.json", &eos)]);
        assert_eq!(map.text_end(), Some(10));
        let none = stops(&[]);
        assert!(none.is_empty() && none.text_end().is_none());
        let unknown = stops(&[("tokenizer_config.json", &json!({"eos_token": "<nowhere>"}))]);
        assert!(unknown.is_empty());
        let beyond = json!({"eos_token_id": [9999, 13]});
        let beyond = stops(&[
            ("config.json", &config(json!(9999))),
            ("generation_config.json", &beyond),
        ]);
        assert!(beyond.is_empty() && beyond.text_end().is_none());
        // The tokenizer's and template's tokens are outside the model's vocabulary.
        let mut small = config_json(8);
        small["eos_token_id"] = json!(3);
        let named = named(CHATML, "</s>");
        let added = stops(&[("config.json", &small), ("tokenizer_config.json", &named)]);
        assert_eq!(added.ids().collect::<Vec<_>>(), [3]);
        assert_eq!((added.text_end(), added.turn_end()), (Some(3), Some(3)));
    }

    /// Phi-3 ends turns with `<|end|>` and texts with `<|endoftext|>`.
    #[test]
    fn a_real_template_has_an_end_of_turn_token() {
        let Some(path) = shared("data/tokenizers/phi-3-mini") else {
            return;
        };
        let config = crate::fixtures::config(32_064);
        let tokenizer = Tokenizer::load(&path, &config, None).unwrap();
        let stops = tokenizer.stops();
        assert_eq!(
            (stops.turn_end(), stops.text_end()),
            (Some(32_007), Some(32_000))
        );
        assert_eq!(stops.ids().collect::<Vec<_>>(), [1, 32_000, 32_007]);
    }

    /// Turns end with `<s>`, the tokenizer's eos_token; generation_config.json lists `</s>` first.
    #[test]
    fn the_first_declared_token_is_not_the_turn_end() {
        for (case, turn, ids) in [
            ("A09/chat-eot", Some(1), vec![1, 2]),
            ("A10/eos-only-tokenizer", None, vec![1, 3]),
            ("A10/eos-null", None, vec![1]),
        ] {
            let Some(path) = shared(&format!("data/cases/{case}")) else {
                return;
            };
            let folder = ModelFolder::open(&path, None).unwrap();
            let stops = &folder.config.stops;
            assert_eq!(stops, folder.tokenizer.stops());
            assert_eq!(
                (stops.turn_end(), stops.text_end()),
                (turn, Some(1)),
                "{case}"
            );
            assert_eq!(stops.ids().collect::<Vec<_>>(), ids, "{case}");
        }
    }
}
