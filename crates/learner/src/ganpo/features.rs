//! Hidden states of responses, laid out for a discriminator.

use candle_core::{DType, Result, Tensor};

use crate::batch::MicroBatch;

/// Hidden states of the response tokens of some completions, without prompts and without padding.
#[derive(Debug, Clone)]
pub(super) struct Features {
    /// `[R, d]`, f32, completion after completion.
    tokens: Tensor,
    /// Their token counts, which add up to R.
    lengths: Vec<usize>,
}

/// Responses side by side, `B` of them, the longest of `T` tokens.
#[derive(Debug)]
pub(super) struct Stream {
    /// `[B, T, d]`, zeros after the end of a response.
    pub(super) tokens: Tensor,
    /// `[B, T]`: 1 for a token, 0 for padding.
    pub(super) mask: Tensor,
}

/// Which completions were preferred to which: a row for each way a label can turn out that is not impossible,
/// weighted by its probability, so that a soft label is the expectation of a drawn one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Rows {
    /// Indices of completions.
    pub(super) chosen: Vec<usize>,
    /// Indices of the others.
    pub(super) rejected: Vec<usize>,
    /// What each row counts.
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

    /// Several as one, without gradient.
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

    /// How many completions they are.
    pub(super) fn completions(&self) -> usize {
        self.lengths.len()
    }

    /// These completions, the first `longest` tokens of each.
    pub(super) fn stream(&self, completions: &[usize], longest: usize) -> Result<Stream> {
        let starts: Vec<usize> = self
            .lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end - length)
            })
            .collect();
        let length = |&completion: &usize| self.lengths[completion].min(longest);
        let (rows, width) = self.tokens.dims2()?;
        let most = completions.iter().map(length).max().unwrap_or(0);
        let (mut places, mut mask) = (Vec::new(), Vec::new());
        for completion in completions {
            let (start, length) = (starts[*completion], length(completion));
            places.extend((start..start + length).map(|place| place as u32));
            places.extend(std::iter::repeat_n(rows as u32, most - length));
            mask.extend(std::iter::repeat_n(1f32, length));
            mask.extend(std::iter::repeat_n(0f32, most - length));
        }
        let (batch, device) = (completions.len(), self.tokens.device());
        let places = Tensor::new(places, device)?;
        let tokens = self
            .tokens
            .pad_with_zeros(0, 0, 1)?
            .index_select(&places, 0)?;
        Ok(Stream {
            tokens: tokens.reshape((batch, most, width))?,
            mask: Tensor::from_vec(mask, (batch, most), device)?,
        })
    }
}

impl Rows {
    /// The rows of a pass.
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

    /// Appends rows whose completions stand behind `completions` others.
    pub(super) fn extend(&mut self, rows: &Self, completions: usize) {
        let moved = |indices: &[usize]| -> Vec<usize> {
            indices.iter().map(|index| index + completions).collect()
        };
        self.chosen.extend(moved(&rows.chosen));
        self.rejected.extend(moved(&rows.rejected));
        self.weights.extend(&rows.weights);
    }

    /// What all rows count together.
    pub(super) fn total(&self) -> f64 {
        self.weights.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// What each row counts of `total`, `[B]`.
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
    fn a_stream_has_the_tokens_of_its_completions_and_nothing_else() -> Result<()> {
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
    fn a_soft_label_counts_either_way_as_it_is_likely() {
        let rows = Rows::of(&MicroBatch::of_lengths(&[2, 3, 1, 4], &[0.75, 1.0]));
        let expected = Rows {
            chosen: vec![0, 1, 2],
            rejected: vec![1, 0, 3],
            weights: vec![0.75, 0.25, 1.0],
        };
        assert_eq!(rows, expected);
        assert_eq!(rows.total(), 2.0);
    }

    #[test]
    fn rows_are_joined_behind_one_another() {
        let mut all = Rows::default();
        let rows = Rows {
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
