//! The HTTP server over localhost sockets.

use std::path::Path;
use std::time::Duration;

use messages::{Dialogue, Finish, PromptText};
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, StatusCode};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;

use super::*;
use crate::error::JudgeError;
use crate::judge::fake::{abstained, pair, preferred};
use crate::pool::fake::{FakeReplica, judges, settings as pool_settings};
use crate::pool::{ComparisonRequest, JudgeReplicas, PoolSettings};
use crate::prompt_encoder::NoEncoding;

/// A running server with a client.
struct Harness {
    url: String,
    shutdown: watch::Sender<bool>,
    task: JoinHandle<()>,
    client: Client,
}

fn limits() -> HttpServiceSettings {
    HttpServiceSettings {
        listen: "127.0.0.1:0".into(),
        token_path: std::path::PathBuf::new(),
        max_connections: 1024,
        max_pairs: 3,
        max_bytes: 4096,
        max_characters: 100,
    }
}

impl Harness {
    async fn new(pool: JudgePool, settings: HttpServiceSettings) -> Self {
        Self::with_encoder(pool, settings, Arc::new(NoEncoding)).await
    }

    async fn with_encoder(
        pool: JudgePool,
        settings: HttpServiceSettings,
        encoder: Arc<dyn PromptEncoder>,
    ) -> Self {
        let parts = ServerParts {
            pool,
            orders: OrdersSetting::Auto,
            encoder,
            settings,
        };
        let server = Server::bind(parts).await.expect("a free port");
        let shutdown = watch::Sender::new(false);
        Self {
            url: format!("http://{}", server.address()),
            task: tokio::spawn(server.run(shutdown.subscribe())),
            shutdown,
            client: Client::new(),
        }
    }

    async fn post(&self, body: impl Into<reqwest::Body>) -> (u16, Value) {
        let response = self.request().body(body).send().await;
        answer(response.expect("it answers")).await
    }

    fn request(&self) -> reqwest::RequestBuilder {
        let url = format!("{}/v1/preferences", self.url);
        self.client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await;
        answer(response.expect("it answers")).await
    }
}

async fn answer(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, response.json().await.expect("every answer is JSON"))
}

/// Prefers the larger of two numbers with a bias toward the first, and abstains from other texts.
fn larger() -> FakeReplica {
    FakeReplica::new(|batch| {
        let number = |text: &str| text.parse::<f32>().ok();
        let verdict = |q: &ComparisonRequest| {
            let comparison = q.comparison();
            match (
                number(&comparison.first.text),
                number(&comparison.second.text),
            ) {
                (Some(a), Some(b)) => preferred(0.5 + (a - b) / 8.0 + 0.125),
                _ => abstained("not a number"),
            }
        };
        Ok(batch.iter().map(verdict).collect())
    })
}

fn pool(replica: FakeReplica) -> JudgePool {
    JudgePool::new(judges([replica]), pool_settings())
}

fn one() -> Value {
    json!({"prompt": "say", "first": "1", "second": "2"})
}

#[tokio::test]
async fn results_follow_the_pairs_and_the_requested_orders() {
    let harness = Harness::new(pool(larger()), limits()).await;
    let both = json!({"p": 0.625, "version": 7, "order_gap": 0.25});
    let dialogue = json!([{"role": "user", "content": "say"}]);
    let pairs = json!([
        {"prompt": "say", "first": "3", "second": "2"},
        {"prompt": dialogue, "first": "3", "second": "two"},
    ]);
    let abstention = json!({"abstained": "not a number"});
    for (orders, result) in [
        (None, both.clone()),
        (Some("auto"), both.clone()),
        (Some("both"), both),
        (Some("one"), json!({"p": 0.75, "version": 7})),
    ] {
        let mut request = json!({"pairs": pairs});
        if let Some(orders) = orders {
            request["orders"] = orders.into();
        }
        let results = json!([result, abstention]);
        let expected = json!({"judge": "fake", "version": 7, "results": results});
        assert_eq!(
            harness.post(request.to_string()).await,
            (200, expected),
            "{orders:?}"
        );
    }
}

impl Harness {
    /// Asserts that this request is rejected and that the server still answers.
    async fn rejects(&self, body: String, status: u16, code: &str, message: &str) {
        let (actual, answer) = self.post(body.clone()).await;
        let error = &answer["error"];
        let expected = (status, &Value::from(code));
        assert_eq!((actual, &error["code"]), expected, "{body}: {answer}");
        let text = error["message"].as_str().expect("a message");
        assert!(text.contains(message), "{body}: {text}");
        let (status, _) = self.post(json!({"pairs": [one()]}).to_string()).await;
        assert_eq!(status, 200, "it still answers");
    }
}

#[tokio::test]
async fn malformed_requests_are_rejected() {
    let harness = Harness::new(pool(larger()), limits()).await;
    let trailing = format!("{} x", json!({"pairs": [one()]}));
    for (body, message) in [
        ("what?", "line 1"),
        (r#"{"pairs": ["#, "EOF"),
        (&trailing, "trailing"),
        ("", "EOF"),
    ] {
        harness
            .rejects(body.into(), 400, "malformed", message)
            .await;
    }
    let large = " ".repeat(5000);
    let message = "preference.http.max_bytes = 4096";
    harness.rejects(large, 413, "too_large", message).await;
    for (path, status, code) in [
        ("/", 404, "not_found"),
        ("/v1/preferences", 405, "method_not_allowed"),
    ] {
        let (actual, answer) = harness.get(path).await;
        let code = Value::from(code);
        assert_eq!(
            (actual, &answer["error"]["code"]),
            (status, &code),
            "{path}"
        );
    }
}

#[tokio::test]
async fn invalid_requests_are_rejected_by_field_name() {
    let harness = Harness::new(pool(larger()), limits()).await;
    let with = |key: &str, value: Value| {
        let mut pair = one();
        pair[key] = value;
        json!({"pairs": [one(), pair]})
    };
    let long = "ä".repeat(101);
    let odd = json!({"pairs": [one()], "orders": "three"});
    for (request, message) in [
        (json!([]), "expected an object with pairs"),
        (json!({"pairs": []}), "pairs: there are none"),
        (json!({"pairs": vec![one(); 4]}), "pairs: 4 are more"),
        (odd, "orders: "),
        (with("frist", "1".into()), "pairs[1].frist"),
        (with("second", 2.into()), "pairs[1].second"),
        (with("prompt", json!({})), "pairs[1].prompt: a prompt is"),
        (with("prompt", json!([])), "pairs[1].prompt: the list"),
        (
            with(
                "prompt",
                json!([{"role": "user", "content": [{"type": "image"}]}]),
            ),
            "turn 1: the content has a part of type",
        ),
        (
            with("prompt", json!([{"from": "narrator", "value": "x"}])),
            "turn 1: unknown speaker",
        ),
        (with("first", "".into()), "pairs[1].first: it is empty"),
        (with("second", long.into()), "pairs[1].second: 101 char"),
    ] {
        let request = request.to_string();
        harness.rejects(request, 422, "invalid", message).await;
    }
}

#[tokio::test]
async fn pages_of_other_sites_get_no_answer() {
    let replica = larger();
    let batches = replica.batches();
    let harness = Harness::new(pool(replica), limits()).await;
    let body = json!({"pairs": [one()]}).to_string();
    let request = || {
        harness
            .client
            .post(format!("{}/v1/preferences", harness.url))
    };
    let json = "application/json";
    for (name, value, status, code) in [
        ("content-type", "text/plain", 415, "unsupported_media_type"),
        (
            "content-type",
            "text/plain; a=application/json",
            415,
            "unsupported_media_type",
        ),
        ("content-type", "", 415, "unsupported_media_type"),
        ("origin", "https://evil.example", 403, "foreign_origin"),
        ("origin", "null", 403, "foreign_origin"),
        ("host", "evil.example", 403, "foreign_host"),
    ] {
        let mut request = request().body(body.clone()).header(name, value);
        if name != "content-type" {
            request = request.header("content-type", json);
        }
        let (actual, answer) = answer(request.send().await.unwrap()).await;
        let error = &answer["error"];
        assert_eq!(
            (actual, &error["code"]),
            (status, &code.into()),
            "{name}: {value}: {answer}"
        );
    }
    let (status, _) = answer(request().body(body.clone()).send().await.unwrap()).await;
    assert_eq!(status, 415, "without a type");
    assert!(batches.sizes().is_empty(), "a judge was called");
    let typed = request().header("content-type", "Application/JSON; charset=utf-8");
    assert_eq!(answer(typed.body(body).send().await.unwrap()).await.0, 200);
    let url = format!("{}/readyz", harness.url);
    let foreign = harness.client.get(url).header("host", "evil.example");
    assert_eq!(answer(foreign.send().await.unwrap()).await.0, 403);
}

#[tokio::test]
async fn a_request_that_is_too_large_is_read_before_it_is_refused() {
    let harness = Harness::new(pool(larger()), limits()).await;
    for size in [4097, 16 << 20] {
        let body = " ".repeat(size);
        let message = "preference.http.max_bytes = 4096";
        harness.rejects(body, 413, "too_large", message).await;
    }
}

#[tokio::test]
async fn the_memory_for_bodies_is_bounded() {
    let narrow = HttpServiceSettings {
        max_bytes: 1024,
        ..limits()
    };
    let harness = Harness::new(pool(larger()), narrow).await;
    let address = harness.url.strip_prefix("http://").unwrap();
    let head = format!(
        "POST /v1/preferences HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Content-Length: 1024\r\n\r\n"
    );
    let mut held = Vec::new();
    let mut status = 200;
    // Each request holds the memory for its body, which does not arrive.
    for _ in 0..200 {
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        client.write_all(head.as_bytes()).await.unwrap();
        held.push(client);
        status = harness.post(json!({"pairs": [one()]}).to_string()).await.0;
        if status != 200 {
            break;
        }
    }
    assert_eq!(status, 429, "after {} requests", held.len());
    drop(held);
    while harness.post(json!({"pairs": [one()]}).to_string()).await.0 != 200 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_address_beyond_loopback_needs_a_token() {
    let open = HttpServiceSettings {
        listen: "0.0.0.0:0".into(),
        ..limits()
    };
    let parts = ServerParts {
        pool: pool(larger()),
        orders: OrdersSetting::Auto,
        encoder: Arc::new(NoEncoding),
        settings: open,
    };
    let error = Server::bind(parts).await.err().expect("it is refused");
    assert!(
        error.to_string().contains("preference.http.token_path"),
        "{error}"
    );
    assert!(Server::check("0.0.0.0:0", None).is_err());
    Server::check("0.0.0.0:0", Some("sesame-sesame-sesame")).unwrap();
}

#[tokio::test]
async fn only_preferences_require_the_token() {
    let folder = std::env::temp_dir().join(format!("agon-token-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let token_path = folder.join("token");
    std::fs::write(&token_path, "sesame-sesame-sesame").unwrap();
    let with_token = HttpServiceSettings {
        token_path: token_path.clone(),
        ..limits()
    };
    let harness = Harness::new(pool(larger()), with_token).await;
    let body = json!({"pairs": [one()]}).to_string();
    let (status, response) = harness.post(body.clone()).await;
    assert_eq!(
        (status, &response["error"]["code"]),
        (401, &"unauthorized".into())
    );
    let request = harness
        .request()
        .bearer_auth("sesame-sesame-sesame")
        .body(body);
    assert_eq!(request.send().await.unwrap().status(), StatusCode::OK);
    assert_eq!(harness.get("/healthz").await.0, 200);
    assert_eq!(
        harness.get("/readyz").await,
        (200, json!({"status": "ready"}))
    );

    let remote = JudgeReplicas::services(std::slice::from_ref(&harness.url), &token_path).unwrap();
    let remote = JudgePool::new(remote, pool_settings());
    let request = ComparisonRequest::new(Arc::new(pair(0, &["1", "2"])), 0, 1);
    let preference = remote.compare(&request, Orders::One).await.unwrap();
    assert_eq!(preference.verdict, preferred(0.5));
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_full_queue_is_429_with_retry_after() {
    let (started, mut batch_started) = tokio::sync::mpsc::unbounded_channel();
    let (open, gate) = watch::channel(false);
    // Signals each batch and answers when the gate opens.
    struct Gated(
        tokio::sync::mpsc::UnboundedSender<()>,
        watch::Receiver<bool>,
    );
    impl crate::pool::Replica for Gated {
        fn name(&self) -> &str {
            "gated"
        }
        fn judge<'a>(
            &'a self,
            batch: &'a [ComparisonRequest],
        ) -> futures_util::future::BoxFuture<
            'a,
            Result<Vec<crate::pool::VersionedVerdict>, JudgeError>,
        > {
            Box::pin(async move {
                self.0.send(()).expect("the test receives");
                self.1
                    .clone()
                    .wait_for(|open| *open)
                    .await
                    .expect("it opens");
                let answer =
                    crate::pool::VersionedVerdict::new(preferred(0.5), messages::JudgeVersion(7));
                Ok(vec![answer; batch.len()])
            })
        }
    }
    let gated = JudgeReplicas {
        replicas: vec![Arc::new(Gated(started, gate))],
        ..judges([])
    };
    let narrow = PoolSettings {
        max_queue: 3,
        ..pool_settings()
    };
    let pool = JudgePool::new(gated, narrow);
    let harness = Arc::new(Harness::new(pool.clone(), limits()).await);
    let request = || json!({"pairs": [one()], "orders": "one"}).to_string();
    let post = || {
        let (harness, body) = (Arc::clone(&harness), request());
        tokio::spawn(async move { harness.post(body).await.0 })
    };
    let first = post();
    batch_started.recv().await.expect("it is called");
    let six = json!({"pairs": [one(), one(), one()], "orders": "both"}).to_string();
    let waiting = {
        let harness = Arc::clone(&harness);
        tokio::spawn(async move { harness.post(six).await.0 })
    };
    while pool.free_permits() > 0 {
        tokio::task::yield_now().await;
    }
    let rejected = harness.request().body(request()).send().await.unwrap();
    assert_eq!(rejected.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(rejected.headers()["retry-after"], "1");
    assert_eq!(answer(rejected).await.1["error"]["code"], "busy");
    open.send_replace(true);
    assert_eq!((first.await.unwrap(), waiting.await.unwrap()), (200, 200));
}

#[tokio::test]
async fn during_an_outage_the_server_is_not_ready() {
    let failing = FakeReplica::new(|_| Err(JudgeError::new("no route")));
    let fragile = PoolSettings {
        circuit_failures: 1,
        circuit_probe: Duration::from_secs(3600),
        timeout: Duration::from_millis(50),
        ..pool_settings()
    };
    let harness = Harness::new(JudgePool::new(judges([failing]), fragile), limits()).await;
    assert_eq!(harness.get("/readyz").await.0, 200);
    let (status, response) = harness.post(json!({"pairs": [one()]}).to_string()).await;
    let error = &response["error"];
    assert_eq!(
        (status, &error["code"]),
        (503, &"unavailable".into()),
        "{error}"
    );
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("every circuit breaker of the judge is open (fake: no route)"),
        "{message}"
    );
    let (status, response) = harness.get("/readyz").await;
    assert_eq!(
        (status, &response["error"]["code"]),
        (503, &"unavailable".into())
    );
    assert_eq!(harness.get("/healthz").await.0, 200, "the process lives");
}

#[tokio::test]
async fn two_hundred_concurrent_clients_are_answered() {
    let generous = PoolSettings {
        max_batch: 16,
        max_queue: 1024,
        cache_size: 64,
        ..pool_settings()
    };
    let replicas = [larger(), larger()];
    let harness = Harness::new(JudgePool::new(judges(replicas), generous), limits()).await;
    let harness = Arc::new(harness);
    let clients = (0..200).map(|i| {
        let harness = Arc::clone(&harness);
        tokio::spawn(async move {
            let first = f64::from(i % 8) / 4.0;
            let pair = json!({"prompt": "say", "first": first.to_string(), "second": "1"});
            let (status, answer) = harness.post(json!({"pairs": [pair]}).to_string()).await;
            (
                status,
                answer["results"][0]["p"].clone(),
                0.5 + (first - 1.0) / 8.0,
            )
        })
    });
    for client in clients.collect::<Vec<_>>() {
        let (status, p, expected) = client.await.expect("no panic");
        assert_eq!((status, p), (200, json!(expected)));
    }
}

#[tokio::test]
async fn a_shutdown_answers_requests_in_progress_and_accepts_no_more() {
    let slow = larger().delay(Duration::from_millis(20));
    let batches = slow.batches();
    let harness = Harness::new(pool(slow), limits()).await;
    let url = format!("{}/v1/preferences", harness.url);
    let request = harness
        .request()
        .body(json!({"pairs": [one()]}).to_string());
    let request = tokio::spawn(request.send());
    while batches.sizes().is_empty() {
        tokio::task::yield_now().await;
    }
    harness.shutdown.send_replace(true);
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    harness.task.await.expect("no panic");
    let error = Client::new().post(&url).send().await;
    assert!(error.is_err_and(|error| error.is_connect()));
}

/// Encodes a letter as its index in the alphabet, from 1, and end-of-text as 0.
struct AlphabetEncoder;

impl PromptEncoder for AlphabetEncoder {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        match prompt {
            PromptText::Text(text) => {
                let ids = self.response(prompt, &[], text, Finish::EndOfText)?;
                Ok((text.clone(), ids))
            }
            PromptText::Dialogue(_) => Err("dialogues are not supported".into()),
        }
    }

    fn response(
        &self,
        _: &PromptText,
        _: &[u32],
        text: &str,
        finish: Finish,
    ) -> Result<Vec<u32>, String> {
        let id = |letter: char| {
            let is_known = letter.is_ascii_lowercase();
            is_known
                .then(|| u32::from(letter) - u32::from('a') + 1)
                .ok_or_else(|| format!("{letter:?} is not a letter"))
        };
        let end = (finish == Finish::EndOfText).then_some(Ok(0));
        text.chars().map(id).chain(end).collect()
    }

    fn has_ended(&self, ids: &[u32]) -> bool {
        ids.last() == Some(&0)
    }
}

#[tokio::test]
async fn texts_are_encoded_unless_the_judges_own_ids_are_given() {
    let echo = |batch: &[ComparisonRequest]| {
        let echo_one = |q: &ComparisonRequest| {
            let comparison = q.comparison();
            let (prompt, first) = (&comparison.prompt.ids, comparison.first);
            abstained(&format!("{prompt:?} {:?} {:?}", first.ids, first.finish))
        };
        Ok(batch.iter().map(echo_one).collect())
    };
    let pool = pool(FakeReplica::new(echo));
    let harness = Harness::with_encoder(pool, limits(), Arc::new(AlphabetEncoder)).await;
    let with = |keys: &[(&str, Value)]| {
        let mut pair = json!({"prompt": "a", "first": "b", "second": "c"});
        for (key, value) in keys {
            pair[*key] = value.clone();
        }
        pair
    };
    let (own, foreign) = (json!([1, 0]), json!([9]));
    for (keys, status, expected) in [
        (&[][..], 200, "[1, 0] [2, 0] EndOfText"),
        (&[("first_ids", json!([7]))], 200, "[1, 0] [7] Length"),
        (&[("first_ids", json!([0]))], 200, "[1, 0] [0] EndOfText"),
        (
            &[("prompt_ids", own), ("first_ids", json!([7]))],
            200,
            "[1, 0] [7] Length",
        ),
        // Ids of another tokenizer are ignored.
        (
            &[
                ("prompt_ids", foreign.clone()),
                ("first_ids", json!([8, 8])),
            ],
            200,
            "[1, 0] [2, 0] EndOfText",
        ),
        (
            &[
                ("prompt_ids", foreign),
                ("first_ids", json!([8, 8])),
                ("first_finish", "length".into()),
            ],
            200,
            "[1, 0] [2] Length",
        ),
        (
            &[("first_finish", "length".into())],
            200,
            "[1, 0] [2] Length",
        ),
        (
            &[("first_finish", "stop".into())],
            200,
            "[1, 0] [2, 0] EndOfText",
        ),
        (
            &[("second", "C".into())],
            422,
            "pairs[0].second: 'C' is not a letter",
        ),
        (
            &[("prompt", json!([{"role": "user"}]))],
            422,
            "pairs[0].prompt: turn 1: the turn of the user has no content",
        ),
        (
            &[("tools", json!([{}]))],
            422,
            "pairs[0].tools: tools and template_kwargs go with a prompt of messages, not with text",
        ),
    ] {
        let (actual, answer) = harness
            .post(json!({"pairs": [with(keys)]}).to_string())
            .await;
        let text = answer["results"][0]["abstained"].as_str();
        let text = text.or(answer["error"]["message"].as_str());
        assert_eq!((actual, text), (status, Some(expected)), "{keys:?}");
    }
}

#[tokio::test]
async fn a_remote_service_gets_messages_and_finish_reasons() {
    let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
    let record = move |batch: &[ComparisonRequest]| {
        for request in batch {
            let comparison = request.comparison();
            sender
                .send((
                    comparison.prompt.clone(),
                    comparison.first.clone(),
                    comparison.second.clone(),
                ))
                .expect("the test receives");
        }
        Ok(vec![preferred(0.5); batch.len()])
    };
    let harness = Harness::new(pool(FakeReplica::new(record)), limits()).await;
    let remote =
        JudgeReplicas::services(std::slice::from_ref(&harness.url), Path::new("")).unwrap();
    let remote = JudgePool::new(remote, pool_settings());
    let mut pair = pair(0, &[" the floor.", "b"]);
    pair.completions[0].finish = Finish::Length;
    pair.prompt.text = "the policy's rendering".into();
    pair.prompt.answer = Some("b".into());
    let dialogue = Dialogue {
        tools: vec![json!({"name": "look"})],
        template_kwargs: serde_json::from_value(json!({"enable_thinking": false})).unwrap(),
        ..Dialogue::of_user("Where?")
    };
    pair.prompt.dialogue = Some(dialogue.clone());
    let request = ComparisonRequest::new(Arc::new(pair), 0, 1);
    remote.compare(&request, Orders::One).await.unwrap();
    let (prompt, first, second) = received.recv().await.expect("it was called");
    assert_eq!(prompt.dialogue, Some(dialogue));
    assert_eq!(prompt.answer.as_deref(), Some("b"));
    assert_eq!(first.text, " the floor.");
    assert_eq!(
        [first.finish, second.finish],
        [Finish::Length, Finish::EndOfText]
    );
}
