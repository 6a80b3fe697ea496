//! A judge request: two completions of a pair, in an order.

use std::sync::Arc;

use messages::{Completion, Dialogue, Digest, Finish, Pair, Prompt, Purpose};
use sha2::{Digest as _, Sha256};

use crate::judge::Comparison;

/// Two completions of a pair, in the order in which a judge sees them. Shares the pair, so it is cheap to clone and to
/// send across threads.
#[derive(Debug, Clone)]
pub struct ComparisonRequest {
    pair: Arc<Pair>,
    first: usize,
    second: usize,
}

impl ComparisonRequest {
    /// A comparison of completion `first` of `pair` with completion `second`, by index.
    ///
    /// # Panics
    /// When the pair has no such completions.
    #[must_use]
    pub fn new(pair: Arc<Pair>, first: u16, second: u16) -> Self {
        let [first, second] = [first, second].map(usize::from);
        let count = pair.completions.len();
        assert!(
            first < count && second < count,
            "completions {first} and {second} of a pair with {count}"
        );
        Self {
            pair,
            first,
            second,
        }
    }

    /// The request as a judge reads it.
    #[must_use]
    pub fn comparison(&self) -> Comparison<'_> {
        Comparison {
            prompt: &self.pair.prompt,
            first: &self.pair.completions[self.first],
            second: &self.pair.completions[self.second],
        }
    }

    /// The same two completions in the other order.
    #[must_use]
    pub fn swapped(&self) -> Self {
        Self {
            pair: Arc::clone(&self.pair),
            first: self.second,
            second: self.first,
        }
    }

    /// Whether the order of the two completions is random: of a training pair, see
    /// [`Labeller`](crate::labelling::Labeller), but not of an evaluation, where the policy's completion is the first.
    pub(crate) fn has_random_order(&self) -> bool {
        matches!(self.pair.prompt.purpose, Purpose::Train | Purpose::File)
    }

    /// Digest of everything that a judge may read, and of the judge's name, version and revision.
    pub(crate) fn digest(&self, judge: &str, version: u64, revision: u64) -> Digest {
        let Comparison {
            prompt,
            first,
            second,
        } = self.comparison();
        let mut hasher = RequestHasher(Sha256::new());
        hasher.bytes(judge.as_bytes());
        hasher.integer(version);
        hasher.integer(revision);
        hasher.prompt(prompt);
        hasher.completion(first);
        hasher.completion(second);
        Digest(hasher.0.finalize().into())
    }
}

/// Hashes fields with their lengths, so that different requests never hash the same bytes.
struct RequestHasher(Sha256);

impl RequestHasher {
    fn integer(&mut self, value: u64) {
        self.0.update(value.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.integer(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn ids(&mut self, ids: &[u32]) {
        self.integer(ids.len() as u64);
        ids.iter().for_each(|id| self.0.update(id.to_le_bytes()));
    }

    fn prompt(&mut self, prompt: &Prompt) {
        self.ids(&prompt.ids);
        self.bytes(prompt.text.as_bytes());
        let dialogue = prompt.dialogue.as_ref();
        self.integer(u64::from(dialogue.is_some()));
        self.bytes(&dialogue.map(dialogue_bytes).unwrap_or_default());
        self.integer(u64::from(prompt.golden.is_some()));
        self.ids(prompt.golden.as_deref().unwrap_or_default());
        self.integer(u64::from(prompt.answer.is_some()));
        self.bytes(prompt.answer.as_deref().unwrap_or_default().as_bytes());
        self.integer(u64::from(prompt.route.is_some()));
        self.bytes(prompt.route.as_deref().unwrap_or_default().as_bytes());
    }

    fn completion(&mut self, completion: &Completion) {
        self.ids(&completion.ids);
        self.bytes(completion.text.as_bytes());
        self.integer(u64::from(completion.finish == Finish::EndOfText));
    }
}

/// JSON of a dialogue.
fn dialogue_bytes(dialogue: &Dialogue) -> Vec<u8> {
    serde_json::to_vec(dialogue).expect("a dialogue is JSON with strings as keys")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::pair;

    #[test]
    fn the_digest_covers_exactly_what_a_judge_reads() {
        let digest = |change: &dyn Fn(&mut Pair)| {
            let mut pair = pair(0, &["ab", "c"]);
            change(&mut pair);
            ComparisonRequest::new(Arc::new(pair), 0, 1).digest("rule", 1, 0)
        };
        let plain = digest(&|_| {});
        type Change = fn(&mut Pair);
        let changes: [(&str, Change); 9] = [
            ("the prompt's text", |p| p.prompt.text.push('!')),
            ("the dialogue", |p| {
                p.prompt.dialogue = Some(Dialogue::of_user(""));
            }),
            ("the prompt's ids", |p| p.prompt.ids.push(7)),
            ("the answer", |p| p.prompt.answer = Some(String::new())),
            ("the route", |p| p.prompt.route = Some(String::new())),
            ("the golden ids", |p| p.prompt.golden = Some(vec![])),
            ("where a text ends", |p| {
                p.completions[0].text = "a".into();
                p.completions[1].text = "bc".into();
            }),
            ("the ids", |p| p.completions[1].ids = vec![2]),
            ("the finish", |p| p.completions[1].finish = Finish::Length),
        ];
        for (name, change) in changes {
            assert_ne!(digest(&change), plain, "{name}");
        }
        let unread: Change = |p| {
            p.prompt.id = messages::PromptId(9);
            p.actor = "another".into();
            p.completions[0].logp = vec![0.0];
        };
        assert_eq!(digest(&unread), plain);
    }

    #[test]
    fn the_digest_distinguishes_judges_versions_revisions_and_orders() {
        let request = ComparisonRequest::new(Arc::new(pair(0, &["a", "b"])), 0, 1);
        let digests = [
            request.digest("rule", 1, 0),
            request.digest("rule", 2, 0),
            request.digest("gold", 1, 0),
            request.digest("rule", 1, 1),
            request.swapped().digest("rule", 1, 0),
        ];
        let distinct: std::collections::HashSet<_> = digests.iter().collect();
        assert_eq!(distinct.len(), 5);
        assert_eq!(request.swapped().swapped().digest("rule", 1, 0), digests[0]);
    }
}
