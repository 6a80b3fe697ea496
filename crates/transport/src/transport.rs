//! The backend of a run's streams and weights: the memory of one process, or a NATS server.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use messages::{StoredWeights, wire::WireMessage};
use settings::JetStreamSettings;

use crate::nats::{
    Connection, Downstream, RunRegistry, StreamLocation, Upstream, create_dead_letter_stream,
};
use crate::{
    error::TransportError,
    stream::{Receiver, Sender, StreamLimits, stream},
    weight_store::WeightStore,
};

/// Role of the process that leads a run, in the names of its subjects on the server.
const LEADER: &str = "learner";

/// A handle on the backend of a run; clones share it.
#[derive(Debug, Clone)]
pub struct Transport {
    backend: Backend,
}

#[derive(Debug, Clone)]
enum Backend {
    Memory,
    JetStream(Arc<Connection>, RunRegistry),
}

impl Transport {
    /// A backend in the memory of this process.
    #[must_use]
    pub fn in_memory() -> Self {
        Self {
            backend: Backend::Memory,
        }
    }

    /// Connects to the server as the leader of the run named `run`; creates what is missing there.
    ///
    /// # Errors
    /// When the server cannot be reached within the configured timeout, refuses, or lacks what a run needs.
    pub async fn connect(settings: &JetStreamSettings, run: &str) -> Result<Self, TransportError> {
        let connection = Connection::open(settings, run, LEADER, true).await?;
        let registry = RunRegistry::open(&connection).await?;
        create_dead_letter_stream(&connection).await?;
        Ok(Self {
            backend: Backend::JetStream(connection, registry),
        })
    }

    /// Connects to the server as a process of the role `role` in the run named `run`; `None` if there is no such run.
    /// Nothing is created, and no permission for that is needed.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn find(
        settings: &JetStreamSettings,
        run: &str,
        role: &str,
    ) -> Result<Option<Self>, TransportError> {
        let connection = Connection::open(settings, run, role, false).await?;
        let registry = RunRegistry::find(&connection).await?;
        Ok(registry.map(|registry| Self {
            backend: Backend::JetStream(connection, registry),
        }))
    }

    /// A stream of at most `capacity` unacknowledged messages. In memory each call creates a new stream; on a
    /// server the name identifies it.
    ///
    /// # Errors
    /// When the server refuses.
    ///
    /// # Panics
    /// When `capacity` is zero.
    pub async fn stream<T>(
        &self,
        name: &'static str,
        capacity: usize,
    ) -> Result<(Sender<T>, Receiver<T>), TransportError>
    where
        T: WireMessage + Clone + Send + Sync + 'static,
    {
        let Backend::JetStream(connection, _) = &self.backend else {
            return Ok(stream(name, capacity));
        };
        let capacity = NonZeroUsize::new(capacity).expect("the capacity is positive");
        let deliveries = NonZeroU32::new(connection.max_deliveries());
        let limits = StreamLimits {
            capacity,
            max_deliveries: deliveries.unwrap_or(StreamLimits::MAX_DELIVERIES),
        };
        let location = StreamLocation::open(connection, name, limits).await?;
        let downstream = Downstream::open(location.clone()).await?;
        Ok((
            Sender::over_jetstream(Arc::new(Upstream::of(location))),
            Receiver::over_jetstream(Arc::new(downstream)),
        ))
    }

    /// The run's weight store.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn weight_store<W: StoredWeights>(&self) -> Result<WeightStore<W>, TransportError> {
        match &self.backend {
            Backend::Memory => Ok(WeightStore::default()),
            Backend::JetStream(connection, registry) => {
                WeightStore::over_jetstream(connection, registry).await
            }
        }
    }

    /// The run's registry; `None` in memory.
    #[must_use]
    pub fn registry(&self) -> Option<&RunRegistry> {
        match &self.backend {
            Backend::Memory => None,
            Backend::JetStream(_, registry) => Some(registry),
        }
    }

    /// Checks that the server takes messages of `bytes` bytes.
    ///
    /// # Errors
    /// When it does not; the message names both sizes.
    pub fn require_payload(&self, bytes: usize) -> Result<(), TransportError> {
        match &self.backend {
            Backend::Memory => Ok(()),
            Backend::JetStream(connection, _) => connection.require_payload(bytes),
        }
    }

    /// Records that this process has started and has work to lose: from now on it waits for a server that is away, for
    /// the configured outage.
    pub fn set_started(&self) {
        if let Backend::JetStream(connection, _) = &self.backend {
            connection.set_started();
        }
    }

    /// Time for which the server was unreachable so far, in all outages together; zero in memory.
    #[must_use]
    pub fn outage_time(&self) -> Duration {
        match &self.backend {
            Backend::Memory => Duration::ZERO,
            Backend::JetStream(connection, _) => connection.health().outage_time(),
        }
    }

    /// Waits until all acknowledgements are sent. To be called before the process exits.
    pub async fn flush(&self) {
        if let Backend::JetStream(connection, _) = &self.backend {
            connection.flush().await;
        }
    }

    /// Removes all data of the run, whose streams are `streams`, from the server.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn remove(&self, streams: &[&str]) -> Result<(), TransportError> {
        match &self.backend {
            Backend::Memory => Ok(()),
            Backend::JetStream(connection, _) => connection.remove(streams).await,
        }
    }
}
