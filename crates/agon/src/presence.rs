//! What the processes of a run tell one another through its register: what the run is, and who is there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use learner::Ending;
use messages::{Digest, Station, WeightsVersion, wire};
use model::BaseModel;
use serde::{Deserialize, Serialize};
use settings::Settings;
use telemetry::{RunDirectory, StationCounters, StationSnapshot, Waits};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use transport::Register;

use crate::failure::Misuse;

/// The entry that says what the run is.
pub(crate) const RUN: &str = "run";

/// The entry that the learner claims.
pub(crate) const LEARNER: &str = "learner";

/// Entries of processes begin so.
const PRESENT: &str = "present.";

/// Signs of life in the time after which a silent process counts as gone.
const SIGNS: u32 = 5;

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RunState {
    /// A learner leads it.
    Running,
    /// All its steps are taken.
    Done,
    /// It was saved, and may be resumed.
    Interrupted,
}

/// What a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    /// Where it stands.
    pub(crate) state: RunState,
    /// The build that leads it.
    pub(crate) build: String,
    /// The host and the directory it is led from.
    pub(crate) home: String,
    /// How often it had been taken up before.
    pub(crate) session: u64,
    /// The step at which this session began.
    pub(crate) step: u64,
    /// The files of the model at the start, which lie beside the weights.
    pub(crate) model: Vec<ModelFile>,
    /// How an adapter names that model as its base, wherever its files lie.
    pub(crate) base_model: BaseModel,
    /// Those of the adapter at the start, where it is not a fresh one.
    pub(crate) adapter: Vec<ModelFile>,
    /// Its resolved settings.
    pub(crate) settings: String,
}

/// A file of the model at the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ModelFile {
    /// Its name in the folder.
    pub(crate) name: String,
    /// What is in it.
    pub(crate) digest: Digest,
}

/// This build: processes of one run must be of the same.
pub(crate) fn build() -> String {
    format!(
        "{}, messages of version {}",
        env!("CARGO_PKG_VERSION"),
        wire::VERSION
    )
}

impl RunState {
    /// Where a run stands after its learner ended so; `None` when it failed.
    pub(crate) fn after(ending: Option<Ending>) -> Self {
        match ending {
            Some(Ending::Finished) => Self::Done,
            Some(Ending::Interrupted) | None => Self::Interrupted,
        }
    }
}

impl RunRecord {
    /// A run that begins, or goes on, at learner step `step` in this directory, with these resolved
    /// settings.
    pub(crate) fn led_from(directory: &RunDirectory, settings: &str, step: u64) -> Self {
        Self {
            state: RunState::Running,
            build: build(),
            home: home(directory.root()),
            session: directory.session(),
            step,
            model: Vec::new(),
            base_model: BaseModel::default(),
            adapter: Vec::new(),
            settings: settings.to_owned(),
        }
    }

    /// The record of the run, if there is one.
    pub(crate) async fn read(register: &Register) -> anyhow::Result<Option<Self>> {
        let Some(entry) = register.get(RUN).await? else {
            return Ok(None);
        };
        let record = serde_json::from_slice(&entry.value);
        Ok(Some(record.context(
            "the run on the server was written by another build; run one build everywhere",
        )?))
    }

    /// Where this session of the run began.
    pub(crate) fn since(&self) -> WeightsVersion {
        WeightsVersion {
            session: self.session,
            step: self.step,
        }
    }

    pub(crate) async fn write(&self, register: &Register) -> anyhow::Result<()> {
        Ok(register.put(RUN, serde_json::to_vec(self)?).await?)
    }

    /// Whether a process of this build with these settings may take part.
    ///
    /// # Errors
    /// When it may not, and why.
    pub(crate) fn admits(&self, settings: &Settings) -> anyhow::Result<()> {
        if self.build != build() {
            return Err(Misuse(format!(
                "the run is led by agon {}, this is {}: run one build everywhere",
                self.build,
                build()
            ))
            .into());
        }
        let ours = shared(&toml::to_string(settings)?)?;
        let theirs = shared(&self.settings)?;
        let keys: Vec<_> = theirs.keys().chain(ours.keys()).collect();
        let mut differing: Vec<String> = keys
            .into_iter()
            .filter(|key| theirs.get(*key) != ours.get(*key))
            .map(|key| {
                let say = |of: &BTreeMap<String, String>| {
                    of.get(key)
                        .map_or_else(|| "absent".to_owned(), String::clone)
                };
                format!("{key} is {} here and {} there", say(&ours), say(&theirs))
            })
            .collect();
        differing.sort();
        differing.dedup();
        if differing.is_empty() {
            return Ok(());
        }
        Err(Misuse(format!(
            "this configuration is not the run's: {}; use the config.toml of the run directory",
            differing.join("; ")
        ))
        .into())
    }
}

/// The settings in which the processes of a run must agree, by their dotted keys: all but where things
/// lie, how much of this machine is used, and what is told where.
fn shared(text: &str) -> anyhow::Result<BTreeMap<String, String>> {
    const OWN: [&str; 12] = [
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
    flat.retain(|key, _| !OWN.iter().any(|own| key.starts_with(own)));
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

/// A process's sign of life.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sign {
    /// What it is: "learner", "actor" or "preference".
    pub(crate) role: String,
    /// Its name in the run.
    pub(crate) name: String,
    /// Where it is.
    pub(crate) host: String,
    /// Its process there.
    pub(crate) pid: u32,
    /// Whether it has left.
    pub(crate) left: bool,
    /// The learner's step, or the step of the weights an actor answers with.
    pub(crate) step: Option<u64>,
    /// What it waits for, and for how many seconds.
    pub(crate) waits: Vec<(String, f64)>,
    /// What it took, gave, dropped and holds.
    pub(crate) station: StationSnapshot,
    /// Where Prometheus finds its metrics.
    pub(crate) metrics: String,
}

/// A process's last sign of life, and how long ago it was.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// What it said.
    pub(crate) sign: Sign,
    /// By the server's clock.
    pub(crate) ago: Duration,
}

/// Everyone who was ever there, by role and name.
pub(crate) async fn everyone(register: &Register) -> anyhow::Result<Vec<Seen>> {
    let now = register.now().await?;
    let entries = register.all(PRESENT).await?;
    let read = |entry: transport::Entry| {
        let sign = serde_json::from_slice(&entry.value).ok()?;
        let ago = now.duration_since(entry.stored).unwrap_or_default();
        Some(Seen { sign, ago })
    };
    Ok(entries.into_iter().filter_map(read).collect())
}

/// The books of a station over all its processes. What a process held that is gone went to others: it
/// never took it.
pub(crate) fn books(everyone: &[Seen], station: Station) -> StationSnapshot {
    let mut sum = StationSnapshot::default();
    for Seen { sign, .. } in everyone {
        if sign.role != station.name() {
            continue;
        }
        let of = &sign.station;
        sum.taken += of.given + of.total_dropped();
        sum.given += of.given;
        for (reason, count) in &of.dropped {
            *sum.dropped.entry(*reason).or_default() += count;
        }
    }
    sum
}

/// What a process tells of itself.
pub(crate) struct Teller {
    /// What it is.
    pub(crate) station: Station,
    /// Its name in the run.
    pub(crate) name: String,
    /// Where Prometheus finds its metrics.
    pub(crate) metrics: String,
    /// Its books.
    pub(crate) counters: StationCounters,
    /// What it waits for: one for each of its roles.
    pub(crate) waits: Vec<Waits>,
    /// Where it is.
    pub(crate) step: Option<Step>,
}

/// Tells the learner's step, or the step of the weights an actor answers with.
pub(crate) type Step = Box<dyn Fn() -> u64 + Send + Sync>;

/// A process that gives signs of life until it leaves.
pub(crate) struct Presence {
    leave: watch::Sender<bool>,
    telling: JoinHandle<()>,
}

impl Presence {
    /// Begins to give signs of life.
    pub(crate) fn start(register: &Register, teller: Teller) -> Self {
        let (leave, mut leaving) = watch::channel(false);
        let register = register.clone();
        let telling = tokio::spawn(async move {
            let key = format!(
                "{PRESENT}{}.{}-{}",
                teller.station.name(),
                teller.name,
                born()
            );
            let pause = register.lease() / SIGNS;
            loop {
                let left = *leaving.borrow_and_update();
                let told = serde_json::to_vec(&teller.sign(left)).unwrap_or_default();
                if let Err(error) = register.put(&key, told).await {
                    tracing::warn!(%error, "the run could not be told that this process lives");
                }
                if left {
                    return;
                }
                drop(timeout(pause, leaving.changed()).await);
            }
        });
        Self { leave, telling }
    }

    /// Says that the process leaves, and with which books.
    pub(crate) async fn end(self) {
        self.leave.send_replace(true);
        if self.telling.await.is_err() {
            tracing::warn!("the last sign of life was not given");
        }
    }
}

impl Sign {
    /// Where it serves its metrics, `host:port`.
    pub(crate) fn metrics_address(&self) -> Option<&str> {
        self.metrics
            .strip_prefix("http://")?
            .strip_suffix("/metrics")
    }
}

impl Teller {
    /// What it tells now.
    pub(crate) fn sign(&self, left: bool) -> Sign {
        let waits = self.waits.iter().flat_map(Waits::current);
        Sign {
            role: self.station.name().to_owned(),
            name: self.name.clone(),
            host: host(),
            pid: std::process::id(),
            left,
            step: self.step.as_ref().map(|step| step()),
            waits: waits
                .map(|wait| (wait.reason.to_owned(), wait.elapsed.as_secs_f64()))
                .collect(),
            station: self.counters.snapshot(),
            metrics: self.metrics.clone(),
        }
    }
}

/// What tells this life of a process from others of the same name.
fn born() -> u128 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_millis()
}

/// The host and the directory of a run.
pub(crate) fn home(directory: &Path) -> String {
    let path = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    format!("{}:{}", host(), path.display())
}

/// Where Prometheus finds the metrics that are served at this address: one that stands for all of a
/// machine's is told by the machine's name.
pub(crate) fn metrics_url(address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("http://{}:{}/metrics", host(), address.port()),
        false => format!("http://{address}/metrics"),
    }
}

/// The name of this machine.
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
        let resolved = resolve(text, "test", &[]).expect("they are sound");
        (resolved.settings, resolved.toml)
    }

    fn record(text: &str) -> RunRecord {
        RunRecord {
            state: RunState::Running,
            build: build(),
            home: "here".into(),
            session: 0,
            step: 0,
            model: Vec::new(),
            base_model: BaseModel::default(),
            adapter: Vec::new(),
            settings: settings(text).1,
        }
    }

    #[test]
    fn who_joins_must_agree_in_all_but_what_is_its_own() {
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
            let refused = run.admits(&settings(text).0).err().map(|e| e.to_string());
            match expected {
                None => assert_eq!(refused, None, "{text}"),
                Some(part) => assert!(
                    refused.as_ref().is_some_and(|why| why.contains(part)),
                    "{refused:?}"
                ),
            }
        }
        let mut other = run;
        other.build = "0.0.9, messages of version 1".into();
        let (same, _) = settings("[actor]\ntemperature = 0.7\n[learner]\nsteps = 9\n");
        let why = other.admits(&same).expect_err("another build").to_string();
        assert!(why.contains("led by agon 0.0.9"), "{why}");
    }

    #[test]
    fn what_the_gone_held_was_never_theirs() {
        let seen = |role: &str, taken, given, stale| Seen {
            sign: Sign {
                role: role.into(),
                name: "x".into(),
                host: "h".into(),
                pid: 1,
                left: false,
                step: None,
                waits: Vec::new(),
                station: StationSnapshot {
                    taken,
                    given,
                    dropped: BTreeMap::from([(DropReason::Identical, stale)]),
                    in_hand: taken - given - stale,
                },
                metrics: String::new(),
            },
            ago: Duration::ZERO,
        };
        let all = [
            seen("actor", 10, 7, 1),
            seen("actor", 4, 4, 0),
            seen("preference", 9, 9, 0),
        ];
        let books = books(&all, Station::Actor);
        assert_eq!((books.taken, books.given, books.in_hand), (12, 11, 0));
        assert!(books.is_conserved());
    }
}
