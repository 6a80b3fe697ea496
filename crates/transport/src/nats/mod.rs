//! The NATS JetStream backend. Streams, the weight store and the registry of a run are on the server and outlive
//! every process.
//!
//! All names on the server contain the run's name, so runs that share a server do not interfere. The first process
//! creates what is missing. Requests to an unavailable server are retried for the configured timeout.

mod lease_keeper;
mod registry;
mod stream;
mod weight_store;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, Context};
use async_nats::rustls::crypto::ring;
use async_nats::{ConnectError, ConnectErrorKind, ConnectOptions, Event};
use futures_util::TryStreamExt;
use settings::JetStreamSettings;
use tokio::time::{Instant, sleep, timeout_at};

use crate::error::TransportError;
use lease_keeper::LeaseKeeper;

pub(crate) use lease_keeper::Lease;
pub(crate) use stream::{Downstream, StreamLocation, Upstream, create_dead_letter_stream};
pub(crate) use weight_store::NatsWeightStore;

pub use registry::{LeaderLease, RegistryEntry, RunRegistry};

/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Delay before a failed request is retried.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// A run's connection to its server.
#[derive(Debug)]
pub(crate) struct Connection {
    context: Context,
    run: String,
    settings: JetStreamSettings,
    lease_keeper: LeaseKeeper,
}

impl Connection {
    /// Connects to the server of the run named `run`.
    pub(crate) async fn open(
        settings: &JetStreamSettings,
        run: &str,
    ) -> Result<Arc<Self>, TransportError> {
        let deadline = Instant::now() + Duration::from_secs(settings.timeout_seconds);
        let client = loop {
            let error = match options(settings)?.connect(&settings.url).await {
                Ok(client) => break client,
                Err(error) => error,
            };
            if is_final(&error) || Instant::now() > deadline {
                return Err(TransportError::Unreachable {
                    url: settings.url.clone(),
                    reason: one_line(&error),
                });
            }
            sleep(RETRY_DELAY).await;
        };
        let mut context = jetstream::new(client.clone());
        context.set_timeout(REQUEST_TIMEOUT);
        let lease = Duration::from_secs(settings.lease_seconds);
        Ok(Arc::new(Self {
            lease_keeper: LeaseKeeper::start(client, lease),
            context,
            run: run.to_owned(),
            settings: settings.clone(),
        }))
    }

    /// Name of `part` of this run on the server.
    fn name(&self, part: &str) -> String {
        format!("agon-{}-{}", self.run, part.replace(' ', "-"))
    }

    /// Subject of the messages of `part`.
    fn subject(&self, part: &str) -> String {
        self.name(part).replacen('-', ".", 1)
    }

    /// Number of deliveries after which a message is given up.
    pub(crate) fn max_deliveries(&self) -> u32 {
        self.settings.max_deliveries
    }

    /// Time without a heartbeat after which a process counts as dead.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(self.settings.lease_seconds)
    }

    /// Retries `request` until it succeeds or the configured timeout has passed.
    async fn retry<T, E, F>(
        &self,
        action: &str,
        request: impl Fn() -> F,
    ) -> Result<T, TransportError>
    where
        E: std::error::Error,
        F: Future<Output = Result<T, E>>,
    {
        let deadline = Instant::now() + Duration::from_secs(self.settings.timeout_seconds);
        loop {
            match timeout_at(deadline, request()).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) if Instant::now() > deadline => {
                    return Err(self.refused(action, &error));
                }
                Ok(Err(error)) => {
                    tracing::debug!(action, error = one_line(&error), "request failed; retrying");
                }
                Err(elapsed) => return Err(self.refused(action, &elapsed)),
            }
            sleep(RETRY_DELAY).await;
        }
    }

    /// The stream's subjects that start with `prefix`, without it. Uses the subject listing instead of reading
    /// messages: a consumer of a stream whose messages are replaced concurrently may wait for the last one for ever.
    async fn subjects(
        &self,
        stream: String,
        prefix: String,
    ) -> Result<Vec<String>, TransportError> {
        let list = || async {
            let stream = self
                .context
                .get_stream(&stream)
                .await
                .map_err(RequestError::of)?;
            let subjects = stream.info_with_subjects(format!("{prefix}>")).await;
            let subjects = subjects.map_err(RequestError::of)?;
            subjects
                .try_collect::<Vec<_>>()
                .await
                .map_err(RequestError::of)
        };
        let subjects = self.retry("list the subjects of a stream", list).await?;
        let suffixes = subjects.iter();
        let suffixes = suffixes.filter_map(|(subject, _)| subject.strip_prefix(&prefix));
        Ok(suffixes.map(str::to_owned).collect())
    }

    fn refused(&self, action: &str, error: &dyn std::error::Error) -> TransportError {
        TransportError::Refused {
            action: action.to_owned(),
            url: self.settings.url.clone(),
            reason: one_line(error),
        }
    }

    /// Waits until all acknowledgements are sent.
    pub(crate) async fn flush(&self) {
        self.lease_keeper.flush().await;
    }

    /// Removes all data of this run from the server.
    pub(crate) async fn remove(&self) -> Result<(), TransportError> {
        let prefix = self.name("");
        let prefixes = [
            prefix.clone(),
            format!("KV_{prefix}"),
            format!("OBJ_{prefix}"),
        ];
        let listed = self.context.stream_names().try_collect::<Vec<_>>().await;
        let names = listed.map_err(|error| self.refused("list streams", &error))?;
        for name in names {
            if prefixes.iter().any(|prefix| name.starts_with(prefix)) {
                let deleted = self.context.delete_stream(&name).await;
                deleted.map_err(|error| self.refused("delete a stream", &error))?;
            }
        }
        Ok(())
    }
}

/// Reads every credentials, key and certificate file that the settings name, without connecting.
///
/// # Errors
/// When one cannot be read or is malformed.
pub fn check_files(settings: &JetStreamSettings) -> Result<(), TransportError> {
    options(settings).map(drop)
}

fn options(settings: &JetStreamSettings) -> Result<ConnectOptions, TransportError> {
    let mut options = ConnectOptions::new()
        .name("agon")
        .connection_timeout(REQUEST_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(Duration::from_secs(5))
        .max_reconnects(None)
        .reconnect_delay_callback(|_| RETRY_DELAY)
        .event_callback(async |event| match event {
            Event::Disconnected => tracing::warn!("the connection to the NATS server is lost"),
            Event::Connected => tracing::debug!("connected to the NATS server"),
            other => tracing::debug!(%other, "event of the NATS client"),
        });
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

fn is_set(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

/// Contents of the file, trimmed; `None` if no file is named.
fn secret(path: &Path) -> Result<Option<String>, TransportError> {
    if !is_set(path) {
        return Ok(None);
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) => Err(TransportError::Unreadable {
            path: path.to_owned(),
            reason: error.to_string(),
        }),
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
