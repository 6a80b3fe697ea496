//! Dispatches requests to replicas: batching, retries, circuit breaking.
//!
//! One task per generation of replicas. It owns the queue and the state of the replicas, so nothing is locked. It ends
//! when all senders of its queue are dropped and all requests are answered.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use rand::Rng;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::error::{ComparisonError, JudgeError, JudgeErrorKind};
use crate::judge::Verdict;
use crate::pool::circuit_breaker::CircuitBreakerLimits;
use crate::pool::metrics::PoolMetrics;
use crate::pool::outage::{Outage, OutageCause, OutagePublisher};
use crate::pool::replica_set::{ReplicaChoice, ReplicaSet};
use crate::pool::{ComparisonRequest, JudgeReplicas, PoolSettings, VersionedVerdict};

/// Shortest time between two lines of the log about pauses.
const PAUSE_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// A queued request.
pub(crate) struct PendingRequest {
    request: ComparisonRequest,
    reply: oneshot::Sender<Result<VersionedVerdict, ComparisonError>>,
    /// Place of the request in the queue, released when it is first sent to a replica.
    permit: Option<OwnedSemaphorePermit>,
    queued_at: Instant,
    /// Failed attempts.
    failures: usize,
    /// Failed attempts that count against the retry limit.
    counted_failures: usize,
    /// [`Dispatcher::answered`] at the last failure, or at the first attempt.
    answered_before: Option<u64>,
    /// Replica that failed last.
    avoided: Option<usize>,
    /// Whether it is sent in a batch of its own, because a batch with it failed permanently or panicked.
    is_alone: bool,
}

impl PendingRequest {
    pub(crate) fn new(
        request: ComparisonRequest,
        permit: Option<OwnedSemaphorePermit>,
        reply: oneshot::Sender<Result<VersionedVerdict, ComparisonError>>,
    ) -> Self {
        Self {
            request,
            reply,
            permit,
            queued_at: Instant::now(),
            failures: 0,
            counted_failures: 0,
            answered_before: None,
            avoided: None,
            is_alone: false,
        }
    }

    /// Replies to the caller, which may have dropped its receiver.
    fn reply(self, verdict: Result<VersionedVerdict, ComparisonError>) {
        drop(self.reply.send(verdict));
    }
}

/// Queue and replicas of one generation.
pub(crate) struct Dispatcher {
    judges: JudgeReplicas,
    settings: PoolSettings,
    metrics: Arc<PoolMetrics>,
    outages: OutagePublisher,
    replicas: ReplicaSet,
    waiting: VecDeque<PendingRequest>,
    /// Batches sent to replicas.
    in_flight: FuturesUnordered<BoxFuture<'static, CompletedBatch>>,
    /// Requests in backoff between a failure and the next attempt.
    backing_off: FuturesUnordered<BoxFuture<'static, PendingRequest>>,
    /// Number of batches answered so far.
    answered: u64,
    last_failure: String,
    /// Time at which a pause was logged last.
    pause_logged: Option<Instant>,
}

/// A batch with its result.
struct CompletedBatch {
    replica: usize,
    /// Whether it was the probe of an open circuit breaker.
    is_probe: bool,
    batch: Vec<PendingRequest>,
    verdicts: Result<Vec<VersionedVerdict>, JudgeError>,
}

/// A failed attempt.
struct FailedAttempt<'a> {
    replica: usize,
    is_probe: bool,
    error: &'a JudgeError,
}

impl Dispatcher {
    pub(crate) fn new(
        judges: JudgeReplicas,
        settings: PoolSettings,
        metrics: Arc<PoolMetrics>,
        outages: OutagePublisher,
    ) -> Self {
        let limits = CircuitBreakerLimits {
            failures: settings.circuit_failures,
            probe_after: settings.circuit_probe,
        };
        Self {
            replicas: ReplicaSet::new(&judges.replicas, limits),
            judges,
            settings,
            metrics,
            outages,
            waiting: VecDeque::new(),
            in_flight: FuturesUnordered::new(),
            backing_off: FuturesUnordered::new(),
            answered: 0,
            last_failure: String::new(),
            pause_logged: None,
        }
    }

    /// Serves `queue` until all its senders are dropped and every request is answered.
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<PendingRequest>) {
        let mut is_open = true;
        loop {
            let wake_at = self.dispatch();
            let waiting = self.waiting.len() + self.backing_off.len();
            self.metrics.queue(waiting);
            if !is_open && waiting == 0 && self.in_flight.is_empty() {
                return;
            }
            tokio::select! {
                biased;
                Some(completed) = self.in_flight.next() => self.complete(completed),
                received = queue.recv(), if is_open => {
                    is_open = received.is_some();
                    self.waiting.extend(received);
                    // Requests that are queued already may share a batch.
                    self.waiting.extend(std::iter::from_fn(|| queue.try_recv().ok()));
                }
                Some(request) = self.backing_off.next() => self.waiting.push_back(request),
                () = sleep_until_some(wake_at) => {}
            }
        }
    }

    /// Sends all batches that can be sent now. Returns when to try again if nothing else happens before.
    fn dispatch(&mut self) -> Option<Instant> {
        if self.replicas.all_dead() {
            self.fail_all();
        }
        loop {
            self.drop_cancelled();
            let oldest = self.waiting.front()?;
            let now = Instant::now();
            let (index, limit) = match self.replicas.choose(now, oldest.avoided) {
                ReplicaChoice::Available { index, limit } => (index, limit),
                ReplicaChoice::Unavailable { until } => return until,
            };
            let limit = limit.min(self.settings.max_batch).max(1);
            let send_at = oldest.queued_at + self.settings.max_wait;
            if !oldest.is_alone && self.waiting.len() < limit && now < send_at {
                return Some(send_at);
            }
            let batch = self.take_batch(index, limit);
            self.send(index, batch);
        }
    }

    /// Drops the oldest requests while their callers have stopped waiting.
    fn drop_cancelled(&mut self) {
        while self
            .waiting
            .front()
            .is_some_and(|request| request.reply.is_closed())
        {
            self.waiting.pop_front();
        }
    }

    /// Takes the oldest request and those that may share its batch for replica `index`, at most `limit`.
    fn take_batch(&mut self, index: usize, limit: usize) -> Vec<PendingRequest> {
        let mut batch: Vec<_> = self.waiting.pop_front().into_iter().collect();
        if batch.iter().any(|request| request.is_alone) {
            return batch;
        }
        let has_other = self.replicas.has_other(index, Instant::now());
        let mut skipped = VecDeque::new();
        while batch.len() < limit
            && let Some(request) = self.waiting.pop_front()
        {
            if request.is_alone || (has_other && request.avoided == Some(index)) {
                skipped.push_back(request);
            } else if !request.reply.is_closed() {
                batch.push(request);
            }
        }
        skipped.append(&mut self.waiting);
        self.waiting = skipped;
        batch
    }

    fn send(&mut self, index: usize, mut batch: Vec<PendingRequest>) {
        let is_probe = self.replicas.get_mut(index).circuit.is_open();
        self.replicas.batch_sent(index);
        self.metrics.batch(batch.len());
        let replica = Arc::clone(&self.replicas.get_mut(index).replica);
        let limit = self.settings.timeout;
        let metrics = Arc::clone(&self.metrics);
        for request in &mut batch {
            request.permit = None;
            request.answered_before.get_or_insert(self.answered);
        }
        self.in_flight.push(Box::pin(async move {
            let requests: Vec<_> = batch.iter().map(|r| r.request.clone()).collect();
            let verdicts = match timeout(limit, replica.judge(&requests)).await {
                Ok(verdicts) => verdicts.and_then(|given| check_count(given, requests.len())),
                Err(_elapsed) => {
                    metrics.timed_out();
                    let seconds = limit.as_secs_f64();
                    Err(JudgeError::new(format!("no answer within {seconds} s")))
                }
            };
            CompletedBatch {
                replica: index,
                is_probe,
                batch,
                verdicts,
            }
        }));
    }

    fn complete(&mut self, completed: CompletedBatch) {
        let CompletedBatch {
            replica,
            is_probe,
            batch,
            verdicts,
        } = completed;
        self.replicas.get_mut(replica).in_flight -= 1;
        match verdicts {
            Ok(verdicts) => {
                self.answered += 1;
                let state = self.replicas.get_mut(replica);
                state.circuit.succeeded();
                state.pause.answered();
                for (request, verdict) in batch.into_iter().zip(verdicts) {
                    request.reply(Ok(verdict));
                }
            }
            Err(error) => {
                self.record_failure(replica, &error);
                let attempt = FailedAttempt {
                    replica,
                    is_probe,
                    error: &error,
                };
                let is_single = batch.len() == 1;
                for request in batch {
                    match error.kind() {
                        JudgeErrorKind::Permanent if is_single => self.abstain(request, &error),
                        _ => self.retry(request, &attempt),
                    }
                }
            }
        }
        self.publish_outage();
    }

    /// Updates the state of the replica after a failure.
    fn record_failure(&mut self, index: usize, error: &JudgeError) {
        let now = Instant::now();
        let state = self.replicas.get_mut(index);
        match error.kind() {
            // It responds, if not with a verdict.
            JudgeErrorKind::RateLimited | JudgeErrorKind::Permanent => state.circuit.succeeded(),
            JudgeErrorKind::Transient => state.circuit.failed(now),
            JudgeErrorKind::Panicked => state.circuit.open(now),
            JudgeErrorKind::Dead => state.is_dead = true,
        }
        let asked = error.retry_after();
        let is_refused = error.kind() == JudgeErrorKind::RateLimited;
        let pause = (is_refused || asked.is_some()).then(|| state.pause.begin(now, asked));
        let replica = state.replica.name();
        tracing::debug!(judge = self.judges.name, replica, %error, "a judge failed");
        self.last_failure = format!("{replica}: {error}");
        if is_refused {
            self.metrics.rate_limited();
        }
        if let Some(pause) = pause {
            self.log_pause(now, asked, pause);
        }
    }

    /// Logs that a replica is paused, after [`Self::last_failure`]; at most one line a minute.
    fn log_pause(&mut self, now: Instant, asked: Option<Duration>, pause: Duration) {
        let is_recent = |logged: Instant| now - logged < PAUSE_LOG_INTERVAL;
        if self.pause_logged.is_some_and(is_recent) {
            return;
        }
        self.pause_logged = Some(now);
        let (judge, failure) = (&self.judges.name, &self.last_failure);
        let pause_seconds = pause.as_secs_f64();
        match asked.map(|asked| asked.as_secs_f64()) {
            Some(retry_after_seconds) => tracing::warn!(
                judge,
                failure,
                retry_after_seconds,
                pause_seconds,
                "the judge asks for a pause"
            ),
            None => tracing::warn!(
                judge,
                failure,
                pause_seconds,
                "the judge refuses requests and is paused"
            ),
        }
    }

    /// Queues the request for another attempt, or fails it when its retries are used up.
    fn retry(&mut self, mut request: PendingRequest, attempt: &FailedAttempt<'_>) {
        let kind = attempt.error.kind();
        request.avoided = Some(attempt.replica);
        request.is_alone |= matches!(
            kind,
            JudgeErrorKind::Permanent | JudgeErrorKind::Panicked | JudgeErrorKind::Dead
        );
        if matches!(
            kind,
            JudgeErrorKind::RateLimited | JudgeErrorKind::Permanent
        ) {
            self.waiting.push_back(request);
            return;
        }
        request.failures += 1;
        request.counted_failures += usize::from(self.counts_as_failure(&request, attempt));
        request.answered_before = Some(self.answered);
        if request.counted_failures > self.settings.max_retries {
            let judge = self.judges.name.clone();
            let reason = attempt.error.to_string();
            tracing::warn!(judge, reason, "a comparison failed after all retries");
            request.reply(Err(ComparisonError::JudgeFailed { judge, reason }));
            return;
        }
        self.metrics.retried();
        if kind == JudgeErrorKind::Transient {
            let delay = self.backoff(request.failures);
            self.backing_off.push(Box::pin(async move {
                sleep(delay).await;
                request
            }));
        } else {
            self.waiting.push_back(request);
        }
    }

    /// Whether a failed attempt counts against the request's retries. A panic does. A transient failure counts only if
    /// the judge answered other batches meanwhile and the attempt was no probe: an outage fails no request.
    fn counts_as_failure(&self, request: &PendingRequest, attempt: &FailedAttempt<'_>) -> bool {
        let answers_others = request
            .answered_before
            .is_some_and(|before| self.answered > before);
        match attempt.error.kind() {
            JudgeErrorKind::Transient => answers_others && !attempt.is_probe,
            JudgeErrorKind::Panicked | JudgeErrorKind::Dead => true,
            JudgeErrorKind::RateLimited | JudgeErrorKind::Permanent => false,
        }
    }

    /// Exponential backoff with full jitter (Brooker, "Exponential backoff and jitter", 2015): uniform
    /// from 0 to `retry_base`, doubled with every failure up to the last retry.
    fn backoff(&self, failures: usize) -> Duration {
        let doublings = failures.clamp(1, self.settings.max_retries.clamp(1, 16)) - 1;
        let max = self.settings.retry_base * (1 << doublings);
        max.mul_f64(rand::rng().random::<f64>())
    }

    fn abstain(&mut self, request: PendingRequest, error: &JudgeError) {
        let verdict = Verdict::Abstained {
            reason: error.to_string(),
        };
        let version = self.judges.version.unwrap_or_default();
        request.reply(Ok(VersionedVerdict::new(verdict, version)));
    }

    /// Fails all queued requests: no replica is left.
    fn fail_all(&mut self) {
        for request in self.waiting.drain(..) {
            request.reply(Err(ComparisonError::NoJudge {
                judge: self.judges.name.clone(),
                reason: self.last_failure.clone(),
            }));
        }
    }

    fn publish_outage(&mut self) {
        let now = Instant::now();
        let cause = if self.replicas.all_open() {
            Some(OutageCause::CircuitOpen)
        } else {
            let is_paused = self.replicas.all_paused(now);
            is_paused.then_some(OutageCause::Paused)
        };
        let outage = cause.map(|cause| Outage {
            cause,
            reason: self.last_failure.clone(),
            probe_at: self.replicas.probe_at(now),
        });
        let Some(change) = self.outages.publish(outage) else {
            return;
        };
        let open = Some(OutageCause::CircuitOpen);
        self.metrics.circuit(change.after == open);
        let (judge, failure) = (&self.judges.name, &self.last_failure);
        if change.after == open {
            let waiting = self.waiting.len() + self.backing_off.len();
            tracing::error!(
                judge,
                failure,
                waiting,
                "every circuit breaker of the judge is open"
            );
        } else if change.before == open && change.after.is_none() {
            tracing::info!(judge, "the judge answers again");
        }
    }
}

/// Checks that there is one verdict per request.
fn check_count(
    verdicts: Vec<VersionedVerdict>,
    requests: usize,
) -> Result<Vec<VersionedVerdict>, JudgeError> {
    match verdicts.len() {
        count if count == requests => Ok(verdicts),
        count => Err(JudgeError::new(format!(
            "it gave {count} verdicts on {requests} comparisons"
        ))),
    }
}

/// Sleeps until `deadline`; forever without one.
async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
