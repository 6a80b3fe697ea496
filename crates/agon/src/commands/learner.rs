//! `agon learner`: the learner of a run whose roles meet over JetStream.

use std::{process::ExitCode, sync::Arc};

use super::{train, view};
use crate::{
    interrupt,
    presence::host,
    report::Report,
    roles::{self, Joined},
    world::{self, Part, Preflight},
};

/// Lead a run over JetStream: learn from labelled pairs, publish weights, write the run directory.
///
/// One learner at a time leads a run; another one is refused while it lives. Actors and preference
/// services join with `agon actor CONFIG` and `agon preference CONFIG`, from any machine, before or after.
/// `agon train` starts them all on one machine.
///
/// Example: agon learner configs/cluster.toml --set transport.url=nats://10.0.0.1:4222
#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Arguments {
    #[command(flatten)]
    train: train::Arguments,
    /// Leave when standard input ends, as on SIGTERM: for whoever starts this process and watches it.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    crate::runtime()?.block_on(lead(&arguments.train, arguments.end_with_stdin))
}

async fn lead(arguments: &train::Arguments, end_with_stdin: bool) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let settings = &resolved.settings;
    let (path, resume) = (arguments.path(settings), arguments.resume.as_deref());
    let read =
        tokio::task::block_in_place(|| Preflight::of(settings, &path, Part::Learner).passed())?;
    let shown = view::beside(&settings.telemetry, &path)?;
    let stop = interrupt::on_signal_or_end(end_with_stdin)?;
    let resuming = resume.is_some() && path.join("config.toml").exists();
    let (joined, claim) = loop {
        let joined = Joined::connect(settings, host(), shown.metrics.clone()).await?;
        if let Some(claim) = joined.claim(settings, &path, resuming).await? {
            break (joined, claim);
        }
    };
    let world = tokio::task::block_in_place(|| world::build(settings, read, &|| *stop.borrow()))?;
    let (directory, resume) = train::open(&path, &resolved, resume)?;
    let directory = Arc::new(directory);
    train::announce(settings, &world);
    let run = roles::lead(
        &joined,
        (settings, &resolved.toml),
        &world,
        (&directory, resume),
        &stop,
    );
    let outcome = tokio::select! {
        outcome = run => outcome?,
        () = claim.lost() => anyhow::bail!(
            "another learner has taken the run over: this one was silent for longer than \
             transport.lease_seconds; what it did since its last checkpoint is given up"
        ),
    };
    Report::new(settings, &world, &outcome)?.tell(&directory)?;
    claim.release().await;
    if outcome.summary.ending == learner::Ending::Finished {
        joined.clear().await?;
    }
    Ok(train::code_of(outcome.summary.ending))
}
