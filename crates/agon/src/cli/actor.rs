//! `agon actor`: actors that join a run over JetStream.

use std::process::ExitCode;

use crate::cli::{config_args::Configuration, join_args::JoinArguments};
use crate::cluster::server_users::ServerRole;

/// Join a run over JetStream as an actor: sample completions until the run is done.
///
/// The model comes from the run's server. Of the configuration, only the server, the run's name and the settings of
/// this machine are used; a configuration that differs from the run's in anything else is rejected. On SIGTERM or
/// Ctrl-C it finishes the completions in progress and exits; its other prompts go to other actors.
///
/// Example: agon actor configs/cluster.toml --set transport.url=nats://10.0.0.1:4222
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    #[command(flatten)]
    join: JoinArguments,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = arguments.configuration.resolve()?.settings;
    crate::runtime()?.block_on(async {
        let joined = arguments.join.connect(&settings, ServerRole::Actor).await?;
        let Some(process) = joined else {
            return Ok(ExitCode::SUCCESS);
        };
        crate::cluster::join_actor(&process.session, &settings, &process.shutdown).await?;
        Ok(ExitCode::SUCCESS)
    })
}
