//! Collects policy samples for adversarial preference optimisation (APO).
//!
//! Does not know what the preference service does with the samples.

use tokio::sync::watch;

use crate::{
    error::LearnerError,
    evaluator::EVALUATION_WINDOW,
    pair_source::{Arrival, PairSource},
    publisher::Publisher,
};

/// Schedule of APO rounds: the steps at which the policy's samples of golden prompts are collected for the preference
/// service, which retrains its model on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApoSchedule {
    /// Steps between two rounds.
    pub interval: u64,
    /// Number of rounds; 0: unlimited.
    pub max_rounds: u64,
    /// Number of prompts per round.
    pub prompts: usize,
}

/// Collects the samples of APO rounds.
pub(crate) struct ApoSampler {
    /// `None` without APO.
    schedule: Option<ApoSchedule>,
    /// Step of the last completed round; 0: none.
    last_step: u64,
}

impl ApoSchedule {
    /// Whether a round is due after `step` steps, the last one having been at `last_step`.
    fn is_due(self, step: u64, last_step: u64) -> bool {
        let round = step / self.interval;
        step > last_step
            && round > 0
            && step.is_multiple_of(self.interval)
            && (self.max_rounds == 0 || round <= self.max_rounds)
    }
}

impl ApoSampler {
    /// Continues after the round at `last_step`; 0: none.
    pub(crate) fn new(schedule: Option<ApoSchedule>, last_step: u64) -> Self {
        Self {
            schedule,
            last_step,
        }
    }

    /// Step of the last completed round; 0: none.
    pub(crate) fn last_step(&self) -> u64 {
        self.last_step
    }

    /// Whether a round is due after `step` steps.
    pub(crate) fn is_due(&self, step: u64) -> bool {
        self.schedule
            .is_some_and(|schedule| schedule.is_due(step, self.last_step))
    }

    /// Has the published weights sample the prompts of the round at `step`, until the preference service has as many
    /// as a round needs: a dropped prompt is replaced by the next one. A shutdown leaves the round incomplete.
    ///
    /// # Errors
    /// If samples do not arrive in time, a stream is closed, or an upload of weights fails.
    pub(crate) async fn collect(
        &mut self,
        step: u64,
        source: &mut PairSource,
        publisher: &mut Publisher,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<(), LearnerError> {
        let wanted = self.schedule.map_or(0, |schedule| schedule.prompts);
        let version = publisher.version();
        let (mut sent, mut collected) = (0, 0);
        source.restart_deadline();
        while collected < wanted {
            let window = EVALUATION_WINDOW.min(wanted - collected);
            while source.eval_outstanding() < window {
                tokio::select! {
                    sent = source.send_apo(sent, version) => sent?,
                    _ = shutdown.wait_for(|requested| *requested) => return Ok(()),
                }
                sent += 1;
            }
            match source.next("APO samples", publisher, shutdown).await? {
                Arrival::ApoSample => collected += 1,
                Arrival::Evaluation(_) | Arrival::Handled => {}
                Arrival::Shutdown => return Ok(()),
            }
        }
        self.last_step = step;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_due_once_at_its_step() {
        let due = |max_rounds| {
            let schedule = ApoSchedule {
                interval: 5,
                max_rounds,
                prompts: 1,
            };
            let mut last_step = 0;
            let mut steps = Vec::new();
            for step in [0, 1, 5, 5, 6, 10, 14, 15, 20] {
                if schedule.is_due(step, last_step) {
                    steps.push(step);
                    last_step = step;
                }
            }
            steps
        };
        assert_eq!((due(0), due(2)), (vec![5, 10, 15, 20], vec![5, 10]));
    }
}
