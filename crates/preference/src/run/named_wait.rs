//! The wait of a loop, by name.

use telemetry::{WaitGuard, Waits};

/// The one wait that a loop is in, recorded under its reason until the reason changes.
pub(super) struct NamedWait {
    waits: Waits,
    current: Option<(&'static str, WaitGuard)>,
}

impl NamedWait {
    pub(super) fn new(waits: Waits) -> Self {
        Self {
            waits,
            current: None,
        }
    }

    /// Starts a wait for `reason`, unless it is the current one.
    pub(super) fn set(&mut self, reason: &'static str) {
        let current = self.current.as_ref().map(|&(reason, _)| reason);
        if current != Some(reason) {
            self.current = Some((reason, self.waits.enter(reason)));
        }
    }

    /// Ends the current wait.
    pub(super) fn end(&mut self) {
        self.current = None;
    }
}
