//! Models in GGUF files: metadata, tokenizer, chat template, tensors; opened, unpacked and loaded.

use std::{fs, path::Path};

use model::{DType, Device, GgufModel, LanguageModel, ModelError, ModelFolder};

use crate::targets::{Input, Outcome};

/// Name of every mutant, which errors must contain.
const MUTANT: &str = "mutant.gguf";

const WIDTH: u64 = 32;
const INNER: u64 = 64;
const KEYS: u64 = 16;
const VOCAB: [&str; 8] = ["<unk>", "<s>", "</s>", "a", "b", "▁", "ab", "▁ab"];

/// A value of the metadata.
enum MetadataValue {
    Unsigned(u32),
    Float(f32),
    Text(&'static str),
    Texts(&'static [&'static str]),
    Numbers([u32; 8]),
    Scores([f32; 8]),
}

/// A file in the making.
struct GgufBytes(Vec<u8>);

impl GgufBytes {
    fn number(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    fn long(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.long(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    /// A list of eight values of the type with this number.
    fn list<T>(&mut self, kind: u32, values: &[T], put: impl Fn(&mut Self, &T)) {
        self.number(9);
        self.number(kind);
        self.long(values.len() as u64);
        values.iter().for_each(|value| put(self, value));
    }

    fn value(&mut self, value: &MetadataValue) {
        match value {
            MetadataValue::Unsigned(value) => {
                self.number(4);
                self.number(*value);
            }
            MetadataValue::Float(value) => {
                self.number(6);
                self.number(value.to_bits());
            }
            MetadataValue::Text(text) => {
                self.number(8);
                self.text(text);
            }
            MetadataValue::Texts(texts) => self.list(8, texts, |file, text| file.text(text)),
            MetadataValue::Numbers(values) => {
                self.list(4, values, |file, value| file.number(*value));
            }
            MetadataValue::Scores(values) => {
                self.list(6, values, |file, value| file.number(value.to_bits()));
            }
        }
    }

    /// A model of one block with a SentencePiece vocabulary, in f32.
    fn model() -> Self {
        let mut file = Self(b"GGUF".to_vec());
        let (metadata, tensors) = (metadata(), tensors());
        file.number(3);
        file.long(tensors.len() as u64);
        file.long(metadata.len() as u64);
        for (key, value) in &metadata {
            file.text(key);
            file.value(value);
        }
        let mut offset = 0;
        for (name, dims) in &tensors {
            file.text(name);
            file.number(dims.len() as u32);
            dims.iter().for_each(|&dim| file.long(dim));
            file.number(0);
            file.long(offset);
            offset += (4 * dims.iter().product::<u64>()).next_multiple_of(32);
        }
        let start = file.0.len().next_multiple_of(32);
        file.0.resize(start, 0);
        for index in 0..offset / 4 {
            file.number((((index * 37) % 113) as f32 / 300.0 - 0.2).to_bits());
        }
        file
    }
}

fn metadata() -> Vec<(&'static str, MetadataValue)> {
    use MetadataValue::{Float, Numbers, Scores, Text, Texts, Unsigned};
    vec![
        ("general.architecture", Text("llama")),
        ("general.alignment", Unsigned(32)),
        ("llama.block_count", Unsigned(1)),
        ("llama.context_length", Unsigned(64)),
        ("llama.embedding_length", Unsigned(WIDTH as u32)),
        ("llama.feed_forward_length", Unsigned(INNER as u32)),
        ("llama.attention.head_count", Unsigned(2)),
        ("llama.attention.head_count_kv", Unsigned(1)),
        ("llama.attention.layer_norm_rms_epsilon", Float(1e-5)),
        ("llama.rope.freq_base", Float(10_000.0)),
        ("tokenizer.ggml.model", Text("llama")),
        ("tokenizer.ggml.tokens", Texts(&VOCAB)),
        (
            "tokenizer.ggml.token_type",
            Numbers([2, 3, 3, 1, 1, 1, 1, 1]),
        ),
        (
            "tokenizer.ggml.scores",
            Scores([0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -1.0, -2.0]),
        ),
        ("tokenizer.ggml.unknown_token_id", Unsigned(0)),
        ("tokenizer.ggml.bos_token_id", Unsigned(1)),
        ("tokenizer.ggml.eos_token_id", Unsigned(2)),
        (
            "tokenizer.chat_template",
            Text("{% for m in messages %}{{ m.content }}</s>{% endfor %}"),
        ),
    ]
}

/// Names of the tensors, and their dimensions, the innermost first.
fn tensors() -> Vec<(&'static str, Vec<u64>)> {
    vec![
        ("token_embd.weight", vec![WIDTH, VOCAB.len() as u64]),
        ("output_norm.weight", vec![WIDTH]),
        ("blk.0.attn_norm.weight", vec![WIDTH]),
        ("blk.0.ffn_norm.weight", vec![WIDTH]),
        ("blk.0.attn_q.weight", vec![WIDTH, WIDTH]),
        ("blk.0.attn_k.weight", vec![WIDTH, KEYS]),
        ("blk.0.attn_v.weight", vec![WIDTH, KEYS]),
        ("blk.0.attn_output.weight", vec![WIDTH, WIDTH]),
        ("blk.0.ffn_gate.weight", vec![WIDTH, INNER]),
        ("blk.0.ffn_up.weight", vec![WIDTH, INNER]),
        ("blk.0.ffn_down.weight", vec![INNER, WIDTH]),
    ]
}

/// Opens the file, unpacks it beside itself, and loads the folder.
fn load(path: &Path) -> Result<(), ModelError> {
    let model = GgufModel::open(path)?;
    let folder = path.with_file_name(format!("of-{MUTANT}"));
    model.unpack(&folder)?;
    let loaded = ModelFolder::open(&folder, None).and_then(|folder| {
        let weights = folder.weights(DType::F32, &Device::Cpu)?;
        LanguageModel::new(folder.config, weights).map(drop)
    });
    fs::remove_dir_all(&folder).expect("a folder in a temporary directory");
    loaded
}

pub(super) fn prepare(scratch: &Path) -> Input {
    let path = scratch.join(MUTANT);
    let GgufBytes(valid) = GgufBytes::model();
    fs::write(&path, &valid).expect("a file in a temporary directory");
    load(&path).expect("a valid file");
    // The header is what most mutants should be of.
    let weights: u64 = tensors()
        .iter()
        .map(|(_, dims)| 4 * dims.iter().product::<u64>())
        .sum();
    let header = valid.len() - weights as usize;
    Box::new(move |mutator| {
        let mutant = match mutator.below(8) {
            0 => mutator.bytes(&valid),
            _ => [&mutator.bytes(&valid[..header]), &valid[header..]].concat(),
        };
        fs::write(&path, mutant).expect("a file in a temporary directory");
        Outcome::of(load(&path), &[MUTANT])
    })
}
