//! Spectral normalisation (Miyato et al. 2018): a weight divided by its largest singular value, which is tracked by
//! power iteration.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

/// Steps of power iteration before the first use, as in PyTorch.
const INITIAL_STEPS: usize = 15;

/// Estimates of the singular vectors of some weights. They are constants: σ is differentiable in the weight alone.
#[derive(Debug, Clone, Default)]
pub(super) struct SpectralNorm {
    /// Unit vectors u `[out]` and v `[in]`, by the weight's name.
    vectors: BTreeMap<String, (Tensor, Tensor)>,
}

impl SpectralNorm {
    /// Adds a weight `[out, in]`.
    pub(super) fn add(&mut self, name: &str, weight: &Tensor) -> Result<()> {
        let (out, _) = weight.dims2()?;
        // Any vector that is not orthogonal to the first singular vector.
        let first: Vec<f32> = (0..out).map(|i| 1.0 + (i as f32).sin()).collect();
        let mut u = unit(&Tensor::from_vec(first, out, weight.device())?)?;
        let mut v = u.clone();
        for _ in 0..INITIAL_STEPS {
            (u, v) = iterate(&u, &weight.detach())?;
        }
        self.vectors.insert(name.to_owned(), (u, v));
        Ok(())
    }

    /// One step of power iteration for the current weight of this name.
    pub(super) fn update(&mut self, name: &str, weight: &Tensor) -> Result<()> {
        if let Some((u, v)) = self.vectors.get_mut(name) {
            (*u, *v) = iterate(u, &weight.detach())?;
        }
        Ok(())
    }

    /// `W/σ` with `σ = uᵀWv`; the weight itself if it was not added.
    pub(super) fn normalise(&self, name: &str, weight: &Tensor) -> Result<Tensor> {
        let Some((u, v)) = self.vectors.get(name) else {
            return Ok(weight.clone());
        };
        let sigma = (weight * u.unsqueeze(1)?.matmul(&v.unsqueeze(0)?)?)?.sum_all()?;
        weight.broadcast_div(&sigma)
    }

    /// The vectors under names of their own, for a checkpoint.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.vectors.iter().flat_map(|(name, (u, v))| {
            [
                (format!("{name}.u"), u.clone()),
                (format!("{name}.v"), v.clone()),
            ]
        })
    }

    /// Restores the vectors of [`Self::tensors`].
    pub(super) fn restore<E>(
        &mut self,
        mut tensor: impl FnMut(&str) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<(), E> {
        for (name, (u, v)) in &mut self.vectors {
            (*u, *v) = (tensor(&format!("{name}.u"))?, tensor(&format!("{name}.v"))?);
        }
        Ok(())
    }
}

/// v = Wᵀu, then u = Wv, each normalised.
fn iterate(u: &Tensor, weight: &Tensor) -> Result<(Tensor, Tensor)> {
    let v = unit(&weight.t()?.matmul(&u.unsqueeze(1)?)?.squeeze(1)?)?;
    let u = unit(&weight.matmul(&v.unsqueeze(1)?)?.squeeze(1)?)?;
    Ok((u, v))
}

fn unit(vector: &Tensor) -> Result<Tensor> {
    let norm = (vector.sqr()?.sum_all()?.sqrt()? + 1e-12)?;
    vector.broadcast_div(&norm)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn a_weight_is_divided_by_its_largest_singular_value() -> Result<()> {
        // Singular values 3 and 1: a rotation of diag(3, 1).
        let (c, s) = (0.6f32, 0.8f32);
        let weight = Tensor::new(&[[3.0 * c, -s], [3.0 * s, c]], &Device::Cpu)?;
        let mut spectral = SpectralNorm::default();
        spectral.add("w", &weight)?;
        let normed = spectral.normalise("w", &weight)?.to_vec2::<f32>()?;
        let expected = [[c, -s / 3.0], [s, c / 3.0]];
        for (row, expected) in normed.iter().flatten().zip(expected.iter().flatten()) {
            assert!((row - expected).abs() < 1e-5, "{normed:?}");
        }
        assert_eq!(
            spectral.normalise("another", &weight)?.to_vec2::<f32>()?,
            weight.to_vec2::<f32>()?
        );
        // One step at a time suffices if the weight changes slowly.
        let mut moved = weight;
        let angle = 0.01f32;
        for _ in 0..40 {
            let rotation = Tensor::new(
                &[[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]],
                &Device::Cpu,
            )?;
            moved = rotation.matmul(&moved)?;
            spectral.update("w", &moved)?;
        }
        let first = spectral.normalise("w", &moved)?.get_on_dim(1, 0)?;
        let length = first.sqr()?.sum_all()?.to_scalar::<f32>()?;
        assert!((length - 1.0).abs() < 1e-3, "{length}");
        Ok(())
    }

    #[test]
    fn scaling_a_weight_changes_nothing_and_its_gradient_is_orthogonal() -> Result<()> {
        let weight = Var::from_tensor(&Tensor::new(&[[2f32, 0.5], [-1.0, 1.5]], &Device::Cpu)?)?;
        let mut spectral = SpectralNorm::default();
        spectral.add("w", &weight)?;
        let normed = spectral.normalise("w", &weight)?;
        let scaled = spectral.normalise("w", &(weight.as_tensor() * 7.0)?)?;
        let gap = (&normed - scaled)?.abs()?.sum_all()?.to_scalar::<f32>()?;
        assert!(gap < 1e-5, "{gap}");
        let mixed = (normed * Tensor::new(&[[1f32, -2.0], [0.3, 0.9]], &Device::Cpu)?)?;
        let found = mixed.sum_all()?.backward()?;
        let along = (found.get(&weight).unwrap() * weight.as_tensor())?;
        let along = along.sum_all()?.to_scalar::<f32>()?;
        assert!(along.abs() < 1e-5, "{along}");
        Ok(())
    }
}
