//! Verdicts that are remembered, so that the same question costs one answer.
//!
//! Only preferences are: an abstention may be chance. What is remembered is found by the judge, its
//! version and the content alone, so a new version never answers with an old verdict.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use lru::LruCache;
use messages::{Digest, JudgeVersion, Probability};

use super::{Answer, Judges, Question};
use crate::Verdict;

/// The least recently used is forgotten first.
pub(super) struct VerdictCache {
    /// `None` when nothing is to be remembered.
    verdicts: Option<Mutex<LruCache<Digest, Probability>>>,
}

impl VerdictCache {
    pub(super) fn new(size: usize) -> Self {
        let size = NonZeroUsize::new(size);
        Self {
            verdicts: size.map(|size| Mutex::new(LruCache::new(size))),
        }
    }

    /// What `judges` said of `question` before, or of the other order where that tells as much.
    pub(super) fn get(&self, judges: &Judges, question: &Question) -> Option<Answer> {
        let (verdicts, version) = (self.verdicts.as_ref()?, judges.version?);
        let digest = |question: &Question| question.digest(&judges.name, version.0);
        let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut remembered = verdicts.get(&digest(question)).copied();
        if remembered.is_none() && judges.is_antisymmetric {
            let swapped = verdicts.get(&digest(&question.swapped()));
            remembered = swapped.map(|p| p.complement());
        }
        remembered.map(|p| Answer {
            verdict: Verdict::Preference(p),
            version,
        })
    }

    /// Remembers a preference that the expected version gave.
    pub(super) fn put(&self, judges: &Judges, question: &Question, answer: &Answer) {
        let (Some(verdicts), &Verdict::Preference(p)) = (&self.verdicts, &answer.verdict) else {
            return;
        };
        if judges.version == Some(answer.version) {
            let JudgeVersion(version) = answer.version;
            let digest = question.digest(&judges.name, version);
            let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
            verdicts.put(digest, p);
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
        Answer {
            verdict,
            version: JudgeVersion(version),
        }
    }

    #[test]
    fn a_preference_is_remembered_for_its_judge_version_and_content() {
        let cache = VerdictCache::new(8);
        let asked = question(&["a", "b"]);
        cache.put(&judges(Some(1)), &asked, &answer(preferred(0.75), 1));
        let another = Judges {
            name: "gold".into(),
            ..judges(Some(1))
        };
        let hit = answer(preferred(0.75), 1);
        for (name, judges, question, expected) in [
            ("the same", judges(Some(1)), asked.clone(), Some(hit)),
            ("a newer version", judges(Some(2)), asked.clone(), None),
            ("no known version", judges(None), asked.clone(), None),
            ("another judge", another, asked.clone(), None),
            ("the other order", judges(Some(1)), asked.swapped(), None),
            ("another pair", judges(Some(1)), question(&["a", "c"]), None),
        ] {
            assert_eq!(cache.get(&judges, &question), expected, "{name}");
        }
    }

    #[test]
    fn the_other_order_counts_for_an_antisymmetric_judge() {
        let cache = VerdictCache::new(8);
        let judges = Judges {
            is_antisymmetric: true,
            ..judges(Some(1))
        };
        let asked = question(&["a", "b"]);
        cache.put(&judges, &asked, &answer(preferred(0.75), 1));
        let swapped = cache.get(&judges, &asked.swapped());
        assert_eq!(swapped, Some(answer(preferred(0.25), 1)));
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
            cache.put(&judges(Some(1)), &asked, &given);
            assert_eq!(cache.get(&judges(Some(1)), &asked), None, "{name}");
        }
    }

    #[test]
    fn the_longest_unused_is_forgotten_first() {
        let cache = VerdictCache::new(2);
        let judges = judges(Some(1));
        let [a, b, c] = ["a", "b", "c"].map(|text| question(&[text, "z"]));
        let given = answer(preferred(0.75), 1);
        cache.put(&judges, &a, &given);
        cache.put(&judges, &b, &given);
        assert!(cache.get(&judges, &a).is_some());
        cache.put(&judges, &c, &given);
        let known = [&a, &b, &c].map(|q| cache.get(&judges, q).is_some());
        assert_eq!(known, [true, false, true]);
    }
}
