//! Live web page of one or several runs.
//!
//! A single page, embedded in the binary and served from a thread and a runtime of its own, so that busy compute
//! never starves it and it never delays a role. It shows what [`crate::RunView`] reads from run directories and,
//! for the first run, the current metrics of its processes. Requests must use a loopback address or present a
//! token. It writes nothing but the verdicts that people give on it.

mod access;
mod events;
mod files;
mod routes;
mod verdicts;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use crate::http::{AccessControl, is_exposed};
use crate::metrics::exporter::MetricsPage;
use crate::server::HttpServer;
use crate::{error::TelemetryError, view::RunView};

/// Configuration of a page.
pub struct PageParts {
    /// Listen address; port 0 picks a free port.
    pub listen: SocketAddr,
    /// Bearer token; required when listening on a non-loopback address.
    pub token: Option<String>,
    /// The displayed runs, at least one.
    pub runs: Vec<RunView>,
    /// Current metrics of the first run's processes, if available; the call may block.
    pub live: Option<MetricsPage>,
}

/// Server of the page; it serves until dropped.
pub struct PageServer {
    address: String,
    url: String,
    _server: HttpServer,
}

/// State shared by all requests.
struct PageState {
    access: AccessControl,
    runs: Vec<Arc<Mutex<RunView>>>,
    live: Option<MetricsPage>,
    events: events::EventChannel,
}

impl PageServer {
    /// Binds the address and serves the page.
    ///
    /// # Errors
    /// When the address is not loopback and there is no token, the address cannot be bound, or a thread cannot be
    /// spawned.
    pub fn start(parts: PageParts) -> Result<Self, TelemetryError> {
        let PageParts {
            listen,
            token,
            runs,
            live,
        } = parts;
        require_protection(listen, token.as_deref())?;
        let bind_error = |source| TelemetryError::PageListen {
            address: listen,
            source,
        };
        let state = Arc::new(PageState {
            access: AccessControl::new(token.as_deref()),
            runs: runs
                .into_iter()
                .map(|run| Arc::new(Mutex::new(run)))
                .collect(),
            live,
            events: events::EventChannel::default(),
        });
        state
            .runs
            .first()
            .iter()
            .for_each(|run| verdicts::announce(run));
        let broadcast = events::broadcast(Arc::clone(&state));
        let server =
            HttpServer::start("page", listen, bind_error, routes::router(state), broadcast)?;
        let address = format!("http://{}/", server.address());
        let query = token.as_deref().map(|token| format!("?token={token}"));
        Ok(Self {
            url: address.clone() + &query.unwrap_or_default(),
            address,
            _server: server,
        })
    }

    /// Checks that a page with this token can be served at the address now.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn check(listen: SocketAddr, token: Option<&str>) -> Result<(), TelemetryError> {
        require_protection(listen, token)?;
        let bind_error = |source| TelemetryError::PageListen {
            address: listen,
            source,
        };
        TcpListener::bind(listen).map(drop).map_err(bind_error)
    }

    /// The page's URL without the token, for logs.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The page's URL including the token.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
}

/// Checks that the address is loopback or a token is set.
fn require_protection(listen: SocketAddr, token: Option<&str>) -> Result<(), TelemetryError> {
    match is_exposed(listen.ip(), token.is_some()) {
        true => Err(TelemetryError::PageExposed { address: listen }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;
