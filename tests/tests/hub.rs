//! Models of the Hugging Face hub: downloaded once, cached, and reported with a remedy when unavailable. A fake hub
//! stands in for the real one.

use std::{
    fs,
    path::{Path, PathBuf},
};

use playground::Bandit;
use serde_json::Value;
use system_tests::{
    FakeHub, HUB_COMMIT, HUB_REPOSITORY, HubLies, ProcessOutput, Sandbox, agon_with_hub, config,
    has_nats_server, report, run_with_hub,
};

const MODEL: &str = "hf:org/tiny";

/// URL of a closed port.
const CLOSED_URL: &str = "http://127.0.0.1:1";

/// Writes a model with a vocabulary of two tokens.
fn model(sandbox: &Sandbox) -> PathBuf {
    let folder = sandbox.path("published");
    fs::create_dir_all(&folder).expect("a folder in the sandbox");
    let bandit = Bandit::new(&[0.7, 0.3]).expect("two probabilities");
    bandit.write_model(&folder).expect("the file is writable");
    folder
}

/// Splits the weights of a model into two shards with an index.
fn shard(folder: &Path) {
    let single = folder.join("model.safetensors");
    let bytes = fs::read(&single).expect("the file was written");
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).expect("a header");
    let mut map = serde_json::Map::new();
    let mut shards = [(serde_json::Map::new(), Vec::new()), Default::default()];
    let tensors = header.as_object().expect("tensors by name").iter();
    let tensors = tensors.filter(|(name, _)| *name != "__metadata__");
    for (index, (name, tensor)) in tensors.enumerate() {
        let offset = |end: usize| tensor["data_offsets"][end].as_u64().expect("an offset") as usize;
        let (header, shard) = &mut shards[index % 2];
        let begin = shard.len();
        shard.extend_from_slice(&data[offset(0)..offset(1)]);
        let mut tensor = tensor.clone();
        tensor["data_offsets"] = serde_json::json!([begin, shard.len()]);
        header.insert(name.clone(), tensor);
        map.insert(
            name.clone(),
            format!("model-{}.safetensors", index % 2).into(),
        );
    }
    for (index, (header, data)) in shards.into_iter().enumerate() {
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        fs::write(folder.join(format!("model-{index}.safetensors")), bytes).expect("a shard");
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(folder.join("model.safetensors.index.json"), index).expect("an index");
    fs::remove_file(single).expect("the file was written");
}

/// Arguments of `agon score` for some tokens and `model`.
fn score(sandbox: &Sandbox, model: &str) -> Vec<String> {
    let rows = sandbox.write("rows.jsonl", "{\"ids\": [0, 1, 1, 0]}\n");
    let rows = rows.display().to_string();
    let arguments = ["score", "--model", model, "--input", &rows];
    arguments.map(str::to_owned).to_vec()
}

/// Runs `agon score` with this hub.
fn scored(sandbox: &Sandbox, url: &str, model: &str, variables: &[(&str, &str)]) -> ProcessOutput {
    run_with_hub(sandbox, url, &score(sandbox, model), variables)
}

#[test]
fn a_hub_model_is_downloaded_once_and_then_cached() {
    for sharded in [false, true] {
        let sandbox = Sandbox::new();
        let folder = model(&sandbox);
        let local = sandbox.run(&score(&sandbox, &folder.display().to_string()));
        let expected = local.succeeded().stdout;
        if sharded {
            shard(&folder);
        }
        fs::write(folder.join("pytorch_model.bin"), "unused").expect("a file");
        let hub = FakeHub::start(&folder, None);
        let first =
            scored(&sandbox, &hub.url(), MODEL, &[]).check(0, &[HUB_COMMIT, "fetching a model"]);
        assert_eq!(first.stdout, expected, "sharded: {sharded}");
        let count_files = |requests: &[String]| {
            requests
                .iter()
                .filter(|path| !path.starts_with("/api/"))
                .count()
        };
        let requests = hub.requests();
        assert!(
            requests.iter().all(|path| !path.contains("pytorch_model")),
            "{requests:?}"
        );

        // Cached files are not downloaded again, under any name of the revision.
        for name in [MODEL, "hf:org/tiny@v1"] {
            let again = scored(&sandbox, &hub.url(), name, &[]).succeeded();
            assert_eq!(again.stdout, expected);
        }
        assert_eq!(count_files(&hub.requests()), count_files(&requests));

        // No request is made when offline; an unreachable hub causes a warning.
        let before = hub.requests().len();
        let offline = [("HF_HUB_OFFLINE", "1")];
        let offline_output = scored(&sandbox, &hub.url(), "hf:org/tiny@main", &offline).succeeded();
        assert_eq!(
            (offline_output.stdout, hub.requests().len()),
            (expected.clone(), before)
        );
        let unreachable =
            scored(&sandbox, CLOSED_URL, MODEL, &[]).check(0, &["the hub cannot be reached"]);
        assert_eq!(unreachable.stdout, expected);
        let commit = format!("{MODEL}@{HUB_COMMIT}");
        assert_eq!(
            scored(&sandbox, CLOSED_URL, &commit, &[])
                .succeeded()
                .stdout,
            expected
        );
    }
}

#[test]
fn an_existing_cache_is_used_and_completed() {
    let sandbox = Sandbox::new();
    let folder = model(&sandbox);
    let hub = FakeHub::start(&folder, None);
    // The cache layout of Python's huggingface_hub, in the folder given by HF_HUB_CACHE.
    let cache = sandbox.path("elsewhere");
    let repository = cache.join("models--org--tiny");
    let snapshot = repository.join("snapshots").join(HUB_COMMIT);
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::create_dir_all(repository.join("refs")).expect("a folder");
    fs::write(repository.join("refs/main"), HUB_COMMIT).expect("a reference");
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(folder.join(file), snapshot.join(file)).expect("a copy");
    }
    let cache = cache.display().to_string();
    let variables = [("HF_HUB_CACHE", cache.as_str())];
    // An incomplete model cannot be used offline.
    scored(&sandbox, CLOSED_URL, MODEL, &variables)
        .check(3, &["hf:org/tiny@main is not in the cache at", &cache])
        .without_panic();
    scored(&sandbox, &hub.url(), MODEL, &variables).succeeded();
    let requests = hub.requests();
    let is_cached =
        |path: &String| path.ends_with("/config.json") || path.ends_with("/tokenizer.json");
    assert!(!requests.iter().any(is_cached), "{requests:?}");
    for missing in ["/tokenizer_config.json", "/model.safetensors"] {
        let is_requested = requests.iter().any(|path| path.ends_with(missing));
        assert!(is_requested, "{missing}: {requests:?}");
    }
    scored(&sandbox, CLOSED_URL, MODEL, &variables).succeeded();
    assert!(
        !sandbox.path("hf").exists(),
        "HF_HUB_CACHE takes precedence over HF_HOME"
    );
}

/// Hub URL, model, environment variables, and expected fragments of the error.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);

fn assert_rejected(sandbox: &Sandbox, cases: &[Case<'_>]) {
    for (url, model, variables, says) in cases {
        let output = scored(sandbox, url, model, variables);
        let output = output.check(3, says).without_panic();
        for (_, value) in variables.iter().filter(|(name, _)| *name == "HF_TOKEN") {
            assert!(!output.stderr.contains(value), "{}", output.stderr);
        }
    }
}

#[test]
fn unavailable_models_are_reported_with_a_remedy() {
    let sandbox = Sandbox::new();
    let folder = model(&sandbox);
    let complete = FakeHub::start(&folder, None).url();
    fs::remove_file(folder.join("model.safetensors")).expect("the file was written");
    fs::write(folder.join("pytorch_model.bin"), "x").expect("a file");
    let without_weights = FakeHub::start(&folder, None).url();
    let cache = sandbox.path("hf").join("hub").display().to_string();
    let absent = "hf:org/tiny@main is not in the cache at";
    let unreachable = [absent, &cache, "refused", "name its folder, or set HF_HOME"];
    let offline = [absent, "HF_HUB_OFFLINE is set"];
    let cases: [Case<'_>; 5] = [
        (CLOSED_URL, MODEL, &[], &unreachable),
        (&complete, MODEL, &[("HF_HUB_OFFLINE", "1")], &offline),
        (
            &complete,
            "hf:org/other",
            &[],
            &["has no model org/other", "HF_TOKEN"],
        ),
        (
            &complete,
            "hf:org/tiny@v9",
            &[],
            &["org/tiny has no branch, tag or commit v9"],
        ),
        (
            &without_weights,
            MODEL,
            &[],
            &["has no safetensors (it has pytorch_model.bin)"],
        ),
    ];
    assert_rejected(&sandbox, &cases);
    let unnamed = scored(&sandbox, &complete, "hf:tiny", &[]);
    unnamed.check(2, &["hf:ORG/NAME@REVISION"]).without_panic();
}

#[test]
fn a_gated_model_needs_a_token_with_access() {
    let sandbox = Sandbox::new();
    let hub = FakeHub::start(&model(&sandbox), Some("hf_right")).url();
    let without = [
        "org/tiny is gated",
        "401",
        "HF_TOKEN is not set",
        "/org/tiny",
    ];
    let wrong = [
        "org/tiny is gated",
        "403",
        "the token in HF_TOKEN gives no access",
    ];
    let cases: [Case<'_>; 3] = [
        (&hub, MODEL, &[], &without),
        (&hub, MODEL, &[("HF_TOKEN", "hf_wrong")], &wrong),
        (
            &hub,
            MODEL,
            &[("HF_TOKEN", "hf_a b")],
            &["HF_TOKEN is not a token"],
        ),
    ];
    assert_rejected(&sandbox, &cases);
}

#[test]
fn the_token_of_a_login_is_sent_to_the_hub() {
    let sandbox = Sandbox::new();
    let hub = FakeHub::start(&model(&sandbox), Some("hf_right")).url();
    fs::create_dir_all(sandbox.path("hf")).expect("a folder");
    let file = sandbox.write("hf/token", "hf_wrong\n");
    let wrong = [
        "403",
        "the token in",
        "hf/token gives no access",
        "hf auth login",
    ];
    let cases: [Case<'_>; 2] = [
        (&hub, MODEL, &[], &wrong),
        (
            &hub,
            MODEL,
            &[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")],
            &["401", "HF_HUB_DISABLE_IMPLICIT_TOKEN is set"],
        ),
    ];
    assert_rejected(&sandbox, &cases);
    fs::write(file, "hf_right\n").expect("the file is writable");
    let output = scored(&sandbox, &hub, MODEL, &[]);
    output.check(0, &[]).without_panic();
}

#[test]
fn the_token_is_sent_to_the_hub_only() {
    let sandbox = Sandbox::new();
    let hub = FakeHub::start(&model(&sandbox), Some("hf_right"));
    let arguments = score(&sandbox, MODEL);
    let mut command = agon_with_hub(&sandbox, &hub.url(), &arguments);
    command.env("HF_TOKEN", "hf_right").env("AGON_LOG", "trace");
    let output = command.output().expect("agon starts");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    // The trace log does not contain the token.
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "{log}");
    assert!(!log.contains("hf_right"), "{log}");
    // The weights came from another server.
    let requests = hub.requests();
    assert!(requests.iter().any(|path| path.starts_with("/redirected/")));
    assert_eq!(hub.delivered_tokens(), [""; 0]);
    let doctor = run_with_hub(
        &sandbox,
        &hub.url(),
        &["doctor"],
        &[("HF_TOKEN", "hf_right")],
    );
    let line = doctor.stdout.lines().find(|line| line.contains(" hub "));
    let line = line.expect("a line on the hub");
    assert!(
        line.contains(&hub.url()) && line.contains("token from HF_TOKEN"),
        "{line}"
    );
    assert!(!line.contains("hf_right"), "{line}");
}

#[test]
fn a_redirect_to_another_host_does_not_carry_the_token() {
    let sandbox = Sandbox::new();
    let lies = HubLies {
        redirects_everything: true,
        ..HubLies::default()
    };
    let hub = FakeHub::hostile(&model(&sandbox), Some("hf_right"), lies);
    scored(&sandbox, &hub.url(), MODEL, &[("HF_TOKEN", "hf_right")]).succeeded();
    assert_eq!(hub.delivered_tokens(), [""; 0]);

    let endpoint = hub.url().replace("http://", "http://user:hf_secret@");
    let output = scored(&sandbox, &endpoint, MODEL, &[]);
    let output = output.check(3, &["HF_ENDPOINT", "has a user name or password"]);
    assert!(!output.stderr.contains("hf_secret"), "{}", output.stderr);
}

/// Lies of a hostile hub about a file outside of the cache at the path `planted`, each with a fragment of the error.
fn hostile_hubs(planted: &str) -> Vec<(HubLies, &'static str)> {
    let up = "../../../../../../planted";
    let etag = |etag: &str| HubLies {
        etag: Some(etag.to_owned()),
        ..HubLies::default()
    };
    let commit = |commit: &str| HubLies {
        commit: Some(commit.to_owned()),
        ..HubLies::default()
    };
    let sha = |sha: &str| HubLies {
        sha: Some(sha.to_owned()),
        ..HubLies::default()
    };
    let sibling = |name: &str| HubLies {
        siblings: vec![name.to_owned()],
        ..HubLies::default()
    };
    let location = |location: &str| HubLies {
        location: Some(location.to_owned()),
        ..HubLies::default()
    };
    let size = |size: u64| HubLies {
        size: Some(size),
        ..HubLies::default()
    };
    vec![
        (etag(planted), "has a path separator"),
        (etag(up), "has a path separator"),
        (etag(".."), "it names a folder"),
        (etag(""), "it is empty"),
        (commit(planted), "is of the commit"),
        (commit(up), "is of the commit"),
        (sha(planted), "as its commit"),
        (sha(up), "as its commit"),
        (sha(""), "as its commit"),
        (sibling(planted), "no path in a repository"),
        (sibling(up), "no path in a repository"),
        (
            sibling("LICENSE/../../../../../../planted"),
            "no path in a repository",
        ),
        (location("file:///etc/passwd"), "which is not HTTP"),
        (location("http://"), "to what is no URL"),
        (size(1), "has more than 1 bytes"),
        (size(1 << 50), "more than"),
    ]
}

#[test]
fn a_hostile_hub_writes_nothing_outside_of_its_cache() {
    let sandbox = Sandbox::new();
    let folder = model(&sandbox);
    let planted = sandbox.path("planted");
    let tokens = [("HF_TOKEN", "hf_right")];
    for (lies, says) in hostile_hubs(&planted.display().to_string()) {
        let hub = FakeHub::hostile(&folder, Some("hf_right"), lies.clone());
        let output = scored(&sandbox, &hub.url(), MODEL, &tokens);
        output.check(3, &["hf:org/tiny@main", says]).without_panic();
        assert!(!planted.exists(), "{lies:?}");
        assert_eq!(hub.delivered_tokens(), [""; 0], "{lies:?}");
        fs::remove_dir_all(sandbox.path("hf")).ok();
    }
}

#[test]
fn the_index_of_a_hub_model_names_files_of_its_repository_only() {
    let sandbox = Sandbox::new();
    let folder = model(&sandbox);
    shard(&folder);
    for path in [
        "../../../../secret.safetensors",
        "/dev/zero",
        "missing.safetensors",
    ] {
        let index = serde_json::json!({"weight_map": {"model.norm.weight": path}});
        let file = folder.join("model.safetensors.index.json");
        fs::write(file, index.to_string()).expect("an index");
        let hub = FakeHub::start(&folder, None);
        let output = scored(&sandbox, &hub.url(), MODEL, &[]);
        output
            .check(3, &["model.safetensors.index.json", path])
            .without_panic();
        fs::remove_dir_all(sandbox.path("hf")).expect("the cache was used");
    }
}

#[test]
fn an_interrupted_download_is_resumed() {
    let sandbox = Sandbox::new();
    let folder = model(&sandbox);
    let hub = FakeHub::start(&folder, None);
    let blobs = sandbox.path("hf/hub/models--org--tiny/blobs");
    fs::create_dir_all(&blobs).expect("a folder");
    let weights = fs::read(folder.join("model.safetensors")).expect("the file was written");
    let partial = blobs.join("model.safetensors-1.part");
    fs::write(&partial, &weights[..weights.len() / 2]).expect("a part of a blob");
    scored(&sandbox, &hub.url(), MODEL, &[]).succeeded();
    let blob = fs::read(blobs.join("model.safetensors-1")).expect("a blob");
    assert!(blob == weights, "the blob differs from the file");
    assert!(!partial.exists());
}

/// Settings of a short run on `model`.
fn sets(sandbox: &Sandbox, model: &str) -> Vec<String> {
    let prompts = sandbox.write(
        "prompts.jsonl",
        "{\"prompt\": \"arm0\"}\n{\"prompt\": \"arm1\"}\n",
    );
    let sets = [
        format!("model.path={model}"),
        "prompts.kind=dataset".into(),
        format!("prompts.path={prompts:?}"),
        "prompts.held_out=1".into(),
        "actor.max_prompt_length=4".into(),
        "actor.max_new_tokens=4".into(),
        "preference.judge.kind=rule".into(),
        "preference.judge.rules=[{ kind = \"keyword\", words = [\"arm1\"], weight = 1.0 }]".into(),
        "learner.steps=2".into(),
        "learner.train_batch_size=2".into(),
        "evaluation.prompts=2".into(),
    ];
    sets.into_iter()
        .flat_map(|set| ["--set".into(), set])
        .collect()
}

/// Arguments of `agon COMMAND` with the default configuration and these settings.
fn on_default(command: &str, sets: &[String]) -> Vec<String> {
    let default = config("default.toml").display().to_string();
    [&[command.to_owned(), default], sets].concat()
}

#[test]
fn check_reports_the_source_of_a_model_without_downloading() {
    let sandbox = Sandbox::new();
    let hub = FakeHub::start(&model(&sandbox), None);
    let arguments = on_default("check", &sets(&sandbox, MODEL));
    let check = |url: &str| run_with_hub(&sandbox, url, &arguments, &[]);
    let url = hub.url();
    check(&url).check(0, &["hf:org/tiny@main", HUB_COMMIT, &url, "fetched into"]);
    assert!(!sandbox.path("hf").exists());
    check(CLOSED_URL).check(3, &["model.path: hf:org/tiny@main is not in the cache"]);
    scored(&sandbox, &url, MODEL, &[]).succeeded();
    // A cached model is checked without the hub.
    check(CLOSED_URL).check(
        0,
        &[
            "hf:org/tiny@main, commit",
            HUB_COMMIT,
            "in the cache",
            "parameters",
        ],
    );
}

#[test]
fn a_run_starts_from_a_hub_model() {
    let sandbox = Sandbox::new();
    let hub = FakeHub::start(&model(&sandbox), None);
    let run = sandbox.path("run");
    let mut arguments = on_default("train", &sets(&sandbox, MODEL));
    arguments.extend(["--run-dir".into(), run.display().to_string()]);
    run_with_hub(&sandbox, &hub.url(), &arguments, &[]).succeeded();
    assert_eq!(report(&run)["steps"], 2);
    let saved = fs::read_to_string(run.join("config.toml")).expect("a configuration");
    assert!(
        saved.contains(&format!("path = \"{MODEL}@main\"")),
        "{saved}"
    );
    let requests = hub.requests();
    let infos = requests.iter().filter(|path| path.starts_with("/api/"));
    assert_eq!(infos.count(), 1, "{requests:?}");
    assert!(requests.iter().any(|path| path.contains(HUB_REPOSITORY)));
}

#[test]
fn only_the_launcher_and_the_learner_request_the_hub() {
    if !has_nats_server() {
        return;
    }
    let sandbox = Sandbox::new();
    let hub = FakeHub::start(&model(&sandbox), None);
    let run = sandbox.path("run");
    let mut arguments = on_default("train", &sets(&sandbox, MODEL));
    arguments.extend(["--run-dir".into(), run.display().to_string()]);
    for set in [
        "run.name=hub",
        "transport.kind=jetstream",
        "topology.actors=2",
    ] {
        arguments.extend(["--set".into(), set.into()]);
    }
    run_with_hub(&sandbox, &hub.url(), &arguments, &[]).succeeded();
    assert_eq!(report(&run)["steps"], 2);
    let requests = hub.requests();
    let infos = requests.iter().filter(|path| path.starts_with("/api/"));
    // The launcher, before it starts other processes, and the learner.
    assert_eq!(infos.count(), 2, "{requests:?}");
}

fn json(path: &Path) -> Value {
    let content = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&content).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Asserts that an adapter names the hub repository and commit of its base.
fn assert_names_hub_base(folder: &Path) {
    let config = json(&folder.join("adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], HUB_REPOSITORY);
    assert_eq!(config["revision"], HUB_COMMIT);
}

/// Asserts that a command finds the base that an adapter names, in the cache or by a download, and reports it as
/// missing otherwise. Returns standard output.
fn assert_finds_base(sandbox: &Sandbox, hub: &FakeHub, arguments: &[String]) -> String {
    let offline = [("HF_HUB_OFFLINE", "1")];
    let cached = run_with_hub(sandbox, CLOSED_URL, arguments, &offline).succeeded();
    let other = tempfile::tempdir().expect("a temporary directory");
    let cache = other.path().display().to_string();
    let other_cache = [("HF_HUB_CACHE", cache.as_str())];
    let absent = format!("{MODEL}@{HUB_COMMIT} is not in the cache");
    run_with_hub(sandbox, CLOSED_URL, arguments, &other_cache)
        .check(3, &["the base model of the adapter", &absent])
        .without_panic();
    let downloaded = run_with_hub(sandbox, &hub.url(), arguments, &other_cache).succeeded();
    assert_eq!(downloaded.stdout, cached.stdout);
    cached.stdout
}

#[test]
fn an_adapter_names_its_hub_model_and_finds_it_on_any_machine() {
    let sandbox = Sandbox::new();
    let folder = model(&sandbox);
    fs::write(folder.join("LICENSE.txt"), "some licence").expect("a file");
    fs::write(folder.join("README.md"), "some text").expect("a file");
    let hub = FakeHub::start(&folder, None);
    let run = sandbox.path("run");
    let mut arguments = on_default("train", &sets(&sandbox, "hf:org/tiny@v1"));
    arguments.extend(["--run-dir".into(), run.display().to_string()]);
    arguments.extend(["--set".into(), "model.lora_rank=2".into()]);
    arguments.extend(["--set".into(), "learner.learning_rate=0.1".into()]);
    run_with_hub(&sandbox, &hub.url(), &arguments, &[]).succeeded();
    let checkpoint = run.join("checkpoints/step_2");
    assert_names_hub_base(&checkpoint);
    assert!(checkpoint.join("LICENSE.txt").exists());
    assert!(!checkpoint.join("README.md").exists());
    let text = checkpoint.display().to_string();
    let of_run = assert_finds_base(&sandbox, &hub, &score(&sandbox, &text));
    let of_base = scored(&sandbox, &hub.url(), MODEL, &[]).succeeded().stdout;
    assert_ne!(of_run, of_base, "the adapter has no effect");

    // Adapters usually name no revision, or a branch.
    let mut config = json(&checkpoint.join("adapter_config.json"));
    config["revision"] = Value::Null;
    let unnamed = sandbox.copy_of(&checkpoint, "unnamed");
    fs::write(unnamed.join("adapter_config.json"), config.to_string()).expect("a copy");
    let unnamed = unnamed.display().to_string();
    let without_revision = scored(&sandbox, &hub.url(), &unnamed, &[]).succeeded();
    assert_eq!(without_revision.stdout, of_run);

    check_exports(&sandbox, &run, &of_run);
}

/// Exports of the adapter and of the merged model, each with the licence and the reported dtype; the base is cached.
fn check_exports(sandbox: &Sandbox, run: &Path, of_run: &str) {
    let run = run.display().to_string();
    for (name, more, says) in [
        ("adapter", &[][..], "an adapter of"),
        ("merged", &["--merge"], "a model of"),
        ("half", &["--merge", "--dtype", "bf16"], "a model of"),
    ] {
        let to = sandbox.path(name);
        let target = to.display().to_string();
        let arguments = [&["export", "--run", &run, "--output", &target], more].concat();
        let dtype = match name {
            "half" => "in bfloat16",
            _ => "in float32",
        };
        let offline = [("HF_HUB_OFFLINE", "1")];
        run_with_hub(sandbox, CLOSED_URL, &arguments, &offline).check(0, &[says, dtype]);
        assert!(to.join("LICENSE.txt").exists(), "{name}");
        if name == "adapter" {
            assert_names_hub_base(&to);
        } else {
            let dtype_key = json(&to.join("config.json"))["dtype"].clone();
            assert_eq!(format!("in {}", dtype_key.as_str().expect("a name")), dtype);
        }
        if name != "half" {
            let arguments = score(sandbox, &target);
            let found = run_with_hub(sandbox, CLOSED_URL, &arguments, &offline).succeeded();
            assert_close(&found.stdout, of_run);
        }
    }
}

/// Asserts that log-probabilities differ by rounding only.
fn assert_close(found: &str, expected: &str) {
    let logprobs = |line: &str| -> Vec<f64> {
        let row: Value = serde_json::from_str(line.trim()).expect("a row");
        serde_json::from_value(row["logprobs"].clone()).expect("log-probabilities")
    };
    let pairs = logprobs(found).into_iter().zip(logprobs(expected));
    assert!(
        pairs.clone().all(|(a, b)| (a - b).abs() < 1e-4),
        "{found} is not {expected}"
    );
}

#[test]
fn an_adapter_judge_finds_its_hub_base() {
    let sandbox = Sandbox::new();
    let hub = FakeHub::start(&model(&sandbox), None);
    let run = sandbox.path("judge");
    // Two distinct prompts, so that one can be held out.
    let pairs = ["arm0", "arm1"].map(|prompt| {
        format!("{{\"prompt\": {prompt:?}, \"chosen\": \" arm1\", \"rejected\": \" arm0\"}}\n")
    });
    let pairs = sandbox.write("pairs.jsonl", pairs.concat().repeat(4));
    let mut arguments = on_default("fit-preference", &sets(&sandbox, MODEL));
    arguments.extend(["--run-dir".into(), run.display().to_string()]);
    for set in [
        "preference.fit.pairs.kind=dataset".to_owned(),
        format!("preference.fit.pairs.path={pairs:?}"),
        "preference.fit.lora_rank=2".into(),
        "preference.fit.validation=0.5".into(),
    ] {
        arguments.extend(["--set".into(), set]);
    }
    run_with_hub(&sandbox, &hub.url(), &arguments, &[]).succeeded();
    let judge = run.join("model");
    assert_names_hub_base(&judge);
    let text = judge.display().to_string();
    let mut scores = score(&sandbox, &text);
    scores.push("--reward".into());
    assert_finds_base(&sandbox, &hub, &scores);
    // `agon check` queries the hub without downloading.
    let own = sandbox.path("published").display().to_string();
    let mut plain = sets(&sandbox, &own);
    plain.retain(|set| !set.starts_with("preference.judge.rules"));
    plain.dedup();
    let mut arguments = on_default("check", &plain);
    for set in [
        "preference.judge.kind=bradley-terry".to_owned(),
        format!("preference.judge.path={judge:?}"),
    ] {
        arguments.extend(["--set".into(), set]);
    }
    let other = sandbox.path("other");
    let cache = other.display().to_string();
    let other_cache = [("HF_HUB_CACHE", cache.as_str())];
    run_with_hub(&sandbox, &hub.url(), &arguments, &other_cache).check(0, &["judge bradley-terry"]);
    assert!(!other.exists());
    run_with_hub(&sandbox, CLOSED_URL, &arguments, &other_cache)
        .check(3, &["judge: the base model of the adapter", HUB_COMMIT]);
}
