//! `agon bench preference`: the preference service under load.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use messages::{Completion, Finish, Prompt, PromptId, Purpose, Release, Seed, WeightsVersion};
use preference::{Comparison, Judge};
use serde_json::{Value, json};
use settings::{Override, Settings, resolve_file};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    failure::Misuse,
    world::{self, JudgeSource, World},
};

/// Prompts whose golden answers are compared, in turn.
const ROWS: u64 = 256;

/// The preference service under load: the judge of a configuration alone in full batches, then behind HTTP
/// with many clients of one pair a request, then the same with batches of 1.
///
/// Tells pairs a second of each, the service's share of the judge's own, the gain over
/// batches of 1, and the latency that clients see (p50 and p99, in milliseconds). The cache is off.
///
/// Example: agon bench preference configs/overoptimization.toml --clients 200 --json
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Arguments {
    /// The configuration, whose prompts have golden answers.
    config: PathBuf,
    /// Change one setting, VALUE being TOML; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<Override>,
    /// Clients at once, each with one pair a request.
    #[arg(long, default_value_t = 200)]
    clients: usize,
    /// How long each of the three is measured.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    let mut settings = resolve_file(&arguments.config, &arguments.set)?.settings;
    settings.preference.cache_size = 0;
    settings.preference.http.listen = "127.0.0.1:0".into();
    settings.preference.http.token_path = PathBuf::new();
    let world = world::build(&settings, None, &|| false)?;
    let judge = JudgeSource::open(&settings, world.judged(), &|| false)?;
    let judge = Arc::new(judge);
    let rows = rows(&world)?;
    let time = Duration::from_secs_f64(arguments.seconds);
    let own = alone(&settings, &judge, &rows, time)?;
    let runtime = crate::runtime()?;
    let served = runtime.block_on(serve(&settings, &judge, &rows, (arguments.clients, time)))?;
    settings.preference.max_batch = 1;
    let single = runtime.block_on(serve(&settings, &judge, &rows, (arguments.clients, time)))?;
    Ok(json!({
        "judge": settings.preference.judge.name(),
        "clients": arguments.clients,
        "judge_pairs_per_second": own,
        "pairs_per_second": served.rate,
        "share_of_judge": served.rate / own,
        "p50_milliseconds": served.percentile(0.5),
        "p99_milliseconds": served.percentile(0.99),
        "requests": served.latencies.len(),
        "unbatched_pairs_per_second": single.rate,
        "unbatched_p50_milliseconds": single.percentile(0.5),
        "unbatched_p99_milliseconds": single.percentile(0.99),
        "gain_over_batch_1": served.rate / single.rate,
        "peak_memory_bytes": telemetry::peak_memory_bytes(),
    }))
}

/// A prompt with two answers to compare.
struct Row {
    prompt: Prompt,
    answers: [Completion; 2],
}

/// Every prompt's golden answer against that of the prompt after it.
fn rows(world: &World) -> anyhow::Result<Vec<Row>> {
    let answer = |index: u64| {
        let row = world.set.train(index);
        let (ids, text) = row.golden.zip(row.answer).ok_or_else(|| {
            Misuse(
                "the prompts have no golden answers to compare; see prompts.golden_column".into(),
            )
        })?;
        Ok::<_, Misuse>(Completion {
            logp: vec![0.0; ids.len()],
            ref_logp: vec![0.0; ids.len()],
            behaviour_logp: vec![0.0; ids.len()],
            ids,
            finish: Finish::EndOfText,
            mixture_coef: 0.0,
            text,
        })
    };
    let row = |index: u64| {
        let asked = world.set.train(index);
        let id = PromptId(index);
        Ok(Row {
            prompt: Prompt {
                id,
                release: Release::single(id),
                purpose: Purpose::Train,
                version: WeightsVersion::REFERENCE,
                seed: Seed(0),
                ids: asked.ids,
                text: asked.text,
                dialogue: None,
                golden: None,
                answer: None,
            },
            answers: [answer(index)?, answer(index + 1)?],
        })
    };
    (0..ROWS).map(row).collect()
}

/// Pairs a second of the judge by itself, in full batches, one after the other.
fn alone(
    settings: &Settings,
    judge: &JudgeSource,
    rows: &[Row],
    time: Duration,
) -> anyhow::Result<f64> {
    let mut judge: Box<dyn Judge> = judge.make()?;
    let comparisons: Vec<_> = rows
        .iter()
        .map(|row| Comparison {
            prompt: &row.prompt,
            first: &row.answers[0],
            second: &row.answers[1],
        })
        .collect();
    let (mut pairs, started) = (0usize, Instant::now());
    while started.elapsed() < time {
        for batch in comparisons.chunks(settings.preference.max_batch) {
            judge
                .judge(batch)
                .map_err(|error| anyhow::anyhow!("{error}"))?;
            pairs += batch.len();
        }
    }
    Ok(pairs as f64 / started.elapsed().as_secs_f64())
}

/// What clients saw of the service.
struct Served {
    rate: f64,
    /// Of every request, in milliseconds, sorted.
    latencies: Vec<f64>,
}

impl Served {
    fn percentile(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1) as f64;
        self.latencies
            .get((last * share).round() as usize)
            .copied()
            .unwrap_or(f64::NAN)
    }
}

/// The service with so many clients, each asking again as soon as it is answered.
async fn serve(
    settings: &Settings,
    judge: &Arc<JudgeSource>,
    rows: &[Row],
    (clients, time): (usize, Duration),
) -> anyhow::Result<Served> {
    let bench = world::bench(settings, judge)?;
    let server = world::server(settings, judge, bench).await?;
    let url = format!("http://{}/v1/preferences", server.address());
    let (quit, quitting) = watch::channel(false);
    let serving = tokio::spawn(server.run(quitting));
    let bodies: Arc<Vec<Value>> = Arc::new(rows.iter().map(body).collect());
    let http = reqwest::Client::new();
    let started = Instant::now();
    let mut asking = JoinSet::new();
    for first in 0..clients {
        let (http, url, bodies) = (http.clone(), url.clone(), Arc::clone(&bodies));
        asking.spawn(async move {
            let mut latencies = Vec::new();
            for body in bodies.iter().cycle().skip(first) {
                if started.elapsed() >= time {
                    break;
                }
                let asked = Instant::now();
                ask(&http, &url, body).await?;
                latencies.push(1000.0 * asked.elapsed().as_secs_f64());
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(client) = asking.join_next().await {
        latencies.extend(client.context("a client panicked")??);
    }
    let rate = latencies.len() as f64 / started.elapsed().as_secs_f64();
    quit.send_replace(true);
    serving.await.context("the service panicked")??;
    latencies.sort_by(f64::total_cmp);
    Ok(Served { rate, latencies })
}

fn body(row: &Row) -> Value {
    let [first, second] = &row.answers;
    json!({"pairs": [{"prompt": row.prompt.text, "first": first.text, "second": second.text}]})
}

async fn ask(http: &reqwest::Client, url: &str, body: &Value) -> anyhow::Result<()> {
    let answer = http.post(url).json(body).send().await?;
    let (status, text) = (answer.status(), answer.text().await?);
    ensure!(status.is_success(), "the service answered {status}: {text}");
    let answer: Value = serde_json::from_str(&text)?;
    ensure!(answer["results"][0]["p"].is_number(), "no p in {text}");
    Ok(())
}
