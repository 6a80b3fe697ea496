//! Preference labels for pairs of completions: the [`Judge`]s, the [`JudgePool`] that batches requests over replicas
//! of a judge, the [`PreferenceService`] that labels a stream of pairs, and the [`Server`] that labels over HTTP.
//!
//! Promises: a pair is acknowledged only when its label or its drop note is stored; pairs leave in the order in which
//! they arrived; while no replica is available, pairs wait.
//! Does not know which actor sampled a pair, how labels are trained on, or which model a judge holds.

pub mod apo;
mod calibration;
mod dedup;
mod error;
mod evaluation_judge;
mod judge;
mod judge_thread;
mod label_penalties;
mod labelling;
mod pool;
mod prompt_encoder;
pub mod reward_training;
mod run;
mod server;
mod wire;

pub use calibration::{BINS, Bin, Calibration, LengthQuarter, Prediction};
pub use error::{ComparisonError, JudgeError, JudgeErrorKind, PreferenceError};
pub use evaluation_judge::EvaluationJudge;
pub use judge::{
    ChatJudge, ChatModel, ChatReply, ChatRequest, Comparison, EncoderJudge, Ensemble, EnsembleRule,
    Judge, JudgeTokenizer, Matrix, PASS_TOKENS, ReplySettings, RewardModelJudge, Route, RouteRule,
    Rules, ScoredToken, ScoredVerdict, TopLogprob, Verdict,
};
pub use label_penalties::LabelPenalties;
pub use pool::{
    ComparisonRequest, Composition, JudgePool, JudgeReplicas, Orders, Outage, OutageCause,
    PoolSettings, Preference, Rebuild, Replica, VersionedVerdict,
};
pub use prompt_encoder::{EosPolicy, NoEncoding, PromptEncoder, TokenEncoder};
pub use run::{PreferenceService, PreferenceServiceParts};
pub use server::{Server, ServerParts};
