//! `agon manifests`: Kubernetes manifests or systemd units for a run over JetStream.

mod instance_name;
mod kubernetes;
mod secret_files;
mod systemd;

use std::process::ExitCode;

use settings::{Settings, TransportSettings};

use crate::{cli::config_args::Configuration, exit_code::UsageError};

use kubernetes::{Cluster, ContainerResources};

/// Port of every process's metrics.
const METRICS_PORT: u16 = 9464;

/// Time for a process to stop, in seconds; the learner saves a checkpoint.
const STOP_TIMEOUT: u32 = 300;

/// Exit codes after which a restart cannot help: a rejected configuration, a diverged run. A missing resource is not
/// among them: a server that is away comes back.
const FINAL_CODES: [u8; 2] = [2, 4];

/// Exit code of a process that was told to stop and has saved its state.
const INTERRUPTED_CODE: u8 = 5;

/// Suffixes of the units of Kubernetes quantities.
const QUANTITY_UNITS: [&str; 13] = [
    "", "m", "k", "M", "G", "T", "P", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei",
];

/// Print Kubernetes manifests, or systemd units, for a run over JetStream.
///
/// Kubernetes: a ConfigMap with the configuration, a volume for the run directory, the learner as a Job that
/// resumes when it is restarted, actors and preference services as Deployments (topology.actors and
/// topology.preference replicas; they can be scaled at any time). Containers run as a user without privileges and
/// with a read-only root file system; files with secrets are mounted from one Secret a role, which the commands on
/// standard error create. Requires a running NATS server with JetStream at transport.url, and an image built from the
/// repository's Dockerfile.
///
/// Example: agon manifests configs/cluster.toml --image registry.example.com/agon:0.1.0 | kubectl apply -f -
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    /// The container image with the agon program, built from the repository's Dockerfile.
    #[arg(long, default_value = concat!("agon:", env!("CARGO_PKG_VERSION")), value_parser = image)]
    image: String,
    /// The size of the volume for the run directory, and the limit on a process's temporary files.
    #[arg(long, default_value = "50Gi", value_parser = quantity)]
    storage: String,
    /// Processors that a process requests.
    #[arg(long, default_value = "2", value_parser = quantity)]
    cpu: String,
    /// Memory that a process requests, which is also its limit.
    #[arg(long, default_value = "8Gi", value_parser = quantity)]
    memory: String,
    /// Print systemd units instead.
    #[arg(long)]
    systemd: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let settings = &resolved.settings;
    check_server(settings)?;
    if arguments.systemd {
        out!("{}", systemd::units(settings).trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = Cluster::new(settings, &resolved.toml, arguments.container_resources())?;
    out!("{:#}", cluster.list())?;
    for command in cluster.secret_commands() {
        note!("{command}");
    }
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    fn container_resources(&self) -> ContainerResources<'_> {
        ContainerResources {
            image: &self.image,
            storage: &self.storage,
            cpu: &self.cpu,
            memory: &self.memory,
        }
    }
}

fn check_server(settings: &Settings) -> Result<(), UsageError> {
    match &settings.transport {
        TransportSettings::Jetstream(jetstream) if !jetstream.url.is_empty() => Ok(()),
        _ => Err(UsageError(
            "a run on several machines needs a NATS server: set transport.kind = \"jetstream\" and transport.url"
                .into(),
        )),
    }
}

/// Parses a Kubernetes quantity, such as `500m`, `2` or `50Gi`.
fn quantity(text: &str) -> Result<String, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let is_number = number.parse::<f64>().is_ok_and(|number| number > 0.0);
    let is_whole = number.starts_with(|c: char| c.is_ascii_digit()) && !number.ends_with('.');
    match is_number && is_whole && QUANTITY_UNITS.contains(&unit) {
        true => Ok(text.to_owned()),
        false => Err("it is not a quantity, such as 500m, 2 or 50Gi".into()),
    }
}

/// Parses the name of a container image.
fn image(text: &str) -> Result<String, String> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    let is_image = text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(is_allowed);
    match is_image {
        true => Ok(text.to_owned()),
        false => {
            Err("it is not the name of an image, such as registry.example.com/agon:0.1.0".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for text in ["1", "500m", "0.5", "50Gi", "100k", "1.5Ti"] {
            assert_eq!(quantity(text).as_deref(), Ok(text));
        }
        for text in [
            "", "0", "-1", "50GB", "Gi", "5 Gi", "1.", ".5", "1..2", "1e3", "inf",
        ] {
            assert!(quantity(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn images_are_names_and_nothing_else() {
        for text in ["agon:0.1.0", "registry.example.com:5000/a/agon@sha256:00ff"] {
            assert_eq!(image(text).as_deref(), Ok(text));
        }
        for text in ["", "a b", "agon:", "-agon", "agon\n", "agon;rm"] {
            assert!(image(text).is_err(), "{text:?}");
        }
    }
}
