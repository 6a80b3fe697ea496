//! Downloads of snapshots, on a thread of their own, so that timeouts and cancellation take effect during a request.

use std::{
    collections::BTreeSet,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::{Duration, Instant},
};

use messages::FileName;
use settings::HubModel;
use telemetry::Progress;

use crate::{
    blob::{self, Blob, BlobError},
    cancel::CancelToken,
    client::{HubClient, commit_of},
    download_event::DownloadEvent,
    error::HubError,
    files,
    http::HttpClient,
};

/// Download timeout: the longest time without data.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(90);
/// Interval between two checks for cancellation or for the lock.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Smallest file with a progress bar, in bytes.
const PROGRESS_THRESHOLD: u64 = 1 << 20;
/// Number of times that an interrupted download is resumed.
const RETRIES: u32 = 3;
/// Delay before the first of them; doubled for each further one.
const RETRY_DELAY: Duration = Duration::from_millis(300);

/// The folder of a model: downloaded, or as it is in the cache if the Hub cannot be reached.
pub(crate) fn folder(
    hub: &HubClient,
    model: &HubModel,
    cancel: &CancelToken,
) -> Result<PathBuf, HubError> {
    let fetched = match hub.is_offline {
        true => Err(hub.offline(model)),
        false => fetch(hub, model, cancel),
    };
    let folder = match (fetched, hub.cached(model)) {
        (Err(HubError::Unreachable { .. }), Some(folder)) if hub.is_offline => folder,
        (Err(HubError::Unreachable { reason, .. }), Some(folder)) => {
            tracing::warn!(%model, reason, "the hub cannot be reached: using the cached model");
            folder
        }
        (fetched, _) => fetched?,
    };
    tracing::info!(%model, commit = commit_of(&folder), "the model is in the hub's cache");
    Ok(folder)
}

/// Downloads the missing files of the commit that the model's revision resolves to; returns the snapshot's folder.
pub(super) fn fetch(
    hub: &HubClient,
    model: &HubModel,
    cancel: &CancelToken,
) -> Result<PathBuf, HubError> {
    let (events, receiver) = mpsc::sync_channel(64);
    let download = Download {
        hub: hub.clone(),
        model: model.clone(),
        events,
    };
    let thread = thread::Builder::new().name("hub".into());
    let started = thread.spawn(move || {
        let result = download.run();
        // After a timeout or cancellation the receiver is gone.
        download.events.send(DownloadEvent::Finished(result)).ok();
    });
    match started {
        Ok(_) => follow(model, &receiver, STALL_TIMEOUT, cancel),
        Err(error) => Err(failed(model, &error)),
    }
}

/// Waits for the download thread; on a timeout or cancellation the thread is detached.
fn follow(
    model: &HubModel,
    events: &Receiver<DownloadEvent>,
    stall_timeout: Duration,
    cancel: &CancelToken,
) -> Result<PathBuf, HubError> {
    let mut progress = FileProgress::default();
    let mut last_event = Instant::now();
    loop {
        match events.recv_timeout(POLL_INTERVAL) {
            Ok(DownloadEvent::FileStarted(file, bytes)) => progress.begin(&file, bytes),
            Ok(DownloadEvent::Bytes(bytes)) => progress.advance(bytes),
            Ok(DownloadEvent::WaitingForLock) => {}
            Ok(DownloadEvent::Finished(result)) => {
                progress.end();
                return result;
            }
            Err(RecvTimeoutError::Timeout) if last_event.elapsed() < stall_timeout => {
                if cancel.is_cancelled() {
                    return Err(HubError::Cancelled {
                        model: model.clone(),
                    });
                }
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(HubError::TimedOut {
                    model: model.clone(),
                    seconds: stall_timeout.as_secs(),
                });
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(failed(model, &"the download thread panicked"));
            }
        }
        last_event = Instant::now();
    }
}

fn failed(model: &HubModel, reason: &dyn ToString) -> HubError {
    HubError::Failed {
        model: model.clone(),
        reason: reason.to_string(),
    }
}

/// State of the download thread.
struct Download {
    hub: HubClient,
    model: HubModel,
    events: SyncSender<DownloadEvent>,
}

impl Download {
    fn run(&self) -> Result<PathBuf, HubError> {
        let (hub, model) = (&self.hub, &self.model);
        let client = hub.http_client(STALL_TIMEOUT);
        let info = hub.info(&client, model)?;
        let folder = hub.snapshot(model, &info.commit);
        self.complete(&client, &info.files, &info.commit)?;
        if hub.cached(model).as_ref() != Some(&folder) {
            let path = hub.reference(model);
            let written = fs::create_dir_all(path.parent().unwrap_or(Path::new("")))
                .and_then(|()| fs::write(&path, info.commit.as_str()));
            written.map_err(|error| self.failed_at(&path, &error))?;
        }
        Ok(folder)
    }

    /// Downloads the missing files of the snapshot of `commit`. One process at a time: the others wait for the lock
    /// and check again.
    fn complete(
        &self,
        client: &HttpClient,
        names: &BTreeSet<FileName>,
        commit: &FileName,
    ) -> Result<(), HubError> {
        let folder = self.hub.snapshot(&self.model, commit);
        let mut lock = None;
        loop {
            let mut missing = files::required(&self.model, names, &folder)?;
            missing.retain(|name| !folder.join(name).exists());
            if missing.is_empty() {
                return Ok(());
            }
            if lock.is_none() {
                lock = Some(self.lock()?);
                continue;
            }
            let (model, endpoint) = (&self.model, &self.hub.endpoint);
            tracing::info!(%model, %commit, %endpoint, into = %folder.display(), "fetching a model");
            fs::create_dir_all(&folder).map_err(|error| self.failed_at(&folder, &error))?;
            for name in &missing {
                let blob = self.blob(client, commit, name)?;
                let linked = blob::link(&blob, &folder.join(name));
                linked.map_err(|error| self.failed_at(&folder, &error))?;
            }
        }
    }

    /// Path of the content of a file, downloaded if it is not in the cache.
    fn blob(
        &self,
        client: &HttpClient,
        commit: &FileName,
        name: &FileName,
    ) -> Result<PathBuf, HubError> {
        let blob = Blob {
            folder: self.hub.repository(&self.model).join("blobs"),
            repository: self.model.repository(),
            commit,
            name,
            events: &self.events,
        };
        let mut retries = 0;
        loop {
            match blob.fetch(client) {
                Ok(path) => return Ok(path),
                Err(BlobError::Interrupted(_)) if retries < RETRIES => {
                    thread::sleep(RETRY_DELAY * 2_u32.pow(retries));
                    retries += 1;
                }
                Err(BlobError::Interrupted(reason)) => {
                    return Err(self.hub.unreachable(&self.model, reason));
                }
                Err(BlobError::Refused(reason)) => return Err(failed(&self.model, &reason)),
                Err(BlobError::Request(error)) => {
                    return Err(self.hub.classify(&self.model, error));
                }
                Err(BlobError::Abandoned) => {
                    return Err(HubError::Cancelled {
                        model: self.model.clone(),
                    });
                }
            }
        }
    }

    fn failed_at(&self, path: &Path, error: &std::io::Error) -> HubError {
        failed(&self.model, &format!("{}: {error}", path.display()))
    }

    /// Takes the repository's file lock, which the system releases when its process ends.
    fn lock(&self) -> Result<File, HubError> {
        let folder = self.hub.repository(&self.model);
        fs::create_dir_all(&folder).map_err(|error| self.failed_at(&folder, &error))?;
        let path = folder.join("agon.lock");
        let file = File::create(&path).map_err(|error| self.failed_at(&path, &error))?;
        let mut is_logged = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(self.failed_at(&path, &error)),
                Err(TryLockError::WouldBlock) => {}
            }
            if !std::mem::replace(&mut is_logged, true) {
                tracing::info!(model = %self.model, "another process fetches the model: waiting for it");
            }
            self.events.send(DownloadEvent::WaitingForLock).ok();
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Progress bar of the current file.
#[derive(Default)]
struct FileProgress {
    file: String,
    bytes: u64,
    progress: Option<Progress>,
}

impl FileProgress {
    fn begin(&mut self, file: &str, bytes: u64) {
        self.bytes = 0;
        if self.file == file {
            return;
        }
        self.end();
        file.clone_into(&mut self.file);
        let title = || Progress::new(&format!("fetching {file}, MiB"), bytes >> 20);
        self.progress = (bytes >= PROGRESS_THRESHOLD).then(title);
    }

    fn advance(&mut self, bytes: u64) {
        self.bytes += bytes;
        if let Some(progress) = &mut self.progress {
            progress.advance_to(self.bytes >> 20, "");
        }
    }

    fn end(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish("");
        }
    }
}

#[cfg(test)]
mod tests {
    use settings::ModelSource;

    use super::*;

    #[test]
    fn a_stalled_download_times_out_and_a_cancelled_one_ends() {
        let Ok(ModelSource::Hub(model)) = "hf:org/name".parse() else {
            panic!("it is a model of the hub");
        };
        let (events, receiver) = mpsc::sync_channel(1);
        events.send(DownloadEvent::Bytes(1)).unwrap();
        let never = CancelToken::never();
        let stalled = follow(&model, &receiver, Duration::ZERO, &never).unwrap_err();
        assert!(matches!(stalled, HubError::TimedOut { .. }), "{stalled}");
        let cancel = CancelToken::new(|| true);
        let cancelled = follow(&model, &receiver, STALL_TIMEOUT, &cancel).unwrap_err();
        assert!(
            matches!(cancelled, HubError::Cancelled { .. }),
            "{cancelled}"
        );
    }
}
