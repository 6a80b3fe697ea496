use model::{DType, Device, ModelFolder, Weights};
use serde_json::json;
use settings::resolve;

use super::*;

/// A random decoder with a vocabulary of 12 tokens, and its folder.
pub(crate) struct TinyModel {
    pub(crate) folder: ModelFolder,
    pub(crate) model: LanguageModel,
    _directory: tempfile::TempDir,
}

pub(crate) fn tiny_model() -> TinyModel {
    let directory = tempfile::tempdir().unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
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
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(
        directory.path().join("tokenizer.json"),
        tokenizer.to_string(),
    )
    .unwrap();
    let folder = ModelFolder::open(directory.path(), None).unwrap();
    let weights = Weights::initialise(&folder.config, Seed(1), DType::F32, &Device::Cpu).unwrap();
    let model = LanguageModel::new(folder.config.clone(), weights).unwrap();
    TinyModel {
        folder,
        model,
        _directory: directory,
    }
}

/// Settings of a short training run with overrides `key=value` below `preference`.
pub(crate) fn settings(changes: &[&str]) -> settings::PreferenceSettings {
    let short = [
        "fit.pooling=mean",
        "fit.likelihood=false",
        "fit.train_batch_size=8",
        "fit.learning_rate=1e-2",
    ];
    let sets = short
        .iter()
        .chain(changes)
        .map(|set| format!("preference.{set}").parse().unwrap());
    let sets: Vec<_> = sets.collect();
    resolve("", "test", &sets).unwrap().settings.preference
}

/// Comparisons of the token `first` with the token `second`, each followed by end-of-text, for several prompts.
pub(crate) fn compared(first: u32, second: u32, label: f32) -> Vec<PreferenceExample> {
    let example = |prompt: u32| PreferenceExample {
        prompt: vec![0, prompt, prompt / 2],
        first: vec![first, 1],
        second: vec![second, 1],
        label,
    };
    (4..12).map(example).collect()
}

fn trained(
    examples: &[PreferenceExample],
    changes: &[&str],
    on_step: impl FnMut(StepMetrics) -> bool,
) -> Result<RewardModel, PreferenceError> {
    let settings = settings(changes);
    let data = TrainingData {
        examples,
        adversarial: &[],
        apo: &settings.apo,
    };
    fit(&tiny_model().model, &settings.fit, data, Seed(7), on_step)
}

fn learned(model: &RewardModel, comparisons: &[(u32, u32)]) -> usize {
    let is_learned = |&(a, b): &(u32, u32)| {
        let examples = compared(a, b, 1.0);
        calibrate(model, &examples).unwrap().unwrap().accuracy == 1.0
    };
    comparisons.iter().filter(|c| is_learned(c)).count()
}

#[test]
fn training_learns_preferences_and_is_deterministic_per_seed() {
    let examples = [
        compared(5, 6, 1.0),
        compared(6, 7, 1.0),
        compared(8, 5, 0.0),
    ]
    .concat();
    let mut losses = Vec::new();
    let one = trained(&examples, &["fit.epochs=12"], |step| {
        losses.push(step.annotated.unwrap());
        true
    });
    let one = one.unwrap();
    assert_eq!(losses.len(), 36);
    assert!(
        (losses[0] - std::f64::consts::LN_2).abs() < 0.05,
        "{}",
        losses[0]
    );
    assert!(losses[35] < 0.3, "{}", losses[35]);
    assert_eq!(
        learned(&one, &[(5, 6), (6, 7), (5, 7), (5, 8)]),
        4,
        "the last is not in the training data"
    );
    let other = trained(&examples, &["fit.epochs=12"], |_| true).unwrap();
    assert_eq!(one.digest().unwrap(), other.digest().unwrap());
}

#[test]
fn training_an_adapter_leaves_the_backbone_unchanged() {
    let examples = [compared(5, 6, 1.0), compared(6, 7, 1.0)].concat();
    let tiny = tiny_model();
    let train = |changes: &[&str]| {
        let lora = ["fit.lora_rank=4", "fit.epochs=40", "fit.lora_alpha=8.0"];
        let settings = settings(&[&lora[..], changes].concat());
        let data = TrainingData {
            examples: &examples,
            adversarial: &[],
            apo: &settings.apo,
        };
        fit(&tiny.model, &settings.fit, data, Seed(7), |_| true).unwrap()
    };
    let one = train(&[]);
    assert_eq!(
        learned(&one, &[(5, 6), (6, 7), (5, 7)]),
        3,
        "the last is not in the training data"
    );
    let backbone_digest = |model: &RewardModel| model.backbone().weights().digest().unwrap();
    let fresh = RewardModel::from_backbone(&tiny.model, one.config(), Seed(1)).unwrap();
    assert_eq!(
        backbone_digest(&one),
        backbone_digest(&fresh),
        "the backbone is frozen"
    );
    let digest = |model: &RewardModel| model.digest().unwrap();
    assert_eq!(digest(&train(&[])), digest(&one));
    let dropping = ["fit.lora_dropout=0.5"];
    assert_eq!(digest(&train(&dropping)), digest(&train(&dropping)));
    assert_ne!(digest(&train(&dropping)), digest(&one));
    let q_only = train(&["fit.target_modules=[\"q_proj\"]"]);
    assert!(q_only.parameter_count() < one.parameter_count());
}

/// A step of eight pairs and one golden answer with samples of different numbers, in one pass, in two and in one per row.
#[test]
fn passes_of_a_step_do_not_change_its_losses_and_gradient() {
    let examples = [compared(5, 6, 1.0), compared(8, 5, 0.3)].concat();
    let golden = |prompt: u32, samples: &[u32]| AdversarialExample {
        prompt: vec![0, prompt],
        golden: vec![5, 1],
        samples: samples.iter().map(|&token| vec![token, 6, 1]).collect(),
    };
    let adversarial = [golden(4, &[7, 8, 6]), golden(5, &[7]), golden(9, &[8, 6])];
    let steps = |max_tokens: usize, precision: &str| {
        let settings = settings(&[
            &format!("fit.max_tokens_per_micro_batch={max_tokens}"),
            &format!("fit.precision={precision}"),
        ]);
        let data = TrainingData {
            examples: &examples,
            adversarial: &adversarial,
            apo: &settings.apo,
        };
        let mut steps = Vec::new();
        fit(&tiny_model().model, &settings.fit, data, Seed(7), |step| {
            steps.extend([
                step.annotated.unwrap(),
                step.golden.unwrap(),
                step.grad_norm,
            ]);
            true
        })
        .unwrap();
        steps
    };
    let whole = steps(0, "f32");
    assert_eq!(whole.len(), 6);
    for max_tokens in [1, 9, 30] {
        let parts = steps(max_tokens, "f32");
        for (part, all) in parts.iter().zip(&whole) {
            assert!(
                (part - all).abs() < 1e-4 * all.abs(),
                "{parts:?} for {whole:?}"
            );
        }
    }
    let reduced = steps(9, "bf16");
    assert_ne!(reduced, steps(9, "f32"));
    for (value, exact) in reduced.iter().zip(&whole) {
        assert!(
            (value - exact).abs() < 0.05 * exact.abs(),
            "{reduced:?} for {whole:?}"
        );
    }
}

#[test]
fn a_pairwise_model_represents_a_cycle_and_a_scalar_reward_cannot() {
    let cycle = [(5, 6), (6, 7), (7, 5)];
    let examples: Vec<_> = cycle
        .iter()
        .flat_map(|&(a, b)| compared(a, b, 1.0))
        .collect();
    let learned_by = |kind: &str| {
        let kind = format!("fit.head={kind}");
        let changes = ["fit.epochs=40", "fit.planes=2", &kind];
        learned(&trained(&examples, &changes, |_| true).unwrap(), &cycle)
    };
    assert_eq!(learned_by("pairwise"), 3);
    assert!(learned_by("bradley-terry") < 3);
}

#[test]
fn soft_labels_are_calibrated() {
    let examples = compared(5, 6, 0.7);
    let model = trained(&examples, &["fit.epochs=80"], |_| true).unwrap();
    let calibration = calibrate(&model, &examples).unwrap().unwrap();
    assert!(calibration.ece < 0.03, "{calibration:?}");
}

#[test]
fn invalid_training_runs_report_the_cause() {
    let message = |result: Result<RewardModel, PreferenceError>| match result {
        Ok(_) => panic!("it was trained"),
        Err(error) => error.to_string(),
    };
    let examples = compared(5, 6, 1.0);
    let none = message(trained(&[], &[], |_| true));
    assert!(none.contains("preference.fit.pairs"), "{none}");
    let stopped = message(trained(&examples, &[], |_| false));
    assert!(stopped.contains("interrupted"), "{stopped}");
    let diverging = ["fit.learning_rate=1e30", "fit.epochs=4"];
    let diverging = message(trained(&examples, &diverging, |_| true));
    assert!(
        diverging.contains("lower preference.fit.learning_rate"),
        "{diverging}"
    );
    let long = PreferenceExample {
        first: vec![3; 40],
        ..examples[0].clone()
    };
    let long = message(trained(&[long], &[], |_| true));
    assert!(long.contains("positions"), "{long}");
}
