//! Importance weights of pairs that the current policy did not sample.
//!
//! The weight of a label is w = Π π_now(y)/μ(y) over its two completions, whose expectation under μ is 1 and for which
//! E_μ[w·L(y, y')] = E_π[L(y, y')] wherever μ has support. π_now is the learner's own pass, without gradient; for a
//! completion of the mixture it is the mixture of π_now and the reference. μ is the distribution that the completion was
//! sampled from, as its actor recorded it: at its temperature, after its truncation, in its precision.
//!
//! Promises that a label with an unrecorded completion, as in a file of pairs, has no weight and counts as 1. Does not
//! know which loss is weighted.

use messages::Completion;
use settings::{LearnerSettings, OffPolicy};
use telemetry::Measurements;

use crate::{
    micro_batch::MicroBatch,
    trainer::metrics::{effective_share, split_by_lengths},
};

/// Correction of a run's labels by their importance weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Correction {
    pub(crate) kind: OffPolicy,
    /// Bound c > 1.
    pub(crate) max_ratio: f64,
}

impl Correction {
    pub(crate) fn new(settings: &LearnerSettings) -> Self {
        Self {
            kind: settings.off_policy,
            max_ratio: settings.max_ratio,
        }
    }

    /// Whether labels of a pass are weighted.
    pub(crate) fn is_on(&self, micro: &MicroBatch<'_>) -> bool {
        let mut completions = micro.scored();
        self.kind
            .corrects(completions.any(|c| !c.behaviour_logp.is_empty()))
    }

    /// Weight in the loss of every label of a pass, given its log w.
    pub(crate) fn row_weights(
        &self,
        micro: &MicroBatch<'_>,
        log_weights: &[Option<f64>],
    ) -> Vec<f32> {
        let both = micro.pair_weight.iter().zip(log_weights);
        both.map(|(weight, &log_weight)| weight * self.factor(log_weight) as f32)
            .collect()
    }

    /// Factor of a label with this log w in the loss; 1 without a weight.
    pub(crate) fn factor(&self, log_weight: Option<f64>) -> f64 {
        let Some(log_weight) = log_weight else {
            return 1.0;
        };
        match self.kind {
            OffPolicy::None => 1.0,
            OffPolicy::Truncate if self.is_above(log_weight) => self.max_ratio,
            OffPolicy::Truncate => log_weight.exp(),
            OffPolicy::Mask if self.is_outside(log_weight) => 0.0,
            OffPolicy::Mask => 1.0,
        }
    }

    /// w > c
    fn is_above(&self, log_weight: f64) -> bool {
        log_weight > self.max_ratio.ln()
    }

    /// w outside [1/c, c]
    fn is_outside(&self, log_weight: f64) -> bool {
        log_weight.abs() > self.max_ratio.ln()
    }

    /// Metrics of a step's weights, given as log w, one per label; none without any.
    pub(crate) fn metrics(&self, log_weights: &[f64], m: &mut Measurements) {
        if log_weights.is_empty() {
            return;
        }
        let count = log_weights.len() as f64;
        let share = |holds: &dyn Fn(f64) -> bool| {
            log_weights.iter().filter(|&&w| holds(w)).count() as f64 / count
        };
        m.set("off_policy/ess", effective_share(log_weights));
        m.set(
            "off_policy/log_weight",
            log_weights.iter().sum::<f64>() / count,
        );
        m.set("off_policy/clipped_ratio", share(&|w| self.is_above(w)));
        m.set("off_policy/masked_ratio", share(&|w| self.is_outside(w)));
    }
}

/// Log-probabilities of a pass's response tokens under the distribution that would sample them now.
pub(crate) struct TargetLogprobs {
    /// log π_now `[R]`; of the tokens of mixture samples that of the mixture, if it was computed.
    pub(crate) tokens: Vec<f32>,
    /// Whether those of the mixture were computed.
    pub(crate) has_mixture: bool,
}

impl TargetLogprobs {
    /// log w of every label of the pass, in nats; `None` if one of its completions has no recorded μ, or is a sample of
    /// the mixture whose log-probability was not computed.
    pub(crate) fn log_weights(&self, micro: &MicroBatch<'_>) -> Vec<Option<f64>> {
        let parts = split_by_lengths(&self.tokens, &micro.lengths);
        let ratios: Vec<Option<f64>> = parts
            .zip(micro.scored())
            .map(|(now, completion)| self.log_ratio(now, completion))
            .collect();
        let sides = micro.first.iter().zip(&micro.second);
        sides
            .map(|(&first, &second)| Some(ratios[first as usize]? + ratios[second as usize]?))
            .collect()
    }

    /// log π_now(y)/μ(y) of a completion.
    fn log_ratio(&self, now: &[f32], completion: &Completion) -> Option<f64> {
        let recorded = &completion.behaviour_logp;
        let is_computed = self.has_mixture || completion.mixture_coef == 0.0;
        let ratios = now
            .iter()
            .zip(recorded)
            .map(|(&now, &then)| f64::from(now) - f64::from(then));
        (is_computed && recorded.len() == now.len()).then(|| ratios.sum())
    }
}

/// Tokens of the mixture samples of a pass.
#[derive(Debug, Default)]
pub(crate) struct MixedTokens {
    /// Indices among the pass's response tokens.
    pub(crate) rows: Vec<u32>,
    /// Token ids.
    pub(crate) targets: Vec<u32>,
    /// Weight of the reference in each token's mixture.
    pub(crate) mixture_coefs: Vec<f32>,
}

impl MixedTokens {
    pub(crate) fn of(micro: &MicroBatch<'_>) -> Self {
        let (mut mixed, mut row) = (Self::default(), 0);
        for completion in micro.scored() {
            let count = completion.ids.len();
            if completion.mixture_coef != 0.0 {
                mixed.rows.extend(row..row + count as u32);
                mixed.targets.extend(&completion.ids);
                let coef = completion.mixture_coef;
                mixed.mixture_coefs.extend(std::iter::repeat_n(coef, count));
            }
            row += count as u32;
        }
        mixed
    }
}

#[cfg(test)]
mod tests {
    use messages::LabelledPair;
    use model::{DType, LanguageModel, Precision};

    use super::*;
    use crate::trainer::tests::{
        TinyModel, adapted, apply, plain_adapter, sampled, sampled_beside, step, tiny, trainer,
    };

    fn correction(kind: OffPolicy, max_ratio: f64) -> Correction {
        Correction { kind, max_ratio }
    }

    #[test]
    fn what_a_label_counts_as() {
        use OffPolicy::{Mask, None, Truncate};
        for (kind, max_ratio, weight, expected) in [
            (None, 2.0, 1000.0, 1.0),
            (None, 2.0, 0.001, 1.0),
            (Truncate, 2.0, 1.5, 1.5),
            (Truncate, 2.0, 2.5, 2.0),
            (Truncate, 2.0, 0.001, 0.001),
            (Mask, 2.0, 1.5, 1.0),
            (Mask, 2.0, 2.5, 0.0),
            (Mask, 2.0, 0.6, 1.0),
            (Mask, 2.0, 0.4, 0.0),
            (Truncate, 1e30, 1e20, 1e20),
        ] {
            let factor = correction(kind, max_ratio).factor(Some(f64::ln(weight)));
            let case = format!("{kind:?} c = {max_ratio}, w = {weight}: {factor}");
            assert!((factor - expected).abs() <= 1e-12 * expected, "{case}");
        }
        for kind in [None, Truncate, Mask] {
            assert_eq!(correction(kind, 2.0).factor(Some(0.0)), 1.0, "{kind:?}");
            assert_eq!(correction(kind, 2.0).factor(Option::None), 1.0, "{kind:?}");
        }
        // Weights whose exponential overflows or underflows.
        assert_eq!(correction(Truncate, 3.0).factor(Some(1e4)), 3.0);
        assert_eq!(correction(Truncate, 3.0).factor(Some(-1e4)), 0.0);
        assert!(correction(Truncate, 3.0).factor(Some(f64::NAN)).is_nan());
    }

    /// w = 1, 2, 4, .2 at c = 3: Σw = 7.2, Σw² = 21.04.
    #[test]
    fn metrics_by_hand() {
        let weights = [1.0, 2.0, 4.0, 0.2].map(f64::ln);
        for kind in [OffPolicy::None, OffPolicy::Truncate, OffPolicy::Mask] {
            let mut m = Measurements::new();
            correction(kind, 3.0).metrics(&weights, &mut m);
            let close = |name: &str, expected: f64| {
                let found = m.get(name).unwrap();
                assert!((found - expected).abs() < 1e-12, "{kind:?} {name}: {found}");
            };
            close("off_policy/ess", 7.2 * 7.2 / (4.0 * 21.04));
            close("off_policy/log_weight", f64::ln(1.6) / 4.0);
            close("off_policy/clipped_ratio", 0.25);
            close("off_policy/masked_ratio", 0.5);
        }
        let mut m = Measurements::new();
        correction(OffPolicy::Truncate, 3.0).metrics(&[], &mut m);
        assert_eq!(m.get("off_policy/ess"), None);
    }

    /// Pairs whose completions were sampled from the policy.
    fn of_policy(policy: &LanguageModel, precision: Precision) -> Vec<LabelledPair> {
        let mut pairs = sampled(policy, precision);
        for labelled in &mut pairs {
            let first = labelled.pair.completions[0].clone();
            labelled.pair.completions[1] = first;
        }
        pairs
    }

    /// Pretends that a pair's first completion was sampled with a log-probability that is this much lower.
    fn shift(labelled: &mut LabelledPair, by: f32) {
        labelled.pair.completions[0].behaviour_logp[0] -= by;
    }

    const TRUNCATE: [&str; 2] = ["off_policy=truncate", "max_ratio=4"];
    const MASK: [&str; 2] = ["off_policy=mask", "max_ratio=4"];

    fn loss(tiny: &TinyModel, pairs: &[LabelledPair], sets: &[&str]) -> f64 {
        let m = step(tiny, &tiny.policy, pairs, sets);
        m.get("loss/ipo").unwrap()
    }

    /// Every pair's loss is 16 at h = 0, see `trainer/tests.rs`.
    #[test]
    fn labels_are_weighted_and_the_mean_is_over_all_pairs() {
        let tiny = tiny(DType::F32);
        let mut pairs = of_policy(&tiny.policy, Precision::F32);
        let close = |pairs: &[LabelledPair], sets: &[&str], weights: [f32; 5]| {
            let expected = 16.0 * f64::from(weights.iter().sum::<f32>()) / 5.0;
            let found = loss(&tiny, pairs, sets);
            assert!(
                (found - expected).abs() < 1e-3,
                "{sets:?}: {found} for {expected}"
            );
        };
        for sets in [TRUNCATE, MASK] {
            close(&pairs, &sets, [1.0; 5]);
        }
        let two = f32::ln(2.0);
        for (labelled, by) in pairs
            .iter_mut()
            .zip([two, 3.0 * two, -two, -3.0 * two, 0.0])
        {
            shift(labelled, by);
        }
        close(&pairs, &["max_ratio=4"], [1.0; 5]);
        close(&pairs, &TRUNCATE, [2.0, 4.0, 0.5, 0.125, 1.0]);
        close(&pairs, &MASK, [1.0, 0.0, 1.0, 0.0, 1.0]);
        let passes = ["gradient_accumulation_steps=5", "train_batch_size=5"];
        let sets = [&TRUNCATE[..], &passes].concat();
        close(&pairs, &sets, [2.0, 4.0, 0.5, 0.125, 1.0]);
        let m = step(&tiny, &tiny.policy, &pairs, &["max_ratio=4"]);
        assert_eq!(m.get("off_policy/clipped_ratio"), Some(0.2));
        assert_eq!(m.get("off_policy/masked_ratio"), Some(0.4));
        // Without a record a pair counts as 1 and has no metrics.
        for labelled in &mut pairs {
            labelled.pair.completions[1].behaviour_logp.clear();
        }
        close(&pairs, &TRUNCATE, [1.0; 5]);
        let m = step(&tiny, &tiny.policy, &pairs, &TRUNCATE);
        assert_eq!(m.get("off_policy/ess"), None);
    }

    /// ESS and mean log w of a step on these pairs.
    fn weights(m: &Measurements) -> [f64; 2] {
        ["off_policy/ess", "off_policy/log_weight"].map(|name| m.get(name).unwrap())
    }

    /// Half of the samples are of the mixture.
    #[test]
    fn weights_are_one_where_the_current_weights_sampled_in_f32() {
        let tiny = tiny(DType::F32);
        let adapted = adapted(&tiny);
        for policy in [&tiny.policy, &adapted] {
            let of = |precision, sets: &[&str]| {
                weights(&step(&tiny, policy, &sampled(policy, precision), sets))
            };
            let [ess, log_weight] = of(Precision::F32, &TRUNCATE);
            assert!(
                (ess - 1.0).abs() < 1e-9 && log_weight.abs() < 1e-6,
                "{ess} {log_weight}"
            );
            for precision in [Precision::Bf16, Precision::Int8] {
                let [ess, log_weight] = of(precision, &TRUNCATE);
                assert!(
                    log_weight.abs() > 1e-5 && log_weight.abs() < 0.5,
                    "{log_weight}"
                );
                assert!(ess < 1.0 - 1e-6 && ess > 0.8, "{ess}");
            }
        }
    }

    /// The policy has moved from its reference when it samples, and moves on while the pairs are reused.
    #[test]
    fn the_mixture_of_a_trained_policy_is_that_of_its_samples() {
        let tiny = tiny(DType::F32);
        let adapter = plain_adapter(&tiny);
        for policy in [&tiny.policy, &adapter] {
            let sets = [&TRUNCATE[..], &["learning_rate=0.02", "warmup_ratio=0"]].concat();
            let mut trainer = trainer(&tiny, policy, &sets);
            let pairs = sampled(policy, Precision::F32);
            for step in 0..4 {
                apply(&mut trainer, &pairs, step);
            }
            let pairs = sampled_beside(trainer.policy(), policy.without_adapter(), Precision::F32);
            let m = apply(&mut trainer, &pairs, 4);
            let [ess, log_weight] = weights(&m);
            let moved = m.get("objective/log_ratio").unwrap();
            assert!(moved.abs() > 0.1, "the policy is its reference: {moved}");
            assert!(
                (ess - 1.0).abs() < 1e-9 && log_weight.abs() < 1e-5,
                "{ess} {log_weight}"
            );
            let [ess, log_weight] = weights(&apply(&mut trainer, &pairs, 5));
            assert!(ess < 0.999 && log_weight.abs() > 0.01, "{ess} {log_weight}");
        }
    }

    #[test]
    fn samples_of_the_mixture_have_no_weight_unless_labels_are_weighted() {
        let tiny = tiny(DType::F32);
        let pairs = sampled(&tiny.policy, Precision::F32);
        let m = step(&tiny, &tiny.policy, &pairs, &[]);
        assert_eq!(m.get("off_policy/ess"), None);
        let pairs = of_policy(&tiny.policy, Precision::F32);
        let m = step(&tiny, &tiny.policy, &pairs, &[]);
        assert!((m.get("off_policy/ess").unwrap() - 1.0).abs() < 1e-9);
    }
}
