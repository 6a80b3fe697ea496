//! Where finished weights lie for whoever wants them. One learner publishes, any number of actors
//! read; only the newest version is announced, so a reader that comes late or was busy misses nothing
//! that still matters.
//!
//! Weights are complete before they are announced, versions only grow, and digests are checked on
//! the way in and on the way out. The shelf does not know what is in a blob.

use std::num::NonZeroUsize;
use std::sync::Arc;

use messages::{WeightsManifest, WeightsVersion};
use tokio::sync::watch;

use crate::TransportError;
use crate::jetstream::{Connection, JetShelf, Register};
use crate::memory::{Announced, Shelf};

/// A handle on the shelf; clones are handles on the same one.
#[derive(Debug, Clone)]
pub struct WeightsShelf {
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Memory(Arc<Shelf>),
    JetStream(Arc<JetShelf>),
}

/// A reader's view of what the shelf announces.
#[derive(Debug, Clone)]
pub struct Announcements {
    announced: watch::Receiver<Announced>,
}

impl WeightsShelf {
    /// How many blobs a shelf on a server keeps: the newest, and the one before it for readers that are
    /// fetching it.
    const KEEP: NonZeroUsize = NonZeroUsize::new(2).expect("two is not zero");

    /// An empty shelf in memory that keeps the newest `keep` blobs. A blob that somebody has fetched
    /// lives on in their hands.
    #[must_use]
    pub fn in_memory(keep: NonZeroUsize) -> Self {
        Self {
            kind: Kind::Memory(Arc::new(Shelf::new(keep))),
        }
    }

    pub(crate) async fn over_jetstream(
        connection: &Arc<Connection>,
        register: &Register,
    ) -> Result<Self, TransportError> {
        let shelf = JetShelf::open(connection, register, Self::KEEP).await?;
        Ok(Self {
            kind: Kind::JetStream(shelf),
        })
    }

    /// Lays `blob` on the shelf, then announces `manifest`. The digest is computed on the runtime's
    /// blocking threads; a call that is cancelled may still take effect.
    ///
    /// # Errors
    /// When the blob is not the one the manifest describes, when the version is not newer than the
    /// announced one, or when the shelf is closed; the shelf is then unchanged. Over JetStream, when the
    /// server cannot be had.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn publish(
        &self,
        manifest: WeightsManifest,
        blob: impl Into<Arc<Vec<u8>>>,
    ) -> Result<(), TransportError> {
        let (blob, version) = (blob.into(), manifest.version);
        match &self.kind {
            Kind::Memory(shelf) => {
                let shelf = Arc::clone(shelf);
                let publish = move || shelf.publish(manifest, blob);
                on_blocking_thread("publish", version, publish).await
            }
            Kind::JetStream(shelf) => shelf.publish(manifest, blob).await,
        }
    }

    /// The blob of `version`, its digest checked on the runtime's blocking threads.
    ///
    /// # Errors
    /// When that version is no longer on the shelf, was never published, or is not what was announced.
    /// Over JetStream, when the server cannot be had; a blob that is not what was announced is laid down
    /// again by whoever published it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn fetch(&self, version: WeightsVersion) -> Result<Arc<Vec<u8>>, TransportError> {
        match &self.kind {
            Kind::Memory(shelf) => {
                let shelf = Arc::clone(shelf);
                on_blocking_thread("fetch", version, move || shelf.fetch(version)).await
            }
            Kind::JetStream(shelf) => shelf.fetch(version).await,
        }
    }

    /// The newest weights that lie complete on the shelf; `None` before the first publication.
    #[must_use]
    pub fn latest(&self) -> Option<WeightsManifest> {
        match &self.kind {
            Kind::Memory(shelf) => shelf.latest(),
            Kind::JetStream(shelf) => shelf.latest(),
        }
    }

    /// What the shelf announces from now on, the current weights included.
    #[must_use]
    pub fn subscribe(&self) -> Announcements {
        let announced = match &self.kind {
            Kind::Memory(shelf) => shelf.subscribe(),
            Kind::JetStream(shelf) => shelf.subscribe(),
        };
        Announcements { announced }
    }

    /// Ends publication and wakes whoever waits for newer weights in this process. What lies there can
    /// still be fetched.
    pub fn close(&self) {
        match &self.kind {
            Kind::Memory(shelf) => shelf.close(),
            Kind::JetStream(shelf) => shelf.close(),
        }
    }

    /// Lays down a file of the run that is no weights, over JetStream; in memory there is nobody to read
    /// it.
    ///
    /// # Errors
    /// When the server cannot be had.
    pub async fn put_file(&self, name: &str, bytes: Vec<u8>) -> Result<(), TransportError> {
        match &self.kind {
            Kind::Memory(_) => Ok(()),
            Kind::JetStream(shelf) => shelf.put_file(name, bytes).await,
        }
    }

    /// A file of the run that is no weights; `None` in memory.
    ///
    /// # Errors
    /// When the server cannot be had, or does not have it.
    pub async fn get_file(&self, name: &str) -> Result<Option<Vec<u8>>, TransportError> {
        match &self.kind {
            Kind::Memory(_) => Ok(None),
            Kind::JetStream(shelf) => shelf.get_file(name).await.map(Some),
        }
    }
}

impl Default for WeightsShelf {
    /// A shelf in memory, where a fetch takes no time: the newest blob is enough.
    fn default() -> Self {
        Self::in_memory(NonZeroUsize::MIN)
    }
}

impl Announcements {
    /// The newest weights, as [`WeightsShelf::latest`].
    #[must_use]
    pub fn latest(&self) -> Option<WeightsManifest> {
        self.announced.borrow().latest.clone()
    }

    /// The newest weights as soon as they are newer than `version`: at once when they are already. A
    /// reader that has none yet passes `None` and gets the current ones.
    ///
    /// # Errors
    /// When the shelf is closed, or no handle on it is left, before anything newer came.
    pub async fn newer_than(
        &self,
        version: impl Into<Option<WeightsVersion>>,
    ) -> Result<WeightsManifest, TransportError> {
        let version = version.into();
        self.wait(|manifest| Some(manifest.version) > version).await
    }

    /// The newest weights as soon as they are `version` or newer: at once when they are already.
    ///
    /// # Errors
    /// As [`Self::newer_than`].
    pub async fn at_least(
        &self,
        version: WeightsVersion,
    ) -> Result<WeightsManifest, TransportError> {
        self.wait(|manifest| manifest.version >= version).await
    }

    async fn wait(
        &self,
        wanted: impl Fn(&WeightsManifest) -> bool,
    ) -> Result<WeightsManifest, TransportError> {
        let mut announced = self.announced.clone();
        let is_wanted = |now: &Announced| now.latest.as_ref().is_some_and(&wanted);
        let now = announced
            .wait_for(|now| now.closed || is_wanted(now))
            .await
            .map_err(|_| TransportError::ShelfClosed)?;
        now.latest
            .clone()
            .filter(&wanted)
            .ok_or(TransportError::ShelfClosed)
    }
}

/// Runs `work` where it may take its time. Its panics are the caller's.
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

    fn manifest(version: u64) -> WeightsManifest {
        WeightsManifest::of(WeightsVersion::at(version), &blob(version))
    }

    fn shelf_with(versions: &[u64]) -> WeightsShelf {
        let shelf = WeightsShelf::default();
        for &version in versions {
            let Kind::Memory(inner) = &shelf.kind else {
                unreachable!("a shelf is in memory unless told otherwise");
            };
            let published = inner.publish(manifest(version), Arc::new(blob(version)));
            published.expect("newer and whole");
        }
        shelf
    }

    async fn waits<F: Future>(future: Pin<&mut F>) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = std::future::ready(()) => true,
        }
    }

    #[tokio::test]
    async fn what_is_published_is_announced_and_fetched() {
        let shelf = WeightsShelf::default();
        assert_eq!(shelf.latest(), None);
        shelf
            .publish(manifest(0), blob(0))
            .await
            .expect("the first is newer than nothing");
        assert_eq!(shelf.latest(), Some(manifest(0)));
        assert_eq!(
            *shelf
                .fetch(WeightsVersion::REFERENCE)
                .await
                .expect("it lies there"),
            blob(0)
        );
    }

    #[tokio::test]
    async fn a_late_joiner_gets_the_current_weights_at_once() {
        let announcements = shelf_with(&[0, 4]).subscribe();
        assert_eq!(announcements.latest(), Some(manifest(4)));
        assert_eq!(announcements.newer_than(None).await, Ok(manifest(4)));
        assert_eq!(
            announcements.newer_than(WeightsVersion::at(3)).await,
            Ok(manifest(4))
        );
        assert_eq!(
            announcements.at_least(WeightsVersion::at(4)).await,
            Ok(manifest(4))
        );
    }

    #[tokio::test]
    async fn a_publication_wakes_whoever_waits_for_it_and_nobody_else() {
        let shelf = shelf_with(&[1]);
        let announcements = shelf.subscribe();
        let mut newer = pin!(announcements.newer_than(WeightsVersion::at(1)));
        let mut much_newer = pin!(announcements.at_least(WeightsVersion::at(3)));
        assert!(waits(newer.as_mut()).await);
        shelf
            .publish(manifest(2), blob(2))
            .await
            .expect("newer and whole");
        assert_eq!(newer.await, Ok(manifest(2)));
        assert!(waits(much_newer.as_mut()).await);
        shelf
            .publish(manifest(5), blob(5))
            .await
            .expect("newer and whole");
        assert_eq!(much_newer.await, Ok(manifest(5)));
    }

    #[tokio::test]
    async fn a_refused_publication_changes_nothing() {
        let not_newer = |offered| TransportError::NotNewer {
            offered: WeightsVersion::at(offered),
            current: WeightsVersion::at(7),
        };
        let torn = |found| TransportError::Mismatched {
            manifest: manifest(8),
            found,
        };
        let cases = [
            (manifest(7), blob(7), not_newer(7)),
            (manifest(6), blob(6), not_newer(6)),
            (manifest(8), blob(9), torn(9)),
            (manifest(8), b"weights".to_vec(), torn(7)),
        ];
        for (manifest_offered, blob_offered, expected) in cases {
            let shelf = shelf_with(&[7]);
            assert_eq!(
                shelf.publish(manifest_offered, blob_offered).await,
                Err(expected)
            );
            assert_eq!(shelf.latest(), Some(manifest(7)));
            assert_eq!(
                *shelf
                    .fetch(WeightsVersion::at(7))
                    .await
                    .expect("still there"),
                blob(7)
            );
            let eight = TransportError::Unpublished {
                version: WeightsVersion::at(8),
            };
            assert_eq!(shelf.fetch(WeightsVersion::at(8)).await, Err(eight));
        }
    }

    #[tokio::test]
    async fn superseded_weights_are_pruned_but_not_from_hands_that_hold_them() {
        let shelf = shelf_with(&[0]);
        let held = shelf
            .fetch(WeightsVersion::REFERENCE)
            .await
            .expect("it lies there");
        shelf
            .publish(manifest(4), blob(4))
            .await
            .expect("newer and whole");
        let gone = shelf
            .fetch(WeightsVersion::REFERENCE)
            .await
            .expect_err("one is kept");
        let (version, newest) = (WeightsVersion::REFERENCE, WeightsVersion::at(4));
        assert_eq!(gone, TransportError::Pruned { version, newest });
        assert_eq!(
            gone.to_string(),
            "fetch weights version 0: superseded and no longer on the shelf; fetch version 4"
        );
        assert_eq!(*held, blob(0));
        assert_eq!(
            *shelf
                .fetch(WeightsVersion::at(4))
                .await
                .expect("the newest is kept"),
            blob(4)
        );
    }

    #[tokio::test]
    async fn a_closed_shelf_wakes_its_readers_and_takes_nothing_more() {
        let shelf = shelf_with(&[1]);
        let announcements = shelf.subscribe();
        let mut newer = pin!(announcements.newer_than(WeightsVersion::at(1)));
        assert!(waits(newer.as_mut()).await);
        shelf.close();
        assert_eq!(newer.await, Err(TransportError::ShelfClosed));
        assert_eq!(announcements.newer_than(None).await, Ok(manifest(1)));
        assert_eq!(
            shelf.publish(manifest(2), blob(2)).await,
            Err(TransportError::ShelfClosed)
        );
        assert_eq!(
            *shelf
                .fetch(WeightsVersion::at(1))
                .await
                .expect("still there"),
            blob(1)
        );
    }

    #[tokio::test]
    async fn readers_learn_that_no_handle_on_the_shelf_is_left() {
        let announcements = shelf_with(&[1]).subscribe();
        assert_eq!(
            announcements.newer_than(WeightsVersion::at(1)).await,
            Err(TransportError::ShelfClosed)
        );
    }
}
