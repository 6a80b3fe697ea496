//! `agon bench transport`: throughput of the transports, with roles that compute nothing.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    num::NonZeroUsize,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use messages::{
    Completion, Finish, JudgeVersion, Label, LabelledPair, Pair, Probability, Prompt, PromptBatch,
    PromptId, Purpose, Seed, WeightsVersion,
};
use serde_json::{Value, json};
use settings::{JetStreamSettings, TransportSettings, WeightsEncoding, resolve};
use tokio::task::JoinSet;
use transport::{Receiver, Sender, Transport, TransportError};

use crate::cluster::{launch::NatsServer, server_users::ServerRole};

/// Tokens per prompt and per completion.
const TOKENS: usize = 64;

/// Names of the runs on the server.
const RUNS: [&str; 3] = ["bench", "weights-full", "weights-delta"];

/// Capacity of each stream, in messages.
const CAPACITY: usize = 512;

/// Measure the transports, with roles that compute nothing: in memory, and over a NATS server that this command
/// starts.
///
/// Reports pairs per second through all roles, after checking that none was lost; the peak memory of this process;
/// and the time to publish and to fetch weights, with the digest of each, as a ratio to a plain copy of the same
/// bytes over loopback, in full and as a delta after a step that changed every weight slightly.
///
/// Example: agon bench transport --pairs 20000 --actors 1000 --weights-mib 256 --json
#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Arguments {
    /// Number of pairs.
    #[arg(long, default_value_t = 20_000)]
    pairs: u64,
    /// Number of simulated actors.
    #[arg(long, default_value_t = 16)]
    actors: usize,
    /// Size of the weights, in MiB.
    #[arg(long, default_value_t = 256)]
    weights_mib: usize,
    /// The NATS server program.
    #[arg(long, default_value = "nats-server")]
    server: String,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    ensure!(arguments.actors > 0, "--actors must be at least 1");
    crate::runtime()?.block_on(measure(arguments))
}

async fn measure(arguments: &Arguments) -> anyhow::Result<Value> {
    let memory = flow(&Transport::in_memory(), arguments).await?;
    let directory = tempfile::tempdir().context("failed to make a folder for the server")?;
    std::fs::create_dir_all(directory.path().join("logs")).context("failed to make a folder")?;
    let mut server = NatsServer::start(&arguments.server, directory.path(), &RUNS, 8).await?;
    let settings = jetstream(&server, WeightsEncoding::Full)?;
    let [flow_run, ..] = RUNS;
    let transport = Transport::connect(&settings, flow_run).await?;
    let jetstream = flow(&transport, arguments).await?;
    let flow_memory = telemetry::peak_memory_bytes();
    let weights = weights(&server, arguments).await?;
    server.stop().await;
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

fn jetstream(server: &NatsServer, weights: WeightsEncoding) -> anyhow::Result<JetStreamSettings> {
    let url = server.url();
    let text = format!("[transport]\nkind = \"jetstream\"\nurl = {url:?}\n");
    let [(_, nkey_path), (_, run_key_path)] = server.keys().settings(ServerRole::Learner);
    match resolve(&text, "bench", &[])?.settings.transport {
        TransportSettings::Jetstream(settings) => Ok(JetStreamSettings {
            weights,
            nkey_path,
            run_key_path,
            ..*settings
        }),
        TransportSettings::Memory {} => unreachable!("the kind is jetstream"),
    }
}

/// Pairs per second from prompt to learner, after checking that every pair arrived.
async fn flow(transport: &Transport, arguments: &Arguments) -> anyhow::Result<f64> {
    let (prompts, prompt_receiver) = transport.stream::<Prompt>("prompts", CAPACITY).await?;
    let (pairs, pair_receiver) = transport.stream::<Pair>("pairs", CAPACITY).await?;
    let (labelled, labelled_receiver) = transport
        .stream::<LabelledPair>("labelled pairs", CAPACITY)
        .await?;
    let started = Instant::now();
    let mut roles = JoinSet::new();
    let share = (CAPACITY / arguments.actors).max(1);
    for _ in 0..arguments.actors {
        let (from, to) = (prompt_receiver.clone(), pairs.clone());
        from.prefetch(share);
        roles.spawn(stage(from, to, answer));
    }
    for _ in 0..4 {
        let (from, to) = (pair_receiver.clone(), labelled.clone());
        from.prefetch(64);
        roles.spawn(stage(from, to, judge));
    }
    let total = arguments.pairs;
    // Credits limit the prompts in flight, as a learner does.
    let (credit, credits) = tokio::sync::mpsc::channel::<()>(CAPACITY / 2);
    roles.spawn(send_prompts(prompts, total, credits));
    let mut seen = vec![false; usize::try_from(total).context("too many pairs")?];
    let mut received = 0;
    labelled_receiver.prefetch(64);
    for _ in 0..(CAPACITY as u64 / 2).min(total) {
        credit
            .send(())
            .await
            .context("the sender of prompts ended")?;
    }
    while received < total {
        let delivery = labelled_receiver.receive().await?;
        let id = usize::try_from(delivery.message().pair.id().0).unwrap_or(usize::MAX);
        let seen = seen.get_mut(id).context("a pair of an unknown prompt")?;
        if !std::mem::replace(seen, true) {
            received += 1;
            if credit.try_send(()).is_err() {
                tracing::trace!("the last prompt has been sent");
            }
        }
        delivery.acknowledge();
    }
    let rate = total as f64 / started.elapsed().as_secs_f64();
    roles.shutdown().await;
    transport.flush().await;
    Ok(rate)
}

async fn send_prompts(
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

/// Receives messages, converts and sends them, and acknowledges.
async fn stage<A, B>(
    from: Receiver<A>,
    to: Sender<B>,
    make: fn(A) -> B,
) -> Result<(), TransportError>
where
    A: messages::wire::WireMessage + Clone + Send + Sync + 'static,
    B: messages::wire::WireMessage + Clone + Send + Sync + 'static,
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
        prompt_batch: PromptBatch::single(id),
        purpose: Purpose::Train,
        version: WeightsVersion::REFERENCE,
        seed: Seed(id.0),
        ids: vec![7; TOKENS],
        text: "x ".repeat(TOKENS),
        dialogue: None,
        golden: None,
        answer: None,
        route: None,
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
        judged: None,
    };
    LabelledPair {
        pair,
        labels: vec![label],
        judge: "bench".into(),
        judge_version: JudgeVersion(1),
        scores: None,
        verdicts: Vec::new(),
    }
}

/// Times of publishing and fetching as ratios to a copy of the same bytes over loopback.
async fn weights(server: &NatsServer, arguments: &Arguments) -> anyhow::Result<Value> {
    let size = arguments.weights_mib << 20;
    let copied = tokio::task::spawn_blocking(move || copy(size)).await??;
    let mut report = json!({"mib": arguments.weights_mib, "copy_seconds": copied.as_secs_f64()});
    for (name, encoding) in [
        ("full", WeightsEncoding::Full),
        ("delta", WeightsEncoding::Delta),
    ] {
        let settings = jetstream(server, encoding)?;
        let run = format!("weights-{name}");
        let publisher = Transport::connect(&settings, &run)
            .await?
            .weight_store::<Vec<u8>>()
            .await?;
        let reader = Transport::connect(&settings, &run)
            .await?
            .weight_store::<Vec<u8>>()
            .await?;
        let updates = reader.subscribe();
        let (mut publish, mut fetch) = (Duration::ZERO, Duration::ZERO);
        // The first version is full in both encodings; the second is measured.
        for step in 1..=2 {
            let blob = blob(size, step);
            let started = Instant::now();
            publisher.publish(WeightsVersion::at(step), blob).await?;
            publish = started.elapsed();
            let newest = updates.at_least(WeightsVersion::at(step)).await?;
            let started = Instant::now();
            let fetched = reader.fetch(newest).await?;
            fetch = started.elapsed();
            ensure!(
                fetched.len() == size,
                "the fetched weights have another length"
            );
        }
        report[format!("{name}_publish_per_copy")] =
            (publish.as_secs_f64() / copied.as_secs_f64()).into();
        report[format!("{name}_fetch_per_copy")] =
            (fetch.as_secs_f64() / copied.as_secs_f64()).into();
    }
    let (delta, full) = (
        report["delta_publish_per_copy"]
            .as_f64()
            .unwrap_or(f64::NAN),
        report["full_publish_per_copy"].as_f64().unwrap_or(f64::NAN),
    );
    report["delta_publish_per_full"] = (delta / full).into();
    Ok(report)
}

/// Random f32 weights, which change from step to step by a relative 1e-4.
fn blob(bytes: usize, step: u64) -> Vec<u8> {
    let scale = 1.0 + 1e-4 * step as f32;
    let mut blob = Vec::with_capacity(bytes);
    let mut state = Seed(1);
    while blob.len() < bytes {
        state = state.derive(2);
        let weight = (state.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        blob.extend((weight * scale).to_le_bytes());
    }
    blob.truncate(bytes);
    blob
}

/// Time to copy this many bytes over a loopback socket.
fn copy(bytes: usize) -> anyhow::Result<Duration> {
    let chunk = NonZeroUsize::new(512 << 10).context("not zero")?.get();
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("failed to listen")?;
    let address = listener.local_addr().context("a listener has an address")?;
    let source = vec![1u8; bytes];
    let sender = thread::spawn(move || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(address)?;
        for part in source.chunks(chunk) {
            stream.write_all(part)?;
        }
        stream.flush()
    });
    let (mut stream, _) = listener.accept().context("failed to accept a connection")?;
    let mut target = Vec::with_capacity(bytes);
    let started = Instant::now();
    stream
        .read_to_end(&mut target)
        .context("failed to read the copy")?;
    let duration = started.elapsed();
    sender
        .join()
        .map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    ensure!(target.len() == bytes, "the copy is incomplete");
    Ok(duration)
}
