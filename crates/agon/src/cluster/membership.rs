//! Membership of a run: its record and the heartbeats of its processes, in the run's registry.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use learner::Ending;
use messages::{Digest, FileName, Stage, wire};
use model::BaseModel;
use serde::{Deserialize, Serialize};
use settings::Settings;
use telemetry::{RunDirectory, StageCounters, StageSnapshot, Waits};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use transport::{KeptEntry, RunRegistry, TransportError};

use crate::{
    exit_code::{RefusedRecord, UsageError},
    run::SessionStart,
};

/// Registry key of the run's record.
const RECORD_KEY: &str = "run";

/// Registry key of the leader lease.
pub(crate) const LEASE_KEY: &str = "learner";

/// Prefix of the registry keys of heartbeats.
const HEARTBEAT_PREFIX: &str = "heartbeat.";

/// Maximum size of a heartbeat in bytes.
const MAX_HEARTBEAT_BYTES: usize = 16 << 10;

/// Maximum length of a host name in bytes.
const MAX_HOST_BYTES: usize = 255;

/// Time for which an ending process tries to reach the server.
pub(crate) const LEAVE_TIMEOUT: Duration = Duration::from_secs(15);

/// Heartbeats per lease duration.
const HEARTBEATS_PER_LEASE: u32 = 5;

/// Phase of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RunPhase {
    /// A learner leads it.
    Running,
    /// All steps are done.
    Done,
    /// Saved; can be resumed.
    Interrupted,
}

/// The record of a run that its processes share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    /// Phase.
    pub(crate) state: RunPhase,
    /// Build of the leader; all processes must be of the same.
    pub(crate) build: String,
    /// Host and directory of the leader.
    pub(crate) home: String,
    /// Session number: how often the run was resumed.
    pub(crate) session: u64,
    /// Learner step at which this session started.
    pub(crate) step: u64,
    /// Step of the last APO round that this session continues from; 0: none.
    #[serde(default)]
    pub(crate) apo_step: u64,
    /// Files of the initial model, in the weight store.
    pub(crate) model: Vec<ModelFile>,
    /// Name of the initial model as the base of adapters.
    pub(crate) base_model: BaseModel,
    /// Files of the initial adapter; empty if it is newly initialised.
    pub(crate) adapter: Vec<ModelFile>,
    /// Resolved settings, as TOML.
    pub(crate) settings: String,
}

/// Result of reading the run record again.
pub(crate) enum Followed {
    /// Present and valid.
    Record(RunRecord),
    /// The run was removed from the server.
    Removed,
    /// Rejected (bad signature, another build) or missing.
    Refused,
}

/// A file of the initial model or adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ModelFile {
    /// File name.
    pub(crate) name: FileName,
    /// Digest of the contents.
    pub(crate) digest: Digest,
    /// Length in bytes.
    pub(crate) bytes: u64,
}

/// Version of this build and of its messages.
pub(crate) fn build() -> String {
    format!(
        "{}, messages of version {}",
        env!("CARGO_PKG_VERSION"),
        wire::VERSION
    )
}

impl RunPhase {
    /// Phase after the learner ended; `None` for an error.
    pub(crate) fn after(ending: Option<Ending>) -> Self {
        match ending {
            Some(Ending::Finished) => Self::Done,
            Some(Ending::Interrupted) | None => Self::Interrupted,
        }
    }
}

impl RunRecord {
    /// Record of a session with this start in `directory`, with these resolved settings and no files yet.
    pub(crate) fn new(directory: &RunDirectory, settings: &str, start: SessionStart) -> Self {
        Self {
            state: RunPhase::Running,
            build: build(),
            home: home(directory.root()),
            session: start.session,
            step: start.step,
            apo_step: start.apo_step,
            model: Vec::new(),
            base_model: BaseModel::default(),
            adapter: Vec::new(),
            settings: settings.to_owned(),
        }
    }

    /// Reads the record; `None` if there is no run.
    ///
    /// # Errors
    /// When the server does not answer; a [`RefusedRecord`] when the record is not the learner's or cannot be used.
    pub(crate) async fn read(registry: &RunRegistry) -> anyhow::Result<Option<Self>> {
        let content = match registry.get_signed(RECORD_KEY, "the run's record").await {
            Ok(None) => return Ok(None),
            Ok(Some(content)) => content,
            Err(error @ (TransportError::Unauthentic { .. } | TransportError::Foreign { .. })) => {
                return Err(RefusedRecord(error.to_string()).into());
            }
            Err(error) => return Err(error.into()),
        };
        let record = serde_json::from_slice(&content).map_err(|error| {
            RefusedRecord(format!(
                "failed to read the run's record on the server: {error}; run one build everywhere"
            ))
        });
        Ok(Some(record?))
    }

    /// As [`Self::read`], for a process that has joined: a record that is refused changes nothing. It is logged when
    /// `refused` does not hold its reason yet.
    pub(crate) async fn follow(
        registry: &RunRegistry,
        refused: &mut Option<String>,
    ) -> anyhow::Result<Followed> {
        match Self::read(registry).await {
            Ok(Some(record)) => Ok(Followed::Record(record)),
            // A removed run has no registry: what is missing there will be written again.
            Ok(None) if registry.exists().await? => Ok(Followed::Refused),
            Ok(None) => Ok(Followed::Removed),
            Err(error) => {
                let reason = error.downcast::<RefusedRecord>()?.0;
                if refused.as_ref() != Some(&reason) {
                    tracing::error!(reason, "the run's record on the server is ignored");
                    *refused = Some(reason);
                }
                Ok(Followed::Refused)
            }
        }
    }

    /// Start of this session.
    pub(crate) fn start(&self) -> SessionStart {
        SessionStart {
            session: self.session,
            step: self.step,
            apo_step: self.apo_step,
        }
    }

    /// Writes the record, and writes it again whenever it was overwritten or deleted, until the result is dropped.
    pub(crate) async fn keep(&self, registry: &RunRegistry) -> anyhow::Result<KeptEntry> {
        let content = serde_json::to_vec(self)?;
        Ok(registry.keep_signed(RECORD_KEY, &content).await?)
    }

    /// Writes the record.
    pub(crate) async fn write(&self, registry: &RunRegistry) -> anyhow::Result<()> {
        let content = serde_json::to_vec(self)?;
        Ok(registry.put_signed(RECORD_KEY, &content).await?)
    }

    /// Checks that a process of this build with these settings may join.
    ///
    /// # Errors
    /// When the build differs, or a setting that must be shared.
    pub(crate) fn check_compatible(&self, settings: &Settings) -> anyhow::Result<()> {
        if self.build != build() {
            return Err(UsageError(format!(
                "the run is led by agon {}, this is {}: run one build everywhere",
                self.build,
                build()
            ))
            .into());
        }
        let ours = shared_settings(&toml::to_string(settings)?)?;
        let theirs = shared_settings(&self.settings)?;
        let keys: Vec<_> = theirs.keys().chain(ours.keys()).collect();
        let mut differing: Vec<String> = keys
            .into_iter()
            .filter(|key| theirs.get(*key) != ours.get(*key))
            .map(|key| {
                let value = |settings: &BTreeMap<String, String>| {
                    settings
                        .get(key)
                        .map_or_else(|| "absent".to_owned(), String::clone)
                };
                format!(
                    "{key} is {} here and {} there",
                    value(&ours),
                    value(&theirs)
                )
            })
            .collect();
        differing.sort();
        differing.dedup();
        if differing.is_empty() {
            return Ok(());
        }
        Err(UsageError(format!(
            "this configuration is not the run's: {}; use the config.toml of the run directory",
            differing.join("; ")
        ))
        .into())
    }
}

/// The settings that all processes of a run must share, by dotted key: all except local paths, addresses and
/// resources.
fn shared_settings(text: &str) -> anyhow::Result<BTreeMap<String, String>> {
    const LOCAL: [&str; 12] = [
        "run.output_dir",
        "playground.base_dir",
        "transport.",
        "topology.",
        "telemetry.",
        "model.device",
        "actor.slots",
        "actor.count",
        "preference.replicas",
        "preference.max_",
        "preference.http.",
        "preference.cache_size",
    ];
    let mut flat = BTreeMap::new();
    flatten("", &toml::Value::Table(text.parse()?), &mut flat);
    flat.retain(|key, _| !LOCAL.iter().any(|local| key.starts_with(local)));
    Ok(flat)
}

fn flatten(path: &str, value: &toml::Value, into: &mut BTreeMap<String, String>) {
    let toml::Value::Table(table) = value else {
        into.insert(path.to_owned(), value.to_string());
        return;
    };
    for (key, value) in table {
        let path = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        flatten(&path, value, into);
    }
}

/// Status that a process publishes periodically.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Heartbeat {
    /// Role: "learner", "actor" or "preference".
    pub(crate) role: String,
    /// Name in the run.
    pub(crate) name: String,
    /// Host name.
    pub(crate) host: String,
    /// Process id.
    pub(crate) pid: u32,
    /// Whether it has left the run.
    pub(crate) left: bool,
    /// The learner's step, or the step of an actor's weights.
    pub(crate) step: Option<u64>,
    /// Current waits: reason and duration in seconds.
    pub(crate) waits: Vec<(String, f64)>,
    /// Counters of its stage.
    pub(crate) stage: StageSnapshot,
    /// URL of its Prometheus metrics.
    pub(crate) metrics: String,
}

/// The last heartbeat of a process, with its age.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// Last heartbeat.
    pub(crate) heartbeat: Heartbeat,
    /// Age of the heartbeat by the server's clock.
    pub(crate) age: Duration,
}

/// All processes that ever joined the run, by role and name. Entries that are no heartbeat of the process whose key they
/// have are left out.
pub(crate) async fn peers(registry: &RunRegistry) -> anyhow::Result<Vec<Peer>> {
    let now = registry.now().await?;
    let entries = registry.all(HEARTBEAT_PREFIX).await?;
    let read = |entry: transport::RegistryEntry| {
        let heartbeat = Heartbeat::read(&entry.key, &entry.value)?;
        let age = now.duration_since(entry.stored).unwrap_or_default();
        Some(Peer { heartbeat, age })
    };
    Ok(entries.into_iter().filter_map(read).collect())
}

/// Sum of a stage's counters over all its processes. Messages in flight at a process are not counted as received,
/// since those of a dead process are redelivered to others.
pub(crate) fn stage_counters(peers: &[Peer], stage: Stage) -> StageSnapshot {
    let mut sum = StageSnapshot::default();
    for Peer { heartbeat, .. } in peers {
        if heartbeat.role != stage.name() {
            continue;
        }
        // Heartbeats come from other processes: no value of theirs overflows.
        let counters = &heartbeat.stage;
        let add = |sum: &mut u64, count: u64| *sum = sum.saturating_add(count);
        add(&mut sum.received, counters.emitted);
        add(&mut sum.emitted, counters.emitted);
        for (reason, count) in &counters.dropped {
            add(&mut sum.received, *count);
            add(sum.dropped.entry(*reason).or_default(), *count);
        }
    }
    sum
}

/// Source of a process's heartbeats.
pub(crate) struct StatusSource {
    /// Stage.
    pub(crate) stage: Stage,
    /// Name in the run.
    pub(crate) name: String,
    /// URL of its Prometheus metrics.
    pub(crate) metrics: String,
    /// Counters of the stage.
    pub(crate) counters: StageCounters,
    /// Waits, one for each role instance.
    pub(crate) waits: Vec<Waits>,
    /// Current step.
    pub(crate) step: Option<StepFn>,
}

/// Returns the learner's step, or the step of an actor's weights.
pub(crate) type StepFn = Box<dyn Fn() -> u64 + Send + Sync>;

/// Membership of this process in a run: publishes heartbeats until it leaves.
pub(crate) struct Membership {
    leave: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Membership {
    /// Starts publishing heartbeats.
    pub(crate) fn start(registry: &RunRegistry, status_source: StatusSource) -> Self {
        let (leave, mut leaving) = watch::channel(false);
        let registry = registry.clone();
        let task = tokio::spawn(async move {
            let key = heartbeat_key(status_source.stage.name(), &status_source.name);
            let key = format!("{key}{}", start_millis());
            let interval = registry.lease() / HEARTBEATS_PER_LEASE;
            loop {
                let left = *leaving.borrow_and_update();
                let heartbeat =
                    serde_json::to_vec(&status_source.heartbeat(left)).unwrap_or_default();
                if let Err(error) = registry.put(&key, heartbeat).await {
                    tracing::warn!(%error, "the heartbeat could not be published");
                }
                if left {
                    return;
                }
                drop(timeout(interval, leaving.changed()).await);
            }
        });
        Self { leave, task }
    }

    /// Publishes the final counters and leaves the run. A server that is away is not waited for: others see from the
    /// lease that the process has gone.
    pub(crate) async fn leave(mut self) {
        self.leave.send_replace(true);
        let left = timeout(LEAVE_TIMEOUT, &mut self.task).await;
        if !matches!(left, Ok(Ok(()))) {
            self.task.abort();
            tracing::warn!("the final heartbeat was not published");
        }
    }
}

/// Beginning of the registry keys of a process's heartbeats; the time of its start follows.
fn heartbeat_key(role: &str, name: &str) -> String {
    format!("{HEARTBEAT_PREFIX}{role}.{name}-")
}

impl Heartbeat {
    /// The heartbeat in a registry entry; `None` if the entry is not one of the process whose key it has.
    fn read(key: &str, value: &[u8]) -> Option<Self> {
        if value.len() > MAX_HEARTBEAT_BYTES {
            return None;
        }
        let heartbeat: Self = serde_json::from_slice(value).ok()?;
        let start = key.strip_prefix(&heartbeat_key(&heartbeat.role, &heartbeat.name))?;
        let is_own = start.parse::<u64>().is_ok() && heartbeat.host.len() <= MAX_HOST_BYTES;
        is_own.then_some(heartbeat)
    }

    /// Address of its metrics, `host:port`; `None` if the heartbeat names anything else.
    pub(crate) fn metrics_address(&self) -> Option<&str> {
        let address = self
            .metrics
            .strip_prefix("http://")?
            .strip_suffix("/metrics")?;
        let (host, port) = address.rsplit_once(':')?;
        let is_of_host = |c: char| c.is_ascii_alphanumeric() || "-._[]:".contains(c);
        let is_address = !host.is_empty() && host.chars().all(is_of_host);
        (is_address && port.parse::<u16>().is_ok()).then_some(address)
    }
}

impl StatusSource {
    /// Current heartbeat.
    pub(crate) fn heartbeat(&self, left: bool) -> Heartbeat {
        let waits = self.waits.iter().flat_map(Waits::current);
        Heartbeat {
            role: self.stage.name().to_owned(),
            name: self.name.clone(),
            host: host(),
            pid: std::process::id(),
            left,
            step: self.step.as_ref().map(|step| step()),
            waits: waits
                .map(|wait| (wait.reason.to_owned(), wait.elapsed.as_secs_f64()))
                .collect(),
            stage: self.counters.snapshot(),
            metrics: self.metrics.clone(),
        }
    }
}

/// Start time in milliseconds since 1970, which distinguishes restarts under the same name.
fn start_millis() -> u128 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_millis()
}

/// Host and absolute directory of a run, as `host:path`.
pub(crate) fn home(directory: &Path) -> String {
    let path = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    format!("{}:{}", host(), path.display())
}

/// URL of the metrics served at `address`; an unspecified address is replaced by the host name.
pub(crate) fn metrics_url(address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("http://{}:{}/metrics", host(), address.port()),
        false => format!("http://{address}/metrics"),
    }
}

/// Host name of this machine.
pub(crate) fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    let name = name.or_else(|_| std::env::var("HOSTNAME"));
    name.map_or_else(|_| "localhost".into(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use messages::DropReason;
    use settings::resolve;

    use super::*;

    fn settings(text: &str) -> (Settings, String) {
        let resolved = resolve(text, "test", &[]).expect("valid settings");
        (resolved.settings, resolved.toml)
    }

    fn record(text: &str) -> RunRecord {
        RunRecord {
            state: RunPhase::Running,
            build: build(),
            home: "here".into(),
            session: 0,
            step: 0,
            apo_step: 0,
            model: Vec::new(),
            base_model: BaseModel::default(),
            adapter: Vec::new(),
            settings: settings(text).1,
        }
    }

    #[test]
    fn joining_requires_the_same_build_and_shared_settings() {
        let run = record("[actor]\ntemperature = 0.7\nslots = 8\n[learner]\nsteps = 9\n");
        let cases = [
            (
                "[actor]\ntemperature = 0.7\nslots = 64\n[learner]\nsteps = 9\n",
                None,
            ),
            (
                "[actor]\ntemperature = 0.7\n[learner]\nsteps = 9\n[telemetry]\nlisten = \"127.0.0.1:99\"\n",
                None,
            ),
            (
                "[learner]\nsteps = 9\n",
                Some("actor.temperature is 1.0 here and 0.7 there"),
            ),
            (
                "[model]\npath = \"other\"\n[actor]\ntemperature = 0.7\n[learner]\nsteps = 9\n",
                Some("model.path is \"other\" here and absent there"),
            ),
        ];
        for (text, expected) in cases {
            let error = run
                .check_compatible(&settings(text).0)
                .err()
                .map(|e| e.to_string());
            match expected {
                None => assert_eq!(error, None, "{text}"),
                Some(expected) => assert!(
                    error.as_ref().is_some_and(|error| error.contains(expected)),
                    "{error:?}"
                ),
            }
        }
        let mut other = run;
        other.build = "0.0.9, messages of version 1".into();
        let (same, _) = settings("[actor]\ntemperature = 0.7\n[learner]\nsteps = 9\n");
        let error = other
            .check_compatible(&same)
            .expect_err("another build")
            .to_string();
        assert!(error.contains("led by agon 0.0.9"), "{error}");
    }

    #[test]
    fn a_heartbeat_names_no_address_but_of_its_metrics() {
        let address = |metrics: &str| Heartbeat {
            metrics: metrics.into(),
            ..heartbeat("actor", StageSnapshot::default())
        };
        for (metrics, expected) in [
            ("http://host-1:9464/metrics", Some("host-1:9464")),
            ("http://[::1]:9464/metrics", Some("[::1]:9464")),
            ("http://host/metrics", None),
            ("http://host:80/secret?x=:1/metrics", None),
            ("http://user@host:80/metrics", None),
            ("file:///etc/metrics", None),
            ("http://:80/metrics", None),
        ] {
            assert_eq!(address(metrics).metrics_address(), expected, "{metrics}");
        }
    }

    #[test]
    fn a_heartbeat_is_read_under_the_key_of_its_process_only() {
        let sent = heartbeat("actor", StageSnapshot::default());
        let read = |key: &str, heartbeat: &Heartbeat| {
            let value = serde_json::to_vec(heartbeat).expect("a heartbeat");
            Heartbeat::read(key, &value)
        };
        assert!(read("heartbeat.actor.x-17", &sent).is_some());
        for key in [
            "heartbeat.preference.x-17",
            "heartbeat.actor.y-17",
            "heartbeat.actor.x-",
            "heartbeat.actor.x-y-17",
        ] {
            assert!(read(key, &sent).is_none(), "{key}");
        }
        let long = "h".repeat(MAX_HOST_BYTES + 1);
        let named = Heartbeat {
            host: long.clone(),
            ..sent.clone()
        };
        assert!(read("heartbeat.actor.x-17", &named).is_none());
        let waits = vec![(long, 0.0); 100];
        let large = Heartbeat { waits, ..sent };
        assert!(read("heartbeat.actor.x-17", &large).is_none());
    }

    #[test]
    fn counters_of_other_processes_do_not_overflow() {
        let stage = StageSnapshot {
            emitted: u64::MAX,
            dropped: BTreeMap::from([(DropReason::Failed, u64::MAX)]),
            ..StageSnapshot::default()
        };
        let peer = Peer {
            heartbeat: heartbeat("actor", stage),
            age: Duration::ZERO,
        };
        let sum = stage_counters(&[peer.clone(), peer], Stage::Actor);
        assert_eq!((sum.received, sum.emitted), (u64::MAX, u64::MAX));
    }

    fn heartbeat(role: &str, stage: StageSnapshot) -> Heartbeat {
        Heartbeat {
            role: role.into(),
            name: "x".into(),
            host: "h".into(),
            pid: 1,
            left: false,
            step: None,
            waits: Vec::new(),
            stage,
            metrics: String::new(),
        }
    }

    #[test]
    fn names_of_files_in_a_record_are_plain() {
        let text = serde_json::to_string(&record("")).expect("a record");
        let with = |name: &str| {
            let digest = serde_json::to_string(&Digest::of(b"")).expect("a digest");
            let file = format!("{{\"name\": {name:?}, \"digest\": {digest}, \"bytes\": 0}}");
            text.replacen("\"model\":[]", &format!("\"model\":[{file}]"), 1)
        };
        let parse = |text: &str| serde_json::from_str::<RunRecord>(text);
        parse(&with("config.json")).expect("a plain name");
        for name in ["../config.json", "/etc/passwd", "..", "a/b", ""] {
            let error = parse(&with(name)).expect_err(name).to_string();
            assert!(error.contains("file name"), "{error}");
        }
    }

    #[test]
    fn messages_in_flight_at_dead_processes_are_not_counted() {
        let peer = |role: &str, received, emitted, stale| Peer {
            heartbeat: heartbeat(
                role,
                StageSnapshot {
                    received,
                    emitted,
                    dropped: BTreeMap::from([(DropReason::Identical, stale)]),
                    in_flight: received - emitted - stale,
                },
            ),
            age: Duration::ZERO,
        };
        let all = [
            peer("actor", 10, 7, 1),
            peer("actor", 4, 4, 0),
            peer("preference", 9, 9, 0),
        ];
        let stage_counters = stage_counters(&all, Stage::Actor);
        assert_eq!(
            (
                stage_counters.received,
                stage_counters.emitted,
                stage_counters.in_flight
            ),
            (12, 11, 0)
        );
        assert!(stage_counters.is_conserved());
    }
}
