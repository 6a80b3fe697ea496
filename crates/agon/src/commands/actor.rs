//! `agon actor`: actors that join a run over JetStream.

use std::{path::PathBuf, process::ExitCode};

use settings::{Override, resolve_file};
use telemetry::Exporter;

use crate::{
    interrupt,
    presence::host,
    roles::{self, Joined},
};

/// Join a run over JetStream as an actor: answer prompts until the run is done.
///
/// The model comes from the run's server; of the configuration only where the server is, the run's name
/// and what concerns this machine count, and a configuration that differs from the run's otherwise is
/// refused. SIGTERM or Ctrl-C finishes what is being written and leaves; what was not begun goes to others.
///
/// Example: agon actor configs/cluster.toml --set transport.url=nats://10.0.0.1:4222
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The run's configuration: its config.toml, or the file it was started from.
    config: PathBuf,
    /// Change one setting, VALUE being TOML; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<Override>,
    /// The actor's name in pairs, metrics and status; this machine's name and a process id by default.
    #[arg(long)]
    name: Option<String>,
    /// Leave when standard input ends, as on SIGTERM: for whoever starts this process and watches it.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = resolve_file(&arguments.config, &arguments.set)?.settings;
    let name = arguments.name.clone();
    let name = name.unwrap_or_else(|| format!("{}-{}", host(), std::process::id()));
    crate::runtime()?.block_on(async {
        let exporter = Exporter::start(settings.telemetry.listen)?;
        let metrics = format!("http://{}/metrics", exporter.address());
        tracing::info!(name, metrics, "agon {}", env!("CARGO_PKG_VERSION"));
        let stop = interrupt::on_signal_or_end(arguments.end_with_stdin)?;
        let joined = Joined::connect(&settings, name, metrics).await?;
        roles::join_actor(&joined, &settings, &stop).await?;
        Ok(ExitCode::SUCCESS)
    })
}
