//! The preference service: takes pairs, has them judged in batches, gives labelled pairs.
//!
//! A pair is acknowledged after its label or its drop note is stored, so a service that ends at any
//! moment loses nothing: what it held is delivered again. The service does not know what its judge is,
//! and never asks it the same again after a failure.

use std::sync::Arc;
use std::time::Duration;

use messages::{DropReason, Dropped, LabelledPair, Pair, PromptId, Station};
use telemetry::{StationCounters, Waits};
use tokio::sync::watch;
use transport::{Receiver, Sender};

use crate::intake::{BatchLimits, Held, Intake};
use crate::judge_thread::JudgeThread;
use crate::metrics::JudgeMetrics;
use crate::panel::{Answer, Judgement, Panel, Refusal};
use crate::{Judge, JudgeError, PreferenceError};

/// All that the service is made of.
pub struct PreferenceParts {
    /// Who labels pairs.
    pub judge: Box<dyn Judge>,
    /// Who knows the true preference, in a world that has one: asked too about the first two completions
    /// of every pair for evaluation.
    pub gold: Option<Box<dyn Judge>>,
    /// Where pairs come from.
    pub pairs: Receiver<Pair>,
    /// Where labelled pairs go.
    pub labelled: Sender<LabelledPair>,
    /// Where the notes of dropped pairs go.
    pub drops: Sender<Dropped>,
    /// The books of [`Station::Preference`], which one service at a time keeps.
    pub counters: Arc<StationCounters>,
    /// The most comparisons in one call of a judge. A comparison in both orders counts as two, and is
    /// one call even when the limit is 1; 0 counts as 1.
    pub max_batch: usize,
    /// How long the first pair of a batch waits for others.
    pub max_wait: Duration,
}

/// The preference service, ready to [run](Self::run).
pub struct Preference {
    parts: PreferenceParts,
    waits: Waits,
}

impl Preference {
    /// A service of these parts. Nothing is taken or asked before it runs.
    #[must_use]
    pub fn new(parts: PreferenceParts) -> Self {
        Self {
            parts,
            waits: Waits::new("preference"),
        }
    }

    /// What the service waits for while it runs: "pairs", "verdicts", or "room for labels".
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// Labels pairs until `shutdown` is true or its sender is gone, or until the stream of pairs ends.
    /// Pairs that were taken by then are still judged and sent. A run that is cancelled returns them to
    /// their stream instead.
    ///
    /// # Errors
    /// When the judge's thread cannot be started, when the judge panics, or when nobody takes labels or
    /// drop notes any more while no shutdown was asked for. A judge that merely fails costs its batch.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) -> Result<(), PreferenceError> {
        let mut service = Service::start(self)?;
        let judge = service.thread.judge_name().to_owned();
        tracing::info!(judge, "preference service started");
        let ended = service.work(&mut shutdown).await;
        service.thread.finish().await;
        match ended {
            Err(PreferenceError::Closed(closed)) if asked_to_stop(&shutdown) => {
                tracing::warn!(%closed, "pairs in hand are returned: nobody takes their labels");
            }
            ended => ended?,
        }
        tracing::info!(judge, "preference service finished");
        Ok(())
    }
}

fn asked_to_stop(shutdown: &watch::Receiver<bool>) -> bool {
    *shutdown.borrow() || shutdown.has_changed().is_err()
}

/// The service while it runs.
struct Service {
    intake: Intake,
    thread: JudgeThread,
    outlet: Outlet,
    metrics: JudgeMetrics,
    waits: Waits,
    has_failed: bool,
}

/// Where pairs go: on as labels, or out with a note.
struct Outlet {
    labelled: Sender<LabelledPair>,
    drops: Sender<Dropped>,
    counters: Arc<StationCounters>,
}

impl Service {
    fn start(preference: Preference) -> Result<Self, PreferenceError> {
        let Preference { parts, waits } = preference;
        let max_batch = parts.max_batch.max(1);
        let thread = JudgeThread::start(Panel::new(parts.judge, parts.gold, max_batch))?;
        let limits = BatchLimits {
            max_batch,
            max_wait: parts.max_wait,
            is_antisymmetric: thread.is_antisymmetric(),
        };
        Ok(Self {
            intake: Intake::new(parts.pairs, limits, Arc::clone(&parts.counters)),
            metrics: JudgeMetrics::new(thread.judge_name()),
            thread,
            outlet: Outlet {
                labelled: parts.labelled,
                drops: parts.drops,
                counters: parts.counters,
            },
            waits,
            has_failed: false,
        })
    }

    async fn work(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), PreferenceError> {
        loop {
            self.note_given_up().await?;
            self.intake.collect(shutdown, &self.waits).await;
            let batch: Vec<_> = self
                .intake
                .batch()
                .map(|held| Arc::clone(&held.pair))
                .collect();
            if batch.is_empty() {
                return Ok(());
            }
            let size = batch.len();
            let judged = {
                let _wait = self.waits.enter("verdicts");
                self.thread.judge(batch).await?
            };
            let _wait = self.waits.enter("room for labels");
            match judged {
                Ok(answer) => self.label(answer).await?,
                Err(error) => self.fail(size, &error).await?,
            }
        }
    }

    /// Sends on what was judged, in the order in which it came.
    async fn label(&mut self, answer: Answer) -> Result<(), PreferenceError> {
        let latencies: Vec<_> = self
            .intake
            .batch()
            .map(|held| held.arrived.elapsed())
            .collect();
        self.metrics.batch(&answer.judgements, &latencies);
        let judge = self.thread.judge_name().to_owned();
        for judgement in answer.judgements {
            let Judgement { labels, gold, .. } = judgement;
            let Held { pair, receipt, .. } = self.intake.pop().expect("a judged pair is in hand");
            match labels {
                Ok(labels) => {
                    let labelled = LabelledPair {
                        pair: Arc::unwrap_or_clone(pair),
                        labels,
                        judge: judge.clone(),
                        judge_version: answer.version,
                        gold,
                    };
                    self.outlet.give(labelled).await?;
                }
                Err(refusal) => self.outlet.drop_pair(pair.id(), refusal).await?,
            }
            receipt.acknowledge();
            self.intake.count();
        }
        Ok(())
    }

    /// Drops the oldest `size` pairs, because the judge could not answer them.
    async fn fail(&mut self, size: usize, error: &JudgeError) -> Result<(), PreferenceError> {
        let judge = self.thread.judge_name();
        if self.has_failed {
            tracing::debug!(judge, %error, pairs = size, "judge failed again");
        } else {
            tracing::error!(judge, %error, pairs = size, "judge failed; its pairs are dropped");
        }
        self.has_failed = true;
        let refusal = Refusal {
            reason: DropReason::Failed,
            detail: format!("the judge {judge} failed: {error}"),
        };
        for _ in 0..size {
            let Held { pair, receipt, .. } = self.intake.pop().expect("a refused pair is in hand");
            self.outlet.drop_pair(pair.id(), refusal.clone()).await?;
            receipt.acknowledge();
            self.intake.count();
        }
        Ok(())
    }

    /// Drops pairs that no service could label in as many deliveries as their stream allows: a pair on
    /// which every judge panics does not hold up the run, and its credit is not lost.
    async fn note_given_up(&self) -> Result<(), PreferenceError> {
        for letter in self.intake.given_up() {
            let refusal = Refusal {
                reason: DropReason::Failed,
                detail: format!("no label after {} deliveries", letter.deliveries),
            };
            self.outlet.drop_pair(letter.message.id(), refusal).await?;
            // The service that held it last may have ended without counting it out.
            self.intake.count();
        }
        Ok(())
    }
}

impl Outlet {
    async fn give(&self, labelled: LabelledPair) -> Result<(), PreferenceError> {
        self.labelled.send(labelled).await?;
        self.counters.given(1);
        Ok(())
    }

    async fn drop_pair(&self, prompt: PromptId, refusal: Refusal) -> Result<(), PreferenceError> {
        let Refusal { reason, detail } = refusal;
        self.drops
            .send(Dropped {
                prompt,
                station: Station::Preference,
                reason,
                detail,
            })
            .await?;
        self.counters.dropped(reason, 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
