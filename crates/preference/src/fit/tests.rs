use model::{DType, Device, ModelFolder, Weights};
use serde_json::json;
use settings::resolve;

use super::*;

/// A random decoder of a dozen words, with its folder.
pub(crate) struct Tiny {
    pub(crate) folder: ModelFolder,
    pub(crate) model: LanguageModel,
    _place: tempfile::TempDir,
}

pub(crate) fn tiny() -> Tiny {
    let place = tempfile::tempdir().unwrap();
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
    std::fs::write(place.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(place.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let folder = ModelFolder::open(place.path(), None).unwrap();
    let weights = Weights::initialise(&folder.config, Seed(1), DType::F32, &Device::Cpu).unwrap();
    let model = LanguageModel::new(folder.config.clone(), weights).unwrap();
    Tiny {
        folder,
        model,
        _place: place,
    }
}

/// The settings of a quick fit, with these changes: `key=value` below `preference`.
pub(crate) fn settings(changes: &[&str]) -> settings::PreferenceSettings {
    let quick = [
        "fit.pooling=mean",
        "fit.likelihood=false",
        "fit.train_batch_size=8",
        "fit.learning_rate=1e-2",
    ];
    let sets = quick
        .iter()
        .chain(changes)
        .map(|set| format!("preference.{set}").parse().unwrap());
    let sets: Vec<_> = sets.collect();
    resolve("", "test", &sets).unwrap().settings.preference
}

/// `first` against `second`, one token each before the end, after every one of a few prompts.
pub(crate) fn against(first: u32, second: u32, label: f32) -> Vec<Example> {
    let example = |prompt: u32| Example {
        prompt: vec![0, prompt, prompt / 2],
        first: vec![first, 1],
        second: vec![second, 1],
        label,
    };
    (4..12).map(example).collect()
}

fn fitted(
    examples: &[Example],
    changes: &[&str],
    watch: impl FnMut(FitStep) -> bool,
) -> Result<RewardModel, PreferenceError> {
    let settings = settings(changes);
    let material = Material {
        examples,
        contests: &[],
        apo: &settings.apo,
    };
    fit(&tiny().model, &settings.fit, material, Seed(7), watch)
}

fn sides(model: &RewardModel, comparisons: &[(u32, u32)]) -> usize {
    let right = |&(a, b): &(u32, u32)| {
        let examples = against(a, b, 1.0);
        calibrate(model, &examples).unwrap().unwrap().accuracy == 1.0
    };
    comparisons.iter().filter(|c| right(c)).count()
}

#[test]
fn a_fit_learns_what_is_preferred_and_a_seed_repeats_it() {
    let examples = [against(5, 6, 1.0), against(6, 7, 1.0), against(8, 5, 0.0)].concat();
    let mut losses = Vec::new();
    let one = fitted(&examples, &["fit.epochs=12"], |step| {
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
        sides(&one, &[(5, 6), (6, 7), (5, 7), (5, 8)]),
        4,
        "the third was never shown"
    );
    let other = fitted(&examples, &["fit.epochs=12"], |_| true).unwrap();
    assert_eq!(one.digest().unwrap(), other.digest().unwrap());
}

#[test]
fn an_adapter_learns_it_too_and_the_trunk_stays_and_is_shared() {
    let examples = [against(5, 6, 1.0), against(6, 7, 1.0)].concat();
    let tiny = tiny();
    let fitted = |changes: &[&str]| {
        let beside = ["fit.lora_rank=4", "fit.epochs=40", "fit.lora_alpha=8.0"];
        let settings = settings(&[&beside[..], changes].concat());
        let material = Material {
            examples: &examples,
            contests: &[],
            apo: &settings.apo,
        };
        fit(&tiny.model, &settings.fit, material, Seed(7), |_| true).unwrap()
    };
    let one = fitted(&[]);
    assert_eq!(
        sides(&one, &[(5, 6), (6, 7), (5, 7)]),
        3,
        "the third was never shown"
    );
    let of_trunk = |model: &RewardModel| model.trunk().weights().digest().unwrap();
    let fresh = RewardModel::from_trunk(&tiny.model, one.config(), Seed(1)).unwrap();
    assert_eq!(of_trunk(&one), of_trunk(&fresh), "it was not trained");
    let digest = |model: &RewardModel| model.digest().unwrap();
    assert_eq!(digest(&fitted(&[])), digest(&one));
    let dropping = ["fit.lora_dropout=0.5"];
    assert_eq!(digest(&fitted(&dropping)), digest(&fitted(&dropping)));
    assert_ne!(digest(&fitted(&dropping)), digest(&one));
    let some = fitted(&["fit.target_modules=[\"q_proj\"]"]);
    assert!(some.parameter_count() < one.parameter_count());
}

#[test]
fn a_pairwise_model_holds_a_cycle_and_a_score_cannot() {
    let cycle = [(5, 6), (6, 7), (7, 5)];
    let examples: Vec<_> = cycle
        .iter()
        .flat_map(|&(a, b)| against(a, b, 1.0))
        .collect();
    let sides_of = |kind: &str| {
        let kind = format!("fit.head={kind}");
        let changes = ["fit.epochs=40", "fit.planes=2", &kind];
        sides(&fitted(&examples, &changes, |_| true).unwrap(), &cycle)
    };
    assert_eq!(sides_of("pairwise"), 3);
    assert!(sides_of("bradley-terry") < 3);
}

#[test]
fn soft_labels_are_met_in_the_middle() {
    let examples = against(5, 6, 0.7);
    let model = fitted(&examples, &["fit.epochs=80"], |_| true).unwrap();
    let found = calibrate(&model, &examples).unwrap().unwrap();
    assert!(found.ece < 0.03, "{found:?}");
}

#[test]
fn what_cannot_be_fitted_says_so() {
    let refusal = |result: Result<RewardModel, PreferenceError>| match result {
        Ok(_) => panic!("it was fitted"),
        Err(error) => error.to_string(),
    };
    let examples = against(5, 6, 1.0);
    let none = refusal(fitted(&[], &[], |_| true));
    assert!(none.contains("preference.fit.pairs"), "{none}");
    let stopped = refusal(fitted(&examples, &[], |_| false));
    assert!(stopped.contains("interrupted"), "{stopped}");
    let wild = ["fit.learning_rate=1e30", "fit.epochs=4"];
    let wild = refusal(fitted(&examples, &wild, |_| true));
    assert!(
        wild.contains("lower preference.fit.learning_rate"),
        "{wild}"
    );
    let long = Example {
        first: vec![3; 40],
        ..examples[0].clone()
    };
    let long = refusal(fitted(&[long], &[], |_| true));
    assert!(long.contains("positions"), "{long}");
}
