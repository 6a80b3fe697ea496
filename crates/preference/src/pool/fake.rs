//! Replica for tests: no thread, configurable answers, recorded batches.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use messages::JudgeVersion;

use crate::error::JudgeError;
use crate::judge::Verdict;
use crate::judge::fake::{pair, preferred};
use crate::pool::{
    ComparisonRequest, JudgePool, JudgeReplicas, PoolSettings, Replica, VersionedVerdict,
};

type BatchAnswerFn = dyn FnMut(&[ComparisonRequest]) -> Result<Vec<Verdict>, JudgeError> + Send;

/// Answers batches with a closure after a delay.
pub(crate) struct FakeReplica {
    answer_batch: Mutex<Box<BatchAnswerFn>>,
    delay: Duration,
    concurrency: usize,
    max_batch: usize,
    batches: RecordedBatches,
}

/// Texts of the first completions of every batch.
#[derive(Clone, Default)]
pub(crate) struct RecordedBatches(Arc<Mutex<Vec<Vec<String>>>>);

impl RecordedBatches {
    pub(crate) fn texts(&self) -> Vec<Vec<String>> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.texts().iter().map(Vec::len).collect()
    }
}

impl FakeReplica {
    pub(crate) fn new(
        answer: impl FnMut(&[ComparisonRequest]) -> Result<Vec<Verdict>, JudgeError> + Send + 'static,
    ) -> Self {
        Self {
            answer_batch: Mutex::new(Box::new(answer)),
            delay: Duration::ZERO,
            concurrency: 1,
            max_batch: usize::MAX,
            batches: RecordedBatches::default(),
        }
    }

    /// Answers ½ to every request.
    pub(crate) fn even() -> Self {
        Self::new(|batch| Ok(vec![preferred(0.5); batch.len()]))
    }

    /// Fails with `errors` in turn, then answers ½.
    pub(crate) fn failing(errors: impl IntoIterator<Item = JudgeError>) -> Self {
        let mut errors: Vec<_> = errors.into_iter().collect();
        errors.reverse();
        Self::new(move |batch| match errors.pop() {
            Some(error) => Err(error),
            None => Ok(vec![preferred(0.5); batch.len()]),
        })
    }

    pub(crate) fn delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    pub(crate) fn concurrency(self, concurrency: usize) -> Self {
        Self {
            concurrency,
            ..self
        }
    }

    pub(crate) fn max_batch(self, max_batch: usize) -> Self {
        Self { max_batch, ..self }
    }

    pub(crate) fn batches(&self) -> RecordedBatches {
        self.batches.clone()
    }
}

impl Replica for FakeReplica {
    fn name(&self) -> &str {
        "fake"
    }

    fn concurrency(&self) -> usize {
        self.concurrency
    }

    fn max_batch(&self) -> usize {
        self.max_batch
    }

    fn judge<'a>(
        &'a self,
        batch: &'a [ComparisonRequest],
    ) -> BoxFuture<'a, Result<Vec<VersionedVerdict>, JudgeError>> {
        let texts = batch
            .iter()
            .map(|request| request.comparison().first.text.clone());
        self.batches.0.lock().unwrap().push(texts.collect());
        Box::pin(async move {
            // A zero sleep would last until the next timer tick.
            if !self.delay.is_zero() {
                tokio::time::sleep(self.delay).await;
            }
            let verdicts = (*self.answer_batch.lock().unwrap())(batch)?.into_iter();
            let version = JudgeVersion(7);
            Ok(verdicts
                .map(|verdict| VersionedVerdict::new(verdict, version))
                .collect())
        })
    }
}

/// A judge with these replicas.
pub(crate) fn judges(replicas: impl IntoIterator<Item = FakeReplica>) -> JudgeReplicas {
    let replica = |replica| Arc::new(replica) as Arc<dyn Replica>;
    JudgeReplicas {
        name: "fake".into(),
        version: Some(JudgeVersion(7)),
        is_antisymmetric: false,
        digest: None,
        replicas: replicas.into_iter().map(replica).collect(),
    }
}

/// A pool of one judge with these replicas.
pub(crate) fn pool(
    replicas: impl IntoIterator<Item = FakeReplica>,
    settings: PoolSettings,
) -> JudgePool {
    JudgePool::new(judges(replicas), settings)
}

impl JudgePool {
    /// Number of requests that the queue has room for.
    pub(crate) fn free_permits(&self) -> usize {
        self.inner.admission.available_permits()
    }
}

/// Settings with single-request batches that do not wait, and without a cache.
pub(crate) fn settings() -> PoolSettings {
    PoolSettings {
        max_batch: 1,
        max_wait: Duration::from_millis(2),
        max_queue: 64,
        tie_margin: 0.0,
        max_order_gap: 1.0,
        cache_size: 0,
        timeout: Duration::from_secs(60),
        max_retries: 3,
        retry_base: Duration::from_millis(100),
        circuit_failures: 5,
        circuit_probe: Duration::from_secs(5),
    }
}

/// A comparison of completions with these texts.
pub(crate) fn request(first: &str, second: &str) -> ComparisonRequest {
    ComparisonRequest::new(Arc::new(pair(0, &[first, second])), 0, 1)
}
