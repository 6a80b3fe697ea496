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
mod settings;
mod sft;
mod source;
mod staleness;
mod telemetry;
mod tournament;
mod transport;
mod url;

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
pub use settings::Settings;
pub use sft::SftSettings;
pub use source::{HubModel, InvalidHubModel, ModelSource};
pub use telemetry::TelemetrySettings;
pub use tournament::{
    KeptVariants, MethodVariant, TOURNAMENT_REFERENCE, Tournament, TournamentJudge,
    TournamentMethod,
};
pub use transport::{JetStreamSettings, TopologySettings, TransportSettings, WeightsEncoding};
