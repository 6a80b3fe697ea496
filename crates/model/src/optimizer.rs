//! AdamW over the variables of a model, with clipping, and state that can be saved. What the loss was, the
//! optimiser does not know.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Device, Tensor, Var};

use crate::{
    ModelError, Weights,
    ops::{AdamWStep, Gradients, Moments, adamw_step, squared_norm, wide},
};

/// What does not change from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the gradient's mean.
    pub beta1: f64,
    /// Decay of the squared gradient's mean.
    pub beta2: f64,
    /// Added to the root of the squared gradient's mean.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient's norm is clipped to it.
    pub max_grad_norm: f64,
}

/// Variables and what AdamW remembers of them.
#[derive(Debug)]
pub struct Optimizer {
    vars: BTreeMap<String, Var>,
    moments: BTreeMap<String, Moments>,
    settings: AdamWSettings,
    steps: u64,
}

impl Optimizer {
    /// An optimiser that has taken no step.
    ///
    /// # Errors
    /// When the device cannot hold the moments.
    pub fn new(vars: BTreeMap<String, Var>, settings: AdamWSettings) -> Result<Self, ModelError> {
        let moments = vars
            .iter()
            .map(|(name, var)| Ok((name.clone(), Moments::zeros(var)?)))
            .collect::<Result<_, candle_core::Error>>()?;
        Ok(Self {
            vars,
            moments,
            settings,
            steps: 0,
        })
    }

    /// The variables that are trained.
    #[must_use]
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// Gives every variable the numbers of `weights`, in place.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn assign(&self, weights: &Weights) -> Result<(), ModelError> {
        for (name, var) in &self.vars {
            var.set(&weights.get(name)?)?;
        }
        Ok(())
    }

    /// The Euclidean norm of all variables' gradients; not finite if any number is not.
    ///
    /// # Errors
    /// When a variable has no gradient: it would silently stay as it is.
    pub fn norm(&self, gradients: &Gradients) -> Result<f64, ModelError> {
        let mut squares = 0.0;
        for (name, var) in &self.vars {
            squares += squared_norm(found(gradients, name, var)?)?;
        }
        Ok(squares.sqrt())
    }

    /// Moves every variable one step against its gradient, whose norm (as [`Self::norm`] gives it) is clipped
    /// first.
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
        let AdamWSettings {
            beta1,
            beta2,
            epsilon,
            weight_decay,
            max_grad_norm,
        } = self.settings;
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let step = AdamWStep {
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
        for (name, var) in &self.vars {
            let gradient = found(gradients, name, var)?;
            let missing = || ModelError::Weights {
                reason: format!("no moments for {name}"),
            };
            let moments = self.moments.get_mut(name).ok_or_else(missing)?;
            adamw_step(var, gradient, moments, &step)?;
        }
        Ok(())
    }

    /// The moments and the step count as the bytes of a safetensors file.
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
        let metadata = HashMap::from([("steps".to_owned(), self.steps.to_string())]);
        safetensors::serialize(tensors, Some(metadata)).map_err(|error| ModelError::Weights {
            reason: error.to_string(),
        })
    }

    /// Takes back what [`Self::to_blob`] wrote.
    ///
    /// # Errors
    /// When the blob is torn or belongs to other variables; nothing has changed then.
    pub fn restore(&mut self, blob: &[u8]) -> Result<(), ModelError> {
        let foreign = |reason: String| ModelError::Weights {
            reason: format!("optimiser state: {reason}"),
        };
        let (_, header) = safetensors::SafeTensors::read_metadata(blob)
            .map_err(|error| foreign(error.to_string()))?;
        let steps = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get("steps")?.parse().ok());
        let steps =
            steps.ok_or_else(|| foreign("it does not say how many steps were taken".into()))?;
        let mut found = candle_core::safetensors::load_buffer(blob, &Device::Cpu)?;
        let mut moments = BTreeMap::new();
        for (name, var) in &self.vars {
            let mut take = |part: &str| {
                let key = format!("{name}.{part}");
                let tensor = found.remove(&key).filter(|t| t.dims() == var.dims());
                let tensor = tensor
                    .ok_or_else(|| foreign(format!("{key} is missing or of another shape")))?;
                Ok::<_, ModelError>(
                    tensor
                        .to_dtype(wide(var.dtype()))?
                        .to_device(var.device())?,
                )
            };
            moments.insert(
                name.clone(),
                Moments {
                    first: take("first")?,
                    second: take("second")?,
                },
            );
        }
        (self.moments, self.steps) = (moments, steps);
        Ok(())
    }
}

fn found<'a>(gradients: &'a Gradients, name: &str, var: &Var) -> Result<&'a Tensor, ModelError> {
    gradients.get(var).ok_or_else(|| ModelError::Weights {
        reason: format!("the variable {name} got no gradient, so it would never be trained"),
    })
}
