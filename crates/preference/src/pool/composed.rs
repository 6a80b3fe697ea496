//! Judges of several members of which one is remote: an ensemble, or a judge for each value of a prompt's column.
//!
//! Every member has a pool of its own, with its own batches, retries and circuit breakers. Does not know what a member
//! computes.

use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all, try_join_all};

use crate::error::{ComparisonError, JudgeError, JudgeErrorKind};
use crate::judge::{EnsembleRule, RouteRule, sum_of_versions};
use crate::pool::{
    ComparisonRequest, JudgePool, JudgeReplicas, Orders, PoolSettings, Preference, Replica,
    VersionedVerdict,
};

/// Combination of the verdicts of several members.
#[derive(Debug, Clone, PartialEq)]
pub enum Composition {
    /// All members are asked, and combined.
    Ensemble(EnsembleRule),
    /// The member of the prompt's column is asked.
    Route(RouteRule),
}

/// The members of a composed judge.
struct ComposedReplica {
    name: &'static str,
    members: Vec<JudgeReplicas>,
    pools: Vec<JudgePool>,
    composition: Composition,
    concurrency: usize,
}

impl JudgeReplicas {
    /// A judge of these members; its tasks run on the current runtime. The pool of each member has `settings`, without
    /// ties and cache, which are those of the composed judge's own pool.
    ///
    /// # Errors
    /// When the number of members does not fit the composition.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    pub fn composed(
        members: Vec<JudgeReplicas>,
        composition: Composition,
        settings: PoolSettings,
    ) -> Result<Self, JudgeError> {
        let name = match &composition {
            Composition::Ensemble(_) => "ensemble",
            Composition::Route(rule) => {
                rule.check(members.len())?;
                "route"
            }
        };
        let of_member = PoolSettings {
            tie_margin: 0.0,
            max_order_gap: 1.0,
            cache_size: 0,
            ..settings
        };
        let pools = members.iter().enumerate().map(|(index, member)| {
            let member = JudgeReplicas {
                name: format!("{name}-{index}-{}", member.name),
                ..member.clone()
            };
            JudgePool::new(member, of_member)
        });
        let versions = members.iter().map(|member| member.version);
        let versions: Option<Vec<_>> = versions.collect();
        let capacities = members.iter().map(|member| capacity(member, settings));
        let replica = ComposedReplica {
            name,
            pools: pools.collect(),
            composition,
            concurrency: capacities.min().unwrap_or(1).max(1),
            members,
        };
        Ok(Self {
            name: name.to_owned(),
            version: versions.map(sum_of_versions),
            is_antisymmetric: replica.members.iter().all(|member| member.is_antisymmetric),
            digest: None,
            replicas: vec![Arc::new(replica)],
        })
    }
}

/// Requests that a member answers at once, so that none waits in its queue for the time limit of the whole.
fn capacity(member: &JudgeReplicas, settings: PoolSettings) -> usize {
    let replicas = member.replicas.iter();
    let capacities = replicas.map(|replica| {
        let batch = replica.max_batch().min(settings.max_batch);
        replica.concurrency().saturating_mul(batch)
    });
    capacities.sum()
}

impl ComposedReplica {
    async fn verdict(&self, request: &ComparisonRequest) -> Result<VersionedVerdict, JudgeError> {
        match &self.composition {
            Composition::Ensemble(rule) => {
                let preferences = self
                    .pools
                    .iter()
                    .map(|pool| pool.compare(request, Orders::One));
                let preferences = join_all(preferences).await;
                let preferences: Result<Vec<Preference>, _> = preferences.into_iter().collect();
                let preferences = preferences.map_err(|error| judge_error(&error))?;
                let versions = preferences.iter().map(|preference| preference.version);
                let version = sum_of_versions(versions);
                let verdicts = preferences.into_iter().map(|preference| preference.verdict);
                Ok(VersionedVerdict::new(rule.verdict(verdicts), version))
            }
            Composition::Route(rule) => {
                let index = rule.member(request.comparison().prompt);
                let pool = (self.pools.get(index))
                    .ok_or_else(|| JudgeError::permanent("the route has no member"))?;
                let preference = pool.compare(request, Orders::One).await;
                let preference = preference.map_err(|error| judge_error(&error))?;
                Ok(VersionedVerdict {
                    verdict: preference.verdict,
                    version: self.version(preference.version),
                    scores: preference.scores,
                })
            }
        }
    }

    /// Version of a verdict of one member: that of all members where it is known, else the member's.
    fn version(&self, of_member: messages::JudgeVersion) -> messages::JudgeVersion {
        let versions = self.members.iter().map(|member| member.version);
        let versions: Option<Vec<_>> = versions.collect();
        versions.map_or(of_member, sum_of_versions)
    }
}

/// The failure of a member as that of the whole.
fn judge_error(error: &ComparisonError) -> JudgeError {
    let kind = match error {
        ComparisonError::NoJudge { .. } => JudgeErrorKind::Dead,
        _ => JudgeErrorKind::Transient,
    };
    JudgeError::with_kind(kind, error.to_string())
}

impl Replica for ComposedReplica {
    fn name(&self) -> &str {
        self.name
    }

    fn concurrency(&self) -> usize {
        self.concurrency
    }

    fn max_batch(&self) -> usize {
        1
    }

    fn revision(&self) -> u64 {
        let revisions = self.members.iter().map(JudgeReplicas::revision);
        revisions.fold(0, u64::wrapping_add)
    }

    fn judge<'a>(
        &'a self,
        batch: &'a [ComparisonRequest],
    ) -> BoxFuture<'a, Result<Vec<VersionedVerdict>, JudgeError>> {
        Box::pin(try_join_all(
            batch.iter().map(|request| self.verdict(request)),
        ))
    }
}

#[cfg(test)]
mod tests {
    use messages::JudgeVersion;
    use settings::Combine;

    use super::*;
    use crate::judge::Verdict;
    use crate::judge::fake::{abstained, pair, preferred};
    use crate::pool::fake::{FakeReplica, settings};

    fn member(replica: FakeReplica) -> JudgeReplicas {
        JudgeReplicas {
            name: "fake".into(),
            version: Some(JudgeVersion(u64::MAX - 1)),
            is_antisymmetric: false,
            digest: None,
            replicas: vec![Arc::new(replica)],
        }
    }

    fn answering(verdict: &Verdict) -> FakeReplica {
        let verdict = verdict.clone();
        FakeReplica::new(move |batch| Ok(vec![verdict.clone(); batch.len()]))
    }

    async fn composed(
        members: Vec<JudgeReplicas>,
        composition: Composition,
        route: Option<&str>,
    ) -> Verdict {
        let judges = JudgeReplicas::composed(members, composition, settings()).unwrap();
        let mut pair = pair(0, &["a", "b"]);
        pair.prompt.route = route.map(str::to_owned);
        let request = ComparisonRequest::new(Arc::new(pair), 0, 1);
        let pool = JudgePool::new(judges, settings());
        pool.compare(&request, Orders::One).await.unwrap().verdict
    }

    fn ensemble(weights: &[f64]) -> Composition {
        Composition::Ensemble(EnsembleRule {
            weights: weights.to_vec(),
            combine: Combine::Mean,
            deviations: 0.0,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn an_ensemble_of_pools_is_the_weighted_mean_of_those_that_answer() {
        let members = |last: &Verdict| {
            let answers = [preferred(1.0), preferred(0.25), last.clone()];
            answers
                .iter()
                .map(|answer| member(answering(answer)))
                .collect()
        };
        let verdict = composed(members(&preferred(0.0)), ensemble(&[2.0, 1.0, 1.0]), None).await;
        assert_eq!(verdict, preferred(0.5625));
        let verdict = composed(members(&abstained("no")), ensemble(&[]), None).await;
        assert_eq!(verdict, preferred(0.625));
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_asks_one_pool_and_a_failure_is_retried() {
        let rule = Composition::Route(RouteRule {
            values: vec!["*".into()],
        });
        let never = || FakeReplica::new(|_| panic!("it has no prompt"));
        let failing = FakeReplica::failing([JudgeError::new("once")]);
        let members = vec![member(failing), member(never())];
        assert_eq!(
            composed(members, rule.clone(), Some("7")).await,
            preferred(0.5)
        );
        let members = vec![member(never()), member(answering(&preferred(0.75)))];
        assert_eq!(composed(members, rule, None).await, preferred(0.75));
        let none = Composition::Route(RouteRule { values: Vec::new() });
        let two = vec![member(never()), member(never())];
        assert!(JudgeReplicas::composed(two, none, settings()).is_err());
    }
}
