//! Evaluation judges: they compare the policy's completion with the reference's, and give no labels.
//!
//! Promises: an evaluation judge that fails costs its own verdicts only. A pair goes without its verdict once no
//! replica of it could be asked for `timeout`, whether circuit breakers are open or it limits the rate of requests.
//! Does not know the run's judge.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use messages::{EvaluationVerdict, Probability};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::judge::Verdict;
use crate::pool::{ComparisonRequest, JudgePool, Orders, Outage};

/// An evaluation judge.
pub struct EvaluationJudge {
    name: String,
    pool: JudgePool,
    /// Whether a missing verdict was logged; only the first is.
    failed: AtomicBool,
}

impl EvaluationJudge {
    /// The judge of this name.
    #[must_use]
    pub fn new(name: String, pool: JudgePool) -> Self {
        Self {
            name,
            pool,
            failed: AtomicBool::new(false),
        }
    }

    /// The judge's name in verdicts.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Preference of the first completion of `request` over the second, from both orders; `None` when the judge fails
    /// or abstains.
    pub async fn verdict(&self, request: &ComparisonRequest) -> Option<EvaluationVerdict> {
        match self.preference(request).await {
            Ok(p) => Some(EvaluationVerdict {
                judge: self.name.clone(),
                p,
            }),
            Err(reason) => {
                if !self.failed.swap(true, Ordering::Relaxed) {
                    let judge = &self.name;
                    tracing::warn!(
                        judge,
                        reason,
                        "an evaluation judge gave no verdict; its pairs are not in its win rate"
                    );
                }
                None
            }
        }
    }

    async fn preference(&self, request: &ComparisonRequest) -> Result<Probability, String> {
        let limit = self.pool.settings().timeout;
        let outage = self.pool.outage();
        tokio::select! {
            biased;
            preference = self.pool.compare(request, Orders::Both) => match preference {
                Ok(preference) => match preference.verdict {
                    Verdict::Preference(p) => Ok(p),
                    Verdict::Abstained { reason } => Err(reason),
                },
                Err(error) => Err(error.to_string()),
            },
            outage = outage_of(outage, limit) => Err(outage),
        }
    }
}

/// Waits for an outage that lasts for `limit`, of whatever cause; its description.
async fn outage_of(mut outages: watch::Receiver<Option<Outage>>, limit: Duration) -> String {
    loop {
        let began = outages.wait_for(Option::is_some).await.is_ok();
        if !began {
            // The pool has ended: its comparison says so.
            return std::future::pending().await;
        }
        let ended = outages.wait_for(Option::is_none);
        let is_over = timeout(limit, ended).await.is_ok();
        if !is_over {
            let outage = outages.borrow().as_ref().map(ToString::to_string);
            return outage.unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::JudgeError;
    use crate::judge::fake::{abstained, pair, preferred};
    use crate::pool::PoolSettings;
    use crate::pool::fake::{FakeReplica, pool, settings};
    use std::sync::Arc;

    async fn verdict(judge: FakeReplica) -> Option<EvaluationVerdict> {
        let pool = pool(
            [judge],
            PoolSettings {
                circuit_failures: 1,
                ..settings()
            },
        );
        let request = ComparisonRequest::new(Arc::new(pair(0, &["2", "1"])), 0, 1);
        let judge = EvaluationJudge::new("strict".into(), pool);
        judge.verdict(&request).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_verdict_carries_the_judges_name_and_both_orders() {
        let biased = FakeReplica::new(|batch| {
            let p = |text: &str| if text == "2" { 0.875 } else { 0.625 };
            let first = |request: &ComparisonRequest| p(&request.comparison().first.text);
            Ok(batch
                .iter()
                .map(|request| preferred(first(request)))
                .collect())
        });
        let verdict = verdict(biased).await.expect("it answers");
        // The mean of .875 and 1 - .625.
        assert_eq!((verdict.judge.as_str(), verdict.p.get()), ("strict", 0.625));
    }

    #[tokio::test(start_paused = true)]
    async fn an_abstention_and_an_outage_are_no_verdict() {
        let abstains = FakeReplica::new(|batch| Ok(vec![abstained("no"); batch.len()]));
        assert_eq!(verdict(abstains).await, None);
        let fails = FakeReplica::new(|_| Err(JudgeError::new("down")));
        assert_eq!(verdict(fails).await, None);
        let limited = FakeReplica::new(|_| Err(JudgeError::rate_limited("quota exceeded")));
        assert_eq!(verdict(limited).await, None);
    }
}
