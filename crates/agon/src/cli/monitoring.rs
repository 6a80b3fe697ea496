//! Metrics and web page of a run that this process leads, and live metrics of other processes.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use futures_util::future::join_all;
use reqwest::Client;
use settings::TelemetrySettings;
use telemetry::{Exporter, MetricsPage, PageParts, PageServer, RunView, page_token};
use tokio::runtime::Handle;

use crate::cluster::{membership::metrics_url, status};

/// Timeout of a request for another process's metrics; the page refreshes once a second.
const SCRAPE_TIMEOUT: Duration = Duration::from_millis(800);

/// Serves the metrics and the page of a run until it is dropped.
pub(crate) struct Monitoring {
    /// URL of this process's metrics.
    pub(crate) metrics: String,
    _page: Option<PageServer>,
    _exporter: Exporter,
}

impl Monitoring {
    /// Serves the metrics of this process, the scrape targets of all processes of the run in the directory `run`, and
    /// its page if the settings name an address; logs the addresses.
    pub(crate) fn start(telemetry: &TelemetrySettings, run: &Path) -> anyhow::Result<Self> {
        let exporter = Exporter::start(telemetry.listen)?;
        let metrics = metrics_url(exporter.address());
        exporter.set_targets(status::service_discovery(run));
        let page = telemetry
            .page_address()
            .map(|listen| start_page(telemetry, listen, run, &exporter))
            .transpose()?;
        tracing::info!(
            run = %run.display(),
            page = page.as_ref().map_or("none", PageServer::address),
            metrics,
            "agon {}",
            env!("CARGO_PKG_VERSION")
        );
        Ok(Self {
            metrics,
            _page: page,
            _exporter: exporter,
        })
    }
}

fn start_page(
    telemetry: &TelemetrySettings,
    listen: SocketAddr,
    run: &Path,
    exporter: &Exporter,
) -> anyhow::Result<PageServer> {
    Ok(PageServer::start(PageParts {
        listen,
        token: page_token(&telemetry.token_path)?,
        runs: vec![RunView::new(run)],
        live: Some(run_metrics(run, Some(exporter), Handle::current())?),
    })?)
}

/// Metrics of all processes of the run in the directory `run`: those of this process from `own`, if it is one of them,
/// the others' from the addresses that the run directory lists.
pub(crate) fn run_metrics(
    run: &Path,
    own: Option<&Exporter>,
    runtime: Handle,
) -> anyhow::Result<MetricsPage> {
    let own_address = own.map(|exporter| exporter.address().to_string());
    let run = run.to_owned();
    let others = scraped_metrics(runtime, move || {
        let addresses = status::metrics_addresses(&run).into_iter();
        let others = addresses.filter(|address| Some(address) != own_address.as_ref());
        others
            .map(|address| format!("http://{address}/metrics"))
            .collect()
    })?;
    let own = own.map(Exporter::page);
    Ok(Arc::new(move || {
        let own = own.as_ref().map(|page| page()).unwrap_or_default();
        own + &others()
    }))
}

/// Metrics scraped from these URLs; a process that does not respond is left out.
pub(crate) fn scraped_metrics(
    runtime: Handle,
    urls: impl Fn() -> Vec<String> + Send + Sync + 'static,
) -> anyhow::Result<MetricsPage> {
    let client = Client::builder().timeout(SCRAPE_TIMEOUT).build()?;
    Ok(Arc::new(move || {
        let page = async |url: String| client.get(url).send().await?.text().await;
        let pages = join_all(urls().into_iter().map(page));
        let pages = runtime.block_on(pages);
        pages.into_iter().map(Result::unwrap_or_default).collect()
    }))
}
