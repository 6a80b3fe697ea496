//! An actor's life: take prompts, have them answered, give pairs; take newer weights when idle.

use std::thread::JoinHandle;

use crossbeam_channel::Sender as Commands;
use messages::{DropReason, Dropped, Pair, Prompt, PromptId, Purpose, Station, WeightsVersion};
use model::{Finished, LanguageModel, Request, Sampler, SamplingSettings, Tokenizer};
use telemetry::{Holder, StationCounters};
use tokio::sync::{mpsc, watch};
use transport::{Announcements, Receiver, Sender, TransportError, WeightsShelf};

use crate::{
    ActorError, Pacing,
    engine::{self, Command, Event},
    metrics::Throughput,
    supply::{Held, Supply},
};

/// What becomes of a training pair whose completions are all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdenticalPairs {
    /// It goes on: the objective learns from single completions too.
    Keep,
    /// It is dropped: a loss of differences has nothing to learn from it.
    Drop,
}

/// What an actor is made of.
pub struct ActorParts {
    /// Its name in pairs, metrics and logs.
    pub name: String,
    /// The policy at version 0: the reference, or the reference with an adapter beside it.
    pub policy: LanguageModel,
    /// The fixed reference.
    pub reference: LanguageModel,
    /// Turns completions into text for people.
    pub tokenizer: Tokenizer,
    /// How tokens are drawn.
    pub sampling: SamplingSettings,
    /// The weight on the reference of every completion of a training prompt.
    pub mixture_coefs: Vec<f32>,
    /// The policy's samples of a prompt of the adversarial game.
    pub contest_samples: usize,
    /// Completions written at once.
    pub slots: usize,
    /// The longest prompt, in tokens.
    pub max_prompt_length: usize,
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
    sampling: SamplingSettings,
    mixture_coefs: Vec<f32>,
    contest_samples: usize,
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
    loading: Option<WeightsVersion>,
    commands: Commands<Command>,
    events: mpsc::Receiver<Event>,
    thread: JoinHandle<()>,
    throughput: Throughput,
}

impl Actor {
    /// Makes an actor and starts its thread.
    ///
    /// # Errors
    /// When the caches do not fit the device or the thread cannot be started.
    pub fn new(parts: ActorParts) -> Result<Self, ActorError> {
        let failed = |source| ActorError::Model {
            actor: parts.name.clone(),
            source,
        };
        let policy = parts.policy;
        let capacity = parts.max_prompt_length + parts.sampling.max_new_tokens;
        let sampler = Sampler::new(
            policy.clone(),
            parts.reference,
            parts.sampling,
            parts.slots,
            capacity,
        )
        .map_err(failed)?;
        let (commands, events, thread) = engine::spawn(&parts.name, sampler, policy, parts.slots)
            .map_err(|source| ActorError::Thread {
            actor: parts.name.clone(),
            source,
        })?;
        Ok(Self {
            throughput: Throughput::new(&parts.name),
            name: parts.name,
            tokenizer: parts.tokenizer,
            sampling: parts.sampling,
            mixture_coefs: parts.mixture_coefs,
            contest_samples: parts.contest_samples,
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
            version: WeightsVersion(0),
            loading: None,
            commands,
            events,
            thread,
        })
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
            tokio::select! {
                event = self.events.recv() => self.on_event(event).await?,
                delivery = self.prompts.receive(), if open && fed && self.has_room() => match delivery {
                    Ok(delivery) => {
                        let (prompt, receipt) = delivery.take();
                        self.take(prompt, receipt);
                    }
                    Err(_) => fed = false,
                },
                newer = self.announcements.newer_than(self.version), if open && self.loading.is_none() => {
                    let manifest = newer.map_err(|source| self.unloadable(source))?;
                    self.loading = Some(manifest.version);
                },
                changed = shutdown.changed(), if open => {
                    if changed.is_err() || *shutdown.borrow() {
                        open = false;
                    }
                }
            }
        }
        // What was not started is still in hand as we leave; dropped with us, it goes back to the stream.
        self.in_hand.set(self.supply.len() as u64);
        drop((self.commands, self.events));
        self.thread
            .join()
            .map_err(|_| ActorError::EngineGone { actor: self.name })
    }

    fn take(&mut self, prompt: Prompt, receipt: transport::Receipt) {
        self.counters.taken(1);
        self.supply.take(prompt, receipt);
        while self.has_room()
            && let Some(delivery) = self.prompts.try_receive()
        {
            let (prompt, receipt) = delivery.take();
            self.counters.taken(1);
            self.supply.take(prompt, receipt);
        }
    }

    /// An actor holds no more prompts ready than its slots could take next: the others are for others.
    fn has_room(&self) -> bool {
        self.supply.ready() * self.mixture_coefs.len() < self.slots
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
            .map(|prompt| self.request(prompt))
            .collect();
        self.command(Command::Answer(requests))
    }

    fn request(&self, prompt: Prompt) -> Request {
        Request {
            key: prompt.id.0,
            seed: prompt.seed,
            mixture_coefs: match prompt.purpose {
                Purpose::Train => self.mixture_coefs.clone(),
                Purpose::Evaluate => vec![0.0, 1.0],
                Purpose::Contest => vec![0.0; self.contest_samples],
            },
            max_new_tokens: self.sampling.max_new_tokens,
            ids: prompt.ids,
        }
    }

    async fn on_event(&mut self, event: Option<Event>) -> Result<(), ActorError> {
        match event {
            Some(Event::Finished(finished)) => self.give(finished).await,
            Some(Event::Refused(key, detail)) => {
                let held = self.supply.finish(PromptId(key));
                self.drop_prompt(held, DropReason::Failed, detail).await
            }
            Some(Event::Loaded(version)) => {
                tracing::debug!(actor = self.name, version = version.0, "weights loaded");
                self.loading = None;
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
        let Some(Held { prompt, receipt }) = self.supply.finish(PromptId(finished.key)) else {
            return Ok(());
        };
        let mut completions = finished.completions;
        for completion in &mut completions {
            completion.text = self.tokenizer.decode(&completion.ids);
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
            let held = Held {
                prompt: pair.prompt,
                receipt,
            };
            return self
                .drop_prompt(Some(held), DropReason::Identical, detail)
                .await;
        }
        self.pairs
            .send(pair)
            .await
            .map_err(|source| self.closed(source))?;
        receipt.acknowledge();
        self.counters.given(1);
        Ok(())
    }

    async fn drop_prompt(
        &mut self,
        held: Option<Held>,
        reason: DropReason,
        detail: String,
    ) -> Result<(), ActorError> {
        let Some(Held { prompt, receipt }) = held else {
            return Ok(());
        };
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
            station: Station::Actor,
            reason,
            detail,
        };
        self.drops
            .send(note)
            .await
            .map_err(|source| self.closed(source))?;
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

    fn closed(&self, source: transport::Closed) -> ActorError {
        ActorError::Closed {
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
