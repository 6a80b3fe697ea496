use std::path::Path;

use messages::{
    Completion, JudgeVersion, Label, Pair, Probability, Prompt, PromptBatch, PromptId, Purpose,
    WeightsVersion,
};
use model::{
    Adapter, DType, Device, LoraConfig, MixtureSampler, Precision, Request, Sampler,
    SamplingSettings, Weights,
};
use serde_json::json;

use super::*;

/// A model of two blocks with a vocabulary of 12, and its folder.
struct TinyModel {
    folder: Arc<ModelFolder>,
    policy: LanguageModel,
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

fn tiny(dtype: DType) -> TinyModel {
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
fn adapted(tiny: &TinyModel) -> LanguageModel {
    let config = LoraConfig::new(4, 16.0, 0.3, &["all-linear".into()]);
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
fn sampled(policy: &LanguageModel, precision: Precision) -> Vec<LabelledPair> {
    let sampling = SamplingSettings {
        precision,
        ..SamplingSettings::plain(12)
    };
    let reference = Some(policy.without_adapter());
    let mut sampler = MixtureSampler::new(policy.clone(), reference, sampling, 10, 24).unwrap();
    for key in 0..5 {
        let request = Request {
            key,
            ids: vec![0, 3 + key as u32, 7],
            seed: Seed(40 + key),
            mixture_coefs: vec![0.0, 0.25],
            exact: 0,
            max_new_tokens: 12,
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
        }],
        judge: String::new(),
        judge_version: JudgeVersion(0),
        scores: None,
        gold: None,
    }
}

fn step(
    tiny: &TinyModel,
    policy: &LanguageModel,
    pairs: &[LabelledPair],
    sets: &[&str],
) -> Measurements {
    let folder = Arc::clone(&tiny.folder);
    let mut trainer = Trainer::new(folder, policy, &settings(sets), Seed(3)).unwrap();
    match trainer.step(pairs, 0).unwrap() {
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
                        &["max_tokens_per_pass=40"],
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
    trainer
        .publish(DType::F32, Publication::Evaluation)
        .unwrap()
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
    let models = tiny.policy.read_published(&published(&trainer)).unwrap();
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
                let blob = trainer.publish(DType::F32, publication).unwrap();
                tiny.policy.read_published(&blob).unwrap()
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
