//! The weight store in memory: blobs by version, and an announcement of the newest.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};

use messages::{WeightsManifest, WeightsVersion};
use tokio::sync::watch;

use crate::error::TransportError;

/// State announced to readers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Announced {
    /// Manifest of the newest stored weights.
    pub(crate) latest: Option<WeightsManifest>,
    /// Whether publication has ended.
    pub(crate) closed: bool,
}

/// The store, shared by all handles.
#[derive(Debug)]
pub(crate) struct MemoryWeightStore {
    keep: NonZeroUsize,
    blobs: Mutex<BTreeMap<WeightsVersion, StoredBlob>>,
    announced: watch::Sender<Announced>,
}

#[derive(Debug, Clone)]
struct StoredBlob {
    manifest: WeightsManifest,
    blob: Arc<Vec<u8>>,
}

impl MemoryWeightStore {
    pub(crate) fn new(keep: NonZeroUsize) -> Self {
        Self {
            keep,
            blobs: Mutex::new(BTreeMap::new()),
            announced: watch::Sender::new(Announced::default()),
        }
    }

    /// Checks and stores `blob`, announces it, then drops superseded blobs.
    pub(crate) fn publish(
        &self,
        manifest: WeightsManifest,
        blob: Arc<Vec<u8>>,
    ) -> Result<(), TransportError> {
        if !manifest.describes(&blob) {
            return Err(TransportError::Mismatched {
                manifest,
                found: blob.len() as u64,
            });
        }
        let mut blobs = self.blobs();
        let current = self.announced.borrow().clone();
        if current.closed {
            return Err(TransportError::WeightStoreClosed);
        }
        if let Some(latest) = current.latest
            && latest.version >= manifest.version
        {
            return Err(TransportError::NotNewer {
                offered: manifest.version,
                current: latest.version,
            });
        }
        blobs.insert(
            manifest.version,
            StoredBlob {
                manifest: manifest.clone(),
                blob,
            },
        );
        self.announced
            .send_modify(|announced| announced.latest = Some(manifest));
        while blobs.len() > self.keep.get() {
            blobs.pop_first();
        }
        Ok(())
    }

    /// The blob of `version`, checked against its manifest.
    pub(crate) fn fetch(&self, version: WeightsVersion) -> Result<Arc<Vec<u8>>, TransportError> {
        let StoredBlob { manifest, blob } = self.find(version)?;
        if !manifest.describes(&blob) {
            return Err(TransportError::Corrupt {
                manifest,
                found: blob.len() as u64,
            });
        }
        Ok(blob)
    }

    fn find(&self, version: WeightsVersion) -> Result<StoredBlob, TransportError> {
        let blobs = self.blobs();
        if let Some(stored) = blobs.get(&version) {
            return Ok(stored.clone());
        }
        match (blobs.first_key_value(), blobs.last_key_value()) {
            (Some((&oldest, _)), Some((&newest, _))) if version < oldest => {
                Err(TransportError::Pruned { version, newest })
            }
            _ => Err(TransportError::Unpublished { version }),
        }
    }

    pub(crate) fn latest(&self) -> Option<WeightsManifest> {
        self.announced.borrow().latest.clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Announced> {
        self.announced.subscribe()
    }

    pub(crate) fn close(&self) {
        // Under the lock of the blobs, so that readers do not see the end during a publication.
        let _blobs = self.blobs();
        self.announced
            .send_modify(|announced| announced.closed = true);
    }

    fn blobs(&self) -> MutexGuard<'_, BTreeMap<WeightsVersion, StoredBlob>> {
        self.blobs
            .lock()
            .expect("nothing done under this lock panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_corrupt_blob_is_not_returned() {
        let version = WeightsVersion::at(1);
        let manifest = WeightsManifest::of(version, b"weights");
        for corrupt in [b"weight".to_vec(), b"weighty".to_vec()] {
            let weight_store = MemoryWeightStore::new(NonZeroUsize::MIN);
            weight_store
                .publish(manifest.clone(), Arc::new(b"weights".to_vec()))
                .expect("it matches its manifest");
            let found = corrupt.len() as u64;
            let replaced = weight_store.blobs().insert(
                version,
                StoredBlob {
                    manifest: manifest.clone(),
                    blob: Arc::new(corrupt),
                },
            );
            assert!(replaced.is_some());
            let expected = TransportError::Corrupt {
                manifest: manifest.clone(),
                found,
            };
            assert_eq!(weight_store.fetch(version), Err(expected));
        }
    }
}
