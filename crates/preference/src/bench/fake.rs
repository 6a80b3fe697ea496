//! A replica for tests, without a thread, that writes down how it is asked.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use messages::JudgeVersion;

use super::{Answer, Bench, BenchSettings, Judges, Question, Replica};
use crate::judge::fake::{pair, preferred};
use crate::{JudgeError, Verdict};

type Say = dyn FnMut(&[Question]) -> Result<Vec<Verdict>, JudgeError> + Send;

/// Answers as it is told to, after a while.
pub(crate) struct FakeReplica {
    say: Mutex<Box<Say>>,
    delay: Duration,
    concurrency: usize,
    max_batch: usize,
    asked: Asked,
}

/// The texts of the first completions of every batch that was asked.
#[derive(Clone, Default)]
pub(crate) struct Asked(Arc<Mutex<Vec<Vec<String>>>>);

impl Asked {
    pub(crate) fn batches(&self) -> Vec<Vec<String>> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.batches().iter().map(Vec::len).collect()
    }
}

impl FakeReplica {
    pub(crate) fn new(
        say: impl FnMut(&[Question]) -> Result<Vec<Verdict>, JudgeError> + Send + 'static,
    ) -> Self {
        Self {
            say: Mutex::new(Box::new(say)),
            delay: Duration::ZERO,
            concurrency: 1,
            max_batch: usize::MAX,
            asked: Asked::default(),
        }
    }

    /// Says ½ to everything.
    pub(crate) fn even() -> Self {
        Self::new(|batch| Ok(vec![preferred(0.5); batch.len()]))
    }

    /// Fails with `errors` in turn, then says ½.
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

    pub(crate) fn asked(&self) -> Asked {
        self.asked.clone()
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

    fn ask<'a>(&'a self, batch: &'a [Question]) -> BoxFuture<'a, Result<Vec<Answer>, JudgeError>> {
        let texts = batch.iter().map(|q| q.comparison().first.text.clone());
        self.asked.0.lock().unwrap().push(texts.collect());
        Box::pin(async move {
            // A sleep of no length would last until the clock's next tick.
            if !self.delay.is_zero() {
                tokio::time::sleep(self.delay).await;
            }
            let verdicts = (*self.say.lock().unwrap())(batch)?.into_iter();
            let version = JudgeVersion(7);
            Ok(verdicts
                .map(|verdict| Answer::new(verdict, version))
                .collect())
        })
    }
}

/// A judge of these replicas.
pub(crate) fn judges(replicas: impl IntoIterator<Item = FakeReplica>) -> Judges {
    let replica = |replica| Arc::new(replica) as Arc<dyn Replica>;
    Judges {
        name: "fake".into(),
        version: Some(JudgeVersion(7)),
        is_antisymmetric: false,
        replicas: replicas.into_iter().map(replica).collect(),
    }
}

/// A bench of one judge of these replicas.
pub(crate) fn bench(
    replicas: impl IntoIterator<Item = FakeReplica>,
    settings: BenchSettings,
) -> Bench {
    Bench::new(judges(replicas), settings)
}

impl Bench {
    /// How many questions could come in now.
    pub(crate) fn free_places(&self) -> usize {
        self.inner.door.available_permits()
    }
}

/// Settings under which every question is asked at once, alone, and is not remembered.
pub(crate) fn settings() -> BenchSettings {
    BenchSettings {
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

/// A question about completions of these texts.
pub(crate) fn question(first: &str, second: &str) -> Question {
    Question::new(Arc::new(pair(0, &[first, second])), 0, 1)
}
