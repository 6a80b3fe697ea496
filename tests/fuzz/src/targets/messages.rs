//! Messages between the roles: decoding, encoding again, and the check at the entry of every stage.

use std::path::Path;

use messages::{
    Completion, CompletionCounts, Dialogue, DropReason, Dropped, EvaluationVerdict, Finish,
    InvalidMessage, JudgeVersion, Label, LabelledPair, MessageLimits, Pair, Probability, Prompt,
    PromptBatch, PromptId, Purpose, Seed, Stage, WeightsManifest, WeightsVersion,
    wire::{self, WireMessage},
};

use crate::targets::{Input, Outcome};

/// Tokens of the vocabulary.
const VOCABULARY: usize = 8;

/// Longest prompt and completion in tokens.
const MAX_TOKENS: usize = 4;

/// What a run of the valid messages permits.
fn limits() -> MessageLimits {
    MessageLimits {
        vocabulary: VOCABULARY,
        prompt_tokens: MAX_TOKENS,
        golden_tokens: Some(2 * MAX_TOKENS),
        completion_tokens: MAX_TOKENS,
        file_tokens: None,
        completions: CompletionCounts {
            train: 2,
            evaluate: 2,
            apo: 2,
        },
        batch_prompts: 1,
        lead_steps: 0,
        newest: WeightsVersion {
            session: 1,
            step: 4,
        },
    }
}

/// Decodes and checks valid messages of all types.
pub(super) fn prepare(_: &Path) -> Input {
    let valid = [
        wire::encode(&prompt()),
        wire::encode(&pair()),
        wire::encode(&labelled()),
        wire::encode(&dropped()),
        wire::encode(&WeightsManifest::of(WeightsVersion::at(3), b"weights")),
    ];
    let decoders: [fn(&[u8]) -> Outcome; 5] = [
        |bytes| decode(bytes, Prompt::check, is_within),
        |bytes| decode(bytes, Pair::check, has_complete_completions),
        |bytes| {
            decode(bytes, LabelledPair::check, |message| {
                has_complete_completions(&message.pair)
            })
        },
        |bytes| decode(bytes, Dropped::check, |_| true),
        |bytes| decode(bytes, |_: &WeightsManifest, _| Ok(()), |_| true),
    ];
    for (decode, valid) in decoders.iter().zip(&valid) {
        let outcome = decode(valid);
        assert!(matches!(outcome, Outcome::Accepted), "{outcome:?}");
    }
    Box::new(move |mutator| {
        let kind = mutator.below(valid.len());
        let mut bytes = mutator.bytes(&valid[kind]);
        // Most mutants keep the version and the kind: what follows them is the larger part.
        if mutator.below(8) > 0 {
            let head = bytes.len().min(2);
            bytes[..head].copy_from_slice(&valid[kind][..head]);
        }
        decoders[kind](&bytes)
    })
}

/// The outcome of decoding and checking a message; what the check lets pass must have `promise`.
fn decode<M: WireMessage>(
    bytes: &[u8],
    check: impl Fn(&M, &MessageLimits) -> Result<(), InvalidMessage>,
    promise: impl Fn(&M) -> bool,
) -> Outcome {
    let message = match wire::decode::<M>(bytes) {
        Ok(message) => message,
        refused => return Outcome::of(refused, &[M::NAME]),
    };
    let encoded = wire::encode(&message);
    let again = wire::decode::<M>(&encoded);
    if !again.is_ok_and(|again| wire::encode(&again) == encoded) || message.id().is_empty() {
        return Outcome::Violation("the message changes when it is encoded again".into());
    }
    match check(&message, &limits()) {
        Ok(()) if promise(&message) => Outcome::Accepted,
        Ok(()) => {
            Outcome::Violation("the check lets a message pass that the run cannot use".into())
        }
        // The stage adds the message's id.
        Err(error) => Outcome::of(Err::<(), _>(&error), &[error.to_string().as_str()]),
    }
}

/// Whether the tokens of a prompt can be read by the policy.
fn is_within(prompt: &Prompt) -> bool {
    (1..=MAX_TOKENS).contains(&prompt.ids.len()) && are_tokens(&prompt.ids)
}

fn are_tokens(ids: &[u32]) -> bool {
    ids.iter().all(|&id| (id as usize) < VOCABULARY)
}

/// Whether a pair has completions that the learner can train on.
fn has_complete_completions(pair: &Pair) -> bool {
    let is_complete = |completion: &Completion| {
        let length = completion.ids.len();
        let logps = [
            &completion.logp,
            &completion.ref_logp,
            &completion.behaviour_logp,
        ];
        let is_finite =
            |logp: &&Vec<f32>| logp.len() == length && logp.iter().all(|l| l.is_finite());
        are_tokens(&completion.ids) && length <= MAX_TOKENS && logps.iter().all(is_finite)
    };
    is_within(&pair.prompt)
        && pair.completions.len() == 2
        && pair.completions.iter().all(is_complete)
}

fn prompt() -> Prompt {
    Prompt {
        id: PromptId(7),
        prompt_batch: PromptBatch::single(PromptId(7)),
        purpose: Purpose::Train,
        version: WeightsVersion::at(3),
        seed: Seed(11),
        ids: vec![1, 2, 3],
        text: "a prompt".into(),
        dialogue: Some(Dialogue::of_user("a prompt")),
        golden: Some(vec![4, 5]),
        answer: Some("an answer".into()),
        route: Some("math".into()),
    }
}

fn pair() -> Pair {
    let completion = |ids: &[u32]| Completion {
        ids: ids.to_vec(),
        finish: Finish::Length,
        mixture_coef: 0.125,
        logp: vec![-1.5; ids.len()],
        ref_logp: vec![-2.5; ids.len()],
        behaviour_logp: vec![-0.5; ids.len()],
        text: "a completion".into(),
    };
    Pair {
        prompt: prompt(),
        version: WeightsVersion::at(4),
        completions: vec![completion(&[1, 2]), completion(&[3])],
        actor: "actor-0".into(),
    }
}

fn labelled() -> LabelledPair {
    let p = Probability::new(0.75).expect("a probability");
    let mut pair = pair();
    pair.prompt.purpose = Purpose::Evaluate;
    LabelledPair {
        pair,
        labels: vec![Label {
            first: 0,
            second: 1,
            p,
            judged: None,
        }],
        judge: "gold".into(),
        judge_version: JudgeVersion(1),
        scores: Some(vec![0.5, -1.0]),
        verdicts: vec![EvaluationVerdict {
            judge: "gold".into(),
            p,
        }],
    }
}

fn dropped() -> Dropped {
    Dropped {
        prompt: PromptId(7),
        session: 1,
        stage: Stage::Preference,
        reason: DropReason::Abstained,
        log_ratio: Some(0.5),
        detail: "a detail".into(),
    }
}
