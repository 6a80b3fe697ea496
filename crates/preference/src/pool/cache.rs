//! LRU cache of verdicts.
//!
//! Caches preferences only: an abstention may not repeat. The key is a digest of the judge's name, its version and the
//! content of the request, so a new version never returns an old verdict, nor does a remote judge that changed. An
//! antisymmetric judge gets both orders of two completions as the same request: its verdict is then bit-identical
//! whether or not it comes from the cache.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use lru::LruCache;
use messages::{Digest, JudgeVersion, Probability};

use crate::judge::Verdict;
use crate::pool::{ComparisonRequest, JudgeReplicas, VersionedVerdict};

/// LRU cache of verdicts; evicts the least recently used.
pub(crate) struct VerdictCache {
    /// `None` when the cache is disabled.
    verdicts: Option<Mutex<LruCache<Digest, CachedVerdict>>>,
}

/// Cached part of a [`VersionedVerdict`].
#[derive(Clone, Copy)]
struct CachedVerdict {
    p: Probability,
    scores: Option<[f32; 2]>,
}

/// A request as sent to the judge, and its cache key.
pub(crate) struct CacheLookup {
    /// Request for the judge.
    pub(crate) request: ComparisonRequest,
    /// Whether it has the opposite order of the original request.
    is_swapped: bool,
    /// Digest and judge version; `None` when the verdict is not cached.
    key: Option<(Digest, JudgeVersion)>,
}

impl VerdictCache {
    pub(crate) fn new(size: usize) -> Self {
        let size = NonZeroUsize::new(size);
        Self {
            verdicts: size.map(|size| Mutex::new(LruCache::new(size))),
        }
    }

    /// Canonical order and cache key of `request` for `judges`.
    pub(crate) fn lookup(
        &self,
        judges: &JudgeReplicas,
        request: &ComparisonRequest,
    ) -> CacheLookup {
        let (request, swapped) = (request.clone(), request.swapped());
        let Some(version) = judges.version.filter(|_| self.verdicts.is_some()) else {
            return CacheLookup {
                request,
                is_swapped: false,
                key: None,
            };
        };
        let revision = judges.revision();
        let digest =
            |request: &ComparisonRequest| request.digest(&judges.name, version.0, revision);
        let key = digest(&request);
        let reversed = judges.is_antisymmetric.then(|| digest(&swapped));
        match reversed.filter(|reversed| reversed.0 < key.0) {
            Some(reversed) => CacheLookup {
                request: swapped,
                is_swapped: true,
                key: Some((reversed, version)),
            },
            None => CacheLookup {
                request,
                is_swapped: false,
                key: Some((key, version)),
            },
        }
    }

    /// Cached verdict, in the order of the original request.
    pub(crate) fn get(&self, lookup: &CacheLookup) -> Option<VersionedVerdict> {
        let (verdicts, (key, version)) = (self.verdicts.as_ref()?, lookup.key?);
        let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        let CachedVerdict { p, scores } = *verdicts.get(&key)?;
        Some(lookup.in_original_order(VersionedVerdict {
            verdict: Verdict::Preference(p),
            version,
            scores,
        }))
    }

    /// Caches a preference by the expected judge version. Returns the verdict in the order of the original request.
    pub(crate) fn put(&self, lookup: &CacheLookup, answer: VersionedVerdict) -> VersionedVerdict {
        if let (Some(verdicts), Some((key, version)), &Verdict::Preference(p)) =
            (&self.verdicts, lookup.key, &answer.verdict)
            && version == answer.version
        {
            let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
            let scores = answer.scores;
            verdicts.put(key, CachedVerdict { p, scores });
        }
        lookup.in_original_order(answer)
    }
}

impl CacheLookup {
    fn in_original_order(&self, answer: VersionedVerdict) -> VersionedVerdict {
        match answer.verdict {
            Verdict::Preference(p) if self.is_swapped => VersionedVerdict {
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

    fn judges(version: Option<u64>) -> JudgeReplicas {
        JudgeReplicas {
            name: "rule".into(),
            version: version.map(JudgeVersion),
            is_antisymmetric: false,
            digest: None,
            replicas: Vec::new(),
        }
    }

    fn request(texts: &[&str]) -> ComparisonRequest {
        ComparisonRequest::new(Arc::new(pair(0, texts)), 0, 1)
    }

    fn answer(verdict: Verdict, version: u64) -> VersionedVerdict {
        VersionedVerdict::new(verdict, JudgeVersion(version))
    }

    fn cached(
        cache: &VerdictCache,
        judges: &JudgeReplicas,
        request: &ComparisonRequest,
    ) -> Option<VersionedVerdict> {
        cache.get(&cache.lookup(judges, request))
    }

    #[test]
    fn a_preference_is_cached_by_judge_version_and_content() {
        let cache = VerdictCache::new(8);
        let original = request(&["a", "b"]);
        let hit = answer(preferred(0.75), 1);
        let given = cache.put(&cache.lookup(&judges(Some(1)), &original), hit.clone());
        assert_eq!(given, hit);
        let another = JudgeReplicas {
            name: "gold".into(),
            ..judges(Some(1))
        };
        for (name, judges, request, expected) in [
            (
                "the same request",
                judges(Some(1)),
                original.clone(),
                Some(hit),
            ),
            ("a newer version", judges(Some(2)), original.clone(), None),
            ("no known version", judges(None), original.clone(), None),
            ("another judge", another, original.clone(), None),
            ("the other order", judges(Some(1)), original.swapped(), None),
            ("another pair", judges(Some(1)), request(&["a", "c"]), None),
        ] {
            assert_eq!(cached(&cache, &judges, &request), expected, "{name}");
        }
    }

    #[test]
    fn both_orders_share_one_cache_key_of_an_antisymmetric_judge() {
        let cache = VerdictCache::new(8);
        let judges = JudgeReplicas {
            is_antisymmetric: true,
            ..judges(Some(1))
        };
        let original = request(&["a", "b"]);
        let requests = [original.clone(), original.swapped()];
        let lookups = requests.each_ref().map(|q| cache.lookup(&judges, q));
        let texts = |lookup: &CacheLookup| lookup.request.comparison().first.text.clone();
        assert_eq!(texts(&lookups[0]), texts(&lookups[1]));
        assert_ne!(lookups[0].is_swapped, lookups[1].is_swapped);
        let expected = |lookup: &CacheLookup| {
            let p = if lookup.is_swapped { 0.25 } else { 0.75 };
            Some(answer(preferred(p), 1))
        };
        let given = cache.put(&lookups[0], answer(preferred(0.75), 1));
        assert_eq!(Some(given), expected(&lookups[0]));
        for (lookup, request) in lookups.iter().zip(&requests) {
            assert_eq!(cached(&cache, &judges, request), expected(lookup));
        }
    }

    #[test]
    fn only_preferences_of_the_expected_version_are_cached() {
        for (name, size, given) in [
            ("an abstention", 8, answer(abstained("no words"), 1)),
            ("of another version", 8, answer(preferred(0.75), 2)),
            ("a disabled cache", 0, answer(preferred(0.75), 1)),
        ] {
            let cache = VerdictCache::new(size);
            let original = request(&["a", "b"]);
            let lookup = cache.lookup(&judges(Some(1)), &original);
            assert_eq!(cache.put(&lookup, given.clone()), given, "{name}");
            assert_eq!(cached(&cache, &judges(Some(1)), &original), None, "{name}");
        }
    }

    #[test]
    fn verdicts_of_a_remote_judge_that_changed_are_not_returned() {
        struct Changing(std::sync::atomic::AtomicU64);
        impl crate::pool::Replica for Changing {
            fn name(&self) -> &str {
                "changing"
            }

            fn revision(&self) -> u64 {
                self.0.load(std::sync::atomic::Ordering::Relaxed)
            }

            fn judge<'a>(
                &'a self,
                _batch: &'a [ComparisonRequest],
            ) -> futures_util::future::BoxFuture<
                'a,
                Result<Vec<VersionedVerdict>, crate::error::JudgeError>,
            > {
                unreachable!("the cache asks no judge")
            }
        }
        let cache = VerdictCache::new(8);
        let replica = Arc::new(Changing(0.into()));
        let judges = JudgeReplicas {
            replicas: vec![Arc::clone(&replica) as Arc<dyn crate::pool::Replica>],
            ..judges(Some(1))
        };
        let original = request(&["a", "b"]);
        let given = answer(preferred(0.75), 1);
        cache.put(&cache.lookup(&judges, &original), given.clone());
        for (revision, expected) in [(0, Some(&given)), (1, None), (0, Some(&given))] {
            replica
                .0
                .store(revision, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(cached(&cache, &judges, &original).as_ref(), expected);
        }
    }

    #[test]
    fn the_least_recently_used_verdict_is_evicted() {
        let cache = VerdictCache::new(2);
        let judges = judges(Some(1));
        let [a, b, c] = ["a", "b", "c"].map(|text| request(&[text, "z"]));
        let put = |q: &ComparisonRequest| {
            let given = answer(preferred(0.75), 1);
            cache.put(&cache.lookup(&judges, q), given);
        };
        put(&a);
        put(&b);
        assert!(cached(&cache, &judges, &a).is_some());
        put(&c);
        let cached = [&a, &b, &c].map(|q| cached(&cache, &judges, q).is_some());
        assert_eq!(cached, [true, false, true]);
    }
}
