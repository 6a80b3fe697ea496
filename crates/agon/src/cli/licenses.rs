//! `agon licenses`: the notices of the third-party code in this program.

use std::process::ExitCode;

/// Third-party notices of the default build. A test checks that they are those of the dependencies.
const NOTICES: &str = include_str!("../../../../THIRD-PARTY-NOTICES.txt");

/// Print the licences of Agon and of the third-party code in it.
///
/// The crates with their versions and licences, then the text of every licence. Those of mistral.rs, which is not
/// part of the default build, are not among them.
///
/// Example: agon licenses | less
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_: &Arguments) -> anyhow::Result<ExitCode> {
    out!("{}", NOTICES.trim_end())?;
    Ok(ExitCode::SUCCESS)
}
