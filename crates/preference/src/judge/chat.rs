//! Chat models as judges: the prompt, and the parsing of the replies. Shared by local and remote models.

use messages::{Completion, Digest, JudgeVersion, Message, Prompt, Seed};
use serde_json::json;
use settings::{ChatSettings, RubricSettings, VerdictForm};

use crate::error::JudgeError;
use crate::judge::score_parser::score;
use crate::judge::verdict_parser::{ScoredToken, VerdictParser};
use crate::judge::{Comparison, Judge, ScoredVerdict, Verdict};

/// Requested number of top log-probabilities per token: more than there are verdicts, within every server's limit.
const TOP_LOGPROBS: usize = 5;

/// RNG stream id of the seeds of several votes.
const VOTE_STREAM: u64 = 0x0b0e;

/// Prompt and verdict strings of the settings.
#[derive(Debug, Clone)]
pub(super) struct ChatPrompt {
    pub(super) settings: ChatSettings,
    rubric: RubricSettings,
    parser: VerdictParser,
}

/// A dialogue that a chat model continues.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// Messages of the request.
    pub messages: Vec<Message>,
    /// Seed of a sampled reply; has no effect on a greedy one.
    pub seed: Seed,
}

/// Settings of replies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplySettings {
    /// Longest reply in tokens.
    pub max_tokens: usize,
    /// Number of most likely alternatives that every token comes with.
    pub top_logprobs: usize,
    /// Sampling temperature; 0: greedy.
    pub temperature: f64,
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

    /// Replies to all requests, in their order.
    ///
    /// # Errors
    /// When generation fails.
    fn reply(
        &mut self,
        requests: &[ChatRequest],
        settings: ReplySettings,
    ) -> Result<Vec<ChatReply>, JudgeError>;
}

/// A local chat model as a judge.
pub struct ChatJudge {
    model: Box<dyn ChatModel>,
    prompt: ChatPrompt,
    version: JudgeVersion,
}

impl ChatPrompt {
    pub(super) fn new(settings: &ChatSettings, rubric: &RubricSettings) -> Self {
        Self {
            settings: settings.clone(),
            rubric: rubric.clone(),
            parser: VerdictParser::new(settings),
        }
    }

    /// Version: a digest of everything that determines the prompt and the parsing, and of `model`.
    pub(super) fn version(&self, model: &str) -> JudgeVersion {
        let (settings, rubric) = (&self.settings, &self.rubric);
        let mut parts = vec![
            json!(model),
            json!(settings.system),
            json!(settings.template),
            json!(settings.first_verdict),
            json!(settings.second_verdict),
            json!(settings.tie_verdict),
            json!(settings.logprobs),
            json!(settings.max_tokens),
        ];
        // Only what has an effect, so that other settings of judges with one greedy verdict keep their version.
        if !rubric.rubric.is_empty() {
            parts.push(json!({"rubric": rubric.rubric}));
        }
        if rubric.votes > 1 {
            parts.push(json!({"votes": rubric.votes, "temperature": settings.vote_temperature}));
        }
        if self.is_pointwise() {
            parts.push(json!({"pointwise": settings.pointwise}));
        }
        let Digest(digest) = Digest::of(json!(parts).to_string().as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        JudgeVersion(u64::from_le_bytes(first))
    }

    /// Whether the model scores one response at a time, so that p(first ≻ second) = 1 − p(second ≻ first).
    pub(super) fn is_pointwise(&self) -> bool {
        self.rubric.form == VerdictForm::Pointwise
    }

    /// Requests for a verdict on `comparison`: for every vote one with both responses, or one for each of them.
    pub(super) fn requests(&self, comparison: &Comparison<'_>) -> Vec<ChatRequest> {
        let Comparison {
            prompt,
            first,
            second,
        } = comparison;
        let dialogues = match self.rubric.form {
            VerdictForm::Pairwise => vec![self.dialogue(comparison)],
            VerdictForm::Pointwise => [first, second]
                .map(|completion| self.pointwise_dialogue(prompt, completion))
                .into(),
        };
        let vote = |vote: usize| {
            let seed = match self.rubric.votes {
                1 => Seed(0),
                _ => prompt.seed.derive(VOTE_STREAM).derive(vote as u64),
            };
            let request = move |messages| ChatRequest { messages, seed };
            dialogues.clone().into_iter().map(request)
        };
        (0..self.rubric.votes).flat_map(vote).collect()
    }

    /// Messages with both responses: the system message, if configured, and the filled template.
    fn dialogue(&self, comparison: &Comparison<'_>) -> Vec<Message> {
        self.messages(
            &self.settings.template,
            &[
                ("{prompt}", &comparison.prompt.transcript()),
                ("{first}", &comparison.first.text),
                ("{second}", &comparison.second.text),
            ],
        )
    }

    /// Messages with one response.
    fn pointwise_dialogue(&self, prompt: &Prompt, completion: &Completion) -> Vec<Message> {
        self.messages(
            &self.settings.pointwise.template,
            &[
                ("{prompt}", &prompt.transcript()),
                ("{response}", &completion.text),
            ],
        )
    }

    /// The system message and the filled template, with the rubric in one of them.
    fn messages(&self, template: &str, texts: &[(&str, &str)]) -> Vec<Message> {
        const RUBRIC: &str = "{rubric}";
        let (rubric, system) = (&self.rubric.rubric, &self.settings.system);
        let user = fill(template, &[texts, &[(RUBRIC, rubric)]].concat());
        let mut system = fill(system, &[(RUBRIC, rubric)]);
        let has_place = [template, &self.settings.system];
        if !has_place.iter().any(|text| text.contains(RUBRIC)) && !rubric.is_empty() {
            let separator = if system.is_empty() { "" } else { "\n\n" };
            system = [&system, separator, rubric].concat();
        }
        let system = (!system.is_empty()).then(|| Message::new("system", system));
        system
            .into_iter()
            .chain([Message::new("user", user)])
            .collect()
    }

    /// Settings of replies: greedy, unless there are several votes.
    pub(super) fn reply_settings(&self) -> ReplySettings {
        let settings = &self.settings;
        ReplySettings {
            max_tokens: settings.max_tokens,
            top_logprobs: if settings.logprobs { TOP_LOGPROBS } else { 0 },
            temperature: match self.rubric.votes {
                1 => 0.0,
                _ => settings.vote_temperature,
            },
        }
    }

    /// Verdict of a reply: the probability that the first response is better, or the score of its response; or why it
    /// says neither.
    pub(super) fn opinion(&self, reply: &ChatReply) -> Result<f64, String> {
        if self.is_pointwise() {
            return score(&reply.text, &self.settings.pointwise);
        }
        let tokens: &[ScoredToken] = if self.settings.logprobs {
            &reply.tokens
        } else {
            &[]
        };
        match self.parser.parse(&reply.text, tokens) {
            Verdict::Preference(p) => Ok(f64::from(p.get())),
            Verdict::Abstained { reason } => Err(reason),
        }
    }

    /// Verdict of the opinions of the replies to [`Self::requests`], in their order. Votes without an opinion are left
    /// out of the mean; without any it is an abstention.
    pub(super) fn verdict(&self, opinions: &[Result<f64, String>]) -> ScoredVerdict {
        let dialogues = if self.is_pointwise() { 2 } else { 1 };
        let mean_of = |dialogue: usize| mean(opinions.iter().skip(dialogue).step_by(dialogues));
        let (verdict, scores) = match (mean_of(0), mean_of(dialogues - 1)) {
            (Err(reason), _) | (_, Err(reason)) => (Verdict::Abstained { reason }, None),
            (Ok(p), _) if !self.is_pointwise() => (Verdict::from_probability(p), None),
            (Ok(first), Ok(second)) => {
                let log_odds = (first - second) / self.settings.pointwise.temperature;
                (
                    Verdict::from_log_odds(log_odds),
                    Some([first as f32, second as f32]),
                )
            }
        };
        ScoredVerdict { verdict, scores }
    }
}

/// Mean of the opinions that there are; the last reason if there are none.
fn mean<'a>(opinions: impl Iterator<Item = &'a Result<f64, String>>) -> Result<f64, String> {
    let (mut sum, mut count, mut last) = (0.0, 0.0, String::new());
    for opinion in opinions {
        match opinion {
            Ok(value) => (sum, count) = (sum + value, count + 1.0),
            Err(reason) => last.clone_from(reason),
        }
    }
    if count > 0.0 {
        Ok(sum / count)
    } else {
        Err(last)
    }
}

impl ChatJudge {
    /// A judge that prompts `model` as configured.
    #[must_use]
    pub fn new(
        model: Box<dyn ChatModel>,
        settings: &ChatSettings,
        rubric: &RubricSettings,
    ) -> Self {
        let prompt = ChatPrompt::new(settings, rubric);
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

    fn is_antisymmetric(&self) -> bool {
        self.prompt.is_pointwise()
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let scored = self.judge_scored(batch)?.into_iter();
        Ok(scored.map(|scored| scored.verdict).collect())
    }

    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<ScoredVerdict>, JudgeError> {
        let requests: Vec<Vec<ChatRequest>> = batch
            .iter()
            .map(|comparison| self.prompt.requests(comparison))
            .collect();
        let settings = self.prompt.reply_settings();
        let replies = self.model.reply(&requests.concat(), settings)?;
        let mut opinions = replies.iter().map(|reply| self.prompt.opinion(reply));
        let verdict = |requests: &Vec<ChatRequest>| {
            let opinions: Vec<_> = opinions.by_ref().take(requests.len()).collect();
            self.prompt.verdict(&opinions)
        };
        Ok(requests.iter().map(verdict).collect())
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
            vote_temperature: 0.5,
            pointwise: settings::PointwiseSettings {
                template: "{prompt}|{response}".into(),
                min: 0.0,
                max: 10.0,
                temperature: 2.0,
            },
        }
    }

    /// One greedy verdict without a rubric.
    pub(in crate::judge) fn plain() -> RubricSettings {
        RubricSettings {
            form: VerdictForm::Pairwise,
            rubric: String::new(),
            votes: 1,
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
            requests: &[ChatRequest],
            settings: ReplySettings,
        ) -> Result<Vec<ChatReply>, JudgeError> {
            assert_eq!((settings.max_tokens, settings.temperature), (16, 0.0));
            let reply = |request: &ChatRequest| {
                let dialogue = &request.messages;
                let roles: Vec<&str> = dialogue.iter().map(|turn| turn.role()).collect();
                assert_eq!(roles, ["system", "user"]);
                let text = dialogue[1].content().as_str().expect("text");
                let text = text.rsplit('|').next().expect("a last part").to_owned();
                let candidate = |token: &str, p: f64| TopLogprob {
                    token: token.into(),
                    logprob: p.ln(),
                };
                let candidates = [candidate(&text, 0.75), candidate("[[B]]", 0.25)];
                let token = ScoredToken {
                    token: text.clone(),
                    logprob: 0.75f64.ln(),
                    top_logprobs: candidates.into_iter().take(settings.top_logprobs).collect(),
                };
                ChatReply {
                    text,
                    tokens: vec![token],
                }
            };
            Ok(requests.iter().map(reply).collect())
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
            let dialogue = ChatPrompt::new(&settings(), &plain()).dialogue(&comparison);
            dialogue[1].content().as_str().expect("text").to_owned()
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
        let mut judge = ChatJudge::new(Box::new(Echo), settings, &plain());
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
        let version =
            |settings: &ChatSettings| ChatJudge::new(Box::new(Echo), settings, &plain()).version();
        let other = ChatSettings {
            template: "{first}|{second}".into(),
            ..settings()
        };
        assert_eq!(version(&settings()), version(&settings()));
        assert_ne!(version(&settings()), version(&other));
        let prompt = ChatPrompt::new(&settings(), &plain());
        assert_ne!(prompt.version("a"), prompt.version("b"));
    }

    /// Replies in turn, and records what it was asked.
    struct Scripted {
        replies: Vec<&'static str>,
        requests: std::sync::Arc<std::sync::Mutex<Vec<ChatRequest>>>,
    }

    impl ChatModel for Scripted {
        fn name(&self) -> &str {
            "scripted"
        }

        fn version(&self) -> u64 {
            1
        }

        fn reply(
            &mut self,
            requests: &[ChatRequest],
            settings: ReplySettings,
        ) -> Result<Vec<ChatReply>, JudgeError> {
            assert_eq!(settings.temperature, 0.5, "several votes are sampled");
            self.requests.lock().unwrap().extend(requests.to_vec());
            let reply = |text: &&str| ChatReply {
                text: (*text).to_owned(),
                tokens: Vec::new(),
            };
            Ok(self.replies.iter().map(reply).collect())
        }
    }

    /// The verdict of a judge of `form` on "x" and "y" with three votes, and what was asked.
    fn voted(form: VerdictForm, replies: &[&'static str]) -> (ScoredVerdict, Vec<ChatRequest>) {
        let requests = std::sync::Arc::default();
        let model = Scripted {
            replies: replies.to_vec(),
            requests: std::sync::Arc::clone(&requests),
        };
        let rubric = RubricSettings {
            form,
            rubric: "Brevity counts.".into(),
            votes: 3,
        };
        let mut judge = ChatJudge::new(Box::new(model), &settings(), &rubric);
        assert_eq!(judge.is_antisymmetric(), form == VerdictForm::Pointwise);
        let pair = pair(1, &["x", "y"]);
        let comparison = Comparison {
            prompt: &pair.prompt,
            first: &pair.completions[0],
            second: &pair.completions[1],
        };
        let verdict = judge
            .judge_scored(&[comparison])
            .expect("it answers")
            .remove(0);
        let requests = requests.lock().unwrap().clone();
        (verdict, requests)
    }

    #[test]
    fn the_mean_of_sampled_votes_is_p() {
        let pairwise = |replies: &[&'static str]| voted(VerdictForm::Pairwise, replies).0;
        let p = |replies: &[&'static str]| match pairwise(replies).verdict {
            Verdict::Preference(p) => p.get(),
            Verdict::Abstained { reason } => panic!("{reason}"),
        };
        // 1, 0 and ½; 1 and 1 with a vote that says nothing.
        assert_eq!(p(&["[[A]]", "[[B]]", "[[C]]"]), 0.5);
        assert_eq!(p(&["[[A]]", "[[A]]", "[[B]]"]), 2.0 / 3.0);
        assert_eq!(p(&["[[A]]", "hm", "[[A]]"]), 1.0);
        let none = pairwise(&["a", "b", "c"]);
        assert_eq!(none.verdict, abstained("no verdict in \"c\""));
        let (_, requests) = voted(VerdictForm::Pairwise, &["[[A]]"; 3]);
        let seeds: std::collections::HashSet<_> = requests.iter().map(|r| r.seed.0).collect();
        assert_eq!(
            (requests.len(), seeds.len()),
            (3, 3),
            "every vote has a seed"
        );
        let system = requests[0].messages[0].content().as_str();
        assert_eq!(system, Some("Judge.\n\nBrevity counts."));
    }

    #[test]
    fn pointwise_scores_are_compared_by_their_means() {
        // Means 7 and 4: log-odds 3/2 at temperature 2.
        let replies = ["[[8]]", "[[3]]", "[[6]]", "[[5]]", "[[7]]", "none"];
        let (scored, requests) = voted(VerdictForm::Pointwise, &replies);
        let Verdict::Preference(p) = scored.verdict else {
            panic!("{scored:?}");
        };
        assert!((p.get() - 0.817_574_5).abs() < 1e-6, "{p:?}");
        assert_eq!(scored.scores, Some([7.0, 4.0]));
        let texts: Vec<_> = requests
            .iter()
            .filter_map(|request| request.messages[1].content().as_str())
            .collect();
        assert_eq!(texts[..2], ["say|x", "say|y"]);
        assert_eq!(requests[0].seed, requests[1].seed, "one vote has one seed");
        let (unscored, _) = voted(
            VerdictForm::Pointwise,
            &["[[8]]", "a", "[[6]]", "b", "[[7]]", "c"],
        );
        assert_eq!(unscored.verdict, abstained("no score in \"c\""));
    }

    #[test]
    fn a_rubric_is_where_the_template_names_it_and_changes_the_version() {
        let rubric = RubricSettings {
            rubric: "Rhyme {first}.".into(),
            ..plain()
        };
        let placed = ChatSettings {
            template: "{rubric}|{first}|{second}".into(),
            ..settings()
        };
        let pair = pair(1, &["x", "y"]);
        let comparison = Comparison {
            prompt: &pair.prompt,
            first: &pair.completions[0],
            second: &pair.completions[1],
        };
        let messages = &ChatPrompt::new(&placed, &rubric).requests(&comparison)[0].messages;
        let texts: Vec<_> = messages
            .iter()
            .filter_map(|m| m.content().as_str())
            .collect();
        assert_eq!(texts, ["Judge.", "Rhyme {first}.|x|y"]);
        let version = |rubric: &RubricSettings| ChatPrompt::new(&settings(), rubric).version("m");
        let variants = [
            plain(),
            rubric,
            RubricSettings {
                votes: 2,
                ..plain()
            },
            RubricSettings {
                form: VerdictForm::Pointwise,
                ..plain()
            },
        ];
        let versions: std::collections::HashSet<_> = variants.iter().map(version).collect();
        assert_eq!(versions.len(), 4);
    }
}
