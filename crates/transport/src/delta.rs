//! What changed between two blobs of weights, bit for bit and compressed.
//!
//! Weights that were trained a little differ in their low bits. The two blobs are combined by exclusive
//! or, which leaves zeros where they agree, and the bytes of every four are laid in four planes: signs and
//! exponents, which hardly ever change, stand together and compress to nothing. Nothing is rounded.

use thiserror::Error;

/// The bytes of a number whose planes are separated.
const WIDTH: usize = 4;

/// zstd's fastest ordinary level: a sync should cost less than what it saves.
const LEVEL: i32 = 1;

/// Why a delta does not lead anywhere.
#[derive(Debug, Error)]
pub(crate) enum DeltaError {
    /// It was made from blobs of another length.
    #[error("a delta for {expected} bytes does not fit the {found} bytes it refers to")]
    Length {
        /// The length of both blobs when it was made.
        expected: usize,
        /// The length of the blob that is here.
        found: usize,
    },
    /// It cannot be decompressed.
    #[error("a delta is torn: {0}")]
    Torn(std::io::Error),
}

/// What leads from `before` to `after`; `None` when that is no shorter than `after`, or the lengths
/// differ.
pub(crate) fn encode(before: &[u8], after: &[u8]) -> Option<Vec<u8>> {
    if before.len() != after.len() {
        return None;
    }
    let planes = separate(before, after);
    let packed = zstd::bulk::compress(&planes, LEVEL).ok()?;
    (packed.len() < after.len()).then_some(packed)
}

/// What `delta` leads to from `before`.
///
/// # Errors
/// When it was made for a blob of another length, or is torn.
pub(crate) fn decode(before: &[u8], delta: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let planes = zstd::bulk::decompress(delta, before.len() + 1).map_err(DeltaError::Torn)?;
    if planes.len() != before.len() {
        return Err(DeltaError::Length {
            expected: planes.len(),
            found: before.len(),
        });
    }
    Ok(join(before, &planes))
}

/// The exclusive or of both, byte `b` of every number in plane `b`; bytes past the last whole number
/// follow.
fn separate(before: &[u8], after: &[u8]) -> Vec<u8> {
    let whole = before.len() / WIDTH * WIDTH;
    let mut planes = Vec::with_capacity(before.len());
    for byte in 0..WIDTH {
        let pairs = before[..whole]
            .chunks_exact(WIDTH)
            .zip(after[..whole].chunks_exact(WIDTH));
        planes.extend(pairs.map(|(a, b)| a[byte] ^ b[byte]));
    }
    planes.extend(
        before[whole..]
            .iter()
            .zip(&after[whole..])
            .map(|(a, b)| a ^ b),
    );
    planes
}

fn join(before: &[u8], planes: &[u8]) -> Vec<u8> {
    let numbers = before.len() / WIDTH;
    let whole = numbers * WIDTH;
    let mut after = before.to_vec();
    for (byte, plane) in planes[..whole].chunks_exact(numbers.max(1)).enumerate() {
        let into = after[..whole].chunks_exact_mut(WIDTH);
        into.zip(plane)
            .for_each(|(number, changed)| number[byte] ^= changed);
    }
    let rest = after[whole..].iter_mut().zip(&planes[whole..]);
    rest.for_each(|(byte, changed)| *byte ^= changed);
    after
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_delta_leads_back_bit_for_bit(before: Vec<u8>, changes: Vec<(usize, u8)>) {
            let mut after = before.clone();
            for (at, byte) in changes {
                if let Some(len) = std::num::NonZeroUsize::new(after.len()) {
                    after[at % len] = byte;
                }
            }
            prop_assert_eq!(join(&before, &separate(&before, &after)), after.clone());
            if let Some(delta) = encode(&before, &after) {
                prop_assert!(delta.len() < after.len());
                prop_assert_eq!(decode(&before, &delta).expect("it is whole"), after);
            }
        }
    }

    #[test]
    fn small_changes_of_numbers_make_small_deltas() {
        let numbers: Vec<f32> = (0..10_000u16).map(|n| f32::from(n).sin()).collect();
        let bytes =
            |numbers: &[f32]| -> Vec<u8> { numbers.iter().flat_map(|n| n.to_le_bytes()).collect() };
        let before = bytes(&numbers);
        let moved: Vec<f32> = numbers.iter().map(|n| n * (1.0 + 1e-6)).collect();
        let delta = encode(&before, &bytes(&moved)).expect("it is shorter");
        assert!(
            delta.len() * 2 < before.len(),
            "{} of {}",
            delta.len(),
            before.len()
        );
        let same = encode(&before, &before).expect("it is shorter");
        assert!(same.len() < 64, "{}", same.len());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let delta = encode(&[1; 64], &[2; 64]).expect("it is shorter");
        assert!(encode(&[1; 64], &[1; 65]).is_none());
        let longer = decode(&[1; 80], &delta).expect_err("another length");
        assert_eq!(
            longer.to_string(),
            "a delta for 64 bytes does not fit the 80 bytes it refers to"
        );
        let torn = decode(&[1; 64], &delta[..delta.len() - 3]).expect_err("torn");
        assert!(torn.to_string().starts_with("a delta is torn"), "{torn}");
        assert!(
            decode(&[1; 8], &delta).is_err(),
            "the planes are longer than the blob"
        );
    }
}
