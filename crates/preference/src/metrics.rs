//! What the service measures of its judge. Shares are over recent labels, so that they follow the
//! policy as it changes.

use std::time::Duration;

use telemetry::{Measurements, publish};

use crate::panel::Judgement;

/// Once a mean is over more than this, half of its past is forgotten.
const WINDOW: f64 = 1000.0;

/// The `judge/…` metrics of one judge, labelled with its name.
pub(crate) struct JudgeMetrics {
    judge: String,
    batch_size: RecentMean,
    tie_rate: RecentMean,
    order_inconsistency: RecentMean,
}

/// A mean that forgets: over the last `WINDOW / 2` to `WINDOW` values, as far as there are so many.
#[derive(Default)]
struct RecentMean {
    sum: f64,
    count: f64,
}

impl JudgeMetrics {
    pub(crate) fn new(judge: &str) -> Self {
        Self {
            judge: judge.to_owned(),
            batch_size: RecentMean::default(),
            tie_rate: RecentMean::default(),
            order_inconsistency: RecentMean::default(),
        }
    }

    /// Takes in and publishes what was seen of one batch: what became of its pairs, and how long each
    /// has been with the service. A share of nothing is not published.
    pub(crate) fn batch(&mut self, judgements: &[Judgement], latencies: &[Duration]) {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a batch has less than 2^53 pairs"
        )]
        self.batch_size.add(latencies.len() as f64);
        for judgement in judgements {
            for label in judgement.labels.iter().flatten() {
                self.tie_rate.add(f64::from(u8::from(label.p.get() == 0.5)));
            }
            for &changed in &judgement.order_changes {
                self.order_inconsistency.add(f64::from(u8::from(changed)));
            }
        }
        let shares = [
            ("judge/batch_size", &self.batch_size),
            ("judge/tie_rate", &self.tie_rate),
            ("judge/order_inconsistency", &self.order_inconsistency),
        ];
        let known = shares
            .iter()
            .filter_map(|(name, mean)| Some((*name, mean.get()?)));
        self.publish(&known.collect());
        for latency in latencies {
            let seconds = ("judge/latency_seconds", latency.as_secs_f64());
            self.publish(&[seconds].into_iter().collect());
        }
    }

    fn publish(&self, measurements: &Measurements) {
        let labels = [("role", "preference"), ("judge", self.judge.as_str())];
        publish(measurements, &labels);
    }
}

impl RecentMean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1.0;
        if self.count > WINDOW {
            self.sum /= 2.0;
            self.count /= 2.0;
        }
    }

    fn get(&self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }
}

#[cfg(test)]
mod tests {
    use messages::{Label, Probability};
    use telemetry::Exporter;

    use super::*;

    fn judgement(ps: &[f32], order_changes: &[bool]) -> Judgement {
        let label = |&p| Label {
            first: 0,
            second: 1,
            p: Probability::new(p).unwrap(),
        };
        Judgement {
            labels: Ok(ps.iter().map(label).collect()),
            gold: None,
            order_changes: order_changes.to_vec(),
        }
    }

    #[test]
    fn what_was_seen_of_a_judge_is_published_under_its_name() {
        let recording = Exporter::recorder_only();
        let mut metrics = JudgeMetrics::new("rule");
        recording.during(|| {
            let first = [judgement(&[0.5, 0.25], &[]), judgement(&[1.0], &[])];
            metrics.batch(
                &first,
                &[Duration::from_millis(200), Duration::from_secs(2)],
            );
        });
        let page = recording.render();
        assert!(
            !page.contains("judge_order_inconsistency{"),
            "of nothing in\n{page}"
        );
        recording.during(|| {
            metrics.batch(
                &[judgement(&[0.5], &[true, false, false, false])],
                &[Duration::ZERO; 4],
            );
        });
        let page = recording.render();
        let labels = "role=\"preference\",judge=\"rule\"";
        for line in [
            format!("agon_judge_batch_size{{{labels}}} 3"),
            format!("agon_judge_tie_rate{{{labels}}} 0.5"),
            format!("agon_judge_order_inconsistency{{{labels}}} 0.25"),
            format!("agon_judge_latency_seconds_sum{{{labels}}} 2.2"),
            format!("agon_judge_latency_seconds_count{{{labels}}} 6"),
        ] {
            assert!(
                page.lines().any(|l| l == line),
                "no line {line:?} in\n{page}"
            );
        }
    }

    #[test]
    fn a_recent_mean_forgets_what_is_long_past() {
        let mut mean = RecentMean::default();
        assert_eq!(mean.get(), None);
        (0..500).for_each(|_| mean.add(1.0));
        assert_eq!(mean.get(), Some(1.0));
        (0..500).for_each(|_| mean.add(0.0));
        assert_eq!(mean.get(), Some(0.5), "all of the window");
        (0..5000).for_each(|_| mean.add(0.0));
        assert!(mean.get().is_some_and(|m| m < 0.01), "{:?}", mean.get());
    }
}
