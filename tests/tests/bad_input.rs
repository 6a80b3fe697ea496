//! Invalid user input: the error names the cause and a remedy, with the documented exit code (2 for an invalid
//! configuration or command line, 3 for a missing or invalid file).

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

use serde_json::Value;
use system_tests::{Sandbox, config, report, shared, steps, tiny_bandit, tiny_playground};

fn owned(arguments: &[&str]) -> Vec<String> {
    arguments
        .iter()
        .map(|&argument| argument.to_owned())
        .collect()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Arguments of `agon train` for the model in `folder` and the prompts in `prompts`, with a rule as judge.
fn train_on(folder: &Path, prompts: &Path, run: &Path) -> Vec<String> {
    let mut arguments = owned(&[
        "train",
        &text(&config("default.toml")),
        "--run-dir",
        &text(run),
    ]);
    for set in [
        format!("model.path={folder:?}"),
        "prompts.kind=dataset".into(),
        format!("prompts.path={prompts:?}"),
        "prompts.held_out=1".into(),
        "actor.max_prompt_length=32".into(),
        "actor.max_new_tokens=8".into(),
        "preference.judge.kind=rule".into(),
        "preference.judge.rules=[{ kind = \"ended\", weight = 1.0 }]".into(),
        "learner.steps=1".into(),
        "learner.train_batch_size=2".into(),
        "evaluation.prompts=2".into(),
    ] {
        arguments.extend(["--set".into(), set]);
    }
    arguments
}

/// A valid file of prompts.
fn prompts(sandbox: &Sandbox) -> PathBuf {
    sandbox.write(
        "prompts.jsonl",
        "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n{\"prompt\": \"c\"}\n",
    )
}

/// Edits `config.json` of a model folder.
fn edit_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut json =
        serde_json::from_slice(&fs::read(&path).expect("the file was copied")).expect("valid JSON");
    change(&mut json);
    fs::write(&path, json.to_string()).expect("the file was copied");
}

#[test]
fn configuration_errors_name_the_key_and_a_remedy() {
    for (toml, says) in [
        (
            "[learner]\nlearning_rat = 1e-4\n",
            &["learner.learning_rat", "did you mean `learning_rate`"][..],
        ),
        (
            "[actor]\nmixture_coeff = 0.1\n",
            &["actor.mixture_coeff", "did you mean `mixture_coef`"],
        ),
        ("[nonsense]\na = 1\n", &["nonsense: unknown key"]),
        (
            "[learner]\nsteps = \"many\"\n",
            &["learner.steps", "\"many\""],
        ),
        ("[learner]\nsteps = \n", &["line 2"]),
        (
            "[learner]\ntrain_batch_size = 10\ngradient_accumulation_steps = 4\n",
            &[
                "learner.gradient_accumulation_steps",
                "4 does not divide learner.train_batch_size = 10",
            ],
        ),
        (
            "[learner]\nmax_staleness = 0\nweight_sync_steps = 4\n",
            &[
                "learner.max_staleness",
                "raise it to 3 or publish more often",
            ],
        ),
        (
            "[model]\npath = \"somewhere\"\nreference_probabilities = [0.5, 0.5]\n[prompts]\nkind = \"bandit\"\n[actor]\nmax_new_tokens = 1\n",
            &["model.reference_probabilities", "not both"],
        ),
        (
            "[actor]\nmixture_coef = 1.5\n",
            &["actor.mixture_coef", "1.5 must be from 0 to 1"],
        ),
        (
            "[learner]\nsteps = 0\ntemperature = 1\n[preference.judge]\nkind = \"golden\"\n",
            &["learner.temperature", "did you mean `gold`"],
        ),
    ] {
        let sandbox = Sandbox::new();
        let file = text(&sandbox.write("mine.toml", toml));
        for command in ["train", "check"] {
            let output = sandbox
                .run(&[command, file.as_str()])
                .check(2, says)
                .without_panic();
            assert!(output.stderr.contains("mine.toml"), "{}", output.stderr);
        }
        assert!(
            !sandbox.path("runs").exists(),
            "a rejected configuration leaves no files: {toml}"
        );
    }
}

#[test]
fn an_inconsistent_preference_matrix_is_rejected() {
    let sandbox = Sandbox::new();
    for (matrix, says) in [
        (
            "[[0.5,0.8,0.3],[0.3,0.5,0.9],[0.7,0.1,0.5]]",
            "must add up to 1",
        ),
        (
            "[[0.6,0.8,0.3],[0.2,0.5,0.9],[0.7,0.1,0.5]]",
            "must add up to 1",
        ),
        (
            "[[0.5,0.8],[0.2,0.5]]",
            "it must have 3 rows of 3 numbers, one per arm",
        ),
    ] {
        let matrix = format!("preference.judge.matrix={matrix}");
        let arguments = tiny_bandit(&sandbox.path("run"), &[&matrix]);
        sandbox
            .run(&arguments)
            .check(2, &["preference.judge.matrix", says])
            .without_panic();
    }
    let arguments = tiny_bandit(
        &sandbox.path("run"),
        &["model.reference_probabilities=[0.5,0.3,0.3]"],
    );
    sandbox
        .run(&arguments)
        .check(2, &["model.reference_probabilities", "add up to 1.1"])
        .without_panic();
}

#[test]
fn an_invalid_command_line_is_rejected_with_usage() {
    let sandbox = Sandbox::new();
    let default = text(&config("default.toml"));
    for (arguments, says) in [
        (
            &["train", &default, "--set", "learner.steps"][..],
            "KEY=VALUE",
        ),
        (
            &["train", &default, "--set", "learner.stepz=3"],
            "did you mean `steps`",
        ),
        (&["train"], "Usage"),
        (&["tarin", &default], "'train'"),
    ] {
        sandbox.run(arguments).check(2, &[says]).without_panic();
    }
}

#[test]
fn missing_files_are_named() {
    let sandbox = Sandbox::new();
    sandbox
        .run(&["train", "nowhere.toml"])
        .check(3, &["nowhere.toml", "No such file"])
        .without_panic();
    let arguments = tiny_playground(&sandbox.path("run"), &["model.path=\"no/such/model\""]);
    sandbox
        .run(&arguments)
        .check(3, &["no/such/model"])
        .without_panic();
    sandbox
        .run(&["score", "--model", "no/such/model"])
        .check(3, &["no/such/model"])
        .without_panic();
}

#[test]
fn a_malformed_prompt_row_is_named_by_file_and_line() {
    let Some(model) = shared("a_malformed_row_of_prompts", "data/models/random-llama3") else {
        return;
    };
    for (rows, says) in [
        (
            "{\"prompt\": \"a\"}\n{\"prompt\": \"b\n",
            &["prompts.jsonl, line 2", "not JSON"][..],
        ),
        (
            "{\"prompt\": \"a\"}\n\n[1, 2]\n",
            &["prompts.jsonl, line 3", "{\"prompt\": \"...\"}"],
        ),
        (
            "{\"prompt\": \"a\"}\n{\"utterance\": \"b\"}\n",
            &["prompts.jsonl, line 2", "prompts.prompt_column"],
        ),
        (
            "{\"prompt\": 7}\n",
            &["prompts.jsonl, line 1", "neither text nor messages"],
        ),
        ("", &["prompts.jsonl", "no prompts"]),
        (
            "{\"prompt\": \"a\"}\n",
            &["prompts.jsonl", "prompts.held_out"],
        ),
    ] {
        let sandbox = Sandbox::new();
        let file = sandbox.write("prompts.jsonl", rows);
        let output = sandbox.run(&train_on(&model, &file, &sandbox.path("run")));
        output.check(3, says).without_panic();
    }
}

#[test]
fn a_tokenizer_of_another_model_is_rejected() {
    let Some(model) = shared("a_tokenizer_of_another_model", "data/models/random-llama3") else {
        return;
    };
    let Some(gpt2) = shared("a_tokenizer_of_another_model", "data/tokenizers/gpt2") else {
        return;
    };
    let sandbox = Sandbox::new();
    let folder = sandbox.copy_of(&model, "foreign");
    let tokenizer = fs::read(gpt2.join("tokenizer.json")).expect("the file exists");
    fs::write(folder.join("tokenizer.json"), tokenizer).expect("a writable copy");
    let prompts = prompts(&sandbox);
    let says = ["the tokenizer of", "foreign", "does not fit the model"];
    let arguments = train_on(&folder, &prompts, &sandbox.path("run"));
    sandbox.run(&arguments).check(3, &says).without_panic();
    // The playground's judge reads token ids, which mean other words in any other vocabulary.
    let arguments = tiny_playground(&sandbox.path("other"), &[&format!("model.path={model:?}")]);
    sandbox
        .run(&arguments)
        .check(3, &["random-llama3", "playground"])
        .without_panic();
}

#[test]
fn an_unsupported_architecture_is_rejected_with_the_supported_ones() {
    let Some(model) = shared("an_unknown_architecture", "data/models/random-llama3") else {
        return;
    };
    let sandbox = Sandbox::new();
    let folder = sandbox.copy_of(&model, "mamba");
    edit_config(&folder, |config| {
        config["architectures"] = Value::from(vec!["MambaForCausalLM"]);
        config["model_type"] = Value::from("mamba");
    });
    let prompts = prompts(&sandbox);
    let says = [
        "Mamba",
        "config.json",
        "not supported",
        "supported are",
        "Llama",
        "Qwen2",
        "Qwen3",
        "Mistral",
    ];
    let arguments = train_on(&folder, &prompts, &sandbox.path("run"));
    sandbox.run(&arguments).check(3, &says).without_panic();
}

#[test]
fn truncated_or_mismatched_weights_are_rejected() {
    let Some(model) = shared("torn_or_foreign_weights", "data/models/random-llama3") else {
        return;
    };
    let sandbox = Sandbox::new();
    let prompts = prompts(&sandbox);
    let complete = fs::read(model.join("model.safetensors")).expect("the file exists");
    for (name, length) in [("half", complete.len() / 2), ("header", 100), ("empty", 0)] {
        let folder = sandbox.copy_of(&model, name);
        fs::write(folder.join("model.safetensors"), &complete[..length]).expect("a writable copy");
        let arguments = train_on(&folder, &prompts, &sandbox.path(&format!("run-{name}")));
        sandbox
            .run(&arguments)
            .check(3, &[name, "model.safetensors"])
            .without_panic();
    }
    let folder = sandbox.copy_of(&model, "narrow");
    edit_config(&folder, |config| {
        config["intermediate_size"] = Value::from(8);
    });
    let arguments = train_on(&folder, &prompts, &sandbox.path("run-narrow"));
    sandbox
        .run(&arguments)
        .check(3, &["weights do not fit its config.json", "mlp"])
        .without_panic();
    let folder = sandbox.copy_of(&model, "bare");
    fs::remove_file(folder.join("model.safetensors")).expect("a writable copy");
    let arguments = train_on(&folder, &prompts, &sandbox.path("run-bare"));
    sandbox
        .run(&arguments)
        .check(3, &["bare", "model.safetensors"])
        .without_panic();
}

#[test]
fn a_run_directory_is_used_by_one_run_only() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let long = tiny_bandit(&run, &["learner.steps=1000000"]);
    let mut first = sandbox.start(&long);
    first.until("its first step", || steps(&run).first().cloned());
    let second = sandbox.run(&tiny_bandit(&run, &[]));
    second
        .check(
            3,
            &[&text(&run), "in use by another process (pid", "--run-dir"],
        )
        .without_panic();
    let mut resume = long.clone();
    resume.push("--resume".into());
    sandbox
        .run(&resume)
        .check(3, &["in use by another process (pid"])
        .without_panic();
    first.terminate();
    first.wait().check(5, &[]);
    let output = sandbox.run(&tiny_bandit(&run, &[]));
    output
        .check(
            3,
            &[&text(&run), "already contains one", "--resume", "--run-dir"],
        )
        .without_panic();
}

#[test]
fn a_run_without_checkpoint_cannot_be_resumed() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let mut resume = tiny_bandit(&run, &[]);
    resume.push("--resume".into());
    sandbox
        .run(&resume)
        .check(3, &[&text(&run), "config.toml", "leave out `--resume`"])
        .without_panic();

    // A run without a checkpoint, for example killed before its first.
    sandbox.run(&tiny_bandit(&run, &[])).succeeded();
    fs::remove_dir_all(run.join("checkpoints")).expect("a run has checkpoints");
    sandbox
        .run(&resume)
        .check(2, &[&text(&run), "no checkpoint", "another directory"])
        .without_panic();
}

#[test]
fn a_truncated_checkpoint_is_not_resumed() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox.run(&tiny_bandit(&run, &[])).succeeded();
    let checkpoint = run.join("checkpoints/step_100");
    let mut resume = tiny_bandit(&run, &["learner.steps=110"]);
    resume.push("--resume".into());
    for file in ["state.json", "model.safetensors", "optimizer.safetensors"] {
        let path = checkpoint.join(file);
        let complete = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        fs::write(&path, &complete[..complete.len() / 2]).expect("a writable run directory");
        sandbox
            .run(&resume)
            .check(3, &["step_100", file])
            .without_panic();
        fs::write(&path, complete).expect("a writable run directory");
    }
    sandbox.run(&resume).succeeded();
}

#[test]
fn a_checkpoint_with_other_weights_is_not_resumed() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = ["learner.save_steps=50"];
    sandbox.run(&tiny_bandit(&run, &sets)).succeeded();
    let path = run.join("checkpoints/step_100/model.safetensors");
    let mut bytes = fs::read(&path).expect("a checkpoint has weights");
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).expect("a writable run directory");
    let resume = |which: &str| {
        let mut arguments = tiny_bandit(&run, &["learner.steps=110", sets[0]]);
        arguments.push(format!("--resume{which}"));
        sandbox.run(&arguments)
    };
    resume("")
        .check(3, &["step_100", "model.safetensors", "--resume=FOLDER"])
        .without_panic();
    let earlier = run.join("checkpoints/step_50");
    resume(&format!("={}", earlier.display())).succeeded();
    assert_eq!(report(&run)["steps"], 110);
}

#[test]
fn a_port_in_use_is_named_by_its_key() {
    let sandbox = Sandbox::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener").to_string();
    let listen = format!("telemetry.listen={address}");
    let arguments = tiny_bandit(&sandbox.path("run"), &[&listen]);
    sandbox
        .run(&arguments)
        .check(3, &[&address, "telemetry.listen"])
        .without_panic();
}

#[test]
fn a_rejected_run_starts_after_its_input_is_fixed() {
    let Some(model) = shared("what_was_refused_runs", "data/models/random-llama3") else {
        return;
    };
    let sandbox = Sandbox::new();
    let file = sandbox.write("prompts.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \n");
    let call = train_on(&model, &file, &sandbox.path("run"));
    sandbox.run(&call).check(3, &["prompts.jsonl, line 2"]);
    prompts(&sandbox);
    // The rejected call created no run directory, so there is nothing to resume.
    sandbox.run(&call).succeeded();
}

#[cfg(not(feature = "mistral"))]
#[test]
fn a_build_without_mistral_rs_names_the_feature() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let remedy = ["without mistral.rs", "--features mistral"];
    for set in [
        "actor.engine.kind=mistral",
        "preference.judge={ kind = \"mistral\", path = \"m\" }",
    ] {
        let call = tiny_playground(&run, &[set]);
        sandbox.run(&call).check(2, &remedy).without_panic();
        assert!(!run.exists(), "no run was started");
    }
    let golden = "golden --model m --prompts p --output o";
    let golden: Vec<&str> = golden.split(' ').collect();
    sandbox.run(&golden).check(2, &remedy);
}
