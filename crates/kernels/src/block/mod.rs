//! A pre-norm decoder block as one operation: attention and feed-forward, each with a residual connection (Vaswani et
//! al. 2017; Llama, Touvron et al. 2023).
//!
//! candle would allocate, zero and add a tensor between any two operations of a block. Here activations are plain
//! slices, and an operand is packed once for all products that it takes part in.
//!
//! Promises: the result has the bits of the single operations, but for low-rank updates, which are added term by term. With [`BlockOptions::recompute`] (gradient
//! checkpointing, Chen et al. 2016) the forward saves its argument only, and the backward runs it again, with the same
//! bits.

mod layers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use self::layers::{LayerInput, LinearView, NormView, WeightGradients};
use crate::attention::{AttentionLayer, Heads, Segments};
use crate::autograd::gradients::{accumulate, par_add_assign, require_accumulator};
use crate::autograd::storage::{F32Guard, argument, fusible, read_f32, result};
use crate::matmul::{MatrixRef, PackedRows, Precision};
use crate::rope::{Direction, rotated};
use crate::swiglu;
use crate::weight::WeightMatrix;

/// Parameters of a linear layer.
#[derive(Clone, Debug)]
pub struct LinearParams {
    /// `[out, in]`; packed in the precision of the block, if it is.
    pub weight: WeightMatrix,
    /// `[out]`, if it has one.
    pub bias: Option<Tensor>,
    /// The update of an adapter, if it has one.
    pub low_rank: Option<LowRankParams>,
}

/// Low-rank update `s·B·A` of a linear layer (LoRA, Hu et al. 2021, eq. 3).
#[derive(Clone, Debug)]
pub struct LowRankParams {
    /// A, `[r, in]`.
    pub a: Tensor,
    /// B, `[out, r]`.
    pub b: Tensor,
    /// s.
    pub scale: f32,
}

/// Weights of a decoder block.
#[derive(Clone, Debug)]
pub struct BlockWeights {
    /// `[D]`.
    pub attention_norm: Tensor,
    /// `D` to `H · hd`.
    pub query: LinearParams,
    /// `D` to `KV · hd`.
    pub key: LinearParams,
    /// `D` to `KV · hd`.
    pub value: LinearParams,
    /// `H · hd` to `D`.
    pub output: LinearParams,
    /// `[hd]`, if queries and keys are normalised per head.
    pub query_norm: Option<Tensor>,
    /// `[hd]`.
    pub key_norm: Option<Tensor>,
    /// `[D]`.
    pub feed_forward_norm: Tensor,
    /// `D` to `F`.
    pub gate: LinearParams,
    /// `D` to `F`.
    pub up: LinearParams,
    /// `F` to `D`.
    pub down: LinearParams,
}

/// Hyperparameters of a decoder block.
#[derive(Clone, Copy, Debug)]
pub struct BlockOptions {
    /// Attention heads, their scale and window.
    pub heads: Heads,
    /// Epsilon of the RMS norms.
    pub eps: f64,
    /// Precision of the products with weights: f32 or bf16.
    pub precision: Precision,
    /// Gradient checkpointing: whether the backward recomputes the activations instead of saving them.
    pub recompute: bool,
}

/// Rotary embedding of a batch's tokens.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// `[N, hd/2]`.
    pub cos: &'a Tensor,
    /// `[N, hd/2]`.
    pub sin: &'a Tensor,
}

/// Fused decoder block: `[N, D]` to `[N, D]`, N being `segments.total()`.
///
/// Differentiable in `x` and in the weights that are variables, by [`backward()`](crate::backward()) only. `None` if it
/// cannot be fused: unless everything is `f32` on the CPU, and every weight is a variable or not trained; and in int8.
///
/// # Errors
/// If the shapes do not match.
pub fn block(
    x: &Tensor,
    weights: &BlockWeights,
    rotation: Rotation<'_>,
    segments: &Arc<Segments>,
    options: BlockOptions,
) -> Result<Option<Tensor>> {
    let all = weights.all();
    let Rotation { cos, sin } = rotation;
    let leaf = |weight: &&Tensor| weight.is_variable() || !weight.track_op();
    let fusible = fusible(&[x, cos, sin]) && fusible(&all) && all.iter().all(leaf);
    if !fusible || options.precision == Precision::Int8 || !all.iter().all(|w| w.is_contiguous()) {
        return Ok(None);
    }
    options.check(weights, x, rotation, segments)?;
    let variable = all.iter().find(|weight| weight.is_variable());
    let op = BlockOp {
        weights: weights.clone(),
        rotation: (cos.contiguous()?, sin.contiguous()?),
        segments: segments.clone(),
        saves: !options.recompute && (x.track_op() || variable.is_some()),
        options,
        saved: Mutex::new(None),
    };
    // The second argument makes candle differentiate a block whose weights are trained though its argument is not.
    let tracked = (*variable.unwrap_or(&all[0])).clone();
    x.contiguous()?.apply_op2(&tracked, op).map(Some)
}

impl LinearParams {
    /// All tensors.
    fn all(&self) -> impl Iterator<Item = &Tensor> {
        let update = self.low_rank.iter();
        let update = update.flat_map(|update| [&update.a, &update.b]);
        let weight = self.weight.tensor().into_iter();
        weight.chain(&self.bias).chain(update)
    }

    /// Whether its parameters have the shapes of a layer of `from` to `to` values.
    fn fits(&self, from: usize, to: usize) -> bool {
        let bias = self.bias.as_ref().is_none_or(|bias| bias.dims() == [to]);
        let update = self.low_rank.as_ref().is_none_or(|update| {
            let rank = update.a.dims().first().copied().unwrap_or_default();
            update.a.dims() == [rank, from] && update.b.dims() == [to, rank]
        });
        self.weight.dims().is_ok_and(|dims| dims == [to, from]) && bias && update
    }
}

impl BlockWeights {
    fn all(&self) -> Vec<&Tensor> {
        let linears = [
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.gate,
            &self.up,
            &self.down,
        ];
        let of_linears = linears.into_iter().flat_map(LinearParams::all);
        [&self.attention_norm, &self.feed_forward_norm]
            .into_iter()
            .chain(&self.query_norm)
            .chain(&self.key_norm)
            .chain(of_linears)
            .collect()
    }
}

impl BlockOptions {
    fn check(
        &self,
        weights: &BlockWeights,
        x: &Tensor,
        rotation: Rotation<'_>,
        segments: &Segments,
    ) -> Result<()> {
        let Rotation { cos, sin } = rotation;
        let (heads, kv_heads, head) = (self.heads.queries, self.heads.keys, self.heads.width);
        let (tokens, width) = x.dims2()?;
        let [inner, _] = weights.gate.weight.dims()?;
        let linears = [
            ("query", &weights.query, width, heads * head),
            ("key", &weights.key, width, kv_heads * head),
            ("value", &weights.value, width, kv_heads * head),
            ("output", &weights.output, heads * head, width),
            ("gate", &weights.gate, width, inner),
            ("up", &weights.up, width, inner),
            ("down", &weights.down, inner, width),
        ];
        for (name, linear, from, to) in linears {
            if !linear.fits(from, to) {
                let weight = linear.weight.dims()?;
                let others: Vec<_> = linear.all().map(Tensor::dims).collect();
                bail!(
                    "block: the {name} layer has a weight {weight:?} among {others:?}, expected [{to}, {from}]"
                );
            }
            let name = format!("block: the {name} layer");
            linear
                .weight
                .check_packed(&name, [to, from], self.precision)?;
        }
        let norms = [
            (Some(&weights.attention_norm), width),
            (Some(&weights.feed_forward_norm), width),
            (weights.query_norm.as_ref(), head),
            (weights.key_norm.as_ref(), head),
        ];
        for (norm, width) in norms {
            if let Some(norm) = norm.filter(|norm| norm.dims() != [width]) {
                bail!(
                    "block: a norm weight of {:?} for rows of {width}",
                    norm.dims()
                );
            }
        }
        let angles = [tokens, head / 2];
        let valid = head > 0 && head % 2 == 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0;
        if !valid || cos.dims() != angles || sin.dims() != angles || segments.total() != tokens {
            bail!(
                "block: {tokens} tokens, segments of {}, angles {:?} and {:?}, {heads} heads on \
                 {kv_heads} of {head} do not fit together",
                segments.total(),
                cos.dims(),
                sin.dims()
            );
        }
        if self.heads.attention.window == Some(0) {
            bail!("block: the window is 0 tokens, it must be at least 1");
        }
        Ok(())
    }
}

struct BlockOp {
    weights: BlockWeights,
    /// cos and sin of each token.
    rotation: (Tensor, Tensor),
    segments: Arc<Segments>,
    options: BlockOptions,
    /// Whether the forward saves its activations for the backward.
    saves: bool,
    saved: Mutex<Option<SavedActivations>>,
}

/// Activations that the backward needs.
struct SavedActivations {
    /// Queries before their norm, if they have one.
    q_before_norm: Option<Vec<f32>>,
    /// Keys before their norm, if they have one.
    k_before_norm: Option<Vec<f32>>,
    /// Arguments of attention: normalised and rotated.
    qkv: [Vec<f32>; 3],
    /// Result of attention.
    attended: Vec<f32>,
    /// Log-sum-exp of each query's scores.
    log_sums: Vec<f32>,
    /// The argument plus the attention's output: the residual stream between both halves.
    residual: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl CustomOp2 for BlockOp {
    fn name(&self) -> &'static str {
        "block"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = argument(x, layout)?;
        let view = BlockWeightsView::of(self)?;
        let (saved, out) = rayon::scope(|_| {
            let saved = view.forward_to_gate(x);
            let out = view.forward_from_gate(&saved);
            (saved, out)
        });
        *self.lock() = self.saves.then_some(saved);
        Ok(result(out, layout.shape()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        require_accumulator("block")?;
        let gradient = gradient.contiguous()?;
        let view = BlockWeightsView::of(self)?;
        let saved = self.lock().take();
        let (dx, weight_gradients) = {
            let (x, gradient) = (read_f32(x)?, read_f32(&gradient)?);
            let (x, gradient): (&[f32], &[f32]) = (&x, &gradient);
            rayon::scope(|_| {
                let saved = saved.unwrap_or_else(|| view.forward_to_gate(x));
                view.backward(x, &saved, gradient)
            })
        };
        for (weight, gradient) in weight_gradients {
            accumulate(weight, gradient)?;
        }
        Ok((accumulate(x, dx)?, None))
    }
}

impl BlockOp {
    fn lock(&self) -> MutexGuard<'_, Option<SavedActivations>> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Read view of a block's weights and hyperparameters.
struct BlockWeightsView<'a> {
    attention_norm: NormView<'a>,
    query: LinearView<'a>,
    key: LinearView<'a>,
    value: LinearView<'a>,
    output: LinearView<'a>,
    query_norm: Option<NormView<'a>>,
    key_norm: Option<NormView<'a>>,
    feed_forward_norm: NormView<'a>,
    gate: LinearView<'a>,
    up: LinearView<'a>,
    down: LinearView<'a>,
    cos: F32Guard<'a>,
    sin: F32Guard<'a>,
    /// Half the width of a head.
    half: usize,
    attention: AttentionLayer,
    precision: Precision,
    /// Whether any weight, or a factor of an update, is a variable.
    trained: bool,
}

impl<'a> BlockWeightsView<'a> {
    fn of(block: &'a BlockOp) -> Result<Self> {
        let (weights, options) = (&block.weights, block.options);
        let linear = |params| LinearView::of(params, options.precision);
        let norm = |weight| NormView::of(weight, options.eps);
        let (cos, sin) = &block.rotation;
        Ok(Self {
            attention_norm: norm(&weights.attention_norm)?,
            query: linear(&weights.query)?,
            key: linear(&weights.key)?,
            value: linear(&weights.value)?,
            output: linear(&weights.output)?,
            query_norm: weights.query_norm.as_ref().map(norm).transpose()?,
            key_norm: weights.key_norm.as_ref().map(norm).transpose()?,
            feed_forward_norm: norm(&weights.feed_forward_norm)?,
            gate: linear(&weights.gate)?,
            up: linear(&weights.up)?,
            down: linear(&weights.down)?,
            cos: read_f32(cos)?,
            sin: read_f32(sin)?,
            half: options.heads.width / 2,
            attention: AttentionLayer::new(options.heads, &block.segments),
            precision: options.precision,
            trained: weights.all().iter().any(|weight| weight.is_variable()),
        })
    }

    /// Packs the input rows of one or more linear layers.
    fn pack_rows<'n>(&self, values: &'n [f32], width: usize) -> PackedRows<'n> {
        let rows = MatrixRef::new(values, values.len() / width, width);
        PackedRows::pack(rows, self.precision)
    }

    /// The input of linear layers, for their gradients.
    fn input<'n>(&self, values: &'n [f32], layer: &LinearView<'_>) -> LayerInput<'n> {
        LayerInput::new(values, layer.width, self.precision, self.trained)
    }

    /// Normalises queries or keys, if they have a norm, and rotates them. Also returns them as they were before the
    /// norm.
    fn norm_and_rotate(
        &self,
        x: Vec<f32>,
        norm: Option<&NormView<'_>>,
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let rotate = |x: &[f32]| rotated(x, &self.cos, &self.sin, self.half, Direction::Forward);
        match norm {
            Some(norm) => (rotate(&norm.forward(&x)), Some(x)),
            None => (rotate(&x), None),
        }
    }

    /// The gradient of [`Self::norm_and_rotate`].
    fn norm_and_rotate_backward(
        &self,
        gradient: &[f32],
        norm: Option<&NormView<'a>>,
        before_norm: Option<&[f32]>,
        weight_gradients: &mut WeightGradients<'a>,
    ) -> Vec<f32> {
        let gradient = rotated(
            gradient,
            &self.cos,
            &self.sin,
            self.half,
            Direction::Inverse,
        );
        match (norm, before_norm) {
            (Some(norm), Some(x)) => norm.backward(x, &gradient, weight_gradients),
            _ => gradient,
        }
    }

    fn forward_to_gate(&self, x: &[f32]) -> SavedActivations {
        let normed = self.attention_norm.forward(x);
        let rows = self.pack_rows(&normed, self.query.width);
        let (q, q_before_norm) =
            self.norm_and_rotate(self.query.forward(&rows), self.query_norm.as_ref());
        let (k, k_before_norm) =
            self.norm_and_rotate(self.key.forward(&rows), self.key_norm.as_ref());
        let v = self.value.forward(&rows);
        let (attended, log_sums) = self.attention.forward(&q, &k, &v);
        let rows = self.pack_rows(&attended, self.output.width);
        let mut residual = self.output.forward(&rows);
        par_add_assign(&mut residual, x);
        let normed = self.feed_forward_norm.forward(&residual);
        let rows = self.pack_rows(&normed, self.gate.width);
        let (gate, up) = (self.gate.forward(&rows), self.up.forward(&rows));
        SavedActivations {
            q_before_norm,
            k_before_norm,
            qkv: [q, k, v],
            attended,
            log_sums,
            residual,
            gate,
            up,
        }
    }

    fn forward_from_gate(&self, saved: &SavedActivations) -> Vec<f32> {
        let active = swiglu::forward(&saved.gate, &saved.up);
        let mut out = self.down.forward(&self.pack_rows(&active, self.down.width));
        par_add_assign(&mut out, &saved.residual);
        out
    }

    /// The gradients of the argument and of the weights.
    fn backward(
        &self,
        x: &[f32],
        saved: &SavedActivations,
        gradient: &[f32],
    ) -> (Vec<f32>, WeightGradients<'a>) {
        let mut gradients = Vec::new();
        let dresidual = self.feed_forward_backward(saved, gradient, &mut gradients);
        let input = self.input(&saved.attended, &self.output);
        let dattended = self
            .output
            .backward(&dresidual, &input, None, &mut gradients);
        let [q, k, v] = &saved.qkv;
        let [dq, dk, dv] =
            self.attention
                .backward([q, k, v], &saved.attended, &saved.log_sums, &dattended);
        let dq = self.norm_and_rotate_backward(
            &dq,
            self.query_norm.as_ref(),
            saved.q_before_norm.as_deref(),
            &mut gradients,
        );
        let dk = self.norm_and_rotate_backward(
            &dk,
            self.key_norm.as_ref(),
            saved.k_before_norm.as_deref(),
            &mut gradients,
        );
        let normed = self.attention_norm.forward(x);
        let input = self.input(&normed, &self.query);
        let dnormed = self.query.backward(&dq, &input, None, &mut gradients);
        let dnormed = self
            .key
            .backward(&dk, &input, Some(dnormed), &mut gradients);
        let dnormed = self
            .value
            .backward(&dv, &input, Some(dnormed), &mut gradients);
        let mut dx = self.attention_norm.backward(x, &dnormed, &mut gradients);
        par_add_assign(&mut dx, &dresidual);
        (dx, gradients)
    }

    /// The gradient of the residual stream between attention and feed-forward.
    fn feed_forward_backward(
        &self,
        saved: &SavedActivations,
        gradient: &[f32],
        gradients: &mut WeightGradients<'a>,
    ) -> Vec<f32> {
        let SavedActivations {
            residual, gate, up, ..
        } = saved;
        let active = swiglu::forward(gate, up);
        let input = self.input(&active, &self.down);
        let dactive = self.down.backward(gradient, &input, None, gradients);
        let (dgate, dup) = swiglu::backward(gate, up, &dactive);
        let normed = self.feed_forward_norm.forward(residual);
        let input = self.input(&normed, &self.gate);
        let dnormed = self.gate.backward(&dgate, &input, None, gradients);
        let dnormed = self.up.backward(&dup, &input, Some(dnormed), gradients);
        let mut dresidual = self
            .feed_forward_norm
            .backward(residual, &dnormed, gradients);
        par_add_assign(&mut dresidual, gradient);
        dresidual
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::attention::AttentionParams;
    use crate::check::{assert_close, bits, noise};
    use crate::matmul::PackedMatrix;
    use crate::{
        attention::causal_attention, autograd::gradients::backward, linear::linear, rms_norm, rope,
    };

    const QUERIES: usize = 4;
    const KEYS: usize = 2;
    const HEAD: usize = 6;
    const WIDTH: usize = 20;
    const INNER: usize = 36;
    const RANK: usize = 3;

    /// Arguments of a block.
    struct Case {
        weights: BlockWeights,
        x: Tensor,
        rotation: (Tensor, Tensor),
        segments: Arc<Segments>,
        options: BlockOptions,
    }

    /// Tensors of a block that are variables.
    #[derive(Clone, Copy, PartialEq)]
    enum Trained {
        Nothing,
        Weights,
        /// The updates of an adapter, with which the weights are frozen.
        Adapter,
    }

    /// A block with or without biases, per-head norms and a window.
    fn case(complete: bool, trained: Trained) -> Case {
        let mut seed = 10;
        let mut tensor = |shape: &[usize], scale: f64, offset: f64| {
            seed += 1;
            let tensor = noise(shape, seed).affine(scale, offset).unwrap();
            match trained {
                Trained::Weights => Var::from_tensor(&tensor).unwrap().into_inner(),
                Trained::Nothing | Trained::Adapter => tensor,
            }
        };
        let factor = |shape: &[usize], seed: u64| {
            let tensor = noise(shape, seed).affine(0.5, 0.0).unwrap();
            Var::from_tensor(&tensor).unwrap().into_inner()
        };
        let mut linear = |from: usize, to: usize, biased: bool| LinearParams {
            weight: tensor(&[to, from], 0.4, 0.0).into(),
            bias: (complete && biased).then(|| tensor(&[to], 0.3, 0.0)),
            // An adapter that leaves a module out is one of those that are not complete.
            low_rank: (trained == Trained::Adapter && (complete || biased)).then(|| {
                LowRankParams {
                    a: factor(&[RANK, from], 50 + to as u64),
                    b: factor(&[to, RANK], 70 + from as u64),
                    scale: 1.5,
                }
            }),
        };
        let weights = BlockWeights {
            query: linear(WIDTH, QUERIES * HEAD, true),
            key: linear(WIDTH, KEYS * HEAD, true),
            value: linear(WIDTH, KEYS * HEAD, true),
            output: linear(QUERIES * HEAD, WIDTH, true),
            gate: linear(WIDTH, INNER, false),
            up: linear(WIDTH, INNER, false),
            down: linear(INNER, WIDTH, true),
            attention_norm: tensor(&[WIDTH], 0.3, 1.0),
            feed_forward_norm: tensor(&[WIDTH], 0.3, 1.0),
            query_norm: complete.then(|| tensor(&[HEAD], 0.3, 1.0)),
            key_norm: complete.then(|| tensor(&[HEAD], 0.3, 1.0)),
        };
        let lengths = [(50, vec![30, 0, 12]), (7, vec![]), (0, vec![3])];
        let segments = Arc::new(Segments::branching(lengths));
        let angles = noise((segments.total(), HEAD / 2), 5);
        Case {
            weights,
            x: noise((segments.total(), WIDTH), 1),
            rotation: (angles.cos().unwrap(), angles.sin().unwrap()),
            segments,
            options: BlockOptions {
                heads: Heads {
                    queries: QUERIES,
                    keys: KEYS,
                    width: HEAD,
                    attention: AttentionParams {
                        scale: 0.4,
                        window: complete.then_some(21),
                    },
                },
                eps: 1e-5,
                precision: Precision::F32,
                recompute: false,
            },
        }
    }

    /// Packs the weights of these layers.
    fn pack(layers: &mut [&mut LinearParams], precision: Precision) {
        let flat = |layer: &&mut LinearParams| {
            let weight = layer.weight.to_tensor()?;
            weight.flatten_all()?.to_vec1::<f32>()
        };
        let weights = layers.iter().map(flat).collect::<Result<Vec<_>>>().unwrap();
        let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        let [_, width] = layers[0].weight.dims().unwrap();
        let parts = PackedMatrix::neighbours(&weights, width, precision);
        for (layer, packed) in layers.iter_mut().zip(parts) {
            layer.weight = WeightMatrix::Packed(packed);
        }
    }

    impl Case {
        fn fused(&self, x: &Tensor) -> Result<Option<Tensor>> {
            let (cos, sin) = &self.rotation;
            let rotation = Rotation { cos, sin };
            block(x, &self.weights, rotation, &self.segments, self.options)
        }

        /// The same from the single operations.
        fn composed(&self, x: &Tensor) -> Result<Tensor> {
            let BlockOptions {
                heads,
                eps,
                precision,
                ..
            } = self.options;
            let (weights, (cos, sin)) = (&self.weights, &self.rotation);
            let apply = |params: &LinearParams, x: &Tensor| {
                let mut y = linear(x, &params.weight.to_tensor()?, precision)?;
                if let Some(bias) = &params.bias {
                    y = y.broadcast_add(bias)?;
                }
                let Some(update) = &params.low_rank else {
                    return Ok(y);
                };
                let low = (linear(x, &update.a, precision)? * f64::from(update.scale))?;
                y + linear(&low, &update.b, precision)?
            };
            let normed = rms_norm::rms_norm(x, &weights.attention_norm, eps)?;
            let project = |params: &LinearParams, count: usize, norm: Option<&Tensor>| {
                let y = apply(params, &normed)?.reshape(((), count, heads.width))?;
                norm.map_or(Ok(y.clone()), |norm| rms_norm::rms_norm(&y, norm, eps))
            };
            let q = project(&weights.query, heads.queries, weights.query_norm.as_ref())?;
            let k = project(&weights.key, heads.keys, weights.key_norm.as_ref())?;
            let v = project(&weights.value, heads.keys, None)?;
            let (q, k) = (rope::rope(&q, cos, sin)?, rope::rope(&k, cos, sin)?);
            let attended = causal_attention(&q, &k, &v, &self.segments, heads.attention)?;
            let x = (x + apply(&weights.output, &attended.flatten(1, 2)?)?)?;
            let normed = rms_norm::rms_norm(&x, &weights.feed_forward_norm, eps)?;
            let (gate, up) = (apply(&weights.gate, &normed)?, apply(&weights.up, &normed)?);
            &x + apply(&weights.down, &swiglu::swiglu(&gate, &up)?)?
        }

        /// The value, and the gradients of a weighted sum of it with respect to `x` and all weights.
        fn differentiated(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> (Tensor, Vec<Tensor>) {
            let x = Var::from_tensor(&self.x).unwrap();
            let value = f(x.as_tensor()).unwrap();
            let weighted = (&value * noise(value.shape().clone(), 99)).unwrap();
            let found = backward(&weighted.sum_all().unwrap()).unwrap();
            let weights = self.weights.all().into_iter();
            let gradients = weights.filter(|weight| weight.is_variable());
            let gradients = std::iter::once(x.as_tensor()).chain(gradients);
            let gradients = gradients
                .map(|tensor| found.get(tensor).unwrap().clone())
                .collect();
            (value.detach(), gradients)
        }
    }

    #[test]
    fn agrees_with_the_single_operations() {
        for complete in [false, true] {
            for trained in [Trained::Nothing, Trained::Weights, Trained::Adapter] {
                let case = case(complete, trained);
                let (value, gradients) = case.differentiated(|x| Ok(case.fused(x)?.unwrap()));
                let (expected, expected_gradients) = case.differentiated(|x| case.composed(x));
                if trained == Trained::Adapter {
                    // An update is added term by term.
                    assert_close(&value, &expected, 1e-5);
                } else {
                    assert_eq!(bits(&value), bits(&expected));
                }
                assert_eq!(gradients.len(), expected_gradients.len());
                assert_eq!(trained != Trained::Nothing, gradients.len() > 1);
                for (gradient, expected) in gradients.iter().zip(&expected_gradients) {
                    assert_close(gradient, expected, 5e-5);
                }
            }
        }
    }

    #[test]
    fn recomputation_changes_no_bit() {
        for trained in [Trained::Weights, Trained::Adapter] {
            let mut case = case(true, trained);
            let found = |case: &Case| {
                let (value, gradients) = case.differentiated(|x| Ok(case.fused(x)?.unwrap()));
                let gradients: Vec<_> = gradients.iter().map(bits).collect();
                (bits(&value), gradients)
            };
            let saved = found(&case);
            case.options.recompute = true;
            assert!(saved == found(&case));
        }
    }

    #[test]
    fn weights_packed_beforehand_change_no_bit() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut case = case(true, Trained::Adapter);
            case.options.precision = precision;
            let found = |case: &Case| {
                let (value, gradients) = case.differentiated(|x| Ok(case.fused(x)?.unwrap()));
                let gradients: Vec<_> = gradients.iter().map(bits).collect();
                (bits(&value), gradients)
            };
            let packed_anew = found(&case);
            let BlockWeights {
                query,
                key,
                value,
                output,
                gate,
                up,
                down,
                ..
            } = &mut case.weights;
            pack(&mut [query, key, value], precision);
            pack(&mut [gate, up], precision);
            pack(&mut [output], precision);
            pack(&mut [down], precision);
            assert!(packed_anew == found(&case), "{precision:?}");
            // What is given is what is multiplied by.
            case.weights.up.weight = case.weights.gate.weight.clone();
            assert!(packed_anew.0 != found(&case).0, "{precision:?}");
        }
    }

    #[test]
    fn other_packed_weights_are_rejected() {
        let error_of = |case: &mut Case, precision| {
            let BlockWeights { gate, .. } = &mut case.weights;
            pack(&mut [gate], precision);
            case.fused(&case.x).unwrap_err().to_string()
        };
        let error = error_of(&mut case(true, Trained::Adapter), Precision::Bf16);
        let expected =
            "the gate layer has PackedMatrix(weight [36, 20] in Bf16), expected [36, 20] in F32";
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn an_update_whose_b_is_zero_changes_no_bit() {
        let mut adapted = case(true, Trained::Adapter);
        let mut bare = case(true, Trained::Adapter);
        for (weights, is_bare) in [(&mut adapted.weights, false), (&mut bare.weights, true)] {
            let BlockWeights { query, down, .. } = weights;
            for layer in [query, down] {
                layer.low_rank = layer.low_rank.take().filter(|_| !is_bare).map(|update| {
                    let b = update.b.zeros_like().unwrap();
                    LowRankParams { b, ..update }
                });
            }
        }
        for precision in [Precision::F32, Precision::Bf16] {
            (adapted.options.precision, bare.options.precision) = (precision, precision);
            let value = |case: &Case| bits(&case.fused(&case.x).unwrap().unwrap());
            assert_eq!(value(&adapted), value(&bare), "{precision:?}");
        }
    }

    #[test]
    fn weights_have_gradients_if_the_argument_has_none() -> Result<()> {
        let case = case(false, Trained::Weights);
        let loss = |x: &Tensor| case.fused(x)?.unwrap().sqr()?.sum_all();
        let found = backward(&loss(&case.x)?)?;
        let with_x = backward(&loss(Var::from_tensor(&case.x)?.as_tensor())?)?;
        for weight in case.weights.all() {
            let [found, expected] = [&found, &with_x].map(|store| bits(store.get(weight).unwrap()));
            assert_eq!(found, expected);
        }
        Ok(())
    }

    #[test]
    fn bf16_rounds_the_factors() {
        // An update adds two more products.
        for (trained, tolerance) in [(Trained::Weights, 0.05), (Trained::Adapter, 0.1)] {
            assert_rounds(case(true, trained), tolerance);
        }
    }

    fn assert_rounds(mut case: Case, tolerance: f32) {
        let exact = case.differentiated(|x| Ok(case.fused(x)?.unwrap()));
        case.options.precision = Precision::Bf16;
        let composed = case.differentiated(|x| case.composed(x));
        let rounded = case.differentiated(|x| Ok(case.fused(x)?.unwrap()));
        assert_close(&rounded.0, &exact.0, tolerance);
        assert_ne!(bits(&rounded.0), bits(&exact.0));
        for (rounded, composed) in rounded.1.iter().zip(&composed.1) {
            assert_close(rounded, composed, 2.0 * tolerance);
        }
    }

    #[test]
    fn unfusible_arguments_give_none_and_mismatched_shapes_are_rejected() -> Result<()> {
        let mut case = case(false, Trained::Weights);
        let double = case.x.to_dtype(candle_core::DType::F64)?;
        assert!(case.fused(&double)?.is_none());
        let loss = case.fused(&case.x)?.unwrap().sum_all()?;
        let by_candle = loss.backward().unwrap_err().to_string();
        assert!(by_candle.contains("kernels::backward"), "{by_candle}");
        let short = case.x.narrow(0, 0, 9)?;
        let error = case.fused(&short).unwrap_err().to_string();
        assert!(error.contains("9 tokens, segments of 102"), "{error}");
        // Only candle can propagate the gradient of a weight that is itself computed.
        let computed = (case.weights.up.weight.to_tensor()? * 2.0)?;
        case.weights.up.weight = computed.into();
        assert!(case.fused(&case.x)?.is_none());
        case.weights.up.weight = noise((INNER, WIDTH + 1), 3).into();
        let error = case.fused(&case.x).unwrap_err().to_string();
        assert!(
            error.contains("the up layer has a weight [36, 21]"),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let case = case(true, Trained::Weights);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            let found = pool.install(|| case.differentiated(|x| Ok(case.fused(x)?.unwrap())));
            let gradients: Vec<_> = found.1.iter().map(bits).collect();
            (bits(&found.0), gradients)
        };
        assert!(on(1) == on(3));
    }

    #[test]
    fn accepts_an_empty_batch() -> Result<()> {
        let mut case = case(true, Trained::Weights);
        case.segments = Arc::new(Segments::new(&[]));
        let empty = |width: usize| Tensor::zeros((0, width), candle_core::DType::F32, &Device::Cpu);
        case.rotation = (empty(3)?, empty(3)?);
        let value = case.fused(&empty(WIDTH)?)?.unwrap();
        assert_eq!(value.dims(), [0, WIDTH]);
        Ok(())
    }
}
