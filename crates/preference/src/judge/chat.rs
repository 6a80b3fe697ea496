//! What a chat model that judges is asked, and how its answer is read; wherever the model is.

use messages::{Digest, JudgeVersion, Message};
use serde_json::json;
use settings::ChatSettings;

use super::verdict_text::{ScoredToken, VerdictWords};
use super::{Comparison, Judge, Verdict};
use crate::JudgeError;

/// How many likeliest tokens are asked for: the verdicts and some more, as few as every server grants.
const TOP_LOGPROBS: usize = 5;

/// The question of the settings.
#[derive(Debug, Clone)]
pub(super) struct ChatQuestion {
    pub(super) settings: ChatSettings,
    words: VerdictWords,
}

/// What a chat model said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Said {
    /// All of it.
    pub text: String,
    /// Its tokens, where their log-probabilities are known.
    pub tokens: Vec<ScoredToken>,
}

/// A chat model that answers in this process.
pub trait ChatModel: Send {
    /// The judge's name in labels and metrics.
    fn name(&self) -> &str;

    /// A number that changes whenever the same dialogue may be answered differently.
    fn version(&self) -> u64;

    /// What it says to every dialogue, in their order: its likeliest words, at most so many tokens, each with
    /// so many `alternatives`.
    ///
    /// # Errors
    /// When it cannot answer them.
    fn answer(
        &mut self,
        dialogues: &[Vec<Message>],
        max_tokens: usize,
        alternatives: usize,
    ) -> Result<Vec<Said>, JudgeError>;
}

/// A chat model of this process as a judge.
pub struct ChatJudge {
    model: Box<dyn ChatModel>,
    question: ChatQuestion,
    version: JudgeVersion,
}

impl ChatQuestion {
    pub(super) fn new(settings: &ChatSettings) -> Self {
        Self {
            settings: settings.clone(),
            words: VerdictWords::new(settings),
        }
    }

    /// Whatever changes what `model` is asked, or how its answer is read, is another version.
    pub(super) fn version(&self, model: &str) -> JudgeVersion {
        let settings = &self.settings;
        let asked = json!([
            model,
            settings.system,
            settings.template,
            settings.first_verdict,
            settings.second_verdict,
            settings.tie_verdict,
            settings.logprobs,
            settings.max_tokens,
        ]);
        let Digest(digest) = Digest::of(asked.to_string().as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        JudgeVersion(u64::from_le_bytes(first))
    }

    /// What the model is sent: the system's turn, if there is one, and the template with the texts in it.
    pub(super) fn dialogue(&self, comparison: &Comparison<'_>) -> Vec<Message> {
        let asked = fill(
            &self.settings.template,
            &[
                ("{prompt}", &comparison.prompt.transcript()),
                ("{first}", &comparison.first.text),
                ("{second}", &comparison.second.text),
            ],
        );
        let system = &self.settings.system;
        let system = (!system.is_empty()).then(|| Message::new("system", system));
        system
            .into_iter()
            .chain([Message::new("user", &asked)])
            .collect()
    }

    /// How many likeliest tokens are of use.
    pub(super) fn alternatives(&self) -> usize {
        if self.settings.logprobs {
            TOP_LOGPROBS
        } else {
            0
        }
    }

    /// The verdict in what the model said.
    pub(super) fn verdict(&self, said: &Said) -> Verdict {
        let tokens: &[ScoredToken] = if self.settings.logprobs {
            &said.tokens
        } else {
            &[]
        };
        self.words.read(&said.text, tokens)
    }
}

impl ChatJudge {
    /// A judge that asks `model` what the settings say.
    #[must_use]
    pub fn new(model: Box<dyn ChatModel>, settings: &ChatSettings) -> Self {
        let question = ChatQuestion::new(settings);
        Self {
            version: question.version(&model.version().to_string()),
            model,
            question,
        }
    }
}

impl Judge for ChatJudge {
    fn name(&self) -> &str {
        self.model.name()
    }

    fn version(&self) -> JudgeVersion {
        self.version
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let dialogues: Vec<_> = batch
            .iter()
            .map(|comparison| self.question.dialogue(comparison))
            .collect();
        let longest = self.question.settings.max_tokens;
        let alternatives = self.question.alternatives();
        let said = self.model.answer(&dialogues, longest, alternatives)?;
        Ok(said
            .iter()
            .map(|said| self.question.verdict(said))
            .collect())
    }
}

/// The template with every name replaced by its text. What a text says is never replaced again.
fn fill(template: &str, texts: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    let next = |rest: &str| {
        let found = texts
            .iter()
            .filter_map(|&(name, text)| Some((rest.find(name)?, name, text)));
        found.min_by_key(|&(place, ..)| place)
    };
    while let Some((place, name, text)) = next(rest) {
        filled.push_str(&rest[..place]);
        filled.push_str(text);
        rest = &rest[place + name.len()..];
    }
    filled + rest
}

#[cfg(test)]
pub(super) mod tests {
    use messages::Dialogue;

    use super::*;
    use crate::judge::fake::{abstained, pair, preferred};
    use crate::judge::verdict_text::Alternative;

    pub(in crate::judge) fn settings() -> ChatSettings {
        ChatSettings {
            system: "Judge.".into(),
            template: "{prompt}|{first}|{second}".into(),
            first_verdict: "[[A]]".into(),
            second_verdict: "[[B]]".into(),
            tie_verdict: "[[C]]".into(),
            logprobs: true,
            max_tokens: 16,
        }
    }

    /// Says what the user's turn ends with, in one token of probability 3/4 where [[B]] has the rest.
    struct Echo;

    impl ChatModel for Echo {
        fn name(&self) -> &str {
            "echo"
        }

        fn version(&self) -> u64 {
            7
        }

        fn answer(
            &mut self,
            dialogues: &[Vec<Message>],
            max_tokens: usize,
            alternatives: usize,
        ) -> Result<Vec<Said>, JudgeError> {
            assert_eq!(max_tokens, 16);
            let said = |dialogue: &Vec<Message>| {
                let roles: Vec<&str> = dialogue.iter().map(|turn| turn.role.as_str()).collect();
                assert_eq!(roles, ["system", "user"]);
                let text = dialogue[1].content.as_str().expect("text");
                let text = text.rsplit('|').next().expect("a last part").to_owned();
                let alternative = |token: &str, p: f64| Alternative {
                    token: token.into(),
                    logprob: p.ln(),
                };
                let likeliest = [alternative(&text, 0.75), alternative("[[B]]", 0.25)];
                let token = ScoredToken {
                    token: text.clone(),
                    logprob: 0.75f64.ln(),
                    top_logprobs: likeliest.into_iter().take(alternatives).collect(),
                };
                Said {
                    text,
                    tokens: vec![token],
                }
            };
            Ok(dialogues.iter().map(said).collect())
        }
    }

    #[test]
    fn a_dialogue_is_asked_about_by_its_turns_and_a_response_keeps_its_space() {
        let mut pair = pair(1, &[" the floor.", "b"]);
        pair.prompt.text = "user\nWhere?\nassistant\n".into();
        let comparison = |pair: &messages::Pair| {
            let asked = Comparison {
                prompt: &pair.prompt,
                first: &pair.completions[0],
                second: &pair.completions[1],
            };
            let dialogue = ChatQuestion::new(&settings()).dialogue(&asked);
            dialogue[1].content.as_str().expect("text").to_owned()
        };
        let mut dialogue = Dialogue::of_user("Where?");
        pair.prompt.dialogue = Some(dialogue.clone());
        assert_eq!(comparison(&pair), "Where?| the floor.|b");
        dialogue
            .messages
            .insert(0, Message::new("system", "Be brief."));
        pair.prompt.dialogue = Some(dialogue);
        let turns = "system: Be brief.\n\nuser: Where?";
        assert_eq!(comparison(&pair), format!("{turns}| the floor.|b"));
    }

    fn verdicts(settings: &ChatSettings) -> Vec<Verdict> {
        let pairs = [pair(1, &["x", "[[A]]"]), pair(2, &["x", "none"])];
        let comparisons = pairs.each_ref().map(|pair| Comparison {
            prompt: &pair.prompt,
            first: &pair.completions[0],
            second: &pair.completions[1],
        });
        let mut judge = ChatJudge::new(Box::new(Echo), settings);
        assert_eq!(judge.name(), "echo");
        judge.judge(&comparisons).expect("it answers")
    }

    #[test]
    fn a_model_of_this_process_is_asked_and_read_as_one_behind_an_endpoint_is() {
        let none = abstained("no verdict in \"none\"");
        assert_eq!(verdicts(&settings()), [preferred(0.75), none.clone()]);
        let words_alone = ChatSettings {
            logprobs: false,
            ..settings()
        };
        assert_eq!(verdicts(&words_alone), [preferred(1.0), none]);
    }

    #[test]
    fn whatever_changes_an_answer_is_another_version() {
        let version = |settings: &ChatSettings| ChatJudge::new(Box::new(Echo), settings).version();
        let other = ChatSettings {
            template: "{first}|{second}".into(),
            ..settings()
        };
        assert_eq!(version(&settings()), version(&settings()));
        assert_ne!(version(&settings()), version(&other));
        let question = ChatQuestion::new(&settings());
        assert_ne!(question.version("a"), question.version("b"));
    }
}
