//! Folders of models, adapters and reward models: configuration, tokenizer, chat template, weights.

use std::{
    fs,
    hint::black_box,
    path::{Path, PathBuf},
};

use messages::{Dialogue, PromptText, Seed};
use model::{
    Adapter, AdapterFolder, DType, Device, LanguageModel, LoraConfig, ModelError, ModelFolder,
    RewardConfig, RewardFolder, RewardModel, Weights, save_policy,
};
use serde_json::{Value, json};
use system_tests::Mutator;

use crate::targets::{Input, Outcome};

/// Folder of every mutant, which errors must name, unless they name the key.
const MUTANT: &str = "mutant-folder";

/// A word-level tokenizer with the ids 0 to 7, which prepends `<s>`.
const TOKENIZER: &str = r#"{
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<unk>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false},
        {"id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false}
    ],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "x"}
    ]},
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    },
    "decoder": {"type": "WordPiece", "prefix": "!!", "cleanup": false},
    "model": {
        "type": "WordLevel",
        "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "<s>": 1, "the": 2, "cat": 3, "sat": 4, "on": 5, "a": 6, "mat": 7}
    }
}"#;

/// A byte-pair tokenizer of the same size.
const BPE_TOKENIZER: &str = r#"{
    "version": "1.0",
    "truncation": null,
    "padding": null,
    "added_tokens": [{"id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+|[a-z]+"}, "behavior": "Isolated", "invert": false},
    "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": "u", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "vocab": {"u": 0, "<s>": 1, "c": 2, "a": 3, "t": 4, "ca": 5, "cat": 6, "s": 7},
        "merges": [["c", "a"], ["ca", "t"]]}
}"#;

const TEMPLATE: &str = "{% for m in messages %}{{ m['content'] | trim }} {% endfor %}";

/// A file of a folder.
struct FolderFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// A folder whose files are mutated one at a time.
struct MutantFolder {
    path: PathBuf,
    files: Vec<FolderFile>,
}

impl MutantFolder {
    /// All files of the folder `path`.
    fn of(path: &Path) -> Self {
        let entries = fs::read_dir(path).expect("the folder was written");
        let paths = entries.map(|entry| entry.expect("a directory entry").path());
        let mut files: Vec<FolderFile> = paths
            .map(|path| FolderFile {
                bytes: fs::read(&path).expect("the file was written"),
                path,
            })
            .collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Self {
            path: path.to_owned(),
            files,
        }
    }

    /// The outcome of `open` with one file mutated.
    fn outcome(
        &self,
        mutator: &mut Mutator,
        open: impl Fn(&Path) -> Result<(), ModelError>,
    ) -> Outcome {
        let file = mutator.pick(&self.files);
        let mutant = file.mutant(mutator);
        fs::write(&file.path, mutant).expect("a file in a temporary directory");
        let outcome = Outcome::of(open(&self.path), &[MUTANT, "target modules"]);
        fs::write(&file.path, &file.bytes).expect("a file in a temporary directory");
        outcome
    }
}

impl FolderFile {
    fn mutant(&self, mutator: &mut Mutator) -> Vec<u8> {
        let extension = self
            .path
            .extension()
            .and_then(|extension| extension.to_str());
        match extension {
            Some("json") => {
                let value: Value = serde_json::from_slice(&self.bytes).expect("valid JSON");
                mutator.json_text(&value).into_bytes()
            }
            Some("jinja") => {
                let text = String::from_utf8_lossy(&self.bytes);
                mutator
                    .text(
                        &text,
                        &["{{", "}}", "{%", "%}", "|trim", "[::-1]", "(", "*9999999"],
                    )
                    .into_bytes()
            }
            _ if mutator.below(3) == 0 => mutator.bytes(&self.bytes),
            _ => safetensors_mutant(&self.bytes, mutator),
        }
    }
}

/// A safetensors file with a mutated header, whose length is mostly right.
fn safetensors_mutant(bytes: &[u8], mutator: &mut Mutator) -> Vec<u8> {
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let (header, tensors) = rest.split_at(length as usize);
    let header: Value = serde_json::from_slice(header).expect("a JSON header");
    let header = mutator.json_text(&header).into_bytes();
    let length = match mutator.below(8) {
        0 => u64::MAX - mutator.below(16) as u64,
        1 => header.len() as u64 + mutator.below(1 << 40) as u64,
        _ => header.len() as u64,
    };
    [&length.to_le_bytes()[..], &header, tensors].concat()
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16},
        "bos_token_id": 1, "eos_token_id": 1, "torch_dtype": "float32",
    })
}

/// Writes a model into the new folder `path`.
fn write_model(path: &Path, tokenizer: &str) -> ModelFolder {
    fs::create_dir(path).expect("a folder in a temporary directory");
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>", "add_bos_token": true,
    });
    let write = |name: &str, bytes: &[u8]| fs::write(path.join(name), bytes).expect("a file");
    write("config.json", config().to_string().as_bytes());
    write("tokenizer.json", tokenizer.as_bytes());
    write(
        "tokenizer_config.json",
        tokenizer_config.to_string().as_bytes(),
    );
    write(
        "generation_config.json",
        br#"{"eos_token_id": [1, 2], "temperature": 0.5}"#,
    );
    write(
        "special_tokens_map.json",
        br#"{"bos_token": {"content": "<s>"}, "eos_token": "<s>"}"#,
    );
    write("chat_template.jinja", TEMPLATE.as_bytes());
    let folder = ModelFolder::open(path, None).expect("a valid folder");
    let weights = Weights::initialise(&folder.config, Seed(7), DType::F32, &Device::Cpu);
    let blob = weights
        .and_then(|weights| weights.to_blob())
        .expect("memory is enough");
    write("model.safetensors", &blob);
    folder
}

/// Moves the weights of a model into a shard with an index.
fn shard(folder: &ModelFolder) {
    let shard = "model-00001-of-00001.safetensors";
    let path = &folder.path;
    fs::rename(path.join("model.safetensors"), path.join(shard)).expect("the file was written");
    let names = folder
        .config
        .tensors()
        .into_iter()
        .map(|(name, _)| (name, shard.into()));
    let map: serde_json::Map<String, Value> = names.collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(path.join("model.safetensors.index.json"), index.to_string()).expect("a file");
}

/// Opens a model, and uses every part of it.
fn open_model(path: &Path) -> Result<(), ModelError> {
    let folder = ModelFolder::open(path, None)?;
    use_tokenizer(&folder)?;
    folder.check_weights()?;
    let weights = folder.weights(DType::F32, &Device::Cpu)?;
    LanguageModel::new(folder.config, weights).map(drop)
}

fn use_tokenizer(folder: &ModelFolder) -> Result<(), ModelError> {
    let tokenizer = &folder.tokenizer;
    for text in ["the cat sat", "", "cat  \u{1f600}x\0"] {
        let prompt = PromptText::Text(text.into());
        let ids = tokenizer.encode_prompt(&prompt)?;
        tokenizer.encode_closed(&prompt, &ids, " a mat")?;
        black_box(tokenizer.decode_all(&ids));
    }
    tokenizer.encode_prompt(&PromptText::Dialogue(Dialogue::of_user("the cat")))?;
    Ok(())
}

pub(super) fn prepare(scratch: &Path) -> Input {
    let [words, pairs, sharded] = ["words", "pairs", "sharded"].map(|name| {
        let folder = scratch.join(name);
        fs::create_dir(&folder).expect("a folder in a temporary directory");
        folder.join(MUTANT)
    });
    write_model(&words, TOKENIZER);
    write_model(&pairs, BPE_TOKENIZER);
    shard(&write_model(&sharded, TOKENIZER));
    let folders = [&words, &pairs, &sharded].map(|path| MutantFolder::of(path));
    for folder in &folders {
        open_model(&folder.path).expect("a valid folder");
    }
    Box::new(move |mutator| mutator.pick(&folders).outcome(mutator, open_model))
}

/// The base model in `scratch`, loaded.
fn base(scratch: &Path) -> (ModelFolder, LanguageModel) {
    let folder = write_model(&scratch.join("base"), TOKENIZER);
    let weights = folder
        .weights(DType::F32, &Device::Cpu)
        .expect("valid weights");
    let model = LanguageModel::new(folder.config.clone(), weights).expect("a valid model");
    (folder, model)
}

pub(super) fn prepare_adapter(scratch: &Path) -> Input {
    let (folder, base) = base(scratch);
    let config = LoraConfig::new(2, 4.0, 0.0, &["all-linear".into()]);
    let adapter = Adapter::fresh(config, base.config(), Seed(1), &Device::Cpu);
    let adapted = adapter
        .and_then(|adapter| base.with_adapter(adapter))
        .expect("it fits");
    let path = scratch.join(MUTANT);
    save_policy(&path, &folder, &adapted).expect("a writable folder");
    let mutant = MutantFolder::of(&path);
    let open = move |path: &Path| {
        let adapter = AdapterFolder::open(path)?;
        adapter.check(&folder.config)?;
        base.with_adapter(adapter.adapter(&base)?).map(drop)
    };
    open(&path).expect("a valid adapter");
    Box::new(move |mutator| mutant.outcome(mutator, &open))
}

pub(super) fn prepare_reward(scratch: &Path) -> Input {
    let (folder, base) = base(scratch);
    let path = scratch.join(MUTANT);
    let reward =
        RewardModel::from_backbone(&base, RewardConfig::default(), Seed(1)).expect("a valid head");
    reward.save(&path, &folder).expect("a writable folder");
    let mutant = MutantFolder::of(&path);
    let open = |path: &Path| {
        let folder = RewardFolder::open(path, None)?;
        folder.check_weights()?;
        folder.model(DType::F32, &Device::Cpu, None).map(drop)
    };
    open(&path).expect("a valid reward model");
    Box::new(move |mutator| mutant.outcome(mutator, open))
}
