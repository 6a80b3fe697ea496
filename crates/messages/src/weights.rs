//! What a weight store holds, and the announcement of weights that are completely uploaded.
//!
//! A version names all models that are published together: the policy, and the reference once it has moved. A pair thus
//! names the reference of its recorded log-probabilities by the version of its weights.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::id::{Digest, WeightsVersion};

/// Version, digest and size of published weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsManifest {
    /// Version of the weights.
    pub version: WeightsVersion,
    /// Digest of the blob.
    pub digest: Digest,
    /// Length of the blob in bytes.
    pub bytes: u64,
}

impl WeightsManifest {
    /// Manifest of `blob` as `version`.
    #[must_use]
    pub fn of(version: WeightsVersion, blob: &[u8]) -> Self {
        Self {
            version,
            digest: Digest::of(blob),
            bytes: blob.len() as u64,
        }
    }

    /// Whether `blob` matches: the length, then the digest.
    #[must_use]
    pub fn describes(&self, blob: &[u8]) -> bool {
        self.bytes == blob.len() as u64 && self.digest == Digest::of(blob)
    }
}

/// Content of a weight store: shared by the roles of one process, and serialised as a blob between processes.
pub trait StoredWeights: Sized + Send + Sync + 'static {
    /// Serialises the weights. Equal weights give equal bytes.
    ///
    /// # Errors
    /// The reason why they cannot be.
    fn into_blob(self: Arc<Self>) -> Result<Vec<u8>, String>;

    /// Reads what [`Self::into_blob`] wrote.
    ///
    /// # Errors
    /// The reason why it cannot be read.
    fn from_blob(blob: Arc<Vec<u8>>) -> Result<Self, String>;
}

/// Weights that are a blob in memory too.
impl StoredWeights for Vec<u8> {
    fn into_blob(self: Arc<Self>) -> Result<Vec<u8>, String> {
        Ok(Arc::unwrap_or_clone(self))
    }

    fn from_blob(blob: Arc<Vec<u8>>) -> Result<Self, String> {
        Ok(Arc::unwrap_or_clone(blob))
    }
}
