//! Sampler thread: holds the models, samples completions and does nothing else.

use std::{sync::Arc, thread::JoinHandle};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use messages::WeightsVersion;
use model::{Finished, LanguageModel, ModelError, Request, Sampler};
use tokio::sync::mpsc;

use crate::{
    error::ActorError,
    quantization_check::{QuantizationCheck, QuantizationError},
};

/// Command to the sampler thread. The thread ends when the channel closes.
enum SamplerCommand {
    /// Sample completions of these prompts, all admitted before the next decoding step.
    Sample(Vec<Request>),
    /// Load this version. Sent only while the sampler is idle.
    Load(WeightsVersion, Arc<Vec<u8>>),
}

/// Event from the sampler thread.
pub(crate) enum SamplerEvent {
    /// All completions of a prompt have ended.
    Finished(Finished),
    /// The sampler rejected the prompt with this key, and why.
    Rejected(u64, String),
    /// A version of the weights has been loaded.
    Loaded(WeightsVersion),
    /// The quantisation error of the loaded version.
    QuantizationError(QuantizationError),
}

/// An event; or the model's error, with which the thread has ended.
type SamplerOutput = Result<SamplerEvent, ModelError>;

/// Handle of the sampler thread.
pub(crate) struct SamplerThread {
    actor: String,
    commands: Sender<SamplerCommand>,
    events: mpsc::Receiver<SamplerOutput>,
    thread: JoinHandle<()>,
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
            policy,
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
        })
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
        blob: Arc<Vec<u8>>,
    ) -> Result<(), ActorError> {
        self.send(SamplerCommand::Load(version, blob))
    }

    /// The next event. Cancel-safe.
    ///
    /// # Errors
    /// If the model failed or the thread has ended.
    pub(crate) async fn next(&mut self) -> Result<SamplerEvent, ActorError> {
        match self.events.recv().await {
            Some(Ok(event)) => Ok(event),
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
    /// Base of new weights; with an adapter, only the adapter is replaced.
    policy: LanguageModel,
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
        for finished in self.sampler.step()? {
            if let Some(error) = self.quantization.check(&self.policy, &finished)? {
                self.emit(Ok(SamplerEvent::QuantizationError(error)));
            }
            self.emit(Ok(SamplerEvent::Finished(finished)));
        }
        Ok(true)
    }

    fn handle(&mut self, command: SamplerCommand) -> Result<(), ModelError> {
        match command {
            SamplerCommand::Sample(requests) => {
                for request in requests {
                    let key = request.key;
                    self.quantization.admit(&request);
                    if let Err(error) = self.sampler.admit(request) {
                        self.quantization.reject(key);
                        self.emit(Ok(SamplerEvent::Rejected(key, error.to_string())));
                    }
                }
            }
            SamplerCommand::Load(version, blob) => {
                self.policy = self.policy.with_blob(&blob)?;
                let precision = self.quantization.start_version();
                self.sampler.set_policy(self.policy.clone(), precision)?;
                self.emit(Ok(SamplerEvent::Loaded(version)));
            }
        }
        Ok(())
    }

    fn emit(&self, output: SamplerOutput) {
        if self.events.blocking_send(output).is_err() {
            tracing::debug!("the actor ended before the events of its sampler thread were handled");
        }
    }
}
