//! Safetensors files of a model folder: single or sharded, with validation by their headers.
//!
//! A header has the name, dtype and shape of every tensor, so that a folder can be validated without loading its
//! weights. It is refused unless its tensors fill the file exactly, so that loading needs no more memory than the file
//! has bytes. An unexpected tensor is refused unless it is a known obsolete buffer, since ignoring a scale or bias would
//! change the logits.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use messages::FileName;
use safetensors::Dtype;
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, IntoDeserializer, MapAccess, Visitor, value::StrDeserializer},
};

use crate::{
    error::ModelError,
    input_file::{self, InputFile, MAX_INDEX_BYTES},
};

/// Name of the token embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the language-model head.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Prefix of the names of a backbone's tensors.
const BACKBONE_PREFIX: &str = "model.";

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes of the header length at the start of a file.
const LENGTH_BYTES: u64 = 8;
/// Maximum length of a header in bytes, as in the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Chunk size in bytes for comparing tensors.
const CHUNK: usize = 1 << 20;

/// Name suffixes of buffers that older versions of transformers saved and newer ones compute.
const OBSOLETE_BUFFERS: [&str; 6] = [
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn.masked_bias",
    "attention.masked_bias",
    "position_ids",
];

/// Name parts of tensors of quantised weights, in addition to those that contain `scale` or `quant`.
const QUANTISED_PARTS: [&str; 9] = [
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

/// Tensors that a model expects in its folder.
#[derive(Debug, Clone)]
pub(crate) struct ExpectedTensors {
    /// Names and shapes of the tensors.
    pub tensors: Vec<(String, Vec<usize>)>,
    /// Tensors that may be present but are not loaded: names, or name prefixes that end in a dot.
    pub ignorable: Vec<&'static str>,
    /// Whether the head shares the embedding's weights, so that either may be absent.
    pub tied_head: bool,
}

/// Header entry of a tensor.
#[derive(Debug, Clone)]
struct TensorEntry {
    /// Dtype by its name in safetensors.
    dtype: String,
    shape: Vec<usize>,
    /// Index of its file in [`Shards::files`].
    file: usize,
    /// Byte range in that file.
    bytes: Range<u64>,
}

/// Headers of the safetensors files of a folder, which stay open: files that replace them meanwhile are not read.
#[derive(Debug)]
pub(crate) struct Shards {
    folder: PathBuf,
    files: Vec<InputFile>,
    tensors: BTreeMap<String, TensorEntry>,
}

impl Shards {
    /// Whether the folder has safetensors files.
    pub fn exist_in(folder: &Path) -> bool {
        [SINGLE, INDEX]
            .iter()
            .any(|name| folder.join(name).exists())
    }

    /// Reads the headers of the single file or of all shards.
    ///
    /// # Errors
    /// When a file is missing, truncated or not a safetensors file.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for path in file_paths(folder)? {
            let file = InputFile::open(&path)?;
            for (name, entry) in header(&file, files.len())? {
                if tensors.insert(name.clone(), entry).is_some() {
                    let reason = format!("{name} is in another shard too");
                    return Err(malformed(&path, reason));
                }
            }
            files.push(file);
        }
        Ok(Self {
            folder: folder.to_owned(),
            files,
            tensors,
        })
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shapes of all tensors by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let tensors = self.tensors.iter();
        tensors
            .map(|(name, entry)| (name.clone(), entry.shape.clone()))
            .collect()
    }

    /// Whether both tensors exist and differ.
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

    fn same_bytes(&self, a: &TensorEntry, b: &TensorEntry) -> Result<bool, ModelError> {
        let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
        let length = a.bytes.end - a.bytes.start;
        for offset in (0..length).step_by(CHUNK) {
            let count = usize::try_from(length - offset).map_or(CHUNK, |rest| rest.min(CHUNK));
            for (chunk, entry) in [(&mut left, a), (&mut right, b)] {
                let file = &self.files[entry.file];
                file.read_exact_at(&mut chunk[..count], entry.bytes.start + offset)?;
            }
            if left[..count] != right[..count] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Checks that the folder has exactly the expected tensors, with their shapes and unquantised.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected, quantised or of another shape, with its name.
    pub fn check(&self, expected: &ExpectedTensors) -> Result<(), ModelError> {
        self.check_unquantised()?;
        for (name, shape) in &expected.tensors {
            let entry = self.tensors.get(self.stored_name(name, expected));
            let reason = match entry {
                None if self.lacks_prefix(name) => return Err(self.missing_prefix_error(name)),
                None => format!("the tensor {name} of shape {shape:?} is missing"),
                Some(entry) if entry.shape != *shape => format!(
                    "{name} has shape {:?}, the configuration says {shape:?}",
                    entry.shape
                ),
                Some(_) => continue,
            };
            let reason = format!("its weights do not fit its config.json: {reason}");
            return Err(malformed(&self.folder, reason));
        }
        let sources = expected.tensors.iter();
        let sources: BTreeSet<&str> = sources
            .map(|(name, _)| self.stored_name(name, expected))
            .collect();
        self.check_unused(|name| sources.contains(name) || is_ignorable(name, &expected.ignorable))
    }

    /// Whether the tensor exists under its name without the backbone prefix.
    fn lacks_prefix(&self, name: &str) -> bool {
        let bare = name.strip_prefix(BACKBONE_PREFIX);
        bare.is_some_and(|bare| self.tensors.contains_key(bare))
    }

    fn missing_prefix_error(&self, name: &str) -> ModelError {
        let bare = name.strip_prefix(BACKBONE_PREFIX).unwrap_or(name);
        let dir = self.folder.display().to_string();
        let how = CONVERTIBLE[0].2.replace("DIR", &dir);
        let reason = format!(
            "it has the tensor {bare} where {name} is needed: these are the weights of a model without a head; save \
             them with one in Python with {how}"
        );
        malformed(&self.folder, reason)
    }

    /// Checks that every tensor is used or an obsolete buffer.
    pub fn check_unused(&self, is_used: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let unexpected: Vec<&str> = self
            .names()
            .filter(|name| !is_obsolete_buffer(name) && !is_used(name))
            .collect();
        let others = match unexpected.as_slice() {
            [] => return Ok(()),
            [_] => String::new(),
            [_, others @ ..] => format!(" and {} more", others.len()),
        };
        let reason = format!(
            "it has the tensor {}{others}, which its config.json does not expect: ignoring it would change the \
             logits; use the weights that the configuration belongs to",
            unexpected[0]
        );
        Err(malformed(&self.folder, reason))
    }

    /// Checks that the weights are not quantised.
    pub fn check_unquantised(&self) -> Result<(), ModelError> {
        let marker = self.tensors.iter().find_map(|(name, entry)| {
            if is_quantised(name) {
                return Some(name.clone());
            }
            (!entry.is_float() && !is_obsolete_buffer(name))
                .then(|| format!("{name} is {}", entry.dtype))
        });
        match marker {
            None => Ok(()),
            Some(marker) => Err(malformed(
                &self.folder,
                format!("this folder is quantised ({marker}), use the unquantised one"),
            )),
        }
    }

    /// Name of an expected tensor in the files, which is the head's for an absent tied embedding.
    fn stored_name<'a>(&self, name: &'a str, expected: &ExpectedTensors) -> &'a str {
        let uses_head =
            expected.tied_head && name == EMBEDDING && !self.tensors.contains_key(EMBEDDING);
        if uses_head { HEAD } else { name }
    }

    /// Checks and loads the expected tensors as `dtype`.
    ///
    /// # Errors
    /// As [`Self::check`], and when a file cannot be read.
    pub fn read(
        &self,
        expected: &ExpectedTensors,
        dtype: DType,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>, ModelError> {
        self.check(expected)?;
        let names = expected.tensors.iter().map(|(name, _)| name);
        let read = names.map(|name| {
            let tensor = self.tensor(self.stored_name(name, expected), device)?;
            Ok((name.clone(), tensor.to_dtype(dtype)?))
        });
        read.collect()
    }

    /// Loads all tensors except obsolete buffers.
    ///
    /// # Errors
    /// When a file cannot be read or the weights are quantised.
    pub fn read_all(&self, device: &Device) -> Result<HashMap<String, Tensor>, ModelError> {
        self.check_unquantised()?;
        let names = self.names().filter(|name| !is_obsolete_buffer(name));
        let read = names.map(|name| Ok((name.to_owned(), self.tensor(name, device)?)));
        read.collect()
    }

    /// Reads one tensor: no more of a file is held at a time.
    fn tensor(&self, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        let entry = &self.tensors[name];
        let file = &self.files[entry.file];
        // The file has as many bytes, as its header was checked to say.
        let count = usize::try_from(entry.bytes.end - entry.bytes.start).unwrap_or_default();
        let mut bytes = vec![0; count];
        file.read_exact_at(&mut bytes, entry.bytes.start)?;
        let unknown = || {
            let dtype = &entry.dtype;
            let reason = format!("{name} has the unsupported dtype {dtype}");
            malformed(&file.path, reason)
        };
        let dtype = entry.known_dtype().and_then(|dtype| dtype.try_into().ok());
        let dtype = dtype.ok_or_else(unknown)?;
        Ok(Tensor::from_raw_buffer(
            &bytes,
            dtype,
            &entry.shape,
            device,
        )?)
    }
}

fn is_obsolete_buffer(name: &str) -> bool {
    OBSOLETE_BUFFERS.iter().any(|end| name.ends_with(end))
}

/// Whether the tensor matches one of the ignorable names or prefixes.
pub(crate) fn is_ignorable(name: &str, ignorable: &[&str]) -> bool {
    let fits = |known: &&str| name == *known || (known.ends_with('.') && name.starts_with(*known));
    ignorable.iter().any(fits)
}

fn is_quantised(name: &str) -> bool {
    let matches = |part: &str| {
        QUANTISED_PARTS.contains(&part)
            || part.contains("quant")
            || part
                .split('_')
                .any(|part| ["scale", "scales"].contains(&part))
    };
    name.split('.').any(matches)
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

/// Content of a safetensors file, whose header was checked.
pub(crate) fn read_weights(path: &Path) -> Result<Vec<u8>, ModelError> {
    let file = InputFile::open(path)?;
    let length = file.length;
    file.read(length)
}

/// Shapes of the tensors of a file by name, from its header.
///
/// # Errors
/// When the file is missing, its header is invalid, or a tensor is not of floating-point numbers.
pub(crate) fn shapes(path: &Path) -> Result<BTreeMap<String, Vec<usize>>, ModelError> {
    let tensors = header(&InputFile::open(path)?, 0)?.into_iter();
    let shape = |(name, entry): (String, TensorEntry)| match entry.is_float() {
        true => Ok((name, entry.shape)),
        false => {
            let reason = format!("{name} is {}, not of floating-point numbers", entry.dtype);
            Err(malformed(path, reason))
        }
    };
    tensors.map(shape).collect()
}

/// Start of a Git LFS pointer file.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec";

fn lfs_reason(path: &Path) -> String {
    let folder = path.parent().unwrap_or(Path::new(".")).display();
    format!(
        "it is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull` in {folder}"
    )
}

/// Checks that the content of a file is not a Git LFS pointer.
///
/// # Errors
/// When it is, with the command that downloads the file.
pub(crate) fn check_not_lfs_pointer(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    match bytes.starts_with(LFS_POINTER) {
        true => Err(malformed(path, lfs_reason(path))),
        false => Ok(()),
    }
}

/// Parses the header of the file with this index.
fn header(file: &InputFile, index: usize) -> Result<Vec<(String, TensorEntry)>, ModelError> {
    let path = &file.path;
    let invalid = |reason: &str| {
        malformed(
            path,
            format!("it is truncated or not a safetensors file ({reason})"),
        )
    };
    let file_length = file.length;
    let mut opened = file.file();
    let mut length = [0; LENGTH_BYTES as usize];
    opened
        .read_exact(&mut length)
        .map_err(|_| invalid("it ends before its header"))?;
    if LFS_POINTER.starts_with(&length) {
        return Err(malformed(path, lfs_reason(path)));
    }
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES.min(file_length.saturating_sub(LENGTH_BYTES)) {
        return Err(invalid("its header is longer than the file"));
    }
    let mut text = Vec::new();
    opened
        .take(length)
        .read_to_end(&mut text)
        .map_err(|source| unreadable(path, source))?;
    let header: Header =
        serde_json::from_slice(&text).map_err(|error| invalid(&error.to_string()))?;
    let start = LENGTH_BYTES + length;
    let entries: Vec<_> = header
        .tensors
        .into_iter()
        .map(|(name, tensor)| Some((name, tensor.entry(index, start)?)))
        .collect::<Option<_>>()
        .ok_or_else(|| invalid("a tensor ends before it begins"))?;
    check_extents(&entries, start, file_length).map_err(|reason| invalid(&reason))?;
    Ok(entries)
}

/// Checks that the tensors lie one after another, from the end of the header to the end of the file, and that each has
/// as many bytes as its shape needs.
fn check_extents(
    entries: &[(String, TensorEntry)],
    start: u64,
    file_length: u64,
) -> Result<(), String> {
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort_by_key(|(_, entry)| (entry.bytes.start, entry.bytes.end));
    let mut end = start;
    for (name, entry) in sorted {
        if entry.bytes.end > file_length {
            return Err(format!("{name} ends after the end of the file"));
        }
        if entry.bytes.start != end {
            return Err(format!(
                "{name} does not begin where the tensor before it ends"
            ));
        }
        end = entry.bytes.end;
        let count = entry.bytes.end - entry.bytes.start;
        if entry
            .expected_bytes()
            .is_some_and(|expected| expected != Some(count))
        {
            let (dtype, shape) = (&entry.dtype, &entry.shape);
            return Err(format!(
                "{name} has {count} bytes, which is not {dtype} {shape:?}"
            ));
        }
    }
    match end == file_length {
        true => Ok(()),
        false => Err(format!(
            "its tensors end {} bytes before the file",
            file_length - end
        )),
    }
}

impl TensorEntry {
    /// Whether it has floating-point numbers that are not quantised.
    fn is_float(&self) -> bool {
        ["F64", "F32", "F16", "BF16"].contains(&self.dtype.as_str())
    }

    /// The dtype, if it is one of the safetensors library.
    fn known_dtype(&self) -> Option<Dtype> {
        let name: StrDeserializer<'_, de::value::Error> = self.dtype.as_str().into_deserializer();
        Dtype::deserialize(name).ok()
    }

    /// Bytes that dtype and shape need, `Some(None)` for more than a number holds or no whole ones; `None` for a dtype
    /// that is not known.
    fn expected_bytes(&self) -> Option<Option<u64>> {
        let bits = u64::try_from(self.known_dtype()?.bitsize()).ok();
        let product = |bits: u64, size: &usize| bits.checked_mul(u64::try_from(*size).ok()?);
        let bits = bits.and_then(|bits| self.shape.iter().try_fold(bits, product));
        Some(
            bits.filter(|bits| bits.is_multiple_of(8))
                .map(|bits| bits / 8),
        )
    }
}

/// Header of a safetensors file.
struct Header {
    tensors: Vec<(String, HeaderTensor)>,
}

/// A tensor in a header.
#[derive(Deserialize)]
struct HeaderTensor {
    dtype: String,
    shape: Vec<usize>,
    /// First byte and end in the data section.
    data_offsets: [u64; 2],
}

impl HeaderTensor {
    /// The entry of a file whose data section begins at `start`; `None` when its offsets are no range.
    fn entry(self, file: usize, start: u64) -> Option<TensorEntry> {
        let [first, end] = self.data_offsets;
        let bytes = first.checked_add(start)?..end.checked_add(start)?;
        (bytes.start <= bytes.end).then_some(TensorEntry {
            dtype: self.dtype,
            shape: self.shape,
            file,
            bytes,
        })
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the tensors of a header, without its metadata.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let tensor = map.next_value();
            let tensor = tensor.map_err(|error| de::Error::custom(format!("{name}: {error}")))?;
            tensors.push((name, tensor));
        }
        Ok(Header { tensors })
    }
}

/// Index of a sharded model.
#[derive(Deserialize)]
struct Index {
    /// File of each tensor.
    weight_map: BTreeMap<String, FileName>,
}

/// Names of the files that the index of the sharded model in `folder` lists, each once, sorted.
///
/// # Errors
/// When there is no index, or it is malformed or lists what is not a plain file name.
pub fn indexed_files(folder: &Path) -> Result<Vec<FileName>, ModelError> {
    let path = folder.join(INDEX);
    let bytes = input_file::read(&path, MAX_INDEX_BYTES)?;
    check_not_lfs_pointer(&path, &bytes)?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| malformed(&path, format!("its weight_map is not usable ({error})")))?;
    let files: BTreeSet<FileName> = index.weight_map.into_values().collect();
    Ok(files.into_iter().collect())
}

/// Safetensors files of a folder: the single file, or those of the index.
fn file_paths(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let files = indexed_files(folder)?;
    let missing: Vec<&FileName> = files
        .iter()
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
    Ok(files.iter().map(|file| folder.join(file)).collect())
}

/// Alternative file formats: the supported file, files in other formats, and how to convert them.
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

/// Error for an unreadable file. If the folder has the content in another format, the error explains the conversion.
pub(crate) fn missing(path: &Path, source: io::Error) -> ModelError {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return unreadable(path, source);
    };
    if source.kind() != io::ErrorKind::NotFound {
        return unreadable(path, source);
    }
    let name = name.to_string_lossy();
    let dir = folder.display().to_string();
    let convertible = CONVERTIBLE
        .iter()
        .filter(|(supported, ..)| *supported == name);
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
    if name != SINGLE && name != "config.json" {
        return unreadable(path, source);
    }
    let with_suffix = |suffix: &str| {
        let entries = std::fs::read_dir(folder).ok()?.filter_map(Result::ok);
        let fits = |name: &String| name.ends_with(suffix) && !name.starts_with("adapter_");
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(fits).min()
    };
    if let Some(gguf) = with_suffix(".gguf") {
        let file = folder.join(&gguf);
        let reason = format!(
            "it has {gguf} but no {name}: name the file itself, {}, as the model",
            file.display()
        );
        return malformed(folder, reason);
    }
    if name != SINGLE {
        return unreadable(path, source);
    }
    match with_suffix(".safetensors") {
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
        config::ModelConfig,
        fixtures::{config_json, folder},
        folder::ModelFolder,
        weights::Weights,
    };

    /// A model folder with an additional tensor.
    fn folder_with(name: &str, shape: &[usize], dtype: DType) -> TempDir {
        let directory = folder();
        let shards = Shards::open(directory.path()).unwrap();
        let mut tensors: HashMap<String, Tensor> = shards.read_all(&Device::Cpu).unwrap();
        let tensor = Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
        tensors.insert(name.to_owned(), tensor);
        candle_core::safetensors::save(&tensors, directory.path().join(SINGLE)).unwrap();
        directory
    }

    /// The error that both the header check and loading the weights give.
    fn refused(directory: &TempDir) -> String {
        let opened = ModelFolder::open(directory.path(), None).unwrap();
        let checked = opened.check_weights().unwrap_err().to_string();
        let read = opened.weights(DType::F32, &Device::Cpu).unwrap_err();
        assert_eq!(read.to_string(), checked);
        checked
    }

    #[test]
    fn unexpected_tensors_are_refused_except_obsolete_buffers() {
        for name in [
            "model.layers.0.self_attn.o_proj.bias",
            "model.layers.1.input_layernorm.weight",
            "score.weight",
            "model.layers.0.self_attn.q_norm.weight",
        ] {
            let message = refused(&folder_with(name, &[8], DType::F32));
            assert!(
                message.contains(&format!(
                    "the tensor {name}, which its config.json does not expect"
                )),
                "{message}"
            );
        }
        for (name, dtype) in [
            ("model.layers.0.self_attn.rotary_emb.inv_freq", DType::F32),
            ("model.embeddings.position_ids", DType::I64),
        ] {
            let directory = folder_with(name, &[2], dtype);
            let opened = ModelFolder::open(directory.path(), None).unwrap();
            opened.check_weights().unwrap();
            let weights = opened.weights(DType::F32, &Device::Cpu).unwrap();
            assert!(weights.get(name).is_err());
        }
    }

    /// Weights that are read tensor by tensor are those of one file.
    #[test]
    fn a_file_that_is_replaced_after_its_header_was_read_is_not_read() {
        let (directory, file) = (folder(), "model.safetensors");
        let shards = Shards::open(directory.path()).unwrap();
        let before = shards.read_all(&Device::Cpu).unwrap();
        let ones = before
            .iter()
            .map(|(name, t)| (name.clone(), t.ones_like().unwrap()));
        let (replacement, ones) = (
            directory.path().join("new"),
            ones.collect::<HashMap<_, _>>(),
        );
        candle_core::safetensors::save(&ones, &replacement).unwrap();
        fs::rename(&replacement, directory.path().join(file)).unwrap();
        let after = shards.read_all(&Device::Cpu).unwrap();
        let values = |tensors: &HashMap<String, Tensor>| {
            let tensor = tensors[EMBEDDING].flatten_all().unwrap();
            tensor.to_vec1::<f32>().unwrap()
        };
        assert_eq!(values(&after), values(&before));
        assert_ne!(values(&after), values(&ones));
    }

    #[test]
    fn quantised_weights_are_detected_by_names_and_dtypes() {
        let projection = "model.layers.0.self_attn.q_proj";
        for (name, dtype, marker) in [
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
            let message = refused(&folder_with(
                &format!("{projection}.{name}"),
                &[8, 8],
                dtype,
            ));
            for part in [
                "this folder is quantised (",
                marker,
                "use the unquantised one",
            ] {
                assert!(message.contains(part), "{part:?} is not in {message}");
            }
        }
    }

    #[test]
    fn unsupported_dtypes_are_reported_by_name() {
        let directory = folder();
        let path = directory.path().join(SINGLE);
        let bytes = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes[..2000]).into_owned();
        let at = text.find("\"F32\"").unwrap();
        let mut bytes = bytes;
        bytes[at + 1..at + 4].copy_from_slice(b"I4X");
        fs::write(&path, bytes).unwrap();
        assert!(
            refused(&directory).contains("is I4X"),
            "{}",
            refused(&directory)
        );
    }

    #[test]
    fn a_tied_head_that_differs_is_kept_and_saved_as_untied() {
        for (offset, tied) in [(1.0, false), (0.0, true)] {
            let directory = folder();
            let shards = Shards::open(directory.path()).unwrap();
            let mut tensors = shards.read_all(&Device::Cpu).unwrap();
            let head = (&tensors[EMBEDDING] + offset).unwrap();
            tensors.insert(HEAD.into(), head);
            candle_core::safetensors::save(&tensors, directory.path().join(SINGLE)).unwrap();
            let opened = ModelFolder::open(directory.path(), None).unwrap();
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
    fn a_tied_head_or_embedding_may_be_absent_and_dtypes_may_differ() {
        let directory = folder();
        let shards = Shards::open(directory.path()).unwrap();
        let full = shards.read_all(&Device::Cpu).unwrap();
        let embedding = &full[EMBEDDING];
        let save = |tensors: &HashMap<String, Tensor>| {
            candle_core::safetensors::save(tensors, directory.path().join(SINGLE)).unwrap();
            let opened = ModelFolder::open(directory.path(), None).unwrap();
            assert!(opened.config.tied_head);
            let weights = opened.weights(DType::F32, &Device::Cpu).unwrap();
            weights.get(EMBEDDING).unwrap().to_vec2::<f32>().unwrap()
        };
        let mut head_alone = full.clone();
        head_alone.remove(EMBEDDING);
        head_alone.insert(HEAD.into(), embedding.clone());
        assert_eq!(save(&head_alone), embedding.to_vec2::<f32>().unwrap());

        let half = embedding.to_dtype(DType::BF16).unwrap();
        let mut both = full.clone();
        both.insert(HEAD.into(), half.to_dtype(DType::F32).unwrap());
        both.insert(EMBEDDING.into(), half);
        save(&both);
    }

    #[test]
    fn errors_for_other_formats_explain_the_conversion() {
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
                "name the file itself",
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
        for (name, other, remedy) in cases {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join(name);
            let message = |kind: io::ErrorKind| missing(&path, kind.into()).to_string();
            assert!(message(io::ErrorKind::NotFound).contains("failed to read"));
            fs::write(directory.path().join(other), "").unwrap();
            let found = message(io::ErrorKind::NotFound);
            let folder = directory.path().display().to_string();
            for part in [remedy, folder.as_str()] {
                assert!(found.contains(part), "{part:?} is not in {found}");
            }
            assert!(message(io::ErrorKind::PermissionDenied).contains("failed to read"));
        }
    }

    #[test]
    fn incomplete_models_are_refused() {
        let directory = folder();
        let file = |name: &str| directory.path().join(name);
        let message = || Shards::open(directory.path()).unwrap_err().to_string();
        fs::rename(file(SINGLE), file("model.fp16.safetensors")).unwrap();
        let variant = message();
        let expected = "has model.fp16.safetensors but neither model.safetensors nor model.safetensors.index.json";
        assert!(variant.contains(expected), "{variant}");
        fs::remove_file(file("model.fp16.safetensors")).unwrap();
        let none = message();
        let expected = "no model.safetensors.index.json either";
        assert!(
            none.contains("No such file") && none.contains(expected),
            "{none}"
        );

        for (shard, expected) in [
            (
                "../other.safetensors",
                "\"../other.safetensors\" is not a plain file name",
            ),
            ("/model.safetensors", "is not a plain file name"),
            ("/dev/zero", "\"/dev/zero\" is not a plain file name"),
            ("sub/model.safetensors", "is not a plain file name"),
            (
                "model-2.safetensors",
                "names model-2.safetensors of 1 files, which the folder does not hold",
            ),
        ] {
            let index = serde_json::json!({"weight_map": {"model.norm.weight": shard}});
            fs::write(file(INDEX), index.to_string()).unwrap();
            let refused = message();
            assert!(
                refused.contains(INDEX) && refused.contains(expected),
                "{refused}"
            );
        }

        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
        for name in [SINGLE, "tokenizer.json", "config.json"] {
            let directory = folder();
            fs::write(directory.path().join(name), pointer).unwrap();
            let opened = ModelFolder::open(directory.path(), None);
            let checked = opened.and_then(|folder| folder.check_weights());
            let refused = checked.unwrap_err().to_string();
            for part in [name, "a pointer of Git LFS", "git lfs pull"] {
                assert!(refused.contains(part), "{part:?} is not in {refused}");
            }
        }
    }

    #[test]
    fn tensors_of_a_model_without_a_head_are_recognised() {
        let directory = folder();
        let tensors = Shards::open(directory.path())
            .unwrap()
            .read_all(&Device::Cpu)
            .unwrap();
        let bare = |name: &String| {
            name.strip_prefix(BACKBONE_PREFIX)
                .unwrap_or(name)
                .to_owned()
        };
        let tensors: HashMap<_, _> = tensors
            .iter()
            .map(|(name, tensor)| (bare(name), tensor.clone()))
            .collect();
        candle_core::safetensors::save(&tensors, directory.path().join(SINGLE)).unwrap();
        let message = refused(&directory);
        for part in [
            "without a head",
            "AutoModelForCausalLM",
            "embed_tokens.weight",
        ] {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
    }

    #[test]
    fn invalid_headers_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(SINGLE);
        let file = |header: &str, data: usize| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(vec![0; data]);
            fs::write(&path, bytes).unwrap();
            shapes(&path).map_err(|error| error.to_string())
        };
        let tensor = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"dtype": {dtype:?}, "shape": {shape}, "data_offsets": {offsets}}}"#)
        };
        let one =
            |shape: &str, offsets: &str| format!(r#"{{"x": {}}}"#, tensor("F32", shape, offsets));
        let two = |a: &str, b: &str| {
            let (a, b) = (tensor("F32", "[1]", a), tensor("F32", "[1]", b));
            format!(r#"{{"__metadata__": {{}}, "x": {a}, "y": {b}}}"#)
        };
        let whole = two("[4, 8]", "[0, 4]");
        assert_eq!(file(&whole, 8).unwrap().len(), 2);
        let huge = "18446744073709551615";
        let overflow = format!("[{huge}, {huge}]");
        for (header, data, expected) in [
            ("{".to_owned(), 0, "EOF"),
            ("[]".to_owned(), 0, "tensors by name"),
            ("{\"x\": {}}".to_owned(), 0, "x: missing field `dtype`"),
            (one("[-1]", "[0, 4]"), 4, "x: invalid value"),
            (one("[1]", "[0, 4]"), 0, "x ends after the end of the file"),
            (one("[1]", "[4, 0]"), 4, "ends before it begins"),
            (one("[1]", &overflow), 4, "ends before it begins"),
            (one("[1]", "[0, 4]"), 5, "end 1 bytes before the file"),
            (one("[1]", "[1, 5]"), 5, "x does not begin where"),
            (one("[2]", "[0, 4]"), 4, "which is not F32 [2]"),
            (one("[0]", "[0, 4]"), 4, "which is not F32 [0]"),
            (one(&overflow, "[0, 4]"), 4, "which is not F32"),
            (two("[0, 4]", "[0, 4]"), 4, "y does not begin where"),
            (two("[0, 4]", "[8, 12]"), 12, "y does not begin where"),
        ] {
            let message = file(&header, data).unwrap_err();
            assert!(
                message.contains("truncated or not a safetensors file")
                    && message.contains(expected),
                "{expected:?} is not in {message}"
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
    fn a_configuration_loads_without_weights() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(
            directory.path().join("config.json"),
            config_json(8).to_string(),
        )
        .unwrap();
        let config = ModelConfig::load(directory.path()).unwrap();
        assert!(config.tied_head);
        assert!(Weights::load(directory.path(), &config, DType::F32, &Device::Cpu).is_err());
    }
}
