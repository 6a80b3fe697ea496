//! The one wire encoding: a version byte, a kind byte, then the message in postcard.
//!
//! A message whose version or kind is not ours is refused with its reason; it is never guessed at.

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{Dropped, LabelledPair, Pair, Prompt, WeightsManifest};

/// The version of the encoding. It changes with any change to any message.
pub const VERSION: u8 = 3;

/// A noun with a place in the encoding.
pub trait Message: Serialize + DeserializeOwned {
    /// The byte that tells it from the others.
    const KIND: u8;
    /// Its name in errors.
    const NAME: &'static str;

    /// What tells this message from all others of its kind in a run: a message that is sent again has
    /// the same id.
    fn id(&self) -> String;
}

macro_rules! messages {
    ($($noun:ident = $kind:literal: |$message:ident| $id:expr),* $(,)?) => {
        $(impl Message for $noun {
            const KIND: u8 = $kind;
            const NAME: &'static str = stringify!($noun);

            fn id(&self) -> String {
                let $message = self;
                $id
            }
        })*
    };
}

messages!(
    Prompt = 1: |prompt| format!("{}-{}", prompt.version.session, prompt.id.0),
    Pair = 2: |pair| pair.prompt.id(),
    LabelledPair = 3: |labelled| labelled.pair.prompt.id(),
    Dropped = 4: |note| format!("{}-{}-{}", note.session, note.prompt.0, note.station.name()),
    WeightsManifest = 5: |manifest| format!("{}-{}", manifest.version.session, manifest.version.step),
);

/// Why bytes are not the message that was expected.
#[derive(Debug, Error)]
pub enum WireError {
    /// Fewer than two bytes.
    #[error("{expected}: {length} bytes are too few for a message")]
    Short {
        /// What was expected.
        expected: &'static str,
        /// How many bytes came.
        length: usize,
    },
    /// Another build's encoding.
    #[error(
        "{expected}: encoded as version {found}, this build reads version {VERSION}; run one build everywhere"
    )]
    Version {
        /// What was expected.
        expected: &'static str,
        /// The version byte that came.
        found: u8,
    },
    /// Another noun.
    #[error("{expected}: the bytes hold a message of kind {found}")]
    Kind {
        /// What was expected.
        expected: &'static str,
        /// The kind byte that came.
        found: u8,
    },
    /// The right noun, but torn or with bytes to spare.
    #[error("{expected}: {reason}")]
    Body {
        /// What was expected.
        expected: &'static str,
        /// What the decoder says.
        reason: String,
    },
}

/// The message as bytes.
///
/// # Panics
/// Never: messages hold nothing that postcard cannot write.
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    postcard::to_extend(message, vec![VERSION, M::KIND])
        .expect("messages hold only what postcard writes, and a Vec does not run out")
}

/// The message that `bytes` hold.
///
/// # Errors
/// When the bytes are another version's, another noun's, torn, or longer than the message.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<M, WireError> {
    let expected = M::NAME;
    let [version, kind, body @ ..] = bytes else {
        return Err(WireError::Short {
            expected,
            length: bytes.len(),
        });
    };
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
            release: Release::single(PromptId(7)),
            purpose: Purpose::Train,
            version: WeightsVersion::at(3),
            seed: Seed(11),
            ids: ids.to_vec(),
            text: text.into(),
            dialogue: Some(crate::Dialogue::of_user("a \" b")),
            golden: Some(ids.to_vec()),
            answer: None,
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
            }],
            judge: "gold".into(),
            judge_version: JudgeVersion(1),
            scores: Some(vec![0.5, -1.0]),
            gold: Some(p),
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(ids: Vec<u32>, text: String, p in 0f32..=1.0) {
            let message = pair(&ids, &text, p);
            prop_assert_eq!(decode::<LabelledPair>(&encode(&message)).expect("decodes"), message);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
            prop_assert!(decode::<LabelledPair>(&bytes).is_ok() || decode::<LabelledPair>(&bytes).is_err());
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_with_the_reason() {
        let good = encode(&pair(&[1, 2], "x", 0.5));
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        let longer = [good.as_slice(), &[0]].concat();
        let cases = [
            (vec![], "too few"),
            (
                with(0, 9),
                "encoded as version 9, this build reads version 3",
            ),
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
                "{message:?} does not say {expected:?}"
            );
        }
    }

    #[test]
    fn a_probability_outside_its_range_is_refused() {
        let mut bytes = encode(&pair(&[], "", 0.5));
        let half = 0.5f32.to_le_bytes();
        let at = bytes
            .windows(4)
            .rposition(|w| w == half)
            .expect("the gold preference is there");
        bytes[at..at + 4].copy_from_slice(&2.0f32.to_le_bytes());
        assert!(decode::<LabelledPair>(&bytes).is_err());
    }
}
