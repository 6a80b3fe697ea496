//! Whatever is wrong with what a user gives is told in a sentence that names the thing and the remedy,
//! with the exit code that the help promises: 2 for a configuration, 3 for what is missing or broken.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

use house::{Workplace, config, report, shared, steps, tiny_bandit, tiny_playground};
use serde_json::Value;

fn words(arguments: &[&str]) -> Vec<String> {
    arguments
        .iter()
        .map(|&argument| argument.to_owned())
        .collect()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// `agon train` on the model in `folder` and the prompts in `prompts`, judged by a rule.
fn train_on(folder: &Path, prompts: &Path, run: &Path) -> Vec<String> {
    let mut arguments = words(&[
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

/// A file of prompts without fault.
fn prompts(workplace: &Workplace) -> PathBuf {
    workplace.write(
        "prompts.jsonl",
        "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n{\"prompt\": \"c\"}\n",
    )
}

/// `config.json` of a model's folder, changed.
fn edit_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut json =
        serde_json::from_slice(&fs::read(&path).expect("it was copied")).expect("it is JSON");
    change(&mut json);
    fs::write(&path, json.to_string()).expect("it was copied");
}

#[test]
fn mistakes_of_a_configuration_are_named_with_their_remedy() {
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
        let workplace = Workplace::new();
        let file = text(&workplace.write("mine.toml", toml));
        for command in ["train", "check"] {
            let ended = workplace
                .run(&[command, file.as_str()])
                .check(2, says)
                .without_panic();
            assert!(ended.err.contains("mine.toml"), "{}", ended.err);
        }
        assert!(
            !workplace.path("runs").exists(),
            "a refused configuration leaves nothing behind: {toml}"
        );
    }
}

#[test]
fn a_bandits_matrix_that_does_not_add_up_is_refused() {
    let workplace = Workplace::new();
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
        let arguments = tiny_bandit(&workplace.path("run"), &[&matrix]);
        workplace
            .run(&arguments)
            .check(2, &["preference.judge.matrix", says])
            .without_panic();
    }
    let arguments = tiny_bandit(
        &workplace.path("run"),
        &["model.reference_probabilities=[0.5,0.3,0.3]"],
    );
    workplace
        .run(&arguments)
        .check(2, &["model.reference_probabilities", "add up to 1.1"])
        .without_panic();
}

#[test]
fn a_command_line_without_sense_is_refused_with_the_right_form() {
    let workplace = Workplace::new();
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
        workplace.run(arguments).check(2, &[says]).without_panic();
    }
}

#[test]
fn files_that_are_not_there_are_named() {
    let workplace = Workplace::new();
    workplace
        .run(&["train", "nowhere.toml"])
        .check(3, &["nowhere.toml", "No such file"])
        .without_panic();
    let arguments = tiny_playground(&workplace.path("run"), &["model.path=\"no/such/model\""]);
    workplace
        .run(&arguments)
        .check(3, &["no/such/model"])
        .without_panic();
    workplace
        .run(&["score", "--model", "no/such/model"])
        .check(3, &["no/such/model"])
        .without_panic();
}

#[test]
fn a_malformed_row_of_prompts_is_named_by_file_and_line() {
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
        let workplace = Workplace::new();
        let file = workplace.write("prompts.jsonl", rows);
        let ended = workplace.run(&train_on(&model, &file, &workplace.path("run")));
        ended.check(3, says).without_panic();
    }
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let Some(model) = shared("a_tokenizer_of_another_model", "data/models/random-llama3") else {
        return;
    };
    let Some(gpt2) = shared("a_tokenizer_of_another_model", "data/tokenizers/gpt2") else {
        return;
    };
    let workplace = Workplace::new();
    let folder = workplace.copy_of(&model, "strange");
    let tokenizer = fs::read(gpt2.join("tokenizer.json")).expect("it is there");
    fs::write(folder.join("tokenizer.json"), tokenizer).expect("the copy is ours");
    let prompts = prompts(&workplace);
    let says = ["the tokenizer of", "strange", "does not fit the model"];
    let arguments = train_on(&folder, &prompts, &workplace.path("run"));
    workplace.run(&arguments).check(3, &says).without_panic();
    // The playground's judge reads ids: any other model's mean other words.
    let arguments = tiny_playground(
        &workplace.path("other"),
        &[&format!("model.path={model:?}")],
    );
    workplace
        .run(&arguments)
        .check(3, &["random-llama3", "playground"])
        .without_panic();
}

#[test]
fn an_unknown_architecture_is_refused_with_those_that_are_known() {
    let Some(model) = shared("an_unknown_architecture", "data/models/random-llama3") else {
        return;
    };
    let workplace = Workplace::new();
    let folder = workplace.copy_of(&model, "mamba");
    edit_config(&folder, |config| {
        config["architectures"] = Value::from(vec!["MambaForCausalLM"]);
        config["model_type"] = Value::from("mamba");
    });
    let prompts = prompts(&workplace);
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
    let arguments = train_on(&folder, &prompts, &workplace.path("run"));
    workplace.run(&arguments).check(3, &says).without_panic();
}

#[test]
fn torn_or_foreign_weights_are_refused() {
    let Some(model) = shared("torn_or_foreign_weights", "data/models/random-llama3") else {
        return;
    };
    let workplace = Workplace::new();
    let prompts = prompts(&workplace);
    let whole = fs::read(model.join("model.safetensors")).expect("it is there");
    for (name, length) in [("half", whole.len() / 2), ("header", 100), ("empty", 0)] {
        let folder = workplace.copy_of(&model, name);
        fs::write(folder.join("model.safetensors"), &whole[..length]).expect("the copy is ours");
        let arguments = train_on(&folder, &prompts, &workplace.path(&format!("run-{name}")));
        workplace
            .run(&arguments)
            .check(3, &[name, "model.safetensors"])
            .without_panic();
    }
    let folder = workplace.copy_of(&model, "narrow");
    edit_config(&folder, |config| {
        config["intermediate_size"] = Value::from(8);
    });
    let arguments = train_on(&folder, &prompts, &workplace.path("run-narrow"));
    workplace
        .run(&arguments)
        .check(3, &["weights do not fit its config.json", "mlp"])
        .without_panic();
    let folder = workplace.copy_of(&model, "bare");
    fs::remove_file(folder.join("model.safetensors")).expect("the copy is ours");
    let arguments = train_on(&folder, &prompts, &workplace.path("run-bare"));
    workplace
        .run(&arguments)
        .check(3, &["bare", "model.safetensors"])
        .without_panic();
}

#[test]
fn one_directory_holds_one_run() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let long = tiny_bandit(&run, &["learner.steps=1000000"]);
    let mut first = workplace.start(&long);
    first.until("its first step", || steps(&run).first().cloned());
    let alive = workplace.run(&tiny_bandit(&run, &[]));
    alive
        .check(
            3,
            &[&text(&run), "in use by another process (pid", "--run-dir"],
        )
        .without_panic();
    let mut resume = long.clone();
    resume.push("--resume".into());
    workplace
        .run(&resume)
        .check(3, &["in use by another process (pid"])
        .without_panic();
    first.terminate();
    first.wait().check(5, &[]);
    let ended = workplace.run(&tiny_bandit(&run, &[]));
    ended
        .check(
            3,
            &[&text(&run), "already holds one", "--resume", "--run-dir"],
        )
        .without_panic();
}

#[test]
fn what_cannot_be_resumed_is_said() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let mut resume = tiny_bandit(&run, &[]);
    resume.push("--resume".into());
    workplace
        .run(&resume)
        .check(3, &[&text(&run), "config.toml", "leave out `--resume`"])
        .without_panic();

    // A run without a checkpoint, such as one that was killed before its first.
    workplace.run(&tiny_bandit(&run, &[])).succeeded();
    fs::remove_dir_all(run.join("checkpoints")).expect("a run has checkpoints");
    workplace
        .run(&resume)
        .check(2, &[&text(&run), "no checkpoint", "--resume auto"])
        .without_panic();
}

#[test]
fn a_torn_checkpoint_is_not_resumed() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    workplace.run(&tiny_bandit(&run, &[])).succeeded();
    let checkpoint = run.join("checkpoints/step_100");
    let mut resume = tiny_bandit(&run, &["learner.steps=110"]);
    resume.push("--resume".into());
    for file in ["state.json", "model.safetensors", "optimizer.safetensors"] {
        let path = checkpoint.join(file);
        let whole = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        fs::write(&path, &whole[..whole.len() / 2]).expect("the run is ours");
        workplace
            .run(&resume)
            .check(3, &["step_100", file])
            .without_panic();
        fs::write(&path, whole).expect("the run is ours");
    }
    workplace.run(&resume).succeeded();
}

#[test]
fn a_checkpoint_whose_weights_are_not_finite_is_not_resumed() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let sets = ["learner.save_steps=50"];
    workplace.run(&tiny_bandit(&run, &sets)).succeeded();
    let path = run.join("checkpoints/step_100/model.safetensors");
    let mut bytes = fs::read(&path).expect("a checkpoint has weights");
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).expect("the run is ours");
    let resume = |which: &str| {
        let mut words = tiny_bandit(&run, &["learner.steps=110", sets[0]]);
        words.push(format!("--resume{which}"));
        workplace.run(&words)
    };
    resume("")
        .check(3, &["step_100", "not finite", "--resume=FOLDER"])
        .without_panic();
    let earlier = run.join("checkpoints/step_50");
    resume(&format!("={}", earlier.display())).succeeded();
    assert_eq!(report(&run)["steps"], 110);
}

#[test]
fn a_taken_port_is_named_by_its_key() {
    let workplace = Workplace::new();
    let holder = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = holder.local_addr().expect("it is bound").to_string();
    let listen = format!("telemetry.listen={address}");
    let arguments = tiny_bandit(&workplace.path("run"), &[&listen]);
    workplace
        .run(&arguments)
        .check(3, &[&address, "telemetry.listen"])
        .without_panic();
}

#[test]
fn what_was_refused_runs_when_it_is_mended() {
    let Some(model) = shared("what_was_refused_runs", "data/models/random-llama3") else {
        return;
    };
    let workplace = Workplace::new();
    let file = workplace.write("prompts.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \n");
    let call = train_on(&model, &file, &workplace.path("run"));
    workplace.run(&call).check(3, &["prompts.jsonl, line 2"]);
    prompts(&workplace);
    // Nothing has begun, so that there is nothing to resume and no directory to give up.
    workplace.run(&call).succeeded();
}

#[cfg(not(feature = "mistral"))]
#[test]
fn a_build_without_mistral_rs_says_how_to_get_one() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let remedy = ["without mistral.rs", "--features mistral"];
    for set in [
        "actor.engine.kind=mistral",
        "preference.judge={ kind = \"mistral\", path = \"m\" }",
    ] {
        let call = tiny_playground(&run, &[set]);
        workplace.run(&call).check(2, &remedy).without_panic();
        assert!(!run.exists(), "no run has begun");
    }
    let golden = "golden --model m --prompts p --output o";
    let golden: Vec<&str> = golden.split(' ').collect();
    workplace.run(&golden).check(2, &remedy);
}
