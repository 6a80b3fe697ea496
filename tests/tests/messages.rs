//! Invalid messages on the streams of a run: each is counted, dead-lettered and logged, and ends no process and no run.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
};

use serde_json::Value;
use system_tests::{
    NatsServer, RunningProcess, Sandbox, has_nats_server, number, report, status_now, steps,
    tiny_bandit, wait_until,
};

/// Version byte of the encoding; see `messages::wire`.
const VERSION: u8 = 6;

/// A client of a NATS server without authentication, as plain as one that does not belong to the run.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the server runs");
        let mut client = Self {
            stream: BufReader::new(stream),
        };
        client.write(b"CONNECT {\"verbose\":false}\r\n");
        client.sync();
        client
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).expect("a socket");
    }

    /// Waits until the server has handled everything before.
    fn sync(&mut self) {
        self.write(b"PING\r\n");
        while self.line() != "PONG" {}
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("a socket");
        let line = line.trim_end().to_owned();
        assert!(!line.starts_with("-ERR"), "{line}");
        line
    }

    fn publish(&mut self, subject: &str, payload: &[u8]) {
        let head = format!("PUB {subject} {}\r\n", payload.len());
        let message = [head.as_bytes(), payload, b"\r\n"].concat();
        self.write(&message);
        self.sync();
    }

    /// Number of messages that a JetStream stream holds.
    fn messages(&mut self, stream: &str) -> u64 {
        self.write(b"SUB answer 1\r\nUNSUB 1 1\r\n");
        self.write(format!("PUB $JS.API.STREAM.INFO.{stream} answer 0\r\n\r\n").as_bytes());
        let mut head = self.line();
        while !head.starts_with("MSG") {
            head = self.line();
        }
        let length = head.rsplit(' ').next().and_then(|size| size.parse().ok());
        let mut body = vec![0; length.expect("a size")];
        self.stream.read_exact(&mut body).expect("a socket");
        let info: Value = serde_json::from_slice(&body).expect("one document");
        info["state"]["messages"].as_u64().expect("a stream")
    }
}

/// Encodes an unsigned number in the wire's variable length.
fn number_of(mut value: u64, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn numbers(values: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &value in values {
        number_of(value, &mut bytes);
    }
    bytes
}

fn list(values: &[u64]) -> Vec<u8> {
    [numbers(&[values.len() as u64]), numbers(values)].concat()
}

fn text(value: &str) -> Vec<u8> {
    [&numbers(&[value.len() as u64])[..], value.as_bytes()].concat()
}

fn floats(values: &[f32]) -> Vec<u8> {
    let floats: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    [numbers(&[values.len() as u64]), floats].concat()
}

/// A prompt that nobody sent: its id is far from those of the run.
#[derive(Clone)]
struct Prompt {
    id: u64,
    first: u64,
    count: u64,
    session: u64,
    step: u64,
    ids: Vec<u64>,
}

impl Default for Prompt {
    fn default() -> Self {
        Self {
            id: 1_000_000,
            first: 1_000_000,
            count: 1,
            session: 0,
            step: 0,
            ids: vec![0],
        }
    }
}

impl Prompt {
    fn body(&self) -> Vec<u8> {
        let (purpose, seed) = (0, 1);
        let head = numbers(&[
            self.id,
            self.first,
            self.count,
            purpose,
            self.session,
            self.step,
            seed,
        ]);
        let (dialogue, golden, answer, route) = (0, 0, 0, 0);
        let options = numbers(&[dialogue, golden, answer, route]);
        [head, list(&self.ids), text("x"), options].concat()
    }

    fn message(&self) -> Vec<u8> {
        [vec![VERSION, 1], self.body()].concat()
    }
}

/// A pair of such a prompt: one log-probability for each completion of one token.
struct Pair {
    prompt: Prompt,
    session: u64,
    step: u64,
    tokens: Vec<u64>,
    logp: f32,
}

impl Default for Pair {
    fn default() -> Self {
        Self {
            prompt: Prompt::default(),
            session: 0,
            step: 0,
            tokens: vec![0, 1],
            logp: -1.0,
        }
    }
}

impl Pair {
    fn body(&self) -> Vec<u8> {
        let head = numbers(&[self.session, self.step, self.tokens.len() as u64]);
        let mut bytes = [self.prompt.body(), head].concat();
        for &token in &self.tokens {
            let finish = numbers(&[0]);
            let mixture = 0f32.to_le_bytes();
            bytes.extend([list(&[token]), finish].concat());
            bytes.extend(mixture);
            for logp in [self.logp, -1.0, -1.0] {
                bytes.extend(floats(&[logp]));
            }
            bytes.extend(text("y"));
        }
        [bytes, text("nobody")].concat()
    }

    fn message(&self) -> Vec<u8> {
        [vec![VERSION, 2], self.body()].concat()
    }

    /// With labels of these first and second completions.
    fn labelled(&self, labels: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = [vec![VERSION, 3], self.body()].concat();
        bytes.extend(numbers(&[labels.len() as u64]));
        for &(first, second) in labels {
            bytes.extend(numbers(&[first, second]));
            bytes.extend(0.5f32.to_le_bytes());
            // No judge's own p.
            bytes.push(0);
        }
        let (version, scores, verdicts) = (u64::MAX, 0, 0);
        [bytes, text("nobody"), numbers(&[version, scores, verdicts])].concat()
    }
}

/// A drop note of stage and reason, by their places in the enumerations.
fn note(session: u64, stage: u64, reason: u64) -> Vec<u8> {
    let (prompt, log_ratio) = (1_000_000, 0);
    let body = numbers(&[prompt, session, stage, reason, log_ratio]);
    [vec![VERSION, 4], body, text("")].concat()
}

fn invalid_prompts() -> Vec<Vec<u8>> {
    let default = Prompt::default();
    let prompts = [
        Prompt {
            ids: vec![1_000_000],
            ..default.clone()
        },
        Prompt {
            ids: Vec::new(),
            ..default.clone()
        },
        Prompt {
            ids: vec![0; 10_000],
            ..default.clone()
        },
        Prompt {
            session: u64::MAX,
            ..default.clone()
        },
        Prompt {
            session: 1,
            ..default.clone()
        },
        Prompt {
            step: u64::MAX,
            ..default.clone()
        },
        Prompt {
            first: 0,
            count: 3,
            ..default.clone()
        },
        // Weights that might still come, but do not come in time.
        Prompt {
            step: 900,
            ..default
        },
    ];
    prompts.iter().map(Prompt::message).collect()
}

fn invalid_pairs() -> Vec<Vec<u8>> {
    let pairs = [
        Pair {
            tokens: vec![0, 1_000_000],
            ..Pair::default()
        },
        Pair {
            tokens: vec![0],
            ..Pair::default()
        },
        Pair {
            tokens: vec![0; 300],
            ..Pair::default()
        },
        Pair {
            logp: f32::NAN,
            ..Pair::default()
        },
        Pair {
            session: u64::MAX,
            ..Pair::default()
        },
        Pair {
            step: u64::MAX,
            ..Pair::default()
        },
    ];
    pairs.iter().map(Pair::message).collect()
}

fn invalid_labels_and_notes() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let pair = Pair::default();
    let future = Pair {
        step: u64::MAX,
        ..Pair::default()
    };
    let labelled = vec![
        pair.labelled(&[]),
        pair.labelled(&[(1, 0)]),
        pair.labelled(&[(0, 1), (0, 1)]),
        future.labelled(&[(0, 1)]),
    ];
    let (actor, identical, stale, no_signal) = (0, 0, 3, 7);
    let notes = vec![
        note(u64::MAX, actor, identical),
        note(0, actor, no_signal),
        note(0, actor, stale),
    ];
    (labelled, notes)
}

fn last_step(run: &Path) -> u64 {
    let last = steps(run);
    last.last()
        .and_then(|line| line["step"].as_u64())
        .unwrap_or(0)
}

fn wait_for_steps(running: &mut RunningProcess, run: &Path, more: u64) {
    let from = last_step(run);
    running.until("more steps", || {
        (last_step(run) >= from + more).then_some(())
    });
}

#[test]
fn invalid_messages_are_counted_dead_lettered_and_logged_and_end_nothing() {
    if !has_nats_server() {
        return;
    }
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let server = NatsServer::start(&sandbox);
    let url = format!("transport.url=nats://127.0.0.1:{}", server.port());
    let arguments = tiny_bandit(
        &run,
        &[
            "run.name=forged",
            "transport.kind=jetstream",
            "transport.lease_seconds=2",
            &url,
            "learner.steps=100000",
            "learner.max_staleness=2",
            "learner.batch_timeout_seconds=60",
            // With room for one prompt: a prompt that waits must not hold up the others.
            "actor.slots=2",
            "learner.train_batch_size=4",
        ],
    );
    let mut running = sandbox.start(&arguments);
    wait_for_steps(&mut running, &run, 3);

    let mut client = Client::connect(server.port());
    let (labelled, notes) = invalid_labels_and_notes();
    let streams = [
        ("prompts", invalid_prompts()),
        ("pairs", invalid_pairs()),
        ("labelled-pairs", labelled),
        ("dropped-prompts.actor", notes),
    ];
    for (stream, messages) in &streams {
        for message in messages {
            client.publish(&format!("agon.forged-{stream}"), message);
        }
        // Its length is a lie.
        let prefix = [vec![VERSION, 1], numbers(&[1, 1, 1, 0, 0, 0, 1, u64::MAX])].concat();
        client.publish(&format!("agon.forged-{stream}"), &prefix);
    }
    let sent: usize = streams.iter().map(|(_, messages)| messages.len() + 1).sum();
    let mut dead_letters = 0;
    wait_until("every message is rejected", || {
        dead_letters = client.messages("agon-forged-dead-letters");
        (dead_letters >= sent as u64).then_some(())
    });
    assert_eq!(dead_letters, sent as u64);
    let counts = streams.map(|(_, messages)| messages.len());
    // The report of an interrupted run has the other processes' last heartbeats.
    running.until("actor and preference service to report them", || {
        let stages = status_now(&sandbox, &run)?["stages"].take();
        let is_reported = |(stage, invalid): (&str, usize)| {
            stages[stage]["dropped"]["invalid"].as_u64() == Some(invalid as u64)
        };
        let mut others = by_stage(counts).into_iter().take(2);
        others.all(is_reported).then_some(())
    });
    wait_for_steps(&mut running, &run, 3);
    running.terminate();
    let output = running.wait().check(5, &[]);

    assert_counted(&run, counts);
    assert_logged(&output.stderr, counts);
    output.without_panic();
}

/// Number of invalid messages that each stage receives, of these numbers on the four streams.
fn by_stage([prompts, pairs, labelled, notes]: [usize; 4]) -> [(&'static str, usize); 3] {
    [
        ("actor", prompts),
        ("preference", pairs),
        ("learner", labelled + notes),
    ]
}

/// Asserts that every stage counted its invalid messages, of which each stream had this number.
fn assert_counted(run: &Path, counts: [usize; 4]) {
    let report = report(run);
    for (stage, invalid) in by_stage(counts) {
        let counters = &report["stages"][stage];
        assert_eq!(counters["conserved"], true, "{stage}: {counters:#}");
        let found = number(counters, "/dropped/invalid");
        assert_eq!(found as usize, invalid, "{stage}: {counters:#}");
    }
}

/// Asserts that every invalid message was logged once, and that no process ended.
fn assert_logged(log: &str, counts: [usize; 4]) {
    let whats = ["prompt", "pair", "labelled pair", "drop note"];
    for (what, count) in whats.into_iter().zip(counts) {
        let what = format!("an invalid {what} was rejected");
        let lines = log.lines().filter(|line| line.contains(&what));
        assert_eq!(lines.count(), count, "{what}: {log}");
    }
    assert!(
        log.contains("token 1000000, which is not in the vocabulary"),
        "{log}"
    );
    assert!(!log.contains("a process ended"), "{log}");
}
