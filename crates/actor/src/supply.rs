//! Prompts in hand: those that wait for weights or for the rest of their release, and those being
//! answered.

use std::collections::{BTreeMap, VecDeque};

use messages::{Prompt, PromptId, Release, WeightsVersion};
use transport::Receipt;

/// When an actor starts on a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pacing {
    /// As soon as there is room for it.
    EachPrompt,
    /// When all of its release is there: what is written together then does not depend on timing, and a
    /// strictly on-policy run of one actor repeats to the last bit.
    WholeReleases,
}

/// Every prompt that was taken and not yet given on or dropped.
#[derive(Debug)]
pub(crate) struct Supply {
    pacing: Pacing,
    gathering: BTreeMap<PromptId, (Release, Vec<Held>)>,
    ready: VecDeque<Held>,
    /// By a number of our own: the same prompt may be here twice, after a session was given up.
    answering: BTreeMap<u64, Held>,
    started: u64,
}

/// A prompt and what acknowledges it.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) prompt: Prompt,
    pub(crate) receipt: Receipt,
}

impl Supply {
    pub(crate) fn new(pacing: Pacing) -> Self {
        Self {
            pacing,
            gathering: BTreeMap::new(),
            ready: VecDeque::new(),
            answering: BTreeMap::new(),
            started: 0,
        }
    }

    /// How many prompts are in hand.
    pub(crate) fn len(&self) -> usize {
        let gathering: usize = self.gathering.values().map(|(_, held)| held.len()).sum();
        gathering + self.ready.len() + self.answering.len()
    }

    /// How many are being answered.
    pub(crate) fn answering(&self) -> usize {
        self.answering.len()
    }

    /// How many could be answered and are not yet.
    pub(crate) fn ready(&self) -> usize {
        self.ready.len()
    }

    pub(crate) fn take(&mut self, prompt: Prompt, receipt: Receipt) {
        let release = prompt.release;
        let held = Held { prompt, receipt };
        if self.pacing == Pacing::EachPrompt || release.count == 1 {
            self.ready.push_back(held);
            return;
        }
        let (_, gathered) = self
            .gathering
            .entry(release.first)
            .or_insert((release, Vec::new()));
        gathered.retain(|other| other.prompt.id != held.prompt.id);
        gathered.push(held);
        if gathered.len() == release.count as usize
            && let Some((_, mut whole)) = self.gathering.remove(&release.first)
        {
            whole.sort_by_key(|held| held.prompt.id);
            self.ready.extend(whole);
        }
    }

    /// Takes out what earlier sessions had sent and was not started: it is sent again, or given up.
    pub(crate) fn superseded(&mut self, session: u64) -> Vec<Held> {
        let old = |held: &Held| held.prompt.version.session < session;
        let mut gone = Vec::new();
        for (_, gathered) in self.gathering.values_mut() {
            gone.extend(gathered.extract_if(.., |held| old(held)));
        }
        self.gathering
            .retain(|_, (_, gathered)| !gathered.is_empty());
        let (out, ready) = self.ready.drain(..).partition(old);
        self.ready = ready;
        gone.extend::<VecDeque<_>>(out);
        gone
    }

    /// Takes up to `most` prompts that `version` may answer, each with a number of its own; they count as
    /// being answered from now on. Whole releases are taken whole.
    pub(crate) fn start(&mut self, version: WeightsVersion, most: usize) -> Vec<(u64, Prompt)> {
        let most = if self.pacing == Pacing::WholeReleases {
            usize::MAX
        } else {
            most
        };
        let mut started = Vec::new();
        while started.len() < most
            && self
                .ready
                .front()
                .is_some_and(|held| held.prompt.version <= version)
        {
            let Some(held) = self.ready.pop_front() else {
                break;
            };
            started.push((self.started, held.prompt.clone()));
            self.answering.insert(self.started, held);
            self.started += 1;
        }
        started
    }

    /// The prompt with this number, which has been answered.
    pub(crate) fn finish(&mut self, number: u64) -> Option<Held> {
        self.answering.remove(&number)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use messages::{Purpose, Seed};

    use super::*;

    fn prompt(id: u64, release: Release, version: u64) -> Prompt {
        Prompt {
            id: PromptId(id),
            release,
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

    fn supply(pacing: Pacing, prompts: &[Prompt]) -> (Supply, transport::Receiver<Prompt>) {
        let (sender, receiver) = transport::stream("prompts", 16);
        let mut supply = Supply::new(pacing);
        for prompt in prompts {
            let sent = sender.send(prompt.clone()).now_or_never();
            sent.expect("there is a place").expect("the stream is open");
            let delivery = receiver.try_receive().expect("a prompt was sent");
            let (prompt, receipt) = delivery.take();
            supply.take(prompt, receipt);
        }
        (supply, receiver)
    }

    fn counts(stream: &transport::Receiver<Prompt>) -> (u64, u64) {
        let counts = stream.counts().now_or_never().expect("at once");
        let counts = counts.expect("it is in memory");
        (counts.queued, counts.in_hand)
    }

    fn ids(prompts: &[(u64, Prompt)]) -> Vec<u64> {
        prompts.iter().map(|(_, prompt)| prompt.id.0).collect()
    }

    #[test]
    fn a_release_starts_only_when_it_is_whole_and_in_the_order_of_its_ids() {
        let release = Release {
            first: PromptId(4),
            count: 3,
        };
        let three = [
            prompt(6, release, 0),
            prompt(4, release, 0),
            prompt(5, release, 0),
        ];
        let (mut part, _stream) = supply(Pacing::WholeReleases, &three[..2]);
        assert_eq!(
            ids(&part.start(WeightsVersion::REFERENCE, 1)),
            Vec::<u64>::new()
        );
        assert_eq!(part.len(), 2);
        let (mut whole, _stream) = supply(Pacing::WholeReleases, &three);
        assert_eq!(
            ids(&whole.start(WeightsVersion::REFERENCE, 1)),
            vec![4, 5, 6]
        );
        let (mut each, _stream) = supply(Pacing::EachPrompt, &three);
        assert_eq!(ids(&each.start(WeightsVersion::REFERENCE, 2)), vec![6, 4]);
    }

    #[test]
    fn a_prompt_waits_for_the_weights_it_asks_for_and_is_in_hand_all_the_while() {
        let asked = [prompt(0, Release::single(PromptId(0)), 2)];
        let (mut supply, stream) = supply(Pacing::EachPrompt, &asked);
        assert!(supply.start(WeightsVersion::at(1), 8).is_empty());
        assert_eq!(
            (supply.len(), supply.answering(), supply.ready()),
            (1, 0, 1)
        );
        assert_eq!(ids(&supply.start(WeightsVersion::at(2), 8)), vec![0]);
        assert_eq!((supply.len(), supply.answering()), (1, 1));
        let held = supply.finish(0).expect("it was being answered");
        assert_eq!(counts(&stream), (0, 1));
        held.receipt.acknowledge();
        assert_eq!((supply.len(), counts(&stream)), (0, (0, 0)));
    }

    #[test]
    fn what_an_actor_leaves_behind_goes_back_to_the_stream() {
        let asked = [prompt(0, Release::single(PromptId(0)), 9)];
        let (supply, stream) = supply(Pacing::EachPrompt, &asked);
        drop(supply);
        assert_eq!(counts(&stream), (1, 0));
    }

    #[test]
    fn what_an_earlier_session_sent_is_taken_out_and_what_is_being_answered_stays() {
        let of = |id, session| {
            let mut prompt = prompt(id, Release::single(PromptId(id)), 0);
            prompt.version.session = session;
            prompt
        };
        let (mut supply, _stream) = supply(Pacing::EachPrompt, &[of(0, 0), of(1, 0)]);
        let old = supply.start(WeightsVersion::at(0), 1);
        assert_eq!(ids(&old), vec![0]);
        for prompt in [of(0, 1), of(1, 1)] {
            let (sender, receiver) = transport::stream("prompts", 1);
            let sent = sender.send(prompt).now_or_never();
            sent.expect("there is a place").expect("it is open");
            let (prompt, receipt) = receiver.try_receive().expect("it was sent").take();
            supply.take(prompt, receipt);
        }
        let gone = supply.superseded(1);
        let gone: Vec<_> = gone.iter().map(|held| held.prompt.id.0).collect();
        assert_eq!(gone, vec![1]);
        let version = WeightsVersion {
            session: 1,
            step: 0,
        };
        let new = supply.start(version, 8);
        assert_eq!(ids(&new), vec![0, 1]);
        assert_ne!(new[0].0, old[0].0, "the same prompt, two answers");
        assert_eq!(supply.answering(), 3);
    }
}
