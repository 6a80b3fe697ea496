//! The versioned weight store. One learner publishes, any number of actors read. Only the newest version is
//! announced, so that a late or busy reader catches up in one step.
//!
//! Promises: weights are complete before they are announced, versions only increase, and what crosses a network is
//! checked by its digest. In memory readers share the published weights: nothing is serialised or copied. It does not
//! know the contents of weights.

use std::num::NonZeroUsize;
use std::sync::Arc;

use messages::{StoredWeights, WeightsManifest, WeightsVersion};
use tokio::sync::watch;

use crate::error::TransportError;
use crate::memory::{Announced, MemoryWeightStore};
use crate::nats::{Connection, NatsWeightStore, RunRegistry};

/// A handle on a store of weights `W`; clones share the store.
#[derive(Debug)]
pub struct WeightStore<W> {
    backend: StoreBackend<W>,
}

#[derive(Debug)]
enum StoreBackend<W> {
    Memory(Arc<MemoryWeightStore<W>>),
    JetStream(Arc<NatsWeightStore>),
}

/// A subscription to the updates of a weight store.
#[derive(Debug, Clone)]
pub struct WeightUpdates {
    announced: watch::Receiver<Announced>,
}

/// Number of blobs kept on a server: the newest, and the previous one for readers that are fetching it.
const KEEP: NonZeroUsize = NonZeroUsize::new(2).expect("two is not zero");

impl<W: StoredWeights> WeightStore<W> {
    pub(crate) async fn over_jetstream(
        connection: &Arc<Connection>,
        registry: &RunRegistry,
    ) -> Result<Self, TransportError> {
        let weight_store = NatsWeightStore::open(connection, registry, KEEP).await?;
        Ok(Self {
            backend: StoreBackend::JetStream(weight_store),
        })
    }

    /// Stores `weights` as `version`, then announces it. Over JetStream they are serialised on the runtime's blocking
    /// threads and uploaded; a cancelled call may still take effect.
    ///
    /// # Errors
    /// When the version is not newer than the announced one, or the store is closed; the store is then unchanged. Over
    /// JetStream, when the weights cannot be serialised, or the server does not answer.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn publish(
        &self,
        version: WeightsVersion,
        weights: impl Into<Arc<W>>,
    ) -> Result<(), TransportError> {
        let weights = weights.into();
        match &self.backend {
            StoreBackend::Memory(weight_store) => weight_store.publish(version, weights),
            StoreBackend::JetStream(weight_store) => {
                let serialise = move || match weights.into_blob() {
                    Ok(blob) => Ok((WeightsManifest::of(version, &blob), blob)),
                    Err(reason) => Err(TransportError::Unserialisable { version, reason }),
                };
                let (manifest, blob) = on_blocking_thread("publish", version, serialise).await?;
                weight_store.publish(manifest, Arc::new(blob)).await
            }
        }
    }

    /// The weights of `version`. Over JetStream they are downloaded, and their digest is checked and their blob read on
    /// the runtime's blocking threads.
    ///
    /// # Errors
    /// When the version is no longer stored or was never published. Over JetStream, when it is corrupt, in which case the
    /// publisher uploads it again, is not of weights, or the server does not answer.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn fetch(&self, version: WeightsVersion) -> Result<Arc<W>, TransportError> {
        match &self.backend {
            StoreBackend::Memory(weight_store) => weight_store.fetch(version),
            StoreBackend::JetStream(weight_store) => {
                let blob = weight_store.fetch(version).await?;
                let read = move || match W::from_blob(blob) {
                    Ok(weights) => Ok(Arc::new(weights)),
                    Err(reason) => Err(TransportError::NotWeights { version, reason }),
                };
                on_blocking_thread("read", version, read).await
            }
        }
    }

    /// Version of the newest published weights; `None` before the first publication.
    #[must_use]
    pub fn latest(&self) -> Option<WeightsVersion> {
        match &self.backend {
            StoreBackend::Memory(weight_store) => weight_store.latest(),
            StoreBackend::JetStream(weight_store) => weight_store.latest(),
        }
    }

    /// Reads the announcement of the newest weights from the server; [`Self::latest`] may be a moment behind it. Does
    /// nothing in memory, where it never is.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn refresh(&self) -> Result<(), TransportError> {
        match &self.backend {
            StoreBackend::Memory(_) => Ok(()),
            StoreBackend::JetStream(weight_store) => weight_store.refresh().await,
        }
    }

    /// Subscribes to updates; the current one is delivered first.
    #[must_use]
    pub fn subscribe(&self) -> WeightUpdates {
        let announced = match &self.backend {
            StoreBackend::Memory(weight_store) => weight_store.subscribe(),
            StoreBackend::JetStream(weight_store) => weight_store.subscribe(),
        };
        WeightUpdates { announced }
    }

    /// Ends publication and wakes all waiting readers of this process. Stored weights can still be fetched.
    pub fn close(&self) {
        match &self.backend {
            StoreBackend::Memory(weight_store) => weight_store.close(),
            StoreBackend::JetStream(weight_store) => weight_store.close(),
        }
    }

    /// Uploads another file of the run over JetStream; does nothing in memory, where there is no other process.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn put_file(&self, name: &str, bytes: Vec<u8>) -> Result<(), TransportError> {
        match &self.backend {
            StoreBackend::Memory(_) => Ok(()),
            StoreBackend::JetStream(weight_store) => weight_store.put_file(name, bytes).await,
        }
    }

    /// Downloads a file of the run that was uploaded with [`Self::put_file`] and has at most `limit` bytes; `None` in
    /// memory.
    ///
    /// # Errors
    /// When the server does not answer or does not have the file, or the file is larger.
    pub async fn get_file(
        &self,
        name: &str,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, TransportError> {
        match &self.backend {
            StoreBackend::Memory(_) => Ok(None),
            StoreBackend::JetStream(weight_store) => {
                weight_store.get_file(name, limit).await.map(Some)
            }
        }
    }
}

impl<W> Clone for WeightStore<W> {
    fn clone(&self) -> Self {
        let backend = match &self.backend {
            StoreBackend::Memory(weight_store) => StoreBackend::Memory(Arc::clone(weight_store)),
            StoreBackend::JetStream(weight_store) => {
                StoreBackend::JetStream(Arc::clone(weight_store))
            }
        };
        Self { backend }
    }
}

impl<W: StoredWeights> Default for WeightStore<W> {
    /// An empty store in memory. It keeps only the newest weights, since a fetch there is immediate.
    fn default() -> Self {
        Self {
            backend: StoreBackend::Memory(Arc::new(MemoryWeightStore::new())),
        }
    }
}

impl WeightUpdates {
    /// Version of the newest weights, as [`WeightStore::latest`].
    #[must_use]
    pub fn latest(&self) -> Option<WeightsVersion> {
        self.announced.borrow().latest
    }

    /// Waits until the newest weights are newer than `version`, or published at all for `None`.
    ///
    /// # Errors
    /// When the store is closed, or its last handle is dropped, before that.
    pub async fn newer_than(
        &self,
        version: impl Into<Option<WeightsVersion>>,
    ) -> Result<WeightsVersion, TransportError> {
        let version = version.into();
        self.wait(|latest| Some(latest) > version).await
    }

    /// Waits until the newest weights are `version` or newer.
    ///
    /// # Errors
    /// As [`Self::newer_than`].
    pub async fn at_least(
        &self,
        version: WeightsVersion,
    ) -> Result<WeightsVersion, TransportError> {
        self.wait(|latest| latest >= version).await
    }

    async fn wait(
        &self,
        accepts: impl Fn(WeightsVersion) -> bool,
    ) -> Result<WeightsVersion, TransportError> {
        let mut announced = self.announced.clone();
        let is_accepted = |now: &Announced| now.latest.is_some_and(&accepts);
        let now = announced
            .wait_for(|now| now.closed || is_accepted(now))
            .await
            .map_err(|_| TransportError::WeightStoreClosed)?;
        now.latest
            .filter(|&latest| accepts(latest))
            .ok_or(TransportError::WeightStoreClosed)
    }
}

/// Runs `work` on a blocking thread; its panics propagate to the caller.
async fn on_blocking_thread<R: Send + 'static>(
    action: &'static str,
    version: WeightsVersion,
    work: impl FnOnce() -> Result<R, TransportError> + Send + 'static,
) -> Result<R, TransportError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(TransportError::Interrupted { action, version }),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};

    use super::*;

    fn blob(version: u64) -> Vec<u8> {
        format!("weights {version}").into_bytes()
    }

    const fn at(step: u64) -> WeightsVersion {
        WeightsVersion::at(step)
    }

    fn store_with(versions: &[u64]) -> WeightStore<Vec<u8>> {
        let weight_store = WeightStore::default();
        for &version in versions {
            let StoreBackend::Memory(inner) = &weight_store.backend else {
                unreachable!("the default store is in memory");
            };
            let published = inner.publish(at(version), Arc::new(blob(version)));
            published.expect("newer");
        }
        weight_store
    }

    async fn waits<F: Future>(future: Pin<&mut F>) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = std::future::ready(()) => true,
        }
    }

    #[tokio::test]
    async fn published_weights_are_announced_and_fetched() {
        let weight_store = WeightStore::<Vec<u8>>::default();
        assert_eq!(weight_store.latest(), None);
        weight_store
            .publish(at(0), blob(0))
            .await
            .expect("the first is newer than nothing");
        assert_eq!(weight_store.latest(), Some(at(0)));
        assert_eq!(
            *weight_store
                .fetch(WeightsVersion::REFERENCE)
                .await
                .expect("it is stored"),
            blob(0)
        );
    }

    #[tokio::test]
    async fn readers_in_memory_share_the_published_weights() {
        let (weight_store, weights) = (WeightStore::default(), Arc::new(blob(1)));
        let published = weight_store.publish(at(1), Arc::clone(&weights)).await;
        published.expect("the first");
        for _ in 0..2 {
            let fetched = weight_store.fetch(at(1)).await.expect("it is stored");
            assert!(Arc::ptr_eq(&fetched, &weights));
        }
    }

    #[tokio::test]
    async fn a_late_joiner_gets_the_current_weights_at_once() {
        let updates = store_with(&[0, 4]).subscribe();
        assert_eq!(updates.latest(), Some(at(4)));
        assert_eq!(updates.newer_than(None).await, Ok(at(4)));
        assert_eq!(updates.newer_than(at(3)).await, Ok(at(4)));
        assert_eq!(updates.at_least(at(4)).await, Ok(at(4)));
    }

    #[tokio::test]
    async fn a_publication_wakes_only_readers_that_wait_for_it() {
        let weight_store = store_with(&[1]);
        let updates = weight_store.subscribe();
        let mut newer = pin!(updates.newer_than(at(1)));
        let mut much_newer = pin!(updates.at_least(at(3)));
        assert!(waits(newer.as_mut()).await);
        weight_store.publish(at(2), blob(2)).await.expect("newer");
        assert_eq!(newer.await, Ok(at(2)));
        assert!(waits(much_newer.as_mut()).await);
        weight_store.publish(at(5), blob(5)).await.expect("newer");
        assert_eq!(much_newer.await, Ok(at(5)));
    }

    #[tokio::test]
    async fn a_rejected_publication_changes_nothing() {
        let not_newer = |offered| TransportError::NotNewer {
            offered: at(offered),
            current: at(7),
        };
        let cases = [(at(7), not_newer(7)), (at(6), not_newer(6))];
        for (offered, expected) in cases {
            let weight_store = store_with(&[7]);
            assert_eq!(
                weight_store.publish(offered, blob(offered.step)).await,
                Err(expected)
            );
            assert_eq!(weight_store.latest(), Some(at(7)));
            assert_eq!(
                *weight_store.fetch(at(7)).await.expect("still stored"),
                blob(7)
            );
            let eight = TransportError::Unpublished { version: at(8) };
            assert_eq!(weight_store.fetch(at(8)).await, Err(eight));
        }
    }

    #[tokio::test]
    async fn pruning_superseded_weights_keeps_fetched_ones_alive() {
        let weight_store = store_with(&[0]);
        let fetched = weight_store
            .fetch(WeightsVersion::REFERENCE)
            .await
            .expect("it is stored");
        weight_store.publish(at(4), blob(4)).await.expect("newer");
        let pruned = weight_store
            .fetch(WeightsVersion::REFERENCE)
            .await
            .expect_err("one is kept");
        let (version, newest) = (WeightsVersion::REFERENCE, at(4));
        assert_eq!(pruned, TransportError::Pruned { version, newest });
        assert_eq!(
            pruned.to_string(),
            "failed to fetch weights version 0: superseded and no longer stored; fetch version 4"
        );
        assert_eq!(*fetched, blob(0));
        assert_eq!(
            *weight_store.fetch(at(4)).await.expect("the newest is kept"),
            blob(4)
        );
    }

    #[tokio::test]
    async fn closing_the_store_wakes_readers_and_rejects_publications() {
        let weight_store = store_with(&[1]);
        let updates = weight_store.subscribe();
        let mut newer = pin!(updates.newer_than(at(1)));
        assert!(waits(newer.as_mut()).await);
        weight_store.close();
        assert_eq!(newer.await, Err(TransportError::WeightStoreClosed));
        assert_eq!(updates.newer_than(None).await, Ok(at(1)));
        assert_eq!(
            weight_store.publish(at(2), blob(2)).await,
            Err(TransportError::WeightStoreClosed)
        );
        assert_eq!(
            *weight_store.fetch(at(1)).await.expect("still stored"),
            blob(1)
        );
    }

    #[tokio::test]
    async fn dropping_the_last_handle_wakes_readers() {
        let updates = store_with(&[1]).subscribe();
        assert_eq!(
            updates.newer_than(at(1)).await,
            Err(TransportError::WeightStoreClosed)
        );
    }
}
