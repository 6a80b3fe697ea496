//! Hidden states of responses as a padded batch for a discriminator.

use candle_core::{DType, Result, Tensor};

use crate::micro_batch::MicroBatch;

/// Hidden states of the response tokens of some completions, without prompts and without padding.
#[derive(Debug, Clone)]
pub(super) struct Features {
    /// `[R, d]`, f32, completion after completion.
    tokens: Tensor,
    /// Token counts, with sum R.
    lengths: Vec<usize>,
}

/// Padded batch of `B` responses, the longest of `T` tokens.
#[derive(Debug)]
pub(super) struct Stream {
    /// `[B, T, d]`, zero-padded.
    pub(super) tokens: Tensor,
    /// `[B, T]`: 1 for a token, 0 for padding.
    pub(super) mask: Tensor,
}

/// Preferences among completions: a row for each outcome of a label with positive probability, weighted by it, so that
/// a soft label is the expectation of a sampled one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct PreferenceRows {
    /// Index of the chosen completion of each row.
    pub(super) chosen: Vec<usize>,
    /// Index of the rejected completion of each row.
    pub(super) rejected: Vec<usize>,
    /// Weight of each row.
    pub(super) weights: Vec<f32>,
}

impl Features {
    pub(super) fn new(tokens: &Tensor, lengths: &[usize]) -> Result<Self> {
        let (rows, _) = tokens.dims2()?;
        if rows != lengths.iter().sum::<usize>() {
            candle_core::bail!("{rows} hidden states for completions of {lengths:?} tokens");
        }
        Ok(Self {
            tokens: tokens.to_dtype(DType::F32)?,
            lengths: lengths.to_vec(),
        })
    }

    /// Concatenation, without gradient.
    pub(super) fn joined<'a>(parts: impl Iterator<Item = &'a Self>) -> Result<Self> {
        let (mut tokens, mut lengths) = (Vec::new(), Vec::new());
        for part in parts {
            tokens.push(part.tokens.detach());
            lengths.extend(&part.lengths);
        }
        Ok(Self {
            tokens: Tensor::cat(&tokens, 0)?,
            lengths,
        })
    }

    /// Number of completions.
    pub(super) fn completions(&self) -> usize {
        self.lengths.len()
    }

    /// The first `max_length` tokens of each of these completions.
    pub(super) fn stream(&self, completions: &[usize], max_length: usize) -> Result<Stream> {
        let starts: Vec<usize> = self
            .lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end - length)
            })
            .collect();
        let length = |&completion: &usize| self.lengths[completion].min(max_length);
        let (rows, width) = self.tokens.dims2()?;
        let longest = completions.iter().map(length).max().unwrap_or(0);
        let (mut indices, mut mask) = (Vec::new(), Vec::new());
        for completion in completions {
            let (start, length) = (starts[*completion], length(completion));
            indices.extend((start..start + length).map(|index| index as u32));
            indices.extend(std::iter::repeat_n(rows as u32, longest - length));
            mask.extend(std::iter::repeat_n(1f32, length));
            mask.extend(std::iter::repeat_n(0f32, longest - length));
        }
        let (batch, device) = (completions.len(), self.tokens.device());
        let indices = Tensor::new(indices, device)?;
        let tokens = self
            .tokens
            .pad_with_zeros(0, 0, 1)?
            .index_select(&indices, 0)?;
        Ok(Stream {
            tokens: tokens.reshape((batch, longest, width))?,
            mask: Tensor::from_vec(mask, (batch, longest), device)?,
        })
    }
}

impl PreferenceRows {
    /// Rows of a pass.
    pub(super) fn of(micro: &MicroBatch<'_>) -> Self {
        let mut rows = Self::default();
        let sides = micro.first.iter().zip(&micro.second);
        for ((&first, &second), (&p, &weight)) in sides.zip(micro.p.iter().zip(&micro.pair_weight))
        {
            for (chosen, rejected, p) in [(first, second, p), (second, first, 1.0 - p)] {
                if p > 0.0 {
                    rows.chosen.push(chosen as usize);
                    rows.rejected.push(rejected as usize);
                    rows.weights.push(weight * p);
                }
            }
        }
        rows
    }

    /// Appends rows with `offset` added to the indices of their completions.
    pub(super) fn extend(&mut self, rows: &Self, offset: usize) {
        let shifted = |indices: &[usize]| -> Vec<usize> {
            indices.iter().map(|index| index + offset).collect()
        };
        self.chosen.extend(shifted(&rows.chosen));
        self.rejected.extend(shifted(&rows.rejected));
        self.weights.extend(&rows.weights);
    }

    /// Sum of the weights.
    pub(super) fn total(&self) -> f64 {
        self.weights.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// Weight of each row divided by `total`, `[B]`.
    pub(super) fn shares(&self, total: f64, like: &Tensor) -> Result<Tensor> {
        let shares = self.weights.iter().map(|&w| (f64::from(w) / total) as f32);
        Tensor::new(shares.collect::<Vec<f32>>(), like.device())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_stream_has_only_the_tokens_of_its_completions() -> Result<()> {
        let tokens = Tensor::arange(1f32, 13f32, &Device::Cpu)?.reshape((6, 2))?;
        let features = Features::new(&tokens, &[1, 3, 2])?;
        let stream = features.stream(&[2, 0, 1], 8)?;
        let expected = [
            [[9., 10.], [11., 12.], [0., 0.]],
            [[1., 2.], [0., 0.], [0., 0.]],
            [[3., 4.], [5., 6.], [7., 8.]],
        ];
        assert_eq!(stream.tokens.to_vec3::<f32>()?, expected);
        let mask = [[1., 1., 0.], [1., 0., 0.], [1., 1., 1.]];
        assert_eq!(stream.mask.to_vec2::<f32>()?, mask);
        let cut = features.stream(&[1, 2], 2)?;
        assert_eq!(
            cut.tokens.to_vec3::<f32>()?,
            [[[3., 4.], [5., 6.]], [[9., 10.], [11., 12.]]]
        );
        let twice = Features::joined([&features, &features].into_iter())?;
        let second = twice.stream(&[3 + 2, 3, 3 + 1], 8)?;
        assert_eq!(second.tokens.to_vec3::<f32>()?, expected);
        assert!(Features::new(&tokens, &[1, 3]).is_err());
        Ok(())
    }

    #[test]
    fn a_soft_label_gives_a_row_per_outcome_weighted_by_its_probability() {
        let rows = PreferenceRows::of(&MicroBatch::of_lengths(&[2, 3, 1, 4], &[0.75, 1.0]));
        let expected = PreferenceRows {
            chosen: vec![0, 1, 2],
            rejected: vec![1, 0, 3],
            weights: vec![0.75, 0.25, 1.0],
        };
        assert_eq!(rows, expected);
        assert_eq!(rows.total(), 2.0);
    }

    #[test]
    fn appended_rows_have_shifted_indices() {
        let mut all = PreferenceRows::default();
        let rows = PreferenceRows {
            chosen: vec![0, 2],
            rejected: vec![1, 3],
            weights: vec![1.0, 0.5],
        };
        all.extend(&rows, 0);
        all.extend(&rows, 4);
        assert_eq!(all.chosen, [0, 2, 4, 6]);
        assert_eq!(all.rejected, [1, 3, 5, 7]);
        assert_eq!(all.total(), 3.0);
    }
}
