//! A run of many processes on one machine: started, watched, started again when they die, and ended
//! together.
//!
//! Every process is this program with another command, joined by a NATS server that is started too when
//! the settings name none. A process ends when its standard input does, and the server has a guard that does so: none
//! outlives this one.

mod child;
mod guard;
mod server;

use std::{
    collections::VecDeque,
    path::Path,
    process::{ExitCode, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use settings::{Resolved, Settings, TransportSettings};
use telemetry::{Exporter, Measurements, RunDirectory, write_atomically};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    failure::Code,
    interrupt,
    overview::LauncherTarget,
    world::{Part, Preflight},
};
use child::{Child, Plan};
pub(crate) use server::{Server, find as find_server};

/// How long the others may take to leave once the learner has ended.
const GRACE: Duration = Duration::from_secs(90);

/// How long after the first of the others leaves a learner whose run is done may take to end.
const TO_TELL: Duration = Duration::from_secs(5);

/// The pause before a process is started again, doubled each time.
const PAUSE: Duration = Duration::from_millis(250);

/// Starts all processes of the run in the directory `path`, watches them, and ends with the learner.
pub(crate) async fn run(
    path: &Path,
    resolved: &Resolved,
    resume: Option<&str>,
) -> anyhow::Result<ExitCode> {
    if resume.is_none() && path.join("config.toml").exists() {
        RunDirectory::create(path, &resolved.toml)?;
    }
    // What a process of the run would refuse is refused before any is started.
    tokio::task::block_in_place(|| Preflight::of(&resolved.settings, path, Part::Whole).passed())?;
    let stop = interrupt::on_signal()?;
    let exporter = Exporter::start(([127, 0, 0, 1], 0).into())?;
    tracing::info!(
        run = %path.display(),
        metrics = format!("http://{}/metrics", exporter.address()),
        "agon {}",
        env!("CARGO_PKG_VERSION")
    );
    let logs = path.join("logs");
    std::fs::create_dir_all(&logs)
        .with_context(|| format!("failed to make the folder {}", logs.display()))?;
    let (server, url) = match &resolved.settings.transport {
        TransportSettings::Jetstream(jetstream) if jetstream.url.is_empty() => {
            let server = Server::start(&jetstream.server, path).await?;
            let url = server.url();
            (Some(server), url)
        }
        TransportSettings::Jetstream(jetstream) => (None, jetstream.url.clone()),
        TransportSettings::Memory {} => bail!("roles in memory need no processes"),
    };
    let watched = LauncherTarget::write(
        path,
        &resolved.settings.run.name,
        &exporter.address().to_string(),
    )?;
    let config = path.join("launch.toml");
    write_atomically(&config, resolved.toml.as_bytes())?;
    let mut house = House::new(resolved, (path, &config, &url), resume, server)?;
    let ended = house.watch(stop.subscribe()).await;
    house.end().await;
    drop(watched);
    ended
}

/// All processes of a run.
struct House {
    learner: Watched,
    others: Vec<Watched>,
    server: Option<Server>,
    limit: (usize, Duration),
    restarts: u64,
}

/// A process and how often it was started again.
struct Watched {
    plan: Plan,
    child: Child,
    restarts: VecDeque<Instant>,
}

impl House {
    fn new(
        resolved: &Resolved,
        (path, config, url): (&Path, &Path, &str),
        resume: Option<&str>,
        server: Option<Server>,
    ) -> anyhow::Result<Self> {
        let settings = &resolved.settings;
        let plan = |command: &str, name: String, extra: &[String]| {
            let mut arguments = vec![command.to_owned(), config.display().to_string()];
            arguments.extend(["--set".into(), format!("transport.url={url}")]);
            arguments.push("--end-with-stdin".into());
            arguments.extend_from_slice(extra);
            Plan {
                log: path.join("logs").join(format!("{name}.log")),
                name,
                arguments,
            }
        };
        let directory = || ["--run-dir".to_owned(), path.display().to_string()];
        let mut learner = plan("learner", "learner".into(), &directory());
        let resumable = learner.clone();
        learner
            .arguments
            .extend(resume.map(|which| format!("--resume={which}")));
        let learner = Watched {
            child: Child::start(&learner, true)?,
            plan: resumable,
            restarts: VecDeque::new(),
        };
        let mut others = Vec::new();
        for plan in companions(settings, &plan, &directory()) {
            others.push(Watched {
                child: Child::start(&plan, false)?,
                plan,
                restarts: VecDeque::new(),
            });
        }
        let topology = &settings.topology;
        let span = Duration::from_secs(topology.restart_seconds);
        Ok(Self {
            learner,
            others,
            server,
            limit: (topology.max_restarts, span),
            restarts: 0,
        })
    }

    /// Watches until the learner has ended for good: its exit code, or why nothing can go on.
    async fn watch(&mut self, mut stop: watch::Receiver<bool>) -> anyhow::Result<ExitCode> {
        let mut stopping = false;
        loop {
            self.tell_guard().await;
            tokio::select! {
                status = self.learner.child.ended() => {
                    let code = status.code().and_then(|code| u8::try_from(code).ok());
                    let for_good = [Code::Configuration, Code::MissingResource, Code::Diverged, Code::Interrupted];
                    match code {
                        Some(0) => return Ok(ExitCode::SUCCESS),
                        Some(code) if stopping || for_good.iter().any(|c| *c as u8 == code) => {
                            return Ok(ExitCode::from(code));
                        }
                        _ if stopping => bail!("the learner did not save: {status}"),
                        _ => self.learner_again(status).await?,
                    }
                }
                (index, status) = ended_of(&mut self.others), if !stopping => {
                    self.again(index, status).await?;
                }
                status = ended_server(&mut self.server) => {
                    tracing::warn!(%status, "the NATS server ended: it is started again with its store");
                    if let Some(server) = &mut self.server {
                        server.again().await?;
                    }
                }
                _ = stop.wait_for(|stop| *stop), if !stopping => {
                    stopping = true;
                    self.learner.child.ask_to_end();
                }
            }
        }
    }

    /// Says who needs the server, should this process be killed.
    async fn tell_guard(&mut self) {
        let Some(server) = &mut self.server else {
            return;
        };
        let everyone = self.others.iter().chain([&self.learner]);
        let ids: Vec<u32> = everyone.filter_map(|one| one.child.id()).collect();
        server.needed_by(&ids).await;
    }

    async fn learner_again(&mut self, status: ExitStatus) -> anyhow::Result<()> {
        let mut plan = self.learner.plan.clone();
        plan.arguments.push("--resume=auto".into());
        let limit = self.limit;
        self.learner.again(&plan, status, limit, true).await
    }

    async fn again(&mut self, index: usize, status: ExitStatus) -> anyhow::Result<()> {
        let limit = self.limit;
        let other = &mut self.others[index];
        let plan = other.plan.clone();
        let refused = [Code::Configuration, Code::MissingResource];
        if refused
            .iter()
            .any(|code| status.code() == Some(*code as i32))
        {
            let last = other.child.last_words();
            bail!("{} cannot take part: {last}", plan.name);
        }
        // One that leaves of itself may have heard before us that the run is done.
        let over = self.learner.child.ended();
        if status.success() && timeout(TO_TELL, over).await.is_ok() {
            return Ok(());
        }
        other.again(&plan, status, limit, false).await?;
        self.restarts += 1;
        let mut measurements = Measurements::new();
        measurements.set("actor/restarts", other.restarts.len() as f64);
        telemetry::publish(&measurements, &[("actor", &plan.name)]);
        let mut measurements = Measurements::new();
        measurements.set("health/actor_restarts", self.restarts as f64);
        telemetry::publish(&measurements, &[("role", "launcher")]);
        Ok(())
    }

    /// Ends whoever is left: first by asking, then by force; the server last.
    async fn end(&mut self) {
        self.learner.child.ask_to_end();
        let mut leaving = JoinSet::new();
        for Watched {
            mut child, plan, ..
        } in self.others.drain(..)
        {
            child.ask_to_end();
            leaving.spawn(async move {
                if timeout(GRACE, child.ended()).await.is_err() {
                    tracing::warn!(name = plan.name, "did not leave in time and is ended");
                    child.kill().await;
                }
            });
        }
        leaving.join_all().await;
        if timeout(GRACE, self.learner.child.ended()).await.is_err() {
            self.learner.child.kill().await;
        }
        if let Some(server) = &mut self.server {
            server.end().await;
        }
    }
}

impl Watched {
    async fn again(
        &mut self,
        plan: &Plan,
        status: ExitStatus,
        (most, span): (usize, Duration),
        leads: bool,
    ) -> anyhow::Result<()> {
        let name = &plan.name;
        let last = self.child.last_words();
        tracing::warn!(name, %status, last, "ended: it is started again");
        let now = Instant::now();
        self.restarts
            .retain(|then| now.duration_since(*then) < span);
        if self.restarts.len() >= most {
            bail!(
                "{name} was started again {most} times within {} s (topology.max_restarts): {last}; see {}",
                span.as_secs(),
                plan.log.display()
            );
        }
        let doublings = u32::try_from(self.restarts.len()).unwrap_or(0);
        self.restarts.push_back(now);
        tokio::time::sleep(PAUSE * 2u32.saturating_pow(doublings)).await;
        self.child = Child::start(plan, leads)?;
        Ok(())
    }
}

/// The plans of actors and preference services.
fn companions(
    settings: &Settings,
    plan: &dyn Fn(&str, String, &[String]) -> Plan,
    directory: &[String],
) -> Vec<Plan> {
    let topology = &settings.topology;
    // The learner has the port of the settings; several processes cannot share one.
    let own_port = [
        "--set".to_owned(),
        "telemetry.listen=127.0.0.1:0".to_owned(),
    ];
    let actors = (0..topology.actors).map(|index| {
        let name = format!("actor-{index}");
        plan(
            "actor",
            name.clone(),
            &[&own_port[..], &["--name".into(), name]].concat(),
        )
    });
    let services = (0..topology.preference).map(|index| {
        let name = format!("preference-{index}");
        let named = ["--name".to_owned(), name.clone()];
        let mut extra = [&own_port[..], &named, directory].concat();
        if index > 0 {
            extra.extend(["--set".into(), "preference.http.listen=\"\"".into()]);
        }
        plan("preference", name, &extra)
    });
    actors.chain(services).collect()
}

/// The next of these to end.
async fn ended_of(others: &mut [Watched]) -> (usize, ExitStatus) {
    if others.is_empty() {
        return std::future::pending().await;
    }
    let ends = others
        .iter_mut()
        .enumerate()
        .map(|(index, other)| Box::pin(async move { (index, other.child.ended().await) }));
    futures_util::future::select_all(ends).await.0
}

async fn ended_server(server: &mut Option<Server>) -> ExitStatus {
    match server {
        Some(server) => server.ended().await,
        None => std::future::pending().await,
    }
}
