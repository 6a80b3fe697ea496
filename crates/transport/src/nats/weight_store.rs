//! The weight store on NATS: blobs in an object store, and an entry of the run's registry that announces the newest.
//!
//! A blob is completely uploaded before the entry is written. With [`WeightsEncoding::Delta`] most blobs are deltas to
//! the last full one, which readers keep in memory. A reader that finds a corrupt blob reports the upload it read in the
//! registry, and the publisher uploads the blob again, in full.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_nats::jetstream::object_store::{Config, ObjectMetadata, ObjectStore};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use messages::{WeightsManifest, WeightsVersion, wire};
use settings::WeightsEncoding;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::memory::Announced;
use crate::nats::{Connection, RequestError, RunRegistry};
use crate::{delta, error::TransportError};

/// Registry key of the announcement of the newest weights.
const ANNOUNCEMENT_KEY: &str = "weights";

/// Registry key under which a reader reports a corrupt blob: its name and the id of the upload that was read.
const CORRUPT_KEY: &str = "corrupt";

/// Maximum time between two reads of the registry.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Chunk size of the object store in bytes.
const CHUNK_SIZE: usize = 512 << 10;

/// Maximum number of bytes for which memory is reserved before they arrive.
const MAX_RESERVED: usize = 64 << 20;

/// Maximum number of re-uploads of a corrupt blob.
const MAX_REUPLOADS: u32 = 8;

#[derive(Debug)]
pub(crate) struct NatsWeightStore {
    connection: Arc<Connection>,
    registry: RunRegistry,
    store: DebugStore,
    keep: NonZeroUsize,
    announced: watch::Sender<Announced>,
    /// Manifest of the announced weights.
    manifest: Mutex<Option<WeightsManifest>>,
    /// Weights that this process published: base of the next delta, and the blob to upload again if corrupt.
    published: Mutex<PublishedVersions>,
    /// The full blob last downloaded, to which deltas refer.
    downloaded: Mutex<Option<(WeightsVersion, Arc<Vec<u8>>)>>,
    /// The reason for which the announcement was last refused, so that it is logged once.
    refused: Mutex<Option<String>>,
    watch_task: Mutex<Option<AbortHandle>>,
}

/// The object store, with a `Debug` implementation.
struct DebugStore(ObjectStore);

#[derive(Debug, Default)]
struct PublishedVersions {
    /// The last full blob, and the number of deltas since.
    full: Option<(WeightsVersion, Arc<Vec<u8>>)>,
    deltas: u64,
    newest: Option<StoredBlob>,
    reuploads: u32,
    /// Whether the blobs of earlier sessions have been listed.
    listed: bool,
    /// Stored versions, each with the full version that its delta refers to.
    stored: BTreeMap<WeightsVersion, Option<WeightsVersion>>,
}

/// A blob as it is uploaded.
#[derive(Debug, Clone)]
struct StoredBlob {
    version: WeightsVersion,
    meta: ObjectMetadata,
    bytes: Arc<Vec<u8>>,
}

/// An object as it was read, complete or not.
#[derive(Debug, Default)]
struct PartialBlob {
    bytes: Vec<u8>,
    /// The version to which it is a delta.
    base: Option<WeightsVersion>,
    /// Id of the upload, unique over time; empty if the object could not be opened.
    upload: String,
}

impl NatsWeightStore {
    pub(crate) async fn open(
        connection: &Arc<Connection>,
        registry: &RunRegistry,
        keep: NonZeroUsize,
    ) -> Result<Arc<Self>, TransportError> {
        let config = Config {
            bucket: connection.names.weights(),
            num_replicas: connection.settings.replicas,
            ..Config::default()
        };
        let context = &connection.context;
        let open = || async {
            match context.get_object_store(&config.bucket).await {
                Ok(store) => Ok(store),
                Err(error) if !connection.leads => Err(RequestError::of(error)),
                Err(_) => context
                    .create_object_store(config.clone())
                    .await
                    .map_err(RequestError::of),
            }
        };
        let store = connection.retry("open the weight store", open).await?;
        let weight_store = Arc::new(Self {
            connection: Arc::clone(connection),
            registry: registry.clone(),
            store: DebugStore(store),
            keep,
            announced: watch::Sender::new(Announced::default()),
            manifest: Mutex::default(),
            published: Mutex::default(),
            downloaded: Mutex::default(),
            refused: Mutex::default(),
            watch_task: Mutex::default(),
        });
        weight_store.refresh().await?;
        let (changes, weak) = (
            registry.follow(ANNOUNCEMENT_KEY),
            Arc::downgrade(&weight_store),
        );
        let watch = tokio::spawn(watch_registry(weak, changes));
        *weight_store
            .watch_task
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(watch.abort_handle());
        Ok(weight_store)
    }

    /// The announced manifest; `None` if there is none. One that the learner has not signed, or that cannot be decoded,
    /// is logged once and counts as none, so that it ends no process: the learner's next announcement replaces it.
    async fn announcement(&self) -> Result<Option<WeightsManifest>, TransportError> {
        let what = "the announcement of weights";
        let read = match self.registry.get_signed(ANNOUNCEMENT_KEY, what).await {
            Ok(None) => return Ok(None),
            Ok(Some(bytes)) => wire::decode(&bytes).map_err(|error| TransportError::Foreign {
                what: what.into(),
                reason: error.to_string(),
            }),
            Err(error) => Err(error),
        };
        match read {
            Ok(manifest) => {
                *lock(&self.refused) = None;
                Ok(Some(manifest))
            }
            Err(error @ (TransportError::Foreign { .. } | TransportError::Unauthentic { .. })) => {
                let reason = error.to_string();
                let before = lock(&self.refused).replace(reason.clone());
                if before.as_ref() != Some(&reason) {
                    tracing::error!(
                        reason,
                        "announced weights are not the learner's and are ignored"
                    );
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the announcement, and uploads a blob again that was reported corrupt.
    pub(crate) async fn refresh(&self) -> Result<(), TransportError> {
        let Some(manifest) = self.announcement().await? else {
            return Ok(());
        };
        self.announce(manifest);
        self.reupload_if_corrupt().await
    }

    /// Announces weights to the readers of this process, unless they know newer ones.
    fn announce(&self, manifest: WeightsManifest) {
        let version = manifest.version;
        let mut announced = lock(&self.manifest);
        if announced
            .as_ref()
            .is_none_or(|latest| latest.version < version)
        {
            *announced = Some(manifest);
            self.announced
                .send_modify(|announced| announced.latest = Some(version));
        }
    }

    /// Uploads the newest blob again, in full, if a reader reported it corrupt. A report of an upload that has been
    /// replaced since is stale: its reader had begun to read before.
    async fn reupload_if_corrupt(&self) -> Result<(), TransportError> {
        let Some(newest) = self.published().newest.clone() else {
            return Ok(());
        };
        let (version, name) = (newest.version, name(newest.version));
        let Some(report) = self.registry.get(CORRUPT_KEY).await? else {
            return Ok(());
        };
        let report = String::from_utf8_lossy(&report.value).into_owned();
        let Some(("", upload)) = report.split_once(&name) else {
            return Ok(());
        };
        let stored = self.store.0.info(&name).await;
        if stored.is_err() || stored.is_ok_and(|object| object.nuid == upload.trim_start()) {
            let attempts = {
                let mut published = self.published();
                published.reuploads += 1;
                published.reuploads
            };
            if attempts <= MAX_REUPLOADS {
                tracing::warn!(%version, "stored weights are corrupt; uploading them again");
                let full = self.in_full(newest).await;
                self.upload(full.meta, full.bytes).await?;
            } else {
                tracing::error!(%version, "stored weights are corrupt again after the maximum number of uploads; giving up");
            }
        }
        // Cleared after the upload: many readers report the same blob until it is readable.
        self.registry.put(CORRUPT_KEY, Vec::new()).await?;
        Ok(())
    }

    /// The blob without reference to an earlier one, which may be what is corrupt. Later deltas refer to it.
    async fn in_full(&self, mut blob: StoredBlob) -> StoredBlob {
        let full = self.published().full.clone();
        if blob.meta.metadata.contains_key("base")
            && let Some((_, before)) = full
        {
            let bytes = Arc::clone(&blob.bytes);
            let decoded = tokio::task::spawn_blocking(move || delta::decode(&before, &bytes)).await;
            if let Ok(Ok(bytes)) = decoded {
                blob.meta.metadata.remove("base");
                blob.bytes = Arc::new(bytes);
                let mut published = self.published();
                published.full = Some((blob.version, Arc::clone(&blob.bytes)));
                published.deltas = 0;
                published.stored.insert(blob.version, None);
                published.newest = Some(blob.clone());
            }
        }
        blob
    }

    fn published(&self) -> std::sync::MutexGuard<'_, PublishedVersions> {
        // Every change is complete before the lock is released, so a poisoned value is consistent.
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn publish(
        &self,
        manifest: WeightsManifest,
        blob: Arc<Vec<u8>>,
    ) -> Result<(), TransportError> {
        let version = manifest.version;
        if let Some(current) = self.latest().filter(|&latest| latest >= version) {
            let offered = version;
            return Err(TransportError::NotNewer { offered, current });
        }
        self.list_stored().await;
        let (meta, bytes) = self.encode(version, blob).await;
        self.upload(meta.clone(), Arc::clone(&bytes)).await?;
        self.registry
            .put_signed(ANNOUNCEMENT_KEY, &wire::encode(&manifest))
            .await?;
        self.announce(manifest);
        let pruned = {
            let mut published = self.published();
            let base = base(&meta);
            published.newest = Some(StoredBlob {
                version,
                meta,
                bytes,
            });
            published.reuploads = 0;
            published.stored.insert(version, base);
            published.prune(self.keep)
        };
        for version in pruned {
            // On failure the next session lists and deletes it.
            if let Err(error) = self.delete(&name(version)).await {
                tracing::debug!(%error, %version, "superseded weights could not be deleted");
            }
        }
        Ok(())
    }

    /// Deletes a blob, and the tombstone that the object store keeps of it.
    async fn delete(&self, name: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.store.0.delete(name).await?;
        let bucket = self.connection.names.weights();
        let tombstone = format!("$O.{bucket}.M.{}", URL_SAFE.encode(name));
        let context = &self.connection.context;
        let stream = context.get_stream(format!("OBJ_{bucket}")).await?;
        stream.purge().filter(tombstone).await?;
        Ok(())
    }

    /// Lists, once before the first publication, the blobs of earlier sessions, so that they are deleted when
    /// superseded.
    async fn list_stored(&self) {
        if std::mem::replace(&mut self.published().listed, true) {
            return;
        }
        let found = async {
            let mut found = BTreeMap::new();
            let bucket = self.connection.names.weights();
            let (stream, prefix) = (format!("OBJ_{bucket}"), format!("$O.{bucket}.M."));
            for subject in self.connection.subjects(stream, prefix).await? {
                let name = String::from_utf8(URL_SAFE.decode(subject)?)?;
                if let Some(version) = version(&name) {
                    let object = self.store.0.info(&name).await?;
                    let base = object.metadata.get("base");
                    found.insert(version, base.and_then(|base| self::version(base)));
                }
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(found)
        };
        match found.await {
            Ok(found) => self.published().stored.extend(found),
            Err(error) => {
                tracing::warn!(%error, "weights of earlier sessions could not be listed and stay stored");
            }
        }
    }

    /// Encodes a blob for upload: in full, or as a delta to the last full one if configured, not due for a full one,
    /// and shorter.
    async fn encode(
        &self,
        version: WeightsVersion,
        blob: Arc<Vec<u8>>,
    ) -> (ObjectMetadata, Arc<Vec<u8>>) {
        let settings = &self.connection.settings;
        let full = match settings.weights {
            WeightsEncoding::Full => None,
            WeightsEncoding::Delta => {
                let published = self.published();
                let due = published.deltas + 1 >= settings.full_every;
                published.full.clone().filter(|_| !due)
            }
        };
        let mut meta = ObjectMetadata {
            name: name(version),
            chunk_size: Some(CHUNK_SIZE),
            ..ObjectMetadata::default()
        };
        if let Some((base, before)) = full {
            let now = Arc::clone(&blob);
            let delta = tokio::task::spawn_blocking(move || delta::encode(&before, &now));
            if let Ok(Some(delta)) = delta.await {
                meta.metadata.insert("base".into(), name(base));
                self.published().deltas += 1;
                return (meta, Arc::new(delta));
            }
        }
        let mut published = self.published();
        published.full = Some((version, Arc::clone(&blob)));
        published.deltas = 0;
        (meta, blob)
    }

    async fn upload(
        &self,
        meta: ObjectMetadata,
        bytes: Arc<Vec<u8>>,
    ) -> Result<(), TransportError> {
        let put = || async { self.store.0.put(meta.clone(), &mut bytes.as_slice()).await };
        self.connection.retry("publish weights", put).await?;
        Ok(())
    }

    pub(crate) async fn fetch(
        &self,
        version: WeightsVersion,
    ) -> Result<Arc<Vec<u8>>, TransportError> {
        let manifest = lock(&self.manifest).clone();
        let manifest = manifest.ok_or(TransportError::Unpublished { version })?;
        if manifest.version != version {
            return Err(TransportError::Pruned {
                version,
                newest: manifest.version,
            });
        }
        let mut stored = PartialBlob::default();
        let downloaded = self.download(&manifest, &mut stored).await;
        let size = match downloaded {
            Ok(blob) => {
                let (checked, described) = (Arc::clone(&blob), manifest.clone());
                let matches = tokio::task::spawn_blocking(move || described.describes(&checked));
                if matches.await.unwrap_or(false) {
                    return Ok(blob);
                }
                blob.len() as u64
            }
            Err(error) => {
                let announced = self.announcement().await?;
                if announced.is_some_and(|announced| announced != manifest) {
                    self.refresh().await?;
                    let newest = self.latest().unwrap_or(version);
                    return Err(TransportError::Pruned { version, newest });
                }
                tracing::warn!(%version, error, "weights cannot be downloaded");
                0
            }
        };
        *lock(&self.downloaded) = None;
        let report = format!("{} {}", name(version), stored.upload);
        self.registry.put(CORRUPT_KEY, report.into_bytes()).await?;
        Err(TransportError::Corrupt {
            manifest,
            found: size,
        })
    }

    /// Downloads the blob of a manifest, applying its delta if it is stored as one. `stored` receives the object of the
    /// version itself. A blob is at most as long as its manifest says, and so is a full blob that a delta refers to.
    async fn download(
        &self,
        manifest: &WeightsManifest,
        stored: &mut PartialBlob,
    ) -> Result<Arc<Vec<u8>>, String> {
        let (version, limit) = (manifest.version, manifest.bytes);
        self.read_object(&name(version), limit, stored).await?;
        let bytes = std::mem::take(&mut stored.bytes);
        let Some(base) = stored.base else {
            let blob = Arc::new(bytes);
            if self.connection.settings.weights == WeightsEncoding::Delta {
                self.cache_full(version, &blob);
            }
            return Ok(blob);
        };
        let cached = lock(&self.downloaded).clone();
        let before = match cached.filter(|(version, _)| *version == base) {
            Some((_, blob)) => blob,
            None => {
                let mut full = PartialBlob::default();
                self.read_object(&name(base), limit, &mut full).await?;
                let blob = Arc::new(full.bytes);
                self.cache_full(base, &blob);
                blob
            }
        };
        let decode = tokio::task::spawn_blocking(move || delta::decode(&before, &bytes));
        let blob = decode.await.map_err(|error| error.to_string())?;
        blob.map(Arc::new).map_err(|error| error.to_string())
    }

    fn cache_full(&self, version: WeightsVersion, blob: &Arc<Vec<u8>>) {
        *lock(&self.downloaded) = Some((version, Arc::clone(blob)));
    }

    /// Reads an object of at most `limit` bytes into `download`; on failure it holds what was read before.
    async fn read_object(
        &self,
        name: &str,
        limit: u64,
        download: &mut PartialBlob,
    ) -> Result<(), String> {
        let reason = |error: &dyn std::error::Error| crate::nats::one_line(error);
        let stopped = |_| "the server stopped sending".to_owned();
        // The timeout applies to each read, not to the whole transfer, which resumes after a lost connection.
        let allowed = Duration::from_secs(self.connection.settings.timeout_seconds);
        let object = timeout(allowed, self.store.0.get(name)).await;
        let object = object.map_err(stopped)?.map_err(|error| reason(&error))?;
        let info = object.info();
        let base = info.metadata.get("base").and_then(|base| version(base));
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        *download = PartialBlob {
            // What the object says of its size is not trusted.
            bytes: Vec::with_capacity(info.size.min(limit).min(MAX_RESERVED)),
            base,
            upload: info.nuid.clone(),
        };
        // One byte more than allowed is read, to tell.
        let mut object = object.take((limit as u64).saturating_add(1));
        loop {
            let read = timeout(allowed, object.read_buf(&mut download.bytes)).await;
            if read.map_err(stopped)?.map_err(|error| reason(&error))? == 0 {
                return Ok(());
            }
            if download.bytes.len() > limit {
                return Err(format!("the object has more than its {limit} bytes"));
            }
        }
    }

    pub(crate) fn latest(&self) -> Option<WeightsVersion> {
        self.announced.borrow().latest
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Announced> {
        self.announced.subscribe()
    }

    pub(crate) fn close(&self) {
        self.announced
            .send_modify(|announced| announced.closed = true);
    }

    /// Uploads another file of the run.
    pub(crate) async fn put_file(&self, name: &str, bytes: Vec<u8>) -> Result<(), TransportError> {
        let meta = ObjectMetadata {
            name: format!("file-{name}"),
            chunk_size: Some(CHUNK_SIZE),
            ..ObjectMetadata::default()
        };
        self.upload(meta, Arc::new(bytes)).await
    }

    /// Downloads a file uploaded with [`Self::put_file`], of at most `limit` bytes.
    pub(crate) async fn get_file(&self, name: &str, limit: u64) -> Result<Vec<u8>, TransportError> {
        let object = format!("file-{name}");
        let get = || async {
            let mut download = PartialBlob::default();
            match self.read_object(&object, limit, &mut download).await {
                Err(_) if download.bytes.len() as u64 > limit => Ok(None),
                Err(reason) => Err(FetchFailure(reason)),
                Ok(()) => Ok(Some(download.bytes)),
            }
        };
        let fetched = self
            .connection
            .retry("fetch a file of the run", get)
            .await?;
        fetched.ok_or_else(|| TransportError::TooLarge {
            name: name.to_owned(),
            limit,
        })
    }
}

/// The value behind a lock. A poisoned one is consistent: every change is a single assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reason why an object cannot be downloaded.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct FetchFailure(String);

impl Drop for NatsWeightStore {
    fn drop(&mut self) {
        let task = self
            .watch_task
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        task.iter().for_each(AbortHandle::abort);
    }
}

/// Reads the registry after each change of the announcement, and at least every [`POLL_INTERVAL`].
async fn watch_registry(weight_store: Weak<NatsWeightStore>, mut changes: watch::Receiver<u64>) {
    loop {
        drop(timeout(POLL_INTERVAL, changes.changed()).await);
        let Some(weight_store) = weight_store.upgrade() else {
            return;
        };
        if let Err(error) = weight_store.refresh().await {
            tracing::warn!(%error, "the weight store is unavailable");
        }
    }
}

impl PublishedVersions {
    /// Forgets and returns the versions that are neither among the newest `keep` nor the base of one of them.
    fn prune(&mut self, keep: NonZeroUsize) -> Vec<WeightsVersion> {
        let newest: Vec<_> = self.stored.keys().rev().take(keep.get()).copied().collect();
        let needed: Vec<_> = newest.iter().filter_map(|v| self.stored[v]).collect();
        let stays = |v: &WeightsVersion| newest.contains(v) || needed.contains(v);
        let pruned: Vec<_> = self.stored.keys().filter(|v| !stays(v)).copied().collect();
        self.stored.retain(|v, _| !pruned.contains(v));
        pruned
    }
}

fn base(meta: &ObjectMetadata) -> Option<WeightsVersion> {
    meta.metadata.get("base").and_then(|base| version(base))
}

/// Name of a version in the object store.
fn name(version: WeightsVersion) -> String {
    format!("{}-{}", version.session, version.step)
}

fn version(name: &str) -> Option<WeightsVersion> {
    let (session, step) = name.split_once('-')?;
    Some(WeightsVersion {
        session: session.parse().ok()?,
        step: step.parse().ok()?,
    })
}

impl std::fmt::Debug for DebugStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ObjectStore")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_blob_is_kept_while_a_delta_refers_to_it() {
        let at = WeightsVersion::at;
        let mut published = PublishedVersions::default();
        let keep = NonZeroUsize::new(2).expect("two");
        let cases = [
            (1, None, vec![]),
            (2, Some(1), vec![]),
            (3, Some(1), vec![]),
            (4, None, vec![2]),
            (5, Some(4), vec![1, 3]),
            (6, Some(4), vec![]),
        ];
        for (step, base, pruned) in cases {
            published.stored.insert(at(step), base.map(at));
            let pruned: Vec<_> = pruned.into_iter().map(at).collect();
            assert_eq!(published.prune(keep), pruned, "after {step}");
        }
    }

    #[test]
    fn names_parse_to_versions() {
        let resumed = WeightsVersion {
            session: 2,
            step: 30,
        };
        assert_eq!(version(&name(resumed)), Some(resumed));
        assert_eq!(version("2"), None);
    }
}
