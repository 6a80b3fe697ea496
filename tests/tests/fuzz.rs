//! Mutants of valid inputs through the program: checkpoints, run directories, configurations, HTTP requests. None may
//! end in a panic, hang, take memory beyond a limit, or be refused without a documented exit code and a message that
//! names the culprit. The parsers have their own mutants in `fuzz/tests/parsers.rs`.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use system_tests::{
    Mutator, ProcessOutput, RunningProcess, Sandbox, agon_binary, config, http, report, tiny_bandit,
};

/// Limit on the address space of a process, in KiB: several times what the largest valid input takes.
const MEMORY_KIB: u64 = 6 << 20;

/// Limit on the resident memory of a process that serves requests, in KiB.
const RESIDENT_KIB: u64 = 1 << 20;

/// Timeout of a response, far above any response time.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A command with a limit on its memory, to which arguments can be appended.
fn limited(program: &Path) -> Command {
    let mut command = Command::new("bash");
    let script = format!("ulimit -c 0 -v {MEMORY_KIB}; exec \"$0\" \"$@\"");
    command.arg("-c").arg(script).arg(program);
    command
}

/// Asserts that a call ended as documented: with one of these codes, and if not 0 with a message that has one of the
/// culprits.
#[track_caller]
fn assert_documented(output: &ProcessOutput, codes: &[i32], culprits: &[&str], mutant: &str) {
    let ProcessOutput { code, stderr, .. } = output;
    let is_documented = code.is_some_and(|code| codes.contains(&code));
    assert!(
        is_documented,
        "{mutant}: code {code:?}, not one of {codes:?}:\n{stderr}"
    );
    assert!(!stderr.contains("panicked at"), "{mutant}:\n{stderr}");
    let is_named = *code == Some(0) || culprits.iter().any(|culprit| stderr.contains(culprit));
    assert!(
        is_named,
        "{mutant}: the message has none of {culprits:?}:\n{stderr}"
    );
    let is_printable = |c: char| c == '\n' || c == '\t' || !c.is_control();
    assert!(
        stderr.chars().all(is_printable),
        "{mutant}: control characters: {stderr:?}"
    );
}

/// Files in a folder, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("a directory entry").path())
        .collect();
    files.retain(|path| path.is_file());
    files.sort();
    files
}

/// A mutant of a file by its content: JSON, text or binary.
fn mutant(path: &Path, valid: &[u8], mutator: &mut Mutator) -> Vec<u8> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    match serde_json::from_slice::<Value>(valid) {
        Ok(value) if mutator.below(4) > 0 => mutator.json_text(&value).into_bytes(),
        _ if name.ends_with(".jsonl") || name.ends_with(".toml") => {
            let text = String::from_utf8_lossy(valid);
            mutator
                .text(&text, &["{", "}", "[", "\"", "null", "1e308", "-1e308"])
                .into_bytes()
        }
        _ => mutator.bytes(valid),
    }
}

#[test]
fn checkpoints_are_refused_or_resumed() {
    const INPUTS: u64 = 32;
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = [
        "learner.steps=10",
        "evaluation.eval_steps=0",
        "evaluation.prompts=8",
    ];
    sandbox.run(&tiny_bandit(&run, &sets)).succeeded();
    for index in 0..INPUTS {
        let mut mutator = Mutator::new("checkpoint", 0, index);
        let copy = sandbox.path("copy");
        copy_folder(&run, &copy);
        let checkpoint = copy.join("checkpoints/step_10");
        let file = mutator.pick(&files(&checkpoint)).clone();
        let valid = fs::read(&file).expect("a checkpoint's file");
        fs::write(&file, mutant(&file, &valid, &mut mutator)).expect("a writable copy");
        let mut command = limited(agon_binary());
        command
            .args(tiny_bandit(
                &copy,
                &[&sets[1..], &["learner.steps=11"]].concat(),
            ))
            .arg("--resume");
        let output = sandbox.start_command(command).wait();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let what = format!("input {index}, a mutant of {name}");
        assert_documented(&output, &[0, 2, 3, 4], &["step_10", "checkpoint"], &what);
        fs::remove_dir_all(&copy).expect("the copy was made");
    }
}

/// Copies a folder with its folders; sockets and the like are left out.
fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder in a temporary directory");
    for entry in fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display())) {
        let path = entry.expect("a directory entry").path();
        let copy = to.join(path.file_name().expect("an entry has a name"));
        if path.is_dir() {
            copy_folder(&path, &copy);
        } else if path.is_file() {
            fs::copy(&path, &copy).expect("a file in a temporary directory");
        }
    }
}

#[test]
fn run_untrusted_directories_are_shown_or_refused() {
    const INPUTS: u64 = 16;
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = [
        "learner.steps=3",
        "evaluation.prompts=8",
        "learner.train_batch_size=8",
    ];
    sandbox.run(&tiny_bandit(&run, &sets)).succeeded();
    assert_eq!(report(&run)["steps"], 3);
    for index in 0..INPUTS {
        let mut mutator = Mutator::new("run directory", 0, index);
        let copy = sandbox.path("copy-of-run");
        copy_folder(&run, &copy);
        let file = mutator.pick(&files(&copy)).clone();
        let valid = fs::read(&file).expect("a run's file");
        fs::write(&file, mutant(&file, &valid, &mut mutator)).expect("a writable copy");
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        for command in ["samples", "report", "status"] {
            let mut call = limited(agon_binary());
            call.arg(command).arg(&copy);
            let output = sandbox.start_command(call).wait();
            let what = format!("input {index}, agon {command}, a mutant of {name}");
            assert_documented(&output, &[0, 1, 2, 3], &["copy-of-run"], &what);
        }
        fs::remove_dir_all(&copy).expect("the copy was made");
    }
}

#[test]
fn configurations_are_checked_by_the_program() {
    const INPUTS: u64 = 40;
    let sandbox = Sandbox::new();
    let valid = fs::read_to_string(config("bandit.toml")).expect("the project has it");
    for index in 0..INPUTS {
        let mut mutator = Mutator::new("configuration", 0, index);
        let fragments = ["\n[", "]", "\"", "\u{1b}[31m", "\nx = 1\n", "nan", "{}"];
        let text = mutator.text(&valid, &fragments);
        let path = sandbox.write("mutant.toml", text);
        let mut command = limited(agon_binary());
        command.arg("check").arg(path);
        let output = sandbox.start_command(command).wait();
        let what = format!("input {index}");
        assert_documented(&output, &[0, 2, 3], &["mutant.toml", "error: "], &what);
    }
}

/// A listener of the program.
struct Listener {
    /// `host:port`.
    address: String,
    /// A valid request without a body, up to the empty line, and without `host`.
    head: String,
    /// Its body.
    body: Value,
}

impl Listener {
    fn request(&self, head: &str, body: &[u8]) -> Vec<u8> {
        let Self { address, .. } = self;
        let length = body.len();
        let head = format!(
            "{head}\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        );
        [head.as_bytes(), body].concat()
    }

    /// Half of the mutants are valid requests with a mutated body, the others mutants of the whole.
    fn mutant(&self, mutator: &mut Mutator) -> Vec<u8> {
        if !self.body.is_null() && mutator.below(2) == 0 {
            return self.request(&self.head, mutator.json_text(&self.body).as_bytes());
        }
        let valid = self.request(&self.head, self.body.to_string().as_bytes());
        match mutator.below(2) {
            0 => mutator.bytes(&valid),
            _ => {
                let fragments = [
                    "\r\n", "\r\n\r\n", " ", ":", "%00", "..", "?", "&", "=", "\t", "chunked",
                ];
                let text = String::from_utf8_lossy(&valid);
                mutator.text(&text, &fragments).into_bytes()
            }
        }
    }

    /// Sends bytes and returns the response, which is empty if the server has closed the connection.
    fn send(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(&self.address).expect("the listener accepts");
        stream
            .set_read_timeout(Some(READ_TIMEOUT))
            .expect("a valid timeout");
        // The server may respond and close before it has read everything.
        stream
            .write_all(bytes)
            .and_then(|()| stream.shutdown(Shutdown::Write))
            .ok();
        let mut response = Vec::new();
        match stream.read_to_end(&mut response) {
            Ok(_) => {}
            Err(error) => {
                let is_closed =
                    [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind());
                assert!(is_closed, "{}: {error}", String::from_utf8_lossy(bytes));
            }
        }
        response
    }

    /// Sends mutants; every response is one of HTTP, and none says that the server failed.
    fn fuzz(&self, name: &str, inputs: u64) {
        for index in 0..inputs {
            let mut mutator = Mutator::new(name, 0, index);
            let request = self.mutant(&mut mutator);
            let response = self.send(&request);
            let response = String::from_utf8_lossy(&response);
            let status = response.split(' ').nth(1).unwrap_or_default();
            let is_valid = response.is_empty()
                || (response.starts_with("HTTP/1.") && status.len() == 3 && status != "500");
            assert!(
                is_valid,
                "{name} {index}: {response}\n{}",
                String::from_utf8_lossy(&request)
            );
        }
    }
}

/// The text after `key=` or `key: ` in the first line that has it, without quotes.
fn logged(running: &mut RunningProcess, key: &str) -> String {
    let [_, stderr] = running.output_files();
    running.until(key, || {
        let text = fs::read_to_string(&stderr).ok()?;
        let (_, rest) = text.split_once(key)?;
        let (value, _) = rest.split_once([' ', '\n'])?;
        let value = value.trim().trim_matches('"');
        let value = value.strip_prefix("http://").unwrap_or(value);
        Some(value.split('/').next()?.to_owned())
    })
}

#[test]
fn requests_are_refused_or_answered() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = [
        "learner.steps=1000000",
        "learner.save_steps=0",
        "evaluation.eval_steps=0",
        "telemetry.page=127.0.0.1:0",
        "preference.http.listen=\"127.0.0.1:0\"",
    ];
    let mut running = sandbox.start(&tiny_bandit(&run, &sets));
    let pair = json!({
        "prompt": "which arm?", "first": "x", "second": "y",
        "prompt_ids": [0], "first_ids": [0], "second_ids": [1],
    });
    let get = |path: &str| format!("GET {path} HTTP/1.1");
    let service = Listener {
        address: logged(&mut running, "preference service listens address="),
        head: "POST /v1/preferences HTTP/1.1\r\ncontent-type: application/json".into(),
        body: json!({"pairs": [pair], "orders": "both"}),
    };
    let metrics = Listener {
        address: logged(&mut running, "metrics="),
        head: get("/metrics"),
        body: Value::Null,
    };
    let page = Listener {
        address: logged(&mut running, "page="),
        head: get("/api/runs?limit=20&before=3"),
        body: Value::Null,
    };
    service.fuzz("preference service", 120);
    metrics.fuzz("metrics", 60);
    page.fuzz("page", 60);
    let (status, answer) = http(
        &format!("http://{}", service.address),
        "POST",
        "/v1/preferences",
        &service.body.to_string(),
    );
    assert_eq!(status, 200, "{answer}");
    let status = fs::read_to_string(format!("/proc/{}/status", running.id())).expect("a process");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|peak| peak.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    assert!(peak.is_some_and(|peak| peak < RESIDENT_KIB), "{peak:?} KiB");
    running.terminate();
    running.wait().check(5, &[]).without_panic();
}
