//! What a run leaves for those who look on: samples on the terminal, a report, event files, a page.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::PathBuf,
};

use house::{
    Workplace, column, config, metrics, number, present, status, status_now, tiny_bandit,
    tiny_playground, wait_until, workspace_root,
};
use serde_json::Value;

const EVALUATED: [&str; 2] = ["evaluation.eval_steps=6", "telemetry.samples_per_step=2"];

/// A finished run with evaluations and samples.
fn evaluated(workplace: &Workplace) -> PathBuf {
    let run = workplace.path("run");
    workplace
        .run(&tiny_playground(&run, &EVALUATED))
        .succeeded();
    run
}

#[test]
fn samples_are_shown_by_step_and_by_what_they_say() {
    let workplace = Workplace::new();
    let run = evaluated(&workplace);
    let path = run.display().to_string();
    let rows = workplace
        .run(&["samples", &path, "--json", "--limit", "100"])
        .succeeded()
        .json_lines();
    assert_eq!(rows.len(), 2 * 12);
    let steps: Vec<_> = rows.iter().map(|row| row["step"].as_u64()).collect();
    assert!(
        steps.is_sorted_by(|a, b| a >= b),
        "the newest first: {steps:?}"
    );
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
            let words: String = tokens
                .iter()
                .copied()
                .filter(|token| !token.contains('<'))
                .collect();
            assert_eq!(
                words.trim_end(),
                text.as_str().expect("a text"),
                "{tokens:?}"
            );
            let sum: f64 = row["logp"][i]
                .as_array()
                .expect("a list")
                .iter()
                .filter_map(Value::as_f64)
                .sum();
            let whole = row["sum_logp"][i].as_f64().expect("a number");
            assert!((sum - whole).abs() < 0.02, "{sum} {whole}");
        }
    }
    let said = workplace
        .run(&["samples", &path, "--step", "3"])
        .succeeded()
        .out;
    assert!(
        said.starts_with("step 3, ") && said.ends_with("2 of 24 samples\n"),
        "{said}"
    );
    let none = workplace.run(&["samples", &path, "--search", "no such words at all"]);
    none.check(0, &["none of the 24 samples of"]);
    workplace
        .run(&["samples", &workplace.path("nowhere").display().to_string()])
        .check(3, &["look at the run in", "nowhere", "run directory"]);
}

#[test]
fn a_report_is_one_file_with_everything_in_it() {
    let workplace = Workplace::new();
    let run = evaluated(&workplace);
    let path = run.display().to_string();
    let said = workplace.run(&["report", &path]).succeeded().out;
    assert_eq!(said.trim(), run.join("report.html").display().to_string());
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
        "{} curves",
        page.matches("<svg").count()
    );
    for foreign in ["<script", "src=", "<link", "href="] {
        assert!(!page.contains(foreign), "the report asks for {foreign}");
    }
}

/// The values of a scalar in an event file: the tag of a summary's value is followed by its number.
fn scalars(bytes: &[u8], tag: &str) -> Vec<f32> {
    let mut wanted = vec![0x0a, u8::try_from(tag.len()).expect("a short tag")];
    wanted.extend(tag.as_bytes());
    wanted.push(0x15);
    let places = bytes
        .windows(wanted.len())
        .enumerate()
        .filter(|(_, part)| *part == wanted);
    let number = |at: usize| bytes[at..at + 4].try_into().map(f32::from_le_bytes);
    places
        .map(|(at, _)| number(at + wanted.len()).expect("four bytes"))
        .collect()
}

#[test]
fn tensorboard_has_the_numbers_of_the_journal_unless_it_is_not_wanted() {
    let workplace = Workplace::new();
    let run = evaluated(&workplace);
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

    let without = workplace.path("without");
    let off = ["telemetry.tensorboard=false", "telemetry.page=\"\""];
    let ended = workplace.run(&tiny_playground(&without, &off)).succeeded();
    assert!(!without.join("tensorboard").exists());
    assert!(ended.err.contains("page=\"none\""), "{}", ended.err);
    assert_eq!(metrics(&without).len(), 13);
}

/// The whole answer to a request with this header.
fn asked(port: &str, path: &str, header: &str) -> String {
    let mut client = TcpStream::connect(format!("127.0.0.1:{port}")).expect("the page listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: agon\r\nConnection: close\r\n{header}\r\n");
    client
        .write_all(request.as_bytes())
        .expect("it takes a request");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn a_page_tells_of_its_own_run_and_only_to_those_who_may_know() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let token = workplace.write("token", "sesame\n");
    let listen = "telemetry.page=\"0.0.0.0:0\"";
    let arguments = tiny_playground(&run, &["learner.steps=100000", listen]);
    workplace
        .run(&arguments)
        .check(2, &["telemetry.page", "telemetry.token_path"]);
    let with_token = format!("telemetry.token_path={:?}", token.display().to_string());
    let arguments = tiny_playground(&run, &["learner.steps=100000", listen, &with_token]);
    let mut running = workplace.start(&arguments);
    let [_, err] = running.files();
    let port = running.until("the address of the page", || {
        let words = fs::read_to_string(&err).ok()?;
        let (_, rest) = words.split_once("page=\"http://0.0.0.0:")?;
        Some(rest.split_once("/\"")?.0.to_owned())
    });
    running.until("a first step", || {
        (!column(&run, "loss").is_empty()).then_some(())
    });
    let config = "/api/runs/0/config";
    let unknown = asked(&port, config, "");
    assert!(unknown.starts_with("HTTP/1.1 401"), "{unknown}");
    let known = asked(&port, config, "Authorization: Bearer sesame\r\n");
    assert!(
        known.starts_with("HTTP/1.1 200") && known.contains("\"mixture_coef\":0.125"),
        "{known}"
    );
    running.terminate();
    let ended = running.wait().check(5, &[]).without_panic();
    assert!(
        !ended.err.contains("sesame"),
        "a log holds no token: {}",
        ended.err
    );
}

#[test]
fn every_declared_metric_is_measured_somewhere() {
    let mut sources = String::new();
    let mut folders: Vec<_> = ["actor", "preference", "learner", "agon"]
        .map(|name| workspace_root().join("crates").join(name).join("src"))
        .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a crate has sources") {
            let path = entry.expect("an entry of a folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources += &fs::read_to_string(&path).expect("a source is text");
            }
        }
    }
    let page = Workplace::new().run(&["metrics"]).succeeded().out;
    let mut declared = 0;
    for line in page
        .lines()
        .filter(|line| line.starts_with("| `") && line.matches('`').count() == 4)
    {
        let name = line.split('`').nth(3).expect("a row has a journal name");
        declared += 1;
        // The learner makes the names of its objectives' losses from those of the objectives.
        let objective = name
            .strip_prefix("loss/")
            .map(|kind| format!("{:?}", kind.replace('_', "-")));
        let is_measured = sources.contains(&format!("{name:?}"))
            || objective.is_some_and(|kind| sources.contains(&kind));
        assert!(is_measured, "{name} is declared, and nothing measures it");
    }
    assert!(declared > 80, "only {declared} metrics are declared");
}

#[test]
fn a_run_in_one_process_has_a_status_while_it_lasts_and_after() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    workplace
        .run(&["status", &config("bandit.toml").display().to_string()])
        .check(2, &["runs/bandit", "no learner has begun there"])
        .without_panic();
    let running = workplace.start(&tiny_bandit(&run, &["learner.steps=1000000"]));
    wait_until("some steps", || {
        let now = status_now(&workplace, &run)?;
        (number(&now, "/streams/0/acknowledged") > 100.0).then_some(())
    });
    let now = status(&workplace, &run);
    assert_eq!(now["state"], "running");
    for role in ["actor", "preference", "learner"] {
        assert_eq!(present(&now, role).len(), 1, "{now:#}");
    }
    let names = ["prompts", "pairs", "labelled pairs", "dropped prompts"];
    for (stream, name) in now["streams"].as_array().expect("a list").iter().zip(names) {
        assert_eq!(stream["name"], name);
        let of = |key: &str| number(stream, key);
        assert!(
            of("/queued") + of("/in_hand") <= of("/capacity"),
            "{stream}"
        );
    }
    let said = workplace
        .run(&["status", &run.display().to_string()])
        .succeeded()
        .out;
    assert!(said.contains("| learner learner ("), "{said}");
    running.terminate();
    running.wait().check(5, &[]).without_panic();
    let after = status(&workplace, &run);
    assert_eq!(after["state"], "interrupted");
    assert!(present(&after, "learner").is_empty(), "{after:#}");
}
