//! Backward pass that accumulates the gradients of variables in place.
//!
//! candle adds every gradient to a tensor of zeros. For weights, which are most of a model, that writes the memory
//! twice and reads it once for nothing. The fused operations accumulate the gradients of variables here instead; a
//! weight that is used twice, or in several passes, has one gradient tensor.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId, bail};
use rayon::prelude::*;

use super::storage::{self, fusible};

/// Values per task.
const CHUNK: usize = 64 * 1024;

/// The sum of each variable's gradients.
type GradientMap = HashMap<TensorId, Tensor>;

thread_local! {
    /// Accumulator of the backward pass that runs on this thread, if any.
    static ACCUMULATOR: RefCell<Option<GradientMap>> = const { RefCell::new(None) };
}

/// Gradients of variables, summed over the backward passes of a step: one tensor per variable.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: GradientMap,
}

impl Gradients {
    /// Adds the gradients of `loss`, a scalar, with respect to all variables it was computed from.
    ///
    /// Replaces candle's own `backward`, which cannot differentiate a whole decoder block,
    /// [`block()`](crate::block()).
    ///
    /// # Errors
    /// When an operation has no gradient, or memory runs out. The sums so far are lost then.
    pub fn backward(&mut self, loss: &Tensor) -> Result<()> {
        let outer = ACCUMULATOR.replace(Some(std::mem::take(&mut self.sums)));
        let by_candle = loss.backward();
        let accumulated = ACCUMULATOR.replace(outer);
        let (mut sums, by_candle) = (accumulated.unwrap_or_default(), by_candle?);
        for &id in by_candle.get_ids() {
            let Some(gradient) = by_candle.get_id(id) else {
                continue;
            };
            let sum = match sums.get(&id) {
                Some(sum) => (sum + gradient)?,
                // candle may use the same tensor for another variable, and sums are changed in place.
                None if fusible(&[gradient]) => gradient.copy()?,
                None => gradient.clone(),
            };
            sums.insert(id, sum);
        }
        self.sums = sums;
        Ok(())
    }

    /// The sum of the variable's gradients, in its shape; `None` if no loss was computed from it.
    #[must_use]
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.sums.get(&variable.id())
    }
}

/// The gradients of one loss, by [`Gradients::backward`].
///
/// # Errors
/// As there.
pub fn backward(loss: &Tensor) -> Result<Gradients> {
    let mut gradients = Gradients::default();
    gradients.backward(loss)?;
    Ok(gradients)
}

/// Whether this thread runs a backward pass that accumulates the gradient of `argument`.
pub(crate) fn is_accumulated(argument: &Tensor) -> bool {
    argument.is_variable() && ACCUMULATOR.with_borrow(Option::is_some)
}

/// Adds the gradient of a variable to its accumulator; returns it for candle if there is none.
pub(crate) fn accumulate(argument: &Tensor, gradient: Vec<f32>) -> Result<Option<Tensor>> {
    if is_accumulated(argument)
        && let Some(sum) = accumulated(argument)
    {
        storage::update_in_place(&sum, |sum| {
            par_add_assign(sum, &gradient);
            Ok(())
        })?;
        return Ok(None);
    }
    emit(
        argument,
        Tensor::from_vec(gradient, argument.shape(), argument.device())?,
    )
}

/// As [`accumulate`], for a gradient that is mostly zeros: `work` adds the others.
pub(crate) fn accumulate_sparse(
    argument: &Tensor,
    work: impl FnOnce(&mut [f32]),
) -> Result<Option<Tensor>> {
    let existing = is_accumulated(argument)
        .then(|| accumulated(argument))
        .flatten();
    let sum = match &existing {
        Some(sum) => sum.clone(),
        None => argument.zeros_like()?,
    };
    storage::update_in_place(&sum, |sum| {
        work(sum);
        Ok(())
    })?;
    match existing {
        Some(_) => Ok(None),
        None => emit(argument, sum),
    }
}

/// Fails unless this thread runs a backward pass of [`Gradients`].
pub(crate) fn require_accumulator(operation: &str) -> Result<()> {
    if ACCUMULATOR.with_borrow(Option::is_none) {
        bail!("{operation}: differentiable by kernels::backward only, not by Tensor::backward");
    }
    Ok(())
}

/// The gradient of `argument` accumulated so far.
fn accumulated(argument: &Tensor) -> Option<Tensor> {
    ACCUMULATOR.with_borrow(|sums| sums.as_ref()?.get(&argument.id()).cloned())
}

/// Starts the accumulation of a variable's gradient; returns any other gradient for candle.
fn emit(argument: &Tensor, gradient: Tensor) -> Result<Option<Tensor>> {
    if !is_accumulated(argument) {
        return Ok(Some(gradient));
    }
    ACCUMULATOR
        .with_borrow_mut(|sums| sums.get_or_insert_default().insert(argument.id(), gradient));
    Ok(None)
}

/// `sum += terms`, on all threads.
pub(crate) fn par_add_assign(sum: &mut [f32], terms: &[f32]) {
    let chunks = sum.par_chunks_mut(CHUNK).zip(terms.par_chunks(CHUNK));
    chunks.for_each(|(sum, terms)| add_assign(sum, terms));
}

/// `sum += terms`, on the calling thread.
pub(crate) fn add_assign(sum: &mut [f32], terms: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += term;
    }
}

/// The sum of rows of `width` values, added in order.
pub(crate) fn sum_rows<'a>(rows: impl IntoIterator<Item = &'a [f32]>, width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for row in rows {
        add_assign(&mut sums, row);
    }
    sums
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::check::{assert_close, noise};
    use crate::{linear::linear, matmul::Precision};

    #[test]
    fn a_variable_used_twice_and_by_candle_accumulates_all_gradients() -> Result<()> {
        let x = noise((3, 4), 1);
        let (weight, bias) = (Var::from_tensor(&noise((4, 4), 2))?, noise(4, 3));
        let loss = || {
            let y = linear(&x, &weight, Precision::F32)?.broadcast_add(&bias)?;
            let y = linear(&y, &weight, Precision::F32)?;
            // And once in an operation of candle's.
            y.matmul(&weight)?.sqr()?.sum_all()
        };
        let found = backward(&loss()?)?;
        let expected = loss()?.backward()?;
        let found = found.get(&weight).unwrap();
        assert_close(found, expected.get(&weight).unwrap(), 1e-5);
        Ok(())
    }

    #[test]
    fn passes_are_summed_and_gradients_that_candle_shares_are_copied() -> Result<()> {
        let [a, b] = [1, 2].map(|seed| Var::from_tensor(&noise((4, 4), seed)).unwrap());
        // candle uses one gradient tensor for both variables.
        let shared = || (a.as_tensor() + b.as_tensor())?.sum_all();
        let of_one = || linear(&noise((3, 4), 3), &a, Precision::F32)?.sum_all();
        let mut gradients = Gradients::default();
        for _ in 0..2 {
            gradients.backward(&shared()?)?;
            gradients.backward(&of_one()?)?;
        }
        let expected = ((shared()? + of_one()?)? * 2.0)?.backward()?;
        for variable in [&a, &b] {
            let found = gradients.get(variable).unwrap();
            assert_close(found, expected.get(variable).unwrap(), 1e-6);
        }
        Ok(())
    }

    #[test]
    fn gradients_of_computed_tensors_are_left_to_candle() -> Result<()> {
        let (x, weight) = (noise((3, 4), 1), Var::from_tensor(&noise((5, 4), 2))?);
        let doubled = (weight.as_tensor() * 2.0)?;
        let loss = linear(&x, &doubled, Precision::F32)?.sum_all()?;
        let (found, expected) = (backward(&loss)?, loss.backward()?);
        let found = found.get(&weight).unwrap();
        assert_close(found, expected.get(&weight).unwrap(), 1e-6);
        Ok(())
    }
}
