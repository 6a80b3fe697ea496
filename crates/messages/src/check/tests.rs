use crate::*;

const LIMITS: MessageLimits = MessageLimits {
    vocabulary: 10,
    prompt_tokens: 4,
    golden_tokens: Some(6),
    completion_tokens: 3,
    file_tokens: Some(8),
    completions: CompletionCounts {
        train: 3,
        evaluate: 2,
        apo: 4,
    },
    batch_prompts: 2,
    lead_steps: 100,
    newest: WeightsVersion {
        session: 1,
        step: 50,
    },
};

fn version(session: u64, step: u64) -> WeightsVersion {
    WeightsVersion { session, step }
}

fn prompt() -> Prompt {
    Prompt {
        id: PromptId(7),
        prompt_batch: PromptBatch {
            first: PromptId(6),
            count: 2,
        },
        purpose: Purpose::Train,
        version: version(1, 50),
        seed: Seed(1),
        ids: vec![0, 9],
        text: "x".into(),
        dialogue: None,
        golden: Some(vec![9, 1]),
        answer: None,
        route: None,
    }
}

fn pair(purpose: Purpose, completions: usize) -> Pair {
    let completion = Completion {
        ids: vec![1, 2],
        finish: Finish::Length,
        mixture_coef: 0.5,
        logp: vec![-1.0; 2],
        ref_logp: vec![-1.0; 2],
        behaviour_logp: vec![-1.0; 2],
        text: "y".into(),
    };
    Pair {
        prompt: Prompt {
            purpose,
            ..prompt()
        },
        version: version(1, 50),
        completions: vec![completion; completions],
        actor: "actor-0".into(),
    }
}

fn labelled(purpose: Purpose, completions: usize) -> LabelledPair {
    let pair = pair(purpose, completions);
    let compared: Vec<_> = match purpose {
        Purpose::Apo => Vec::new(),
        _ => pair.compared().collect(),
    };
    let label = |(first, second)| Label {
        first,
        second,
        p: Probability::HALF,
        judged: None,
    };
    LabelledPair {
        labels: compared.into_iter().map(label).collect(),
        pair,
        judge: "gold".into(),
        judge_version: JudgeVersion(1),
        scores: Some(vec![0.5; completions]),
        verdicts: Vec::new(),
    }
}

fn note() -> Dropped {
    Dropped {
        prompt: PromptId(7),
        session: 1,
        stage: Stage::Actor,
        reason: DropReason::Identical,
        log_ratio: Some(0.5),
        detail: "one\ntwo".into(),
    }
}

/// An alteration of a message, and part of the reason for which it is invalid then; empty if it stays valid.
type Case<M> = (fn(&mut M), &'static str);

fn assert_cases<M>(
    make: impl Fn() -> M,
    check: impl Fn(&M) -> Result<(), InvalidMessage>,
    cases: &[Case<M>],
) {
    assert_eq!(check(&make()), Ok(()));
    for (index, (alter, expected)) in cases.iter().enumerate() {
        let mut message = make();
        alter(&mut message);
        let found = check(&message).err().map(|error| error.to_string());
        let fits = match &found {
            None => expected.is_empty(),
            Some(found) => !expected.is_empty() && found.contains(expected),
        };
        assert!(fits, "case {index}: {found:?} instead of {expected:?}");
    }
}

#[test]
fn prompts_fit_vocabulary_positions_batch_and_announced_weights() {
    let cases: [Case<Prompt>; 18] = [
        (|p| p.ids = vec![1; 4], ""),
        (|p| p.ids = vec![1; 5], "5 tokens; from 1 to 4 are possible"),
        (|p| p.ids.clear(), "the prompt has 0 tokens"),
        (
            |p| p.ids[1] = 10,
            "token 10, which is not in the vocabulary of 10 tokens",
        ),
        (|p| p.ids[0] = u32::MAX, "token 4294967295"),
        (
            |p| p.golden = Some(vec![10]),
            "the golden answer has token 10",
        ),
        (|p| p.golden = Some(vec![1; 5]), "7 tokens; from 1 to 6"),
        (|p| p.golden = None, ""),
        (|p| p.id = PromptId(8), "one of the 2 prompts from prompt 6"),
        (|p| p.id = PromptId(5), "prompt 5 is not one of"),
        (|p| p.prompt_batch.count = 0, "one of the 0 prompts"),
        (
            |p| p.prompt_batch.count = 3,
            "its batch has 3 prompts; at most 2 are sent together",
        ),
        (
            |p| p.version = version(u64::MAX, 0),
            "the newest announced weights are version 50 of session 1",
        ),
        (|p| p.version = version(2, 0), "version 0 of session 2"),
        (|p| p.version = version(1, u64::MAX), "of session 1"),
        (|p| p.version = version(1, 151), "version 151 of session 1"),
        // The weights of a prompt may be on their way; those of an earlier session are superseded, not invalid.
        (|p| p.version = version(1, 150), ""),
        (|p| p.version = version(0, u64::MAX), ""),
    ];
    assert_cases(prompt, |prompt| prompt.check(&LIMITS), &cases);
    let unread = MessageLimits {
        golden_tokens: None,
        ..LIMITS
    };
    let mut long = prompt();
    long.golden = Some(vec![1; 100]);
    assert_eq!(long.check(&unread), Ok(()), "no model reads it");
}

/// A completion without log ref.
fn without_reference(mixture_coef: f32) -> Completion {
    let mut completion = pair(Purpose::Train, 3).completions.remove(0);
    completion.mixture_coef = mixture_coef;
    completion.ref_logp.clear();
    completion
}

#[test]
fn pairs_have_the_completions_of_the_settings_sampled_with_announced_weights() {
    let cases: [Case<Pair>; 21] = [
        (|p| p.prompt.ids[0] = 11, "the prompt has token 11"),
        (|p| p.completions.truncate(2), "the pair has 2 completions"),
        (|p| p.completions.clear(), "the settings ask for 3"),
        (|p| p.prompt.purpose = Purpose::Apo, "ask for 4"),
        (|p| p.completions[2].ids.clear(), "a completion has 0"),
        (|p| p.completions[1].ids = vec![1; 4], "from 1 to 3"),
        (|p| p.completions[1].ids[1] = 10, "a completion has token"),
        (|p| p.completions[0].logp[1] = f32::NAN, "one per token"),
        (|p| p.completions[0].ref_logp[1] = f32::INFINITY, "finite"),
        (|p| p.completions[0].behaviour_logp.push(0.0), "finite"),
        (|p| p.completions[0] = without_reference(0.0), ""),
        (
            |p| p.completions[0] = without_reference(0.25),
            "one per token",
        ),
        (|p| p.completions[0].mixture_coef = 1.5, "is 1.5"),
        (|p| p.completions[0].mixture_coef = f32::NAN, "is NaN"),
        (|p| p.version = version(1, 51), "names weights version 51"),
        (|p| p.version = version(9, 0), "of session 9"),
        (|p| p.version = version(1, u64::MAX), "names weights"),
        (|p| p.version = version(1, 49), "requires version 50"),
        (|p| p.prompt.version = version(0, 3), ""),
        (|p| p.actor = "a".repeat(4096), ""),
        (|p| p.actor = "a".repeat(4097), "the name of the actor"),
    ];
    let check = |pair: &Pair| pair.check(&LIMITS);
    assert_cases(|| pair(Purpose::Train, 3), check, &cases);
    let cases: [Case<Pair>; 1] = [(
        |p| p.completions[0] = without_reference(0.0),
        "one per token",
    )];
    assert_cases(|| pair(Purpose::Evaluate, 2), check, &cases);
    assert_cases(|| pair(Purpose::Apo, 4), check, &[]);
}

/// A pair from a file: nothing was recorded, and its lengths are limited together.
fn file_pair() -> LabelledPair {
    let mut labelled = labelled(Purpose::File, 2);
    labelled.pair.prompt.golden = None;
    for completion in &mut labelled.pair.completions {
        completion.mixture_coef = 0.0;
        completion.logp.clear();
        completion.ref_logp.clear();
        completion.behaviour_logp.clear();
    }
    labelled
}

#[test]
fn pairs_from_files_are_unrecorded_and_within_their_own_lengths() {
    let cases: [Case<LabelledPair>; 10] = [
        (|l| l.pair.prompt.ids = vec![1; 6], ""),
        (|l| l.pair.prompt.ids = vec![1; 7], "from 1 to 1 are"),
        (|l| l.pair.prompt.ids = vec![1; 9], "the prompt has 9"),
        (|l| l.pair.completions[1].ids = vec![1; 6], ""),
        (|l| l.pair.completions[1].ids = vec![1; 7], "from 1 to 6"),
        (|l| l.pair.completions[1].ids.clear(), "file has 0 tokens"),
        (|l| l.pair.completions[0].ids[0] = 10, "has token 10"),
        (|l| l.pair.completions[0].logp = vec![-1.0; 2], "recorded"),
        (|l| l.pair.completions[0].mixture_coef = 0.5, "mixture"),
        (|l| l.labels.clear(), "the labels are not"),
    ];
    assert_cases(file_pair, |labelled| labelled.check(&LIMITS), &cases);
    assert!(!file_pair().pair.completions[0].is_recorded());
    assert!(pair(Purpose::Train, 3).completions[0].is_recorded());
    let online = MessageLimits {
        file_tokens: None,
        ..LIMITS
    };
    assert_eq!(file_pair().check(&online), Err(InvalidMessage::NoFiles));
    let prompt = file_pair().pair.prompt;
    assert_eq!(prompt.check(&LIMITS), Ok(()));
    assert_eq!(prompt.check_open(&LIMITS), Err(InvalidMessage::Answered));
    let open = pair(Purpose::Train, 3).prompt;
    assert_eq!(open.check_open(&LIMITS), open.check(&LIMITS));
}

#[test]
fn labelled_pairs_have_every_label_once_and_in_order() {
    let cases: [Case<LabelledPair>; 10] = [
        (|l| l.pair.completions[0].ids[0] = 99, "token 99"),
        (|l| l.labels.clear(), "the labels are not"),
        (|l| l.labels.truncate(2), "the labels are not"),
        (|l| l.labels.swap(0, 1), "the labels are not"),
        (|l| l.labels[2].second = 3, "the labels are not"),
        (|l| l.labels.push(l.labels[0]), "the labels are not"),
        (|l| l.scores = Some(vec![0.0; 2]), "the scores must be"),
        (|l| l.scores = Some(vec![f32::NAN; 3]), "one per completion"),
        (|l| l.scores = None, ""),
        (|l| l.judge = "j".repeat(4097), "the name of the judge"),
    ];
    let check = |labelled: &LabelledPair| labelled.check(&LIMITS);
    assert_cases(|| labelled(Purpose::Train, 3), check, &cases);
    let samples: [Case<LabelledPair>; 1] = [(
        |l| {
            l.labels.push(Label {
                first: 0,
                second: 1,
                p: Probability::HALF,
                judged: None,
            });
        },
        "the labels are not",
    )];
    assert_cases(|| labelled(Purpose::Apo, 4), check, &samples);
    let verdict = |judge: &str| EvaluationVerdict {
        judge: judge.into(),
        p: Probability::HALF,
    };
    let judged = || LabelledPair {
        verdicts: vec![verdict("gold"), verdict("strict")],
        ..labelled(Purpose::Evaluate, 2)
    };
    let verdicts: [Case<LabelledPair>; 2] = [
        (
            |l| l.verdicts[1].judge = "gold".into(),
            "the verdicts are not one for each evaluation judge",
        ),
        (
            |l| l.verdicts[1].judge = "j".repeat(4097),
            "the name of a judge",
        ),
    ];
    assert_cases(judged, check, &verdicts);
    let trained = LabelledPair {
        verdicts: vec![verdict("gold")],
        ..labelled(Purpose::Train, 3)
    };
    assert_eq!(trained.check(&LIMITS), Err(InvalidMessage::Verdicts));
}

#[test]
fn drop_notes_have_a_reason_of_their_stage_and_a_known_session() {
    let cases: [Case<Dropped>; 10] = [
        (
            |n| (n.session, n.reason) = (u64::MAX, DropReason::Invalid),
            "",
        ),
        (|n| n.session = 0, ""),
        (|n| n.session = 2, "of session 2"),
        (|n| n.session = u64::MAX, "names weights"),
        (|n| n.stage = Stage::Learner, "the stage learner"),
        (|n| n.reason = DropReason::Stale, "as stale"),
        (|n| n.stage = Stage::Preference, "as identical"),
        (|n| n.log_ratio = Some(f32::NAN), "the log-ratios"),
        (|n| n.log_ratio = None, ""),
        (|n| n.detail = "é".repeat(2049), "the explanation has 4098"),
    ];
    assert_cases(note, |note| note.check(&LIMITS), &cases);
    let long = Dropped::shortened(format!("x{}", "é".repeat(5000)));
    assert_eq!(
        (long.len(), Dropped::shortened("x".into())),
        (4095, "x".into())
    );
}
