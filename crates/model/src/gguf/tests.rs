//! Files that are written here, with values known by hand. A real model is read in `tests/tests/gguf.rs`.

use std::{collections::BTreeMap, io::Write};

use candle_core::quantized::QTensor;

use super::*;
use crate::{folder::ModelFolder, gguf::header::MetadataValue, transformer::LanguageModel};

/// Parts of a GGUF file of a small model.
struct SmallFile {
    metadata: BTreeMap<String, MetadataValue>,
    tensors: Vec<(String, Tensor, GgmlDType)>,
}

const HEADS: usize = 2;
const HIDDEN: usize = 32;

fn text(value: &str) -> MetadataValue {
    MetadataValue::Text(value.into())
}

fn texts(values: &[&str]) -> MetadataValue {
    MetadataValue::Array(values.iter().map(|value| text(value)).collect())
}

/// A deterministic matrix.
fn matrix(rows: usize, columns: usize, seed: usize) -> Tensor {
    let value = |i: usize| (((i * 37 + seed * 101) % 113) as f32 - 56.0) / 300.0;
    let values: Vec<f32> = (0..rows * columns).map(value).collect();
    Tensor::from_vec(values, (rows, columns), &CPU).unwrap()
}

/// llama.cpp's permutation of the rows of queries and keys.
fn permuted(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, columns) = weight.dims2().unwrap();
    let split = weight
        .reshape((heads, 2, rows / heads / 2, columns))
        .unwrap();
    split
        .transpose(1, 2)
        .unwrap()
        .contiguous()
        .unwrap()
        .reshape((rows, columns))
        .unwrap()
}

impl SmallFile {
    /// A model of one block with a SentencePiece vocabulary.
    fn new() -> Self {
        let mut metadata = BTreeMap::new();
        let mut set = |key: &str, value: MetadataValue| metadata.insert(key.to_owned(), value);
        set("general.architecture", text("llama"));
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", HIDDEN as u64),
            ("feed_forward_length", 64),
            ("attention.head_count", HEADS as u64),
            ("attention.head_count_kv", 1),
        ] {
            set(&format!("llama.{key}"), MetadataValue::Unsigned(value));
        }
        set(
            "llama.attention.layer_norm_rms_epsilon",
            MetadataValue::Float(1e-5),
        );
        set("tokenizer.ggml.model", text("llama"));
        set(
            "tokenizer.ggml.tokens",
            texts(&["<unk>", "<s>", "</s>", "a", "b", "▁", "ab", "▁ab"]),
        );
        let kinds = [2, 3, 3, 1, 1, 1, 1, 1].map(MetadataValue::Unsigned);
        set(
            "tokenizer.ggml.token_type",
            MetadataValue::Array(kinds.into()),
        );
        let scores = [0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -1.0, -2.0].map(MetadataValue::Float);
        set("tokenizer.ggml.scores", MetadataValue::Array(scores.into()));
        for (key, id) in [("unknown", 0), ("bos", 1), ("eos", 2)] {
            set(
                &format!("tokenizer.ggml.{key}_token_id"),
                MetadataValue::Unsigned(id),
            );
        }
        set(
            "tokenizer.chat_template",
            text("{% for m in messages %}{{ m.content }}</s>{% endfor %}"),
        );
        let ones = Tensor::ones(HIDDEN, DType::F32, &CPU).unwrap();
        let part = |name: &str, tensor: Tensor, dtype| (name.to_owned(), tensor, dtype);
        let tensors = vec![
            part("token_embd.weight", matrix(8, HIDDEN, 1), GgmlDType::F32),
            part("output_norm.weight", ones.clone(), GgmlDType::F32),
            part("blk.0.attn_norm.weight", ones.clone(), GgmlDType::F32),
            part("blk.0.ffn_norm.weight", ones, GgmlDType::F32),
            part(
                "blk.0.attn_q.weight",
                permuted(&matrix(HIDDEN, HIDDEN, 2), HEADS),
                GgmlDType::F32,
            ),
            part(
                "blk.0.attn_k.weight",
                permuted(&matrix(16, HIDDEN, 3), 1),
                GgmlDType::F32,
            ),
            part("blk.0.attn_v.weight", matrix(16, HIDDEN, 4), GgmlDType::F16),
            part(
                "blk.0.attn_output.weight",
                matrix(HIDDEN, HIDDEN, 5),
                GgmlDType::Q8_0,
            ),
            part(
                "blk.0.ffn_gate.weight",
                matrix(64, HIDDEN, 6),
                GgmlDType::Q4_1,
            ),
            part("blk.0.ffn_up.weight", matrix(64, HIDDEN, 7), GgmlDType::F32),
            part(
                "blk.0.ffn_down.weight",
                matrix(HIDDEN, 64, 8),
                GgmlDType::F32,
            ),
        ];
        Self { metadata, tensors }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        let put_text = |out: &mut Vec<u8>, text: &str| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        };
        fn kind(value: &MetadataValue) -> u32 {
            match value {
                MetadataValue::Unsigned(_) => 4,
                MetadataValue::Signed(_) => 11,
                MetadataValue::Float(_) => 6,
                MetadataValue::Bool(_) => 7,
                MetadataValue::Text(_) => 8,
                MetadataValue::Array(_) => 9,
            }
        }
        fn put(out: &mut Vec<u8>, value: &MetadataValue) {
            match value {
                MetadataValue::Unsigned(value) => out.extend((*value as u32).to_le_bytes()),
                MetadataValue::Signed(value) => out.extend(value.to_le_bytes()),
                MetadataValue::Float(value) => out.extend((*value as f32).to_le_bytes()),
                MetadataValue::Bool(value) => out.push(u8::from(*value)),
                MetadataValue::Text(text) => {
                    out.extend((text.len() as u64).to_le_bytes());
                    out.extend(text.as_bytes());
                }
                MetadataValue::Array(values) => {
                    out.extend(values.first().map_or(4, kind).to_le_bytes());
                    out.extend((values.len() as u64).to_le_bytes());
                    values.iter().for_each(|value| put(out, value));
                }
            }
        }
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            out.extend(kind(value).to_le_bytes());
            put(&mut out, value);
        }
        let mut data: Vec<u8> = Vec::new();
        for (name, tensor, dtype) in &self.tensors {
            put_text(&mut out, name);
            let dims = tensor.dims();
            out.extend((dims.len() as u32).to_le_bytes());
            for dim in dims.iter().rev() {
                out.extend((*dim as u64).to_le_bytes());
            }
            let number: u32 = match dtype {
                GgmlDType::F32 => 0,
                GgmlDType::F16 => 1,
                GgmlDType::Q4_1 => 3,
                GgmlDType::Q8_0 => 8,
                other => panic!("{other:?} is not written here"),
            };
            out.extend(number.to_le_bytes());
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend((data.len() as u64).to_le_bytes());
            let quantised = QTensor::quantize(tensor, *dtype).unwrap();
            data.extend(&*quantised.data().unwrap());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// Opens the file with these bytes.
fn opened(folder: &tempfile::TempDir, bytes: &[u8]) -> Result<GgufModel, String> {
    let path = folder.path().join("small.gguf");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(bytes).unwrap();
    GgufModel::open(&path).map_err(|error| error.to_string())
}

#[test]
fn a_small_file_becomes_a_folder_with_the_same_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let small = SmallFile::new();
    let model = opened(&directory, &small.bytes()).unwrap();
    let folder = directory.path().join("unpacked");
    model.unpack(&folder).unwrap();
    let opened = ModelFolder::open(&folder, None).unwrap();
    assert_eq!((opened.config.vocab_size, opened.config.layers), (8, 1));
    assert!(opened.config.tied_head);
    let weights = opened.weights(DType::F32, &CPU).unwrap();
    LanguageModel::new(opened.config.clone(), weights).unwrap();
    let saved = candle_core::safetensors::load(folder.join("model.safetensors"), &CPU).unwrap();
    let values = |name: &str| {
        saved[name]
            .to_dtype(DType::F32)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap()
    };
    let expected = |rows, columns, seed| matrix(rows, columns, seed).to_vec2::<f32>().unwrap();
    assert_eq!(
        values("model.layers.0.self_attn.q_proj.weight"),
        expected(HIDDEN, HIDDEN, 2)
    );
    assert_eq!(
        values("model.layers.0.self_attn.k_proj.weight"),
        expected(16, HIDDEN, 3)
    );
    assert_eq!(
        saved["model.layers.0.self_attn.v_proj.weight"].dtype(),
        DType::F16
    );
    for (name, rows, seed, bound) in [
        ("self_attn.o_proj", HIDDEN, 5, 1e-3),
        ("mlp.gate_proj", 64, 6, 1.5e-2),
    ] {
        let found = values(&format!("model.layers.0.{name}.weight"));
        let differences = found
            .iter()
            .flatten()
            .zip(expected(rows, HIDDEN, seed).into_iter().flatten());
        let largest = differences.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest > 0.0 && largest < bound, "{name}: {largest}");
    }
    // An adapter trained on it names the file.
    let base = crate::lora::BaseModel::of_folder(&folder);
    assert!(base.name.ends_with("small.gguf"), "{base:?}");
    // What is unpacked at once twice is whole.
    model.unpack(&folder).unwrap();
    let left = fs::read_dir(directory.path()).unwrap();
    assert_eq!(left.count(), 2, "the file and the folder");
}

/// The merges of transformers' `SentencePieceExtractor` for these scores, by hand: `a`+`b` (-1), `▁`+`ab` (-2).
#[test]
fn a_sentence_piece_vocabulary_merges_by_score() {
    let directory = tempfile::tempdir().unwrap();
    let model = opened(&directory, &SmallFile::new().bytes()).unwrap();
    let merges = &model.tokenizer.tokenizer["model"]["merges"];
    assert_eq!(merges, &json!([["a", "b"], ["▁", "ab"]]));
    let folder = directory.path().join("unpacked");
    model.unpack(&folder).unwrap();
    let tokenizer = ModelFolder::open(&folder, None).unwrap().tokenizer;
    let ids = |text: &str| {
        tokenizer
            .encode_prompt(&messages::PromptText::Text(text.into()))
            .unwrap()
    };
    assert_eq!(ids("ab"), [1, 7]);
    assert_eq!(ids("ab b"), [1, 7, 5, 4]);
    assert_eq!(tokenizer.stops().turn_end(), Some(2));
}

/// The file is refused with an error that names it and says this.
fn assert_refused(small: &SmallFile, says: &str) {
    let directory = tempfile::tempdir().unwrap();
    let error = opened(&directory, &small.bytes()).err().unwrap_or_default();
    let is_named = error.contains(says) && error.contains("small.gguf");
    assert!(is_named, "no {says:?} in {error:?}");
}

/// The file with this value of the key, or without it, is refused with an error that says this.
fn assert_refused_with(key: &str, value: Option<MetadataValue>, says: &str) {
    let mut small = SmallFile::new();
    match value {
        Some(value) => small.metadata.insert(key.into(), value),
        None => small.metadata.remove(key),
    };
    assert_refused(&small, says);
}

#[test]
fn metadata_that_is_not_understood_is_refused_by_name() {
    let number = |value| Some(MetadataValue::Unsigned(value));
    for (key, value, says) in [
        ("general.architecture", Some(text("gemma")), "\"gemma\""),
        ("llama.expert_count", number(8), "llama.expert_count"),
        (
            "llama.rope.scaling.type",
            Some(text("longrope")),
            "longrope",
        ),
        (
            "llama.rope.dimension_count",
            number(8),
            "rope.dimension_count is 8",
        ),
        ("llama.block_count", None, "llama.block_count"),
        (
            "llama.vocab_size",
            number(9),
            "its llama.vocab_size is 9, and its embedding has 8 rows",
        ),
        (
            "general.architecture",
            None,
            "it has no general.architecture",
        ),
        ("tokenizer.ggml.model", Some(text("bert")), "\"bert\""),
        ("split.count", number(2), "part 1 of 2 of a model"),
        (
            "general.type",
            Some(text("adapter")),
            "general.type is \"adapter\"",
        ),
        (
            "llama.rope.scaling.type",
            number(1),
            "llama.rope.scaling.type is not a text",
        ),
    ] {
        assert_refused_with(key, value, says);
    }
}

#[test]
fn vocabularies_that_are_not_understood_are_refused_by_name() {
    let number = |value| Some(MetadataValue::Unsigned(value));
    for (key, value, says) in [
        (
            "tokenizer.ggml.add_eos_token",
            Some(MetadataValue::Bool(true)),
            "add_eos_token",
        ),
        (
            "tokenizer.ggml.bos_token_id",
            None,
            "no tokenizer.ggml.bos_token_id",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            number(99),
            "tokenizer.ggml.eos_token_id is 99, and its vocabulary has 8 tokens",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            number(3),
            "tokenizer.ggml.eos_token_id is 3, which is a text by tokenizer.ggml.token_type (1)",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            None,
            "it has no tokenizer.ggml.eos_token_id",
        ),
        (
            "tokenizer.ggml.token_type",
            None,
            "it has no tokenizer.ggml.token_type",
        ),
        (
            "tokenizer.ggml.lowercase",
            Some(MetadataValue::Bool(true)),
            "it has tokenizer.ggml.lowercase, which is not supported",
        ),
        (
            "tokenizer.ggml.scores",
            None,
            "it has no tokenizer.ggml.scores",
        ),
        (
            "tokenizer.ggml.scores",
            Some(MetadataValue::Array(vec![
                MetadataValue::Float(f64::NAN);
                8
            ])),
            "tokenizer.ggml.scores: that of token 0 is not finite",
        ),
        (
            "tokenizer.ggml.add_bos_token",
            Some(text("false")),
            "tokenizer.ggml.add_bos_token is not true or false",
        ),
        (
            "tokenizer.chat_template",
            Some(texts(&["a", "b"])),
            "tokenizer.chat_template is not a text",
        ),
        (
            "tokenizer.ggml.tokens",
            Some(texts(&["<unk>", "<s>", "</s>", "a", "b", "▁", "ab", "a"])),
            "its tokens 3 and 7 have the same text, \"a\"",
        ),
    ] {
        assert_refused_with(key, value, says);
    }
    let mut other = SmallFile::new();
    other
        .metadata
        .insert("tokenizer.ggml.model".into(), text("gpt2"));
    other
        .metadata
        .insert("tokenizer.ggml.pre".into(), text("tekken"));
    assert_refused(&other, "\"tekken\"");
    other.metadata.remove("tokenizer.ggml.pre");
    assert_refused(&other, "it has no tokenizer.ggml.pre");
}

#[test]
fn tensors_that_the_model_does_not_have_are_refused_by_name() {
    let mut twice = SmallFile::new();
    twice.tensors.push(twice.tensors[2].clone());
    assert_refused(&twice, "the tensor blk.0.attn_norm.weight twice");
    let mut without = SmallFile::new();
    without.tensors.remove(6);
    assert_refused(
        &without,
        "no tensor for model.layers.0.self_attn.v_proj.weight, of shape [16, 32]",
    );
    let mut wider = SmallFile::new();
    wider.tensors[6].1 = matrix(32, HIDDEN, 4);
    assert_refused(
        &wider,
        "its tensor blk.0.attn_v.weight has shape [32, 32], its metadata says [16, 32]",
    );
    for name in [
        "blk.0.attn_q.bias",
        "blk.01.attn_q.weight",
        "blk.1.attn_q.weight",
    ] {
        let mut small = SmallFile::new();
        small.tensors[4].0 = name.into();
        assert_refused(&small, name);
    }
}

/// Whole numbers are numbers, -1 is no token, and where nothing is put before a text no token is needed.
#[test]
fn other_ways_to_write_the_same_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let mut small = SmallFile::new();
    let mut set = |key: &str, value| small.metadata.insert(key.to_owned(), value);
    set("llama.rope.freq_base", MetadataValue::Unsigned(10_000));
    set(
        "tokenizer.ggml.padding_token_id",
        MetadataValue::Unsigned(u64::from(u32::MAX)),
    );
    set("tokenizer.ggml.add_bos_token", MetadataValue::Bool(false));
    set(
        "tokenizer.ggml.remove_extra_whitespaces",
        MetadataValue::Bool(false),
    );
    set(
        "tokenizer.ggml.fim_pre_token_id",
        MetadataValue::Unsigned(3),
    );
    small.metadata.remove("tokenizer.ggml.bos_token_id");
    let model = opened(&directory, &small.bytes()).unwrap();
    assert_eq!(model.config["rope_theta"], json!(10_000.0));
    assert_eq!(model.tokenizer.tokenizer["post_processor"], Value::Null);
    assert!(model.tokenizer.settings.get("pad_token").is_none());
}

/// Elements are kept only of arrays that are read: they take many times the memory of the file.
#[test]
fn arrays_that_are_not_read_are_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let mut small = SmallFile::new();
    let many = MetadataValue::Array(vec![MetadataValue::Unsigned(7); 100]);
    small.metadata.insert("general.tags".into(), many);
    let model = opened(&directory, &small.bytes()).unwrap();
    let kept = &model.header.metadata["general.tags"];
    assert_eq!(kept, &MetadataValue::Array(Vec::new()));
}

#[test]
fn a_folder_that_is_not_whole_is_unpacked_again() {
    let directory = tempfile::tempdir().unwrap();
    let model = opened(&directory, &SmallFile::new().bytes()).unwrap();
    let folder = directory.path().join("unpacked");
    assert!(!model.is_unpacked_in(&folder));
    let shortened = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 1])
    };
    for damaged in ["model.safetensors", "tokenizer.json", "config.json"] {
        let path = folder.join(damaged);
        for shorten in [false, true] {
            model.unpack(&folder).unwrap();
            assert!(model.is_unpacked_in(&folder));
            match shorten {
                true => shortened(&path).unwrap(),
                false => fs::remove_file(&path).unwrap(),
            }
            assert!(!model.is_unpacked_in(&folder), "{damaged}");
        }
    }
    model.unpack(&folder).unwrap();
    ModelFolder::open(&folder, None).unwrap();
    let left = fs::read_dir(directory.path()).unwrap();
    assert_eq!(left.count(), 2, "the file and the folder");
}

/// What `agon check` reads: no weights are needed, and mistakes are those of the unpacked folder.
#[test]
fn a_description_opens_as_a_folder_without_weights() {
    let directory = tempfile::tempdir().unwrap();
    let model = opened(&directory, &SmallFile::new().bytes()).unwrap();
    let folder = directory.path().join("description");
    fs::create_dir(&folder).unwrap();
    model.describe(&folder).unwrap();
    let described = ModelFolder::open(&folder, None).unwrap();
    assert_eq!(described.config.vocab_size, 8);
    assert!(described.check_weights().is_err(), "it has none");
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let model = opened(&directory, &SmallFile::new().bytes()).unwrap();
    let own = format!(".partial-{}-other", std::process::id());
    // No process has this id: it is above the largest of Linux.
    for left in [".partial-4194305-other", &own, ".partial-x"] {
        fs::create_dir(directory.path().join(left)).unwrap();
    }
    model.unpack(&directory.path().join("unpacked")).unwrap();
    let is_left = |name: &str| directory.path().join(name).exists();
    assert!(!is_left(".partial-4194305-other"));
    assert!(is_left(&own) && is_left(".partial-x"));
}

#[test]
fn errors_of_an_unpacked_folder_name_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let model = opened(&directory, &SmallFile::new().bytes()).unwrap();
    let folder = directory.path().join("unpacked");
    model.unpack(&folder).unwrap();
    fs::write(folder.join("config.json"), "{").unwrap();
    let error = ModelFolder::open(&folder, None).err().unwrap().to_string();
    let origin = format!("unpacked from {}", model.path.display());
    assert!(
        error.contains("config.json") && error.ends_with(&origin),
        "{error}"
    );
}

/// A file that promises more than it has allocates nothing and is refused.
#[test]
fn damaged_files_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let whole = SmallFile::new().bytes();
    for length in (0..whole.len()).step_by(61) {
        let error = opened(&directory, &whole[..length]).err();
        assert!(error.is_some(), "cut off at {length} of {}", whole.len());
    }
    for place in (0..whole.len().min(4000)).step_by(31) {
        let mut damaged = whole.clone();
        damaged[place] = damaged[place].wrapping_add(0x7f);
        // Many places hold free text; what counts is that nothing panics or takes all memory.
        drop(opened(&directory, &damaged));
    }
    let mut big_endian = whole.clone();
    big_endian[4..8].copy_from_slice(&3u32.to_be_bytes());
    let refused = opened(&directory, &big_endian).err().unwrap_or_default();
    assert!(refused.contains("big-endian"), "{refused}");
    let mut huge = whole;
    huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(
        opened(&directory, &huge)
            .err()
            .is_some_and(|error| error.contains("tensors"))
    );
}

/// The factors of Llama 3.2 1B: factor 32 on a context of 8,192, θ = 500,000, 64 dimensions a head.
#[test]
fn llama3_frequencies_are_recognised_by_their_factors() {
    let header = |dimensions: u64| {
        let small = SmallFile::new();
        let mut metadata = small.metadata;
        metadata.insert(
            "llama.embedding_length".into(),
            MetadataValue::Unsigned(2 * dimensions),
        );
        metadata.insert(
            "llama.rope.freq_base".into(),
            MetadataValue::Float(500_000.0),
        );
        GgufHeader {
            metadata,
            tensors: Vec::new(),
        }
    };
    let factors: Vec<f32> = (0..32)
        .map(|index| {
            let wavelength = 2.0 * std::f64::consts::PI * 500_000f64.powf(f64::from(index) / 32.0);
            let smooth = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32
        })
        .collect();
    let header = header(64);
    let architecture = config::architecture(&header).unwrap();
    let (config, _) = config::config(&header, architecture, Some(&factors)).unwrap();
    let scaling = &config["rope_scaling"];
    assert_eq!(
        (scaling["rope_type"].as_str(), scaling["factor"].as_f64()),
        (Some("llama3"), Some(32.0))
    );
    let mut others = factors;
    others[20] *= 1.5;
    assert!(config::config(&header, architecture, Some(&others)).is_err());
}
