//! Sender and receiver of a JetStream work queue: bounded, and a message is removed when it is acknowledged.
//!
//! A message is stored once however often it is sent, since the server deduplicates by its id. A full stream rejects
//! messages, and senders retry. A message that cannot be decoded, exceeded the delivery limit, or was rejected by
//! its receiver is copied to the run's dead-letter stream for inspection.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, PullConsumer};
use async_nats::jetstream::context::PublishError;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, State};
use bytes::Bytes;
use futures_util::StreamExt;
use messages::wire::{self, WireMessage};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout_at};

use crate::nats::lease_keeper::Lease;
use crate::nats::names::{CONSUMER, DEAD_LETTERS};
use crate::nats::{Connection, RETRY_DELAY, one_line, requirements};
use crate::{
    delivery::Delivery,
    error::TransportError,
    stream::{StreamCounts, StreamLimits},
};

/// Expiry of a pull request, after which it is made again.
const PULL_EXPIRY: Duration = Duration::from_secs(5);

/// Time after the expiry of a pull request in which the server says that it has expired. Shorter than the client
/// library's own, after which a server that does not answer would look like an empty stream.
const PULL_GRACE: Duration = Duration::from_secs(3);

/// Maximum delay before a send to a full stream is retried.
const MAX_SEND_DELAY: Duration = Duration::from_millis(100);

/// Time in which the server deduplicates messages. Later duplicates are recognised by consumers, by message id.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(600);

/// Capacity of the dead-letter stream; the oldest message is discarded first.
const MAX_DEAD_LETTERS: i64 = 1000;

/// Names and limits of a stream on the server.
#[derive(Debug, Clone)]
pub(crate) struct StreamLocation {
    connection: Arc<Connection>,
    name: &'static str,
    limits: StreamLimits,
    stream: String,
    subject: String,
}

#[derive(Debug)]
pub(crate) struct Upstream {
    location: StreamLocation,
}

#[derive(Debug)]
pub(crate) struct Downstream<T> {
    location: StreamLocation,
    fetched: flume::Receiver<Result<Delivery<T>, TransportError>>,
    demand: Arc<Demand>,
    fetch_loop: AbortHandle,
    /// Sequence number of the first orphaned message found last time; 0 for none.
    orphaned: AtomicU64,
}

/// Demand of the receivers, served by the fetch loop.
#[derive(Debug)]
struct Demand {
    raised: Notify,
    /// Waiting receivers less fetched messages. A single counter, so that no message is fetched, and kept from other
    /// processes, for a receiver that has already been served.
    unmet: AtomicI64,
    batch_size: AtomicUsize,
}

impl Demand {
    fn increment(&self) {
        if self.unmet.fetch_add(1, Ordering::AcqRel) >= 0 {
            self.raised.notify_one();
        }
    }

    fn decrement(&self) {
        self.unmet.fetch_sub(1, Ordering::AcqRel);
    }

    /// Waits until there are more waiting receivers than fetched messages.
    async fn wait(&self) {
        while self.unmet.load(Ordering::Acquire) <= 0 {
            self.raised.notified().await;
        }
    }
}

/// Creates the run's dead-letter stream if it does not exist.
pub(crate) async fn create_dead_letter_stream(
    connection: &Connection,
) -> Result<(), TransportError> {
    let config = Config {
        name: connection.names.stream(DEAD_LETTERS),
        subjects: vec![connection.names.dead_letters_of("*")],
        max_messages: MAX_DEAD_LETTERS,
        ..base_config(connection)
    };
    create(connection, &config).await
}

/// Configuration common to all streams of a run.
fn base_config(connection: &Connection) -> Config {
    Config {
        duplicate_window: DUPLICATE_WINDOW,
        num_replicas: connection.settings.replicas,
        ..Config::default()
    }
}

async fn create(connection: &Connection, config: &Config) -> Result<(), TransportError> {
    let request = || connection.context.create_or_update_stream(config.clone());
    connection.retry("create a stream", request).await?;
    Ok(())
}

impl StreamLocation {
    /// The stream named `name`, which the leader creates if it does not exist.
    pub(crate) async fn open(
        connection: &Arc<Connection>,
        name: &'static str,
        limits: StreamLimits,
    ) -> Result<Self, TransportError> {
        let location = Self {
            connection: Arc::clone(connection),
            name,
            limits,
            stream: connection.names.stream(name),
            subject: connection.names.subject(name),
        };
        if !connection.leads {
            return Ok(location);
        }
        let config = Config {
            name: location.stream.clone(),
            subjects: vec![location.subject.clone(), format!("{}.*", location.subject)],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_messages: i64::try_from(limits.capacity.get()).unwrap_or(i64::MAX),
            ..base_config(connection)
        };
        create(connection, &config).await?;
        Ok(location)
    }

    /// The stream's consumer, which the leader creates if it does not exist.
    async fn consumer(&self) -> Result<PullConsumer, TransportError> {
        let context = &self.connection.context;
        if !self.connection.leads {
            let find = || context.get_consumer_from_stream(CONSUMER, &self.stream);
            let found = self.connection.retry("open a stream", find);
            return found.await;
        }
        let config = consumer::pull::Config {
            durable_name: Some(CONSUMER.into()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: self.connection.lease(),
            max_ack_pending: -1,
            max_deliver: -1,
            ..consumer::pull::Config::default()
        };
        let create = || context.create_consumer_on_stream(config.clone(), &self.stream);
        self.connection
            .retry("create the consumer of a stream", create)
            .await
    }

    /// State of the stream and of its consumer.
    async fn info(&self) -> Result<(State, consumer::Info), TransportError> {
        let context = &self.connection.context;
        let request = || context.get_stream(&self.stream);
        let stream = self.connection.retry("inspect a stream", request).await?;
        let request = || stream.consumer_info(CONSUMER);
        let consumer = self.connection.retry("inspect a stream", request).await?;
        Ok((stream.cached_info().state.clone(), consumer))
    }

    /// Sequence number of the first message if it is orphaned: stored although the consumer counts it as
    /// acknowledged. A killed server may restore such messages, which then occupy slots and are never delivered.
    async fn first_orphaned(&self) -> Result<Option<u64>, TransportError> {
        let (state, consumer) = self.info().await?;
        let is_orphaned =
            state.messages > 0 && state.first_sequence <= consumer.ack_floor.stream_sequence;
        Ok(is_orphaned.then_some(state.first_sequence))
    }

    /// Recreates the consumer, so that all stored messages are redelivered. Duplicates of messages in flight or
    /// acknowledged are recognised by message id.
    async fn recreate_consumer(&self) -> Result<(), TransportError> {
        let context = &self.connection.context;
        let deleted = context.delete_consumer_from_stream(CONSUMER, &self.stream);
        if let Err(error) = deleted.await {
            tracing::debug!(stream = self.name, %error, "the consumer could not be deleted; retrying later");
        }
        self.consumer().await.map(drop)
    }

    async fn counts(&self) -> Result<StreamCounts, TransportError> {
        let (state, consumer) = self.info().await?;
        let in_flight = consumer.num_ack_pending as u64;
        Ok(StreamCounts {
            sent: state.last_sequence,
            acknowledged: state.last_sequence.saturating_sub(state.messages),
            queued: state.messages.saturating_sub(in_flight),
            in_flight,
            redelivered: consumer.num_redelivered as u64,
            dead_lettered: self.dead_letters().await?,
        })
    }

    /// Number of this stream's messages in the dead-letter stream.
    async fn dead_letters(&self) -> Result<u64, TransportError> {
        let names = &self.connection.names;
        let (stream, subject) = (names.stream(DEAD_LETTERS), names.dead_letters_of(self.name));
        let counts = self
            .connection
            .messages_by_subject(&stream, &subject)
            .await?;
        Ok(counts.into_iter().map(|(_, count)| count as u64).sum())
    }

    /// Subject of `message`, which ends with the stage in whose name it is sent where several stages send.
    fn subject_of<T: WireMessage>(&self, message: &T) -> String {
        match message.sender() {
            Some(stage) => format!("{}.{}", self.subject, stage.name()),
            None => self.subject.clone(),
        }
    }

    /// Decodes a message that was sent to `subject`.
    fn decode<T: WireMessage>(&self, subject: &str, payload: &[u8]) -> Result<T, String> {
        let message: T = wire::decode(payload).map_err(|error| error.to_string())?;
        let own = self.subject_of(&message);
        if subject != own {
            let what = T::NAME;
            return Err(format!(
                "{what}: sent to subject {subject} and not to its sender's, {own}"
            ));
        }
        Ok(message)
    }

    async fn publish(&self, subject: &str, id: &str, payload: Bytes) -> Result<(), PublishError> {
        let message = PublishMessage::build().message_id(id).payload(payload);
        let context = &self.connection.context;
        context
            .send_publish(subject.to_owned(), message)
            .await?
            .await?;
        Ok(())
    }

    /// Copies a message to the dead-letter stream. Returns whether it was stored.
    async fn dead_letter(&self, id: &str, payload: Bytes) -> bool {
        let subject = self.connection.names.dead_letters_of(self.name);
        let stored = self.publish(&subject, id, payload).await;
        if let Err(error) = &stored {
            let (stream, error) = (self.name, one_line(error));
            tracing::warn!(
                stream,
                error,
                "a message could not be copied to the dead-letter stream; retrying"
            );
        }
        stored.is_ok()
    }
}

impl Upstream {
    pub(crate) fn of(location: StreamLocation) -> Self {
        Self { location }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.location.name
    }

    pub(crate) fn outage_time(&self) -> Duration {
        self.location.connection.health().outage_time()
    }

    pub(crate) async fn counts(&self) -> Result<StreamCounts, TransportError> {
        self.location.counts().await
    }

    /// Sends until the server has stored the message: without limit while the stream or the server's storage is
    /// full, else as long as any other request.
    pub(crate) async fn send<T: WireMessage>(&self, message: &T) -> Result<(), TransportError> {
        let connection = &self.location.connection;
        let (payload, id) = (Bytes::from(wire::encode(message)), message.id());
        let subject = self.location.subject_of(message);
        let mut retries = connection.retry_state(&format!("send to stream {}", self.location.name));
        let mut delay = Duration::from_millis(2);
        loop {
            let sent = self.location.publish(&subject, &id, payload.clone());
            let Err(error) = sent.await else {
                return Ok(());
            };
            let failure = one_line(&error);
            if is_stream_full(&failure) {
                retries.restart(connection);
            } else if requirements::is_storage_full(&failure) {
                retries.warn(&failure);
                retries.extend();
            } else {
                connection.on_failure(&mut retries, &failure)?;
            }
            sleep(delay).await;
            delay = MAX_SEND_DELAY.min(2 * delay);
        }
    }
}

/// Whether a message was not stored for want of a slot, which its consumers free.
fn is_stream_full(failure: &str) -> bool {
    failure.contains("maximum messages exceeded")
}

impl<T: WireMessage + Send + Sync + 'static> Downstream<T> {
    pub(crate) async fn open(location: StreamLocation) -> Result<Self, TransportError> {
        let (sender, fetched) = flume::unbounded();
        let demand = Arc::new(Demand {
            raised: Notify::new(),
            unmet: AtomicI64::new(0),
            batch_size: AtomicUsize::new(1),
        });
        let fetch_loop = FetchLoop {
            consumer: location.consumer().await?,
            location: Arc::new(location.clone()),
            sender,
            demand: Arc::clone(&demand),
        };
        Ok(Self {
            location,
            fetched,
            demand,
            fetch_loop: tokio::spawn(fetch_loop.run()).abort_handle(),
            orphaned: AtomicU64::new(0),
        })
    }

    pub(crate) async fn receive(&self) -> Result<Delivery<T>, TransportError> {
        let demand = DemandGuard::new(&self.demand);
        let received = self.fetched.recv_async().await;
        demand.keep();
        received.unwrap_or_else(|_| {
            let action = format!("read stream {}", self.location.name);
            let reason = "the runtime is shutting down";
            Err(self.location.connection.refused(&action, reason))
        })
    }

    pub(crate) fn try_receive(&self) -> Option<Delivery<T>> {
        let received = self.fetched.try_recv().ok()?;
        self.demand.increment();
        received.ok()
    }

    /// Redelivers orphaned messages that are found for the second time. Returns whether there were any.
    pub(crate) async fn reclaim(&self) -> Result<bool, TransportError> {
        let orphaned = self.location.first_orphaned().await?.unwrap_or(0);
        let before = self.orphaned.swap(orphaned, Ordering::Relaxed);
        if orphaned == 0 || orphaned != before {
            return Ok(false);
        }
        let stream = self.location.name;
        tracing::warn!(
            stream,
            "the NATS server holds orphaned messages; redelivering them"
        );
        self.location.recreate_consumer().await?;
        Ok(true)
    }

    pub(crate) fn prefetch(&self, messages: usize) {
        self.demand
            .batch_size
            .store(messages.max(1), Ordering::Relaxed);
    }
}

impl<T> Downstream<T> {
    pub(crate) fn name(&self) -> &'static str {
        self.location.name
    }

    pub(crate) fn outage_time(&self) -> Duration {
        self.location.connection.health().outage_time()
    }

    pub(crate) async fn counts(&self) -> Result<StreamCounts, TransportError> {
        self.location.counts().await
    }
}

impl<T> Drop for Downstream<T> {
    fn drop(&mut self) {
        // Fetched messages that nobody received are returned when the channel is dropped.
        self.fetch_loop.abort();
    }
}

/// The demand of one waiting receiver; withdrawn on drop, when the wait is cancelled.
struct DemandGuard<'a>(&'a Demand);

impl<'a> DemandGuard<'a> {
    fn new(demand: &'a Demand) -> Self {
        demand.increment();
        Self(demand)
    }

    /// Leaves the demand counted: it balances the message that was received.
    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for DemandGuard<'_> {
    fn drop(&mut self) {
        self.0.decrement();
    }
}

/// A message in flight at this process; dropping it returns it.
#[derive(Debug)]
pub(crate) struct HeldMessage {
    lease: Lease,
    location: Arc<StreamLocation>,
    /// Id of its dead letter.
    id: String,
}

impl HeldMessage {
    pub(crate) fn deliveries(&self) -> u32 {
        self.lease.deliveries()
    }

    pub(crate) fn exceeds_delivery_limit(&self) -> bool {
        self.lease.exceeds_delivery_limit()
    }

    pub(crate) fn acknowledge(self) {
        self.lease.acknowledge();
    }

    /// Copies it to the dead-letter stream and removes it from its own; returns it for a later try if the copy is not
    /// stored.
    pub(crate) async fn dead_letter(self, payload: Vec<u8>) {
        match self.location.dead_letter(&self.id, payload.into()).await {
            true => self.lease.terminate(),
            false => self.lease.postpone(),
        }
    }
}

/// The task that fetches messages while receivers wait for them.
struct FetchLoop<T> {
    location: Arc<StreamLocation>,
    consumer: PullConsumer,
    sender: flume::Sender<Result<Delivery<T>, TransportError>>,
    demand: Arc<Demand>,
}

impl<T: WireMessage + Send + Sync + 'static> FetchLoop<T> {
    async fn run(self) {
        let connection = &self.location.connection;
        let mut retries = connection.retry_state(&format!("read stream {}", self.location.name));
        let mut failing = false;
        loop {
            self.demand.wait().await;
            if !failing {
                // Nothing may have been wanted for long.
                retries.restart(connection);
            }
            let fetched = self.fetch().await;
            failing = fetched.is_err();
            let Err(error) = fetched else { continue };
            if let Err(over) = connection.on_failure(&mut retries, &one_line(&*error)) {
                self.emit(Err(over));
                return;
            }
            sleep(RETRY_DELAY).await;
        }
    }

    fn emit(&self, received: Result<Delivery<T>, TransportError>) {
        self.demand.decrement();
        // Fails only when the receiver was dropped; the message is then returned.
        drop(self.sender.send(received));
    }

    /// Makes one pull request and handles its messages until it is complete or the server says that it has expired.
    async fn fetch(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let batch_size = self.demand.batch_size.load(Ordering::Relaxed);
        let request = self.consumer.batch().max_messages(batch_size);
        let deadline = Instant::now() + PULL_EXPIRY + PULL_GRACE;
        let mut batch = request.expires(PULL_EXPIRY).messages().await?;
        while let Some(message) = timeout_at(deadline, batch.next())
            .await
            .map_err(|_| "the server does not answer a request for messages")?
        {
            self.handle(message?).await?;
        }
        Ok(())
    }

    async fn handle(
        &self,
        message: async_nats::jetstream::Message,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let (deliveries, sequence) = {
            let info = message.info()?;
            (
                u32::try_from(info.delivered).unwrap_or(u32::MAX),
                info.stream_sequence,
            )
        };
        let message = message.message;
        let reply = message.reply.ok_or("a message without a reply subject")?;
        let max_deliveries = self.location.limits.max_deliveries.get();
        let lease = self
            .location
            .connection
            .lease_keeper
            .hold(reply, deliveries, max_deliveries);
        let id = format!("{}-{sequence}", self.location.stream);
        let decoded = self
            .location
            .decode::<T>(&message.subject, &message.payload);
        let is_dead = lease.exceeds_delivery_limit() || decoded.is_err();
        if is_dead && !self.location.dead_letter(&id, message.payload).await {
            lease.postpone();
            return Ok(());
        }
        let stream = self.location.name;
        match decoded {
            Ok(decoded) => {
                if lease.exceeds_delivery_limit() {
                    tracing::warn!(
                        stream,
                        deliveries,
                        "a message exceeded the delivery limit; moved to the dead-letter stream"
                    );
                }
                let location = Arc::clone(&self.location);
                let held = HeldMessage {
                    lease,
                    location,
                    id,
                };
                self.emit(Ok(Delivery::jetstream(decoded, held)));
            }
            Err(error) => {
                tracing::error!(stream, sequence, %error, "a message cannot be decoded; moved to the dead-letter stream");
                lease.terminate();
            }
        }
        Ok(())
    }
}
