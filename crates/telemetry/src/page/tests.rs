//! Tests of the page over HTTP.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::*;
use crate::run_dir::{journal::Journal, samples::SampleRow};

fn run(directory: &Path) -> RunView {
    fs::write(directory.join("config.toml"), "[run]\nname = \"one\"\n").unwrap();
    let mut journal = Journal::open(&directory.join("metrics.jsonl")).unwrap();
    for (step, loss) in [(1, 2.0), (2, 1.0)] {
        journal
            .append(step, 0.5, &[("loss", loss)].into_iter().collect())
            .unwrap();
    }
    let row = SampleRow {
        step: 2,
        prompt: "<script>alert(1)</script>".into(),
        completions: vec!["a".into(), "b".into()],
        p: Some(0.75),
        judge_p: Some(0.75),
        ..SampleRow::default()
    };
    let line = serde_json::to_string(&row).unwrap() + "\n";
    fs::write(directory.join("samples.jsonl"), line).unwrap();
    RunView::open(directory).unwrap()
}

fn served(directory: &Path, token: Option<&str>) -> PageServer {
    let parts = PageParts {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        token: token.map(str::to_owned),
        runs: vec![run(directory)],
        live: Some(Arc::new(|| {
            "agon_stage_in_flight{stage=\"actor\"} 3\nagon_loss 1\n".into()
        })),
    };
    PageServer::start(parts).unwrap()
}

fn connect(server: &PageServer) -> TcpStream {
    let address = server
        .url()
        .strip_prefix("http://")
        .unwrap()
        .split('/')
        .next()
        .unwrap();
    let client = TcpStream::connect(address).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    client
}

/// Head and body of the response to a GET request.
fn get(server: &PageServer, path: &str, header: &str) -> (String, String) {
    let mut client = connect(server);
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}\r\n");
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// Status line and body of the response to a POST request with these headers.
fn post(server: &PageServer, path: &str, headers: &str, body: &str) -> (String, String) {
    let mut client = connect(server);
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.lines().next().unwrap_or_default();
    (status.to_owned(), body.to_owned())
}

#[test]
fn verdicts_are_taken_from_the_page_alone() {
    const JSON: &str = "Content-Type: application/json\r\n";
    let directory = tempfile::tempdir().unwrap();
    let server = served(directory.path(), Some("sesame"));
    let path = "/api/runs/0/verdicts";
    let bearer = format!("{JSON}Authorization: Bearer sesame\r\n");
    let verdict = |prompt: u64, verdict: &str| {
        format!(
            r#"{{"step":2,"prompt_id":{prompt},"verdict":"{verdict}","swapped":true,"choice":"random"}}"#
        )
    };
    let first = verdict(0, "first");
    let foreign = format!("{bearer}Origin: http://evil.example\r\n");
    let text = "Content-Type: text/plain\r\nAuthorization: Bearer sesame\r\n";
    let long = verdict(0, &"x".repeat(5000));
    for (headers, body, expected) in [
        (JSON, first.as_str(), "401"),
        (&foreign, &first, "403"),
        (text, &first, "415"),
        (&bearer, "{", "400"),
        (&bearer, &verdict(0, "third"), "422"),
        (&bearer, &verdict(7, "first"), "404"),
        (&bearer, &long, "413"),
    ] {
        let (status, _) = post(&server, path, headers, body);
        assert!(status.contains(expected), "{status} {headers} {body}");
        assert!(!directory.path().join("verdicts.jsonl").exists());
    }
    let (head, offered) = get(
        &server,
        &format!("{path}/next?choice=uncertain"),
        "Authorization: Bearer sesame\r\n",
    );
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let offered: Value = serde_json::from_str(&offered).unwrap();
    assert_eq!(
        (&offered["step"], &offered["row"]["p"]),
        (&2.into(), &Value::Null)
    );
    let (status, body) = post(&server, path, &bearer, &first);
    assert!(status.contains("200"), "{status} {body}");
    let summary: Value = serde_json::from_str(&body).unwrap();
    let found = [
        &summary["decided"],
        &summary["first_shown"],
        &summary["last"],
    ];
    assert_eq!(found, [&Value::from(1), &Value::from(0), &Value::from(1)]);
    assert_eq!(summary["agreement"]["mean"], 1.0);
    let (status, _) = post(&server, path, &bearer, &first);
    assert!(status.contains("409"), "{status}");
    let withdraw = format!("{path}/withdraw");
    for (id, expected) in [(2, "409"), (1, "200"), (1, "409")] {
        let (status, _) = post(&server, &withdraw, &bearer, &format!(r#"{{"id":{id}}}"#));
        assert!(status.contains(expected), "{status}");
    }
}

#[test]
fn the_api_serves_all_parts_of_a_run() {
    let directory = tempfile::tempdir().unwrap();
    let server = served(directory.path(), None);
    let json = |path: &str| -> Value {
        let (head, body) = get(&server, path, "");
        assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}\n{body}");
        serde_json::from_str(&body).unwrap()
    };
    let curves = json("/api/runs/0/curves?names=loss,eval/win_rate");
    assert_eq!(
        curves["curves"]["loss"]["values"],
        serde_json::json!([2.0, 1.0])
    );
    assert_eq!(curves["names"], serde_json::json!(["loss"]));
    let samples = json("/api/runs/0/samples?search=SCRIPT&limit=5");
    assert_eq!(samples["rows"][0][1]["prompt"], "<script>alert(1)</script>");
    assert_eq!(samples["total"], 1);
    assert_eq!(json("/api/runs/0/config")["run"]["name"], "one");
    assert_eq!(json("/api/runs/0/rounds"), serde_json::json!([]));
    assert_eq!(json("/api/runs/0/report"), Value::Null);
}

#[test]
fn missing_pages_are_errors_and_all_responses_have_security_headers() {
    let directory = tempfile::tempdir().unwrap();
    let server = served(directory.path(), None);
    for (path, status) in [
        ("/", "200"),
        ("/main.js", "200"),
        ("/main.js.map", "404"),
        ("/../config.toml", "404"),
        ("/api/runs/1/config", "404"),
        ("/api/runs/x/config", "400"),
        ("/api/runs/0/samples?colour=red", "400"),
    ] {
        let (head, _) = get(&server, path, "");
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status}")),
            "{path}: {head}"
        );
        let head = head.to_lowercase();
        for header in [
            "content-security-policy: default-src 'none'",
            "x-content-type-options: nosniff",
        ] {
            assert!(head.contains(header), "{path}: {head}");
        }
    }
}

#[test]
fn a_token_is_required_and_removed_from_the_url() {
    let directory = tempfile::tempdir().unwrap();
    let server = served(directory.path(), Some("sesame"));
    assert!(server.url().ends_with("/?token=sesame"), "{}", server.url());
    assert!(get(&server, "/", "").0.starts_with("HTTP/1.1 401"));
    assert!(
        get(&server, "/api/runs/0/config", "")
            .0
            .starts_with("HTTP/1.1 401")
    );
    let (head, _) = get(&server, "/?token=sesame", "");
    let head = head.to_lowercase();
    assert!(
        head.starts_with("http/1.1 303") && head.contains("location: /\r\n"),
        "{head}"
    );
    assert!(
        head.contains("set-cookie: agon_token=sesame; path=/; httponly; samesite=strict"),
        "{head}"
    );
    let (head, _) = get(
        &server,
        "/api/runs/0/config",
        "Cookie: agon_token=sesame\r\n",
    );
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
}

#[test]
fn requests_for_other_sites_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let server = served(directory.path(), None);
    let (head, body) = get(
        &server,
        "/api/runs/0/config",
        "Origin: http://evil.example\r\n",
    );
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    assert!(body.contains("other origins"), "{body}");
    let mut client = connect(&server);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
}

#[test]
fn the_number_of_open_pages_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let server = served(directory.path(), None);
    let open = || {
        let mut client = connect(&server);
        client
            .write_all(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut status = [0; 12];
        client.read_exact(&mut status).unwrap();
        (client, String::from_utf8_lossy(&status).into_owned())
    };
    let pages: Vec<_> = (0..64).map(|_| open()).collect();
    let refused = pages
        .iter()
        .filter(|(_, status)| status.ends_with("503"))
        .count();
    assert!(refused > 0 && refused < 64, "{refused} of 64 are refused");
    let (head, _) = get(&server, "/", "");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
}

#[test]
fn open_pages_receive_updates() {
    let directory = tempfile::tempdir().unwrap();
    let server = served(directory.path(), None);
    let mut client = connect(&server);
    client
        .write_all(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let mut seen = String::new();
    let mut data = || loop {
        let mut block = [0; 4096];
        let count = client.read(&mut block).unwrap();
        assert!(count > 0, "the event stream ended: {seen}");
        seen.push_str(std::str::from_utf8(&block[..count]).unwrap());
        if let Some((before, rest)) = seen.split_once("\n\n")
            && let Some((_, data)) = before.split_once("data: ")
        {
            let update: Value = serde_json::from_str(data).unwrap();
            seen = rest.to_owned();
            return update;
        }
    };
    let update = data();
    assert_eq!(
        (&update["runs"][0]["step"], &update["runs"][0]["samples"]),
        (&2.into(), &1.into())
    );
    assert_eq!(update["live"].as_array().unwrap().len(), 1);
    assert_eq!(update["live"][0]["value"], 3.0);
    let mut journal = Journal::open(&directory.path().join("metrics.jsonl")).unwrap();
    journal
        .append(3, 1.0, &[("loss", 0.5)].into_iter().collect())
        .unwrap();
    let updated = (0..10)
        .map(|_| data())
        .find(|update| update["runs"][0]["step"] == 3);
    assert!(updated.is_some(), "no update has the third step");
    drop(server);
}

#[test]
fn a_non_loopback_address_requires_a_token() {
    let parts = |listen: &str, token: Option<&str>| PageParts {
        listen: listen.parse().unwrap(),
        token: token.map(str::to_owned),
        runs: Vec::new(),
        live: None,
    };
    let exposed = PageServer::start(parts("0.0.0.0:0", None))
        .err()
        .unwrap()
        .to_string();
    assert!(exposed.contains("`telemetry.token_path`"), "{exposed}");
    let server = PageServer::start(parts("0.0.0.0:0", Some("sesame"))).unwrap();
    let port = server
        .url()
        .trim_end_matches("/?token=sesame")
        .rsplit(':')
        .next()
        .unwrap();
    let in_use = PageServer::start(parts(&format!("0.0.0.0:{port}"), Some("x")))
        .err()
        .unwrap();
    assert!(
        matches!(in_use, TelemetryError::PageListen { .. }),
        "{in_use}"
    );
}
