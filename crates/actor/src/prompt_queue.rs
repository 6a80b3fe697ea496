//! Prompts of an actor: queued for newer weights or for the rest of their batch, and in progress.

use std::collections::{BTreeMap, VecDeque};

use messages::{Pacing, Prompt, PromptBatch, PromptId, WeightsVersion};
use transport::{Delivery, Receipt};

/// All prompts that were received and neither answered nor dropped.
#[derive(Debug)]
pub(crate) struct PromptQueue {
    pacing: Pacing,
    /// Largest number of ready prompts: what the sampler's slots can hold.
    capacity: usize,
    /// Newest session seen.
    session: u64,
    /// Incomplete batches, by first prompt.
    partial: BTreeMap<PromptId, (PromptBatch, Vec<QueuedPrompt>)>,
    ready: VecDeque<QueuedPrompt>,
    /// By sampling key, since a prompt may be in progress twice after a session was superseded.
    in_progress: BTreeMap<u64, QueuedPrompt>,
    next_key: u64,
}

/// A prompt and its receipt.
#[derive(Debug)]
pub(crate) struct QueuedPrompt {
    pub(crate) prompt: Prompt,
    pub(crate) receipt: Receipt,
}

impl From<Delivery<Prompt>> for QueuedPrompt {
    fn from(delivery: Delivery<Prompt>) -> Self {
        let (prompt, receipt) = delivery.take();
        Self { prompt, receipt }
    }
}

/// A prompt to be sampled, under its sampling key.
#[derive(Debug)]
pub(crate) struct StartedPrompt {
    pub(crate) key: u64,
    pub(crate) prompt: Prompt,
}

impl PromptQueue {
    /// An empty queue with room for `capacity` ready prompts.
    pub(crate) fn new(pacing: Pacing, capacity: usize) -> Self {
        Self {
            pacing,
            capacity,
            session: 0,
            partial: BTreeMap::new(),
            ready: VecDeque::new(),
            in_progress: BTreeMap::new(),
            next_key: 0,
        }
    }

    /// Number of prompts: queued and in progress.
    pub(crate) fn len(&self) -> usize {
        let partial: usize = self
            .partial
            .values()
            .map(|(_, prompts)| prompts.len())
            .sum();
        partial + self.ready.len() + self.in_progress.len()
    }

    /// Number of prompts in progress.
    pub(crate) fn in_progress(&self) -> usize {
        self.in_progress.len()
    }

    /// Number of prompts that wait only for weights or slots.
    pub(crate) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// How many more ready prompts may be queued. An actor takes no more than its slots can start next; the rest is
    /// left to other actors.
    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.ready.len())
    }

    /// Whether another prompt may be received.
    pub(crate) fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// Newest session seen.
    pub(crate) fn session(&self) -> u64 {
        self.session
    }

    /// Queues a prompt; with [`Pacing::Batched`] it becomes ready once its whole batch is here.
    pub(crate) fn push(&mut self, queued: QueuedPrompt) {
        let prompt_batch = queued.prompt.prompt_batch;
        if self.pacing == Pacing::EachPrompt || prompt_batch.count == 1 {
            self.ready.push_back(queued);
            return;
        }
        let (_, partial) = self
            .partial
            .entry(prompt_batch.first)
            .or_insert((prompt_batch, Vec::new()));
        partial.retain(|other| other.prompt.id != queued.prompt.id);
        partial.push(queued);
        if partial.len() == prompt_batch.count as usize
            && let Some((_, mut complete)) = self.partial.remove(&prompt_batch.first)
        {
            complete.sort_by_key(|queued| queued.prompt.id);
            self.ready.extend(complete);
        }
    }

    /// Enters a session if it is newer. Returns the queued prompts of earlier ones, which will be sent again or were
    /// given up; those in progress stay.
    pub(crate) fn enter_session(&mut self, session: u64) -> Vec<QueuedPrompt> {
        if session <= self.session {
            return Vec::new();
        }
        self.session = session;
        let is_old = |queued: &QueuedPrompt| queued.prompt.version.session < session;
        let mut superseded = Vec::new();
        for (_, partial) in self.partial.values_mut() {
            superseded.extend(partial.extract_if(.., |queued| is_old(queued)));
        }
        self.partial.retain(|_, (_, partial)| !partial.is_empty());
        let (old, ready) = self.ready.drain(..).partition(is_old);
        self.ready = ready;
        superseded.extend::<VecDeque<_>>(old);
        superseded
    }

    /// Starts up to `limit` ready prompts that weights `version` may answer; they are in progress from now on. Whole
    /// batches are started whole.
    pub(crate) fn start(&mut self, version: WeightsVersion, limit: usize) -> Vec<StartedPrompt> {
        let limit = match self.pacing {
            Pacing::Batched => usize::MAX,
            Pacing::EachPrompt => limit,
        };
        let mut started = Vec::new();
        while started.len() < limit
            && self
                .ready
                .front()
                .is_some_and(|queued| queued.prompt.version <= version)
        {
            let Some(queued) = self.ready.pop_front() else {
                break;
            };
            let (key, prompt) = (self.next_key, queued.prompt.clone());
            started.push(StartedPrompt { key, prompt });
            self.in_progress.insert(key, queued);
            self.next_key += 1;
        }
        started
    }

    /// Removes the prompt in progress under `key`.
    pub(crate) fn finish(&mut self, key: u64) -> Option<QueuedPrompt> {
        self.in_progress.remove(&key)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use messages::{Purpose, Seed};

    use super::*;

    fn prompt(id: u64, prompt_batch: PromptBatch, version: u64) -> Prompt {
        Prompt {
            id: PromptId(id),
            prompt_batch,
            purpose: Purpose::Train,
            version: WeightsVersion::at(version),
            seed: Seed(id),
            ids: vec![1],
            text: String::new(),
            dialogue: None,
            golden: None,
            answer: None,
        }
    }

    fn queue(pacing: Pacing, prompts: &[Prompt]) -> (PromptQueue, transport::Receiver<Prompt>) {
        let (sender, receiver) = transport::stream("prompts", 16);
        let mut queue = PromptQueue::new(pacing, 16);
        for prompt in prompts {
            let sent = sender.send(prompt.clone()).now_or_never();
            sent.expect("there is room").expect("the stream is open");
            let delivery = receiver.try_receive().expect("a prompt was sent");
            queue.push(delivery.into());
        }
        (queue, receiver)
    }

    fn counts(stream: &transport::Receiver<Prompt>) -> (u64, u64) {
        let counts = stream.counts().now_or_never().expect("no waiting");
        let counts = counts.expect("the stream is in memory");
        (counts.queued, counts.in_flight)
    }

    fn ids(started: &[StartedPrompt]) -> Vec<u64> {
        started.iter().map(|started| started.prompt.id.0).collect()
    }

    #[test]
    fn a_batch_starts_only_when_complete_and_in_order_of_ids() {
        let prompt_batch = PromptBatch {
            first: PromptId(4),
            count: 3,
        };
        let three = [
            prompt(6, prompt_batch, 0),
            prompt(4, prompt_batch, 0),
            prompt(5, prompt_batch, 0),
        ];
        let (mut partial, _stream) = queue(Pacing::Batched, &three[..2]);
        assert_eq!(
            ids(&partial.start(WeightsVersion::REFERENCE, 1)),
            Vec::<u64>::new()
        );
        assert_eq!(partial.len(), 2);
        let (mut whole, _stream) = queue(Pacing::Batched, &three);
        assert_eq!(
            ids(&whole.start(WeightsVersion::REFERENCE, 1)),
            vec![4, 5, 6]
        );
        let (mut each, _stream) = queue(Pacing::EachPrompt, &three);
        assert_eq!(ids(&each.start(WeightsVersion::REFERENCE, 2)), vec![6, 4]);
    }

    #[test]
    fn a_prompt_waits_for_its_minimum_weights_version() {
        let prompts = [prompt(0, PromptBatch::single(PromptId(0)), 2)];
        let (mut queue, stream) = queue(Pacing::EachPrompt, &prompts);
        assert!(queue.start(WeightsVersion::at(1), 8).is_empty());
        assert_eq!((queue.len(), queue.in_progress(), queue.ready()), (1, 0, 1));
        assert_eq!(ids(&queue.start(WeightsVersion::at(2), 8)), vec![0]);
        assert_eq!((queue.len(), queue.in_progress()), (1, 1));
        let finished = queue.finish(0).expect("it is in progress");
        assert_eq!(counts(&stream), (0, 1));
        finished.receipt.acknowledge();
        assert_eq!((queue.len(), counts(&stream)), (0, (0, 0)));
    }

    #[test]
    fn queued_prompts_are_returned_to_the_stream_on_drop() {
        let prompts = [prompt(0, PromptBatch::single(PromptId(0)), 9)];
        let (queue, stream) = queue(Pacing::EachPrompt, &prompts);
        drop(queue);
        assert_eq!(counts(&stream), (1, 0));
    }

    #[test]
    fn a_new_session_supersedes_queued_prompts_but_not_those_in_progress() {
        let of = |id, session| {
            let mut prompt = prompt(id, PromptBatch::single(PromptId(id)), 0);
            prompt.version.session = session;
            prompt
        };
        let (mut queue, _stream) = queue(Pacing::EachPrompt, &[of(0, 0), of(1, 0)]);
        let old = queue.start(WeightsVersion::at(0), 1);
        assert_eq!(ids(&old), vec![0]);
        for prompt in [of(0, 1), of(1, 1)] {
            let (sender, receiver) = transport::stream("prompts", 1);
            let sent = sender.send(prompt).now_or_never();
            sent.expect("there is room").expect("the stream is open");
            queue.push(receiver.try_receive().expect("a prompt was sent").into());
        }
        let superseded = queue.enter_session(1);
        let superseded: Vec<_> = superseded.iter().map(|queued| queued.prompt.id.0).collect();
        assert_eq!(superseded, vec![1]);
        assert!(queue.enter_session(1).is_empty());
        let version = WeightsVersion {
            session: 1,
            step: 0,
        };
        let new = queue.start(version, 8);
        assert_eq!(ids(&new), vec![0, 1]);
        assert_ne!(new[0].key, old[0].key, "the same prompt twice");
        assert_eq!(queue.in_progress(), 3);
    }
}
