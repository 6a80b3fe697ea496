//! The program's own log, on standard error.

use std::{fmt::Debug, io};

use telemetry::{printable_line, takes_ansi};
use tracing_subscriber::{
    EnvFilter,
    field::MakeExt,
    fmt::format::{Writer, debug_fn},
};

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
        .with_writer(io::stderr)
        // It would be told on standard error, with a panic where that is what failed.
        .log_internal_errors(false)
        .with_ansi(takes_ansi(&io::stderr()))
        .with_target(false)
        .fmt_fields(debug_fn(write_field).delimited(" "))
        .compact()
        .init();
}

/// A field of an event as `name=value`, the message alone without its name. Values may quote data: what would
/// drive a terminal is escaped.
fn write_field(
    writer: &mut Writer<'_>,
    field: &tracing::field::Field,
    value: &dyn Debug,
) -> std::fmt::Result {
    let value = format!("{value:?}");
    let value = printable_line(&value);
    match field.name() {
        "message" => write!(writer, "{value}"),
        name => {
            let name = name.strip_prefix("r#").unwrap_or(name);
            match writer.has_ansi_escapes() {
                true => write!(writer, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}"),
                false => write!(writer, "{name}={value}"),
            }
        }
    }
}
