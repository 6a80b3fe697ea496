//! Views of a run: `agon samples`, `agon report`, TensorBoard event files, the live page, and `agon status`.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::PathBuf,
};

use serde_json::Value;
use system_tests::{
    Sandbox, column, config, metrics, number, present, status, status_now, tiny_bandit,
    tiny_playground, wait_until, workspace_root,
};

const EVALUATED: [&str; 2] = ["evaluation.eval_steps=6", "telemetry.samples_per_step=2"];

/// Runs a tiny playground with evaluations and samples to completion.
fn evaluated(sandbox: &Sandbox) -> PathBuf {
    let run = sandbox.path("run");
    sandbox.run(&tiny_playground(&run, &EVALUATED)).succeeded();
    run
}

#[test]
fn samples_are_filtered_by_step_and_text() {
    let sandbox = Sandbox::new();
    let run = evaluated(&sandbox);
    let path = run.display().to_string();
    let rows = sandbox
        .run(&["samples", &path, "--json", "--limit", "100"])
        .succeeded()
        .json_lines();
    assert_eq!(rows.len(), 2 * 12);
    let steps: Vec<_> = rows.iter().map(|row| row["step"].as_u64()).collect();
    assert!(steps.is_sorted_by(|a, b| a >= b), "newest first: {steps:?}");
    for row in &rows {
        for (i, text) in row["completions"]
            .as_array()
            .expect("a list")
            .iter()
            .enumerate()
        {
            let tokens: Vec<&str> = row["tokens"][i]
                .as_array()
                .expect("a list")
                .iter()
                .filter_map(Value::as_str)
                .collect();
            let length = row["lengths"][i].as_u64().expect("a number");
            assert_eq!(tokens.len() as u64, length, "{row}");
            let decoded: String = tokens
                .iter()
                .copied()
                .filter(|token| !token.contains('<'))
                .collect();
            assert_eq!(
                decoded.trim_end(),
                text.as_str().expect("a text"),
                "{tokens:?}"
            );
            let sum: f64 = row["logp"][i]
                .as_array()
                .expect("a list")
                .iter()
                .filter_map(Value::as_f64)
                .sum();
            let total = row["sum_logp"][i].as_f64().expect("a number");
            assert!((sum - total).abs() < 0.02, "{sum} {total}");
        }
    }
    let text = sandbox
        .run(&["samples", &path, "--step", "3"])
        .succeeded()
        .stdout;
    assert!(
        text.starts_with("step 3, ") && text.ends_with("2 of 24 samples\n"),
        "{text}"
    );
    let none = sandbox.run(&["samples", &path, "--search", "no such words at all"]);
    none.check(0, &["none of the 24 samples of"]);
    sandbox
        .run(&["samples", &sandbox.path("nowhere").display().to_string()])
        .check(3, &["open the run in", "nowhere", "run directory"]);
}

#[test]
fn the_report_is_a_self_contained_file() {
    let sandbox = Sandbox::new();
    let run = evaluated(&sandbox);
    let path = run.display().to_string();
    let text = sandbox.run(&["report", &path]).succeeded().stdout;
    assert_eq!(text.trim(), run.join("report.html").display().to_string());
    let page = fs::read_to_string(run.join("report.html")).expect("a report is written");
    for part in [
        "Win rate against the reference",
        "policy before",
        "policy after",
        "<td>preference</td>",
        "mixture_coef = 0.125",
        "operating system",
        env!("CARGO_PKG_VERSION"),
    ] {
        assert!(page.contains(part), "no {part:?} in the report");
    }
    assert!(
        page.matches("<svg").count() >= 7,
        "{} charts",
        page.matches("<svg").count()
    );
    for external in ["<script", "src=", "<link", "href="] {
        assert!(!page.contains(external), "the report contains {external}");
    }
}

/// Values of a scalar in an event file: the tag of a summary value is followed by its `simple_value`.
fn scalars(bytes: &[u8], tag: &str) -> Vec<f32> {
    let mut pattern = vec![0x0a, u8::try_from(tag.len()).expect("a short tag")];
    pattern.extend(tag.as_bytes());
    pattern.push(0x15);
    let matches = bytes
        .windows(pattern.len())
        .enumerate()
        .filter(|(_, part)| *part == pattern);
    let number = |at: usize| bytes[at..at + 4].try_into().map(f32::from_le_bytes);
    matches
        .map(|(at, _)| number(at + pattern.len()).expect("four bytes"))
        .collect()
}

#[test]
fn tensorboard_files_equal_the_journal_and_can_be_disabled() {
    let sandbox = Sandbox::new();
    let run = evaluated(&sandbox);
    let files: Vec<_> = fs::read_dir(run.join("tensorboard"))
        .expect("there are event files")
        .collect();
    assert_eq!(files.len(), 1);
    let file = files
        .into_iter()
        .next()
        .expect("there is one")
        .expect("an entry")
        .path();
    let bytes = fs::read(file).expect("an event file");
    let journal: Vec<f32> = column(&run, "loss")
        .iter()
        .map(|&loss| loss as f32)
        .collect();
    assert_eq!(scalars(&bytes, "loss"), journal);
    assert_eq!(scalars(&bytes, "eval/win_rate").len(), 3);

    let without = sandbox.path("without");
    let off = ["telemetry.tensorboard=false", "telemetry.page=\"\""];
    let output = sandbox.run(&tiny_playground(&without, &off)).succeeded();
    assert!(!without.join("tensorboard").exists());
    assert!(output.stderr.contains("page=\"none\""), "{}", output.stderr);
    assert_eq!(metrics(&without).len(), 13);
}

/// Sends a GET request with this header and returns the response.
fn get(port: &str, path: &str, header: &str) -> String {
    let mut client = TcpStream::connect(format!("127.0.0.1:{port}")).expect("the page listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: agon\r\nConnection: close\r\n{header}\r\n");
    client
        .write_all(request.as_bytes())
        .expect("the server accepts the request");
    let mut answer = String::new();
    client
        .read_to_string(&mut answer)
        .expect("the server responds");
    answer
}

#[test]
fn the_page_requires_its_token() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let token = sandbox.write("token", "sesame\n");
    let listen = "telemetry.page=\"0.0.0.0:0\"";
    let arguments = tiny_playground(&run, &["learner.steps=100000", listen]);
    sandbox
        .run(&arguments)
        .check(2, &["telemetry.page", "telemetry.token_path"]);
    let with_token = format!("telemetry.token_path={:?}", token.display().to_string());
    let arguments = tiny_playground(&run, &["learner.steps=100000", listen, &with_token]);
    let mut running = sandbox.start(&arguments);
    let [_, stderr] = running.output_files();
    let port = running.until("the address of the page", || {
        let text = fs::read_to_string(&stderr).ok()?;
        let (_, rest) = text.split_once("page=\"http://0.0.0.0:")?;
        Some(rest.split_once("/\"")?.0.to_owned())
    });
    running.until("a first step", || {
        (!column(&run, "loss").is_empty()).then_some(())
    });
    let config = "/api/runs/0/config";
    let unauthorised = get(&port, config, "");
    assert!(unauthorised.starts_with("HTTP/1.1 401"), "{unauthorised}");
    let authorised = get(&port, config, "Authorization: Bearer sesame\r\n");
    assert!(
        authorised.starts_with("HTTP/1.1 200") && authorised.contains("\"mixture_coef\":0.125"),
        "{authorised}"
    );
    running.terminate();
    let output = running.wait().check(5, &[]).without_panic();
    assert!(
        !output.stderr.contains("sesame"),
        "the log contains the token: {}",
        output.stderr
    );
}

#[test]
fn every_declared_metric_is_recorded() {
    let mut sources = String::new();
    let mut folders: Vec<_> = ["actor", "preference", "learner", "agon"]
        .map(|name| workspace_root().join("crates").join(name).join("src"))
        .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a crate has sources") {
            let path = entry.expect("a directory entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources += &fs::read_to_string(&path).expect("a source is text");
            }
        }
    }
    let page = Sandbox::new().run(&["metrics"]).succeeded().stdout;
    let mut declared = 0;
    for line in page
        .lines()
        .filter(|line| line.starts_with("| `") && line.matches('`').count() == 4)
    {
        let name = line.split('`').nth(3).expect("a row has a journal name");
        declared += 1;
        // Names of objective losses are derived from the names of the objectives.
        let objective = name
            .strip_prefix("loss/")
            .map(|kind| format!("{:?}", kind.replace('_', "-")));
        let is_recorded = sources.contains(&format!("{name:?}"))
            || objective.is_some_and(|kind| sources.contains(&kind));
        assert!(is_recorded, "{name} is declared but not recorded");
    }
    assert!(declared > 80, "only {declared} metrics are declared");
}

#[test]
fn a_single_process_run_has_a_status_during_and_after_the_run() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox
        .run(&["status", &config("bandit.toml").display().to_string()])
        .check(2, &["runs/bandit", "no learner has started there"])
        .without_panic();
    let running = sandbox.start(&tiny_bandit(&run, &["learner.steps=1000000"]));
    wait_until("some steps", || {
        let now = status_now(&sandbox, &run)?;
        (number(&now, "/streams/0/acknowledged") > 100.0).then_some(())
    });
    let now = status(&sandbox, &run);
    assert_eq!(now["state"], "running");
    for role in ["actor", "preference", "learner"] {
        assert_eq!(present(&now, role).len(), 1, "{now:#}");
    }
    let names = ["prompts", "pairs", "labelled pairs", "dropped prompts"];
    for (stream, name) in now["streams"].as_array().expect("a list").iter().zip(names) {
        assert_eq!(stream["name"], name);
        let of = |key: &str| number(stream, key);
        assert!(
            of("/queued") + of("/in_flight") <= of("/capacity"),
            "{stream}"
        );
    }
    let text = sandbox
        .run(&["status", &run.display().to_string()])
        .succeeded()
        .stdout;
    assert!(text.contains("| learner learner ("), "{text}");
    running.terminate();
    running.wait().check(5, &[]).without_panic();
    let after = status(&sandbox, &run);
    assert_eq!(after["state"], "interrupted");
    assert!(present(&after, "learner").is_empty(), "{after:#}");
}
