//! A bound on how often one and the same warning is logged.
//!
//! A peer that sends a bad message may send a thousand: each is counted in the metrics, but only some lines of a place
//! in the program are written per period. Lines that are left out are announced and counted. Does not know what a line
//! says.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Subscriber, callsite::Identifier};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Warnings and errors of one place in the program that are written per [`PERIOD`].
const LINES: u64 = 20;

/// Period of the bound.
const PERIOD: Duration = Duration::from_secs(10);

/// Formats events as `F` does, but no more than [`LINES`] warnings and errors of one place per [`PERIOD`].
pub(super) struct LineLimit<F> {
    format: F,
    places: Mutex<HashMap<Identifier, Place>>,
}

/// Lines of one place in the program in the current period.
struct Place {
    since: Instant,
    lines: u64,
}

/// Decision about the lines of an event.
#[derive(Debug, PartialEq, Eq)]
enum LineDecision {
    /// Print the line, after the number of those that the period before left out, if any.
    Write { omitted: u64 },
    /// Print the line, and say that it is the last of this period.
    WriteLast,
    /// Nothing.
    Omit,
}

impl Place {
    /// Counts a line at the time `now`.
    fn admit(&mut self, now: Instant) -> LineDecision {
        let mut omitted = 0;
        if now.duration_since(self.since) >= PERIOD {
            omitted = self.lines.saturating_sub(LINES);
            *self = Self {
                since: now,
                lines: 0,
            };
        }
        self.lines += 1;
        match self.lines {
            LINES => LineDecision::WriteLast,
            lines if lines < LINES => LineDecision::Write { omitted },
            _ => LineDecision::Omit,
        }
    }
}

impl<F> LineLimit<F> {
    pub(super) fn new(format: F) -> Self {
        Self {
            format,
            places: Mutex::default(),
        }
    }

    fn admit(&self, event: &Event<'_>) -> LineDecision {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN {
            return LineDecision::Write { omitted: 0 };
        }
        let now = Instant::now();
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(metadata.callsite()).or_insert(Place {
            since: now,
            lines: 0,
        });
        place.admit(now)
    }
}

impl<S, N, F> FormatEvent<S, N> for LineLimit<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        match self.admit(event) {
            LineDecision::Omit => Ok(()),
            LineDecision::Write { omitted } => {
                if omitted > 0 {
                    writeln!(writer, "… {omitted} lines like the next one were left out")?;
                }
                self.format.format_event(context, writer, event)
            }
            LineDecision::WriteLast => {
                self.format.format_event(context, writer.by_ref(), event)?;
                let seconds = PERIOD.as_secs();
                writeln!(
                    writer,
                    "… further lines like this one are left out for up to {seconds} s"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_place_are_bounded_and_the_omitted_ones_counted() {
        let since = Instant::now();
        let mut place = Place { since, lines: 0 };
        let mut admit = |seconds: u64| place.admit(since + Duration::from_secs(seconds));
        for _ in 1..LINES {
            assert_eq!(admit(1), LineDecision::Write { omitted: 0 });
        }
        assert_eq!(admit(2), LineDecision::WriteLast);
        for _ in 0..7 {
            assert_eq!(admit(9), LineDecision::Omit);
        }
        assert_eq!(admit(10), LineDecision::Write { omitted: 7 });
        assert_eq!(admit(19), LineDecision::Write { omitted: 0 });
        assert_eq!(admit(20), LineDecision::Write { omitted: 0 });
    }
}
