//! Queue of pairs that are being labelled.
//!
//! Promises: pairs leave in the order in which they arrived, however their judges finish.
//! Does not know where pairs come from and where their labels go.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use messages::Pair;
use transport::{Delivery, Receipt};

use crate::error::ComparisonError;
use crate::labelling::{DropCause, Labeller, PairLabels};
use crate::pool::PoolSettings;

/// Received pairs that are not acknowledged, oldest first, with the futures of their labels.
pub(super) struct InFlightQueue {
    labeller: Arc<Labeller>,
    pairs: VecDeque<InFlightPair>,
    /// One future for each of `pairs`, in the same order.
    labels: FuturesOrdered<BoxFuture<'static, Result<PairLabels, ComparisonError>>>,
    /// Sum of `comparisons` over `pairs`.
    comparisons: usize,
    max_comparisons: usize,
    max_prefetch: usize,
}

/// A received pair that is not acknowledged.
pub(super) struct InFlightPair {
    pub(super) pair: Arc<Pair>,
    pub(super) receipt: Receipt,
    pub(super) received_at: Instant,
    /// Comparisons that it needs at most.
    comparisons: usize,
}

impl InFlightQueue {
    pub(super) fn new(labeller: Arc<Labeller>, settings: &PoolSettings) -> Self {
        Self {
            labeller,
            pairs: VecDeque::new(),
            labels: FuturesOrdered::new(),
            comparisons: 0,
            max_comparisons: settings.max_queue.max(1),
            // One batch while another is judged; further pairs are left to other services.
            max_prefetch: 2 * settings.max_batch,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.pairs.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Whether another pair may be received. A pair may exceed the limit by its own comparisons.
    pub(super) fn has_room(&self) -> bool {
        self.comparisons < self.max_comparisons
    }

    /// Number of pairs worth prefetching.
    pub(super) fn prefetch(&self) -> usize {
        let room = self.max_comparisons.saturating_sub(self.comparisons);
        room.min(self.max_prefetch)
    }

    /// Starts labelling a pair. One that is `rejected`, for this cause, is not judged: its labels are the drop cause.
    pub(super) fn push(&mut self, delivery: Delivery<Pair>, rejected: Option<DropCause>) {
        let (pair, receipt) = delivery.take();
        let pair = Arc::new(pair);
        let comparisons = match rejected {
            Some(_) => 0,
            None => self.labeller.comparisons(&pair),
        };
        let (labeller, labelled) = (Arc::clone(&self.labeller), Arc::clone(&pair));
        self.labels.push_back(Box::pin(async move {
            match rejected {
                Some(cause) => Ok(labeller.unlabelled(cause)),
                None => labeller.label(labelled).await,
            }
        }));
        self.comparisons += comparisons;
        self.pairs.push_back(InFlightPair {
            pair,
            receipt,
            received_at: Instant::now(),
            comparisons,
        });
    }

    /// Waits for the labels of the oldest pair and removes it; `None` when the queue is empty. Cancel-safe.
    ///
    /// The inner error means that no replica of the judge is left.
    pub(super) async fn next(
        &mut self,
    ) -> Option<(InFlightPair, Result<PairLabels, ComparisonError>)> {
        let labels = self.labels.next().await?;
        let pair = (self.pairs.pop_front()).expect("every future of labels has a pair");
        self.comparisons -= pair.comparisons;
        Some((pair, labels))
    }
}
