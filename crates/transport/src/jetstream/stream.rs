//! The two ends of a stream on the server: a work queue, bounded, from which a message goes when it is
//! acknowledged.
//!
//! A message is stored once however often it is sent, since its id goes with it. A full stream refuses,
//! and whoever sends waits. A message that cannot be read, or was delivered too often, is copied to the
//! run's dead letters, where people find it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, PullConsumer};
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, State};
use bytes::Bytes;
use futures_util::StreamExt;
use messages::wire::{self, Message};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::{Connection, PAUSE, sentence};
use crate::{Counts, Delivery, Limits, TransportError};

/// The one reader of a stream: all receivers share it, each message goes to one of them.
const READERS: &str = "readers";

/// How long a request for messages stands before it is made again.
const STANDING: Duration = Duration::from_secs(5);

/// The longest pause before a message is offered to a full stream again.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long a second sending of a message is recognised by the server. Later ones are recognised by
/// whoever takes them, by their ids.
const RECOGNISED: Duration = Duration::from_secs(600);

/// What lies there, nobody works on any more.
const DEAD: &str = "dead letters";

/// Dead letters that are kept.
const DEAD_LETTERS: i64 = 1000;

/// Where a stream is on the server.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    connection: Arc<Connection>,
    name: &'static str,
    limits: Limits,
    stream: String,
    subject: String,
}

#[derive(Debug)]
pub(crate) struct Upstream {
    place: Place,
}

#[derive(Debug)]
pub(crate) struct Downstream<T> {
    place: Place,
    arrived: flume::Receiver<Result<Delivery<T>, TransportError>>,
    wanted: Arc<Wanted>,
    pump: AbortHandle,
    /// The first message that was found stranded last time; 0: none.
    stranded: AtomicU64,
}

/// What receivers ask of the pump.
#[derive(Debug)]
struct Wanted {
    asked: Notify,
    /// The receivers that wait less the messages that are here: one number, so that no message is ever
    /// fetched, and kept from other processes, for a receiver that has already been served.
    demand: AtomicI64,
    messages: AtomicUsize,
}

impl Wanted {
    fn one_more(&self) {
        if self.demand.fetch_add(1, Ordering::AcqRel) >= 0 {
            self.asked.notify_one();
        }
    }

    fn one_less(&self) {
        self.demand.fetch_sub(1, Ordering::AcqRel);
    }

    /// Until more receivers wait than messages are here.
    async fn demand(&self) {
        while self.demand.load(Ordering::Acquire) <= 0 {
            self.asked.notified().await;
        }
    }
}

/// Makes the run's dead letters unless they are there.
pub(crate) async fn make_dead_letters(connection: &Connection) -> Result<(), TransportError> {
    let config = Config {
        name: connection.name(DEAD),
        subjects: vec![format!("{}.*", connection.subject(DEAD))],
        max_messages: DEAD_LETTERS,
        ..made(connection)
    };
    make(connection, &config).await
}

/// What all streams of a run have in common.
fn made(connection: &Connection) -> Config {
    Config {
        duplicate_window: RECOGNISED,
        num_replicas: connection.settings.replicas,
        ..Config::default()
    }
}

async fn make(connection: &Connection, config: &Config) -> Result<(), TransportError> {
    let create = || connection.context.create_or_update_stream(config.clone());
    connection.insist("make a stream", create).await?;
    Ok(())
}

impl Place {
    /// Makes the stream unless it is there.
    pub(crate) async fn make(
        connection: &Arc<Connection>,
        name: &'static str,
        limits: Limits,
    ) -> Result<Self, TransportError> {
        let place = Self {
            connection: Arc::clone(connection),
            name,
            limits,
            stream: connection.name(name),
            subject: connection.subject(name),
        };
        let config = Config {
            name: place.stream.clone(),
            subjects: vec![place.subject.clone()],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_messages: i64::try_from(limits.capacity.get()).unwrap_or(i64::MAX),
            ..made(connection)
        };
        make(connection, &config).await?;
        Ok(place)
    }

    async fn consumer(&self) -> Result<PullConsumer, TransportError> {
        let config = consumer::pull::Config {
            durable_name: Some(READERS.into()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: self.connection.lease(),
            max_ack_pending: -1,
            max_deliver: -1,
            ..consumer::pull::Config::default()
        };
        let context = &self.connection.context;
        let create = || context.create_consumer_on_stream(config.clone(), &self.stream);
        self.connection.insist("read a stream", create).await
    }

    /// What the server knows of the stream, and of its one reader.
    async fn look(&self) -> Result<(State, consumer::Info), TransportError> {
        let context = &self.connection.context;
        let ask = || context.get_stream(&self.stream);
        let stream = self.connection.insist("ask about a stream", ask).await?;
        let ask = || stream.consumer_info(READERS);
        let reader = self.connection.insist("ask about a stream", ask).await?;
        Ok((stream.cached_info().state.clone(), reader))
    }

    /// The first message of the stream, when the server counts it as read and keeps it all the same. A server
    /// that was killed may come back with such messages: they take places for ever and reach nobody.
    async fn stranded(&self) -> Result<Option<u64>, TransportError> {
        let (state, reader) = self.look().await?;
        let is_stranded =
            state.messages > 0 && state.first_sequence <= reader.ack_floor.stream_sequence;
        Ok(is_stranded.then_some(state.first_sequence))
    }

    /// Has everything that the stream holds delivered again, whatever the server remembers of it. Who has
    /// some of it in hand, or had acknowledged it, is known by the messages' ids.
    async fn read_anew(&self) -> Result<(), TransportError> {
        let context = &self.connection.context;
        let forgotten = context.delete_consumer_from_stream(READERS, &self.stream);
        if let Err(error) = forgotten.await {
            tracing::debug!(stream = self.name, %error, "not forgotten; it is tried again");
        }
        self.consumer().await.map(drop)
    }

    async fn counts(&self) -> Result<Counts, TransportError> {
        let (state, reader) = self.look().await?;
        let context = &self.connection.context;
        let dead = self.connection.name(DEAD);
        let ask = || context.get_stream(&dead);
        let dead = self
            .connection
            .insist("ask about dead letters", ask)
            .await?;
        let in_hand = reader.num_ack_pending as u64;
        Ok(Counts {
            sent: state.last_sequence,
            acknowledged: state.last_sequence.saturating_sub(state.messages),
            queued: state.messages.saturating_sub(in_hand),
            in_hand,
            redelivered: reader.num_redelivered as u64,
            given_up: dead.cached_info().state.last_sequence,
        })
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

    /// Keeps a copy of what nobody will work on; whether it is stored.
    async fn bury(&self, id: &str, payload: Bytes) -> bool {
        let dead = self.connection.subject(DEAD);
        let subject = format!("{dead}.{}", self.name.replace(' ', "-"));
        let stored = self.publish(&subject, id, payload).await;
        if let Err(error) = &stored {
            let (stream, error) = (self.name, sentence(error));
            tracing::warn!(
                stream,
                error,
                "a dead letter could not be kept: it is tried again"
            );
        }
        stored.is_ok()
    }
}

impl Upstream {
    pub(crate) fn of(place: Place) -> Self {
        Self { place }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.place.name
    }

    pub(crate) async fn counts(&self) -> Result<Counts, TransportError> {
        self.place.counts().await
    }

    /// Sends until the server has stored the message: while the stream or the server's store is full,
    /// however long that takes; while the server does not answer, for as long as the settings allow.
    pub(crate) async fn send<T: Message>(&self, message: &T) -> Result<(), TransportError> {
        let connection = &self.place.connection;
        let (payload, id) = (Bytes::from(wire::encode(message)), message.id());
        let allowed = Duration::from_secs(connection.settings.timeout_seconds);
        let mut deadline = Instant::now() + allowed;
        let mut pause = Duration::from_millis(2);
        let mut warned = false;
        loop {
            let sent = self
                .place
                .publish(&self.place.subject, &id, payload.clone());
            let Err(error) = sent.await else {
                return Ok(());
            };
            match trouble(&error) {
                Trouble::Full => deadline = Instant::now() + allowed,
                Trouble::StoreFull => {
                    deadline = Instant::now() + allowed;
                    if !std::mem::replace(&mut warned, true) {
                        let (stream, error) = (self.place.name, sentence(&error));
                        tracing::warn!(stream, error, "the server's store is full: waiting");
                    }
                }
                Trouble::Silent if Instant::now() < deadline => {}
                Trouble::Silent | Trouble::Hopeless => {
                    let action = format!("send to stream {}", self.place.name);
                    return Err(connection.refused(&action, &error));
                }
            }
            sleep(pause).await;
            pause = LONGEST_PAUSE.min(2 * pause);
        }
    }
}

/// What to do about a message that was not stored.
enum Trouble {
    /// Wait for a place.
    Full,
    /// Wait for room on the server's disk.
    StoreFull,
    /// Try again for a while.
    Silent,
    /// Nothing.
    Hopeless,
}

fn trouble(error: &PublishError) -> Trouble {
    let text = sentence(error);
    if text.contains("maximum messages exceeded") {
        return Trouble::Full;
    }
    let full = ["resource", "no space", "maximum bytes"];
    if full.iter().any(|part| text.contains(part)) {
        return Trouble::StoreFull;
    }
    match error.kind() {
        PublishErrorKind::MaxPayloadExceeded => Trouble::Hopeless,
        _ => Trouble::Silent,
    }
}

impl<T: Message + Send + Sync + 'static> Downstream<T> {
    pub(crate) async fn open(place: Place) -> Result<Self, TransportError> {
        let (arrive, arrived) = flume::unbounded();
        let wanted = Arc::new(Wanted {
            asked: Notify::new(),
            demand: AtomicI64::new(0),
            messages: AtomicUsize::new(1),
        });
        let pump = Pump {
            consumer: place.consumer().await?,
            place: place.clone(),
            arrive,
            wanted: Arc::clone(&wanted),
        };
        Ok(Self {
            place,
            arrived,
            wanted,
            pump: tokio::spawn(pump.run()).abort_handle(),
            stranded: AtomicU64::new(0),
        })
    }

    pub(crate) async fn receive(&self) -> Result<Delivery<T>, TransportError> {
        let waiting = Waiting::among(&self.wanted);
        let arrived = self.arrived.recv_async().await;
        waiting.served();
        arrived.unwrap_or_else(|_| {
            Err(TransportError::Refused {
                action: format!("read stream {}", self.place.name),
                url: self.place.connection.settings.url.clone(),
                reason: "the runtime is shutting down".into(),
            })
        })
    }

    pub(crate) fn try_receive(&self) -> Option<Delivery<T>> {
        let arrived = self.arrived.try_recv().ok()?;
        self.wanted.one_more();
        arrived.ok()
    }

    /// Has delivered again what the server keeps and would deliver to nobody, when it is found for the
    /// second time; whether there was any.
    pub(crate) async fn reclaim(&self) -> Result<bool, TransportError> {
        let stranded = self.place.stranded().await?.unwrap_or(0);
        let before = self.stranded.swap(stranded, Ordering::Relaxed);
        if stranded == 0 || stranded != before {
            return Ok(false);
        }
        let stream = self.place.name;
        tracing::warn!(
            stream,
            "the server kept messages that it delivered to nobody: they are delivered again"
        );
        self.place.read_anew().await?;
        Ok(true)
    }

    pub(crate) fn prefetch(&self, messages: usize) {
        self.wanted
            .messages
            .store(messages.max(1), Ordering::Relaxed);
    }
}

impl<T> Downstream<T> {
    pub(crate) fn name(&self) -> &'static str {
        self.place.name
    }

    pub(crate) async fn counts(&self) -> Result<Counts, TransportError> {
        self.place.counts().await
    }
}

impl<T> Drop for Downstream<T> {
    fn drop(&mut self) {
        // What has arrived and was not asked for goes back with the queue.
        self.pump.abort();
    }
}

/// A receiver that waits; it may stop waiting at any moment.
struct Waiting<'a>(&'a Wanted);

impl<'a> Waiting<'a> {
    fn among(wanted: &'a Wanted) -> Self {
        wanted.one_more();
        Self(wanted)
    }

    /// The message that it waited for is taken, and no longer here either.
    fn served(self) {
        std::mem::forget(self);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.one_less();
    }
}

/// Fetches messages when somebody waits for them, never more than were asked for.
struct Pump<T> {
    place: Place,
    consumer: PullConsumer,
    arrive: flume::Sender<Result<Delivery<T>, TransportError>>,
    wanted: Arc<Wanted>,
}

impl<T: Message + Send + Sync + 'static> Pump<T> {
    async fn run(self) {
        let allowed = Duration::from_secs(self.place.connection.settings.timeout_seconds);
        let mut answered = Instant::now();
        loop {
            self.wanted.demand().await;
            match self.fetch().await {
                Ok(()) => answered = Instant::now(),
                Err(error) if answered.elapsed() > allowed => {
                    let action = format!("read stream {}", self.place.name);
                    let refused = self.place.connection.refused(&action, &*error);
                    self.hand_over(Err(refused));
                    return;
                }
                Err(error) => {
                    tracing::debug!(stream = self.place.name, %error, "asked again");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn hand_over(&self, arrived: Result<Delivery<T>, TransportError>) {
        self.wanted.one_less();
        // Nobody is there to take it when the receiver has gone.
        drop(self.arrive.send(arrived));
    }

    /// One request: ends when it is answered in full, or has stood for a while.
    async fn fetch(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let messages = self.wanted.messages.load(Ordering::Relaxed);
        let request = self.consumer.batch().max_messages(messages);
        let mut batch = request.expires(STANDING).messages().await?;
        // The server ends a request in time; a connection that is gone does not.
        while let Some(message) = timeout(2 * STANDING, batch.next()).await? {
            self.take(message?).await?;
        }
        Ok(())
    }

    async fn take(
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
        let reply = message.reply.ok_or("a message without a way to answer")?;
        let most = self.place.limits.max_deliveries.get();
        let lease = self.place.connection.keeper.hold(reply, deliveries, most);
        let id = format!("{}-{sequence}", self.place.stream);
        let decoded = wire::decode::<T>(&message.payload);
        let is_dead = lease.is_given_up() || decoded.is_err();
        if is_dead && !self.place.bury(&id, message.payload).await {
            lease.postpone();
            return Ok(());
        }
        let stream = self.place.name;
        match decoded {
            Ok(decoded) => {
                if lease.is_given_up() {
                    tracing::warn!(stream, deliveries, "a message is given up");
                }
                self.hand_over(Ok(Delivery::jetstream(decoded, lease)));
            }
            Err(error) => {
                tracing::error!(stream, sequence, %error, "a message cannot be read: it is put aside");
                lease.terminate();
            }
        }
        Ok(())
    }
}
