//! Layers of a block on plain slices: RMS norms, and linear layers with an optional low-rank update.

use std::cell::OnceCell;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::autograd::gradients::{add_assign, sum_rows};
use crate::autograd::storage::{F32Guard, read_f32};
use crate::block::{LinearParams, LowRankParams};
use crate::matmul::{Accumulate, MatrixRef, PackedMatrix, PackedRows, Precision, Threads};
use crate::rms_norm;
use crate::weight::WeightMatrix;

/// Rows per partial column sum: fixed, so that the sum does not depend on the number of threads.
const SUM_ROWS: usize = 64;

/// Gradients of the weights that are variables.
pub(super) type WeightGradients<'a> = Vec<(&'a Tensor, Vec<f32>)>;

/// The input of linear layers in the backward pass, `[N, in]`.
pub(super) struct LayerInput<'n> {
    rows: MatrixRef<'n>,
    precision: Precision,
    /// Packed as a left operand, for the gradients of B, once for all layers that read it.
    left: OnceCell<PackedRows<'n>>,
    /// Packed as a right operand, for the gradients of weights and of A, if any are trained.
    packed: Option<PackedMatrix>,
}

impl<'n> LayerInput<'n> {
    pub(super) fn new(
        values: &'n [f32],
        width: usize,
        precision: Precision,
        trained: bool,
    ) -> Self {
        let rows = MatrixRef::new(values, values.len() / width, width);
        Self {
            rows,
            precision,
            left: OnceCell::new(),
            packed: trained.then(|| PackedMatrix::pack(rows, precision)),
        }
    }

    fn left(&self) -> &PackedRows<'n> {
        let pack = || PackedRows::pack(self.rows, self.precision);
        self.left.get_or_init(pack)
    }
}

/// The gradient of a linear layer's output, `[N, out]`.
struct OutputGradient<'g> {
    values: MatrixRef<'g>,
    packed: PackedRows<'g>,
}

pub(super) struct NormView<'a> {
    tensor: &'a Tensor,
    weight: F32Guard<'a>,
    eps: f32,
}

impl<'a> NormView<'a> {
    pub(super) fn of(tensor: &'a Tensor, eps: f64) -> Result<Self> {
        Ok(Self {
            tensor,
            weight: read_f32(tensor)?,
            eps: eps as f32,
        })
    }

    pub(super) fn forward(&self, x: &[f32]) -> Vec<f32> {
        rms_norm::forward(x, &self.weight, self.eps)
    }

    pub(super) fn backward(
        &self,
        x: &[f32],
        gradient: &[f32],
        gradients: &mut WeightGradients<'a>,
    ) -> Vec<f32> {
        let (dx, dweight) = rms_norm::backward(x, &self.weight, self.eps, gradient);
        if self.tensor.is_variable() {
            gradients.push((self.tensor, dweight));
        }
        dx
    }
}

/// The values of a weight, `[out, in]`.
enum WeightView<'a> {
    Values(&'a Tensor, F32Guard<'a>),
    Packed(&'a PackedMatrix),
}

impl<'a> WeightView<'a> {
    fn of(weight: &'a WeightMatrix) -> Result<Self> {
        Ok(match weight {
            WeightMatrix::Tensor(tensor) => Self::Values(tensor, read_f32(tensor)?),
            WeightMatrix::Packed(packed) => Self::Packed(packed),
        })
    }

    /// The tensor, if it is trained.
    fn variable(&self) -> Option<&'a Tensor> {
        match *self {
            Self::Values(tensor, _) if tensor.is_variable() => Some(tensor),
            _ => None,
        }
    }
}

pub(super) struct LinearView<'a> {
    params: &'a LinearParams,
    weight: WeightView<'a>,
    bias: Option<F32Guard<'a>>,
    low_rank: Option<LowRankView<'a>>,
    out: usize,
    pub(super) width: usize,
    precision: Precision,
}

impl<'a> LinearView<'a> {
    pub(super) fn of(params: &'a LinearParams, precision: Precision) -> Result<Self> {
        let [out, width] = params.weight.dims()?;
        let low_rank = params.low_rank.as_ref();
        let low_rank = low_rank.map(|params| LowRankView::of(params, precision));
        Ok(Self {
            params,
            weight: WeightView::of(&params.weight)?,
            bias: params.bias.as_ref().map(read_f32).transpose()?,
            low_rank: low_rank.transpose()?,
            out,
            width,
            precision,
        })
    }

    /// Packed for products with inputs.
    fn forward_weight(&self) -> PackedMatrix {
        match &self.weight {
            WeightView::Values(_, values) => {
                let weight = MatrixRef::new(values, self.out, self.width);
                PackedMatrix::pack(weight.transpose(), self.precision)
            }
            WeightView::Packed(packed) => (*packed).clone(),
        }
    }

    /// Packed for products with gradients of outputs.
    fn backward_weight(&self) -> PackedMatrix {
        match &self.weight {
            WeightView::Values(_, values) => {
                let weight = MatrixRef::new(values, self.out, self.width);
                PackedMatrix::pack(weight, self.precision)
            }
            WeightView::Packed(packed) => packed.transposed(),
        }
    }

    /// `x · weightᵀ + bias`, and the update, `[N, out]`.
    pub(super) fn forward(&self, x: &PackedRows<'_>) -> Vec<f32> {
        let mut y = self.forward_weight().product(x);
        if let Some(bias) = &self.bias {
            let bias: &[f32] = bias;
            y.par_chunks_mut(SUM_ROWS * self.out).for_each(|rows| {
                for row in rows.chunks_exact_mut(self.out) {
                    add_assign(row, bias);
                }
            });
        }
        if let Some(low_rank) = &self.low_rank {
            low_rank.forward(x, &mut y);
        }
        y
    }

    /// The gradient of the layer's input, `[N, in]`, added to `sum` if given.
    pub(super) fn backward(
        &self,
        gradient: &[f32],
        input: &LayerInput<'_>,
        sum: Option<Vec<f32>>,
        gradients: &mut WeightGradients<'a>,
    ) -> Vec<f32> {
        let dy = MatrixRef::new(gradient, gradient.len() / self.out, self.out);
        if let Some(packed) = &input.packed
            && let Some(weight) = self.weight.variable()
        {
            let dweight = packed.product(&PackedRows::pack(dy.transpose(), self.precision));
            gradients.push((weight, dweight));
        }
        if let Some(bias) = &self.params.bias
            && bias.is_variable()
        {
            gradients.push((bias, column_sums(gradient, self.out)));
        }
        let dy = OutputGradient {
            values: dy,
            packed: PackedRows::pack(dy, self.precision),
        };
        let weight = self.backward_weight();
        let mut dx = match sum {
            Some(mut sum) => {
                weight.product_into(Threads::All, &dy.packed, Accumulate::Add, &mut sum);
                sum
            }
            None => weight.product(&dy.packed),
        };
        if let Some(low_rank) = &self.low_rank {
            low_rank.backward(&dy, input, &mut dx, gradients);
        }
        dx
    }
}

/// Low-rank update of a linear layer: `s·B·A·x`.
struct LowRankView<'a> {
    params: &'a LowRankParams,
    a: F32Guard<'a>,
    b: F32Guard<'a>,
    rank: usize,
    precision: Precision,
}

impl<'a> LowRankView<'a> {
    fn of(params: &'a LowRankParams, precision: Precision) -> Result<Self> {
        Ok(Self {
            params,
            a: read_f32(&params.a)?,
            b: read_f32(&params.b)?,
            rank: params.a.dim(0)?,
            precision,
        })
    }

    /// A, `[r, in]`.
    fn a(&self) -> MatrixRef<'_> {
        MatrixRef::new(&self.a, self.rank, self.a.len() / self.rank)
    }

    /// B, `[out, r]`.
    fn b(&self) -> MatrixRef<'_> {
        MatrixRef::new(&self.b, self.b.len() / self.rank, self.rank)
    }

    fn pack(&self, right: MatrixRef<'_>) -> PackedMatrix {
        PackedMatrix::pack(right, self.precision)
    }

    fn scaled(&self, mut values: Vec<f32>) -> Vec<f32> {
        for value in &mut values {
            *value *= self.params.scale;
        }
        values
    }

    /// `s·A·x`, `[N, r]`.
    fn low(&self, x: &PackedRows<'_>) -> Vec<f32> {
        self.scaled(self.pack(self.a().transpose()).product(x))
    }

    /// Values of `[N, r]` as a matrix.
    fn of_rank<'v>(&self, values: &'v [f32]) -> MatrixRef<'v> {
        MatrixRef::new(values, values.len() / self.rank, self.rank)
    }

    /// Adds the update of `x` to `y`, `[N, out]`.
    fn forward(&self, x: &PackedRows<'_>, y: &mut [f32]) {
        let low = self.low(x);
        let rows = PackedRows::pack(self.of_rank(&low), self.precision);
        let b = self.pack(self.b().transpose());
        b.product_into(Threads::All, &rows, Accumulate::Add, y);
    }

    /// Adds the gradient of the input to `dx`.
    fn backward(
        &self,
        dy: &OutputGradient<'_>,
        input: &LayerInput<'_>,
        dx: &mut [f32],
        gradients: &mut WeightGradients<'a>,
    ) {
        let LowRankParams { a, b, .. } = self.params;
        if b.is_variable() {
            let low = self.low(input.left());
            let columns = PackedRows::pack(dy.values.transpose(), self.precision);
            gradients.push((b, self.pack(self.of_rank(&low)).product(&columns)));
        }
        let dlow = self.scaled(self.pack(self.b()).product(&dy.packed));
        let dlow = self.of_rank(&dlow);
        if let Some(packed) = &input.packed
            && a.is_variable()
        {
            let columns = PackedRows::pack(dlow.transpose(), self.precision);
            gradients.push((a, packed.product(&columns)));
        }
        let rows = PackedRows::pack(dlow, self.precision);
        let a = self.pack(self.a());
        a.product_into(Threads::All, &rows, Accumulate::Add, dx);
    }
}

/// The sum of each column of `[N, width]`.
fn column_sums(values: &[f32], width: usize) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = values
        .par_chunks(SUM_ROWS * width)
        .map(|rows| sum_rows(rows.chunks_exact(width), width))
        .collect();
    sum_rows(partial.iter().map(Vec::as_slice), width)
}
