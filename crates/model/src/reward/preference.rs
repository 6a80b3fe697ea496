//! Preference probabilities from the outputs of two responses.
//!
//! Promises exact antisymmetry: swapping the responses negates the log-odds exactly, and the two probabilities sum to
//! exactly 1.

use candle_core::Tensor;
use messages::{InvalidProbability, Probability};

use crate::error::ModelError;
use crate::reward::{RewardKind, RewardModel};

impl RewardKind {
    /// Log-odds of a ≻ b from two rows of [`RewardModel::rewards`]: `r_a − r_b`, and for a pairwise model `+ Σ_l
    /// (v_a[2l]·v_b[2l+1] − v_a[2l+1]·v_b[2l])` (Zhang et al. 2410.02197, with a score in addition to the embedding).
    /// Exactly antisymmetric in a and b.
    ///
    /// # Panics
    /// When a row does not have [`Self::outputs`] values.
    #[must_use]
    pub fn logit(self, a: &[f32], b: &[f32]) -> f64 {
        let outputs = self.outputs();
        assert!(
            a.len() == outputs && b.len() == outputs,
            "rows of {} and {} values where the model has {outputs} outputs",
            a.len(),
            b.len()
        );
        let wide = f64::from;
        let (planes_a, planes_b) = (a[1..].chunks_exact(2), b[1..].chunks_exact(2));
        let skew: f64 = planes_a
            .zip(planes_b)
            .map(|(a, b)| wide(a[0]) * wide(b[1]) - wide(a[1]) * wide(b[0]))
            .sum();
        (wide(a[0]) - wide(b[0])) + skew
    }

    /// σ of [`Self::logit`]. The probabilities of (a, b) and (b, a) sum to exactly 1.
    ///
    /// # Errors
    /// When an output is NaN, or the difference of infinities is undefined.
    ///
    /// # Panics
    /// As [`Self::logit`].
    pub fn probability(self, a: &[f32], b: &[f32]) -> Result<Probability, InvalidProbability> {
        let logit = self.logit(a, b);
        // From ½ to 1 the complement is exact in floating point (Sterbenz).
        let preferred = Probability::from_log_odds(logit.abs())?;
        Ok(if logit < 0.0 {
            preferred.complement()
        } else {
            preferred
        })
    }
}

impl RewardModel {
    /// Log-odds of `features[first[i]] ≻ features[second[i]]`, `[rows]`, as in [`RewardKind::logit`]; differentiable in
    /// `features` `[n, outputs]`.
    ///
    /// # Errors
    /// When `first` and `second` differ in length, are empty or have an index outside `features`.
    pub fn margins(
        &self,
        features: &Tensor,
        first: &[u32],
        second: &[u32],
    ) -> Result<Tensor, ModelError> {
        let device = features.device();
        let a = features.index_select(&Tensor::new(first, device)?, 0)?;
        let b = features.index_select(&Tensor::new(second, device)?, 0)?;
        let score = |rows: &Tensor| rows.narrow(1, 0, 1)?.squeeze(1);
        let margin = (score(&a)? - score(&b)?)?;
        let RewardKind::Pairwise { planes } = self.config.kind else {
            return Ok(margin);
        };
        let component = |rows: &Tensor, index: usize| {
            let embedding = rows.narrow(1, 1, 2 * planes)?;
            let by_plane = embedding.reshape((rows.dim(0)?, planes, 2))?;
            by_plane.narrow(2, index, 1)?.squeeze(2)
        };
        let skew =
            ((component(&a, 0)? * component(&b, 1)?)? - (component(&a, 1)? * component(&b, 0)?)?)?;
        Ok((margin + skew.sum(1)?)?)
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;
    use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

    use super::*;
    use crate::{
        Device,
        fixtures::tiny_model,
        reward::{
            RewardConfig,
            tests::{close, reward},
        },
    };

    const PAIRWISE: RewardKind = RewardKind::Pairwise { planes: 2 };

    /// Rows of outputs of very different magnitudes.
    fn rows(kind: RewardKind, count: usize) -> Vec<Vec<f32>> {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut output = || {
            let scale = 10f32.powf(random.random_range(-6.0..2.0));
            scale * random.random_range(-1.0f32..1.0)
        };
        (0..count)
            .map(|_| (0..kind.outputs()).map(|_| output()).collect())
            .collect()
    }

    #[test]
    fn log_odds_match_hand_worked_values() {
        let bradley_terry = RewardKind::BradleyTerry;
        assert_eq!(bradley_terry.logit(&[1.5], &[0.25]), 1.25);
        // 1 − 3 + (1·6 − 2·5) + (3·8 − 4·7)
        let (a, b) = ([1., 1., 2., 3., 4.], [3., 5., 6., 7., 8.]);
        assert_eq!(PAIRWISE.logit(&a, &b), -10.0);
        let p = bradley_terry.probability(&[2.0], &[1.0]).unwrap().get();
        assert!((p - 0.731_058_6).abs() < 1e-7, "{p}");
    }

    #[test]
    fn swapping_the_responses_is_exact() {
        for kind in [RewardKind::BradleyTerry, PAIRWISE] {
            let rows = rows(kind, 60);
            for (a, b) in rows.iter().flat_map(|a| rows.iter().map(move |b| (a, b))) {
                assert_eq!(kind.logit(a, b), -kind.logit(b, a), "{a:?} {b:?}");
                let p = |a, b| kind.probability(a, b).unwrap().get();
                assert_eq!(p(a, b) + p(b, a), 1.0, "{a:?} {b:?}");
                assert_eq!(p(a, a), 0.5);
            }
        }
    }

    #[test]
    fn preferences_may_be_intransitive() {
        let kind = RewardKind::Pairwise { planes: 1 };
        let at = |rotations: f32| {
            let angle = rotations * std::f32::consts::TAU;
            [0.0, 2.0 * angle.cos(), 2.0 * angle.sin()]
        };
        let (rock, paper, scissors) = (at(0.0), at(2.0 / 3.0), at(1.0 / 3.0));
        for (better, worse) in [(paper, rock), (scissors, paper), (rock, scissors)] {
            // 4·sin(120°)
            let logit = kind.logit(&better, &worse);
            assert!((logit - 12f64.sqrt()).abs() < 1e-5, "{logit}");
            let p = kind.probability(&better, &worse).unwrap().get();
            assert!(p > 0.96, "{p}");
        }
    }

    #[test]
    fn nan_outputs_give_no_probability() {
        let p = |a: f32, b: f32| RewardKind::BradleyTerry.probability(&[a], &[b]);
        assert!(p(f32::NAN, 0.0).is_err());
        assert!(p(f32::INFINITY, f32::INFINITY).is_err());
        assert_eq!(p(f32::NEG_INFINITY, 0.0).unwrap().get(), 0.0);
    }

    #[test]
    #[should_panic(expected = "rows of 3 and 1 values")]
    fn rows_of_the_wrong_length_panic() {
        let kind = RewardKind::Pairwise { planes: 1 };
        assert_eq!(kind.logit(&[0.0; 3], &[0.0]), 0.0);
    }

    #[test]
    fn margins_are_the_log_odds_and_antisymmetric() {
        for kind in [RewardKind::BradleyTerry, PAIRWISE] {
            let config = RewardConfig {
                kind,
                ..RewardConfig::default()
            };
            let model = reward(&tiny_model(7, 1), config);
            let rows = rows(kind, 12);
            let features =
                Tensor::from_vec(rows.concat(), (12, kind.outputs()), &Device::Cpu).unwrap();
            let (first, second) = ([0, 3, 7, 7, 2], [1, 0, 11, 7, 9]);
            let margins = |a: &[u32], b: &[u32]| {
                let margins = model.margins(&features, a, b).unwrap();
                margins.to_vec1::<f32>().unwrap()
            };
            let expected: Vec<f32> = (0..5)
                .map(|i| kind.logit(&rows[first[i] as usize], &rows[second[i] as usize]) as f32)
                .collect();
            let found = margins(&first, &second);
            close(&found, &expected, 1e-5);
            let swapped: Vec<f32> = margins(&second, &first).iter().map(|m| -m).collect();
            assert_eq!(found, swapped);
        }
    }
}
