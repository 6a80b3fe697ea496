//! Cancellation of long-running work from elsewhere.

use std::{fmt, sync::Arc};

/// Cancellation token, polled by long-running work. Clones share one source; work polls it between units.
#[derive(Clone, Default)]
pub struct CancelToken {
    is_cancelled: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl CancelToken {
    /// A token that is cancelled while `is_cancelled` returns true.
    pub fn new(is_cancelled: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self {
            is_cancelled: Some(Arc::new(is_cancelled)),
        }
    }

    /// A token that is never cancelled.
    pub fn never() -> Self {
        Self::default()
    }

    /// Whether the work is to end.
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.as_ref().is_some_and(|source| source())
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.is_cancelled();
        f.debug_tuple("CancelToken").field(&state).finish()
    }
}
