//! Why an actor ends before it is told to.

use model::ModelError;
use thiserror::Error;
use transport::TransportError;

/// Why an actor ends before it is told to.
#[derive(Debug, Error)]
pub enum ActorError {
    /// The model fails.
    #[error("{actor}: {source}")]
    Model {
        /// Which actor.
        actor: String,
        /// What failed.
        source: ModelError,
    },
    /// The thread that writes completions is gone.
    #[error(
        "{actor}: the thread that writes completions ended unexpectedly (it panicked; see the log)"
    )]
    EngineGone {
        /// Which actor.
        actor: String,
    },
    /// The thread that writes completions cannot be started.
    #[error("{actor}: failed to start the thread that writes completions: {source}")]
    Thread {
        /// Which actor.
        actor: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// Announced weights cannot be had.
    #[error("{actor}: {source}")]
    Weights {
        /// Which actor.
        actor: String,
        /// What is wrong with them.
        source: TransportError,
    },
    /// A stream has no other end any more, or the server is gone.
    #[error("{actor}: {source}")]
    Stream {
        /// Which actor.
        actor: String,
        /// Which stream.
        source: TransportError,
    },
}
