//! The configuration that most commands are given.

use std::path::PathBuf;

use settings::{Override, Resolved, SettingsError, resolve_file};

// No doc comment: clap would show it in place of the command's own.
#[derive(clap::Args)]
pub(super) struct Configuration {
    /// The configuration. `configs/default.toml` explains every key.
    #[arg(value_name = "CONFIG")]
    pub(super) config: PathBuf,
    /// Change one setting, VALUE being TOML; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<Override>,
}

impl Configuration {
    /// Its settings, as [`resolve_file`] finds them.
    pub(super) fn resolve(&self) -> Result<Resolved, SettingsError> {
        resolve_file(&self.config, &self.set)
    }
}
