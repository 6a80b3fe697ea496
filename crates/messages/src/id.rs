//! Ids, versions, seeds and digests: one newtype each, so that the compiler tells them apart.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Index of a prompt in the run's order; also the id of everything derived from it, so that duplicate
/// deliveries are recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PromptId(pub u64);

/// Version of the weights: session and learner step, ordered lexicographically. Versions only increase: what a
/// resumed learner publishes is newer than everything published before, whatever the step.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct WeightsVersion {
    /// Session number: 0 at first, incremented each time the run is resumed.
    pub session: u64,
    /// Learner step after which the weights were copied.
    pub step: u64,
}

impl WeightsVersion {
    /// The reference policy's weights, with which every run begins.
    pub const REFERENCE: Self = Self::at(0);

    /// The version after `step` in a run's first session.
    #[must_use]
    pub const fn at(step: u64) -> Self {
        Self { session: 0, step }
    }
}

/// Version of a judge; changes whenever it may label the same comparison differently.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct JudgeVersion(pub u64);

/// Seed of a random stream. Seeds come from messages or settings, never from a slot, batch or thread, so results
/// do not depend on scheduling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Seed(pub u64);

impl Seed {
    /// Derives an independent seed for each `stream`.
    ///
    /// The finaliser of SplitMix64 (Steele, Lea & Flood 2014) over both 64-bit values.
    #[must_use]
    pub fn derive(self, stream: u64) -> Self {
        let mut z = self.0 ^ stream.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(z ^ (z >> 31))
    }
}

/// A SHA-256 digest, displayed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Digest of `bytes`.
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
