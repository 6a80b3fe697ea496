//! The weight store in memory: weights by version, shared with their readers, and an announcement of the newest.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};

use messages::WeightsVersion;
use tokio::sync::watch;

use crate::error::TransportError;

/// State announced to readers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Announced {
    /// Version of the newest stored weights.
    pub(crate) latest: Option<WeightsVersion>,
    /// Whether publication has ended.
    pub(crate) closed: bool,
}

/// The store, shared by all handles.
#[derive(Debug)]
pub(crate) struct MemoryWeightStore<W> {
    keep: NonZeroUsize,
    stored: Mutex<BTreeMap<WeightsVersion, Arc<W>>>,
    announced: watch::Sender<Announced>,
}

impl<W> MemoryWeightStore<W> {
    pub(crate) fn new(keep: NonZeroUsize) -> Self {
        Self {
            keep,
            stored: Mutex::new(BTreeMap::new()),
            announced: watch::Sender::new(Announced::default()),
        }
    }

    /// Stores weights, announces them, then drops superseded ones.
    pub(crate) fn publish(
        &self,
        version: WeightsVersion,
        weights: Arc<W>,
    ) -> Result<(), TransportError> {
        let mut stored = self.stored();
        let Announced { latest, closed } = *self.announced.borrow();
        if closed {
            return Err(TransportError::WeightStoreClosed);
        }
        if let Some(current) = latest.filter(|&latest| latest >= version) {
            let offered = version;
            return Err(TransportError::NotNewer { offered, current });
        }
        stored.insert(version, weights);
        self.announced
            .send_modify(|announced| announced.latest = Some(version));
        while stored.len() > self.keep.get() {
            stored.pop_first();
        }
        Ok(())
    }

    pub(crate) fn fetch(&self, version: WeightsVersion) -> Result<Arc<W>, TransportError> {
        let stored = self.stored();
        if let Some(weights) = stored.get(&version) {
            return Ok(Arc::clone(weights));
        }
        match (stored.first_key_value(), stored.last_key_value()) {
            (Some((&oldest, _)), Some((&newest, _))) if version < oldest => {
                Err(TransportError::Pruned { version, newest })
            }
            _ => Err(TransportError::Unpublished { version }),
        }
    }

    pub(crate) fn latest(&self) -> Option<WeightsVersion> {
        self.announced.borrow().latest
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Announced> {
        self.announced.subscribe()
    }

    pub(crate) fn close(&self) {
        // Under the lock of the weights, so that readers do not see the end during a publication.
        let _stored = self.stored();
        self.announced
            .send_modify(|announced| announced.closed = true);
    }

    fn stored(&self) -> MutexGuard<'_, BTreeMap<WeightsVersion, Arc<W>>> {
        self.stored
            .lock()
            .expect("nothing done under this lock panics")
    }
}
