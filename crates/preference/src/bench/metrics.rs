//! What the bench measures of its judge. Shares are over recent rulings, so that they follow the policy
//! as it changes; what is counted is counted since the bench began.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use telemetry::publish;

use super::Ruling;
use crate::Verdict;

/// Once a mean is over more than this, half of its past is forgotten.
const WINDOW: f64 = 1000.0;

/// The metrics of one judge, labelled with its name.
pub(super) struct BenchMetrics {
    judge: String,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    batch_size: RecentMean,
    tie_rate: RecentMean,
    order_inconsistency: RecentMean,
    timeouts: u64,
    retries: u64,
    abstained: u64,
    cache_hits: u64,
    queue: Option<usize>,
}

/// A mean that forgets: over the last `WINDOW / 2` to `WINDOW` values, as far as there are so many.
#[derive(Default)]
struct RecentMean {
    sum: f64,
    count: f64,
}

impl BenchMetrics {
    pub(super) fn new(judge: &str) -> Self {
        let metrics = Self {
            judge: judge.to_owned(),
            seen: Mutex::default(),
        };
        let begun = [
            "judge/timeouts",
            "judge/retries",
            "judge/abstained",
            "judge/cache_hits",
            "health/judge_circuit_open",
        ];
        begun.iter().for_each(|name| metrics.publish(name, 0.0));
        metrics
    }

    /// A ruling, `latency` after its question came.
    pub(super) fn ruling(&self, ruling: &Ruling, latency: Duration) {
        let mut seen = self.seen();
        match ruling.verdict {
            Verdict::Preference(p) => {
                let is_tie = p.get() == 0.5;
                self.publish("judge/tie_rate", seen.tie_rate.add_if(is_tie));
            }
            Verdict::Abstained { .. } => {
                self.count("judge/abstained", &mut seen.abstained);
            }
        }
        if let Some(changes) = ruling.changes_with_order() {
            let share = seen.order_inconsistency.add_if(changes);
            self.publish("judge/order_inconsistency", share);
        }
        self.publish("judge/latency_seconds", latency.as_secs_f64());
    }

    /// A batch of so many questions goes to a replica.
    pub(super) fn batch(&self, questions: usize) {
        let mean = self.seen().batch_size.add(number(questions));
        self.publish("judge/batch_size", mean);
    }

    pub(super) fn timed_out(&self) {
        self.count("judge/timeouts", &mut self.seen().timeouts);
    }

    pub(super) fn retried(&self) {
        self.count("judge/retries", &mut self.seen().retries);
    }

    pub(super) fn cache_hit(&self) {
        self.count("judge/cache_hits", &mut self.seen().cache_hits);
    }

    /// So many questions wait for a replica.
    pub(super) fn queue(&self, waiting: usize) {
        if self.seen().queue.replace(waiting) != Some(waiting) {
            self.publish("judge/queue", number(waiting));
        }
    }

    /// Every circuit is open, or not any more.
    pub(super) fn circuit(&self, is_open: bool) {
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

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // Numbers for people: a count that a panic cut short harms nobody.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn number(count: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "nothing here has 2^53 parts")]
    let number = count as f64;
    number
}

impl RecentMean {
    /// The mean with `value`.
    fn add(&mut self, value: f64) -> f64 {
        self.sum += value;
        self.count += 1.0;
        if self.count > WINDOW {
            self.sum /= 2.0;
            self.count /= 2.0;
        }
        self.sum / self.count
    }

    /// The share with one more, which `counts`.
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

    fn ruling(verdict: Verdict, estimates: Option<[f32; 2]>) -> Ruling {
        Ruling {
            verdict,
            version: JudgeVersion(1),
            estimates: estimates.map(|both| both.map(|p| Probability::new(p).unwrap())),
            scores: None,
        }
    }

    #[test]
    fn what_was_seen_of_a_judge_is_published_under_its_name() {
        let recording = Exporter::recorder_only();
        let page = |act: &dyn Fn(&BenchMetrics), metrics: &BenchMetrics| {
            recording.during(|| act(metrics));
            recording.render()
        };
        let mut made = None;
        recording.during(|| made = Some(BenchMetrics::new("rule")));
        let metrics = made.expect("it was made");
        let first = page(
            &|metrics| {
                metrics.batch(2);
                metrics.ruling(&ruling(preferred(0.5), None), Duration::from_millis(200));
                metrics.ruling(&ruling(preferred(1.0), None), Duration::from_secs(2));
            },
            &metrics,
        );
        assert!(
            !first.contains("judge_order_inconsistency{"),
            "of nothing in\n{first}"
        );
        let second = page(
            &|metrics| {
                metrics.batch(4);
                let both = |p, q| ruling(preferred(0.25), Some([p, q]));
                metrics.ruling(&both(0.25, 0.75), Duration::ZERO);
                metrics.ruling(&both(0.25, 0.25), Duration::ZERO);
                metrics.ruling(&ruling(abstained("why"), None), Duration::ZERO);
                (0..2).for_each(|_| metrics.retried());
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
    fn a_recent_mean_forgets_what_is_long_past() {
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
