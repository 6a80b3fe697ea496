//! A backward pass that gathers what it finds of variables where it stays.
//!
//! candle adds every gradient to zeros, a whole tensor each time: of weights, which are most of a model, that
//! is memory written twice and read once for nothing. The fused operations lay the gradients of variables
//! down here instead, and those of weights that are met twice are added in place.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId, bail};
use rayon::prelude::*;

use super::storage::{self, fusible};

/// Numbers to a task.
const CHUNK: usize = 64 * 1024;

/// Of each variable, the sum of its gradients.
type Sums = HashMap<TensorId, Tensor>;

thread_local! {
    /// Of the backward pass that this thread is in.
    static GATHERED: RefCell<Option<Sums>> = const { RefCell::new(None) };
}

/// The gradients of variables, summed over the backward passes of a step: one tensor a variable, into which
/// every pass adds its own.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: Sums,
}

impl Gradients {
    /// Adds the gradients of `loss`, a scalar, in all variables it was computed from.
    ///
    /// What candle's own `backward` gives, at less cost. The operation of a whole block,
    /// [`block()`](super::block()), cannot be differentiated otherwise.
    ///
    /// # Errors
    /// When an operation has no gradient, or memory runs out; what was summed before is gone then.
    pub fn add(&mut self, loss: &Tensor) -> Result<()> {
        let around = GATHERED.replace(Some(std::mem::take(&mut self.sums)));
        let found = loss.backward();
        let gathered = GATHERED.replace(around);
        let (mut sums, found) = (gathered.unwrap_or_default(), found?);
        for &id in found.get_ids() {
            let Some(gradient) = found.get_id(id) else {
                continue;
            };
            let sum = match sums.get(&id) {
                Some(sum) => (sum + gradient)?,
                // candle may have given the same tensor to another variable; sums are changed in place.
                None if fusible(&[gradient]) => gradient.copy()?,
                None => gradient.clone(),
            };
            sums.insert(id, sum);
        }
        self.sums = sums;
        Ok(())
    }

    /// The sum of the variable's gradients, of its shape; `None` if no loss was computed from it.
    #[must_use]
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.sums.get(&variable.id())
    }
}

/// The gradients of one loss, as [`Gradients::add`] finds them.
///
/// # Errors
/// As there.
pub fn backward(loss: &Tensor) -> Result<Gradients> {
    let mut gradients = Gradients::default();
    gradients.add(loss)?;
    Ok(gradients)
}

/// Whether this thread is in a backward pass that gathers the gradient of `argument`.
pub(super) fn gathers(argument: &Tensor) -> bool {
    argument.is_variable() && GATHERED.with_borrow(Option::is_some)
}

/// Lays the gradient of an argument down where it is gathered, or hands it to candle.
pub(super) fn give(argument: &Tensor, gradient: Vec<f32>) -> Result<Option<Tensor>> {
    if gathers(argument)
        && let Some(sum) = gathered(argument)
    {
        storage::edit(&sum, |sum| {
            add(sum, &gradient);
            Ok(())
        })?;
        return Ok(None);
    }
    hand(
        argument,
        Tensor::from_vec(gradient, argument.shape(), argument.device())?,
    )
}

/// The same, for a gradient that is mostly zeros: `work` adds what is not.
pub(super) fn edit(argument: &Tensor, work: impl FnOnce(&mut [f32])) -> Result<Option<Tensor>> {
    let begun = gathers(argument).then(|| gathered(argument)).flatten();
    let sum = match &begun {
        Some(sum) => sum.clone(),
        None => argument.zeros_like()?,
    };
    storage::edit(&sum, |sum| {
        work(sum);
        Ok(())
    })?;
    match begun {
        Some(_) => Ok(None),
        None => hand(argument, sum),
    }
}

/// An error unless gradients are gathered.
pub(super) fn must_gather(operation: &str) -> Result<()> {
    if GATHERED.with_borrow(Option::is_none) {
        bail!("{operation}: its gradient is found by ops::backward alone");
    }
    Ok(())
}

/// What was gathered for `argument` so far.
fn gathered(argument: &Tensor) -> Option<Tensor> {
    GATHERED.with_borrow(|sums| sums.as_ref()?.get(&argument.id()).cloned())
}

/// Keeps the first gradient of a variable that is gathered; any other goes to candle.
fn hand(argument: &Tensor, gradient: Tensor) -> Result<Option<Tensor>> {
    if !gathers(argument) {
        return Ok(Some(gradient));
    }
    GATHERED.with_borrow_mut(|sums| sums.get_or_insert_default().insert(argument.id(), gradient));
    Ok(None)
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
        let found = found.get(&weight).unwrap();
        assert_close(found, expected.get(&weight).unwrap(), 1e-5);
        Ok(())
    }

    #[test]
    fn passes_are_summed_and_what_candle_shares_is_not() -> Result<()> {
        let [a, b] = [1, 2].map(|seed| Var::from_tensor(&noise((4, 4), seed)).unwrap());
        // candle gives both variables one tensor.
        let shared = || (a.as_tensor() + b.as_tensor())?.sum_all();
        let of_one = || linear(&noise((3, 4), 3), &a, Precision::F32)?.sum_all();
        let mut gradients = Gradients::default();
        for _ in 0..2 {
            gradients.add(&shared()?)?;
            gradients.add(&of_one()?)?;
        }
        let expected = ((shared()? + of_one()?)? * 2.0)?.backward()?;
        for variable in [&a, &b] {
            let found = gradients.get(variable).unwrap();
            assert_close(found, expected.get(variable).unwrap(), 1e-6);
        }
        Ok(())
    }

    #[test]
    fn what_is_no_variable_is_left_to_candle() -> Result<()> {
        let (x, weight) = (noise((3, 4), 1), Var::from_tensor(&noise((5, 4), 2))?);
        let doubled = (weight.as_tensor() * 2.0)?;
        let loss = linear(&x, &doubled, Precision::F32)?.sum_all()?;
        let (found, expected) = (backward(&loss)?, loss.backward()?);
        let found = found.get(&weight).unwrap();
        assert_close(found, expected.get(&weight).unwrap(), 1e-6);
        Ok(())
    }
}
