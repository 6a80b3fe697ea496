//! Requests to an engine.

use std::time::Duration;

/// Selects the tokens of one completion from its logits.
pub trait TokenSelector: Send + 'static {
    /// Selects the token that follows `context` (the prompt and the tokens generated so far) from `logits`, one value
    /// per vocabulary token. `None` ends the completion.
    fn select(&mut self, logits: &[f32], context: &[u32]) -> Option<u32>;
}

/// A completion request to an [`Engine`](crate::engine::Engine).
#[derive(Debug, Clone)]
pub struct EngineRequest {
    /// Token ids of the prompt.
    pub ids: Vec<u32>,
    /// Maximum length of the completion, in tokens.
    pub max_new_tokens: usize,
    /// Timeout, queueing included.
    pub timeout: Duration,
}

/// Dtype in which weights are loaded and computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadDtype {
    /// 32-bit floating point.
    F32,
    /// Chosen by mistral.rs from the model's dtype and the processor.
    Auto,
}
