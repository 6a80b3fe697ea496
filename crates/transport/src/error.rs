//! Errors of the transport, by what the caller can do about them.

use messages::{Classified, ErrorClass, WeightsManifest, WeightsVersion};
use thiserror::Error;

/// The stream is closed: no more messages can be sent, or none will arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("failed to use stream {stream}: {cause}")]
#[non_exhaustive]
pub struct Closed {
    /// The stream's name.
    pub stream: &'static str,
    /// The side that closed it.
    pub cause: ClosedBy,
}

/// The side that closed a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ClosedBy {
    /// A sender closed it, or all senders were dropped: the orderly end.
    #[error("its senders have closed it")]
    Senders,
    /// All receivers were dropped; queued messages stay undelivered.
    #[error("all its receivers were dropped")]
    Receivers,
}

/// Reason why a transport operation failed. Messages say what failed, why, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The stream is closed.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// The weight store is closed: it accepts and announces no more weights.
    #[error("failed to use the weight store: it has been closed")]
    WeightStoreClosed,
    /// The version is not newer than the announced one; the store is unchanged.
    #[error(
        "failed to publish weights {offered}: the weight store already holds {current}; versions only increase"
    )]
    NotNewer {
        /// Version to be published.
        offered: WeightsVersion,
        /// Announced version.
        current: WeightsVersion,
    },
    /// The weights cannot be serialised.
    #[error("failed to serialise weights {version}: {reason}")]
    Unserialisable {
        /// Version concerned.
        version: WeightsVersion,
        /// Cause.
        reason: String,
    },
    /// A complete blob is not of the weights that this build reads.
    #[error(
        "failed to read weights {version}: {reason}; start all processes of the run from the same build"
    )]
    NotWeights {
        /// Version concerned.
        version: WeightsVersion,
        /// Cause.
        reason: String,
    },
    /// The stored blob is corrupt.
    #[error(
        "failed to fetch weights {}: the {found} stored bytes are not the {} bytes with digest {} that \
         were announced; wait for a newer version",
        .manifest.version, .manifest.bytes, .manifest.digest
    )]
    Corrupt {
        /// Announced manifest.
        manifest: WeightsManifest,
        /// Length of the stored blob in bytes.
        found: u64,
    },
    /// The version is older than every stored one.
    #[error("failed to fetch weights {version}: superseded and no longer stored; fetch {newest}")]
    Pruned {
        /// Requested version.
        version: WeightsVersion,
        /// Newest version.
        newest: WeightsVersion,
    },
    /// The version was never published.
    #[error("failed to fetch weights {version}: never published; wait until it is announced")]
    Unpublished {
        /// Requested version.
        version: WeightsVersion,
    },
    /// The runtime shut down during the call.
    #[error("failed to {action} weights {version}: the runtime is shutting down")]
    Interrupted {
        /// Interrupted operation.
        action: &'static str,
        /// Version concerned.
        version: WeightsVersion,
    },
    /// The server cannot be reached.
    #[error(
        "failed to connect to NATS at {url}: {reason}; start a nats-server with JetStream, or set transport.url"
    )]
    Unreachable {
        /// Configured URL.
        url: String,
        /// Cause.
        reason: String,
    },
    /// The server or the settings must be changed: no restart and no wait helps.
    #[error("failed to use NATS at {url}: {reason}")]
    Rejected {
        /// Configured URL.
        url: String,
        /// Cause and remedy.
        reason: String,
    },
    /// An entry that only the run's leader may write was written by someone else.
    #[error(
        "failed to read {what}: {reason}, so the run's learner has not written it; name the learner's key with \
         transport.run_key_path (here {path}), and find out who writes to the server"
    )]
    Unauthentic {
        /// Name of the data.
        what: String,
        /// Cause.
        reason: String,
        /// File with the key.
        path: std::path::PathBuf,
    },
    /// A file of the run on the server is larger than the run's record says.
    #[error(
        "failed to fetch {name}: the server holds more than the {limit} bytes of the run's record"
    )]
    TooLarge {
        /// Name of the file.
        name: String,
        /// Size of the file according to the record.
        limit: u64,
    },
    /// The server rejected a request, or did not answer within the configured timeout.
    #[error("failed to {action} at {url}: {reason}")]
    Refused {
        /// Request.
        action: String,
        /// URL of the server.
        url: String,
        /// Cause.
        reason: String,
    },
    /// A credentials, token, key or certificate file cannot be read.
    #[error("failed to read {path}: {reason}")]
    Unreadable {
        /// The file.
        path: std::path::PathBuf,
        /// Cause.
        reason: String,
    },
    /// The lease is held by another live process.
    #[error(
        "failed to take the lease of the {what}: {holder} has it and is alive; end that process first"
    )]
    LeaseHeld {
        /// Name of the lease.
        what: String,
        /// Name of its holder.
        holder: String,
    },
    /// Data on the server was written by an incompatible build.
    #[error("failed to read {what}: {reason}")]
    Foreign {
        /// Name of the data.
        what: String,
        /// Cause.
        reason: String,
    },
}

impl Classified for TransportError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Rejected { .. } | Self::Unreadable { .. } => ErrorClass::Resource,
            Self::LeaseHeld { .. }
            | Self::Foreign { .. }
            | Self::Unauthentic { .. }
            | Self::NotWeights { .. } => ErrorClass::Usage,
            // A server that is away comes back: a process that ends for it is to be started again.
            _ => ErrorClass::Failed,
        }
    }
}
