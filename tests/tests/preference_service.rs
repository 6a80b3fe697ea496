//! `agon preference`: the HTTP preference service.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
};

use playground::{Vocabulary, train_post};
use serde_json::{Value, json};
use system_tests::{RunningProcess, Sandbox, agon_binary, config, http, tiny_bandit};

const LISTEN: &str = "preference.http.listen=\"127.0.0.1:0\"";

/// Starts `agon preference` with additional settings; returns the process and its address.
fn serve(sandbox: &Sandbox, sets: &[&str]) -> (RunningProcess, String) {
    let path = config("default.toml").display().to_string();
    let mut arguments = vec!["preference", &path, "--set", LISTEN];
    arguments.extend(sets.iter().flat_map(|set| ["--set", *set]));
    let mut command = Command::new(agon_binary());
    command.args(arguments);
    serve_with(sandbox, command)
}

/// Starts a command that runs `agon preference`; returns the process and its address.
fn serve_with(sandbox: &Sandbox, command: Command) -> (RunningProcess, String) {
    let mut running = sandbox.start_command(command);
    let [stdout, _] = running.output_files();
    let address = running.until("its address", || {
        let text = std::fs::read_to_string(&stdout).ok()?;
        Some(text.split_once('\n')?.0.to_owned())
    });
    (running, address)
}

/// Posts these comparisons.
fn post_preferences(base: &str, pairs: &Value) -> (u16, Value) {
    let body = json!({"pairs": pairs}).to_string();
    http(base, "POST", "/v1/preferences", &body)
}

fn p(result: &Value) -> f64 {
    let p = result["p"].as_f64();
    p.unwrap_or_else(|| panic!("no p in {result}"))
}

#[test]
fn the_gold_judge_is_served_over_http_and_stops_on_sigterm() {
    let sandbox = Sandbox::new();
    let (running, base) = serve(&sandbox, &[]);
    let post = train_post(0, 1);
    let golden = post.golden(2);
    let golden = Vocabulary::shared().text(&golden[..golden.len() - 1]);
    let pair = |first: &str, second: &str| json!({"prompt": post.text(), "first": first, "second": second});
    let pairs = json!([
        pair(&golden, "the dog likes the dog"),
        pair("the dog likes the dog", &golden),
        pair(&golden, &golden),
    ]);
    let (status, answer) = post_preferences(&base, &pairs);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["judge"], "gold");
    let [better, worse, same] = [0, 1, 2].map(|i| p(&answer["results"][i]));
    assert!(better > 0.9, "{answer}");
    assert!((better + worse - 1.0).abs() < 1e-6, "{answer}");
    assert!((same - 0.5).abs() < 1e-6, "{answer}");
    assert_eq!(http(&base, "GET", "/healthz", "").0, 200);
    assert_eq!(http(&base, "GET", "/readyz", "").0, 200);
    running.terminate();
    running.wait().succeeded().without_panic();
}

#[test]
fn invalid_requests_are_rejected_and_the_service_continues() {
    let sandbox = Sandbox::new();
    let (running, base) = serve(&sandbox, &["preference.http.max_pairs=2"]);
    let post = train_post(0, 1).text();
    let pair = json!({"prompt": post, "first": "the dog", "second": "my dog"});
    let with = |key: &str, value: Value| {
        let mut pair = pair.clone();
        pair[key] = value;
        json!({"pairs": [pair]}).to_string()
    };
    for (body, status, says) in [
        ("{".to_owned(), 400, "EOF"),
        (r#"{"pears": []}"#.to_owned(), 422, "pears"),
        (with("first", "".into()), 422, "pairs[0].first: it is empty"),
        (
            with("first", "a xylophone".into()),
            422,
            "\"xylophone\" is not in",
        ),
        (
            with("prompt", json!([{"role": "user", "content": "hi"}])),
            422,
            "pairs[0].prompt",
        ),
        (with("third", "".into()), 422, "pairs[0].third"),
        (
            json!({"pairs": vec![&pair; 3]}).to_string(),
            422,
            "preference.http.max_pairs = 2",
        ),
    ] {
        let (seen, answer) = http(&base, "POST", "/v1/preferences", &body);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!(seen, status, "{body}: {answer}");
        assert!(message.contains(says), "{body}: {message}");
    }
    let unparsable = with("prompt", "the dog".into());
    let (status, answer) = http(&base, "POST", "/v1/preferences", &unparsable);
    assert_eq!(status, 200, "{answer}");
    assert!(answer["results"][0]["abstained"].is_string(), "{answer}");
    running.terminate();
    running.wait().succeeded().without_panic();
}

#[test]
fn a_service_can_be_the_judge_of_another() {
    let sandbox = Sandbox::new();
    let (first, base) = serve(&sandbox, &[]);
    let urls = format!("preference.judge.urls=[{base:?}]");
    let (second, second_base) = serve(&sandbox, &["preference.judge.kind=service", &urls]);
    let post = train_post(0, 4);
    let golden = post.golden(2);
    let text = Vocabulary::shared().text(&golden[..golden.len() - 1]);
    let pair = json!({
        "prompt": post.text(),
        "first": text,
        "second": "the dog likes the dog",
        "prompt_ids": post.prompt_ids(),
        "first_ids": golden,
        "second_ids": [1, 2],
    });
    let (status, answer) = post_preferences(&second_base, &json!([pair]));
    assert_eq!(
        (status, &answer["judge"]),
        (200, &"service".into()),
        "{answer}"
    );
    assert!(p(&answer["results"][0]) > 0.9, "{answer}");
    assert_eq!(
        answer["results"][0]["version"], 1,
        "the version of the gold judge"
    );
    for running in [second, first] {
        running.terminate();
        running.wait().succeeded().without_panic();
    }
}

#[test]
fn missing_settings_are_reported() {
    let sandbox = Sandbox::new();
    let path = config("default.toml").display().to_string();
    sandbox
        .run(&["preference", &path])
        .check(2, &["preference.http.listen is empty"]);
    let invalid = "preference.http.listen=\"256.0.0.1:80\"";
    sandbox
        .run(&["preference", &path, "--set", invalid])
        .check(3, &["256.0.0.1:80"]);
    let key = "preference.http.token_path=\"nowhere\"";
    sandbox
        .run(&["preference", &path, "--set", LISTEN, "--set", key])
        .check(3, &["nowhere"]);
}

#[test]
fn a_run_serves_its_judge_over_http() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let mut running = sandbox.start(&tiny_bandit(&run, &[LISTEN, "learner.steps=100000"]));
    let log_line = "preference service listens address=";
    let base = running.until("the address of the service", {
        let [_, stderr] = running.output_files();
        move || {
            let text = std::fs::read_to_string(&stderr).ok()?;
            let (_, rest) = text.split_once(log_line)?;
            let (address, _) = rest.split_once('\n')?;
            Some(format!("http://{}", address.trim().trim_matches('"')))
        }
    });
    let arms = json!([
        {
            "prompt": "which arm?", "first": "x", "second": "y",
            "prompt_ids": [0], "first_ids": [0], "second_ids": [1],
        },
    ]);
    let (status, answer) = post_preferences(&base, &arms);
    assert_eq!(
        (status, &answer["judge"]),
        (200, &"matrix".into()),
        "{answer}"
    );
    let p = p(&answer["results"][0]);
    assert!((p - 0.8).abs() < 1e-6, "the matrix entry is 0.8: {answer}");
    running.terminate();
    running.wait().check(5, &[]).without_panic();
}

/// Sends a request with these headers and this body; returns the whole response.
fn exchange(base: &str, headers: &str, body: &str) -> String {
    let address = base.trim_start_matches("http://");
    let mut client = TcpStream::connect(address).expect("the service listens");
    let request = format!(
        "POST /v1/preferences HTTP/1.1\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    client
        .write_all(request.as_bytes())
        .expect("the server reads the request");
    let mut answer = String::new();
    client
        .read_to_string(&mut answer)
        .expect("the server responds");
    answer
}

#[test]
fn requests_from_elsewhere_are_refused() {
    let sandbox = Sandbox::new();
    let token = sandbox
        .write("token", "sesame-sesame-sesame")
        .display()
        .to_string();
    let path = config("default.toml").display().to_string();
    let listen = "preference.http.listen=\"0.0.0.0:0\"";
    sandbox
        .run(&["preference", &path, "--set", listen])
        .check(2, &["preference.http.listen", "preference.http.token_path"]);
    let metrics = "telemetry.listen=\"0.0.0.0:0\"";
    sandbox
        .run(&["preference", &path, "--set", LISTEN, "--set", metrics])
        .check(2, &["telemetry.listen", "telemetry.token_path"]);

    let (open, base) = serve(&sandbox, &[]);
    let json = "Content-Type: application/json\r\n";
    let large = " ".repeat(5 << 20);
    for (headers, body, status) in [
        (format!("Host: localhost\r\n{json}"), "{", "400"),
        (format!("Host: evil.example\r\n{json}"), "{", "403"),
        (
            format!("Host: localhost\r\nOrigin: https://evil.example\r\n{json}"),
            "{",
            "403",
        ),
        (
            "Host: localhost\r\nContent-Type: text/plain\r\n".into(),
            "{",
            "415",
        ),
        (format!("Host: localhost\r\n{json}"), large.as_str(), "413"),
        ("Host: evil.example\r\n".into(), large.as_str(), "403"),
    ] {
        let answer = exchange(&base, &headers, body);
        let expected = format!("HTTP/1.1 {status}");
        assert!(answer.starts_with(&expected), "{headers}: {answer}");
    }
    open.terminate();
    open.wait().succeeded().without_panic();

    let token_path = format!("preference.http.token_path={token:?}");
    let (closed, base) = serve(&sandbox, &[listen, &token_path]);
    let base = base.replace("0.0.0.0", "127.0.0.1");
    for (header, status) in [
        ("", "401"),
        ("Authorization: Bearer sesame-sesame-sesame\r\n", "400"),
    ] {
        let answer = exchange(&base, &format!("Host: elsewhere\r\n{header}{json}"), "{");
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
    }
    assert_eq!(http(&base, "GET", "/healthz", "").0, 200);
    closed.terminate();
    closed.wait().succeeded().without_panic();
}

#[test]
fn silent_connections_leave_descriptors_and_answers() {
    let sandbox = Sandbox::new();
    let mut command = Command::new("bash");
    let path = config("default.toml").display().to_string();
    command
        .args(["-c", "ulimit -n 256; exec \"$0\" \"$@\""])
        .arg(agon_binary())
        .args(["preference", &path, "--set", LISTEN]);
    let (running, base) = serve_with(&sandbox, command);
    let address = base.trim_start_matches("http://");
    let silent: Vec<_> = (0..200)
        .filter_map(|_| TcpStream::connect(address).ok())
        .collect();
    assert_eq!(silent.len(), 200, "connections are queued");
    let (status, answer) = post_preferences(&base, &json!([]));
    assert_eq!(status, 422, "{answer}");
    drop(silent);
    running.terminate();
    running.wait().succeeded().without_panic();
}
