//! The safetensors of a folder: one file or several shards, their headers, and the tensors that are wanted of them.
//!
//! A header holds the name, type and shape of every tensor, so that a folder can be checked without reading its
//! weights. A tensor without a place in the model is refused unless it is a known leftover: weights whose scale or bias
//! is not applied give other logits.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    path::{Component, Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, safetensors::SliceSafetensors};
use serde_json::{Map, Value};

use crate::{ModelError, config::read_json, weights::torn};

/// The embedding's name.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The name of a language model's head.
pub(crate) const HEAD: &str = "lm_head.weight";

/// What stands before the names of a trunk's tensors.
const TRUNK: &str = "model.";

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What starts a file: the length of its header.
const LENGTH: u64 = 8;
/// A header longer than this is none, as the safetensors library has it.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes that are compared at once.
const CHUNK: usize = 1 << 20;

/// Ends of the names of buffers that older versions of transformers saved, and newer ones compute.
const LEFTOVERS: [&str; 6] = [
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn.masked_bias",
    "attention.masked_bias",
    "position_ids",
];

/// Parts of the names of tensors that belong to quantised weights, beside those with `scale` or `quant` in them.
const OF_QUANTISED: [&str; 9] = [
    "absmax",
    "biases",
    "codebooks",
    "codes",
    "g_idx",
    "qweight",
    "qzeros",
    "SCB",
    "weight_packed",
];

/// Tensors that a model needs of its folder.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// Their names and shapes.
    pub tensors: Vec<(String, Vec<usize>)>,
    /// Names, or beginnings of names that end in a dot, of tensors that may be there for another purpose.
    pub spare: Vec<&'static str>,
    /// Whether the head, where it alone is there, is the embedding.
    pub tied: bool,
}

/// A tensor as a header describes it.
#[derive(Debug, Clone)]
struct Stored {
    /// Its type, as safetensors names it.
    dtype: String,
    shape: Vec<usize>,
    /// The place of its file in [`Shards::files`].
    file: usize,
    /// Its bytes in that file.
    bytes: Range<u64>,
}

/// The headers of a folder's safetensors.
#[derive(Debug)]
pub(crate) struct Shards {
    folder: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Stored>,
}

impl Shards {
    /// Whether the folder has safetensors.
    pub fn are_in(folder: &Path) -> bool {
        [SINGLE, INDEX]
            .iter()
            .any(|name| folder.join(name).exists())
    }

    /// Reads the headers of the single file or of all shards.
    ///
    /// # Errors
    /// When a file is missing, truncated or none of safetensors.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let files = files(folder)?;
        let mut tensors = BTreeMap::new();
        for (file, path) in files.iter().enumerate() {
            for (name, stored) in header(path, file)? {
                if tensors.insert(name.clone(), stored).is_some() {
                    let reason = format!("{name} is in another shard too");
                    return Err(malformed(path, reason));
                }
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            files,
            tensors,
        })
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shapes of all tensors, by their names.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let tensors = self.tensors.iter();
        tensors
            .map(|(name, stored)| (name.clone(), stored.shape.clone()))
            .collect()
    }

    /// Whether both tensors are there, and not equal.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn differ(&self, one: &str, other: &str) -> Result<bool, ModelError> {
        let (Some(a), Some(b)) = (self.tensors.get(one), self.tensors.get(other)) else {
            return Ok(false);
        };
        if a.shape != b.shape {
            return Ok(true);
        }
        if a.dtype != b.dtype {
            let [a, b] = [one, other].map(|name| {
                let tensor = self.tensor(name, &Device::Cpu)?.to_dtype(DType::F32)?;
                Ok::<_, ModelError>(tensor.flatten_all()?.to_vec1::<f32>()?)
            });
            return Ok(a? != b?);
        }
        Ok(!self.same_bytes(a, b)?)
    }

    fn same_bytes(&self, a: &Stored, b: &Stored) -> Result<bool, ModelError> {
        let open = |stored: &Stored| {
            let path = &self.files[stored.file];
            let part = File::open(path).and_then(|mut file| {
                file.seek(SeekFrom::Start(stored.bytes.start))?;
                Ok(file.take(stored.bytes.end - stored.bytes.start))
            });
            part.map_err(|source| unreadable(path, source))
        };
        let (mut left, mut right) = (open(a)?, open(b)?);
        let (mut of_left, mut of_right) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut rest = a.bytes.end - a.bytes.start;
        while rest > 0 {
            let count = usize::try_from(rest).unwrap_or(CHUNK).min(CHUNK);
            for (part, chunk, stored) in
                [(&mut left, &mut of_left, a), (&mut right, &mut of_right, b)]
            {
                part.read_exact(&mut chunk[..count])
                    .map_err(|source| unreadable(&self.files[stored.file], source))?;
            }
            if of_left[..count] != of_right[..count] {
                return Ok(false);
            }
            rest -= count as u64;
        }
        Ok(true)
    }

    /// Whether the tensors are those that are wanted: all of them, of their shapes and in floating point, and no
    /// other.
    ///
    /// # Errors
    /// Which are not.
    pub fn check(&self, wanted: &Wanted) -> Result<(), ModelError> {
        self.are_plain()?;
        for (name, shape) in &wanted.tensors {
            let stored = self.tensors.get(self.source(name, wanted));
            let reason = match stored {
                None if self.lacks_prefix(name) => return Err(self.headless(name)),
                None => format!("the tensor {name} of shape {shape:?} is missing"),
                Some(stored) if stored.shape != *shape => format!(
                    "{name} has shape {:?}, the configuration says {shape:?}",
                    stored.shape
                ),
                Some(_) => continue,
            };
            let reason = format!("its weights do not fit its config.json: {reason}");
            return Err(malformed(&self.folder, reason));
        }
        let sources = wanted.tensors.iter();
        let sources: BTreeSet<&str> = sources.map(|(name, _)| self.source(name, wanted)).collect();
        self.leaves_none(|name| sources.contains(name) || is_spare(name, &wanted.spare))
    }

    /// Whether the tensor of this name is there without what stands before a trunk's names.
    fn lacks_prefix(&self, name: &str) -> bool {
        let bare = name.strip_prefix(TRUNK);
        bare.is_some_and(|bare| self.tensors.contains_key(bare))
    }

    fn headless(&self, name: &str) -> ModelError {
        let bare = name.strip_prefix(TRUNK).unwrap_or(name);
        let dir = self.folder.display().to_string();
        let how = CONVERTIBLE[0].2.replace("DIR", &dir);
        let reason = format!(
            "it has the tensor {bare} where {name} is needed: these are the weights of a model without a head; save \
             them with one in Python with {how}"
        );
        malformed(&self.folder, reason)
    }

    /// An error if the folder has a tensor that is not used and no leftover.
    pub fn leaves_none(&self, is_used: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let strangers: Vec<&str> = self
            .names()
            .filter(|name| !is_leftover(name) && !is_used(name))
            .collect();
        let others = match strangers.as_slice() {
            [] => return Ok(()),
            [_] => String::new(),
            [_, others @ ..] => format!(" and {} more", others.len()),
        };
        let reason = format!(
            "it has the tensor {}{others}, which its config.json has no place for: without it the weights would \
             give other logits; use the weights that the configuration belongs to",
            strangers[0]
        );
        Err(malformed(&self.folder, reason))
    }

    /// An error if the weights are quantised.
    pub fn are_plain(&self) -> Result<(), ModelError> {
        let sign = self.tensors.iter().find_map(|(name, stored)| {
            if is_of_quantised(name) {
                return Some(name.clone());
            }
            let is_plain = ["F64", "F32", "F16", "BF16"].contains(&stored.dtype.as_str());
            (!is_plain && !is_leftover(name)).then(|| format!("{name} is {}", stored.dtype))
        });
        match sign {
            None => Ok(()),
            Some(sign) => Err(malformed(
                &self.folder,
                format!("this folder is quantised ({sign}), use the unquantised one"),
            )),
        }
    }

    /// The name that a wanted tensor has in the files.
    fn source<'a>(&self, name: &'a str, wanted: &Wanted) -> &'a str {
        let is_head = wanted.tied && name == EMBEDDING && !self.tensors.contains_key(EMBEDDING);
        if is_head { HEAD } else { name }
    }

    /// Checks and reads the wanted tensors, as `dtype`.
    ///
    /// # Errors
    /// As [`Self::check`], and when a file cannot be read.
    pub fn read(
        &self,
        wanted: &Wanted,
        dtype: DType,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>, ModelError> {
        self.check(wanted)?;
        let mut tensors = BTreeMap::new();
        for (file, path) in self.files.iter().enumerate() {
            let here = wanted.tensors.iter().filter_map(|(name, _)| {
                let source = self.source(name, wanted);
                (self.tensors[source].file == file).then_some((name, source))
            });
            let bytes = read(path)?;
            let refused = |error: candle_core::Error| malformed(path, torn(&error));
            let shard = SliceSafetensors::new(&bytes).map_err(refused)?;
            for (name, source) in here {
                let tensor = shard.load(source, device).map_err(refused)?;
                tensors.insert(name.clone(), tensor.to_dtype(dtype)?);
            }
        }
        Ok(tensors)
    }

    /// Reads all tensors but leftovers.
    ///
    /// # Errors
    /// When a file cannot be read or the weights are quantised.
    pub fn read_all(&self, device: &Device) -> Result<HashMap<String, Tensor>, ModelError> {
        self.are_plain()?;
        let mut tensors = HashMap::new();
        for (file, path) in self.files.iter().enumerate() {
            let bytes = read(path)?;
            let refused = |error: candle_core::Error| malformed(path, torn(&error));
            let shard = SliceSafetensors::new(&bytes).map_err(refused)?;
            let here = self
                .tensors
                .iter()
                .filter(|(_, stored)| stored.file == file);
            for (name, _) in here.filter(|(name, _)| !is_leftover(name)) {
                tensors.insert(name.clone(), shard.load(name, device).map_err(refused)?);
            }
        }
        Ok(tensors)
    }

    fn tensor(&self, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        let path = &self.files[self.tensors[name].file];
        let refused = |error: candle_core::Error| malformed(path, torn(&error));
        let bytes = read(path)?;
        let shard = SliceSafetensors::new(&bytes).map_err(refused)?;
        shard.load(name, device).map_err(refused)
    }
}

fn is_leftover(name: &str) -> bool {
    LEFTOVERS.iter().any(|end| name.ends_with(end))
}

/// Whether the tensor is one of those that may be there for another purpose.
pub(crate) fn is_spare(name: &str, spare: &[&str]) -> bool {
    let fits = |known: &&str| name == *known || (known.ends_with('.') && name.starts_with(*known));
    spare.iter().any(fits)
}

fn is_of_quantised(name: &str) -> bool {
    let is_one = |part: &str| {
        OF_QUANTISED.contains(&part)
            || part.contains("quant")
            || part
                .split('_')
                .any(|word| ["scale", "scales"].contains(&word))
    };
    name.split('.').any(is_one)
}

fn malformed(path: &Path, reason: String) -> ModelError {
    ModelError::Malformed {
        path: path.to_owned(),
        reason,
    }
}

fn unreadable(path: &Path, source: io::Error) -> ModelError {
    ModelError::Unreadable {
        path: path.to_owned(),
        source,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    std::fs::read(path).map_err(|source| missing(path, source))
}

/// The shapes of the tensors of a file by their names, as its header has them.
///
/// # Errors
/// When the file is missing, or its header does not fit its length.
pub(crate) fn shapes(path: &Path) -> Result<BTreeMap<String, Vec<usize>>, ModelError> {
    let tensors = header(path, 0)?.into_iter();
    Ok(tensors.map(|(name, stored)| (name, stored.shape)).collect())
}

/// How a file begins that Git LFS keeps elsewhere.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec";

fn lfs_reason(path: &Path) -> String {
    let folder = path.parent().unwrap_or(Path::new(".")).display();
    format!(
        "it is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull` in {folder}"
    )
}

/// An error if what was read of the file is a pointer of Git LFS.
///
/// # Errors
/// When it is one: the way to the file.
pub(crate) fn is_fetched(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    match bytes.starts_with(LFS_POINTER) {
        true => Err(malformed(path, lfs_reason(path))),
        false => Ok(()),
    }
}

/// What the header of a file says, the file being number `file`.
fn header(path: &Path, file: usize) -> Result<Vec<(String, Stored)>, ModelError> {
    let torn = |reason: &str| {
        malformed(
            path,
            format!("it is truncated or not a safetensors file ({reason})"),
        )
    };
    let mut opened = File::open(path).map_err(|source| missing(path, source))?;
    let whole = opened
        .metadata()
        .map_err(|source| unreadable(path, source))?;
    let mut length = [0; LENGTH as usize];
    opened
        .read_exact(&mut length)
        .map_err(|_| torn("it ends before its header"))?;
    if LFS_POINTER.starts_with(&length) {
        return Err(malformed(path, lfs_reason(path)));
    }
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER.min(whole.len()) {
        return Err(torn("its header is longer than the file"));
    }
    let mut text = Vec::new();
    opened
        .take(length)
        .read_to_end(&mut text)
        .map_err(|source| unreadable(path, source))?;
    let keys: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|error| torn(&error.to_string()))?;
    let start = LENGTH + length;
    let stored = |(name, value): (String, Value)| {
        let stored = Stored::read(&value, file, start);
        let stored = stored.ok_or_else(|| torn(&format!("its header says {value} of {name}")))?;
        if stored.bytes.end > whole.len() {
            return Err(torn(&format!("{name} ends behind its end")));
        }
        Ok((name, stored))
    };
    keys.into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(stored)
        .collect()
}

impl Stored {
    /// A tensor from its entry in a header; data begin at `start`.
    fn read(value: &Value, file: usize, start: u64) -> Option<Self> {
        let shape = value["shape"].as_array()?.iter();
        let offset = |place: usize| value["data_offsets"][place].as_u64()?.checked_add(start);
        let bytes = offset(0)?..offset(1)?;
        (bytes.start <= bytes.end).then_some(())?;
        Some(Self {
            dtype: value["dtype"].as_str()?.to_owned(),
            shape: shape
                .map(|size| usize::try_from(size.as_u64()?).ok())
                .collect::<Option<_>>()?,
            file,
            bytes,
        })
    }
}

/// The safetensors files of a folder: one, or those that the index names.
fn files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let map = read_json(&index)?;
    let Some(map) = map["weight_map"].as_object() else {
        return Err(malformed(&index, "it has no \"weight_map\"".into()));
    };
    let mut files: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    files.sort_unstable();
    files.dedup();
    let is_outside = |file: &&&str| {
        !Path::new(file)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
    };
    if let Some(file) = files.iter().find(is_outside) {
        let reason = format!(
            "it names {file:?}, which is no file of its folder; correct its \"weight_map\""
        );
        return Err(malformed(&index, reason));
    }
    let missing: Vec<&str> = files
        .iter()
        .copied()
        .filter(|file| !folder.join(file).exists())
        .collect();
    if let [first, others @ ..] = missing.as_slice() {
        let more = match others.len() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        let reason = format!(
            "it names {first}{more} of {} files, which the folder does not hold: copy or fetch the whole model",
            files.len()
        );
        return Err(malformed(&index, reason));
    }
    Ok(files.into_iter().map(|file| folder.join(file)).collect())
}

/// Files in other formats: the name of the file that is read, theirs, and how to convert them.
const CONVERTIBLE: [(&str, &[&str], &str); 4] = [
    (
        SINGLE,
        &[
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "tf_model.h5",
            "flax_model.msgpack",
        ],
        "transformers.AutoModelForCausalLM.from_pretrained(\"DIR\").save_pretrained(\"DIR\") (a classifier's class is \
         AutoModelForSequenceClassification)",
    ),
    (
        SINGLE,
        &["consolidated.safetensors", "consolidated.00.pth"],
        "transformers' conversion script of the model's family",
    ),
    (
        "tokenizer.json",
        &[
            "tokenizer.model",
            "spiece.model",
            "spm.model",
            "vocab.json",
            "vocab.txt",
            "tekken.json",
        ],
        "transformers.AutoTokenizer.from_pretrained(\"DIR\").save_pretrained(\"DIR\")",
    ),
    (
        "adapter_model.safetensors",
        &["adapter_model.bin"],
        "safetensors.torch.save_file(torch.load(\"DIR/adapter_model.bin\", weights_only=True), \
         \"DIR/adapter_model.safetensors\")",
    ),
];

/// The error of a file that cannot be read. Where the folder has the same in another format, it says how to convert
/// that.
pub(crate) fn missing(path: &Path, source: io::Error) -> ModelError {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return unreadable(path, source);
    };
    if source.kind() != io::ErrorKind::NotFound {
        return unreadable(path, source);
    }
    let name = name.to_string_lossy();
    let dir = folder.display().to_string();
    let convertible = CONVERTIBLE.iter().filter(|(of, ..)| *of == name);
    let found = convertible
        .flat_map(|(_, others, how)| others.iter().map(move |other| (*other, *how)))
        .find(|(other, _)| folder.join(other).exists());
    if let Some((other, how)) = found {
        let how = how.replace("DIR", &dir);
        let reason = format!("it has {other} but no {name}: convert it in Python with {how}");
        return malformed(folder, reason);
    }
    if name == "config.json" && folder.join("adapter_config.json").exists() {
        let reason =
            "it holds an adapter: name its base as the model, and this folder as the adapter";
        return malformed(folder, reason.into());
    }
    if name == "config.json" && folder.join("config.toml").exists() {
        let reason =
            "it holds a run and no model: name one of the folders in its checkpoints as the model";
        return malformed(folder, reason.into());
    }
    if name != SINGLE {
        return unreadable(path, source);
    }
    let with_end = |end: &str| {
        let entries = std::fs::read_dir(folder).ok()?.filter_map(Result::ok);
        let fits = |name: &String| name.ends_with(end) && !name.starts_with("adapter_");
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(fits).min()
    };
    if let Some(gguf) = with_end(".gguf") {
        let reason =
            format!("it has {gguf} but no {name}: use the folder with the unquantised safetensors");
        return malformed(folder, reason);
    }
    match with_end(".safetensors") {
        Some(other) => malformed(
            folder,
            format!(
                "it has {other} but neither {SINGLE} nor {INDEX}: rename it to {SINGLE} if it is the whole model"
            ),
        ),
        None => unreadable(
            path,
            io::Error::new(
                source.kind(),
                format!("{source}, and there is no {INDEX} either"),
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::{
        ModelConfig, ModelFolder, Weights,
        fixtures::{config_json, folder},
    };

    /// A model's folder with one more tensor, of these numbers.
    fn with(name: &str, shape: &[usize], dtype: DType) -> TempDir {
        let place = folder();
        let shards = Shards::open(place.path()).unwrap();
        let mut tensors: HashMap<String, Tensor> = shards.read_all(&Device::Cpu).unwrap();
        let tensor = Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
        tensors.insert(name.to_owned(), tensor);
        candle_core::safetensors::save(&tensors, place.path().join(SINGLE)).unwrap();
        place
    }

    /// What both the check of the headers and reading the weights say.
    fn refused(place: &TempDir) -> String {
        let opened = ModelFolder::open(place.path(), None).unwrap();
        let checked = opened.check_weights().unwrap_err().to_string();
        let read = opened.weights(DType::F32, &Device::Cpu).unwrap_err();
        assert_eq!(read.to_string(), checked);
        checked
    }

    #[test]
    fn a_tensor_without_a_place_is_refused_and_a_leftover_is_not() {
        for name in [
            "model.layers.0.self_attn.o_proj.bias",
            "model.layers.1.input_layernorm.weight",
            "score.weight",
            "model.layers.0.self_attn.q_norm.weight",
        ] {
            let said = refused(&with(name, &[8], DType::F32));
            assert!(
                said.contains(&format!(
                    "the tensor {name}, which its config.json has no place for"
                )),
                "{said}"
            );
        }
        for (name, dtype) in [
            ("model.layers.0.self_attn.rotary_emb.inv_freq", DType::F32),
            ("model.embeddings.position_ids", DType::I64),
        ] {
            let place = with(name, &[2], dtype);
            let opened = ModelFolder::open(place.path(), None).unwrap();
            opened.check_weights().unwrap();
            let weights = opened.weights(DType::F32, &Device::Cpu).unwrap();
            assert!(weights.get(name).is_err());
        }
    }

    #[test]
    fn quantised_weights_are_known_by_names_and_types() {
        let projection = "model.layers.0.self_attn.q_proj";
        for (name, dtype, sign) in [
            ("weight_scale", DType::F32, "weight_scale"),
            ("weight_scale_inv", DType::F32, "weight_scale_inv"),
            ("qweight", DType::I32, "qweight"),
            ("scales", DType::F16, "scales"),
            ("SCB", DType::F32, "SCB"),
            ("weight.absmax", DType::F32, "weight.absmax"),
            (
                "weight.quant_state.bitsandbytes__nf4",
                DType::U8,
                "bitsandbytes__nf4",
            ),
            ("weight", DType::U8, "weight is U8"),
        ] {
            let said = refused(&with(&format!("{projection}.{name}"), &[8, 8], dtype));
            for part in [
                "this folder is quantised (",
                sign,
                "use the unquantised one",
            ] {
                assert!(said.contains(part), "{part:?} is not in {said}");
            }
        }
    }

    #[test]
    fn a_type_that_cannot_be_read_at_all_is_named_too() {
        let place = folder();
        let path = place.path().join(SINGLE);
        let bytes = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes[..2000]).into_owned();
        let at = text.find("\"F32\"").unwrap();
        let mut bytes = bytes;
        bytes[at + 1..at + 4].copy_from_slice(b"I4X");
        fs::write(&path, bytes).unwrap();
        assert!(refused(&place).contains("is I4X"), "{}", refused(&place));
    }

    #[test]
    fn a_tied_head_of_its_own_is_kept_and_saved_as_untied() {
        for (number, tied) in [(1.0, false), (0.0, true)] {
            let place = folder();
            let shards = Shards::open(place.path()).unwrap();
            let mut tensors = shards.read_all(&Device::Cpu).unwrap();
            let head = (&tensors[EMBEDDING] + number).unwrap();
            tensors.insert(HEAD.into(), head);
            candle_core::safetensors::save(&tensors, place.path().join(SINGLE)).unwrap();
            let opened = ModelFolder::open(place.path(), None).unwrap();
            assert_eq!(opened.config.tied_head, tied);
            opened.check_weights().unwrap();
            let weights = opened.weights(DType::F32, &Device::Cpu).unwrap();
            assert_eq!(weights.get(HEAD).is_ok(), !tied);

            let target = tempfile::tempdir().unwrap();
            crate::save_folder(target.path(), &opened, &weights).unwrap();
            let again = ModelFolder::open(target.path(), None).unwrap();
            assert_eq!(again.config.raw["tie_word_embeddings"], tied);
            let read = again.weights(DType::F32, &Device::Cpu).unwrap();
            assert_eq!(read.digest().unwrap(), weights.digest().unwrap());
        }
    }

    #[test]
    fn of_a_tied_head_and_embedding_one_is_enough_and_types_may_differ() {
        let place = folder();
        let shards = Shards::open(place.path()).unwrap();
        let whole = shards.read_all(&Device::Cpu).unwrap();
        let embedding = &whole[EMBEDDING];
        let save = |tensors: &HashMap<String, Tensor>| {
            candle_core::safetensors::save(tensors, place.path().join(SINGLE)).unwrap();
            let opened = ModelFolder::open(place.path(), None).unwrap();
            assert!(opened.config.tied_head);
            let weights = opened.weights(DType::F32, &Device::Cpu).unwrap();
            weights.get(EMBEDDING).unwrap().to_vec2::<f32>().unwrap()
        };
        let mut head_alone = whole.clone();
        head_alone.remove(EMBEDDING);
        head_alone.insert(HEAD.into(), embedding.clone());
        assert_eq!(save(&head_alone), embedding.to_vec2::<f32>().unwrap());

        let half = embedding.to_dtype(DType::BF16).unwrap();
        let mut both = whole.clone();
        both.insert(HEAD.into(), half.to_dtype(DType::F32).unwrap());
        both.insert(EMBEDDING.into(), half);
        save(&both);
    }

    #[test]
    fn files_in_other_formats_are_named_with_the_way_out() {
        let cases = [
            ("model.safetensors", "pytorch_model.bin", "save_pretrained"),
            (
                "model.safetensors",
                "consolidated.safetensors",
                "conversion script",
            ),
            (
                "model.safetensors",
                "model.Q4_K_M.gguf",
                "unquantised safetensors",
            ),
            ("tokenizer.json", "tokenizer.model", "AutoTokenizer"),
            (
                "adapter_model.safetensors",
                "adapter_model.bin",
                "save_file",
            ),
            (
                "config.json",
                "adapter_config.json",
                "name its base as the model",
            ),
            ("config.json", "config.toml", "it holds a run"),
        ];
        for (name, other, way) in cases {
            let place = tempfile::tempdir().unwrap();
            let path = place.path().join(name);
            let said = |kind: io::ErrorKind| missing(&path, kind.into()).to_string();
            assert!(said(io::ErrorKind::NotFound).contains("failed to read"));
            fs::write(place.path().join(other), "").unwrap();
            let found = said(io::ErrorKind::NotFound);
            let folder = place.path().display().to_string();
            for part in [way, folder.as_str()] {
                assert!(found.contains(part), "{part:?} is not in {found}");
            }
            assert!(said(io::ErrorKind::PermissionDenied).contains("failed to read"));
        }
    }

    #[test]
    fn what_is_not_the_whole_model_is_said() {
        let place = folder();
        let file = |name: &str| place.path().join(name);
        let said = || Shards::open(place.path()).unwrap_err().to_string();
        fs::rename(file(SINGLE), file("model.fp16.safetensors")).unwrap();
        let variant = said();
        let expected = "has model.fp16.safetensors but neither model.safetensors nor model.safetensors.index.json";
        assert!(variant.contains(expected), "{variant}");
        fs::remove_file(file("model.fp16.safetensors")).unwrap();
        let none = said();
        let expected = "no model.safetensors.index.json either";
        assert!(
            none.contains("No such file") && none.contains(expected),
            "{none}"
        );

        for (shard, expected) in [
            (
                "../other.safetensors",
                "names \"../other.safetensors\", which is no file of its folder",
            ),
            ("/model.safetensors", "which is no file of its folder"),
            (
                "model-2.safetensors",
                "names model-2.safetensors of 1 files, which the folder does not hold",
            ),
        ] {
            let index = serde_json::json!({"weight_map": {"model.norm.weight": shard}});
            fs::write(file(INDEX), index.to_string()).unwrap();
            let refused = said();
            assert!(
                refused.contains(INDEX) && refused.contains(expected),
                "{refused}"
            );
        }

        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
        for name in [SINGLE, "tokenizer.json", "config.json"] {
            let place = folder();
            fs::write(place.path().join(name), pointer).unwrap();
            let opened = ModelFolder::open(place.path(), None);
            let checked = opened.and_then(|folder| folder.check_weights());
            let refused = checked.unwrap_err().to_string();
            for part in [name, "a pointer of Git LFS", "git lfs pull"] {
                assert!(refused.contains(part), "{part:?} is not in {refused}");
            }
        }
    }

    #[test]
    fn tensors_of_a_model_without_a_head_are_known() {
        let place = folder();
        let tensors = Shards::open(place.path())
            .unwrap()
            .read_all(&Device::Cpu)
            .unwrap();
        let bare = |name: &String| name.strip_prefix(TRUNK).unwrap_or(name).to_owned();
        let tensors: HashMap<_, _> = tensors
            .iter()
            .map(|(name, tensor)| (bare(name), tensor.clone()))
            .collect();
        candle_core::safetensors::save(&tensors, place.path().join(SINGLE)).unwrap();
        let said = refused(&place);
        for part in [
            "without a head",
            "AutoModelForCausalLM",
            "embed_tokens.weight",
        ] {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
    }

    #[test]
    fn a_header_that_does_not_fit_its_file_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(SINGLE);
        let file = |header: &str| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            fs::write(&path, bytes).unwrap();
            shapes(&path).unwrap_err().to_string()
        };
        for (header, expected) in [
            ("{", "EOF"),
            ("{\"x\": {}}", "its header says {} of x"),
            (
                "{\"x\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}}",
                "x ends behind its end",
            ),
        ] {
            let said = file(header);
            assert!(
                said.contains("truncated or not a safetensors file") && said.contains(expected),
                "{said}"
            );
        }
        fs::write(&path, [255; 12]).unwrap();
        assert!(
            shapes(&path)
                .unwrap_err()
                .to_string()
                .contains("longer than the file")
        );
        fs::write(&path, [1, 0]).unwrap();
        assert!(
            shapes(&path)
                .unwrap_err()
                .to_string()
                .contains("before its header")
        );
    }

    #[test]
    fn a_configuration_and_its_weights_need_not_be_together() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("config.json"), config_json(8).to_string()).unwrap();
        let config = ModelConfig::load(place.path()).unwrap();
        assert!(config.tied_head);
        assert!(Weights::load(place.path(), &config, DType::F32, &Device::Cpu).is_err());
    }
}
