//! The shelf in memory: whole blobs by version, and one announcement that is always the newest.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};

use messages::{WeightsManifest, WeightsVersion};
use tokio::sync::watch;

use crate::TransportError;

/// What the shelf tells its readers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Announced {
    /// The newest weights that lie complete on the shelf.
    pub(crate) latest: Option<WeightsManifest>,
    /// Whether anything newer may come.
    pub(crate) closed: bool,
}

/// The shelf that all its handles share.
#[derive(Debug)]
pub(crate) struct Shelf {
    keep: NonZeroUsize,
    blobs: Mutex<BTreeMap<WeightsVersion, Stored>>,
    announced: watch::Sender<Announced>,
}

#[derive(Debug, Clone)]
struct Stored {
    manifest: WeightsManifest,
    blob: Arc<Vec<u8>>,
}

impl Shelf {
    pub(crate) fn new(keep: NonZeroUsize) -> Self {
        Self {
            keep,
            blobs: Mutex::new(BTreeMap::new()),
            announced: watch::Sender::new(Announced::default()),
        }
    }

    /// Checks `blob`, lays it down, announces it, and only then drops what it supersedes.
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
            return Err(TransportError::ShelfClosed);
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
            Stored {
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

    /// The blob of `version`, checked against its manifest again.
    pub(crate) fn fetch(&self, version: WeightsVersion) -> Result<Arc<Vec<u8>>, TransportError> {
        let Stored { manifest, blob } = self.find(version)?;
        if !manifest.describes(&blob) {
            return Err(TransportError::Torn {
                manifest,
                found: blob.len() as u64,
            });
        }
        Ok(blob)
    }

    fn find(&self, version: WeightsVersion) -> Result<Stored, TransportError> {
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
        // Under the lock of the blobs, so that no publication is half done when readers see the end.
        let _blobs = self.blobs();
        self.announced
            .send_modify(|announced| announced.closed = true);
    }

    fn blobs(&self) -> MutexGuard<'_, BTreeMap<WeightsVersion, Stored>> {
        self.blobs
            .lock()
            .expect("nothing done under this lock panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_that_was_torn_on_the_shelf_is_not_handed_out() {
        let version = WeightsVersion::at(1);
        let manifest = WeightsManifest::of(version, b"weights");
        for torn in [b"weight".to_vec(), b"weighty".to_vec()] {
            let shelf = Shelf::new(NonZeroUsize::MIN);
            shelf
                .publish(manifest.clone(), Arc::new(b"weights".to_vec()))
                .expect("it is whole");
            let found = torn.len() as u64;
            let lying = shelf.blobs().insert(
                version,
                Stored {
                    manifest: manifest.clone(),
                    blob: Arc::new(torn),
                },
            );
            assert!(lying.is_some());
            let expected = TransportError::Torn {
                manifest: manifest.clone(),
                found,
            };
            assert_eq!(shelf.fetch(version), Err(expected));
        }
    }
}
