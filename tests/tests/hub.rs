//! Models of the Hugging Face hub, wherever one may be named: fetched once, found again, and told of in sentences when
//! they cannot be had. The hub is one of the test's own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use house::{
    Ended, FakeHub, HUB_COMMIT, HUB_REPOSITORY, Workplace, agon_at_hub, config, has_nats_server,
    report, run_at_hub,
};
use playground::Bandit;
use serde_json::Value;

const MODEL: &str = "hf:org/tiny";

/// Where nobody listens.
const NOWHERE: &str = "http://127.0.0.1:1";

/// A model of two words.
fn model(workplace: &Workplace) -> PathBuf {
    let folder = workplace.path("published");
    fs::create_dir_all(&folder).expect("a folder in a temporary directory");
    let bandit = Bandit::new(&[0.7, 0.3]).expect("two probabilities");
    bandit.write_model(&folder).expect("it is written");
    folder
}

/// Its one file of weights as two shards with an index.
fn shard(folder: &Path) {
    let single = folder.join("model.safetensors");
    let bytes = fs::read(&single).expect("it was written");
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
    let (header, numbers) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).expect("a header");
    let mut map = serde_json::Map::new();
    let mut shards = [(serde_json::Map::new(), Vec::new()), Default::default()];
    let tensors = header.as_object().expect("tensors by name").iter();
    let tensors = tensors.filter(|(name, _)| *name != "__metadata__");
    for (index, (name, tensor)) in tensors.enumerate() {
        let place = |end: usize| tensor["data_offsets"][end].as_u64().expect("a place") as usize;
        let (header, data) = &mut shards[index % 2];
        let begin = data.len();
        data.extend_from_slice(&numbers[place(0)..place(1)]);
        let mut tensor = tensor.clone();
        tensor["data_offsets"] = serde_json::json!([begin, data.len()]);
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
    fs::remove_file(single).expect("it was written");
}

/// `agon score` of some tokens under `model`.
fn score(workplace: &Workplace, model: &str) -> Vec<String> {
    let rows = workplace.write("rows.jsonl", "{\"ids\": [0, 1, 1, 0]}\n");
    let rows = rows.display().to_string();
    let words = ["score", "--model", model, "--input", &rows];
    words.map(str::to_owned).to_vec()
}

/// What it says, at this hub.
fn scored(workplace: &Workplace, url: &str, model: &str, variables: &[(&str, &str)]) -> Ended {
    run_at_hub(workplace, url, &score(workplace, model), variables)
}

#[test]
fn a_model_of_the_hub_is_fetched_once_and_found_again_without_it() {
    for sharded in [false, true] {
        let workplace = Workplace::new();
        let folder = model(&workplace);
        let here = workplace.run(&score(&workplace, &folder.display().to_string()));
        let expected = here.succeeded().out;
        if sharded {
            shard(&folder);
        }
        fs::write(folder.join("pytorch_model.bin"), "not wanted").expect("a file");
        let hub = FakeHub::start(&folder, None);
        let first =
            scored(&workplace, &hub.url(), MODEL, &[]).check(0, &[HUB_COMMIT, "fetching a model"]);
        assert_eq!(first.out, expected, "sharded: {sharded}");
        let files = |asked: &[String]| {
            asked
                .iter()
                .filter(|path| !path.starts_with("/api/"))
                .count()
        };
        let asked = hub.asked();
        assert!(
            asked.iter().all(|path| !path.contains("pytorch_model")),
            "{asked:?}"
        );

        // What is there is not fetched again, under whichever name.
        for name in [MODEL, "hf:org/tiny@v1"] {
            let again = scored(&workplace, &hub.url(), name, &[]).succeeded();
            assert_eq!(again.out, expected);
        }
        assert_eq!(files(&hub.asked()), files(&asked));

        // Nor is anybody asked who must not be, or cannot be: the second is said.
        let before = hub.asked().len();
        let offline = [("HF_HUB_OFFLINE", "1")];
        let quiet = scored(&workplace, &hub.url(), "hf:org/tiny@main", &offline).succeeded();
        assert_eq!((quiet.out, hub.asked().len()), (expected.clone(), before));
        let alone =
            scored(&workplace, NOWHERE, MODEL, &[]).check(0, &["the hub cannot be reached"]);
        assert_eq!(alone.out, expected);
        let commit = format!("{MODEL}@{HUB_COMMIT}");
        assert_eq!(
            scored(&workplace, NOWHERE, &commit, &[]).succeeded().out,
            expected
        );
    }
}

#[test]
fn a_cache_that_others_filled_is_used_and_completed() {
    let workplace = Workplace::new();
    let folder = model(&workplace);
    let hub = FakeHub::start(&folder, None);
    // As Python's huggingface_hub leaves it, in the place that HF_HUB_CACHE names.
    let cache = workplace.path("elsewhere");
    let repository = cache.join("models--org--tiny");
    let snapshot = repository.join("snapshots").join(HUB_COMMIT);
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::create_dir_all(repository.join("refs")).expect("a folder");
    fs::write(repository.join("refs/main"), HUB_COMMIT).expect("a reference");
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(folder.join(file), snapshot.join(file)).expect("a copy");
    }
    let cache = cache.display().to_string();
    let named = [("HF_HUB_CACHE", cache.as_str())];
    // Half a model is none.
    scored(&workplace, NOWHERE, MODEL, &named)
        .check(3, &["hf:org/tiny@main is not in the cache at", &cache])
        .without_panic();
    scored(&workplace, &hub.url(), MODEL, &named).succeeded();
    let asked = hub.asked();
    let had = |path: &String| path.ends_with("/config.json") || path.ends_with("/tokenizer.json");
    assert!(!asked.iter().any(had), "{asked:?}");
    for missing in ["/tokenizer_config.json", "/model.safetensors"] {
        let came = asked.iter().any(|path| path.ends_with(missing));
        assert!(came, "{missing}: {asked:?}");
    }
    scored(&workplace, NOWHERE, MODEL, &named).succeeded();
    assert!(
        !workplace.path("hf").exists(),
        "HF_HUB_CACHE goes before HF_HOME"
    );
}

/// A hub, a model of it, variables, and what is said when it cannot be had.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);

fn are_refused(workplace: &Workplace, cases: &[Case<'_>]) {
    for (url, model, variables, says) in cases {
        let ended = scored(workplace, url, model, variables);
        let ended = ended.check(3, says).without_panic();
        for (_, value) in variables.iter().filter(|(name, _)| *name == "HF_TOKEN") {
            assert!(!ended.err.contains(value), "{}", ended.err);
        }
    }
}

#[test]
fn what_is_not_there_is_told_with_its_remedy() {
    let workplace = Workplace::new();
    let folder = model(&workplace);
    let whole = FakeHub::start(&folder, None).url();
    fs::remove_file(folder.join("model.safetensors")).expect("it was written");
    fs::write(folder.join("pytorch_model.bin"), "x").expect("a file");
    let bare = FakeHub::start(&folder, None).url();
    let cache = workplace.path("hf").join("hub").display().to_string();
    let absent = "hf:org/tiny@main is not in the cache at";
    let away = [absent, &cache, "refused", "name its folder, or set HF_HOME"];
    let offline = [absent, "HF_HUB_OFFLINE is set"];
    let cases: [Case<'_>; 5] = [
        (NOWHERE, MODEL, &[], &away),
        (&whole, MODEL, &[("HF_HUB_OFFLINE", "1")], &offline),
        (
            &whole,
            "hf:org/other",
            &[],
            &["has no model org/other", "HF_TOKEN"],
        ),
        (
            &whole,
            "hf:org/tiny@v9",
            &[],
            &["org/tiny has no branch, tag or commit v9"],
        ),
        (
            &bare,
            MODEL,
            &[],
            &["has no safetensors (it has pytorch_model.bin)"],
        ),
    ];
    are_refused(&workplace, &cases);
    let unnamed = scored(&workplace, &whole, "hf:tiny", &[]);
    unnamed.check(2, &["hf:ORG/NAME@REVISION"]).without_panic();
}

#[test]
fn a_gated_model_asks_for_a_token_that_has_access() {
    let workplace = Workplace::new();
    let hub = FakeHub::start(&model(&workplace), Some("hf_right")).url();
    let without = [
        "org/tiny is gated",
        "401",
        "HF_TOKEN is not set",
        "/org/tiny",
    ];
    let wrong = ["org/tiny is gated", "403", "the token in HF_TOKEN has none"];
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
    are_refused(&workplace, &cases);
}

#[test]
fn the_token_of_a_login_is_shown_to_the_hub() {
    let workplace = Workplace::new();
    let hub = FakeHub::start(&model(&workplace), Some("hf_right")).url();
    fs::create_dir_all(workplace.path("hf")).expect("a folder");
    let file = workplace.write("hf/token", "hf_wrong\n");
    let wrong = ["403", "the token in", "hf/token has none", "hf auth login"];
    let cases: [Case<'_>; 2] = [
        (&hub, MODEL, &[], &wrong),
        (
            &hub,
            MODEL,
            &[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")],
            &["401", "HF_HUB_DISABLE_IMPLICIT_TOKEN is set"],
        ),
    ];
    are_refused(&workplace, &cases);
    fs::write(file, "hf_right\n").expect("it is written");
    let ended = scored(&workplace, &hub, MODEL, &[]);
    ended.check(0, &[]).without_panic();
}

#[test]
fn the_token_is_shown_to_the_hub_and_to_nobody_else() {
    let workplace = Workplace::new();
    let hub = FakeHub::start(&model(&workplace), Some("hf_right"));
    let words = score(&workplace, MODEL);
    let mut command = agon_at_hub(&workplace, &hub.url(), &words);
    command.env("HF_TOKEN", "hf_right").env("AGON_LOG", "trace");
    let ended = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{said}");
    // Everything is told, and the token is not.
    assert!(said.contains("TRACE") || said.contains("DEBUG"), "{said}");
    assert!(!said.contains("hf_right"), "{said}");
    let doctor = run_at_hub(
        &workplace,
        &hub.url(),
        &["doctor"],
        &[("HF_TOKEN", "hf_right")],
    );
    let line = doctor.out.lines().find(|line| line.contains(" hub "));
    let line = line.expect("a line on the hub");
    assert!(
        line.contains(&hub.url()) && line.contains("the token is that of HF_TOKEN"),
        "{line}"
    );
    assert!(!line.contains("hf_right"), "{line}");
}

/// The settings of a short run on `model`.
fn sets(workplace: &Workplace, model: &str) -> Vec<String> {
    let prompts = workplace.write(
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

/// `agon COMMAND` on the default configuration with these settings.
fn on_default(command: &str, sets: &[String]) -> Vec<String> {
    let default = config("default.toml").display().to_string();
    [&[command.to_owned(), default], sets].concat()
}

#[test]
fn a_check_says_where_a_model_comes_from_and_fetches_nothing() {
    let workplace = Workplace::new();
    let hub = FakeHub::start(&model(&workplace), None);
    let words = on_default("check", &sets(&workplace, MODEL));
    let check = |url: &str| run_at_hub(&workplace, url, &words, &[]);
    let url = hub.url();
    check(&url).check(0, &["hf:org/tiny@main", HUB_COMMIT, &url, "fetched into"]);
    assert!(!workplace.path("hf").exists());
    check(NOWHERE).check(3, &["model.path: hf:org/tiny@main is not in the cache"]);
    scored(&workplace, &url, MODEL, &[]).succeeded();
    // Known with its shape, and nobody need be asked.
    check(NOWHERE).check(
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
fn a_run_starts_from_a_model_of_the_hub() {
    let workplace = Workplace::new();
    let hub = FakeHub::start(&model(&workplace), None);
    let run = workplace.path("run");
    let mut words = on_default("train", &sets(&workplace, MODEL));
    words.extend(["--run-dir".into(), run.display().to_string()]);
    run_at_hub(&workplace, &hub.url(), &words, &[]).succeeded();
    assert_eq!(report(&run)["steps"], 2);
    let kept = fs::read_to_string(run.join("config.toml")).expect("a configuration");
    assert!(kept.contains(&format!("path = \"{MODEL}@main\"")), "{kept}");
    let asked = hub.asked();
    let infos = asked.iter().filter(|path| path.starts_with("/api/"));
    assert_eq!(infos.count(), 1, "{asked:?}");
    assert!(asked.iter().any(|path| path.contains(HUB_REPOSITORY)));
}

#[test]
fn only_the_process_that_leads_a_run_asks_the_hub() {
    if !has_nats_server() {
        return;
    }
    let workplace = Workplace::new();
    let hub = FakeHub::start(&model(&workplace), None);
    let run = workplace.path("run");
    let mut words = on_default("train", &sets(&workplace, MODEL));
    words.extend(["--run-dir".into(), run.display().to_string()]);
    for set in [
        "run.name=hub",
        "transport.kind=jetstream",
        "topology.actors=2",
    ] {
        words.extend(["--set".into(), set.into()]);
    }
    run_at_hub(&workplace, &hub.url(), &words, &[]).succeeded();
    assert_eq!(report(&run)["steps"], 2);
    let asked = hub.asked();
    let infos = asked.iter().filter(|path| path.starts_with("/api/"));
    // The launcher, before it starts anything, and the learner; no other process.
    assert_eq!(infos.count(), 2, "{asked:?}");
}

fn json(path: &Path) -> Value {
    let content = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&content).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What an adapter says of its base, beside a model that is the hub's.
fn names_the_hub(folder: &Path) {
    let config = json(&folder.join("adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], HUB_REPOSITORY);
    assert_eq!(config["revision"], HUB_COMMIT);
}

/// Holds that a command finds the base that an adapter names: in the cache, or fetched into another; and says it where
/// there is neither.
fn finds_its_base(workplace: &Workplace, hub: &FakeHub, words: &[String]) -> String {
    let offline = [("HF_HUB_OFFLINE", "1")];
    let known = run_at_hub(workplace, NOWHERE, words, &offline).succeeded();
    let other = tempfile::tempdir().expect("a temporary directory");
    let cache = other.path().display().to_string();
    let elsewhere = [("HF_HUB_CACHE", cache.as_str())];
    let absent = format!("{MODEL}@{HUB_COMMIT} is not in the cache");
    run_at_hub(workplace, NOWHERE, words, &elsewhere)
        .check(3, &["the base model of the adapter", &absent])
        .without_panic();
    let fetched = run_at_hub(workplace, &hub.url(), words, &elsewhere).succeeded();
    assert_eq!(fetched.out, known.out);
    known.out
}

#[test]
fn an_adapter_names_its_model_as_the_hub_does_and_finds_it_anywhere() {
    let workplace = Workplace::new();
    let folder = model(&workplace);
    fs::write(folder.join("LICENSE.txt"), "as you like").expect("a file");
    fs::write(folder.join("README.md"), "a model of two words").expect("a file");
    let hub = FakeHub::start(&folder, None);
    let run = workplace.path("run");
    let mut words = on_default("train", &sets(&workplace, "hf:org/tiny@v1"));
    words.extend(["--run-dir".into(), run.display().to_string()]);
    words.extend(["--set".into(), "model.lora_rank=2".into()]);
    words.extend(["--set".into(), "learner.learning_rate=0.1".into()]);
    run_at_hub(&workplace, &hub.url(), &words, &[]).succeeded();
    let checkpoint = run.join("checkpoints/step_2");
    names_the_hub(&checkpoint);
    assert!(checkpoint.join("LICENSE.txt").exists());
    assert!(!checkpoint.join("README.md").exists());
    let text = checkpoint.display().to_string();
    let of_run = finds_its_base(&workplace, &hub, &score(&workplace, &text));
    let of_base = scored(&workplace, &hub.url(), MODEL, &[]).succeeded().out;
    assert_ne!(of_run, of_base, "the adapter makes no difference");

    // A branch, as people write it, or nothing.
    let mut config = json(&checkpoint.join("adapter_config.json"));
    config["revision"] = Value::Null;
    let unnamed = workplace.copy_of(&checkpoint, "unnamed");
    fs::write(unnamed.join("adapter_config.json"), config.to_string()).expect("a copy");
    let unnamed = unnamed.display().to_string();
    let again = scored(&workplace, &hub.url(), &unnamed, &[]).succeeded();
    assert_eq!(again.out, of_run);

    exports_say_what_they_are(&workplace, &run, &of_run);
}

/// The adapter by itself and merged, each with the licence and its number format, the base coming from the cache.
fn exports_say_what_they_are(workplace: &Workplace, run: &Path, of_run: &str) {
    let run = run.display().to_string();
    for (name, more, says) in [
        ("adapter", &[][..], "an adapter of"),
        ("merged", &["--merge"], "a model of"),
        ("half", &["--merge", "--dtype", "bf16"], "a model of"),
    ] {
        let to = workplace.path(name);
        let target = to.display().to_string();
        let words = [&["export", "--run", &run, "--output", &target], more].concat();
        let dtype = match name {
            "half" => "in bfloat16",
            _ => "in float32",
        };
        let offline = [("HF_HUB_OFFLINE", "1")];
        run_at_hub(workplace, NOWHERE, &words, &offline).check(0, &[says, dtype]);
        assert!(to.join("LICENSE.txt").exists(), "{name}");
        if name == "adapter" {
            names_the_hub(&to);
        } else {
            let written = json(&to.join("config.json"))["dtype"].clone();
            assert_eq!(format!("in {}", written.as_str().expect("a name")), dtype);
        }
        if name != "half" {
            let words = score(workplace, &target);
            let found = run_at_hub(workplace, NOWHERE, &words, &offline).succeeded();
            close(&found.out, of_run);
        }
    }
}

/// Log-probabilities that differ by rounding alone.
fn close(found: &str, expected: &str) {
    let numbers = |line: &str| -> Vec<f64> {
        let row: Value = serde_json::from_str(line.trim()).expect("a row");
        serde_json::from_value(row["logprobs"].clone()).expect("log-probabilities")
    };
    let gaps = numbers(found).into_iter().zip(numbers(expected));
    assert!(
        gaps.clone().all(|(a, b)| (a - b).abs() < 1e-4),
        "{found} is not {expected}"
    );
}

#[test]
fn a_judge_that_is_an_adapter_of_a_hub_model_finds_it_too() {
    let workplace = Workplace::new();
    let hub = FakeHub::start(&model(&workplace), None);
    let run = workplace.path("judge");
    // Prompts differ, so that some can be held out.
    let pairs = ["arm0", "arm1"].map(|prompt| {
        format!("{{\"prompt\": {prompt:?}, \"chosen\": \" arm1\", \"rejected\": \" arm0\"}}\n")
    });
    let pairs = workplace.write("pairs.jsonl", pairs.concat().repeat(4));
    let mut words = on_default("fit-preference", &sets(&workplace, MODEL));
    words.extend(["--run-dir".into(), run.display().to_string()]);
    for set in [
        "preference.fit.pairs.kind=dataset".to_owned(),
        format!("preference.fit.pairs.path={pairs:?}"),
        "preference.fit.lora_rank=2".into(),
        "preference.fit.validation=0.5".into(),
    ] {
        words.extend(["--set".into(), set]);
    }
    run_at_hub(&workplace, &hub.url(), &words, &[]).succeeded();
    let judge = run.join("model");
    names_the_hub(&judge);
    let text = judge.display().to_string();
    let mut scores = score(&workplace, &text);
    scores.push("--reward".into());
    finds_its_base(&workplace, &hub, &scores);
    // A check asks, and fetches nothing.
    let own = workplace.path("published").display().to_string();
    let mut plain = sets(&workplace, &own);
    plain.retain(|set| !set.starts_with("preference.judge.rules"));
    plain.dedup();
    let mut words = on_default("check", &plain);
    for set in [
        "preference.judge.kind=bradley-terry".to_owned(),
        format!("preference.judge.path={judge:?}"),
    ] {
        words.extend(["--set".into(), set]);
    }
    let other = workplace.path("other");
    let cache = other.display().to_string();
    let elsewhere = [("HF_HUB_CACHE", cache.as_str())];
    run_at_hub(&workplace, &hub.url(), &words, &elsewhere).check(0, &["judge bradley-terry"]);
    assert!(!other.exists());
    run_at_hub(&workplace, NOWHERE, &words, &elsewhere)
        .check(3, &["judge: the base model of the adapter", HUB_COMMIT]);
}
