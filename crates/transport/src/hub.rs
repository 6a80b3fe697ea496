//! Where the roles of a run meet: in the memory of one process, or on a server.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;

use messages::wire::Message;
use settings::JetStreamSettings;

use crate::jetstream::{Connection, Downstream, Place, Register, Upstream, make_dead_letters};
use crate::{Limits, Receiver, Sender, TransportError, WeightsShelf, stream};

/// Where the roles of a run meet; clones are the same place.
#[derive(Debug, Clone)]
pub struct Hub {
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Memory,
    JetStream(Arc<Connection>, Register),
}

impl Hub {
    /// The memory of this process.
    #[must_use]
    pub fn in_memory() -> Self {
        Self { kind: Kind::Memory }
    }

    /// The server of these settings, for the run of this name.
    ///
    /// # Errors
    /// When it cannot be reached in the time the settings allow, or refuses.
    pub async fn connect(settings: &JetStreamSettings, run: &str) -> Result<Self, TransportError> {
        let connection = Connection::open(settings, run).await?;
        let register = Register::open(&connection).await?;
        make_dead_letters(&connection).await?;
        Ok(Self {
            kind: Kind::JetStream(connection, register),
        })
    }

    /// As [`Self::connect`], for a run that is there already: `None` when it is not, and nothing is made.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn find(
        settings: &JetStreamSettings,
        run: &str,
    ) -> Result<Option<Self>, TransportError> {
        let connection = Connection::open(settings, run).await?;
        let register = Register::find(&connection).await?;
        Ok(register.map(|register| Self {
            kind: Kind::JetStream(connection, register),
        }))
    }

    /// A stream for `capacity` unacknowledged messages. In memory each call makes another stream; on a
    /// server the name says which it is.
    ///
    /// # Errors
    /// When the server refuses.
    ///
    /// # Panics
    /// When `capacity` is zero: such a stream could never take a message.
    pub async fn stream<T>(
        &self,
        name: &'static str,
        capacity: usize,
    ) -> Result<(Sender<T>, Receiver<T>), TransportError>
    where
        T: Message + Clone + Send + Sync + 'static,
    {
        let Kind::JetStream(connection, _) = &self.kind else {
            return Ok(stream(name, capacity));
        };
        let capacity = NonZeroUsize::new(capacity).expect("a stream has room for a message");
        let deliveries = NonZeroU32::new(connection.max_deliveries());
        let limits = Limits {
            capacity,
            max_deliveries: deliveries.unwrap_or(Limits::MAX_DELIVERIES),
        };
        let place = Place::make(connection, name, limits).await?;
        let downstream = Downstream::open(place.clone()).await?;
        Ok((
            Sender::over_jetstream(Arc::new(Upstream::of(place))),
            Receiver::over_jetstream(Arc::new(downstream)),
        ))
    }

    /// The run's shelf of weights.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn shelf(&self) -> Result<WeightsShelf, TransportError> {
        match &self.kind {
            Kind::Memory => Ok(WeightsShelf::default()),
            Kind::JetStream(connection, register) => {
                WeightsShelf::over_jetstream(connection, register).await
            }
        }
    }

    /// The run's register, where there is a server to keep it.
    #[must_use]
    pub fn register(&self) -> Option<&Register> {
        match &self.kind {
            Kind::Memory => None,
            Kind::JetStream(_, register) => Some(register),
        }
    }

    /// Waits until everything that was acknowledged is on its way: to be called before the process ends.
    pub async fn flush(&self) {
        if let Kind::JetStream(connection, _) = &self.kind {
            connection.flush().await;
        }
    }

    /// Removes everything of the run from the server.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn remove(&self) -> Result<(), TransportError> {
        match &self.kind {
            Kind::Memory => Ok(()),
            Kind::JetStream(connection, _) => connection.remove().await,
        }
    }
}
