//! `agon preference`: the preference service alone, over HTTP or as a part of a run over JetStream.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use settings::{Settings, TransportSettings};
use telemetry::Exporter;

use super::{configuration::Configuration, membership::Membership};
use crate::{failure::Misuse, interrupt, presence::metrics_url, roles, world};

/// Serve the judge of a configuration: to a run over JetStream, or over HTTP to other trainers.
///
/// With transport.kind = "jetstream" it joins the run, labels its pairs until the run is done, and serves
/// HTTP besides where preference.http.listen says. Without, it serves HTTP alone:
/// POST /v1/preferences with {"pairs": [{"prompt", "first", "second"}]} tells for every pair the
/// probability that the first response is preferred to the second. GET /healthz tells that the process
/// lives, GET /readyz that a judge can be asked. The address stands on standard output; SIGTERM or Ctrl-C
/// answers what is in hand and leaves.
///
/// Example: agon preference configs/default.toml --set 'preference.http.listen="127.0.0.1:8000"'
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    #[command(flatten)]
    membership: Membership,
    /// The run directory, where the adversarial game keeps its rounds; <run.output_dir>/<run.name> by default.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.configuration.resolve()?.settings;
    if let TransportSettings::Jetstream(_) = settings.transport {
        return crate::runtime()?.block_on(join(arguments, &settings));
    }
    if settings.preference.http.listen.is_empty() {
        let reason = "preference.http.listen is empty: say where to listen, as in \
                      --set 'preference.http.listen=\"127.0.0.1:8000\"'";
        return Err(Misuse(reason.into()).into());
    }
    crate::runtime()?.block_on(serve(&settings))
}

async fn join(arguments: &Arguments, settings: &Settings) -> anyhow::Result<ExitCode> {
    let member = arguments.membership.connect(settings).await?;
    let run_dir = arguments.run_dir.clone();
    let run_dir = run_dir.unwrap_or_else(|| settings.run.output_dir.join(&settings.run.name));
    roles::join_preference(&member.joined, settings, &run_dir, &member.stop).await?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(settings: &Settings) -> anyhow::Result<ExitCode> {
    let exporter = Exporter::start(settings.telemetry.listen)?;
    let stop = interrupt::on_signal()?;
    let judge = tokio::task::block_in_place(|| {
        world::JudgeSource::open(settings, world::Judged::Anyone, &|| *stop.borrow())
    })?;
    let judge = Arc::new(judge);
    let bench = world::bench(settings, &judge)?;
    let name = bench.name();
    let server = world::server(settings, &judge, bench).await?;
    tracing::info!(
        judge = name,
        metrics = metrics_url(exporter.address()),
        "agon {}",
        env!("CARGO_PKG_VERSION")
    );
    out!("http://{}", server.address())?;
    server.run(stop.subscribe()).await?;
    Ok(ExitCode::SUCCESS)
}
