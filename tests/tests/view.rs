//! Views of a run: `agon samples`, `agon report`, TensorBoard event files, the live page, and `agon status`.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use serde_json::Value;
use system_tests::{
    Sandbox, column, config, make_pipe, metrics, number, present, status, status_now, tiny_bandit,
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
    let token = sandbox.write("token", "sesame-sesame-sesame\n");
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
    let authorised = get(
        &port,
        config,
        "Authorization: Bearer sesame-sesame-sesame\r\n",
    );
    assert!(
        authorised.starts_with("HTTP/1.1 200") && authorised.contains("\"mixture_coef\":0.125"),
        "{authorised}"
    );
    running.terminate();
    let output = running.wait().check(5, &[]).without_panic();
    assert!(
        !output.stderr.contains("sesame-sesame-sesame"),
        "the log contains the token: {}",
        output.stderr
    );
}

#[test]
fn every_declared_metric_is_recorded() {
    let mut sources = String::new();
    let mut folders: Vec<_> = [
        "actor/src",
        "preference/src",
        "learner/src",
        "agon/src",
        // Telemetry itself declares all.
        "telemetry/src/verdicts",
    ]
    .map(|name| workspace_root().join("crates").join(name))
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
        // Names of further comparisons begin with the other side's name.
        let of_comparison = ["average", "current_reference"].iter().find_map(|other| {
            let rest = name.strip_prefix(&format!("eval/{other}_"))?;
            Some(format!("eval/{{name}}_{rest}"))
        });
        // Names of evaluation judges' metrics are made of their prefix, their own part and the judge's name.
        let of_judge = name
            .strip_suffix("/JUDGE")
            .and_then(|name| name.strip_prefix("eval/"));
        let is_recorded = sources.contains(&format!("{name:?}"))
            || of_comparison.is_some_and(|name| sources.contains(&format!("{name:?}")))
            || of_judge.is_some_and(|name| sources.contains(&format!("{name:?}")))
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

#[test]
fn what_a_run_leaves_is_readable_by_its_owner_only() {
    let sandbox = Sandbox::new();
    let run = evaluated(&sandbox);
    sandbox
        .run(&["report", &run.display().to_string()])
        .succeeded();
    let mode = |path: &Path| {
        let metadata = fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        metadata.permissions().mode() & 0o777
    };
    let mut names = vec![run.clone()];
    let mut at = 0;
    while let Some(path) = names.get(at).cloned() {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(&path), expected, "{}", path.display());
        if path.is_dir() {
            let entries = fs::read_dir(&path).expect("a folder of the run");
            names.extend(entries.map(|entry| entry.expect("a directory entry").path()));
        }
        at += 1;
    }
    let has_checkpoint = |path: &PathBuf| path.ends_with("buffered.pairs");
    assert!(names.iter().any(has_checkpoint), "{names:?}");
    for name in [
        "samples.jsonl",
        "metrics.jsonl",
        "report.json",
        "report.html",
    ] {
        assert!(names.contains(&run.join(name)), "no {name}");
    }
}

/// A server that counts its connections.
struct Trap(TcpListener);

impl Trap {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a listener");
        Self(listener)
    }

    fn address(&self) -> String {
        self.0.local_addr().expect("an address").to_string()
    }

    #[track_caller]
    fn assert_untouched(&self) {
        let accepted = self.0.accept();
        let waits = accepted.as_ref().err().map(std::io::Error::kind);
        assert_eq!(waits, Some(ErrorKind::WouldBlock), "{accepted:?}");
    }
}

/// Writes the directory of a run that somebody sent, whose files name the trap's address.
fn foreign_run(sandbox: &Sandbox, trap: &Trap) -> PathBuf {
    let run = sandbox.path("foreign");
    let address = trap.address();
    let write = |name: &str, text: String| fs::write(run.join(name), text).expect("a file");
    fs::create_dir_all(&run).expect("a folder in the sandbox");
    write(
        "config.toml",
        format!(
            "[run]\nname = \"foreign\"\n[transport]\nkind = \"jetstream\"\nurl = \"nats://{address}\"\n\
             timeout_seconds = 5\n"
        ),
    );
    write("run.lock", "1\n".into());
    write(
        "targets.json",
        format!("[{{\"targets\": [{address:?}], \"labels\": {{}}}}]"),
    );
    write(
        "status.json",
        serde_json::json!({
            "run": "\u{1b}[31mforeign", "state": "running", "session": 0, "home": "h:/r",
            "processes": [{
                "role": "actor", "name": "a", "host": "h", "pid": 1, "left": false, "step": null,
                "waits": [["prompts", 1e308]], "metrics": format!("http://{address}/metrics"),
                "stage": {"received": 0, "emitted": 0, "dropped": {}, "in_flight": 0},
                "state": "present", "silent_seconds": 1e308,
            }],
            "streams": [], "stages": {}, "at": -1e308,
        })
        .to_string(),
    );
    let names: String = (0..200_000).map(|n| format!(",\"m{n}\":1e308")).collect();
    write(
        "metrics.jsonl",
        format!(
            "{{\"step\":1,\"wall_seconds\":1e308,\"loss\":1e308{names}}}\n\
             {{\"step\":18446744073709551615,\"loss\":-1e308}}\n{{\"step\":3,\"loss\":NaN}}\n"
        ),
    );
    write(
        "report.json",
        serde_json::json!({
            "finished": true,
            "evaluations": [{
                "step": 1e308,
                "win_rate": {"mean": format!("<img src=http://{address}>")},
            }],
        })
        .to_string(),
    );
    run
}

/// Reads the first update of a page.
fn first_update(address: &str) -> String {
    let mut client = TcpStream::connect(address).expect("the page listens");
    client
        .write_all(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .expect("the server accepts the request");
    let mut seen = Vec::new();
    let mut block = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains("\n\n") {
        let count = client.read(&mut block).expect("an update");
        assert!(count > 0, "the event stream ended");
        seen.extend(&block[..count]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

#[test]
fn looking_at_an_untrusted_run_makes_no_request() {
    let sandbox = Sandbox::new();
    let trap = Trap::new();
    let run = foreign_run(&sandbox, &trap);
    let path = run.display().to_string();
    let status = sandbox.run(&["status", &path]).succeeded().stdout;
    assert!(status.contains("| actor a (h, pid 1)"), "{status}");
    assert!(!status.contains('\u{1b}'), "{status:?}");
    let json = sandbox.run(&["status", &path, "--json"]).succeeded().stdout;
    assert!(
        json.contains("foreign") && !json.contains('\u{1b}'),
        "{json:?}"
    );
    sandbox.run(&["report", &path]).succeeded().without_panic();
    let page = fs::read_to_string(run.join("report.html")).expect("a report is written");
    assert!(page.contains("&lt;img src=http") && !page.contains("<img"));
    sandbox
        .run(&["samples", &path])
        .check(0, &[])
        .without_panic();

    let mut running = sandbox.start(&["view", &path]);
    let [stdout, _] = running.output_files();
    let url = running.until("the address of the page", || {
        let text = fs::read_to_string(&stdout).ok()?;
        Some(text.split_once('\n')?.0.to_owned())
    });
    let address = url.trim_start_matches("http://").trim_end_matches('/');
    let update = first_update(address);
    assert!(update.contains("\"ignored\":199001"), "{update}");
    running.terminate();
    running.wait().succeeded().without_panic();
    trap.assert_untouched();

    // Only on request.
    let asking = sandbox.start(&["status", "--connect", &path]);
    wait_until("a connection", || trap.0.accept().ok());
    drop(asking);
}

#[test]
fn damaged_run_directories_are_refused_by_file_name() {
    type Breaking<'a> = &'a dyn Fn(&Path);

    let sandbox = Sandbox::new();
    let trap = Trap::new();
    let run = foreign_run(&sandbox, &trap);
    let path = run.display().to_string();
    let secret = sandbox.write("secret", "secret");
    let broken: [(&str, Breaking<'_>); 5] = [
        ("a pipe", &|file| {
            make_pipe(file);
        }),
        ("a link out", &|file| {
            symlink(&secret, file).expect("a link");
        }),
        ("a device", &|file| {
            symlink("/dev/zero", file).expect("a link");
        }),
        ("a directory", &|file| {
            fs::create_dir(file).expect("a folder");
        }),
        ("garbage", &|file| {
            fs::write(file, "\u{0}{[").expect("a file");
        }),
    ];
    for (command, name) in [
        ("status", "status.json"),
        ("report", "report.json"),
        ("report", "metrics.jsonl"),
        ("report", "preference/rounds.jsonl"),
        ("report", "config.toml"),
    ] {
        let file = run.join(name);
        fs::create_dir_all(file.parent().expect("a parent")).expect("a folder in the sandbox");
        let whole = fs::read(&file).ok();
        for (kind, make) in broken {
            fs::remove_file(&file).ok();
            make(&file);
            let output = sandbox.run(&[command, &path]).without_panic();
            // Malformed lines are counted, and the report says so.
            let is_counted = kind == "garbage" && name.ends_with(".jsonl");
            let is_expected = match output.code {
                Some(0) => is_counted,
                Some(2 | 3) => output.stderr.contains(name),
                _ => false,
            };
            assert!(is_expected, "{command} with {kind} for {name}: {output:?}");
            assert!(!output.stderr.contains("secret"), "{output:?}");
            if kind == "a directory" {
                fs::remove_dir(&file).expect("an empty folder");
            }
        }
        fs::remove_file(&file).ok();
        if let Some(whole) = whole {
            fs::write(&file, whole).expect("a file");
        }
    }
    trap.assert_untouched();
}
