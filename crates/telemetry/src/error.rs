//! Errors of telemetry, one variant per remedy.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A telemetry error; the cause, if any, is the error's source.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The directory of a new run already contains a run.
    #[error(
        "failed to create a run in {}: it already contains one; continue it with `--resume`, or choose another `run.name` or `--run-dir`",
        directory.display()
    )]
    RunExists {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory of a run to resume contains no run.
    #[error("failed to resume the run in {}: it contains no config.toml; leave out `--resume` to start a run there", directory.display())]
    RunMissing {
        /// The directory.
        directory: PathBuf,
    },
    /// Another process has locked the run.
    #[error(
        "failed to lock the run in {}: it is in use by another process ({holder}); stop that one, or choose another `run.name` or `--run-dir`",
        directory.display()
    )]
    RunInUse {
        /// The directory.
        directory: PathBuf,
        /// The lock's holder: `pid N`, or that the process id is unknown.
        holder: String,
    },
    /// The directory of a run to view contains no run.
    #[error("failed to open the run in {}: it contains neither config.toml nor metrics.jsonl; name a run directory, such as runs/quickstart", directory.display())]
    NoRun {
        /// The directory.
        directory: PathBuf,
    },
    /// The configuration file of a run is not valid TOML.
    #[error("failed to read {}: it is not the configuration of a run", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        source: Box<toml::de::Error>,
    },
    /// The page's address is in use or does not belong to this machine.
    #[error(
        "failed to serve the page on {address}: set `telemetry.page` (or `--listen`) to a free address of this machine (port 0 picks a free port), or stop the process that uses this one"
    )]
    PageListen {
        /// The address.
        address: SocketAddr,
        /// The I/O error.
        source: io::Error,
    },
    /// The page would be readable without authentication from other machines.
    #[error(
        "failed to serve the page on {address}: an address reachable from other machines needs a token; name its file with `telemetry.token_path` (or `--token-path`), or listen on 127.0.0.1"
    )]
    PageExposed {
        /// The address.
        address: SocketAddr,
    },
    /// The metrics would be readable without authentication from other machines.
    #[error(
        "failed to serve metrics on {address}: an address reachable from other machines needs a token; name its file with `telemetry.token_path`, or set `telemetry.listen` to an address of 127.0.0.1"
    )]
    ExporterExposed {
        /// The address.
        address: SocketAddr,
    },
    /// A token file is missing or contains no valid token.
    #[error(
        "failed to read the token in {}: it must contain one line of at least 16 letters, digits and -._~, such as openssl rand \
         -hex 32 prints", path.display()
    )]
    Token {
        /// The file.
        path: PathBuf,
        /// The I/O error; `None` where the content is invalid.
        source: Option<io::Error>,
    },
    /// A file operation failed.
    #[error("failed to {action} {}", path.display())]
    File {
        /// The operation, a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// A document of a run is not JSON.
    #[error("failed to read {}: it is not valid JSON; the process that writes it replaces it", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// A line of a log does not have the format of this build.
    #[error("failed to read line {line} of {}; remove the line, or read the file with the build that wrote it", path.display())]
    Line {
        /// The log.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// A measurement has the name of a reserved column of the journal.
    #[error(
        "failed to journal the measurement `{name}`: the journal reserves a column of that name; rename the measurement"
    )]
    ReservedName {
        /// The measurement's name.
        name: String,
    },
    /// The exporter's address is in use or does not belong to this machine.
    #[error(
        "failed to listen on {address}: set `telemetry.listen` to a free address of this machine (port 0 picks a free port), or stop the process that uses this one"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The I/O error.
        source: io::Error,
    },
    /// The process already has a global metrics recorder.
    #[error(
        "failed to start an exporter: this process already has a metrics recorder; start one exporter and share it"
    )]
    RecorderInstalled,
    /// A thread could not be spawned.
    #[error("failed to start the thread {name}")]
    Thread {
        /// The thread's name.
        name: String,
        /// The I/O error.
        source: io::Error,
    },
}

impl TelemetryError {
    /// A closure for `map_err` that adds the operation and the path to an I/O error.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

impl messages::Classified for TelemetryError {
    fn class(&self) -> messages::ErrorClass {
        messages::ErrorClass::Resource
    }
}
