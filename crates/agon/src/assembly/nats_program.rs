//! The program of a NATS server.

use std::path::Path;

use crate::exit_code::UsageError;

/// Checks that the program exists, at its path or on the search path.
pub(crate) fn find_nats_server(program: &str) -> Result<(), UsageError> {
    let exists = |path: &Path| path.is_file();
    let found = match program.contains('/') {
        true => exists(Path::new(program)),
        false => {
            let folders = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&folders).any(|folder| exists(&folder.join(program)))
        }
    };
    match found {
        true => Ok(()),
        false => Err(missing_nats_server(program)),
    }
}

/// The error for a NATS server that is not there.
pub(crate) fn missing_nats_server(program: &str) -> UsageError {
    UsageError(format!(
        "{program} is not there: install a NATS server (apt install nats-server), name it with \
         transport.server, or say where one runs with transport.url"
    ))
}
