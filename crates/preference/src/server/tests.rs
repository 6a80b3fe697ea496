//! The service over HTTP, asked over real sockets.

use std::path::Path;
use std::time::Duration;

use messages::{Dialogue, Finish, PromptText};
use reqwest::{Client, StatusCode};
use tokio::task::JoinHandle;

use super::*;
use crate::bench::fake::{FakeReplica, judges, settings as bench_settings};
use crate::bench::{BenchSettings, Judges, Question};
use crate::judge::fake::{abstained, pair, preferred};
use crate::{JudgeError, TextsAlone};

/// A service that runs until it is told to stop.
struct House {
    url: String,
    shutdown: watch::Sender<bool>,
    task: JoinHandle<Result<(), PreferenceError>>,
    client: Client,
}

fn limits() -> HttpServiceSettings {
    HttpServiceSettings {
        listen: "127.0.0.1:0".into(),
        token_path: std::path::PathBuf::new(),
        max_pairs: 3,
        max_bytes: 4096,
        max_characters: 100,
    }
}

impl House {
    async fn new(bench: Bench, settings: HttpServiceSettings) -> Self {
        Self::with_texts(bench, settings, Arc::new(TextsAlone)).await
    }

    async fn with_texts(
        bench: Bench,
        settings: HttpServiceSettings,
        texts: Arc<dyn Texts>,
    ) -> Self {
        let parts = ServerParts {
            bench,
            orders: OrdersSetting::Auto,
            texts,
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
        let url = format!("{}/v1/preferences", self.url);
        let response = self.client.post(url).body(body).send().await;
        answer(response.expect("it answers")).await
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

/// A judge of numbers that prefers the larger, always a little more what stands first, and abstains
/// from what is none.
fn larger() -> FakeReplica {
    FakeReplica::new(|batch| {
        let number = |text: &str| text.parse::<f32>().ok();
        let verdict = |q: &Question| {
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

fn bench(replica: FakeReplica) -> Bench {
    Bench::new(judges([replica]), bench_settings())
}

fn one() -> Value {
    json!({"prompt": "say", "first": "1", "second": "2"})
}

#[tokio::test]
async fn pairs_are_answered_in_their_order_and_in_the_orders_asked_for() {
    let house = House::new(bench(larger()), limits()).await;
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
            house.post(request.to_string()).await,
            (200, expected),
            "{orders:?}"
        );
    }
}

impl House {
    /// That this request is refused, and that the service goes on.
    async fn refuses(&self, body: String, status: u16, code: &str, says: &str) {
        let (seen, answer) = self.post(body.clone()).await;
        let error = &answer["error"];
        let expected = (status, &Value::from(code));
        assert_eq!((seen, &error["code"]), expected, "{body}: {answer}");
        let told = error["message"].as_str().expect("a sentence");
        assert!(told.contains(says), "{body}: {told}");
        let (status, _) = self.post(json!({"pairs": [one()]}).to_string()).await;
        assert_eq!(status, 200, "it goes on");
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let house = House::new(bench(larger()), limits()).await;
    let trailing = format!("{} x", json!({"pairs": [one()]}));
    for (body, says) in [
        ("what?", "line 1"),
        (r#"{"pairs": ["#, "EOF"),
        (&trailing, "trailing"),
        ("", "EOF"),
    ] {
        house.refuses(body.into(), 400, "malformed", says).await;
    }
    let large = " ".repeat(5000);
    let says = "preference.http.max_bytes = 4096";
    house.refuses(large, 413, "too_large", says).await;
    for (path, status, code) in [
        ("/", 404, "not_found"),
        ("/v1/preferences", 405, "method_not_allowed"),
    ] {
        let (seen, answer) = house.get(path).await;
        let code = Value::from(code);
        assert_eq!((seen, &answer["error"]["code"]), (status, &code), "{path}");
    }
}

#[tokio::test]
async fn a_request_that_cannot_be_answered_is_refused_by_the_name_of_its_field() {
    let house = House::new(bench(larger()), limits()).await;
    let with = |key: &str, value: Value| {
        let mut pair = one();
        pair[key] = value;
        json!({"pairs": [one(), pair]})
    };
    let long = "ä".repeat(101);
    let odd = json!({"pairs": [one()], "orders": "three"});
    for (request, says) in [
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
            "turn 1: nobody knows who",
        ),
        (with("first", "".into()), "pairs[1].first: it is empty"),
        (with("second", long.into()), "pairs[1].second: 101 char"),
    ] {
        let request = request.to_string();
        house.refuses(request, 422, "invalid", says).await;
    }
}

#[tokio::test]
async fn only_who_shows_the_token_is_answered_and_health_is_told_to_all() {
    let folder = std::env::temp_dir().join(format!("agon-token-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let token_path = folder.join("token");
    std::fs::write(&token_path, "sesame").unwrap();
    let guarded = HttpServiceSettings {
        token_path: token_path.clone(),
        ..limits()
    };
    let house = House::new(bench(larger()), guarded).await;
    let body = json!({"pairs": [one()]}).to_string();
    let (status, refusal) = house.post(body.clone()).await;
    assert_eq!(
        (status, &refusal["error"]["code"]),
        (401, &"unauthorized".into())
    );
    let url = format!("{}/v1/preferences", house.url);
    let request = house.client.post(url).bearer_auth("sesame").body(body);
    assert_eq!(request.send().await.unwrap().status(), StatusCode::OK);
    assert_eq!(house.get("/healthz").await.0, 200);
    assert_eq!(
        house.get("/readyz").await,
        (200, json!({"status": "ready"}))
    );

    let elsewhere = Judges::services(std::slice::from_ref(&house.url), &token_path).unwrap();
    let elsewhere = Bench::new(elsewhere, bench_settings());
    let question = Question::new(Arc::new(pair(0, &["1", "2"])), 0, 1);
    let ruling = elsewhere.rule(&question, Orders::One).await.unwrap();
    assert_eq!(ruling.verdict, preferred(0.5));
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn when_the_queue_is_full_one_is_told_to_come_again() {
    let (asked, mut is_asked) = tokio::sync::mpsc::unbounded_channel();
    let (open, gate) = watch::channel(false);
    // It says that it is asked, and is at it until the gate opens.
    struct Gated(
        tokio::sync::mpsc::UnboundedSender<()>,
        watch::Receiver<bool>,
    );
    impl crate::Replica for Gated {
        fn name(&self) -> &str {
            "gated"
        }
        fn ask<'a>(
            &'a self,
            batch: &'a [Question],
        ) -> futures_util::future::BoxFuture<'a, Result<Vec<crate::Answer>, JudgeError>> {
            Box::pin(async move {
                self.0.send(()).expect("the test goes on");
                self.1
                    .clone()
                    .wait_for(|open| *open)
                    .await
                    .expect("it opens");
                let answer = crate::Answer::new(preferred(0.5), messages::JudgeVersion(7));
                Ok(vec![answer; batch.len()])
            })
        }
    }
    let gated = Judges {
        replicas: vec![Arc::new(Gated(asked, gate))],
        ..judges([])
    };
    let narrow = BenchSettings {
        max_queue: 3,
        ..bench_settings()
    };
    let bench = Bench::new(gated, narrow);
    let house = Arc::new(House::new(bench.clone(), limits()).await);
    let request = || json!({"pairs": [one()], "orders": "one"}).to_string();
    let asking = || {
        let (house, body) = (Arc::clone(&house), request());
        tokio::spawn(async move { house.post(body).await.0 })
    };
    let first = asking();
    is_asked.recv().await.expect("it is asked");
    let six = json!({"pairs": [one(), one(), one()], "orders": "both"}).to_string();
    let waiting = {
        let house = Arc::clone(&house);
        tokio::spawn(async move { house.post(six).await.0 })
    };
    while bench.free_places() > 0 {
        tokio::task::yield_now().await;
    }
    let url = format!("{}/v1/preferences", house.url);
    let refused = house.client.post(url).body(request()).send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(answer(refused).await.1["error"]["code"], "busy");
    open.send_replace(true);
    assert_eq!((first.await.unwrap(), waiting.await.unwrap()), (200, 200));
}

#[tokio::test]
async fn while_no_judge_can_be_asked_the_service_is_not_ready_and_says_so() {
    let away = FakeReplica::new(|_| Err(JudgeError::new("no route")));
    let fragile = BenchSettings {
        circuit_failures: 1,
        circuit_probe: Duration::from_secs(3600),
        timeout: Duration::from_millis(50),
        ..bench_settings()
    };
    let house = House::new(Bench::new(judges([away]), fragile), limits()).await;
    assert_eq!(house.get("/readyz").await.0, 200);
    let (status, refusal) = house.post(json!({"pairs": [one()]}).to_string()).await;
    let error = &refusal["error"];
    assert_eq!(
        (status, &error["code"]),
        (503, &"unavailable".into()),
        "{error}"
    );
    let told = error["message"].as_str().unwrap();
    assert!(
        told.contains("every circuit of the judge is open (fake: no route)"),
        "{told}"
    );
    let (status, refusal) = house.get("/readyz").await;
    assert_eq!(
        (status, &refusal["error"]["code"]),
        (503, &"unavailable".into())
    );
    assert_eq!(house.get("/healthz").await.0, 200, "the process lives");
}

#[tokio::test]
async fn two_hundred_clients_at_once_are_all_answered() {
    let generous = BenchSettings {
        max_batch: 16,
        max_queue: 1024,
        cache_size: 64,
        ..bench_settings()
    };
    let replicas = [larger(), larger()];
    let house = House::new(Bench::new(judges(replicas), generous), limits()).await;
    let house = Arc::new(house);
    let clients = (0..200).map(|i| {
        let house = Arc::clone(&house);
        tokio::spawn(async move {
            let first = f64::from(i % 8) / 4.0;
            let pair = json!({"prompt": "say", "first": first.to_string(), "second": "1"});
            let (status, answer) = house.post(json!({"pairs": [pair]}).to_string()).await;
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
async fn a_shutdown_answers_what_is_in_hand_and_takes_no_more() {
    let slow = larger().delay(Duration::from_millis(20));
    let asked = slow.asked();
    let house = House::new(bench(slow), limits()).await;
    let url = format!("{}/v1/preferences", house.url);
    let request = Client::new()
        .post(&url)
        .body(json!({"pairs": [one()]}).to_string());
    let request = tokio::spawn(request.send());
    while asked.sizes().is_empty() {
        tokio::task::yield_now().await;
    }
    house.shutdown.send_replace(true);
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    house.task.await.expect("no panic").expect("it was stopped");
    let refused = Client::new().post(&url).send().await;
    assert!(refused.is_err_and(|error| error.is_connect()));
}

/// Writes a letter as its number in the alphabet, and ends with 0.
struct Letters;

impl Texts for Letters {
    fn prompt(&self, prompt: &PromptText) -> Result<(String, Vec<u32>), String> {
        match prompt {
            PromptText::Text(text) => {
                let ids = self.response(prompt, &[], text, Finish::EndOfText)?;
                Ok((text.clone(), ids))
            }
            PromptText::Dialogue(_) => Err("letters have no turns".into()),
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
                .ok_or_else(|| format!("{letter:?} is no letter"))
        };
        let end = (finish == Finish::EndOfText).then_some(Ok(0));
        text.chars().map(id).chain(end).collect()
    }

    fn has_ended(&self, ids: &[u32]) -> bool {
        ids.last() == Some(&0)
    }
}

#[tokio::test]
async fn texts_become_ids_unless_the_judges_own_ids_are_given() {
    let told = |batch: &[Question]| {
        let tell = |q: &Question| {
            let comparison = q.comparison();
            let (prompt, first) = (&comparison.prompt.ids, comparison.first);
            abstained(&format!("{prompt:?} {:?} {:?}", first.ids, first.finish))
        };
        Ok(batch.iter().map(tell).collect())
    };
    let house = House::with_texts(bench(FakeReplica::new(told)), limits(), Arc::new(Letters)).await;
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
        // The tokens of another tokenizer are not read.
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
            "pairs[0].second: 'C' is no letter",
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
        let (seen, answer) = house.post(json!({"pairs": [with(keys)]}).to_string()).await;
        let told = answer["results"][0]["abstained"].as_str();
        let told = told.or(answer["error"]["message"].as_str());
        assert_eq!((seen, told), (status, Some(expected)), "{keys:?}");
    }
}

#[tokio::test]
async fn a_service_asks_another_with_messages_and_with_how_each_response_ended() {
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let keep = move |batch: &[Question]| {
        for question in batch {
            let asked = question.comparison();
            tell.send((
                asked.prompt.clone(),
                asked.first.clone(),
                asked.second.clone(),
            ))
            .expect("the test listens");
        }
        Ok(vec![preferred(0.5); batch.len()])
    };
    let house = House::new(bench(FakeReplica::new(keep)), limits()).await;
    let elsewhere = Judges::services(std::slice::from_ref(&house.url), Path::new("")).unwrap();
    let elsewhere = Bench::new(elsewhere, bench_settings());
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
    let question = Question::new(Arc::new(pair), 0, 1);
    elsewhere.rule(&question, Orders::One).await.unwrap();
    let (prompt, first, second) = told.recv().await.expect("it was asked");
    assert_eq!(prompt.dialogue, Some(dialogue));
    assert_eq!(prompt.answer.as_deref(), Some("b"));
    assert_eq!(first.text, " the floor.");
    assert_eq!(
        [first.finish, second.finish],
        [Finish::Length, Finish::EndOfText]
    );
}
