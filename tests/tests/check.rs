//! `agon check` and `agon train` say the same of a configuration: what one refuses the other does, in the same
//! words and with the same exit code.

use std::{fs, net::TcpListener, path::PathBuf};

use house::{Ended, HUB_REPOSITORY, Workplace, config, run_at_hub, shared};

/// No request gets here: nothing listens on it.
const NOWHERE: &str = "http://127.0.0.1:9";

/// A run that is refused before it starts, or done at once.
const SMALL: [&str; 14] = [
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

/// `agon check` and `agon train` of the same settings, without a hub, in one workplace.
struct Both {
    workplace: Workplace,
}

impl Both {
    fn new() -> Self {
        let workplace = Workplace::new();
        fs::create_dir(workplace.path("folder")).expect("a folder in a temporary directory");
        workplace.write("file", "not what is wanted\n");
        Self { workplace }
    }

    fn run(&self, command: &str, sets: &[&str]) -> Ended {
        let default = config("default.toml").display().to_string();
        let mut words = vec![command.to_owned(), default];
        let sets = SMALL.iter().chain(sets);
        words.extend(sets.flat_map(|&set| ["--set".to_owned(), set.to_owned()]));
        run_at_hub(&self.workplace, NOWHERE, &words, &[("HF_HUB_OFFLINE", "1")])
    }

    /// That both refuse these settings with `code` for the one same reason, which holds each of `says`.
    #[track_caller]
    fn refuse(&self, sets: &[&str], code: i32, says: &[&str]) {
        let [checked, trained] = ["check", "train"].map(|command| self.run(command, sets));
        let reasons = |ended: &Ended, grade: &str| -> Vec<String> {
            let lines = ended
                .err
                .lines()
                .filter_map(|line| line.strip_prefix(grade));
            lines.map(str::to_owned).collect()
        };
        let (of_check, of_train) = (reasons(&checked, "fail "), reasons(&trained, "error: "));
        assert_eq!(
            of_check, of_train,
            "{sets:?}\n{}\n{}",
            checked.err, trained.err
        );
        assert_eq!(of_check.len(), 1, "{sets:?}: {of_check:#?}");
        checked.check(code, says).without_panic();
        trained.check(code, says).without_panic();
        let runs = self.workplace.path("runs");
        assert!(!runs.exists(), "{sets:?}: no run has begun");
    }
}

/// A key, what else must be set for it to matter, and which of a missing path, a folder and a file it refuses.
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
fn every_setting_that_names_a_file_or_folder_has_one_verdict() {
    let Some(model) = shared("every_setting_that_names_a_file", "data/models/stories260K") else {
        return;
    };
    let both = Both::new();
    let rows = |row: fn(usize) -> String| (0..4).map(row).collect::<String>();
    let prompt = |index: usize| format!("{{\"prompt\": \"Once upon a time {index}\"}}\n");
    both.workplace.write("prompts.jsonl", rows(prompt));
    let pair = |index: usize| {
        format!("{{\"prompt\": \"Once {index}\", \"chosen\": \" a\", \"rejected\": \" b\"}}\n")
    };
    both.workplace.write("pairs.jsonl", rows(pair));
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
    for (key, beside, wrong) in cases {
        for path in wrong {
            let set = format!("{key}=\"{path}\"");
            let sets = [beside, &[set.as_str()]].concat();
            // A judge may have members: its table is named.
            let named = match key.starts_with("preference.judge.") {
                true => "preference.judge",
                false => key,
            };
            both.refuse(&sets, 3, &[path, named]);
        }
    }
}

#[test]
fn a_list_of_files_a_program_and_a_model_of_the_hub_have_one_verdict() {
    let Some(model) = shared("a_list_of_files_has_one_verdict", "data/models/stories260K") else {
        return;
    };
    let both = Both::new();
    let model = format!("model.path={model:?}");
    let dataset = [
        model.as_str(),
        "prompts.kind=dataset",
        "preference.judge={ kind = \"rule\", rules = [{ kind = \"ended\", weight = 1.0 }] }",
    ];
    let mix = "prompts.mix=[{ path = \"missing\" }]";
    both.refuse(
        &[&dataset[..], &[mix]].concat(),
        3,
        &["prompts.mix", "missing"],
    );
    let certificate = [
        "transport.certificate_path=\"missing\"",
        "transport.key_path=\"file\"",
    ];
    both.refuse(
        &[&JETSTREAM[..], &certificate].concat(),
        3,
        &["transport.certificate_path"],
    );
    let server = [
        "transport.kind=jetstream",
        "transport.server=\"no-such-server\"",
    ];
    both.refuse(&server, 2, &["no-such-server is not there"]);
    let hub = format!("model.path=\"hf:{HUB_REPOSITORY}\"");
    both.refuse(
        &[&hub],
        3,
        &["model.path", HUB_REPOSITORY, "HF_HUB_OFFLINE"],
    );
    let judge =
        format!("preference.judge={{ kind = \"encoder\", path = \"hf:{HUB_REPOSITORY}\" }}");
    both.refuse(&[&judge], 3, &["preference.judge", HUB_REPOSITORY]);
    // What the settings say of a model, which both must read to know.
    both.refuse(&[&model], 3, &["model.path", "playground"]);
    let lora = ["model.lora_rank=2", "model.target_modules=[\"nothing\"]"];
    both.refuse(&lora, 2, &["model.target_modules", "nothing"]);
    let short = ["actor.max_prompt_length=32"];
    both.refuse(&short, 2, &["actor.max_prompt_length", "longest post"]);
    let long = ["actor.max_new_tokens=100000"];
    both.refuse(&long, 2, &["actor.max_new_tokens", "positions"]);
}

#[test]
fn a_taken_port_has_one_verdict() {
    let both = Both::new();
    let holder = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = holder.local_addr().expect("it is bound").to_string();
    for key in [
        "telemetry.listen",
        "telemetry.page",
        "preference.http.listen",
    ] {
        let set = format!("{key}=\"{address}\"");
        both.refuse(&[&set], 3, &[key, &address]);
    }
}

#[test]
fn a_file_that_only_another_command_reads_is_no_reason_to_refuse() {
    let both = Both::new();
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
        assert!(checked.err.contains(says), "no {says:?} in {}", checked.err);
    }
    both.run("train", &sets).succeeded();
}

#[test]
fn several_faults_are_named_at_once_by_both() {
    let both = Both::new();
    let sets = ["model.path=\"missing\"", "telemetry.token_path=\"folder\""];
    for command in ["check", "train"] {
        both.run(command, &sets)
            .check(3, &["model.path: ", "telemetry.token_path: "])
            .without_panic();
    }
    let path: PathBuf = both.workplace.path("runs");
    assert!(!path.exists(), "no run has begun");
}
