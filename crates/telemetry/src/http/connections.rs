//! Open connections of a listener: how many there are, and which have stopped making progress.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

/// File descriptors of the process that listeners leave to files and to connections of its own.
const RESERVED_DESCRIPTORS: u64 = 128;

/// Least number of connections of a listener.
const MIN_CONNECTIONS: usize = 8;

/// Age below which a connection is not closed to admit another.
const EVICTION_AGE: Duration = Duration::from_millis(250);

/// Interval between two sweeps for overdue connections, and between two attempts to admit a connection.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);

/// Limits of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Maximum number of open connections. One more is admitted in place of the connection that waits longest for a
    /// request; while all are busy it waits.
    pub connections: usize,
    /// Time for the head of a request, from the opening of the connection or its first byte.
    pub head: Duration,
    /// Time without a request between two requests.
    pub idle: Duration,
    /// Time without progress of a response that the client does not read.
    pub write: Duration,
}

impl ConnectionLimits {
    /// At most `connections`, and no more than half of the file descriptors that this process may open, less a
    /// reserve.
    #[must_use]
    pub fn new(connections: usize) -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let half = descriptors.saturating_sub(RESERVED_DESCRIPTORS) / 2;
        let half = usize::try_from(half).unwrap_or(usize::MAX);
        Self {
            connections: connections.min(half).max(MIN_CONNECTIONS.min(connections)),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            write: Duration::from_secs(30),
        }
    }
}

/// Phase of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The head of a request is arriving, or the connection is new.
    Head,
    /// The connection waits for its next request.
    Idle,
    /// A request is answered.
    Busy,
}

/// Progress of one connection.
#[derive(Debug)]
struct ConnectionProgress {
    phase: Phase,
    since: Instant,
    /// Since when the client has not read what is written to it.
    stalled: Option<Instant>,
}

/// One open connection.
#[derive(Debug)]
pub(super) struct ClientConnection {
    progress: Mutex<ConnectionProgress>,
    ended: Notify,
}

/// All open connections of a listener.
#[derive(Debug)]
pub(super) struct ConnectionTable {
    limits: ConnectionLimits,
    open: Mutex<BTreeMap<u64, Arc<ClientConnection>>>,
    /// Notified when a connection is closed.
    closed: Notify,
}

/// An admitted connection; it leaves the table when this is dropped.
pub(super) struct AdmissionGuard {
    table: Arc<ConnectionTable>,
    id: u64,
    connection: Arc<ClientConnection>,
}

/// A request in progress; the connection is idle again when this is dropped.
pub(super) struct BusyGuard(Arc<ClientConnection>);

impl ClientConnection {
    fn new() -> Self {
        Self {
            progress: Mutex::new(ConnectionProgress {
                phase: Phase::Head,
                since: Instant::now(),
                stalled: None,
            }),
            ended: Notify::new(),
        }
    }

    fn progress(&self) -> MutexGuard<'_, ConnectionProgress> {
        // Each change is an assignment: the progress is valid even after a panic.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Phase) {
        let mut progress = self.progress();
        progress.phase = phase;
        progress.since = Instant::now();
    }

    /// Bytes have arrived.
    pub(super) fn heard(&self) {
        if self.progress().phase == Phase::Idle {
            self.set(Phase::Head);
        }
    }

    /// A request has arrived.
    pub(super) fn begin(self: &Arc<Self>) -> BusyGuard {
        self.set(Phase::Busy);
        BusyGuard(Arc::clone(self))
    }

    /// Whether the last write could not make progress.
    pub(super) fn written(&self, is_pending: bool) {
        let mut progress = self.progress();
        progress.stalled = match is_pending {
            true => Some(progress.stalled.unwrap_or_else(Instant::now)),
            false => None,
        };
    }

    /// Returns once the connection is to be closed.
    pub(super) async fn ended(&self) {
        self.ended.notified().await;
    }

    fn is_overdue(&self, now: Instant, limits: &ConnectionLimits) -> bool {
        let progress = self.progress();
        let exceeds =
            |since: Instant, limit: Duration| now.saturating_duration_since(since) > limit;
        let is_stalled = progress
            .stalled
            .is_some_and(|since| exceeds(since, limits.write));
        is_stalled
            || match progress.phase {
                Phase::Head => exceeds(progress.since, limits.head),
                Phase::Idle => exceeds(progress.since, limits.idle),
                Phase::Busy => false,
            }
    }

    /// Since when it waits for a request, if it does.
    fn waits_since(&self) -> Option<Instant> {
        let progress = self.progress();
        (progress.phase != Phase::Busy && progress.stalled.is_none()).then_some(progress.since)
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.set(Phase::Idle);
    }
}

impl ConnectionTable {
    pub(super) fn new(limits: ConnectionLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            open: Mutex::default(),
            closed: Notify::new(),
        })
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<ClientConnection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a new connection. While the table is full, the connection that waits longest for a request is closed
    /// in its place.
    pub(super) async fn admit(self: &Arc<Self>) -> AdmissionGuard {
        loop {
            if let Some(admission) = self.try_admit() {
                return admission;
            }
            if let Some(longest) = self.longest_waiting() {
                longest.ended.notify_one();
            }
            // The timeout bounds the wait for a connection that becomes old enough.
            timeout(SWEEP_INTERVAL, self.closed.notified()).await.ok();
        }
    }

    fn try_admit(self: &Arc<Self>) -> Option<AdmissionGuard> {
        let mut open = self.open();
        if open.len() >= self.limits.connections {
            return None;
        }
        let id = open.last_key_value().map_or(0, |(last, _)| last + 1);
        let connection = Arc::new(ClientConnection::new());
        open.insert(id, Arc::clone(&connection));
        drop(open);
        Some(AdmissionGuard {
            table: Arc::clone(self),
            id,
            connection,
        })
    }

    fn longest_waiting(&self) -> Option<Arc<ClientConnection>> {
        let now = Instant::now();
        let open = self.open();
        let waiting = open.values().filter_map(|connection| {
            let since = connection.waits_since()?;
            let is_old = now.saturating_duration_since(since) >= EVICTION_AGE;
            is_old.then_some((since, connection))
        });
        let longest = waiting.min_by_key(|(since, _)| *since);
        longest.map(|(_, connection)| Arc::clone(connection))
    }

    /// Closes connections that exceed a time limit, until cancelled.
    pub(super) async fn sweep(&self) {
        loop {
            sleep(SWEEP_INTERVAL).await;
            let now = Instant::now();
            for connection in self.open().values() {
                if connection.is_overdue(now, &self.limits) {
                    connection.ended.notify_one();
                }
            }
        }
    }

    /// Returns once no connection is open.
    pub(super) async fn empty(&self) {
        while !self.open().is_empty() {
            self.closed.notified().await;
        }
    }
}

impl AdmissionGuard {
    /// The admitted connection.
    pub(super) fn connection(&self) -> &Arc<ClientConnection> {
        &self.connection
    }
}

impl Drop for AdmissionGuard {
    fn drop(&mut self) {
        self.table.open().remove(&self.id);
        // One waiter at a time: the accept loop, or the end of the listener.
        self.table.closed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(connections: usize) -> Arc<ConnectionTable> {
        ConnectionTable::new(ConnectionLimits {
            connections,
            ..ConnectionLimits::new(connections)
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_table_admits_a_connection_in_place_of_the_longest_waiting() {
        let table = table(3);
        let (silent, busy, newer) = (
            table.admit().await,
            table.admit().await,
            table.admit().await,
        );
        let _request = busy.connection().begin();
        sleep(EVICTION_AGE).await;
        drop(newer.connection().begin());
        let admitting = tokio::spawn({
            let table = Arc::clone(&table);
            async move { table.admit().await }
        });
        silent.connection().ended().await;
        assert!(!admitting.is_finished());
        drop(silent);
        let _admitted = admitting.await.unwrap();
        assert_eq!(table.open().len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_without_progress_are_closed_at_their_limits() {
        let table = table(8);
        let limits = table.limits;
        let started = Instant::now();
        let sweeping = tokio::spawn({
            let table = Arc::clone(&table);
            async move { table.sweep().await }
        });
        let new = table.admit().await;
        let (idle, stalled) = (table.admit().await, table.admit().await);
        drop(idle.connection().begin());
        let _request = stalled.connection().begin();
        stalled.connection().written(true);
        for (admission, limit) in [
            (new, limits.head),
            (stalled, limits.write),
            (idle, limits.idle),
        ] {
            admission.connection().ended().await;
            let after = started.elapsed();
            assert!(
                after > limit && after <= limit + 2 * SWEEP_INTERVAL,
                "after {after:?}, limit {limit:?}"
            );
        }
        sweeping.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_handler_and_a_reading_client_are_not_closed() {
        let table = table(8);
        let busy = table.admit().await;
        let _request = busy.connection().begin();
        busy.connection().written(true);
        sleep(table.limits.write / 2).await;
        busy.connection().written(false);
        sleep(2 * table.limits.idle).await;
        assert!(!busy.connection().is_overdue(Instant::now(), &table.limits));
    }
}
