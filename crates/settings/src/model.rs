//! `[model]`: the policy and its reference.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    checks::Checks,
    lora::LoraSettings,
    prompts::PromptsSettings,
    settings::Settings,
    source::{ModelSource, check_source},
};

/// The language model that is trained, its dtype and its device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSettings {
    /// Source of the model. Without it the model is made for `prompts.kind`: the playground's base or a bandit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<ModelSource>,
    /// Reference probabilities of a bandit's arms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_probabilities: Option<Vec<f64>>,
    /// Dtype of the weights.
    pub dtype: DtypeSetting,
    /// Device: `cpu`, `cuda`, `cuda:N` or `metal`.
    pub device: String,
    /// Chat template that replaces the tokenizer's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,
    /// Rank of the LoRA adapter; 0: all weights are trained.
    pub lora_rank: usize,
    /// LoRA scaling numerator of a new adapter: the update is scaled by `lora_alpha / lora_rank`.
    pub lora_alpha: f64,
    /// Dropout probability of the adapter's inputs during training.
    pub lora_dropout: f64,
    /// Modules that a new adapter is attached to.
    pub target_modules: Vec<String>,
    /// Source of the initial adapter, instead of a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<ModelSource>,
}

/// Dtype of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeSetting {
    /// 32-bit floating point.
    F32,
    /// 16-bit brain floating point.
    Bf16,
}

impl ModelSettings {
    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        check_source("model.path", self.path.as_ref(), checks);
        check_source("model.adapter", self.adapter.as_ref(), checks);
        let lora = LoraSettings {
            rank: self.lora_rank,
            alpha: self.lora_alpha,
            dropout: self.lora_dropout,
            target_modules: &self.target_modules,
        };
        lora.check("model", checks);
        checks.require(
            self.lora_rank > 0 || self.adapter.is_none(),
            "model.lora_rank",
            "0 trains the whole weights, but model.adapter names an adapter: set it to the \"r\" of its adapter_config.json",
        );
        checks.require(
            self.path.is_none() || self.reference_probabilities.is_none(),
            "model.reference_probabilities",
            "a model is either read from model.path or made from these probabilities, not both",
        );
        let is_bandit = matches!(settings.prompts, PromptsSettings::Bandit {});
        checks.require(
            is_bandit == self.reference_probabilities.is_some(),
            "model.reference_probabilities",
            "these belong to prompts.kind = \"bandit\", and a bandit needs them: one per arm",
        );
        if let Some(probabilities) = &self.reference_probabilities {
            check_probabilities(probabilities, checks);
        }
    }
}

/// Checks the reference probabilities of a bandit.
fn check_probabilities(probabilities: &[f64], checks: &mut Checks) {
    let path = "model.reference_probabilities";
    let sum: f64 = probabilities.iter().sum();
    checks.require(
        probabilities.len() >= 2,
        path,
        "a bandit has at least two arms",
    );
    checks.require(
        probabilities.iter().all(|&p| p > 0.0 && p < 1.0),
        path,
        "every arm's probability must be between 0 and 1",
    );
    checks.require(
        (sum - 1.0).abs() < 1e-6,
        path,
        format!("they add up to {sum}, not to 1"),
    );
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::assert_reported;

    #[test]
    fn contradictions_of_the_model_are_reported() {
        assert_reported(&[
            (
                "[model]\nreference_probabilities = [0.5, 0.5]",
                "belong to prompts.kind = \"bandit\"",
            ),
            (
                "[model]\nadapter = \"a\"",
                "model.lora_rank: 0 trains the whole weights",
            ),
        ]);
    }

    #[test]
    fn empty_model_sources_are_reported() {
        assert_reported(&[
            ("[model]\npath = \"\"", "model.path: it is empty"),
            (
                "[model]\nlora_rank = 4\nadapter = \"\"",
                "model.adapter: it is empty",
            ),
            (
                "[preference.fit]\npath = \"\"",
                "preference.fit.path: it is empty",
            ),
        ]);
    }
}
