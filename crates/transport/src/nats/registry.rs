//! The registry of a run: a NATS key-value bucket that all processes of the run read and write. It holds the run's
//! description, its members and the leader lease.
//!
//! What only the leader may say is signed with the run's key. The registry does not know the contents of its entries.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::kv::{self, Operation, Store, UpdateErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use futures_util::TryStreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::error::TransportError;
use crate::nats::{Connection, RETRY_DELAY, one_line};

/// Renewals per lease duration.
const RENEWALS_PER_LEASE: u32 = 5;

/// The registry of one run.
#[derive(Debug, Clone)]
pub struct RunRegistry {
    connection: Arc<Connection>,
    store: Arc<Store>,
}

/// An entry of the registry.
#[derive(Debug, Clone)]
pub struct RegistryEntry {
    /// Key.
    pub key: String,
    /// Value.
    pub value: Vec<u8>,
    /// Time at which it was stored, by the server's clock.
    pub stored: SystemTime,
}

/// A lease that one process of the run holds at a time, such as the leader's. Renewed until dropped or lost.
#[derive(Debug)]
pub struct LeaderLease {
    lost: watch::Receiver<bool>,
    renewal: tokio::task::JoinHandle<()>,
    registry: RunRegistry,
    key: String,
}

/// An entry of the leader that is written again whenever another value is found in its place. No longer once dropped.
#[derive(Debug)]
pub struct KeptEntry {
    keeping: tokio::task::JoinHandle<()>,
}

impl RunRegistry {
    /// Creates the registry if it does not exist.
    pub(crate) async fn open(connection: &Arc<Connection>) -> Result<Self, TransportError> {
        let bucket = connection.names.registry();
        // The bucket's stream is created directly: the client's bucket API first queries the account's limits, whose
        // answer from servers before 2.10 it cannot parse. Without rollups no client can clear the registry by a write.
        let config = Config {
            name: connection.names.registry_stream(),
            subjects: vec![format!("$KV.{bucket}.>")],
            max_messages_per_subject: 1,
            discard: DiscardPolicy::New,
            allow_rollup: false,
            deny_delete: true,
            allow_direct: true,
            num_replicas: connection.settings.replicas,
            ..Config::default()
        };
        let create = || connection.context.get_or_create_stream(config.clone());
        connection
            .retry("create the run's registry", create)
            .await?;
        Self::of(connection).await
    }

    /// The registry of an existing run; `None` if there is none.
    pub(crate) async fn find(connection: &Arc<Connection>) -> Result<Option<Self>, TransportError> {
        let stream = connection.names.registry_stream();
        let exists = || async {
            match connection.context.get_stream(&stream).await {
                Ok(_) => Ok(true),
                Err(error) if is_missing(&error) => Ok(false),
                Err(error) => Err(error),
            }
        };
        match connection
            .retry("look for the run's registry", exists)
            .await?
        {
            true => Self::of(connection).await.map(Some),
            false => Ok(None),
        }
    }

    async fn of(connection: &Arc<Connection>) -> Result<Self, TransportError> {
        let bucket = connection.names.registry();
        let open = || connection.context.get_key_value(&bucket);
        let store = connection.retry("open the run's registry", open).await?;
        Ok(Self {
            store: Arc::new(store),
            connection: Arc::clone(connection),
        })
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// When the server does not store it within the configured timeout.
    pub async fn put(&self, key: &str, value: Vec<u8>) -> Result<(), TransportError> {
        let value = bytes::Bytes::from(value);
        let put = || self.store.put(key, value.clone());
        self.connection
            .retry("write the run's registry", put)
            .await?;
        Ok(())
    }

    /// Reads an entry; `None` if there is none, or the registry was removed.
    ///
    /// # Errors
    /// When the server does not answer within the configured timeout.
    pub async fn get(&self, key: &str) -> Result<Option<RegistryEntry>, TransportError> {
        let stream = self.connection.names.registry_stream();
        let get = || async {
            let entry = self.store.entry(key).await;
            let Err(error) = entry else {
                return entry;
            };
            // A direct read of a registry that does not exist is not answered.
            match self.connection.context.get_stream(&stream).await {
                Err(missing) if is_missing(&missing) => Ok(None),
                _ => Err(error),
            }
        };
        let entry = self
            .connection
            .retry("read the run's registry", get)
            .await?;
        Ok(entry.and_then(RegistryEntry::of))
    }

    /// Writes an entry that only the leader may write: signed, if the run has a key.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub async fn put_signed(&self, key: &str, content: &[u8]) -> Result<(), TransportError> {
        self.put(key, self.connection.key().seal(key, content))
            .await
    }

    /// As [`Self::put_signed`], and writes the entry again when it was overwritten or deleted: every client that may send a
    /// request can have the server write its answers there.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub async fn keep_signed(
        &self,
        key: &'static str,
        content: &[u8],
    ) -> Result<KeptEntry, TransportError> {
        let value = self.connection.key().seal(key, content);
        self.put(key, value.clone()).await?;
        let registry = self.clone();
        let keeping = tokio::spawn(async move {
            loop {
                sleep(registry.lease() / RENEWALS_PER_LEASE).await;
                if let Err(error) = registry.restore(key, &value).await {
                    tracing::debug!(%error, key, "an entry of the run could not be checked; retrying");
                }
            }
        });
        Ok(KeptEntry { keeping })
    }

    /// Writes an entry again if it has another value.
    async fn restore(&self, key: &str, value: &[u8]) -> Result<(), TransportError> {
        let found = self.get(key).await?;
        if found.is_some_and(|entry| entry.value == value) {
            return Ok(());
        }
        tracing::warn!(
            key,
            "another client of the server has overwritten or deleted an entry of the run; writing it again"
        );
        self.put(key, value.to_vec()).await
    }

    /// Whether the registry is on the server: the run was not removed.
    ///
    /// # Errors
    /// When the server does not answer within the configured timeout.
    pub async fn exists(&self) -> Result<bool, TransportError> {
        Ok(Self::find(&self.connection).await?.is_some())
    }

    /// Reads an entry written with [`Self::put_signed`]; `None` if there is none. `what` names it in errors.
    ///
    /// # Errors
    /// As [`Self::get`], and when the settings name the run's key and the entry is not signed with it.
    pub async fn get_signed(
        &self,
        key: &str,
        what: &str,
    ) -> Result<Option<Vec<u8>>, TransportError> {
        let Some(entry) = self.get(key).await? else {
            return Ok(None);
        };
        let run_key = self.connection.key();
        let opened = run_key.open(key, &entry.value);
        opened
            .map(Some)
            .map_err(|reason| run_key.refuse(what, reason))
    }

    /// Whether the settings name a key with which signatures are made or checked.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.connection.key().is_set()
    }

    /// All entries whose keys start with `prefix`, sorted by key.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn all(&self, prefix: &str) -> Result<Vec<RegistryEntry>, TransportError> {
        let names = &self.connection.names;
        let (stream, subject_prefix) = (names.registry_stream(), names.registry_subject(""));
        let mut keys = self.connection.subjects(stream, subject_prefix).await?;
        keys.retain(|key| key.starts_with(prefix));
        keys.sort();
        let mut entries = Vec::with_capacity(keys.len());
        for key in keys {
            entries.extend(self.get(&key).await?);
        }
        Ok(entries)
    }

    /// Current time of the server's clock.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub async fn now(&self) -> Result<SystemTime, TransportError> {
        self.put("clock", Vec::new()).await?;
        Ok(self
            .get("clock")
            .await?
            .map_or_else(SystemTime::now, |entry| entry.stored))
    }

    /// Time without a heartbeat after which a process counts as dead.
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.connection.lease()
    }

    /// A counter of the changes to an entry from now on. Changes may be missed while the server is unavailable.
    pub(crate) fn follow(&self, key: &'static str) -> watch::Receiver<u64> {
        let (changes, updates) = watch::channel(0);
        let store = self.store.clone();
        tokio::spawn(async move {
            while !changes.is_closed() {
                tokio::select! {
                    () = count_changes(&store, key, &changes) => sleep(RETRY_DELAY).await,
                    () = changes.closed() => return,
                }
            }
        });
        updates
    }

    /// Acquires the lease `key` for this process, under the name `owner`. If another process holds it, waits for one
    /// lease duration: a lease that is not renewed meanwhile has expired and is taken over.
    ///
    /// # Errors
    /// When the lease is held by a live process, or the server does not answer.
    pub async fn acquire(&self, key: &str, owner: &str) -> Result<LeaderLease, TransportError> {
        let value = bytes::Bytes::from(self.connection.key().seal(key, owner.as_bytes()));
        let deadline = Instant::now() + self.lease() + self.lease() / 4;
        let mut first_revision = None;
        let mut retries = self.connection.retry_state("take a lease of the run");
        let revision = loop {
            let Some(entry) = self.lease_entry(key).await? else {
                let failure = match self.store.create(key, value.clone()).await {
                    Ok(revision) => break revision,
                    Err(error) => one_line(&error),
                };
                // Another process may have taken it. Otherwise a client has had the server store an answer without a
                // value there: it is read as nothing, and prevents a creation for ever.
                if self.lease_entry(key).await?.is_none() {
                    match self.store.put(key, value.clone()).await {
                        Ok(revision) => break revision,
                        Err(error) => {
                            tracing::debug!(%error, key, "a lease could not be written; retrying");
                        }
                    }
                }
                self.connection.on_failure(&mut retries, &failure)?;
                sleep(RETRY_DELAY).await;
                continue;
            };
            // What no learner has written holds nothing.
            let holder = self.connection.key().open(key, &entry.value).ok();
            let first = match &holder {
                Some(_) => *first_revision.get_or_insert(entry.revision),
                None => entry.revision,
            };
            if let Some(holder) = &holder
                && entry.revision != first
            {
                return Err(TransportError::LeaseHeld {
                    what: key.to_owned(),
                    holder: String::from_utf8_lossy(holder).into_owned(),
                });
            }
            if holder.is_none() || Instant::now() > deadline {
                match self.store.update(key, value.clone(), first).await {
                    Ok(revision) => break revision,
                    Err(error) => self
                        .connection
                        .on_failure(&mut retries, &one_line(&error))?,
                }
            }
            sleep(RETRY_DELAY).await;
        };
        Ok(self.renewed_lease(key, value, revision))
    }

    /// The entry of a lease; `None` if there is none, or none with a value.
    async fn lease_entry(&self, key: &str) -> Result<Option<kv::Entry>, TransportError> {
        let entry = || self.store.entry(key);
        let entry = self.connection.retry("read the run's registry", entry);
        Ok(entry.await?.filter(|e| e.operation == Operation::Put))
    }

    /// The lease stored in `revision`, renewed until it is dropped or lost.
    fn renewed_lease(&self, key: &str, value: bytes::Bytes, revision: u64) -> LeaderLease {
        let (lost_sender, lost) = watch::channel(false);
        let renewal = Renewal {
            registry: self.clone(),
            key: key.to_owned(),
            value,
            revision,
            lost: lost_sender,
        };
        LeaderLease {
            lost,
            renewal: tokio::spawn(renewal.run()),
            registry: self.clone(),
            key: key.to_owned(),
        }
    }
}

fn is_missing(error: &GetStreamError) -> bool {
    match error.kind() {
        GetStreamErrorKind::JetStream(error) => error.error_code() == ErrorCode::STREAM_NOT_FOUND,
        _ => false,
    }
}

/// Counts the changes of an entry until the server is unavailable.
async fn count_changes(store: &Store, key: &str, changes: &watch::Sender<u64>) {
    let Ok(mut entries) = store.watch(key).await else {
        return;
    };
    while let Ok(Some(_)) = entries.try_next().await {
        changes.send_modify(|changes| *changes += 1);
    }
}

/// The task that renews a lease.
struct Renewal {
    registry: RunRegistry,
    key: String,
    value: bytes::Bytes,
    revision: u64,
    lost: watch::Sender<bool>,
}

impl Renewal {
    async fn run(mut self) {
        let store = Arc::clone(&self.registry.store);
        loop {
            sleep(self.registry.lease() / RENEWALS_PER_LEASE).await;
            let updated = store.update(&self.key, self.value.clone(), self.revision);
            match updated.await {
                Ok(revision) => self.revision = revision,
                Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                    match store.entry(self.key.as_str()).await {
                        Ok(Some(entry)) if self.is_taken_over(&entry) => {
                            self.lost.send_replace(true);
                            return;
                        }
                        Ok(Some(entry)) => self.revision = entry.revision,
                        Ok(None) => self.write_again(&store).await,
                        Err(error) => self.log_failure(&error),
                    }
                }
                Err(error) => self.log_failure(&error),
            }
        }
    }

    /// Writes the lease where nothing can be read, whatever another client has had the server store there.
    async fn write_again(&mut self, store: &Store) {
        self.log_overwritten();
        match store.put(&self.key, self.value.clone()).await {
            Ok(revision) => self.revision = revision,
            Err(error) => self.log_failure(&error),
        }
    }

    /// Whether another process has taken the lease over. It has not if a previous renewal was stored although its answer
    /// was lost, or if what is there was written by nobody who may lead: it is then overwritten by the next renewal.
    fn is_taken_over(&self, entry: &kv::Entry) -> bool {
        if entry.value == self.value {
            return false;
        }
        let run_key = self.registry.connection.key();
        let is_a_leader =
            entry.operation == Operation::Put && run_key.open(&self.key, &entry.value).is_ok();
        if !is_a_leader {
            self.log_overwritten();
        }
        is_a_leader
    }

    fn log_overwritten(&self) {
        tracing::warn!(
            key = self.key,
            "another client of the server has overwritten or deleted the lease; writing it again"
        );
    }

    fn log_failure(&self, error: &dyn std::error::Error) {
        tracing::debug!(%error, key = self.key, "a lease could not be renewed; retrying");
    }
}

impl LeaderLease {
    /// Returns when another process has taken the lease over, which it may once this one has not renewed it for a
    /// lease duration.
    pub async fn lost(&self) {
        let mut lost = self.lost.clone();
        if lost.wait_for(|lost| *lost).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Releases the lease, so that the next process need not wait for it to expire.
    pub async fn release(self) {
        self.renewal.abort();
        if let Err(error) = self.registry.store.delete(&self.key).await {
            tracing::debug!(%error, key = self.key, "the lease could not be released; it will expire");
        }
    }
}

impl Drop for KeptEntry {
    fn drop(&mut self) {
        self.keeping.abort();
    }
}

impl Drop for LeaderLease {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

impl RegistryEntry {
    fn of(entry: kv::Entry) -> Option<Self> {
        (entry.operation == Operation::Put).then(|| Self {
            key: entry.key,
            value: entry.value.to_vec(),
            stored: entry.created.into(),
        })
    }
}
