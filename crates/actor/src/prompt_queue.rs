//! Prompts of an actor: queued for newer weights or for the rest of their batch, and in progress.
//!
//! A prompt may name weights that are still being uploaded, at most one upload ahead of the announced ones. It waits
//! for them without holding up others; one whose weights are not announced in time names weights that do not exist.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use messages::{Pacing, Prompt, PromptId, Purpose, WeightsVersion};
use tokio::time::Instant;
use transport::{Delivery, Receipt};

/// Time after which a prompt still waiting for its weights no longer counts towards the capacity.
const WAIT_LIMIT: Duration = Duration::from_secs(2);

/// Number of announcements that a prompt may wait for its weights. Those before the next may have been made when it was
/// sent, and be read only after it was received.
const MAX_ANNOUNCEMENTS: u64 = 3;

/// All prompts that were received and neither answered nor dropped.
#[derive(Debug)]
pub(crate) struct PromptQueue {
    pacing: Pacing,
    /// Largest number of ready prompts: what the sampler's slots can hold.
    capacity: usize,
    /// Newest announced weights, and the number of announcements.
    newest: WeightsVersion,
    announcements: u64,
    /// Incomplete batches, by first prompt and size.
    partial: BTreeMap<(PromptId, u32), Vec<WaitingPrompt>>,
    ready: VecDeque<WaitingPrompt>,
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

/// A prompt that is not in progress.
#[derive(Debug)]
struct WaitingPrompt {
    queued: QueuedPrompt,
    since: Instant,
    /// Number of announcements before it was queued.
    announcements: u64,
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

impl WaitingPrompt {
    fn prompt(&self) -> &Prompt {
        &self.queued.prompt
    }
}

impl PromptQueue {
    /// An empty queue with room for `capacity` ready prompts.
    pub(crate) fn new(pacing: Pacing, capacity: usize) -> Self {
        Self {
            pacing,
            capacity,
            newest: WeightsVersion::REFERENCE,
            announcements: 0,
            partial: BTreeMap::new(),
            ready: VecDeque::new(),
            in_progress: BTreeMap::new(),
            next_key: 0,
        }
    }

    /// Number of prompts: queued and in progress.
    pub(crate) fn len(&self) -> usize {
        let partial: usize = self.partial.values().map(Vec::len).sum();
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

    /// Number of further ready prompts that may be queued. An actor takes no more than its slots can start next; the rest is
    /// left to other actors. Prompts that have waited for their weights for [`WAIT_LIMIT`] are not counted.
    pub(crate) fn room(&self, now: Instant) -> usize {
        let takes_room = |waiting: &&WaitingPrompt| {
            !self.is_ahead(waiting) || now.duration_since(waiting.since) < WAIT_LIMIT
        };
        let taken = self.ready.iter().filter(takes_room).count();
        self.capacity.saturating_sub(taken)
    }

    /// Whether another prompt may be received.
    pub(crate) fn has_room(&self, now: Instant) -> bool {
        self.room(now) > 0
    }

    /// Time at which the next prompt that waits for its weights ceases to take room; `None` if none does.
    pub(crate) fn next_room(&self, now: Instant) -> Option<Instant> {
        let ahead = self.ready.iter().filter(|waiting| self.is_ahead(waiting));
        let ends = ahead.map(|waiting| waiting.since + WAIT_LIMIT);
        ends.filter(|&end| end > now).min()
    }

    /// Current session: that of the newest announced weights.
    pub(crate) fn session(&self) -> u64 {
        self.newest.session
    }

    /// Queues a prompt; with [`Pacing::Batched`] it becomes ready once its whole batch is here.
    pub(crate) fn push(&mut self, queued: QueuedPrompt, now: Instant) {
        let prompt_batch = queued.prompt.prompt_batch;
        let waiting = WaitingPrompt {
            queued,
            since: now,
            announcements: self.announcements,
        };
        if self.pacing == Pacing::EachPrompt || prompt_batch.count == 1 {
            self.ready.push_back(waiting);
            return;
        }
        let key = (prompt_batch.first, prompt_batch.count);
        let partial = self.partial.entry(key).or_default();
        partial.retain(|other| other.prompt().id != waiting.prompt().id);
        partial.push(waiting);
        if partial.len() == prompt_batch.count as usize
            && let Some(mut complete) = self.partial.remove(&key)
        {
            complete.sort_by_key(|waiting| waiting.prompt().id);
            self.ready.extend(complete);
        }
    }

    /// Enters the session of newly announced weights if it is newer. Returns the queued prompts of earlier ones, which
    /// will be sent again or were given up; those in progress stay.
    pub(crate) fn supersede(&mut self, newest: WeightsVersion) -> Vec<QueuedPrompt> {
        let session = newest.session;
        if session <= self.session() {
            return Vec::new();
        }
        self.newest = newest;
        let is_old = |waiting: &WaitingPrompt| waiting.prompt().version.session < session;
        let mut superseded = self.take_partial(is_old);
        superseded.extend(self.take_ready(is_old));
        superseded
    }

    /// Counts an announcement. Returns the queued prompts that have waited for their weights, or for the rest of their
    /// batch, for too many of them.
    pub(crate) fn announce(&mut self, newest: WeightsVersion) -> Vec<QueuedPrompt> {
        self.newest = self.newest.max(newest);
        self.announcements += 1;
        let (newest, announcements) = (self.newest, self.announcements);
        let is_late =
            |waiting: &WaitingPrompt| announcements - waiting.announcements >= MAX_ANNOUNCEMENTS;
        let mut late = self.take_partial(is_late);
        late.extend(
            self.take_ready(|waiting| is_late(waiting) && waiting.prompt().version > newest),
        );
        late
    }

    fn take_ready(&mut self, is_taken: impl FnMut(&WaitingPrompt) -> bool) -> Vec<QueuedPrompt> {
        let (taken, ready): (VecDeque<_>, _) = self.ready.drain(..).partition(is_taken);
        self.ready = ready;
        taken.into_iter().map(|waiting| waiting.queued).collect()
    }

    fn take_partial(&mut self, is_taken: impl Fn(&WaitingPrompt) -> bool) -> Vec<QueuedPrompt> {
        let mut taken = Vec::new();
        for partial in self.partial.values_mut() {
            taken.extend(partial.extract_if(.., |waiting| is_taken(waiting)));
        }
        self.partial.retain(|_, partial| !partial.is_empty());
        taken.into_iter().map(|waiting| waiting.queued).collect()
    }

    /// Whether a prompt waits for weights that are not announced.
    fn is_ahead(&self, waiting: &WaitingPrompt) -> bool {
        waiting.prompt().version > self.newest
    }

    /// Purpose of the oldest ready prompt that weights `version` may answer.
    pub(crate) fn next_purpose(&self, version: WeightsVersion) -> Option<Purpose> {
        let mut prompts = self.ready.iter().map(WaitingPrompt::prompt);
        let next = prompts.find(|prompt| prompt.version <= version);
        next.map(|prompt| prompt.purpose)
    }

    /// Starts up to `limit` ready prompts that weights `version` may answer, oldest first, up to the first whose purpose
    /// needs other models than those that are selected; they are in progress from now on. Whole batches are started
    /// whole.
    pub(crate) fn start(
        &mut self,
        version: WeightsVersion,
        limit: usize,
        is_selected: impl Fn(Purpose) -> bool,
    ) -> Vec<StartedPrompt> {
        let mut limit = match self.pacing {
            Pacing::Batched => usize::MAX,
            Pacing::EachPrompt => limit,
        };
        let started = self.take_ready(|waiting| {
            if limit == 0 || waiting.prompt().version > version {
                return false;
            }
            let is_started = is_selected(waiting.prompt().purpose);
            // None overtakes one that waits for its models.
            limit = if is_started { limit - 1 } else { 0 };
            is_started
        });
        started
            .into_iter()
            .map(|queued| self.begin(queued))
            .collect()
    }

    fn begin(&mut self, queued: QueuedPrompt) -> StartedPrompt {
        let (key, prompt) = (self.next_key, queued.prompt.clone());
        self.in_progress.insert(key, queued);
        self.next_key += 1;
        StartedPrompt { key, prompt }
    }

    /// Removes the prompt in progress under `key`.
    pub(crate) fn finish(&mut self, key: u64) -> Option<QueuedPrompt> {
        self.in_progress.remove(&key)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use messages::{PromptBatch, Purpose, Seed};

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
            route: None,
        }
    }

    fn queue(pacing: Pacing, prompts: &[Prompt]) -> (PromptQueue, transport::Receiver<Prompt>) {
        let (sender, receiver) = transport::stream("prompts", 16);
        let mut queue = PromptQueue::new(pacing, 16);
        for prompt in prompts {
            let sent = sender.send(prompt.clone()).now_or_never();
            sent.expect("there is room").expect("the stream is open");
            let delivery = receiver.try_receive().expect("a prompt was sent");
            queue.push(delivery.into(), Instant::now());
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
            ids(&partial.start(WeightsVersion::REFERENCE, 1, |_| true)),
            Vec::<u64>::new()
        );
        assert_eq!(partial.len(), 2);
        let (mut whole, _stream) = queue(Pacing::Batched, &three);
        assert_eq!(
            ids(&whole.start(WeightsVersion::REFERENCE, 1, |_| true)),
            vec![4, 5, 6]
        );
        let (mut each, _stream) = queue(Pacing::EachPrompt, &three);
        assert_eq!(
            ids(&each.start(WeightsVersion::REFERENCE, 2, |_| true)),
            vec![6, 4]
        );
    }

    #[test]
    fn no_prompt_overtakes_one_that_waits_for_other_models() {
        let purposes = [
            Purpose::Train,
            Purpose::Train,
            Purpose::Evaluate,
            Purpose::Train,
        ];
        let prompts: Vec<Prompt> = (0..)
            .zip(purposes)
            .map(|(id, purpose)| Prompt {
                purpose,
                ..prompt(id, PromptBatch::single(PromptId(id)), 0)
            })
            .collect();
        let (mut queue, _stream) = queue(Pacing::EachPrompt, &prompts);
        let now = WeightsVersion::at(0);
        let started = queue.start(now, 9, |purpose| purpose == Purpose::Train);
        assert_eq!(ids(&started), vec![0, 1]);
        assert_eq!(queue.next_purpose(now), Some(Purpose::Evaluate));
        let none = queue.start(now, 9, |purpose| purpose == Purpose::Train);
        assert!(none.is_empty());
        let started = queue.start(now, 9, |purpose| purpose == Purpose::Evaluate);
        assert_eq!(ids(&started), vec![2]);
        assert_eq!(queue.next_purpose(now), Some(Purpose::Train));
        let started = queue.start(now, 9, |purpose| purpose == Purpose::Train);
        assert_eq!(ids(&started), vec![3]);
        assert_eq!(queue.next_purpose(now), None);
    }

    #[test]
    fn a_prompt_waits_for_its_minimum_weights_version() {
        let prompts = [prompt(0, PromptBatch::single(PromptId(0)), 2)];
        let (mut queue, stream) = queue(Pacing::EachPrompt, &prompts);
        assert!(queue.start(WeightsVersion::at(1), 8, |_| true).is_empty());
        assert_eq!((queue.len(), queue.in_progress(), queue.ready()), (1, 0, 1));
        assert_eq!(
            ids(&queue.start(WeightsVersion::at(2), 8, |_| true)),
            vec![0]
        );
        assert_eq!((queue.len(), queue.in_progress()), (1, 1));
        let finished = queue.finish(0).expect("it is in progress");
        assert_eq!(counts(&stream), (0, 1));
        finished.receipt.acknowledge();
        assert_eq!((queue.len(), counts(&stream)), (0, (0, 0)));
    }

    #[test]
    fn a_prompt_for_weights_that_do_not_exist_holds_up_no_other() {
        let single = |id, version| prompt(id, PromptBatch::single(PromptId(id)), version);
        let prompts = [single(0, 90), single(1, 0), single(2, 91), single(3, 0)];
        let (mut queue, _stream) = queue(Pacing::EachPrompt, &prompts);
        assert_eq!(
            ids(&queue.start(WeightsVersion::at(0), 9, |_| true)),
            vec![1, 3]
        );
        // It takes room for a while, as a prompt does whose weights are being uploaded.
        let now = Instant::now();
        assert_eq!(queue.room(now), 14);
        let later = queue.next_room(now).expect("it ends") + WAIT_LIMIT;
        assert_eq!((queue.room(later), queue.next_room(later)), (16, None));
        // Weights are at most one upload ahead: announcements decide.
        for step in [5, 90, 95] {
            let late = queue.announce(WeightsVersion::at(step));
            assert!(late.is_empty(), "95 is enough");
        }
        assert_eq!(
            ids(&queue.start(WeightsVersion::at(95), 9, |_| true)),
            vec![0, 2]
        );
    }

    #[test]
    fn prompts_whose_weights_or_batches_never_come_are_late() {
        let pair = PromptBatch {
            first: PromptId(4),
            count: 2,
        };
        let prompts = [
            prompt(4, pair, 0),
            prompt(9, PromptBatch::single(PromptId(9)), 90),
        ];
        let (mut queue, _stream) = queue(Pacing::Batched, &prompts);
        for step in 1..MAX_ANNOUNCEMENTS {
            assert!(queue.announce(WeightsVersion::at(step)).is_empty());
        }
        let late = queue.announce(WeightsVersion::at(MAX_ANNOUNCEMENTS));
        let late: Vec<_> = late.iter().map(|queued| queued.prompt.id.0).collect();
        assert_eq!((late, queue.len()), (vec![4, 9], 0));
    }

    #[test]
    fn batches_of_another_size_do_not_mix() {
        let batch = |count| PromptBatch {
            first: PromptId(4),
            count,
        };
        let prompts = [
            prompt(4, batch(2), 0),
            prompt(5, batch(u32::MAX), 0),
            prompt(5, batch(2), 0),
        ];
        let (mut queue, _stream) = queue(Pacing::Batched, &prompts);
        assert_eq!(
            ids(&queue.start(WeightsVersion::at(0), 9, |_| true)),
            vec![4, 5]
        );
        assert_eq!((queue.len(), queue.in_progress()), (3, 2));
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
        let old = queue.start(WeightsVersion::at(0), 1, |_| true);
        assert_eq!(ids(&old), vec![0]);
        for prompt in [of(0, 1), of(1, 1)] {
            let (sender, receiver) = transport::stream("prompts", 1);
            let sent = sender.send(prompt).now_or_never();
            sent.expect("there is room").expect("the stream is open");
            let delivery = receiver.try_receive().expect("a prompt was sent");
            queue.push(delivery.into(), Instant::now());
        }
        let session = WeightsVersion {
            session: 1,
            step: 0,
        };
        let superseded = queue.supersede(session);
        let superseded: Vec<_> = superseded.iter().map(|queued| queued.prompt.id.0).collect();
        assert_eq!(superseded, vec![1]);
        assert!(queue.supersede(session).is_empty());
        let new = queue.start(session, 8, |_| true);
        assert_eq!(ids(&new), vec![0, 1]);
        assert_ne!(new[0].key, old[0].key, "the same prompt twice");
        assert_eq!(queue.in_progress(), 3);
    }
}
