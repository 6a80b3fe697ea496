//! What can go wrong between two roles, told apart by what the caller can do about it.

use messages::{WeightsManifest, WeightsVersion};
use thiserror::Error;

/// The end of a stream: nothing more will be taken, or nothing more will come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("use stream {stream}: {cause}")]
#[non_exhaustive]
pub struct Closed {
    /// The stream's name.
    pub stream: &'static str,
    /// Who ended it.
    pub cause: ClosedBy,
}

/// Who ended a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ClosedBy {
    /// The orderly end: a sender closed it, or all senders are gone.
    #[error("its senders have closed it")]
    Senders,
    /// Nobody is left to receive; the messages that were queued stay undelivered.
    #[error("every receiver is gone")]
    Receivers,
}

/// All that transport refuses.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// A stream has ended.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// The shelf has been closed and takes and announces no more weights.
    #[error("use the weights shelf: it has been closed")]
    ShelfClosed,
    /// The published weights are not newer than those announced; the shelf is unchanged.
    #[error("publish weights {offered}: the shelf already holds {current}; versions only grow")]
    NotNewer {
        /// What was to be published.
        offered: WeightsVersion,
        /// What the shelf announces.
        current: WeightsVersion,
    },
    /// The published blob is not the one its manifest describes; the shelf is unchanged.
    #[error(
        "publish weights {}: the blob of {found} bytes is not the {} bytes with digest {} of its \
         manifest; make the manifest from the whole blob",
        .manifest.version, .manifest.bytes, .manifest.digest
    )]
    Mismatched {
        /// What was promised.
        manifest: WeightsManifest,
        /// The length of the blob that came, in bytes.
        found: u64,
    },
    /// The blob on the shelf is no longer what was published.
    #[error(
        "fetch weights {}: the {found} bytes on the shelf are not the {} bytes with digest {} that \
         were announced; wait for a newer version",
        .manifest.version, .manifest.bytes, .manifest.digest
    )]
    Torn {
        /// What was announced.
        manifest: WeightsManifest,
        /// The length of the blob that lies there, in bytes.
        found: u64,
    },
    /// The version is older than everything still on the shelf.
    #[error("fetch weights {version}: superseded and no longer on the shelf; fetch {newest}")]
    Pruned {
        /// What was asked for.
        version: WeightsVersion,
        /// What to ask for instead.
        newest: WeightsVersion,
    },
    /// The version was not published.
    #[error("fetch weights {version}: never published; wait until it is announced")]
    Unpublished {
        /// What was asked for.
        version: WeightsVersion,
    },
    /// The runtime was shut down under a waiting call.
    #[error("{action} weights {version}: the runtime is shutting down")]
    Interrupted {
        /// What was being done.
        action: &'static str,
        /// To which weights.
        version: WeightsVersion,
    },
    /// The server cannot be reached.
    #[error(
        "connect to NATS at {url}: {reason}; start a nats-server with JetStream, or set transport.url"
    )]
    Unreachable {
        /// Where it should be.
        url: String,
        /// What went wrong.
        reason: String,
    },
    /// The server does not do what it is asked, and has not for as long as the settings allow.
    #[error("{action} at {url}: {reason}")]
    Refused {
        /// What it was asked.
        action: String,
        /// Where it is.
        url: String,
        /// What it says.
        reason: String,
    },
    /// A file of the connection's secrets.
    #[error("read {path}: {reason}")]
    Unreadable {
        /// Which file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process has it, and lives.
    #[error("claim the part of the {what}: {holder} has it and is alive; end that process first")]
    Claimed {
        /// What was claimed.
        what: String,
        /// Who has it.
        holder: String,
    },
    /// Something on the server was written by another build.
    #[error("read {what}: {reason}")]
    Foreign {
        /// What was read.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
}
