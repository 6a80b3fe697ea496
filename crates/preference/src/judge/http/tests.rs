//! The chat judge against servers on this machine that speak as OpenAI's do.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;

use axum::Router;
use axum::extract::Request;
use axum::http::header::AUTHORIZATION;
use axum::response::{IntoResponse, Json, Response};
use messages::{DropReason, Dropped, LabelledPair, Station};
use settings::OrdersSetting;
use telemetry::StationCounters;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use transport::stream;

use super::*;
use crate::Verdict;
use crate::bench::fake::{question, settings as bench_settings};
use crate::bench::{Bench, BenchSettings, Orders};
use crate::judge::chat::tests::settings;
use crate::judge::fake::{abstained, pair, preferred};
use crate::{Preference, PreferenceParts, RulingError};

/// Settings of a judge at these addresses.
fn endpoints(urls: &[String]) -> EndpointSettings {
    EndpointSettings {
        urls: urls.to_vec(),
        model: "some-judge".into(),
        api_key_path: std::path::PathBuf::new(),
        concurrency: 8,
    }
}

/// A server that answers every chat completion as it is told; it ends when this is dropped.
struct FakeOpenAi {
    address: SocketAddr,
    task: JoinHandle<()>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// A request: its key and its body.
type Asked = (Option<String>, Value);

impl FakeOpenAi {
    /// `answer` is given how many requests came before, and what the user says.
    async fn start(answer: impl Fn(usize, &str) -> Response + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", answer).await
    }

    async fn start_at(
        address: &str,
        answer: impl Fn(usize, &str) -> Response + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let seen = Arc::clone(&asked);
        let answer = Arc::new(answer);
        let handler = move |request: Request| {
            let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
            async move {
                assert_eq!(request.uri().path(), "/v1/chat/completions");
                let key = request.headers().get(AUTHORIZATION);
                let key = key.map(|key| key.to_str().unwrap().to_owned());
                let body = axum::body::to_bytes(request.into_body(), 1 << 20).await;
                let body: Value = serde_json::from_slice(&body.unwrap()).unwrap();
                let messages = body["messages"].as_array().unwrap();
                let said = messages.last().unwrap()["content"].as_str().unwrap();
                let said = said.to_owned();
                let before = {
                    let mut seen = seen.lock().unwrap();
                    seen.push((key, body));
                    seen.len() - 1
                };
                answer(before, &said)
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
            asked,
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

/// A chat completion that says this.
fn says(content: &str) -> Response {
    let message = json!({"role": "assistant", "content": content});
    Json(json!({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}))
        .into_response()
}

fn fails(status: u16) -> Response {
    let status = axum::http::StatusCode::from_u16(status).unwrap();
    (status, "not now").into_response()
}

/// A bench whose judges are at these addresses, and which does not wait long between attempts.
fn bench(urls: &[String], chat: &ChatSettings) -> Bench {
    bench_of(&endpoints(urls), chat)
}

fn bench_of(endpoints: &EndpointSettings, chat: &ChatSettings) -> Bench {
    let judges = Judges::chat(endpoints, chat).expect("clients");
    let quick = BenchSettings {
        retry_base: std::time::Duration::from_millis(1),
        circuit_probe: std::time::Duration::from_millis(10),
        ..bench_settings()
    };
    Bench::new(judges, quick)
}

async fn verdict(bench: &Bench, first: &str, second: &str) -> Result<Verdict, RulingError> {
    let ruling = bench.rule(&question(first, second), Orders::One).await;
    ruling.map(|ruling| ruling.verdict)
}

#[tokio::test]
async fn a_question_is_asked_as_the_settings_say_and_no_text_is_expanded() {
    let server = FakeOpenAi::start(|_, _| says("[[A]]")).await;
    let folder = std::env::temp_dir().join(format!("agon-chat-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let api_key_path = folder.join("key");
    std::fs::write(&api_key_path, "sk-123\n").unwrap();
    let with_key = EndpointSettings {
        api_key_path,
        ..endpoints(&[server.url()])
    };
    let with_key = bench_of(&with_key, &settings());
    let seen = verdict(&with_key, "{second} {prompt}", "{first}").await;
    assert_eq!(seen, Ok(preferred(1.0)));
    let plain = ChatSettings {
        system: String::new(),
        logprobs: false,
        ..settings()
    };
    verdict(&bench(&[server.url()], &plain), "a", "b")
        .await
        .unwrap();
    let asked = server.asked.lock().unwrap().clone();
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
    assert_eq!(asked, [(key, full), (None, short)]);
}

#[tokio::test]
async fn verdicts_are_read_from_words_or_from_log_probabilities() {
    let server = FakeOpenAi::start(|_, said| match said {
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
        said => says(said.trim_start_matches("say|").trim_end_matches("|-")),
    })
    .await;
    let bench = bench(&[server.url()], &settings());
    for (said, expected) in [
        ("p", preferred(0.75)),
        ("Both are fine. [[C]]", preferred(0.5)),
        ("[[A]]? No: [[B]]", preferred(0.0)),
        ("nothing", abstained("no verdict in \"nothing\"")),
        ("null", abstained("no verdict in \"\"")),
    ] {
        assert_eq!(verdict(&bench, said, "-").await, Ok(expected), "{said}");
    }
}

#[tokio::test]
async fn what_may_pass_is_asked_again_and_a_bad_request_is_not() {
    let busy = || {
        let mut response = fails(429);
        let headers = response.headers_mut();
        headers.insert("retry-after", "0.001".parse().unwrap());
        response
    };
    let server = FakeOpenAi::start(move |before, said| match (before, said) {
        (_, "say|odd|-") => fails(400),
        (0, _) => fails(500),
        (1, _) => "no JSON".into_response(),
        (2, _) => "{}".into_response(),
        (3 | 4, _) => busy(),
        (5, _) => fails(401),
        _ => says("[[B]]"),
    })
    .await;
    let patient = bench(&[server.url()], &settings());
    assert_eq!(verdict(&patient, "a", "-").await, Ok(preferred(0.0)));
    assert_eq!(server.asked.lock().unwrap().len(), 7);
    let reason = "it answered 400 Bad Request: not now";
    assert_eq!(verdict(&patient, "odd", "-").await, Ok(abstained(reason)));
    assert_eq!(server.asked.lock().unwrap().len(), 8, "asked once");
}

#[tokio::test]
async fn a_replica_that_dies_in_the_middle_loses_nothing() {
    let [dying, living] = [
        FakeOpenAi::start(|_, _| says("[[A]]")).await,
        FakeOpenAi::start(|_, _| says("[[A]]")).await,
    ];
    let bench = bench(&[dying.url(), living.url()], &settings());
    let asking = |i: usize| {
        let bench = bench.clone();
        tokio::spawn(async move { verdict(&bench, &i.to_string(), "-").await })
    };
    let mut tasks: Vec<_> = (0..50).map(asking).collect();
    // The first answer shows that both are at work.
    let first = tasks.remove(0).await.expect("no panic");
    assert_eq!(first, Ok(preferred(1.0)));
    drop(dying);
    tasks.extend((50..100).map(asking));
    for task in tasks {
        assert_eq!(task.await.expect("no panic"), Ok(preferred(1.0)));
    }
}

/// A port on which nobody listens.
async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn with_all_three_away_the_service_waits_by_name_until_one_returns() {
    let addresses = [nobody().await, nobody().await, nobody().await];
    let urls = addresses.map(|address| format!("http://{address}/v1"));
    let bench = bench(&urls, &settings());
    let mut outage = bench.outage();
    let (pairs, intake) = stream("pairs", 64);
    let (labelled, labels) = stream::<LabelledPair>("labelled pairs", 64);
    let (drops, dropped) = stream::<Dropped>("drops", 64);
    let counters = Arc::new(StationCounters::new(Station::Preference));
    let service = Preference::new(PreferenceParts {
        player: None,
        judge: bench,
        gold: None,
        orders: OrdersSetting::One,
        pairs: intake,
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
        let told = outage.wait_for(Option::is_some).await.expect("it goes on");
        let reason = told.as_ref().expect("it is there").reason.clone();
        drop(told);
        assert!(reason.contains("it cannot be reached"), "{reason}");
        let is_named = || {
            let mut waits = waits.current().into_iter();
            waits.any(|wait| wait.reason == "a judge: every circuit is open")
        };
        while !is_named() {
            tokio::task::yield_now().await;
        }
        assert_eq!(labels.counts().await.unwrap().sent, 0);
        FakeOpenAi::start_at(&addresses[1].to_string(), |_, _| says("[[B]]")).await
    };
    let (_shutdown, running) = watch::channel(false);
    let (ended, server) = tokio::join!(service.run(running), returning);
    ended.expect("the stream ended");
    assert_eq!(labels.counts().await.unwrap().sent, 20, "nothing is lost");
    assert_eq!(dropped.counts().await.unwrap().sent, 0);
    assert_eq!(counters.snapshot().given, 20);
    assert!(server.asked.lock().unwrap().len() >= 20);
    assert_eq!(counters.snapshot().dropped.get(&DropReason::Failed), None);
}

/// A file of the shared data, `$AGON_SHARED` or `shared` beside the workspace; skipped aloud where it
/// is not there, which continuous integration does not accept.
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
async fn the_pair_templates_of_fastchat_work_once_their_places_have_our_names() {
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
    let places = [
        ("{question}", "{prompt}"),
        ("{answer_a}", "{first}"),
        ("{answer_b}", "{second}"),
    ];
    let ours = places
        .iter()
        .fold(of("prompt_template"), |text, (theirs, ours)| {
            assert!(text.contains(theirs), "{text}");
            text.replace(theirs, ours)
        });
    let server = FakeOpenAi::start(|_, said| {
        let place = |text: &str| {
            said.find(text)
                .unwrap_or_else(|| panic!("no {text:?} in {said}"))
        };
        let is_in_order = place("say") < place("the first answer")
            && place("the first answer") < place("{first}");
        says(&format!(
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
    let bench = bench(&[server.url()], &settings);
    let seen = verdict(&bench, "the first answer", "{first}").await;
    assert_eq!(seen, Ok(preferred(1.0)));
    let system = &server.asked.lock().unwrap()[0].1["messages"][0]["content"];
    assert!(system.as_str().unwrap().contains("[[C]]"), "{system}");
}
