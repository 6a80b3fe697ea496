//! The announcement of weights that lie complete on the shelf.

use serde::{Deserialize, Serialize};

use crate::{Digest, WeightsVersion};

/// What a reader must know before it fetches weights: which they are and how to know them when whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsManifest {
    /// The learner step after which they were taken.
    pub version: WeightsVersion,
    /// The digest of the blob.
    pub digest: Digest,
    /// The blob's length in bytes.
    pub bytes: u64,
}

impl WeightsManifest {
    /// The manifest of `blob` as `version`.
    #[must_use]
    pub fn of(version: WeightsVersion, blob: &[u8]) -> Self {
        Self {
            version,
            digest: Digest::of(blob),
            bytes: blob.len() as u64,
        }
    }

    /// Whether `blob` is what was announced: the length, then the digest.
    #[must_use]
    pub fn describes(&self, blob: &[u8]) -> bool {
        self.bytes == blob.len() as u64 && self.digest == Digest::of(blob)
    }
}
