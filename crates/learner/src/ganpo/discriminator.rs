//! Discriminator: projection with spectral normalisation, learned positions, pre-norm transformer encoder, masked mean
//! pooling, and a head of two layers with spectral normalisation.

use std::collections::BTreeMap;

use candle_core::{D, Device, Result, Tensor};
use kernels::linear;
use messages::Seed;
use model::{ModelError, Precision, Weights};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::ganpo::{features::Stream, spectral::SpectralNorm};

/// Added to variances.
const EPSILON: f64 = 1e-5;
/// Subtracted from the attention scores of padding, whose weights underflow to exactly zero.
const MASK_BIAS: f64 = 1e9;
/// Width of the feed-forward layer as a multiple of the discriminator's.
const EXPANSION: usize = 4;
/// Standard deviation of initial position embeddings.
const POSITION_DEVIATION: f32 = 0.02;

/// Weights with spectral normalisation.
pub(super) const SPECTRAL: [&str; 3] = ["input.weight", "hidden.weight", "score.weight"];

/// Dimensions of a discriminator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiscriminatorShape {
    /// Width of the hidden states it reads.
    pub(super) features: usize,
    /// Width, a multiple of `heads`.
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) layers: usize,
    /// Number of positions.
    pub(super) length: usize,
}

impl DiscriminatorShape {
    /// Names and shapes of all tensors.
    pub(super) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (w, inner) = (self.width, EXPANSION * self.width);
        let mut tensors = vec![
            ("input.weight".to_owned(), vec![w, self.features]),
            ("input.bias".to_owned(), vec![w]),
            ("positions".to_owned(), vec![self.length, w]),
        ];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("blocks.{layer}.{name}"), shape.to_vec()));
            };
            for norm in ["first_norm", "second_norm"] {
                add(&format!("{norm}.weight"), &[w]);
                add(&format!("{norm}.bias"), &[w]);
            }
            for (linear, out, width) in [
                ("attention", 3 * w, w),
                ("output", w, w),
                ("up", inner, w),
                ("down", w, inner),
            ] {
                add(&format!("{linear}.weight"), &[out, width]);
                add(&format!("{linear}.bias"), &[out]);
            }
        }
        for (linear, out) in [("hidden", w), ("score", 1)] {
            tensors.push((format!("{linear}.weight"), vec![out, w]));
            tensors.push((format!("{linear}.bias"), vec![out]));
        }
        tensors
    }

    /// Initial tensors, a function of `seed`: weights uniform within 1/√in, positions small, norms one, biases zero.
    pub(super) fn initialise(
        &self,
        seed: Seed,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (index, (name, shape)) in self.tensors().into_iter().enumerate() {
            let mut random = ChaCha8Rng::seed_from_u64(seed.derive(index as u64).0);
            let count: usize = shape.iter().product();
            let bound = match shape.as_slice() {
                [_, _] if name == "positions" => POSITION_DEVIATION * 3f32.sqrt(),
                [_, width] => 1.0 / (*width as f32).sqrt(),
                _ => 0.0,
            };
            let mean = if name.ends_with("norm.weight") {
                1.0
            } else {
                0.0
            };
            let values: Vec<f32> = (0..count)
                .map(|_| mean + bound * (2.0 * random.random::<f32>() - 1.0))
                .collect();
            tensors.insert(name, Tensor::from_vec(values, shape, device)?);
        }
        Ok(tensors)
    }
}

/// One of the two discriminators: the tensors of `weights` with the prefix `name`.
#[derive(Clone, Copy)]
pub(super) struct Discriminator<'a> {
    pub(super) name: &'static str,
    pub(super) shape: DiscriminatorShape,
    pub(super) weights: &'a Weights,
    pub(super) spectral: &'a SpectralNorm,
}

impl Discriminator<'_> {
    /// Score of each response, `[B]`, in logits: higher is more like the reference.
    pub(super) fn score(&self, stream: &Stream) -> std::result::Result<Tensor, ModelError> {
        let (batch, length, features) = stream.tokens.dims3()?;
        let tokens = stream.tokens.reshape((batch * length, features))?;
        let positions = self.tensor("positions")?.narrow(0, 0, length)?;
        let mut x = self
            .linear("input", &tokens)?
            .reshape((batch, length, self.shape.width))?
            .broadcast_add(&positions)?
            .reshape((batch * length, self.shape.width))?;
        let bias = ((&stream.mask - 1.0)? * MASK_BIAS)?.reshape((batch, 1, 1, length))?;
        for layer in 0..self.shape.layers {
            let name = |part: &str| format!("blocks.{layer}.{part}");
            let normed = self.layer_norm(&name("first_norm"), &x)?;
            x = (x + self.attention(&name(""), &normed, &bias)?)?;
            let normed = self.layer_norm(&name("second_norm"), &x)?;
            let inner = self.linear(&name("up"), &normed)?.gelu_erf()?;
            x = (x + self.linear(&name("down"), &inner)?)?;
        }
        let x = x.reshape((batch, length, self.shape.width))?;
        let sums = x.broadcast_mul(&stream.mask.unsqueeze(2)?)?.sum(1)?;
        let pooled = sums.broadcast_div(&stream.mask.sum_keepdim(1)?)?;
        let hidden = self.linear("hidden", &pooled)?.gelu_erf()?;
        Ok(self.linear("score", &hidden)?.squeeze(1)?)
    }

    /// Full self-attention within each response; `bias` is `[B, 1, 1, T]`.
    fn attention(
        &self,
        block: &str,
        x: &Tensor,
        bias: &Tensor,
    ) -> std::result::Result<Tensor, ModelError> {
        let DiscriminatorShape { width, heads, .. } = self.shape;
        let (batch, length) = (bias.dim(0)?, bias.dim(3)?);
        let all = self.linear(&format!("{block}attention"), x)?;
        let all = all.reshape((batch, length, 3, heads, width / heads))?;
        let of = |part: usize| {
            all.narrow(2, part, 1)?
                .squeeze(2)?
                .transpose(1, 2)?
                .contiguous()
        };
        let (queries, keys, values) = (of(0)?, of(1)?, of(2)?);
        let scale = 1.0 / ((width / heads) as f64).sqrt();
        let scores = (queries.matmul(&keys.t()?.contiguous()?)? * scale)?.broadcast_add(bias)?;
        let mixed = softmax(&scores)?.matmul(&values)?;
        let mixed = mixed.transpose(1, 2)?.reshape((batch * length, width))?;
        self.linear(&format!("{block}output"), &mixed)
    }

    fn linear(&self, name: &str, x: &Tensor) -> std::result::Result<Tensor, ModelError> {
        let bias = self.tensor(&format!("{name}.bias"))?;
        let name = format!("{name}.weight");
        let weight = self.tensor(&name)?;
        let weight = self.spectral.normalise(&self.full_name(&name), &weight)?;
        let product = linear(x, &weight, Precision::F32)?;
        Ok(product.broadcast_add(&bias)?)
    }

    fn layer_norm(&self, name: &str, x: &Tensor) -> std::result::Result<Tensor, ModelError> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centred.broadcast_div(&(variance + EPSILON)?.sqrt()?)?;
        let scaled = normed.broadcast_mul(&self.tensor(&format!("{name}.weight"))?)?;
        Ok(scaled.broadcast_add(&self.tensor(&format!("{name}.bias"))?)?)
    }

    fn tensor(&self, name: &str) -> std::result::Result<Tensor, ModelError> {
        self.weights.get(&self.full_name(name))
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }
}

fn softmax(scores: &Tensor) -> Result<Tensor> {
    let max = scores.max_keepdim(D::Minus1)?.detach();
    let exp = scores.broadcast_sub(&max)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ganpo::features::Features;

    const SHAPE: DiscriminatorShape = DiscriminatorShape {
        features: 6,
        width: 8,
        heads: 2,
        layers: 2,
        length: 5,
    };

    fn weights(seed: u64) -> Weights {
        let tensors = SHAPE.initialise(Seed(seed), &Device::Cpu).unwrap();
        let named = tensors
            .into_iter()
            .map(|(name, t)| (format!("chosen.{name}"), t));
        Weights::of(named.collect())
    }

    fn features(lengths: &[usize]) -> Features {
        let rows: usize = lengths.iter().sum();
        let values: Vec<f32> = (0..rows * 6)
            .map(|i| ((i * i) as f32 * 0.37).sin())
            .collect();
        let tokens = Tensor::from_vec(values, (rows, 6), &Device::Cpu).unwrap();
        Features::new(&tokens, lengths).unwrap()
    }

    fn scores(weights: &Weights, stream: &Stream) -> Vec<f32> {
        let mut spectral = SpectralNorm::default();
        for name in SPECTRAL {
            let name = format!("chosen.{name}");
            spectral.add(&name, &weights.get(&name).unwrap()).unwrap();
        }
        let discriminator = Discriminator {
            name: "chosen",
            shape: SHAPE,
            weights,
            spectral: &spectral,
        };
        discriminator.score(stream).unwrap().to_vec1().unwrap()
    }

    fn close(a: &[f32], b: &[f32], tolerance: f32) {
        assert_eq!(a.len(), b.len());
        for (x, y) in a.iter().zip(b) {
            assert!((x - y).abs() < tolerance, "{a:?} is not {b:?}");
        }
    }

    #[test]
    fn changing_padding_changes_nothing() -> Result<()> {
        let (weights, features) = (weights(1), features(&[2, 4, 3]));
        let together = features.stream(&[0, 1, 2], 5)?;
        let scored = scores(&weights, &together);
        // Other values in the padding: bit-identical.
        let noise = together.mask.affine(-7.0, 7.0)?.unsqueeze(2)?;
        let noisy = Stream {
            tokens: together.tokens.broadcast_add(&noise)?,
            mask: together.mask.clone(),
        };
        assert_eq!(scores(&weights, &noisy), scored);
        // No padding, or more.
        for (completion, expected) in scored.iter().enumerate() {
            let alone = features.stream(&[completion], 5)?;
            close(&scores(&weights, &alone), &[*expected], 1e-5);
            let padded = Stream {
                tokens: alone.tokens.pad_with_zeros(1, 0, 1)?,
                mask: alone.mask.pad_with_zeros(1, 0, 1)?,
            };
            close(&scores(&weights, &padded), &[*expected], 1e-5);
        }
        Ok(())
    }

    #[test]
    fn a_score_depends_on_every_token_and_its_position() -> Result<()> {
        let (weights, features) = (weights(1), features(&[4]));
        let stream = features.stream(&[0], 5)?;
        let scored = scores(&weights, &stream);
        let swapped = stream
            .tokens
            .index_select(&Tensor::new(&[1u32, 0, 2, 3], &Device::Cpu)?, 1)?;
        let moved = Stream {
            tokens: swapped,
            mask: stream.mask.clone(),
        };
        let apart = |other: &Stream| (scores(&weights, other)[0] - scored[0]).abs();
        assert!(apart(&moved) > 1e-6, "{}", apart(&moved));
        for token in 0..4 {
            let mut mask = [1f32; 4];
            mask[token] = 2.0;
            let scale = Tensor::from_vec(mask.to_vec(), (1, 4, 1), &Device::Cpu)?;
            let changed = Stream {
                tokens: stream.tokens.broadcast_mul(&scale)?,
                mask: stream.mask.clone(),
            };
            assert!(apart(&changed) > 1e-5, "token {token}: {}", apart(&changed));
        }
        Ok(())
    }

    #[test]
    fn parameters_match_the_shape_and_depend_on_the_seed() {
        let count = weights(1).parameter_count();
        let block = 4 * 8 + (24 + 8 + 32) * 8 + 8 * 32 + 24 + 8 + 32 + 8;
        assert_eq!(count, 6 * 8 + 8 + 5 * 8 + 2 * block + 8 * 8 + 8 + 8 + 1);
        let digest = |seed| weights(seed).digest().unwrap();
        assert_eq!(digest(1), digest(1));
        assert_ne!(digest(1), digest(2));
    }
}
