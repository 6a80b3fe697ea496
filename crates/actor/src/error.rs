//! Errors that end an actor.

use model::ModelError;
use thiserror::Error;
use transport::TransportError;

/// Error that ends an actor.
#[derive(Debug, Error)]
pub enum ActorError {
    /// The model fails.
    #[error("{actor}: {source}")]
    Model {
        /// Name of the actor.
        actor: String,
        /// Error of the model.
        source: ModelError,
    },
    /// The sampler thread panicked.
    #[error("{actor}: the sampler thread ended unexpectedly (it panicked; see the log)")]
    ThreadPanicked {
        /// Name of the actor.
        actor: String,
    },
    /// The sampler thread cannot be started.
    #[error("{actor}: failed to start the sampler thread: {source}")]
    Thread {
        /// Name of the actor.
        actor: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// Announced weights cannot be fetched.
    #[error("{actor}: {source}")]
    Weights {
        /// Name of the actor.
        actor: String,
        /// Error of the weight store.
        source: TransportError,
    },
    /// A stream is closed at its other end, or the server is unreachable.
    #[error("{actor}: {source}")]
    Stream {
        /// Name of the actor.
        actor: String,
        /// Error of the stream.
        source: TransportError,
    },
}
