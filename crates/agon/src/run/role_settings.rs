//! Values that the roles derive from several settings at once: sampling, pacing, mixtures and dtypes.

use actor::{CompletionPlan, IdenticalPairs};
use learner::{ApoSchedule, Sampling, planned_steps};
use messages::{CompletionCounts, MessageLimits, Pacing, WeightsVersion};
use model::{DType, ModelConfig, Precision, PublishedForm, SamplingSettings};
use settings::{
    CurriculumSetting, ObjectiveSettings, PromptsSettings, Settings, TransportSettings,
};

use crate::assembly::{self, RunInputs};

/// Sampling settings of the actors.
pub(crate) fn sampling(settings: &Settings) -> SamplingSettings {
    let actor = &settings.actor;
    SamplingSettings {
        temperature: actor.temperature,
        top_k: actor.top_k,
        top_p: actor.top_p,
        min_p: actor.min_p,
        max_new_tokens: actor.max_new_tokens,
        precision: model::sampling_precision(actor.precision),
    }
}

/// Pacing of the prompts: batched for a single strictly on-policy actor, so that a seed reproduces a run bit by bit.
pub(super) fn pacing(settings: &Settings) -> Pacing {
    let actors = match settings.transport {
        TransportSettings::Memory {} => 1,
        TransportSettings::Jetstream(_) => settings.topology.actors,
    };
    if settings.learner.max_staleness == 0 && actors * settings.actor.count == 1 {
        Pacing::Batched
    } else {
        Pacing::EachPrompt
    }
}

/// Floor of the curriculum over the prompts, if there is one.
pub(super) fn curriculum_floor(settings: &Settings) -> Option<f64> {
    match &settings.prompts {
        PromptsSettings::Dataset(dataset) => {
            let is_on = dataset.curriculum == CurriculumSetting::Signal;
            is_on.then_some(dataset.curriculum_floor)
        }
        PromptsSettings::Playground { .. } | PromptsSettings::Bandit {} => None,
    }
}

/// Whether actors sample from exactly the distribution that the learner computes: without temperature, truncation or
/// reduced precision, and with weights that are not rounded in transport.
pub(super) fn sampling_kind(settings: &Settings) -> Sampling {
    let own = sampling(settings);
    let rounded = weights_dtype(settings) != assembly::dtype(settings.model.dtype);
    match own.is_exact() && own.precision == Precision::F32 && !rounded {
        true => Sampling::Exact,
        false => Sampling::Altered,
    }
}

/// Dtype of published weights; within one process that of the model.
fn weights_dtype(settings: &Settings) -> DType {
    assembly::dtype(match &settings.transport {
        TransportSettings::Memory {} => settings.model.dtype,
        TransportSettings::Jetstream(jetstream) => jetstream.weights_dtype,
    })
}

/// Form of published weights. Within one process actors read them where they are: packed, if all weights are trained and actors
/// and the learner multiply in the same precision.
pub(crate) fn weights_form(settings: &Settings, has_adapter: bool) -> PublishedForm {
    let precision = assembly::frozen_precision(settings, has_adapter);
    let is_shared = |precision: &Precision| {
        let is_memory = matches!(settings.transport, TransportSettings::Memory {});
        is_memory && !has_adapter && *precision == sampling(settings).precision
    };
    match precision.filter(is_shared) {
        Some(precision) => PublishedForm::Packed(precision),
        None => PublishedForm::Tensors(weights_dtype(settings)),
    }
}

/// Steps that the run takes: `learner.steps`, or fewer if `pairs.epochs` passes over its pairs end it earlier.
pub(super) fn steps(settings: &Settings, inputs: &RunInputs) -> u64 {
    let pairs = inputs.pairs.as_ref().map_or(0, |pairs| pairs.count());
    planned_steps(&settings.learner, &settings.pairs, pairs)
}

/// Schedule of adversarial preference optimisation; `None` if it is off.
pub(super) fn apo_schedule(settings: &Settings) -> Option<ApoSchedule> {
    let apo = &settings.preference.apo;
    (apo.refresh_steps > 0).then_some(ApoSchedule {
        interval: apo.refresh_steps,
        max_rounds: apo.max_rounds,
        prompts: apo.prompts,
    })
}

/// Completions that an actor samples for each prompt.
pub(super) fn completion_plan(settings: &Settings) -> CompletionPlan {
    CompletionPlan {
        mixture_coefs: mixture_coefs(settings),
        apo_samples: settings.preference.apo.samples,
        exact_samples: usize::from(!sampling(settings).is_exact()),
        max_new_tokens: settings.actor.max_new_tokens,
        records_reference: settings.learner.leaves_out_labels(),
    }
}

/// Limits of the messages of a run whose policy has this configuration.
pub(super) fn message_limits(settings: &Settings, config: &ModelConfig) -> MessageLimits {
    let plan = completion_plan(settings);
    let room = config.max_positions.saturating_sub(plan.max_new_tokens);
    let reads_golden = assembly::reads_golden(settings);
    MessageLimits {
        vocabulary: config.vocab_size,
        prompt_tokens: settings.actor.max_prompt_length.min(room),
        golden_tokens: reads_golden.then_some(config.max_positions),
        completion_tokens: plan.max_new_tokens,
        file_tokens: settings
            .pairs
            .is_used()
            .then_some(settings.pairs.max_length.min(config.max_positions)),
        completions: CompletionCounts {
            train: plan.mixture_coefs.len(),
            evaluate: 2 + plan.exact_samples,
            apo: plan.apo_samples,
        },
        batch_prompts: settings.learner.prompt_window(),
        // A prompt is at most one upload ahead, and a rollback skips steps.
        lead_steps: settings.learner.weight_sync_steps.saturating_add(1000),
        newest: WeightsVersion::REFERENCE,
    }
}

/// Weight on the reference of each completion: Nash-MD by policy gradient compares a completion of the policy with one
/// of the mixture, all other objectives compare completions of the mixture.
fn mixture_coefs(settings: &Settings) -> Vec<f32> {
    let mixture = settings.actor.mixture_coef as f32;
    match settings.learner.objective {
        ObjectiveSettings::NashMdPg { .. } => vec![0.0, mixture],
        _ => vec![mixture; settings.actor.num_generations],
    }
}

/// Treatment of pairs of identical completions.
pub(super) fn identical_pairs(settings: &Settings) -> IdenticalPairs {
    match settings.learner.objective {
        ObjectiveSettings::NashMdPg { .. }
        | ObjectiveSettings::Rpo { .. }
        | ObjectiveSettings::RejectionSampling {} => IdenticalPairs::Keep,
        _ => IdenticalPairs::Drop,
    }
}

#[cfg(test)]
mod tests {
    use settings::Override;

    use super::*;

    #[test]
    fn sampling_is_exact_only_with_the_learners_precision() {
        let kind = |sets: &[&str]| {
            let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
            sampling_kind(&settings::resolve("", "test", &sets).unwrap().settings)
        };
        let over_nats = "transport.kind=jetstream";
        for exact in [
            &[][..],
            &["model.dtype=bf16"],
            &[over_nats, "transport.weights_dtype=f32"],
            &[
                over_nats,
                "transport.weights_dtype=bf16",
                "model.dtype=bf16",
            ],
        ] {
            assert_eq!(kind(exact), Sampling::Exact, "{exact:?}");
        }
        for altered in [
            &["actor.temperature=0.9"][..],
            &["actor.top_k=5"],
            &["actor.precision=int8"],
            &[over_nats, "transport.weights_dtype=bf16"],
        ] {
            assert_eq!(kind(altered), Sampling::Altered, "{altered:?}");
        }
    }
}
