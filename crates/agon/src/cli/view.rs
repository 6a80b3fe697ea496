//! `agon view`: runs in a browser, whether finished or in progress in another process.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use reqwest::Url;
use telemetry::http::read_token;
use telemetry::{MetricsPage, PageParts, PageServer, RunView, evaluation_differences};

use crate::{
    cli::monitoring::{self, MetricsClient},
    exit_code::UsageError,
    signals,
};

/// Show runs in a browser: curves, stages and their messages, samples, APO rounds, settings.
///
/// Reads run directories and writes nothing but the verdicts that people give on the page; a run in progress is followed.
/// Directories may be untrusted: only regular files inside them are read, and the processes that a directory lists are
/// asked for their metrics only while a process of this user runs there. The curves of several runs are overlaid; a warning says where their evaluations
/// differ in stop tokens, chat template or sampling, or in the rate of truncated answers. Prints the address on
/// standard output; ends on SIGTERM or Ctrl-C.
///
/// Example: agon view runs/quickstart runs/another
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The run directories.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The address to serve on; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Metrics URL of a process of the first run, as it logged it: shows its messages in flight and current waits.
    /// Needed once per process of a run that no process of this user leads on this machine.
    #[arg(long, value_name = "URL")]
    metrics: Vec<String>,
    /// A file with the page's access token; required on a non-loopback address.
    #[arg(long, value_name = "FILE")]
    token_path: Option<PathBuf>,
    /// A file with the token of the processes' metrics, their telemetry.token_path, if they have one.
    #[arg(long, value_name = "FILE")]
    metrics_token_path: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let runs = arguments.runs.iter().map(RunView::open);
    let mut runs = runs.collect::<Result<Vec<_>, _>>()?;
    warn_of_differences(&mut runs)?;
    let runtime = crate::runtime()?;
    let token = |path: &Option<PathBuf>| read_token(path.as_deref().unwrap_or(Path::new("")));
    let parts = PageParts {
        listen: arguments.listen,
        token: token(&arguments.token_path)?,
        runs,
        live: Some(live_metrics(
            arguments,
            MetricsClient::new(
                runtime.handle().clone(),
                token(&arguments.metrics_token_path)?,
            )?,
        )?),
    };
    runtime.block_on(async {
        let mut shutdown = signals::on_signal()?.subscribe();
        let page = PageServer::start(parts)?;
        out!("{}", page.url())?;
        // Fails only without a sender; the signal handlers hold one.
        drop(shutdown.wait_for(|stop| *stop).await);
        Ok(ExitCode::SUCCESS)
    })
}

/// Metrics of the processes that the arguments name, or else of those of the first run while it is this user's.
fn live_metrics(arguments: &Arguments, client: MetricsClient) -> anyhow::Result<MetricsPage> {
    if arguments.metrics.is_empty() {
        let run = RunView::new(&arguments.runs[0]);
        return Ok(monitoring::metrics_of_own_run(run, client));
    }
    for url in &arguments.metrics {
        let invalid = |error| UsageError(format!("--metrics {url:?} is not a URL: {error}"));
        Url::parse(url).map_err(invalid)?;
    }
    let urls = arguments.metrics.clone();
    Ok(client.page(move || urls.clone()))
}

/// Logs a warning if the last evaluations of these runs are not comparable.
fn warn_of_differences(runs: &mut [RunView]) -> Result<(), telemetry::TelemetryError> {
    for run in runs.iter_mut() {
        run.refresh()?;
    }
    let evaluations: Vec<_> = runs.iter().filter_map(RunView::evaluation).collect();
    for difference in evaluation_differences(&evaluations) {
        tracing::warn!(difference, "the win rates of these runs cannot be compared");
    }
    Ok(())
}
