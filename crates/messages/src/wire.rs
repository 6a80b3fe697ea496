//! The wire encoding: a version byte, a kind byte, then the message in postcard.
//!
//! Messages of an unknown version or kind are rejected with a reason, never decoded on a guess.

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{
    pair::{Dropped, LabelledPair, Pair, Stage},
    prompt::Prompt,
    weights::WeightsManifest,
};

/// Version of the encoding; incremented with every change to any message.
pub const VERSION: u8 = 6;

/// Largest encoding of a message in bytes: the largest payload that a NATS server takes. What a message claims to hold
/// is allocated only as far as its bytes reach, so this bounds the memory of decoding too.
pub const MAX_BYTES: usize = 64 * 1024 * 1024;

/// A message type with a wire encoding.
pub trait WireMessage: Serialize + DeserializeOwned {
    /// Kind byte, unique to the type.
    const KIND: u8;
    /// Name in errors.
    const NAME: &'static str;

    /// Id, unique among messages of this type in a run. A message that is sent again has the same id, so that the
    /// server can deduplicate it.
    fn id(&self) -> String;

    /// The stage in whose name it is sent, where several stages send messages of this type. It is a part of the
    /// message's subject, for which the server gives permission.
    fn sender(&self) -> Option<Stage> {
        None
    }
}

macro_rules! messages {
    ($($type:ident = $kind:literal $(by $stage:ident)?: |$message:ident| $id:expr),* $(,)?) => {
        $(impl WireMessage for $type {
            const KIND: u8 = $kind;
            const NAME: &'static str = stringify!($type);

            fn id(&self) -> String {
                let $message = self;
                $id
            }

            $(fn sender(&self) -> Option<Stage> {
                Some(self.$stage)
            })?
        })*
    };
}

messages!(
    Prompt = 1: |prompt| format!("{}-{}", prompt.version.session, prompt.id.0),
    Pair = 2: |pair| pair.prompt.id(),
    LabelledPair = 3: |labelled| labelled.pair.prompt.id(),
    Dropped = 4 by stage: |note| format!("{}-{}-{}", note.session, note.prompt.0, note.stage.name()),
    WeightsManifest = 5: |manifest| format!("{}-{}", manifest.version.session, manifest.version.step),
);

/// Reason why bytes cannot be decoded as the expected message.
#[derive(Debug, Error)]
pub enum WireError {
    /// Fewer than two bytes.
    #[error("{expected}: {length} bytes are too few for a message")]
    Short {
        /// Name of the expected message.
        expected: &'static str,
        /// Number of bytes.
        length: usize,
    },
    /// More bytes than any message has.
    #[error("{expected}: {length} bytes are too many for a message; it has at most {MAX_BYTES}")]
    Long {
        /// Name of the expected message.
        expected: &'static str,
        /// Number of bytes.
        length: usize,
    },
    /// Encoded by an incompatible build.
    #[error(
        "{expected}: encoded as version {found}, this build reads version {VERSION}; run one build everywhere"
    )]
    Version {
        /// Name of the expected message.
        expected: &'static str,
        /// Version byte found.
        found: u8,
    },
    /// A message of another type.
    #[error("{expected}: the bytes hold a message of kind {found}")]
    Kind {
        /// Name of the expected message.
        expected: &'static str,
        /// Kind byte found.
        found: u8,
    },
    /// A truncated or malformed body, or trailing bytes.
    #[error("{expected}: {reason}")]
    Body {
        /// Name of the expected message.
        expected: &'static str,
        /// Message of the decoder.
        reason: String,
    },
}

/// Encodes a message.
///
/// # Panics
/// Never: all field types are serialisable by postcard.
pub fn encode<M: WireMessage>(message: &M) -> Vec<u8> {
    postcard::to_extend(message, vec![VERSION, M::KIND])
        .expect("all fields are serialisable by postcard, and a Vec grows")
}

/// Decodes a message.
///
/// # Errors
/// When the version or type differs, or the bytes are truncated, malformed or longer than the message.
pub fn decode<M: WireMessage>(bytes: &[u8]) -> Result<M, WireError> {
    let expected = M::NAME;
    let [version, kind, body @ ..] = bytes else {
        return Err(WireError::Short {
            expected,
            length: bytes.len(),
        });
    };
    if bytes.len() > MAX_BYTES {
        return Err(WireError::Long {
            expected,
            length: bytes.len(),
        });
    }
    if *version != VERSION {
        return Err(WireError::Version {
            expected,
            found: *version,
        });
    }
    if *kind != M::KIND {
        return Err(WireError::Kind {
            expected,
            found: *kind,
        });
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(WireError::Body {
            expected,
            reason: format!("{} bytes too many", rest.len()),
        }),
        Err(error) => Err(WireError::Body {
            expected,
            reason: error.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::*;

    fn pair(ids: &[u32], text: &str, p: f32) -> LabelledPair {
        let prompt = Prompt {
            id: PromptId(7),
            prompt_batch: PromptBatch::single(PromptId(7)),
            purpose: Purpose::Train,
            version: WeightsVersion::at(3),
            seed: Seed(11),
            ids: ids.to_vec(),
            text: text.into(),
            dialogue: Some(crate::Dialogue::of_user("a \" b")),
            golden: Some(ids.to_vec()),
            answer: None,
            route: None,
        };
        let completion = Completion {
            ids: ids.to_vec(),
            finish: Finish::Length,
            mixture_coef: 0.125,
            logp: vec![-1.5; ids.len()],
            ref_logp: vec![-2.5; ids.len()],
            behaviour_logp: vec![-0.5; ids.len()],
            text: text.into(),
        };
        let pair = Pair {
            prompt,
            version: WeightsVersion::at(4),
            completions: vec![completion.clone(), completion],
            actor: "actor-0".into(),
        };
        let p = Probability::new(p).expect("a probability");
        LabelledPair {
            pair,
            labels: vec![Label {
                first: 0,
                second: 1,
                p,
                judged: None,
            }],
            judge: "gold".into(),
            judge_version: JudgeVersion(1),
            scores: Some(vec![0.5, -1.0]),
            verdicts: vec![EvaluationVerdict {
                judge: GOLD.into(),
                p,
            }],
        }
    }

    proptest! {
        #[test]
        fn decoding_inverts_encoding(ids: Vec<u32>, text: String, p in 0f32..=1.0) {
            let message = pair(&ids, &text, p);
            prop_assert_eq!(decode::<LabelledPair>(&encode(&message)).expect("decodes"), message);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic_the_decoder(bytes: Vec<u8>) {
            prop_assert!(decode::<LabelledPair>(&bytes).is_ok() || decode::<LabelledPair>(&bytes).is_err());
        }
    }

    #[test]
    fn invalid_bytes_are_rejected_with_the_reason() {
        let good = encode(&pair(&[1, 2], "x", 0.5));
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        let longer = [good.as_slice(), &[0]].concat();
        let cases = [
            (vec![], "too few"),
            (with(0, 9), "encoded as version 9, this build reads version"),
            (
                with(1, 1),
                "holds a message of kind 1".trim_start_matches("holds "),
            ),
            (good[..good.len() - 1].to_vec(), "LabelledPair: "),
            (longer, "1 bytes too many"),
        ];
        for (bytes, expected) in cases {
            let message = decode::<LabelledPair>(&bytes)
                .expect_err(expected)
                .to_string();
            assert!(
                message.contains(expected),
                "{message:?} does not contain {expected:?}"
            );
        }
    }

    #[test]
    fn a_length_prefix_alone_allocates_nothing() {
        let prompt = &pair(&[1, 2], "x", 0.5).pair.prompt;
        let good = encode(prompt);
        let lengths = [u64::from(u32::MAX), 1 << 40, u64::MAX >> 1];
        for at in 2..good.len() {
            for length in lengths {
                let prefix = postcard::to_allocvec(&length).expect("a number");
                let bytes = [&good[..at], &prefix, &good[at + 1..]].concat();
                // Terabytes would abort the test.
                drop(decode::<Prompt>(&bytes));
            }
        }
        let long = vec![VERSION; MAX_BYTES + 1];
        let message = decode::<Prompt>(&long).expect_err("too long").to_string();
        assert!(message.contains("too many for a message"), "{message}");
    }

    #[test]
    fn a_probability_out_of_range_is_rejected() {
        let mut bytes = encode(&pair(&[], "", 0.5));
        let half = 0.5f32.to_le_bytes();
        let at = bytes
            .windows(4)
            .rposition(|w| w == half)
            .expect("the gold preference is encoded");
        bytes[at..at + 4].copy_from_slice(&2.0f32.to_le_bytes());
        assert!(decode::<LabelledPair>(&bytes).is_err());
    }
}
