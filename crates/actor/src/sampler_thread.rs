//! Sampler thread: holds the models, samples completions and does nothing else.

use std::{sync::Arc, thread::JoinHandle};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use messages::{Completion, Purpose, WeightsVersion};
use model::{
    Finished, LanguageModel, ModelError, Precision, PublishedWeights, Request, Sampler, Sequence,
    within_tokens,
};
use tokio::sync::mpsc;

use crate::{
    error::ActorError,
    model_selection::{LoadedModels, ModelSelection},
    quantization_check::{QuantizationCheck, QuantizationError},
};

/// Maximum number of tokens, prompts and completions, of a pass that scores identical completions.
const PASS_TOKENS: usize = 2048;

/// Command to the sampler thread. The thread ends when the channel closes.
enum SamplerCommand {
    /// Sample completions of these prompts, all admitted before the next decoding step.
    Sample(Vec<Request>),
    /// Load this version and select its policy and reference. Sent only while the sampler is idle.
    Load(WeightsVersion, Arc<PublishedWeights>),
    /// Sample from these of the loaded models. Sent only while the sampler is idle, before prompts for them.
    Select(ModelSelection),
}

/// Event from the sampler thread.
pub(crate) enum SamplerEvent {
    /// All completions of a prompt have ended.
    Finished(Finished),
    /// The sampler rejected the prompt with this key, and why.
    Rejected(u64, String),
    /// A version of the weights has been loaded.
    Loaded(LoadedWeights),
    /// The quantisation error of the loaded version.
    QuantizationError(QuantizationError),
}

/// Weights that have been loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoadedWeights {
    pub(crate) version: WeightsVersion,
    /// Whether the reference that came with them is not that of the start.
    pub(crate) reference_has_moved: bool,
}

/// An event; or the model's error, with which the thread has ended.
type SamplerOutput = Result<SamplerEvent, ModelError>;

/// Handle of the sampler thread.
pub(crate) struct SamplerThread {
    actor: String,
    commands: Sender<SamplerCommand>,
    events: mpsc::Receiver<SamplerOutput>,
    thread: JoinHandle<()>,
    /// Models that submitted prompts are sampled with.
    selection: ModelSelection,
    reference_has_moved: bool,
}

impl SamplerThread {
    /// Starts the thread under the actor's name, around a sampler with `slots` slots.
    ///
    /// # Errors
    /// If the operating system cannot start a thread.
    pub(crate) fn spawn(
        actor: &str,
        sampler: Box<dyn Sampler>,
        policy: LanguageModel,
        quantization: QuantizationCheck,
        slots: usize,
    ) -> Result<Self, ActorError> {
        // A request takes at least one slot, and at most one load is pending: sending a command never blocks.
        let (commands, inbox) = crossbeam_channel::bounded(slots + 1);
        let (outbox, events) = mpsc::channel(slots + 1);
        let sampler_loop = SamplerLoop {
            sampler,
            models: LoadedModels::at_start(policy),
            selection: ModelSelection::Current,
            has_moved_reference: false,
            quantization,
            commands: inbox,
            events: outbox,
        };
        let thread = std::thread::Builder::new()
            .name(actor.to_owned())
            .spawn(move || sampler_loop.run())
            .map_err(|source| ActorError::Thread {
                actor: actor.to_owned(),
                source,
            })?;
        Ok(Self {
            actor: actor.to_owned(),
            commands,
            events,
            thread,
            selection: ModelSelection::Current,
            reference_has_moved: false,
        })
    }

    /// Whether prompts of this purpose are sampled with the selected models.
    pub(crate) fn selects(&self, purpose: Purpose) -> bool {
        self.selection == ModelSelection::of(purpose, self.reference_has_moved)
    }

    /// Selects the models for prompts of this purpose; only while the sampler is idle.
    ///
    /// # Errors
    /// If the thread has ended.
    pub(crate) fn select(&mut self, purpose: Purpose) -> Result<(), ActorError> {
        self.selection = ModelSelection::of(purpose, self.reference_has_moved);
        self.send(SamplerCommand::Select(self.selection))
    }

    /// Submits prompts for sampling.
    ///
    /// # Errors
    /// If the thread has ended.
    pub(crate) fn submit(&self, requests: Vec<Request>) -> Result<(), ActorError> {
        self.send(SamplerCommand::Sample(requests))
    }

    /// Loads a version of the weights; only while the sampler is idle.
    ///
    /// # Errors
    /// If the thread has ended.
    pub(crate) fn load(
        &self,
        version: WeightsVersion,
        weights: Arc<PublishedWeights>,
    ) -> Result<(), ActorError> {
        self.send(SamplerCommand::Load(version, weights))
    }

    /// The next event. Cancel-safe.
    ///
    /// # Errors
    /// If the model failed or the thread has ended.
    pub(crate) async fn next(&mut self) -> Result<SamplerEvent, ActorError> {
        match self.events.recv().await {
            Some(Ok(event)) => {
                if let SamplerEvent::Loaded(loaded) = &event {
                    self.selection = ModelSelection::Current;
                    self.reference_has_moved = loaded.reference_has_moved;
                }
                Ok(event)
            }
            Some(Err(source)) => Err(ActorError::Model {
                actor: self.actor.clone(),
                source,
            }),
            None => Err(self.panicked()),
        }
    }

    /// Ends the thread and waits for it.
    ///
    /// # Errors
    /// If it panicked.
    pub(crate) fn join(self) -> Result<(), ActorError> {
        drop((self.commands, self.events));
        self.thread
            .join()
            .map_err(|_| ActorError::ThreadPanicked { actor: self.actor })
    }

    fn send(&self, command: SamplerCommand) -> Result<(), ActorError> {
        self.commands.send(command).map_err(|_| self.panicked())
    }

    fn panicked(&self) -> ActorError {
        ActorError::ThreadPanicked {
            actor: self.actor.clone(),
        }
    }
}

/// State of the thread itself.
struct SamplerLoop {
    sampler: Box<dyn Sampler>,
    models: LoadedModels,
    /// Models that the sampler has.
    selection: ModelSelection,
    /// Whether the sampler's reference is another than that of the start.
    has_moved_reference: bool,
    quantization: QuantizationCheck,
    commands: Receiver<SamplerCommand>,
    events: mpsc::Sender<SamplerOutput>,
}

impl SamplerLoop {
    fn run(mut self) {
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    self.emit(Err(error));
                    return;
                }
            }
        }
    }

    /// Handles all queued commands, blocking for one if the sampler is idle, then decodes one token of every
    /// completion. False once the command channel is closed.
    fn turn(&mut self) -> Result<bool, ModelError> {
        if self.sampler.is_idle() {
            let Ok(command) = self.commands.recv() else {
                return Ok(false);
            };
            self.handle(command)?;
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.handle(command)?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
        let mut finished = self.sampler.step()?;
        self.score_identical(&mut finished)?;
        for finished in finished {
            if let Some(policy) = self.models.policy(self.selection)
                && let Some(error) = self.quantization.check(policy, &finished)?
            {
                self.emit(Ok(SamplerEvent::QuantizationError(error)));
            }
            self.emit(Ok(SamplerEvent::Finished(finished)));
        }
        Ok(true)
    }

    /// Records log ref of completions that are all identical, which no label compares: without it the divergence of a
    /// step would leave out its most probable completions.
    fn score_identical(&self, finished: &mut [Finished]) -> Result<(), ModelError> {
        let is_unscored = |finished: &&mut Finished| match &finished.completions[..] {
            [first, _, ..] => {
                first.ref_logp.is_empty() && Completion::are_identical(&finished.completions)
            }
            _ => false,
        };
        let mut unscored: Vec<&mut Finished> = finished.iter_mut().filter(is_unscored).collect();
        if unscored.is_empty() {
            return Ok(());
        }
        let sequences: Vec<_> = unscored
            .iter()
            .map(|finished| Sequence {
                prompt: &finished.prompt,
                completion: &finished.completions[0].ids,
            })
            .collect();
        let reference = self.models.moved_reference(self.selection);
        let reference = reference.unwrap_or_else(|| self.models.start());
        let tokens = |sequence: &Sequence<'_>| sequence.prompt.len() + sequence.completion.len();
        let mut scored: Vec<f32> = Vec::new();
        for sequences in within_tokens(&sequences, PASS_TOKENS, tokens) {
            scored.extend(reference.logprobs(sequences)?.logp.to_vec1::<f32>()?);
        }
        let mut rest = &scored[..];
        for finished in &mut unscored {
            let (logp, later) = rest.split_at(finished.completions[0].ids.len());
            for completion in &mut finished.completions {
                completion.ref_logp = logp.to_vec();
            }
            rest = later;
        }
        Ok(())
    }

    fn handle(&mut self, command: SamplerCommand) -> Result<(), ModelError> {
        match command {
            SamplerCommand::Sample(requests) => self.admit(requests),
            SamplerCommand::Select(selection) => {
                let precision = self.quantization.precision();
                self.select(selection, precision)?;
            }
            SamplerCommand::Load(version, weights) => {
                self.models.load(&weights)?;
                let precision = self.quantization.start_version();
                self.select(ModelSelection::Current, precision)?;
                self.emit(Ok(SamplerEvent::Loaded(LoadedWeights {
                    version,
                    reference_has_moved: self.models.reference_has_moved(),
                })));
            }
        }
        Ok(())
    }

    /// Submits prompts to the sampler; rejects those that it cannot answer.
    fn admit(&mut self, requests: Vec<Request>) {
        let is_available = self.models.policy(self.selection).is_some();
        for request in requests {
            let key = request.key;
            if !is_available {
                let reason = "no moving average was published with the loaded weights";
                self.emit(Ok(SamplerEvent::Rejected(key, reason.to_owned())));
                continue;
            }
            self.quantization.admit(&request);
            if let Err(error) = self.sampler.admit(request) {
                self.quantization.reject(key);
                self.emit(Ok(SamplerEvent::Rejected(key, error.to_string())));
            }
        }
    }

    /// Gives the sampler these of the loaded models.
    fn select(
        &mut self,
        selection: ModelSelection,
        precision: Precision,
    ) -> Result<(), ModelError> {
        self.selection = selection;
        if let Some(policy) = self.models.policy(selection) {
            self.sampler.set_policy(policy.clone(), precision)?;
        }
        let moved = self.models.moved_reference(selection);
        let has_moved = moved.is_some();
        if has_moved || self.has_moved_reference {
            let reference = moved.unwrap_or_else(|| self.models.start());
            self.sampler.set_reference(reference.clone(), precision)?;
        }
        self.has_moved_reference = has_moved;
        Ok(())
    }

    fn emit(&self, output: SamplerOutput) {
        if self.events.blocking_send(output).is_err() {
            tracing::debug!("the actor ended before the events of its sampler thread were handled");
        }
    }
}
