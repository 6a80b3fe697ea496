//! The streams and the weight store that connect the roles of a run.

use learner::EVALUATION_WINDOW;
use messages::wire::WireMessage;
use messages::{Dropped, LabelledPair, Pair, Prompt};
use model::PublishedWeights;
use settings::{PairLabelSource, Settings};
use transport::{Receiver, Sender, StreamCounts, Transport, TransportError, WeightStore};

/// Names of a run's streams, in the order of the data flow.
pub(crate) const STREAM_NAMES: [&str; 4] =
    ["prompts", "pairs", "labelled pairs", "dropped prompts"];

/// All streams of a run.
#[derive(Clone)]
pub(crate) struct RunStreams {
    capacity: usize,
    pub(crate) prompts: StreamEnds<Prompt>,
    pub(crate) pairs: StreamEnds<Pair>,
    pub(crate) labelled: StreamEnds<LabelledPair>,
    pub(crate) drops: StreamEnds<Dropped>,
    pub(crate) weight_store: WeightStore<PublishedWeights>,
}

/// Both ends of a stream.
pub(crate) struct StreamEnds<T> {
    pub(crate) sender: Sender<T>,
    pub(crate) receiver: Receiver<T>,
}

impl<T> Clone for StreamEnds<T> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            receiver: self.receiver.clone(),
        }
    }
}

impl<T: WireMessage + Clone + Send + Sync + 'static> StreamEnds<T> {
    async fn open(
        transport: &Transport,
        name: &'static str,
        capacity: usize,
    ) -> Result<Self, TransportError> {
        let (sender, receiver) = transport.stream(name, capacity).await?;
        Ok(Self { sender, receiver })
    }

    async fn counts(&self) -> Result<(&'static str, StreamCounts), TransportError> {
        Ok((self.sender.name(), self.sender.counts().await?))
    }
}

impl RunStreams {
    /// Opens the streams of this run; creates those that do not exist.
    pub(crate) async fn open(
        transport: &Transport,
        settings: &Settings,
    ) -> Result<Self, TransportError> {
        let window = settings.learner.prompt_window();
        // Room for every credit, so that a full stream indicates a defect, and for the messages of an abandoned
        // session. The samples of an APO round stay in their stream until its model is trained.
        let apo = &settings.preference.apo;
        let round = if apo.refresh_steps > 0 {
            apo.prompts
        } else {
            0
        };
        // Pairs from files are with the judge for two steps at once.
        let from_files = match settings.pairs.label {
            PairLabelSource::Judge if settings.pairs.is_used() => {
                2 * settings.learner.train_batch_size
            }
            PairLabelSource::Judge | PairLabelSource::File => 0,
        };
        let capacity = 2 * (window + EVALUATION_WINDOW + round + from_files);
        let [prompts, pairs, labelled, drops] = STREAM_NAMES;
        Ok(Self {
            capacity,
            prompts: StreamEnds::open(transport, prompts, capacity).await?,
            pairs: StreamEnds::open(transport, pairs, capacity).await?,
            labelled: StreamEnds::open(transport, labelled, capacity).await?,
            drops: StreamEnds::open(transport, drops, capacity).await?,
            weight_store: transport.weight_store().await?,
        })
    }

    /// Capacity of each stream in messages.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Redelivers orphaned messages, see [`Receiver::reclaim`].
    pub(crate) async fn reclaim(&self) -> Result<(), TransportError> {
        self.prompts.receiver.reclaim().await?;
        self.pairs.receiver.reclaim().await?;
        self.labelled.receiver.reclaim().await?;
        self.drops.receiver.reclaim().await?;
        Ok(())
    }

    /// Name and counters of each stream, in the order of the data flow.
    pub(crate) async fn counts(&self) -> Result<Vec<(&'static str, StreamCounts)>, TransportError> {
        Ok(vec![
            self.prompts.counts().await?,
            self.pairs.counts().await?,
            self.labelled.counts().await?,
            self.drops.counts().await?,
        ])
    }
}
