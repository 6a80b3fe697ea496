//! Check of received pairs against the limits of the run.
//!
//! Promises that no judge sees a pair that does not fit the run. Does not know what a judge does with a pair.

use messages::{InvalidMessage, MessageLimits, Pair, WeightsVersion};
use model::PublishedWeights;
use transport::{Delivery, WeightStore};

use crate::labelling::DropCause;

/// Checks received pairs.
pub(super) struct PairCheck {
    pub(super) limits: MessageLimits,
    /// Announces the weights that completions may be of.
    pub(super) weight_store: WeightStore<PublishedWeights>,
}

impl PairCheck {
    /// Reason why a received pair is not judged: it exceeds its delivery limit, or is invalid. `None` if it is judged.
    pub(super) async fn rejection(&mut self, delivery: &Delivery<Pair>) -> Option<DropCause> {
        if delivery.exceeds_delivery_limit() {
            return Some(DropCause::exhausted(delivery.deliveries()));
        }
        let pair = delivery.message();
        let invalid = self.check(pair).await.err()?;
        let (prompt, actor) = (pair.id().0, &pair.actor);
        tracing::warn!(prompt, ?actor, detail = %invalid, "an invalid pair was rejected");
        Some(DropCause::invalid(&invalid))
    }

    /// Checks a pair. One of weights that are not announced, as far as this process knows, is checked again after a
    /// look at the weight store.
    async fn check(&mut self, pair: &Pair) -> Result<(), InvalidMessage> {
        self.limits.newest = self.newest();
        match pair.check(&self.limits) {
            Err(InvalidMessage::Unannounced { .. }) => {}
            checked => return checked,
        }
        if let Err(error) = self.weight_store.refresh().await {
            tracing::warn!(%error, "the announcement of weights could not be read");
        }
        self.limits.newest = self.newest();
        pair.check(&self.limits)
    }

    fn newest(&self) -> WeightsVersion {
        let newest = self.weight_store.latest();
        newest.unwrap_or(WeightsVersion::REFERENCE)
    }
}
