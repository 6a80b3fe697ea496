//! `agon view`: runs in a browser, whether finished or in progress in another process.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use reqwest::Url;
use telemetry::{PageParts, PageServer, RunView, evaluation_differences, page_token};

use crate::{cli::monitoring, exit_code::UsageError, signals};

/// Show runs in a browser: curves, stages and their messages, samples, APO rounds, settings.
///
/// Reads run directories and changes nothing; a run in progress is followed. The curves of several runs are
/// overlaid; a warning says where their evaluations differ in stop tokens, chat template or sampling, or in the
/// rate of truncated answers. Prints the address on standard output; ends on SIGTERM or Ctrl-C.
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
    /// Needed once per process if the run's targets.json does not list them.
    #[arg(long, value_name = "URL")]
    metrics: Vec<String>,
    /// A file with the page's access token; required on a non-loopback address.
    #[arg(long, value_name = "FILE")]
    token_path: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let runs = arguments.runs.iter().map(RunView::open);
    let mut runs = runs.collect::<Result<Vec<_>, _>>()?;
    warn_of_differences(&mut runs)?;
    let runtime = crate::runtime()?;
    let parts = PageParts {
        listen: arguments.listen,
        token: page_token(arguments.token_path.as_deref().unwrap_or(Path::new("")))?,
        runs,
        live: Some(match arguments.metrics.as_slice() {
            [] => monitoring::run_metrics(&arguments.runs[0], None, runtime.handle().clone())?,
            urls => {
                for url in urls {
                    let invalid =
                        |error| UsageError(format!("--metrics {url:?} is not a URL: {error}"));
                    Url::parse(url).map_err(invalid)?;
                }
                let urls = urls.to_vec();
                monitoring::scraped_metrics(runtime.handle().clone(), move || urls.clone())?
            }
        }),
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

/// Logs a warning if the last evaluations of these runs are not comparable.
fn warn_of_differences(runs: &mut [RunView]) -> Result<(), telemetry::Error> {
    for run in runs.iter_mut() {
        run.refresh()?;
    }
    let evaluations: Vec<_> = runs.iter().filter_map(RunView::evaluation).collect();
    for difference in evaluation_differences(&evaluations) {
        tracing::warn!("the win rates of these runs cannot be compared: {difference}");
    }
    Ok(())
}
