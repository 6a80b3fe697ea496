//! Metrics of an actor.

use std::time::Instant;

use messages::Completion;
use telemetry::Measurements;

/// Number of pairs between two publications of the throughput.
const PAIRS_PER_REPORT: usize = 32;

/// Generation throughput since the last publication.
pub(crate) struct Throughput {
    actor: String,
    since: Instant,
    tokens: usize,
    pairs: usize,
}

impl Throughput {
    pub(crate) fn new(actor: &str) -> Self {
        Self {
            actor: actor.to_owned(),
            since: Instant::now(),
            tokens: 0,
            pairs: 0,
        }
    }

    /// Publishes the quantisation error, in nats per token.
    pub(crate) fn publish_quantization_error(&self, nats: f64) {
        let mut measurements = Measurements::new();
        measurements.set("actor/quantization_error", nats);
        telemetry::publish(&measurements, &[("role", "actor"), ("actor", &self.actor)]);
    }

    /// Counts a sampled pair; publishes every [`PAIRS_PER_REPORT`] pairs.
    pub(crate) fn count(&mut self, completions: &[Completion], in_progress: usize) {
        self.tokens += completions
            .iter()
            .map(|completion| completion.ids.len())
            .sum::<usize>();
        self.pairs += 1;
        if self.pairs < PAIRS_PER_REPORT {
            return;
        }
        let seconds = self.since.elapsed().as_secs_f64().max(1e-9);
        let mut measurements = Measurements::new();
        measurements.set("actor/gen_throughput", self.tokens as f64 / seconds);
        measurements.set("actor/generate_seconds", seconds / self.pairs as f64);
        measurements.set("actor/in_flight", in_progress as f64);
        telemetry::publish(&measurements, &[("role", "actor"), ("actor", &self.actor)]);
        (self.since, self.tokens, self.pairs) = (Instant::now(), 0, 0);
    }
}
