//! Metrics of a judge pool. Rates and means are over recent preferences, so that they follow the policy as it changes;
//! counters count from the start of the pool.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use telemetry::publish;

use crate::judge::Verdict;
use crate::pool::Preference;

/// Weight of a mean at which it is halved.
const WINDOW: f64 = 1000.0;

/// The metrics of one judge, labelled with its name.
pub(crate) struct PoolMetrics {
    judge: String,
    statistics: Mutex<PoolStatistics>,
}

#[derive(Default)]
struct PoolStatistics {
    batch_size: RecentMean,
    tie_rate: RecentMean,
    order_inconsistency: RecentMean,
    timeouts: u64,
    retries: u64,
    rate_limited: u64,
    abstained: u64,
    cache_hits: u64,
    queue: Option<usize>,
}

/// Mean over roughly the last `WINDOW / 2` to `WINDOW` values.
#[derive(Default)]
struct RecentMean {
    sum: f64,
    count: f64,
}

impl PoolMetrics {
    pub(crate) fn new(judge: &str) -> Self {
        let metrics = Self {
            judge: judge.to_owned(),
            statistics: Mutex::default(),
        };
        let initial = [
            "judge/timeouts",
            "judge/retries",
            "judge/rate_limited",
            "judge/abstained",
            "judge/cache_hits",
            "health/judge_circuit_open",
        ];
        initial.iter().for_each(|name| metrics.publish(name, 0.0));
        metrics
    }

    /// Records a preference, `latency` after its request.
    pub(crate) fn preference(&self, preference: &Preference, latency: Duration) {
        let mut statistics = self.statistics();
        match preference.verdict {
            Verdict::Preference(p) => {
                let is_tie = p.get() == 0.5;
                self.publish("judge/tie_rate", statistics.tie_rate.add_if(is_tie));
            }
            Verdict::Abstained { .. } => {
                self.count("judge/abstained", &mut statistics.abstained);
            }
        }
        if let Some(changes) = preference.changes_with_order() {
            let rate = statistics.order_inconsistency.add_if(changes);
            self.publish("judge/order_inconsistency", rate);
        }
        self.publish("judge/latency_seconds", latency.as_secs_f64());
    }

    /// Records the size of a batch sent to a replica.
    pub(crate) fn batch(&self, requests: usize) {
        let mean = self.statistics().batch_size.add(as_f64(requests));
        self.publish("judge/batch_size", mean);
    }

    pub(crate) fn timed_out(&self) {
        self.count("judge/timeouts", &mut self.statistics().timeouts);
    }

    pub(crate) fn retried(&self) {
        self.count("judge/retries", &mut self.statistics().retries);
    }

    pub(crate) fn rate_limited(&self) {
        self.count("judge/rate_limited", &mut self.statistics().rate_limited);
    }

    /// Records the mean preference for the completion that is shown first, less ½.
    pub(crate) fn position_bias(&self, bias: f64) {
        self.publish("judge/position_bias", bias);
    }

    pub(crate) fn cache_hit(&self) {
        self.count("judge/cache_hits", &mut self.statistics().cache_hits);
    }

    /// Records the length of the queue.
    pub(crate) fn queue(&self, waiting: usize) {
        if self.statistics().queue.replace(waiting) != Some(waiting) {
            self.publish("judge/queue", as_f64(waiting));
        }
    }

    /// Records whether every circuit breaker is open.
    pub(crate) fn circuit(&self, is_open: bool) {
        let value = f64::from(u8::from(is_open));
        self.publish("health/judge_circuit_open", value);
    }

    fn count(&self, name: &'static str, count: &mut u64) {
        *count += 1;
        #[expect(clippy::cast_precision_loss, reason = "no run counts to 2^53")]
        self.publish(name, *count as f64);
    }

    fn publish(&self, name: &'static str, value: f64) {
        let labels = [("role", "preference"), ("judge", self.judge.as_str())];
        publish(&[(name, value)].into_iter().collect(), &labels);
    }

    fn statistics(&self) -> MutexGuard<'_, PoolStatistics> {
        // A panic leaves at most one count too low.
        self.statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn as_f64(count: usize) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "no queue or batch holds 2^53 requests"
    )]
    let value = count as f64;
    value
}

impl RecentMean {
    /// Adds `value` and returns the mean.
    fn add(&mut self, value: f64) -> f64 {
        self.sum += value;
        self.count += 1.0;
        if self.count > WINDOW {
            self.sum /= 2.0;
            self.count /= 2.0;
        }
        self.sum / self.count
    }

    /// Adds one event and returns the rate of those that `counts`.
    fn add_if(&mut self, counts: bool) -> f64 {
        self.add(f64::from(u8::from(counts)))
    }
}

#[cfg(test)]
mod tests {
    use messages::{JudgeVersion, Probability};
    use telemetry::Exporter;

    use super::*;
    use crate::judge::fake::{abstained, preferred};

    fn preference(verdict: Verdict, estimates: Option<[f32; 2]>) -> Preference {
        Preference {
            verdict,
            version: JudgeVersion(1),
            estimates: estimates.map(|both| both.map(|p| Probability::new(p).unwrap())),
            scores: None,
        }
    }

    #[test]
    fn judge_metrics_are_labelled_with_the_judges_name() {
        let recording = Exporter::recorder_only();
        let page = |act: &dyn Fn(&PoolMetrics), metrics: &PoolMetrics| {
            recording.during(|| act(metrics));
            recording.render()
        };
        let mut made = None;
        recording.during(|| made = Some(PoolMetrics::new("rule")));
        let metrics = made.expect("it was made");
        let first = page(
            &|metrics| {
                metrics.batch(2);
                metrics.preference(
                    &preference(preferred(0.5), None),
                    Duration::from_millis(200),
                );
                metrics.preference(&preference(preferred(1.0), None), Duration::from_secs(2));
            },
            &metrics,
        );
        assert!(
            !first.contains("judge_order_inconsistency{"),
            "published without a value in\n{first}"
        );
        let second = page(
            &|metrics| {
                metrics.batch(4);
                let both = |p, q| preference(preferred(0.25), Some([p, q]));
                metrics.preference(&both(0.25, 0.75), Duration::ZERO);
                metrics.preference(&both(0.25, 0.25), Duration::ZERO);
                metrics.preference(&preference(abstained("why"), None), Duration::ZERO);
                (0..2).for_each(|_| metrics.retried());
                (0..4).for_each(|_| metrics.rate_limited());
                metrics.position_bias(0.25);
                metrics.timed_out();
                (0..3).for_each(|_| metrics.cache_hit());
                metrics.queue(5);
                metrics.circuit(true);
            },
            &metrics,
        );
        let labels = "role=\"preference\",judge=\"rule\"";
        for (name, value) in [
            ("agon_judge_batch_size", "3"),
            ("agon_judge_tie_rate", "0.25"),
            ("agon_judge_order_inconsistency", "0.5"),
            ("agon_judge_latency_seconds_sum", "2.2"),
            ("agon_judge_latency_seconds_count", "5"),
            ("agon_judge_abstained", "1"),
            ("agon_judge_retries", "2"),
            ("agon_judge_rate_limited", "4"),
            ("agon_judge_position_bias", "0.25"),
            ("agon_judge_timeouts", "1"),
            ("agon_judge_cache_hits", "3"),
            ("agon_judge_queue", "5"),
            ("agon_health_judge_circuit_open", "1"),
        ] {
            let line = format!("{name}{{{labels}}} {value}");
            assert!(
                second.lines().any(|l| l == line),
                "no line {line:?} in\n{second}"
            );
        }
        let circuit = format!("agon_health_judge_circuit_open{{{labels}}} 0");
        assert!(first.lines().any(|l| l == circuit), "closed at first");
    }

    #[test]
    fn a_recent_mean_discounts_old_values() {
        let mut mean = RecentMean::default();
        let all = |mean: &mut RecentMean, times, value| {
            (0..times).map(|_| mean.add(value)).last().unwrap()
        };
        assert_eq!(all(&mut mean, 500, 1.0), 1.0);
        assert_eq!(all(&mut mean, 500, 0.0), 0.5, "all of the window");
        let later = all(&mut mean, 5000, 0.0);
        assert!(later < 0.01, "{later}");
    }
}
