use serde_json::{Value, json};

use super::*;
use crate::{
    DType, Device,
    config::ModelConfig,
    fixtures::{adapted, tiny_model},
    sampling::log_softmax_at,
    weights::Weights,
};

/// A tensor-based decoder, as used on other devices.
fn tensor_decoder(model: &LanguageModel, slots: usize, capacity: usize) -> Decoder {
    let cache = device::TensorKvCache::new(model, slots, capacity).unwrap();
    Decoder {
        models: vec![model.clone()],
        precision: Precision::F32,
        capacity,
        lengths: vec![0; slots],
        backend: DecodeBackend::Device(cache),
    }
}

/// A model with two layers and grouped-query attention, with `changes` applied to its configuration.
fn model(changes: &Value) -> LanguageModel {
    let mut raw = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    });
    raw.as_object_mut()
        .unwrap()
        .extend(changes.as_object().unwrap().clone());
    let config = ModelConfig::from_json(raw, std::path::Path::new("config.json")).unwrap();
    let weights = Weights::initialise(&config, messages::Seed(3), DType::F32, &Device::Cpu);
    LanguageModel::new(config, weights.unwrap()).unwrap()
}

/// All logits of decoding five sequences in permuted slots, some of which share a prompt.
fn logits(decoder: &mut Decoder) -> Vec<f32> {
    let long: Vec<u32> = (0..23).map(|i| (i * 7) % 50).collect();
    let prompts = [
        Prefill {
            ids: &[3, 1, 4],
            slots: &[4, 1],
        },
        Prefill {
            ids: &long,
            slots: &[0],
        },
        Prefill {
            ids: &[5],
            slots: &[3, 2],
        },
    ];
    let mut all = decoder.prefill(&prompts).unwrap().values;
    let mut slots = vec![1, 0, 4, 2, 3];
    for step in 0..8u32 {
        let tokens: Vec<u32> = slots
            .iter()
            .map(|&slot| (slot as u32 * 11 + step) % 50)
            .collect();
        all.extend(decoder.extend(&slots, &tokens).unwrap().values);
        if step == 4 {
            slots.remove(1);
        }
    }
    all
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

#[test]
fn both_backends_agree_on_every_architecture_and_reduced_precision_deviates_little() {
    for changes in [
        json!({}),
        json!({"tie_word_embeddings": true}),
        json!({"architectures": ["MistralForCausalLM"], "sliding_window": 9}),
        json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "use_sliding_window": false, "max_window_layers": 2}),
        json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}),
    ] {
        let model = model(&changes);
        let expected = logits(&mut tensor_decoder(&model, 5, 40));
        let found = |precision| logits(&mut Decoder::new(model.clone(), precision, 5, 40).unwrap());
        let largest = expected
            .iter()
            .fold(0f32, |largest, x| largest.max(x.abs()));
        let exact = max_difference(&found(Precision::F32), &expected);
        assert!(exact < 1e-5 * (1.0 + largest), "{changes}: {exact}");
        for precision in [Precision::Bf16, Precision::Int8] {
            let difference = max_difference(&found(precision), &expected);
            assert!(
                difference > 1e-4 && difference < 0.1 * largest,
                "{changes} {precision:?}: {difference} of {largest}"
            );
        }
    }
}

/// The logits of both models after three prompts in two slots each, and after each of four further tokens.
fn both_logits(decoder: &mut MixtureDecoder) -> [Vec<f32>; 2] {
    let (policy, reference) = scored_logits(decoder, [true; 3]);
    let reference: Vec<Vec<f32>> = reference.into_iter().flatten().collect();
    [policy.concat(), reference.concat()]
}

/// Rows of the policy, and those of the reference, which reads only the `scored` ones of the three prompts.
fn scored_logits(
    decoder: &mut MixtureDecoder,
    scored: [bool; 3],
) -> (Vec<Vec<f32>>, Vec<Option<Vec<f32>>>) {
    let prompts = [[0, 4, 2], [3, 3, 1], [5, 0, 8]];
    let slots = [[4, 1], [0, 5], [2, 3]];
    let prompts: Vec<Prefill<'_>> = prompts
        .iter()
        .zip(&slots)
        .map(|(ids, slots)| Prefill { ids, slots })
        .collect();
    let (mut policy, mut reference) = (Vec::new(), Vec::new());
    let mut take = |logits: &MixtureLogits, count: usize| {
        policy.extend((0..count).map(|row| logits.policy(row).to_vec()));
        reference.extend((0..count).map(|row| logits.reference(row).map(<[f32]>::to_vec)));
    };
    take(&decoder.prefill(&prompts, &scored).unwrap(), 3);
    // With the prompt of each slot.
    let slots = [(3, 2), (0, 1), (5, 1), (1, 0)];
    for step in 0..4 {
        let next = slots.map(|(slot, prompt)| NextToken {
            slot,
            token: (slot as u32 + step) % 9,
            is_scored: scored[prompt],
        });
        take(&decoder.extend(&next).unwrap(), 4);
    }
    (policy, reference)
}

#[test]
fn a_reference_reads_only_what_is_scored() {
    let limits = SlotLimits {
        slots: 6,
        capacity: 12,
    };
    let adapted = adapted(9, 1, &["all-linear"]);
    let (policy, reference) = (tiny_model(9, 1), tiny_model(9, 2));
    for (policy, reference) in [
        (policy, reference),
        (adapted.clone(), adapted.without_adapter()),
    ] {
        let decoder = || {
            let (policy, reference) = (policy.clone(), Some(reference.clone()));
            MixtureDecoder::new(policy, reference, Precision::F32, limits).unwrap()
        };
        let (policy_rows, all) = scored_logits(&mut decoder(), [true; 3]);
        for scored in [[true, false, true], [false, true, false], [false; 3]] {
            let mut decoder = decoder();
            let (rows, some) = scored_logits(&mut decoder, scored);
            assert_eq!(
                rows, policy_rows,
                "the policy has the same bits: {scored:?}"
            );
            let prompts = [0, 1, 2].into_iter().chain([2, 1, 1, 0].repeat(4));
            for ((prompt, found), expected) in prompts.zip(some).zip(&all) {
                let expected = expected.clone().filter(|_| scored[prompt]);
                assert_eq!(found, expected, "{scored:?}");
            }
            // All slots again, those of the reference from empty ones.
            assert_eq!(scored_logits(&mut decoder, [true; 3]), (rows, all.clone()));
        }
    }
}

#[test]
fn a_policy_with_an_adapter_is_decoded_together_with_its_base() {
    let limits = SlotLimits {
        slots: 6,
        capacity: 12,
    };
    for targets in [&["q_proj", "down_proj"][..], &["all-linear"]] {
        let policy = adapted(9, 1, targets);
        let base = policy.without_adapter();
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            let of = |policy: &LanguageModel, reference: Option<&LanguageModel>| {
                MixtureDecoder::new(policy.clone(), reference.cloned(), precision, limits).unwrap()
            };
            let mut both = of(&policy, Some(&base));
            assert!(matches!(both, MixtureDecoder::Shared { .. }));
            let [of_policy, of_base] = both_logits(&mut both);
            assert_eq!(of_policy, both_logits(&mut of(&policy, None))[0]);
            assert_eq!(of_base, both_logits(&mut of(&base, None))[0]);
            let merged = policy.merged().unwrap();
            let merged = LanguageModel::new(policy.config().clone(), merged).unwrap();
            let [of_merged, _] = both_logits(&mut of(&merged, None));
            let largest = of_merged
                .iter()
                .fold(0f32, |largest, x| largest.max(x.abs()));
            let difference = max_difference(&of_policy, &of_merged);
            let tolerance = match precision {
                Precision::F32 => 1e-5 * (1.0 + largest),
                Precision::Bf16 | Precision::Int8 => 0.15 * largest,
            };
            assert!(
                difference < tolerance,
                "{precision:?}: {difference} of {largest}"
            );
            assert!(max_difference(&of_policy, &of_base) > 0.05, "no effect");

            // Another adapter, of the reference too; then one that changes nothing.
            let other = policy.with_neutral_adapter().unwrap();
            both.set_reference(policy.clone(), precision).unwrap();
            both.set_policy(other.clone(), precision).unwrap();
            assert!(matches!(both, MixtureDecoder::Shared { .. }));
            assert_eq!(both_logits(&mut both), [of_base.clone(), of_policy.clone()]);
            both.set_reference(base.clone(), precision).unwrap();
            assert_eq!(both_logits(&mut both), [of_base.clone(), of_base.clone()]);

            // Weights of its own.
            let unrelated = tiny_model(9, 2);
            both.set_policy(unrelated.clone(), precision).unwrap();
            assert!(matches!(both, MixtureDecoder::Separate { .. }));
            let expected = both_logits(&mut of(&unrelated, None))[0].clone();
            assert_eq!(both_logits(&mut both), [expected, of_base.clone()]);
            both.set_policy(policy.clone(), precision).unwrap();
            assert_eq!(both_logits(&mut both), [of_policy, of_base]);
        }
    }
}

#[test]
fn an_adapter_is_applied_and_the_model_can_be_replaced() {
    let adapted = adapted(9, 1, &["q_proj", "down_proj"]);
    let last = |decoder: &mut Decoder| {
        let prompt = Prefill {
            ids: &[0, 4, 2],
            slots: &[0],
        };
        decoder.prefill(&[prompt]).unwrap().row(0).to_vec()
    };
    let mut decoder = Decoder::new(adapted.clone(), Precision::F32, 1, 8).unwrap();
    assert!(
        max_difference(
            &last(&mut decoder),
            &last(&mut tensor_decoder(&adapted, 1, 8))
        ) < 1e-5
    );
    let other = tiny_model(9, 2);
    decoder.set_model(other.clone(), Precision::F32).unwrap();
    assert_eq!(decoder.length(0), 0);
    let fresh = last(&mut Decoder::new(other, Precision::F32, 1, 8).unwrap());
    assert_eq!(last(&mut decoder), fresh);
    assert!(fresh.iter().all(|x| x.is_finite()));
    assert!(log_softmax_at(&fresh, 3) < 0.0);
}

#[test]
fn logits_are_independent_of_other_sequences_and_of_the_thread_count() {
    let model = model(&json!({}));
    let slots: Vec<usize> = (0..40).collect();
    let decoded = |slots: &[usize], threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut decoder = Decoder::new(model.clone(), Precision::F32, 40, 16).unwrap();
            for slot in slots {
                let ids = [*slot as u32, 7];
                let prompt = Prefill {
                    ids: &ids,
                    slots: &[*slot],
                };
                decoder.prefill(&[prompt]).unwrap();
            }
            let tokens: Vec<u32> = slots.iter().map(|&slot| slot as u32 + 1).collect();
            decoder.extend(slots, &tokens).unwrap()
        })
    };
    let all = decoded(&slots, 1);
    assert_eq!(all.values, decoded(&slots, 3).values);
    for slot in [0, 17, 39] {
        assert_eq!(decoded(&[slot], 2).row(0), all.row(slot));
    }
}

#[test]
fn invalid_prompts_and_full_slots_are_refused() {
    let mut decoder = Decoder::new(tiny_model(9, 1), Precision::F32, 2, 4).unwrap();
    let refused = |decoder: &mut Decoder, ids: &[u32], slots: &[usize]| {
        let prompt = Prefill { ids, slots };
        decoder.prefill(&[prompt]).unwrap_err().to_string()
    };
    assert!(refused(&mut decoder, &[], &[0]).contains("at least one token"));
    assert!(refused(&mut decoder, &[1], &[]).contains("one slot"));
    assert!(refused(&mut decoder, &[9], &[0]).contains("token 9"));
    assert!(refused(&mut decoder, &[1; 5], &[0]).contains("room for 4 tokens"));
    decoder
        .prefill(&[Prefill {
            ids: &[1; 4],
            slots: &[0],
        }])
        .unwrap();
    let full = decoder.extend(&[0], &[1]).unwrap_err().to_string();
    assert!(
        full.contains("room for 4 tokens cannot take 1 more"),
        "{full}"
    );
}
