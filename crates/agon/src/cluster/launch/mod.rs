//! The launcher of a multi-process run on one machine: starts, supervises, restarts and stops its processes.
//!
//! Every process is this program with another subcommand. They communicate over a NATS server, which is started too if
//! the settings name none. Child processes end when their standard input is closed, and the server has a watchdog
//! process for that, so none outlives the launcher.

mod child;
mod nats_server;
mod nats_watchdog;

use std::{
    collections::VecDeque,
    path::Path,
    process::{ExitCode, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use settings::{Resolved, Settings, TransportSettings};
use telemetry::{Exporter, Measurements, RunDirectory, create_private_directory, write_atomically};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    assembly::{Preflight, PreflightScope},
    cluster::server_users::{RunKeys, ServerRole, max_payload_mib},
    cluster::status::LauncherTarget,
    exit_code::Code,
    run::EXIT_GRACE,
    signals,
};
use child::{ChildCommand, ChildProcess};
pub(crate) use nats_server::NatsServer;

/// Time for the other processes to end after the learner: that of their roles, and some to close.
pub(crate) const PROCESS_EXIT_GRACE: Duration = EXIT_GRACE.saturating_add(Duration::from_secs(30));

/// Time for the learner of a finished run to end after another process has left.
const LEARNER_EXIT_WAIT: Duration = Duration::from_secs(5);

/// Delay before the first restart of a process; doubled for each further one.
const RESTART_DELAY: Duration = Duration::from_millis(250);

/// Checkpoint that a run is resumed from, if any.
#[derive(Clone, Copy)]
pub(crate) struct ResumeRequest<'a> {
    /// Value of `--resume`.
    pub(crate) which: Option<&'a str>,
    /// Whether the run is resumed although its inputs have changed.
    pub(crate) accepts_changes: bool,
}

/// Starts all processes of the run in the directory `path`, supervises them, and ends with the learner.
pub(crate) async fn run(
    path: &Path,
    resolved: &Resolved,
    resume: ResumeRequest<'_>,
) -> anyhow::Result<ExitCode> {
    if resume.which.is_none() && path.join("config.toml").exists() {
        RunDirectory::create(path, &resolved.toml)?;
    }
    // Before anything is printed: a signal that is not handled yet would lose what follows.
    let shutdown = signals::on_signal()?;
    // Checked before any process is started.
    let scope = PreflightScope::AllRoles;
    tokio::task::block_in_place(|| Preflight::of(&resolved.settings, path, scope).into_result())?;
    let exporter = Exporter::start(([127, 0, 0, 1], 0).into(), Path::new(""))?;
    tracing::info!(
        run = %path.display(),
        metrics = format!("http://{}/metrics", exporter.address()),
        "agon {}",
        env!("CARGO_PKG_VERSION")
    );
    let logs = path.join("logs");
    create_private_directory(&logs)
        .with_context(|| format!("failed to make the folder {}", logs.display()))?;
    let (server, url) = server(&resolved.settings, path).await?;
    let launcher_target = LauncherTarget::write(
        path,
        &resolved.settings.run.name,
        &exporter.address().to_string(),
    )?;
    let config = path.join("launch.toml");
    write_atomically(&config, resolved.toml.as_bytes())?;
    let commands = Commands {
        path,
        config: &config,
        url: &url,
        keys: server.as_ref().map(|server| server.keys().clone()),
    };
    let mut group = ProcessGroup::start(resolved, &commands, resume, server)?;
    let result = group.supervise(shutdown.subscribe()).await;
    group.stop().await;
    drop(launcher_target);
    result
}

/// The run's NATS server, started here unless the settings name one, and its URL.
async fn server(settings: &Settings, path: &Path) -> anyhow::Result<(Option<NatsServer>, String)> {
    match &settings.transport {
        TransportSettings::Jetstream(jetstream) if jetstream.url.is_empty() => {
            let (runs, payload) = ([settings.run.name.as_str()], max_payload_mib(settings));
            let server = NatsServer::start(&jetstream.server, path, &runs, payload).await?;
            let url = server.url();
            Ok((Some(server), url))
        }
        TransportSettings::Jetstream(jetstream) => Ok((None, jetstream.url.clone())),
        TransportSettings::Memory {} => bail!("roles in memory run in one process"),
    }
}

/// All processes of a run.
struct ProcessGroup {
    learner: SupervisedProcess,
    others: Vec<SupervisedProcess>,
    server: Option<NatsServer>,
    limit: RestartLimit,
    restarts: u64,
}

/// Maximum number of restarts of a process within a period.
#[derive(Clone, Copy)]
struct RestartLimit {
    max_restarts: usize,
    period: Duration,
}

/// A process with its recent restarts.
struct SupervisedProcess {
    command: ChildCommand,
    child: ChildProcess,
    restarts: VecDeque<Instant>,
}

/// Builds the commands of a run's processes.
struct Commands<'a> {
    /// Run directory.
    path: &'a Path,
    /// Configuration file of all processes.
    config: &'a Path,
    /// URL of the NATS server.
    url: &'a str,
    /// Keys of the NATS server's users; `None` if the settings name the server and its credentials.
    keys: Option<RunKeys>,
}

impl ProcessGroup {
    fn start(
        resolved: &Resolved,
        commands: &Commands<'_>,
        resume: ResumeRequest<'_>,
        server: Option<NatsServer>,
    ) -> anyhow::Result<Self> {
        let settings = &resolved.settings;
        // A restart resumes from the newest checkpoint, not from the one that was asked for.
        let mut restart = commands.learner();
        let accepts = resume
            .accepts_changes
            .then(|| "--accept-changes".to_owned());
        restart.arguments.extend(accepts);
        let mut first = restart.clone();
        let which = resume.which.map(|which| format!("--resume={which}"));
        first.arguments.extend(which);
        let learner = SupervisedProcess {
            child: ChildProcess::start(&first, true)?,
            command: restart,
            restarts: VecDeque::new(),
        };
        let mut others = Vec::new();
        for command in commands.actors_and_services(settings) {
            others.push(SupervisedProcess {
                child: ChildProcess::start(&command, false)?,
                command,
                restarts: VecDeque::new(),
            });
        }
        let topology = &settings.topology;
        Ok(Self {
            learner,
            others,
            server,
            limit: RestartLimit {
                max_restarts: topology.max_restarts,
                period: Duration::from_secs(topology.restart_seconds),
            },
            restarts: 0,
        })
    }

    /// Supervises until the learner has ended for good. Returns its exit code.
    ///
    /// # Errors
    /// When a process cannot run or exceeds its restart limit.
    async fn supervise(&mut self, mut shutdown: watch::Receiver<bool>) -> anyhow::Result<ExitCode> {
        let mut stopping = false;
        loop {
            self.update_watchdog().await;
            tokio::select! {
                status = self.learner.child.wait() => {
                    let code = status.code().and_then(|code| u8::try_from(code).ok());
                    let permanent = [Code::Configuration, Code::MissingResource, Code::Diverged, Code::Interrupted];
                    match code {
                        Some(0) => return Ok(ExitCode::SUCCESS),
                        Some(code) if stopping || permanent.iter().any(|c| *c as u8 == code) => {
                            return Ok(ExitCode::from(code));
                        }
                        _ if stopping => bail!("the learner did not save: {status}"),
                        _ => self.restart_learner(status).await?,
                    }
                }
                (index, status) = next_exit(&mut self.others), if !stopping => {
                    self.restart_other(index, status).await?;
                }
                status = server_exit(&mut self.server) => {
                    tracing::warn!(%status, "the NATS server ended; restarting it with its storage");
                    if let Some(server) = &mut self.server {
                        server.restart().await?;
                    }
                }
                _ = shutdown.wait_for(|requested| *requested), if !stopping => {
                    stopping = true;
                    self.learner.child.request_shutdown();
                }
            }
        }
    }

    /// Updates the watchdog's list of processes that need the server.
    async fn update_watchdog(&mut self) {
        let Some(server) = &mut self.server else {
            return;
        };
        let processes = self.others.iter().chain([&self.learner]);
        let ids: Vec<u32> = processes.filter_map(|process| process.child.id()).collect();
        server.set_users(&ids).await;
    }

    async fn restart_learner(&mut self, status: ExitStatus) -> anyhow::Result<()> {
        let mut command = self.learner.command.clone();
        command.arguments.push("--resume=auto".into());
        let limit = self.limit;
        self.learner.restart(&command, status, limit, true).await
    }

    async fn restart_other(&mut self, index: usize, status: ExitStatus) -> anyhow::Result<()> {
        let limit = self.limit;
        let other = &mut self.others[index];
        let command = other.command.clone();
        let permanent = [Code::Configuration, Code::MissingResource];
        if permanent
            .iter()
            .any(|code| status.code() == Some(*code as i32))
        {
            let message = other.child.last_message();
            bail!("{} cannot take part: {message}", command.name);
        }
        // A process that ends with success may have seen the end of the run before the launcher.
        let run_end = self.learner.child.wait();
        if status.success() && timeout(LEARNER_EXIT_WAIT, run_end).await.is_ok() {
            return Ok(());
        }
        other.restart(&command, status, limit, false).await?;
        self.restarts += 1;
        let mut measurements = Measurements::new();
        measurements.set("actor/restarts", other.restarts.len() as f64);
        telemetry::publish(&measurements, &[("actor", &command.name)]);
        let mut measurements = Measurements::new();
        measurements.set("health/actor_restarts", self.restarts as f64);
        telemetry::publish(&measurements, &[("role", "launcher")]);
        Ok(())
    }

    /// Stops all remaining processes, by request and then by force; the server last.
    async fn stop(&mut self) {
        self.learner.child.request_shutdown();
        let mut leaving = JoinSet::new();
        for SupervisedProcess {
            mut child, command, ..
        } in self.others.drain(..)
        {
            child.request_shutdown();
            leaving.spawn(async move {
                if timeout(PROCESS_EXIT_GRACE, child.wait()).await.is_err() {
                    tracing::warn!(
                        name = command.name,
                        "a process did not end in time and is killed"
                    );
                    child.kill().await;
                }
            });
        }
        leaving.join_all().await;
        if timeout(PROCESS_EXIT_GRACE, self.learner.child.wait())
            .await
            .is_err()
        {
            self.learner.child.kill().await;
        }
        if let Some(server) = &mut self.server {
            server.stop().await;
        }
    }
}

impl SupervisedProcess {
    async fn restart(
        &mut self,
        command: &ChildCommand,
        status: ExitStatus,
        limit: RestartLimit,
        leads: bool,
    ) -> anyhow::Result<()> {
        let RestartLimit {
            max_restarts,
            period,
        } = limit;
        let name = &command.name;
        let message = self.child.last_message();
        tracing::warn!(name, %status, last = message, "a process ended; restarting it");
        let now = Instant::now();
        self.restarts
            .retain(|then| now.duration_since(*then) < period);
        if self.restarts.len() >= max_restarts {
            bail!(
                "{name} was restarted {max_restarts} times within {} s (topology.max_restarts): {message}; see {}",
                period.as_secs(),
                command.log.display()
            );
        }
        let doublings = u32::try_from(self.restarts.len()).unwrap_or(0);
        self.restarts.push_back(now);
        tokio::time::sleep(RESTART_DELAY * 2u32.saturating_pow(doublings)).await;
        self.child = ChildProcess::start(command, leads)?;
        Ok(())
    }
}

impl Commands<'_> {
    fn learner(&self) -> ChildCommand {
        self.command(ServerRole::Learner, "learner", &self.run_dir())
    }

    fn actors_and_services(&self, settings: &Settings) -> Vec<ChildCommand> {
        let topology = &settings.topology;
        // The learner has the configured port; several processes cannot share one.
        let own_port = [
            "--set".to_owned(),
            "telemetry.listen=127.0.0.1:0".to_owned(),
        ];
        let (actors, services) = needed(settings, topology.actors, topology.preference);
        let actors = (0..actors).map(|index| {
            let name = format!("actor-{index}");
            let extra = [&own_port[..], &["--name".into(), name.clone()]].concat();
            self.command(ServerRole::Actor, &name, &extra)
        });
        let services = (0..services).map(|index| {
            let name = format!("preference-{index}");
            let named = ["--name".to_owned(), name.clone()];
            let mut extra = [&own_port[..], &named, &self.run_dir()].concat();
            if index > 0 {
                extra.extend(["--set".into(), "preference.http.listen=\"\"".into()]);
            }
            self.command(ServerRole::Preference, &name, &extra)
        });
        actors.chain(services).collect()
    }

    /// The command of a process of this role. Arguments are visible to all users of the machine: they name the files of
    /// keys.
    fn command(&self, role: ServerRole, name: &str, extra: &[String]) -> ChildCommand {
        let mut arguments = vec![role.name().to_owned(), self.config.display().to_string()];
        arguments.extend(["--set".into(), format!("transport.url={}", self.url)]);
        let keys = self.keys.iter().flat_map(|keys| keys.settings(role));
        for (key, path) in keys {
            let path = toml::Value::String(path.display().to_string());
            arguments.extend(["--set".into(), format!("{key}={path}")]);
        }
        arguments.push("--end-with-stdin".into());
        arguments.extend_from_slice(extra);
        ChildCommand {
            log: self.path.join("logs").join(format!("{name}.log")),
            name: name.to_owned(),
            arguments,
        }
    }

    fn run_dir(&self) -> [String; 2] {
        ["--run-dir".to_owned(), self.path.display().to_string()]
    }
}

/// The numbers of actors and preference services to start: none of a role that the run does not need.
fn needed(settings: &Settings, actors: usize, services: usize) -> (usize, usize) {
    let count = |is_needed, count| if is_needed { count } else { 0 };
    (
        count(settings.needs_samples(), actors),
        count(settings.needs_judge(), services),
    )
}

/// Waits for the next of these processes to end. Returns its index and exit status.
async fn next_exit(others: &mut [SupervisedProcess]) -> (usize, ExitStatus) {
    if others.is_empty() {
        return std::future::pending().await;
    }
    let exits = others
        .iter_mut()
        .enumerate()
        .map(|(index, other)| Box::pin(async move { (index, other.child.wait().await) }));
    futures_util::future::select_all(exits).await.0
}

async fn server_exit(server: &mut Option<NatsServer>) -> ExitStatus {
    match server {
        Some(server) => server.wait().await,
        None => std::future::pending().await,
    }
}
