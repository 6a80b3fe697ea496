//! AdamW over the variables of a model, with gradient clipping and serialisable state. Does not know the loss.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Device, Tensor, Var};
use settings::OptimizerSettings;

use crate::{error::ModelError, weights::Weights};
use kernels::{AdamWStep, Gradients, Moments, accumulation_dtype, adamw_step, squared_norm};

/// Hyperparameters of AdamW, constant over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; vectors (norms, biases) and embeddings are exempt.
    pub weight_decay: f64,
    /// Maximum gradient norm, above which gradients are clipped.
    pub max_grad_norm: f64,
}

impl From<&OptimizerSettings> for AdamWSettings {
    fn from(settings: &OptimizerSettings) -> Self {
        Self {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            epsilon: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
            max_grad_norm: settings.max_grad_norm,
        }
    }
}

/// AdamW with the trained variables and their state.
///
/// A variable in half precision has a master copy in f32, which receives the updates; the variable is the rounded
/// master. Without it an update smaller than half the spacing of bf16 (1/256 of the weight) would be lost.
#[derive(Debug)]
pub struct Optimizer {
    vars: BTreeMap<String, Var>,
    /// f32 master copies of the variables that are not f32, by the same names.
    masters: BTreeMap<String, Var>,
    moments: BTreeMap<String, Moments>,
    settings: AdamWSettings,
    steps: u64,
    clipped: u64,
}

/// Whether weight decay applies to a variable: to matrices except token and position embeddings. Norms and biases are
/// vectors.
fn decays(name: &str, dims: &[usize]) -> bool {
    let embedding = name.ends_with("embed_tokens.weight") || name.ends_with("positions");
    dims.len() >= 2 && !embedding
}

/// f32 master copy of a variable in half precision; `None` for an f32 variable.
fn master_of(var: &Var) -> Result<Option<Var>, ModelError> {
    let master = accumulation_dtype(var.dtype());
    if master == var.dtype() {
        return Ok(None);
    }
    let copy = var.as_detached_tensor().to_dtype(master)?;
    Ok(Some(Var::from_tensor(&copy)?))
}

impl Optimizer {
    /// Creates an optimiser with zero moments.
    ///
    /// # Errors
    /// When the device cannot hold the moments.
    pub fn new(vars: BTreeMap<String, Var>, settings: AdamWSettings) -> Result<Self, ModelError> {
        let moments = vars
            .iter()
            .map(|(name, var)| Ok((name.clone(), Moments::zeros(var)?)))
            .collect::<Result<_, candle_core::Error>>()?;
        let mut masters = BTreeMap::new();
        for (name, var) in &vars {
            if let Some(master) = master_of(var)? {
                masters.insert(name.clone(), master);
            }
        }
        Ok(Self {
            vars,
            masters,
            moments,
            settings,
            steps: 0,
            clipped: 0,
        })
    }

    /// Fraction of all steps so far whose gradient was clipped, in [0, 1].
    #[must_use]
    pub fn clipped_share(&self) -> f64 {
        self.clipped as f64 / self.steps.max(1) as f64
    }

    /// The trained variables by name.
    #[must_use]
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// The trained values by name, in f32 where the variables are in half precision: the master copies if there are any.
    /// They change in place with every step.
    pub fn values(&self) -> impl Iterator<Item = (&str, Tensor)> {
        self.vars.iter().map(|(name, var)| {
            let value = self.masters.get(name).unwrap_or(var);
            (name.as_str(), value.as_detached_tensor())
        })
    }

    /// Number of steps taken.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Assigns `weights` to the variables and their master copies, in place. Saved master copies are only restored by
    /// [`Self::restore`], to be called afterwards.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn assign(&self, weights: &Weights) -> Result<(), ModelError> {
        for (name, var) in &self.vars {
            let tensor = weights.get(name)?;
            var.set(&tensor.to_dtype(var.dtype())?)?;
            if let Some(master) = self.masters.get(name) {
                master.set(&tensor.to_dtype(master.dtype())?)?;
            }
        }
        Ok(())
    }

    /// Euclidean norm of the gradients of all variables; not finite if any value is not.
    ///
    /// # Errors
    /// When a variable has no gradient, since it would silently never be trained.
    pub fn norm(&self, gradients: &Gradients) -> Result<f64, ModelError> {
        let mut squares = 0.0;
        for (name, var) in &self.vars {
            squares += squared_norm(gradient_of(gradients, name, var)?)?;
        }
        Ok(squares.sqrt())
    }

    /// Takes one AdamW step, after clipping the gradients, whose norm is given by [`Self::norm`].
    ///
    /// # Errors
    /// When a variable has no gradient or a tensor operation fails.
    pub fn step(
        &mut self,
        gradients: &Gradients,
        norm: f64,
        learning_rate: f64,
    ) -> Result<(), ModelError> {
        self.steps += 1;
        self.clipped += u64::from(norm > self.settings.max_grad_norm);
        let AdamWSettings {
            beta1,
            beta2,
            epsilon,
            weight_decay,
            max_grad_norm,
        } = self.settings;
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let decaying = AdamWStep {
            learning_rate,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            bias1: correction(beta1),
            bias2: correction(beta2),
            grad_scale: if norm > max_grad_norm {
                max_grad_norm / norm
            } else {
                1.0
            },
        };
        let plain = AdamWStep {
            weight_decay: 0.0,
            ..decaying
        };
        for (name, var) in &self.vars {
            let gradient = gradient_of(gradients, name, var)?;
            let missing = || ModelError::Weights {
                reason: format!("no moments for {name}"),
            };
            let moments = self.moments.get_mut(name).ok_or_else(missing)?;
            let step = if decays(name, var.dims()) {
                &decaying
            } else {
                &plain
            };
            match self.masters.get(name) {
                None => adamw_step(var, gradient, moments, step)?,
                Some(master) => {
                    let gradient = gradient.to_dtype(master.dtype())?;
                    adamw_step(master, &gradient, moments, step)?;
                    var.set(&master.as_detached_tensor().to_dtype(var.dtype())?)?;
                }
            }
        }
        Ok(())
    }

    /// Serialises moments, master copies and step counts as a safetensors file.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn to_blob(&self) -> Result<Vec<u8>, ModelError> {
        let mut tensors = Vec::new();
        for (name, moments) in &self.moments {
            tensors.push((
                format!("{name}.first"),
                moments.first.to_device(&Device::Cpu)?,
            ));
            tensors.push((
                format!("{name}.second"),
                moments.second.to_device(&Device::Cpu)?,
            ));
        }
        for (name, master) in &self.masters {
            let master = master.as_detached_tensor().to_device(&Device::Cpu)?;
            tensors.push((format!("{name}.master"), master));
        }
        // One entry only: with several, the order in the library's hash map would vary between runs.
        let counts = format!("{},{}", self.steps, self.clipped);
        let metadata = HashMap::from([("steps".to_owned(), counts)]);
        safetensors::serialize(tensors, Some(metadata)).map_err(|error| ModelError::Weights {
            reason: error.to_string(),
        })
    }

    /// Restores the state of [`Self::to_blob`]; variables with a master copy are set to that copy, rounded.
    ///
    /// # Errors
    /// When the blob is truncated or belongs to other variables; the state is then unchanged.
    pub fn restore(&mut self, blob: &[u8]) -> Result<(), ModelError> {
        let invalid = |reason: String| ModelError::Weights {
            reason: format!("optimiser state: {reason}"),
        };
        let (_, header) = safetensors::SafeTensors::read_metadata(blob)
            .map_err(|error| invalid(error.to_string()))?;
        let counts = header.metadata().as_ref().and_then(|metadata| {
            let (steps, clipped) = metadata.get("steps")?.split_once(',')?;
            Some((steps.parse().ok()?, clipped.parse().ok()?))
        });
        let (steps, clipped) = counts.ok_or_else(|| invalid("the step count is missing".into()))?;
        let mut found = candle_core::safetensors::load_buffer(blob, &Device::Cpu)?;
        let (mut moments, mut masters) = (BTreeMap::new(), BTreeMap::new());
        for (name, var) in &self.vars {
            let mut take = |part: &str| {
                let key = format!("{name}.{part}");
                let tensor = found.remove(&key).filter(|t| t.dims() == var.dims());
                let tensor = tensor
                    .ok_or_else(|| invalid(format!("{key} is missing or of another shape")))?;
                Ok::<_, ModelError>(
                    tensor
                        .to_dtype(accumulation_dtype(var.dtype()))?
                        .to_device(var.device())?,
                )
            };
            let of_var = Moments {
                first: take("first")?,
                second: take("second")?,
            };
            moments.insert(name, of_var);
            if self.masters.contains_key(name) {
                masters.insert(name, take("master")?);
            }
        }
        for (name, tensor) in masters {
            self.masters[name].set(&tensor)?;
            self.vars[name].set(&tensor.to_dtype(self.vars[name].dtype())?)?;
        }
        let moments = moments.into_iter().map(|(name, m)| (name.clone(), m));
        self.moments = moments.collect();
        (self.steps, self.clipped) = (steps, clipped);
        Ok(())
    }
}

fn gradient_of<'a>(
    gradients: &'a Gradients,
    name: &str,
    var: &Var,
) -> Result<&'a Tensor, ModelError> {
    gradients.get(var).ok_or_else(|| ModelError::Weights {
        reason: format!("the variable {name} got no gradient, so it would never be trained"),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use rand::Rng;
    use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

    use super::*;

    fn settings(weight_decay: f64) -> AdamWSettings {
        AdamWSettings {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay,
            max_grad_norm: 1.0,
        }
    }

    fn values(var: &Var) -> Vec<f32> {
        let tensor = var.as_tensor().to_dtype(DType::F32).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// 4,000 weights, uniform in [−0.1, 0.1].
    fn weights(dtype: DType) -> BTreeMap<String, Var> {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let values: Vec<f32> = (0..4000)
            .map(|_| 0.2 * random.random::<f32>() - 0.1)
            .collect();
        let tensor = Tensor::from_vec(values, (40, 100), &Device::Cpu).unwrap();
        let var = Var::from_tensor(&tensor.to_dtype(dtype).unwrap()).unwrap();
        BTreeMap::from([("w".to_owned(), var)])
    }

    /// Takes optimiser steps on the gradient of Σw: each moves every weight by the learning rate.
    fn descend(optimizer: &mut Optimizer, steps: u64, learning_rate: f64) {
        for _ in 0..steps {
            let sums: Vec<Tensor> = optimizer
                .vars()
                .values()
                .map(|var| var.sum_all().unwrap())
                .collect();
            let sum = sums
                .iter()
                .skip(1)
                .fold(sums[0].clone(), |a, b| (a + b).unwrap());
            let mut gradients = Gradients::default();
            gradients.backward(&sum).unwrap();
            let norm = optimizer.norm(&gradients).unwrap();
            optimizer.step(&gradients, norm, learning_rate).unwrap();
        }
    }

    /// In bf16 alone the spacing at 0.1 is 0.0005, and updates of 1e-5 would all be lost.
    #[test]
    fn bf16_weights_accumulate_updates_smaller_than_their_spacing() {
        let vars = weights(DType::BF16);
        let start = values(&vars["w"]);
        let mut optimizer = Optimizer::new(vars, settings(0.0)).unwrap();
        descend(&mut optimizer, 60, 1e-5);
        let end = values(&optimizer.vars["w"]);
        let moved = start.iter().zip(&end).filter(|(a, b)| a != b).count();
        assert!(moved > 3800, "{moved} of 4000 moved");
        // 60 updates of 1e-5, which appear at 0.1 in whole spacings of 0.00049.
        let mean = start.iter().zip(&end).map(|(a, b)| a - b).sum::<f32>() / 4000.0;
        assert!((mean - 6e-4).abs() < 1.2e-4, "{mean}");
    }

    #[test]
    fn saved_masters_resume_bit_identically() {
        let mut whole = Optimizer::new(weights(DType::BF16), settings(0.1)).unwrap();
        descend(&mut whole, 7, 1e-5);
        let saved = whole.to_blob().unwrap();
        let policy = Weights::of(BTreeMap::from([(
            "w".to_owned(),
            whole.vars["w"].as_detached_tensor().copy().unwrap(),
        )]));
        let mut resumed = Optimizer::new(weights(DType::BF16), settings(0.1)).unwrap();
        resumed.assign(&policy).unwrap();
        resumed.restore(&saved).unwrap();
        assert_eq!(resumed.to_blob().unwrap(), saved);
        descend(&mut whole, 7, 1e-5);
        descend(&mut resumed, 7, 1e-5);
        assert_eq!(resumed.to_blob().unwrap(), whole.to_blob().unwrap());
        assert_eq!(values(&resumed.vars["w"]), values(&whole.vars["w"]));
    }

    /// With a zero gradient only weight decay moves a weight.
    #[test]
    fn vectors_and_embeddings_do_not_decay() {
        let names = [
            ("model.embed_tokens.weight", vec![3, 2], 1.0f32),
            ("chosen.positions", vec![3, 2], 1.0),
            ("model.norm.weight", vec![4], 1.0),
            ("model.layers.0.self_attn.q_proj.bias", vec![4], 1.0),
            ("lm_head.weight", vec![3, 2], 0.95),
            ("model.layers.0.mlp.up_proj.weight", vec![3, 2], 0.95),
            (
                "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
                vec![1, 2],
                0.95,
            ),
        ];
        let var = |dims: &[usize]| Var::ones(dims, DType::F32, &Device::Cpu).unwrap();
        let vars: BTreeMap<String, Var> = names
            .iter()
            .map(|(name, dims, _)| ((*name).to_owned(), var(dims)))
            .collect();
        let mut optimizer = Optimizer::new(vars, settings(0.5)).unwrap();
        // (x − x)² has a zero gradient.
        let squares = |v: &Var| (v.as_tensor() - v.as_detached_tensor()).unwrap().sqr();
        let sums = optimizer
            .vars
            .values()
            .map(|v| squares(v).unwrap().sum_all().unwrap());
        let sum = sums.reduce(|a, b| (a + b).unwrap()).unwrap();
        let mut gradients = Gradients::default();
        gradients.backward(&sum).unwrap();
        optimizer.step(&gradients, 0.0, 0.1).unwrap();
        for (name, _, expected) in names {
            let found = values(&optimizer.vars[name]);
            assert!(
                found.iter().all(|x| (x - expected).abs() < 1e-6),
                "{name}: {found:?}"
            );
        }
    }

    #[test]
    fn the_fraction_of_clipped_steps_is_counted_and_saved() {
        let mut optimizer = Optimizer::new(weights(DType::F32), settings(0.0)).unwrap();
        assert_eq!(optimizer.clipped_share(), 0.0);
        // All ones: norm √4000 > 1.
        descend(&mut optimizer, 1, 1e-3);
        assert_eq!(optimizer.clipped_share(), 1.0);
        let mut gradients = Gradients::default();
        let small = (optimizer.vars["w"].sum_all().unwrap() * 1e-3).unwrap();
        gradients.backward(&small).unwrap();
        for _ in 0..3 {
            let norm = optimizer.norm(&gradients).unwrap();
            optimizer.step(&gradients, norm, 1e-3).unwrap();
        }
        assert_eq!(optimizer.clipped_share(), 0.25);
        let mut resumed = Optimizer::new(weights(DType::F32), settings(0.0)).unwrap();
        resumed.restore(&optimizer.to_blob().unwrap()).unwrap();
        assert_eq!(resumed.clipped_share(), 0.25);
    }
}
