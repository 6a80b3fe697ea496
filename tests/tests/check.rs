//! Agreement of `agon check` and `agon train`: both reject the same configurations, with the same message and exit
//! code.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use system_tests::{
    HUB_REPOSITORY, ProcessOutput, Sandbox, config, number, report, run_with_hub, shared,
};

/// URL of a closed port.
const CLOSED_URL: &str = "http://127.0.0.1:9";

/// Settings of a run that is rejected before it starts or ends at once.
const SMALL_RUN: [&str; 14] = [
    "playground.hidden_size=32",
    "playground.layers=1",
    "playground.heads=2",
    "playground.intermediate_size=64",
    "sft.steps=1",
    "sft.train_batch_size=4",
    "actor.slots=8",
    "actor.max_prompt_length=64",
    "actor.max_new_tokens=8",
    "learner.steps=1",
    "learner.train_batch_size=4",
    "evaluation.prompts=4",
    "evaluation.eval_steps=0",
    "run.output_dir=\"runs\"",
];

/// Runs `agon check` and `agon train` on the same settings, offline, in one sandbox.
struct CheckAndTrain {
    sandbox: Sandbox,
}

impl CheckAndTrain {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        fs::create_dir(sandbox.path("folder")).expect("a folder in the sandbox");
        sandbox.write("file", "invalid content\n");
        Self { sandbox }
    }

    fn run(&self, command: &str, sets: &[&str]) -> ProcessOutput {
        let default = config("default.toml").display().to_string();
        let mut arguments = vec![command.to_owned(), default];
        let sets = SMALL_RUN.iter().chain(sets);
        arguments.extend(sets.flat_map(|&set| ["--set".to_owned(), set.to_owned()]));
        run_with_hub(
            &self.sandbox,
            CLOSED_URL,
            &arguments,
            &[("HF_HUB_OFFLINE", "1")],
        )
    }

    /// Asserts that both reject these settings with `code` and one identical error, which contains each of `says`.
    #[track_caller]
    fn assert_rejected(&self, sets: &[&str], code: i32, says: &[&str]) {
        let [checked, trained] = ["check", "train"].map(|command| self.run(command, sets));
        let reasons = |output: &ProcessOutput, grade: &str| -> Vec<String> {
            let lines = output
                .stderr
                .lines()
                .filter_map(|line| line.strip_prefix(grade));
            lines.map(str::to_owned).collect()
        };
        let (of_check, of_train) = (reasons(&checked, "fail "), reasons(&trained, "error: "));
        assert_eq!(
            of_check, of_train,
            "{sets:?}\n{}\n{}",
            checked.stderr, trained.stderr
        );
        assert_eq!(of_check.len(), 1, "{sets:?}: {of_check:#?}");
        checked.check(code, says).without_panic();
        trained.check(code, says).without_panic();
        let runs = self.sandbox.path("runs");
        assert!(!runs.exists(), "{sets:?}: no run was started");
    }
}

/// A key, the settings that make it effective, and which of a missing path, a folder and a file it rejects.
type Case<'a> = (&'a str, &'a [&'a str], &'a [&'a str]);

const JETSTREAM: [&str; 2] = [
    "transport.kind=jetstream",
    "transport.url=\"nats://127.0.0.1:9\"",
];
const FITTED: &str = "preference.judge={ kind = \"bradley-terry\", path = \"\" }";
const PAIRS: [&str; 3] = [
    FITTED,
    "preference.fit.pairs.kind=dataset",
    "preference.fit.pairs.path=\"pairs.jsonl\"",
];
const NOT_A_FILE: [&str; 2] = ["missing", "folder"];
const NOT_A_FOLDER: [&str; 2] = ["missing", "file"];

#[test]
#[expect(clippy::too_many_lines, reason = "a table of settings")]
fn check_and_train_agree_on_every_path_setting() {
    let Some(model) = shared(
        "check_and_train_agree_on_every_path_setting",
        "data/models/stories260K",
    ) else {
        return;
    };
    let both = CheckAndTrain::new();
    let rows = |row: fn(usize) -> String| (0..4).map(row).collect::<String>();
    let prompt = |index: usize| format!("{{\"prompt\": \"Once upon a time {index}\"}}\n");
    both.sandbox.write("prompts.jsonl", rows(prompt));
    let pair = |index: usize| {
        format!("{{\"prompt\": \"Once {index}\", \"chosen\": \" a\", \"rejected\": \" b\"}}\n")
    };
    both.sandbox.write("pairs.jsonl", rows(pair));
    let model = format!("model.path={model:?}");
    let real = [
        model.as_str(),
        "prompts.kind=dataset",
        "preference.judge={ kind = \"rule\", rules = [{ kind = \"ended\", weight = 1.0 }] }",
    ];
    let prompts = [
        &real[..],
        &["prompts.path=\"prompts.jsonl\"", "prompts.held_out=1"],
    ]
    .concat();
    let pairs = [
        &PAIRS[..],
        &[
            model.as_str(),
            "prompts.kind=dataset",
            "prompts.path=\"prompts.jsonl\"",
            "prompts.held_out=1",
        ],
    ]
    .concat();
    let http =
        ["preference.judge={ kind = \"http\", urls = [\"http://127.0.0.1:9/v1\"], model = \"m\" }"];
    let service = ["preference.judge={ kind = \"service\", urls = [\"http://127.0.0.1:9\"] }"];
    let listen = ["preference.http.listen=\"127.0.0.1:0\""];
    let cases: [Case<'_>; 22] = [
        ("run.output_dir", &[], &["file"]),
        ("playground.base_dir", &[], &["file"]),
        ("model.path", &[], &NOT_A_FOLDER),
        ("model.chat_template", &[], &NOT_A_FILE),
        ("model.adapter", &["model.lora_rank=4"], &NOT_A_FOLDER),
        ("prompts.path", &real, &["missing", "file"]),
        ("prompts.held_out_path", &prompts, &["missing", "file"]),
        (
            "preference.judge.path",
            &["preference.judge.kind=bradley-terry"],
            &NOT_A_FOLDER,
        ),
        (
            "preference.judge.path",
            &["preference.judge.kind=pairwise"],
            &NOT_A_FOLDER,
        ),
        (
            "preference.judge.path",
            &["preference.judge.kind=encoder"],
            &NOT_A_FOLDER,
        ),
        ("preference.judge.api_key_path", &http, &NOT_A_FILE),
        ("preference.judge.token_path", &service, &NOT_A_FILE),
        ("preference.fit.path", &[FITTED], &NOT_A_FOLDER),
        ("preference.fit.pairs.path", &pairs, &["missing", "file"]),
        (
            "preference.fit.pairs.validation_path",
            &pairs,
            &["missing", "file"],
        ),
        ("preference.http.token_path", &listen, &NOT_A_FILE),
        ("telemetry.token_path", &[], &NOT_A_FILE),
        (
            "transport.password_path",
            &JETSTREAM,
            &["missing", "folder", "file"],
        ),
        ("transport.token_path", &JETSTREAM, &NOT_A_FILE),
        ("transport.nkey_path", &JETSTREAM, &NOT_A_FILE),
        (
            "transport.credentials_path",
            &JETSTREAM,
            &["missing", "folder", "file"],
        ),
        ("transport.ca_path", &JETSTREAM, &NOT_A_FILE),
    ];
    for (key, required, invalid) in cases {
        for path in invalid {
            let set = format!("{key}=\"{path}\"");
            let sets = [required, &[set.as_str()]].concat();
            // A judge may be an ensemble, so the error names its table.
            let named = match key.starts_with("preference.judge.") {
                true => "preference.judge",
                false => key,
            };
            both.assert_rejected(&sets, 3, &[path, named]);
        }
    }
}

#[test]
fn check_and_train_agree_on_mixes_programs_and_hub_models() {
    let Some(model) = shared(
        "check_and_train_agree_on_mixes_programs_and_hub_models",
        "data/models/stories260K",
    ) else {
        return;
    };
    let both = CheckAndTrain::new();
    let model = format!("model.path={model:?}");
    let dataset = [
        model.as_str(),
        "prompts.kind=dataset",
        "preference.judge={ kind = \"rule\", rules = [{ kind = \"ended\", weight = 1.0 }] }",
    ];
    let mix = "prompts.mix=[{ path = \"missing\" }]";
    both.assert_rejected(
        &[&dataset[..], &[mix]].concat(),
        3,
        &["prompts.mix", "missing"],
    );
    let certificate = [
        "transport.certificate_path=\"missing\"",
        "transport.key_path=\"file\"",
    ];
    both.assert_rejected(
        &[&JETSTREAM[..], &certificate].concat(),
        3,
        &["transport.certificate_path"],
    );
    let server = [
        "transport.kind=jetstream",
        "transport.server=\"no-such-server\"",
    ];
    both.assert_rejected(&server, 2, &["no-such-server is not there"]);
    let hub = format!("model.path=\"hf:{HUB_REPOSITORY}\"");
    both.assert_rejected(
        &[&hub],
        3,
        &["model.path", HUB_REPOSITORY, "HF_HUB_OFFLINE"],
    );
    let judge =
        format!("preference.judge={{ kind = \"encoder\", path = \"hf:{HUB_REPOSITORY}\" }}");
    both.assert_rejected(&[&judge], 3, &["preference.judge", HUB_REPOSITORY]);
    // Settings that depend on the model, which both commands must read.
    both.assert_rejected(&[&model], 3, &["model.path", "playground"]);
    let lora = ["model.lora_rank=2", "model.target_modules=[\"nothing\"]"];
    both.assert_rejected(&lora, 2, &["model.target_modules", "nothing"]);
    let short = ["actor.max_prompt_length=32"];
    both.assert_rejected(&short, 2, &["actor.max_prompt_length", "longest post"]);
    let long = ["actor.max_new_tokens=100000"];
    both.assert_rejected(&long, 2, &["actor.max_new_tokens", "positions"]);
}

#[test]
fn check_and_train_agree_on_a_port_in_use() {
    let both = CheckAndTrain::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener").to_string();
    for key in [
        "telemetry.listen",
        "telemetry.page",
        "preference.http.listen",
    ] {
        let set = format!("{key}=\"{address}\"");
        both.assert_rejected(&[&set], 3, &[key, &address]);
    }
}

#[test]
fn files_of_other_commands_cause_warnings_only() {
    let both = CheckAndTrain::new();
    let sets = [
        "sft.path=\"missing\"",
        "preference.fit.pairs.kind=dataset",
        "preference.fit.pairs.path=\"missing\"",
    ];
    let checked = both.run("check", &sets).succeeded();
    for says in [
        "warn sft.path = missing: No such file",
        "warn preference.fit.pairs.path = missing: No such file",
        "only agon fit-preference reads it",
    ] {
        assert!(
            checked.stderr.contains(says),
            "no {says:?} in {}",
            checked.stderr
        );
    }
    both.run("train", &sets).succeeded();
}

#[test]
fn rows_are_not_called_usable_before_they_are_checked() {
    let both = CheckAndTrain::new();
    both.sandbox.write(
        "rows.jsonl",
        "{\"question_id\": 81, \"turns\": [\"Why?\"]}\n",
    );
    let sets = [
        "model.path=\"missing\"",
        "prompts.kind=dataset",
        "prompts.path=\"rows.jsonl\"",
        "preference.judge={kind=\"rule\",rules=[{kind=\"ended\",weight=1.0}]}",
    ];
    let checked = both.run("check", &sets);
    checked.check(
        3,
        &[
            "fail model.path",
            "warn prompts.path = rows.jsonl: read, but its columns are only checked once",
        ],
    );
}

#[test]
fn check_and_train_report_all_errors_at_once() {
    let both = CheckAndTrain::new();
    let sets = ["model.path=\"missing\"", "telemetry.token_path=\"folder\""];
    for command in ["check", "train"] {
        both.run(command, &sets)
            .check(3, &["model.path: ", "telemetry.token_path: "])
            .without_panic();
    }
    let path: PathBuf = both.sandbox.path("runs");
    assert!(!path.exists(), "no run was started");
}

/// A Llama of 15 million parameters with random weights and the tokenizer of Phi-3, in the sandbox.
fn write_model(sandbox: &Sandbox, tokenizer: &Path) -> PathBuf {
    let folder = sandbox.copy_of(tokenizer, "model");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32064, "hidden_size": 288,
        "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
        "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 32000, "torch_dtype": "float32",
    });
    fs::write(folder.join("config.json"), config.to_string()).expect("a file");
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![32064, 288])];
    for layer in 0..6 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            shapes.push((name(&format!("self_attn.{part}")), vec![288, 288]));
        }
        shapes.push((name("mlp.gate_proj"), vec![768, 288]));
        shapes.push((name("mlp.up_proj"), vec![768, 288]));
        shapes.push((name("mlp.down_proj"), vec![288, 768]));
        shapes.push((name("input_layernorm"), vec![288]));
        shapes.push((name("post_attention_layernorm"), vec![288]));
    }
    shapes.push(("model.norm.weight".to_owned(), vec![288]));
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for (name, shape) in shapes {
        let begin = data.len();
        let is_norm = shape.len() == 1;
        for _ in 0..shape.iter().product::<usize>() {
            let value = if is_norm {
                1.0
            } else {
                random.random_range(-0.05..0.05_f32)
            };
            data.extend(value.to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert(name, entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(data);
    fs::write(folder.join("model.safetensors"), file).expect("a file");
    folder
}

/// Every completion has the greatest length, for which the estimate is: random weights hardly ever sample the end token.
/// The peak of a run varies by a tenth, with the arenas of malloc that its threads come to share: the median counts.
#[test]
fn the_estimated_memory_is_that_of_a_run() {
    let test = "the_estimated_memory_is_that_of_a_run";
    let Some(tokenizer) = shared(test, "data/tokenizers/phi-3-mini") else {
        return;
    };
    let sandbox = Sandbox::new();
    let model = write_model(&sandbox, &tokenizer);
    let prompt = "the little dog ran up the hill ".repeat(9);
    let rows = (0..200).map(|row| format!("{}\n", json!({"prompt": format!("{row} {prompt}")})));
    let prompts = sandbox.write("prompts.jsonl", rows.collect::<String>());
    let config = sandbox.write("empty.toml", "");
    for (name, changes) in [
        ("full", &["actor.precision=f32"][..]),
        ("adapter", &["model.lora_rank=16"]),
    ] {
        let mut sets = vec![
            format!("model.path={model:?}"),
            format!("prompts={{ kind = \"dataset\", path = {prompts:?}, held_out = 8 }}"),
            "preference.judge={ kind = \"rule\", rules = [{ kind = \"length\", min = 1, max = 9, weight = 1.0 }] }".to_owned(),
            "evaluation.prompts=0".to_owned(),
            "learner={ steps = 3, train_batch_size = 8, save_steps = 0 }".to_owned(),
            "actor={ slots = 16, max_new_tokens = 48, max_prompt_length = 80 }".to_owned(),
        ];
        sets.extend(changes.iter().map(|&change| change.to_owned()));
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let config = config.display().to_string();
        let sets: Vec<&str> = sets.collect();
        let checked = sandbox
            .run(&[&["check", &config][..], &sets].concat())
            .succeeded();
        let line = checked
            .stderr
            .lines()
            .find_map(|line| line.split_once("memory: about "));
        let estimate: f64 = line
            .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("no estimate in {}", checked.stderr));
        let mut peaks = [1, 2, 3].map(|repetition| {
            let run = sandbox.path(&format!("{name}-{repetition}"));
            let directory = run.display().to_string();
            let train = ["train", &config, "--run-dir", &directory];
            sandbox.run(&[&train[..], &sets].concat()).succeeded();
            number(&report(&run), "/peak_memory_bytes") / f64::from(1 << 20)
        });
        peaks.sort_by(f64::total_cmp);
        let peak = peaks[1];
        let ratio = estimate / peak;
        eprintln!("{name}: {estimate} MiB estimated, {peak:.1} MiB at the peak, ratio {ratio:.3}");
        assert!(
            (0.85..=1.15).contains(&ratio),
            "{name}: {estimate} MiB for {peak} MiB"
        );
    }
}
