//! Header of a GGUF file: metadata and the table of tensors.
//!
//! The file is untrusted: every length is checked against what is left of the file before anything is allocated, elements
//! are kept only of arrays that are read, and every tensor has its own place in the file. Source: the GGUF specification of the ggml project, versions 2 and 3, little-endian.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufReader, Read},
};

use candle_core::quantized::GgmlDType;

/// Largest header in bytes: a vocabulary of a million tokens with its merges has 60 MB.
const MAX_HEADER_BYTES: u64 = 1 << 29;
/// Largest number of metadata entries, and of tensors.
const MAX_ENTRIES: u64 = 1 << 17;
/// Largest number of elements of an array.
const MAX_ELEMENTS: u64 = 1 << 22;
/// Number of the type of arrays.
const ARRAY: u32 = 9;
/// Largest number of dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
/// Keys of the arrays that are read.
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
/// Alignment of tensors where the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value. Arrays do not nest; one that is not read is empty.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum MetadataValue {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<MetadataValue>),
}

/// A tensor of the file.
#[derive(Debug, Clone)]
pub(super) struct GgufTensor {
    pub(super) name: String,
    /// Shape, outermost dimension first.
    pub(super) shape: Vec<usize>,
    pub(super) dtype: GgmlDType,
    /// Position in the file in bytes.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) bytes: u64,
}

/// The header of a file.
#[derive(Debug)]
pub(super) struct GgufHeader {
    pub(super) metadata: BTreeMap<String, MetadataValue>,
    pub(super) tensors: Vec<GgufTensor>,
}

impl MetadataValue {
    pub(super) fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    pub(super) fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Signed(value) => Some(*value as f64),
            _ => None,
        }
    }

    pub(super) fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }
}

impl GgufHeader {
    /// The value of a key, read by `read`; `None` if the file does not have it.
    ///
    /// # Errors
    /// When `read` gives `None`: the value is not `expected`.
    pub(super) fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a MetadataValue) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        read(value)
            .map(Some)
            .ok_or_else(|| format!("{key} is not {expected}"))
    }

    /// The text of a key; `None` if the file does not have it.
    ///
    /// # Errors
    /// When the value is no text.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, String> {
        self.get(key, "a text", MetadataValue::as_text)
    }

    /// The flag of a key; `None` if the file does not have it.
    ///
    /// # Errors
    /// When the value is neither true nor false.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.get(key, "true or false", MetadataValue::as_bool)
    }

    /// Reads the header of a file of `length` bytes.
    ///
    /// # Errors
    /// The reason why it is not a GGUF file of a supported version, or is malformed.
    pub(super) fn read(file: File, length: u64) -> Result<Self, String> {
        let mut reader = HeaderReader {
            input: BufReader::new(file),
            position: 0,
            limit: length.min(MAX_HEADER_BYTES),
        };
        if reader.bytes::<4>()? != *b"GGUF" {
            return Err("it does not begin with GGUF".into());
        }
        let version = reader.u32()?;
        if (2..=3).contains(&version.swap_bytes()) {
            return Err("it is big-endian; supported is little-endian".into());
        }
        if !(2..=3).contains(&version) {
            return Err(format!(
                "it is of GGUF version {version}; supported are 2 and 3, little-endian"
            ));
        }
        let tensors = reader.count("tensors")?;
        let entries = reader.count("metadata entries")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let is_read = [TOKENS, TOKEN_TYPES, SCORES, MERGES].contains(&&*key);
            let value = reader
                .value_or_array(kind, is_read)
                .map_err(|reason| format!("{key}: {reason}"))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("it has {key} twice"));
            }
        }
        let tensors: Result<Vec<_>, _> = (0..tensors).map(|_| reader.tensor()).collect();
        let mut header = Self {
            metadata,
            tensors: tensors?,
        };
        header.place_tensors(reader.position, length)?;
        Ok(header)
    }

    /// Moves the tensors' positions from the end of the header, `from`, to the start of the file, and checks that all lie
    /// in its `length` bytes, each in a place of its own and with a name of its own.
    fn place_tensors(&mut self, from: u64, length: u64) -> Result<(), String> {
        let alignment = self.metadata.get("general.alignment");
        let alignment = alignment.map_or(Some(DEFAULT_ALIGNMENT), MetadataValue::as_u64);
        let alignment = alignment.filter(|a| a.is_power_of_two());
        let alignment = alignment.ok_or("general.alignment is not a power of two")?;
        let data = from
            .checked_next_multiple_of(alignment)
            .ok_or("general.alignment is too large")?;
        for tensor in &mut self.tensors {
            let start = data.checked_add(tensor.start);
            let end = start.and_then(|start| start.checked_add(tensor.bytes));
            match (start, end) {
                (Some(start), Some(end)) if end <= length => tensor.start = start,
                _ => {
                    return Err(format!(
                        "the tensor {} is not in the file, which has {length} bytes: it is cut off",
                        tensor.name
                    ));
                }
            }
        }
        let mut by_place: Vec<&GgufTensor> = self.tensors.iter().collect();
        by_place.sort_by_key(|tensor| tensor.start);
        for pair in by_place.windows(2) {
            if let [first, second] = pair
                && first.start + first.bytes > second.start
            {
                let (first, second) = (&first.name, &second.name);
                return Err(format!("its tensors {first} and {second} overlap"));
            }
        }
        let mut names = BTreeSet::new();
        match self.tensors.iter().find(|t| !names.insert(&t.name)) {
            Some(twice) => Err(format!("it has the tensor {} twice", twice.name)),
            None => Ok(()),
        }
    }
}

/// Bounded reader of a header.
struct HeaderReader {
    input: BufReader<File>,
    position: u64,
    limit: u64,
}

impl HeaderReader {
    /// Counts `bytes` as read.
    fn advance(&mut self, bytes: u64) -> Result<(), String> {
        self.position = self.position.saturating_add(bytes);
        match self.position <= self.limit {
            true => Ok(()),
            false => Err("its header is cut off, or larger than 512 MiB".into()),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.advance(N as u64)?;
        let mut bytes = [0; N];
        let read = self.input.read_exact(&mut bytes);
        read.map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn count(&mut self, what: &str) -> Result<u64, String> {
        let count = self.u64()?;
        match count <= MAX_ENTRIES {
            true => Ok(count),
            false => Err(format!(
                "it has {count} {what}; at most {MAX_ENTRIES} are read"
            )),
        }
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.u64()?;
        self.advance(length)?;
        let mut bytes = vec![0; length as usize];
        let read = self.input.read_exact(&mut bytes);
        read.map_err(|error| error.to_string())?;
        String::from_utf8(bytes).map_err(|_| "a text is not UTF-8".into())
    }

    /// A value, which may be an array. Its elements are kept if it is read.
    fn value_or_array(&mut self, kind: u32, is_read: bool) -> Result<MetadataValue, String> {
        if kind != ARRAY {
            return self.value(kind);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        if count > MAX_ELEMENTS {
            return Err(format!(
                "it has {count} elements; at most {MAX_ELEMENTS} are read"
            ));
        }
        let mut elements = Vec::new();
        for _ in 0..count {
            let element = self.value(kind)?;
            if is_read {
                elements.push(element);
            }
        }
        Ok(MetadataValue::Array(elements))
    }

    fn value(&mut self, kind: u32) -> Result<MetadataValue, String> {
        let signed = |value: i64| Ok(MetadataValue::Signed(value));
        match kind {
            0 => Ok(MetadataValue::Unsigned(
                u8::from_le_bytes(self.bytes()?).into(),
            )),
            1 => signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Ok(MetadataValue::Unsigned(
                u16::from_le_bytes(self.bytes()?).into(),
            )),
            3 => signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => Ok(MetadataValue::Unsigned(self.u32()?.into())),
            5 => signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Ok(MetadataValue::Float(
                f32::from_le_bytes(self.bytes()?).into(),
            )),
            7 => Ok(MetadataValue::Bool(self.bytes::<1>()? != [0])),
            8 => self.text().map(MetadataValue::Text),
            10 => Ok(MetadataValue::Unsigned(self.u64()?)),
            11 => signed(i64::from_le_bytes(self.bytes()?)),
            12 => Ok(MetadataValue::Float(f64::from_le_bytes(self.bytes()?))),
            other => Err(format!(
                "its values have the type {other}, which is unknown here"
            )),
        }
    }

    fn tensor(&mut self) -> Result<GgufTensor, String> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(format!("the tensor {name} has {dimensions} dimensions"));
        }
        let shape: Result<Vec<u64>, _> = (0..dimensions).map(|_| self.u64()).collect();
        // The file has the innermost dimension first.
        let shape: Vec<u64> = shape?.into_iter().rev().collect();
        let (kind, start) = (self.u32()?, self.u64()?);
        let dtype = dtype(kind).ok_or_else(|| {
            format!(
                "the tensor {name} is of ggml type {kind}; supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, \
                 Q4_K, Q5_K and Q6_K"
            )
        })?;
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let impossible = || format!("the tensor {name} has the impossible shape {shape:?}");
        let elements = elements.filter(|&n| n > 0 && !shape.is_empty());
        let elements = elements.ok_or_else(impossible)?;
        let block = dtype.block_size() as u64;
        let innermost = shape.last().copied().unwrap_or(1);
        if !innermost.is_multiple_of(block) {
            return Err(format!(
                "the rows of the tensor {name} have {innermost} elements, which are no blocks of {block}"
            ));
        }
        let bytes = (elements / block).checked_mul(dtype.type_size() as u64);
        Ok(GgufTensor {
            shape: shape.iter().map(|&d| d as usize).collect(),
            bytes: bytes.ok_or_else(impossible)?,
            name,
            dtype,
            start,
        })
    }
}

/// The supported type of this number.
fn dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_that_overlap_are_refused() {
        let tensor = |name: &str, start| GgufTensor {
            name: name.into(),
            shape: vec![16],
            dtype: GgmlDType::F32,
            start,
            bytes: 64,
        };
        let placed = |second| {
            let mut header = GgufHeader {
                metadata: BTreeMap::new(),
                tensors: vec![tensor("b", second), tensor("a", 0)],
            };
            header
                .place_tensors(32, 1024)
                .map(|()| header.tensors[0].start)
        };
        assert_eq!(placed(64), Ok(96));
        assert_eq!(placed(32), Err("its tensors a and b overlap".into()));
    }
}
