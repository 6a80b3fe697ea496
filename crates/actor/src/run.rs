//! The actor's loop: receives prompts, samples completions, sends pairs; loads newer weights while idle.

use messages::{
    Dropped, InvalidMessage, MessageLimits, Pacing, Pair, Prompt, Purpose, WeightsVersion,
};
use model::{Finished, LanguageModel, PublishedWeights, Request, Sampler, Tokenizer};
use telemetry::{InFlightGauge, NamedWait, StageCounters, Waits};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use transport::{Delivery, Receiver, Sender, TransportError, WeightStore};

use crate::{
    error::ActorError,
    metrics::Throughput,
    pair_publisher::{IdenticalPairs, PairPublisher, PromptDrop},
    prompt_queue::{PromptQueue, QueuedPrompt, StartedPrompt},
    quantization_check::{PrecisionLimit, QuantizationCheck},
    sampler_thread::{SamplerEvent, SamplerThread},
    weight_loader::WeightLoader,
};

/// Parts of an actor.
pub struct ActorParts {
    /// Name in pairs, metrics and logs.
    pub name: String,
    /// Models.
    pub model: ActorModel,
    /// Completions to sample per prompt.
    pub completions: CompletionPlan,
    /// Pacing of prompts.
    pub pacing: Pacing,
    /// Treatment of training pairs whose completions are identical.
    pub identical: IdenticalPairs,
    /// Streams.
    pub streams: ActorStreams,
    /// Stage counters.
    pub counters: StageCounters,
}

/// Models of an actor.
pub struct ActorModel {
    /// Policy at version 0: the reference, or the reference with an adapter.
    pub policy: LanguageModel,
    /// Sampler for this policy and its reference.
    pub sampler: Box<dyn Sampler>,
    /// Number of the sampler's slots: completions sampled at once.
    pub slots: usize,
    /// Weight precision used for sampling, and its largest error.
    pub precision: PrecisionLimit,
    /// Decodes completions into text.
    pub tokenizer: Tokenizer,
}

/// Completions to sample per prompt, by purpose.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionPlan {
    /// Training: weight on the reference of every completion. Not empty.
    pub mixture_coefs: Vec<f32>,
    /// APO: number of policy samples.
    pub apo_samples: usize,
    /// Evaluation: number of policy samples from the full distribution at temperature 1, besides the judged pair: 1
    /// if the sampling settings temper or truncate, else 0.
    pub exact_samples: usize,
    /// Longest completion, in tokens.
    pub max_new_tokens: usize,
    /// Training: whether log ref is recorded of all of the policy's own completions, and not of one prompt a version alone.
    /// The learner computes it of all that its labels compare; what it leaves out is known as recorded only.
    pub records_reference: bool,
}

/// Streams of an actor.
pub struct ActorStreams {
    /// Incoming prompts.
    pub prompts: Receiver<Prompt>,
    /// Outgoing pairs.
    pub pairs: Sender<Pair>,
    /// Outgoing notes of dropped prompts.
    pub drops: Sender<Dropped>,
    /// Incoming weights.
    pub weight_store: WeightStore<PublishedWeights>,
    /// Limits of incoming prompts.
    pub limits: MessageLimits,
}

/// An actor.
pub struct Actor {
    slots: usize,
    completions: CompletionPlan,
    prompts: Receiver<Prompt>,
    limits: MessageLimits,
    queue: PromptQueue,
    weights: WeightLoader,
    sampler: SamplerThread,
    publisher: PairPublisher,
    throughput: Throughput,
    in_flight: InFlightGauge,
    wait: NamedWait,
    /// Version of the weights of the last training prompt whose log ref was recorded for its own sake.
    recorded: Option<WeightsVersion>,
}

impl Actor {
    /// Builds an actor and starts its sampler thread.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn new(parts: ActorParts) -> Result<Self, ActorError> {
        let ActorParts { name, model, .. } = parts;
        let sampler = SamplerThread::spawn(
            &name,
            model.sampler,
            model.policy,
            QuantizationCheck::new(model.precision),
            model.slots,
        )?;
        let capacity = model.slots.div_ceil(parts.completions.mixture_coefs.len());
        let waits = Waits::new("actor");
        Ok(Self {
            wait: NamedWait::new(waits.clone()),
            slots: model.slots,
            completions: parts.completions,
            prompts: parts.streams.prompts,
            limits: parts.streams.limits,
            queue: PromptQueue::new(parts.pacing, capacity),
            weights: WeightLoader::new(&name, parts.streams.weight_store),
            sampler,
            recorded: None,
            throughput: Throughput::new(&name),
            in_flight: parts.counters.in_flight_gauge(),
            publisher: PairPublisher {
                actor: name,
                pairs: parts.streams.pairs,
                drops: parts.streams.drops,
                counters: parts.counters,
                waits,
                tokenizer: model.tokenizer,
                identical: parts.identical,
            },
        })
    }

    /// Current waits: "prompts", "the rest of a prompt batch", "weights", or room in an outgoing stream; none while
    /// sampling.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.publisher.waits.clone()
    }

    /// Watches the weights version that it samples with.
    #[must_use]
    pub fn loaded(&self) -> watch::Receiver<WeightsVersion> {
        self.weights.loaded()
    }

    /// Runs until `shutdown` turns true or the prompt stream is closed, then finishes the prompts in progress; what
    /// was not started is returned to the stream.
    ///
    /// # Errors
    /// If the model fails, weights cannot be fetched, or a stream is closed.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> Result<(), ActorError> {
        let (mut draining, mut exhausted) = (false, false);
        while self.queue.in_progress() > 0 || !draining && (!exhausted || self.queue.len() > 0) {
            if !draining {
                self.advance().await?;
            }
            self.in_flight.set(self.queue.len() as u64);
            let now = Instant::now();
            self.prompts.prefetch(self.queue.room(now));
            self.note_wait();
            let has_room = self.queue.has_room(now);
            let next_room = self.queue.next_room(now).filter(|_| !has_room);
            let receives = !draining && !exhausted && has_room;
            let follows = !draining && !self.weights.is_pending();
            tokio::select! {
                event = self.sampler.next() => self.handle(event?).await?,
                delivery = self.prompts.receive(), if receives => match delivery {
                    Ok(delivery) => self.accept(delivery).await?,
                    Err(TransportError::Closed(_)) => exhausted = true,
                    Err(source) => return Err(self.publisher.error(source)),
                },
                newer = self.weights.newer(), if follows => self.announce(newer?).await?,
                () = until(next_room) => {}
                changed = shutdown.changed(), if !draining => {
                    draining = changed.is_err() || *shutdown.borrow();
                }
            }
        }
        self.publisher.counters.returned(self.queue.len() as u64);
        self.in_flight.set(0);
        self.sampler.join()
    }

    /// Loads newer weights once nothing is in progress; while none are pending, starts prompts.
    async fn advance(&mut self) -> Result<(), ActorError> {
        if !self.weights.is_pending() {
            return self.start();
        }
        if self.queue.in_progress() > 0 {
            return Ok(());
        }
        self.weights.load_into(&self.sampler).await
    }

    /// Submits the prompts that the loaded weights may answer to the free slots. Prompts for other models than those that
    /// are being sampled from wait until the sampler is idle, and hold up later ones.
    fn start(&mut self) -> Result<(), ActorError> {
        let version = self.weights.version();
        let Some(purpose) = self.queue.next_purpose(version) else {
            return Ok(());
        };
        if !self.sampler.selects(purpose) {
            if self.queue.in_progress() > 0 {
                return Ok(());
            }
            self.sampler.select(purpose)?;
        }
        let width = self.completions.mixture_coefs.len();
        let busy = self.queue.in_progress() * width;
        let limit = self.slots.saturating_sub(busy).div_ceil(width);
        let sampler = &self.sampler;
        let is_selected = |purpose| sampler.selects(purpose);
        let started = self.queue.start(version, limit, is_selected);
        if started.is_empty() {
            return Ok(());
        }
        let mut requests = Vec::with_capacity(started.len());
        for started in started {
            // Of one prompt a version, so that the learner sees where this actor's arithmetic departs from its own.
            let is_first =
                started.prompt.purpose == Purpose::Train && self.recorded != Some(version);
            if is_first {
                self.recorded = Some(version);
            }
            let mut request = self.completions.request(started);
            request.records_reference |= is_first;
            requests.push(request);
        }
        self.sampler.submit(requests)
    }

    fn note_wait(&mut self) {
        let reason = if self.queue.in_progress() > 0 {
            None
        } else if self.weights.is_pending() || self.queue.ready() > 0 {
            Some("weights")
        } else if self.queue.len() > 0 {
            Some("the rest of a prompt batch")
        } else {
            Some("prompts")
        };
        self.wait.set(reason);
    }

    /// Queues this prompt, and further ones that have arrived, while there is room.
    async fn accept(&mut self, delivery: Delivery<Prompt>) -> Result<(), ActorError> {
        let mut next = Some(delivery);
        while let Some(delivery) = next {
            self.publisher.counters.received(1);
            let exhausted = delivery.exceeds_delivery_limit();
            let exhausted = exhausted.then(|| delivery.deliveries());
            let queued = QueuedPrompt::from(delivery);
            match self.rejection(&queued.prompt, exhausted).await? {
                Some(cause) => self.publisher.drop(queued, cause).await?,
                None => self.queue.push(queued, Instant::now()),
            }
            let room = self.queue.has_room(Instant::now());
            next = room.then(|| self.prompts.try_receive()).flatten();
        }
        Ok(())
    }

    /// Reason why a received prompt is not queued; `None` if it is. `exhausted` is its number of deliveries if that exceeds
    /// the limit. Enters the prompt's session.
    async fn rejection(
        &mut self,
        prompt: &Prompt,
        exhausted: Option<u32>,
    ) -> Result<Option<PromptDrop>, ActorError> {
        if let Some(deliveries) = exhausted {
            let detail = format!("no answer after {} deliveries", deliveries - 1);
            return Ok(Some(PromptDrop::failed(detail)));
        }
        if let Err(invalid) = self.check(prompt).await {
            return Ok(Some(PromptDrop::invalid(&invalid)));
        }
        self.supersede(self.limits.newest).await?;
        let is_old = prompt.version.session < self.queue.session();
        Ok(is_old.then(PromptDrop::superseded))
    }

    /// Checks a prompt. If its weights are unknown here, refreshes the announcement from the weight store and checks
    /// again.
    async fn check(&mut self, prompt: &Prompt) -> Result<(), InvalidMessage> {
        self.limits.newest = self.weights.announced();
        match prompt.check_open(&self.limits) {
            Err(InvalidMessage::Unannounced { .. }) => {}
            checked => return checked,
        }
        self.weights.refresh().await;
        self.limits.newest = self.weights.announced();
        prompt.check_open(&self.limits)
    }

    /// Enters the session of newly announced weights, and drops the prompts that name weights which do not exist.
    async fn announce(&mut self, newest: WeightsVersion) -> Result<(), ActorError> {
        self.supersede(newest).await?;
        for queued in self.queue.announce(newest) {
            let found = queued.prompt.version;
            let cause = PromptDrop::invalid(&InvalidMessage::Unannounced { found, newest });
            self.publisher.drop(queued, cause).await?;
        }
        Ok(())
    }

    /// Drops the queued prompts of sessions before that of these announced weights.
    async fn supersede(&mut self, newest: WeightsVersion) -> Result<(), ActorError> {
        for queued in self.queue.supersede(newest) {
            let cause = PromptDrop::superseded();
            self.publisher.drop(queued, cause).await?;
        }
        Ok(())
    }

    async fn handle(&mut self, event: SamplerEvent) -> Result<(), ActorError> {
        match event {
            SamplerEvent::Finished(finished) => self.finish(finished).await,
            SamplerEvent::Rejected(key, detail) => match self.queue.finish(key) {
                Some(queued) => {
                    self.publisher
                        .drop(queued, PromptDrop::failed(detail))
                        .await
                }
                None => Ok(()),
            },
            SamplerEvent::Loaded(loaded) => {
                self.weights.finish(loaded.version);
                Ok(())
            }
            SamplerEvent::QuantizationError(error) => {
                self.throughput.publish_quantization_error(error.nats);
                if error.is_too_large {
                    tracing::warn!(
                        actor = self.publisher.actor,
                        nats_per_token = error.nats,
                        "the quantisation error exceeds actor.max_quantization_error; the next version is loaded in learner.precision"
                    );
                }
                Ok(())
            }
        }
    }

    async fn finish(&mut self, finished: Finished) -> Result<(), ActorError> {
        let Some(queued) = self.queue.finish(finished.key) else {
            return Ok(());
        };
        let completions = finished.completions;
        self.throughput
            .count(&completions, self.queue.in_progress());
        self.publisher
            .send(queued, completions, self.weights.version())
            .await
    }
}

/// Waits until `instant`; for ever without one.
async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

impl CompletionPlan {
    /// The sampling request of a prompt.
    fn request(&self, started: StartedPrompt) -> Request {
        let StartedPrompt { key, prompt } = started;
        let (mixture_coefs, exact, records_reference) = match prompt.purpose {
            // Prompts of pairs from files are not sent to actors.
            Purpose::Train | Purpose::File => {
                (self.mixture_coefs.clone(), 0, self.records_reference)
            }
            Purpose::Evaluate | Purpose::EvaluateAverage | Purpose::EvaluateReference => {
                let mut coefs = vec![0.0, 1.0];
                coefs.resize(2 + self.exact_samples, 0.0);
                (coefs, self.exact_samples, true)
            }
            Purpose::Apo => (vec![0.0; self.apo_samples], 0, false),
        };
        Request {
            key,
            seed: prompt.seed,
            mixture_coefs,
            exact,
            max_new_tokens: self.max_new_tokens,
            records_reference,
            ids: prompt.ids,
        }
    }
}
