//! `agon preference`: the preference service alone, over HTTP or as a role of a run over JetStream.

use std::{process::ExitCode, sync::Arc};

use settings::{Settings, TransportSettings};
use telemetry::Exporter;

use crate::cli::{
    config_args::{Configuration, RunDirectoryArgument},
    join_args::JoinArguments,
};
use crate::{
    assembly::{self, CompletionOrigin, JudgeSource},
    cluster::{membership::metrics_url, server_users::ServerRole},
    exit_code::UsageError,
    signals,
};

/// Serve the judge of a configuration: to a run over JetStream, or over HTTP to other trainers.
///
/// With transport.kind = "jetstream" it joins the run, labels its pairs until the run is done, and also serves
/// HTTP if preference.http.listen is set. Without, it serves HTTP alone:
/// POST /v1/preferences with {"pairs": [{"prompt", "first", "second"}]} returns for every pair the
/// probability that the first response is preferred to the second. GET /healthz succeeds while the process
/// lives, GET /readyz while a judge is available. Prints its address on standard output. On SIGTERM or Ctrl-C it
/// answers the requests in progress and exits.
///
/// With preference.apo.refresh_steps above 0 the rounds of APO are stored in the run directory.
///
/// Example: agon preference configs/default.toml --set 'preference.http.listen="127.0.0.1:8000"'
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    #[command(flatten)]
    join: JoinArguments,
    #[command(flatten)]
    directory: RunDirectoryArgument,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.configuration.resolve()?.settings;
    if let TransportSettings::Jetstream(_) = settings.transport {
        return crate::runtime()?.block_on(join(arguments, &settings));
    }
    if settings.preference.http.listen.is_empty() {
        let reason = "preference.http.listen is empty: set the address to listen on, as in \
                      --set 'preference.http.listen=\"127.0.0.1:8000\"'";
        return Err(UsageError(reason.into()).into());
    }
    crate::runtime()?.block_on(serve(&settings))
}

async fn join(arguments: &Arguments, settings: &Settings) -> anyhow::Result<ExitCode> {
    let joined = arguments.join.connect(settings, ServerRole::Preference);
    let Some(process) = joined.await? else {
        return Ok(ExitCode::SUCCESS);
    };
    let run_dir = arguments.directory.path(settings);
    crate::cluster::join_preference(&process.session, settings, &run_dir, &process.shutdown)
        .await?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(settings: &Settings) -> anyhow::Result<ExitCode> {
    let exporter = Exporter::start(settings.telemetry.listen, &settings.telemetry.token_path)?;
    let shutdown = signals::on_signal()?;
    let cancel = signals::cancel_token(&shutdown);
    let judge = tokio::task::block_in_place(|| {
        JudgeSource::open(settings, CompletionOrigin::External, &cancel)
    })?;
    let judge = Arc::new(judge);
    let pool = assembly::pool(settings, &judge)?;
    let name = pool.name();
    let server = assembly::server(settings, &judge, pool).await?;
    tracing::info!(
        judge = name,
        metrics = metrics_url(exporter.address()),
        "agon {}",
        env!("CARGO_PKG_VERSION")
    );
    out!("http://{}", server.address())?;
    server.run(shutdown.subscribe()).await;
    Ok(ExitCode::SUCCESS)
}
