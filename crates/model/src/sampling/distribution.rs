//! One token: mix two rows of logits, temper, truncate, draw.

use super::SamplingSettings;
#[cfg(test)]
use crate::ops::log_sum_exp;
use crate::ops::{PART, exponentials, largest_of};

/// A drawn token and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// The token.
    pub token: u32,
    /// Its log-probability under the distribution it was drawn from.
    pub behaviour_logp: f32,
    /// ln Σ e^z of the logits it was drawn from, where they were not tempered.
    pub log_sum: Option<f64>,
}

/// Room for rows of the vocabulary, kept between draws.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The mixed logits.
    pub(super) mixed: Vec<f32>,
    /// Of every token, up to a factor.
    weights: Vec<f32>,
    /// Their sums, a part of the vocabulary each.
    sums: Vec<f64>,
    /// Tokens that truncation leaves.
    kept: Vec<u32>,
}

/// The geometric mixture `(1 − m)·z_π + m·z_ref`, m being the weight on the reference (Munos et al. 2023,
/// Nash-MD; Calandriello et al. 2024, IPO-MD). m = 0 is the policy and m = 1 the reference themselves; what
/// lies between is laid into `room`.
pub fn mix<'a>(
    policy: &'a [f32],
    reference: &'a [f32],
    mixture_coef: f32,
    room: &'a mut Vec<f32>,
) -> &'a [f32] {
    if mixture_coef == 0.0 {
        return policy;
    }
    if mixture_coef == 1.0 {
        return reference;
    }
    let blend = |(&p, &r): (&f32, &f32)| (1.0 - mixture_coef) * p + mixture_coef * r;
    room.clear();
    room.extend(policy.iter().zip(reference).map(blend));
    room
}

/// log softmax(`logits`)[`token`].
#[cfg(test)]
pub(crate) fn log_softmax_at(logits: &[f32], token: u32) -> f32 {
    (f64::from(logits[token as usize]) - log_sum_exp(logits)) as f32
}

/// Draws a token from softmax(`mixed` / T), truncated as the settings say, with `uniform` in [0, 1).
///
/// Truncation follows the field's order: top-k, then top-p, then min-p, each on what is left; the
/// likeliest token always stays. `None` when a logit is NaN: such a row has no distribution.
pub fn draw(
    mixed: &[f32],
    settings: &SamplingSettings,
    uniform: f64,
    scratch: &mut Scratch,
) -> Option<Draw> {
    let most = largest_of(mixed);
    let scale = (most, settings.temperature);
    exponentials(mixed, scale, &mut scratch.weights, &mut scratch.sums);
    let mut total: f64 = scratch.sums.iter().sum();
    if !total.is_finite() || total <= 0.0 {
        return None;
    }
    let is_tempered = settings.temperature != 1.0;
    let log_sum = (!is_tempered).then(|| f64::from(most) + total.ln());
    let token = if settings.truncates() {
        truncate(scratch, total, settings);
        let weights = || {
            scratch
                .kept
                .iter()
                .map(|&token| (token, scratch.weight(token)))
        };
        total = weights().map(|(_, weight)| weight).sum();
        inverse(weights(), uniform * total)?
    } else {
        let (part, before) = scratch.part(uniform * total);
        let weights = scratch
            .weights
            .iter()
            .enumerate()
            .skip(part * PART)
            .take(PART);
        let weights = weights.map(|(token, &weight)| (token as u32, f64::from(weight)));
        inverse(weights, uniform * total - before)?
    };
    let logit = f64::from(mixed[token as usize]) - f64::from(most);
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

    /// The part of the vocabulary in which the running sum passes `target`, and the sum before it.
    fn part(&self, target: f64) -> (usize, f64) {
        let mut before = 0.0;
        for (part, sum) in self.sums.iter().enumerate() {
            if before + sum > target {
                return (part, before);
            }
            before += sum;
        }
        let last = self.sums.iter().rposition(|&sum| sum > 0.0).unwrap_or(0);
        (last, self.sums[..last].iter().sum())
    }
}

/// The first token at which the running sum passes `target`, or the last one; never one without weight.
fn inverse(weights: impl Iterator<Item = (u32, f64)>, target: f64) -> Option<u32> {
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

/// Leaves in `kept`, in the order of the vocabulary, the tokens that truncation leaves. `total` is the sum
/// of all weights.
///
/// Nothing is sorted but what may be in the nucleus: the tokens below (1 − top-p) / V of the total have
/// together no more than what lies outside it.
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
        let least = (1.0 - settings.top_p) * total / weights.len() as f64;
        let candidates = (0..weights.len() as u32).filter(|&token| weight(token) >= least);
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
    let most = kept.iter().map(|&token| weight(token)).fold(0.0, f64::max);
    kept.retain(|&token| weight(token) >= settings.min_p * most);
    kept.sort_unstable();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> SamplingSettings {
        SamplingSettings::plain(1)
    }

    /// The distribution that `draw` samples from, by walking the unit interval.
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
    fn truncation_by_hand() {
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
    fn the_token_level_mixture_of_two_steps_has_the_papers_numbers() {
        let step = |p: &[f64], r: &[f64]| {
            let mut room = Vec::new();
            distribution(mix(&logits(p), &logits(r), 0.5, &mut room), &plain())
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
    fn the_sum_is_told_of_logits_as_they_are_and_whatever_is_cut_off() {
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
