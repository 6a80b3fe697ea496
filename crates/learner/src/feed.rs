//! Prompts as credits: never more on their way and in hand than the learner will train on in time.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use messages::{Prompt, PromptId, Purpose, Release, Seed, WeightsVersion};
use serde::{Deserialize, Serialize};
use telemetry::Waits;
use tokio::time::timeout;
use transport::Sender;

use crate::{LearnerError, PromptRow, PromptSet};

/// Ids from here on belong to evaluations.
const EVALUATION: u64 = 1 << 63;

/// Ids from here up to evaluations belong to the adversarial game.
const CONTEST: u64 = 1 << 62;

/// How prompts are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pacing {
    /// Each when there is a credit for it.
    EachPrompt,
    /// Only when nothing is on its way, and then all that the step lacks as one release: for a lone
    /// actor that is to repeat to the last bit.
    WholeReleases,
}

/// The feed's part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FeedState {
    /// The next training prompt.
    cursor: u64,
    /// Training prompts on their way.
    outstanding: Vec<(PromptId, Release)>,
}

/// The game reads training prompts from this place on, far from those that are trained on.
const CONTEST_ROWS: u64 = 1 << 40;

/// What a prompt is asked as.
struct Asked {
    id: PromptId,
    release: Release,
    purpose: Purpose,
    seed: Seed,
}

/// Sends prompts and remembers which have not come back.
pub(crate) struct Feed {
    prompts: Sender<Prompt>,
    waits: Waits,
    patience: Duration,
    set: Arc<dyn PromptSet>,
    seed: Seed,
    pacing: Pacing,
    window: usize,
    cursor: u64,
    outstanding: BTreeMap<PromptId, Release>,
}

impl Feed {
    /// `window`: (max_staleness + 1) · train_batch_size. A prompt waits at most `patience` for room in its
    /// stream, under that name among `waits`.
    pub(crate) fn new(
        (prompts, waits, patience): (Sender<Prompt>, Waits, Duration),
        set: Arc<dyn PromptSet>,
        seed: Seed,
        pacing: Pacing,
        window: usize,
    ) -> Self {
        Self {
            prompts,
            waits,
            patience,
            set,
            seed,
            pacing,
            window,
            cursor: 0,
            outstanding: BTreeMap::new(),
        }
    }

    pub(crate) fn pacing(&self) -> Pacing {
        self.pacing
    }

    /// Number of distinct held-out prompts; `None` when every place is an independent draw.
    pub(crate) fn held_out_count(&self) -> Option<usize> {
        self.set.held_out_count()
    }

    /// Whether the prompt was sent and has not come back; from now on it has.
    pub(crate) fn returned(&mut self, id: PromptId) -> bool {
        self.outstanding.remove(&id).is_some()
    }

    /// Training prompts on their way.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding.keys().filter(|id| id.0 < CONTEST).count()
    }

    /// Prompts on their way that are not trained on: of an evaluation, or of a round of the game.
    pub(crate) fn asking(&self) -> usize {
        self.outstanding.len() - self.outstanding()
    }

    /// Sends as many training prompts as there are credits: `in_hand` pairs wait already, `needed` more
    /// prompts, at most, are to be trained on until the end of the run.
    pub(crate) async fn top_up(
        &mut self,
        version: WeightsVersion,
        in_hand: usize,
        needed: usize,
    ) -> Result<(), LearnerError> {
        let on_their_way = self.outstanding();
        let credits = self
            .window
            .min(needed)
            .saturating_sub(in_hand + on_their_way);
        if credits == 0 || (self.pacing == Pacing::WholeReleases && on_their_way > 0) {
            return Ok(());
        }
        let first = PromptId(self.cursor);
        for _ in 0..credits {
            let id = PromptId(self.cursor);
            let release = match self.pacing {
                Pacing::EachPrompt => Release::single(id),
                Pacing::WholeReleases => Release {
                    first,
                    count: credits as u32,
                },
            };
            self.cursor += 1;
            self.send_training(id, release, version).await?;
        }
        Ok(())
    }

    async fn send_training(
        &mut self,
        id: PromptId,
        release: Release,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let asked = Asked {
            id,
            release,
            purpose: Purpose::Train,
            seed: self.seed.derive(id.0),
        };
        self.send(asked, self.set.train(id.0), version).await
    }

    async fn send(
        &mut self,
        asked: Asked,
        row: PromptRow,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let Asked {
            id,
            release,
            purpose,
            seed,
        } = asked;
        let prompt = Prompt {
            id,
            release,
            purpose,
            version,
            seed,
            ids: row.ids,
            text: row.text,
            dialogue: row.dialogue,
            golden: row.golden,
            answer: row.answer,
        };
        self.outstanding.insert(id, release);
        let _wait = self.waits.enter("room for prompts");
        let sent = timeout(self.patience, self.prompts.send(prompt)).await;
        sent.map_err(|_| LearnerError::NoRoom {
            seconds: self.patience.as_secs(),
        })??;
        Ok(())
    }

    /// Sends the held-out prompt `index` of the evaluation at `version`. Its seed is the same in every
    /// evaluation, so that the reference's answers, and luck, are shared between them.
    pub(crate) async fn send_held_out(
        &mut self,
        index: u64,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let id = PromptId(EVALUATION | version.step << 24 | index);
        let asked = Asked {
            id,
            release: Release::single(id),
            purpose: Purpose::Evaluate,
            seed: self.seed.derive(EVALUATION | index),
        };
        self.send(asked, self.set.held_out(index), version).await
    }

    /// Sends the prompt `index` of the round of the adversarial game that is played at `version`: a
    /// training prompt, other ones in every round, with a seed of its own.
    pub(crate) async fn send_contest(
        &mut self,
        index: u64,
        version: WeightsVersion,
    ) -> Result<(), LearnerError> {
        let id = PromptId(CONTEST | version.step << 24 | index);
        let asked = Asked {
            id,
            release: Release::single(id),
            purpose: Purpose::Contest,
            seed: self.seed.derive(id.0),
        };
        let row = self.set.train(CONTEST_ROWS + (version.step << 20) + index);
        self.send(asked, row, version).await
    }

    /// What a checkpoint keeps. Evaluations are not resumed: they are done again.
    pub(crate) fn state(&self) -> FeedState {
        let outstanding = self
            .outstanding
            .iter()
            .filter(|(id, _)| id.0 < CONTEST)
            .map(|(&id, &r)| (id, r));
        FeedState {
            cursor: self.cursor,
            outstanding: outstanding.collect(),
        }
    }

    /// Takes up where a checkpoint left off: what was on its way is sent again, with the same seeds. A
    /// release of which anything was on its way is sent again whole; `forget` is called with each of
    /// its prompts, so that pairs of it that had come back already are not trained on twice.
    pub(crate) async fn restore(
        &mut self,
        state: FeedState,
        version: WeightsVersion,
        mut forget: impl FnMut(PromptId),
    ) -> Result<(), LearnerError> {
        self.cursor = state.cursor;
        let mut again = BTreeMap::new();
        for (id, release) in state.outstanding {
            let whole = release.first.0..release.first.0 + u64::from(release.count);
            again.extend(whole.map(|id| (PromptId(id), release)));
            again.insert(id, release);
        }
        for (id, release) in again {
            forget(id);
            self.send_training(id, release, version).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting;

    impl PromptSet for Counting {
        fn train(&self, index: u64) -> PromptRow {
            PromptRow {
                ids: vec![index as u32],
                text: String::new(),
                dialogue: None,
                golden: None,
                answer: None,
            }
        }
        fn held_out(&self, index: u64) -> PromptRow {
            self.train(1000 + index)
        }
        fn held_out_count(&self) -> Option<usize> {
            None
        }
    }

    fn feed(pacing: Pacing) -> (Feed, transport::Receiver<Prompt>) {
        of_room(pacing, 64)
    }

    fn of_room(pacing: Pacing, room: usize) -> (Feed, transport::Receiver<Prompt>) {
        let (sender, receiver) = transport::stream("prompts", room);
        let way = (sender, Waits::new("learner"), Duration::from_secs(60));
        let feed = Feed::new(way, Arc::new(Counting), Seed(1), pacing, 6);
        (feed, receiver)
    }

    #[tokio::test(start_paused = true)]
    async fn a_prompt_for_which_there_is_no_room_is_not_waited_for_for_ever() {
        let (mut feed, receiver) = of_room(Pacing::EachPrompt, 2);
        let waits = feed.waits.clone();
        let mut topping = Box::pin(feed.top_up(WeightsVersion::REFERENCE, 0, 9));
        assert!(timeout(Duration::from_secs(1), &mut topping).await.is_err());
        assert_eq!(waits.current()[0].reason, "room for prompts");
        let error = topping.await.expect_err("nobody takes any");
        assert!(
            matches!(error, LearnerError::NoRoom { seconds: 60 }),
            "{error}"
        );
        assert_eq!(sent(&receiver).len(), 2);
        assert!(waits.current().is_empty());
    }

    fn sent(receiver: &transport::Receiver<Prompt>) -> Vec<Prompt> {
        std::iter::from_fn(|| receiver.try_receive())
            .map(|delivery| {
                let prompt = delivery.message().clone();
                delivery.acknowledge();
                prompt
            })
            .collect()
    }

    fn ids(prompts: &[Prompt]) -> Vec<u64> {
        prompts.iter().map(|prompt| prompt.id.0).collect()
    }

    #[tokio::test]
    async fn credits_are_the_window_less_what_is_on_its_way_and_in_hand() {
        let (mut feed, receiver) = feed(Pacing::EachPrompt);
        let version = WeightsVersion::REFERENCE;
        feed.top_up(version, 0, 100).await.expect("open");
        assert_eq!(ids(&sent(&receiver)), vec![0, 1, 2, 3, 4, 5]);
        assert!(feed.returned(PromptId(3)) && !feed.returned(PromptId(3)));
        feed.top_up(version, 1, 100).await.expect("open");
        assert!(
            sent(&receiver).is_empty(),
            "the pair in hand still holds its credit"
        );
        feed.top_up(version, 0, 100).await.expect("open");
        assert_eq!(ids(&sent(&receiver)), vec![6]);
        assert!(feed.returned(PromptId(0)));
        feed.top_up(version, 0, 5).await.expect("open");
        assert!(
            sent(&receiver).is_empty(),
            "no more than the run still needs"
        );
    }

    #[tokio::test]
    async fn whole_releases_are_sent_when_nothing_is_on_its_way() {
        let (mut feed, receiver) = feed(Pacing::WholeReleases);
        feed.top_up(WeightsVersion::REFERENCE, 0, 4)
            .await
            .expect("open");
        let release = Release {
            first: PromptId(0),
            count: 4,
        };
        assert!(
            sent(&receiver)
                .iter()
                .all(|prompt| prompt.release == release)
        );
        for id in 0..3 {
            assert!(feed.returned(PromptId(id)));
        }
        feed.top_up(WeightsVersion::REFERENCE, 1, 4)
            .await
            .expect("open");
        assert!(sent(&receiver).is_empty());
        assert!(feed.returned(PromptId(3)));
        feed.top_up(WeightsVersion::REFERENCE, 1, 4)
            .await
            .expect("open");
        assert_eq!(ids(&sent(&receiver)), vec![4, 5, 6]);
    }

    #[tokio::test]
    async fn a_restored_feed_sends_an_unfinished_release_again_with_the_same_seeds() {
        let (mut feed, receiver) = feed(Pacing::WholeReleases);
        feed.top_up(WeightsVersion::at(2), 0, 3)
            .await
            .expect("open");
        let before = sent(&receiver);
        assert!(feed.returned(PromptId(1)));
        let state = feed.state();
        let (mut resumed, receiver) = self::feed(Pacing::WholeReleases);
        let mut forgotten = Vec::new();
        resumed
            .restore(state, WeightsVersion::at(2), |id| forgotten.push(id.0))
            .await
            .expect("open");
        assert_eq!(sent(&receiver), before);
        assert_eq!((forgotten, resumed.outstanding()), (vec![0, 1, 2], 3));
    }
}
