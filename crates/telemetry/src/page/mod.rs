//! The live page: a run, or several laid over one another, in a browser.
//!
//! One page, all of it in the binary, served from a thread and a runtime of its own, so that busy compute
//! never starves it and it never delays a role. It shows what [`crate::RunView`] reads of run directories
//! and, for a run of this process, what the process says of itself now. Who asks must come to an address
//! of this machine or show a token. It changes nothing.

mod door;
mod events;
mod files;
mod routes;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::server::Server;
use crate::{Error, RunView};
use door::Door;

/// A page of metrics, made anew each time: what a process says of itself, or several one after another.
pub type MetricsPage = Arc<dyn Fn() -> String + Send + Sync>;

/// What a page is made of.
pub struct PageParts {
    /// Where it listens; port 0 takes a free port.
    pub listen: SocketAddr,
    /// What who asks must show; needed where others reach the address.
    pub token: Option<String>,
    /// The runs it shows, at least one.
    pub runs: Vec<RunView>,
    /// What the processes of the first run say of themselves, when they can be asked; it may wait.
    pub live: Option<MetricsPage>,
}

/// The page, served until this is dropped.
pub struct PageServer {
    address: String,
    url: String,
    _server: Server,
}

/// What all requests share.
struct Shared {
    door: Door,
    runs: Vec<Arc<Mutex<RunView>>>,
    live: Option<MetricsPage>,
    events: events::Events,
}

impl PageServer {
    /// Takes the address and serves the page.
    ///
    /// # Errors
    /// When others reach the address and there is no token, the address cannot be listened on, or the
    /// system gives no thread.
    pub fn start(parts: PageParts) -> Result<Self, Error> {
        let PageParts {
            listen,
            token,
            runs,
            live,
        } = parts;
        protected(listen, token.as_deref())?;
        let refused = |source| Error::PageListen {
            address: listen,
            source,
        };
        let shared = Arc::new(Shared {
            door: Door::new(token.as_deref()),
            runs: runs
                .into_iter()
                .map(|run| Arc::new(Mutex::new(run)))
                .collect(),
            live,
            events: events::Events::default(),
        });
        let telling = events::tell(Arc::clone(&shared));
        let server = Server::start("page", listen, refused, routes::router(shared), telling)?;
        let address = format!("http://{}/", server.address());
        let shown = token.as_deref().map(|token| format!("?token={token}"));
        Ok(Self {
            url: address.clone() + &shown.unwrap_or_default(),
            address,
            _server: server,
        })
    }

    /// Whether a page with this token can be served at the address now.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn check(listen: SocketAddr, token: Option<&str>) -> Result<(), Error> {
        protected(listen, token)?;
        let refused = |source| Error::PageListen {
            address: listen,
            source,
        };
        TcpListener::bind(listen).map(drop).map_err(refused)
    }

    /// Where the page is, without the token: fit for a log.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What to type into a browser, the token included.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
}

/// Whether the address is this machine's alone, or a token is asked for.
fn protected(listen: SocketAddr, token: Option<&str>) -> Result<(), Error> {
    match token {
        None if !listen.ip().is_loopback() => Err(Error::PageExposed { address: listen }),
        _ => Ok(()),
    }
}

/// The token in a file; an empty path is no token.
///
/// # Errors
/// When the file cannot be read or holds none.
pub fn page_token(path: &Path) -> Result<Option<String>, Error> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let refuse = |source| Error::PageToken {
        path: path.to_owned(),
        source,
    };
    let text = std::fs::read_to_string(path).map_err(|source| refuse(Some(source)))?;
    let token = text.trim();
    // It travels in an address and in a cookie.
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let is_sound = !token.is_empty() && token.bytes().all(is_plain);
    is_sound
        .then(|| Some(token.to_owned()))
        .ok_or_else(|| refuse(None))
}

#[cfg(test)]
mod tests;
