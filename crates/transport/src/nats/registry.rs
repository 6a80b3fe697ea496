//! The registry of a run: a NATS key-value bucket that all processes of the run read and write. It holds the run's
//! description, its members and the leader lease.
//!
//! It does not know the contents of its entries.

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
use crate::nats::{Connection, RETRY_DELAY};

/// Name of the bucket on the server.
const BUCKET: &str = "register";

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

impl RunRegistry {
    pub(crate) async fn open(connection: &Arc<Connection>) -> Result<Self, TransportError> {
        let bucket = connection.name(BUCKET);
        // The bucket's stream is created directly: the client's bucket API first queries the account's limits, whose
        // answer from servers before 2.10 it cannot parse.
        let config = Config {
            name: format!("KV_{bucket}"),
            subjects: vec![format!("$KV.{bucket}.>")],
            max_messages_per_subject: 1,
            discard: DiscardPolicy::New,
            allow_rollup: true,
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
        let stream = format!("KV_{}", connection.name(BUCKET));
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
        let bucket = connection.name(BUCKET);
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

    /// Reads an entry; `None` if there is none.
    ///
    /// # Errors
    /// When the server does not answer within the configured timeout.
    pub async fn get(&self, key: &str) -> Result<Option<RegistryEntry>, TransportError> {
        let get = || self.store.entry(key);
        let entry = self
            .connection
            .retry("read the run's registry", get)
            .await?;
        Ok(entry.and_then(RegistryEntry::of))
    }

    /// All entries whose keys start with `prefix`, sorted by key.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn all(&self, prefix: &str) -> Result<Vec<RegistryEntry>, TransportError> {
        let bucket = self.connection.name(BUCKET);
        let (stream, subject_prefix) = (format!("KV_{bucket}"), format!("$KV.{bucket}."));
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
        let value = bytes::Bytes::from(owner.as_bytes().to_vec());
        let deadline = Instant::now() + self.lease() + self.lease() / 4;
        let mut first_revision = None;
        let revision = loop {
            let entry = || self.store.entry(key);
            let entry = self.connection.retry("read the run's registry", entry);
            let entry = entry.await?.filter(|e| e.operation == Operation::Put);
            let Some(entry) = entry else {
                match self.store.create(key, value.clone()).await {
                    Ok(revision) => break revision,
                    Err(_) => {
                        sleep(RETRY_DELAY).await;
                        continue;
                    }
                }
            };
            let first = *first_revision.get_or_insert(entry.revision);
            if entry.revision != first {
                return Err(TransportError::LeaseHeld {
                    what: key.to_owned(),
                    holder: String::from_utf8_lossy(&entry.value).into_owned(),
                });
            }
            if Instant::now() > deadline
                && let Ok(revision) = self.store.update(key, value.clone(), first).await
            {
                break revision;
            }
            sleep(RETRY_DELAY).await;
        };
        let (lost_sender, lost) = watch::channel(false);
        let renewal = Renewal {
            registry: self.clone(),
            key: key.to_owned(),
            value,
            revision,
            lost: lost_sender,
        };
        let renewal = tokio::spawn(renewal.run());
        Ok(LeaderLease {
            lost,
            renewal,
            registry: self.clone(),
            key: key.to_owned(),
        })
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
                    // A previous renewal may have been stored although its answer was lost.
                    match store.entry(self.key.as_str()).await {
                        Ok(Some(entry)) if entry.value == self.value => {
                            self.revision = entry.revision;
                        }
                        Ok(_) => {
                            self.lost.send_replace(true);
                            return;
                        }
                        Err(error) => self.log_failure(&error),
                    }
                }
                Err(error) => self.log_failure(&error),
            }
        }
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
