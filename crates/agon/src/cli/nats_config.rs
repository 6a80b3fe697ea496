//! `agon nats-config`: the configuration of a NATS server for a run on several machines, with a user for each role.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use settings::TransportSettings;
use telemetry::write_atomically;

use crate::{
    cli::config_args::Configuration,
    cluster::server_users::{RunKeys, ServerRole, max_payload_mib, server_config},
    exit_code::UsageError,
};

/// Port of NATS.
const DEFAULT_PORT: u16 = 4222;

/// Write the configuration of a NATS server for a run, with a user and a key for each role.
///
/// DIR gets nats-server.conf, which holds public keys only; the seeds learner.nk, actor.nk, preference.nk and view.nk, one
/// for each role, each allowed what its role does; and the run's key, with which the learner signs the run's record and
/// its weights: run.key for the learner, run.pub for the others. Keys that are there already are kept. Prints how each
/// role uses them.
///
/// Example: agon nats-config configs/cluster.toml --directory nats --set transport.url=nats://10.0.0.1:4222
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    /// The folder to write into; made if it does not exist.
    #[arg(long, value_name = "DIR", default_value = "nats")]
    directory: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.configuration.resolve()?.settings;
    let TransportSettings::Jetstream(jetstream) = &settings.transport else {
        return Err(UsageError(
            "the run uses no NATS server: set transport.kind = \"jetstream\"".into(),
        )
        .into());
    };
    let directory = &arguments.directory;
    let path = directory.join("nats-server.conf");
    if path.exists() {
        return Err(UsageError(format!(
            "{} exists already: move it away, or name another folder with --directory",
            path.display()
        ))
        .into());
    }
    let keys = RunKeys::open(directory)?;
    let directory = std::path::absolute(directory).context("failed to find the folder")?;
    let text = [
        notes(&settings.run.name),
        server_config(
            &listen_address(&jetstream.url),
            max_payload_mib(&settings),
            &directory.join("jetstream"),
        ),
        keys.authorization(&[&settings.run.name]),
    ];
    write_atomically(&path, text.concat().as_bytes())?;
    print_usage(arguments, &jetstream.url, &path, &keys)?;
    Ok(ExitCode::SUCCESS)
}

/// Header comment of the server configuration.
fn notes(run: &str) -> String {
    format!(
        "# A NATS server for the run {run}: nats-server -c THIS_FILE\n\
         # Users prove who they are with keys that are never sent. On a network that others can read, use TLS too:\n\
         # tls {{ cert_file: \"server.pem\", key_file: \"server.key\" }}   # and transport.tls = true\n"
    )
}

/// The address at which a server for clients of `url` listens: on loopback if they are on its machine.
fn listen_address(url: &str) -> String {
    let first = url.split(',').next().unwrap_or_default();
    let authority = first.rsplit("://").next().unwrap_or_default();
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()),
        _ => (authority, None),
    };
    let local = ["", "localhost", "[::1]"].contains(&host) || host.starts_with("127.");
    let host = if local { "127.0.0.1" } else { "0.0.0.0" };
    format!("{host}:{}", port.unwrap_or(DEFAULT_PORT))
}

fn print_usage(
    arguments: &Arguments,
    url: &str,
    path: &Path,
    keys: &RunKeys,
) -> anyhow::Result<()> {
    let url = match url {
        "" => "nats://HOST:4222",
        url => url,
    };
    let config = arguments.configuration.config.display();
    out!("nats-server -c {}", path.display())?;
    for role in ServerRole::ALL {
        let command = match role {
            ServerRole::View => "status",
            _ => role.name(),
        };
        let set =
            |setting: (&str, PathBuf)| format!(" --set {}={}", setting.0, setting.1.display());
        let settings: String = keys.settings(role).into_iter().map(set).collect();
        out!("agon {command} {config} --set transport.url={url}{settings}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_listens_where_its_clients_look_for_it() {
        for (url, expected) in [
            ("", "127.0.0.1:4222"),
            ("nats://localhost", "127.0.0.1:4222"),
            ("nats://127.0.0.1:5000", "127.0.0.1:5000"),
            ("tls://[::1]:5000", "127.0.0.1:5000"),
            ("nats://10.0.0.1:4223,nats://10.0.0.2:4224", "0.0.0.0:4223"),
            ("nats.example.org", "0.0.0.0:4222"),
            ("nats://[fe80::1]", "0.0.0.0:4222"),
        ] {
            assert_eq!(listen_address(url), expected, "{url}");
        }
    }
}
