//! How a process that plays one role of a run over JetStream begins: the same for actors and preference
//! services.

use settings::Settings;
use telemetry::Exporter;
use tokio::sync::watch;

use crate::{
    interrupt,
    presence::{host, metrics_url},
    roles::Joined,
};

/// The arguments of a process that joins a run.
#[derive(clap::Args)]
pub(super) struct Membership {
    /// The process's name in pairs, metrics and status; this machine's name and a process id by default.
    #[arg(long)]
    name: Option<String>,
    /// Leave when standard input ends, as on SIGTERM: for whoever starts this process and watches it.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

/// A process that is connected to its run's server.
pub(super) struct Member {
    /// Its connection.
    pub(super) joined: Joined,
    /// Turns true when it is to leave.
    pub(super) stop: watch::Sender<bool>,
    /// Shows its metrics as long as it is kept.
    _exporter: Exporter,
}

impl Membership {
    /// Shows metrics, listens for signals and connects.
    pub(super) async fn connect(&self, settings: &Settings) -> anyhow::Result<Member> {
        let exporter = Exporter::start(settings.telemetry.listen)?;
        let metrics = metrics_url(exporter.address());
        let name = self.name.clone();
        let name = name.unwrap_or_else(|| format!("{}-{}", host(), std::process::id()));
        tracing::info!(name, metrics, "agon {}", env!("CARGO_PKG_VERSION"));
        let stop = interrupt::on_signal_or_end(self.end_with_stdin)?;
        Ok(Member {
            joined: Joined::connect(settings, name, metrics).await?,
            stop,
            _exporter: exporter,
        })
    }
}
