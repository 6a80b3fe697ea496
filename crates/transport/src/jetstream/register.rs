//! The register of a run on the server: small entries that all its processes read and write. Who leads,
//! who is there, what the run is.
//!
//! It does not know what the entries say.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::kv::{self, Operation, Store, UpdateErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use futures_util::TryStreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::{Connection, PAUSE};
use crate::TransportError;

/// What the register is called on the server.
const REGISTER: &str = "register";

/// Renewals of a claim before it ends.
const RENEWALS: u32 = 5;

/// The register of one run.
#[derive(Debug, Clone)]
pub struct Register {
    connection: Arc<Connection>,
    store: Arc<Store>,
}

/// An entry as it was read.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// What it says.
    pub value: Vec<u8>,
    /// When the server stored it, by the server's clock.
    pub stored: SystemTime,
}

/// A part in the run that one process at a time may play. It is renewed until it is dropped or lost.
#[derive(Debug)]
pub struct Claim {
    lost: watch::Receiver<bool>,
    renewal: tokio::task::JoinHandle<()>,
    register: Register,
    key: String,
}

impl Register {
    pub(crate) async fn open(connection: &Arc<Connection>) -> Result<Self, TransportError> {
        let bucket = connection.name(REGISTER);
        // The bucket's stream is made by hand: the client asks for the account's limits before it makes one,
        // and does not understand what servers before 2.10 answer.
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
        let make = || connection.context.get_or_create_stream(config.clone());
        connection.insist("make the run's register", make).await?;
        Self::of(connection).await
    }

    /// The register of a run that is there already.
    pub(crate) async fn find(connection: &Arc<Connection>) -> Result<Option<Self>, TransportError> {
        let stream = format!("KV_{}", connection.name(REGISTER));
        let ask = || async {
            match connection.context.get_stream(&stream).await {
                Ok(_) => Ok(true),
                Err(error) if is_missing(&error) => Ok(false),
                Err(error) => Err(error),
            }
        };
        match connection
            .insist("look for the run's register", ask)
            .await?
        {
            true => Self::of(connection).await.map(Some),
            false => Ok(None),
        }
    }

    async fn of(connection: &Arc<Connection>) -> Result<Self, TransportError> {
        let bucket = connection.name(REGISTER);
        let open = || connection.context.get_key_value(&bucket);
        let store = connection.insist("open the run's register", open).await?;
        Ok(Self {
            store: Arc::new(store),
            connection: Arc::clone(connection),
        })
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// When the server does not store it in the time the settings allow.
    pub async fn put(&self, key: &str, value: Vec<u8>) -> Result<(), TransportError> {
        let value = bytes::Bytes::from(value);
        let put = || self.store.put(key, value.clone());
        self.connection
            .insist("write the run's register", put)
            .await?;
        Ok(())
    }

    /// Reads an entry, if it is there.
    ///
    /// # Errors
    /// When the server does not answer in the time the settings allow.
    pub async fn get(&self, key: &str) -> Result<Option<Entry>, TransportError> {
        let get = || self.store.entry(key);
        let entry = self
            .connection
            .insist("read the run's register", get)
            .await?;
        Ok(entry.and_then(Entry::of))
    }

    /// All entries whose keys begin so.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn all(&self, prefix: &str) -> Result<Vec<Entry>, TransportError> {
        let bucket = self.connection.name(REGISTER);
        let (stream, beginning) = (format!("KV_{bucket}"), format!("$KV.{bucket}."));
        let mut keys = self.connection.subjects(stream, beginning).await?;
        keys.retain(|key| key.starts_with(prefix));
        keys.sort();
        let mut entries = Vec::with_capacity(keys.len());
        for key in keys {
            entries.extend(self.get(&key).await?);
        }
        Ok(entries)
    }

    /// The time by the server's clock.
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

    /// The seconds without a sign of life after which a process counts as gone.
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.connection.lease()
    }

    /// Counts the changes of an entry from now on. Some may be missed while the server is away.
    pub(crate) fn follow(&self, key: &'static str) -> watch::Receiver<u64> {
        let (changes, followed) = watch::channel(0);
        let store = self.store.clone();
        tokio::spawn(async move {
            while !changes.is_closed() {
                tokio::select! {
                    () = tell_changes(&store, key, &changes) => sleep(PAUSE).await,
                    () = changes.closed() => return,
                }
            }
        });
        followed
    }

    /// Claims `key` for this process, which calls itself `owner`. A claim that another process holds is
    /// watched for as long as a lease lasts: if it is not renewed meanwhile its holder is gone, and the
    /// claim is taken over.
    ///
    /// # Errors
    /// When the claim is held by a process that lives, or the server does not answer.
    pub async fn claim(&self, key: &str, owner: &str) -> Result<Claim, TransportError> {
        let value = bytes::Bytes::from(owner.as_bytes().to_vec());
        let deadline = Instant::now() + self.lease() + self.lease() / 4;
        let mut seen = None;
        let revision = loop {
            let entry = || self.store.entry(key);
            let entry = self.connection.insist("read the run's register", entry);
            let entry = entry.await?.filter(|e| e.operation == Operation::Put);
            let Some(entry) = entry else {
                match self.store.create(key, value.clone()).await {
                    Ok(revision) => break revision,
                    Err(_) => {
                        sleep(PAUSE).await;
                        continue;
                    }
                }
            };
            let first = *seen.get_or_insert(entry.revision);
            if entry.revision != first {
                return Err(TransportError::Claimed {
                    what: key.to_owned(),
                    holder: String::from_utf8_lossy(&entry.value).into_owned(),
                });
            }
            if Instant::now() > deadline
                && let Ok(revision) = self.store.update(key, value.clone(), first).await
            {
                break revision;
            }
            sleep(PAUSE).await;
        };
        let (lose, lost) = watch::channel(false);
        let renewal = tokio::spawn(renew(self.clone(), key.to_owned(), value, revision, lose));
        Ok(Claim {
            lost,
            renewal,
            register: self.clone(),
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

/// Counts the changes of an entry until the server is away.
async fn tell_changes(store: &Store, key: &str, changes: &watch::Sender<u64>) {
    let Ok(mut entries) = store.watch(key).await else {
        return;
    };
    while let Ok(Some(_)) = entries.try_next().await {
        changes.send_modify(|changes| *changes += 1);
    }
}

async fn renew(
    register: Register,
    key: String,
    value: bytes::Bytes,
    mut revision: u64,
    lose: watch::Sender<bool>,
) {
    loop {
        sleep(register.lease() / RENEWALS).await;
        let updated = register.store.update(&key, value.clone(), revision).await;
        match updated {
            Ok(renewed) => revision = renewed,
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                // Our own renewal may have been stored without our hearing of it.
                match register.store.entry(key.as_str()).await {
                    Ok(Some(entry)) if entry.value == value => revision = entry.revision,
                    Ok(_) => {
                        lose.send_replace(true);
                        return;
                    }
                    Err(error) => tracing::debug!(%error, key, "a claim could not be renewed"),
                }
            }
            Err(error) => tracing::debug!(%error, key, "a claim could not be renewed"),
        }
    }
}

impl Claim {
    /// Returns when another process has taken the claim over, which it may after this one was silent for
    /// as long as a lease lasts.
    pub async fn lost(&self) {
        let mut lost = self.lost.clone();
        if lost.wait_for(|lost| *lost).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Gives the claim up, so that the next one need not wait.
    pub async fn release(self) {
        self.renewal.abort();
        if let Err(error) = self.register.store.delete(&self.key).await {
            tracing::debug!(%error, key = self.key, "a claim was not given up; it ends by itself");
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

impl Entry {
    fn of(entry: kv::Entry) -> Option<Self> {
        (entry.operation == Operation::Put).then(|| Self {
            key: entry.key,
            value: entry.value.to_vec(),
            stored: entry.created.into(),
        })
    }
}
