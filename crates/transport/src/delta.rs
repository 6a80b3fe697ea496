//! Lossless compressed deltas between two blobs of weights.
//!
//! Weights of nearby steps differ mostly in their low bits. The blobs are combined by exclusive or, which gives
//! zeros where they agree; the four bytes of each 32-bit value are split into four planes, so that signs and
//! exponents, which rarely change, are contiguous and compress well; the result is compressed with zstd.

use thiserror::Error;

/// Bytes per value, and number of planes.
const WIDTH: usize = 4;

/// zstd compression level: the fastest of the standard ones, since a sync waits for it.
const LEVEL: i32 = 1;

/// Reason why a delta cannot be applied.
#[derive(Debug, Error)]
pub(crate) enum DeltaError {
    /// Computed from blobs of another length.
    #[error("a delta for {expected} bytes does not fit the {found} bytes it refers to")]
    Length {
        /// Length of the blobs it was computed from.
        expected: usize,
        /// Length of the given base blob.
        found: usize,
    },
    /// Cannot be decompressed.
    #[error("a delta is corrupt: {0}")]
    Corrupt(std::io::Error),
}

/// Delta from `before` to `after`; `None` if it is no shorter than `after`, or the lengths differ.
pub(crate) fn encode(before: &[u8], after: &[u8]) -> Option<Vec<u8>> {
    if before.len() != after.len() {
        return None;
    }
    let planes = split_planes(before, after);
    let compressed = zstd::bulk::compress(&planes, LEVEL).ok()?;
    (compressed.len() < after.len()).then_some(compressed)
}

/// Applies `delta` to `before`.
///
/// # Errors
/// When the delta was computed from blobs of another length, or is corrupt.
pub(crate) fn decode(before: &[u8], delta: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let planes = zstd::bulk::decompress(delta, before.len() + 1).map_err(DeltaError::Corrupt)?;
    if planes.len() != before.len() {
        return Err(DeltaError::Length {
            expected: planes.len(),
            found: before.len(),
        });
    }
    Ok(merge_planes(before, &planes))
}

/// Exclusive or of both, byte `b` of each value in plane `b`; the bytes after the last whole value follow.
fn split_planes(before: &[u8], after: &[u8]) -> Vec<u8> {
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

fn merge_planes(before: &[u8], planes: &[u8]) -> Vec<u8> {
    let values = before.len() / WIDTH;
    let whole = values * WIDTH;
    let mut after = before.to_vec();
    for (byte, plane) in planes[..whole].chunks_exact(values.max(1)).enumerate() {
        let into = after[..whole].chunks_exact_mut(WIDTH);
        into.zip(plane)
            .for_each(|(value, changed)| value[byte] ^= changed);
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
        fn applying_a_delta_is_exact(before: Vec<u8>, changes: Vec<(usize, u8)>) {
            let mut after = before.clone();
            for (at, byte) in changes {
                if let Some(len) = std::num::NonZeroUsize::new(after.len()) {
                    after[at % len] = byte;
                }
            }
            prop_assert_eq!(merge_planes(&before, &split_planes(&before, &after)), after.clone());
            if let Some(delta) = encode(&before, &after) {
                prop_assert!(delta.len() < after.len());
                prop_assert_eq!(decode(&before, &delta).expect("not corrupt"), after);
            }
        }
    }

    #[test]
    fn small_changes_of_values_give_small_deltas() {
        let values: Vec<f32> = (0..10_000u16).map(|n| f32::from(n).sin()).collect();
        let bytes =
            |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|n| n.to_le_bytes()).collect() };
        let before = bytes(&values);
        let moved: Vec<f32> = values.iter().map(|n| n * (1.0 + 1e-6)).collect();
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
    fn a_delta_of_another_length_or_a_truncated_one_is_rejected() {
        let delta = encode(&[1; 64], &[2; 64]).expect("it is shorter");
        assert!(encode(&[1; 64], &[1; 65]).is_none());
        let longer = decode(&[1; 80], &delta).expect_err("another length");
        assert_eq!(
            longer.to_string(),
            "a delta for 64 bytes does not fit the 80 bytes it refers to"
        );
        let truncated = decode(&[1; 64], &delta[..delta.len() - 3]).expect_err("truncated");
        assert!(
            truncated.to_string().starts_with("a delta is corrupt"),
            "{truncated}"
        );
        assert!(
            decode(&[1; 8], &delta).is_err(),
            "the planes are longer than the blob"
        );
    }
}
