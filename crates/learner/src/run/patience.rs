//! How long nothing has come of waiting, and what came instead.
//!
//! A deadline counts from the last progress, not from the last message: a policy that has collapsed onto single
//! answers, or a judge that never gives a verdict, sends messages for ever.

use std::{collections::BTreeMap, fmt, time::Duration};

use messages::DropReason;
use tokio::time::Instant;

/// The last progress, and the prompts that were dropped since.
#[derive(Debug)]
pub(crate) struct Patience {
    since: Instant,
    dropped: BTreeMap<DropReason, Drops>,
    /// A refusal of the judge was told.
    warned: bool,
}

/// How often a prompt was dropped for one reason, and what was said of the last.
#[derive(Debug, Default)]
struct Drops {
    count: u64,
    detail: String,
}

impl Patience {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
            dropped: BTreeMap::new(),
            warned: false,
        }
    }

    /// A wait begins, or something came of it.
    pub(crate) fn renew(&mut self) {
        self.since = Instant::now();
        self.dropped.clear();
    }

    /// What came is progress, though it may have come to nothing.
    pub(crate) fn go_on(&mut self) {
        self.since = Instant::now();
    }

    /// Counts a dropped prompt. The first that a judge refused is logged.
    pub(crate) fn lost(&mut self, reason: DropReason, detail: &str) {
        let drops = self.dropped.entry(reason).or_default();
        drops.count += 1;
        detail.clone_into(&mut drops.detail);
        let is_refusal = matches!(reason, DropReason::Failed | DropReason::Abstained);
        if is_refusal && !self.warned {
            self.warned = true;
            tracing::warn!(
                "a pair got no label and is left out: {detail} (later ones are only counted)"
            );
        }
    }

    /// When it ends, if nothing comes.
    pub(crate) fn end(&self, seconds: u64) -> Instant {
        self.since + Duration::from_secs(seconds)
    }
}

/// What came instead, as the end of a sentence; nothing when nothing did.
impl fmt::Display for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (reason, Drops { count, detail })) in self.dropped.iter().enumerate() {
            let before = if place == 0 {
                "; dropped meanwhile: "
            } else {
                ", "
            };
            write!(f, "{before}{count} {}", reason.name())?;
            if !detail.is_empty() {
                write!(f, " (the last: {detail})")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_told_and_is_no_progress() {
        let mut patience = Patience::new();
        let end = patience.end(3);
        assert_eq!(patience.to_string(), "");
        for reason in [
            DropReason::Identical,
            DropReason::Abstained,
            DropReason::Identical,
        ] {
            patience.lost(reason, "");
        }
        assert_eq!(patience.end(3), end);
        patience.lost(DropReason::Abstained, "too long");
        let told = "; dropped meanwhile: 2 identical, 2 abstained (the last: too long)";
        assert_eq!(patience.to_string(), told);
        patience.renew();
        assert!(patience.end(3) >= end);
        assert_eq!(patience.to_string(), "");
    }
}
