//! A backward pass that gathers what it finds of variables where it stays.
//!
//! candle adds every gradient to zeros, a whole tensor each time: of weights, which are most of a model, that
//! is memory written twice and read once for nothing. The fused operations lay the gradients of variables
//! down here instead, and those of weights that are met twice are added in place.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId, backprop::GradStore, bail};
use rayon::prelude::*;

/// Numbers to a task.
const CHUNK: usize = 64 * 1024;

type Gathered = HashMap<TensorId, (Tensor, Vec<f32>)>;

thread_local! {
    /// Of the backward pass that this thread is in.
    static GATHERED: RefCell<Option<Gathered>> = const { RefCell::new(None) };
}

/// The gradients of `loss`, a scalar, in all variables it was computed from.
///
/// What candle's own `backward` gives, at less cost. The operation of a whole block,
/// [`block()`](super::block()), cannot be differentiated otherwise.
///
/// # Errors
/// When an operation has no gradient, or memory runs out.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let around = GATHERED.replace(Some(Gathered::new()));
    let found = loss.backward();
    let gathered = GATHERED.replace(around).unwrap_or_default();
    let mut found = found?;
    for (variable, numbers) in gathered.into_values() {
        let mut gradient = Tensor::from_vec(numbers, variable.shape(), variable.device())?;
        if let Some(other) = found.remove(&variable) {
            gradient = (gradient + other)?;
        }
        found.insert(&variable, gradient);
    }
    Ok(found)
}

/// Whether this thread is in a [`backward`] pass that gathers the gradient of `argument`.
pub(super) fn gathers(argument: &Tensor) -> bool {
    argument.is_variable() && GATHERED.with_borrow(Option::is_some)
}

/// Lays the gradient of an argument down where it is gathered, or hands it to candle.
pub(super) fn give(argument: &Tensor, gradient: Vec<f32>) -> Result<Option<Tensor>> {
    if !gathers(argument) {
        return Tensor::from_vec(gradient, argument.shape(), argument.device()).map(Some);
    }
    with(argument, |entry| match entry {
        Some(sum) => add(sum, &gradient),
        None => *entry = Some(gradient),
    });
    Ok(None)
}

/// The same, for a gradient that is mostly zeros: `work` adds what is not.
pub(super) fn edit(argument: &Tensor, work: impl FnOnce(&mut [f32])) -> Result<Option<Tensor>> {
    let zeros = || vec![0.0; argument.elem_count()];
    if !gathers(argument) {
        let mut gradient = zeros();
        work(&mut gradient);
        return give(argument, gradient);
    }
    with(argument, |entry| work(entry.get_or_insert_with(zeros)));
    Ok(None)
}

/// An error unless gradients are gathered.
pub(super) fn must_gather(operation: &str) -> Result<()> {
    if GATHERED.with_borrow(Option::is_none) {
        bail!("{operation}: its gradient is found by ops::backward alone");
    }
    Ok(())
}

/// Lends what was gathered for `argument` so far.
fn with(argument: &Tensor, work: impl FnOnce(&mut Option<Vec<f32>>)) {
    GATHERED.with_borrow_mut(|gathered| {
        let gathered = gathered.get_or_insert_default();
        let mut sum = gathered.remove(&argument.id()).map(|(_, sum)| sum);
        work(&mut sum);
        if let Some(sum) = sum {
            gathered.insert(argument.id(), (argument.clone(), sum));
        }
    });
}

/// `sum += terms`, on all threads.
pub(super) fn add(sum: &mut [f32], terms: &[f32]) {
    let chunks = sum.par_chunks_mut(CHUNK).zip(terms.par_chunks(CHUNK));
    chunks.for_each(|(sum, terms)| plus(sum, terms));
}

/// `sum += terms`, on this thread.
pub(super) fn plus(sum: &mut [f32], terms: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += term;
    }
}

/// The sum of rows so wide, added in order.
pub(super) fn in_order<'a>(rows: impl IntoIterator<Item = &'a [f32]>, width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for row in rows {
        plus(&mut sums, row);
    }
    sums
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::super::check::{assert_close, noise};
    use super::super::{Precision, linear};
    use super::*;

    #[test]
    fn a_variable_that_is_met_twice_gathers_both_and_candles_own() -> Result<()> {
        let x = noise((3, 4), 1);
        let (weight, bias) = (Var::from_tensor(&noise((4, 4), 2))?, noise(4, 3));
        let loss = || {
            let y = linear(&x, &weight, Precision::F32)?.broadcast_add(&bias)?;
            let y = linear(&y, &weight, Precision::F32)?;
            // And once by an operation of candle's.
            y.matmul(&weight)?.sqr()?.sum_all()
        };
        let found = backward(&loss()?)?;
        let expected = loss()?.backward()?;
        let of = |store: &GradStore| store.get(&weight).unwrap().clone();
        assert_close(&of(&found), &of(&expected), 1e-5);
        Ok(())
    }

    #[test]
    fn what_is_no_variable_is_left_to_candle() -> Result<()> {
        let (x, weight) = (noise((3, 4), 1), Var::from_tensor(&noise((5, 4), 2))?);
        let doubled = (weight.as_tensor() * 2.0)?;
        let loss = linear(&x, &doubled, Precision::F32)?.sum_all()?;
        let (found, expected) = (backward(&loss)?, loss.backward()?);
        let of = |store: &GradStore| store.get(&weight).unwrap().clone();
        assert_close(&of(&found), &of(&expected), 1e-6);
        Ok(())
    }
}
