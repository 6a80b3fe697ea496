//! `agon bench preference`: throughput and latency of the preference service under load.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hub::CancelToken;
use messages::{Completion, Finish, Prompt, PromptBatch, PromptId, Purpose, Seed, WeightsVersion};
use preference::{Comparison, Judge};
use serde_json::{Value, json};
use settings::Settings;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    assembly::{self, CompletionOrigin, JudgeSource, ReadInputs, RunInputs},
    cli::{bench::TimingOptions, config_args::Configuration},
    exit_code::UsageError,
};

/// Number of prompts whose golden answers are compared.
const ROWS: u64 = 256;

/// Measure the preference service: the judge of a configuration alone in full batches, then over HTTP with many
/// clients of one pair per request, then the same with batches of 1. The configuration's prompts must have golden
/// answers.
///
/// Reports pairs per second of each, the service's share of the judge's own rate, the gain over batches of 1, and
/// the latency seen by clients (p50 and p99, in milliseconds). The cache is disabled.
///
/// Example: agon bench preference configs/overoptimization.toml --clients 200 --json
#[derive(clap::Args)]
#[group(skip)]
#[command(mut_arg("seconds", |arg| {
    arg.help("Seconds of each of the three measurements").default_value("10")
}))]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    /// Number of concurrent clients, each with one pair per request.
    #[arg(long, default_value_t = 200)]
    clients: usize,
    #[command(flatten)]
    timing: TimingOptions,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Value> {
    let mut settings = arguments.configuration.resolve()?.settings;
    settings.preference.cache_size = 0;
    settings.preference.http.listen = "127.0.0.1:0".into();
    settings.preference.http.token_path = PathBuf::new();
    let never = CancelToken::never();
    let inputs = RunInputs::build(&settings, ReadInputs::default(), &never)?;
    let judge = JudgeSource::open(&settings, CompletionOrigin::Policy(&inputs.model), &never)?;
    let judge = Arc::new(judge);
    let rows = rows(&inputs)?;
    let load = Load {
        rows: &rows,
        clients: arguments.clients,
        duration: Duration::from_secs_f64(arguments.timing.seconds),
    };
    let own = judge_rate(&settings, &judge, &load)?;
    let runtime = crate::runtime()?;
    let served = runtime.block_on(serve(&settings, &judge, &load))?;
    settings.preference.max_batch = 1;
    let single = runtime.block_on(serve(&settings, &judge, &load))?;
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
struct AnsweredPrompt {
    prompt: Prompt,
    answers: [Completion; 2],
}

/// Load on the judge.
struct Load<'a> {
    rows: &'a [AnsweredPrompt],
    clients: usize,
    duration: Duration,
}

/// Every prompt with its own golden answer and that of the next prompt.
fn rows(inputs: &RunInputs) -> anyhow::Result<Vec<AnsweredPrompt>> {
    let answer = |index: u64| {
        let row = inputs.prompts.train(index);
        let (ids, text) = row.golden.zip(row.answer).ok_or_else(|| {
            UsageError(
                "the prompts have no golden answers to compare; see prompts.golden_column".into(),
            )
        })?;
        Ok::<_, UsageError>(Completion {
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
        let row = inputs.prompts.train(index);
        let id = PromptId(index);
        Ok(AnsweredPrompt {
            prompt: Prompt {
                id,
                prompt_batch: PromptBatch::single(id),
                purpose: Purpose::Train,
                version: WeightsVersion::REFERENCE,
                seed: Seed(0),
                ids: row.ids,
                text: row.text,
                dialogue: None,
                golden: None,
                answer: None,
                route: None,
            },
            answers: [answer(index)?, answer(index + 1)?],
        })
    };
    (0..ROWS).map(row).collect()
}

/// Pairs per second of the judge alone, in full batches.
fn judge_rate(settings: &Settings, judge: &JudgeSource, load: &Load<'_>) -> anyhow::Result<f64> {
    let mut judge: Box<dyn Judge> = judge.make()?;
    let comparisons: Vec<_> = load
        .rows
        .iter()
        .map(|row| Comparison {
            prompt: &row.prompt,
            first: &row.answers[0],
            second: &row.answers[1],
        })
        .collect();
    let (mut pairs, started) = (0usize, Instant::now());
    while started.elapsed() < load.duration {
        for batch in comparisons.chunks(settings.preference.max_batch) {
            judge
                .judge(batch)
                .map_err(|error| anyhow::anyhow!("{error}"))?;
            pairs += batch.len();
        }
    }
    Ok(pairs as f64 / started.elapsed().as_secs_f64())
}

/// Rate and latencies seen by the clients.
struct LoadResult {
    /// Pairs per second.
    rate: f64,
    /// Latency of every request in milliseconds, sorted.
    latencies: Vec<f64>,
}

impl LoadResult {
    fn percentile(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1) as f64;
        self.latencies
            .get((last * share).round() as usize)
            .copied()
            .unwrap_or(f64::NAN)
    }
}

/// Runs the service under load; every client sends its next request as soon as the last one is answered.
async fn serve(
    settings: &Settings,
    judge: &Arc<JudgeSource>,
    load: &Load<'_>,
) -> anyhow::Result<LoadResult> {
    let pool = assembly::pool(settings, judge)?;
    let server = assembly::server(settings, judge, pool).await?;
    let url = format!("http://{}/v1/preferences", server.address());
    let (stop, shutdown) = watch::channel(false);
    let serving = tokio::spawn(server.run(shutdown));
    let bodies: Arc<Vec<Value>> = Arc::new(load.rows.iter().map(body).collect());
    let http = reqwest::Client::new();
    let (started, duration) = (Instant::now(), load.duration);
    let mut clients = JoinSet::new();
    for first in 0..load.clients {
        let (http, url, bodies) = (http.clone(), url.clone(), Arc::clone(&bodies));
        clients.spawn(async move {
            let mut latencies = Vec::new();
            for body in bodies.iter().cycle().skip(first) {
                if started.elapsed() >= duration {
                    break;
                }
                let sent = Instant::now();
                post(&http, &url, body).await?;
                latencies.push(1000.0 * sent.elapsed().as_secs_f64());
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(client) = clients.join_next().await {
        latencies.extend(client.context("a client panicked")??);
    }
    let rate = latencies.len() as f64 / started.elapsed().as_secs_f64();
    stop.send_replace(true);
    serving.await.context("the service panicked")?;
    latencies.sort_by(f64::total_cmp);
    Ok(LoadResult { rate, latencies })
}

fn body(row: &AnsweredPrompt) -> Value {
    let [first, second] = &row.answers;
    json!({"pairs": [{"prompt": row.prompt.text, "first": first.text, "second": second.text}]})
}

async fn post(http: &reqwest::Client, url: &str, body: &Value) -> anyhow::Result<()> {
    let response = http.post(url).json(body).send().await?;
    let (status, text) = (response.status(), response.text().await?);
    ensure!(status.is_success(), "the service answered {status}: {text}");
    let response: Value = serde_json::from_str(&text)?;
    ensure!(response["results"][0]["p"].is_number(), "no p in {text}");
    Ok(())
}
