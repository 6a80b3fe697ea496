//! The NATS server of a run that names none: its store lies in the run directory.

use std::{
    io::ErrorKind,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use telemetry::write_atomically;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::sleep,
};

use super::guard::Guard;
use crate::failure::Misuse;

/// How long it may take to listen.
const TO_LISTEN: Duration = Duration::from_secs(20);

/// The longest message: pairs of long completions, with three numbers for every token.
const MAX_PAYLOAD: &str = "8MB";

/// A NATS server with JetStream that listens on this machine alone.
pub(crate) struct Server {
    program: String,
    config: PathBuf,
    log: PathBuf,
    port: u16,
    process: Child,
    guard: Option<Guard>,
}

impl Server {
    /// Starts `program` with its store in the run directory `path`, on the port it had before where that is
    /// free.
    pub(crate) async fn start(program: &str, path: &Path) -> anyhow::Result<Self> {
        let store = path.join("jetstream");
        std::fs::create_dir_all(&store)
            .with_context(|| format!("failed to make the folder {}", store.display()))?;
        let known = store.join("port");
        let before = std::fs::read_to_string(&known).ok();
        let before = before
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        let free = TcpListener::bind(("127.0.0.1", before));
        let free = free.or_else(|_| TcpListener::bind(("127.0.0.1", 0)));
        let free = free.context("failed to find a free port for the NATS server")?;
        let port = free
            .local_addr()
            .context("a listener has an address")?
            .port();
        drop(free);
        write_atomically(&known, format!("{port}\n").as_bytes())?;
        let config = store.join("server.conf");
        let absolute = std::path::absolute(&store).context("the run directory has a path")?;
        let text = format!(
            "listen: \"127.0.0.1:{port}\"\nmax_payload: {MAX_PAYLOAD}\njetstream {{ store_dir: {:?} }}\n",
            absolute.display().to_string()
        );
        write_atomically(&config, text.as_bytes())?;
        let log = path.join("logs").join("nats-server.log");
        let mut server = Self {
            process: spawn(program, &config, &log)?,
            program: program.to_owned(),
            config,
            log,
            port,
            guard: None,
        };
        server.guard().await?;
        server.listens().await?;
        Ok(server)
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Starts it again, on the same port and with the same store.
    pub(crate) async fn again(&mut self) -> anyhow::Result<()> {
        self.process = spawn(&self.program, &self.config, &self.log)?;
        self.guard().await?;
        self.listens().await
    }

    pub(crate) async fn ended(&mut self) -> ExitStatus {
        self.process.wait().await.unwrap_or_default()
    }

    pub(crate) async fn end(&mut self) {
        if let Err(error) = self.process.kill().await {
            tracing::debug!(%error, "the NATS server had ended already");
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss().await;
        }
    }

    /// Says which processes need it, should this one be killed.
    pub(crate) async fn needed_by(&mut self, processes: &[u32]) {
        if let Some(guard) = &mut self.guard {
            guard.needed_by(processes).await;
        }
    }

    /// Has the process of the server guarded, in place of the one before.
    async fn guard(&mut self) -> anyhow::Result<()> {
        let guard = self.process.id().map(Guard::start).transpose()?;
        if let Some(before) = std::mem::replace(&mut self.guard, guard) {
            before.dismiss().await;
        }
        Ok(())
    }

    async fn listens(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
            let ended = self
                .process
                .try_wait()
                .context("the NATS server is a process")?;
            if ended.is_some() || started.elapsed() > TO_LISTEN {
                bail!(
                    "the NATS server does not listen; see {}",
                    self.log.display()
                );
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

/// Whether the program is there, by its path or on the search path.
pub(crate) fn find(program: &str) -> Result<(), Misuse> {
    let is_here = |path: &Path| path.is_file();
    let found = match program.contains('/') {
        true => is_here(Path::new(program)),
        false => {
            let folders = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&folders).any(|folder| is_here(&folder.join(program)))
        }
    };
    match found {
        true => Ok(()),
        false => Err(missing(program)),
    }
}

fn missing(program: &str) -> Misuse {
    Misuse(format!(
        "{program} is not there: install a NATS server (apt install nats-server), name it with \
         transport.server, or say where one runs with transport.url"
    ))
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
        Err(error) if error.kind() == ErrorKind::NotFound => Err(missing(program).into()),
        Err(error) => Err(error).context(format!("failed to start {program}")),
    }
}
