//! Configuration: typed sections, one commented default file, validation.
//!
//! [`resolve`] merges a user's file and command-line overrides into `configs/default.toml` and reports all mistakes
//! at once, each with its path and, for an unknown key, the nearest valid one. A section's keys, checks and tests
//! are in one file. No other crate reads configuration files or has default values. This crate does not know what
//! the settings are used for.

mod actor;
mod apo;
mod checks;
mod choice;
mod error;
mod evaluation;
mod fit;
mod flat;
mod ganpo;
mod judge;
mod learner;
mod lora;
mod model;
mod objective;
mod optimizer;
mod pairs;
mod playground;
mod preference;
mod prompts;
mod redaction;
mod reference;
mod repair;
mod resolve;
mod run;
mod sft;
mod source;
mod staleness;
mod telemetry;
mod transport;
mod url;

use serde::{Deserialize, Serialize};

pub use actor::{ActorSettings, EngineSettings, PrecisionSetting};
pub use apo::{ApoForm, ApoSettings};
pub use error::{Problem, SettingsError};
pub use evaluation::EvaluationSettings;
pub use fit::{DatasetPairs, FitSettings, Head, PairsSettings, PlaygroundPairs, PoolingSetting};
pub use flat::{changed_settings, flat};
pub use ganpo::GanpoSettings;
pub use judge::{
    ChatSettings, Combine, EndpointSettings, JudgeSettings, LocalChatSettings, PointwiseSettings,
    RubricSettings, RuleSettings, VerdictForm,
};
pub use learner::{
    LabelKind, LearnerSettings, LogpReduction, MaxGradNorm, OffPolicy, PairSelection,
};
pub use model::{DtypeSetting, ModelSettings};
pub use objective::{CLIPPED_SLOPES, IpoScale, ObjectiveSettings, RpoNll};
pub use optimizer::{LrSchedulerType, OptimizerSettings};
pub use pairs::{FilePairsSettings, PairLabelSource};
pub use playground::PlaygroundSettings;
pub use preference::{HttpServiceSettings, OrdersSetting, PreferenceSettings};
pub use prompts::{
    CurriculumSetting, DatasetPrompts, MixedFile, PlaygroundGolden, PromptsSettings, TooLong,
};
pub use reference::ReferenceSettings;
pub use resolve::{DEFAULT_TOML, Override, Resolved, resolve, resolve_file};
pub use run::RunSettings;
pub use sft::SftSettings;
pub use source::{HubModel, InvalidHubModel, ModelSource};
pub use telemetry::TelemetrySettings;
pub use transport::{JetStreamSettings, TopologySettings, TransportSettings, WeightsEncoding};

/// All settings. `configs/default.toml` documents every key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each section's type is documented")]
pub struct Settings {
    pub run: RunSettings,
    pub transport: TransportSettings,
    pub topology: TopologySettings,
    pub model: ModelSettings,
    pub prompts: PromptsSettings,
    pub pairs: FilePairsSettings,
    pub playground: PlaygroundSettings,
    pub sft: SftSettings,
    pub actor: ActorSettings,
    pub preference: PreferenceSettings,
    pub learner: LearnerSettings,
    pub reference: ReferenceSettings,
    pub evaluation: EvaluationSettings,
    pub telemetry: TelemetrySettings,
}
