//! The NATS server that the launcher starts if the settings name none; its storage is in the run directory. It has a user
//! for each role, whose keys are made with it: other users of this machine cannot use it.

use std::{
    io::ErrorKind,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use telemetry::{create_private_directory, write_atomically};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::sleep,
};

use crate::assembly::missing_nats_server;
use crate::cluster::launch::nats_watchdog::NatsWatchdog;
use crate::cluster::server_users::{RunKeys, server_config};

/// Time for the server to start listening.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(20);

/// A NATS server with JetStream on the loopback address.
pub(crate) struct NatsServer {
    program: String,
    config: PathBuf,
    log: PathBuf,
    port: u16,
    keys: RunKeys,
    process: Child,
    watchdog: Option<NatsWatchdog>,
}

impl NatsServer {
    /// Starts `program` for the runs of these names, with its storage in the run directory `path`, on the port of its
    /// previous start if that is free. It takes messages of `max_payload_mib` MiB.
    pub(crate) async fn start(
        program: &str,
        path: &Path,
        runs: &[&str],
        max_payload_mib: usize,
    ) -> anyhow::Result<Self> {
        let store = path.join("jetstream");
        create_private_directory(&store)
            .with_context(|| format!("failed to make the folder {}", store.display()))?;
        let keys = RunKeys::open(&store.join("keys"))?;
        let port_file = store.join("port");
        let previous = std::fs::read_to_string(&port_file).ok();
        let previous = previous
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        let free = TcpListener::bind(("127.0.0.1", previous));
        let free = free.or_else(|_| TcpListener::bind(("127.0.0.1", 0)));
        let free = free.context("failed to find a free port for the NATS server")?;
        let port = free
            .local_addr()
            .context("a listener has an address")?
            .port();
        drop(free);
        write_atomically(&port_file, format!("{port}\n").as_bytes())?;
        let config = store.join("server.conf");
        let absolute = std::path::absolute(&store).context("the run directory has a path")?;
        let text = server_config(&format!("127.0.0.1:{port}"), max_payload_mib, &absolute);
        write_atomically(&config, (text + &keys.authorization(runs)).as_bytes())?;
        let log = path.join("logs").join("nats-server.log");
        let mut server = Self {
            process: spawn(program, &config, &log)?,
            program: program.to_owned(),
            config,
            log,
            port,
            keys,
            watchdog: None,
        };
        server.start_watchdog().await?;
        server.wait_until_listening().await?;
        Ok(server)
    }

    /// URL for clients.
    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Keys of its clients.
    pub(crate) fn keys(&self) -> &RunKeys {
        &self.keys
    }

    /// Restarts it on the same port with the same storage.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<()> {
        self.process = spawn(&self.program, &self.config, &self.log)?;
        self.start_watchdog().await?;
        self.wait_until_listening().await
    }

    /// Waits for its exit status.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        self.process.wait().await.unwrap_or_default()
    }

    /// Stops it.
    pub(crate) async fn stop(&mut self) {
        if let Err(error) = self.process.kill().await {
            tracing::debug!(%error, "the NATS server had ended already");
        }
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.dismiss().await;
        }
    }

    /// Tells the watchdog which processes need the server.
    pub(crate) async fn set_users(&mut self, processes: &[u32]) {
        if let Some(watchdog) = &mut self.watchdog {
            watchdog.set_users(processes).await;
        }
    }

    /// Starts a watchdog for the current server process, replacing the previous one.
    async fn start_watchdog(&mut self) -> anyhow::Result<()> {
        let watchdog = self.process.id().map(NatsWatchdog::start).transpose()?;
        if let Some(previous) = std::mem::replace(&mut self.watchdog, watchdog) {
            previous.dismiss().await;
        }
        Ok(())
    }

    async fn wait_until_listening(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
            let ended = self
                .process
                .try_wait()
                .context("the NATS server is a process")?;
            if ended.is_some() || started.elapsed() > STARTUP_TIMEOUT {
                let last = std::fs::read_to_string(&self.log).unwrap_or_default();
                let last = last.lines().next_back().unwrap_or("it has logged nothing");
                bail!(
                    "failed to start the NATS server {}: it does not listen ({last}); see {}",
                    self.program,
                    self.log.display()
                );
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn spawn(program: &str, config: &Path, log: &Path) -> anyhow::Result<Child> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("failed to open {}", log.display()))?;
    let spawned = Command::new(program)
        .arg("-c")
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    match spawned {
        Ok(process) => Ok(process),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(missing_nats_server(program).into())
        }
        Err(error) => Err(error).context(format!("failed to start {program}")),
    }
}
