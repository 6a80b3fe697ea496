//! Replicas of a judge: on a thread of this process, or behind a URL.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use messages::{Digest, JudgeVersion};

use crate::error::{JudgeError, PreferenceError};
use crate::judge::{Judge, Verdict};
use crate::judge_thread::JudgeThread;
use crate::pool::ComparisonRequest;

/// A replica of a judge. Called from async code; computes only on threads of its own.
pub trait Replica: Send + Sync {
    /// Identifies the replica in logs: a thread's name or a URL.
    fn name(&self) -> &str;

    /// Largest number of concurrent batches, at least 1.
    fn concurrency(&self) -> usize {
        1
    }

    /// Largest batch, at least 1 request.
    fn max_batch(&self) -> usize {
        usize::MAX
    }

    /// Number that changes when another judge answers under the same version, which a remote judge may do: verdicts of
    /// one revision are not cached for another.
    fn revision(&self) -> u64 {
        0
    }

    /// One verdict for every request of `batch`, in its order. Dropping the future abandons the batch.
    ///
    /// Fails when the whole batch failed; [`JudgeError::kind`] says whether to retry. A single request that cannot be
    /// answered gets an abstention.
    fn judge<'a>(
        &'a self,
        batch: &'a [ComparisonRequest],
    ) -> BoxFuture<'a, Result<Vec<VersionedVerdict>, JudgeError>>;
}

/// A verdict and the version of the judge that gave it.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionedVerdict {
    /// The verdict.
    pub verdict: Verdict,
    /// Version of the judge.
    pub version: JudgeVersion,
    /// Scores of the first and the second completion, where the judge has scores.
    pub scores: Option<[f32; 2]>,
}

impl VersionedVerdict {
    /// A verdict without scores.
    #[must_use]
    pub fn new(verdict: Verdict, version: JudgeVersion) -> Self {
        Self {
            verdict,
            version,
            scores: None,
        }
    }
}

/// Equivalent replicas of one judge, and their common properties.
#[derive(Clone)]
pub struct JudgeReplicas {
    /// Name of the judge in labels and metrics.
    pub name: String,
    /// Version of all their verdicts; `None` when only a verdict carries it, as with remote services: then nothing is
    /// cached.
    pub version: Option<JudgeVersion>,
    /// Whether p(first ≻ second) = 1 − p(second ≻ first) by construction.
    pub is_antisymmetric: bool,
    /// Digest of what determines the verdicts of this version, for clients of the HTTP service; `None` where it is not
    /// known.
    pub digest: Option<Digest>,
    /// At least one replica.
    pub replicas: Vec<Arc<dyn Replica>>,
}

/// Rebuilds a judge after a panic, on the thread that will own it.
pub type Rebuild = Arc<dyn Fn() -> Result<Box<dyn Judge>, JudgeError> + Send + Sync>;

impl JudgeReplicas {
    /// Judges on named threads of their own. One that panics is rebuilt by `rebuild`; without it, its replica is dead.
    ///
    /// # Errors
    /// When a thread cannot be started.
    ///
    /// # Panics
    /// When `judges` is empty.
    pub fn on_threads(
        judges: Vec<Box<dyn Judge>>,
        rebuild: Option<&Rebuild>,
    ) -> Result<Self, PreferenceError> {
        let first = judges.first().expect("a pool has at least one judge");
        let name = first.name().to_owned();
        let version = first.version();
        let is_antisymmetric = first.is_antisymmetric();
        let replicas = judges.into_iter().enumerate().map(|(index, judge)| {
            let thread = JudgeThread::start(index, judge, rebuild.cloned())?;
            Ok(Arc::new(thread) as Arc<dyn Replica>)
        });
        Ok(Self {
            name,
            version: Some(version),
            is_antisymmetric,
            digest: None,
            replicas: replicas.collect::<Result<_, PreferenceError>>()?,
        })
    }

    /// Revision of all replicas, which share it.
    pub(crate) fn revision(&self) -> u64 {
        self.replicas
            .first()
            .map_or(0, |replica| replica.revision())
    }
}
