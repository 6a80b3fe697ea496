//! Stub used without the `engine` feature: an uninhabited [`Engine`] whose `load` fails.

use messages::PromptText;

use crate::{
    error::MistralError,
    model_files::ModelFiles,
    request::{EngineRequest, LoadDtype, TokenSelector},
};

/// A model loaded by mistral.rs; uninhabited in this build.
#[derive(Debug)]
pub enum Engine {}

impl Engine {
    /// Fails with [`MistralError::NotBuilt`].
    ///
    /// # Errors
    /// Always.
    pub fn load(_: &ModelFiles, _: LoadDtype) -> Result<Self, MistralError> {
        Err(MistralError::NotBuilt)
    }

    /// See `Engine` of a build with the `engine` feature.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        match *self {}
    }

    /// See `Engine` of a build with the `engine` feature.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        match *self {}
    }

    /// See `Engine` of a build with the `engine` feature.
    ///
    /// # Errors
    /// Never: the type is uninhabited.
    pub fn encode(&self, _: &PromptText) -> Result<Vec<u32>, MistralError> {
        match *self {}
    }

    /// See `Engine` of a build with the `engine` feature.
    #[must_use]
    pub fn decode(&self, _: &[u32]) -> String {
        match *self {}
    }

    /// See `Engine` of a build with the `engine` feature.
    #[must_use]
    pub fn decode_all(&self, _: &[u32]) -> String {
        match *self {}
    }

    /// See `Engine` of a build with the `engine` feature.
    pub fn start<W: TokenSelector>(
        &self,
        _: EngineRequest,
        _: W,
        _: impl FnOnce(W, Result<(), MistralError>) + Send + 'static,
    ) {
        match *self {}
    }
}
