//! Replies of chat models that judge.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use messages::{Completion, Finish, Prompt, PromptBatch, PromptId, Purpose, Seed, WeightsVersion};
use preference::{
    ChatJudge, ChatModel, ChatReply, ChatRequest, Comparison, Judge, JudgeError, ReplySettings,
    ScoredToken, TopLogprob, Verdict,
};
use serde_json::{Value, json};
use settings::{RubricSettings, VerdictForm, resolve};

use crate::targets::{Input, Outcome};

/// What a reply may hold.
const FRAGMENTS: [&str; 8] = ["[[A]]", "[[B]]", "[[C]]", "[[", "]]", "A", "[[A", "[[D]]"];

/// A chat model with one reply.
struct FixedReply(Arc<Mutex<ChatReply>>);

impl ChatModel for FixedReply {
    fn name(&self) -> &'static str {
        "fixed"
    }

    fn version(&self) -> u64 {
        1
    }

    fn reply(
        &mut self,
        requests: &[ChatRequest],
        _: ReplySettings,
    ) -> Result<Vec<ChatReply>, JudgeError> {
        let reply = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        Ok(vec![reply; requests.len()])
    }
}

pub(super) fn prepare(_: &Path) -> Input {
    let settings = resolve("", "the defaults", &[])
        .expect("they are valid")
        .settings;
    let reply = Arc::new(Mutex::new(ChatReply::default()));
    let model = FixedReply(Arc::clone(&reply));
    let rubric = RubricSettings {
        form: VerdictForm::Pairwise,
        rubric: String::new(),
        votes: 1,
    };
    let mut judge = ChatJudge::new(Box::new(model), &settings.preference.chat, &rubric);
    let (prompt, first, second) = (prompt(), completion("one"), completion("two"));
    let tokens = tokens();
    Box::new(move |mutator| {
        let text = mutator.text("Response A is better: [[A]]", &FRAGMENTS);
        let tokens = mutator.json(&tokens);
        let tokens = tokens.as_array().map(Vec::as_slice).unwrap_or_default();
        let tokens = tokens.iter().map(scored).collect();
        *reply.lock().unwrap_or_else(PoisonError::into_inner) = ChatReply { text, tokens };
        let comparison = Comparison {
            prompt: &prompt,
            first: &first,
            second: &second,
        };
        match judge.judge(&[comparison]).as_deref() {
            Ok([Verdict::Preference(_)]) => Outcome::Accepted,
            Ok([Verdict::Abstained { reason }]) if !reason.is_empty() && reason.len() < 1000 => {
                Outcome::Accepted
            }
            other => Outcome::Violation(format!("{other:?}")),
        }
    })
}

/// A token of this JSON; what it lacks is empty or not a number.
fn scored(value: &Value) -> ScoredToken {
    let token = |value: &Value| value["token"].as_str().unwrap_or_default().to_owned();
    let logprob = |value: &Value| value["logprob"].as_f64().unwrap_or(f64::NAN);
    let candidates = value["top_logprobs"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let candidate = |value| TopLogprob {
        token: token(value),
        logprob: logprob(value),
    };
    ScoredToken {
        token: token(value),
        logprob: logprob(value),
        top_logprobs: candidates.iter().map(candidate).collect(),
    }
}

fn tokens() -> Value {
    let token =
        |text: &str, logprob: f64| json!({"token": text, "logprob": logprob, "top_logprobs": []});
    let mut scored = token("A", -0.1);
    scored["top_logprobs"] = json!([token("A", -0.1), token("B", -2.5), token("C", -9.0)]);
    json!([token("[[", -0.01), scored, token("]]", -0.01)])
}

fn prompt() -> Prompt {
    Prompt {
        id: PromptId(0),
        prompt_batch: PromptBatch::single(PromptId(0)),
        purpose: Purpose::Train,
        version: WeightsVersion::at(0),
        seed: Seed(0),
        ids: vec![1],
        text: "a prompt".into(),
        dialogue: None,
        golden: None,
        answer: None,
        route: None,
    }
}

fn completion(text: &str) -> Completion {
    Completion {
        ids: vec![2],
        finish: Finish::EndOfText,
        mixture_coef: 0.0,
        logp: vec![-1.0],
        ref_logp: vec![-1.0],
        behaviour_logp: vec![-1.0],
        text: text.into(),
    }
}
