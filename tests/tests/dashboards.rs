//! Dashboards and alerts: every metric they use exists, and on a live run every panel shows data.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use system_tests::{
    RunningProcess, Sandbox, has_nats_server, http, present, signal, status, status_now,
    tiny_bandit, tiny_playground, tool, wait_until, workspace_root,
};

/// Substrings of expressions that may be empty on the runs of these tests, with the reason.
const MAY_BE_EMPTY: [(&str, &str); 7] = [
    ("agon_beta", "the temperature of IPO is called tau"),
    (
        "agon_objective_scores",
        "these judges give completions no scores",
    ),
    (
        "agon_objective_kl{",
        "pairs of older weights, or of the mixture, cannot estimate it",
    ),
    (
        "agon_judge_order_inconsistency",
        "these judges are antisymmetric by construction and evaluated in one order",
    ),
    (
        "agon_judge_position_bias",
        "these judges are antisymmetric by construction and evaluated in one order",
    ),
    (
        "agon_judge_model_changes",
        "these judges are in the process, and no other model answers for them",
    ),
    ("agon_judge_human", "nobody gives verdicts on these runs"),
];

fn folder() -> PathBuf {
    workspace_root().join("dashboards")
}

/// File name and content of every dashboard.
fn dashboards() -> BTreeMap<String, Value> {
    let files = fs::read_dir(folder().join("grafana/dashboards")).expect("there are dashboards");
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.expect("a directory entry").path();
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = path
            .file_name()
            .expect("a file has a name")
            .to_string_lossy()
            .into_owned();
        (
            name,
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display())),
        )
    };
    files.map(read).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Every expression of every panel, with its dashboard and panel title.
fn panel_expressions() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (file, dashboard) in dashboards() {
        for panel in list(&dashboard["panels"]) {
            for target in list(&panel["targets"]) {
                let expression = target["expr"].as_str().expect("a target has an expression");
                found.push((format!("{file}, {}", panel["title"]), expression.to_owned()));
            }
        }
    }
    found
}

/// The values of `key:` in the alert rules, each with the name of its alert. Folded expressions are joined.
fn rules(key: &str) -> Vec<(String, String)> {
    let text =
        fs::read_to_string(folder().join("prometheus/alerts.yml")).expect("there are alerts");
    let mut found: Vec<(String, String)> = Vec::new();
    let (mut alert, mut is_folded) = (String::new(), false);
    for line in text.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("- alert: ") {
            name.clone_into(&mut alert);
        } else if let Some(value) = line.strip_prefix(&format!("{key}: ")) {
            is_folded = value == ">-";
            let value = if is_folded { "" } else { value };
            found.push((alert.clone(), value.to_owned()));
        } else if is_folded && !line.starts_with("for:") && !line.starts_with("labels:") {
            let (_, expression) = found.last_mut().expect("a folded value follows its key");
            *expression = format!("{expression} {line}");
        } else {
            is_folded = false;
        }
    }
    found
}

/// Names of the metrics in an expression.
fn metrics_in(expression: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = expression.split(|c| !is_part(c));
    let is_metric = |word: &&str| word.starts_with("agon_") || word.starts_with("process_");
    words.filter(is_metric).map(str::to_owned).collect()
}

/// Every series name that the program declares, from `agon metrics`.
fn declared_series(sandbox: &Sandbox) -> BTreeSet<String> {
    let page = sandbox.run(&["metrics"]).succeeded().stdout;
    let mut known = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let name = line.split('`').nth(1).expect("a row begins with a name");
        known.insert(name.to_owned());
        if line.contains("| histogram |") {
            known.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}")));
        }
    }
    known
}

#[test]
fn every_metric_of_a_panel_or_an_alert_exists() {
    let known = declared_series(&Sandbox::new());
    assert!(known.len() > 100, "{known:?}");
    let all = panel_expressions().into_iter().chain(rules("expr"));
    let mut seen = 0;
    for (location, expression) in all {
        let metrics = metrics_in(&expression);
        assert!(
            !metrics.is_empty() || expression.starts_with("up{"),
            "{location}: {expression}"
        );
        for metric in metrics {
            assert!(
                known.contains(&metric),
                "{location} uses {metric}, which is not declared"
            );
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} metrics are used");
}

#[test]
fn dashboards_have_valid_layouts_and_descriptions() {
    let dashboards = dashboards();
    assert_eq!(dashboards.len(), 4);
    let mut uids = BTreeSet::new();
    for (file, dashboard) in &dashboards {
        assert!(
            uids.insert(dashboard["uid"].as_str().expect("a dashboard has a uid")),
            "{file}"
        );
        assert!(
            dashboard["schemaVersion"]
                .as_u64()
                .expect("a schema has a version")
                >= 41
        );
        assert_eq!(
            dashboard["templating"]["list"][0]["type"], "datasource",
            "{file}"
        );
        let (mut ids, mut occupied) = (BTreeSet::new(), BTreeSet::new());
        for panel in list(&dashboard["panels"]) {
            let title = &panel["title"];
            assert!(
                ids.insert(panel["id"].as_u64()),
                "{file}, {title}: duplicate id"
            );
            let of = |key: &str| {
                panel["gridPos"][key]
                    .as_u64()
                    .expect("a panel has a position")
            };
            for x in of("x")..of("x") + of("w") {
                assert!(x < 24, "{file}, {title} exceeds the grid");
                for y in of("y")..of("y") + of("h") {
                    assert!(
                        occupied.insert((x, y)),
                        "{file}, {title} overlaps another panel"
                    );
                }
            }
            if panel["type"] != "row" {
                assert_ne!(
                    panel["description"].as_str().unwrap_or_default(),
                    "",
                    "{file}, {title}"
                );
                assert_eq!(
                    panel["datasource"]["uid"], "${datasource}",
                    "{file}, {title}"
                );
                assert!(
                    !list(&panel["targets"]).is_empty(),
                    "{file}, {title} has no query"
                );
            }
        }
    }
}

#[test]
fn every_alert_has_a_runbook_and_tests() {
    let alerts: Vec<_> = rules("expr").into_iter().map(|(alert, _)| alert).collect();
    assert!(alerts.len() >= 8, "{alerts:?}");
    for key in ["summary", "runbook", "severity"] {
        let of: Vec<_> = rules(key).into_iter().map(|(alert, _)| alert).collect();
        assert_eq!(of, alerts, "every alert has its {key}");
    }
    let tests = fs::read_to_string(folder().join("prometheus/alerts_test.yml"));
    let tests = tests.expect("there are tests of the alerts");
    for alert in &alerts {
        assert!(
            tests.contains(&format!("alertname: {alert}}}")),
            "no test of {alert} expects it to be inactive"
        );
        assert!(
            tests.contains(&format!("alertname=\"{alert}\"")),
            "no test of {alert} expects it to fire"
        );
    }
    let test = "every_alert_has_a_runbook_and_tests";
    let Some(promtool) = tool(test, &["promtool"]) else {
        return;
    };
    for arguments in [
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "alerts_test.yml"],
    ] {
        let checked = Command::new(&promtool)
            .args(arguments)
            .current_dir(folder().join("prometheus"))
            .output()
            .expect("promtool starts");
        let text =
            String::from_utf8_lossy(&checked.stdout) + String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "promtool {arguments:?}: {text}");
    }
}

/// Whether Prometheus is ready; it listens before it is.
fn ready(port: u16) -> Option<()> {
    let mut client = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let request = "GET /-/ready HTTP/1.1\r\nHost: prometheus\r\nConnection: close\r\n\r\n";
    client.write_all(request.as_bytes()).ok()?;
    let mut response = String::new();
    client.read_to_string(&mut response).ok()?;
    response.starts_with("HTTP/1.1 200").then_some(())
}

/// A Prometheus server; killed on drop.
struct Prometheus {
    process: Child,
    base: String,
}

impl Prometheus {
    /// Starts Prometheus with HTTP service discovery at these addresses, a scrape interval of one second and the alert
    /// rules.
    fn start(program: &Path, sandbox: &Sandbox, discovery: &[String]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let port = port.expect("there is a free port").port();
        let endpoint = |address| format!("{{url: http://{address}/targets, refresh_interval: 1s}}");
        let discovery: Vec<_> = discovery.iter().map(endpoint).collect();
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{:?}]\n\
             scrape_configs: [{{job_name: agon, http_sd_configs: [{}]}}]\n",
            folder().join("prometheus/alerts.yml"),
            discovery.join(", ")
        );
        let config = sandbox.write("prometheus.yml", config);
        let base = format!("http://127.0.0.1:{port}");
        let process = Command::new(program)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                sandbox.path("prometheus").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Prometheus starts");
        wait_until("Prometheus", || ready(port));
        Self { process, base }
    }

    /// Evaluates an instant query.
    fn query(&self, expression: &str) -> Vec<Value> {
        let escape = |byte: u8| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        };
        let encoded: String = expression.bytes().map(escape).collect();
        let (status, answer) = http(
            &self.base,
            "GET",
            &format!("/api/v1/query?query={encoded}"),
            "",
        );
        assert_eq!(status, 200, "{expression}: {answer}");
        list(&answer["data"]["result"]).to_vec()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // Errors mean that the process has exited already.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Metrics address that a run logs.
fn metrics_address(running: &mut RunningProcess) -> String {
    let [_, stderr] = running.output_files();
    running.until("the address of the metrics", || {
        let text = fs::read_to_string(&stderr).ok()?;
        let (_, rest) = text.split_once("metrics=\"http://")?;
        Some(rest.split_once("/metrics")?.0.to_owned())
    })
}

#[test]
fn every_panel_and_alert_has_data_on_live_runs() {
    let test = "every_panel_and_alert_has_data_on_live_runs";
    let Some(program) = tool(test, &["prometheus"]) else {
        return;
    };
    let sandbox = Sandbox::new();
    let bandit = sandbox.path("bandit");
    let mut bandit = sandbox.start(&tiny_bandit(
        &bandit,
        &["learner.steps=1000000", "evaluation.eval_steps=50"],
    ));
    let apo = sandbox.path("apo");
    let mut apo = sandbox.start(&tiny_playground(
        &apo,
        &[
            "learner.steps=1000000",
            "learner.max_staleness=2",
            "learner.off_policy=truncate",
            "learner.ema_decay=0.9",
            "reference.kind=every",
            "reference.every_steps=5",
            "evaluation.eval_steps=10",
            "evaluation.judge={kind=\"rule\",rules=[{kind=\"ended\",weight=1.0}]}",
            "preference.judge.kind=bradley-terry",
            "preference.fit.pairs.count=60",
            "preference.fit.train_batch_size=16",
            "preference.apo.refresh_steps=20",
            "preference.apo.prompts=6",
            "preference.apo.samples=3",
            "preference.apo.min_accuracy=0",
            "preference.apo.max_ece=1",
        ],
    ));
    let discovery = [metrics_address(&mut bandit), metrics_address(&mut apo)];
    let prometheus = Prometheus::start(&program, &sandbox, &discovery);
    let expected = |expression: &str| {
        !MAY_BE_EMPTY
            .iter()
            .any(|(part, _)| expression.contains(part))
    };
    for (location, expression) in panel_expressions() {
        let query = expression
            .replace("$instance", ".*")
            .replace("$__rate_interval", "10s");
        if !expected(&expression) {
            prometheus.query(&query);
            continue;
        }
        wait_until(&format!("{location}: {query}"), || {
            (!prometheus.query(&query).is_empty()).then_some(())
        });
    }
    for (alert, expression) in rules("expr") {
        prometheus.query(&expression);
        for metric in metrics_in(&expression) {
            assert!(
                !expected(&metric) || !prometheus.query(&metric).is_empty(),
                "{alert} uses {metric}, which has no data"
            );
        }
    }
    let firing = prometheus.query("ALERTS{alertstate=\"firing\", alertname!=\"AgonEceDrift\", alertname!=\"AgonDiskFilling\"}");
    assert!(firing.is_empty(), "{firing:?}");
    for running in [bandit, apo] {
        running.terminate();
        running.wait().check(5, &[]).without_panic();
    }
}

#[test]
fn all_processes_of_a_cluster_are_discovered_and_their_counters_summed() {
    let test = "all_processes_of_a_cluster_are_discovered_and_their_counters_summed";
    let Some(program) = tool(test, &["prometheus"]) else {
        return;
    };
    if !has_nats_server() {
        return;
    }
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
    let address = port.expect("there is a free port").to_string();
    let running = sandbox.start(&tiny_bandit(
        &run,
        &[
            "run.name=watched",
            "learner.steps=1000000",
            "learner.max_staleness=2",
            "transport.kind=jetstream",
            "transport.lease_seconds=2",
            "topology.actors=2",
            "topology.preference=2",
            &format!("telemetry.listen={address}"),
        ],
    ));
    wait_until("a learner", || status_now(&sandbox, &run));
    let prometheus = Prometheus::start(&program, &sandbox, &[address]);
    let value = |expression: &str| -> Option<f64> {
        let found = prometheus.query(expression);
        found.first()?["value"][1].as_str()?.parse().ok()
    };
    let processes = [
        "actor-0",
        "actor-1",
        "preference-0",
        "preference-1",
        "launcher",
    ];
    for process in processes {
        wait_until(process, || {
            value(&format!(
                "up{{run=\"watched\", process=\"{process}\"}} == 1"
            ))
        });
    }
    // The learner is labelled with its host name.
    wait_until("six processes", || value("count(up == 1) == 6"));
    for stage in ["actor", "preference", "learner"] {
        let emitted = format!("sum(agon_stage_emitted_total{{stage=\"{stage}\"}}) > 100");
        wait_until(&emitted, || value(&emitted));
    }
    for stream in ["prompts", "pairs", "labelled pairs", "dropped prompts"] {
        let fill = format!("agon_stream_fill{{stream=\"{stream}\"}} <= 1");
        wait_until(&fill, || value(&fill));
    }
    // A restarted process is discovered again and counted.
    let now = status(&sandbox, &run);
    let (name, pid) = present(&now, "actor").remove(0);
    signal(pid, "KILL");
    wait_until("the restart", || {
        value("sum(agon_health_actor_restarts) == 1")
    });
    wait_until("the actor", || {
        let actors = present(&status_now(&sandbox, &run)?, "actor");
        actors
            .iter()
            .any(|one| one.0 == name && one.1 != pid)
            .then_some(())
    });
    let up = format!("up{{process=\"{name}\"}} == 1");
    wait_until(&up, || value(&up));
    running.terminate();
    running.wait().check(5, &[]).without_panic();
}
