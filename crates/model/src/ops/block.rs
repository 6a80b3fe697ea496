//! A whole decoder block as one operation: attention and feed-forward, each normed before and added to what
//! came in (Vaswani et al. 2017; pre-norm as in Llama, Touvron et al. 2023).
//!
//! Between the operations of a block candle would make, zero and add a tensor each time. Here the numbers
//! of a block pass from slice to slice, and a factor is laid out once for all products it takes part in. The
//! result is that of the single operations to the bit. With [`BlockOptions::recompute`] the forward keeps nothing but its
//! argument, and the backward runs it again (Chen et al. 2016).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::attention::{self, Attention, Segments};
use super::gradients::{add, give, in_order, must_gather, plus};
use super::matrix::{Begin, Factor, PackedMatrix, PackedRows, Precision, Threads};
use super::rope::{Direction, rotated};
use super::storage::{Floats, argument, floats, fusible, result};
use super::{rms_norm, swiglu};

/// Rows to a task where columns are summed: fixed, because the sum is taken task by task.
const ROWS: usize = 64;

/// A linear map: a weight `[out, in]` and maybe a bias `[out]`.
#[derive(Clone, Debug)]
pub struct Affine {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

/// The weights of one block.
#[derive(Clone, Debug)]
pub struct BlockWeights {
    /// `[D]`.
    pub attention_norm: Tensor,
    /// `D` to `H · hd`.
    pub query: Affine,
    /// `D` to `KV · hd`.
    pub key: Affine,
    /// `D` to `KV · hd`.
    pub value: Affine,
    /// `H · hd` to `D`.
    pub output: Affine,
    /// `[hd]`, where queries and keys are normed head by head.
    pub query_norm: Option<Tensor>,
    /// `[hd]`.
    pub key_norm: Option<Tensor>,
    /// `[D]`.
    pub feed_forward_norm: Tensor,
    /// `D` to `F`.
    pub gate: Affine,
    /// `D` to `F`.
    pub up: Affine,
    /// `F` to `D`.
    pub down: Affine,
}

/// How a block computes.
#[derive(Clone, Copy, Debug)]
pub struct BlockOptions {
    /// Query heads, key heads, and the width of each.
    pub heads: (usize, usize, usize),
    /// Added to mean squares before their root is taken.
    pub eps: f64,
    /// Of the products with weights; bytes are for writing.
    pub precision: Precision,
    /// How queries look at keys.
    pub attention: Attention,
    /// Whether the backward runs the forward again, instead of finding what it left.
    pub recompute: bool,
}

/// The block's result for `x` `[N, D]`: `[N, D]`; `cos` and `sin` are `[N, hd/2]`, N is `segments.total()`.
///
/// Differentiable in `x` and in the weights that are variables, by [`backward()`](super::backward()) alone.
/// `None` where it cannot be fused: unless everything is `f32` on the CPU, and the weights are variables or
/// not trained.
///
/// # Errors
/// If shapes do not fit.
pub fn block(
    x: &Tensor,
    weights: &BlockWeights,
    (cos, sin): (&Tensor, &Tensor),
    segments: &Arc<Segments>,
    options: BlockOptions,
) -> Result<Option<Tensor>> {
    let all = weights.all();
    let plain = |weight: &&Tensor| weight.is_variable() || !weight.track_op();
    let fusible = fusible(&[x, cos, sin]) && fusible(&all) && all.iter().all(plain);
    if !fusible || options.precision == Precision::Int8 || !all.iter().all(|w| w.is_contiguous()) {
        return Ok(None);
    }
    options.check(weights, x, (cos, sin), segments)?;
    let variable = all.iter().find(|weight| weight.is_variable());
    let op = Block {
        weights: weights.clone(),
        rotation: (cos.contiguous()?, sin.contiguous()?),
        segments: segments.clone(),
        keeps: !options.recompute && (x.track_op() || variable.is_some()),
        options,
        kept: Mutex::new(None),
    };
    // A variable goes along, for a block whose argument is not differentiated may still be.
    let along = (*variable.unwrap_or(&all[0])).clone();
    x.contiguous()?.apply_op2(&along, op).map(Some)
}

impl BlockWeights {
    fn all(&self) -> Vec<&Tensor> {
        let affines = [
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.gate,
            &self.up,
            &self.down,
        ];
        let of_affines = affines
            .into_iter()
            .flat_map(|affine| std::iter::once(&affine.weight).chain(&affine.bias));
        [&self.attention_norm, &self.feed_forward_norm]
            .into_iter()
            .chain(&self.query_norm)
            .chain(&self.key_norm)
            .chain(of_affines)
            .collect()
    }
}

impl BlockOptions {
    fn check(
        &self,
        weights: &BlockWeights,
        x: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        segments: &Segments,
    ) -> Result<()> {
        let (heads, kv_heads, head) = self.heads;
        let (tokens, width) = x.dims2()?;
        let inner = weights.gate.weight.dims2()?.0;
        let maps = [
            ("query", &weights.query, width, heads * head),
            ("key", &weights.key, width, kv_heads * head),
            ("value", &weights.value, width, kv_heads * head),
            ("output", &weights.output, heads * head, width),
            ("gate", &weights.gate, width, inner),
            ("up", &weights.up, width, inner),
            ("down", &weights.down, inner, width),
        ];
        for (name, map, from, to) in maps {
            let bias = map.bias.as_ref().is_none_or(|bias| bias.dims() == [to]);
            if map.weight.dims() != [to, from] || !bias {
                let weight = map.weight.dims();
                bail!("block: the {name} weight is {weight:?} where it maps {from} to {to}");
            }
        }
        let norms = [
            (Some(&weights.attention_norm), width),
            (Some(&weights.feed_forward_norm), width),
            (weights.query_norm.as_ref(), head),
            (weights.key_norm.as_ref(), head),
        ];
        for (norm, width) in norms {
            if let Some(norm) = norm.filter(|norm| norm.dims() != [width]) {
                bail!("block: a norm of {:?} for rows of {width}", norm.dims());
            }
        }
        let angles = [tokens, head / 2];
        let fit = head > 0 && head % 2 == 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0;
        if !fit || cos.dims() != angles || sin.dims() != angles || segments.total() != tokens {
            bail!(
                "block: {tokens} tokens, segments of {}, angles {:?} and {:?}, {heads} heads on \
                 {kv_heads} of {head} do not fit together",
                segments.total(),
                cos.dims(),
                sin.dims()
            );
        }
        if self.attention.window == Some(0) {
            bail!("block: a window of 0 tokens sees nothing: give at least 1");
        }
        Ok(())
    }
}

struct Block {
    weights: BlockWeights,
    /// cos and sin of every token.
    rotation: (Tensor, Tensor),
    segments: Arc<Segments>,
    options: BlockOptions,
    /// Whether the forward leaves what the backward needs.
    keeps: bool,
    kept: Mutex<Option<Kept>>,
}

/// What the backward needs of the forward.
struct Kept {
    /// Queries and keys before their norms, where they have any.
    plain: [Option<Vec<f32>>; 2],
    /// As attention takes them.
    qkv: [Vec<f32>; 3],
    /// Of attention: the result and each query's ln Σ exp(score).
    mixed: Vec<f32>,
    log_sums: Vec<f32>,
    /// The argument with attention added.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl CustomOp2 for Block {
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
        let numbers = Numbers::of(self)?;
        let (kept, out) = rayon::scope(|_| {
            let kept = numbers.until_gate(x);
            let out = numbers.after_gate(&kept);
            (kept, out)
        });
        *self.lock() = self.keeps.then_some(kept);
        Ok(result(out, layout.shape()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        must_gather("block")?;
        let gradient = gradient.contiguous()?;
        let numbers = Numbers::of(self)?;
        let kept = self.lock().take();
        let (dx, found) = {
            let (x, gradient) = (floats(x)?, floats(&gradient)?);
            let (x, gradient): (&[f32], &[f32]) = (&x, &gradient);
            rayon::scope(|_| {
                let kept = kept.unwrap_or_else(|| numbers.until_gate(x));
                numbers.backward(x, &kept, gradient)
            })
        };
        for (weight, gradient) in found {
            give(weight, gradient)?;
        }
        Ok((give(x, dx)?, None))
    }
}

impl Block {
    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The gradients of weights that are variables.
type Found<'a> = Vec<(&'a Tensor, Vec<f32>)>;

/// The numbers of a block, read under their locks.
struct Numbers<'a> {
    attention_norm: Norm<'a>,
    query: Map<'a>,
    key: Map<'a>,
    value: Map<'a>,
    output: Map<'a>,
    query_norm: Option<Norm<'a>>,
    key_norm: Option<Norm<'a>>,
    feed_forward_norm: Norm<'a>,
    gate: Map<'a>,
    up: Map<'a>,
    down: Map<'a>,
    rotation: (Floats<'a>, Floats<'a>),
    /// Half the width of a head.
    half: usize,
    attention: attention::Layer,
    precision: Precision,
    /// Whether any weight is a variable.
    trained: bool,
}

impl<'a> Numbers<'a> {
    fn of(block: &'a Block) -> Result<Self> {
        let (weights, options) = (&block.weights, block.options);
        let map = |affine| Map::of(affine, options.precision);
        let norm = |weight| Norm::of(weight, options.eps);
        let (cos, sin) = &block.rotation;
        Ok(Self {
            attention_norm: norm(&weights.attention_norm)?,
            query: map(&weights.query)?,
            key: map(&weights.key)?,
            value: map(&weights.value)?,
            output: map(&weights.output)?,
            query_norm: weights.query_norm.as_ref().map(norm).transpose()?,
            key_norm: weights.key_norm.as_ref().map(norm).transpose()?,
            feed_forward_norm: norm(&weights.feed_forward_norm)?,
            gate: map(&weights.gate)?,
            up: map(&weights.up)?,
            down: map(&weights.down)?,
            rotation: (floats(cos)?, floats(sin)?),
            half: options.heads.2 / 2,
            attention: attention::Layer::new(options.heads, &block.segments, options.attention),
            precision: options.precision,
            trained: weights.all().iter().any(|weight| weight.is_variable()),
        })
    }

    /// Rows that several maps take, laid out once.
    fn rows<'n>(&self, numbers: &'n [f32], width: usize) -> PackedRows<'n> {
        let rows = Factor::new(numbers, numbers.len() / width, width);
        PackedRows::of(rows, self.precision)
    }

    /// What maps took, laid out once for the gradients of their weights, if they are trained.
    fn taken(&self, numbers: &[f32], width: usize) -> Option<PackedMatrix> {
        let rows = || Factor::new(numbers, numbers.len() / width, width);
        self.trained
            .then(|| PackedMatrix::of(rows(), self.precision))
    }

    /// Queries or keys as attention takes them, and before their norm if they have one.
    fn placed(&self, plain: Vec<f32>, norm: Option<&Norm<'_>>) -> (Vec<f32>, Option<Vec<f32>>) {
        let turn = |x: &[f32]| {
            let (cos, sin) = &self.rotation;
            rotated(x, (cos, sin), self.half, Direction::Forth)
        };
        match norm {
            Some(norm) => (turn(&norm.forward(&plain)), Some(plain)),
            None => (turn(&plain), None),
        }
    }

    /// The gradient of queries or keys before all that.
    fn unplaced(
        &self,
        gradient: &[f32],
        (norm, plain): (Option<&Norm<'a>>, &Option<Vec<f32>>),
        found: &mut Found<'a>,
    ) -> Vec<f32> {
        let (cos, sin) = &self.rotation;
        let gradient = rotated(gradient, (cos, sin), self.half, Direction::Back);
        match (norm, plain) {
            (Some(norm), Some(plain)) => norm.backward(plain, &gradient, found),
            _ => gradient,
        }
    }

    fn until_gate(&self, x: &[f32]) -> Kept {
        let normed = self.attention_norm.forward(x);
        let rows = self.rows(&normed, self.query.width);
        let (q, plain_q) = self.placed(self.query.forward(&rows), self.query_norm.as_ref());
        let (k, plain_k) = self.placed(self.key.forward(&rows), self.key_norm.as_ref());
        let v = self.value.forward(&rows);
        let (mixed, log_sums) = self.attention.forward(&q, &k, &v);
        let mut middle = self.output.forward(&self.rows(&mixed, self.output.width));
        add(&mut middle, x);
        let normed = self.feed_forward_norm.forward(&middle);
        let rows = self.rows(&normed, self.gate.width);
        let (gate, up) = (self.gate.forward(&rows), self.up.forward(&rows));
        Kept {
            plain: [plain_q, plain_k],
            qkv: [q, k, v],
            mixed,
            log_sums,
            middle,
            gate,
            up,
        }
    }

    fn after_gate(&self, kept: &Kept) -> Vec<f32> {
        let active = swiglu::forward(&kept.gate, &kept.up);
        let mut out = self.down.forward(&self.rows(&active, self.down.width));
        add(&mut out, &kept.middle);
        out
    }

    /// The gradients of the argument and of the weights.
    fn backward(&self, x: &[f32], kept: &Kept, gradient: &[f32]) -> (Vec<f32>, Found<'a>) {
        let mut found = Vec::new();
        let dmiddle = self.feed_forward_back(kept, gradient, &mut found);
        let taken = self.taken(&kept.mixed, self.output.width);
        let dmixed = self
            .output
            .backward(&dmiddle, taken.as_ref(), None, &mut found);
        let [q, k, v] = &kept.qkv;
        let given = (kept.mixed.as_slice(), kept.log_sums.as_slice());
        let [dq, dk, dv] = self.attention.backward([q, k, v], given, &dmixed);
        let [plain_q, plain_k] = &kept.plain;
        let dq = self.unplaced(&dq, (self.query_norm.as_ref(), plain_q), &mut found);
        let dk = self.unplaced(&dk, (self.key_norm.as_ref(), plain_k), &mut found);
        let normed = self.attention_norm.forward(x);
        let taken = self.taken(&normed, self.query.width);
        let taken = taken.as_ref();
        let dnormed = self.query.backward(&dq, taken, None, &mut found);
        let dnormed = self.key.backward(&dk, taken, Some(dnormed), &mut found);
        let dnormed = self.value.backward(&dv, taken, Some(dnormed), &mut found);
        let mut dx = self.attention_norm.backward(x, &dnormed, &mut found);
        add(&mut dx, &dmiddle);
        (dx, found)
    }

    /// The gradient of what attention gave to the feed-forward layer.
    fn feed_forward_back(&self, kept: &Kept, gradient: &[f32], found: &mut Found<'a>) -> Vec<f32> {
        let Kept {
            middle, gate, up, ..
        } = kept;
        let active = swiglu::forward(gate, up);
        let taken = self.taken(&active, self.down.width);
        let dactive = self.down.backward(gradient, taken.as_ref(), None, found);
        let (dgate, dup) = swiglu::backward(gate, up, &dactive);
        let normed = self.feed_forward_norm.forward(middle);
        let taken = self.taken(&normed, self.gate.width);
        let dnormed = self.gate.backward(&dgate, taken.as_ref(), None, found);
        let dnormed = self.up.backward(&dup, taken.as_ref(), Some(dnormed), found);
        let mut dmiddle = self.feed_forward_norm.backward(middle, &dnormed, found);
        add(&mut dmiddle, gradient);
        dmiddle
    }
}

struct Norm<'a> {
    tensor: &'a Tensor,
    weight: Floats<'a>,
    eps: f32,
}

impl<'a> Norm<'a> {
    fn of(tensor: &'a Tensor, eps: f64) -> Result<Self> {
        Ok(Self {
            tensor,
            weight: floats(tensor)?,
            eps: eps as f32,
        })
    }

    fn forward(&self, x: &[f32]) -> Vec<f32> {
        rms_norm::forward(x, &self.weight, self.eps)
    }

    fn backward(&self, x: &[f32], gradient: &[f32], found: &mut Found<'a>) -> Vec<f32> {
        let (dx, dweight) = rms_norm::backward(x, &self.weight, self.eps, gradient);
        if self.tensor.is_variable() {
            found.push((self.tensor, dweight));
        }
        dx
    }
}

struct Map<'a> {
    affine: &'a Affine,
    weight: Floats<'a>,
    bias: Option<Floats<'a>>,
    out: usize,
    width: usize,
    precision: Precision,
}

impl<'a> Map<'a> {
    fn of(affine: &'a Affine, precision: Precision) -> Result<Self> {
        let (out, width) = affine.weight.dims2()?;
        Ok(Self {
            affine,
            weight: floats(&affine.weight)?,
            bias: affine.bias.as_ref().map(floats).transpose()?,
            out,
            width,
            precision,
        })
    }

    fn factor(&self) -> Factor<'_> {
        Factor::new(&self.weight, self.out, self.width)
    }

    /// `x · weightᵀ + bias`, `[N, out]`.
    fn forward(&self, x: &PackedRows<'_>) -> Vec<f32> {
        let weight = PackedMatrix::of(self.factor().transposed(), self.precision);
        let mut y = weight.product(x);
        if let Some(bias) = &self.bias {
            let bias: &[f32] = bias;
            y.par_chunks_mut(ROWS * self.out).for_each(|rows| {
                for row in rows.chunks_exact_mut(self.out) {
                    plus(row, bias);
                }
            });
        }
        y
    }

    /// The gradient of what the map took, `[N, in]`, added to `sum` if there is one; `taken` is what it took, for
    /// the gradient of the weight.
    fn backward(
        &self,
        gradient: &[f32],
        taken: Option<&PackedMatrix>,
        sum: Option<Vec<f32>>,
        found: &mut Found<'a>,
    ) -> Vec<f32> {
        let factor = Factor::new(gradient, gradient.len() / self.out, self.out);
        if let Some(taken) = taken
            && self.affine.weight.is_variable()
        {
            let dweight = taken.product(&PackedRows::of(factor.transposed(), self.precision));
            found.push((&self.affine.weight, dweight));
        }
        if let Some(bias) = &self.affine.bias
            && bias.is_variable()
        {
            found.push((bias, column_sums(gradient, self.out)));
        }
        let rows = PackedRows::of(factor, self.precision);
        let weight = PackedMatrix::of(self.factor(), self.precision);
        match sum {
            Some(mut sum) => {
                weight.put(Threads::All, &rows, (Begin::There, &mut sum));
                sum
            }
            None => weight.product(&rows),
        }
    }
}

/// The sum of each column of `[N, width]`.
fn column_sums(numbers: &[f32], width: usize) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = numbers
        .par_chunks(ROWS * width)
        .map(|rows| in_order(rows.chunks_exact(width), width))
        .collect();
    in_order(partial.iter().map(Vec::as_slice), width)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::check::{assert_close, bits, noise};
    use super::super::{backward, causal_attention, linear, rope};
    use super::*;

    const HEADS: (usize, usize, usize) = (4, 2, 6);
    const WIDTH: usize = 20;
    const INNER: usize = 36;

    /// What a block is tried with.
    struct Case {
        weights: BlockWeights,
        x: Tensor,
        rotation: (Tensor, Tensor),
        segments: Arc<Segments>,
        options: BlockOptions,
    }

    /// Weights that are variables, or not; with biases and norms of heads, or without.
    fn case(everything: bool, trained: bool) -> Case {
        let mut seed = 10;
        let mut tensor = |shape: &[usize], scale: f64, around: f64| {
            seed += 1;
            let tensor = noise(shape, seed).affine(scale, around).unwrap();
            match trained {
                true => Var::from_tensor(&tensor).unwrap().into_inner(),
                false => tensor,
            }
        };
        let mut affine = |from: usize, to: usize, biased: bool| Affine {
            weight: tensor(&[to, from], 0.4, 0.0),
            bias: (everything && biased).then(|| tensor(&[to], 0.3, 0.0)),
        };
        let (heads, kv_heads, head) = HEADS;
        let weights = BlockWeights {
            query: affine(WIDTH, heads * head, true),
            key: affine(WIDTH, kv_heads * head, true),
            value: affine(WIDTH, kv_heads * head, true),
            output: affine(heads * head, WIDTH, true),
            gate: affine(WIDTH, INNER, false),
            up: affine(WIDTH, INNER, false),
            down: affine(INNER, WIDTH, true),
            attention_norm: tensor(&[WIDTH], 0.3, 1.0),
            feed_forward_norm: tensor(&[WIDTH], 0.3, 1.0),
            query_norm: everything.then(|| tensor(&[head], 0.3, 1.0)),
            key_norm: everything.then(|| tensor(&[head], 0.3, 1.0)),
        };
        let lengths = [(50, vec![30, 0, 12]), (7, vec![]), (0, vec![3])];
        let segments = Arc::new(Segments::branching(lengths));
        let angles = noise((segments.total(), head / 2), 5);
        Case {
            weights,
            x: noise((segments.total(), WIDTH), 1),
            rotation: (angles.cos().unwrap(), angles.sin().unwrap()),
            segments,
            options: BlockOptions {
                heads: HEADS,
                eps: 1e-5,
                precision: Precision::F32,
                attention: Attention {
                    scale: 0.4,
                    window: everything.then_some(21),
                },
                recompute: false,
            },
        }
    }

    impl Case {
        fn whole(&self, x: &Tensor) -> Result<Option<Tensor>> {
            let (cos, sin) = &self.rotation;
            block(x, &self.weights, (cos, sin), &self.segments, self.options)
        }

        /// The same from the operations it is made of.
        fn composed(&self, x: &Tensor) -> Result<Tensor> {
            let BlockOptions {
                heads: (heads, kv_heads, head),
                eps,
                precision,
                attention,
                ..
            } = self.options;
            let (weights, (cos, sin)) = (&self.weights, &self.rotation);
            let map = |affine: &Affine, x: &Tensor| {
                let y = linear(x, &affine.weight, precision)?;
                match &affine.bias {
                    Some(bias) => y.broadcast_add(bias),
                    None => Ok(y),
                }
            };
            let normed = rms_norm::rms_norm(x, &weights.attention_norm, eps)?;
            let placed = |affine: &Affine, count: usize, norm: Option<&Tensor>| {
                let y = map(affine, &normed)?.reshape(((), count, head))?;
                norm.map_or(Ok(y.clone()), |norm| rms_norm::rms_norm(&y, norm, eps))
            };
            let q = placed(&weights.query, heads, weights.query_norm.as_ref())?;
            let k = placed(&weights.key, kv_heads, weights.key_norm.as_ref())?;
            let v = placed(&weights.value, kv_heads, None)?;
            let (q, k) = (rope::rope(&q, cos, sin)?, rope::rope(&k, cos, sin)?);
            let mixed = causal_attention(&q, &k, &v, &self.segments, attention)?;
            let x = (x + map(&weights.output, &mixed.flatten(1, 2)?)?)?;
            let normed = rms_norm::rms_norm(&x, &weights.feed_forward_norm, eps)?;
            let (gate, up) = (map(&weights.gate, &normed)?, map(&weights.up, &normed)?);
            &x + map(&weights.down, &swiglu::swiglu(&gate, &up)?)?
        }

        /// The value, and the gradients of a sum of it in `x` and all weights.
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
    fn agrees_with_the_operations_it_is_made_of() {
        for everything in [false, true] {
            for trained in [false, true] {
                let case = case(everything, trained);
                let (value, gradients) = case.differentiated(|x| Ok(case.whole(x)?.unwrap()));
                let (expected, expected_gradients) = case.differentiated(|x| case.composed(x));
                assert_eq!(bits(&value), bits(&expected));
                assert_eq!(gradients.len(), expected_gradients.len());
                assert_eq!(trained, gradients.len() > 1);
                for (gradient, expected) in gradients.iter().zip(&expected_gradients) {
                    assert_close(gradient, expected, 5e-5);
                }
            }
        }
    }

    #[test]
    fn what_is_computed_again_is_the_same_to_the_bit() {
        let mut case = case(true, true);
        let found = |case: &Case| {
            let (value, gradients) = case.differentiated(|x| Ok(case.whole(x)?.unwrap()));
            let gradients: Vec<_> = gradients.iter().map(bits).collect();
            (bits(&value), gradients)
        };
        let kept = found(&case);
        case.options.recompute = true;
        assert!(kept == found(&case));
    }

    #[test]
    fn weights_are_differentiated_though_the_argument_is_not() -> Result<()> {
        let case = case(false, true);
        let loss = |x: &Tensor| case.whole(x)?.unwrap().sqr()?.sum_all();
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
        let mut case = case(true, true);
        let exact = case.differentiated(|x| Ok(case.whole(x)?.unwrap()));
        case.options.precision = Precision::Bf16;
        let composed = case.differentiated(|x| case.composed(x));
        let rounded = case.differentiated(|x| Ok(case.whole(x)?.unwrap()));
        assert_close(&rounded.0, &exact.0, 0.05);
        assert_ne!(bits(&rounded.0), bits(&exact.0));
        for (rounded, composed) in rounded.1.iter().zip(&composed.1) {
            assert_close(rounded, composed, 0.1);
        }
    }

    #[test]
    fn what_cannot_be_fused_is_left_and_what_does_not_fit_refused() -> Result<()> {
        let mut case = case(false, true);
        let double = case.x.to_dtype(candle_core::DType::F64)?;
        assert!(case.whole(&double)?.is_none());
        let loss = case.whole(&case.x)?.unwrap().sum_all()?;
        let alone = loss.backward().unwrap_err().to_string();
        assert!(alone.contains("ops::backward"), "{alone}");
        let short = case.x.narrow(0, 0, 9)?;
        let refused = case.whole(&short).unwrap_err().to_string();
        assert!(refused.contains("9 tokens, segments of 102"), "{refused}");
        // Weights that are computed have gradients that only candle can pass on.
        let computed = (&case.weights.up.weight * 2.0)?;
        case.weights.up.weight = computed;
        assert!(case.whole(&case.x)?.is_none());
        case.weights.up.weight = noise((INNER, WIDTH + 1), 3);
        let refused = case.whole(&case.x).unwrap_err().to_string();
        assert!(refused.contains("the up weight is [36, 21]"), "{refused}");
        Ok(())
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let case = case(true, true);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            let found = pool.install(|| case.differentiated(|x| Ok(case.whole(x)?.unwrap())));
            let gradients: Vec<_> = found.1.iter().map(bits).collect();
            (bits(&found.0), gradients)
        };
        assert!(on(1) == on(3));
    }

    #[test]
    fn no_tokens_at_all() -> Result<()> {
        let mut case = case(true, true);
        case.segments = Arc::new(Segments::new(&[]));
        let empty = |width: usize| Tensor::zeros((0, width), candle_core::DType::F32, &Device::Cpu);
        case.rotation = (empty(3)?, empty(3)?);
        let whole = case.whole(&empty(WIDTH)?)?.unwrap();
        assert_eq!(whole.dims(), [0, WIDTH]);
        Ok(())
    }
}
