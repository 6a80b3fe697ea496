//! Arguments and start of a process that joins a run over JetStream: the same for actors and preference services.

use settings::Settings;
use telemetry::Exporter;
use tokio::sync::watch;

use crate::{
    cluster::{
        ClusterSession, ProcessNames,
        membership::{host, metrics_url},
        server_users::ServerRole,
    },
    exit_code::UsageError,
    signals,
};

// The structs here have no doc comment: clap would show it in place of the command's own.
#[derive(clap::Args)]
pub(crate) struct StdinArgument {
    /// Stop when standard input ends, as on SIGTERM: for a parent process that supervises this one.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

impl StdinArgument {
    /// The shutdown watch of this process.
    pub(crate) fn shutdown(&self) -> anyhow::Result<watch::Sender<bool>> {
        signals::on_signal_or_end(self.end_with_stdin)
    }
}

#[derive(clap::Args)]
pub(crate) struct JoinArguments {
    /// The process's name in pairs, metrics and status; host name and process id by default.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    stdin: StdinArgument,
}

/// A process that is connected to its run's server.
pub(crate) struct JoinedProcess {
    /// The connection.
    pub(crate) session: ClusterSession,
    /// Turns true when the process is to stop.
    pub(crate) shutdown: watch::Sender<bool>,
    /// Serves metrics until it is dropped.
    _exporter: Exporter,
}

impl JoinArguments {
    /// Serves metrics, installs signal handlers, connects to the server and waits for the run to be there. `None` when
    /// shutdown is requested.
    pub(crate) async fn connect(
        &self,
        settings: &Settings,
        role: ServerRole,
    ) -> anyhow::Result<Option<JoinedProcess>> {
        let name = process_name(self.name.as_deref())?;
        let exporter = Exporter::start(settings.telemetry.listen, &settings.telemetry.token_path)?;
        let metrics = metrics_url(exporter.address());
        tracing::info!(name, metrics, "agon {}", env!("CARGO_PKG_VERSION"));
        let shutdown = self.stdin.shutdown()?;
        let names = ProcessNames { name, metrics };
        let mut requested = shutdown.subscribe();
        let joined = ClusterSession::join(settings, role, names, &mut requested).await?;
        Ok(joined.map(|session| JoinedProcess {
            session,
            shutdown,
            _exporter: exporter,
        }))
    }
}

/// The name given, or one of host and process. It is part of a key on the server, which takes few symbols.
fn process_name(given: Option<&str>) -> Result<String, UsageError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    let Some(name) = given else {
        let host: String = host()
            .chars()
            .map(|c| if is_allowed(c) { c } else { '-' })
            .collect();
        return Ok(format!("{host}-{}", std::process::id()));
    };
    if name.is_empty() || name.len() > 128 || !name.chars().all(is_allowed) {
        return Err(UsageError(format!(
            "--name {name:?} must consist of at most 128 letters, digits, - and _: it is part of a key on the server"
        )));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_valid_in_a_key_of_the_server() {
        assert_eq!(process_name(Some("actor-1_b")).expect("valid"), "actor-1_b");
        for name in ["", "a b", "a.b", "a>", "*", "ü", &"x".repeat(129)] {
            let error = process_name(Some(name)).expect_err(name).to_string();
            assert!(error.starts_with("--name "), "{error}");
        }
        let own = process_name(None).expect("a name");
        assert_eq!(process_name(Some(&own)).expect("valid"), own);
    }
}
