//! Models in GGUF files, unpacked into Hugging Face folders.
//!
//! A file holds a whole model: configuration, tokenizer, chat template and weights, which may be quantised. It is unpacked
//! once, so that everything else reads one form of models: quantised weights are dequantised to f32 (through candle), those
//! in f16 and bf16 stay what they are, and the rows of queries and keys return to Hugging Face's order. Promises that what is
//! not understood is refused by name, and that a folder is whole or absent. The file is untrusted.

mod config;
mod header;
mod tensors;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use messages::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    config::ModelConfig,
    error::ModelError,
    folder::write,
    gguf::{
        config::{GgufArchitecture, ModelShape},
        header::{GgufHeader, GgufTensor, MetadataValue},
        tensors::TensorReader,
        tokenizer::TokenizerFiles,
    },
    input_file::InputFile,
};

/// Device of everything here.
const CPU: Device = Device::Cpu;
/// Name of the file in an unpacked folder that says what it was unpacked from.
const ORIGIN: &str = "gguf.json";
/// Files of an unpacked folder beside the weights' and [`ORIGIN`].
const FILES: [&str; 4] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
];
/// Version of what is written; part of the folder's name.
const FORMAT: u32 = 2;
/// Start of the name of a folder that is being written, which is followed by the id of the process.
const PARTIAL: &str = ".partial-";
/// Size of a weights file above which another is begun, in bytes.
const SHARD_BYTES: u64 = 1 << 30;

/// Whether the path is that of a GGUF file, by its name.
#[must_use]
pub fn is_gguf(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && !path.is_dir()
}

/// Where a folder was unpacked from, in a file of it that is written last.
#[derive(Serialize, Deserialize)]
struct Origin {
    /// Path of the GGUF file.
    file: PathBuf,
    /// Sizes of the folder's other files in bytes, by name.
    sizes: BTreeMap<String, u64>,
}

impl Origin {
    fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder.join(ORIGIN)).ok()?).ok()
    }
}

/// Path of the GGUF file that the folder was unpacked from.
pub(crate) fn origin_of(folder: &Path) -> Option<PathBuf> {
    Some(Origin::read(folder)?.file)
}

/// A file of an unpacked model's weights.
struct WeightsFile<'a> {
    file: String,
    tensors: Vec<&'a GgufTensor>,
}

/// A model in a GGUF file.
pub struct GgufModel {
    path: PathBuf,
    header: GgufHeader,
    architecture: GgufArchitecture,
    shape: ModelShape,
    config: Value,
    generation: Value,
    tokenizer: TokenizerFiles,
    /// Distinguishes the file from others, and from what it was before it was replaced.
    digest: Digest,
}

impl GgufModel {
    /// Reads everything but the weights of the file at `path`.
    ///
    /// # Errors
    /// When it cannot be read, or holds anything that is not supported, which is named.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        };
        // The user names the file itself, which may be a link.
        let target = path
            .canonicalize()
            .map_err(|source| ModelError::Unreadable {
                path: path.to_owned(),
                source,
            })?;
        let input = InputFile::open(&target)?;
        let length = input.length;
        let header = GgufHeader::read(input.into_file(), length).map_err(malformed)?;
        config::check_whole(&header).map_err(malformed)?;
        let architecture = config::architecture(&header).map_err(malformed)?;
        let factors = rope_factors(&target, &header)?;
        let read = config::config(&header, architecture, factors.as_deref());
        let (mut config, shape) = read.map_err(malformed)?;
        let special = config::special_ids(&header).map_err(malformed)?;
        let tokenizer = tokenizer::tokenizer(&header, special).map_err(malformed)?;
        let vocabulary = vocabulary_size(&header, architecture).map_err(malformed)?;
        config["vocab_size"] = vocabulary.into();
        config["bos_token_id"] = special.bos.into();
        config["eos_token_id"] = special.eos.into();
        config["tie_word_embeddings"] =
            (!header.tensors.iter().any(|t| t.name == tensors::HEAD)).into();
        config["torch_dtype"] = "float32".into();
        let model = Self {
            digest: digest(&target, length, &header)?,
            generation: json!({"bos_token_id": special.bos, "eos_token_id": special.ends()}),
            path: target,
            header,
            architecture,
            shape,
            config,
            tokenizer,
        };
        let expected = ModelConfig::from_json(model.config.clone(), &model.path)?;
        model.check_tensors(&expected).map_err(malformed)?;
        Ok(model)
    }

    /// Name of the folder that it is unpacked into.
    #[must_use]
    pub fn folder_name(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let stem: String = stem
            .chars()
            .map(|c| if is_plain(c) { c } else { '-' })
            .collect();
        let digest = self.digest.to_string();
        format!(
            "{}-{}",
            stem.trim_start_matches('.'),
            &digest[..16.min(digest.len())]
        )
    }

    /// Checks that the file has the tensors of a model of this configuration, in their shapes, and no others.
    fn check_tensors(&self, config: &ModelConfig) -> Result<(), String> {
        let mut found = HashMap::new();
        for tensor in self.weights() {
            let target = tensors::target(&tensor.name, self.architecture, self.shape.layers)?;
            found.insert(target.name, tensor);
        }
        for (name, shape) in config.tensors() {
            let Some(tensor) = found.get(&name) else {
                return Err(format!("it has no tensor for {name}, of shape {shape:?}"));
            };
            if tensor.shape != shape {
                return Err(format!(
                    "its tensor {} has shape {:?}, its metadata says {shape:?} (outermost dimension first)",
                    tensor.name, tensor.shape
                ));
            }
        }
        Ok(())
    }

    /// The tensors that are weights.
    fn weights(&self) -> impl Iterator<Item = &GgufTensor> {
        let tensors = self.header.tensors.iter();
        tensors.filter(|tensor| tensor.name != tensors::ROPE_FACTORS)
    }

    /// Whether the folder at `folder` has every file that [`Self::unpack`] writes, in its size.
    #[must_use]
    pub fn is_unpacked_in(&self, folder: &Path) -> bool {
        let size = |name: &str| Some(fs::metadata(folder.join(name)).ok()?.len());
        let is_whole = |(name, bytes): (&String, &u64)| size(name) == Some(*bytes);
        let origin = Origin::read(folder);
        origin.is_some_and(|origin| origin.sizes.iter().all(is_whole))
    }

    /// Writes all but the weights into the folder `folder`, which opens as a model's.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn describe(&self, folder: &Path) -> Result<(), ModelError> {
        let contents = [
            &self.generation,
            &self.tokenizer.tokenizer,
            &self.tokenizer.settings,
            &self.config,
        ];
        let mut files = FILES.into_iter().zip(contents);
        files.try_for_each(|(name, content)| write_json(&folder.join(name), content))
    }

    /// Writes the model as a Hugging Face folder at `folder`; replaces one that is not whole.
    ///
    /// # Errors
    /// When the file changes meanwhile, or the folder cannot be written.
    pub fn unpack(&self, folder: &Path) -> Result<(), ModelError> {
        let unwritable = |source| ModelError::Unwritable {
            path: folder.to_owned(),
            source,
        };
        let parent = folder.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(unwritable)?;
        remove_abandoned(parent);
        let partial = format!("{PARTIAL}{}-{}", std::process::id(), self.folder_name());
        let partial = parent.join(partial);
        let written = self.write_files(&partial);
        let written = written.and_then(|()| {
            // Files of it may have been deleted or damaged since.
            if folder.exists() && !self.is_unpacked_in(folder) {
                fs::remove_dir_all(folder).map_err(unwritable)?;
            }
            match fs::rename(&partial, folder) {
                // Another process was first.
                Err(_) if self.is_unpacked_in(folder) => Ok(()),
                renamed => renamed.map_err(unwritable),
            }
        });
        // What is left of a failure, or of the slower of two processes.
        if partial.exists() {
            fs::remove_dir_all(&partial).ok();
        }
        written
    }

    fn write_files(&self, folder: &Path) -> Result<(), ModelError> {
        fs::create_dir_all(folder).map_err(|source| ModelError::Unwritable {
            path: folder.to_owned(),
            source,
        })?;
        self.write_weights(folder)?;
        self.describe(folder)?;
        let origin = Origin {
            file: self.path.clone(),
            sizes: sizes(folder)?,
        };
        write_json(&folder.join(ORIGIN), &json!(origin))
    }

    /// The files of the weights.
    fn shards(&self) -> Vec<WeightsFile<'_>> {
        let mut shards: Vec<Vec<&GgufTensor>> = Vec::new();
        let mut size = SHARD_BYTES;
        for tensor in self.weights() {
            let elements: usize = tensor.shape.iter().product();
            let bytes = (elements * stored_dtype(tensor.dtype).size_in_bytes()) as u64;
            if size.saturating_add(bytes) > SHARD_BYTES {
                shards.push(Vec::new());
                size = 0;
            }
            size += bytes;
            shards
                .last_mut()
                .into_iter()
                .for_each(|shard| shard.push(tensor));
        }
        let count = shards.len();
        let shards = shards.into_iter().zip(1..);
        let shards = shards.map(|(tensors, number)| WeightsFile {
            file: match count {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{number:05}-of-{count:05}.safetensors"),
            },
            tensors,
        });
        shards.collect()
    }

    fn write_weights(&self, folder: &Path) -> Result<(), ModelError> {
        let mut reader = TensorReader::open(&self.path)?;
        let shards = self.shards();
        let mut index = serde_json::Map::new();
        for WeightsFile { file, tensors } in &shards {
            let mut weights = HashMap::new();
            for tensor in tensors {
                let (name, weight) = self.weight(&mut reader, tensor)?;
                index.insert(name.clone(), file.clone().into());
                weights.insert(name, weight);
            }
            candle_core::safetensors::save(&weights, folder.join(file))?;
        }
        if shards.len() > 1 {
            let index = json!({"metadata": {}, "weight_map": index});
            write_json(&folder.join("model.safetensors.index.json"), &index)?;
        }
        Ok(())
    }

    /// A tensor under its name in Hugging Face's form.
    fn weight(
        &self,
        reader: &mut TensorReader,
        tensor: &GgufTensor,
    ) -> Result<(String, Tensor), ModelError> {
        let malformed = |reason: String| ModelError::Malformed {
            path: self.path.clone(),
            reason,
        };
        let target = tensors::target(&tensor.name, self.architecture, self.shape.layers);
        let target = target.map_err(malformed)?;
        let mut weight = reader.read(tensor, stored_dtype(tensor.dtype))?;
        if let Some(heads) = target.permuted_heads(self.architecture, self.shape) {
            let rows = heads.checked_mul(self.shape.head_dim);
            let is_matrix = tensor.shape.len() == 2 && tensor.shape.first().copied() == rows;
            if !is_matrix || !self.shape.head_dim.is_multiple_of(2) {
                let reason = format!("the tensor {} is no matrix of {heads} heads", tensor.name);
                return Err(malformed(reason));
            }
            weight = tensors::unpermuted(&weight, heads)?;
        }
        Ok((target.name, weight))
    }
}

/// Number of rows of the embedding.
fn vocabulary_size(header: &GgufHeader, architecture: GgufArchitecture) -> Result<usize, String> {
    let embedding = header.tensors.iter().find(|t| t.name == tensors::EMBEDDING);
    let rows = embedding.and_then(|embedding| embedding.shape.first().copied());
    let rows = rows.ok_or("it has no token_embd.weight")?;
    let key = format!("{}.vocab_size", architecture.name);
    match header.get(&key, "a number", MetadataValue::as_u64)? {
        Some(stated) if stated != rows as u64 => Err(format!(
            "its {key} is {stated}, and its embedding has {rows} rows"
        )),
        _ => Ok(rows),
    }
}

fn write_json(path: &Path, content: &Value) -> Result<(), ModelError> {
    write(path, format!("{content:#}\n").as_bytes())
}

/// Sizes of the files of a folder in bytes, by name.
fn sizes(folder: &Path) -> Result<BTreeMap<String, u64>, ModelError> {
    let size = |entry: io::Result<fs::DirEntry>| {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        Ok((name, entry.metadata()?.len()))
    };
    let entries = fs::read_dir(folder).and_then(|entries| entries.map(size).collect());
    entries.map_err(|source| ModelError::Unreadable {
        path: folder.to_owned(),
        source,
    })
}

/// Removes what killed processes left unfinished in a folder; without `/proc` it is not known which processes live.
fn remove_abandoned(parent: &Path) {
    let processes = Path::new("/proc");
    if !processes.join("self").exists() {
        return;
    }
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_prefix(PARTIAL)
            .and_then(|rest| rest.split_once('-'));
        let id = process.and_then(|(id, _)| id.parse::<u32>().ok());
        if id.is_some_and(|id| !processes.join(id.to_string()).exists()) {
            tracing::info!(path = %entry.path().display(), "removing what an ended process left unfinished");
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// Dtype in which a tensor is stored: f16 and bf16 as they are, all else in f32.
fn stored_dtype(dtype: GgmlDType) -> DType {
    match dtype {
        GgmlDType::F16 => DType::F16,
        GgmlDType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

/// Factors of RoPE's frequencies, if the file has any.
fn rope_factors(path: &Path, header: &GgufHeader) -> Result<Option<Vec<f32>>, ModelError> {
    let mut tensors = header.tensors.iter();
    let Some(factors) = tensors.find(|tensor| tensor.name == tensors::ROPE_FACTORS) else {
        return Ok(None);
    };
    let factors = TensorReader::open(path)?.read(factors, DType::F32)?;
    Ok(Some(factors.flatten_all()?.to_vec1()?))
}

/// Digest of the header, the file's size and the time of its last change.
fn digest(path: &Path, length: u64, header: &GgufHeader) -> Result<Digest, ModelError> {
    let unreadable = |source| ModelError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let changed = fs::metadata(path).and_then(|metadata| metadata.modified());
    let changed = changed.map_err(unreadable)?;
    let text = format!("{FORMAT} {length} {changed:?} {path:?} {header:?}");
    Ok(Digest::of(text.as_bytes()))
}
