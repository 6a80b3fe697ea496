//! A bandit as a language model: every completion is one token, and every token is one arm.
//!
//! [`Bandit::write_model`] writes a Llama, in the layout of a Hugging Face folder, whose next-token distribution after
//! the one-token prompt `[0]` is exactly the given one. The whole pipeline, sampling and training included, can then be
//! compared with fixed points computed in closed form. The model is untrained: its distribution after any other prompt
//! is arbitrary.

use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::error::PlaygroundError;
use crate::llama::{HIDDEN, LlamaWeights, NORMS, config};
use crate::seed::{RngStream, generator};
use crate::tokenizer::{word_level, write};

const ARMS: std::ops::RangeInclusive<usize> = 2..=64;
const SUM_TOLERANCE: f64 = 1e-6;
const WEIGHT_SEED: u64 = 0;

/// A finite set of arms with a known reference policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Bandit {
    probabilities: Vec<f64>,
}

impl Bandit {
    /// Creates a bandit from its reference probabilities, one per arm.
    ///
    /// # Errors
    /// [`PlaygroundError::Probabilities`] unless there are 2 to 64 arms with positive probabilities that sum to 1 within 10⁻⁶.
    pub fn new(probabilities: &[f64]) -> Result<Self, PlaygroundError> {
        let invalid = |reason| Err(PlaygroundError::Probabilities { reason });
        if !ARMS.contains(&probabilities.len()) {
            return invalid(format!("has {} arms; give 2 to 64", probabilities.len()));
        }
        if let Some(arm) = probabilities
            .iter()
            .position(|p| !(p.is_finite() && *p > 0.0))
        {
            return invalid(format!(
                "gives arm {arm} probability {}; each must be above 0",
                probabilities[arm]
            ));
        }
        let sum: f64 = probabilities.iter().sum();
        if (sum - 1.0).abs() > SUM_TOLERANCE {
            return invalid(format!("sums to {sum}; it must sum to 1"));
        }
        Ok(Self {
            probabilities: probabilities.to_vec(),
        })
    }

    /// Reference probabilities, one per arm.
    pub fn probabilities(&self) -> &[f64] {
        &self.probabilities
    }

    /// The prompt after which the model's next-token distribution is the reference: the single id 0.
    pub fn prompt_ids(&self) -> [u32; 1] {
        [0]
    }

    /// Writes `config.json`, `model.safetensors` (f32), `tokenizer.json` and `tokenizer_config.json` into an
    /// existing folder. Token i is arm i; there is no end-of-text token, so completions must have exactly one token.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_model(&self, folder: &Path) -> Result<(), PlaygroundError> {
        let arms = self.probabilities.len();
        let names: Vec<String> = (0..arms).map(|arm| format!("arm{arm}")).collect();
        let tokenizer = word_level(names.iter().map(String::as_str), &[]);
        let tokenizer_config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "model_max_length": 16,
        });
        write(folder, "config.json", config(arms).to_string().as_bytes())?;
        write(folder, "tokenizer.json", tokenizer.to_string().as_bytes())?;
        write(
            folder,
            "tokenizer_config.json",
            tokenizer_config.to_string().as_bytes(),
        )?;
        let weights = LlamaWeights::random(arms, &mut generator(WEIGHT_SEED, RngStream::Bandit));
        write(folder, "model.safetensors", &self.encode(&weights)?)
    }

    /// Serialises the weights as safetensors, with the LM head that yields the reference.
    fn encode(&self, weights: &LlamaWeights) -> Result<Vec<u8>, PlaygroundError> {
        let mut tensors: Vec<(&str, Vec<usize>, Vec<u8>)> = Vec::new();
        for (name, matrix) in weights.named() {
            tensors.push((
                name,
                vec![matrix.rows, matrix.columns],
                bytes(&matrix.cells),
            ));
        }
        let head = self.head(&weights.hidden_after(0));
        tensors.push((
            "lm_head.weight",
            vec![self.probabilities.len(), HIDDEN],
            bytes(&head),
        ));
        for name in NORMS {
            tensors.push((name, vec![HIDDEN], bytes(&[1.0; HIDDEN])));
        }
        let mut views = Vec::new();
        for (name, shape, data) in &tensors {
            views.push((*name, TensorView::new(Dtype::F32, shape.clone(), data)?));
        }
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        Ok(safetensors::serialize(views, Some(metadata))?)
    }

    /// The LM head: row i is log p_i · h/|h|², so that the logit of arm i after hidden state h is log p_i.
    fn head(&self, hidden: &[f64]) -> Vec<f32> {
        let square: f64 = hidden.iter().map(|h| h * h).sum();
        let row = |p: &f64| {
            hidden
                .iter()
                .map(|h| (p.ln() * h / square) as f32)
                .collect::<Vec<_>>()
        };
        self.probabilities.iter().flat_map(row).collect()
    }
}

fn bytes(cells: &[f32]) -> Vec<u8> {
    cells.iter().flat_map(|cell| cell.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;
    use tokenizers::Tokenizer;

    use serde_json::Value;

    use super::*;

    /// Reads a tensor as f32 after checking its dtype and shape.
    fn read(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(
            (tensor.dtype(), tensor.shape()),
            (Dtype::F32, shape),
            "{name}"
        );
        tensor
            .data()
            .chunks_exact(4)
            .map(|cell| f32::from_le_bytes(cell.try_into().unwrap()))
            .collect()
    }

    fn linear(weight: &[f32], input: &[f32]) -> Vec<f32> {
        weight
            .chunks_exact(input.len())
            .map(|row| row.iter().zip(input).map(|(w, x)| w * x).sum())
            .collect()
    }

    fn norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
        let scale = (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32 + 1e-5)
            .sqrt()
            .recip();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }

    /// The next-token distribution after token 0, computed in f32 from the file alone.
    fn next_token_probabilities(bytes: &[u8], arms: usize) -> Vec<f64> {
        let file = SafeTensors::deserialize(bytes).unwrap();
        assert_eq!(file.len(), 12);
        let layer = |name: &str, shape: &[usize]| {
            read(&file, &format!("model.layers.0.{name}.weight"), shape)
        };
        for name in ["self_attn.q_proj", "self_attn.k_proj"] {
            layer(name, &[16, 16]);
        }
        let mut x = read(&file, "model.embed_tokens.weight", &[arms, 16])[..16].to_vec();
        let value = linear(
            &layer("self_attn.v_proj", &[16, 16]),
            &norm(&x, &layer("input_layernorm", &[16])),
        );
        for (x, out) in x
            .iter_mut()
            .zip(linear(&layer("self_attn.o_proj", &[16, 16]), &value))
        {
            *x += out;
        }
        let normed = norm(&x, &layer("post_attention_layernorm", &[16]));
        let up = linear(&layer("mlp.up_proj", &[32, 16]), &normed);
        let mut inner = linear(&layer("mlp.gate_proj", &[32, 16]), &normed);
        for (gate, up) in inner.iter_mut().zip(up) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        for (x, out) in x
            .iter_mut()
            .zip(linear(&layer("mlp.down_proj", &[16, 32]), &inner))
        {
            *x += out;
        }
        let hidden = norm(&x, &read(&file, "model.norm.weight", &[16]));
        let weights: Vec<f64> = linear(&read(&file, "lm_head.weight", &[arms, 16]), &hidden)
            .iter()
            .map(|logit| f64::from(*logit).exp())
            .collect();
        // The logits are log-probabilities and need no normalisation.
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 2e-6);
        weights
    }

    #[test]
    fn the_model_samples_from_the_reference() {
        let uniform: Vec<f64> = vec![1.0 / 64.0; 64];
        for probabilities in [vec![0.5, 0.3, 0.2], vec![0.999_999, 0.000_001], uniform] {
            let folder = tempfile::tempdir().unwrap();
            Bandit::new(&probabilities)
                .unwrap()
                .write_model(folder.path())
                .unwrap();
            let bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
            let actual = next_token_probabilities(&bytes, probabilities.len());
            for (actual, expected) in actual.iter().zip(&probabilities) {
                assert!(
                    (actual / expected - 1.0).abs() < 1e-5,
                    "{actual} instead of {expected}"
                );
            }
        }
    }

    #[test]
    fn the_model_folder_is_complete_and_deterministic() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let bandit = Bandit::new(&[0.5, 0.3, 0.2]).unwrap();
        bandit.write_model(first.path()).unwrap();
        bandit.write_model(second.path()).unwrap();
        for name in [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
            assert_eq!(read(first.path()), read(second.path()), "{name}");
        }
        let config: Value =
            serde_json::from_slice(&std::fs::read(first.path().join("config.json")).unwrap())
                .unwrap();
        assert_eq!(
            (&config["vocab_size"], &config["bos_token_id"]),
            (&json!(3), &json!(0))
        );
        assert!(config.get("eos_token_id").unwrap().is_null());
        let tokenizer = Tokenizer::from_file(first.path().join("tokenizer.json")).unwrap();
        assert_eq!(
            tokenizer.encode("arm0 arm2", true).unwrap().get_ids(),
            [0, 2]
        );
        assert_eq!(tokenizer.decode(&[1, 2], true).unwrap(), "arm1 arm2");
    }

    #[test]
    fn invalid_distributions_are_rejected() {
        for (probabilities, message) in [
            (
                vec![1.0],
                "model.reference_probabilities has 1 arms; give 2 to 64",
            ),
            (
                vec![1.0 / 65.0; 65],
                "model.reference_probabilities has 65 arms",
            ),
            (
                vec![1.0, 0.0],
                "model.reference_probabilities gives arm 1 probability 0;",
            ),
            (
                vec![1.5, -0.5],
                "model.reference_probabilities gives arm 1 probability -0.5;",
            ),
            (
                vec![f64::NAN, 0.5],
                "model.reference_probabilities gives arm 0 probability NaN;",
            ),
            (
                vec![0.5, 0.25],
                "model.reference_probabilities sums to 0.75; it must sum to 1",
            ),
        ] {
            let error = Bandit::new(&probabilities).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        assert!(Bandit::new(&[0.5, 0.5 - 5e-7]).is_ok());
    }
}
