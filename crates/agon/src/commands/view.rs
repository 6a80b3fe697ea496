//! `agon view`: runs in a browser, also those that have ended or that another process holds.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use settings::TelemetrySettings;
use telemetry::{Exporter, PageParts, PageServer, RunView, page_token};

use crate::interrupt;

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
    /// A file with the token that the page asks for; needed where others reach the address.
    #[arg(long, value_name = "FILE")]
    token_path: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let runs = arguments.runs.iter().map(RunView::open);
    let parts = PageParts {
        listen: arguments.listen,
        token: page_token(arguments.token_path.as_deref().unwrap_or(Path::new("")))?,
        runs: runs.collect::<Result<_, _>>()?,
        live: None,
    };
    crate::runtime()?.block_on(async {
        let mut stopped = interrupt::on_signal()?.subscribe();
        let page = PageServer::start(parts)?;
        println!("{}", page.url());
        // The sender lives as long as signals are heard.
        drop(stopped.wait_for(|stop| *stop).await);
        Ok(ExitCode::SUCCESS)
    })
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
