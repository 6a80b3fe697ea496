//! APO as the preference service runs it: receipts of samples, and replicas of the trained models.

use messages::Pair;
use model::RewardModel;
use transport::Receipt;

use crate::apo::{Apo, RoundOutcome};
use crate::error::PreferenceError;
use crate::pool::JudgeReplicas;

/// Builds judge replicas of the model of a round; the second argument is the round's number.
pub type ReplicaFactory =
    Box<dyn Fn(RewardModel, u64) -> Result<JudgeReplicas, PreferenceError> + Send + Sync>;

/// Runs APO rounds and holds the receipts of their samples until the round's model is written: if the service dies
/// before, the samples are delivered to its successor, which repeats the round.
pub struct ApoRunner {
    apo: Apo,
    replicas: ReplicaFactory,
    /// Receipts of the round that is being collected.
    collecting: Vec<Receipt>,
    /// Receipts of the round that is being trained.
    training: Vec<Receipt>,
}

impl ApoRunner {
    /// A runner before the next round of `apo`; `replicas` builds judges of its models.
    #[must_use]
    pub fn new(apo: Apo, replicas: ReplicaFactory) -> Self {
        Self {
            apo,
            replicas,
            collecting: Vec::new(),
            training: Vec::new(),
        }
    }

    /// Adds the policy's samples of one prompt; the last of a round start its training.
    ///
    /// # Errors
    /// When the training thread cannot be started.
    pub(crate) fn collect_samples(
        &mut self,
        pair: &Pair,
        receipt: Receipt,
    ) -> Result<(), PreferenceError> {
        let round_complete = self.apo.collect_samples(pair)?;
        self.collecting.push(receipt);
        if round_complete {
            self.training.append(&mut self.collecting);
        }
        Ok(())
    }

    /// Whether labelling must wait for the model in training.
    pub(crate) fn blocks_labelling(&self) -> bool {
        self.apo.is_training() && self.apo.waits_for_training()
    }

    /// Acknowledges the samples of the round whose training has ended.
    pub(crate) fn acknowledge_samples(&mut self) {
        for receipt in self.training.drain(..) {
            receipt.acknowledge();
        }
    }
}

/// Waits for the end of the round in training and returns replicas of its model, `None` if the model was rejected.
/// Pending forever without APO or without a round in training. Cancel-safe.
///
/// # Errors
/// When training failed or the replicas cannot be built.
pub(crate) async fn next_model(
    runner: &mut Option<ApoRunner>,
) -> Result<Option<JudgeReplicas>, PreferenceError> {
    let Some(runner) = runner else {
        return std::future::pending().await;
    };
    let RoundOutcome { report, model } = runner.apo.outcome().await?;
    model
        .map(|model| (runner.replicas)(model, report.round))
        .transpose()
}
