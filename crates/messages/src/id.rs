//! Ids, versions, seeds and digests: one newtype each, so that none is mistaken for another.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The place of a prompt in the run's own order; also the id of everything made from it, so that a
/// message delivered twice is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PromptId(pub u64);

/// Which weights: of which of a run's sessions, after how many steps. Versions only grow: what a resumed
/// learner publishes is newer than all that was published before it, whatever the step.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct WeightsVersion {
    /// 0 in a run's first session, one more each time the run is resumed.
    pub session: u64,
    /// The learner step after which the weights were taken.
    pub step: u64,
}

impl WeightsVersion {
    /// The reference itself: every run begins with it.
    pub const REFERENCE: Self = Self::at(0);

    /// The version after `step` in a run that was never resumed.
    #[must_use]
    pub const fn at(step: u64) -> Self {
        Self { session: 0, step }
    }
}

/// The version of a judge: it changes whenever the same question may be answered differently.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct JudgeVersion(pub u64);

/// The seed of a random stream. A seed belongs to a message or to the settings, never to a slot, a
/// batch or a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Seed(pub u64);

impl Seed {
    /// The seed of a stream derived from this one: independent for every `stream`.
    ///
    /// SplitMix64's finaliser (Steele, Lea & Flood 2014) over both words.
    #[must_use]
    pub fn derive(self, stream: u64) -> Self {
        let mut z = self.0 ^ stream.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(z ^ (z >> 31))
    }
}

/// A SHA-256 digest, printed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl fmt::Display for PromptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prompt {}", self.0)
    }
}

impl fmt::Display for WeightsVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {}", self.step)?;
        match self.session {
            0 => Ok(()),
            session => write!(f, " of session {session}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_seeds_differ_by_stream_and_by_parent() {
        let mut seen = std::collections::HashSet::new();
        for parent in 0..64 {
            for stream in 0..64 {
                assert!(
                    seen.insert(Seed(parent).derive(stream)),
                    "{parent} {stream}"
                );
            }
        }
    }

    #[test]
    fn a_digest_prints_the_known_sha256_of_abc() {
        assert_eq!(
            Digest::of(b"abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
