//! Sampling of one token: mixture, temperature, truncation, draw.

use crate::sampling::SamplingSettings;
#[cfg(test)]
use kernels::log_sum_exp;
use kernels::{SUM_CHUNK, exponentials, max_value};

/// A sampled token with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Token id.
    pub token: u32,
    /// Log-probability under the distribution it was sampled from.
    pub behaviour_logp: f32,
    /// Log-sum-exp of the mixed logits; `None` at temperatures other than 1.
    pub log_sum: Option<f64>,
}

/// Buffers over the vocabulary, reused between draws.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Mixed logits.
    pub(super) mixed: Vec<f32>,
    /// Unnormalised probability of every token.
    weights: Vec<f32>,
    /// Sums of the weights over chunks of the vocabulary, [`SUM_CHUNK`] tokens each.
    sums: Vec<f64>,
    /// Tokens that remain after truncation.
    kept: Vec<u32>,
}

/// The geometric mixture `(1 − m)·z_π + m·z_ref`, m being the weight on the reference (Munos et al. 2023, Nash-MD;
/// Calandriello et al. 2024, IPO-MD). m = 0 and m = 1 return the policy's and the reference's logits themselves; other
/// mixtures are written to `buffer`.
pub fn mix<'a>(
    policy: &'a [f32],
    reference: &'a [f32],
    mixture_coef: f32,
    buffer: &'a mut Vec<f32>,
) -> &'a [f32] {
    if mixture_coef == 0.0 {
        return policy;
    }
    if mixture_coef == 1.0 {
        return reference;
    }
    let blend = |(&p, &r): (&f32, &f32)| (1.0 - mixture_coef) * p + mixture_coef * r;
    buffer.clear();
    buffer.extend(policy.iter().zip(reference).map(blend));
    buffer
}

/// log softmax(`logits`)[`token`].
#[cfg(test)]
pub(crate) fn log_softmax_at(logits: &[f32], token: u32) -> f32 {
    (f64::from(logits[token as usize]) - log_sum_exp(logits)) as f32
}

/// Samples a token from softmax(`mixed` / T), truncated according to the settings, with `uniform` in [0, 1).
///
/// Truncation order is top-k, top-p, min-p, each on the remaining tokens; the most likely token always remains. `None`
/// when a logit is NaN or all are −∞.
pub fn draw(
    mixed: &[f32],
    settings: &SamplingSettings,
    uniform: f64,
    scratch: &mut Scratch,
) -> Option<Draw> {
    let max_logit = max_value(mixed);
    exponentials(
        mixed,
        max_logit,
        settings.temperature,
        &mut scratch.weights,
        &mut scratch.sums,
    );
    let mut total: f64 = scratch.sums.iter().sum();
    if !total.is_finite() || total <= 0.0 {
        return None;
    }
    let log_sum = (settings.temperature == 1.0).then(|| f64::from(max_logit) + total.ln());
    let token = if settings.truncates() {
        truncate(scratch, total, settings);
        let weighted = |&token: &u32| (token, scratch.weight(token));
        let weights = || scratch.kept.iter().map(weighted);
        total = weights().map(|(_, weight)| weight).sum();
        inverse_cdf(weights(), uniform * total)?
    } else {
        let (chunk, before) = scratch.chunk(uniform * total);
        let weights = scratch
            .weights
            .iter()
            .enumerate()
            .skip(chunk * SUM_CHUNK)
            .take(SUM_CHUNK);
        let weights = weights.map(|(token, &weight)| (token as u32, f64::from(weight)));
        inverse_cdf(weights, uniform * total - before)?
    };
    let logit = f64::from(mixed[token as usize]) - f64::from(max_logit);
    Some(Draw {
        token,
        behaviour_logp: (logit / settings.temperature - total.ln()) as f32,
        log_sum,
    })
}

impl Scratch {
    fn weight(&self, token: u32) -> f64 {
        f64::from(self.weights[token as usize])
    }

    /// Chunk of the vocabulary in which the cumulative sum exceeds `target`, and the sum before it.
    fn chunk(&self, target: f64) -> (usize, f64) {
        let mut before = 0.0;
        for (chunk, sum) in self.sums.iter().enumerate() {
            if before + sum > target {
                return (chunk, before);
            }
            before += sum;
        }
        let last = self.sums.iter().rposition(|&sum| sum > 0.0).unwrap_or(0);
        (last, self.sums[..last].iter().sum())
    }
}

/// First token at which the cumulative sum exceeds `target`, or the last one; never a token of zero weight.
fn inverse_cdf(weights: impl Iterator<Item = (u32, f64)>, target: f64) -> Option<u32> {
    let (mut sum, mut last) = (0.0, None);
    for (token, weight) in weights.filter(|&(_, weight)| weight > 0.0) {
        sum += weight;
        last = Some(token);
        if sum > target {
            break;
        }
    }
    last
}

/// Writes the tokens that remain after truncation to `kept`, in vocabulary order. `total` is the sum of all weights.
///
/// Only candidates for the nucleus are sorted: the tokens below (1 − top-p) / V of the total have together at most the
/// mass outside it.
fn truncate(scratch: &mut Scratch, mut total: f64, settings: &SamplingSettings) {
    let (weights, kept) = (&scratch.weights, &mut scratch.kept);
    let weight = |token: u32| f64::from(weights[token as usize]);
    let descending = |a: &u32, b: &u32| weight(*b).total_cmp(&weight(*a)).then(a.cmp(b));
    kept.clear();
    if settings.top_k > 0 && settings.top_k < weights.len() {
        kept.extend(0..weights.len() as u32);
        kept.select_nth_unstable_by(settings.top_k - 1, descending);
        kept.truncate(settings.top_k);
        total = kept.iter().map(|&token| weight(token)).sum();
    } else {
        let min_weight = (1.0 - settings.top_p) * total / weights.len() as f64;
        let candidates = (0..weights.len() as u32).filter(|&token| weight(token) >= min_weight);
        kept.extend(candidates);
    }
    if settings.top_p < 1.0 {
        kept.sort_unstable_by(descending);
        let mut sum = 0.0;
        let nucleus = kept.iter().take_while(|&&token| {
            let before = sum;
            sum += weight(token);
            before < settings.top_p * total
        });
        let count = nucleus.count().max(1);
        kept.truncate(count);
    }
    let max_weight = kept.iter().map(|&token| weight(token)).fold(0.0, f64::max);
    kept.retain(|&token| weight(token) >= settings.min_p * max_weight);
    kept.sort_unstable();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> SamplingSettings {
        SamplingSettings::plain(1)
    }

    /// The distribution that `draw` samples from, by enumerating the unit interval.
    fn distribution(logits: &[f32], settings: &SamplingSettings) -> Vec<f64> {
        let mut scratch = Scratch::default();
        let mut found = vec![0.0; logits.len()];
        for step in 0..10_000 {
            let uniform = (f64::from(step) + 0.5) / 10_000.0;
            let drawn = draw(logits, settings, uniform, &mut scratch).unwrap();
            found[drawn.token as usize] = f64::from(drawn.behaviour_logp).exp();
        }
        found
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-6, "{found:?} is not {expected:?}");
        }
    }

    fn logits(p: &[f64]) -> Vec<f32> {
        p.iter().map(|p| p.ln() as f32).collect()
    }

    #[test]
    fn truncation_matches_hand_worked_values() {
        let z = logits(&[0.1, 0.4, 0.2, 0.3]);
        let with = |top_k, top_p, min_p| SamplingSettings {
            top_k,
            top_p,
            min_p,
            ..plain()
        };
        close(&distribution(&z, &plain()), &[0.1, 0.4, 0.2, 0.3]);
        close(
            &distribution(&z, &with(2, 1.0, 0.0)),
            &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        );
        close(
            &distribution(&z, &with(0, 0.6, 0.0)),
            &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        );
        close(
            &distribution(&z, &with(0, 1e-9, 0.0)),
            &[0.0, 1.0, 0.0, 0.0],
        );
        close(
            &distribution(&z, &with(0, 1.0, 0.45)),
            &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0],
        );
        close(&distribution(&z, &with(1, 1.0, 1.0)), &[0.0, 1.0, 0.0, 0.0]);
        let half = SamplingSettings {
            temperature: 0.5,
            ..plain()
        };
        close(
            &distribution(&z, &half),
            &[0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3],
        );
    }

    #[test]
    fn the_token_level_mixture_of_two_steps_matches_the_paper() {
        let step = |p: &[f64], r: &[f64]| {
            let mut buffer = Vec::new();
            distribution(mix(&logits(p), &logits(r), 0.5, &mut buffer), &plain())
        };
        let first = step(&[0.9, 0.1], &[0.4, 0.6]);
        let second = [
            step(&[0.5, 0.5], &[0.2, 0.8]),
            step(&[0.99, 0.01], &[0.3, 0.7]),
        ];
        let joint: Vec<f64> = (0..4)
            .map(|i| first[i / 2] * second[i / 2][i % 2])
            .collect();
        close(&joint, &[0.236_701, 0.473_401, 0.251_315, 0.038_582]);
    }

    #[test]
    fn the_ends_of_the_mixture_are_exact() {
        let (policy, reference) = (vec![0.1f32, -3.3, 7.0], vec![2.0f32, 1e-7, -40.0]);
        for (coef, end) in [(0.0, &policy), (1.0, &reference)] {
            assert_eq!(mix(&policy, &reference, coef, &mut Vec::new()), end);
        }
    }

    #[test]
    fn a_row_without_a_distribution_draws_nothing() {
        let mut scratch = Scratch::default();
        assert_eq!(draw(&[0.0, f32::NAN], &plain(), 0.5, &mut scratch), None);
        assert_eq!(
            draw(&[f32::NEG_INFINITY; 2], &plain(), 0.5, &mut scratch),
            None
        );
        let drawn = draw(&[f32::NEG_INFINITY, 1.0], &plain(), 0.0, &mut scratch).unwrap();
        assert_eq!((drawn.token, drawn.behaviour_logp), (1, 0.0));
        assert_eq!(drawn.log_sum, Some(1.0));
    }

    #[test]
    fn the_log_sum_is_of_untruncated_logits_at_temperature_1() {
        let z: Vec<f32> = (0..3000).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
        let drawn = |temperature, top_k| {
            let settings = SamplingSettings {
                temperature,
                top_k,
                ..plain()
            };
            draw(&z, &settings, 0.4, &mut Scratch::default()).unwrap()
        };
        for top_k in [0, 5] {
            assert_eq!(drawn(1.0, top_k).log_sum, Some(log_sum_exp(&z)));
            assert_eq!(drawn(0.7, top_k).log_sum, None);
        }
    }
}
