//! The preference service: takes pairs, has them judged, gives labelled pairs.
//!
//! A pair is acknowledged after its label or its drop note is stored, so a service that ends at any
//! moment loses nothing: what it held is delivered again. Many pairs are with the judges together; they
//! leave in the order in which they came. The service does not know who its judges are.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use messages::{Dropped, LabelledPair, Pair, Prompt, Purpose, Station};
use settings::OrdersSetting;
use telemetry::{StationCounters, WaitGuard, Waits, publish};
use tokio::sync::watch;
use transport::{Delivery, Receipt, Receiver, Sender, TransportError};

use crate::apo::Player;
use crate::bench::{Bench, Outage};
use crate::labelling::{Judgement, Labelling, Refusal};
use crate::{PreferenceError, RulingError};

/// All that the service is made of.
pub struct PreferenceParts {
    /// Who labels pairs.
    pub judge: Bench,
    /// Who knows the true preference, in a world that has one: asked too about the first two completions
    /// of every pair for evaluation.
    pub gold: Option<Bench>,
    /// In how many orders a comparison is asked.
    pub orders: OrdersSetting,
    /// The adversarial game, where it is played.
    pub player: Option<Player>,
    /// Where pairs come from.
    pub pairs: Receiver<Pair>,
    /// Where labelled pairs go.
    pub labelled: Sender<LabelledPair>,
    /// Where the notes of dropped pairs go.
    pub drops: Sender<Dropped>,
    /// The books of [`Station::Preference`], which one service at a time keeps.
    pub counters: Arc<StationCounters>,
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

    /// What the service waits for while it runs: "pairs", "verdicts", "a judge: every circuit is open",
    /// "a round of the game", or "room for labels".
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// Labels pairs until `shutdown` is true or its sender is gone, or until the stream of pairs ends.
    /// Pairs that were taken by then are still judged and sent. A run that is cancelled returns them to
    /// their stream instead.
    ///
    /// # Errors
    /// When no judge is left to ask, or when nobody takes labels or drop notes any more while no
    /// shutdown was asked for. A judge that merely fails is asked again, or waited for.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) -> Result<(), PreferenceError> {
        let judge = self.parts.judge.name();
        tracing::info!(judge, "preference service started");
        let ended = Service::new(self).work(&mut shutdown).await;
        match ended {
            Err(PreferenceError::Transport(TransportError::Closed(closed)))
                if asked_to_stop(&shutdown) =>
            {
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
    pairs: Receiver<Pair>,
    labelling: Arc<Labelling>,
    player: Option<Player>,
    outage: watch::Receiver<Option<Outage>>,
    /// The pairs in hand, oldest first, and what becomes of each, in the same order.
    held: VecDeque<Held>,
    judgements: FuturesOrdered<BoxFuture<'static, Result<Judgement, RulingError>>>,
    /// The sum over `held`, and how many there may be before no more pairs are taken.
    questions: usize,
    max_questions: usize,
    max_prefetch: usize,
    material: Material,
    outlet: Outlet,
    waits: Waits,
}

/// What holds the samples of a round with this service until the round's model is written: one that dies
/// before leaves them to its successor, which plays the round.
#[derive(Default)]
struct Material {
    collected: Vec<Receipt>,
    fitting: Vec<Receipt>,
}

impl Material {
    /// Keeps the receipt of samples; `begun`: they were the last of their round.
    fn keep(&mut self, receipt: Receipt, begun: bool) {
        self.collected.push(receipt);
        if begun {
            self.fitting.append(&mut self.collected);
        }
    }

    /// The round that was being fitted has ended.
    fn settle(&mut self) {
        for receipt in self.fitting.drain(..) {
            receipt.acknowledge();
        }
    }
}

/// A pair that was taken and is not yet acknowledged.
struct Held {
    pair: Arc<Pair>,
    receipt: Receipt,
    questions: usize,
    since: Instant,
}

/// Where pairs go: on as labels, or out with a note.
struct Outlet {
    labelled: Sender<LabelledPair>,
    drops: Sender<Dropped>,
    counters: Arc<StationCounters>,
}

impl Service {
    fn new(preference: Preference) -> Self {
        let Preference { parts, waits } = preference;
        Self {
            pairs: parts.pairs,
            player: parts.player,
            outage: parts.judge.outage(),
            max_questions: parts.judge.settings().max_queue.max(1),
            // One batch while another is judged: the rest is for other services.
            max_prefetch: 2 * parts.judge.settings().max_batch,
            labelling: Arc::new(Labelling {
                judge: parts.judge,
                gold: parts.gold,
                orders: parts.orders,
                gold_failed: AtomicBool::new(false),
            }),
            held: VecDeque::new(),
            judgements: FuturesOrdered::new(),
            questions: 0,
            material: Material::default(),
            outlet: Outlet {
                labelled: parts.labelled,
                drops: parts.drops,
                counters: parts.counters,
            },
            waits,
        }
    }

    async fn work(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), PreferenceError> {
        let mut is_open = true;
        let mut wait: Option<(&str, WaitGuard)> = None;
        loop {
            if !is_open && self.held.is_empty() {
                return Ok(());
            }
            let reason = self.waits_for();
            if wait.as_ref().is_none_or(|(named, _)| *named != reason) {
                wait = Some((reason, self.waits.enter(reason)));
            }
            let room = self.max_questions.saturating_sub(self.questions);
            let has_room = room > 0;
            self.pairs.prefetch(room.min(self.max_prefetch));
            tokio::select! {
                biased;
                () = stopped(shutdown), if is_open => is_open = false,
                Some(judgement) = self.judgements.next() => {
                    wait = None;
                    self.settle(judgement, shutdown).await?;
                }
                seated = Player::seated(&mut self.player, &self.labelling.judge) => {
                    seated?;
                    self.material.settle();
                }
                // The bench lives as long as this service: there is always something to be told.
                _changed = self.outage.changed() => {}
                received = self.pairs.receive(), if is_open && has_room => match received {
                    Ok(delivery) => self.take(delivery),
                    Err(_ended) => is_open = false,
                },
            }
        }
    }

    /// What the service waits for now.
    fn waits_for(&mut self) -> &'static str {
        if self.held.is_empty() {
            "pairs"
        } else if self.outage.borrow_and_update().is_some() {
            "a judge: every circuit is open"
        } else {
            "verdicts"
        }
    }

    fn take(&mut self, delivery: Delivery<Pair>) {
        self.outlet.counters.taken(1);
        let (given_up, deliveries) = (delivery.is_given_up(), delivery.deliveries());
        let (pair, receipt) = delivery.take();
        let pair = Arc::new(pair);
        let questions = self.labelling.questions(&pair);
        let (labelling, asked) = (Arc::clone(&self.labelling), Arc::clone(&pair));
        self.judgements.push_back(Box::pin(async move {
            if given_up {
                return Ok(labelling.given_up(deliveries));
            }
            labelling.judge(asked).await
        }));
        self.questions += questions;
        self.held.push_back(Held {
            pair,
            receipt,
            questions,
            since: Instant::now(),
        });
        self.count();
    }

    /// Sends on the oldest pair, of which this was said.
    async fn settle(
        &mut self,
        judgement: Result<Judgement, RulingError>,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<(), PreferenceError> {
        let judgement = judgement.map_err(PreferenceError::NoJudge)?;
        let held = self.held.pop_front().expect("a judged pair is in hand");
        self.questions -= held.questions;
        tell_wait(held.since.elapsed());
        let Held { pair, receipt, .. } = held;
        let receipt = match pair.prompt.purpose {
            Purpose::Contest => self.play(&pair, receipt, shutdown).await?,
            _ => Some(receipt),
        };
        let _wait = self.waits.enter("room for labels");
        let sent = match judgement.labels {
            Ok(labels) => {
                let labelled = LabelledPair {
                    pair: Arc::unwrap_or_clone(pair),
                    labels,
                    judge: self.labelling.judge.name(),
                    judge_version: judgement.version,
                    scores: judgement.scores,
                    gold: judgement.gold,
                };
                self.outlet.give(labelled).await
            }
            Err(refusal) => self.outlet.drop_pair(&pair.prompt, refusal).await,
        };
        if sent.is_err() {
            self.outlet.counters.returned(1);
        }
        sent?;
        if let Some(receipt) = receipt {
            receipt.acknowledge();
        }
        self.count();
        Ok(())
    }

    /// Takes the policy's samples for a round of the game, and keeps their receipt until the round is
    /// played. Where labels wait for the round's model, this pair, the last of the round, does. Without a
    /// game the receipt comes back.
    async fn play(
        &mut self,
        pair: &Pair,
        receipt: Receipt,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Option<Receipt>, PreferenceError> {
        let Some(player) = &mut self.player else {
            return Ok(Some(receipt));
        };
        let begun = player.game.take(pair)?;
        let waits = player.game.is_fitting() && player.game.holds_labels();
        self.material.keep(receipt, begun);
        if !waits {
            return Ok(None);
        }
        let _wait = self.waits.enter("a round of the game");
        tokio::select! {
            biased;
            () = stopped(shutdown) => {}
            seated = Player::seated(&mut self.player, &self.labelling.judge) => {
                seated?;
                self.material.settle();
            }
        }
        Ok(None)
    }

    /// Counts what is in hand.
    fn count(&self) {
        self.outlet.counters.set_in_hand(self.held.len() as u64);
    }
}

impl Drop for Service {
    /// Counts out what goes back to its stream with the service.
    fn drop(&mut self) {
        let counters = &self.outlet.counters;
        counters.returned(self.held.len() as u64);
        counters.set_in_hand(0);
    }
}

impl Outlet {
    async fn give(&self, labelled: LabelledPair) -> Result<(), PreferenceError> {
        self.labelled.send(labelled).await?;
        self.counters.given(1);
        Ok(())
    }

    async fn drop_pair(&self, prompt: &Prompt, refusal: Refusal) -> Result<(), PreferenceError> {
        let Refusal { reason, detail } = refusal;
        self.drops
            .send(Dropped {
                prompt: prompt.id,
                session: prompt.version.session,
                station: Station::Preference,
                reason,
                log_ratio: None,
                detail,
            })
            .await?;
        self.counters.dropped(reason, 1);
        Ok(())
    }
}

fn tell_wait(waited: Duration) {
    let waited = [("time/wait_for_judge", waited.as_secs_f64())];
    publish(&waited.into_iter().collect(), &[("role", "preference")]);
}

/// Waits until the caller asks to stop. A caller that is gone asks for it too.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    drop(shutdown.wait_for(|stop| *stop).await);
}

#[cfg(test)]
mod tests;
