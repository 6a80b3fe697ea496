use candle_core::{DType, Device};

use super::*;
use crate::check::{assert_close, assert_differentiates, assert_same, bits, noise};

fn full(scale: f32) -> AttentionParams {
    AttentionParams {
        scale,
        window: None,
    }
}

fn inputs(tokens: usize, heads: usize, kv_heads: usize, width: usize) -> [Tensor; 3] {
    let q = (noise((tokens, heads, width), 1) * 3.0).unwrap();
    let kv = |seed| noise((tokens, kv_heads, width), seed);
    [q, kv(2), kv(3)]
}

fn branching(shapes: &[(usize, &[usize])]) -> Arc<Segments> {
    let shapes = shapes
        .iter()
        .map(|&(prefix, branches)| (prefix, branches.to_vec()));
    Arc::new(Segments::branching(shapes))
}

#[test]
fn by_hand() -> Result<()> {
    let column = |x: &[f32]| Tensor::new(x, &Device::Cpu)?.reshape((4, 1, 1));
    let q = column(&[1., 1., 1., 1.])?;
    let k = column(&[0., 3f32.ln(), 0., 4f32.ln()])?;
    let v = column(&[4., 8., 16., 32.])?;
    let segments = Arc::new(Segments::new(&[3, 1]));
    // Weights of the first three: 1; 1/4, 3/4; 1/5, 3/5, 1/5. The fourth is a sequence of its own.
    let y = causal_attention(&q, &k, &v, &segments, full(1.0))?;
    let expected = Tensor::new(&[4f32, 7., 8.8, 32.], &Device::Cpu)?;
    assert_close(&y.flatten_all()?, &expected, 1e-6);
    // A window of two hides the first from the third: 3/4, 1/4.
    let window = AttentionParams {
        scale: 1.0,
        window: Some(2),
    };
    let y = causal_attention(&q, &k, &v, &segments, window)?;
    let expected = Tensor::new(&[4f32, 7., 10., 32.], &Device::Cpu)?;
    assert_close(&y.flatten_all()?, &expected, 1e-6);
    // The last two as branches of the first two: the fourth has weights 1/8, 3/8, 4/8.
    let branches = branching(&[(2, &[1, 1])]);
    let y = causal_attention(&q, &k, &v, &branches, full(1.0))?;
    let expected = Tensor::new(&[4f32, 7., 8.8, 19.5], &Device::Cpu)?;
    assert_close(&y.flatten_all()?, &expected, 1e-6);
    let y = causal_attention(&q, &k, &v, &branches, window)?;
    let expected = Tensor::new(&[4f32, 7., 10., 152. / 7.], &Device::Cpu)?;
    assert_close(&y.flatten_all()?, &expected, 1e-6);
    Ok(())
}

fn assert_agrees(
    segments: &Arc<Segments>,
    [heads, kv_heads, width]: [usize; 3],
    window: Option<usize>,
) {
    let params = AttentionParams {
        scale: 1.0 / (width as f32).sqrt(),
        window,
    };
    assert_same(
        &inputs(segments.total(), heads, kv_heads, width),
        |t| causal_attention(&t[0], &t[1], &t[2], segments, params),
        |t| composed(&t[0], &t[1], &t[2], segments, params),
    );
}

#[test]
fn agrees_with_its_composed_version() {
    type Case<'a> = (&'a [usize], usize, usize, usize, Option<usize>);
    // Lengths, query heads, key heads, head width, window.
    let cases: [Case<'_>; 7] = [
        (&[1], 1, 1, 8, None),
        (&[5, 0, 2], 2, 1, 8, None),
        (&[17, 64, 65, 3], 6, 6, 48, None),
        (&[130, 1, 40], 4, 2, 20, None),
        (&[130, 33], 4, 2, 20, Some(1)),
        (&[150, 9], 2, 2, 16, Some(37)),
        (&[70], 3, 1, 128, Some(200)),
    ];
    for (lengths, heads, kv_heads, width, window) in cases {
        let segments = Arc::new(Segments::new(lengths));
        assert_agrees(&segments, [heads, kv_heads, width], window);
    }
}

#[test]
fn branches_agree_with_the_composed_version() {
    type Case<'a> = (
        &'a [(usize, &'a [usize])],
        usize,
        usize,
        usize,
        Option<usize>,
    );
    // Prefixes with their branches, query heads, key heads, head width, window.
    let cases: [Case<'_>; 6] = [
        (&[(1, &[1])], 1, 1, 8, None),
        (&[(37, &[15, 0, 3, 15])], 4, 2, 24, None),
        (
            &[(70, &[66, 130, 1]), (5, &[]), (0, &[3, 2])],
            4,
            2,
            20,
            None,
        ),
        (&[(130, &[0, 70])], 2, 1, 16, Some(1)),
        (&[(150, &[90, 5]), (20, &[40])], 2, 2, 16, Some(37)),
        (&[(66, &[80, 9])], 3, 1, 128, Some(200)),
    ];
    for (shapes, heads, kv_heads, width, window) in cases {
        let segments = branching(shapes);
        assert_agrees(&segments, [heads, kv_heads, width], window);
    }
}

#[test]
fn a_shared_prefix_gives_the_bits_of_a_repeated_prefix() -> Result<()> {
    let segments = branching(&[(70, &[66, 0, 15]), (9, &[4]), (21, &[])]);
    let apart = Arc::new(Segments::new(&[136, 70, 85, 13, 21]));
    let rows: Vec<u32> = segments
        .iter()
        .flat_map(|segment| segment.paths().flatten())
        .map(|row| row as u32)
        .collect();
    let rows = Tensor::new(rows, &Device::Cpu)?;
    let shared = inputs(segments.total(), 4, 2, 24);
    let repeated = shared.each_ref().map(|x| x.index_select(&rows, 0).unwrap());
    for window in [None, Some(30)] {
        let params = AttentionParams { scale: 0.3, window };
        let attend =
            |[q, k, v]: &[Tensor; 3], segments| causal_attention(q, k, v, segments, params);
        let once = attend(&shared, &segments)?.index_select(&rows, 0)?;
        assert_eq!(bits(&once), bits(&attend(&repeated, &apart)?));
    }
    Ok(())
}

#[test]
fn differentiates() {
    let plain = Arc::new(Segments::new(&[3, 2]));
    let branched = branching(&[(2, &[2, 0, 1])]);
    for (segments, window) in [
        (&plain, None),
        (&plain, Some(2)),
        (&branched, None),
        (&branched, Some(2)),
    ] {
        let params = AttentionParams { scale: 0.7, window };
        assert_differentiates(&inputs(5, 2, 1, 3), |t| {
            causal_attention(&t[0], &t[1], &t[2], segments, params)
        });
    }
}

#[test]
fn a_token_depends_on_its_segment_and_earlier_tokens_only() -> Result<()> {
    let [q, k, v] = inputs(170, 4, 2, 24);
    let attend = |range: std::ops::Range<usize>, lengths: &[usize]| {
        let part = |x: &Tensor| x.narrow(0, range.start, range.len());
        let segments = Arc::new(Segments::new(lengths));
        causal_attention(&part(&q)?, &part(&k)?, &part(&v)?, &segments, full(0.2))
    };
    let all = attend(0..170, &[30, 100, 40])?;
    let alone = attend(30..130, &[100])?;
    assert_eq!(bits(&alone), bits(&all.narrow(0, 30, 100)?));
    for shorter in [1, 63, 64, 65, 90] {
        let prefix = attend(30..30 + shorter, &[shorter])?;
        assert_eq!(bits(&prefix), bits(&all.narrow(0, 30, shorter)?));
    }
    Ok(())
}

#[test]
fn other_dtypes_use_the_composed_version() -> Result<()> {
    let [q, k, v] = inputs(9, 4, 2, 8);
    let segments = Arc::new(Segments::new(&[4, 5]));
    let double = |x: &Tensor| x.to_dtype(DType::F64);
    let y = causal_attention(&q, &k, &v, &segments, full(0.3))?;
    let (q, k, v) = (double(&q)?, double(&k)?, double(&v)?);
    let expected = causal_attention(&q, &k, &v, &segments, full(0.3))?;
    assert_close(&y, &expected.to_dtype(DType::F32)?, 1e-6);
    Ok(())
}

#[test]
fn mismatched_shapes_are_rejected() {
    let [q, k, v] = inputs(6, 4, 2, 8);
    let of = |lengths: &[usize]| Arc::new(Segments::new(lengths));
    assert!(causal_attention(&q, &k, &v, &of(&[6]), full(1.0)).is_ok());
    assert!(causal_attention(&q, &k, &v, &of(&[5]), full(1.0)).is_err());
    let three = noise((6, 3, 8), 1);
    assert!(causal_attention(&q, &three, &three, &of(&[6]), full(1.0)).is_err());
    assert!(causal_attention(&q, &k, &three, &of(&[6]), full(1.0)).is_err());
    let zero_window = AttentionParams {
        scale: 1.0,
        window: Some(0),
    };
    assert!(causal_attention(&q, &k, &v, &of(&[6]), zero_window).is_err());
}
