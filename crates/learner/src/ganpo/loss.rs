//! Discriminator and generator losses: relativistic averages (Jolicoeur-Martineau 2018) of policy and reference.

use candle_core::{Result, Tensor, bail};

use crate::objective::dpo::softplus;

/// The three streams that a discriminator distinguishes. For the chosen side they are the policy's chosen responses,
/// the reference's chosen, and the reference's rejected; for the rejected side chosen and rejected are exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Streams<T> {
    pub(super) policy: T,
    pub(super) reference: T,
    pub(super) opposite: T,
}

/// Discriminator loss: `¼[BCE(ref − m(π), 1) + BCE(π − m(ref), 0) + BCE(π − m(opp), 1) + BCE(opp − m(π), 0)]`. `scores`
/// are `[B]` each, `means` the running means m; `weights`, `[B]`, have sum 1.
pub(super) fn discriminator(
    scores: &Streams<Tensor>,
    means: Streams<f64>,
    weights: &Tensor,
) -> Result<Tensor> {
    let terms = [
        bce(&scores.reference, means.policy, BinaryTarget::Real, weights)?,
        bce(&scores.policy, means.reference, BinaryTarget::Fake, weights)?,
        bce(&scores.policy, means.opposite, BinaryTarget::Real, weights)?,
        bce(&scores.opposite, means.policy, BinaryTarget::Fake, weights)?,
    ];
    let [first, rest @ ..] = &terms;
    rest.iter()
        .try_fold(first.clone(), |sum, term| sum + term)?
        * 0.25
}

/// Generator loss of one discriminator, without the factor ½: `BCE(π − m(ref), 1)`.
pub(super) fn generator(policy: &Tensor, mean_reference: f64, weights: &Tensor) -> Result<Tensor> {
    bce(policy, mean_reference, BinaryTarget::Real, weights)
}

/// Weighted accuracy of a discriminator: a response of the policy or the reference is classified by comparison with the
/// running mean of the other.
pub(super) fn accuracy(
    scores: &Streams<Tensor>,
    means: Streams<f64>,
    weights: &Tensor,
) -> Result<f64> {
    let share = |is_right: Tensor| -> Result<f64> {
        let is_right = is_right.to_dtype(weights.dtype())?;
        Ok(f64::from(
            (is_right * weights)?.sum_all()?.to_scalar::<f32>()?,
        ))
    };
    let of_reference = share(scores.reference.gt(means.policy)?)?;
    let of_policy = share(scores.policy.lt(means.reference)?)?;
    Ok((of_reference + of_policy) / 2.0)
}

#[derive(Debug, Clone, Copy)]
enum BinaryTarget {
    Real,
    Fake,
}

/// Weighted sum of the binary cross-entropy of the logits `scores − mean`.
fn bce(scores: &Tensor, mean: f64, target: BinaryTarget, weights: &Tensor) -> Result<Tensor> {
    if scores.dims() != weights.dims() || scores.rank() != 1 {
        let (scores, weights) = (scores.dims(), weights.dims());
        bail!("scores have shape {scores:?}, their weights {weights:?}: both must be [B]");
    }
    let logits = (scores - mean)?;
    let losses = match target {
        BinaryTarget::Real => softplus(&logits.neg()?)?,
        BinaryTarget::Fake => softplus(&logits)?,
    };
    (losses * weights)?.sum_all()
}

#[cfg(test)]
mod tests {
    use std::f64::consts::LN_2;

    use candle_core::{Device, Var};

    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn scalar(tensor: &Tensor) -> f64 {
        f64::from(tensor.to_scalar::<f32>().unwrap())
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} is not {b}");
    }

    #[test]
    fn equal_scores_cost_ln_2_everywhere() -> Result<()> {
        let weights = tensor(&[0.25, 0.75]);
        for score in [-3.0, 0.0, 2.5] {
            let scores = tensor(&[score, score]);
            let streams = Streams {
                policy: scores.clone(),
                reference: scores.clone(),
                opposite: scores.clone(),
            };
            let mean = f64::from(score);
            let means = Streams {
                policy: mean,
                reference: mean,
                opposite: mean,
            };
            close(scalar(&discriminator(&streams, means, &weights)?), LN_2);
            close(scalar(&generator(&scores, mean, &weights)?), LN_2);
            close(accuracy(&streams, means, &weights)?, 0.0);
        }
        Ok(())
    }

    #[test]
    fn losses_by_hand() -> Result<()> {
        let streams = Streams {
            policy: tensor(&[1.0, 0.0]),
            reference: tensor(&[2.0, 0.2]),
            opposite: tensor(&[0.0, -1.0]),
        };
        let means = Streams {
            policy: 0.5,
            reference: 1.5,
            opposite: -0.5,
        };
        let weights = tensor(&[0.75, 0.25]);
        let plus = |x: f64| (1.0 + x.exp()).ln();
        // softplus of -(ref - .5), π - 1.5, -(π + .5), opp - .5.
        let of = |policy: f64, reference: f64, opposite: f64| {
            plus(0.5 - reference) + plus(policy - 1.5) + plus(-0.5 - policy) + plus(opposite - 0.5)
        };
        let expected = 0.25 * (0.75 * of(1.0, 2.0, 0.0) + 0.25 * of(0.0, 0.2, -1.0));
        close(scalar(&discriminator(&streams, means, &weights)?), expected);
        close(expected, 0.361_512_5);
        let generated = 0.75 * plus(0.5) + 0.25 * plus(1.5);
        close(
            scalar(&generator(&streams.policy, 1.5, &weights)?),
            generated,
        );
        // The first reference is above .5, both of the policy's are below 1.5.
        close(accuracy(&streams, means, &weights)?, 0.875);
        Ok(())
    }

    #[test]
    fn gradients_by_hand() -> Result<()> {
        let [policy, reference, opposite] =
            [0.3f32, 0.1, -0.2].map(|x| Var::from_tensor(&tensor(&[x])).unwrap());
        let streams = Streams {
            policy: policy.as_tensor().clone(),
            reference: reference.as_tensor().clone(),
            opposite: opposite.as_tensor().clone(),
        };
        let means = Streams {
            policy: 0.3,
            reference: 0.1,
            opposite: -0.2,
        };
        let weights = tensor(&[1.0]);
        let found = discriminator(&streams, means, &weights)?.backward()?;
        let slope = |var: &Var| found.get(var).unwrap().to_vec1::<f32>().unwrap()[0];
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        // ¼(σ(x) − 1) for the target real, ¼σ(x) for fake.
        let expected = [
            0.25 * (sigmoid(0.2) + sigmoid(0.5) - 1.0),
            0.25 * (sigmoid(-0.2) - 1.0),
            0.25 * sigmoid(-0.5),
        ];
        for (var, expected) in [&policy, &reference, &opposite].into_iter().zip(expected) {
            close(f64::from(slope(var)), f64::from(expected));
        }
        let found = generator(&streams.policy, 0.1, &weights)?.backward()?;
        let slope = found.get(&policy).unwrap().to_vec1::<f32>()?[0];
        close(f64::from(slope), f64::from(sigmoid(0.2) - 1.0));
        Ok(())
    }

    #[test]
    fn shapes_that_disagree_are_rejected() {
        let error = generator(&tensor(&[1.0]), 0.0, &tensor(&[0.5, 0.5])).unwrap_err();
        assert!(
            error.to_string().contains("[1], their weights [2]"),
            "{error}"
        );
    }
}
