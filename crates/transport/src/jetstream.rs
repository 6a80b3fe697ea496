//! The transport between processes: NATS JetStream. Streams, the shelf and the register of a run live on
//! the server and outlive every process.
//!
//! Everything of a run has the run's name in its own: runs that share a server do not meet. Whoever comes
//! first makes what is missing. A server that goes away is waited for, as long as the settings say.

mod keeper;
mod register;
mod shelf;
mod stream;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, Context};
use async_nats::rustls::crypto::ring;
use async_nats::{ConnectError, ConnectErrorKind, ConnectOptions, Event};
use futures_util::TryStreamExt;
use settings::JetStreamSettings;
use tokio::time::{Instant, sleep, timeout_at};

use crate::TransportError;
use keeper::Keeper;

pub(crate) use keeper::Lease;
pub(crate) use shelf::JetShelf;
pub(crate) use stream::{Downstream, Place, Upstream, make_dead_letters};

pub use register::{Claim, Entry, Register};

/// How long the server may take for one answer before it is asked again.
const ANSWER: Duration = Duration::from_secs(5);

/// The pause before a server that could not be reached is tried again.
const PAUSE: Duration = Duration::from_millis(250);

/// A run's connection to its server.
#[derive(Debug)]
pub(crate) struct Connection {
    context: Context,
    run: String,
    settings: JetStreamSettings,
    keeper: Keeper,
}

impl Connection {
    /// Connects for the run of this name.
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
                    reason: sentence(&error),
                });
            }
            sleep(PAUSE).await;
        };
        let mut context = jetstream::new(client.clone());
        context.set_timeout(ANSWER);
        let lease = Duration::from_secs(settings.lease_seconds);
        Ok(Arc::new(Self {
            keeper: Keeper::start(client, lease),
            context,
            run: run.to_owned(),
            settings: settings.clone(),
        }))
    }

    /// What `part` of this run is called on the server.
    fn name(&self, part: &str) -> String {
        format!("agon-{}-{}", self.run, part.replace(' ', "-"))
    }

    /// The subject of `part`'s messages.
    fn subject(&self, part: &str) -> String {
        self.name(part).replacen('-', ".", 1)
    }

    /// How often a message is delivered before it is given up.
    pub(crate) fn max_deliveries(&self) -> u32 {
        self.settings.max_deliveries
    }

    /// How long a process may be silent before it counts as gone.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(self.settings.lease_seconds)
    }

    /// Asks the server until it answers, or has not for as long as the settings allow, whatever a single
    /// question waits for.
    async fn insist<T, E, F>(&self, action: &str, ask: impl Fn() -> F) -> Result<T, TransportError>
    where
        E: std::error::Error,
        F: Future<Output = Result<T, E>>,
    {
        let deadline = Instant::now() + Duration::from_secs(self.settings.timeout_seconds);
        loop {
            match timeout_at(deadline, ask()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if Instant::now() > deadline => {
                    return Err(self.refused(action, &error));
                }
                Ok(Err(error)) => tracing::debug!(action, error = sentence(&error), "asked again"),
                Err(late) => return Err(self.refused(action, &late)),
            }
            sleep(PAUSE).await;
        }
    }

    /// What of a stream's subjects begins so, without that beginning. Asked for, not read from the messages:
    /// a reader of a stream whose messages are replaced meanwhile may wait for ever for the last of them.
    async fn subjects(
        &self,
        stream: String,
        beginning: String,
    ) -> Result<Vec<String>, TransportError> {
        let listed = || async {
            let stream = self.context.get_stream(&stream).await.map_err(Failed::of)?;
            let found = stream.info_with_subjects(format!("{beginning}>")).await;
            let found = found.map_err(Failed::of)?;
            found.try_collect::<Vec<_>>().await.map_err(Failed::of)
        };
        let listed = self.insist("list what a stream holds", listed).await?;
        let endings = listed.iter();
        let endings = endings.filter_map(|(subject, _)| subject.strip_prefix(&beginning));
        Ok(endings.map(str::to_owned).collect())
    }

    fn refused(&self, action: &str, error: &dyn std::error::Error) -> TransportError {
        TransportError::Refused {
            action: action.to_owned(),
            url: self.settings.url.clone(),
            reason: sentence(error),
        }
    }

    /// Waits until everything that was acknowledged is on its way.
    pub(crate) async fn flush(&self) {
        self.keeper.flush().await;
    }

    /// Removes everything of this run from the server.
    pub(crate) async fn remove(&self) -> Result<(), TransportError> {
        let prefix = self.name("");
        let parts = [
            prefix.clone(),
            format!("KV_{prefix}"),
            format!("OBJ_{prefix}"),
        ];
        let listed = self.context.stream_names().try_collect::<Vec<_>>().await;
        let names = listed.map_err(|error| self.refused("list streams", &error))?;
        for name in names {
            if parts.iter().any(|part| name.starts_with(part)) {
                let deleted = self.context.delete_stream(&name).await;
                deleted.map_err(|error| self.refused("delete a stream", &error))?;
            }
        }
        Ok(())
    }
}

/// Opens every file that the settings name, as a connection does, without connecting.
///
/// # Errors
/// When one cannot be read or does not hold what it should.
pub fn check_files(settings: &JetStreamSettings) -> Result<(), TransportError> {
    options(settings).map(drop)
}

fn options(settings: &JetStreamSettings) -> Result<ConnectOptions, TransportError> {
    let mut options = ConnectOptions::new()
        .name("agon")
        .connection_timeout(ANSWER)
        .request_timeout(Some(ANSWER))
        .ping_interval(Duration::from_secs(5))
        .max_reconnects(None)
        .reconnect_delay_callback(|_| PAUSE)
        .event_callback(async |event| match event {
            Event::Disconnected => tracing::warn!("the connection to the server is lost"),
            Event::Connected => tracing::debug!("connected to the server"),
            other => tracing::debug!(%other, "the server"),
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
        // Its last line must end.
        options = options
            .credentials(&format!("{credentials}\n"))
            .map_err(|error| TransportError::Unreadable {
                path: settings.credentials_path.clone(),
                reason: error.to_string(),
            })?;
    }
    // Said aloud, for rustls does not choose where a build has several, and panics. An error means that it has
    // been said before.
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

/// Whether trying again would not help: the server is there and does not let this process in, or is not to be
/// trusted.
fn is_final(error: &ConnectError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(of) = cause {
        // What rustls makes of a certificate, its own or the other side's.
        if of
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData)
        {
            return true;
        }
        cause = of.source();
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

/// What the file says, without the white space around it; `None` when no file is named.
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
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

/// An error of several kinds, as text.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String);

impl Failed {
    fn of(error: impl std::error::Error) -> Self {
        Self(sentence(&error))
    }
}
