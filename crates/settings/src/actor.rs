//! `[actor]`.

use serde::{Deserialize, Serialize};

/// How completions are sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActorSettings {
    /// Actors in this process.
    pub count: usize,
    /// Completions that one actor writes at once.
    pub slots: usize,
    /// Completions of a prompt.
    pub num_generations: usize,
    /// Weight on the reference in the behaviour policy.
    pub mixture_coef: f64,
    /// Divides the mixed logits.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1: all.
    pub top_p: f64,
    /// Only tokens at least so likely, relative to the likeliest; 0: all.
    pub min_p: f64,
    /// How weights are kept while completions are written.
    pub precision: PrecisionSetting,
    /// How far coarse numbers may lead from f32, in nats a token, before weights are kept in f32; 0: however far.
    pub max_drift: f64,
    /// The longest completion, in tokens.
    pub max_new_tokens: usize,
    /// The longest prompt, in tokens.
    pub max_prompt_length: usize,
    /// What writes completions.
    pub engine: EngineSettings,
}

/// What writes completions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum EngineSettings {
    /// Agon's own sampler.
    Own {},
    /// mistral.rs for the policy, with Agon's own reference beside it.
    Mistral {
        /// How long one completion may take, in seconds.
        timeout_seconds: f64,
    },
}

/// How the weights of policy and reference are kept while completions are written, on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrecisionSetting {
    /// As they are trained.
    F32,
    /// The upper half of each number.
    Bf16,
    /// Bytes, with a scale for every column and every row.
    Int8,
}
