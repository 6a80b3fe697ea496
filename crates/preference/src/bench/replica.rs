//! What the bench asks: replicas of one judge, each on a thread of this process or behind a URL.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use messages::JudgeVersion;

use super::Question;
use crate::judge_thread::JudgeThread;
use crate::{Judge, JudgeError, PreferenceError, Verdict};

/// One of several that answer alike. It is asked from async code and computes nowhere but on threads
/// of its own.
pub trait Replica: Send + Sync {
    /// What tells it from its fellows in logs: a thread's name, a URL.
    fn name(&self) -> &str;

    /// How many batches it may be at together; at least 1.
    fn concurrency(&self) -> usize {
        1
    }

    /// The largest batch that it takes; at least 1.
    fn max_batch(&self) -> usize {
        usize::MAX
    }

    /// One answer for every question of `batch`, in its order. A future that is dropped has given the
    /// batch up.
    ///
    /// Fails when the batch as a whole got no answer; [`JudgeError::kind`] says what may be done. A
    /// question that alone has no answer is abstained from.
    fn ask<'a>(&'a self, batch: &'a [Question]) -> BoxFuture<'a, Result<Vec<Answer>, JudgeError>>;
}

/// A verdict and the version of the judge that gave it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What was said.
    pub verdict: Verdict,
    /// By which version.
    pub version: JudgeVersion,
    /// The scores of the first and the second completion, where the judge has scores.
    pub scores: Option<[f32; 2]>,
}

impl Answer {
    /// An answer of a judge without scores.
    #[must_use]
    pub fn new(verdict: Verdict, version: JudgeVersion) -> Self {
        Self {
            verdict,
            version,
            scores: None,
        }
    }
}

/// A judge as the bench has it: replicas that answer alike, and what is true of all of them.
#[derive(Clone)]
pub struct Judges {
    /// The judge's name in labels and metrics.
    pub name: String,
    /// The version of all their answers; `None` when only an answer tells it, as with services
    /// elsewhere: then no verdict is remembered.
    pub version: Option<JudgeVersion>,
    /// Whether p(first ≻ second) = 1 − p(second ≻ first) by construction.
    pub is_antisymmetric: bool,
    /// Whoever is asked, at least one.
    pub replicas: Vec<Arc<dyn Replica>>,
}

/// Makes a judge again after it has panicked, on the thread that will own it.
pub type Rebuild = Arc<dyn Fn() -> Result<Box<dyn Judge>, JudgeError> + Send + Sync>;

impl Judges {
    /// Judges that compute, each on a named thread of its own. One that panics is made again by
    /// `rebuild`; without it, it is not asked again.
    ///
    /// # Errors
    /// When a thread cannot be started.
    ///
    /// # Panics
    /// When there is no judge.
    pub fn computing(
        judges: Vec<Box<dyn Judge>>,
        rebuild: Option<&Rebuild>,
    ) -> Result<Self, PreferenceError> {
        let first = judges.first().expect("a bench has at least one judge");
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
            replicas: replicas.collect::<Result<_, PreferenceError>>()?,
        })
    }
}
