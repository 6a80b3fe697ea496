//! Verdicts that are remembered, so that the same question costs one answer.
//!
//! Only preferences are: an abstention may be chance. What is remembered is found by the judge, its
//! version and the content alone, so a new version never answers with an old verdict. An antisymmetric
//! judge is asked about two completions in one order only, whichever was wanted: an answer is then the
//! same to the last bit, remembered or not.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use lru::LruCache;
use messages::{Digest, JudgeVersion, Probability};

use super::{Answer, Judges, Question};
use crate::Verdict;

/// The least recently used is forgotten first.
pub(super) struct VerdictCache {
    /// `None` when nothing is to be remembered.
    verdicts: Option<Mutex<LruCache<Digest, Remembered>>>,
}

/// What is remembered of an answer.
#[derive(Clone, Copy)]
struct Remembered {
    p: Probability,
    scores: Option<[f32; 2]>,
}

/// A question as it is asked and remembered.
pub(super) struct Entry {
    /// What the judge is asked.
    pub(super) question: Question,
    /// Whether that is the other order than was wanted.
    is_swapped: bool,
    /// Under which it is remembered, and of which version; `None` when it is not.
    key: Option<(Digest, JudgeVersion)>,
}

impl VerdictCache {
    pub(super) fn new(size: usize) -> Self {
        let size = NonZeroUsize::new(size);
        Self {
            verdicts: size.map(|size| Mutex::new(LruCache::new(size))),
        }
    }

    /// Where `question` to `judges` has its place.
    pub(super) fn entry(&self, judges: &Judges, question: &Question) -> Entry {
        let (question, swapped) = (question.clone(), question.swapped());
        let Some(version) = judges.version.filter(|_| self.verdicts.is_some()) else {
            return Entry {
                question,
                is_swapped: false,
                key: None,
            };
        };
        let digest = |question: &Question| question.digest(&judges.name, version.0);
        let key = digest(&question);
        let other = judges.is_antisymmetric.then(|| digest(&swapped));
        match other.filter(|other| other.0 < key.0) {
            Some(other) => Entry {
                question: swapped,
                is_swapped: true,
                key: Some((other, version)),
            },
            None => Entry {
                question,
                is_swapped: false,
                key: Some((key, version)),
            },
        }
    }

    /// What was said of it before, in the order that was wanted.
    pub(super) fn get(&self, entry: &Entry) -> Option<Answer> {
        let (verdicts, (key, version)) = (self.verdicts.as_ref()?, entry.key?);
        let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        let Remembered { p, scores } = *verdicts.get(&key)?;
        Some(entry.turn(Answer {
            verdict: Verdict::Preference(p),
            version,
            scores,
        }))
    }

    /// Remembers a preference that the expected version gave to what was asked, and gives the answer in
    /// the order that was wanted.
    pub(super) fn put(&self, entry: &Entry, answer: Answer) -> Answer {
        if let (Some(verdicts), Some((key, version)), &Verdict::Preference(p)) =
            (&self.verdicts, entry.key, &answer.verdict)
            && version == answer.version
        {
            let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
            let scores = answer.scores;
            verdicts.put(key, Remembered { p, scores });
        }
        entry.turn(answer)
    }
}

impl Entry {
    fn turn(&self, answer: Answer) -> Answer {
        match answer.verdict {
            Verdict::Preference(p) if self.is_swapped => Answer {
                verdict: Verdict::Preference(p.complement()),
                scores: answer.scores.map(|[first, second]| [second, first]),
                ..answer
            },
            _ => answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::judge::fake::{abstained, pair, preferred};

    fn judges(version: Option<u64>) -> Judges {
        Judges {
            name: "rule".into(),
            version: version.map(JudgeVersion),
            is_antisymmetric: false,
            replicas: Vec::new(),
        }
    }

    fn question(texts: &[&str]) -> Question {
        Question::new(Arc::new(pair(0, texts)), 0, 1)
    }

    fn answer(verdict: Verdict, version: u64) -> Answer {
        Answer::new(verdict, JudgeVersion(version))
    }

    /// What is remembered of `question` to `judges`.
    fn known(cache: &VerdictCache, judges: &Judges, question: &Question) -> Option<Answer> {
        cache.get(&cache.entry(judges, question))
    }

    #[test]
    fn a_preference_is_remembered_for_its_judge_version_and_content() {
        let cache = VerdictCache::new(8);
        let asked = question(&["a", "b"]);
        let hit = answer(preferred(0.75), 1);
        let given = cache.put(&cache.entry(&judges(Some(1)), &asked), hit.clone());
        assert_eq!(given, hit);
        let another = Judges {
            name: "gold".into(),
            ..judges(Some(1))
        };
        for (name, judges, question, expected) in [
            ("the same", judges(Some(1)), asked.clone(), Some(hit)),
            ("a newer version", judges(Some(2)), asked.clone(), None),
            ("no known version", judges(None), asked.clone(), None),
            ("another judge", another, asked.clone(), None),
            ("the other order", judges(Some(1)), asked.swapped(), None),
            ("another pair", judges(Some(1)), question(&["a", "c"]), None),
        ] {
            assert_eq!(known(&cache, &judges, &question), expected, "{name}");
        }
    }

    #[test]
    fn an_antisymmetric_judge_is_asked_in_one_order_whichever_is_wanted() {
        let cache = VerdictCache::new(8);
        let judges = Judges {
            is_antisymmetric: true,
            ..judges(Some(1))
        };
        let asked = question(&["a", "b"]);
        let wanted = [asked.clone(), asked.swapped()];
        let entries = wanted.each_ref().map(|q| cache.entry(&judges, q));
        let texts = |entry: &Entry| entry.question.comparison().first.text.clone();
        assert_eq!(texts(&entries[0]), texts(&entries[1]));
        assert_ne!(entries[0].is_swapped, entries[1].is_swapped);
        let said = |entry: &Entry| {
            let p = if entry.is_swapped { 0.25 } else { 0.75 };
            Some(answer(preferred(p), 1))
        };
        let given = cache.put(&entries[0], answer(preferred(0.75), 1));
        assert_eq!(Some(given), said(&entries[0]));
        for (entry, question) in entries.iter().zip(&wanted) {
            assert_eq!(known(&cache, &judges, question), said(entry));
        }
    }

    #[test]
    fn what_is_no_preference_of_the_expected_version_is_not_remembered() {
        for (name, size, given) in [
            ("an abstention", 8, answer(abstained("no words"), 1)),
            ("of another version", 8, answer(preferred(0.75), 2)),
            ("no room", 0, answer(preferred(0.75), 1)),
        ] {
            let cache = VerdictCache::new(size);
            let asked = question(&["a", "b"]);
            let entry = cache.entry(&judges(Some(1)), &asked);
            assert_eq!(cache.put(&entry, given.clone()), given, "{name}");
            assert_eq!(known(&cache, &judges(Some(1)), &asked), None, "{name}");
        }
    }

    #[test]
    fn the_longest_unused_is_forgotten_first() {
        let cache = VerdictCache::new(2);
        let judges = judges(Some(1));
        let [a, b, c] = ["a", "b", "c"].map(|text| question(&[text, "z"]));
        let put = |q: &Question| {
            let given = answer(preferred(0.75), 1);
            cache.put(&cache.entry(&judges, q), given);
        };
        put(&a);
        put(&b);
        assert!(known(&cache, &judges, &a).is_some());
        put(&c);
        let remembered = [&a, &b, &c].map(|q| known(&cache, &judges, q).is_some());
        assert_eq!(remembered, [true, false, true]);
    }
}
