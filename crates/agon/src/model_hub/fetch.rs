//! Fetching: on a thread of its own, so that a hub that falls silent is given up and a signal is heard.

use std::{
    collections::BTreeSet,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::{Duration, Instant},
};

use hf_hub::{
    Cache,
    api::{self, sync::Api},
};
use settings::HubModel;
use telemetry::Progress;

use super::{Hub, HubError, at, files};

/// So long without a byte, and the hub is given up.
const SILENCE: Duration = Duration::from_secs(90);
/// Between two looks at whether to stop, or at a lock.
const LOOK: Duration = Duration::from_millis(200);
/// Smaller files are fetched without a word.
const WORTH_SHOWING: usize = 1 << 20;

/// What the fetching thread tells.
enum Event {
    /// A file of so many bytes begins, perhaps once more.
    Begins(String, usize),
    /// So many bytes of it have come.
    Bytes(usize),
    /// Another process fetches the model.
    Waits,
    /// All is there, or it failed.
    Ended(Result<PathBuf, HubError>),
}

/// The folder of the commit that the model's revision is today, with all its files.
pub(super) fn fetch(
    hub: &Hub,
    model: &HubModel,
    stopped: &dyn Fn() -> bool,
) -> Result<PathBuf, HubError> {
    let (tell, told) = mpsc::sync_channel(64);
    let job = Job {
        hub: hub.clone(),
        model: model.clone(),
        tell,
    };
    let thread = thread::Builder::new().name("hub".into());
    let started = thread.spawn(move || {
        let ended = job.run();
        // Whoever gave up does not listen.
        job.tell.send(Event::Ended(ended)).ok();
    });
    match started {
        Ok(_) => follow(model, &told, SILENCE, stopped),
        Err(error) => Err(failed(model, &error)),
    }
}

/// Follows the thread to its end, unless it is silent for too long or told to stop: then it is left alone.
fn follow(
    model: &HubModel,
    told: &Receiver<Event>,
    silence: Duration,
    stopped: &dyn Fn() -> bool,
) -> Result<PathBuf, HubError> {
    let mut shown = Shown::default();
    let mut heard = Instant::now();
    loop {
        match told.recv_timeout(LOOK) {
            Ok(Event::Begins(file, bytes)) => shown.begin(&file, bytes),
            Ok(Event::Bytes(bytes)) => shown.advance(bytes),
            Ok(Event::Waits) => {}
            Ok(Event::Ended(ended)) => {
                shown.end();
                return ended;
            }
            Err(RecvTimeoutError::Timeout) if heard.elapsed() < silence => {
                if stopped() {
                    return Err(HubError::Stopped {
                        model: model.clone(),
                    });
                }
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(HubError::Silent {
                    model: model.clone(),
                    seconds: silence.as_secs(),
                });
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(failed(model, &"the fetching thread panicked"));
            }
        }
        heard = Instant::now();
    }
}

fn failed(model: &HubModel, reason: &dyn ToString) -> HubError {
    HubError::Failed {
        model: model.clone(),
        reason: reason.to_string(),
    }
}

/// What the thread does.
struct Job {
    hub: Hub,
    model: HubModel,
    tell: SyncSender<Event>,
}

impl Job {
    fn run(&self) -> Result<PathBuf, HubError> {
        let (hub, model) = (&self.hub, &self.model);
        let api = hub.api(model)?;
        let info = hub.info(&api, model)?;
        let folder = hub.snapshot(model, &info.sha);
        self.complete(&api, &files::names(&info), &folder, &info.sha)?;
        if hub.cached(model).as_ref() != Some(&folder) {
            let named = Cache::new(hub.cache.clone()).repo(at(model, model.revision()));
            let named = named.create_ref(&info.sha);
            named.map_err(|error| failed(model, &error))?;
        }
        Ok(folder)
    }

    /// Fetches what is missing of `folder`. One process at a time: the others wait, and look again.
    fn complete(
        &self,
        api: &Api,
        names: &BTreeSet<String>,
        folder: &Path,
        commit: &str,
    ) -> Result<(), HubError> {
        let mut lock = None;
        loop {
            let mut missing = files::wanted(&self.model, names, folder)?;
            missing.retain(|name| !folder.join(name).exists());
            if missing.is_empty() {
                return Ok(());
            }
            if lock.is_none() {
                lock = Some(self.lock()?);
                continue;
            }
            let (model, endpoint) = (&self.model, &self.hub.endpoint);
            tracing::info!(%model, commit, endpoint, into = %folder.display(), "fetching a model");
            let repository = api.repo(at(&self.model, commit));
            for name in missing {
                let progress = Teller(self.tell.clone());
                let came = repository.download_with_progress(&name, progress);
                let came = came.map_err(|error| self.hub.refused(&self.model, error))?;
                if came != folder.join(&name) {
                    let reason = format!("{name} came of another commit: {}", came.display());
                    return Err(failed(&self.model, &reason));
                }
            }
        }
    }

    /// Waits until no other process fetches this model. The system lets a lock go with its process.
    fn lock(&self) -> Result<File, HubError> {
        let failed = |error: std::io::Error, path: &Path| {
            failed(&self.model, &format!("{}: {error}", path.display()))
        };
        let folder = self.hub.repository(&self.model);
        fs::create_dir_all(&folder).map_err(|error| failed(error, &folder))?;
        let path = folder.join("agon.lock");
        let file = File::create(&path).map_err(|error| failed(error, &path))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(failed(error, &path)),
                Err(TryLockError::WouldBlock) => {}
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(model = %self.model, "another process fetches the model: waiting for it");
            }
            self.tell.send(Event::Waits).ok();
            thread::sleep(LOOK);
        }
    }
}

/// Passes on how a file comes. Whoever gave up does not listen.
struct Teller(SyncSender<Event>);

impl api::Progress for Teller {
    fn init(&mut self, size: usize, filename: &str) {
        self.0.send(Event::Begins(filename.into(), size)).ok();
    }

    fn update(&mut self, size: usize) {
        self.0.send(Event::Bytes(size)).ok();
    }

    fn finish(&mut self) {}
}

/// The file that comes, as it is shown.
#[derive(Default)]
struct Shown {
    file: String,
    bytes: u64,
    progress: Option<Progress>,
}

impl Shown {
    fn begin(&mut self, file: &str, bytes: usize) {
        self.bytes = 0;
        if self.file == file {
            return;
        }
        self.end();
        file.clone_into(&mut self.file);
        let title = || Progress::new(&format!("fetching {file}, MiB"), (bytes >> 20) as u64);
        self.progress = (bytes >= WORTH_SHOWING).then(title);
    }

    fn advance(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
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
    fn a_silent_hub_is_given_up_and_a_signal_is_heard() {
        let Ok(ModelSource::Hub(model)) = "hf:org/name".parse() else {
            panic!("it is a model of the hub");
        };
        let (tell, told) = mpsc::sync_channel(1);
        tell.send(Event::Bytes(1)).unwrap();
        let silent = follow(&model, &told, Duration::ZERO, &|| false).unwrap_err();
        assert!(matches!(silent, HubError::Silent { .. }), "{silent}");
        let stopped = follow(&model, &told, SILENCE, &|| true).unwrap_err();
        assert!(matches!(stopped, HubError::Stopped { .. }), "{stopped}");
    }
}
