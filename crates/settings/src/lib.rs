//! The configuration: structs, one commented default file, validation in sentences.
//!
//! [`resolve`] lays a user's file and the command line's overrides over `configs/default.toml` and
//! reports every mistake at once, each with its path and, for an unknown key, the nearest valid one.
//! Nothing reads a file, the environment or a default anywhere else. This crate knows what a setting
//! may be, not what is done with it.

mod actor;
mod choice;
mod error;
mod evaluation;
mod fit;
mod judge;
mod learner;
mod model;
mod playground;
mod preference;
mod prompts;
mod repair;
mod resolve;
mod run;
mod source;
mod validate;

use serde::{Deserialize, Serialize};

pub use actor::{ActorSettings, EngineSettings, PrecisionSetting};
pub use error::{Problem, SettingsError};
pub use evaluation::{EvaluationSettings, TelemetrySettings};
pub use fit::{
    ApoForm, ApoSettings, DatasetPairs, FitSettings, Head, PairsSettings, PlaygroundPairs,
    PoolingSetting,
};
pub use judge::{
    ChatSettings, Combine, EndpointSettings, JudgeSettings, LocalChatSettings, RuleSettings,
};
pub use learner::{
    CLIPPED_SLOPES, GanpoSettings, IpoScale, LabelKind, LearnerSettings, LogpReduction,
    LrSchedulerType, MaxGradNorm, ObjectiveSettings, RpoNll,
};
pub use model::{DtypeSetting, ModelSettings};
pub use playground::{PlaygroundSettings, SftSettings};
pub use preference::{HttpServiceSettings, OrdersSetting, PreferenceSettings};
pub use prompts::{DatasetPrompts, MixedFile, PlaygroundGolden, PromptsSettings, TooLong};
pub use resolve::{DEFAULT_TOML, Override, Resolved, resolve, resolve_file};
pub use run::{
    JetStreamSettings, RunSettings, TopologySettings, TransportSettings, WeightsEncoding,
};
pub use source::{HubModel, ModelSource, NotAHubModel};

/// Everything that can be set. See `configs/default.toml` for what each key means.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each section's type says what it is")]
pub struct Settings {
    pub run: RunSettings,
    pub transport: TransportSettings,
    pub topology: TopologySettings,
    pub model: ModelSettings,
    pub prompts: PromptsSettings,
    pub playground: PlaygroundSettings,
    pub sft: SftSettings,
    pub actor: ActorSettings,
    pub preference: PreferenceSettings,
    pub learner: LearnerSettings,
    pub evaluation: EvaluationSettings,
    pub telemetry: TelemetrySettings,
}
