//! All settings.

use serde::{Deserialize, Serialize};

use crate::{
    actor::ActorSettings,
    evaluation::EvaluationSettings,
    learner::LearnerSettings,
    model::ModelSettings,
    pairs::FilePairsSettings,
    playground::PlaygroundSettings,
    preference::PreferenceSettings,
    prompts::PromptsSettings,
    reference::ReferenceSettings,
    run::RunSettings,
    sft::SftSettings,
    telemetry::TelemetrySettings,
    transport::{TopologySettings, TransportSettings},
};

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
