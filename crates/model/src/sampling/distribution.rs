//! One token: mix two rows of logits, temper, truncate, draw.

use super::SamplingSettings;

/// A drawn token and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// The token.
    pub token: u32,
    /// Its log-probability under the distribution it was drawn from.
    pub behaviour_logp: f32,
}

/// Room for rows of the vocabulary, kept between draws.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) mixed: Vec<f32>,
    probabilities: Vec<f64>,
    order: Vec<u32>,
}

/// The geometric mixture `(1 − m)·z_π + m·z_ref` into `mixed`, m being the weight on the reference
/// (Munos et al. 2023, Nash-MD; Calandriello et al. 2024, IPO-MD). m = 0 is the policy and m = 1 the
/// reference to the last bit.
pub fn mix(policy: &[f32], reference: &[f32], mixture_coef: f32, mixed: &mut Vec<f32>) {
    mixed.clear();
    if mixture_coef == 0.0 {
        mixed.extend_from_slice(policy);
    } else if mixture_coef == 1.0 {
        mixed.extend_from_slice(reference);
    } else {
        let blend = |(&p, &r): (&f32, &f32)| (1.0 - mixture_coef) * p + mixture_coef * r;
        mixed.extend(policy.iter().zip(reference).map(blend));
    }
}

/// log softmax(`logits`)[`token`], summed in f64.
pub(crate) fn log_softmax_at(logits: &[f32], token: u32) -> f32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&z| f64::from(z - most).exp()).sum();
    (f64::from(logits[token as usize] - most) - sum.ln()) as f32
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
    let most = f64::from(mixed.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let probabilities = &mut scratch.probabilities;
    probabilities.clear();
    probabilities.extend(
        mixed
            .iter()
            .map(|&z| ((f64::from(z) - most) / settings.temperature).exp()),
    );
    if settings.truncates() {
        truncate(probabilities, &mut scratch.order, settings);
    }
    let total: f64 = probabilities.iter().sum();
    if !total.is_finite() || total <= 0.0 {
        return None;
    }
    let token = inverse(probabilities, uniform * total)?;
    let behaviour_logp = (probabilities[token] / total).ln() as f32;
    Some(Draw {
        token: u32::try_from(token).ok()?,
        behaviour_logp,
    })
}

/// The first token at which the running sum passes `target`; never one without probability.
fn inverse(probabilities: &[f64], target: f64) -> Option<usize> {
    let mut sum = 0.0;
    for (token, &p) in probabilities.iter().enumerate() {
        sum += p;
        if p > 0.0 && sum > target {
            return Some(token);
        }
    }
    probabilities.iter().rposition(|&p| p > 0.0)
}

/// Sets what truncation drops to zero. `probabilities` need not add up to one.
fn truncate(probabilities: &mut [f64], order: &mut Vec<u32>, settings: &SamplingSettings) {
    order.clear();
    order.extend(0..probabilities.len() as u32);
    let at = |token: u32| probabilities[token as usize];
    let descending = |a: &u32, b: &u32| at(*b).total_cmp(&at(*a)).then(a.cmp(b));
    if settings.top_k > 0 && settings.top_k < order.len() {
        order.select_nth_unstable_by(settings.top_k - 1, descending);
        order.truncate(settings.top_k);
    }
    order.sort_unstable_by(descending);
    let total: f64 = order.iter().map(|&token| at(token)).sum();
    let mut sum = 0.0;
    let nucleus = order.iter().take_while(|&&token| {
        let before = sum;
        sum += at(token);
        before < settings.top_p * total
    });
    let kept = nucleus.count().max(1);
    order.truncate(kept);
    let least = settings.min_p * order.first().map_or(0.0, |&token| at(token));
    let kept = order
        .iter()
        .take_while(|&&token| at(token) >= least)
        .count()
        .max(1);
    order.truncate(kept);
    let survivors: Vec<(u32, f64)> = order.iter().map(|&token| (token, at(token))).collect();
    probabilities.fill(0.0);
    for (token, p) in survivors {
        probabilities[token as usize] = p;
    }
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
            let mut mixed = Vec::new();
            mix(&logits(p), &logits(r), 0.5, &mut mixed);
            distribution(&mixed, &plain())
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
        let mut mixed = Vec::new();
        mix(&policy, &reference, 0.0, &mut mixed);
        assert_eq!(mixed, policy);
        mix(&policy, &reference, 1.0, &mut mixed);
        assert_eq!(mixed, reference);
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
    }
}
