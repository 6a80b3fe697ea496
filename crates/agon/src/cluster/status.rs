//! Status of a run: its processes, its streams, and the scrape targets of its metrics.
//!
//! Over JetStream it is read from the run's registry. The leader also writes it to the run directory: `status.json` for
//! `agon status`, `targets.json` for Prometheus and for the live page.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use messages::Stage;
use serde::{Deserialize, Serialize};
use settings::Settings;
use telemetry::{
    Measurements, MetricsPage, RunDirectory, RunFiles, StageSnapshot, write_atomically,
};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use transport::{RunRegistry, StreamCounts};

use crate::{
    cluster::membership::{self, Heartbeat, Peer, RunPhase, RunRecord, StatusSource},
    exit_code::Resource,
    run::RunStreams,
};

/// Interval at which the status is published.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(2);

/// Age of `status.json` after which a process of a single-process run counts as dead.
const SINGLE_PROCESS_LEASE: Duration = Duration::from_secs(15);

/// Status in a run directory, for `agon status`.
const STATUS_FILE: &str = "status.json";

/// Scrape targets in a run directory, for Prometheus and the live page.
const TARGETS_FILE: &str = "targets.json";

/// The launcher's scrape target.
const LAUNCHER_FILE: &str = "targets-launcher.json";

/// Maximum size of these files in bytes: some thousand processes.
const MAX_STATUS_BYTES: u64 = 16 << 20;

/// Snapshot of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ClusterStatus {
    /// Name of the run.
    pub(crate) run: String,
    /// Phase.
    pub(crate) state: RunPhase,
    /// Session number: how often the run was resumed.
    pub(crate) session: u64,
    /// Host and directory of the leader.
    pub(crate) home: String,
    /// All processes that ever joined.
    pub(crate) processes: Vec<Participant>,
    /// Streams, in the order of the data flow.
    pub(crate) streams: Vec<StreamState>,
    /// Counters of each stage, over all its processes.
    pub(crate) stages: BTreeMap<String, StageSnapshot>,
    /// Time of the snapshot in seconds since 1970.
    pub(crate) at: f64,
}

/// A process of the run, or one role of a single-process run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Participant {
    /// Last heartbeat.
    #[serde(flatten)]
    pub(crate) heartbeat: Heartbeat,
    /// Liveness.
    pub(crate) state: Liveness,
    /// Age of the last heartbeat in seconds.
    pub(crate) silent_seconds: f64,
}

/// Liveness of a process, from its heartbeats. A slow process still sends heartbeats and is present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Liveness {
    /// Sends heartbeats.
    Present,
    /// Left the run in an orderly way.
    Left,
    /// Sent no heartbeat for a lease duration; its messages are redelivered to others.
    Gone,
}

/// Counters of a stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StreamState {
    /// Name.
    pub(crate) name: String,
    /// Capacity in messages.
    pub(crate) capacity: usize,
    /// Messages sent.
    pub(crate) sent: u64,
    /// Messages acknowledged.
    pub(crate) acknowledged: u64,
    /// Messages queued.
    pub(crate) queued: u64,
    /// Messages delivered and not yet acknowledged.
    pub(crate) in_flight: u64,
    /// Messages redelivered.
    pub(crate) redelivered: u64,
    /// Messages of the stage in the dead-letter stream: undecodable, invalid, or delivered too often.
    pub(crate) dead_lettered: u64,
}

/// Value of the label `process` for a process that runs all roles: its command.
const SINGLE_PROCESS: &str = "train";

/// Source of the members of a run.
pub(crate) enum MemberSource {
    /// All roles are in this process.
    SingleProcess {
        /// Record of the run.
        record: Box<RunRecord>,
        /// Status of each role.
        roles: Vec<StatusSource>,
    },
    /// The run's registry.
    Registry(RunRegistry),
}

/// The record of a run and its members.
struct Members {
    record: RunRecord,
    peers: Vec<Peer>,
    /// Time without a heartbeat after which a process counts as dead.
    lease: Duration,
}

impl MemberSource {
    /// Reads the members; `None` if there is no run.
    async fn members(&self) -> anyhow::Result<Option<Members>> {
        Ok(match self {
            Self::SingleProcess { record, roles } => {
                let left = record.state != RunPhase::Running;
                let peer = |role: &StatusSource| Peer {
                    heartbeat: role.heartbeat(left),
                    age: Duration::ZERO,
                };
                Some(Members {
                    record: RunRecord::clone(record),
                    peers: roles.iter().map(peer).collect(),
                    lease: SINGLE_PROCESS_LEASE,
                })
            }
            Self::Registry(registry) => match RunRecord::read(registry).await? {
                None => None,
                Some(record) => Some(Members {
                    record,
                    peers: membership::peers(registry).await?,
                    lease: registry.lease(),
                }),
            },
        })
    }
}

impl ClusterStatus {
    /// Current status of the run of these settings; `None` if there is no run.
    pub(crate) async fn now(
        source: &MemberSource,
        settings: &Settings,
        streams: &RunStreams,
    ) -> anyhow::Result<Option<Self>> {
        let Some(members) = source.members().await? else {
            return Ok(None);
        };
        let Members {
            record,
            peers,
            lease,
        } = members;
        let counts = streams.counts().await?;
        let stage_counters = [Stage::Actor, Stage::Preference].map(|stage| {
            (
                stage.name().to_owned(),
                membership::stage_counters(&peers, stage),
            )
        });
        Ok(Some(Self {
            run: settings.run.name.clone(),
            state: record.state,
            session: record.session,
            home: record.home,
            processes: peers
                .into_iter()
                .map(|peer| Participant::new(peer, lease))
                .collect(),
            streams: counts
                .into_iter()
                .map(|(name, counts)| StreamState::new(name, streams.capacity(), counts))
                .collect(),
            stages: stage_counters.into(),
            at: since_1970().as_secs_f64(),
        }))
    }

    /// Reads the status last written to a run directory, with the ages of heartbeats as of now.
    pub(crate) fn read(directory: &Path) -> anyhow::Result<Option<Self>> {
        let path = status_file(directory);
        let bytes = RunFiles::new(directory).read(STATUS_FILE, MAX_STATUS_BYTES)?;
        let Some(bytes) = bytes else {
            return Ok(None);
        };
        let damaged = |error| {
            Resource(format!(
                "failed to read {}: it is damaged, or of another build: {error}",
                path.display()
            ))
        };
        let status: Self = serde_json::from_slice(&bytes).map_err(damaged)?;
        Ok(Some(status.aged_to(since_1970().as_secs_f64())))
    }

    /// The status as of the time `now`, in seconds since 1970: a process without a recent heartbeat counts as dead.
    fn aged_to(mut self, now: f64) -> Self {
        let since = (now - self.at).max(0.0);
        for process in &mut self.processes {
            process.silent_seconds += since;
            if process.state == Liveness::Present
                && process.silent_seconds > SINGLE_PROCESS_LEASE.as_secs_f64()
            {
                process.state = Liveness::Gone;
            }
        }
        self
    }

    /// Scrape targets of all present processes, one per address.
    fn targets(&self) -> Vec<ScrapeTarget> {
        let mut targets: Vec<ScrapeTarget> = Vec::new();
        let mut heartbeats: Vec<&Heartbeat> = Vec::new();
        for process in &self.processes {
            let Some(address) = process.heartbeat.metrics_address() else {
                continue;
            };
            if process.state != Liveness::Present {
                continue;
            }
            let index = heartbeats
                .iter()
                .position(|heartbeat| heartbeat.metrics == process.heartbeat.metrics);
            if let Some(index) = index {
                let process_key = |heartbeat: &Heartbeat| (heartbeat.host.clone(), heartbeat.pid);
                if process_key(heartbeats[index]) == process_key(&process.heartbeat) {
                    let label = ("process".to_owned(), SINGLE_PROCESS.to_owned());
                    targets[index].labels.extend([label]);
                }
                continue;
            }
            heartbeats.push(&process.heartbeat);
            targets.push(ScrapeTarget {
                targets: vec![address.to_owned()],
                labels: BTreeMap::from([
                    ("run".to_owned(), self.run.clone()),
                    ("process".to_owned(), process.heartbeat.name.clone()),
                ]),
            });
        }
        targets
    }

    fn publish_stream_metrics(&self) {
        for stream in &self.streams {
            let waiting = stream.queued + stream.in_flight;
            let mut measurements = Measurements::new();
            measurements.set("stream/queued", stream.queued as f64);
            measurements.set("stream/in_flight", stream.in_flight as f64);
            measurements.set("stream/fill", waiting as f64 / stream.capacity as f64);
            measurements.set("stream/redelivered", stream.redelivered as f64);
            measurements.set("stream/dead_lettered", stream.dead_lettered as f64);
            let labels = [("role", "learner"), ("stream", stream.name.as_str())];
            telemetry::publish(&measurements, &labels);
        }
    }
}

impl Participant {
    fn new(peer: Peer, lease: Duration) -> Self {
        Self {
            state: match () {
                () if peer.heartbeat.left => Liveness::Left,
                () if peer.age > lease => Liveness::Gone,
                () => Liveness::Present,
            },
            silent_seconds: peer.age.as_secs_f64(),
            heartbeat: peer.heartbeat,
        }
    }
}

impl StreamState {
    fn new(name: &str, capacity: usize, counts: StreamCounts) -> Self {
        Self {
            name: name.to_owned(),
            capacity,
            sent: counts.sent,
            acknowledged: counts.acknowledged,
            queued: counts.queued,
            in_flight: counts.in_flight,
            redelivered: counts.redelivered,
            dead_lettered: counts.dead_lettered,
        }
    }
}

/// Scrape targets, in the format of Prometheus' service discovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ScrapeTarget {
    /// Addresses, `host:port`.
    pub(crate) targets: Vec<String>,
    /// Labels added to all their series.
    pub(crate) labels: BTreeMap<String, String>,
}

/// Addresses of the metrics of all processes that are listed in a run directory.
pub(crate) fn metrics_addresses(directory: &Path) -> Vec<String> {
    let targets = targets(directory).into_iter();
    targets.flat_map(|target| target.targets).collect()
}

/// The targets of a run directory, for Prometheus' HTTP service discovery.
pub(crate) fn service_discovery(directory: &Path) -> MetricsPage {
    let directory = directory.to_owned();
    Arc::new(move || serde_json::to_string(&targets(&directory)).unwrap_or_default())
}

fn targets(directory: &Path) -> Vec<ScrapeTarget> {
    let files = RunFiles::new(directory);
    let read = |name| files.read(name, MAX_STATUS_BYTES).ok().flatten();
    let parse = |bytes: Vec<u8>| serde_json::from_slice::<Vec<ScrapeTarget>>(&bytes).ok();
    let found = [TARGETS_FILE, LAUNCHER_FILE].into_iter();
    found.filter_map(read).filter_map(parse).flatten().collect()
}

/// The launcher's entry among the scrape targets; removed on drop.
pub(crate) struct LauncherTarget(PathBuf);

impl LauncherTarget {
    /// Writes the entry to the run directory.
    pub(crate) fn write(directory: &Path, run: &str, address: &str) -> anyhow::Result<Self> {
        let target = ScrapeTarget {
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
            tracing::warn!(path = %self.0.display(), %error, "the file could not be removed");
        }
    }
}

fn status_file(directory: &Path) -> PathBuf {
    directory.join(STATUS_FILE)
}

fn targets_file(directory: &Path) -> PathBuf {
    directory.join(TARGETS_FILE)
}

fn launcher_file(directory: &Path) -> PathBuf {
    directory.join(LAUNCHER_FILE)
}

fn since_1970() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default()
}

/// A task that periodically writes the status of a run to its directory and redelivers orphaned messages.
pub(crate) struct StatusPublisher {
    end: watch::Sender<Option<RunPhase>>,
    task: JoinHandle<()>,
}

impl StatusPublisher {
    /// Starts the task.
    pub(crate) fn start(
        directory: &RunDirectory,
        settings: &Settings,
        streams: RunStreams,
        mut source: MemberSource,
    ) -> Self {
        let (end, mut ending) = watch::channel(None);
        let (root, settings) = (directory.root().to_owned(), settings.clone());
        let task = tokio::spawn(async move {
            loop {
                let ended = *ending.borrow_and_update();
                if let (Some(state), MemberSource::SingleProcess { record, .. }) =
                    (ended, &mut source)
                {
                    record.state = state;
                }
                if let Err(error) = publish(&source, &settings, &streams, &root).await {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "the status of the run could not be written");
                }
                if ended.is_some() {
                    return;
                }
                drop(timeout(PUBLISH_INTERVAL, ending.changed()).await);
            }
        });
        Self { end, task }
    }

    /// Publishes the status a last time and ends the task.
    pub(crate) async fn end(self, state: RunPhase) {
        self.end.send_replace(Some(state));
        if self.task.await.is_err() {
            tracing::warn!("the final status of the run was not written");
        }
    }
}

async fn publish(
    source: &MemberSource,
    settings: &Settings,
    streams: &RunStreams,
    directory: &Path,
) -> anyhow::Result<()> {
    let Some(status) = ClusterStatus::now(source, settings, streams).await? else {
        return Ok(());
    };
    status.publish_stream_metrics();
    streams.reclaim().await?;
    let targets = serde_json::to_vec_pretty(&status.targets())?;
    // Written only when changed, since Prometheus reloads it on every write.
    if std::fs::read(targets_file(directory)).ok().as_ref() != Some(&targets) {
        write_atomically(&targets_file(directory), &targets)?;
    }
    write_atomically(
        &status_file(directory),
        &serde_json::to_vec_pretty(&status)?,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat(name: &str, metrics: &str) -> Heartbeat {
        Heartbeat {
            role: "actor".into(),
            name: name.into(),
            host: "h".into(),
            pid: 1,
            left: false,
            step: None,
            waits: Vec::new(),
            stage: StageSnapshot::default(),
            metrics: metrics.into(),
        }
    }

    fn status() -> ClusterStatus {
        let participant = |name: &str, metrics: &str, left, age| {
            let mut heartbeat = heartbeat(name, metrics);
            heartbeat.left = left;
            let age = Duration::from_secs(age);
            Participant::new(Peer { heartbeat, age }, SINGLE_PROCESS_LEASE)
        };
        ClusterStatus {
            run: "r".into(),
            state: RunPhase::Running,
            session: 0,
            home: "h:/r".into(),
            processes: vec![
                participant("a", "http://127.0.0.1:1/metrics", false, 0),
                participant("b", "http://127.0.0.1:1/metrics", false, 0),
                participant("c", "http://127.0.0.1:2/metrics", true, 0),
                participant("d", "http://127.0.0.1:3/metrics", false, 99),
                participant("e", "http://127.0.0.1:4/metrics", false, 9),
            ],
            streams: Vec::new(),
            stages: BTreeMap::new(),
            at: 1000.0,
        }
    }

    #[test]
    fn each_present_process_is_one_target() {
        let targets = status().targets();
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
    fn processes_of_an_old_status_count_as_dead() {
        let liveness = |at: f64| -> Vec<Liveness> {
            let status = status().aged_to(at);
            status
                .processes
                .iter()
                .map(|process| process.state)
                .collect()
        };
        use Liveness::{Gone, Left, Present};
        assert_eq!(liveness(1000.0), [Present, Present, Left, Gone, Present]);
        assert_eq!(liveness(1010.0), [Present, Present, Left, Gone, Gone]);
        assert_eq!(liveness(1016.0), [Gone, Gone, Left, Gone, Gone]);
    }
}
