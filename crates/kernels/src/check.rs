//! Test helpers for operations: agreement with a composed version and with finite differences, and repeatability.

use candle_core::{Device, Result, Shape, Tensor, Var};

/// Pseudo-random values in [-1, 1), the same for the same seed.
pub(crate) fn noise(shape: impl Into<Shape>, seed: u64) -> Tensor {
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count() as u64)
        .map(|i| {
            let z = (i + 1)
                .wrapping_add(seed.wrapping_mul(0x1000_0000_01b3))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Bits of a tensor's values, for exact comparison.
pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Panics unless |a - b| ≤ tolerance · (1 + |b|) everywhere.
pub(crate) fn assert_close(a: &Tensor, b: &Tensor, tolerance: f32) {
    assert_eq!(a.dims(), b.dims());
    let a: Vec<f32> = a.flatten_all().unwrap().to_vec1().unwrap();
    let b: Vec<f32> = b.flatten_all().unwrap().to_vec1().unwrap();
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let close = (a - b).abs() <= tolerance * (1.0 + b.abs());
        assert!(close, "at {i}: {a} is not {b}");
    }
}

/// The value of `f`, and the gradient of a randomly weighted sum of it with respect to each input.
pub(crate) fn value_and_gradients(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|i| Var::from_tensor(i).unwrap())
        .collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let value = f(&tensors).unwrap();
    let gradients = project(&value).backward().unwrap();
    let gradients = vars
        .iter()
        .map(|v| gradients.get(v).unwrap().clone())
        .collect();
    (value.detach(), gradients)
}

/// Panics unless `fused` and `composed` agree in value and in every gradient, and `fused` gives the same bits when it
/// runs twice.
pub(crate) fn assert_same(
    inputs: &[Tensor],
    fused: impl Fn(&[Tensor]) -> Result<Tensor>,
    composed: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let (value, gradients) = value_and_gradients(inputs, &fused);
    let (expected, expected_gradients) = value_and_gradients(inputs, composed);
    assert_close(&value, &expected, 2e-5);
    for (gradient, expected) in gradients.iter().zip(&expected_gradients) {
        assert_close(gradient, expected, 5e-5);
    }
    let (again, again_gradients) = value_and_gradients(inputs, &fused);
    assert_eq!(bits(&value), bits(&again));
    for (gradient, again) in gradients.iter().zip(&again_gradients) {
        assert_eq!(bits(gradient), bits(again));
    }
}

/// Panics unless the gradients of `f` agree with central finite differences, to 3 parts in 1000.
pub(crate) fn assert_differentiates(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let step = 1e-2;
    let (_, gradients) = value_and_gradients(inputs, &f);
    for (index, gradient) in gradients.iter().enumerate() {
        let at = |element: usize, shift: f32| {
            let mut moved = inputs.to_vec();
            let shape = inputs[index].shape().clone();
            let mut values: Vec<f32> = moved[index].flatten_all().unwrap().to_vec1().unwrap();
            values[element] += shift;
            moved[index] = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            project(&f(&moved).unwrap()).to_scalar::<f32>().unwrap()
        };
        let differences: Vec<f32> = (0..gradient.elem_count())
            .map(|element| (at(element, step) - at(element, -step)) / (2.0 * step))
            .collect();
        let differences =
            Tensor::from_vec(differences, gradient.shape().clone(), &Device::Cpu).unwrap();
        assert_close(gradient, &differences, 3e-3);
    }
}

fn project(value: &Tensor) -> Tensor {
    let weights = noise(value.shape().clone(), 99);
    (value * weights).unwrap().sum_all().unwrap()
}
