//! Chat models as judges: the prompt, and the parsing of the reply. Shared by local and remote models.

use messages::{Digest, JudgeVersion, Message};
use serde_json::json;
use settings::ChatSettings;

use crate::error::JudgeError;
use crate::judge::verdict_parser::{ScoredToken, VerdictParser};
use crate::judge::{Comparison, Judge, Verdict};

/// Requested number of top log-probabilities per token: more than there are verdicts, within every server's limit.
const TOP_LOGPROBS: usize = 5;

/// Prompt and verdict strings of the settings.
#[derive(Debug, Clone)]
pub(super) struct ChatPrompt {
    pub(super) settings: ChatSettings,
    parser: VerdictParser,
}

/// Reply of a chat model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatReply {
    /// Full text.
    pub text: String,
    /// Tokens with log-probabilities, where they are known.
    pub tokens: Vec<ScoredToken>,
}

/// A chat model in this process.
pub trait ChatModel: Send {
    /// The judge's name in labels and metrics.
    fn name(&self) -> &str;

    /// Changes whenever the same dialogue may get a different reply.
    fn version(&self) -> u64;

    /// Greedy replies to all dialogues, in their order: at most `max_tokens` tokens each, every token with its
    /// `top_logprobs` most likely alternatives.
    ///
    /// # Errors
    /// When generation fails.
    fn reply(
        &mut self,
        dialogues: &[Vec<Message>],
        max_tokens: usize,
        top_logprobs: usize,
    ) -> Result<Vec<ChatReply>, JudgeError>;
}

/// A local chat model as a judge.
pub struct ChatJudge {
    model: Box<dyn ChatModel>,
    prompt: ChatPrompt,
    version: JudgeVersion,
}

impl ChatPrompt {
    pub(super) fn new(settings: &ChatSettings) -> Self {
        Self {
            settings: settings.clone(),
            parser: VerdictParser::new(settings),
        }
    }

    /// Version: a digest of everything that determines the prompt and the parsing, and of `model`.
    pub(super) fn version(&self, model: &str) -> JudgeVersion {
        let settings = &self.settings;
        let parts = json!([
            model,
            settings.system,
            settings.template,
            settings.first_verdict,
            settings.second_verdict,
            settings.tie_verdict,
            settings.logprobs,
            settings.max_tokens,
        ]);
        let Digest(digest) = Digest::of(parts.to_string().as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        JudgeVersion(u64::from_le_bytes(first))
    }

    /// Messages for the model: the system message, if configured, and the filled template.
    pub(super) fn dialogue(&self, comparison: &Comparison<'_>) -> Vec<Message> {
        let user = fill(
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
            .chain([Message::new("user", &user)])
            .collect()
    }

    /// Number of top log-probabilities to request.
    pub(super) fn top_logprobs(&self) -> usize {
        if self.settings.logprobs {
            TOP_LOGPROBS
        } else {
            0
        }
    }

    /// Verdict in a reply.
    pub(super) fn verdict(&self, reply: &ChatReply) -> Verdict {
        let tokens: &[ScoredToken] = if self.settings.logprobs {
            &reply.tokens
        } else {
            &[]
        };
        self.parser.parse(&reply.text, tokens)
    }
}

impl ChatJudge {
    /// A judge that prompts `model` as configured.
    #[must_use]
    pub fn new(model: Box<dyn ChatModel>, settings: &ChatSettings) -> Self {
        let prompt = ChatPrompt::new(settings);
        Self {
            version: prompt.version(&model.version().to_string()),
            model,
            prompt,
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
            .map(|comparison| self.prompt.dialogue(comparison))
            .collect();
        let max_tokens = self.prompt.settings.max_tokens;
        let top_logprobs = self.prompt.top_logprobs();
        let replies = self.model.reply(&dialogues, max_tokens, top_logprobs)?;
        Ok(replies
            .iter()
            .map(|reply| self.prompt.verdict(reply))
            .collect())
    }
}

/// The template with every placeholder replaced by its text. Placeholders within a text are not replaced.
fn fill(template: &str, texts: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    let next = |rest: &str| {
        let found = texts
            .iter()
            .filter_map(|&(name, text)| Some((rest.find(name)?, name, text)));
        found.min_by_key(|&(start, ..)| start)
    };
    while let Some((start, name, text)) = next(rest) {
        filled.push_str(&rest[..start]);
        filled.push_str(text);
        rest = &rest[start + name.len()..];
    }
    filled + rest
}

#[cfg(test)]
pub(super) mod tests {
    use messages::Dialogue;

    use super::*;
    use crate::judge::fake::{abstained, pair, preferred};
    use crate::judge::verdict_parser::TopLogprob;

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

    /// Replies with the end of the user's message as one token of probability 3/4; [[B]] has the rest.
    struct Echo;

    impl ChatModel for Echo {
        fn name(&self) -> &str {
            "echo"
        }

        fn version(&self) -> u64 {
            7
        }

        fn reply(
            &mut self,
            dialogues: &[Vec<Message>],
            max_tokens: usize,
            top_logprobs: usize,
        ) -> Result<Vec<ChatReply>, JudgeError> {
            assert_eq!(max_tokens, 16);
            let reply = |dialogue: &Vec<Message>| {
                let roles: Vec<&str> = dialogue.iter().map(|turn| turn.role.as_str()).collect();
                assert_eq!(roles, ["system", "user"]);
                let text = dialogue[1].content.as_str().expect("text");
                let text = text.rsplit('|').next().expect("a last part").to_owned();
                let candidate = |token: &str, p: f64| TopLogprob {
                    token: token.into(),
                    logprob: p.ln(),
                };
                let candidates = [candidate(&text, 0.75), candidate("[[B]]", 0.25)];
                let token = ScoredToken {
                    token: text.clone(),
                    logprob: 0.75f64.ln(),
                    top_logprobs: candidates.into_iter().take(top_logprobs).collect(),
                };
                ChatReply {
                    text,
                    tokens: vec![token],
                }
            };
            Ok(dialogues.iter().map(reply).collect())
        }
    }

    #[test]
    fn a_dialogue_is_rendered_turn_by_turn_and_responses_keep_leading_spaces() {
        let mut pair = pair(1, &[" the floor.", "b"]);
        pair.prompt.text = "user\nWhere?\nassistant\n".into();
        let rendered = |pair: &messages::Pair| {
            let comparison = Comparison {
                prompt: &pair.prompt,
                first: &pair.completions[0],
                second: &pair.completions[1],
            };
            let dialogue = ChatPrompt::new(&settings()).dialogue(&comparison);
            dialogue[1].content.as_str().expect("text").to_owned()
        };
        let mut dialogue = Dialogue::of_user("Where?");
        pair.prompt.dialogue = Some(dialogue.clone());
        assert_eq!(rendered(&pair), "Where?| the floor.|b");
        dialogue
            .messages
            .insert(0, Message::new("system", "Be brief."));
        pair.prompt.dialogue = Some(dialogue);
        let turns = "system: Be brief.\n\nuser: Where?";
        assert_eq!(rendered(&pair), format!("{turns}| the floor.|b"));
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
    fn a_local_model_is_prompted_and_parsed_like_a_remote_one() {
        let none = abstained("no verdict in \"none\"");
        assert_eq!(verdicts(&settings()), [preferred(0.75), none.clone()]);
        let without_logprobs = ChatSettings {
            logprobs: false,
            ..settings()
        };
        assert_eq!(verdicts(&without_logprobs), [preferred(1.0), none]);
    }

    #[test]
    fn everything_that_changes_a_verdict_changes_the_version() {
        let version = |settings: &ChatSettings| ChatJudge::new(Box::new(Echo), settings).version();
        let other = ChatSettings {
            template: "{first}|{second}".into(),
            ..settings()
        };
        assert_eq!(version(&settings()), version(&settings()));
        assert_ne!(version(&settings()), version(&other));
        let prompt = ChatPrompt::new(&settings());
        assert_ne!(prompt.version("a"), prompt.version("b"));
    }
}
