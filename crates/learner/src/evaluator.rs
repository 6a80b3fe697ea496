//! Evaluates the policy against its reference on held-out prompts, through the same actors and judge as training.
//!
//! Promises that every distinct prompt is sent once for each comparison. Does not know when to evaluate.

use std::ops::ControlFlow;

use messages::Purpose;
use settings::EvaluationSettings;
use tokio::sync::watch;

use crate::{
    error::LearnerError,
    evaluation::{
        Evaluation, EvaluationConditions, EvaluationTally, EvaluationTarget, FurtherComparison,
    },
    pair_source::{Arrival, PairSource},
    publisher::Publisher,
};

/// Largest number of held-out prompts outstanding at once.
pub const EVALUATION_WINDOW: usize = 128;

/// Evaluations of a run.
pub(crate) struct Evaluator {
    settings: EvaluationSettings,
    /// Recorded with every evaluation.
    conditions: EvaluationConditions,
    /// Evaluations so far, oldest first.
    history: Vec<Evaluation>,
}

/// Outcome of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evaluated {
    /// All prompts came back; the evaluation is the last of the history.
    Completed,
    /// All prompts came back without a verdict: there is no evaluation.
    Unjudged,
    /// A shutdown was requested; what came back was discarded.
    Interrupted,
}

impl Evaluator {
    /// Continues a history of evaluations.
    pub(crate) fn new(
        settings: EvaluationSettings,
        conditions: EvaluationConditions,
        history: Vec<Evaluation>,
    ) -> Self {
        Self {
            settings,
            conditions,
            history,
        }
    }

    /// Steps between two evaluations; 0: only at the end of the run, if at all.
    pub(crate) fn interval(&self) -> u64 {
        match self.is_off() {
            true => 0,
            false => self.settings.eval_steps,
        }
    }

    /// Whether there are no evaluations, not even at the end of the run.
    pub(crate) fn is_off(&self) -> bool {
        self.settings.prompts == 0
    }

    /// Whether the weights of `step` were evaluated.
    pub(crate) fn has_evaluated(&self, step: u64) -> bool {
        self.history.last().is_some_and(|last| last.step == step)
    }

    /// Evaluations so far, oldest first.
    pub(crate) fn history(&self) -> &[Evaluation] {
        &self.history
    }

    /// Evaluations, oldest first.
    pub(crate) fn into_history(self) -> Vec<Evaluation> {
        self.history
    }

    /// Evaluates the published weights: the policy against the reference of the start; and with the same prompts the
    /// moving average against it, and the policy against the reference of the last step's pairs, where they were published.
    ///
    /// # Errors
    /// If prompts do not come back in time, a stream is closed, or an upload of weights fails.
    pub(crate) async fn run(
        &mut self,
        source: &mut PairSource,
        publisher: &mut Publisher,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Evaluated, LearnerError> {
        let content = publisher.content();
        let compared = self.compare(Purpose::Evaluate, source, publisher, shutdown);
        let mut evaluation = match compared.await? {
            ControlFlow::Continue(evaluation) => evaluation,
            ControlFlow::Break(evaluated) => return Ok(evaluated),
        };
        evaluation.reference_version = content.evaluated_reference;
        for (purpose, is_published) in [
            (Purpose::EvaluateAverage, content.has_average),
            (
                Purpose::EvaluateReference,
                content.evaluated_reference.is_some(),
            ),
        ] {
            if !is_published {
                continue;
            }
            let compared = self.compare(purpose, source, publisher, shutdown);
            let comparison = match compared.await? {
                ControlFlow::Continue(comparison) => Some(FurtherComparison::from(comparison)),
                ControlFlow::Break(Evaluated::Interrupted) => return Ok(Evaluated::Interrupted),
                ControlFlow::Break(_) => None,
            };
            match purpose {
                Purpose::EvaluateAverage => evaluation.average = comparison,
                _ => evaluation.current_reference = comparison,
            }
        }
        self.history.push(evaluation);
        Ok(Evaluated::Completed)
    }

    /// One comparison of an evaluation on all its prompts; breaks without a result.
    async fn compare(
        &self,
        purpose: Purpose,
        source: &mut PairSource,
        publisher: &mut Publisher,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<ControlFlow<Evaluated, Evaluation>, LearnerError> {
        let (version, prompts) = (publisher.version(), self.prompt_count(source) as u64);
        let (mut sent, mut tally) = (0, EvaluationTally::default());
        let interrupted = ControlFlow::Break(Evaluated::Interrupted);
        source.restart_deadline();
        while sent < prompts || source.eval_outstanding() > 0 {
            while sent < prompts && source.eval_outstanding() < EVALUATION_WINDOW {
                tokio::select! {
                    sent = source.send_held_out(sent, purpose, version) => sent?,
                    _ = shutdown.wait_for(|requested| *requested) => return Ok(interrupted),
                }
                sent += 1;
            }
            match source.next("evaluation pairs", publisher, shutdown).await? {
                Arrival::Evaluation(labelled) => tally.add(*labelled),
                Arrival::ApoSample | Arrival::Handled => {}
                Arrival::Shutdown => return Ok(interrupted),
            }
        }
        let target = EvaluationTarget {
            step: version.step,
            prompts: sent as usize,
            conditions: self.conditions.clone(),
            judges: self.settings.judge.keys().cloned().collect(),
        };
        let Some(evaluation) = tally.finish(target, self.settings.show) else {
            tracing::warn!(
                step = version.step,
                "an evaluation without a single verdict measures nothing{}",
                source.dropped()
            );
            return Ok(ControlFlow::Break(Evaluated::Unjudged));
        };
        Ok(ControlFlow::Continue(evaluation))
    }

    /// Number of prompts of an evaluation: that of the settings, but no more than there are distinct ones.
    fn prompt_count(&self, source: &PairSource) -> usize {
        let wanted = self.settings.prompts;
        let distinct = source.held_out_count();
        let Some(distinct) = distinct.filter(|&count| count < wanted) else {
            return wanted;
        };
        if self.history.is_empty() {
            tracing::warn!(
                "evaluation.prompts = {wanted}, but there are {distinct} distinct held-out prompts: each is \
                 evaluated once (prompts.held_out and prompts.held_out_path give more)"
            );
        }
        distinct
    }
}
