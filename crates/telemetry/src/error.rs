//! What can go wrong here, by what the caller can do about it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why telemetry could not do what it was asked. Every message reads after "failed to"; the cause,
/// where there is one, is the error's source.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory of a new run holds a run already.
    #[error(
        "create a run in {}: it already holds one; continue it with `--resume`, or choose another `run.name` or `--run-dir`",
        directory.display()
    )]
    RunExists {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory of a run to resume holds none.
    #[error("resume the run in {}: it holds no config.toml; leave out `--resume` to start a run there", directory.display())]
    RunMissing {
        /// The directory.
        directory: PathBuf,
    },
    /// Another process holds the run.
    #[error(
        "lock the run in {}: it is in use by another process ({holder}); stop that one, or choose another `run.name` or `--run-dir`",
        directory.display()
    )]
    RunInUse {
        /// The directory.
        directory: PathBuf,
        /// What the lock file says of the holder: `pid N`, or that it says nothing.
        holder: String,
    },
    /// The directory of a run to look at holds none.
    #[error("look at the run in {}: it holds neither config.toml nor metrics.jsonl; name a run directory, such as runs/quickstart", directory.display())]
    NoRun {
        /// The directory.
        directory: PathBuf,
    },
    /// The settings of a run are not TOML.
    #[error("read {}: it is not the configuration of a run", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<toml::de::Error>,
    },
    /// The page's address is taken or is not this machine's.
    #[error(
        "serve the page on {address}: set `telemetry.page` (or `--listen`) to a free address of this machine (port 0 picks a free port), or stop what holds this one"
    )]
    PageListen {
        /// The address.
        address: SocketAddr,
        /// Why it was refused.
        source: io::Error,
    },
    /// The page would be open to everyone who reaches this machine.
    #[error(
        "serve the page on {address}: an address that others reach needs a token; name its file with `telemetry.token_path` (or `--token-path`), or listen on 127.0.0.1"
    )]
    PageExposed {
        /// The address.
        address: SocketAddr,
    },
    /// The file of the page's token is missing or holds no token.
    #[error(
        "read the page's token from {}: it must hold one line of printable characters without spaces", path.display()
    )]
    PageToken {
        /// The file.
        path: PathBuf,
        /// Why it could not be read, where it could not.
        source: Option<io::Error>,
    },
    /// The operating system refused a file operation.
    #[error("{action} {}", path.display())]
    File {
        /// What was to be done with the file.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it was refused.
        source: io::Error,
    },
    /// A line of a log is not what this build writes.
    #[error("read line {line} of {}; remove the line, or read the file with the build that wrote it", path.display())]
    Line {
        /// The log.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A measurement has the name of a column that the journal fills itself.
    #[error(
        "journal the measurement `{name}`: the journal has a column of that name; rename the measurement"
    )]
    ReservedName {
        /// The measurement's name.
        name: String,
    },
    /// The exporter's address is taken or is not this machine's.
    #[error(
        "listen on {address}: set `telemetry.listen` to a free address of this machine (port 0 picks a free port), or stop what holds this one"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why it was refused.
        source: io::Error,
    },
    /// A process has one metrics recorder, and it has been installed.
    #[error(
        "start an exporter: this process has a metrics recorder already; start one exporter and share it"
    )]
    RecorderInstalled,
    /// The operating system refused a thread.
    #[error("start the thread {name}")]
    Thread {
        /// The thread's name.
        name: String,
        /// Why it was refused.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: what was being done, and with which file.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
