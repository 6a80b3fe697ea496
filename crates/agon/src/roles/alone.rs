//! One role in a process of its own: it joins the run on its server, plays its part, and leaves.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow};
use learner::Ending;
use messages::{Digest, Station};
use model::{LanguageModel, ModelFolder, Weights};
use settings::{ModelSource, Settings, TransportSettings};
use telemetry::{RunDirectory, StationCounters, StationSnapshot};
use tempfile::TempDir;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use transport::{Claim, Hub, Register, WeightsShelf};

use super::{Outcome, Streams};
use crate::{
    failure::Misuse,
    model_hub,
    overview::{Lookout, Source},
    presence::{self, ModelFile, Presence, RunRecord, RunState, Seen, Step, Teller, home},
    world::{self, JudgeSource, Judged, World},
};

/// How long a role waits for a run that it is to join. Making a base policy takes a while.
const TO_JOIN: Duration = Duration::from_secs(1800);

/// The pause between two looks at the run's record.
const LOOK: Duration = Duration::from_millis(500);

/// How long the others may take to finish what they hold once the run is done.
const GRACE: Duration = Duration::from_secs(60);

/// A process that has joined a run.
pub(crate) struct Joined {
    hub: Hub,
    register: Register,
    name: String,
    metrics: String,
}

impl Joined {
    /// Connects to the server of the settings. `metrics` is where Prometheus finds this process.
    pub(crate) async fn connect(
        settings: &Settings,
        name: String,
        metrics: String,
    ) -> anyhow::Result<Self> {
        let TransportSettings::Jetstream(jetstream) = &settings.transport else {
            return Err(Misuse(
                "transport.kind is \"memory\": a role of its own needs transport.kind = \"jetstream\"; \
                 agon train runs all roles in one process"
                    .into(),
            )
            .into());
        };
        if jetstream.url.is_empty() {
            return Err(Misuse(
                "transport.url is empty: say where the run's NATS server is, as in \
                 --set transport.url=nats://host:4222"
                    .into(),
            )
            .into());
        }
        let hub = Hub::connect(jetstream, &settings.run.name).await?;
        let register = hub.register().context("a server keeps a register")?.clone();
        Ok(Self {
            hub,
            register,
            name,
            metrics,
        })
    }

    /// Waits for the run, and checks that this process may take part in it. `None` when told to stop.
    async fn admitted(
        &self,
        settings: &Settings,
        stop: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<Option<RunRecord>> {
        let waiting = async {
            let mut told = false;
            loop {
                if let Some(record) = RunRecord::read(&self.register).await?
                    && record.state == RunState::Running
                {
                    return anyhow::Ok(record);
                }
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(
                        run = settings.run.name,
                        "waiting for a learner to lead the run"
                    );
                }
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            record = timeout(TO_JOIN, waiting) => {
                let record = record.map_err(|_| anyhow!(
                    "no learner led the run {} within {} s; start one with agon learner",
                    settings.run.name, TO_JOIN.as_secs()
                ))??;
                record.admits(settings)?;
                Ok(Some(record))
            }
            _ = stop.wait_for(|stop| *stop) => Ok(None),
        }
    }

    fn present(
        &self,
        counters: &StationCounters,
        waits: Vec<telemetry::Waits>,
        step: Option<Step>,
    ) -> Presence {
        let teller = Teller {
            station: counters.station(),
            name: self.name.clone(),
            metrics: self.metrics.clone(),
            counters: counters.clone(),
            waits,
            step,
        };
        Presence::start(&self.register, teller)
    }
}

/// Plays an actor, or as many as the settings say, until the run is done or this process is told to stop.
pub(crate) async fn join_actor(
    joined: &Joined,
    settings: &Settings,
    stop: &watch::Sender<bool>,
) -> anyhow::Result<()> {
    let mut stopping = stop.subscribe();
    let Some(record) = joined.admitted(settings, &mut stopping).await? else {
        return Ok(());
    };
    let streams = Streams::open(&joined.hub, settings).await?;
    let model = FetchedModel::fetch(settings, &record, &streams.shelf).await?;
    let counters = StationCounters::new(Station::Actor);
    let (quit, quitting) = watch::channel(false);
    let (mut playing, mut waits, mut step) = (JoinSet::new(), Vec::new(), None);
    for index in 0..settings.actor.count {
        let name = match settings.actor.count {
            1 => joined.name.clone(),
            _ => format!("{}.{index}", joined.name),
        };
        let actor = super::actor(settings, name, model.whole(settings)?, &streams, &counters)?;
        waits.push(actor.waits());
        let loaded = actor.loaded();
        step = Some(Box::new(move || loaded.borrow().step) as Step);
        let quitting = quitting.clone();
        playing.spawn(async move { actor.run(quitting).await.map_err(anyhow::Error::from) });
    }
    let presence = joined.present(&counters, waits, step);
    tracing::info!(actor = joined.name, "joined the run");
    let ended = play(joined, &mut playing, &quit, &mut stopping, None).await;
    presence.end().await;
    joined.hub.flush().await;
    ended.map(drop)
}

/// Plays a preference service until the run is done or this process is told to stop. When the run is
/// resumed by another session, the judges are what they were at its checkpoint.
pub(crate) async fn join_preference(
    joined: &Joined,
    settings: &Settings,
    run_dir: &Path,
    stop: &watch::Sender<bool>,
) -> anyhow::Result<()> {
    let counters = StationCounters::new(Station::Preference);
    let mut stopping = stop.subscribe();
    loop {
        let Some(record) = joined.admitted(settings, &mut stopping).await? else {
            return Ok(());
        };
        let streams = Streams::open(&joined.hub, settings).await?;
        let model = FetchedModel::fetch(settings, &record, &streams.shelf).await?;
        let policy = model.start();
        let stopped = || *stop.borrow();
        let judge = tokio::task::block_in_place(|| {
            JudgeSource::open(settings, Judged::Policy(policy.0, policy.1), &stopped)
        })?;
        let judge = Arc::new(judge);
        let since = (world::rounds(run_dir), record.since());
        let (judge, player) = super::judges(settings, policy, &judge, since, &stopping)?;
        let plays = player.is_some();
        let bench = world::bench(settings, &judge)?;
        let (quit, quitting) = watch::channel(false);
        let mut playing = JoinSet::new();
        if !settings.preference.http.listen.is_empty() {
            let server = world::server(settings, &judge, bench.clone()).await?;
            out!("http://{}", server.address())?;
            let quitting = quitting.clone();
            playing.spawn(async move { server.run(quitting).await.map_err(anyhow::Error::from) });
        }
        let service = super::preference(settings, (bench, player), &streams, &counters)?;
        let presence = joined.present(&counters, vec![service.waits()], None);
        tracing::info!(
            service = joined.name,
            session = record.session,
            "joined the run"
        );
        playing.spawn(async move { service.run(quitting).await.map_err(anyhow::Error::from) });
        let session = plays.then_some(record.session);
        let ended = play(joined, &mut playing, &quit, &mut stopping, session).await;
        presence.end().await;
        joined.hub.flush().await;
        if ended? == Leaving::Over {
            return Ok(());
        }
    }
}

/// Why a role stops playing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// The run is done, or this process was told to stop.
    Over,
    /// Another session leads the run.
    NewSession,
}

/// Lets the roles of this process play until the run is done, another session than `session` leads it, or
/// this process is told to stop; then lets them finish.
async fn play(
    joined: &Joined,
    playing: &mut JoinSet<anyhow::Result<()>>,
    quit: &watch::Sender<bool>,
    stopping: &mut watch::Receiver<bool>,
    session: Option<u64>,
) -> anyhow::Result<Leaving> {
    let leaving = tokio::select! {
        Some(ended) = playing.join_next() => {
            ended.context("a role panicked")??;
            return Err(anyhow!("a role ended without being told to"));
        }
        leaving = until_over(&joined.register, session) => leaving?,
        _ = stopping.wait_for(|stop| *stop) => Leaving::Over,
    };
    quit.send_replace(true);
    let finish = async {
        while let Some(ended) = playing.join_next().await {
            ended.context("a role panicked")??;
        }
        anyhow::Ok(())
    };
    let late = |_| {
        anyhow!(
            "what was in hand was not finished within {} s",
            GRACE.as_secs()
        )
    };
    timeout(GRACE, finish).await.map_err(late)??;
    Ok(leaving)
}

/// Returns when the run is done, or gone from the server, or led by another session than `session`.
async fn until_over(register: &Register, session: Option<u64>) -> anyhow::Result<Leaving> {
    loop {
        sleep(LOOK).await;
        match RunRecord::read(register).await? {
            None => return Ok(Leaving::Over),
            Some(record) if record.state == RunState::Done => return Ok(Leaving::Over),
            Some(record) if session.is_some_and(|session| session != record.session) => {
                return Ok(Leaving::NewSession);
            }
            Some(_) => {}
        }
    }
}

/// Leads the run: claims it, lays down its model, learns, and clears up when all steps are taken.
pub(crate) async fn lead(
    joined: &Joined,
    (settings, resolved): (&Settings, &str),
    world: &World,
    (directory, resume): (&Arc<RunDirectory>, Option<PathBuf>),
    stop: &watch::Sender<bool>,
) -> anyhow::Result<Outcome> {
    let register = &joined.register;
    let streams = Streams::open(&joined.hub, settings).await?;
    let step = resume
        .as_deref()
        .map(learner::checkpoint_step)
        .transpose()?;
    let known = RunRecord::read(register).await?;
    let known = known.map(|before| [before.model, before.adapter].concat());
    let known = known.unwrap_or_default();
    let mut record = RunRecord::led_from(directory, resolved, step.unwrap_or(0));
    record.base_model = world.folder.base_model.clone();
    record.model = lay_down(&world.folder.path, is_of_a_model, &streams.shelf, &known).await?;
    if let Some(folder) = &world.adapter_folder {
        record.adapter = lay_down(folder, is_of_an_adapter, &streams.shelf, &known).await?;
    }
    record.write(register).await?;
    let counters = StationCounters::new(Station::Learner);
    let own = (&counters, std::slice::from_ref(&counters));
    let learner = super::learner(settings, world, (directory, resume), &streams, own).await?;
    let steps = learner.steps();
    let step: Step = Box::new(move || *steps.borrow());
    let presence = joined.present(&counters, vec![learner.waits()], Some(step));
    let source = Source::Server(register.clone());
    let lookout = Lookout::start(directory, settings, streams.clone(), source);
    let ended = learner.run(stop.subscribe()).await;
    record.state = RunState::after(ended.as_ref().ok().map(|summary| summary.ending));
    record.write(register).await?;
    presence.end().await;
    lookout.end(record.state).await;
    joined.hub.flush().await;
    let summary = ended?;
    let everyone = match summary.ending {
        Ending::Finished => all_gone(register).await?,
        Ending::Interrupted => presence::everyone(register).await?,
    };
    let mut stations: Vec<(Station, StationSnapshot)> = [Station::Actor, Station::Preference]
        .map(|station| (station, presence::books(&everyone, station)))
        .to_vec();
    stations.push((Station::Learner, counters.snapshot()));
    Ok(Outcome {
        stations,
        rounds: super::rounds_of(directory, summary.steps)?,
        summary,
    })
}

impl Joined {
    /// Claims the lead of the run of this directory, so that no other learner works on it. `None` when
    /// what an earlier run of the directory had left on the server was removed: connect again.
    ///
    /// # Errors
    /// When another learner lives, or the name belongs to another run.
    pub(crate) async fn claim(
        &self,
        settings: &Settings,
        directory: &Path,
        resuming: bool,
    ) -> anyhow::Result<Option<Claim>> {
        let owner = format!("the learner {} of {}", std::process::id(), home(directory));
        let claim = self.register.claim(presence::LEARNER, &owner).await?;
        if let Some(record) = RunRecord::read(&self.register).await? {
            let ours = record.home == home(directory);
            if !ours && !resuming {
                let name = &settings.run.name;
                claim.release().await;
                return Err(Misuse(format!(
                    "a run {name} is on the server already, led from {}: choose another run.name, resume \
                     it with --resume, or remove it with agon status {name} --remove",
                    record.home
                ))
                .into());
            }
            if !resuming {
                tracing::warn!(
                    "what an earlier run of this directory left on the server is removed"
                );
                claim.release().await;
                self.hub.remove().await?;
                return Ok(None);
            }
        }
        Ok(Some(claim))
    }

    /// Removes the run from its server: all its messages were taken and its result lies in its directory.
    pub(crate) async fn clear(&self) -> anyhow::Result<()> {
        Ok(self.hub.remove().await?)
    }
}

/// Waits until all others have left or are silent for too long.
async fn all_gone(register: &Register) -> anyhow::Result<Vec<Seen>> {
    let waiting = async {
        loop {
            let everyone = presence::everyone(register).await?;
            let gone = |seen: &Seen| seen.sign.left || seen.ago > register.lease();
            if everyone.iter().all(gone) {
                return anyhow::Ok(everyone);
            }
            sleep(LOOK).await;
        }
    };
    match timeout(GRACE + register.lease(), waiting).await {
        Ok(everyone) => everyone,
        Err(_) => {
            tracing::warn!("not everyone has left the run in time");
            presence::everyone(register).await
        }
    }
}

/// Lays the files of a folder that the model at the start is made of on the shelf, so that whoever joins needs
/// nothing but the server; those that are `known` lie there since an earlier session.
async fn lay_down(
    folder: &Path,
    belongs: fn(&str) -> bool,
    shelf: &WeightsShelf,
    known: &[ModelFile],
) -> anyhow::Result<Vec<ModelFile>> {
    let mut files = Vec::new();
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .with_context(|| format!("failed to read {}", folder.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| belongs(name))
        .collect();
    names.sort();
    for name in names {
        let path = folder.join(&name);
        let bytes =
            std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let digest = Digest::of(&bytes);
        let file = ModelFile { name, digest };
        if !known.contains(&file) {
            shelf.put_file(&stored_as(&file), bytes).await?;
        }
        files.push(file);
    }
    Ok(files)
}

fn is_of_a_model(name: &str) -> bool {
    ["json", "safetensors", "jinja", "model"]
        .iter()
        .any(|end| name.rsplit('.').next() == Some(end))
}

fn is_of_an_adapter(name: &str) -> bool {
    ["adapter_config.json", "adapter_model.safetensors"].contains(&name)
}

fn stored_as(file: &ModelFile) -> String {
    format!("{}-{}", file.digest, file.name)
}

/// The model at the start, as this process has it.
struct FetchedModel {
    folder: ModelFolder,
    weights: Weights,
    /// The adapter at the start, where it is not a fresh one.
    adapter: Option<Place>,
    /// Where its files lie as long as it is used.
    _place: Place,
}

impl FetchedModel {
    fn start(&self) -> (&ModelFolder, &Weights) {
        (&self.folder, &self.weights)
    }

    /// With the policy, an adapter beside the reference where one is trained.
    fn whole(
        &self,
        settings: &Settings,
    ) -> anyhow::Result<(&ModelFolder, &Weights, LanguageModel)> {
        let saved = self.adapter.as_ref().map(Place::path);
        let adapter = world::adapter(settings, self.start(), saved)?;
        let policy = world::policy(&self.folder, &self.weights, adapter)?;
        Ok((&self.folder, &self.weights, policy))
    }

    /// The files of this machine where they are the run's, else the shelf's.
    async fn fetch(
        settings: &Settings,
        record: &RunRecord,
        shelf: &WeightsShelf,
    ) -> anyhow::Result<Self> {
        let (device, dtype) = world::device(settings)?;
        let how = &settings.model;
        let place = Place::find(how.path.as_ref(), &record.model, shelf).await?;
        let adapter = match record.adapter.as_slice() {
            [] => None,
            files => Some(Place::find(how.adapter.as_ref(), files, shelf).await?),
        };
        let mut folder = ModelFolder::open(place.path(), how.chat_template.as_deref())?;
        folder.base_model = record.base_model.clone();
        let weights = folder.weights(dtype, &device)?;
        Ok(Self {
            folder,
            weights,
            adapter,
            _place: place,
        })
    }
}

/// Where files of the model at the start lie in this process.
enum Place {
    /// Where the settings say.
    Own(PathBuf),
    /// In a folder of their own, from the shelf.
    Fetched(TempDir),
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::Own(path) => path,
            Self::Fetched(folder) => folder.path(),
        }
    }

    /// The folder of this machine that `source` names if it has these files, else one with those of the shelf.
    async fn find(
        source: Option<&ModelSource>,
        files: &[ModelFile],
        shelf: &WeightsShelf,
    ) -> anyhow::Result<Self> {
        let is_here = |folder: &Path, file: &ModelFile| {
            let bytes = std::fs::read(folder.join(&file.name));
            bytes.is_ok_and(|bytes| Digest::of(&bytes) == file.digest)
        };
        let own = source.and_then(model_hub::folder_here);
        if let Some(own) = own.filter(|own| files.iter().all(|file| is_here(own, file))) {
            return Ok(Self::Own(own));
        }
        let place = tempfile::tempdir().context("failed to make a folder for the model")?;
        for file in files {
            let bytes = shelf.get_file(&stored_as(file)).await?;
            let bytes = bytes.context("a server has a shelf of files")?;
            if Digest::of(&bytes) != file.digest {
                return Err(anyhow!("{} came torn from the server", file.name));
            }
            std::fs::write(place.path().join(&file.name), bytes)
                .with_context(|| format!("failed to write into {}", place.path().display()))?;
        }
        Ok(Self::Fetched(place))
    }
}
