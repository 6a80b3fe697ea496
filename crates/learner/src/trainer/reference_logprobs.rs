//! The reference's log-probabilities of pairs from files, computed once and kept.
//!
//! Promises the bits that computing them again would give: the kernels compute each row of a batch alone. The file is whole
//! or absent, and one with other contents (another reference, other pairs, another precision) is not read. Does not know
//! when it is saved.

use std::{cell::Cell, collections::BTreeMap, fs, io::ErrorKind, path::PathBuf};

use messages::Digest;
use telemetry::write_atomically;

/// First bytes of the file.
const MAGIC: &[u8; 8] = b"agonref1";

/// Bytes of a digest.
const DIGEST_BYTES: usize = 32;

/// Storage of the reference's log-probabilities of pairs from files.
#[derive(Debug, Clone)]
pub struct ReferenceLogprobs {
    /// The file.
    pub path: PathBuf,
    /// Digest of everything that they depend on: reference, pairs, precision, build.
    pub key: Digest,
}

/// The log-probabilities by index of the pair: of all response tokens of both responses.
pub(crate) struct ReferenceCache {
    kept: ReferenceLogprobs,
    pairs: BTreeMap<u64, Box<[f32]>>,
    is_changed: Cell<bool>,
}

impl ReferenceCache {
    /// Values of the file; none if there is no file or it is not of this key.
    pub(crate) fn open(kept: ReferenceLogprobs) -> Self {
        let pairs = match fs::read(&kept.path) {
            Ok(bytes) => decode(&bytes, &kept.key),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error.to_string()),
        };
        let path = kept.path.display();
        let pairs = pairs.unwrap_or_else(|reason| {
            tracing::warn!(%path, reason, "the reference's log-probabilities of the pairs are computed again");
            BTreeMap::new()
        });
        if !pairs.is_empty() {
            let count = pairs.len();
            tracing::info!(%path, pairs = count, "using the reference's log-probabilities of an earlier session");
        }
        Self {
            kept,
            pairs,
            is_changed: Cell::new(false),
        }
    }

    /// The log-probabilities of a pair, if they are known and of this many tokens.
    pub(crate) fn get(&self, index: u64, tokens: usize) -> Option<&[f32]> {
        let found = self.pairs.get(&index)?;
        (found.len() == tokens).then_some(found)
    }

    /// Keeps the log-probabilities of a pair.
    pub(crate) fn insert(&mut self, index: u64, logp: &[f32]) {
        self.pairs.insert(index, logp.into());
        self.is_changed.set(true);
    }

    /// Writes the file if anything was added. A failure costs time only, and is logged.
    pub(crate) fn save(&self) {
        if !self.is_changed.get() {
            return;
        }
        match write_atomically(&self.kept.path, &encode(&self.pairs, &self.kept.key)) {
            Ok(()) => self.is_changed.set(false),
            Err(error) => {
                tracing::warn!(%error, "the reference's log-probabilities of the pairs were not saved");
            }
        }
    }
}

/// The file: magic, key, then of each pair index, number of tokens and values; at the end the digest of all that.
fn encode(pairs: &BTreeMap<u64, Box<[f32]>>, key: &Digest) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(key.0);
    for (index, values) in pairs {
        bytes.extend(index.to_le_bytes());
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    let digest = Digest::of(&bytes);
    bytes.extend(digest.0);
    bytes
}

/// Reads the contents of a file with this key.
///
/// # Errors
/// If it is damaged, or has another key.
fn decode(bytes: &[u8], key: &Digest) -> Result<BTreeMap<u64, Box<[f32]>>, String> {
    let damaged = || "the file is damaged".to_owned();
    let (content, digest) = bytes
        .split_last_chunk::<DIGEST_BYTES>()
        .ok_or_else(damaged)?;
    if Digest::of(content).0 != *digest {
        return Err(damaged());
    }
    let rest = content.strip_prefix(MAGIC).ok_or_else(damaged)?;
    let (found, mut rest) = rest
        .split_first_chunk::<DIGEST_BYTES>()
        .ok_or_else(damaged)?;
    if *found != key.0 {
        return Err(
            "the file is of another reference, other pairs, another precision or another build"
                .into(),
        );
    }
    let mut pairs = BTreeMap::new();
    while !rest.is_empty() {
        let (index, after) = rest.split_first_chunk::<8>().ok_or_else(damaged)?;
        let (length, after) = after.split_first_chunk::<8>().ok_or_else(damaged)?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| damaged())?;
        let bytes = length
            .checked_mul(4)
            .and_then(|end| after.split_at_checked(end));
        let (values, after) = bytes.ok_or_else(damaged)?;
        let (values, _) = values.as_chunks::<4>();
        let values = values.iter().map(|value| f32::from_le_bytes(*value));
        pairs.insert(u64::from_le_bytes(*index), values.collect());
        rest = after;
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_survives_and_another_or_a_damaged_one_is_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let kept = |key: &str| ReferenceLogprobs {
            path: folder.path().join("reference_logprobs.bin"),
            key: Digest::of(key.as_bytes()),
        };
        let mut cache = ReferenceCache::open(kept("one"));
        cache.save();
        assert!(!kept("one").path.exists(), "nothing was added");
        let values = [-1.5, f32::MIN_POSITIVE, -0.0];
        cache.insert(7, &values);
        cache.insert(1 << 31, &[]);
        cache.save();
        let again = ReferenceCache::open(kept("one"));
        let bits = |found: Option<&[f32]>| found.map(|f| f.iter().map(|x| x.to_bits()).collect());
        let expected: Vec<u32> = values.iter().map(|x| x.to_bits()).collect();
        assert_eq!(bits(again.get(7, 3)), Some(expected));
        assert_eq!(again.get(7, 2), None, "of other tokens");
        assert_eq!(again.get(1 << 31, 0), Some(&[][..]));
        assert!(ReferenceCache::open(kept("two")).pairs.is_empty());
        let whole = fs::read(&kept("one").path).expect("it was written");
        for (length, flip) in [
            (0, None),
            (60, None),
            (whole.len() - 1, None),
            (whole.len(), Some(50)),
        ] {
            let mut bytes = whole[..length].to_vec();
            if let Some(place) = flip {
                bytes[place] ^= 1;
            }
            assert!(decode(&bytes, &kept("one").key).is_err(), "{length} bytes");
        }
    }
}
