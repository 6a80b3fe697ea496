//! `agon view`: runs in a browser, also those that have ended or that another process holds.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use reqwest::{Client, Url};
use settings::TelemetrySettings;
use telemetry::{
    Exporter, MetricsPage, PageParts, PageServer, RunView, evaluation_differences, page_token,
};
use tokio::runtime::Handle;

use crate::{failure::Misuse, interrupt, overview, presence::metrics_url};

/// How long a process may take to say what it holds: the page is told once a second.
const PATIENCE: Duration = Duration::from_millis(800);

/// Show runs in a browser: curves, the flow of messages, samples, rounds, settings.
///
/// Reads run directories and changes nothing; a run that goes on is followed. Several runs are laid over
/// one another; a warning says where their evaluations had other stop tokens, chat templates or sampling, or
/// truncated more answers. The address stands on standard output; SIGTERM or Ctrl-C ends it.
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
    /// now. Give one for every process, where the run's targets.json does not tell.
    #[arg(long, value_name = "URL")]
    metrics: Vec<String>,
    /// A file with the token that the page asks for; needed where others reach the address.
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
            [] => everyone(&arguments.runs[0], None, runtime.handle().clone())?,
            urls => {
                for url in urls {
                    let misuse = |why| Misuse(format!("--metrics {url:?} is no address: {why}"));
                    Url::parse(url).map_err(misuse)?;
                }
                let urls = urls.to_vec();
                elsewhere(runtime.handle().clone(), move || urls.clone())?
            }
        }),
    };
    runtime.block_on(async {
        let mut stopped = interrupt::on_signal()?.subscribe();
        let page = PageServer::start(parts)?;
        out!("{}", page.url())?;
        // The sender lives as long as signals are heard.
        drop(stopped.wait_for(|stop| *stop).await);
        Ok(ExitCode::SUCCESS)
    })
}

/// Warns when the last evaluations of these runs cannot be compared.
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

/// What all processes of a run say of themselves: this one directly, when it is one of them, the others as
/// the run's directory tells where they are.
fn everyone(run: &Path, this: Option<&Exporter>, runtime: Handle) -> anyhow::Result<MetricsPage> {
    let (run, own) = (run.to_owned(), this.map(|this| this.address().to_string()));
    let others = elsewhere(runtime, move || {
        let known = overview::watched(&run).into_iter();
        let others = known.filter(|address| Some(address) != own.as_ref());
        others
            .map(|address| format!("http://{address}/metrics"))
            .collect()
    })?;
    let this = this.map(Exporter::page);
    Ok(Arc::new(move || {
        let this = this.as_ref().map(|page| page()).unwrap_or_default();
        this + &others()
    }))
}

/// What processes elsewhere say of themselves; those that do not answer say nothing.
fn elsewhere(
    runtime: Handle,
    urls: impl Fn() -> Vec<String> + Send + Sync + 'static,
) -> anyhow::Result<MetricsPage> {
    let client = Client::builder().timeout(PATIENCE).build()?;
    Ok(Arc::new(move || {
        let page = async |url: String| client.get(url).send().await?.text().await;
        let pages = join_all(urls().into_iter().map(page));
        let pages = runtime.block_on(pages);
        pages.into_iter().map(Result::unwrap_or_default).collect()
    }))
}

/// What shows a run that this process leads, as long as it is kept.
pub(crate) struct Shown {
    /// Where Prometheus finds this process.
    pub(crate) metrics: String,
    _page: Option<PageServer>,
    _exporter: Exporter,
}

/// Shows a run that this process leads: its metrics, its page where the settings want one, and to Prometheus
/// where all its processes are; and says where.
pub(crate) fn beside(telemetry: &TelemetrySettings, run: &Path) -> anyhow::Result<Shown> {
    let exporter = Exporter::start(telemetry.listen)?;
    let metrics = metrics_url(exporter.address());
    exporter.tell_targets(overview::discovery(run));
    let page = telemetry
        .page_address()
        .map(|listen| page(telemetry, listen, run, &exporter))
        .transpose()?;
    tracing::info!(
        run = %run.display(),
        page = page.as_ref().map_or("none", PageServer::address),
        metrics,
        "agon {}",
        env!("CARGO_PKG_VERSION")
    );
    Ok(Shown {
        metrics,
        _page: page,
        _exporter: exporter,
    })
}

fn page(
    telemetry: &TelemetrySettings,
    listen: SocketAddr,
    run: &Path,
    exporter: &Exporter,
) -> anyhow::Result<PageServer> {
    Ok(PageServer::start(PageParts {
        listen,
        token: page_token(&telemetry.token_path)?,
        runs: vec![RunView::new(run)],
        live: Some(everyone(run, Some(exporter), Handle::current())?),
    })?)
}
