//! Chat judge against fake OpenAI-compatible servers on localhost.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;

use axum::Router;
use axum::extract::Request;
use axum::http::header::AUTHORIZATION;
use axum::response::{IntoResponse, Json, Response};
use messages::{DropReason, Dropped, LabelledPair, Stage};
use settings::{OrdersSetting, VerdictForm};
use telemetry::StageCounters;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use transport::stream;

use super::*;
use crate::error::ComparisonError;
use crate::judge::Verdict;
use crate::judge::chat::tests::settings;
use crate::judge::fake::{abstained, message_limits, pair, preferred};
use crate::pool::fake::{request, settings as pool_settings};
use crate::pool::{JudgePool, Orders, PoolSettings};
use crate::run::{PreferenceService, PreferenceServiceParts};

/// Settings of a judge at these URLs.
fn endpoints(urls: &[String]) -> EndpointSettings {
    EndpointSettings {
        urls: urls.to_vec(),
        model: "some-judge".into(),
        api_key_path: std::path::PathBuf::new(),
        concurrency: 8,
        form: VerdictForm::Pairwise,
        rubric: String::new(),
        votes: 1,
    }
}

/// A server that answers chat completions with a closure, until it is dropped.
struct FakeOpenAi {
    address: SocketAddr,
    task: JoinHandle<()>,
    requests: Arc<Mutex<Vec<RecordedRequest>>>,
}

/// Authorization header and body of a request.
type RecordedRequest = (Option<String>, Value);

impl FakeOpenAi {
    /// `answer` gets the number of earlier requests and the user message.
    async fn start(answer: impl Fn(usize, &str) -> Response + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", answer).await
    }

    async fn start_at(
        address: &str,
        answer: impl Fn(usize, &str) -> Response + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<RecordedRequest>>> = Arc::default();
        let recorded = Arc::clone(&requests);
        let answer = Arc::new(answer);
        let handler = move |request: Request| {
            let (recorded, answer) = (Arc::clone(&recorded), Arc::clone(&answer));
            async move {
                assert_eq!(request.uri().path(), "/v1/chat/completions");
                let key = request.headers().get(AUTHORIZATION);
                let key = key.map(|key| key.to_str().unwrap().to_owned());
                let body = axum::body::to_bytes(request.into_body(), 1 << 20).await;
                let body: Value = serde_json::from_slice(&body.unwrap()).unwrap();
                let messages = body["messages"].as_array().unwrap();
                let user = messages.last().unwrap()["content"].as_str().unwrap();
                let user = user.to_owned();
                let before = {
                    let mut recorded = recorded.lock().unwrap();
                    recorded.push((key, body));
                    recorded.len() - 1
                };
                answer(before, &user)
            }
        };
        let task = tokio::spawn(async move {
            axum::serve(listener, Router::new().fallback(handler))
                .await
                .expect("it listens");
        });
        Self {
            address,
            task,
            requests,
        }
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }
}

impl Drop for FakeOpenAi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A chat completion with this content.
fn reply(content: &str) -> Response {
    let message = json!({"role": "assistant", "content": content});
    Json(json!({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}))
        .into_response()
}

fn failure(status: u16) -> Response {
    let status = axum::http::StatusCode::from_u16(status).unwrap();
    (status, "not now").into_response()
}

/// A pool with replicas at these URLs and a short backoff.
fn pool(urls: &[String], chat: &ChatSettings) -> JudgePool {
    pool_with(&endpoints(urls), chat)
}

fn pool_with(endpoints: &EndpointSettings, chat: &ChatSettings) -> JudgePool {
    let judges = JudgeReplicas::chat(endpoints, chat).expect("clients");
    let quick = PoolSettings {
        retry_base: std::time::Duration::from_millis(1),
        circuit_probe: std::time::Duration::from_millis(10),
        ..pool_settings()
    };
    JudgePool::new(judges, quick)
}

async fn verdict(pool: &JudgePool, first: &str, second: &str) -> Result<Verdict, ComparisonError> {
    let preference = pool.compare(&request(first, second), Orders::One).await;
    preference.map(|preference| preference.verdict)
}

#[tokio::test]
async fn requests_follow_the_settings_and_texts_are_not_expanded() {
    let server = FakeOpenAi::start(|_, _| reply("[[A]]")).await;
    let folder = std::env::temp_dir().join(format!("agon-chat-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let api_key_path = folder.join("key");
    std::fs::write(&api_key_path, "sk-123\n").unwrap();
    let with_key = EndpointSettings {
        api_key_path,
        ..endpoints(&[server.url()])
    };
    let with_key = pool_with(&with_key, &settings());
    let actual = verdict(&with_key, "{second} {prompt}", "{first}").await;
    assert_eq!(actual, Ok(preferred(1.0)));
    let plain = ChatSettings {
        system: String::new(),
        logprobs: false,
        ..settings()
    };
    verdict(&pool(&[server.url()], &plain), "a", "b")
        .await
        .unwrap();
    let requests = server.requests.lock().unwrap().clone();
    std::fs::remove_dir_all(folder).unwrap();
    let user = |content: &str| json!({"role": "user", "content": content});
    let system = json!({"role": "system", "content": "Judge."});
    let full = json!({
        "model": "some-judge",
        "messages": [system, user("say|{second} {prompt}|{first}")],
        "max_tokens": 16,
        "temperature": 0,
        "logprobs": true,
        "top_logprobs": 5,
    });
    let short = json!({
        "model": "some-judge",
        "messages": [user("say|a|b")],
        "max_tokens": 16,
        "temperature": 0,
    });
    let key = Some("Bearer sk-123".to_owned());
    assert_eq!(requests, [(key, full), (None, short)]);
}

#[tokio::test]
async fn verdicts_are_parsed_from_text_or_logprobs() {
    let server = FakeOpenAi::start(|_, user| match user {
        "say|p|-" => {
            let top = json!([
                {"token": "A", "logprob": 0.75f64.ln()},
                {"token": "B", "logprob": 0.25f64.ln()},
            ]);
            let tokens = json!([
                {"token": "[[", "logprob": 0.0, "top_logprobs": []},
                {"token": "A", "logprob": 0.75f64.ln(), "top_logprobs": top},
                {"token": "]]", "logprob": 0.0, "top_logprobs": []},
            ]);
            let message = json!({"role": "assistant", "content": "[[A]]"});
            let choice = json!({"message": message, "logprobs": {"content": tokens}});
            Json(json!({"choices": [choice]})).into_response()
        }
        "say|null|-" => {
            Json(json!({"choices": [{"message": {"content": null}, "logprobs": null}]}))
                .into_response()
        }
        user => reply(user.trim_start_matches("say|").trim_end_matches("|-")),
    })
    .await;
    let pool = pool(&[server.url()], &settings());
    for (content, expected) in [
        ("p", preferred(0.75)),
        ("Both are fine. [[C]]", preferred(0.5)),
        ("[[A]]? No: [[B]]", preferred(0.0)),
        ("nothing", abstained("no verdict in \"nothing\"")),
        ("null", abstained("no verdict in \"\"")),
    ] {
        assert_eq!(
            verdict(&pool, content, "-").await,
            Ok(expected),
            "{content}"
        );
    }
}

#[tokio::test]
async fn transient_failures_are_retried_and_bad_requests_are_not() {
    let rate_limited = || {
        let mut response = failure(429);
        let headers = response.headers_mut();
        headers.insert("retry-after", "0.001".parse().unwrap());
        response
    };
    let server = FakeOpenAi::start(move |before, user| match (before, user) {
        (_, "say|odd|-") => failure(400),
        (0, _) => failure(500),
        (1, _) => "no JSON".into_response(),
        (2, _) => "{}".into_response(),
        (3 | 4, _) => rate_limited(),
        (5, _) => failure(401),
        _ => reply("[[B]]"),
    })
    .await;
    let pool = pool(&[server.url()], &settings());
    assert_eq!(verdict(&pool, "a", "-").await, Ok(preferred(0.0)));
    assert_eq!(server.requests.lock().unwrap().len(), 7);
    let reason = "it answered 400 Bad Request: not now";
    assert_eq!(verdict(&pool, "odd", "-").await, Ok(abstained(reason)));
    assert_eq!(server.requests.lock().unwrap().len(), 8, "one request");
}

#[tokio::test]
async fn verdicts_of_the_model_before_a_change_are_not_taken_from_the_cache() {
    let server = FakeOpenAi::start(|before, _| {
        let model = if before == 0 { "m-1" } else { "m-2" };
        let message = json!({"role": "assistant", "content": "[[A]]"});
        Json(json!({"model": model, "choices": [{"message": message}]})).into_response()
    })
    .await;
    let cached = PoolSettings {
        cache_size: 8,
        ..pool_settings()
    };
    let judges = JudgeReplicas::chat(&endpoints(&[server.url()]), &settings()).expect("clients");
    let pool = JudgePool::new(judges, cached);
    for (first, requests) in [("a", 1), ("a", 1), ("b", 2), ("a", 3), ("a", 3), ("b", 4)] {
        assert_eq!(verdict(&pool, first, "-").await, Ok(preferred(1.0)));
        assert_eq!(server.requests.lock().unwrap().len(), requests, "{first}");
    }
}

#[tokio::test]
async fn no_request_is_lost_when_a_replica_dies() {
    let [dying, living] = [
        FakeOpenAi::start(|_, _| reply("[[A]]")).await,
        FakeOpenAi::start(|_, _| reply("[[A]]")).await,
    ];
    let pool = pool(&[dying.url(), living.url()], &settings());
    let compare = |i: usize| {
        let pool = pool.clone();
        tokio::spawn(async move { verdict(&pool, &i.to_string(), "-").await })
    };
    let mut tasks: Vec<_> = (0..50).map(compare).collect();
    // Both replicas are busy once the first verdict arrives.
    let first = tasks.remove(0).await.expect("no panic");
    assert_eq!(first, Ok(preferred(1.0)));
    drop(dying);
    tasks.extend((50..100).map(compare));
    for task in tasks {
        assert_eq!(task.await.expect("no panic"), Ok(preferred(1.0)));
    }
}

/// A port without a listener.
async fn unused_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn with_all_endpoints_unreachable_the_service_waits_until_one_returns() {
    let addresses = [
        unused_address().await,
        unused_address().await,
        unused_address().await,
    ];
    let urls = addresses.map(|address| format!("http://{address}/v1"));
    let pool = pool(&urls, &settings());
    let mut outage = pool.outage();
    let (pairs, pairs_receiver) = stream("pairs", 64);
    let (labelled, labels) = stream::<LabelledPair>("labelled pairs", 64);
    let (drops, dropped) = stream::<Dropped>("drops", 64);
    let counters = Arc::new(StageCounters::new(Stage::Preference));
    let service = PreferenceService::new(PreferenceServiceParts {
        apo: None,
        judge: pool,
        evaluation: Vec::new(),
        orders: OrdersSetting::One,
        penalties: crate::label_penalties::LabelPenalties::default(),
        pairs: pairs_receiver,
        limits: message_limits(2),
        weight_store: transport::WeightStore::default(),
        labelled,
        drops,
        counters: Arc::clone(&counters),
    });
    let waits = service.waits();
    for id in 0..20 {
        pairs.send(pair(id, &["a", "b"])).await.unwrap();
    }
    drop(pairs);
    let returning = async {
        let current = outage
            .wait_for(Option::is_some)
            .await
            .expect("the pool lives");
        let reason = current.as_ref().expect("it is some").reason.clone();
        drop(current);
        assert!(reason.contains("it cannot be reached"), "{reason}");
        let is_named = || {
            let mut waits = waits.current().into_iter();
            waits.any(|wait| wait.reason == "a judge: every circuit is open")
        };
        while !is_named() {
            tokio::task::yield_now().await;
        }
        assert_eq!(labels.counts().await.unwrap().sent, 0);
        FakeOpenAi::start_at(&addresses[1].to_string(), |_, _| reply("[[B]]")).await
    };
    let (_shutdown, running) = watch::channel(false);
    let (ended, server) = tokio::join!(service.run(running), returning);
    ended.expect("the stream ended");
    assert_eq!(labels.counts().await.unwrap().sent, 20, "nothing is lost");
    assert_eq!(dropped.counts().await.unwrap().sent, 0);
    assert_eq!(counters.snapshot().emitted, 20);
    assert!(server.requests.lock().unwrap().len() >= 20);
    assert_eq!(counters.snapshot().dropped.get(&DropReason::Failed), None);
}

/// A file of the shared data, in `$AGON_SHARED` or in `shared` beside the workspace. If it is missing, the test is
/// skipped with a message, or fails in continuous integration.
fn shared(path: &str) -> Option<std::path::PathBuf> {
    let root = std::env::var_os("AGON_SHARED").unwrap_or_else(|| "../shared".into());
    let workspace = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let found = workspace.join(root).join(path);
    if found.exists() {
        return Some(found);
    }
    let skipped = format!("SKIPPED the templates of FastChat: AGON_SHARED has no {path}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{skipped}");
    eprintln!("{skipped}");
    None
}

#[tokio::test]
async fn the_pair_templates_of_fastchat_work_with_renamed_placeholders() {
    let Some(path) = shared("data/prompts/fastchat_judge_prompts.jsonl") else {
        return;
    };
    let lines = std::fs::read_to_string(path).unwrap();
    let templates = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let templates: HashMap<String, Value> = templates
        .map(|template: Value| (template["name"].as_str().unwrap().to_owned(), template))
        .collect();
    let template = &templates["pair-v2"];
    let of = |key: &str| template[key].as_str().unwrap().to_owned();
    let placeholders = [
        ("{question}", "{prompt}"),
        ("{answer_a}", "{first}"),
        ("{answer_b}", "{second}"),
    ];
    let ours = placeholders
        .iter()
        .fold(of("prompt_template"), |text, (theirs, ours)| {
            assert!(text.contains(theirs), "{text}");
            text.replace(theirs, ours)
        });
    let server = FakeOpenAi::start(|_, user| {
        let position = |text: &str| {
            user.find(text)
                .unwrap_or_else(|| panic!("no {text:?} in {user}"))
        };
        let is_in_order = position("say") < position("the first answer")
            && position("the first answer") < position("{first}");
        reply(&format!(
            "Assistant A explains itself; assistant B does not. {}",
            if is_in_order { "[[A]]" } else { "[[B]]" }
        ))
    })
    .await;
    let settings = ChatSettings {
        system: of("system_prompt"),
        template: ours,
        ..settings()
    };
    let pool = pool(&[server.url()], &settings);
    let actual = verdict(&pool, "the first answer", "{first}").await;
    assert_eq!(actual, Ok(preferred(1.0)));
    let system = &server.requests.lock().unwrap()[0].1["messages"][0]["content"];
    assert!(system.as_str().unwrap().contains("[[C]]"), "{system}");
}

#[tokio::test]
async fn votes_are_sampled_with_seeds_of_their_own_and_averaged() {
    let server =
        FakeOpenAi::start(|before, _| reply(["[[A]]", "[[B]]", "[[A]]", "[[A]]"][before % 4]))
            .await;
    let endpoints = EndpointSettings {
        votes: 4,
        ..endpoints(&[server.url()])
    };
    let found = verdict(&pool_with(&endpoints, &settings()), "x", "y").await;
    assert_eq!(found.unwrap(), preferred(0.75));
    let requests = server.requests.lock().unwrap().clone();
    let seeds: std::collections::HashSet<_> = requests
        .iter()
        .map(|(_, body)| body["seed"].as_u64())
        .collect();
    assert_eq!((requests.len(), seeds.len()), (4, 4));
    assert!(
        requests.iter().all(|(_, body)| body["temperature"] == 0.5),
        "{requests:?}"
    );
}

#[tokio::test]
async fn pointwise_scores_of_an_endpoint_need_one_order() {
    let score = |_: usize, user: &str| {
        reply(if user.ends_with('x') {
            "[[9]]"
        } else {
            "[[5]]"
        })
    };
    let server = FakeOpenAi::start(score).await;
    let endpoints = EndpointSettings {
        form: VerdictForm::Pointwise,
        ..endpoints(&[server.url()])
    };
    let pool = pool_with(&endpoints, &settings());
    let preference = pool
        .compare(&request("x", "y"), Orders::Both)
        .await
        .unwrap();
    assert_eq!(preference.scores, Some([9.0, 5.0]));
    // Log-odds 4/2.
    let Verdict::Preference(p) = preference.verdict else {
        panic!("{preference:?}");
    };
    assert!((p.get() - 0.880_797).abs() < 1e-6, "{p:?}");
    let requests = server.requests.lock().unwrap().clone();
    assert_eq!(requests.len(), 2, "one for each response");
    assert!(
        requests.iter().all(|(_, body)| body["seed"].is_null()),
        "one vote is greedy"
    );
}
