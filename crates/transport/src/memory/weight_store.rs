//! The weight store in memory: the newest weights, shared with their readers, and their announcement.

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
    newest: Mutex<Option<(WeightsVersion, Arc<W>)>>,
    announced: watch::Sender<Announced>,
}

impl<W> MemoryWeightStore<W> {
    pub(crate) fn new() -> Self {
        Self {
            newest: Mutex::new(None),
            announced: watch::Sender::new(Announced::default()),
        }
    }

    /// Stores weights and announces them. Those before are superseded.
    pub(crate) fn publish(
        &self,
        version: WeightsVersion,
        weights: Arc<W>,
    ) -> Result<(), TransportError> {
        let mut newest = self.newest();
        let Announced { latest, closed } = *self.announced.borrow();
        if closed {
            return Err(TransportError::WeightStoreClosed);
        }
        if let Some(current) = latest.filter(|&latest| latest >= version) {
            let offered = version;
            return Err(TransportError::NotNewer { offered, current });
        }
        let superseded = newest.replace((version, weights));
        self.announced
            .send_modify(|announced| announced.latest = Some(version));
        // Freeing them takes a while; readers need not wait for it.
        drop(newest);
        drop(superseded);
        Ok(())
    }

    pub(crate) fn fetch(&self, version: WeightsVersion) -> Result<Arc<W>, TransportError> {
        match &*self.newest() {
            Some((newest, weights)) if *newest == version => Ok(Arc::clone(weights)),
            &Some((newest, _)) if newest > version => {
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
        let _newest = self.newest();
        self.announced
            .send_modify(|announced| announced.closed = true);
    }

    fn newest(&self) -> MutexGuard<'_, Option<(WeightsVersion, Arc<W>)>> {
        self.newest
            .lock()
            .expect("nothing done under this lock panics")
    }
}
