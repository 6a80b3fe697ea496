//! Both paths against the log-probabilities that other implementations gave for the same weights.

use std::path::Path;

use serde_json::Value;

use crate::{
    DType, Device, LanguageModel, ModelFolder, Sequence,
    decode::{Decoder, Precision, Prefill},
    fixtures::shared,
    open_policy,
};

const TRANSFORMERS: [&str; 4] = [
    "random-llama3",
    "random-mistral",
    "random-qwen2",
    "random-qwen3",
];
const NUMPY: [&str; 2] = ["stories260K", "babyllama-tok361"];

fn load(path: &Path) -> (LanguageModel, Value) {
    let folder = ModelFolder::open(path, None).unwrap();
    let weights = folder.weights(DType::F32, &Device::Cpu).unwrap();
    let reference = std::fs::read_to_string(path.join("reference.json")).unwrap();
    (
        LanguageModel::new(folder.config, weights).unwrap(),
        serde_json::from_str(&reference).unwrap(),
    )
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

/// log p(ids[t+1] | ids[..=t]) of every sequence by the scoring path, all in one packed batch.
fn scored(model: &LanguageModel, sequences: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let split: Vec<Sequence<'_>> = sequences
        .iter()
        .map(|ids| Sequence {
            prompt: &ids[..1],
            completion: &ids[1..],
        })
        .collect();
    let scores = model.score(&split).unwrap();
    let mut flat = scores
        .logp
        .to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(f64::from);
    scores
        .lengths
        .iter()
        .map(|&n| flat.by_ref().take(n).collect())
        .collect()
}

/// The same by the cached path: the first half of each sequence as a prompt, the rest token by token,
/// all sequences side by side and ending at different times.
fn cached(model: &LanguageModel, sequences: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let slots: Vec<usize> = (0..sequences.len()).rev().collect();
    let mut decoder = Decoder::new(model.clone(), Precision::F32, slots.len(), 256).unwrap();
    let prompts: Vec<Prefill<'_>> = sequences
        .iter()
        .zip(&slots)
        .map(|(ids, slot)| Prefill {
            ids: &ids[..ids.len() / 2],
            slots: std::slice::from_ref(slot),
        })
        .collect();
    let mut found: Vec<Vec<f64>> = vec![Vec::new(); sequences.len()];
    let mut rows: Vec<usize> = (0..sequences.len()).collect();
    let mut logits = decoder.prefill(&prompts).unwrap();
    loop {
        for (index, row) in rows.iter().enumerate() {
            let ids = &sequences[*row];
            let target = ids[ids.len() / 2 + found[*row].len()];
            found[*row].push(f64::from(crate::sampling::log_softmax_at(
                logits.row(index),
                target,
            )));
        }
        rows.retain(|&row| sequences[row].len() / 2 + found[row].len() < sequences[row].len());
        if rows.is_empty() {
            return found;
        }
        let step = |&row: &usize| {
            let ids = &sequences[row];
            (slots[row], ids[ids.len() / 2 + found[row].len() - 1])
        };
        let (slots, tokens): (Vec<usize>, Vec<u32>) = rows.iter().map(step).unzip();
        logits = decoder.extend(&slots, &tokens).unwrap();
    }
}

fn close(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (t, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f - e).abs() < 1e-3,
            "{what}: entry {t} is {f}, the reference says {e}"
        );
    }
}

#[test]
fn both_paths_agree_with_transformers() {
    for name in TRANSFORMERS {
        let Some(path) = shared(&format!("data/models/{name}")) else {
            return;
        };
        let (model, reference) = load(&path);
        agrees(&model, &reference, name);
    }
}

#[test]
fn both_paths_agree_with_peft_beside_an_adapter() {
    let name = "random-llama3-lora";
    let (Some(base), Some(adapter)) = (
        shared("data/models/random-llama3"),
        shared(&format!("data/models/{name}")),
    ) else {
        return;
    };
    let (_, model) = open_policy(&base, Some(&adapter), None, (DType::F32, &Device::Cpu)).unwrap();
    let reference = std::fs::read_to_string(adapter.join("reference.json")).unwrap();
    let reference: Value = serde_json::from_str(&reference).unwrap();
    agrees(&model, &reference, name);
    let merged = LanguageModel::new(model.config().clone(), model.merged().unwrap()).unwrap();
    agrees(&merged, &reference, "merged");
    // The adapter is what makes the difference.
    let (_, of_base) = load(&base);
    agrees(&model.without_adapter(), &of_base, "without the adapter");
    let first = |reference: &Value| numbers(&reference["logprobs"][0])[0];
    assert!((first(&reference) - first(&of_base)).abs() > 1e-2);
}

/// Panics unless both paths give the log-probabilities that the reference has for its sequences.
fn agrees(model: &LanguageModel, reference: &Value, name: &str) {
    let rows = reference["ids"].as_array().unwrap().len();
    let real = |row: usize| {
        numbers(&reference["attention_mask"][row])
            .iter()
            .sum::<f64>() as usize
    };
    let sequences: Vec<Vec<u32>> = (0..rows)
        .map(|row| ids(&reference["ids"][row])[..real(row)].to_vec())
        .collect();
    let expected: Vec<Vec<f64>> = (0..rows)
        .map(|row| numbers(&reference["logprobs"][row])[..sequences[row].len() - 1].to_vec())
        .collect();
    for (row, found) in scored(model, &sequences).iter().enumerate() {
        close(found, &expected[row], &format!("{name}, scored, row {row}"));
    }
    for (row, found) in cached(model, &sequences).iter().enumerate() {
        let from = sequences[row].len() / 2 - 1;
        close(
            found,
            &expected[row][from..],
            &format!("{name}, cached, row {row}"),
        );
    }
}

#[test]
fn both_paths_agree_with_numpy_on_pretrained_models() {
    for name in NUMPY {
        let Some(path) = shared(&format!("data/models/{name}")) else {
            return;
        };
        let (model, reference) = load(&path);
        let text = ids(&reference["scored"]["ids"]);
        let found: f64 = scored(&model, std::slice::from_ref(&text))[0].iter().sum();
        let expected = reference["scored"]["sum_logprob"].as_f64().unwrap();
        assert!(
            (found - expected).abs() < 1e-3 * text.len() as f64,
            "{name}: {found}, not {expected}"
        );
        for prompt in reference["prompts"].as_array().unwrap() {
            let (start, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy_ids"]));
            assert_eq!(
                greedily(&model, &start, greedy.len() - start.len()),
                greedy,
                "{name}"
            );
            let mut decoder = Decoder::new(model.clone(), Precision::F32, 1, 64).unwrap();
            let read = Prefill {
                ids: &start,
                slots: &[0],
            };
            let logits = decoder.prefill(&[read]).unwrap();
            let logits = logits.row(0);
            for pair in prompt["last_logits_top8"].as_array().unwrap() {
                let (token, logit) = (
                    pair[0].as_u64().unwrap() as usize,
                    pair[1].as_f64().unwrap(),
                );
                assert!(
                    (f64::from(logits[token]) - logit).abs() < 1e-3,
                    "{name}: token {token}"
                );
            }
        }
    }
}

fn greedily(model: &LanguageModel, start: &[u32], count: usize) -> Vec<u32> {
    let capacity = start.len() + count;
    let mut decoder = Decoder::new(model.clone(), Precision::F32, 1, capacity).unwrap();
    let mut text = start.to_vec();
    let prompt = Prefill {
        ids: start,
        slots: &[0],
    };
    let mut logits = decoder.prefill(&[prompt]).unwrap();
    for _ in 0..count {
        let likeliest = logits.row(0).iter().enumerate();
        let likeliest = likeliest.max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        let next = likeliest.0 as u32;
        text.push(next);
        logits = decoder.extend(&[0], &[next]).unwrap();
    }
    text
}

#[test]
fn bf16_stays_near_f32() {
    let Some(path) = shared("data/models/random-llama3") else {
        return;
    };
    let folder = ModelFolder::open(&path, None).unwrap();
    let of = |dtype| {
        let weights = folder.weights(dtype, &Device::Cpu).unwrap();
        let model = LanguageModel::new(folder.config.clone(), weights).unwrap();
        let sequences = vec![vec![1, 95, 138, 5, 366, 6, 345, 458], vec![1, 339, 343]];
        (
            scored(&model, &sequences).concat(),
            cached(&model, &sequences).concat(),
        )
    };
    let (wide, narrow) = (of(DType::F32), of(DType::BF16));
    for (w, n) in wide
        .0
        .iter()
        .zip(&narrow.0)
        .chain(wide.1.iter().zip(&narrow.1))
    {
        assert!((w - n).abs() < 0.15, "{w} in f32, {n} in bf16");
    }
}
