//! Resource limits: templates are untrusted programs and must not exhaust time, memory or stack.
//!
//! A rendering has a budget of work units, of bytes and of time, all far above the needs of a dialogue. Values and
//! operations are charged where they are created and computed, on the budget of the current thread. Where an operation
//! cannot return an error (an equality, a lookup), it ends early with any result: an exceeded budget stays exceeded,
//! and the renderer checks it after every expression, so that the result is never printed.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use crate::error::TemplateError;

/// Maximum length of a template's source, in bytes.
pub const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Maximum nesting depth of statements, expressions and macros during rendering.
pub(crate) const DEPTH: usize = 400;
/// Maximum nesting depth of values; JSON input is at most 128 deep.
pub(crate) const VALUE_DEPTH: usize = 150;
/// Maximum length of a string, in bytes.
const MAX_TEXT_BYTES: usize = 8 << 20;
/// Maximum length of the output, in bytes: tokens take many times as much.
const MAX_OUTPUT_BYTES: usize = MAX_TEXT_BYTES;
/// Maximum length of a list.
const MAX_ITEMS: usize = 1_000_000;
/// Maximum size of a dictionary; lookups are linear.
pub(crate) const KEYS: usize = 10_000;
/// Work units of a rendering: a comparison, an element or eight bytes of text take one. Tests reach the limit sooner.
const MAX_WORK: u64 = if cfg!(test) { 2_000_000 } else { 50_000_000 };
/// Work units of a statement or an expression, besides those of its operation.
const STEP_WORK: usize = 5;
/// Bytes of all values that a rendering creates, freed ones included.
const MAX_BYTES: usize = 256 << 20;
/// Bytes of bookkeeping of a value.
const VALUE_OVERHEAD: usize = 48;
/// Maximum duration of a rendering.
const MAX_TIME: Duration = Duration::from_secs(10);
/// Work units between two looks at the clock.
const WORK_PER_TICK: u64 = 1 << 16;
/// Longest time that counts between two looks: a suspended process is not a slow template.
const MAX_TICK: Duration = Duration::from_secs(1);
/// Stack that must be left to evaluate one level deeper; values of maximum depth are compared and printed within it.
const STACK_RESERVE: usize = 256 << 10;
/// Size of a stack segment that is allocated when less is left.
const STACK_SEGMENT: usize = 2 << 20;

/// A limit that a rendering exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExceededLimit {
    Work,
    Time,
    Memory,
    Text,
    Items,
}

impl ExceededLimit {
    fn error(self) -> TemplateError {
        TemplateError::new(match self {
            Self::Work => "the template takes too many steps".to_owned(),
            Self::Time => format!("the template takes more than {} s", MAX_TIME.as_secs()),
            Self::Memory => "the template takes too much memory".to_owned(),
            Self::Text => format!("a string of more than {MAX_TEXT_BYTES} bytes"),
            Self::Items => format!("a list of more than {MAX_ITEMS} elements"),
        })
    }
}

/// Resources of the rendering that a thread runs.
struct ThreadBudget {
    /// Whether a rendering runs; without one nothing is charged.
    is_active: Cell<bool>,
    work: Cell<u64>,
    bytes: Cell<usize>,
    /// Time that counted so far, and the last look at the clock.
    time: Cell<Duration>,
    last_look: Cell<Option<Instant>>,
    exceeded: Cell<Option<ExceededLimit>>,
}

thread_local! {
    static BUDGET: ThreadBudget = const {
        ThreadBudget {
            is_active: Cell::new(false),
            work: Cell::new(0),
            bytes: Cell::new(0),
            time: Cell::new(Duration::ZERO),
            last_look: Cell::new(None),
            exceeded: Cell::new(None),
        }
    };
}

impl ThreadBudget {
    fn start(&self) {
        self.is_active.set(true);
        self.work.set(0);
        self.bytes.set(0);
        self.time.set(Duration::ZERO);
        self.last_look.set(Some(Instant::now()));
        self.exceeded.set(None);
    }

    /// Records an exceeded limit; the first one is reported.
    fn exceed(&self, limit: ExceededLimit) {
        if self.is_active.get() && self.exceeded.get().is_none() {
            self.exceeded.set(Some(limit));
        }
    }

    fn spend(&self, units: usize) -> bool {
        if !self.is_active.get() {
            return true;
        }
        let before = self.work.get();
        let after = before.saturating_add(units as u64);
        self.work.set(after);
        if after > MAX_WORK {
            self.exceed(ExceededLimit::Work);
        } else if after / WORK_PER_TICK != before / WORK_PER_TICK {
            self.look_at_clock();
        }
        self.exceeded.get().is_none()
    }

    fn look_at_clock(&self) {
        let now = Instant::now();
        let passed = self.last_look.replace(Some(now));
        let passed = passed.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.time.set(self.time.get() + passed.min(MAX_TICK));
        if self.time.get() > MAX_TIME {
            self.exceed(ExceededLimit::Time);
        }
    }

    fn allocate(&self, bytes: usize) {
        let total = self.bytes.get().saturating_add(bytes);
        self.bytes.set(total);
        if total > MAX_BYTES {
            self.exceed(ExceededLimit::Memory);
        }
    }
}

/// Charges work; returns whether the rendering may go on.
pub(crate) fn spend(units: usize) -> bool {
    BUDGET.with(|budget| budget.spend(units))
}

/// Charges work.
///
/// # Errors
/// If a limit is exceeded, now or earlier.
pub(crate) fn work(units: usize) -> Result<(), TemplateError> {
    match spend(units) {
        true => Ok(()),
        false => check(),
    }
}

/// Charges the memory of a value that is created, besides its content.
pub(crate) fn allocate(bytes: usize) {
    BUDGET.with(|budget| budget.allocate(bytes.saturating_add(VALUE_OVERHEAD)));
}

/// Charges the memory of a string that is created.
pub(crate) fn allocate_text(bytes: usize) {
    if bytes > MAX_TEXT_BYTES {
        BUDGET.with(|budget| budget.exceed(ExceededLimit::Text));
    }
    allocate(bytes);
}

/// Charges the memory of a list of this many elements that is created.
pub(crate) fn allocate_items(count: usize, bytes_each: usize) {
    if count > MAX_ITEMS {
        BUDGET.with(|budget| budget.exceed(ExceededLimit::Items));
    }
    allocate(count.saturating_mul(bytes_each));
}

/// Checks that no limit is exceeded.
pub(crate) fn check() -> Result<(), TemplateError> {
    let exceeded = BUDGET.with(|budget| budget.exceeded.get());
    exceeded.map_or(Ok(()), |limit| Err(limit.error()))
}

/// Checks the length of a template's source, in bytes.
pub(crate) fn source(bytes: usize) -> Result<(), TemplateError> {
    if bytes > MAX_SOURCE_BYTES {
        let message = format!("a template of {bytes} bytes, more than {MAX_SOURCE_BYTES}");
        return Err(TemplateError::new(message));
    }
    Ok(())
}

/// Checks the length of a string, in bytes.
pub(crate) fn text(bytes: usize) -> Result<(), TemplateError> {
    match bytes > MAX_TEXT_BYTES {
        true => Err(ExceededLimit::Text.error()),
        false => Ok(()),
    }
}

/// Checks the length of the output, in bytes.
pub(crate) fn output(bytes: usize) -> Result<(), TemplateError> {
    if bytes > MAX_OUTPUT_BYTES {
        let message = format!("the template writes more than {MAX_OUTPUT_BYTES} bytes");
        return Err(TemplateError::new(message));
    }
    Ok(())
}

/// Checks the length of a list.
pub(crate) fn items(count: usize) -> Result<(), TemplateError> {
    match count > MAX_ITEMS {
        true => Err(ExceededLimit::Items.error()),
        false => Ok(()),
    }
}

/// Collects at most the maximum number of elements.
///
/// # Errors
/// If there are more.
pub(crate) fn collect<T>(elements: impl Iterator<Item = T>) -> Result<Vec<T>, TemplateError> {
    let collected: Vec<T> = elements.take(MAX_ITEMS + 1).collect();
    items(collected.len())?;
    Ok(collected)
}

/// Runs `compute` on a new stack segment if little of the current one is left.
pub(crate) fn with_stack<T>(compute: impl FnOnce() -> T) -> T {
    stacker::maybe_grow(STACK_RESERVE, STACK_SEGMENT, compute)
}

/// The budget of one rendering: charges of this thread count while it lives.
#[derive(Debug)]
pub(crate) struct RenderBudget {
    depth: Cell<usize>,
}

impl Default for RenderBudget {
    fn default() -> Self {
        BUDGET.with(ThreadBudget::start);
        Self {
            depth: Cell::new(0),
        }
    }
}

impl Drop for RenderBudget {
    fn drop(&mut self) {
        BUDGET.with(|budget| {
            budget.is_active.set(false);
            budget.exceeded.set(None);
        });
    }
}

impl RenderBudget {
    /// Runs `compute` one nesting level deeper, counting a step.
    pub(crate) fn deeper<T>(
        &self,
        compute: impl FnOnce() -> Result<T, TemplateError>,
    ) -> Result<T, TemplateError> {
        work(STEP_WORK)?;
        if self.depth.get() == DEPTH {
            return Err(TemplateError::new(
                "the template is nested too deeply: does a macro recurse without end?",
            ));
        }
        self.depth.set(self.depth.get() + 1);
        let result = with_stack(compute);
        self.depth.set(self.depth.get() - 1);
        check()?;
        result
    }
}
