use std::path::Path;

use messages::{
    Completion, Finish, JudgeVersion, Label, Pair, Probability, Prompt, PromptBatch, PromptId,
    Purpose, StoredWeights, WeightsVersion,
};
use model::{
    Adapter, DType, Device, LoraConfig, MixtureSampler, Precision, Request, Sampler,
    SamplingSettings, Weights,
};
use serde_json::json;

use super::*;
use crate::file_pairs::PairFiles;

/// A model of two blocks with a vocabulary of 12, and its folder.
pub(crate) struct TinyModel {
    pub(crate) folder: Arc<ModelFolder>,
    pub(crate) policy: LanguageModel,
    _temp_dir: tempfile::TempDir,
}

fn write(path: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 12, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "bos_token_id": 0, "eos_token_id": 1
    });
    let vocabulary: serde_json::Map<_, _> =
        (0..12).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w2"}
    });
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    std::fs::write(path.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

pub(crate) fn tiny(dtype: DType) -> TinyModel {
    let temp_dir = tempfile::tempdir().unwrap();
    write(temp_dir.path());
    let folder = ModelFolder::open(temp_dir.path(), None).unwrap();
    let weights = Weights::initialise(&folder.config, Seed(1), dtype, &Device::Cpu).unwrap();
    let policy = LanguageModel::new(folder.config.clone(), weights).unwrap();
    TinyModel {
        folder: Arc::new(folder),
        policy,
        _temp_dir: temp_dir,
    }
}

/// The policy with a fresh adapter, whose B is zero, so that it equals its reference.
pub(super) fn adapted(tiny: &TinyModel) -> LanguageModel {
    with_adapter(tiny, 0.3)
}

/// As [`adapted`], without dropout.
pub(super) fn plain_adapter(tiny: &TinyModel) -> LanguageModel {
    with_adapter(tiny, 0.0)
}

fn with_adapter(tiny: &TinyModel, dropout: f64) -> LanguageModel {
    let config = LoraConfig::new(4, 16.0, dropout, &["all-linear".into()]);
    let shape = tiny.policy.config();
    let adapter = Adapter::fresh(config, shape, Seed(2), &Device::Cpu).unwrap();
    tiny.policy.with_adapter(adapter).unwrap()
}

fn settings(changes: &[&str]) -> LearnerSettings {
    let sets: Vec<_> = changes
        .iter()
        .map(|set| format!("learner.{set}").parse().unwrap())
        .collect();
    settings::resolve("", "test", &sets)
        .unwrap()
        .settings
        .learner
}

/// Five pairs that an actor sampled with weights in `precision`, all labelled .9.
pub(super) fn sampled(policy: &LanguageModel, precision: Precision) -> Vec<LabelledPair> {
    sampled_beside(policy, policy.without_adapter(), precision)
}

/// As [`sampled`], with this reference.
pub(super) fn sampled_beside(
    policy: &LanguageModel,
    reference: LanguageModel,
    precision: Precision,
) -> Vec<LabelledPair> {
    let sampling = SamplingSettings {
        precision,
        ..SamplingSettings::plain(12)
    };
    let policy = policy.clone();
    let mut sampler = MixtureSampler::new(policy, Some(reference), sampling, 10, 24).unwrap();
    for key in 0..5 {
        let request = Request {
            key,
            ids: vec![0, 3 + key as u32, 7],
            seed: Seed(40 + key),
            mixture_coefs: vec![0.0, 0.25],
            exact: 0,
            max_new_tokens: 12,
            records_reference: true,
        };
        sampler.admit(request).unwrap();
    }
    let mut pairs = Vec::new();
    while !sampler.is_idle() {
        let finished = sampler.step().unwrap();
        pairs.extend(finished.into_iter().map(|f| labelled(f.key, f.completions)));
    }
    pairs.sort_by_key(|labelled| labelled.pair.id());
    pairs
}

fn labelled(key: u64, completions: Vec<Completion>) -> LabelledPair {
    let prompt = Prompt {
        id: PromptId(key),
        prompt_batch: PromptBatch::single(PromptId(key)),
        purpose: Purpose::Train,
        version: WeightsVersion::at(0),
        seed: Seed(0),
        ids: vec![0, 3 + key as u32, 7],
        text: String::new(),
        dialogue: None,
        golden: Some(vec![5, 6, 1]),
        answer: None,
        route: None,
    };
    LabelledPair {
        pair: Pair {
            prompt,
            version: WeightsVersion::at(0),
            completions,
            actor: String::new(),
        },
        labels: vec![Label {
            first: 0,
            second: 1,
            p: Probability::new(0.9).unwrap(),
            judged: None,
        }],
        judge: String::new(),
        judge_version: JudgeVersion(0),
        scores: None,
        verdicts: Vec::new(),
    }
}

pub(super) fn step(
    tiny: &TinyModel,
    policy: &LanguageModel,
    pairs: &[LabelledPair],
    sets: &[&str],
) -> Measurements {
    apply(&mut trainer(tiny, policy, sets), pairs, 0)
}

pub(super) fn trainer(tiny: &TinyModel, policy: &LanguageModel, sets: &[&str]) -> Trainer {
    let folder = Arc::clone(&tiny.folder);
    Trainer::new(folder, policy, &settings(sets), Seed(3)).unwrap()
}

/// Takes a step that is applied.
pub(super) fn apply(trainer: &mut Trainer, pairs: &[LabelledPair], step: u64) -> Measurements {
    match trainer.step(pairs, step).unwrap() {
        StepOutcome::Applied(measurements, _) => measurements,
        StepOutcome::Rejected(_) => panic!("the step was rejected"),
    }
}

/// Asserts that every h was exactly 0 in a step of pairs with p = .9.
fn assert_h_is_zero(m: &Measurements, case: &str) {
    for name in ["objective/log_ratio", "rewards/chosen", "rewards/margins"] {
        assert_eq!(m.get(name), Some(0.0), "{case}: {name}");
    }
    if !case.contains("objective.kind=rpo") {
        // ((.9 - ½)/τ)² at τ = .1.
        let loss = m.get("loss/ipo").unwrap();
        assert!((loss - 16.0).abs() < 1e-4, "{case}: {loss}");
    }
}

#[test]
fn h_is_exactly_zero_where_the_policy_is_its_reference() {
    let passes = ["gradient_accumulation_steps=5", "train_batch_size=5"];
    for dtype in [DType::F32, DType::BF16] {
        let tiny = tiny(dtype);
        let adapted = adapted(&tiny);
        for (kind, policy) in [("whole", &tiny.policy), ("adapter", &adapted)] {
            for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
                let pairs = sampled(policy, precision);
                for learner in ["precision=f32", "precision=bf16"] {
                    for more in [
                        &[][..],
                        &passes,
                        &["max_tokens_per_micro_batch=40"],
                        &["gradient_checkpointing=true"],
                        &["objective.kind=rpo"],
                        &["ganpo.lambda=1.0"],
                    ] {
                        let sets = [&[learner][..], more].concat();
                        let m = step(&tiny, policy, &pairs, &sets);
                        assert_h_is_zero(&m, &format!("{dtype:?} {kind} {precision:?} {sets:?}"));
                    }
                }
            }
        }
    }
}

/// The actors' recorded log-probabilities do not enter the loss; their difference from the learner's is a metric of
/// every step, for pairs of any version.
#[test]
fn reduced_precision_of_actors_shows_in_the_mismatch_only() {
    let tiny = tiny(DType::F32);
    let mismatch = |precision, version: u64| {
        let mut pairs = sampled(&tiny.policy, precision);
        for labelled in &mut pairs {
            labelled.pair.version = WeightsVersion::at(version);
        }
        let m = step(&tiny, &tiny.policy, &pairs, &[]);
        let gap = |name: &str| m.get(name).unwrap();
        let (policy, reference) = (
            gap("mismatch/logp_abs_diff"),
            gap("mismatch/ref_logp_abs_diff"),
        );
        assert!(
            (policy - reference).abs() < 1e-6,
            "π is ref: {policy} {reference}"
        );
        assert!(gap("mismatch/ess") > 0.5 && gap("mismatch/ess") <= 1.0 + 1e-9);
        policy
    };
    for version in [0, 7] {
        assert!(mismatch(Precision::F32, version) < 1e-5);
        assert!(mismatch(Precision::Int8, version) > 1e-3);
    }
}

/// bf16 weights have f32 master weights, so that small updates are not lost.
#[test]
fn training_in_bf16_accumulates_updates_in_master_weights() {
    let tiny = tiny(DType::BF16);
    let pairs = sampled(&tiny.policy, Precision::F32);
    let sets = ["learning_rate=2e-6", "warmup_ratio=0"];
    let trainer = || {
        let folder = Arc::clone(&tiny.folder);
        Trainer::new(folder, &tiny.policy, &settings(&sets), Seed(3)).unwrap()
    };
    let train = |trainer: &mut Trainer, steps: std::ops::Range<u64>| {
        for step in steps {
            assert!(matches!(
                trainer.step(&pairs, step).unwrap(),
                StepOutcome::Applied(..)
            ));
        }
    };
    let mut whole = trainer();
    train(&mut whole, 0..4);
    let masters = whole.optimizer_blob().unwrap();
    let start = trainer().optimizer_blob().unwrap();
    let read = |blob: &[u8]| candle_core::safetensors::load_buffer(blob, &Device::Cpu).unwrap();
    let (before, after) = (read(&start), read(&masters));
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (mut moved, mut count) = (0, 0);
    for (name, tensor) in before
        .iter()
        .filter(|(name, _)| name.ends_with("q_proj.weight.master"))
    {
        let pairs = values(tensor).into_iter().zip(values(&after[name]));
        let each: Vec<bool> = pairs.map(|(a, b)| a != b).collect();
        moved += each.iter().filter(|&&moved| moved).count();
        count += each.len();
    }
    assert!(count > 0 && moved * 100 > 93 * count, "{moved} of {count}");
}

/// Twelve pairs of a file, with soft labels, prompts that repeat and lengths that differ.
fn pair_files(tiny: &TinyModel) -> PairFiles {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    let text = |from: u32, count: u32| {
        let words = (0..count).map(|i| format!("w{}", 3 + (from + i * 5) % 9));
        words.collect::<Vec<_>>().join(" ")
    };
    let rows = (0..12u32).map(|i| {
        let row = json!({
            "prompt": text(i / 3, 3 + i / 3), "chosen": text(i, 1 + i % 7),
            "rejected": text(i + 1, 2 + i % 5), "p": 0.95 - 0.07 * f64::from(i),
        });
        format!("{row}\n")
    });
    std::fs::write(&path, rows.collect::<String>()).unwrap();
    let sets = [
        format!("pairs.path={:?}", path.display().to_string()),
        "pairs.label_column=p".into(),
    ];
    let sets: Vec<_> = sets.iter().map(|set| set.parse().unwrap()).collect();
    let settings = settings::resolve("", "test", &sets).unwrap().settings;
    PairFiles::load(&settings.pairs, 0.0, Seed(5), 64, &tiny.folder.tokenizer).unwrap()
}

/// The pairs of the numbers `cursors` in the order of the files.
fn drawn(files: &PairFiles, cursors: std::ops::Range<u64>) -> Vec<LabelledPair> {
    let mut pairs: Vec<LabelledPair> = cursors
        .map(|cursor| files.message(files.place(cursor), 0))
        .collect();
    pairs.sort_by_key(|labelled| labelled.pair.id());
    pairs
}

/// Three passes in batches of 8, so that a batch has pairs of two passes; returns the losses and the optimiser's state.
fn three_passes(
    tiny: &TinyModel,
    sets: &[&str],
    kept: Option<&ReferenceLogprobs>,
) -> (Vec<Option<f64>>, Vec<u8>) {
    let (files, settings) = (pair_files(tiny), settings(sets));
    let folder = Arc::clone(&tiny.folder);
    let mut trainer = Trainer::new(folder, &tiny.policy, &settings, Seed(3)).unwrap();
    if let Some(kept) = kept {
        trainer.keep_reference_logprobs(kept.clone());
    }
    let mut losses = Vec::new();
    // Pairs from actors among those from files, in every other step; of three completions the last two are compared.
    let mut online = sampled(&tiny.policy, Precision::F32);
    for labelled in &mut online {
        let left_out = labelled.pair.completions[1].clone();
        labelled.pair.completions.insert(0, left_out);
        (labelled.labels[0].first, labelled.labels[0].second) = (1, 2);
    }
    for step in 0..5 {
        let mut pairs = drawn(&files, 8 * step..8 * (step + 1));
        if step % 2 == 1 {
            pairs.splice(0..0, online.iter().cloned());
        }
        let StepOutcome::Applied(m, _) = trainer.step(&pairs, step).unwrap() else {
            panic!("the step was rejected")
        };
        losses.push(m.get("loss"));
    }
    trainer.save_reference_logprobs();
    (losses, trainer.optimizer_blob().unwrap())
}

#[test]
fn kept_log_probabilities_of_the_reference_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (number, (dtype, sets)) in [
        (DType::F32, &["objective.kind=ipo"][..]),
        (
            DType::F32,
            &["objective.kind=rpo", "max_tokens_per_micro_batch=40"],
        ),
        (
            DType::F32,
            &["precision=bf16", "gradient_accumulation_steps=4"],
        ),
        (DType::BF16, &["objective.kind=dpo"]),
        (DType::F32, &["ganpo.lambda=1.0"]),
        (DType::F32, &["hidden_l2=1.0"]),
    ]
    .into_iter()
    .enumerate()
    {
        let tiny = tiny(dtype);
        let kept = ReferenceLogprobs {
            path: folder.path().join(number.to_string()),
            key: messages::Digest::of(b"key"),
        };
        let sets = [sets, &["learning_rate=0.01", "warmup_ratio=0"]].concat();
        let computed = three_passes(&tiny, &sets, None);
        assert!(
            computed == three_passes(&tiny, &sets, Some(&kept)),
            "{sets:?}"
        );
        // Regularisers read the reference's hidden states, so nothing is kept.
        let reads_states = ["ganpo.lambda=1.0", "hidden_l2=1.0"];
        let reads_states = sets.iter().any(|set| reads_states.contains(set));
        assert_eq!(kept.path.exists(), !reads_states);
        // From the file of the run before.
        assert!(
            computed == three_passes(&tiny, &sets, Some(&kept)),
            "{sets:?}"
        );
    }
}

/// The regulariser's share of the loss in each of six steps.
fn hidden_l2(tiny: &TinyModel, sets: &[&str]) -> Vec<f64> {
    let sets = [sets, &["learning_rate=0.01", "warmup_ratio=0"]].concat();
    let folder = Arc::clone(&tiny.folder);
    let mut trainer = Trainer::new(folder, &tiny.policy, &settings(&sets), Seed(3)).unwrap();
    let pairs = drawn(&pair_files(tiny), 0..8);
    let losses = (0..6).map(|step| {
        let StepOutcome::Applied(m, _) = trainer.step(&pairs, step).unwrap() else {
            panic!("the step was rejected")
        };
        m.get("loss/hidden_l2").unwrap()
    });
    losses.collect()
}

/// Zero at π = ref; the same however a batch is split; and with a large weight hidden states stay nearer the reference's.
#[test]
fn hidden_states_are_held_to_the_references() {
    let tiny = tiny(DType::F32);
    let weak = hidden_l2(&tiny, &["hidden_l2=1e-3"]);
    assert_eq!(weak[0], 0.0);
    let split = hidden_l2(&tiny, &["hidden_l2=1e-3", "gradient_accumulation_steps=4"]);
    for (whole, split) in weak.iter().zip(&split) {
        assert!(
            (whole - split).abs() < 1e-3 * whole.abs() + 1e-9,
            "{whole} {split}"
        );
    }
    let strong = hidden_l2(&tiny, &["hidden_l2=1e4"]);
    let (weak, strong) = (weak[5] / 1e-3, strong[5] / 1e4);
    assert!(weak > 0.0 && strong < weak / 2.0, "{weak} {strong}");
}

#[test]
fn pairs_from_files_begin_at_h_zero_and_have_no_mismatch() {
    let tiny = tiny(DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let kept = ReferenceLogprobs {
        path: folder.path().join("kept"),
        key: messages::Digest::of(b"key"),
    };
    let pairs = drawn(&pair_files(&tiny), 0..12);
    for _ in 0..2 {
        let settings = settings(&["precision=bf16"]);
        let folder = Arc::clone(&tiny.folder);
        let mut trainer = Trainer::new(folder, &tiny.policy, &settings, Seed(3)).unwrap();
        trainer.keep_reference_logprobs(kept.clone());
        let outcome = trainer.step(&pairs, 0).unwrap();
        trainer.save_reference_logprobs();
        let StepOutcome::Applied(m, samples) = outcome else {
            panic!("the step was rejected")
        };
        for name in ["objective/log_ratio", "rewards/chosen", "rewards/margins"] {
            assert_eq!(m.get(name), Some(0.0), "{name}");
        }
        assert_eq!(m.get("mismatch/ess"), None, "nothing was recorded");
        assert_eq!(samples, PolicySamples::default(), "nothing was sampled");
        assert!(m.get("completions/mean_length").is_some());
        assert_eq!(m.get("completions/clipped_ratio"), None, "nor truncated");
    }
}

/// The mismatch of a mixed batch is that of its samples, and so are lengths and scores.
#[test]
fn the_mismatch_of_a_mixed_batch_is_that_of_its_samples() {
    let tiny = tiny(DType::F32);
    let mut online = sampled(&tiny.policy, Precision::Int8);
    for labelled in &mut online {
        labelled.scores = Some(vec![1.0; labelled.pair.completions.len()]);
        labelled.pair.completions[0].finish = Finish::Length;
    }
    let mixed = [online.clone(), drawn(&pair_files(&tiny), 0..7)].concat();
    for name in [
        "mismatch/logp_abs_diff",
        "mismatch/kl",
        "mismatch/ess",
        "completions/mean_length",
        "completions/clipped_ratio",
        "objective/scores",
    ] {
        let of = |pairs: &[LabelledPair]| step(&tiny, &tiny.policy, pairs, &[]).get(name);
        let (found, expected) = (of(&mixed).unwrap(), of(&online).unwrap());
        assert!(
            (found - expected).abs() < 1e-5,
            "{name}: {found} {expected}"
        );
    }
}

/// RPO's baseline of pairs from files is their preferred side: the same as a golden answer with its tokens.
#[test]
fn rpo_takes_the_preferred_response_of_a_file_for_its_baseline() {
    let tiny = tiny(DType::F32);
    let pairs = drawn(&pair_files(&tiny), 0..12);
    let mut golden = pairs.clone();
    for labelled in &mut golden {
        let preferred = usize::from(labelled.labels[0].p.get() < 0.5);
        labelled.pair.prompt.purpose = Purpose::Train;
        labelled.pair.prompt.golden = Some(labelled.pair.completions[preferred].ids.clone());
        for completion in &mut labelled.pair.completions {
            completion.logp = vec![-1.0; completion.ids.len()];
            completion.ref_logp.clone_from(&completion.logp);
            completion.behaviour_logp.clone_from(&completion.logp);
        }
    }
    assert!(
        pairs.iter().any(|l| l.labels[0].p.get() < 0.5),
        "both sides"
    );
    let of = |pairs| {
        let m = step(&tiny, &tiny.policy, pairs, &["objective.kind=rpo"]);
        (m.get("loss"), m.get("grad_norm"))
    };
    assert_eq!(of(&pairs), of(&golden));
}

#[test]
fn scores_are_reported_only_if_every_pair_has_them() {
    let tiny = tiny(DType::F32);
    let mut pairs = sampled(&tiny.policy, Precision::F32);
    pairs.truncate(2);
    let names = ["objective/scores", "objective/scores_margin"];
    let of = |pairs: &[LabelledPair]| {
        let m = step(&tiny, &tiny.policy, pairs, &[]);
        // From p = .9, whatever the scores.
        assert!((m.get("objective/label_margin").unwrap() - 0.8).abs() < 1e-6);
        names.map(|name| m.get(name))
    };
    assert_eq!(of(&pairs), [None, None]);
    pairs[0].scores = Some(vec![1.0, 3.0]);
    assert_eq!(of(&pairs), [None, None]);
    pairs[1].scores = Some(vec![0.0, -1.0]);
    assert_eq!(of(&pairs), [Some(0.75), Some(1.5)]);
}

/// A trainer of `policy` on `pairs` with a reference that moves.
fn moving(tiny: &TinyModel, policy: &LanguageModel, rule: ReferenceSettings) -> Trainer {
    let sets = ["learning_rate=1e-2", "warmup_ratio=0", "ema_decay=0.5"];
    Trainer::new(Arc::clone(&tiny.folder), policy, &settings(&sets), Seed(3))
        .and_then(|trainer| trainer.with_reference(rule))
        .unwrap()
}

fn applied(trainer: &mut Trainer, pairs: &[LabelledPair], step: u64) -> Measurements {
    match trainer.step(pairs, step).unwrap() {
        StepOutcome::Applied(measurements, _) => measurements,
        StepOutcome::Rejected(_) => panic!("step {step} was rejected"),
    }
}

/// Writes the files of a checkpoint that hold tensors.
fn save(trainer: &Trainer, folder: &Path) {
    model::save_policy(folder, trainer.folder(), trainer.policy()).unwrap();
    let optimizer = trainer.optimizer_blob().unwrap();
    std::fs::write(folder.join("optimizer.safetensors"), optimizer).unwrap();
    for (name, bytes) in trainer.extra_files().unwrap() {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

fn published(trainer: &Trainer) -> Vec<u8> {
    let weights = trainer
        .publish(PublishedForm::Tensors(DType::F32), Publication::Evaluation)
        .unwrap();
    Arc::new(weights).into_blob().unwrap()
}

const RULES: [ReferenceSettings; 3] = [
    ReferenceSettings::Fixed {},
    ReferenceSettings::Every { every_steps: 2 },
    ReferenceSettings::Ema { decay: 0.75 },
];

/// After a copy, log π/ref is exactly 0 for every completion, whole models and adapters, f32 and bf16.
#[test]
fn a_copied_reference_equals_the_policy_to_the_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let tiny = tiny(dtype);
        for policy in [tiny.policy.clone(), adapted(&tiny)] {
            let pairs = sampled(&policy, Precision::F32);
            let mut trainer = moving(&tiny, &policy, ReferenceSettings::Every { every_steps: 2 });
            let mut moves = Vec::new();
            for step in 0..5 {
                let m = applied(&mut trainer, &pairs, step);
                // Dropout is part of the policy's pass, so that an adapter's margins are not 0.
                let is_zero = m.get("rewards/margins") == Some(0.0);
                assert_eq!(
                    is_zero,
                    step % 2 == 0 && (step == 0 || policy.adapter().is_none()),
                    "{step}"
                );
                moves.push(m.get("reference/version").unwrap());
            }
            // Of the reference with which the step computed.
            assert_eq!(moves, [0.0, 0.0, 2.0, 2.0, 4.0]);
        }
    }
}

/// The reference and the average are the moving averages of the weights after each step.
#[test]
fn moving_averages_have_their_closed_form() {
    let tiny = tiny(DType::F32);
    let pairs = sampled(&tiny.policy, Precision::F32);
    let mut trainer = moving(&tiny, &tiny.policy, ReferenceSettings::Ema { decay: 0.75 });
    let values = |weights: &Weights| -> Vec<f64> {
        let tensor = weights.get("model.norm.weight").unwrap();
        let values: Vec<f32> = tensor.to_vec1().unwrap();
        values.into_iter().map(f64::from).collect()
    };
    let start = values(tiny.policy.weights());
    let (mut reference, mut average) = (start.clone(), start.clone());
    for step in 0..4 {
        applied(&mut trainer, &pairs, step);
        let now = values(trainer.policy().trained());
        for (to, decay) in [(&mut reference, 0.75), (&mut average, 0.5)] {
            for (to, now) in to.iter_mut().zip(&now) {
                *to = decay * *to + (1.0 - decay) * now;
            }
        }
    }
    let weights = trainer
        .publish(PublishedForm::Tensors(DType::F32), Publication::Evaluation)
        .unwrap();
    let models = tiny.policy.with_published(&weights).unwrap();
    let close = |model: &LanguageModel, expected: &[f64]| {
        for (found, expected) in values(model.trained()).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    };
    close(&models.reference.unwrap(), &reference);
    close(&models.average.unwrap(), &average);
    assert!(reference != start && average != reference);
}

/// A trainer that is restored from a checkpoint continues to the bit, its reference and its average included; so does
/// one that has gone on meanwhile and is rolled back.
#[test]
fn followers_are_restored_and_rolled_back_to_the_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let tiny = tiny(dtype);
        for policy in [tiny.policy.clone(), adapted(&tiny)] {
            for rule in RULES {
                for saved_after in [1, 3] {
                    assert_restored(&tiny, &policy, rule, saved_after);
                }
            }
        }
    }
}

#[track_caller]
fn assert_restored(
    tiny: &TinyModel,
    policy: &LanguageModel,
    rule: ReferenceSettings,
    saved_after: u64,
) {
    let pairs = sampled(policy, Precision::F32);
    let train = |trainer: &mut Trainer, steps: std::ops::Range<u64>| {
        for step in steps {
            applied(trainer, &pairs, step);
        }
    };
    let end = |trainer: &Trainer| (published(trainer), trainer.extra_files().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut whole = moving(tiny, policy, rule);
    train(&mut whole, 0..saved_after);
    save(&whole, folder.path());
    train(&mut whole, saved_after..5);
    let expected = end(&whole);
    let mut resumed = moving(tiny, policy, rule);
    for trainer in [&mut whole, &mut resumed] {
        trainer.restore(folder.path()).unwrap();
        train(trainer, saved_after..5);
        assert!(end(trainer) == expected, "{rule:?} after {saved_after}");
    }
}

/// Weights are published as ever while nothing moves; with a reference once that has moved, and with the average only
/// for an evaluation.
#[test]
fn only_what_has_moved_is_published() {
    let tiny = tiny(DType::F32);
    let pairs = sampled(&tiny.policy, Precision::F32);
    for rule in RULES {
        let mut trainer = moving(&tiny, &tiny.policy, rule);
        for step in 0..2 {
            let models = |publication| {
                let weights = trainer
                    .publish(PublishedForm::Tensors(DType::F32), publication)
                    .unwrap();
                tiny.policy.with_published(&weights).unwrap()
            };
            let has_moved = step > 0 && matches!(rule, ReferenceSettings::Ema { .. });
            let (training, evaluation) = (
                models(Publication::Training),
                models(Publication::Evaluation),
            );
            assert_eq!(training.reference.is_some(), has_moved, "{rule:?} {step}");
            assert_eq!(evaluation.reference.is_some(), has_moved, "{rule:?} {step}");
            assert!(training.average.is_none() && evaluation.average.is_some());
            assert_eq!(trainer.followers().moved_at(), has_moved.then_some(step));
            applied(&mut trainer, &pairs, step);
        }
    }
}

/// Actors in the learner's process read the published tensors themselves, while it trains on.
#[test]
fn published_weights_do_not_change_with_a_step() {
    for dtype in [DType::F32, DType::BF16] {
        let tiny = tiny(dtype);
        let forms = [
            PublishedForm::Tensors(dtype),
            PublishedForm::Packed(Precision::F32),
            PublishedForm::Packed(Precision::Bf16),
        ];
        for policy in [tiny.policy.clone(), adapted(&tiny)] {
            for rule in RULES {
                let pairs = sampled(&policy, Precision::F32);
                let mut trainer = moving(&tiny, &policy, rule);
                for (step, form) in (0..).zip(forms) {
                    let weights = trainer.publish(form, Publication::Evaluation).unwrap();
                    let digest = || {
                        let blob = Arc::new(weights.clone()).into_blob().unwrap();
                        messages::Digest::of(&blob)
                    };
                    let before = digest();
                    applied(&mut trainer, &pairs, step);
                    assert_eq!(digest(), before, "{rule:?} {form:?}");
                }
            }
        }
    }
}

/// An evaluation after a step that copied the policy compares with the reference before, after a resume too.
#[test]
fn an_evaluation_does_not_compare_a_policy_with_its_copy() {
    let tiny = tiny(DType::F32);
    let pairs = sampled(&tiny.policy, Precision::F32);
    let every = ReferenceSettings::Every { every_steps: 2 };
    let mut trainer = moving(&tiny, &tiny.policy, every);
    let models = |trainer: &Trainer, publication| {
        let weights = trainer
            .publish(PublishedForm::Tensors(DType::F32), publication)
            .unwrap();
        tiny.policy.with_published(&weights).unwrap()
    };
    let digest = |model: &LanguageModel| model.trained().digest().unwrap().to_string();
    let mut copies = Vec::new();
    // Copied after steps 2 and 4; before step 2 the reference was that of the start.
    for (step, expected) in [(1, None), (2, None), (3, Some(2)), (4, Some(2))] {
        applied(&mut trainer, &pairs, step - 1);
        let evaluated = trainer.followers().evaluated_reference();
        assert_eq!(evaluated, expected, "step {step}");
        copies.extend(
            models(&trainer, Publication::Training)
                .reference
                .as_ref()
                .map(digest),
        );
    }
    let folder = tempfile::tempdir().unwrap();
    save(&trainer, folder.path());
    let mut resumed = moving(&tiny, &tiny.policy, every);
    resumed.restore(folder.path()).unwrap();
    for trainer in [&trainer, &resumed] {
        let evaluation = models(trainer, Publication::Evaluation);
        let earlier = evaluation.earlier_reference.as_ref().map(digest);
        assert_eq!(earlier.as_ref(), copies.first());
        assert_eq!(
            evaluation.reference.as_ref().map(digest),
            Some(digest(&evaluation.policy))
        );
        assert_eq!(trainer.followers().evaluated_reference(), Some(2));
        assert!(
            models(trainer, Publication::Training)
                .earlier_reference
                .is_none()
        );
    }
}

/// Log-probabilities that were recorded under an earlier reference are not compared with those under the current one.
#[test]
fn recorded_log_probabilities_of_another_reference_are_left_out() {
    let tiny = tiny(DType::F32);
    let recorded_at = |version: u64| {
        let mut pairs = sampled(&tiny.policy, Precision::F32);
        for labelled in &mut pairs {
            labelled.pair.version = WeightsVersion::at(version);
        }
        pairs
    };
    let of = |m: &Measurements| m.get("mismatch/ref_logp_abs_diff");
    let every = ReferenceSettings::Every { every_steps: 2 };
    let mut trainer = moving(&tiny, &tiny.policy, every);
    for step in 0..2 {
        assert!(of(&applied(&mut trainer, &recorded_at(0), step)).unwrap() < 1e-5);
    }
    assert_eq!(of(&applied(&mut trainer, &recorded_at(1), 2)), None);
    // Recorded under the start, although the version says otherwise: the difference shows.
    assert!(of(&applied(&mut trainer, &recorded_at(2), 3)).unwrap() > 1e-4);
    let folder = tempfile::tempdir().unwrap();
    save(&trainer, folder.path());
    trainer.restore(folder.path()).unwrap();
    // Whether older weights came with this reference is not known after a rollback.
    assert_eq!(of(&applied(&mut trainer, &recorded_at(4), 5)), None);
    let mut fixed = moving(&tiny, &tiny.policy, ReferenceSettings::Fixed {});
    for step in 0..3 {
        assert!(of(&applied(&mut fixed, &recorded_at(0), step)).unwrap() < 1e-5);
    }
}

/// The means of a step whose labels leave out a completion are those over all completions, and its policy samples are
/// as without that selection.
#[test]
fn completions_that_are_left_out_still_count_as_samples() {
    let tiny = tiny(DType::F32);
    let mut pairs = sampled(&tiny.policy, Precision::F32);
    for labelled in &mut pairs {
        let completions = &mut labelled.pair.completions;
        let mut third = completions[0].clone();
        third.ids.push(4);
        for logp in [&mut third.logp, &mut third.behaviour_logp] {
            logp.push(-2.0);
        }
        third.ref_logp.push(-2.5);
        completions.push(third);
    }
    let take =
        |pairs: &[LabelledPair]| match trainer(&tiny, &tiny.policy, &[]).step(pairs, 0).unwrap() {
            StepOutcome::Applied(measurements, samples) => (measurements, samples),
            StepOutcome::Rejected(_) => panic!("the step was rejected"),
        };
    let (m, samples) = take(&pairs);
    assert_eq!(
        samples.count, 10,
        "of the policy: the first and the third of each"
    );
    assert!((samples.log_ratio - 5.0 * 0.5).abs() < 1e-4, "{samples:?}");
    let lengths = pairs
        .iter()
        .flat_map(|l| &l.pair.completions)
        .map(|c| c.ids.len());
    let mean = lengths.clone().sum::<usize>() as f64 / 15.0;
    assert_eq!(m.get("completions/mean_length"), Some(mean));
    assert_eq!(
        m.get("completions/max_length"),
        lengths.max().map(|l| l as f64)
    );
    // The third is neither scored nor in the loss.
    assert_eq!(m.get("objective/log_ratio"), Some(0.0));
    assert!((m.get("loss/ipo").unwrap() - 16.0).abs() < 1e-4);
}
