//! Log-probabilities of chosen tokens under a language head, without the logits.
//!
//! The logits of a batch are its largest tensor by far. Here they exist one tile at a time: the
//! forward keeps an online log-sum-exp of each row (Milakov and Gimelshein 2018), the backward
//! computes each tile again. A task takes a few rows through a tile of the vocabulary, so that their logits
//! never leave the processor's cache.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::gradients::{edit, give};
use super::matrix::{Begin, Factor, PackedMatrix, PackedRows, Precision, Threads};
use super::storage::{floats, fusible, wide};
use super::vector::{Arithmetic, Kernel, LANES, dispatch, exp, flushed, fold, largest};

/// Words of the vocabulary to a tile.
const WORDS: usize = 512;
/// Rows of hidden states whose slopes in a tile are kept at once, for the gradient of the head.
const ROWS: usize = 2048;
/// Rows to a task.
const TASK: usize = 64;

/// What [`token_logprobs()`] finds, one number a row.
#[derive(Clone, Debug)]
pub struct TokenLogprobs {
    /// ln π(target), `[R]`, in nats; at most 0 up to rounding. Differentiable.
    pub logp: Tensor,
    /// Entropy of π, `[R]`, in nats. Detached: no gradient passes through it.
    pub entropy: Tensor,
}

/// `log_softmax(hidden · headᵀ)` at each row's target, and the entropy of the row's distribution.
///
/// `hidden` is `[R, D]`, `head` `[V, D]`, `targets` R ids below V. Differentiable in `hidden` and
/// `head`; a head that is not trained costs no gradient. `precision` is that of the products, as in
/// [`linear()`](super::linear()).
///
/// # Errors
/// If there are no rows, the shapes do not fit, or a target is outside the vocabulary.
pub fn token_logprobs(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
    precision: Precision,
) -> Result<TokenLogprobs> {
    let (rows, width) = hidden.dims2()?;
    let (words, head_width) = head.dims2()?;
    if rows == 0 || rows != targets.len() || width == 0 || width != head_width {
        let (targets, hidden, head) = (targets.len(), hidden.dims(), head.dims());
        bail!("token_logprobs: hidden {hidden:?}, head {head:?} and {targets} targets do not fit");
    }
    if precision == Precision::Int8 {
        bail!("token_logprobs: bytes are for writing, not for training: use f32 or bf16");
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= words) {
        bail!("token_logprobs: target {target} is outside a vocabulary of {words}");
    }
    if !fusible(&[hidden, head]) {
        return composed(hidden, head, targets);
    }
    let (hidden, head) = (hidden.contiguous()?, head.contiguous()?);
    let op = PickedLogprobs {
        packed: forward(&floats(&hidden)?, &floats(&head)?, targets, precision),
        targets: targets.to_vec(),
        precision,
    };
    let packed = hidden.apply_op2(&head, op)?;
    Ok(TokenLogprobs {
        logp: packed.get(0)?,
        entropy: packed.detach().get(1)?,
    })
}

/// The same from candle's operations, holding all logits, in `f32` at least.
pub(crate) fn composed(hidden: &Tensor, head: &Tensor, targets: &[u32]) -> Result<TokenLogprobs> {
    let logits = hidden.matmul(&head.t()?)?.to_dtype(wide(hidden.dtype()))?;
    let logps = candle_nn::ops::log_softmax(&logits, 1)?;
    let targets = Tensor::new(targets, hidden.device())?.unsqueeze(1)?;
    let detached = logps.detach();
    Ok(TokenLogprobs {
        logp: logps.gather(&targets, 1)?.squeeze(1)?,
        entropy: (detached.exp()? * detached)?.sum(1)?.neg()?,
    })
}

/// The result is `[3, R]`: log-probabilities, entropies, log-sum-exps. The first row alone has a
/// gradient; the last is for the backward.
struct PickedLogprobs {
    packed: Vec<f32>,
    targets: Vec<u32>,
    precision: Precision,
}

impl CustomOp2 for PickedLogprobs {
    fn name(&self) -> &'static str {
        "token-logprobs"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = Shape::from((3, self.targets.len()));
        Ok((CpuStorage::F32(self.packed.clone()), shape))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.get(0)?.contiguous()?;
        let (gradient, hidden_, head_) = (floats(&gradient)?, floats(hidden)?, floats(head)?);
        let mut dhidden = vec![0.0; hidden_.len()];
        let mut differentiate = |dhead: Option<&mut [f32]>| {
            self.differentiate([&hidden_, &head_, &gradient], &mut dhidden, dhead);
        };
        let dhead = if head.track_op() {
            edit(head, |dhead| differentiate(Some(dhead)))?
        } else {
            differentiate(None);
            None
        };
        Ok((give(hidden, dhidden)?, dhead))
    }
}

impl PickedLogprobs {
    /// Adds the gradients of `hidden`, `[R, D]`, and of `head`, `[V, D]`, where it is wanted.
    fn differentiate(
        &self,
        [hidden, head, gradient]: [&[f32]; 3],
        dhidden: &mut [f32],
        mut dhead: Option<&mut [f32]>,
    ) {
        let (rows, precision) = (self.targets.len(), self.precision);
        let width = hidden.len() / rows;
        let mut slopes = vec![0.0; rows.min(ROWS) * WORDS.min(head.len() / width)];
        for tile in tiles(rows, ROWS) {
            let few = few_rows(&hidden[part(&tile, width)], width, precision);
            let across = rows_of(hidden, width, &tile);
            let across = dhead.is_some().then(|| PackedMatrix::of(across, precision));
            let rows = Rows {
                targets: &self.targets[tile.clone()],
                log_sums: &self.packed[2 * rows..][tile.clone()],
                gradient: &gradient[tile.clone()],
            };
            for words in tiles(head.len() / width, WORDS) {
                let head = rows_of(head, width, &words);
                let slopes = &mut slopes[..tile.len() * words.len()];
                let head = [head.transposed(), head].map(|head| PackedMatrix::of(head, precision));
                slopes
                    .par_chunks_mut(TASK * words.len())
                    .zip(dhidden[part(&tile, width)].par_chunks_mut(TASK * width))
                    .zip(few.par_iter().zip(rows.few()))
                    .for_each(|((slopes, dhidden), (hidden, rows))| {
                        let [head, back] = &head;
                        head.put(Threads::This, hidden, (Begin::Anew, slopes));
                        let logits = &mut *slopes;
                        let words = &words;
                        dispatch(Differentiate {
                            rows,
                            logits,
                            words,
                        });
                        let slopes = Factor::new(slopes, rows.targets.len(), words.len());
                        let slopes = PackedRows::of(slopes, precision);
                        back.put(Threads::This, &slopes, (Begin::There, dhidden));
                    });
                if let (Some(dhead), Some(across)) = (&mut dhead, &across) {
                    let slopes = Factor::new(slopes, tile.len(), words.len()).transposed();
                    let slopes = PackedRows::of(slopes, precision);
                    let dhead = &mut dhead[part(&words, width)];
                    across.put(Threads::All, &slopes, (Begin::There, dhead));
                }
            }
        }
    }
}

/// `0..total` in pieces of `size`, the last one shorter.
fn tiles(total: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total)
        .step_by(size)
        .map(move |start| start..(start + size).min(total))
}

/// Where these rows of a matrix lie.
fn part(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

/// Some rows of a matrix.
fn rows_of<'a>(numbers: &'a [f32], width: usize, rows: &Range<usize>) -> Factor<'a> {
    Factor::new(&numbers[part(rows, width)], rows.len(), width)
}

/// The rows of each task.
fn few_rows(hidden: &[f32], width: usize, precision: Precision) -> Vec<PackedRows<'_>> {
    let few = |rows| PackedRows::of(Factor::new(rows, rows.len() / width, width), precision);
    hidden.par_chunks(TASK * width).map(few).collect()
}

/// Log-probability, entropy and log-sum-exp of every row: `[3, R]`.
fn forward(hidden: &[f32], head: &[f32], targets: &[u32], precision: Precision) -> Vec<f32> {
    let width = hidden.len() / targets.len();
    let mut running: Vec<Running> = targets.iter().copied().map(Running::new).collect();
    let few = few_rows(hidden, width, precision);
    for words in tiles(head.len() / width, WORDS) {
        let head = PackedMatrix::of(rows_of(head, width, &words).transposed(), precision);
        running.par_chunks_mut(TASK).zip(&few).for_each_init(
            Vec::new,
            |logits, (running, hidden)| {
                logits.resize(running.len() * words.len(), 0.0);
                head.put(Threads::This, hidden, (Begin::Anew, logits));
                let words = words.clone();
                dispatch(Accumulate {
                    running,
                    logits,
                    words,
                });
            },
        );
    }
    let part = |of: fn(&Running) -> f64| running.iter().map(move |row| of(row) as f32);
    part(Running::logp)
        .chain(part(Running::entropy))
        .chain(part(Running::log_sum))
        .collect()
}

/// One row's distribution over the words seen so far, from logits l.
struct Running {
    target: usize,
    /// l of the target, once seen.
    target_logit: f32,
    /// M, the largest l.
    most: f32,
    /// Σ e^(l-M).
    sum: f64,
    /// Σ e^(l-M) (l-M).
    weighted: f64,
}

impl Running {
    fn new(target: u32) -> Self {
        Self {
            target: target as usize,
            target_logit: f32::NAN,
            most: f32::NEG_INFINITY,
            sum: 0.0,
            weighted: 0.0,
        }
    }

    fn logp(&self) -> f64 {
        f64::from(self.target_logit) - f64::from(self.most) - self.sum.ln()
    }

    /// H = ln Σ - Σ p (l - M).
    fn entropy(&self) -> f64 {
        self.sum.ln() - self.weighted / self.sum
    }

    fn log_sum(&self) -> f64 {
        f64::from(self.most) + self.sum.ln()
    }

    /// Takes in the logits of `words`.
    #[inline(always)]
    fn take<A: Arithmetic>(&mut self, logits: &[f32], words: &Range<usize>) {
        if words.contains(&self.target) {
            self.target_logit = logits[self.target - words.start];
        }
        let most = largest(logits);
        if most > self.most {
            if self.most > f32::NEG_INFINITY {
                let drop = f64::from(self.most) - f64::from(most);
                self.weighted = (self.weighted + self.sum * drop) * drop.exp();
                self.sum *= drop.exp();
            }
            self.most = most;
        }
        let (sum, weighted) = moments::<A>(logits, self.most);
        self.sum += f64::from(sum);
        self.weighted += f64::from(weighted);
    }
}

/// Σ e^(l-M) and Σ e^(l-M) (l-M).
#[inline(always)]
fn moments<A: Arithmetic>(logits: &[f32], most: f32) -> (f32, f32) {
    let (mut sums, mut weighted) = ([0.0; LANES], [0.0; LANES]);
    let mut take = |lane: usize, logit: f32| {
        let shifted = logit - most;
        let e = exp::<A>(shifted);
        sums[lane] += e;
        weighted[lane] = A::mul_add(e, shifted, weighted[lane]);
    };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &logit) in chunk.iter().enumerate() {
            take(lane, logit);
        }
    }
    for (lane, &logit) in rest.iter().enumerate() {
        take(lane, logit);
    }
    (fold(sums), fold(weighted))
}

struct Accumulate<'a> {
    running: &'a mut [Running],
    logits: &'a [f32],
    words: Range<usize>,
}

impl Kernel for Accumulate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let rows = self.logits.chunks_exact(self.words.len());
        for (running, logits) in self.running.iter_mut().zip(rows) {
            running.take::<A>(logits, &self.words);
        }
    }
}

/// Rows of a tile, as the backward sees them.
#[derive(Clone, Copy)]
struct Rows<'a> {
    targets: &'a [u32],
    log_sums: &'a [f32],
    gradient: &'a [f32],
}

impl<'a> Rows<'a> {
    /// The rows of each task.
    fn few(self) -> impl IndexedParallelIterator<Item = Rows<'a>> {
        let targets = self.targets.par_chunks(TASK);
        let numbers = self
            .log_sums
            .par_chunks(TASK)
            .zip(self.gradient.par_chunks(TASK));
        targets
            .zip(numbers)
            .map(|(targets, (log_sums, gradient))| Rows {
                targets,
                log_sums,
                gradient,
            })
    }
}

/// Turns the logits of `words` into their gradient: g (onehot - softmax).
struct Differentiate<'a> {
    rows: Rows<'a>,
    logits: &'a mut [f32],
    words: &'a Range<usize>,
}

impl Kernel for Differentiate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let logits = self.logits.chunks_exact_mut(self.words.len());
        for (row, logits) in logits.enumerate() {
            let (gradient, log_sum) = (self.rows.gradient[row], self.rows.log_sums[row]);
            for logit in logits.iter_mut() {
                *logit = flushed(-gradient * exp::<A>(*logit - log_sum));
            }
            let target = self.rows.targets[row] as usize;
            if self.words.contains(&target) {
                logits[target - self.words.start] += gradient;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::super::check::{
        assert_close, assert_differentiates, assert_same, bits, noise, value_and_gradients,
    };
    use super::*;

    fn inputs(rows: usize, words: usize, width: usize) -> ([Tensor; 2], Vec<u32>) {
        let hidden = (noise((rows, width), 1) * 4.0).unwrap();
        let targets = (0..rows).map(|row| ((row * 7919 + words - 1) % words) as u32);
        ([hidden, noise((words, width), 2)], targets.collect())
    }

    #[test]
    fn by_hand() -> Result<()> {
        let ln_2 = std::f32::consts::LN_2;
        let hidden = Tensor::new(&[[1f32], [0.]], &Device::Cpu)?;
        let head = Tensor::new(&[[0f32], [ln_2], [0.]], &Device::Cpu)?;
        // The first row's distribution is (1/4, 1/2, 1/4), the second's is even.
        let found = token_logprobs(&hidden, &head, &[2, 0], Precision::F32)?;
        let expected = Tensor::new(&[-2.0 * ln_2, -(3f32.ln())], &Device::Cpu)?;
        assert_close(&found.logp, &expected, 1e-6);
        let expected = Tensor::new(&[1.5 * ln_2, 3f32.ln()], &Device::Cpu)?;
        assert_close(&found.entropy, &expected, 1e-6);
        Ok(())
    }

    #[test]
    fn agrees_with_its_composed_version() -> Result<()> {
        let cases = [
            (1, 3, 2),
            (1, 1, 1),
            (17, 1000, 24),
            (515, 1025, 8),
            (40, 3001, 33),
        ];
        for (rows, words, width) in cases {
            let (inputs, targets) = inputs(rows, words, width);
            assert_same(
                &inputs,
                |t| Ok(token_logprobs(&t[0], &t[1], &targets, Precision::F32)?.logp),
                |t| Ok(composed(&t[0], &t[1], &targets)?.logp),
            );
            let fused = token_logprobs(&inputs[0], &inputs[1], &targets, Precision::F32)?.entropy;
            let expected = composed(&inputs[0], &inputs[1], &targets)?.entropy;
            assert_close(&fused, &expected, 2e-5);
        }
        Ok(())
    }

    #[test]
    fn differentiates() {
        let (inputs, targets) = inputs(4, 5, 3);
        assert_differentiates(&inputs, |t| {
            Ok(token_logprobs(&t[0], &t[1], &targets, Precision::F32)?.logp)
        });
    }

    #[test]
    fn a_frozen_head_and_the_entropy_have_no_gradient() -> Result<()> {
        let ([hidden, head], targets) = inputs(6, 9, 4);
        let expected = value_and_gradients(&[hidden.clone(), head.clone()], |t| {
            Ok(token_logprobs(&t[0], &t[1], &targets, Precision::F32)?.logp)
        });
        let (alone, gradients) = value_and_gradients(std::slice::from_ref(&hidden), |t| {
            Ok(token_logprobs(&t[0], &head, &targets, Precision::F32)?.logp)
        });
        assert_eq!(bits(&alone), bits(&expected.0));
        assert_eq!(bits(&gradients[0]), bits(&expected.1[0]));
        let hidden = Var::from_tensor(&hidden)?;
        let entropy = token_logprobs(hidden.as_tensor(), &head, &targets, Precision::F32)?.entropy;
        assert!(entropy.sum_all()?.backward()?.get(&hidden).is_none());
        Ok(())
    }

    #[test]
    fn large_logits_and_nan() -> Result<()> {
        let hidden = Tensor::new(&[[1f32], [-1.], [f32::NAN]], &Device::Cpu)?;
        let head = Tensor::arange(0f32, 3000., &Device::Cpu)?.reshape((3000, 1))?;
        let found = token_logprobs(&hidden, &head, &[0, 0, 0], Precision::F32)?;
        let logp = found.logp.to_vec1::<f32>()?;
        // Σ e^-i is e / (e - 1): its logarithm is 0.458675.
        assert!((logp[0] + 2999.4587).abs() < 1e-3);
        assert!((logp[1] + 0.458_675).abs() < 1e-6);
        assert!(logp[2].is_nan());
        let entropy = found.entropy.to_vec1::<f32>()?;
        // Geometric: 0.458675 + 1 / (e - 1).
        assert!((entropy[0] - 1.040_652).abs() < 1e-5);
        assert!((entropy[1] - 1.040_652).abs() < 1e-5);
        assert!(entropy[2].is_nan());
        Ok(())
    }

    #[test]
    fn other_types_are_composed_and_misfits_refused() -> Result<()> {
        let ([hidden, head], targets) = inputs(5, 7, 3);
        let found = token_logprobs(&hidden, &head, &targets, Precision::F32)?.logp;
        let (hidden64, head64) = (hidden.to_dtype(DType::F64)?, head.to_dtype(DType::F64)?);
        let double = token_logprobs(&hidden64, &head64, &targets, Precision::F32)?.logp;
        assert_close(&found, &double.to_dtype(DType::F32)?, 1e-6);
        assert!(token_logprobs(&hidden, &head, &targets[1..], Precision::F32).is_err());
        assert!(token_logprobs(&hidden, &head, &[0, 1, 2, 3, 7], Precision::F32).is_err());
        assert!(token_logprobs(&hidden, &noise((7, 4), 1), &targets, Precision::F32).is_err());
        Ok(())
    }
}
