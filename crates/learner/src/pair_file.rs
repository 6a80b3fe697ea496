//! Files of labelled pairs: `buffered.pairs` of a checkpoint, and quarantined batches.
//!
//! Pairs follow one another in the wire encoding, each preceded by its length as eight little-endian bytes. Does not
//! know what the pairs are kept for.

use messages::{LabelledPair, wire};

/// Encodes pairs.
pub(crate) fn encode_pairs(pairs: &[LabelledPair]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for pair in pairs {
        let message = wire::encode(pair);
        bytes.extend((message.len() as u64).to_le_bytes());
        bytes.extend(message);
    }
    bytes
}

/// Decodes pairs.
///
/// # Errors
/// If the file is truncated, or a pair has another encoding.
pub(crate) fn decode_pairs(mut bytes: &[u8]) -> Result<Vec<LabelledPair>, String> {
    let mut pairs = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|e| e.to_string())?;
        let message = rest.get(..length).ok_or("the file is truncated")?;
        pairs.push(wire::decode(message).map_err(|error| error.to_string())?);
        bytes = &rest[length..];
    }
    match bytes.is_empty() {
        true => Ok(pairs),
        false => Err("the file is truncated".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_survive_and_a_truncated_file_is_an_error() {
        let pair = crate::micro_batch::tests::labelled(Vec::new());
        let bytes = encode_pairs(&[pair.clone(), pair.clone()]);
        assert_eq!(decode_pairs(&bytes).unwrap(), [pair.clone(), pair]);
        for length in [1, 7, 8, bytes.len() / 2 + 3, bytes.len() - 1] {
            let error = decode_pairs(&bytes[..length]).unwrap_err();
            assert_eq!(error, "the file is truncated", "{length} bytes");
        }
        let mut huge = u64::MAX.to_le_bytes().to_vec();
        huge.push(0);
        assert!(decode_pairs(&huge).is_err());
    }
}
