//! What a learner asks its policy beside training: held-out prompts, and prompts of the adversarial game.

use tokio::sync::watch;

use super::{Arrival, EVALUATION_WINDOW, Learner};
use crate::{
    Evaluation, LearnerError,
    evaluation::{Asked, Tally},
};

/// How an evaluation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Evaluated {
    /// Every prompt came back.
    Completed,
    /// The run is to stop; what came back so far is discarded.
    Interrupted,
}

impl Learner {
    /// Compares the policy with its reference on held-out prompts, through the same actors and judge.
    /// Every distinct prompt is asked once.
    pub(super) async fn evaluate(
        &mut self,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Evaluated, LearnerError> {
        self.publish().await?;
        let (version, prompts) = (self.state.version, self.evaluation_prompts() as u64);
        let mut sent = 0;
        self.patience.renew();
        while sent < prompts || self.feed.asking() > 0 {
            while sent < prompts && self.feed.asking() < EVALUATION_WINDOW {
                self.feed.send_held_out(sent, version).await?;
                sent += 1;
            }
            if let Arrival::Shutdown = self.arrival("evaluation pairs", shutdown).await? {
                self.tally = Tally::default();
                return Ok(Evaluated::Interrupted);
            }
            // Every prompt is asked once: one that is dropped is an answer too.
            self.patience.go_on();
        }
        let tally = std::mem::take(&mut self.tally);
        let asked = Asked {
            step: self.state.step,
            prompts: sent as usize,
            conditions: self.conditions.clone(),
        };
        match tally.finish(asked, self.evaluation.show) {
            Some(evaluation) => self.record(evaluation)?,
            None => tracing::warn!(
                step = self.state.step,
                "an evaluation without a single verdict measures nothing{}",
                self.patience
            ),
        }
        Ok(Evaluated::Completed)
    }

    /// Number of prompts of an evaluation: as many as the settings want, of distinct ones no more than
    /// there are.
    fn evaluation_prompts(&self) -> usize {
        let wanted = self.evaluation.prompts;
        let Some(distinct) = self.feed.held_out_count().filter(|&count| count < wanted) else {
            return wanted;
        };
        if self.state.evaluations.is_empty() {
            tracing::warn!(
                "evaluation.prompts = {wanted}, but there are {distinct} distinct held-out prompts: each is \
                 asked once (prompts.held_out and prompts.held_out_path give more)"
            );
        }
        distinct
    }

    /// Writes an evaluation into the journal, the metrics and the log.
    fn record(&mut self, evaluation: Evaluation) -> Result<(), LearnerError> {
        let measurements = evaluation.measurements();
        let conditions = serde_json::json!(evaluation.conditions);
        let (step, seconds) = (self.state.step, self.wall_seconds());
        self.journal
            .append_evaluation(step, seconds, &measurements, conditions)?;
        telemetry::publish(&measurements, &[("role", "learner")]);
        tracing::info!(
            step = evaluation.step,
            win_rate = format!("{:.3}", evaluation.win_rate.mean),
            prompts = evaluation.prompts,
            unjudged = evaluation.unjudged,
            kl = format!("{:.3}", evaluation.kl),
            length = format!("{:.1}", evaluation.response_length),
            "evaluated"
        );
        self.state.evaluations.push(evaluation);
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
        self.patience.renew();
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
