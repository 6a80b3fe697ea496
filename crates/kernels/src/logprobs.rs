//! Fused language-model head: log-probabilities of target tokens without materialising the logits.
//!
//! The logits of a batch are its largest tensor by far. Here they exist one tile at a time: the forward keeps an online
//! log-sum-exp of each row (Milakov and Gimelshein 2018), the backward recomputes each tile. A task computes a few rows
//! of one vocabulary tile, so that their logits stay in its core's cache.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::autograd::gradients::{accumulate, accumulate_sparse};
use crate::autograd::storage::{accumulation_dtype, fusible, read_f32};
use crate::matmul::{Accumulate, MatrixRef, PackedMatrix, PackedRows, Precision, Threads};
use crate::simd::{Arithmetic, Kernel, LANES, dispatch, exp, flush_to_zero, maximum, sum_lanes};
use crate::weight::WeightMatrix;

/// Token ids per vocabulary tile.
const VOCAB_TILE: usize = 512;
/// Rows of hidden states per row tile of the backward, whose logit gradients are held at once.
const ROW_TILE: usize = 2048;
/// Rows per task.
const TASK_ROWS: usize = 64;

/// Output of [`token_logprobs()`], one value per row.
#[derive(Clone, Debug)]
pub struct LogprobsOutput {
    /// ln π(target), `[R]`, in nats; at most 0 up to rounding. Differentiable.
    pub logp: Tensor,
    /// Entropy of π, `[R]`, in nats. Detached: no gradient passes through it.
    pub entropy: Tensor,
}

/// Token log-probabilities, `log_softmax(hidden · headᵀ)` at each row's target, and the entropy of each row.
///
/// `hidden` is `[R, D]`, `head` `[V, D]`, `targets` R ids below V. Differentiable in `hidden` and
/// `head`; the gradient of a head that is not trained is not computed. `precision` is that of the products, as in
/// [`linear()`](crate::linear()).
///
/// # Errors
/// If there are no rows, the shapes do not match, a target is outside the vocabulary, a packed head is of another precision
/// or for hidden states that are not `f32` on the CPU, or for [`Precision::Int8`].
pub fn token_logprobs(
    hidden: &Tensor,
    head: impl Into<WeightMatrix>,
    targets: &[u32],
    precision: Precision,
) -> Result<LogprobsOutput> {
    let head = head.into();
    let (rows, width) = hidden.dims2()?;
    let [vocab, head_width] = head.dims()?;
    if rows == 0 || rows != targets.len() || width == 0 || width != head_width {
        let (targets, hidden) = (targets.len(), hidden.dims());
        bail!(
            "token_logprobs: hidden {hidden:?}, head [{vocab}, {head_width}] and {targets} targets do not fit"
        );
    }
    if precision == Precision::Int8 {
        bail!("token_logprobs: int8 is inference-only, not for training: use f32 or bf16");
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocab) {
        bail!("token_logprobs: target {target} is outside a vocabulary of {vocab}");
    }
    head.check_packed("token_logprobs: the head", [vocab, width], precision)?;
    let outputs = match head {
        WeightMatrix::Tensor(head) if !fusible(&[hidden, &head]) => {
            return composed(hidden, &head, targets);
        }
        WeightMatrix::Tensor(head) => {
            let (hidden, head) = (hidden.contiguous()?, head.contiguous()?);
            let op = {
                let values = read_f32(&head)?;
                let matrix = HeadMatrix::Values(&values);
                TokenLogprobsOp::new(&hidden, matrix, targets, precision)?
            };
            hidden.apply_op2(&head, op)?
        }
        WeightMatrix::Packed(head) if fusible(&[hidden]) => {
            let hidden = hidden.contiguous()?;
            let matrix = HeadMatrix::Packed(&head);
            let op = TokenLogprobsOp::new(&hidden, matrix, targets, precision)?;
            hidden.apply_op1(PackedHeadOp { op, head })?
        }
        WeightMatrix::Packed(_) => {
            let dtype = hidden.dtype();
            bail!(
                "token_logprobs: a packed head needs hidden states in f32 on the CPU, not {dtype:?}"
            );
        }
    };
    Ok(LogprobsOutput {
        logp: outputs.get(0)?,
        entropy: outputs.detach().get(1)?,
    })
}

/// [`token_logprobs`] composed of candle's operations, with all logits in memory, in `f32` at least.
pub(crate) fn composed(hidden: &Tensor, head: &Tensor, targets: &[u32]) -> Result<LogprobsOutput> {
    let logits = hidden
        .matmul(&head.t()?)?
        .to_dtype(accumulation_dtype(hidden.dtype()))?;
    let logps = candle_nn::ops::log_softmax(&logits, 1)?;
    let targets = Tensor::new(targets, hidden.device())?.unsqueeze(1)?;
    let detached = logps.detach();
    Ok(LogprobsOutput {
        logp: logps.gather(&targets, 1)?.squeeze(1)?,
        entropy: (detached.exp()? * detached)?.sum(1)?.neg()?,
    })
}

/// An operation with the result `[3, R]`: log-probabilities, entropies, log-sum-exps. Only the first row has a gradient;
/// the last is for the backward.
struct TokenLogprobsOp {
    /// Computed before the operation is applied.
    outputs: Vec<f32>,
    targets: Vec<u32>,
    precision: Precision,
}

impl TokenLogprobsOp {
    fn new(
        hidden: &Tensor,
        matrix: HeadMatrix<'_>,
        targets: &[u32],
        precision: Precision,
    ) -> Result<Self> {
        let hidden = read_f32(hidden)?;
        let head = HeadTiles {
            matrix,
            width: hidden.len() / targets.len(),
            precision,
        };
        Ok(Self {
            outputs: forward(&hidden, &head, targets),
            targets: targets.to_vec(),
            precision,
        })
    }

    fn result(&self) -> (CpuStorage, Shape) {
        let shape = Shape::from((3, self.targets.len()));
        (CpuStorage::F32(self.outputs.clone()), shape)
    }

    /// The gradient of the hidden states; that of the head is added to `dhead`, if it is wanted.
    fn backward(
        &self,
        hidden: &Tensor,
        matrix: HeadMatrix<'_>,
        gradient: &Tensor,
        dhead: Option<&mut [f32]>,
    ) -> Result<Vec<f32>> {
        let gradient = gradient.get(0)?.contiguous()?;
        let (gradient, hidden) = (read_f32(&gradient)?, read_f32(hidden)?);
        let mut dhidden = vec![0.0; hidden.len()];
        let inputs = BackwardInputs {
            hidden: &hidden,
            head: HeadTiles {
                matrix,
                width: hidden.len() / self.targets.len(),
                precision: self.precision,
            },
            gradient: &gradient,
        };
        self.differentiate(inputs, &mut dhidden, dhead);
        Ok(dhidden)
    }
}

impl CustomOp2 for TokenLogprobsOp {
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
        Ok(self.result())
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let values = read_f32(head)?;
        let matrix = HeadMatrix::Values(&values);
        let mut dhidden = Ok(Vec::new());
        let mut differentiate = |dhead: Option<&mut [f32]>| {
            dhidden = self.backward(hidden, matrix, gradient, dhead);
        };
        let dhead = if head.track_op() {
            accumulate_sparse(head, |dhead| differentiate(Some(dhead)))?
        } else {
            differentiate(None);
            None
        };
        Ok((accumulate(hidden, dhidden?)?, dhead))
    }
}

/// The operation with a head that is frozen and packed.
struct PackedHeadOp {
    op: TokenLogprobsOp,
    head: PackedMatrix,
}

impl CustomOp1 for PackedHeadOp {
    fn name(&self) -> &'static str {
        "packed-token-logprobs"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(self.op.result())
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let matrix = HeadMatrix::Packed(&self.head);
        accumulate(hidden, self.op.backward(hidden, matrix, gradient, None)?)
    }
}

/// The values of a head, `[V, D]`.
#[derive(Clone, Copy)]
enum HeadMatrix<'a> {
    Values(&'a [f32]),
    Packed(&'a PackedMatrix),
}

/// A head, one vocabulary tile at a time.
#[derive(Clone, Copy)]
struct HeadTiles<'a> {
    matrix: HeadMatrix<'a>,
    width: usize,
    precision: Precision,
}

impl HeadTiles<'_> {
    fn vocab(&self) -> usize {
        match self.matrix {
            HeadMatrix::Values(values) => values.len() / self.width,
            HeadMatrix::Packed(packed) => packed.weight_dims()[0],
        }
    }

    /// The transpose of a tile: for products with hidden states.
    fn forward(&self, tokens: &Range<usize>) -> PackedMatrix {
        match self.matrix {
            HeadMatrix::Values(values) => {
                let tile = rows_of(values, self.width, tokens);
                PackedMatrix::pack(tile.transpose(), self.precision)
            }
            HeadMatrix::Packed(packed) => whole_panels(packed, tokens),
        }
    }

    /// A tile: for products with gradients of logits.
    fn backward(&self, tokens: &Range<usize>) -> PackedMatrix {
        match self.matrix {
            HeadMatrix::Values(values) => {
                PackedMatrix::pack(rows_of(values, self.width, tokens), self.precision)
            }
            HeadMatrix::Packed(packed) => whole_panels(packed, tokens).transposed(),
        }
    }
}

/// These columns of a head. A tile begins with a panel, since its size is a multiple of one.
fn whole_panels(packed: &PackedMatrix, tokens: &Range<usize>) -> PackedMatrix {
    match packed.columns(tokens.clone()) {
        Some(tile) => tile,
        None => unreachable!("a vocabulary tile begins with a panel"),
    }
}

#[derive(Clone, Copy)]
struct BackwardInputs<'a> {
    /// `[R, D]`.
    hidden: &'a [f32],
    head: HeadTiles<'a>,
    /// Of the log-probabilities, `[R]`.
    gradient: &'a [f32],
}

impl TokenLogprobsOp {
    /// Adds the gradients to `dhidden`, `[R, D]`, and to `dhead`, `[V, D]`, if it is wanted.
    fn differentiate(
        &self,
        inputs: BackwardInputs<'_>,
        dhidden: &mut [f32],
        mut dhead: Option<&mut [f32]>,
    ) {
        let BackwardInputs {
            hidden,
            head,
            gradient,
        } = inputs;
        let (rows, precision) = (self.targets.len(), self.precision);
        let width = hidden.len() / rows;
        let mut dlogits = vec![0.0; rows.min(ROW_TILE) * VOCAB_TILE.min(head.vocab())];
        for row_tile in tiles(rows, ROW_TILE) {
            let packed = pack_task_rows(&hidden[range_of(&row_tile, width)], width, precision);
            let hidden_tile = dhead
                .is_some()
                .then(|| PackedMatrix::pack(rows_of(hidden, width, &row_tile), precision));
            let rows = TileRows {
                targets: &self.targets[row_tile.clone()],
                log_sums: &self.outputs[2 * rows..][row_tile.clone()],
                gradient: &gradient[row_tile.clone()],
            };
            for vocab_tile in tiles(head.vocab(), VOCAB_TILE) {
                let dlogits = &mut dlogits[..row_tile.len() * vocab_tile.len()];
                let (head, head_backward) = (head.forward(&vocab_tile), head.backward(&vocab_tile));
                dlogits
                    .par_chunks_mut(TASK_ROWS * vocab_tile.len())
                    .zip(dhidden[range_of(&row_tile, width)].par_chunks_mut(TASK_ROWS * width))
                    .zip(packed.par_iter().zip(rows.tasks()))
                    .for_each(|((dlogits, dhidden), (hidden, rows))| {
                        head.product_into(Threads::Current, hidden, Accumulate::Overwrite, dlogits);
                        dispatch(DifferentiateLogits {
                            rows,
                            logits: &mut *dlogits,
                            vocab_tile: &vocab_tile,
                        });
                        let dlogits = MatrixRef::new(dlogits, rows.targets.len(), vocab_tile.len());
                        let dlogits = PackedRows::pack(dlogits, precision);
                        head_backward.product_into(
                            Threads::Current,
                            &dlogits,
                            Accumulate::Add,
                            dhidden,
                        );
                    });
                if let (Some(dhead), Some(hidden_tile)) = (&mut dhead, &hidden_tile) {
                    let dlogits = MatrixRef::new(dlogits, row_tile.len(), vocab_tile.len());
                    let dlogits = PackedRows::pack(dlogits.transpose(), precision);
                    let dhead = &mut dhead[range_of(&vocab_tile, width)];
                    hidden_tile.product_into(Threads::All, &dlogits, Accumulate::Add, dhead);
                }
            }
        }
    }
}

/// `0..total` in tiles of `size`, the last one shorter.
fn tiles(total: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total)
        .step_by(size)
        .map(move |start| start..(start + size).min(total))
}

/// Elements of these rows of a row-major matrix.
fn range_of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

/// These rows of a matrix.
fn rows_of<'a>(values: &'a [f32], width: usize, rows: &Range<usize>) -> MatrixRef<'a> {
    MatrixRef::new(&values[range_of(rows, width)], rows.len(), width)
}

/// Packs the rows of each task.
fn pack_task_rows(hidden: &[f32], width: usize, precision: Precision) -> Vec<PackedRows<'_>> {
    let pack = |rows| PackedRows::pack(MatrixRef::new(rows, rows.len() / width, width), precision);
    hidden.par_chunks(TASK_ROWS * width).map(pack).collect()
}

/// Log-probability, entropy and log-sum-exp of each row: `[3, R]`.
fn forward(hidden: &[f32], head: &HeadTiles<'_>, targets: &[u32]) -> Vec<f32> {
    let HeadTiles {
        width, precision, ..
    } = *head;
    let mut rows: Vec<OnlineSoftmax> = targets.iter().copied().map(OnlineSoftmax::new).collect();
    let packed = pack_task_rows(hidden, width, precision);
    for vocab_tile in tiles(head.vocab(), VOCAB_TILE) {
        let head = head.forward(&vocab_tile);
        rows.par_chunks_mut(TASK_ROWS).zip(&packed).for_each_init(
            Vec::new,
            |logits, (rows, hidden)| {
                logits.resize(rows.len() * vocab_tile.len(), 0.0);
                head.product_into(Threads::Current, hidden, Accumulate::Overwrite, logits);
                dispatch(UpdateSoftmax {
                    rows,
                    logits,
                    vocab_tile: vocab_tile.clone(),
                });
            },
        );
    }
    let of_rows = |f: fn(&OnlineSoftmax) -> f64| rows.iter().map(move |row| f(row) as f32);
    of_rows(OnlineSoftmax::logp)
        .chain(of_rows(OnlineSoftmax::entropy))
        .chain(of_rows(OnlineSoftmax::log_sum))
        .collect()
}

/// Online softmax of one row over the token ids so far, from logits l.
struct OnlineSoftmax {
    target: usize,
    /// l of the target; NaN before its tile.
    target_logit: f32,
    /// M, the maximum of l.
    max: f32,
    /// Σ e^(l-M).
    sum: f64,
    /// Σ e^(l-M) (l-M).
    weighted: f64,
}

impl OnlineSoftmax {
    fn new(target: u32) -> Self {
        Self {
            target: target as usize,
            target_logit: f32::NAN,
            max: f32::NEG_INFINITY,
            sum: 0.0,
            weighted: 0.0,
        }
    }

    fn logp(&self) -> f64 {
        f64::from(self.target_logit) - f64::from(self.max) - self.sum.ln()
    }

    /// H = ln Σ - Σ p (l - M).
    fn entropy(&self) -> f64 {
        self.sum.ln() - self.weighted / self.sum
    }

    fn log_sum(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }

    /// Adds the logits of a vocabulary tile.
    #[inline(always)]
    fn update<A: Arithmetic>(&mut self, logits: &[f32], vocab_tile: &Range<usize>) {
        if vocab_tile.contains(&self.target) {
            self.target_logit = logits[self.target - vocab_tile.start];
        }
        let max = maximum(logits);
        if max > self.max {
            if self.max > f32::NEG_INFINITY {
                let drop = f64::from(self.max) - f64::from(max);
                self.weighted = (self.weighted + self.sum * drop) * drop.exp();
                self.sum *= drop.exp();
            }
            self.max = max;
        }
        let (sum, weighted) = moments::<A>(logits, self.max);
        self.sum += f64::from(sum);
        self.weighted += f64::from(weighted);
    }
}

/// Σ e^(l-M) and Σ e^(l-M) (l-M).
#[inline(always)]
fn moments<A: Arithmetic>(logits: &[f32], max: f32) -> (f32, f32) {
    let (mut sums, mut weighted) = ([0.0; LANES], [0.0; LANES]);
    let mut add = |lane: usize, logit: f32| {
        let shifted = logit - max;
        let e = exp::<A>(shifted);
        sums[lane] += e;
        weighted[lane] = A::mul_add(e, shifted, weighted[lane]);
    };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &logit) in chunk.iter().enumerate() {
            add(lane, logit);
        }
    }
    for (lane, &logit) in rest.iter().enumerate() {
        add(lane, logit);
    }
    (sum_lanes(sums), sum_lanes(weighted))
}

struct UpdateSoftmax<'a> {
    rows: &'a mut [OnlineSoftmax],
    logits: &'a [f32],
    vocab_tile: Range<usize>,
}

impl Kernel for UpdateSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let logits = self.logits.chunks_exact(self.vocab_tile.len());
        for (row, logits) in self.rows.iter_mut().zip(logits) {
            row.update::<A>(logits, &self.vocab_tile);
        }
    }
}

/// Rows of a row tile in the backward.
#[derive(Clone, Copy)]
struct TileRows<'a> {
    targets: &'a [u32],
    log_sums: &'a [f32],
    gradient: &'a [f32],
}

impl<'a> TileRows<'a> {
    /// The rows of each task.
    fn tasks(self) -> impl IndexedParallelIterator<Item = TileRows<'a>> {
        let targets = self.targets.par_chunks(TASK_ROWS);
        let per_row = self
            .log_sums
            .par_chunks(TASK_ROWS)
            .zip(self.gradient.par_chunks(TASK_ROWS));
        targets
            .zip(per_row)
            .map(|(targets, (log_sums, gradient))| TileRows {
                targets,
                log_sums,
                gradient,
            })
    }
}

/// Replaces the logits of a vocabulary tile by their gradient: g (onehot - softmax).
struct DifferentiateLogits<'a> {
    rows: TileRows<'a>,
    logits: &'a mut [f32],
    vocab_tile: &'a Range<usize>,
}

impl Kernel for DifferentiateLogits<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let logits = self.logits.chunks_exact_mut(self.vocab_tile.len());
        for (row, logits) in logits.enumerate() {
            let (gradient, log_sum) = (self.rows.gradient[row], self.rows.log_sums[row]);
            for logit in logits.iter_mut() {
                *logit = flush_to_zero(-gradient * exp::<A>(*logit - log_sum));
            }
            let target = self.rows.targets[row] as usize;
            if self.vocab_tile.contains(&target) {
                logits[target - self.vocab_tile.start] += gradient;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::check::{
        assert_close, assert_differentiates, assert_same, bits, noise, value_and_gradients,
    };

    fn inputs(rows: usize, vocab: usize, width: usize) -> ([Tensor; 2], Vec<u32>) {
        let hidden = (noise((rows, width), 1) * 4.0).unwrap();
        let targets = (0..rows).map(|row| ((row * 7919 + vocab - 1) % vocab) as u32);
        ([hidden, noise((vocab, width), 2)], targets.collect())
    }

    #[test]
    fn by_hand() -> Result<()> {
        let ln_2 = std::f32::consts::LN_2;
        let hidden = Tensor::new(&[[1f32], [0.]], &Device::Cpu)?;
        let head = Tensor::new(&[[0f32], [ln_2], [0.]], &Device::Cpu)?;
        // The first row's distribution is (1/4, 1/2, 1/4), the second's is uniform.
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
        for (rows, vocab, width) in cases {
            let (inputs, targets) = inputs(rows, vocab, width);
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
    fn a_packed_head_changes_no_bit() -> Result<()> {
        for precision in [Precision::F32, Precision::Bf16] {
            let ([hidden, head], targets) = inputs(70, 1100, 24);
            let values = head.flatten_all()?.to_vec1::<f32>()?;
            let packed = PackedMatrix::stacked(&[&values], 24, precision);
            let hidden = std::slice::from_ref(&hidden);
            let differentiated = |head: WeightMatrix| {
                let (value, gradients) = value_and_gradients(hidden, |t| {
                    Ok(token_logprobs(&t[0], &head, &targets, precision)?.logp)
                });
                (bits(&value), bits(&gradients[0]))
            };
            let expected = differentiated((&head).into());
            assert!(
                differentiated((&packed).into()) == expected,
                "{precision:?}"
            );
            let error = token_logprobs(&hidden[0], &packed, &targets, other(precision));
            let error = error.unwrap_err().to_string();
            assert!(error.contains("expected [1100, 24] in"), "{error}");
            let double = hidden[0].to_dtype(DType::F64)?;
            let error = token_logprobs(&double, &packed, &targets, precision);
            assert!(error.unwrap_err().to_string().contains("in f32 on the CPU"));
        }
        Ok(())
    }

    fn other(precision: Precision) -> Precision {
        match precision {
            Precision::F32 => Precision::Bf16,
            _ => Precision::F32,
        }
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
    fn other_dtypes_use_the_composed_version_and_mismatches_are_rejected() -> Result<()> {
        let ([hidden, head], targets) = inputs(5, 7, 3);
        let found = token_logprobs(&hidden, &head, &targets, Precision::F32)?.logp;
        let (hidden64, head64) = (hidden.to_dtype(DType::F64)?, head.to_dtype(DType::F64)?);
        let double = token_logprobs(&hidden64, &head64, &targets, Precision::F32)?.logp;
        assert_close(&found, &double.to_dtype(DType::F32)?, 1e-6);
        assert!(token_logprobs(&hidden, &head, &targets[1..], Precision::F32).is_err());
        assert!(token_logprobs(&hidden, &head, &[0, 1, 2, 3, 7], Precision::F32).is_err());
        assert!(token_logprobs(&hidden, noise((7, 4), 1), &targets, Precision::F32).is_err());
        Ok(())
    }
}
