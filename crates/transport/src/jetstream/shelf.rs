//! The shelf on the server: whole blobs in its object store, and one entry of the run's register that
//! announces the newest.
//!
//! A blob lies complete in the store before the entry is written. With [`WeightsEncoding::Delta`] most
//! blobs are what changed since the last whole one, and whoever reads them holds on to that one. A reader
//! that finds a blob torn says so in the register, and the publisher lays it down again.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError, Weak};
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

use super::{Connection, Register};
use crate::memory::Announced;
use crate::{TransportError, delta};

/// The entry that announces the newest weights.
const NEWEST: &str = "weights";

/// The entry in which a reader complains of a torn blob.
const TORN: &str = "torn";

/// The longest time between two looks at the register, whether it changes or not.
const LOOK: Duration = Duration::from_secs(2);

/// How many bytes travel in one message.
const CHUNK: usize = 512 << 10;

/// How often one blob is laid down again before its readers are left to wait for the next.
const MENDS: u32 = 8;

#[derive(Debug)]
pub(crate) struct JetShelf {
    connection: Arc<Connection>,
    register: Register,
    store: Store,
    keep: NonZeroUsize,
    announced: watch::Sender<Announced>,
    /// What was last published from here: for deltas, and to be laid down again.
    published: Mutex<Published>,
    /// The whole blob that deltas refer to, as it was last read.
    read: Mutex<Option<(WeightsVersion, Arc<Vec<u8>>)>>,
    watch: Mutex<Option<AbortHandle>>,
}

/// The object store, which says nothing of itself.
struct Store(ObjectStore);

#[derive(Debug, Default)]
struct Published {
    /// The last whole blob, and how many deltas followed it.
    full: Option<(WeightsVersion, Arc<Vec<u8>>)>,
    deltas: u64,
    /// The newest, as it lies in the store.
    newest: Option<(WeightsVersion, ObjectMetadata, Arc<Vec<u8>>)>,
    mends: u32,
    /// Whether what earlier sessions left is known.
    stocked: bool,
    /// What lies in the store, and the whole blob each needs.
    lying: BTreeMap<WeightsVersion, Option<WeightsVersion>>,
}

impl JetShelf {
    pub(crate) async fn open(
        connection: &Arc<Connection>,
        register: &Register,
        keep: NonZeroUsize,
    ) -> Result<Arc<Self>, TransportError> {
        let config = Config {
            bucket: connection.name("weights"),
            num_replicas: connection.settings.replicas,
            ..Config::default()
        };
        let context = &connection.context;
        let make = || async {
            match context.get_object_store(&config.bucket).await {
                Ok(store) => Ok(store),
                Err(_) => context.create_object_store(config.clone()).await,
            }
        };
        let store = connection.insist("open the weights shelf", make).await?;
        let shelf = Arc::new(Self {
            connection: Arc::clone(connection),
            register: register.clone(),
            store: Store(store),
            keep,
            announced: watch::Sender::new(Announced::default()),
            published: Mutex::default(),
            read: Mutex::default(),
            watch: Mutex::default(),
        });
        shelf.look().await?;
        let (told, watching) = (register.follow(NEWEST), Arc::downgrade(&shelf));
        let watch = tokio::spawn(watch_over(watching, told));
        *shelf.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch.abort_handle());
        Ok(shelf)
    }

    /// Learns what is announced.
    async fn look(&self) -> Result<(), TransportError> {
        let Some(entry) = self.register.get(NEWEST).await? else {
            return Ok(());
        };
        let manifest: WeightsManifest =
            wire::decode(&entry.value).map_err(|error| TransportError::Foreign {
                what: "the announcement of weights".into(),
                reason: error.to_string(),
            })?;
        self.announced.send_if_modified(|announced| {
            let newer = announced
                .latest
                .as_ref()
                .is_none_or(|latest| latest.version < manifest.version);
            if newer {
                announced.latest = Some(manifest);
            }
            newer
        });
        self.mend().await
    }

    /// Lays the newest blob down again when a reader has found it torn.
    async fn mend(&self) -> Result<(), TransportError> {
        let newest = self.published().newest.clone();
        let Some((version, meta, bytes)) = newest else {
            return Ok(());
        };
        let complaint = self.register.get(TORN).await?;
        if complaint.is_none_or(|entry| entry.value != name(version).as_bytes()) {
            return Ok(());
        }
        let again = {
            let mut published = self.published();
            published.mends += 1;
            published.mends <= MENDS
        };
        if again {
            tracing::warn!(%version, "weights were torn on the shelf: laid down again");
            self.lay_down(meta, bytes).await?;
        } else {
            tracing::error!(%version, "weights are torn on the shelf again and again, and stay so");
        }
        // Only now: many readers complain of one blob, again and again until it is whole.
        self.register.put(TORN, Vec::new()).await?;
        Ok(())
    }

    fn published(&self) -> std::sync::MutexGuard<'_, Published> {
        // Each change is made whole before the lock is let go.
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn publish(
        &self,
        manifest: WeightsManifest,
        blob: Arc<Vec<u8>>,
    ) -> Result<(), TransportError> {
        if let Some(latest) = self.latest()
            && latest.version >= manifest.version
        {
            return Err(TransportError::NotNewer {
                offered: manifest.version,
                current: latest.version,
            });
        }
        let version = manifest.version;
        self.take_stock().await;
        let (meta, bytes) = self.encode(version, blob).await;
        self.lay_down(meta.clone(), Arc::clone(&bytes)).await?;
        self.register.put(NEWEST, wire::encode(&manifest)).await?;
        self.announced
            .send_modify(|announced| announced.latest = Some(manifest));
        let pruned = {
            let mut published = self.published();
            let base = base(&meta);
            published.newest = Some((version, meta, bytes));
            published.mends = 0;
            published.lying.insert(version, base);
            published.prune(self.keep)
        };
        for version in pruned {
            // What stays behind is taken stock of by the next session, and goes with the run.
            if let Err(error) = self.take_away(&name(version)).await {
                tracing::debug!(%error, %version, "superseded weights stay on the shelf");
            }
        }
        Ok(())
    }

    /// Removes a blob, and the note that the store keeps of what was removed.
    async fn take_away(&self, name: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.store.0.delete(name).await?;
        let bucket = self.connection.name("weights");
        let note = format!("$O.{bucket}.M.{}", URL_SAFE.encode(name));
        let context = &self.connection.context;
        let stream = context.get_stream(format!("OBJ_{bucket}")).await?;
        stream.purge().filter(note).await?;
        Ok(())
    }

    /// Finds, before the first publication, what earlier sessions left on the shelf, so that it goes when
    /// it is superseded.
    async fn take_stock(&self) {
        if std::mem::replace(&mut self.published().stocked, true) {
            return;
        }
        let found = async {
            let mut found = BTreeMap::new();
            let bucket = self.connection.name("weights");
            let (stream, beginning) = (format!("OBJ_{bucket}"), format!("$O.{bucket}.M."));
            for note in self.connection.subjects(stream, beginning).await? {
                let name = String::from_utf8(URL_SAFE.decode(note)?)?;
                if let Some(version) = version(&name) {
                    let object = self.store.0.info(&name).await?;
                    let base = object.metadata.get("base");
                    found.insert(version, base.and_then(|base| self::version(base)));
                }
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(found)
        };
        match found.await {
            Ok(found) => self.published().lying.extend(found),
            Err(error) => tracing::warn!(%error, "weights of earlier sessions stay on the shelf"),
        }
    }

    /// The blob as it travels: whole, or what changed since the last whole one where that is less.
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
            chunk_size: Some(CHUNK),
            ..ObjectMetadata::default()
        };
        if let Some((base, before)) = full {
            let now = Arc::clone(&blob);
            let less = tokio::task::spawn_blocking(move || delta::encode(&before, &now));
            if let Ok(Some(less)) = less.await {
                meta.metadata.insert("base".into(), name(base));
                self.published().deltas += 1;
                return (meta, Arc::new(less));
            }
        }
        let mut published = self.published();
        published.full = Some((version, Arc::clone(&blob)));
        published.deltas = 0;
        (meta, blob)
    }

    async fn lay_down(
        &self,
        meta: ObjectMetadata,
        bytes: Arc<Vec<u8>>,
    ) -> Result<(), TransportError> {
        let put = || async { self.store.0.put(meta.clone(), &mut bytes.as_slice()).await };
        self.connection.insist("publish weights", put).await?;
        Ok(())
    }

    pub(crate) async fn fetch(
        &self,
        version: WeightsVersion,
    ) -> Result<Arc<Vec<u8>>, TransportError> {
        let manifest = self
            .latest()
            .ok_or(TransportError::Unpublished { version })?;
        if manifest.version != version {
            return Err(TransportError::Pruned {
                version,
                newest: manifest.version,
            });
        }
        let fetched = self.whole(version).await;
        let torn = |found| TransportError::Torn {
            manifest: manifest.clone(),
            found,
        };
        let blob = match fetched {
            Ok(blob) => blob,
            Err(error) => {
                if self
                    .register
                    .get(NEWEST)
                    .await?
                    .is_some_and(|entry| entry.value != wire::encode(&manifest))
                {
                    self.look().await?;
                    let newest = self.latest().map_or(version, |latest| latest.version);
                    return Err(TransportError::Pruned { version, newest });
                }
                tracing::warn!(%version, error, "weights cannot be read from the shelf");
                self.register.put(TORN, name(version).into_bytes()).await?;
                return Err(torn(0));
            }
        };
        let (checked, described) = (Arc::clone(&blob), manifest.clone());
        let whole = tokio::task::spawn_blocking(move || described.describes(&checked));
        if whole.await.unwrap_or(false) {
            return Ok(blob);
        }
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.register.put(TORN, name(version).into_bytes()).await?;
        Err(torn(blob.len() as u64))
    }

    /// The whole blob of a version, put together from its delta where it is one.
    async fn whole(&self, version: WeightsVersion) -> Result<Arc<Vec<u8>>, String> {
        let (bytes, base) = self.object(&name(version)).await?;
        let Some(base) = base else {
            let blob = Arc::new(bytes);
            if self.connection.settings.weights == WeightsEncoding::Delta {
                self.remember(version, &blob);
            }
            return Ok(blob);
        };
        let known = {
            let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
            read.clone().filter(|(version, _)| *version == base)
        };
        let before = match known {
            Some((_, blob)) => blob,
            None => {
                let (bytes, _) = self.object(&name(base)).await?;
                let blob = Arc::new(bytes);
                self.remember(base, &blob);
                blob
            }
        };
        let decode = tokio::task::spawn_blocking(move || delta::decode(&before, &bytes));
        let blob = decode.await.map_err(|error| error.to_string())?;
        blob.map(Arc::new).map_err(|error| error.to_string())
    }

    fn remember(&self, version: WeightsVersion, blob: &Arc<Vec<u8>>) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        *read = Some((version, Arc::clone(blob)));
    }

    /// An object's bytes, and the version its delta refers to.
    async fn object(&self, name: &str) -> Result<(Vec<u8>, Option<WeightsVersion>), String> {
        let told = |error: &dyn std::error::Error| super::sentence(error);
        let object = self.store.0.get(name).await;
        let mut object = object.map_err(|error| told(&error))?;
        let info = object.info();
        let base = info.metadata.get("base").and_then(|base| version(base));
        let mut bytes = Vec::with_capacity(info.size);
        // However long it takes as a whole: a connection that is lost is taken up where it broke off, and only
        // a server that sends nothing for so long is given up.
        let allowed = Duration::from_secs(self.connection.settings.timeout_seconds);
        loop {
            let read = timeout(allowed, object.read_buf(&mut bytes)).await;
            let read = read.map_err(|_| "the server stopped sending".to_owned())?;
            if read.map_err(|error| told(&error))? == 0 {
                return Ok((bytes, base));
            }
        }
    }

    pub(crate) fn latest(&self) -> Option<WeightsManifest> {
        self.announced.borrow().latest.clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Announced> {
        self.announced.subscribe()
    }

    pub(crate) fn close(&self) {
        self.announced
            .send_modify(|announced| announced.closed = true);
    }

    /// Lays down a file of the run that is no weights.
    pub(crate) async fn put_file(&self, name: &str, bytes: Vec<u8>) -> Result<(), TransportError> {
        let meta = ObjectMetadata {
            name: format!("file-{name}"),
            chunk_size: Some(CHUNK),
            ..ObjectMetadata::default()
        };
        self.lay_down(meta, Arc::new(bytes)).await
    }

    /// A file of the run that is no weights.
    pub(crate) async fn get_file(&self, name: &str) -> Result<Vec<u8>, TransportError> {
        let name = format!("file-{name}");
        let get = || async { self.object(&name).await.map_err(Missing) };
        let (bytes, _) = self
            .connection
            .insist("fetch a file of the run", get)
            .await?;
        Ok(bytes)
    }
}

/// Why an object cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Missing(String);

impl Drop for JetShelf {
    fn drop(&mut self) {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.iter().for_each(AbortHandle::abort);
    }
}

/// Looks at the register whenever it tells of new weights, and now and then besides.
async fn watch_over(shelf: Weak<JetShelf>, mut told: watch::Receiver<u64>) {
    loop {
        drop(timeout(LOOK, told.changed()).await);
        let Some(shelf) = shelf.upgrade() else {
            return;
        };
        if let Err(error) = shelf.look().await {
            tracing::warn!(%error, "the weights shelf is out of sight");
        }
    }
}

impl Published {
    /// Forgets and names what is neither among the newest `keep` nor needed by one of them.
    fn prune(&mut self, keep: NonZeroUsize) -> Vec<WeightsVersion> {
        let newest: Vec<_> = self.lying.keys().rev().take(keep.get()).copied().collect();
        let needed: Vec<_> = newest.iter().filter_map(|v| self.lying[v]).collect();
        let stays = |v: &WeightsVersion| newest.contains(v) || needed.contains(v);
        let gone: Vec<_> = self.lying.keys().filter(|v| !stays(v)).copied().collect();
        self.lying.retain(|v, _| !gone.contains(v));
        gone
    }
}

fn base(meta: &ObjectMetadata) -> Option<WeightsVersion> {
    meta.metadata.get("base").and_then(|base| version(base))
}

/// What a version is called in the store.
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

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_blob_stays_as_long_as_a_delta_needs_it() {
        let at = WeightsVersion::at;
        let mut published = Published::default();
        let keep = NonZeroUsize::new(2).expect("two");
        let story = [
            (1, None, vec![]),
            (2, Some(1), vec![]),
            (3, Some(1), vec![]),
            (4, None, vec![2]),
            (5, Some(4), vec![1, 3]),
            (6, Some(4), vec![]),
        ];
        for (step, base, gone) in story {
            published.lying.insert(at(step), base.map(at));
            let gone: Vec<_> = gone.into_iter().map(at).collect();
            assert_eq!(published.prune(keep), gone, "after {step}");
        }
    }

    #[test]
    fn names_are_read_back() {
        let resumed = WeightsVersion {
            session: 2,
            step: 30,
        };
        assert_eq!(version(&name(resumed)), Some(resumed));
        assert_eq!(version("2"), None);
    }
}
