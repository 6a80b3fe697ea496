//! Pretrained encoder classifiers that map a text to one score. They are not trained here.
//!
//! The networks are those of candle-transformers, in f32. Promises that padding changes a score by rounding only. Does
//! not know what the scores are used for.

mod deberta_v2;
#[cfg(test)]
mod fixtures;
mod modern_bert;
mod tensors;

use std::{fmt, path::Path};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::{Map, Value};

use crate::{
    config::{layers, read_json, size},
    error::ModelError,
    guarded_tokenizer::GuardedTokenizer,
    keys::{self, AttentionMask},
    shards::{Shards, is_ignorable},
    tokenizer::load_tokenizer,
};
use deberta_v2::DebertaV2Classifier;
use modern_bert::ModernBertClassifier;
use panic_guard::guarded;
use tensors::{RecordingBackend, TensorSource};

/// Supported encoder architectures, as `config.json` names them.
pub const SUPPORTED_ENCODERS: [&str; 2] = [
    "DebertaV2ForSequenceClassification",
    "ModernBertForSequenceClassification",
];

/// Maximum number of tokens in a forward pass, padding included; a longer text is alone in one.
const MAX_PASS_TOKENS: usize = 8192;

/// Largest number of positions, whatever the configuration says: networks make tables of all positions.
const MAX_POSITIONS: usize = 1 << 15;

/// An encoder with a single-label classification head, and its tokenizer.
pub struct Encoder {
    network: EncoderNetwork,
    tokenizer: GuardedTokenizer,
    vocab_size: usize,
    max_positions: usize,
    device: Device,
}

/// Network by architecture.
enum EncoderNetwork {
    DebertaV2(Box<DebertaV2Classifier>),
    ModernBert(Box<ModernBertClassifier>),
}

/// An encoder folder, without its weights.
struct EncoderFolder {
    raw: Value,
    architecture: EncoderArchitecture,
    vocab_size: usize,
    max_positions: usize,
    tokenizer: GuardedTokenizer,
    shards: Shards,
}

impl EncoderFolder {
    fn read(path: &Path) -> Result<Self, ModelError> {
        let file = path.join("config.json");
        let raw = read_json(&file)?;
        let architecture = architecture_of(&raw, &file)?;
        let malformed = |reason: String| ModelError::Malformed {
            path: file.clone(),
            reason,
        };
        let number = |key: &str| {
            let number = size(&raw, key).map_err(malformed)?;
            number.ok_or_else(|| malformed(format!("{key} is missing")))
        };
        number("intermediate_size")?;
        let (width, heads) = (number("hidden_size")?, number("num_attention_heads")?);
        if !width.is_multiple_of(heads) {
            return Err(malformed(format!(
                "num_attention_heads = {heads} does not divide hidden_size = {width}"
            )));
        }
        layers(&raw).map_err(malformed)?;
        let (vocab_size, max_positions) =
            (number("vocab_size")?, number("max_position_embeddings")?);
        check_single_label(&raw).map_err(malformed)?;
        let ignored = keys::ignored(
            &raw,
            &[&READ, architecture.read],
            AttentionMask::Bidirectional,
        );
        let ignored = ignored.map_err(malformed)?;
        if !ignored.is_empty() {
            let (path, keys) = (file.display(), ignored.join(", "));
            tracing::warn!(%path, keys, "the configuration has keys that are not read");
        }
        Ok(Self {
            tokenizer: load_tokenizer(path, vocab_size)?,
            shards: Shards::open(path)?,
            raw,
            architecture,
            vocab_size,
            max_positions: max_positions.min(MAX_POSITIONS),
        })
    }

    /// Builds the network from these tensors; `path` identifies the folder in errors.
    fn network(
        &self,
        path: &Path,
        tensors: TensorSource,
        device: &Device,
    ) -> Result<EncoderNetwork, ModelError> {
        let (backend, used) = RecordingBackend::new(tensors);
        let tensors = VarBuilder::from_backend(Box::new(backend), DType::F32, device.clone());
        // candle panics on some configurations.
        let built = guarded(|| (self.architecture.build)(&self.raw, &tensors));
        let network = built
            .unwrap_or_else(|panic| Err(BuildError::Config(panic)))
            .map_err(|error| match error {
                BuildError::Config(reason) => ModelError::Malformed {
                    path: path.join("config.json"),
                    reason,
                },
                BuildError::Weights(error) => ModelError::Malformed {
                    path: path.to_owned(),
                    // candle appends a backtrace after the first line when backtraces are enabled.
                    reason: format!(
                        "its weights do not fit its config.json: {}",
                        error.to_string().lines().next().unwrap_or_default()
                    ),
                },
            })?;
        let is_used =
            |name: &str| used.contains(name) || is_ignorable(name, self.architecture.ignorable);
        self.shards.check_unused(is_used)?;
        Ok(network)
    }
}

impl Encoder {
    /// Validates that the folder `path` holds an encoder with its tokenizer, by the headers of its weights' files.
    /// Returns the maximum length of a text in tokens.
    ///
    /// # Errors
    /// As [`Self::load`], as far as the headers show.
    pub fn check_folder(path: &Path) -> Result<usize, ModelError> {
        let folder = EncoderFolder::read(path)?;
        folder.shards.check_unquantised()?;
        let shapes = TensorSource::Headers(folder.shards.shapes());
        folder.network(path, shapes, &Device::Cpu)?;
        Ok(folder.max_positions)
    }

    /// Loads the model in the folder `path` onto `device`.
    ///
    /// # Errors
    /// When a file is missing, truncated or contradicts the others, the architecture or one of its options is not
    /// supported, the weights are quantised or have an unexpected tensor, or the classifier does not have exactly one
    /// label.
    pub fn load(path: &Path, device: &Device) -> Result<Self, ModelError> {
        let folder = EncoderFolder::read(path)?;
        let tensors = TensorSource::Read(folder.shards.read_all(device)?);
        Ok(Self {
            network: folder.network(path, tensors, device)?,
            tokenizer: folder.tokenizer,
            vocab_size: folder.vocab_size,
            max_positions: folder.max_positions,
            device: device.clone(),
        })
    }

    /// Vocabulary size.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Maximum length of a text in tokens.
    #[must_use]
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Token ids of a text, with the special tokens that the tokenizer adds.
    ///
    /// # Errors
    /// When the tokenizer fails on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.tokenizer.ids(text, true)
    }

    /// One score per text, in order; special tokens are added.
    ///
    /// # Errors
    /// As [`Self::encode`] and [`Self::score_ids`].
    pub fn score_texts(&self, texts: &[String]) -> Result<Vec<f32>, ModelError> {
        let ids: Result<Vec<_>, _> = texts.iter().map(|text| self.encode(text)).collect();
        self.score_ids(&ids?)
    }

    /// One score per sequence, in order; special tokens are part of the sequences.
    ///
    /// # Errors
    /// When a sequence is empty, too long, or holds a token that is not in the vocabulary.
    pub fn score_ids(&self, sequences: &[Vec<u32>]) -> Result<Vec<f32>, ModelError> {
        for ids in sequences {
            self.check(ids)
                .map_err(|reason| ModelError::Tokens { reason })?;
        }
        let mut scores = Vec::with_capacity(sequences.len());
        let mut rest = sequences;
        while !rest.is_empty() {
            let (batch, remaining) = rest.split_at(batch_size(rest));
            scores.extend(self.forward(batch)?);
            rest = remaining;
        }
        Ok(scores)
    }

    fn check(&self, ids: &[u32]) -> Result<(), String> {
        let (vocab, positions) = (self.vocab_size, self.max_positions);
        if ids.is_empty() {
            Err("a text without tokens cannot be scored".into())
        } else if ids.len() > positions {
            let count = ids.len();
            Err(format!(
                "{count} tokens are more than the model's {positions} positions"
            ))
        } else if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            Err(format!(
                "token {id} is not in the model's vocabulary of {vocab}"
            ))
        } else {
            Ok(())
        }
    }

    /// Scores of these sequences in one padded forward pass.
    fn forward(&self, sequences: &[Vec<u32>]) -> Result<Vec<f32>, ModelError> {
        let width = longest(sequences);
        let padded = |of: &dyn Fn(&[u32]) -> Vec<u32>| {
            let rows = sequences.iter().map(|ids| {
                let mut row = of(ids);
                // The padding token is arbitrary, since its mask is 0.
                row.resize(width, 0);
                row
            });
            let values: Vec<u32> = rows.flatten().collect();
            Tensor::from_vec(values, (sequences.len(), width), &self.device)
        };
        let ids = padded(&<[u32]>::to_vec)?;
        let mask = padded(&|ids| vec![1; ids.len()])?;
        let scores = match &self.network {
            EncoderNetwork::DebertaV2(model) => model.forward(&ids, &mask)?,
            EncoderNetwork::ModernBert(model) => model.forward(&ids, &mask)?,
        };
        Ok(scores.squeeze(1)?.to_vec1()?)
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let architecture = match self.network {
            EncoderNetwork::DebertaV2(_) => SUPPORTED_ENCODERS[0],
            EncoderNetwork::ModernBert(_) => SUPPORTED_ENCODERS[1],
        };
        f.debug_struct("Encoder")
            .field("architecture", &architecture)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

/// Failure to build a network: an unsupported configuration or unsuitable tensors.
enum BuildError {
    Config(String),
    Weights(candle_core::Error),
}

impl From<String> for BuildError {
    fn from(reason: String) -> Self {
        Self::Config(reason)
    }
}

impl From<candle_core::Error> for BuildError {
    fn from(error: candle_core::Error) -> Self {
        Self::Weights(error)
    }
}

/// Function that builds a network from its `config.json` and tensors.
type Build = fn(&Value, &VarBuilder<'_>) -> Result<EncoderNetwork, BuildError>;

/// Keys of `config.json` that are read for every architecture.
const READ: [&str; 12] = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "id2label",
    "label2id",
    "num_labels",
    "tie_word_embeddings",
    "position_embedding_type",
    "layer_norm_eps",
];

/// An encoder architecture.
struct EncoderArchitecture {
    build: Build,
    /// Keys of `config.json` that are read in addition to [`READ`], or that do not affect a classifier's score.
    read: &'static [&'static str],
    /// Tensors of pretraining heads, which a classifier ignores.
    ignorable: &'static [&'static str],
}

/// Architecture named by `raw`, the content of `file`.
fn architecture_of(raw: &Value, file: &Path) -> Result<EncoderArchitecture, ModelError> {
    let named = raw["architectures"][0].as_str();
    let index = SUPPORTED_ENCODERS
        .iter()
        .position(|name| named == Some(*name));
    match index {
        Some(0) => Ok(deberta_v2::ARCHITECTURE),
        Some(1) => Ok(modern_bert::ARCHITECTURE),
        _ => Err(ModelError::Architecture {
            path: file.to_owned(),
            found: named.unwrap_or("(none is named)").to_owned(),
            supported: SUPPORTED_ENCODERS.to_vec(),
        }),
    }
}

fn check_single_label(raw: &Value) -> Result<(), String> {
    let named = raw["id2label"].as_object().map(Map::len);
    match named.or_else(|| usize::try_from(raw["num_labels"].as_u64()?).ok()) {
        None | Some(1) => Ok(()),
        Some(labels) => Err(format!(
            "it has {labels} labels; a judge needs exactly one, whose logit is the score"
        )),
    }
}

fn longest(sequences: &[Vec<u32>]) -> usize {
    sequences.iter().map(Vec::len).max().unwrap_or(0)
}

/// Number of leading sequences that fit one forward pass; at least one.
fn batch_size(sequences: &[Vec<u32>]) -> usize {
    let mut longest = 0;
    let fits = |(before, ids): &(usize, &Vec<u32>)| {
        longest = longest.max(ids.len());
        (before + 1) * longest <= MAX_PASS_TOKENS
    };
    sequences.iter().enumerate().take_while(fits).count().max(1)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::{
        fixtures::{modern_bert, sequences},
        *,
    };
    use crate::fixtures::shared;

    fn close(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= tolerance, "{f} is not {e}");
        }
    }

    /// Sequences of a fixture with the scores computed by transformers.
    fn expected_scores(path: &Path) -> (Vec<Vec<u32>>, Vec<f32>) {
        let text = fs::read_to_string(path.join("reference.json")).unwrap();
        let parity: Value = serde_json::from_str(&text).unwrap();
        let rows =
            |key: &str| -> Vec<Vec<u32>> { serde_json::from_value(parity[key].clone()).unwrap() };
        let sequences: Vec<Vec<u32>> = rows("ids")
            .iter()
            .zip(rows("attention_mask"))
            .map(|(ids, mask)| ids[..mask.iter().sum::<u32>() as usize].to_vec())
            .collect();
        let expected: Vec<f32> = serde_json::from_value(parity["scores"].clone()).unwrap();
        (sequences, expected)
    }

    /// The error that both the header check and loading the weights give.
    fn refused(path: &Path) -> String {
        let checked = Encoder::check_folder(path).unwrap_err().to_string();
        let read = Encoder::load(path, &Device::Cpu).unwrap_err().to_string();
        assert_eq!(read, checked);
        checked
    }

    #[test]
    fn header_checks_find_mismatching_tensors() {
        let cases = [
            ("num_hidden_layers", json!(5), "model.layers.4."),
            ("num_hidden_layers", json!(3), "model.layers.3."),
            (
                "num_hidden_layers",
                json!(1u64 << 40),
                "num_hidden_layers = ",
            ),
            ("num_attention_heads", json!(0), "num_attention_heads is 0"),
            ("intermediate_size", json!(13), "mlp.Wi.weight"),
            (
                "max_position_embeddings",
                json!(1u64 << 40),
                "max_position_embeddings = ",
            ),
        ];
        for (key, value, expected) in cases {
            let folder = modern_bert(|config| config[key] = value.clone());
            let message = refused(folder.path());
            assert!(message.contains(expected), "{message} for {key} = {value}");
        }
        let valid = modern_bert(|_| {});
        Encoder::check_folder(valid.path()).unwrap();
    }

    #[test]
    fn deberta_scores_match_transformers() {
        let Some(path) = shared("data/models/random-deberta-reward") else {
            return;
        };
        let (sequences, expected) = expected_scores(&path);
        let encoder = Encoder::load(&path, &Device::Cpu).unwrap();
        close(&encoder.score_ids(&sequences).unwrap(), &expected, 1e-4);
        // Scores do not depend on the batch and its padding.
        for (ids, score) in sequences.iter().zip(expected) {
            let alone = encoder.score_ids(std::slice::from_ref(ids)).unwrap();
            close(&alone, &[score], 1e-4);
        }
        let text = "Tom and his dog".to_owned();
        let ids = encoder.encode(&text).unwrap();
        assert_eq!(ids, [1, 274, 287, 269, 345, 400, 428]);
        assert_eq!(
            encoder.score_texts(&[text]).unwrap(),
            encoder.score_ids(&[ids]).unwrap()
        );
    }

    #[test]
    fn absolute_positions_are_added_to_every_text_of_a_batch() {
        let Some(path) = shared("data/models/random-deberta-reward") else {
            return;
        };
        // Zero position embeddings have no effect.
        let folder = tempfile::tempdir().unwrap();
        let mut config = read_json(&path.join("config.json")).unwrap();
        config["position_biased_input"] = json!(true);
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        fs::copy(
            path.join("tokenizer.json"),
            folder.path().join("tokenizer.json"),
        )
        .unwrap();
        let mut tensors = Shards::open(&path).unwrap().read_all(&Device::Cpu).unwrap();
        let positions = Tensor::zeros((256, 64), DType::F32, &Device::Cpu).unwrap();
        let name = "deberta.embeddings.position_embeddings.weight";
        tensors.insert(name.into(), positions);
        let weights = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&tensors, weights).unwrap();
        let encoder = Encoder::load(folder.path(), &Device::Cpu).unwrap();
        let (sequences, expected) = expected_scores(&path);
        close(&encoder.score_ids(&sequences).unwrap(), &expected, 1e-4);
    }

    /// Scores computed by transformers 5.23 for the same weights and sequences.
    const MODERN_BERT: [(&str, [f32; 3]); 2] = [
        ("cls", [1.349_434, -2.400_463, 1.382_954]),
        ("mean", [-1.784_403, -2.400_463, 0.395_866]),
    ];

    #[test]
    fn modern_bert_scores_match_transformers() {
        for (pooling, expected) in MODERN_BERT {
            let folder = modern_bert(|config| config["classifier_pooling"] = json!(pooling));
            let encoder = Encoder::load(folder.path(), &Device::Cpu).unwrap();
            close(&encoder.score_ids(&sequences()).unwrap(), &expected, 1e-4);
            for (ids, score) in sequences().into_iter().zip(expected) {
                close(&encoder.score_ids(&[ids]).unwrap(), &[score], 1e-4);
            }
        }
    }

    #[test]
    fn errors_name_what_cannot_be_loaded() {
        let refused = |change: &dyn Fn(&mut Value)| {
            let folder = modern_bert(change);
            Encoder::load(folder.path(), &Device::Cpu)
                .unwrap_err()
                .to_string()
        };
        let cases: [(&str, Value, &[&str]); 6] = [
            (
                "architectures",
                json!(["BertForSequenceClassification"]),
                &[
                    "BertForSequenceClassification",
                    "config.json",
                    "DebertaV2For",
                    "ModernBertFor",
                ],
            ),
            (
                "vocab_size",
                json!(null),
                &["config.json", "vocab_size is missing"],
            ),
            (
                "vocab_size",
                json!(7),
                &["largest token id is 7", "vocab_size is 7"],
            ),
            (
                "id2label",
                json!({"0": "a", "1": "b"}),
                &["it has 2 labels"],
            ),
            ("mlp_bias", json!(true), &["config.json", "mlp_bias = true"]),
            (
                "num_hidden_layers",
                json!(5),
                &[
                    "weights do not fit its config.json",
                    "model.layers.4.attn.Wqkv.weight",
                ],
            ),
        ];
        for (key, value, expected) in cases {
            let error = refused(&|config| config[key] = value.clone());
            for part in expected {
                assert!(error.contains(part), "{part:?} is not in {error}");
            }
        }
        for (key, value) in [
            ("rope_scaling", json!({"type": "yarn", "factor": 2.0})),
            ("logit_scale", json!(2)),
            ("quantization_config", json!({"quant_method": "fp8"})),
        ] {
            let error = refused(&|config| config[key] = value.clone());
            assert!(
                error.contains("config.json") && error.contains(key),
                "{error}"
            );
        }
        let folder = modern_bert(|_| {});
        fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let error = Encoder::load(folder.path(), &Device::Cpu)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("failed to read") && error.contains("model.safetensors"),
            "{error}"
        );
    }

    #[test]
    fn an_unused_tensor_is_refused() {
        for (name, expected) in [
            ("model.layers.0.attn.Wo.bias", "does not expect"),
            ("model.layers.0.attn.Wo.weight_scale", "is quantised"),
            ("decoder.bias", ""),
        ] {
            let folder = modern_bert(|_| {});
            let shards = Shards::open(folder.path()).unwrap();
            let mut tensors = shards.read_all(&Device::Cpu).unwrap();
            let tensor = Tensor::ones(16, DType::F32, &Device::Cpu).unwrap();
            tensors.insert(name.into(), tensor);
            let path = folder.path().join("model.safetensors");
            candle_core::safetensors::save(&tensors, path).unwrap();
            match Encoder::load(folder.path(), &Device::Cpu) {
                Ok(_) => assert!(expected.is_empty(), "{name} is accepted"),
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains(name) && error.contains(expected), "{error}");
                }
            }
        }
    }

    #[test]
    fn invalid_sequences_are_refused() {
        let folder = modern_bert(|_| {});
        let encoder = Encoder::load(folder.path(), &Device::Cpu).unwrap();
        for (ids, expected) in [
            (vec![], "a text without tokens"),
            (
                vec![0; 41],
                "41 tokens are more than the model's 40 positions",
            ),
            (
                vec![3, 24],
                "token 24 is not in the model's vocabulary of 24",
            ),
        ] {
            let refused = encoder.score_ids(&[vec![1], ids]).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
        assert_eq!(encoder.score_ids(&[]).unwrap(), [0f32; 0]);
        let scores = encoder.score_texts(&["the cat".into()]).unwrap();
        assert_eq!(scores, encoder.score_ids(&[vec![1, 2, 3]]).unwrap());
    }

    #[test]
    fn a_batch_is_limited_by_its_padded_size() {
        let passes = |lengths: &[usize]| {
            let sequences: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![0; n]).collect();
            let (mut rest, mut passes) = (&sequences[..], Vec::new());
            while !rest.is_empty() {
                passes.push(batch_size(rest));
                rest = &rest[passes[passes.len() - 1]..];
            }
            passes
        };
        assert_eq!(passes(&[MAX_PASS_TOKENS / 2, 1, 1]), [2, 1]);
        assert_eq!(passes(&[2 * MAX_PASS_TOKENS, 1, 1]), [1, 2]);
        assert_eq!(passes(&[1, 2 * MAX_PASS_TOKENS, 1]), [1, 1, 1]);
        assert_eq!(passes(&[4; 5]), [5]);
    }
}
