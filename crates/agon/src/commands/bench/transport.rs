//! `agon bench transport`: what it costs that roles meet, with compute that costs nothing.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    num::NonZeroUsize,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use messages::{
    Completion, Finish, JudgeVersion, Label, LabelledPair, Pair, Probability, Prompt, PromptId,
    Purpose, Release, Seed, WeightsManifest, WeightsVersion,
};
use serde_json::{Value, json};
use settings::{JetStreamSettings, TransportSettings, WeightsEncoding, resolve};
use tokio::task::JoinSet;
use transport::{Hub, Receiver, Sender, TransportError};

use crate::launch::Server;

/// Tokens of a prompt and of each of its two completions.
const TOKENS: usize = 64;

/// Messages that may be on their way at once.
const WINDOW: usize = 512;

/// How the roles meet, with fake compute: in memory, and over a NATS server of its own.
///
/// Tells pairs a second through prompt, pair, label and learner; whether anything was
/// lost; the largest memory of this process; and what it costs to publish and to fetch weights, as a ratio
/// to a plain copy of the same bytes over loopback, whole and as a delta after a step that moved every
/// weight a little.
///
/// Example: agon bench transport --pairs 20000 --actors 1000 --weights-mib 256 --json
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Arguments {
    /// Pairs that go through.
    #[arg(long, default_value_t = 20_000)]
    pairs: u64,
    /// Simulated actors.
    #[arg(long, default_value_t = 16)]
    actors: usize,
    /// The size of the weights, in MiB.
    #[arg(long, default_value_t = 256)]
    weights_mib: usize,
    /// The NATS server to start.
    #[arg(long, default_value = "nats-server")]
    server: String,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    ensure!(arguments.actors > 0, "--actors must be at least 1");
    crate::runtime()?.block_on(measure(arguments))
}

async fn measure(arguments: &Arguments) -> anyhow::Result<Value> {
    let memory = flow(&Hub::in_memory(), arguments).await?;
    let place = tempfile::tempdir().context("failed to make a folder for the server")?;
    std::fs::create_dir_all(place.path().join("logs")).context("failed to make a folder")?;
    let mut server = Server::start(&arguments.server, place.path()).await?;
    let settings = jetstream(&server.url(), WeightsEncoding::Full)?;
    let hub = Hub::connect(&settings, "bench").await?;
    let jetstream = flow(&hub, arguments).await?;
    let flow_memory = telemetry::peak_memory_bytes();
    let weights = weights(&server, arguments).await?;
    server.end().await;
    Ok(json!({
        "actors": arguments.actors,
        "pairs": arguments.pairs,
        "memory_pairs_per_second": memory,
        "jetstream_pairs_per_second": jetstream,
        "jetstream_share_of_memory": jetstream / memory,
        "flow_peak_memory_bytes": flow_memory,
        "weights": weights,
    }))
}

fn jetstream(url: &str, weights: WeightsEncoding) -> anyhow::Result<JetStreamSettings> {
    let text = format!("[transport]\nkind = \"jetstream\"\nurl = {url:?}\n");
    match resolve(&text, "bench", &[])?.settings.transport {
        TransportSettings::Jetstream(settings) => Ok(JetStreamSettings {
            weights,
            ..*settings
        }),
        TransportSettings::Memory {} => unreachable!("it says jetstream"),
    }
}

/// Pairs a second from prompt to learner, after checking that each came exactly once.
async fn flow(hub: &Hub, arguments: &Arguments) -> anyhow::Result<f64> {
    let (prompts, for_actors) = hub.stream::<Prompt>("prompts", WINDOW).await?;
    let (pairs, for_judge) = hub.stream::<Pair>("pairs", WINDOW).await?;
    let (labelled, for_learner) = hub.stream::<LabelledPair>("labelled pairs", WINDOW).await?;
    let started = Instant::now();
    let mut working = JoinSet::new();
    let share = (WINDOW / arguments.actors).max(1);
    for _ in 0..arguments.actors {
        let (from, to) = (for_actors.clone(), pairs.clone());
        from.prefetch(share);
        working.spawn(station(from, to, answer));
    }
    for _ in 0..4 {
        let (from, to) = (for_judge.clone(), labelled.clone());
        from.prefetch(64);
        working.spawn(station(from, to, judge));
    }
    let total = arguments.pairs;
    // Credits: as many prompts are on their way as a learner would have.
    let (credit, credits) = tokio::sync::mpsc::channel::<()>(WINDOW / 2);
    working.spawn(feed(prompts, total, credits));
    let mut seen = vec![false; usize::try_from(total).context("too many pairs")?];
    let mut came = 0;
    for_learner.prefetch(64);
    for _ in 0..(WINDOW as u64 / 2).min(total) {
        credit.send(()).await.context("the feed is gone")?;
    }
    while came < total {
        let delivery = for_learner.receive().await?;
        let id = usize::try_from(delivery.message().pair.id().0).unwrap_or(usize::MAX);
        let seen = seen.get_mut(id).context("a pair that nobody asked for")?;
        if !std::mem::replace(seen, true) {
            came += 1;
            if credit.try_send(()).is_err() {
                tracing::trace!("the feed has sent the last prompt");
            }
        }
        delivery.acknowledge();
    }
    let rate = total as f64 / started.elapsed().as_secs_f64();
    working.shutdown().await;
    hub.flush().await;
    Ok(rate)
}

async fn feed(
    prompts: Sender<Prompt>,
    total: u64,
    mut credits: tokio::sync::mpsc::Receiver<()>,
) -> Result<(), TransportError> {
    for id in 0..total {
        if credits.recv().await.is_none() {
            break;
        }
        prompts.send(prompt(id)).await?;
    }
    Ok(())
}

/// Takes, makes something of it, gives, and acknowledges.
async fn station<A, B>(
    from: Receiver<A>,
    to: Sender<B>,
    make: fn(A) -> B,
) -> Result<(), TransportError>
where
    A: messages::wire::Message + Clone + Send + Sync + 'static,
    B: messages::wire::Message + Clone + Send + Sync + 'static,
{
    loop {
        let (message, receipt) = from.receive().await?.take();
        to.send(make(message)).await?;
        receipt.acknowledge();
    }
}

fn prompt(id: u64) -> Prompt {
    let id = PromptId(id);
    Prompt {
        id,
        release: Release::single(id),
        purpose: Purpose::Train,
        version: WeightsVersion::REFERENCE,
        seed: Seed(id.0),
        ids: vec![7; TOKENS],
        text: "x ".repeat(TOKENS),
        dialogue: None,
        golden: None,
        answer: None,
    }
}

fn answer(prompt: Prompt) -> Pair {
    let completion = Completion {
        ids: vec![9; TOKENS],
        finish: Finish::EndOfText,
        mixture_coef: 0.0,
        logp: vec![-1.0; TOKENS],
        ref_logp: vec![-1.0; TOKENS],
        behaviour_logp: vec![-1.0; TOKENS],
        text: "y ".repeat(TOKENS),
    };
    Pair {
        version: prompt.version,
        prompt,
        completions: vec![completion.clone(), completion],
        actor: "bench".into(),
    }
}

fn judge(pair: Pair) -> LabelledPair {
    let label = Label {
        first: 0,
        second: 1,
        p: Probability::HALF,
    };
    LabelledPair {
        pair,
        labels: vec![label],
        judge: "bench".into(),
        judge_version: JudgeVersion(1),
        scores: None,
        gold: None,
    }
}

/// What publishing and fetching cost beside a copy of the same bytes over loopback.
async fn weights(server: &Server, arguments: &Arguments) -> anyhow::Result<Value> {
    let size = arguments.weights_mib << 20;
    let copied = tokio::task::spawn_blocking(move || copy(size)).await??;
    let mut report = json!({"mib": arguments.weights_mib, "copy_seconds": copied.as_secs_f64()});
    for (name, encoding) in [
        ("full", WeightsEncoding::Full),
        ("delta", WeightsEncoding::Delta),
    ] {
        let settings = jetstream(&server.url(), encoding)?;
        let run = format!("weights-{name}");
        let publisher = Hub::connect(&settings, &run).await?.shelf().await?;
        let reader = Hub::connect(&settings, &run).await?.shelf().await?;
        let news = reader.subscribe();
        let (mut publish, mut fetch) = (Duration::ZERO, Duration::ZERO);
        // The first is whole in both encodings; what is measured is the second.
        for step in 1..=2 {
            let blob = blob(size, step);
            let manifest = WeightsManifest::of(WeightsVersion::at(step), &blob);
            let started = Instant::now();
            publisher.publish(manifest, blob).await?;
            publish = started.elapsed();
            let newest = news.at_least(WeightsVersion::at(step)).await?;
            let started = Instant::now();
            let fetched = reader.fetch(newest.version).await?;
            fetch = started.elapsed();
            ensure!(
                fetched.len() == size,
                "weights came back with another length"
            );
        }
        report[format!("{name}_publish_per_copy")] =
            (publish.as_secs_f64() / copied.as_secs_f64()).into();
        report[format!("{name}_fetch_per_copy")] =
            (fetch.as_secs_f64() / copied.as_secs_f64()).into();
    }
    let (publish, whole) = (
        report["delta_publish_per_copy"]
            .as_f64()
            .unwrap_or(f64::NAN),
        report["full_publish_per_copy"].as_f64().unwrap_or(f64::NAN),
    );
    report["delta_publish_per_full"] = (publish / whole).into();
    Ok(report)
}

/// Weights in 32 bits, moved from step to step by about a part in ten thousand.
fn blob(bytes: usize, step: u64) -> Vec<u8> {
    let moved = 1.0 + 1e-4 * step as f32;
    let mut blob = Vec::with_capacity(bytes);
    let mut state = Seed(1);
    while blob.len() < bytes {
        state = state.derive(2);
        let weight = (state.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        blob.extend((weight * moved).to_le_bytes());
    }
    blob.truncate(bytes);
    blob
}

/// How long so many bytes take from one socket of this machine to another.
fn copy(bytes: usize) -> anyhow::Result<Duration> {
    let chunk = NonZeroUsize::new(512 << 10).context("not zero")?.get();
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("failed to listen")?;
    let address = listener.local_addr().context("a listener has an address")?;
    let source = vec![1u8; bytes];
    let sending = thread::spawn(move || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(address)?;
        for part in source.chunks(chunk) {
            stream.write_all(part)?;
        }
        stream.flush()
    });
    let (mut stream, _) = listener.accept().context("nobody connected")?;
    let mut target = Vec::with_capacity(bytes);
    let started = Instant::now();
    stream
        .read_to_end(&mut target)
        .context("the copy broke off")?;
    let took = started.elapsed();
    sending
        .join()
        .map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    ensure!(target.len() == bytes, "the copy is not whole");
    Ok(took)
}
