//! Events of the thread that downloads a model.

use std::path::PathBuf;

use crate::error::HubError;

/// Event of the download thread.
pub(crate) enum DownloadEvent {
    /// A file of this many bytes begins, possibly again after a retry.
    FileStarted(String, u64),
    /// This many more bytes of it have arrived.
    Bytes(u64),
    /// Another process holds the lock of the repository.
    WaitingForLock,
    /// The snapshot is complete, or the download failed.
    Finished(Result<PathBuf, HubError>),
}
