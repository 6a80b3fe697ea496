//! Exponential moving average of a model's trained weights.
//!
//! Promises that equal histories give equal bits, also where the history was interrupted and read back from a blob.
//! Does not know what the average is for.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Var};
use kernels::{accumulation_dtype, moving_average_step};

use crate::{
    error::ModelError, optimizer::Optimizer, transformer::LanguageModel, weights::Weights,
};

/// Moving average `a ← decay·a + (1 − decay)·θ` of the trained weights θ of a model, in f32 where those are in half
/// precision, and the model with these weights.
#[derive(Debug)]
pub struct MovingAverage {
    decay: f64,
    /// The averages by the names of the variables.
    averages: BTreeMap<String, Var>,
    /// Averages rounded to the dtype of the model, of those in half precision.
    rounded: BTreeMap<String, Var>,
    model: LanguageModel,
}

impl MovingAverage {
    /// The average before the first step: the weights of `model` themselves.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn new(model: &LanguageModel, decay: f64) -> Result<Self, ModelError> {
        let (weights, vars) = model.trainable()?;
        let weights = weights.trained().detached();
        let (mut averages, mut rounded) = (BTreeMap::new(), BTreeMap::new());
        for (name, var) in vars {
            let dtype = accumulation_dtype(var.dtype());
            if dtype == var.dtype() {
                averages.insert(name, var);
                continue;
            }
            let average = var.as_detached_tensor().to_dtype(dtype)?;
            averages.insert(name.clone(), Var::from_tensor(&average)?);
            rounded.insert(name, var);
        }
        Ok(Self {
            decay,
            averages,
            rounded,
            model: model.with_trained(weights)?,
        })
    }

    /// The model with the averaged weights. They change in place with every update.
    #[must_use]
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// Moves the average towards the weights in training, after a step of `optimizer`.
    ///
    /// # Errors
    /// When a variable has no average, or a tensor operation fails.
    pub fn update(&mut self, optimizer: &Optimizer) -> Result<(), ModelError> {
        for (name, value) in optimizer.values() {
            let average = self.averages.get(name).ok_or_else(|| ModelError::Weights {
                reason: format!("no average for {name}"),
            })?;
            moving_average_step(average, &value, self.decay)?;
        }
        self.round()
    }

    /// The averages as one safetensors file, in f32 where the model is in half precision.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn to_blob(&self) -> Result<Vec<u8>, ModelError> {
        self.weights().to_blob()
    }

    /// Restores the averages of [`Self::to_blob`].
    ///
    /// # Errors
    /// When the blob is truncated or belongs to another model; the state is then unchanged.
    pub fn restore(&mut self, blob: &[u8]) -> Result<(), ModelError> {
        let device = self.model.device();
        let dtype = accumulation_dtype(self.model.trained_dtype());
        let shapes = self.weights().shapes().into_iter().collect();
        let saved = Weights::from_blob_with_shapes(blob, shapes, dtype, device)?;
        self.assign(&saved)
    }

    /// Starts again at the weights of `model`.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn restart(&mut self, model: &LanguageModel) -> Result<(), ModelError> {
        self.assign(model.trained())
    }

    fn assign(&self, weights: &Weights) -> Result<(), ModelError> {
        for (name, average) in &self.averages {
            let tensor = weights.get(name)?;
            average.set(&tensor.to_dtype(average.dtype())?)?;
        }
        self.round()
    }

    fn round(&self) -> Result<(), ModelError> {
        for (name, rounded) in &self.rounded {
            let average = self.averages[name].as_detached_tensor();
            rounded.set(&average.to_dtype(rounded.dtype())?)?;
        }
        Ok(())
    }

    fn weights(&self) -> Weights {
        let of = |(name, var): (&String, &Var)| (name.clone(), var.as_detached_tensor());
        Weights::of(self.averages.iter().map(of).collect())
    }
}

impl LanguageModel {
    /// A model with a copy of the trained weights, which does not change with them. Frozen weights are shared.
    ///
    /// # Errors
    /// When the device cannot hold the copy.
    pub fn snapshot(&self) -> Result<Self, ModelError> {
        self.with_trained(self.trained().copied(self.trained_dtype())?)
    }

    /// The model with the trained weights in the file `path`, a blob of [`Weights::to_blob`] or
    /// [`MovingAverage::to_blob`] of this model's weights, rounded to their dtype.
    ///
    /// # Errors
    /// When the file cannot be read, is truncated or belongs to another model.
    pub fn with_weights_file(&self, path: &Path) -> Result<Self, ModelError> {
        let blob = std::fs::read(path).map_err(|source| ModelError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        self.with_blob(&blob)
    }

    /// Dtype of the trained weights: f32 of an adapter's.
    pub(crate) fn trained_dtype(&self) -> DType {
        match self.adapter() {
            Some(_) => DType::F32,
            None => self.dtype(),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use kernels::Gradients;

    use super::*;
    use crate::{fixtures::tiny_model, optimizer::AdamWSettings};

    const DECAY: f64 = 0.75;

    fn optimizer(model: &LanguageModel) -> (LanguageModel, Optimizer) {
        let settings = AdamWSettings {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        };
        let (model, vars) = model.trainable().unwrap();
        let optimizer = Optimizer::new(vars, settings).unwrap();
        (model, optimizer)
    }

    /// One step down the sum of all weights.
    fn descend(optimizer: &mut Optimizer) {
        let mut gradients = Gradients::default();
        let sums = optimizer.vars().values().map(|var| {
            let values = var.to_dtype(DType::F32).unwrap();
            values.sum_all().unwrap()
        });
        let sum = sums.reduce(|a, b| (a + b).unwrap()).unwrap();
        gradients.backward(&sum).unwrap();
        let norm = optimizer.norm(&gradients).unwrap();
        optimizer.step(&gradients, norm, 0.01).unwrap();
    }

    fn of_dtype(dtype: DType) -> LanguageModel {
        let model = tiny_model(7, 1);
        let weights = model.weights().to_dtype(dtype).unwrap();
        LanguageModel::new(model.config().clone(), weights).unwrap()
    }

    fn values(model: &LanguageModel) -> Vec<f32> {
        let tensor = model.trained().get("model.norm.weight").unwrap();
        tensor.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
    }

    /// The norms begin at 1 and Adam moves every weight by the learning rate: the average lags by the geometric sum.
    #[test]
    fn the_average_lags_behind_the_weights_by_a_geometric_sum() {
        let start = of_dtype(DType::F32);
        let (model, mut optimizer) = optimizer(&start);
        let mut average = MovingAverage::new(&start, DECAY).unwrap();
        let mut expected = 1.0;
        for step in 1..=5 {
            descend(&mut optimizer);
            average.update(&optimizer).unwrap();
            expected = DECAY * expected + (1.0 - DECAY) * (1.0 - 0.01 * f64::from(step));
            for (value, now) in values(average.model()).iter().zip(values(&model)) {
                assert!(
                    (f64::from(*value) - expected).abs() < 1e-4,
                    "{value} {expected}"
                );
                assert!((now - (1.0 - 0.01 * step as f32)).abs() < 1e-4, "{now}");
            }
        }
        assert_eq!(values(&start), vec![1.0; 16], "the start is unchanged");
    }

    /// In bf16 a step of .0001 is lost, in the master copies and their average it is not.
    #[test]
    fn an_interrupted_average_continues_to_the_bit() {
        for dtype in [DType::F32, DType::BF16] {
            let start = of_dtype(dtype);
            let (model, mut optimizer) = optimizer(&start);
            let mut whole = MovingAverage::new(&start, DECAY).unwrap();
            for _ in 0..3 {
                descend(&mut optimizer);
                whole.update(&optimizer).unwrap();
            }
            let mut resumed = MovingAverage::new(&start, DECAY).unwrap();
            resumed.restore(&whole.to_blob().unwrap()).unwrap();
            for _ in 0..3 {
                descend(&mut optimizer);
                whole.update(&optimizer).unwrap();
                resumed.update(&optimizer).unwrap();
            }
            assert_eq!(whole.to_blob().unwrap(), resumed.to_blob().unwrap());
            assert_eq!(values(whole.model()), values(resumed.model()));
            assert_eq!(whole.model().dtype(), dtype);
            let truncated = whole.to_blob().unwrap();
            let truncated = &truncated[..truncated.len() - 4];
            assert!(resumed.restore(truncated).is_err());
            assert_eq!(whole.to_blob().unwrap(), resumed.to_blob().unwrap());
            resumed.restart(&model).unwrap();
            assert_eq!(values(resumed.model()), values(&model));
        }
    }

    #[test]
    fn a_snapshot_stays_when_the_weights_move() {
        let start = of_dtype(DType::F32);
        let (model, mut optimizer) = optimizer(&start);
        let snapshot = model.snapshot().unwrap();
        descend(&mut optimizer);
        assert_eq!(values(&snapshot), vec![1.0; 16]);
        assert!(values(&model).iter().all(|&value| value < 1.0));
        let device = &Device::Cpu;
        assert!(snapshot.device().same_device(device));
    }
}
