//! Who leads questions to replicas: batches, retries, circuits.
//!
//! One task a judge. It owns the questions that wait and all that is known of the replicas, so nothing
//! here is locked. It ends when nobody can ask it any more and all that was asked is answered.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use rand::Rng;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::circuit::CircuitLimits;
use super::metrics::BenchMetrics;
use super::outage::{Outage, OutageBoard};
use super::seat::{Choice, Seats};
use super::{Answer, BenchSettings, Judges, Question};
use crate::{JudgeError, JudgeErrorKind, RulingError, Verdict};

/// A question at the bench.
pub(super) struct Asked {
    question: Question,
    reply: oneshot::Sender<Result<Answer, RulingError>>,
    /// Its place in the queue, until it is handed to a replica for the first time.
    place: Option<OwnedSemaphorePermit>,
    since: Instant,
    /// How often it got no answer.
    failures: usize,
    /// How many of them it may be at fault for.
    faults: usize,
    /// How many batches had been answered when it failed last, or was asked first.
    answered_before: Option<u64>,
    /// The seat that failed last.
    avoided: Option<usize>,
    /// Whether it is asked without company, since one of a batch has done harm.
    is_alone: bool,
}

impl Asked {
    pub(super) fn new(
        question: Question,
        place: Option<OwnedSemaphorePermit>,
        reply: oneshot::Sender<Result<Answer, RulingError>>,
    ) -> Self {
        Self {
            question,
            reply,
            place,
            since: Instant::now(),
            failures: 0,
            faults: 0,
            answered_before: None,
            avoided: None,
            is_alone: false,
        }
    }

    /// Tells whoever asked, who may have left.
    fn answer(self, answer: Result<Answer, RulingError>) {
        drop(self.reply.send(answer));
    }
}

pub(super) struct Usher {
    judges: Judges,
    settings: BenchSettings,
    metrics: Arc<BenchMetrics>,
    outages: OutageBoard,
    seats: Seats,
    waiting: VecDeque<Asked>,
    /// Batches that replicas are at.
    at_work: FuturesUnordered<BoxFuture<'static, Judged>>,
    /// Questions between a failure and the next attempt.
    pausing: FuturesUnordered<BoxFuture<'static, Asked>>,
    /// Batches that were answered so far.
    answered: u64,
    /// What the last failure said.
    last_failure: String,
}

/// What became of a batch.
struct Judged {
    seat: usize,
    /// Whether it was to see if the replica is back.
    is_probe: bool,
    batch: Vec<Asked>,
    answers: Result<Vec<Answer>, JudgeError>,
}

/// An attempt that failed.
struct Attempt<'a> {
    seat: usize,
    is_probe: bool,
    error: &'a JudgeError,
}

impl Usher {
    pub(super) fn new(
        judges: Judges,
        settings: BenchSettings,
        metrics: Arc<BenchMetrics>,
        outages: OutageBoard,
    ) -> Self {
        let limits = CircuitLimits {
            failures: settings.circuit_failures,
            probe_after: settings.circuit_probe,
        };
        Self {
            seats: Seats::new(&judges.replicas, limits),
            judges,
            settings,
            metrics,
            outages,
            waiting: VecDeque::new(),
            at_work: FuturesUnordered::new(),
            pausing: FuturesUnordered::new(),
            answered: 0,
            last_failure: String::new(),
        }
    }

    /// Serves `line` until all its senders are gone and everything in hand is answered.
    pub(super) async fn run(mut self, mut line: mpsc::Receiver<Asked>) {
        let mut is_open = true;
        loop {
            let wake = self.hand_out();
            self.metrics.queue(self.waiting.len() + self.pausing.len());
            let is_idle =
                self.waiting.is_empty() && self.at_work.is_empty() && self.pausing.is_empty();
            if !is_open && is_idle {
                return;
            }
            tokio::select! {
                biased;
                Some(judged) = self.at_work.next() => self.settle(judged),
                asked = line.recv(), if is_open => {
                    is_open = asked.is_some();
                    self.waiting.extend(asked);
                    // All that is there belongs into the same batch.
                    self.waiting.extend(std::iter::from_fn(|| line.try_recv().ok()));
                }
                Some(asked) = self.pausing.next() => self.waiting.push_back(asked),
                () = reached(wake) => {}
            }
        }
    }

    /// Asks all that can be asked now. Gives the moment at which there is more to do even if nothing
    /// happens before.
    fn hand_out(&mut self) -> Option<Instant> {
        if self.seats.all_dead() {
            self.dismiss();
        }
        loop {
            self.forget_who_left();
            let front = self.waiting.front()?;
            let now = Instant::now();
            let (seat, room) = match self.seats.choose(now, front.avoided) {
                Choice::Seat(seat, room) => (seat, room),
                Choice::NobodyBefore(moment) => return moment,
            };
            let limit = room.min(self.settings.max_batch).max(1);
            let complete_at = front.since + self.settings.max_wait;
            if !front.is_alone && self.waiting.len() < limit && now < complete_at {
                return Some(complete_at);
            }
            let batch = self.gather(seat, limit);
            self.ask(seat, batch);
        }
    }

    /// Lets go of the oldest questions for whose answers nobody waits any more.
    fn forget_who_left(&mut self) {
        while self
            .waiting
            .front()
            .is_some_and(|asked| asked.reply.is_closed())
        {
            self.waiting.pop_front();
        }
    }

    /// The oldest question and those that may go with it to `seat`, `limit` at most.
    fn gather(&mut self, seat: usize, limit: usize) -> Vec<Asked> {
        let mut batch: Vec<_> = self.waiting.pop_front().into_iter().collect();
        if batch.iter().any(|asked| asked.is_alone) {
            return batch;
        }
        let has_other = self.seats.has_other(seat, Instant::now());
        let mut kept = VecDeque::new();
        while batch.len() < limit
            && let Some(asked) = self.waiting.pop_front()
        {
            if asked.is_alone || (has_other && asked.avoided == Some(seat)) {
                kept.push_back(asked);
            } else if !asked.reply.is_closed() {
                batch.push(asked);
            }
        }
        kept.append(&mut self.waiting);
        self.waiting = kept;
        batch
    }

    fn ask(&mut self, seat: usize, mut batch: Vec<Asked>) {
        let is_probe = self.seats.get_mut(seat).circuit.is_open();
        self.seats.asked(seat);
        self.metrics.batch(batch.len());
        let replica = Arc::clone(&self.seats.get_mut(seat).replica);
        let limit = self.settings.timeout;
        let metrics = Arc::clone(&self.metrics);
        for asked in &mut batch {
            asked.place = None;
            asked.answered_before.get_or_insert(self.answered);
        }
        self.at_work.push(Box::pin(async move {
            let questions: Vec<_> = batch.iter().map(|asked| asked.question.clone()).collect();
            let answers = match timeout(limit, replica.ask(&questions)).await {
                Ok(answers) => answers.and_then(|answers| complete(answers, questions.len())),
                Err(_elapsed) => {
                    metrics.timed_out();
                    let seconds = limit.as_secs_f64();
                    Err(JudgeError::new(format!("no answer within {seconds} s")))
                }
            };
            Judged {
                seat,
                is_probe,
                batch,
                answers,
            }
        }));
    }

    fn settle(&mut self, judged: Judged) {
        let Judged {
            seat,
            is_probe,
            batch,
            answers,
        } = judged;
        self.seats.get_mut(seat).in_hand -= 1;
        match answers {
            Ok(answers) => {
                self.answered += 1;
                self.seats.get_mut(seat).circuit.succeeded();
                for (asked, answer) in batch.into_iter().zip(answers) {
                    asked.answer(Ok(answer));
                }
            }
            Err(error) => {
                self.failed(seat, &error);
                let attempt = Attempt {
                    seat,
                    is_probe,
                    error: &error,
                };
                let is_one = batch.len() == 1;
                for asked in batch {
                    match error.kind() {
                        JudgeErrorKind::Permanent if is_one => self.abstain(asked, &error),
                        _ => self.again(asked, &attempt),
                    }
                }
            }
        }
        self.tell_outage();
    }

    /// What a failure says of the replica.
    fn failed(&mut self, index: usize, error: &JudgeError) {
        let now = Instant::now();
        let seat = self.seats.get_mut(index);
        match error.kind() {
            // It answers, if not this.
            JudgeErrorKind::Busy | JudgeErrorKind::Permanent => seat.circuit.succeeded(),
            JudgeErrorKind::Transient => seat.circuit.failed(now),
            JudgeErrorKind::Panicked => seat.circuit.open(now),
            JudgeErrorKind::Dead => seat.is_dead = true,
        }
        if let Some(rest) = error.retry_after() {
            seat.rest(now, rest);
        }
        let replica = seat.replica.name();
        tracing::debug!(judge = self.judges.name, replica, %error, "a judge failed");
        self.last_failure = format!("{replica}: {error}");
    }

    /// Has the question wait for another attempt, or gives it up: when it was at fault too often.
    fn again(&mut self, mut asked: Asked, attempt: &Attempt<'_>) {
        let kind = attempt.error.kind();
        asked.avoided = Some(attempt.seat);
        asked.is_alone |= matches!(
            kind,
            JudgeErrorKind::Permanent | JudgeErrorKind::Panicked | JudgeErrorKind::Dead
        );
        if matches!(kind, JudgeErrorKind::Busy | JudgeErrorKind::Permanent) {
            self.waiting.push_back(asked);
            return;
        }
        asked.failures += 1;
        asked.faults += usize::from(self.may_be_at_fault(&asked, attempt));
        asked.answered_before = Some(self.answered);
        if asked.faults > self.settings.max_retries {
            let judge = self.judges.name.clone();
            let reason = attempt.error.to_string();
            tracing::warn!(judge, reason, "a question is given up");
            asked.answer(Err(RulingError::Failed { judge, reason }));
            return;
        }
        self.metrics.retried();
        if kind == JudgeErrorKind::Transient {
            let pause = self.pause(asked.failures);
            self.pausing.push(Box::pin(async move {
                sleep(pause).await;
                asked
            }));
        } else {
            self.waiting.push_back(asked);
        }
    }

    /// Whether a failure may be the question's fault. A panic is. Else it is not while the judge answers
    /// nobody, nor at a replica that was known to be away: no question is lost by an outage.
    fn may_be_at_fault(&self, asked: &Asked, attempt: &Attempt<'_>) -> bool {
        let answers_others = asked
            .answered_before
            .is_some_and(|before| self.answered > before);
        match attempt.error.kind() {
            JudgeErrorKind::Transient => answers_others && !attempt.is_probe,
            JudgeErrorKind::Panicked | JudgeErrorKind::Dead => true,
            JudgeErrorKind::Busy | JudgeErrorKind::Permanent => false,
        }
    }

    /// Exponential backoff with full jitter (Brooker, "Exponential backoff and jitter", 2015): uniform
    /// from nothing to the base, doubled with every failure up to the last retry.
    fn pause(&self, failures: usize) -> Duration {
        let doublings = failures.clamp(1, self.settings.max_retries.clamp(1, 16)) - 1;
        let longest = self.settings.retry_base * (1 << doublings);
        longest.mul_f64(rand::rng().random::<f64>())
    }

    fn abstain(&mut self, asked: Asked, error: &JudgeError) {
        let verdict = Verdict::Abstained {
            reason: error.to_string(),
        };
        let version = self.judges.version.unwrap_or_default();
        asked.answer(Ok(Answer::new(verdict, version)));
    }

    /// Sends everybody away: there is no judge any more.
    fn dismiss(&mut self) {
        for asked in self.waiting.drain(..) {
            asked.answer(Err(RulingError::NoJudge {
                judge: self.judges.name.clone(),
                reason: self.last_failure.clone(),
            }));
        }
    }

    fn tell_outage(&mut self) {
        let now = Instant::now();
        let outage = self.seats.all_open().then(|| Outage {
            reason: self.last_failure.clone(),
            probe_at: self.seats.probe_at(now),
        });
        let Some(begins) = self.outages.tell(outage) else {
            return;
        };
        self.metrics.circuit(begins);
        let (judge, failure) = (&self.judges.name, &self.last_failure);
        if begins {
            let waiting = self.waiting.len() + self.pausing.len();
            tracing::error!(
                judge,
                failure,
                waiting,
                "every circuit of the judge is open"
            );
        } else {
            tracing::info!(judge, "the judge answers again");
        }
    }
}

fn complete(answers: Vec<Answer>, asked: usize) -> Result<Vec<Answer>, JudgeError> {
    match answers.len() {
        given if given == asked => Ok(answers),
        given => Err(JudgeError::new(format!(
            "it gave {given} verdicts on {asked} comparisons"
        ))),
    }
}

/// Waits until `moment`; without one, for ever.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
