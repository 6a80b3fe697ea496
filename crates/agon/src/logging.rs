//! The program's own log, on standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts the log: warnings and the story of a run, or what `AGON_LOG` asks for (as in
/// `AGON_LOG=learner=debug`). Read once, here.
pub(crate) fn start() {
    let filter = EnvFilter::try_from_env("AGON_LOG").unwrap_or_else(|_| {
        EnvFilter::new(
            "info,async_nats=warn,candle_core=warn,hf_hub=warn,tokenizers=warn,mistralrs_core=warn,mistralrs_quant=warn",
        )
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .compact()
        .init();
}
