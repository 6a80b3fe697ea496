//! Metrics and web page of a run that this process leads, and live metrics of other processes.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use futures_util::future::join_all;
use reqwest::{Client, redirect::Policy};
use settings::TelemetrySettings;
use telemetry::http::read_token;
use telemetry::{Exporter, MetricsPage, PageParts, PageServer, RunView};
use tokio::runtime::Handle;

use crate::cluster::{membership::metrics_url, status};

/// Timeout of a request for another process's metrics; the page refreshes once a second.
const SCRAPE_TIMEOUT: Duration = Duration::from_millis(800);

/// Maximum size of another process's metrics in bytes.
const MAX_SCRAPE_BYTES: usize = 8 << 20;

/// Maximum number of processes that are asked.
const MAX_SCRAPED: usize = 256;

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
        let exporter = Exporter::start(telemetry.listen, &telemetry.token_path)?;
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
    let token = read_token(&telemetry.token_path)?;
    let client = MetricsClient::new(Handle::current(), token.clone())?;
    Ok(PageServer::start(PageParts {
        listen,
        token,
        runs: vec![RunView::new(run)],
        live: Some(metrics_of_led_run(run, exporter, client)),
    })?)
}

/// Metrics of all processes of the run that this process leads: its own, and those of the processes that the run
/// directory lists.
fn metrics_of_led_run(run: &Path, own: &Exporter, client: MetricsClient) -> MetricsPage {
    let own_address = own.address().to_string();
    let run = run.to_owned();
    let others = client.page(move || {
        let mut addresses = status::metrics_addresses(&run);
        addresses.retain(|address| *address != own_address);
        urls(&addresses)
    });
    let own = own.page();
    Arc::new(move || own() + &others())
}

/// Metrics of the processes that a run directory lists, while a process of this user runs there: a directory that
/// somebody sent must not cause requests.
pub(crate) fn metrics_of_own_run(run: RunView, client: MetricsClient) -> MetricsPage {
    client.page(move || match run.is_own() {
        true => urls(&status::metrics_addresses(run.root())),
        false => Vec::new(),
    })
}

fn urls(addresses: &[String]) -> Vec<String> {
    let addresses = addresses.iter();
    addresses
        .map(|address| format!("http://{address}/metrics"))
        .collect()
}

/// Client for the metrics of other processes. It follows no redirects, so that its token reaches no other address.
#[derive(Clone)]
pub(crate) struct MetricsClient {
    runtime: Handle,
    client: Client,
    token: Option<String>,
}

impl MetricsClient {
    /// A client that shows this token.
    pub(crate) fn new(runtime: Handle, token: Option<String>) -> anyhow::Result<Self> {
        let client = Client::builder()
            .timeout(SCRAPE_TIMEOUT)
            .redirect(Policy::none())
            .no_proxy()
            .build()?;
        Ok(Self {
            runtime,
            client,
            token,
        })
    }

    /// Metrics scraped from these URLs; a process that does not respond is left out.
    pub(crate) fn page(
        self,
        urls: impl Fn() -> Vec<String> + Send + Sync + 'static,
    ) -> MetricsPage {
        Arc::new(move || {
            let urls = urls().into_iter().take(MAX_SCRAPED);
            let pages = join_all(urls.map(|url| self.scrape(url)));
            let pages = self.runtime.block_on(pages);
            pages.into_iter().map(Option::unwrap_or_default).collect()
        })
    }

    /// Metrics at this URL, if they arrive in time and are not too many.
    async fn scrape(&self, url: String) -> Option<String> {
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let mut response = request.send().await.ok()?.error_for_status().ok()?;
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.ok()? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_SCRAPE_BYTES {
                return None;
            }
        }
        String::from_utf8(bytes).ok()
    }
}
