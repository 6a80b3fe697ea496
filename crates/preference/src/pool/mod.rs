//! The judge pool: batching, caching, retries and circuit breaking over replicas of one judge.
//!
//! Callers [compare](JudgePool::compare) concurrently. The pool caches verdicts, forms batches, compares in both orders
//! to cancel position bias, retries on other replicas, opens the circuit breaker of a failing replica, and limits its
//! queue.
//!
//! Promises: every request gets a [`Preference`] or an error that says why not; while no replica is available it
//! waits. Requests made before new replicas were [installed](JudgePool::install) are answered by the old ones.
//! Does not know what a judge computes, or what preferences are used for.

mod cache;
mod circuit_breaker;
mod comparison;
mod composed;
mod dispatcher;
#[cfg(test)]
pub(crate) mod fake;
mod metrics;
mod order_swap;
mod outage;
mod position_bias;
mod replica;
mod replica_pause;
mod replica_set;
mod settings;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use crate::error::ComparisonError;
use crate::judge::Verdict;
use cache::VerdictCache;
use dispatcher::{Dispatcher, PendingRequest};
use metrics::PoolMetrics;
use outage::OutagePublisher;
use position_bias::PositionBiasMonitor;

pub use comparison::ComparisonRequest;
pub use composed::Composition;
pub use order_swap::{Orders, Preference};
pub use outage::{Outage, OutageCause};
pub use replica::{JudgeReplicas, Rebuild, Replica, VersionedVerdict};
pub use settings::PoolSettings;

/// A pool of judge replicas. Clones share the pool. Its dispatcher runs in the tokio runtime that created the pool.
#[derive(Clone)]
pub struct JudgePool {
    inner: Arc<PoolInner>,
}

struct PoolInner {
    settings: PoolSettings,
    /// One permit per free place in the queue.
    admission: Arc<Semaphore>,
    cache: VerdictCache,
    metrics: Arc<PoolMetrics>,
    position_bias: PositionBiasMonitor,
    outages: OutagePublisher,
    current: Mutex<Arc<Generation>>,
}

/// A replica set and the queue of its dispatcher, which ends after the last caller that holds the generation.
struct Generation {
    judges: JudgeReplicas,
    queue: mpsc::Sender<PendingRequest>,
}

/// Admission of one request to the queue.
enum Permit {
    /// To be acquired, however long that takes.
    Wait,
    /// Acquired; `None` for a request that shares the permit of another one of its call.
    Held(Option<OwnedSemaphorePermit>),
}

impl JudgePool {
    /// A pool of these replicas; spawns its dispatcher in the current runtime.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    #[must_use]
    pub fn new(judges: JudgeReplicas, settings: PoolSettings) -> Self {
        let metrics = Arc::new(PoolMetrics::new(&judges.name));
        let outages = OutagePublisher::new();
        let generation = Generation::new(judges, settings, &metrics, outages.next_generation());
        Self {
            inner: Arc::new(PoolInner {
                settings,
                admission: Arc::new(Semaphore::new(settings.max_queue.max(1))),
                cache: VerdictCache::new(settings.cache_size),
                metrics,
                position_bias: PositionBiasMonitor::default(),
                outages,
                current: Mutex::new(Arc::new(generation)),
            }),
        }
    }

    /// Replaces the replicas, for example by a newer version, without blocking. Earlier requests are answered by the
    /// previous replicas, whose threads end after the last of them.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    pub fn install(&self, judges: JudgeReplicas) {
        let inner = &self.inner;
        let mut current = inner.current();
        let outages = inner.outages.next_generation();
        inner.metrics.circuit(false);
        let next = Generation::new(judges, inner.settings, &inner.metrics, outages);
        *current = Arc::new(next);
    }

    /// Name of the judge.
    #[must_use]
    pub fn name(&self) -> String {
        self.inner.current().judges.name.clone()
    }

    /// Version of the judge, where it is known before the first answer.
    #[must_use]
    pub fn version(&self) -> Option<messages::JudgeVersion> {
        self.inner.current().judges.version
    }

    /// Digest of what determines the judge's verdicts, where it is known.
    #[must_use]
    pub fn digest(&self) -> Option<messages::Digest> {
        self.inner.current().judges.digest
    }

    /// Whether p(first ≻ second) = 1 − p(second ≻ first) by construction.
    pub(crate) fn is_antisymmetric(&self) -> bool {
        self.inner.current().judges.is_antisymmetric
    }

    /// Settings of the pool.
    #[must_use]
    pub fn settings(&self) -> &PoolSettings {
        &self.inner.settings
    }

    /// The current outage: `Some` while no replica can be asked.
    #[must_use]
    pub fn outage(&self) -> watch::Receiver<Option<Outage>> {
        self.inner.outages.subscribe()
    }

    /// Preference on `request`. Waits for admission while the queue is full, and in the queue while no replica is
    /// available.
    ///
    /// # Errors
    /// When the request used up its retries while the judge answered others, or when no replica is left.
    pub async fn compare(
        &self,
        request: &ComparisonRequest,
        orders: Orders,
    ) -> Result<Preference, ComparisonError> {
        let generation = self.inner.generation();
        self.inner
            .compare(&generation, request, orders, &mut || Permit::Wait)
            .await
    }

    /// Preferences on all `requests` from one generation of replicas, each as [`Self::compare`] gives it.
    pub async fn compare_all(
        &self,
        requests: &[ComparisonRequest],
        orders: Orders,
    ) -> Vec<Result<Preference, ComparisonError>> {
        let generation = &self.inner.generation();
        let compare = |request| async move {
            self.inner
                .compare(generation, request, orders, &mut || Permit::Wait)
                .await
        };
        join_all(requests.iter().map(compare)).await
    }

    /// Preferences on all `requests` or none, without waiting for admission. More requests than the queue holds are
    /// admitted when the queue is empty.
    ///
    /// # Errors
    /// As [`Self::compare`]; also when the queue has no room for all of them now, or after `limit`.
    pub async fn compare_within(
        &self,
        limit: Duration,
        requests: &[ComparisonRequest],
        orders: Orders,
    ) -> Result<Vec<Preference>, ComparisonError> {
        let inner = &self.inner;
        let generation = &inner.generation();
        let permits = inner.try_admit(requests.len() * orders.count())?;
        let permits = &Mutex::new(permits);
        let compare = |request| async move {
            let mut held = || {
                let mut permits = permits.lock().unwrap_or_else(PoisonError::into_inner);
                Permit::Held(permits.split(1))
            };
            inner.compare(generation, request, orders, &mut held).await
        };
        let preferences = timeout(limit, try_join_all(requests.iter().map(compare))).await;
        preferences.unwrap_or_else(|_| {
            let outage = inner.outages.current();
            Err(ComparisonError::TimedOut {
                timeout: limit,
                reason: outage.map(|outage| outage.to_string()),
            })
        })
    }
}

impl Generation {
    fn new(
        judges: JudgeReplicas,
        settings: PoolSettings,
        metrics: &Arc<PoolMetrics>,
        outages: OutagePublisher,
    ) -> Self {
        // As many places as permits: an admitted request never waits here.
        let (queue, requests) = mpsc::channel(settings.max_queue.max(1));
        let dispatcher = Dispatcher::new(judges.clone(), settings, Arc::clone(metrics), outages);
        tokio::spawn(dispatcher.run(requests));
        Self { judges, queue }
    }
}

impl PoolInner {
    fn current(&self) -> MutexGuard<'_, Arc<Generation>> {
        // Each change is one assignment: the value is valid even after a panic.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn generation(&self) -> Arc<Generation> {
        Arc::clone(&self.current())
    }

    /// Permits for `requests` requests, or at most for the whole queue; fails instead of waiting.
    fn try_admit(&self, requests: usize) -> Result<OwnedSemaphorePermit, ComparisonError> {
        let count = requests.min(self.settings.max_queue.max(1));
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let permits = Arc::clone(&self.admission).try_acquire_many_owned(count);
        permits.map_err(|_| ComparisonError::QueueFull {
            waiting: self.settings.max_queue - self.admission.available_permits(),
        })
    }

    async fn compare(
        &self,
        generation: &Generation,
        request: &ComparisonRequest,
        orders: Orders,
        permit: &mut (dyn FnMut() -> Permit + Send),
    ) -> Result<Preference, ComparisonError> {
        let start = Instant::now();
        let margins = self.settings.margins();
        let one_order = orders == Orders::One || generation.judges.is_antisymmetric;
        let preference = if one_order {
            let verdict = self.verdict(generation, request, permit()).await?;
            if request.has_random_order() {
                self.observe_order(&generation.judges, &[&verdict.verdict]);
            }
            Preference::one_sided(verdict, margins)
        } else {
            let swapped = request.swapped();
            let (forward, backward) = tokio::try_join!(
                self.verdict(generation, request, permit()),
                self.verdict(generation, &swapped, permit()),
            )?;
            let verdicts = [&forward.verdict, &backward.verdict];
            self.observe_order(&generation.judges, &verdicts);
            Preference::two_sided(forward, backward, margins)
        };
        self.metrics.preference(&preference, start.elapsed());
        Ok(preference)
    }

    /// Measures the position bias with verdicts on a random order, or on both.
    fn observe_order(&self, judges: &JudgeReplicas, verdicts: &[&Verdict]) {
        if judges.is_antisymmetric {
            return;
        }
        if let Some(bias) = self.position_bias.observe(&judges.name, verdicts) {
            self.metrics.position_bias(bias);
        }
    }

    /// Verdict on a request in its own order, from the cache or from a replica.
    async fn verdict(
        &self,
        generation: &Generation,
        request: &ComparisonRequest,
        permit: Permit,
    ) -> Result<VersionedVerdict, ComparisonError> {
        let lookup = self.cache.lookup(&generation.judges, request);
        if let Some(verdict) = self.cache.get(&lookup) {
            self.metrics.cache_hit();
            return Ok(verdict);
        }
        let permit = match permit {
            Permit::Held(permit) => permit,
            Permit::Wait => {
                let admission = Arc::clone(&self.admission);
                // The semaphore is never closed.
                admission.acquire_owned().await.ok()
            }
        };
        let (reply, verdict) = oneshot::channel();
        let pending = PendingRequest::new(lookup.request.clone(), permit, reply);
        // Without a dispatcher the request is dropped, and its reply channel with it.
        drop(generation.queue.send(pending).await);
        let verdict = verdict.await.unwrap_or_else(|_| {
            Err(ComparisonError::NoJudge {
                judge: generation.judges.name.clone(),
                reason: "the runtime of the judge pool has ended".into(),
            })
        })?;
        Ok(self.cache.put(&lookup, verdict))
    }
}
