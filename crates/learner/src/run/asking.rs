//! What a learner asks its policy beside training: held-out prompts, and prompts of the adversarial game.

use tokio::sync::watch;

use super::{Arrival, EVALUATION_WINDOW, Learner};
use crate::{LearnerError, evaluation::Tally};

impl Learner {
    /// Compares the policy with its reference on held-out prompts, through the same actors and judge.
    pub(super) async fn evaluate(
        &mut self,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<(), LearnerError> {
        self.publish().await?;
        let (version, prompts) = (self.state.version, self.evaluation.prompts as u64);
        let mut sent = 0;
        while sent < prompts || self.feed.asking() > 0 {
            while sent < prompts && self.feed.asking() < EVALUATION_WINDOW {
                self.feed.send_held_out(sent, version).await?;
                sent += 1;
            }
            if let Arrival::Shutdown = self.arrival("evaluation pairs", shutdown).await? {
                self.tally = Tally::default();
                return Ok(());
            }
        }
        let tally = std::mem::take(&mut self.tally);
        if let Some(evaluation) = tally.finish(self.state.step, self.evaluation.show) {
            let measurements = evaluation.measurements();
            self.journal
                .append(self.state.step, self.wall_seconds(), &measurements)?;
            telemetry::publish(&measurements, &[("role", "learner")]);
            tracing::info!(
                step = evaluation.step,
                win_rate = format!("{:.3}", evaluation.win_rate.mean),
                kl = format!("{:.3}", evaluation.kl),
                length = format!("{:.1}", evaluation.response_length),
                "evaluated"
            );
            self.state.evaluations.push(evaluation);
        }
        Ok(())
    }

    /// Has the policy answer prompts for a round of the adversarial game, where one is due, until the
    /// preference service has given back as many as a round has. A prompt that an actor gave up is
    /// replaced by the next one.
    pub(super) async fn play(
        &mut self,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<(), LearnerError> {
        let step = self.state.step;
        let Some(rounds) = self
            .rounds
            .filter(|rounds| rounds.due(step, self.state.played))
        else {
            return Ok(());
        };
        self.publish().await?;
        let (version, wanted) = (self.state.version, rounds.prompts);
        let mut sent = 0;
        self.contested = 0;
        while self.contested < wanted {
            while self.feed.asking() < EVALUATION_WINDOW.min(wanted - self.contested) {
                self.feed.send_contest(sent, version).await?;
                sent += 1;
            }
            if let Arrival::Shutdown = self.arrival("a round of the game", shutdown).await? {
                return Ok(());
            }
        }
        self.state.played = step;
        Ok(())
    }
}
