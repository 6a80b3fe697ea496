//! Judges behind HTTP that misbehave: each answer is read as what it is, or refused and named; nothing is lost.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use system_tests::{
    FakeChat, FakeChatRequest, FakeChatResponse, RunningProcess, Sandbox, config, free_port, http,
    shared, tiny_playground, wait_until,
};

/// Starts `agon preference` with a judge at `url` and these settings; returns the process and its address.
fn serve(sandbox: &Sandbox, judge: &str, sets: &[&str]) -> (RunningProcess, String) {
    let path = config("default.toml").display().to_string();
    let judge = format!("preference.judge={judge}");
    let listen = "preference.http.listen=\"127.0.0.1:0\"";
    let mut arguments = vec!["preference", &path, "--set", listen, "--set", &judge];
    arguments.extend(sets.iter().flat_map(|set| ["--set", *set]));
    let mut running = sandbox.start(&arguments);
    let [stdout, _] = running.output_files();
    let address = running.until("its address", || {
        let text = fs::read_to_string(&stdout).ok()?;
        Some(text.split_once('\n')?.0.to_owned())
    });
    (running, address)
}

/// The settings of a chat judge at `url`, with further keys.
fn chat(url: &str, keys: &str) -> String {
    format!("{{ kind = \"http\", urls = [\"{url}/v1\"], model = \"judge\"{keys} }}")
}

/// Compares two responses to `prompt` in one order.
fn compare(address: &str, prompt: &str) -> (u16, Value) {
    let pair = json!({"prompt": prompt, "first": "one", "second": "two"});
    let body = json!({"pairs": [pair], "orders": "one"}).to_string();
    http(address, "POST", "/v1/preferences", &body)
}

/// Waits until the judge fails on `prompt` with a reason that holds `says`: a busy machine may be slower than the
/// judge's timeout.
fn until_it_fails(address: &str, prompt: &str, says: &str) {
    wait_until(&format!("{says:?} for {prompt:?}"), || {
        let (status, answer) = compare(address, prompt);
        assert_eq!(status, 503, "{prompt}: {answer}");
        let message = answer["error"]["message"].as_str()?;
        message.contains(says).then_some(())
    });
}

/// The prompt in a request with the default template.
fn prompt_of(request: &FakeChatRequest) -> &str {
    let after = request.text().split_once("[Prompt]\n");
    after
        .and_then(|(_, rest)| Some(rest.split_once('\n')?.0))
        .unwrap_or_default()
}

/// A completion whose choice is this.
fn choice(choice: &Value) -> FakeChatResponse {
    FakeChatResponse::json(200, &json!({"model": "judge", "choices": [choice]}))
}

/// An answer of "A" with these log-probabilities.
fn scored(top_logprobs: &Value) -> FakeChatResponse {
    let token = json!({"token": "A", "logprob": -0.1, "top_logprobs": top_logprobs});
    choice(&json!({"message": {"content": "A"}, "logprobs": {"content": [token]}}))
}

fn answer(prompt: &str) -> FakeChatResponse {
    let length = json!("length");
    match prompt {
        "null top_logprobs" => scored(&Value::Null),
        "no candidates" => scored(&json!([])),
        "null logprobs" => choice(&json!({"message": {"content": "B"}, "logprobs": null})),
        "null content of logprobs" => {
            choice(&json!({"message": {"content": "B"}, "logprobs": {"content": null}}))
        }
        "logprobs" => scored(&json!([
            {"token": "A", "logprob": 0.5f64.ln()},
            {"token": " A", "logprob": 0.25f64.ln()},
            {"token": "B", "logprob": 0.25f64.ln()},
        ])),
        "parts" => choice(&json!({"message": {"content": [{"type": "text", "text": "A"}]}})),
        "reasoning" => choice(&json!({"message": {"content": "<think>A? No.</think>B"}})),
        "byte order mark" => {
            let response = FakeChatResponse::completion("judge", "A");
            FakeChatResponse {
                body: format!("\u{feff}{}", response.body),
                ..response
            }
        }
        "null content" => choice(&json!({"message": {"content": null}, "finish_reason": length})),
        "refusal" => choice(&json!({"message": {"content": null, "refusal": "I cannot"}})),
        "unfinished reasoning" => {
            choice(&json!({"message": {"content": "<think>A?"}, "finish_reason": length}))
        }
        "banana" => choice(&json!({"message": {"content": "banana"}})),
        "status 400" => FakeChatResponse::json(
            400,
            &json!({"error": {"message": "max_tokens is not known"}}),
        ),
        other => panic!("no answer for {other:?}"),
    }
}

#[test]
fn answers_with_null_and_missing_fields_are_read_as_what_they_are() {
    let server = FakeChat::start(|_, request| answer(prompt_of(request)));
    let sandbox = Sandbox::new();
    let letters = [
        "preference.chat.first_verdict=\"A\"",
        "preference.chat.second_verdict=\"B\"",
        "preference.chat.tie_verdict=\"\"",
        "preference.chat.max_tokens=16",
    ];
    let (running, address) = serve(&sandbox, &chat(&server.url(), ""), &letters);
    for (prompt, expected) in [
        ("null top_logprobs", 1.0),
        ("no candidates", 1.0),
        ("null logprobs", 0.0),
        ("null content of logprobs", 0.0),
        ("logprobs", 0.75),
        ("parts", 1.0),
        ("reasoning", 0.0),
        ("byte order mark", 1.0),
    ] {
        let (status, answer) = compare(&address, prompt);
        assert_eq!(status, 200, "{prompt}: {answer}");
        let p = answer["results"][0]["p"].as_f64();
        assert!(
            p.is_some_and(|p| (p - expected).abs() < 1e-6),
            "{prompt}: {answer}"
        );
    }
    for (prompt, says) in [
        (
            "null content",
            "no verdict in \"\": it was cut off, raise preference.chat.max_tokens = 16",
        ),
        ("refusal", "the model refused (I cannot)"),
        ("unfinished reasoning", "it was cut off"),
        ("banana", "no verdict in \"banana\""),
        ("status 400", "it answered 400 Bad Request: "),
    ] {
        let (status, answer) = compare(&address, prompt);
        assert_eq!(status, 200, "{prompt}: {answer}");
        let reason = answer["results"][0]["abstained"].as_str();
        assert!(
            reason.is_some_and(|reason| reason.contains(says)),
            "{prompt}: {answer}"
        );
    }
    running.terminate();
    running.wait().succeeded().without_panic();
}

/// A response that is a failure of the judge, not of the request; other prompts get an answer.
fn failure(prompt: &str) -> FakeChatResponse {
    let ok = || FakeChatResponse::completion("judge", "[[A]]");
    let text = |body: String| FakeChatResponse { body, ..ok() };
    match prompt {
        "no choice" => FakeChatResponse::json(200, &json!({"choices": []})),
        "null message" => choice(&json!({"message": null})),
        "error in 200" => {
            FakeChatResponse::json(200, &json!({"error": {"message": "busy", "code": 502}}))
        }
        "cut JSON" => text("{\"choices\": [{\"mess".into()),
        "not a number" => text("{\"choices\": [NaN]}".into()),
        "deep JSON" => text("[".repeat(100_000)),
        "empty" => text(String::new()),
        "HTML" => text("<html>login</html>".into()),
        "huge" => text(" ".repeat((16 << 20) + 1)),
        "compressed" => ok().with_header("content-encoding", "gzip"),
        "key" => FakeChatResponse::json(401, &json!({"error": "the key sk-SECRET is wrong"})),
        _ => ok(),
    }
}

#[test]
fn failures_of_a_judge_are_named_and_the_judge_is_asked_again() {
    let server = FakeChat::start(|_, request| failure(prompt_of(request)));
    let sandbox = Sandbox::new();
    let key = sandbox.write("key", "sk-SECRET\n");
    let quick = [
        "preference.timeout_seconds=0.2",
        "preference.circuit_failures=1",
        "preference.circuit_probe_seconds=0.05",
        "preference.retry_base_ms=1",
    ];
    let judge = chat(&server.url(), &format!(", api_key_path = {key:?}"));
    let (running, address) = serve(&sandbox, &judge, &quick);
    for (prompt, says) in [
        ("no choice", "its response has no choice with a message"),
        ("null message", "its response has no choice with a message"),
        ("error in 200", "it answered 502 Bad Gateway: busy"),
        (
            "cut JSON",
            "its response cannot be parsed (EOF while parsing",
        ),
        (
            "not a number",
            "its response cannot be parsed (expected value",
        ),
        (
            "deep JSON",
            "its response cannot be parsed (recursion limit",
        ),
        ("empty", "its response is empty"),
        (
            "HTML",
            "its response cannot be parsed (expected value at line 1 column 1): <html>",
        ),
        ("huge", "its response has more than 16777216 bytes"),
        (
            "compressed",
            "the content encoding \"gzip\", which was not asked for",
        ),
        (
            "key",
            "401 Unauthorized: {\"error\":\"the key (the key) is wrong\"}",
        ),
    ] {
        until_it_fails(&address, prompt, says);
        wait_until("an answer of the judge", || {
            let (status, _) = compare(&address, &format!("after {prompt}"));
            (status == 200).then_some(())
        });
    }
    assert!(
        server
            .requests()
            .iter()
            .all(|request| { request.authorization.as_deref() == Some("Bearer sk-SECRET") })
    );
    running.terminate();
    let output = running.wait().succeeded().without_panic();
    assert!(!output.stderr.contains("SECRET"), "{}", output.stderr);
}

#[test]
fn an_address_without_tls_or_without_a_server_is_named() {
    let server = FakeChat::start(|_, _| FakeChatResponse::completion("judge", "[[A]]"));
    let without_tls = server.url().replace("http://", "https://");
    let unused = format!("127.0.0.1:{}", free_port());
    for (url, says) in [
        (without_tls, "it does not speak TLS"),
        (format!("http://{unused}"), "it cannot be reached: "),
        (
            "http://no-such-host.invalid".to_owned(),
            "it cannot be reached: ",
        ),
    ] {
        let sandbox = Sandbox::new();
        let once = [
            "preference.circuit_failures=1",
            "preference.timeout_seconds=1",
        ];
        let (mut running, address) = serve(&sandbox, &chat(&url, ""), &once);
        let (status, answer) = compare(&address, "x");
        assert_eq!(status, 503, "{url}: {answer}");
        let [_, stderr] = running.output_files();
        running.until("the failure in the log", || {
            let log = fs::read_to_string(&stderr).ok()?;
            log.contains(says).then_some(())
        });
    }
}

#[test]
fn a_redirect_to_another_host_gets_neither_the_key_nor_the_prompt() {
    let elsewhere = FakeChat::start(|_, _| FakeChatResponse::completion("judge", "[[A]]"));
    let other = elsewhere.url();
    let server = FakeChat::start(move |_, request| {
        let redirect = |status, to: &str| {
            FakeChatResponse::json(status, &Value::Null).with_header("location", to)
        };
        match (request.path.as_str(), prompt_of(request)) {
            ("/v2/chat/completions", _) => FakeChatResponse::completion("judge", "[[B]]"),
            (_, "here") => redirect(307, "/v2/chat/completions"),
            (path, "round") => redirect(308, path),
            (_, "as GET") => redirect(302, "/v2/chat/completions"),
            _ => redirect(308, &format!("{other}/v1/chat/completions")),
        }
    });
    let sandbox = Sandbox::new();
    let key = sandbox.write("key", "sk-SECRET\n");
    let judge = chat(&server.url(), &format!(", api_key_path = {key:?}"));
    let quick = [
        "preference.timeout_seconds=0.2",
        "preference.circuit_failures=1",
        "preference.circuit_probe_seconds=0.05",
    ];
    let (running, address) = serve(&sandbox, &judge, &quick);
    wait_until("an answer after a redirect within the host", || {
        let (_, answer) = compare(&address, "here");
        (answer["results"][0]["p"].as_f64() == Some(0.0)).then_some(())
    });
    let away = format!("308 Permanent Redirect to \"{}/v1", elsewhere.url());
    for (prompt, says) in [
        ("away", away.as_str()),
        (
            "round",
            "308 Permanent Redirect to \"/v1/chat/completions\"",
        ),
        ("as GET", "302 Found to \"/v2/chat/completions\""),
    ] {
        until_it_fails(&address, prompt, says);
    }
    assert!(
        elsewhere.requests().is_empty(),
        "{:?}",
        elsewhere.requests()
    );
    running.terminate();
    running.wait().succeeded().without_panic();
}

#[test]
fn a_judge_that_refuses_requests_is_named_and_its_retry_after_is_honoured() {
    let server = FakeChat::start(|before, request| {
        let refused = |retry_after: &str| {
            let reason = json!({"error": {"message": "quota exceeded"}});
            // Its clock is wrong: the time that it names counts from its own date.
            FakeChatResponse::json(429, &reason)
                .with_header("date", "Wed, 21 Oct 2015 07:28:00 GMT")
                .with_header("retry-after", retry_after)
        };
        match (prompt_of(request), before) {
            ("a day", _) => refused("86400"),
            (_, 0) => refused("0.5"),
            (_, 1) => refused("Wed, 21 Oct 2015 07:28:01 GMT"),
            _ => FakeChatResponse::completion("judge", "[[A]]"),
        }
    });
    let sandbox = Sandbox::new();
    let (running, address) = serve(
        &sandbox,
        &chat(&server.url(), ""),
        &["preference.timeout_seconds=3"],
    );
    assert_eq!(compare(&address, "x").0, 200);
    let at: Vec<Instant> = server.requests().iter().map(|request| request.at).collect();
    assert_eq!(at.len(), 3);
    assert!(at[1] - at[0] >= Duration::from_millis(450), "in seconds");
    assert!(at[2] - at[1] >= Duration::from_millis(950), "as a date");
    // The pause is bounded and the judge not ready meanwhile.
    let (status, answer) = compare(&address, "a day");
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert_eq!(status, 503, "{answer}");
    for says in ["the judge asks for a pause", "429", "quota exceeded"] {
        assert!(message.contains(says), "{message}");
    }
    running.terminate();
    running.wait().check(
        0,
        &[
            "the judge asks for a pause",
            "429",
            "quota exceeded",
            "retry_after_seconds=0.5",
        ],
    );
}

#[test]
fn a_judge_that_changes_or_always_says_the_first_is_named() {
    let server = FakeChat::start(|before, _| {
        let model = if before < 40 { "judge-1" } else { "judge-2" };
        FakeChatResponse::completion(model, "[[A]]")
    });
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let judge = format!("preference.judge={}", chat(&server.url(), ""));
    let output = sandbox.run(&tiny_playground(&run, &[&judge])).succeeded();
    for says in [
        "the model or version of the judge has changed",
        "before=\"model judge-1\"",
        "now=\"model judge-2\"",
        "the judge has a significant position bias",
        "prefers=\"first\"",
    ] {
        assert!(output.stderr.contains(says), "{says}: {}", output.stderr);
    }
}

#[test]
fn another_judge_behind_a_service_is_named() {
    let sandbox = Sandbox::new();
    let server = FakeChat::start(|before, _| {
        let digest = if before == 0 { "2ab3" } else { "77f0" };
        let results = json!([{"p": 0.75, "version": 1}]);
        let body = json!({"judge": "gold", "version": 1, "digest": digest, "results": results});
        FakeChatResponse::json(200, &body)
    });
    let judge = format!("{{ kind = \"service\", urls = [{:?}] }}", server.url());
    let (running, address) = serve(&sandbox, &judge, &[]);
    for prompt in ["a", "b"] {
        assert_eq!(compare(&address, prompt).0, 200);
    }
    running.terminate();
    let output = running.wait().succeeded();
    for says in [
        "model or version of the judge has changed",
        "digest 2ab3",
        "digest 77f0",
    ] {
        assert!(output.stderr.contains(says), "{}", output.stderr);
    }
}

#[test]
fn the_digest_of_a_service_is_of_its_judge() {
    let digest = |weight: f64| {
        let sandbox = Sandbox::new();
        let rules = format!("rules = [{{ kind = \"ended\", weight = {weight:.1} }}]");
        let judge = format!("{{ kind = \"rule\", {rules} }}");
        let (_running, address) = serve(&sandbox, &judge, &[]);
        let (status, answer) = compare(&address, "x");
        assert_eq!(status, 200, "{answer}");
        answer["digest"].as_str().expect("a digest").to_owned()
    };
    assert_eq!(digest(1.0), digest(1.0));
    assert_ne!(digest(1.0), digest(2.0));
}

#[test]
fn a_judge_that_reads_fewer_tokens_than_a_pair_has_is_refused_or_named() {
    let test = "a_judge_that_reads_fewer_tokens_than_a_pair_has_is_refused_or_named";
    let model = shared(test, "data/models/stories260K");
    let encoder = shared(test, "data/models/random-deberta-reward");
    let (Some(model), Some(encoder)) = (model, encoder) else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = |row: fn(usize) -> String| (0..4).map(row).collect::<String>();
    sandbox.write(
        "prompts.jsonl",
        rows(|i| format!("{{\"prompt\": \"Once upon a time {i}\"}}\n")),
    );
    sandbox.write(
        "pairs.jsonl",
        rows(|i| {
            format!("{{\"prompt\": \"Once {i}\", \"chosen\": \" a\", \"rejected\": \" b\"}}\n")
        }),
    );
    let short = sandbox.copy_of(&model, "short");
    let file = short.join("config.json");
    let mut json: Value =
        serde_json::from_slice(&fs::read(&file).expect("a copy")).expect("valid JSON");
    json["max_position_embeddings"] = 64.into();
    fs::write(&file, json.to_string()).expect("a copy");
    let check = |sets: &[String]| {
        let mut arguments = vec![
            "check".to_owned(),
            config("default.toml").display().to_string(),
        ];
        let common = [
            format!("model.path={model:?}"),
            "prompts.kind=dataset".into(),
            "prompts.path=\"prompts.jsonl\"".into(),
            "prompts.held_out=1".into(),
            "actor.max_prompt_length=300".into(),
            "actor.max_new_tokens=64".into(),
        ];
        for set in common.iter().chain(sets) {
            arguments.extend(["--set".into(), set.clone()]);
        }
        sandbox.run(&arguments).without_panic()
    };
    let trained = [
        "preference.judge={ kind = \"bradley-terry\", path = \"\" }".to_owned(),
        format!("preference.fit.path={short:?}"),
        "preference.fit.pairs.kind=dataset".into(),
        "preference.fit.pairs.path=\"pairs.jsonl\"".into(),
    ];
    check(&trained).check(
        2,
        &[
            "preference.fit.path",
            "reads 64 tokens, a prompt and its completion have up to 364",
            "lower actor.max_prompt_length or actor.max_new_tokens",
        ],
    );
    let own = [format!(
        "preference.judge={{ kind = \"encoder\", path = {encoder:?} }}"
    )];
    let output = check(&own).succeeded();
    assert!(
        output.stderr.contains(
            "reads 256 tokens, a prompt and its completion have up to 364: in its own tokens"
        ),
        "{}",
        output.stderr
    );
}

#[test]
fn a_rule_and_a_model_are_mixed_by_weight_and_scores_are_compared() {
    let server = FakeChat::start(|_, request| {
        let text = if request.text().contains("two") {
            "[[4]]"
        } else {
            "[[5]]"
        };
        FakeChatResponse::completion("judge", text)
    });
    let model = chat(&server.url(), ", form = \"pointwise\", rubric = \"Count.\"");
    let rule = "{ kind = \"rule\", temperature = 0, rules = [{ kind = \"keyword\", words = [\"two\"], weight = 1.0 }] }";
    let mixed =
        format!("{{ kind = \"ensemble\", members = [{rule}, {model}], weights = [1.0, 3.0] }}");
    let sandbox = Sandbox::new();
    let (running, address) = serve(&sandbox, &mixed, &[]);
    let (status, answer) = compare(&address, "mixed");
    assert_eq!(status, 200, "{answer}");
    // The rule says 0, the model σ(5 - 4) = .731059.
    let p = answer["results"][0]["p"].as_f64().expect("a number");
    assert!((p - 0.75 * 0.731_059).abs() < 1e-5, "{answer}");
    let requests = server.requests();
    assert_eq!(requests.len(), 2, "one for each response");
    assert!(requests.iter().all(|request| {
        request.body["messages"][0]["content"]
            .as_str()
            .is_some_and(|system| system.ends_with("\n\nCount."))
    }));
    running.terminate();
    running.wait().succeeded();
}

#[test]
fn prompts_with_an_answer_go_to_a_rule_and_the_rest_to_a_model() {
    let test = "prompts_with_an_answer_go_to_a_rule_and_the_rest_to_a_model";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let server = FakeChat::start(|_, _| FakeChatResponse::completion("judge", "[[A]]"));
    let sandbox = Sandbox::new();
    let rows = (0..12).map(|index| match index % 2 {
        0 => format!("{{\"prompt\": \"Checked number {index} is\", \"answer\": \"{index}\"}}\n"),
        _ => format!("{{\"prompt\": \"Open number {index} is\"}}\n"),
    });
    let prompts = sandbox.write("prompts.jsonl", rows.collect::<String>());
    let rule = "{kind=\"rule\",rules=[{kind=\"exact-match\",weight=1.0}]}";
    let judge = format!(
        "preference.judge={{kind=\"route\",values=[\"*\"],members=[{rule},{}]}}",
        chat(&server.url(), "")
    );
    let sets = [
        format!("model.path={model:?}"),
        format!("prompts.path={prompts:?}"),
        "prompts.golden_column=answer".into(),
        "prompts.route_column=answer".into(),
        "prompts.held_out=2".into(),
        "learner.steps=2".into(),
        "learner.train_batch_size=4".into(),
        "actor.max_new_tokens=8".into(),
        judge,
    ];
    let run = sandbox.path("run").display().to_string();
    let stories = config("stories.toml").display().to_string();
    let mut arguments = vec!["train", &stories, "--run-dir", &run];
    arguments.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
    sandbox.run(&arguments).succeeded();
    let requests = server.requests();
    assert!(!requests.is_empty());
    for request in &requests {
        let prompt = prompt_of(request);
        assert!(prompt.starts_with("Open number"), "{prompt:?}");
    }
}

/// The last line of a run is what a supervisor shows.
#[test]
fn a_run_that_ends_for_its_judge_says_so_in_its_last_line() {
    let server = FakeChat::start(|_, _| FakeChatResponse::json(401, &json!({"error": "no key"})));
    let sandbox = Sandbox::new();
    let judge = format!("preference.judge={}", chat(&server.url(), ""));
    let sets = ["learner.batch_timeout_seconds=4", &judge];
    let output = sandbox.run(&tiny_playground(&sandbox.path("run"), &sets));
    let output = output.without_panic();
    let last = output.stderr.lines().last().unwrap_or_default();
    for says in ["error: labels are waiting for a judge: ", "no step for 4 s"] {
        assert!(last.contains(says), "no {says:?} in {last:?}");
    }
}
