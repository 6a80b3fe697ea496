//! What an actor tells of itself.

use std::time::Instant;

use messages::Completion;
use telemetry::Measurements;

/// Counts tokens between two readings.
pub(crate) struct Throughput {
    actor: String,
    since: Instant,
    tokens: usize,
    pairs: usize,
}

/// Pairs between two readings.
const READ_EVERY: usize = 32;

impl Throughput {
    pub(crate) fn new(actor: &str) -> Self {
        Self {
            actor: actor.to_owned(),
            since: Instant::now(),
            tokens: 0,
            pairs: 0,
        }
    }

    /// Tells how far coarse numbers lead.
    pub(crate) fn drifted(&self, nats: f64) {
        let mut measurements = Measurements::new();
        measurements.set("actor/drift", nats);
        telemetry::publish(&measurements, &[("role", "actor"), ("actor", &self.actor)]);
    }

    /// Counts a pair, and publishes once in a while.
    pub(crate) fn wrote(&mut self, completions: &[Completion], in_flight: usize) {
        self.tokens += completions
            .iter()
            .map(|completion| completion.ids.len())
            .sum::<usize>();
        self.pairs += 1;
        if self.pairs < READ_EVERY {
            return;
        }
        let seconds = self.since.elapsed().as_secs_f64().max(1e-9);
        let mut measurements = Measurements::new();
        measurements.set("actor/gen_throughput", self.tokens as f64 / seconds);
        measurements.set("actor/generate_seconds", seconds / self.pairs as f64);
        measurements.set("actor/in_flight", in_flight as f64);
        telemetry::publish(&measurements, &[("role", "actor"), ("actor", &self.actor)]);
        (self.since, self.tokens, self.pairs) = (Instant::now(), 0, 0);
    }
}
