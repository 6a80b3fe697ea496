//! `agon actor`: actors that join a run over JetStream.

use std::process::ExitCode;

use super::{configuration::Configuration, membership::Membership};
use crate::roles;

/// Join a run over JetStream as an actor: answer prompts until the run is done.
///
/// The model comes from the run's server; of the configuration only where the server is, the run's name
/// and what concerns this machine count, and a configuration that differs from the run's otherwise is
/// refused. SIGTERM or Ctrl-C finishes what is being written and leaves; what was not begun goes to others.
///
/// Example: agon actor configs/cluster.toml --set transport.url=nats://10.0.0.1:4222
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    #[command(flatten)]
    membership: Membership,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.configuration.resolve()?.settings;
    crate::runtime()?.block_on(async {
        let member = arguments.membership.connect(&settings).await?;
        roles::join_actor(&member.joined, &settings, &member.stop).await?;
        Ok(ExitCode::SUCCESS)
    })
}
