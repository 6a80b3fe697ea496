//! Progress of a long task, on standard error.
//!
//! On a terminal it is a progress bar with a message line below it. Elsewhere, and with `NO_COLOR`, it is a plain
//! line every ten seconds and one at the end, so that a log stays short.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    printable::{printable_line, stderr_takes_ansi},
    standard_error::StandardError,
};

/// Minimum time between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress of one task, in units of the caller's choice.
#[derive(Debug)]
pub struct Progress(Display);

#[derive(Debug)]
enum Display {
    Bar(ProgressBar),
    Lines(PlainLines),
}

/// Formats the plain lines; the caller passes the time.
#[derive(Debug)]
struct PlainLines {
    title: String,
    total: u64,
    done: u64,
    began: Instant,
    last: Instant,
}

impl Progress {
    /// Progress at 0 of `total`.
    #[must_use]
    pub fn new(title: &str, total: u64) -> Self {
        let title = &printable_line(title);
        if stderr_takes_ansi() {
            Self(Display::Bar(bar(title, total)))
        } else {
            Self(Display::Lines(PlainLines::new(
                title,
                total,
                Instant::now(),
            )))
        }
    }

    /// Sets the progress to `done` of the total, with a message.
    pub fn advance_to(&mut self, done: u64, note: &str) {
        let note = &*printable_line(note);
        match &mut self.0 {
            Display::Bar(bar) => {
                bar.set_message(note.to_owned());
                bar.set_position(done);
            }
            Display::Lines(lines) => {
                if let Some(line) = lines.advance_to(done, note, Instant::now()) {
                    print(&line);
                }
            }
        }
    }

    /// Sets the progress to `done` and finishes as [`Self::finish`].
    pub fn finish_at(mut self, done: u64, note: &str) {
        match &mut self.0 {
            Display::Bar(bar) => bar.set_position(done),
            Display::Lines(lines) => lines.done = done,
        }
        self.finish(note);
    }

    /// Ends the display, whether or not the task is complete; `note` is the last message.
    pub fn finish(self, note: &str) {
        let note = &*printable_line(note);
        match self.0 {
            Display::Bar(bar) => bar.abandon_with_message(note.to_owned()),
            Display::Lines(lines) => print(&lines.line(note, Instant::now())),
        }
    }
}

fn bar(title: &str, total: u64) -> ProgressBar {
    let template = "{prefix} {wide_bar} {pos}/{len}  {elapsed}, left {eta}\n  {msg}";
    let style = ProgressStyle::with_template(template).expect("the template names known keys only");
    ProgressBar::new(total)
        .with_style(style)
        .with_prefix(title.to_owned())
}

fn print(line: &str) {
    StandardError::line(format_args!("{line}"));
}

impl PlainLines {
    fn new(title: &str, total: u64, began: Instant) -> Self {
        Self {
            title: title.to_owned(),
            total,
            done: 0,
            began,
            last: began,
        }
    }

    fn advance_to(&mut self, done: u64, note: &str, now: Instant) -> Option<String> {
        self.done = done;
        if now.saturating_duration_since(self.last) < LINE_INTERVAL {
            return None;
        }
        self.last = now;
        Some(self.line(note, now))
    }

    fn line(&self, note: &str, now: Instant) -> String {
        let Self {
            title, total, done, ..
        } = self;
        let seconds = now.saturating_duration_since(self.began).as_secs();
        let percent = (100 * u128::from(*done))
            .checked_div(u128::from(*total))
            .unwrap_or(100);
        let line = format!("{title} {done}/{total} ({percent} %) after {seconds} s {note}");
        line.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_are_at_least_ten_seconds_apart() {
        let began = Instant::now();
        let mut lines = PlainLines::new("train", 200, began);
        let cases = [
            (0, 0, None),
            (9, 10, None),
            (10, 11, Some("train 11/200 (5 %) after 10 s loss 0.5")),
            (11, 12, None),
            (19, 20, None),
            (25, 30, Some("train 30/200 (15 %) after 25 s loss 0.5")),
            (34, 40, None),
            (35, 41, Some("train 41/200 (20 %) after 35 s loss 0.5")),
        ];
        for (second, done, expected) in cases {
            let now = began + Duration::from_secs(second);
            let line = lines.advance_to(done, "loss 0.5", now);
            assert_eq!(line.as_deref(), expected, "at {second} s");
        }
        let end = lines.line("", began + Duration::from_secs(36));
        assert_eq!(end, "train 41/200 (20 %) after 36 s");
    }

    #[test]
    fn a_total_of_zero_is_complete() {
        let lines = PlainLines::new("fit", 0, Instant::now());
        assert_eq!(
            lines.line("nothing to do", lines.began),
            "fit 0/0 (100 %) after 0 s nothing to do"
        );
    }

    #[test]
    fn the_bar_shows_position_and_note() {
        let bar = bar("train", 200);
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        let mut progress = Progress(Display::Bar(bar.clone()));
        progress.advance_to(41, "loss 0.5");
        assert_eq!((bar.position(), bar.message().as_str()), (41, "loss 0.5"));
        progress.finish("stopped");
        assert_eq!((bar.position(), bar.message().as_str()), (41, "stopped"));
        assert!(bar.is_finished());
    }
}
