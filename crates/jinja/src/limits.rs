//! What a template may use: they come from strangers, and a loop or a width must not take the machine.
//!
//! The bounds are far beyond what a dialogue needs.

use std::cell::Cell;

use crate::Error;

/// How deep statements, expressions and macros may be within one another while they are computed.
pub(crate) const DEPTH: usize = 400;
/// How deep values may be within one another; those that come as JSON are at most 128 deep.
pub(crate) const VALUE_DEPTH: usize = 150;
/// The longest string, in bytes.
const TEXT: usize = 8 << 20;
/// The longest list.
const ITEMS: usize = 1_000_000;
/// The largest dictionary, whose keys are found one by one.
pub(crate) const KEYS: usize = 10_000;

/// Checks that a string may have this many bytes.
pub(crate) fn text(bytes: usize) -> Result<(), Error> {
    if bytes > TEXT {
        return Err(Error::new(format!("a string of more than {TEXT} bytes")));
    }
    Ok(())
}

/// Checks that a list may have this many elements.
pub(crate) fn items(count: usize) -> Result<(), Error> {
    if count > ITEMS {
        return Err(Error::new(format!("a list of more than {ITEMS} elements")));
    }
    Ok(())
}

/// What is left to one text.
#[derive(Debug)]
pub(crate) struct Budget {
    steps: Cell<usize>,
    bytes: Cell<usize>,
    depth: Cell<usize>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            steps: Cell::new(10_000_000),
            bytes: Cell::new(256 << 20),
            depth: Cell::new(0),
        }
    }
}

impl Budget {
    /// Computes something one level deeper.
    pub(crate) fn deeper<T>(&self, compute: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let steps = self.steps.get().checked_sub(1);
        self.steps
            .set(steps.ok_or_else(|| Error::new("the template takes too many steps"))?);
        if self.depth.get() == DEPTH {
            return Err(Error::new(
                "the template is nested too deeply: does a macro call itself for ever?",
            ));
        }
        self.depth.set(self.depth.get() + 1);
        let result = compute();
        self.depth.set(self.depth.get() - 1);
        result
    }

    /// Accounts for what was made.
    pub(crate) fn take(&self, bytes: usize) -> Result<(), Error> {
        let left = self.bytes.get().checked_sub(bytes);
        self.bytes
            .set(left.ok_or_else(|| Error::new("the template takes too much memory"))?);
        Ok(())
    }
}
