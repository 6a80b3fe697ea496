//! The bench: judges behind one door.
//!
//! Whoever has a [`Question`] asks the [`Bench`], many at once; behind it are the [`Replica`]s of one
//! judge. The bench remembers verdicts, makes batches, asks in both orders and takes the side out of
//! them, tries again elsewhere, leaves alone who keeps failing, and says no when too many wait.
//!
//! What is promised: a question is never lost silently. It has a ruling, or an error that says why
//! not; while no replica can be asked it waits. Whoever asked before the judges were
//! [replaced](Bench::replace) is answered by those who were there. The bench does not know what a judge
//! is, nor what rulings are for.

mod cache;
mod circuit;
#[cfg(test)]
pub(crate) mod fake;
mod metrics;
mod outage;
mod question;
mod replica;
mod ruling;
mod seat;
mod settings;
#[cfg(test)]
mod tests;
mod usher;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use crate::RulingError;
use cache::VerdictCache;
use metrics::BenchMetrics;
use outage::OutageBoard;
use usher::{Asked, Usher};

pub use outage::Outage;
pub use question::Question;
pub use replica::{Answer, Judges, Rebuild, Replica};
pub use ruling::{Orders, Ruling};
pub use settings::BenchSettings;

/// The bench; clones are doors to the same one. It lives in the tokio runtime in which it was made.
#[derive(Clone)]
pub struct Bench {
    inner: Arc<Inner>,
}

struct Inner {
    settings: BenchSettings,
    /// A permit is a place in the queue.
    door: Arc<Semaphore>,
    cache: VerdictCache,
    metrics: Arc<BenchMetrics>,
    outages: OutageBoard,
    /// Who sits there now.
    sitting: Mutex<Arc<Generation>>,
}

/// Judges, and the way to their usher. It is gone when the last caller who asked them is answered.
struct Generation {
    judges: Judges,
    line: mpsc::Sender<Asked>,
}

/// A place in the queue.
enum Place {
    /// To be waited for.
    AtTheDoor,
    /// Had already, alone or within a request that has its own.
    Inside(Option<OwnedSemaphorePermit>),
}

impl Bench {
    /// A bench with these judges, who are asked by a task in the current runtime.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    #[must_use]
    pub fn new(judges: Judges, settings: BenchSettings) -> Self {
        let metrics = Arc::new(BenchMetrics::new(&judges.name));
        let outages = OutageBoard::new();
        let generation = Generation::new(judges, settings, &metrics, outages.succeed());
        Self {
            inner: Arc::new(Inner {
                settings,
                door: Arc::new(Semaphore::new(settings.max_queue.max(1))),
                cache: VerdictCache::new(settings.cache_size),
                metrics,
                outages,
                sitting: Mutex::new(Arc::new(generation)),
            }),
        }
    }

    /// Seats other judges, a newer version say, without holding anybody up. Questions that were asked
    /// before are answered by those who were there; their threads end with the last of them.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    pub fn replace(&self, judges: Judges) {
        let inner = &self.inner;
        let mut sitting = inner.sitting();
        let outages = inner.outages.succeed();
        inner.metrics.circuit(false);
        let next = Generation::new(judges, inner.settings, &inner.metrics, outages);
        *sitting = Arc::new(next);
    }

    /// The judge's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.inner.sitting().judges.name.clone()
    }

    /// The judge's version, where it is known before it answers.
    #[must_use]
    pub fn version(&self) -> Option<messages::JudgeVersion> {
        self.inner.sitting().judges.version
    }

    /// How the bench was told to go about it.
    #[must_use]
    pub fn settings(&self) -> &BenchSettings {
        &self.inner.settings
    }

    /// Tells whether no judge can be asked, and of every change.
    #[must_use]
    pub fn outage(&self) -> watch::Receiver<Option<Outage>> {
        self.inner.outages.subscribe()
    }

    /// The ruling on `question`. It waits at the door while the queue is full, and inside while no judge
    /// can be asked.
    ///
    /// # Errors
    /// When the judge has failed on this question as often as it may while it answers others, or when no
    /// judge is left.
    pub async fn rule(&self, question: &Question, orders: Orders) -> Result<Ruling, RulingError> {
        let generation = self.inner.generation();
        self.inner
            .rule(&generation, question, orders, &mut || Place::AtTheDoor)
            .await
    }

    /// The rulings on all `questions` by the same judges, as [`Self::rule`] has each.
    pub async fn rule_all(
        &self,
        questions: &[Question],
        orders: Orders,
    ) -> Vec<Result<Ruling, RulingError>> {
        let generation = &self.inner.generation();
        let rule = |question| async move {
            let mut at_the_door = || Place::AtTheDoor;
            self.inner
                .rule(generation, question, orders, &mut at_the_door)
                .await
        };
        join_all(questions.iter().map(rule)).await
    }

    /// The rulings on all `questions` or none: for callers who do not wait at doors. A request of more
    /// questions than there are places is let in when all places are free.
    ///
    /// # Errors
    /// As [`Self::rule`]; also when there are no places for all of them now, or when `patience` is over.
    pub async fn rule_within(
        &self,
        patience: Duration,
        questions: &[Question],
        orders: Orders,
    ) -> Result<Vec<Ruling>, RulingError> {
        let inner = &self.inner;
        let generation = &inner.generation();
        let places = inner.places(questions.len() * orders.count())?;
        let places = Mutex::new(places);
        let places = &places;
        let rule = |question| async move {
            let mut inside = || {
                let mut places = places.lock().unwrap_or_else(PoisonError::into_inner);
                Place::Inside(places.split(1))
            };
            inner.rule(generation, question, orders, &mut inside).await
        };
        let rulings = timeout(patience, try_join_all(questions.iter().map(rule))).await;
        rulings.unwrap_or_else(|_| {
            let outage = inner.outages.current();
            Err(RulingError::Late {
                patience,
                reason: outage.map(|outage| outage.reason),
            })
        })
    }
}

impl Generation {
    fn new(
        judges: Judges,
        settings: BenchSettings,
        metrics: &Arc<BenchMetrics>,
        outages: OutageBoard,
    ) -> Self {
        // There is a place in the line for whoever has one in the queue.
        let (line, asked) = mpsc::channel(settings.max_queue.max(1));
        let usher = Usher::new(judges.clone(), settings, Arc::clone(metrics), outages);
        tokio::spawn(usher.run(asked));
        Self { judges, line }
    }
}

impl Inner {
    fn sitting(&self) -> MutexGuard<'_, Arc<Generation>> {
        // Each change is one assignment: it is sound even after a panic.
        self.sitting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn generation(&self) -> Arc<Generation> {
        Arc::clone(&self.sitting())
    }

    /// Places for `questions`, now or not at all.
    fn places(&self, questions: usize) -> Result<OwnedSemaphorePermit, RulingError> {
        let wanted = questions.min(self.settings.max_queue.max(1));
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let taken = Arc::clone(&self.door).try_acquire_many_owned(wanted);
        taken.map_err(|_| RulingError::Full {
            waiting: self.settings.max_queue - self.door.available_permits(),
        })
    }

    async fn rule(
        &self,
        generation: &Generation,
        question: &Question,
        orders: Orders,
        place: &mut (dyn FnMut() -> Place + Send),
    ) -> Result<Ruling, RulingError> {
        let begun = Instant::now();
        let margins = self.settings.margins();
        let one_suffices = orders == Orders::One || generation.judges.is_antisymmetric;
        let ruling = if one_suffices {
            let answer = self.answer(generation, question, place()).await?;
            Ruling::one_sided(answer, margins)
        } else {
            let swapped = question.swapped();
            let (forward, backward) = tokio::try_join!(
                self.answer(generation, question, place()),
                self.answer(generation, &swapped, place()),
            )?;
            Ruling::two_sided(forward, backward, margins)
        };
        self.metrics.ruling(&ruling, begun.elapsed());
        Ok(ruling)
    }

    /// The answer to a question in the order in which it stands: remembered, or from the judges.
    async fn answer(
        &self,
        generation: &Generation,
        question: &Question,
        place: Place,
    ) -> Result<Answer, RulingError> {
        let entry = self.cache.entry(&generation.judges, question);
        if let Some(answer) = self.cache.get(&entry) {
            self.metrics.cache_hit();
            return Ok(answer);
        }
        let place = match place {
            Place::Inside(place) => place,
            Place::AtTheDoor => {
                let door = Arc::clone(&self.door);
                // The door is never closed; without it there is nothing to wait for.
                door.acquire_owned().await.ok()
            }
        };
        let (reply, answer) = oneshot::channel();
        let asked = Asked::new(entry.question.clone(), place, reply);
        // Without an usher the reply is dropped with the question.
        drop(generation.line.send(asked).await);
        let answer = answer.await.unwrap_or_else(|_| {
            Err(RulingError::NoJudge {
                judge: generation.judges.name.clone(),
                reason: "the runtime of the bench has ended".into(),
            })
        })?;
        Ok(self.cache.put(&entry, answer))
    }
}
