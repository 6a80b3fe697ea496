//! The NATS JetStream backend. Streams, the weight store and the registry of a run are on the server and outlive
//! every process.
//!
//! All names on the server contain the run's name, so runs that share a server do not interfere. The leader creates what
//! is missing; other processes need no permission for that. What a restart or a wait cannot fix, such as a server without
//! JetStream or a missing permission, is an error at once. A server that is away is waited for: at the start for the
//! configured timeout, by a running process for the configured outage.

mod access;
mod health;
mod lease_keeper;
mod names;
mod registry;
mod requirements;
mod stream;
mod weight_store;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::jetstream::{self, Context};
use async_nats::rustls::crypto::ring;
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions};
use futures_util::TryStreamExt;
use settings::JetStreamSettings;
use tokio::time::{Instant, sleep, timeout};

use crate::error::TransportError;
use crate::run_key::RunKey;
use health::ConnectionHealth;
use lease_keeper::LeaseKeeper;
use names::RunNames;

pub(crate) use stream::{
    Downstream, HeldMessage, StreamLocation, Upstream, create_dead_letter_stream,
};
pub(crate) use weight_store::NatsWeightStore;

pub use access::{Permissions, RoleAccess};
pub use registry::{KeptEntry, LeaderLease, RegistryEntry, RunRegistry};

/// Beginning of the seed of a user's nkey.
const USER_SEED: &str = "SU";
/// Largest file of a secret, in bytes.
const MAX_SECRET_BYTES: u64 = 1 << 16;
/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Delay before a failed request is retried.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// The server's error code of a stream that does not exist.
const NO_STREAM: &str = "error code 10059";

/// Delay before a warning about a request that keeps failing is repeated.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// A run's connection to its server.
#[derive(Debug)]
pub(crate) struct Connection {
    client: Client,
    context: Context,
    names: RunNames,
    settings: JetStreamSettings,
    lease_keeper: LeaseKeeper,
    health: Arc<ConnectionHealth>,
    key: RunKey,
    /// Whether this process leads the run and creates what is missing.
    leads: bool,
    /// Whether the process has started, after which it waits for a server that is away.
    started: AtomicBool,
}

/// Patience with a failing request: how long it is repeated, and how it is reported meanwhile.
pub(crate) struct RetryState {
    action: String,
    /// Time of the last success, or of the first attempt.
    started: Instant,
    /// Since when the server has been connected and has failed.
    connected: Instant,
    warned: Option<Instant>,
    refusals: u64,
}

impl Connection {
    /// Connects to the server of the run named `run`, as its leader or as another role.
    pub(crate) async fn open(
        settings: &JetStreamSettings,
        run: &str,
        role: &str,
        leads: bool,
    ) -> Result<Arc<Self>, TransportError> {
        let names = RunNames::of(run);
        let key = RunKey::read(settings, run)?;
        if leads {
            key.require_seed()?;
        }
        let health = Arc::new(ConnectionHealth::default());
        let connect = || {
            let events = Arc::clone(&health);
            let options = options(settings)?.custom_inbox_prefix(names.inbox(role));
            Ok::<_, TransportError>(options.event_callback(move |event| {
                let events = Arc::clone(&events);
                async move { events.handle(&event) }
            }))
        };
        let deadline = Instant::now() + Duration::from_secs(settings.timeout_seconds);
        let client = loop {
            let error = match connect()?.connect(&settings.url).await {
                Ok(client) => break client,
                Err(error) => error,
            };
            let reason = one_line(&error);
            let remedy = requirements::remedy_of_connection(&reason);
            if is_final(&error) || remedy.is_some() {
                let url = settings.url.clone();
                let reason = remedy.map_or(reason.clone(), |remedy| format!("{reason}: {remedy}"));
                return Err(TransportError::Rejected { url, reason });
            }
            if Instant::now() > deadline {
                let url = settings.url.clone();
                return Err(TransportError::Unreachable { url, reason });
            }
            sleep(RETRY_DELAY).await;
        };
        requirements::check(&client.server_info(), settings)?;
        let mut context = jetstream::new(client.clone());
        context.set_timeout(REQUEST_TIMEOUT);
        let lease = Duration::from_secs(settings.lease_seconds);
        Ok(Arc::new(Self {
            lease_keeper: LeaseKeeper::start(client.clone(), lease),
            client,
            context,
            names,
            settings: settings.clone(),
            health,
            key,
            leads,
            started: AtomicBool::new(false),
        }))
    }

    /// Records that the process has started: from now on it waits for a server that is away.
    pub(crate) fn set_started(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// Checks that the server takes messages of `bytes` bytes.
    pub(crate) fn require_payload(&self, bytes: usize) -> Result<(), TransportError> {
        let info = self.client.server_info();
        requirements::check_payload(&info, &self.settings, bytes)
    }

    /// State of the connection.
    pub(crate) fn health(&self) -> &ConnectionHealth {
        &self.health
    }

    /// Key of the run.
    pub(crate) fn key(&self) -> &RunKey {
        &self.key
    }

    /// Number of deliveries after which a message is given up.
    pub(crate) fn max_deliveries(&self) -> u32 {
        self.settings.max_deliveries
    }

    /// Time without a heartbeat after which a process counts as dead.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(self.settings.lease_seconds)
    }

    /// Retries `request` until it succeeds, fails for a reason that a retry cannot fix, or its time is up.
    async fn retry<T, E, F>(
        &self,
        action: &str,
        request: impl Fn() -> F,
    ) -> Result<T, TransportError>
    where
        E: std::error::Error,
        F: Future<Output = Result<T, E>>,
    {
        let allowed = Duration::from_secs(self.settings.timeout_seconds);
        let mut retries = self.retry_state(action);
        loop {
            let failure = match timeout(allowed, request()).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => one_line(&error),
                Err(elapsed) => one_line(&elapsed),
            };
            self.on_failure(&mut retries, &failure)?;
            sleep(RETRY_DELAY).await;
        }
    }

    /// State of the retries of with a request that begins now. `action` reads after "failed to".
    pub(crate) fn retry_state(&self, action: &str) -> RetryState {
        RetryState {
            action: action.to_owned(),
            started: Instant::now(),
            connected: Instant::now(),
            warned: None,
            refusals: self.health.refusals(),
        }
    }

    /// Returns if a failed request should be retried, else the final error.
    ///
    /// # Errors
    /// When a retry cannot help, or its time is up: after the configured timeout of a connected server, after the
    /// configured outage of one that is away from a running process, and after both of one that comes and goes.
    pub(crate) fn on_failure(
        &self,
        retries: &mut RetryState,
        failure: &str,
    ) -> Result<(), TransportError> {
        let (now, started) = (Instant::now(), self.started.load(Ordering::Relaxed));
        if let Some(reason) = self.permanent(retries, failure, started) {
            return Err(TransportError::Rejected {
                url: self.settings.url.clone(),
                reason: format!("{}: {reason}", retries.action),
            });
        }
        let waits = started && (self.health.is_disconnected() || requirements::is_absent(failure));
        if waits {
            retries.connected = now;
        }
        let outage = Duration::from_secs(self.settings.max_outage_seconds);
        let allowed = Duration::from_secs(self.settings.timeout_seconds);
        let is_over = now - retries.connected > allowed
            || now - retries.started > if waits { outage } else { outage + allowed };
        if is_over {
            let reason = match requirements::is_storage_full(failure) {
                true => format!("{failure}: {}", requirements::MORE_STORAGE),
                false => failure.to_owned(),
            };
            return Err(self.refused(&retries.action, &reason));
        }
        let storage_full = requirements::is_storage_full(failure);
        if storage_full || now - retries.started > REQUEST_TIMEOUT {
            retries.warn(failure);
        }
        let action = &retries.action;
        tracing::debug!(action, failure, "request failed; retrying");
        Ok(())
    }

    /// The reason and remedy of a failure that a retry cannot fix.
    fn permanent(&self, retries: &RetryState, failure: &str, started: bool) -> Option<String> {
        if let Some(refusal) = self.health.refusal_since(retries.refusals) {
            return Some(requirements::permission(&refusal));
        }
        let remedy = requirements::remedy(failure).or_else(|| match started {
            true => None,
            false => requirements::remedy_at_start(failure, retries.started.elapsed()),
        });
        remedy.map(|remedy| format!("{failure}: {remedy}"))
    }

    pub(crate) fn refused(&self, action: &str, reason: &str) -> TransportError {
        TransportError::Refused {
            action: action.to_owned(),
            url: self.settings.url.clone(),
            reason: reason.to_owned(),
        }
    }

    /// The stream's subjects that start with `prefix`, without it. Uses the subject listing instead of reading
    /// messages: a consumer of a stream whose messages are replaced concurrently may wait for the last one for ever.
    async fn subjects(
        &self,
        stream: String,
        prefix: String,
    ) -> Result<Vec<String>, TransportError> {
        let filter = format!("{prefix}>");
        let subjects = self.messages_by_subject(&stream, &filter).await?;
        let suffixes = subjects.iter();
        let suffixes = suffixes.filter_map(|(subject, _)| subject.strip_prefix(&prefix));
        Ok(suffixes.map(str::to_owned).collect())
    }

    /// The stream's subjects that match `filter`, each with its number of messages.
    async fn messages_by_subject(
        &self,
        stream: &str,
        filter: &str,
    ) -> Result<Vec<(String, usize)>, TransportError> {
        let list = || async {
            let stream = self.context.get_stream(stream).await;
            let stream = stream.map_err(RequestError::of)?;
            let subjects = stream.info_with_subjects(filter).await;
            let subjects = subjects.map_err(RequestError::of)?;
            let subjects = subjects.try_collect::<Vec<_>>().await;
            subjects.map_err(RequestError::of)
        };
        self.retry("list the subjects of a stream", list).await
    }

    /// Waits until all acknowledgements are sent.
    pub(crate) async fn flush(&self) {
        self.lease_keeper.flush().await;
    }

    /// Removes all data of this run from the server: these streams, the dead letters, the weights and the registry.
    pub(crate) async fn remove(&self, streams: &[&str]) -> Result<(), TransportError> {
        let queues = streams.iter().map(|stream| self.names.stream(stream));
        let kept = [
            self.names.stream(names::DEAD_LETTERS),
            self.names.weights_stream(),
            // Last, so that an interrupted removal is found and repeated.
            self.names.registry_stream(),
        ];
        for name in queues.chain(kept) {
            let delete = || async {
                match self.context.delete_stream(&name).await {
                    Err(error) if one_line(&error).contains(NO_STREAM) => Ok(()),
                    deleted => deleted.map(drop),
                }
            };
            self.retry("delete a stream", delete).await?;
        }
        Ok(())
    }
}

impl RetryState {
    /// Begins again, after a success.
    pub(crate) fn restart(&mut self, connection: &Connection) {
        let action = std::mem::take(&mut self.action);
        *self = connection.retry_state(&action);
    }

    /// Begins the timeouts again, after a failure that is waited out without limit.
    pub(crate) fn extend(&mut self) {
        (self.started, self.connected) = (Instant::now(), Instant::now());
    }

    /// Warns at the first call and then once a minute.
    pub(crate) fn warn(&mut self, failure: &str) {
        let now = Instant::now();
        if self.warned.is_none_or(|last| now - last > WARNING_INTERVAL) {
            self.warned = Some(now);
            let (action, seconds) = (&self.action, (now - self.started).as_secs());
            match requirements::is_storage_full(failure) {
                true => tracing::warn!(
                    action,
                    failure,
                    seconds,
                    "the NATS server has no storage left: {}; retrying",
                    requirements::MORE_STORAGE
                ),
                false => tracing::warn!(
                    action,
                    failure,
                    seconds,
                    "the NATS server does not answer or refuses; retrying"
                ),
            }
        }
    }
}

/// Reads every credentials, key and certificate file that the settings name, without connecting.
///
/// # Errors
/// When one cannot be read or is malformed.
pub fn check_files(settings: &JetStreamSettings) -> Result<(), TransportError> {
    RunKey::read(settings, "")?;
    options(settings).map(drop)
}

fn options(settings: &JetStreamSettings) -> Result<ConnectOptions, TransportError> {
    let mut options = ConnectOptions::new()
        .name("agon")
        .connection_timeout(REQUEST_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(Duration::from_secs(5))
        .max_reconnects(None)
        .reconnect_delay_callback(|_| RETRY_DELAY);
    if let Some(pair) = secret(&settings.password_path)? {
        let (user, password) = pair
            .split_once(':')
            .ok_or_else(|| TransportError::Unreadable {
                path: settings.password_path.clone(),
                reason: "it must hold user:password".into(),
            })?;
        options = options.user_and_password(user.to_owned(), password.to_owned());
    }
    if let Some(token) = secret(&settings.token_path)? {
        options = options.token(token);
    }
    if let Some(seed) = secret(&settings.nkey_path)? {
        if !seed.starts_with(USER_SEED) {
            return Err(TransportError::Unreadable {
                path: settings.nkey_path.clone(),
                reason: "it must hold the seed of a user's nkey, which begins with SU".into(),
            });
        }
        options = options.nkey(seed);
    }
    if let Some(credentials) = secret(&settings.credentials_path)? {
        // The parser needs a line break at the end.
        options = options
            .credentials(&format!("{credentials}\n"))
            .map_err(|error| TransportError::Unreadable {
                path: settings.credentials_path.clone(),
                reason: error.to_string(),
            })?;
    }
    with_tls(options, settings)
}

/// Adds what TLS needs.
fn with_tls(
    mut options: ConnectOptions,
    settings: &JetStreamSettings,
) -> Result<ConnectOptions, TransportError> {
    // Explicit, because rustls panics when a build has several providers and none is installed. An error means that
    // one is installed already.
    ring::default_provider().install_default().ok();
    if settings.tls {
        options = options.require_tls(true);
    }
    for path in [
        &settings.ca_path,
        &settings.certificate_path,
        &settings.key_path,
    ] {
        secret(path)?;
    }
    if is_set(&settings.ca_path) {
        options = options.add_root_certificates(settings.ca_path.clone());
    }
    if is_set(&settings.certificate_path) {
        let (certificate, key) = (&settings.certificate_path, &settings.key_path);
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

/// Whether a retry cannot help: authentication failed, or a certificate was rejected.
fn is_final(error: &ConnectError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        // How rustls reports a rejected certificate, of either side.
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData)
        {
            return true;
        }
        cause = error.source();
    }
    matches!(
        error.kind(),
        ConnectErrorKind::ServerParse
            | ConnectErrorKind::Authentication
            | ConnectErrorKind::AuthorizationViolation
            | ConnectErrorKind::Tls
    )
}

pub(crate) fn is_set(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

/// Contents of the file, trimmed; `None` if no file is named.
pub(crate) fn secret(path: &Path) -> Result<Option<String>, TransportError> {
    if !is_set(path) {
        return Ok(None);
    }
    let unreadable = |reason: String| TransportError::Unreadable {
        path: path.to_owned(),
        reason,
    };
    let failed = |error: std::io::Error| unreadable(error.to_string());
    let found = std::fs::metadata(path).map_err(failed)?;
    if !found.is_file() || found.len() > MAX_SECRET_BYTES {
        let reason = format!("it must be a regular file of at most {MAX_SECRET_BYTES} bytes");
        return Err(unreadable(reason));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    match text.trim() {
        "" => Err(unreadable("it is empty".into())),
        secret => Ok(Some(secret.to_owned())),
    }
}

/// An error and its causes in one line.
fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        cause = error.source();
    }
    text
}

/// An error of one of several types, as text.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RequestError(String);

impl RequestError {
    fn of(error: impl std::error::Error) -> Self {
        Self(one_line(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_a_small_file_with_text() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        assert_eq!(secret(Path::new("")).unwrap(), None);
        let good = secret(&file("good", b" token \n")).unwrap();
        assert_eq!(good.as_deref(), Some("token"));
        for (path, expected) in [
            (file("empty", b"\n"), "it is empty"),
            (
                file("large", &vec![b'x'; 1 << 17]),
                "a regular file of at most",
            ),
            (
                Path::new("/dev/zero").to_owned(),
                "a regular file of at most",
            ),
            (folder.path().join("none"), "No such file"),
        ] {
            let error = secret(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }

    #[test]
    fn a_public_key_is_not_taken_for_a_seed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("user.pub");
        std::fs::write(&path, "UABC\n").unwrap();
        let settings =
            settings::resolve("", "test", &["transport.kind=jetstream".parse().unwrap()]);
        let settings::TransportSettings::Jetstream(mut settings) =
            settings.unwrap().settings.transport
        else {
            panic!("it was set");
        };
        settings.nkey_path = path;
        let error = check_files(&settings).unwrap_err().to_string();
        assert!(
            error.contains("user.pub") && error.contains("begins with SU"),
            "{error}"
        );
    }
}
