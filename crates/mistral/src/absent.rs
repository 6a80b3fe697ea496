//! What stands for the engine in a build without mistral.rs: a type without values.

use messages::PromptText;

use crate::{Asked, MistralError, Numbers, Source, TokenWriter};

/// A model that mistral.rs has loaded. In this build there is none.
#[derive(Debug)]
pub enum Engine {}

impl Engine {
    /// Fails: this build is without mistral.rs.
    ///
    /// # Errors
    /// Always.
    pub fn load(_: &Source, _: Numbers) -> Result<Self, MistralError> {
        Err(MistralError::NotBuilt)
    }

    /// See the engine of a build with mistral.rs.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        match *self {}
    }

    /// See the engine of a build with mistral.rs.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        match *self {}
    }

    /// See the engine of a build with mistral.rs.
    ///
    /// # Errors
    /// Never: there is no engine.
    pub fn encode(&self, _: &PromptText) -> Result<Vec<u32>, MistralError> {
        match *self {}
    }

    /// See the engine of a build with mistral.rs.
    #[must_use]
    pub fn decode(&self, _: &[u32]) -> String {
        match *self {}
    }

    /// See the engine of a build with mistral.rs.
    #[must_use]
    pub fn decode_all(&self, _: &[u32]) -> String {
        match *self {}
    }

    /// See the engine of a build with mistral.rs.
    pub fn start<W: TokenWriter>(
        &self,
        _: Asked,
        _: W,
        _: impl FnOnce(W, Result<(), MistralError>) + Send + 'static,
    ) {
        match *self {}
    }
}
