//! Reduction of token log-probabilities to the log-probability of a completion.
//!
//! The sum is the log-probability of the completion, which the theorems are about; the mean is robust to length. A
//! temperature must be chosen for each: for completions of one length n, the mean at τ is the sum at τ/n; for unequal
//! lengths the two have different fixed points.

use candle_core::{DType, Device, Result, Tensor, bail};
use settings::LogpReduction;

/// Matrix `[C, R]` whose product with R token log-probabilities gives those of C completions: row c holds 1 (`Sum`) or
/// 1/n (`Mean`) at the n tokens of completion c, and 0 elsewhere.
///
/// # Errors
/// If a completion has no tokens; end-of-text is one.
pub fn weights(
    reduction: LogpReduction,
    lengths: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let tokens: usize = lengths.iter().sum();
    let mut weights = vec![0f64; lengths.len() * tokens];
    let mut start = 0;
    for (completion, &length) in lengths.iter().enumerate() {
        if length == 0 {
            bail!("completion {completion} has no tokens");
        }
        let weight = match reduction {
            LogpReduction::Sum => 1.0,
            LogpReduction::Mean => 1.0 / length as f64,
        };
        let row = completion * tokens;
        weights[row + start..row + start + length].fill(weight);
        start += length;
    }
    Tensor::from_vec(weights, (lengths.len(), tokens), &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)
}

/// `[C]` log-probabilities of completions from the `[R]` of their tokens; differentiable.
///
/// # Errors
/// If the lengths do not add up to R or a completion has no tokens.
pub fn reduce(reduction: LogpReduction, token_logp: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let tokens: usize = lengths.iter().sum();
    if token_logp.dims() != [tokens] {
        bail!(
            "token log-probabilities have shape {:?}, expected [{tokens}]",
            token_logp.dims()
        );
    }
    let weights = weights(reduction, lengths, token_logp.dtype(), token_logp.device())?;
    weights.matmul(&token_logp.unsqueeze(1)?)?.squeeze(1)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn values_and_gradients_by_hand() -> Result<()> {
        for dtype in [DType::F32, DType::F64] {
            let tokens = Tensor::new(&[-1.0, -2.0, -4.0, -0.5, -1.5], &Device::Cpu)?;
            let tokens = Var::from_tensor(&tokens.to_dtype(dtype)?)?;
            for (reduction, expected, slope) in [
                (
                    LogpReduction::Sum,
                    [-1.0, -6.0, -2.0],
                    [1.0, 1.0, 1.0, 1.0, 1.0],
                ),
                (
                    LogpReduction::Mean,
                    [-1.0, -3.0, -1.0],
                    [1.0, 0.5, 0.5, 0.5, 0.5],
                ),
            ] {
                let reduced = reduce(reduction, &tokens, &[1, 2, 2])?;
                assert_eq!(reduced.to_dtype(DType::F64)?.to_vec1::<f64>()?, expected);
                let gradients = reduced.sum_all()?.backward()?;
                let gradient = gradients.get(&tokens).expect("the tokens are variables");
                assert_eq!(gradient.to_dtype(DType::F64)?.to_vec1::<f64>()?, slope);
            }
        }
        Ok(())
    }

    #[test]
    fn weights_are_a_row_per_completion() -> Result<()> {
        let weights = weights(LogpReduction::Mean, &[1, 2], DType::F64, &Device::Cpu)?;
        assert_eq!(
            weights.to_vec2::<f64>()?,
            [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
        );
        Ok(())
    }

    #[test]
    fn lengths_must_fit() -> Result<()> {
        let tokens = Tensor::new(&[-1.0, -2.0], &Device::Cpu)?;
        for (lengths, message) in [
            (vec![1, 2], "expected [3]"),
            (vec![2, 0], "completion 1 has no tokens"),
        ] {
            let error = reduce(LogpReduction::Sum, &tokens, &lengths).expect_err(message);
            assert!(error.to_string().contains(message), "{error}");
        }
        Ok(())
    }
}
