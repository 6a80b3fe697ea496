//! `agon view`: runs in a browser, also those that have ended or that another process holds.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use reqwest::{Client, Url};
use settings::TelemetrySettings;
use telemetry::{Exporter, MetricsPage, PageParts, PageServer, RunView, page_token};
use tokio::runtime::Handle;

use crate::{failure::Misuse, interrupt};

/// How long a process may take to say what it holds: the page is told once a second.
const PATIENCE: Duration = Duration::from_millis(800);

/// Show runs in a browser: curves, the flow of messages, samples, rounds, settings.
///
/// Reads run directories and changes nothing; a run that goes on is followed. Several runs are laid over
/// one another. The address stands on standard output; SIGTERM or Ctrl-C ends it.
///
/// Example: agon view runs/quickstart runs/another
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The run directories.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where to serve; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where a process of the first run serves its metrics, as it printed: shows what it holds and waits for
    /// now. Give one for every process.
    #[arg(long, value_name = "URL")]
    metrics: Vec<String>,
    /// A file with the token that the page asks for; needed where others reach the address.
    #[arg(long, value_name = "FILE")]
    token_path: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let runs = arguments.runs.iter().map(RunView::open);
    let runtime = crate::runtime()?;
    let parts = PageParts {
        listen: arguments.listen,
        token: page_token(arguments.token_path.as_deref().unwrap_or(Path::new("")))?,
        runs: runs.collect::<Result<_, _>>()?,
        live: elsewhere(&arguments.metrics, runtime.handle().clone())?,
    };
    runtime.block_on(async {
        let mut stopped = interrupt::on_signal()?.subscribe();
        let page = PageServer::start(parts)?;
        println!("{}", page.url());
        // The sender lives as long as signals are heard.
        drop(stopped.wait_for(|stop| *stop).await);
        Ok(ExitCode::SUCCESS)
    })
}

/// What processes elsewhere say of themselves; those that do not answer say nothing.
fn elsewhere(urls: &[String], runtime: Handle) -> anyhow::Result<Option<MetricsPage>> {
    if urls.is_empty() {
        return Ok(None);
    }
    let client = Client::builder().timeout(PATIENCE).build()?;
    let mut asked = Vec::new();
    for url in urls {
        let misuse = |why| Misuse(format!("--metrics {url:?} is no address: {why}"));
        asked.push(Url::parse(url).map_err(misuse)?);
    }
    Ok(Some(Arc::new(move || {
        let page = async |url: &Url| client.get(url.clone()).send().await?.text().await;
        let pages = asked.iter().map(|url| runtime.block_on(page(url)));
        pages.map(Result::unwrap_or_default).collect()
    })))
}

/// The page of a run of this process, where the settings want one.
pub(crate) fn beside(
    telemetry: &TelemetrySettings,
    run: &Path,
    exporter: &Exporter,
) -> anyhow::Result<Option<PageServer>> {
    let Some(listen) = telemetry.page_address() else {
        return Ok(None);
    };
    let parts = PageParts {
        listen,
        token: page_token(&telemetry.token_path)?,
        runs: vec![RunView::new(run)],
        live: Some(exporter.page()),
    };
    Ok(Some(PageServer::start(parts)?))
}
