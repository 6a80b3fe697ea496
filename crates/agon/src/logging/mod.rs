//! The program's log, on standard error.

mod line_limit;

use std::{fmt::Debug, io};

use telemetry::{StandardError, printable_line, shortened, takes_ansi};
use tracing_subscriber::{
    EnvFilter,
    field::MakeExt,
    fmt::format::{Writer, debug_fn, format},
};

use crate::logging::line_limit::LineLimit;

/// Installs the log subscriber. Level `info` by default (`warn` for noisy libraries), or the filter in `AGON_LOG`,
/// as in `AGON_LOG=learner=debug`.
pub(crate) fn start() {
    let filter = EnvFilter::try_from_env("AGON_LOG").unwrap_or_else(|_| {
        EnvFilter::new(
            "info,async_nats=warn,candle_core=warn,hf_hub=warn,tokenizers=warn,mistralrs_core=warn,mistralrs_quant=warn",
        )
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        // A log that nobody reads stops nothing.
        .with_writer(|| StandardError)
        // Internal errors would go to standard error and panic if that is closed.
        .log_internal_errors(false)
        .with_ansi(takes_ansi(&io::stderr()))
        .fmt_fields(debug_fn(write_field).delimited(" "))
        .event_format(LineLimit::new(format().with_target(false).compact()))
        .init();
}

/// Formats a field as `name=value`; the message without its name. Values may contain user data, so control
/// characters are escaped.
fn write_field(
    out: &mut Writer<'_>,
    field: &tracing::field::Field,
    value: &dyn Debug,
) -> std::fmt::Result {
    let value = format!("{value:?}");
    let value = shortened(&value);
    let value = printable_line(&value);
    match field.name() {
        "message" => write!(out, "{value}"),
        name => {
            let name = name.strip_prefix("r#").unwrap_or(name);
            match out.has_ansi_escapes() {
                true => write!(out, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}"),
                false => write!(out, "{name}={value}"),
            }
        }
    }
}
