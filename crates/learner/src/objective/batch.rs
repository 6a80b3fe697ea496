//! Input of a loss: log-probabilities of completions, the label rows that compare them, and the labels.
//!
//! Promises that shapes are checked before anything is computed, and that reference and labels carry no gradient. Does
//! not know which loss reads it.

use candle_core::{Result, Tensor, bail};

/// One micro-batch: C completions with R response tokens in total, and B label rows that compare two completions each.
/// All tensors have the same float dtype and device.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// `[R]` log π of every response token, completion after completion; with gradient.
    pub token_logp: &'a Tensor,
    /// `[R]` log ref of the same tokens.
    pub token_ref_logp: &'a Tensor,
    /// C token counts, with sum R.
    pub lengths: &'a [usize],
    /// `[C]` log π of each completion, by [`reduce`](crate::objective::reduction::reduce); with gradient.
    pub logp: &'a Tensor,
    /// `[C]` log ref of each completion, reduced in the same way.
    pub ref_logp: &'a Tensor,
    /// B indices: the completion y of each row.
    pub first: &'a [u32],
    /// B indices: the completion y' of each row.
    pub second: &'a [u32],
    /// `[B]` training labels: the probability that y is preferred to y'.
    pub p: &'a Tensor,
    /// `[B]` 1/(number of label rows of the row's pair), so that a prompt with more than two samples counts as the mean
    /// over its rows.
    pub pair_weight: &'a Tensor,
    /// Golden answers, for objectives that need them.
    pub baseline: Option<Baseline<'a>>,
}

/// Golden (offline: chosen) answers to a batch's prompts, one per pair.
#[derive(Debug, Clone, Copy)]
pub struct Baseline<'a> {
    /// `[Rb]` log π of every token, answer after answer; with gradient.
    pub token_logp: &'a Tensor,
    /// Token counts, one per pair, with sum Rb.
    pub lengths: &'a [usize],
}

impl Batch<'_> {
    /// `h = (log π − log ref)(first) − (log π − log ref)(second)`, `[B]`.
    ///
    /// # Errors
    /// If the batch's shapes disagree or an index is out of range.
    pub fn margin(&self) -> Result<Tensor> {
        self.check()?;
        let [of_first, of_second] = self.of_rows(&(self.logp - self.ref_logp.detach())?)?;
        of_first - of_second
    }

    /// `log π` of each row's first and second completion, `[B]`; with gradient.
    ///
    /// # Errors
    /// As [`Self::margin`].
    pub(super) fn logp_of_rows(&self) -> Result<[Tensor; 2]> {
        self.check()?;
        self.of_rows(self.logp)
    }

    /// Entries of `values`, `[C]`, of each row's completions.
    fn of_rows(&self, values: &Tensor) -> Result<[Tensor; 2]> {
        let of = |rows: &[u32]| values.index_select(&Tensor::new(rows, values.device())?, 0);
        Ok([of(self.first)?, of(self.second)?])
    }

    /// Sum over rows of `loss(h, p)`, `[B] -> [B]`, times the row's weight; a scalar.
    pub(super) fn sum_of(
        &self,
        loss: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let rows = loss(&self.margin()?, &self.p.detach())?;
        self.weighted_sum(&rows)
    }

    /// Sum over `rows`, `[B]`, times the row's weight; a scalar.
    pub(super) fn weighted_sum(&self, rows: &Tensor) -> Result<Tensor> {
        (rows * self.pair_weight.detach())?.sum_all()
    }

    /// Entries of `tokens`, `[R]`, of each row's first completion, zero-padded to the longest: `[B, L]`;
    /// differentiable.
    pub(super) fn tokens_of_first(&self, tokens: &Tensor) -> Result<Tensor> {
        self.check()?;
        let ends: Vec<usize> = self
            .lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end)
            })
            .collect();
        let padding = tokens.dim(0)?;
        let longest = self
            .first
            .iter()
            .map(|&c| self.lengths[c as usize])
            .max()
            .unwrap_or(0);
        let mut indices = Vec::with_capacity(self.first.len() * longest);
        for &completion in self.first {
            let length = self.lengths[completion as usize];
            let end = ends[completion as usize];
            indices.extend((end - length..end).map(|index| index as u32));
            indices.extend(std::iter::repeat_n(padding as u32, longest - length));
        }
        let indices = Tensor::new(indices, tokens.device())?;
        tokens
            .pad_with_zeros(0, 0, 1)?
            .index_select(&indices, 0)?
            .reshape((self.first.len(), longest))
    }

    /// Checks that all shapes agree and all indices are in range.
    pub(super) fn check(&self) -> Result<()> {
        let tokens: usize = self.lengths.iter().sum();
        let completions = self.lengths.len();
        let rows = self.first.len();
        check_length("token_logp", self.token_logp, tokens)?;
        check_length("token_ref_logp", self.token_ref_logp, tokens)?;
        check_length("logp", self.logp, completions)?;
        check_length("ref_logp", self.ref_logp, completions)?;
        check_length("p", self.p, rows)?;
        check_length("pair_weight", self.pair_weight, rows)?;
        if rows == 0 || self.second.len() != rows {
            bail!(
                "a batch has {rows} first and {} second completions",
                self.second.len()
            );
        }
        for &index in self.first.iter().chain(self.second) {
            if index as usize >= completions {
                bail!("a row compares completion {index}, but the batch has {completions}");
            }
        }
        Ok(())
    }
}

/// Checks that `tensor` is a vector of `length` elements.
fn check_length(name: &str, tensor: &Tensor, length: usize) -> Result<()> {
    if tensor.dims() != [length] {
        bail!("{name} has shape {:?}, expected [{length}]", tensor.dims());
    }
    Ok(())
}

/// Checks that `h` and `p` are vectors of the same length.
pub(super) fn check_rows(h: &Tensor, p: &Tensor) -> Result<()> {
    check_length("p", p, h.dims1()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn vector(values: &[f64]) -> Result<Tensor> {
        Tensor::new(values, &Device::Cpu)
    }

    #[test]
    fn the_margin_subtracts_reference_and_second_and_is_differentiable_in_both() -> Result<()> {
        let logp = Var::from_tensor(&vector(&[-1.0, -2.0, -4.0])?)?;
        let reference = Var::from_tensor(&vector(&[-1.5, -1.0, -3.5])?)?;
        let batch = Batch {
            token_logp: &logp,
            token_ref_logp: &reference,
            lengths: &[1, 1, 1],
            logp: &logp,
            ref_logp: &reference,
            first: &[0, 2],
            second: &[1, 1],
            p: &vector(&[0.5, 0.5])?,
            pair_weight: &vector(&[1.0, 1.0])?,
            baseline: None,
        };
        let h = batch.margin()?;
        assert_eq!(h.to_vec1::<f64>()?, [1.5, 0.5]);
        let gradients = h.sum_all()?.backward()?;
        let gradient = gradients
            .get(&logp)
            .map(Tensor::to_vec1::<f64>)
            .transpose()?;
        assert_eq!(gradient, Some(vec![1.0, -2.0, 1.0]));
        assert!(gradients.get(&reference).is_none());
        Ok(())
    }

    #[test]
    fn tokens_of_the_first_completions_are_padded_with_zeros() -> Result<()> {
        let tokens = vector(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
        let reduced = vector(&[0.0; 3])?;
        let batch = Batch {
            token_logp: &tokens,
            token_ref_logp: &tokens,
            lengths: &[1, 3, 2],
            logp: &reduced,
            ref_logp: &reduced,
            first: &[2, 0, 2],
            second: &[1, 1, 0],
            p: &reduced,
            pair_weight: &reduced,
            baseline: None,
        };
        let padded = batch.tokens_of_first(&tokens)?.to_vec2::<f64>()?;
        assert_eq!(padded, [[5.0, 6.0], [1.0, 0.0], [5.0, 6.0]]);
        Ok(())
    }

    #[test]
    fn shapes_that_disagree_are_refused_by_name() -> Result<()> {
        let (two, three) = (vector(&[0.0; 2])?, vector(&[0.0; 3])?);
        let good = Batch {
            token_logp: &three,
            token_ref_logp: &three,
            lengths: &[1, 2],
            logp: &two,
            ref_logp: &two,
            first: &[0, 1, 0],
            second: &[1, 0, 1],
            p: &three,
            pair_weight: &three,
            baseline: None,
        };
        good.check()?;
        let bad = [
            (
                "token_logp has shape [2], expected [3]",
                Batch {
                    token_logp: &two,
                    ..good
                },
            ),
            (
                "token_ref_logp has shape",
                Batch {
                    token_ref_logp: &two,
                    ..good
                },
            ),
            (
                "logp has shape [3], expected [2]",
                Batch {
                    logp: &three,
                    ..good
                },
            ),
            (
                "ref_logp has shape",
                Batch {
                    ref_logp: &three,
                    ..good
                },
            ),
            ("p has shape [2], expected [3]", Batch { p: &two, ..good }),
            (
                "pair_weight has shape",
                Batch {
                    pair_weight: &two,
                    ..good
                },
            ),
            (
                "3 first and 2 second",
                Batch {
                    second: &[1, 0],
                    ..good
                },
            ),
            (
                "compares completion 2",
                Batch {
                    second: &[1, 0, 2],
                    ..good
                },
            ),
        ];
        for (message, batch) in bad {
            let error = batch.margin().expect_err(message).to_string();
            assert!(error.contains(message), "{error}");
        }
        Ok(())
    }
}
