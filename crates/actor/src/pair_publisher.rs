//! Publisher of pairs: sends pairs and drop notes, then acknowledges their prompts.
//!
//! Promises that every finished prompt leaves as exactly one message, counted, and is acknowledged only once that
//! message is stored; and that an invalid prompt is rejected. Does not know where prompts come from.

use messages::{
    Completion, DropReason, Dropped, InvalidMessage, Pair, PromptId, Purpose, Stage, WeightsVersion,
};
use model::Tokenizer;
use telemetry::{StageCounters, Waits};
use transport::{Sender, TransportError};

use crate::{error::ActorError, prompt_queue::QueuedPrompt};

/// Treatment of a training pair whose completions are all identical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdenticalPairs {
    /// The pair is sent: the objective learns from single completions too.
    Keep,
    /// The pair is dropped: a loss of log-ratio differences has no gradient on it.
    Drop,
}

/// Reason why a prompt gets no pair.
pub(crate) struct PromptDrop {
    reason: DropReason,
    detail: String,
    /// log π/ref of one of the completions, if they were identical.
    log_ratio: Option<f32>,
}

impl PromptDrop {
    pub(crate) fn failed(detail: String) -> Self {
        Self {
            reason: DropReason::Failed,
            detail,
            log_ratio: None,
        }
    }

    pub(crate) fn invalid(cause: &InvalidMessage) -> Self {
        Self {
            reason: DropReason::Invalid,
            detail: cause.to_string(),
            log_ratio: None,
        }
    }

    pub(crate) fn superseded() -> Self {
        Self {
            reason: DropReason::Superseded,
            detail: "sent by a superseded session".to_owned(),
            log_ratio: None,
        }
    }

    fn identical(completions: &[Completion]) -> Self {
        Self {
            reason: DropReason::Identical,
            detail: "all completions have the same tokens".to_owned(),
            log_ratio: completions
                .first()
                .and_then(Completion::log_ratio)
                .map(|ratio| ratio as f32),
        }
    }
}

/// Sends pairs and drop notes.
pub(crate) struct PairPublisher {
    pub(crate) actor: String,
    pub(crate) pairs: Sender<Pair>,
    pub(crate) drops: Sender<Dropped>,
    pub(crate) counters: StageCounters,
    pub(crate) waits: Waits,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) identical: IdenticalPairs,
}

impl PairPublisher {
    /// Sends the pair of a prompt, sampled with weights `version`; or the note that it was dropped because its
    /// completions are identical.
    ///
    /// # Errors
    /// If the stream is closed.
    pub(crate) async fn send(
        &self,
        queued: QueuedPrompt,
        mut completions: Vec<Completion>,
        version: WeightsVersion,
    ) -> Result<(), ActorError> {
        let QueuedPrompt { prompt, receipt } = queued;
        for completion in &mut completions {
            completion.text = self.tokenizer.completion_text(&prompt.ids, completion);
        }
        let pair = Pair {
            prompt,
            version,
            completions,
            actor: self.actor.clone(),
        };
        let is_droppable =
            self.identical == IdenticalPairs::Drop && pair.prompt.purpose == Purpose::Train;
        if is_droppable && pair.is_identical() {
            let cause = PromptDrop::identical(&pair.completions);
            let prompt = pair.prompt;
            return self.drop(QueuedPrompt { prompt, receipt }, cause).await;
        }
        let wait = self.waits.enter("room for pairs");
        let sent = self.pairs.send(pair).await;
        drop(wait);
        sent.map_err(|source| self.error(source))?;
        receipt.acknowledge();
        self.counters.emitted(1);
        Ok(())
    }

    /// Sends the note that a prompt was dropped.
    ///
    /// # Errors
    /// If the stream is closed.
    pub(crate) async fn drop(
        &self,
        queued: QueuedPrompt,
        cause: PromptDrop,
    ) -> Result<(), ActorError> {
        let QueuedPrompt { prompt, receipt } = queued;
        let PromptDrop {
            reason,
            detail,
            log_ratio,
        } = cause;
        self.log(prompt.id, reason, &detail);
        let note = Dropped {
            prompt: prompt.id,
            session: prompt.version.session,
            stage: Stage::Actor,
            reason,
            log_ratio,
            detail: Dropped::shortened(detail),
        };
        let wait = self.waits.enter("room for notes");
        let sent = self.drops.send(note).await;
        drop(wait);
        sent.map_err(|source| self.error(source))?;
        match reason {
            DropReason::Invalid => receipt.dead_letter(&prompt).await,
            _ => receipt.acknowledge(),
        }
        self.counters.dropped(reason, 1);
        Ok(())
    }

    /// Logs the drops that a working run does not have.
    fn log(&self, prompt: PromptId, reason: DropReason, detail: &str) {
        let (actor, prompt) = (&self.actor, prompt.0);
        match reason {
            DropReason::Failed => tracing::warn!(actor, prompt, detail, "a prompt was dropped"),
            DropReason::Invalid => {
                tracing::warn!(actor, prompt, detail, "an invalid prompt was rejected");
            }
            _ => {}
        }
    }

    /// The error of a stream.
    pub(crate) fn error(&self, source: TransportError) -> ActorError {
        ActorError::Stream {
            actor: self.actor.clone(),
            source,
        }
    }
}
