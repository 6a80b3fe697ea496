//! What a run is doing now: who takes part in it, what lies between them, and where each is watched.
//!
//! Over JetStream the server's register says so. The process that leads a run also keeps it in the run's
//! directory, for whoever looks there: `status.json` for `agon status`, `targets.json` for Prometheus and
//! for the live page.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use messages::Station;
use serde::{Deserialize, Serialize};
use settings::Settings;
use telemetry::{Measurements, MetricsPage, RunDirectory, StationSnapshot, write_atomically};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use transport::{Counts, Register};

use crate::{
    presence::{self, RunRecord, RunState, Seen, Sign, Teller},
    roles::Streams,
};

/// How often a run is looked at.
const EVERY: Duration = Duration::from_secs(2);

/// How long a process in whose run nobody else takes part may be silent before it counts as gone.
const LEASE: Duration = Duration::from_secs(15);

/// A run at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Overview {
    /// Its name.
    pub(crate) run: String,
    /// Where it stands.
    pub(crate) state: RunState,
    /// How often it had been taken up before.
    pub(crate) session: u64,
    /// The host and the directory it is led from.
    pub(crate) home: String,
    /// Everyone who was ever there.
    pub(crate) present: Vec<Participant>,
    /// What lies between them, in the order of the flow.
    pub(crate) streams: Vec<StreamState>,
    /// What each station took, gave and dropped, over all its processes.
    pub(crate) stations: BTreeMap<String, StationSnapshot>,
    /// When this was so, in seconds since 1970.
    pub(crate) at: f64,
}

/// A process, or one role of a process that plays all.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Participant {
    /// What it said last.
    #[serde(flatten)]
    pub(crate) sign: Sign,
    /// Whether it is there.
    pub(crate) state: Standing,
    /// How long ago it said so.
    pub(crate) silent_seconds: f64,
}

/// Whether somebody takes part. Who is slow still gives signs of life, and is present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Standing {
    /// It gives signs of life.
    Present,
    /// It said that it leaves.
    Left,
    /// It was silent for too long: what it held is with others.
    Gone,
}

/// A stream and what has happened to its messages.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StreamState {
    /// Its name.
    pub(crate) name: String,
    /// How many messages it has room for.
    pub(crate) capacity: usize,
    /// Messages sent into it.
    pub(crate) sent: u64,
    /// Messages whose stay ended.
    pub(crate) acknowledged: u64,
    /// Messages that wait.
    pub(crate) queued: u64,
    /// Messages in somebody's hands.
    pub(crate) in_hand: u64,
    /// Messages that came back.
    pub(crate) redelivered: u64,
    /// Messages that were given up.
    pub(crate) given_up: u64,
}

/// What a process that plays all roles is called where Prometheus finds it: the command that it is.
const SINGLE_PROCESS: &str = "train";

/// Who knows who takes part in a run.
pub(crate) enum Source {
    /// All its roles are in this process.
    Here {
        /// The run as it stands.
        record: RunRecord,
        /// What its roles tell of themselves.
        tellers: Vec<Teller>,
    },
    /// Its server.
    Server(Register),
}

impl Source {
    /// The run and everyone who was ever in it; `None` when there is no run.
    async fn look(&self) -> anyhow::Result<Option<(RunRecord, Vec<Seen>, Duration)>> {
        Ok(match self {
            Self::Here { record, tellers } => {
                let left = record.state != RunState::Running;
                let seen = |teller: &Teller| Seen {
                    sign: teller.sign(left),
                    ago: Duration::ZERO,
                };
                Some((record.clone(), tellers.iter().map(seen).collect(), LEASE))
            }
            Self::Server(register) => match RunRecord::read(register).await? {
                None => None,
                Some(record) => {
                    let everyone = presence::everyone(register).await?;
                    Some((record, everyone, register.lease()))
                }
            },
        })
    }
}

impl Overview {
    /// The run of these settings as it is now; `None` when there is none.
    pub(crate) async fn now(
        source: &Source,
        settings: &Settings,
        streams: &Streams,
    ) -> anyhow::Result<Option<Self>> {
        let Some((record, everyone, lease)) = source.look().await? else {
            return Ok(None);
        };
        let counts = streams.counts().await?;
        let books = [Station::Actor, Station::Preference].map(|station| {
            (
                station.name().to_owned(),
                presence::books(&everyone, station),
            )
        });
        Ok(Some(Self {
            run: settings.run.name.clone(),
            state: record.state,
            session: record.session,
            home: record.home,
            present: everyone
                .into_iter()
                .map(|seen| Participant::new(seen, lease))
                .collect(),
            streams: counts
                .into_iter()
                .map(|(name, counts)| StreamState::new(name, streams.capacity(), counts))
                .collect(),
            stations: books.into(),
            at: since_1970().as_secs_f64(),
        }))
    }

    /// What the process that leads the run in this directory last wrote, as it is to be read now.
    pub(crate) fn written(directory: &Path) -> anyhow::Result<Option<Self>> {
        let path = status_file(directory);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("failed to read {}", path.display()));
            }
        };
        let read: Self = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} was not written by this build", path.display()))?;
        Ok(Some(read.read_at(since_1970().as_secs_f64())))
    }

    /// The same, read at another time: who has not said that it leaves may be gone by now.
    fn read_at(mut self, now: f64) -> Self {
        let since = (now - self.at).max(0.0);
        for one in &mut self.present {
            one.silent_seconds += since;
            if one.state == Standing::Present && one.silent_seconds > LEASE.as_secs_f64() {
                one.state = Standing::Gone;
            }
        }
        self
    }

    /// Where Prometheus finds everyone who is there, as its service discovery reads it.
    fn targets(&self) -> Vec<Target> {
        let mut targets: Vec<Target> = Vec::new();
        let mut signs: Vec<&Sign> = Vec::new();
        for one in &self.present {
            let Some(address) = one.sign.metrics_address() else {
                continue;
            };
            if one.state != Standing::Present {
                continue;
            }
            let at = signs
                .iter()
                .position(|sign| sign.metrics == one.sign.metrics);
            if let Some(at) = at {
                let of_process = |sign: &Sign| (sign.host.clone(), sign.pid);
                if of_process(signs[at]) == of_process(&one.sign) {
                    let label = ("process".to_owned(), SINGLE_PROCESS.to_owned());
                    targets[at].labels.extend([label]);
                }
                continue;
            }
            signs.push(&one.sign);
            targets.push(Target {
                targets: vec![address.to_owned()],
                labels: BTreeMap::from([
                    ("run".to_owned(), self.run.clone()),
                    ("process".to_owned(), one.sign.name.clone()),
                ]),
            });
        }
        targets
    }

    fn tell_streams(&self) {
        for stream in &self.streams {
            let waiting = stream.queued + stream.in_hand;
            let mut measurements = Measurements::new();
            measurements.set("stream/queued", stream.queued as f64);
            measurements.set("stream/in_hand", stream.in_hand as f64);
            measurements.set("stream/fill", waiting as f64 / stream.capacity as f64);
            measurements.set("stream/redelivered", stream.redelivered as f64);
            measurements.set("stream/given_up", stream.given_up as f64);
            let labels = [("role", "learner"), ("stream", stream.name.as_str())];
            telemetry::publish(&measurements, &labels);
        }
    }
}

impl Participant {
    fn new(seen: Seen, lease: Duration) -> Self {
        Self {
            state: match () {
                () if seen.sign.left => Standing::Left,
                () if seen.ago > lease => Standing::Gone,
                () => Standing::Present,
            },
            silent_seconds: seen.ago.as_secs_f64(),
            sign: seen.sign,
        }
    }
}

impl StreamState {
    fn new(name: &str, capacity: usize, counts: Counts) -> Self {
        Self {
            name: name.to_owned(),
            capacity,
            sent: counts.sent,
            acknowledged: counts.acknowledged,
            queued: counts.queued,
            in_hand: counts.in_hand,
            redelivered: counts.redelivered,
            given_up: counts.given_up,
        }
    }
}

/// Processes to look at, in the form of Prometheus' service discovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    /// Addresses, `host:port`.
    pub(crate) targets: Vec<String>,
    /// What is added to all their series.
    pub(crate) labels: BTreeMap<String, String>,
}

/// The addresses at which the processes of the run in this directory serve their metrics, as far as is
/// known there.
pub(crate) fn watched(directory: &Path) -> Vec<String> {
    let targets = targets(directory).into_iter();
    targets.flat_map(|target| target.targets).collect()
}

/// The same as Prometheus' HTTP service discovery reads it.
pub(crate) fn discovery(directory: &Path) -> MetricsPage {
    let directory = directory.to_owned();
    Arc::new(move || serde_json::to_string(&targets(&directory)).unwrap_or_default())
}

fn targets(directory: &Path) -> Vec<Target> {
    let read = |file: PathBuf| std::fs::read(file).ok();
    let parsed = |bytes: Vec<u8>| serde_json::from_slice::<Vec<Target>>(&bytes).ok();
    let files = [targets_file(directory), launcher_file(directory)];
    let found = files.into_iter().filter_map(read).filter_map(parsed);
    found.flatten().collect()
}

/// Says where the process that launched the run serves its metrics, until the value goes.
pub(crate) struct LauncherTarget(PathBuf);

impl LauncherTarget {
    /// Writes it into the run's directory.
    pub(crate) fn write(directory: &Path, run: &str, address: &str) -> anyhow::Result<Self> {
        let target = Target {
            targets: vec![address.to_owned()],
            labels: BTreeMap::from([
                ("run".to_owned(), run.to_owned()),
                ("process".to_owned(), "launcher".to_owned()),
            ]),
        };
        let path = launcher_file(directory);
        write_atomically(&path, &serde_json::to_vec_pretty(&[target])?)?;
        Ok(Self(path))
    }
}

impl Drop for LauncherTarget {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "could not be removed");
        }
    }
}

fn status_file(directory: &Path) -> PathBuf {
    directory.join("status.json")
}

fn targets_file(directory: &Path) -> PathBuf {
    directory.join("targets.json")
}

fn launcher_file(directory: &Path) -> PathBuf {
    directory.join("targets-launcher.json")
}

fn since_1970() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default()
}

/// Looks at a run every few seconds, writes what there is to see into its directory, and has delivered again
/// what the server has forgotten.
pub(crate) struct Lookout {
    end: watch::Sender<Option<RunState>>,
    looking: JoinHandle<()>,
}

impl Lookout {
    /// Begins to look.
    pub(crate) fn start(
        directory: &RunDirectory,
        settings: &Settings,
        streams: Streams,
        mut source: Source,
    ) -> Self {
        let (end, mut ending) = watch::channel(None);
        let (root, settings) = (directory.root().to_owned(), settings.clone());
        let looking = tokio::spawn(async move {
            loop {
                let ended = *ending.borrow_and_update();
                if let (Some(state), Source::Here { record, .. }) = (ended, &mut source) {
                    record.state = state;
                }
                if let Err(error) = look(&source, &settings, &streams, &root).await {
                    tracing::warn!("the state of the run could not be written: {error:#}");
                }
                if ended.is_some() {
                    return;
                }
                drop(timeout(EVERY, ending.changed()).await);
            }
        });
        Self { end, looking }
    }

    /// Looks once more, and no longer.
    pub(crate) async fn end(self, state: RunState) {
        self.end.send_replace(Some(state));
        if self.looking.await.is_err() {
            tracing::warn!("the last state of the run was not written");
        }
    }
}

async fn look(
    source: &Source,
    settings: &Settings,
    streams: &Streams,
    directory: &Path,
) -> anyhow::Result<()> {
    let Some(overview) = Overview::now(source, settings, streams).await? else {
        return Ok(());
    };
    overview.tell_streams();
    streams.reclaim().await?;
    let targets = serde_json::to_vec_pretty(&overview.targets())?;
    // Prometheus reads it again whenever it changes.
    if std::fs::read(targets_file(directory)).ok().as_ref() != Some(&targets) {
        write_atomically(&targets_file(directory), &targets)?;
    }
    write_atomically(
        &status_file(directory),
        &serde_json::to_vec_pretty(&overview)?,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sign(name: &str, metrics: &str) -> Sign {
        Sign {
            role: "actor".into(),
            name: name.into(),
            host: "h".into(),
            pid: 1,
            left: false,
            step: None,
            waits: Vec::new(),
            station: StationSnapshot::default(),
            metrics: metrics.into(),
        }
    }

    fn overview() -> Overview {
        let seen = |name: &str, metrics: &str, left, ago| {
            let mut sign = sign(name, metrics);
            sign.left = left;
            let ago = Duration::from_secs(ago);
            Participant::new(Seen { sign, ago }, LEASE)
        };
        Overview {
            run: "r".into(),
            state: RunState::Running,
            session: 0,
            home: "h:/r".into(),
            present: vec![
                seen("a", "http://127.0.0.1:1/metrics", false, 0),
                seen("b", "http://127.0.0.1:1/metrics", false, 0),
                seen("c", "http://127.0.0.1:2/metrics", true, 0),
                seen("d", "http://127.0.0.1:3/metrics", false, 99),
                seen("e", "http://127.0.0.1:4/metrics", false, 9),
            ],
            streams: Vec::new(),
            stations: BTreeMap::new(),
            at: 1000.0,
        }
    }

    #[test]
    fn who_is_there_is_a_target_once() {
        let targets = overview().targets();
        let addresses: Vec<_> = targets.iter().flat_map(|t| &t.targets).collect();
        assert_eq!(addresses, ["127.0.0.1:1", "127.0.0.1:4"]);
        let names = targets
            .iter()
            .map(|target| target.labels["process"].as_str());
        assert_eq!(
            names.collect::<Vec<_>>(),
            ["train", "e"],
            "one process has several roles"
        );
        assert_eq!(targets[1].labels["run"], "r");
    }

    #[test]
    fn what_was_written_long_ago_is_of_those_who_are_gone() {
        let standing = |at: f64| -> Vec<Standing> {
            let read = overview().read_at(at);
            read.present.iter().map(|one| one.state).collect()
        };
        use Standing::{Gone, Left, Present};
        assert_eq!(standing(1000.0), [Present, Present, Left, Gone, Present]);
        assert_eq!(standing(1010.0), [Present, Present, Left, Gone, Gone]);
        assert_eq!(standing(1016.0), [Gone, Gone, Left, Gone, Gone]);
    }
}
