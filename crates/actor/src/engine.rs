//! The thread that holds the models: it writes completions and does nothing else.

use std::{sync::Arc, thread::JoinHandle};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use messages::WeightsVersion;
use model::{CompletionWriter, Finished, LanguageModel, ModelError, Request};
use tokio::sync::mpsc;

use crate::drift::Drift;

/// What the thread can be told. When the channel closes it ends.
pub(crate) enum Command {
    /// Answer these prompts, all admitted before the next token is written.
    Answer(Vec<Request>),
    /// Become this version. Told only when nothing is being written.
    Load(WeightsVersion, Arc<Vec<u8>>),
}

/// What the thread tells.
pub(crate) enum Event {
    /// A prompt's completions have ended.
    Finished(Finished),
    /// A prompt cannot be answered, and why.
    Refused(u64, String),
    /// New weights are in place.
    Loaded(WeightsVersion),
    /// How far the numbers that completions are written with lie from f32, in nats a token, and whether that
    /// is too far.
    Drifted { nats: f64, is_too_far: bool },
    /// The model does not work; the thread has ended.
    Failed(ModelError),
}

/// Starts the thread `name` around `writer`, which has so many slots.
pub(crate) fn spawn(
    name: &str,
    writer: Box<dyn CompletionWriter>,
    policy: LanguageModel,
    drift: Drift,
    slots: usize,
) -> std::io::Result<(Sender<Command>, mpsc::Receiver<Event>, JoinHandle<()>)> {
    // An answer takes a slot at least, and there is one load at a time: commands never wait for room.
    let (commands, inbox) = crossbeam_channel::bounded(slots + 1);
    let (events, outbox) = mpsc::channel(slots + 1);
    let engine = Engine {
        writer,
        policy,
        drift,
        inbox,
        events,
    };
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || engine.run())?;
    Ok((commands, outbox, thread))
}

struct Engine {
    writer: Box<dyn CompletionWriter>,
    /// What new weights are laid into: an adapter's beside its base.
    policy: LanguageModel,
    drift: Drift,
    inbox: Receiver<Command>,
    events: mpsc::Sender<Event>,
}

impl Engine {
    fn run(mut self) {
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    self.tell(Event::Failed(error));
                    return;
                }
            }
        }
    }

    /// Obeys every command that is there, waiting for one when there is nothing to write, then writes
    /// one token of every completion. False when nobody commands any more.
    fn turn(&mut self) -> Result<bool, ModelError> {
        if self.writer.is_idle() {
            let Ok(command) = self.inbox.recv() else {
                return Ok(false);
            };
            self.obey(command)?;
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.obey(command)?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
        for finished in self.writer.step()? {
            if let Some((nats, is_too_far)) = self.drift.of(&self.policy, &finished)? {
                self.tell(Event::Drifted { nats, is_too_far });
            }
            self.tell(Event::Finished(finished));
        }
        Ok(true)
    }

    fn obey(&mut self, command: Command) -> Result<(), ModelError> {
        match command {
            Command::Answer(requests) => {
                for request in requests {
                    let key = request.key;
                    self.drift.admit(&request);
                    if let Err(error) = self.writer.admit(request) {
                        self.drift.refused(key);
                        self.tell(Event::Refused(key, error.to_string()));
                    }
                }
            }
            Command::Load(version, blob) => {
                self.policy = self.policy.with_blob(&blob)?;
                let precision = self.drift.renew();
                self.writer.set_policy(self.policy.clone(), precision)?;
                self.tell(Event::Loaded(version));
            }
        }
        Ok(())
    }

    fn tell(&self, event: Event) {
        if self.events.blocking_send(event).is_err() {
            tracing::debug!("an actor left before its thread had told it everything");
        }
    }
}
