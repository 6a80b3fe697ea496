//! Arguments and start of a process that joins a run over JetStream: the same for actors and preference services.

use settings::Settings;
use telemetry::Exporter;
use tokio::sync::watch;

use crate::{
    cluster::{
        ClusterSession,
        membership::{host, metrics_url},
    },
    signals,
};

// The structs here have no doc comment: clap would show it in place of the command's own.
#[derive(clap::Args)]
pub(crate) struct StdinArgument {
    /// Stop when standard input ends, as on SIGTERM: for a parent process that supervises this one.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

impl StdinArgument {
    /// The shutdown watch of this process.
    pub(crate) fn shutdown(&self) -> anyhow::Result<watch::Sender<bool>> {
        signals::on_signal_or_end(self.end_with_stdin)
    }
}

#[derive(clap::Args)]
pub(crate) struct JoinArguments {
    /// The process's name in pairs, metrics and status; host name and process id by default.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    stdin: StdinArgument,
}

/// A process that is connected to its run's server.
pub(crate) struct JoinedProcess {
    /// The connection.
    pub(crate) session: ClusterSession,
    /// Turns true when the process is to stop.
    pub(crate) shutdown: watch::Sender<bool>,
    /// Serves metrics until it is dropped.
    _exporter: Exporter,
}

impl JoinArguments {
    /// Serves metrics, installs signal handlers and connects to the server.
    pub(crate) async fn connect(&self, settings: &Settings) -> anyhow::Result<JoinedProcess> {
        let exporter = Exporter::start(settings.telemetry.listen)?;
        let metrics = metrics_url(exporter.address());
        let name = self.name.clone();
        let name = name.unwrap_or_else(|| format!("{}-{}", host(), std::process::id()));
        tracing::info!(name, metrics, "agon {}", env!("CARGO_PKG_VERSION"));
        let shutdown = self.stdin.shutdown()?;
        Ok(JoinedProcess {
            session: ClusterSession::connect(settings, name, metrics).await?,
            shutdown,
            _exporter: exporter,
        })
    }
}
