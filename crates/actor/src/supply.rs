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
    answering: BTreeMap<PromptId, Held>,
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

    /// Takes up to `most` prompts that `version` may answer; they count as being answered from now on.
    /// Whole releases are taken whole.
    pub(crate) fn start(&mut self, version: WeightsVersion, most: usize) -> Vec<Prompt> {
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
            started.push(held.prompt.clone());
            self.answering.insert(held.prompt.id, held);
        }
        started
    }

    /// The prompt that has been answered.
    pub(crate) fn finish(&mut self, id: PromptId) -> Option<Held> {
        self.answering.remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use messages::{Purpose, Seed};

    use super::*;

    fn prompt(id: u64, release: Release, version: u64) -> Prompt {
        Prompt {
            id: PromptId(id),
            release,
            purpose: Purpose::Train,
            version: WeightsVersion(version),
            seed: Seed(id),
            ids: vec![1],
            text: String::new(),
            golden: None,
            answer: None,
        }
    }

    fn supply(pacing: Pacing, prompts: &[Prompt]) -> (Supply, transport::Receiver<Prompt>) {
        let (sender, receiver) = transport::stream("prompts", 16);
        let mut supply = Supply::new(pacing);
        for prompt in prompts {
            sender
                .send_blocking(prompt.clone())
                .expect("the stream is open");
            let delivery = receiver.receive_blocking().expect("a prompt was sent");
            let (prompt, receipt) = delivery.take();
            supply.take(prompt, receipt);
        }
        (supply, receiver)
    }

    fn ids(prompts: &[Prompt]) -> Vec<u64> {
        prompts.iter().map(|prompt| prompt.id.0).collect()
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
        assert_eq!(ids(&part.start(WeightsVersion(0), 1)), Vec::<u64>::new());
        assert_eq!(part.len(), 2);
        let (mut whole, _stream) = supply(Pacing::WholeReleases, &three);
        assert_eq!(ids(&whole.start(WeightsVersion(0), 1)), vec![4, 5, 6]);
        let (mut each, _stream) = supply(Pacing::EachPrompt, &three);
        assert_eq!(ids(&each.start(WeightsVersion(0), 2)), vec![6, 4]);
    }

    #[test]
    fn a_prompt_waits_for_the_weights_it_asks_for_and_is_in_hand_all_the_while() {
        let asked = [prompt(0, Release::single(PromptId(0)), 2)];
        let (mut supply, stream) = supply(Pacing::EachPrompt, &asked);
        assert!(supply.start(WeightsVersion(1), 8).is_empty());
        assert_eq!(
            (supply.len(), supply.answering(), supply.ready()),
            (1, 0, 1)
        );
        assert_eq!(ids(&supply.start(WeightsVersion(2), 8)), vec![0]);
        assert_eq!((supply.len(), supply.answering()), (1, 1));
        let held = supply.finish(PromptId(0)).expect("it was being answered");
        assert_eq!(stream.in_hand(), 1);
        held.receipt.acknowledge();
        assert_eq!((supply.len(), stream.in_hand()), (0, 0));
    }

    #[test]
    fn what_an_actor_leaves_behind_goes_back_to_the_stream() {
        let asked = [prompt(0, Release::single(PromptId(0)), 9)];
        let (supply, stream) = supply(Pacing::EachPrompt, &asked);
        drop(supply);
        assert_eq!((stream.depth(), stream.in_hand()), (1, 0));
    }
}
