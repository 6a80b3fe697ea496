//! Stand-in until the encoders come.
use crate::{Device, ModelError};
/// An encoder.
#[derive(Clone, Debug)]
pub struct Encoder;
impl Encoder {
    /// Loads.
    pub fn load(_: &std::path::Path, _: &Device) -> Result<Self, ModelError> {
        Ok(Self)
    }
    /// Scores.
    pub fn score_texts(&self, texts: &[String]) -> Result<Vec<f32>, ModelError> {
        Ok(vec![0.0; texts.len()])
    }
}
