//! An actor's life: take prompts, have them answered, give pairs; take newer weights when idle.

use std::{thread::JoinHandle, time::Duration};

use crossbeam_channel::Sender as Commands;
use messages::{Completion, DropReason, Dropped, Pair, Prompt, Purpose, Station, WeightsVersion};
use model::{CompletionWriter, Finished, LanguageModel, Precision, Request, Tokenizer};
use telemetry::{Holder, Measurements, StationCounters, WaitGuard, Waits};
use tokio::sync::{mpsc, watch};
use transport::{Announcements, Delivery, Receiver, Sender, TransportError, WeightsShelf};

use crate::{
    ActorError, Pacing,
    drift::Drift,
    engine::{self, Command, Event},
    metrics::Throughput,
    supply::{Held, Supply},
};

/// The pause before weights that were torn are fetched again.
const BEFORE_ANOTHER_FETCH: Duration = Duration::from_millis(500);

/// What becomes of a training pair whose completions are all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdenticalPairs {
    /// It goes on: the objective learns from single completions too.
    Keep,
    /// It is dropped: a loss of differences has nothing to learn from it.
    Drop,
}

/// Why a prompt gets no pair.
struct Refusal {
    reason: DropReason,
    detail: String,
    /// Of completions that were all the same.
    log_ratio: Option<f32>,
}

impl Refusal {
    fn new(reason: DropReason, detail: String) -> Self {
        Self {
            reason,
            detail,
            log_ratio: None,
        }
    }
}

/// What an actor is made of.
pub struct ActorParts {
    /// Its name in pairs, metrics and logs.
    pub name: String,
    /// The policy at version 0: the reference, or the reference with an adapter beside it.
    pub policy: LanguageModel,
    /// What writes completions of this policy and its reference, in so many slots.
    pub writer: Box<dyn CompletionWriter>,
    /// In which numbers the writer keeps weights.
    pub precision: Precision,
    /// How far those may lead from f32, in nats a token, before weights are kept in f32; 0: however far.
    pub max_drift: f64,
    /// Turns completions into text for people.
    pub tokenizer: Tokenizer,
    /// The weight on the reference of every completion of a training prompt.
    pub mixture_coefs: Vec<f32>,
    /// The policy's samples of a prompt of the adversarial game.
    pub contest_samples: usize,
    /// The policy's samples of a held-out prompt that are drawn from the whole distribution at temperature 1,
    /// beside the pair that is judged: 1 where the writer's settings draw otherwise, else 0.
    pub exact_samples: usize,
    /// Completions written at once.
    pub slots: usize,
    /// The longest completion, in tokens.
    pub max_new_tokens: usize,
    /// When it starts on a prompt.
    pub pacing: Pacing,
    /// What becomes of pairs without a difference.
    pub identical: IdenticalPairs,
    /// Where prompts come from.
    pub prompts: Receiver<Prompt>,
    /// Where pairs go.
    pub pairs: Sender<Pair>,
    /// Where the notes of dropped prompts go.
    pub drops: Sender<Dropped>,
    /// Where weights come from.
    pub shelf: WeightsShelf,
    /// What it took, gave and dropped.
    pub counters: StationCounters,
}

/// An actor, ready to run.
pub struct Actor {
    name: String,
    tokenizer: Tokenizer,
    max_new_tokens: usize,
    mixture_coefs: Vec<f32>,
    contest_samples: usize,
    exact_samples: usize,
    slots: usize,
    identical: IdenticalPairs,
    prompts: Receiver<Prompt>,
    pairs: Sender<Pair>,
    drops: Sender<Dropped>,
    shelf: WeightsShelf,
    announcements: Announcements,
    counters: StationCounters,
    in_hand: Holder,
    supply: Supply,
    version: WeightsVersion,
    /// The newest session that was heard of.
    session: u64,
    loading: Option<WeightsVersion>,
    commands: Commands<Command>,
    events: mpsc::Receiver<Event>,
    thread: JoinHandle<()>,
    throughput: Throughput,
    /// Fetches of weights that were torn.
    failures: u32,
    waits: Waits,
    wait: Option<(&'static str, WaitGuard)>,
    loaded: watch::Sender<WeightsVersion>,
}

impl Actor {
    /// Makes an actor and starts its thread.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new(parts: ActorParts) -> Result<Self, ActorError> {
        let engine = engine::spawn(
            &parts.name,
            parts.writer,
            parts.policy,
            Drift::new(parts.precision, parts.max_drift),
            parts.slots,
        );
        let (commands, events, thread) = engine.map_err(|source| ActorError::Thread {
            actor: parts.name.clone(),
            source,
        })?;
        Ok(Self {
            throughput: Throughput::new(&parts.name),
            name: parts.name,
            tokenizer: parts.tokenizer,
            max_new_tokens: parts.max_new_tokens,
            mixture_coefs: parts.mixture_coefs,
            contest_samples: parts.contest_samples,
            exact_samples: parts.exact_samples,
            slots: parts.slots,
            identical: parts.identical,
            prompts: parts.prompts,
            pairs: parts.pairs,
            drops: parts.drops,
            announcements: parts.shelf.subscribe(),
            shelf: parts.shelf,
            in_hand: parts.counters.holder(),
            counters: parts.counters,
            supply: Supply::new(parts.pacing),
            version: WeightsVersion::REFERENCE,
            session: 0,
            loading: None,
            commands,
            events,
            thread,
            failures: 0,
            waits: Waits::new("actor"),
            wait: None,
            loaded: watch::Sender::new(WeightsVersion::REFERENCE),
        })
    }

    /// What it waits for while it runs: "prompts", "the rest of a release", "weights", or room for what it
    /// gives; nothing while it writes.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// The weights it answers with, as they are loaded.
    #[must_use]
    pub fn loaded(&self) -> watch::Receiver<WeightsVersion> {
        self.loaded.subscribe()
    }

    /// Works until `shutdown` turns true or there will be no more prompts, then finishes what it is
    /// writing and leaves.
    ///
    /// # Errors
    /// When the model fails, weights cannot be had, or nobody takes the pairs.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> Result<(), ActorError> {
        let (mut open, mut fed) = (true, true);
        while self.supply.answering() > 0 || open && (fed || self.supply.len() > 0) {
            if open {
                self.advance().await?;
            }
            self.in_hand.set(self.supply.len() as u64);
            self.prompts.prefetch(self.room());
            self.note_wait();
            tokio::select! {
                event = self.events.recv() => self.on_event(event).await?,
                delivery = self.prompts.receive(), if open && fed && self.has_room() => match delivery {
                    Ok(delivery) => self.take(delivery).await?,
                    Err(TransportError::Closed(_)) => fed = false,
                    Err(source) => return Err(self.lost(source)),
                },
                newer = self.announcements.newer_than(self.version), if open && self.loading.is_none() => {
                    let manifest = newer.map_err(|source| self.unloadable(source))?;
                    self.loading = Some(manifest.version);
                    self.enter(manifest.version.session).await?;
                },
                changed = shutdown.changed(), if open => {
                    if changed.is_err() || *shutdown.borrow() {
                        open = false;
                    }
                }
            }
        }
        // What was not started goes back to the stream.
        self.counters.returned(self.supply.len() as u64);
        self.in_hand.set(0);
        drop((self.commands, self.events));
        self.thread
            .join()
            .map_err(|_| ActorError::EngineGone { actor: self.name })
    }

    fn note_wait(&mut self) {
        let reason = if self.supply.answering() > 0 {
            None
        } else if self.loading.is_some() || self.supply.ready() > 0 {
            Some("weights")
        } else if self.supply.len() > 0 {
            Some("the rest of a release")
        } else {
            Some("prompts")
        };
        if self.wait.as_ref().map(|(named, _)| *named) != reason {
            self.wait = None;
            self.wait = reason.map(|reason| (reason, self.waits.enter(reason)));
        }
    }

    /// Takes this prompt, and the others that are here as long as there is room.
    async fn take(&mut self, delivery: Delivery<Prompt>) -> Result<(), ActorError> {
        let mut next = Some(delivery);
        while let Some(delivery) = next {
            self.counters.taken(1);
            let (given_up, deliveries) = (delivery.is_given_up(), delivery.deliveries());
            let (prompt, receipt) = delivery.take();
            self.enter(prompt.version.session).await?;
            if given_up {
                let detail = format!("no answer after {} deliveries", deliveries - 1);
                let held = Held { prompt, receipt };
                self.drop_prompt(Some(held), Refusal::new(DropReason::Failed, detail))
                    .await?;
            } else if prompt.version.session < self.session {
                self.supersede(Held { prompt, receipt }).await?;
            } else {
                self.supply.take(prompt, receipt);
            }
            next = self
                .has_room()
                .then(|| self.prompts.try_receive())
                .flatten();
        }
        Ok(())
    }

    /// Gives up what earlier sessions had sent, once a later one is heard of.
    async fn enter(&mut self, session: u64) -> Result<(), ActorError> {
        if session <= self.session {
            return Ok(());
        }
        self.session = session;
        for held in self.supply.superseded(session) {
            self.supersede(held).await?;
        }
        Ok(())
    }

    async fn supersede(&mut self, held: Held) -> Result<(), ActorError> {
        let detail = "sent by a session that was given up".to_owned();
        self.drop_prompt(Some(held), Refusal::new(DropReason::Superseded, detail))
            .await
    }

    /// An actor holds no more prompts ready than its slots could take next: the others are for others.
    fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// How many more prompts it may hold ready.
    fn room(&self) -> usize {
        let most = self.slots.div_ceil(self.mixture_coefs.len());
        most.saturating_sub(self.supply.ready())
    }

    /// Loads newer weights if nothing is being written; else, and only while no newer weights wait,
    /// starts on prompts.
    async fn advance(&mut self) -> Result<(), ActorError> {
        if self.loading.is_none() {
            return self.start();
        }
        if self.supply.answering() > 0 {
            return Ok(());
        }
        while let Some(version) = self.loading
            && version > self.version
        {
            match self.shelf.fetch(version).await {
                Ok(blob) => {
                    self.version = version;
                    self.command(Command::Load(version, blob))?;
                }
                // Superseded while we were writing: a newer one is announced already.
                Err(TransportError::Pruned { .. }) => {
                    self.loading = self.announcements.latest().map(|manifest| manifest.version);
                }
                // Its publisher has been told, and lays it down again.
                Err(torn @ TransportError::Torn { .. }) => {
                    tracing::warn!(actor = self.name, %torn, "weights are fetched again");
                    self.failures += 1;
                    let mut measurements = Measurements::new();
                    measurements.set("weight_sync/failures", f64::from(self.failures));
                    telemetry::publish(&measurements, &[("actor", &self.name)]);
                    tokio::time::sleep(BEFORE_ANOTHER_FETCH).await;
                    self.loading = self.announcements.latest().map(|manifest| manifest.version);
                }
                Err(source) => return Err(self.unloadable(source)),
            }
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), ActorError> {
        let busy = self.supply.answering() * self.mixture_coefs.len();
        let most = self
            .slots
            .saturating_sub(busy)
            .div_ceil(self.mixture_coefs.len());
        let prompts = self.supply.start(self.version, most);
        if prompts.is_empty() {
            return Ok(());
        }
        let requests = prompts
            .into_iter()
            .map(|(number, prompt)| self.request(number, prompt))
            .collect();
        self.command(Command::Answer(requests))
    }

    fn request(&self, number: u64, prompt: Prompt) -> Request {
        let (mixture_coefs, exact) = match prompt.purpose {
            Purpose::Train => (self.mixture_coefs.clone(), 0),
            Purpose::Evaluate => {
                let mut coefs = vec![0.0, 1.0];
                coefs.resize(2 + self.exact_samples, 0.0);
                (coefs, self.exact_samples)
            }
            Purpose::Contest => (vec![0.0; self.contest_samples], 0),
        };
        Request {
            key: number,
            seed: prompt.seed,
            mixture_coefs,
            exact,
            max_new_tokens: self.max_new_tokens,
            ids: prompt.ids,
        }
    }

    async fn on_event(&mut self, event: Option<Event>) -> Result<(), ActorError> {
        match event {
            Some(Event::Finished(finished)) => self.give(finished).await,
            Some(Event::Refused(key, detail)) => {
                let held = self.supply.finish(key);
                self.drop_prompt(held, Refusal::new(DropReason::Failed, detail))
                    .await
            }
            Some(Event::Loaded(version)) => {
                tracing::debug!(actor = self.name, %version, "weights loaded");
                self.loading = None;
                self.loaded.send_replace(version);
                Ok(())
            }
            Some(Event::Drifted { nats, is_too_far }) => {
                self.throughput.drifted(nats);
                if is_too_far {
                    tracing::warn!(
                        actor = self.name,
                        nats_per_token = nats,
                        "coarse numbers lead too far from the policy (actor.max_drift): the next \
                         version is kept in f32"
                    );
                }
                Ok(())
            }
            Some(Event::Failed(source)) => Err(ActorError::Model {
                actor: self.name.clone(),
                source,
            }),
            None => Err(ActorError::EngineGone {
                actor: self.name.clone(),
            }),
        }
    }

    async fn give(&mut self, finished: Finished) -> Result<(), ActorError> {
        let Some(Held { prompt, receipt }) = self.supply.finish(finished.key) else {
            return Ok(());
        };
        let mut completions = finished.completions;
        for completion in &mut completions {
            completion.text = self.tokenizer.completion_text(&prompt.ids, completion);
        }
        self.throughput.wrote(&completions, self.supply.answering());
        let pair = Pair {
            prompt,
            version: self.version,
            completions,
            actor: self.name.clone(),
        };
        let droppable =
            self.identical == IdenticalPairs::Drop && pair.prompt.purpose == Purpose::Train;
        if droppable && pair.is_identical() {
            let detail = "all completions have the same tokens".to_owned();
            let refusal = Refusal {
                log_ratio: pair.completions.first().map(Completion::log_ratio),
                ..Refusal::new(DropReason::Identical, detail)
            };
            let held = Held {
                prompt: pair.prompt,
                receipt,
            };
            return self.drop_prompt(Some(held), refusal).await;
        }
        let wait = self.waits.enter("room for pairs");
        let sent = self.pairs.send(pair).await;
        drop(wait);
        sent.map_err(|source| self.lost(source))?;
        receipt.acknowledge();
        self.counters.given(1);
        Ok(())
    }

    async fn drop_prompt(
        &mut self,
        held: Option<Held>,
        refusal: Refusal,
    ) -> Result<(), ActorError> {
        let Some(Held { prompt, receipt }) = held else {
            return Ok(());
        };
        let Refusal {
            reason,
            detail,
            log_ratio,
        } = refusal;
        if reason == DropReason::Failed {
            tracing::warn!(
                actor = self.name,
                prompt = prompt.id.0,
                detail,
                "a prompt was dropped"
            );
        }
        let note = Dropped {
            prompt: prompt.id,
            session: prompt.version.session,
            station: Station::Actor,
            reason,
            log_ratio,
            detail,
        };
        let wait = self.waits.enter("room for notes");
        let sent = self.drops.send(note).await;
        drop(wait);
        sent.map_err(|source| self.lost(source))?;
        receipt.acknowledge();
        self.counters.dropped(reason, 1);
        Ok(())
    }

    fn command(&self, command: Command) -> Result<(), ActorError> {
        self.commands
            .send(command)
            .map_err(|_| ActorError::EngineGone {
                actor: self.name.clone(),
            })
    }

    fn lost(&self, source: TransportError) -> ActorError {
        ActorError::Stream {
            actor: self.name.clone(),
            source,
        }
    }

    fn unloadable(&self, source: TransportError) -> ActorError {
        ActorError::Weights {
            actor: self.name.clone(),
            source,
        }
    }
}
