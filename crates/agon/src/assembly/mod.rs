//! Builds the inputs of a run from its settings: base model, adapter, prompts, judge and sampler.
//!
//! Models are loaded once and shared by all that need them; what is expensive to make (a base policy, annotated
//! pairs, a preference model) is cached under a digest of its inputs. How the roles are joined and run, this module
//! does not know.

mod adapter;
mod apo;
mod cache;
mod conditions;
mod file_pairs;
mod input_record;
mod judge;
mod judge_digest;
mod judge_pool;
mod loaded_model;
mod local_chat;
mod model_location;
mod nats_program;
mod playground;
mod preference_model;
mod preference_pairs;
mod preflight;
mod prompt_encoder;
mod prompts;
mod sampler;

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use hub::CancelToken;
use learner::{NoPrompts, PairFiles, PromptSet};
use model::{Adapter, LanguageModel};
use settings::Settings;

pub(crate) use adapter::{adapter, adapter_shape, fresh_adapter, saved_adapter};
pub(crate) use apo::{ApoJudge, judge_version, rounds_directory};
pub(crate) use conditions::conditions;
pub(crate) use file_pairs::{file_pairs, reference_key, reference_logprobs_path};
pub(crate) use judge::{CompletionOrigin, JudgeSource};
pub(crate) use judge_digest::judge_digest;
pub(crate) use judge_pool::{evaluation_judges, judge_replicas, pool, server};
pub(crate) use loaded_model::{
    LoadedModel, NO_STOP_TOKENS, device, dtype, frozen_precision, warn_without_stop_tokens,
};
pub(crate) use model_location::ModelLocation;
pub(crate) use nats_program::missing_nats_server;
pub(crate) use playground::{StyleComparison, base_model, gold_judge, style_comparisons};
pub(crate) use preference_model::{
    Backbone, JudgeFiles, JudgeUse, LoadedRewardModel, check_fit_adapter, preference_model,
    reads_tokens_of, reward_folder, same_tokenizer,
};
pub(crate) use preference_pairs::{
    AnnotatedPairs, SkippedPairs, annotated_pairs, human_verdict_pairs,
};
pub(crate) use preflight::{Preflight, PreflightFinding, PreflightScope, ReadInputs};
pub(crate) use prompt_encoder::prompt_encoder;
pub(crate) use prompts::{
    check_positions, check_run_positions, longest_sequence, prompts, reads_golden,
};
pub(crate) use sampler::{SamplerParts, check_engines, sampler};

/// Base model, adapter and prompts of a run.
pub(crate) struct RunInputs {
    /// The base model: the reference policy, and without an adapter also the policy at the start.
    pub(crate) model: LoadedModel,
    /// The LoRA adapter at the start; `None` if all weights are trained.
    adapter: Option<Adapter>,
    /// The folder it was loaded from; `None` for a newly initialised one.
    pub(crate) adapter_folder: Option<PathBuf>,
    /// Training and held-out prompts; none in a run that samples nothing.
    pub(crate) prompts: Arc<dyn PromptSet>,
    /// Pairs from files; `None` if batches have none.
    pub(crate) pairs: Option<Arc<PairFiles>>,
}

impl RunInputs {
    /// Loads or makes the base model, the prompts and the pairs that the settings name; those in `read` are used as they
    /// are. Blocks; ends early once `cancel` is cancelled.
    pub(crate) fn build(
        settings: &Settings,
        read: ReadInputs,
        cancel: &CancelToken,
    ) -> anyhow::Result<Self> {
        check_engines(settings)?;
        let model = LoadedModel::open(settings, cancel)?;
        let prompts = match read.prompts {
            Some(prompts) => prompts,
            None if settings.needs_samples() => prompts::prompts(settings, &model, cancel)?,
            None => Arc::new(NoPrompts),
        };
        let mut pairs = match read.pairs {
            Some(pairs) => Some(pairs),
            None => file_pairs(settings, &model, cancel)?,
        };
        if let Some(pairs) = &mut pairs {
            let pairs = Arc::get_mut(pairs).context("the pairs are in use already")?;
            pairs.remove_held_out(&settings.pairs, &*prompts)?;
        }
        check_run_positions(settings, &model.folder.config)?;
        let adapter_folder = saved_adapter(settings, cancel)?;
        let adapter = adapter(settings, &model, adapter_folder.as_deref())?;
        let precision = frozen_precision(settings, adapter.is_some());
        Ok(Self {
            model: model.packed(precision)?,
            adapter,
            adapter_folder,
            prompts,
            pairs,
        })
    }

    /// Whether an adapter is trained, and not all weights.
    pub(crate) fn trains_adapter(&self) -> bool {
        self.adapter.is_some()
    }

    /// The policy at the start, for the learner: weights that are all trained are read anew, as they are exactly.
    pub(crate) fn policy_to_train(&self, settings: &Settings) -> anyhow::Result<LanguageModel> {
        let is_packed = frozen_precision(settings, self.trains_adapter()).is_some();
        if self.trains_adapter() || !is_packed {
            return self.policy();
        }
        LoadedModel::read(settings, &self.model.folder.path)?.language_model()
    }

    /// The policy at the start: the base model, with the adapter if one is trained. All copies share the weights.
    pub(crate) fn policy(&self) -> anyhow::Result<LanguageModel> {
        self.model.policy(self.adapter.clone())
    }
}

#[cfg(test)]
mod tests {
    use model::Precision;
    use settings::Override;

    use super::*;

    /// What is trained as a whole begins with the exact weights, whatever the roles share.
    #[test]
    fn rounded_weights_are_not_trained() {
        let directory = tempfile::tempdir().unwrap();
        let base = format!("playground.base_dir={:?}", directory.path().join("base"));
        let sets = [
            base.as_str(),
            "prompts.kind=bandit",
            "model.reference_probabilities=[0.5, 0.3, 0.2]",
            "preference.judge={ kind = \"matrix\", matrix = [[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]] }",
            "actor.max_new_tokens=1",
            "learner.precision=bf16",
            "actor.precision=bf16",
        ];
        let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
        let settings = settings::resolve("", "test", &sets).unwrap().settings;
        let never = CancelToken::never();
        let inputs = RunInputs::build(&settings, ReadInputs::default(), &never).unwrap();
        let held = &inputs.model.weights;
        assert_eq!(held.packed_precision(), Some(Precision::Bf16));
        let read = LoadedModel::read(&settings, &inputs.model.folder.path).unwrap();
        let exact = read.weights.digest().unwrap();
        assert_ne!(held.digest().unwrap(), exact);
        let trained = inputs.policy_to_train(&settings).unwrap();
        assert_eq!(trained.weights().digest().unwrap(), exact);
        // Judges share what is held in their precision, and read what is not.
        let judging = inputs.model.judging_backbone(Precision::Bf16).unwrap();
        assert_eq!(
            judging.map(|weights| weights.packed_precision()),
            Some(Some(Precision::Bf16))
        );
        assert!(
            inputs
                .model
                .judging_backbone(Precision::F32)
                .unwrap()
                .is_none()
        );
        let judging = read.judging_backbone(Precision::F32).unwrap();
        assert_eq!(judging.unwrap().digest().unwrap(), exact);
    }
}
