//! What a learner tells of its steps: to the journal, to Prometheus, and to whoever looks on.

use std::time::Duration;

use messages::{DropReason, LabelledPair};
use telemetry::Measurements;

use super::{Learner, Missing, Sampling, due, outlook};
use crate::{LearnerError, PolicySamples, intake};

/// A share of prompts with identical completions beyond which there is little left to learn from.
const COLLAPSED: f64 = 0.9;

/// Pairs of completions that these prompts give: one label each, three where a prompt has three completions.
pub(super) fn labels(prompts: &[LabelledPair]) -> usize {
    prompts.iter().map(|labelled| labelled.labels.len()).sum()
}

impl Learner {
    /// Staleness, waits, throughput and health of a step.
    pub(super) fn flow(
        &mut self,
        pairs: &[LabelledPair],
        step: u64,
        busy: Duration,
    ) -> Measurements {
        let mut m = Measurements::new();
        let staleness: Vec<u64> = pairs
            .iter()
            .map(|labelled| intake::staleness(labelled, step))
            .collect();
        let waited = std::mem::take(&mut self.waited).as_secs_f64();
        let seconds = waited + busy.as_secs_f64();
        let tokens: usize = pairs
            .iter()
            .flat_map(|l| &l.pair.completions)
            .map(|c| c.ids.len())
            .sum();
        m.set(
            "staleness/mean",
            staleness.iter().sum::<u64>() as f64 / pairs.len().max(1) as f64,
        );
        m.set(
            "staleness/max",
            staleness.iter().max().map_or(0.0, |&s| s as f64),
        );
        let dropped = self.counters.snapshot().dropped;
        m.set(
            "staleness/dropped",
            dropped.get(&DropReason::Stale).map_or(0.0, |&n| n as f64),
        );
        m.set("staleness/in_flight", self.feed.outstanding() as f64);
        m.set("policy_version", self.state.version.step as f64);
        m.set("time/step", seconds);
        m.set("time/wait_for_batch", waited);
        m.set("idle_ratio", waited / seconds.max(1e-9));
        m.set(
            "perf/pairs_per_second",
            labels(pairs) as f64 / seconds.max(1e-9),
        );
        m.set("perf/tokens_per_second", tokens as f64 / seconds.max(1e-9));
        if let Some(bytes) = telemetry::peak_memory_bytes() {
            m.set("perf/peak_memory_bytes", bytes as f64);
        }
        m.set("num_tokens", self.state.tokens as f64);
        m.merge(outlook::echoes(&self.settings.objective, pairs));
        outlook::ages(&staleness);
        if let Some(bytes) = telemetry::free_bytes(self.directory.root()) {
            m.set("disk/free_bytes", bytes as f64);
        }
        m.set("health/nonfinite_steps", self.state.nonfinite as f64);
        m.set("health/skipped_steps", self.state.nonfinite as f64);
        m.set("health/rollbacks", self.state.rollbacks as f64);
        m
    }

    /// KL(π ‖ ref) per completion in nats, where the step's samples can estimate it: all are of the current
    /// weights, drawn from the policy alone in its own law, and none but identical ones are missing, of which
    /// the log-ratios came with their notes. `None` where not; the evaluations' `eval/kl` is the estimate then.
    pub(super) fn kl(
        &self,
        pairs: &[LabelledPair],
        samples: PolicySamples,
        missing: Missing,
    ) -> Option<f64> {
        let is_current = self.settings.max_staleness == 0 && self.sampling == Sampling::Exact;
        let completions = pairs.first().map_or(0, |l| l.pair.completions.len());
        missing
            .mean_with(samples, completions)
            .filter(|_| is_current)
    }

    /// The share of the prompts since the last step that were dropped because their completions were the
    /// same. A policy that has collapsed onto one answer takes ever longer to give a pair to learn from.
    pub(super) fn sameness(&mut self, identical: u64, pairs: usize) -> f64 {
        let identical = identical as f64;
        let ratio = identical / (identical + pairs as f64).max(1.0);
        let collapsed = ratio > COLLAPSED;
        if collapsed && !self.collapsed {
            tracing::warn!(
                step = self.state.step,
                "{:.0} % of the prompts were answered with the same tokens each time: the policy has all but \
                 collapsed onto single answers, and pairs to learn from are rare; raise tau or beta, \
                 actor.mixture_coef or actor.temperature, or lower learner.learning_rate",
                100.0 * ratio
            );
        }
        self.collapsed = collapsed;
        ratio
    }

    pub(super) fn report(
        &mut self,
        measurements: &Measurements,
        pairs: &[LabelledPair],
    ) -> Result<(), LearnerError> {
        let step = self.state.step;
        self.journal
            .append(step, self.wall_seconds(), measurements)?;
        telemetry::publish(measurements, &[("role", "learner")]);
        let texts = |prompt: &[u32], ids: &[u32]| self.tokenizer.token_texts(prompt, ids);
        for labelled in pairs.iter().take(self.telemetry.samples_per_step) {
            self.samples.append_with_tokens(step, labelled, &texts)?;
        }
        if due(step, self.telemetry.logging_steps) || step == self.settings.steps {
            let note = outlook::note(measurements, self.state.evaluations.last());
            self.progress.advance_to(step, &note);
        }
        Ok(())
    }
}
