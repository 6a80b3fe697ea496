//! Resource limits: templates are untrusted and must not exhaust time or memory.
//!
//! The limits are far above the needs of a dialogue.

use std::cell::Cell;

use crate::error::Error;

/// Maximum nesting depth of statements, expressions and macros during rendering.
pub(crate) const DEPTH: usize = 400;
/// Maximum nesting depth of values; JSON input is at most 128 deep.
pub(crate) const VALUE_DEPTH: usize = 150;
/// Maximum length of a string, in bytes.
const MAX_TEXT_BYTES: usize = 8 << 20;
/// Maximum length of a list.
const MAX_ITEMS: usize = 1_000_000;
/// Maximum size of a dictionary; lookups are linear.
pub(crate) const KEYS: usize = 10_000;

/// Checks the length of a string, in bytes.
pub(crate) fn text(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_TEXT_BYTES {
        return Err(Error::new(format!(
            "a string of more than {MAX_TEXT_BYTES} bytes"
        )));
    }
    Ok(())
}

/// Checks the length of a list.
pub(crate) fn items(count: usize) -> Result<(), Error> {
    if count > MAX_ITEMS {
        return Err(Error::new(format!(
            "a list of more than {MAX_ITEMS} elements"
        )));
    }
    Ok(())
}

/// Remaining resources of one rendering.
#[derive(Debug)]
pub(crate) struct RenderBudget {
    steps: Cell<usize>,
    bytes: Cell<usize>,
    depth: Cell<usize>,
}

impl Default for RenderBudget {
    fn default() -> Self {
        Self {
            steps: Cell::new(10_000_000),
            bytes: Cell::new(256 << 20),
            depth: Cell::new(0),
        }
    }
}

impl RenderBudget {
    /// Runs `compute` one nesting level deeper, counting a step.
    pub(crate) fn deeper<T>(&self, compute: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let steps = self.steps.get().checked_sub(1);
        self.steps
            .set(steps.ok_or_else(|| Error::new("the template takes too many steps"))?);
        if self.depth.get() == DEPTH {
            return Err(Error::new(
                "the template is nested too deeply: does a macro recurse without end?",
            ));
        }
        self.depth.set(self.depth.get() + 1);
        let result = compute();
        self.depth.set(self.depth.get() - 1);
        result
    }

    /// Charges `bytes` of created values.
    pub(crate) fn take(&self, bytes: usize) -> Result<(), Error> {
        let left = self.bytes.get().checked_sub(bytes);
        self.bytes
            .set(left.ok_or_else(|| Error::new("the template takes too much memory"))?);
        Ok(())
    }
}
