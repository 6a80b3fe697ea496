//! Resuming: from the newest whole checkpoint of the run's branch, with the inputs that the run began with, and never
//! from nothing where a run has been.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use playground::Bandit;
use serde_json::json;
use system_tests::{
    ProcessOutput, Sandbox, agon_binary, config, make_pipe, metrics, number, report, steps,
    tiny_adapted, tiny_bandit, tiny_playground,
};

/// Runs a short bandit with run directory `run`, resumed as `resume` says, such as `--resume=auto`.
fn bandit(sandbox: &Sandbox, run: &Path, sets: &[&str], resume: &[&str]) -> ProcessOutput {
    let sets = [&["learner.save_steps=2", "learner.steps=6"], sets].concat();
    let mut arguments = tiny_bandit(run, &sets);
    arguments.extend(resume.iter().map(|&argument| argument.to_owned()));
    sandbox.run(&arguments).without_panic()
}

/// A finished run with checkpoints of the steps 0, 2, 4 and 6.
fn finished(sandbox: &Sandbox) -> PathBuf {
    let run = sandbox.path("run");
    bandit(sandbox, &run, &["learner.save_total_limit=10"], &[]).succeeded();
    assert_eq!(checkpoints(&run), [0, 2, 4, 6]);
    run
}

/// Steps of a run's checkpoints; other names than theirs and that of the lineage are failures.
fn checkpoints(run: &Path) -> Vec<u64> {
    let entries = fs::read_dir(run.join("checkpoints")).expect("a run has checkpoints");
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut steps: Vec<u64> = names
        .map(|name| name.into_string().expect("a name in UTF-8"))
        .filter(|name| name != "lineage.json")
        .map(|name| {
            let step = name
                .strip_prefix("step_")
                .and_then(|step| step.parse().ok());
            step.unwrap_or_else(|| panic!("{name} is no checkpoint"))
        })
        .collect();
    steps.sort_unstable();
    steps
}

/// Content of every file of a run, but of its lock.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else if !path.ends_with("run.lock") {
            let content = fs::read(&path).expect("a file of the run");
            found.insert(path, content);
        }
    }
    found
}

/// Flips one bit in the middle of a file.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).expect("a writable run");
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let before = contents(&run);
    for resume in ["--resume", "--resume=auto"] {
        let output = bandit(&sandbox, &run, &[], &[resume]);
        output.check(0, &["nothing is left to do", "learner.steps"]);
        assert!(contents(&run) == before, "{resume} changed a file");
    }
    bandit(&sandbox, &run, &["learner.steps=8"], &["--resume"]).succeeded();
    assert_eq!(report(&run)["steps"], 8);
}

#[test]
fn a_finished_run_with_a_damaged_last_checkpoint_is_not_left_at_that() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    damage(&run.join("checkpoints/step_6/model.safetensors"));
    let says = ["step_6", "model.safetensors is damaged", "--resume=auto"];
    bandit(&sandbox, &run, &[], &["--resume"]).check(3, &says);
    let again = bandit(&sandbox, &run, &[], &["--resume=auto"]);
    again.check(0, &["is skipped", "step_6", "resumed step=4"]);
    bandit(&sandbox, &run, &[], &["--resume"]).check(0, &["nothing is left to do"]);
}

/// A run that waits for a pipe's writer would hang without a word.
#[test]
fn a_pipe_in_place_of_a_checkpoints_file_is_damage() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    for name in ["state.json", "buffered.pairs", "checksums.json"] {
        let path = run.join("checkpoints/step_6").join(name);
        let content = fs::read(&path).expect("a file of the checkpoint");
        fs::remove_file(&path).expect("a writable run");
        make_pipe(&path);
        let output = bandit(&sandbox, &run, &["learner.steps=8"], &["--resume"]);
        output.check(3, &["step_6", name, "not a regular file"]);
        fs::remove_file(&path).expect("a writable run");
        fs::write(&path, content).expect("a writable run");
    }
}

#[test]
fn a_pipe_in_place_of_a_runs_file_is_not_waited_for() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    for name in ["config.toml", "session", "metrics.jsonl", "samples.jsonl"] {
        let path = run.join(name);
        let content = fs::read(&path).expect("a file of the run");
        fs::remove_file(&path).expect("a writable run");
        make_pipe(&path);
        let output = bandit(&sandbox, &run, &["learner.steps=8"], &["--resume=auto"]);
        assert!(
            output.code.is_some_and(|code| [1, 3].contains(&code)),
            "{:?}",
            output.code
        );
        assert!(output.stderr.contains(name), "{}", output.stderr);
        assert!(
            output.stderr.contains("not a regular file"),
            "{}",
            output.stderr
        );
        fs::remove_file(&path).expect("a writable run");
        fs::write(&path, content).expect("a writable run");
    }
    bandit(&sandbox, &run, &["learner.steps=8"], &["--resume=auto"]).succeeded();
}

#[test]
fn a_finished_run_without_its_report_gets_it_without_another_evaluation() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let evaluations = || {
        let lines = metrics(&run);
        let evaluated = lines.iter().filter(|line| !line["eval/win_rate"].is_null());
        evaluated.count()
    };
    assert_eq!(evaluations(), 1);
    fs::remove_file(run.join("report.json")).expect("a report");
    bandit(&sandbox, &run, &[], &["--resume"]).succeeded();
    assert_eq!(
        (evaluations(), &report(&run)["finished"]),
        (1, &json!(true))
    );
}

#[test]
fn a_run_continues_on_the_branch_that_it_was_resumed_on() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let step_2 = format!("--resume={}", run.join("checkpoints/step_2").display());
    let few = ["learner.steps=3", "learner.save_total_limit=2"];
    let output = bandit(&sandbox, &run, &few, &[&step_2]).succeeded();
    assert!(output.stdout.contains("step_3"), "{}", output.stdout);
    // The oldest of the branch is removed; those that were left behind are kept.
    assert_eq!(checkpoints(&run), [2, 3, 4, 6]);
    let output = bandit(&sandbox, &run, &["learner.steps=5"], &["--resume"]);
    output.check(
        0,
        &[
            "resumed step=3",
            "does not continue from these later checkpoints",
        ],
    );
    assert_eq!(steps(&run).len(), 5);
    let newest = sandbox.run(&["export", "--run", &text(&run), "--output", "exported"]);
    newest.check(0, &["checkpoints/step_5"]);
}

#[test]
fn a_damaged_journal_of_verdicts_does_not_keep_a_run_from_resuming() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let journal = run.join("verdicts.jsonl");
    let damaged = "no verdict\n{}\n";
    fs::write(&journal, damaged).expect("a journal");
    let output = bandit(&sandbox, &run, &["learner.steps=7"], &["--resume"]);
    output.check(0, &["WARN", "failed to read line 1 of", "resumed step=6"]);
    // Nothing of it is lost.
    let kept = fs::read_to_string(journal).expect("the journal is there");
    assert_eq!(kept, damaged);
}

#[test]
fn auto_takes_the_newest_whole_checkpoint_and_names_what_it_skips() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let file = |step: u64, name: &str| run.join(format!("checkpoints/step_{step}/{name}"));
    damage(&file(6, "optimizer.safetensors"));
    let more = ["learner.steps=8"];
    bandit(&sandbox, &run, &more, &["--resume"]).check(
        3,
        &[
            "step_6",
            "optimizer.safetensors is damaged",
            "--resume=auto",
        ],
    );
    bandit(&sandbox, &run, &more, &["--resume=auto"]).check(
        0,
        &[
            "is skipped",
            "step_6",
            "optimizer.safetensors",
            "resumed step=4",
        ],
    );
    assert_eq!(report(&run)["steps"], 8);

    for step in checkpoints(&run) {
        damage(&file(step, "model.safetensors"));
    }
    bandit(&sandbox, &run, &["learner.steps=9"], &["--resume=auto"]).check(
        3,
        &[
            "step_8: model.safetensors is damaged",
            "does not start again from nothing",
        ],
    );
    assert_eq!(steps(&run).len(), 8);
}

#[test]
fn a_checkpoint_of_an_earlier_build_is_named_as_such() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let checkpoint = run.join("checkpoints/step_6");
    fs::remove_file(checkpoint.join("checksums.json")).expect("a checkpoint has checksums");
    bandit(&sandbox, &run, &["learner.steps=8"], &["--resume"])
        .check(3, &["step_6", "written by an earlier build"]);
    // Its model is one for every build.
    sandbox
        .run(&["export", "--run", &text(&run), "--output", "exported"])
        .check(0, &["checkpoints/step_6"]);
}

#[test]
fn a_run_does_not_start_again_where_one_has_been() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let config = run.join("config.toml");
    let settings = fs::read(&config).expect("a configuration");
    fs::remove_file(&config).expect("a writable run");
    for resume in [&[][..], &["--resume=auto"]] {
        bandit(&sandbox, &run, &[], resume).check(3, &["step_6", "no config.toml"]);
    }
    fs::write(&config, settings).expect("a writable run");
    fs::remove_dir_all(run.join("checkpoints")).expect("a run has checkpoints");
    bandit(&sandbox, &run, &[], &["--resume=auto"])
        .check(3, &["no checkpoint", "steps up to 6", "another directory"]);
    assert_eq!(steps(&run).len(), 6);
    // As if it had been killed before its first checkpoint.
    for name in ["metrics.jsonl", "report.json"] {
        fs::remove_file(run.join(name)).expect("a file of the run");
    }
    bandit(&sandbox, &run, &[], &["--resume=auto"]).succeeded();
    assert_eq!(steps(&run).len(), 6);
}

#[test]
fn leftovers_of_killed_processes_and_copies_do_not_block_a_start() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let checkpoints = run.join("checkpoints");
    for name in [".step_8.unfinished", ".step_1.removed"] {
        fs::create_dir(checkpoints.join(name)).expect("a writable run");
        fs::write(checkpoints.join(name).join("state.json"), "{").expect("a writable run");
    }
    fs::rename(
        checkpoints.join("step_4"),
        checkpoints.join(".step_4.replaced"),
    )
    .expect("a name");
    let sets = ["learner.steps=8", "learner.save_total_limit=10"];
    bandit(&sandbox, &run, &sets, &["--resume"]).succeeded();
    assert!(self::checkpoints(&run).contains(&4), "it got its name back");
    // A copy of the directory from before that session.
    fs::write(run.join("session"), "0\n").expect("a writable run");
    bandit(&sandbox, &run, &["learner.steps=9"], &["--resume"]).succeeded();
    let session = fs::read_to_string(run.join("session")).expect("a session");
    assert_eq!((session.trim(), steps(&run).len()), ("2", 9));
}

#[test]
fn an_interrupted_evaluation_is_made_up_for() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = ["learner.steps=3", "evaluation.prompts=20000"];
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    running.until("the last step", || (steps(&run).len() == 3).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    let sets = [
        "learner.steps=6",
        "evaluation.prompts=16",
        "evaluation.eval_steps=3",
    ];
    let mut resume = tiny_playground(&run, &sets);
    resume.push("--resume".into());
    sandbox
        .run(&resume)
        .check(0, &["repeating the interrupted evaluation"]);
    let lines = metrics(&run);
    let evaluated = lines.iter().filter(|line| !line["eval/win_rate"].is_null());
    let evaluated: Vec<f64> = evaluated.map(|line| number(line, "/step")).collect();
    assert_eq!(evaluated, [3.0, 6.0]);
}

#[test]
fn changed_settings_are_refused_or_named() {
    let sandbox = Sandbox::new();
    let run = finished(&sandbox);
    let more = "learner.steps=8";
    for (set, names) in [
        ("run.seed=5", &["run.seed was 0 and is 5"][..]),
        (
            "model.reference_probabilities=[0.4, 0.4, 0.2]",
            &[
                "model.reference_probabilities was",
                "weights of the reference model was",
            ],
        ),
        (
            "learner.objective.tau=0.25",
            &["learner.objective.tau was 0.5 and is 0.25"],
        ),
        (
            "preference.judge.matrix=[[0.5, 0.1, 0.3], [0.9, 0.5, 0.9], [0.7, 0.1, 0.5]]",
            &["preference.judge.matrix"],
        ),
    ] {
        let output = bandit(&sandbox, &run, &[more, set], &["--resume"]);
        let output = output.check(2, names);
        assert!(
            output.stderr.contains("--accept-changes"),
            "{}",
            output.stderr
        );
    }
    let rate = "learner.learning_rate=1e-3";
    bandit(&sandbox, &run, &[more, rate], &["--resume"])
        .check(0, &["learner.learning_rate was 0.015 and is 0.001"]);
    let changed = ["learner.steps=9", "run.seed=5"];
    bandit(&sandbox, &run, &changed, &["--resume", "--accept-changes"])
        .check(0, &["run.seed was 0 and is 5"]);
    // The new checkpoint is of the new seed.
    bandit(
        &sandbox,
        &run,
        &["learner.steps=10", "run.seed=5"],
        &["--resume"],
    )
    .succeeded();
}

#[test]
fn changed_files_are_refused_by_name() {
    let sandbox = Sandbox::new();
    let (run, model) = (sandbox.path("run"), sandbox.path("model"));
    let write_model = |probabilities: &[f64]| {
        fs::create_dir_all(&model).expect("a folder");
        let bandit = Bandit::new(probabilities).expect("probabilities");
        bandit.write_model(&model).expect("a model");
    };
    let write_prompts = |prompts: &[&str]| {
        let rows = prompts
            .iter()
            .map(|prompt| json!({"prompt": prompt}).to_string() + "\n");
        sandbox.write("prompts.jsonl", rows.collect::<String>())
    };
    write_model(&[0.5, 0.5]);
    let prompts = write_prompts(&["arm0", "arm1", "arm0 arm1"]);
    let train = |steps: u64, resume: &[&str]| {
        let sets = [
            format!("model.path={model:?}"),
            "prompts.kind=dataset".into(),
            format!("prompts.path={prompts:?}"),
            "prompts.held_out=1".into(),
            "preference.judge.kind=rule".into(),
            "preference.judge.rules=[{kind = \"ended\", weight = 1.0}]".into(),
            "actor.max_new_tokens=3".into(),
            "actor.max_prompt_length=8".into(),
            format!("learner.steps={steps}"),
            "learner.train_batch_size=4".into(),
            "evaluation.prompts=1".into(),
            "telemetry.page=\"\"".into(),
        ];
        let (config, run) = (text(&config("default.toml")), text(&run));
        let mut arguments = vec!["train", &config, "--run-dir", &run];
        arguments.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
        arguments.extend(resume);
        sandbox.run(&arguments).without_panic()
    };
    train(2, &[]).succeeded();
    write_prompts(&["arm1", "arm0", "arm0 arm1"]);
    train(3, &["--resume"]).check(2, &["rows of the training prompts was", "--accept-changes"]);
    write_prompts(&["arm0", "arm1", "arm1 arm1"]);
    train(3, &["--resume"]).check(2, &["rows of the held-out prompts was"]);
    write_prompts(&["arm0", "arm1", "arm0 arm1"]);
    write_model(&[0.6, 0.4]);
    train(3, &["--resume"]).check(2, &["weights of the reference model was"]);
    // Files that need not be there.
    write_model(&[0.5, 0.5]);
    for (file, content, says) in [
        (
            "generation_config.json",
            json!({"eos_token_id": [0, 1]}),
            "stop tokens was",
        ),
        (
            "tokenizer_config.json",
            json!({"add_bos_token": true}),
            "tokenizer_config.json of the reference model was",
        ),
    ] {
        let file = model.join(file);
        let before = fs::read(&file).ok();
        fs::write(&file, content.to_string()).expect("a writable model");
        train(3, &["--resume"]).check(2, &[says, "--accept-changes"]);
        match before {
            Some(before) => fs::write(&file, before).expect("a writable model"),
            None => fs::remove_file(&file).expect("a writable model"),
        }
    }
    assert_eq!(steps(&run).len(), 2);
    // The same content elsewhere is no change.
    write_model(&[0.5, 0.5]);
    train(3, &["--resume"]).succeeded();
}

#[test]
fn a_run_directory_can_be_moved() {
    let sandbox = Sandbox::new();
    let (run, moved) = (sandbox.path("run"), sandbox.path("else/where"));
    sandbox
        .run(&tiny_adapted(&run, &["learner.steps=2"]))
        .succeeded();
    fs::create_dir(sandbox.path("else")).expect("a folder");
    fs::rename(&run, &moved).expect("a run is moved");
    // Relative to the sandbox, in which the program runs.
    let mut resume = tiny_adapted(Path::new("else/where"), &["learner.steps=3"]);
    resume.push("--resume".into());
    sandbox.run(&resume).succeeded();
    assert_eq!(steps(&moved).len(), 3);
    sandbox
        .run(&[
            "export",
            "--run",
            "else/where",
            "--output",
            "merged",
            "--merge",
        ])
        .succeeded();
    assert!(!run.exists());
}

#[test]
fn a_hangup_saves_as_a_termination_does() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let script = "\"$0\" \"$@\" & run=$!; \
        until grep -q '\"step\":3,' run/metrics.jsonl 2>/dev/null; do sleep 0.02; done; \
        kill -HUP $run; wait $run";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(agon_binary());
    command.args(tiny_bandit(&run, &["learner.steps=1000000"]));
    sandbox
        .start_command(command)
        .wait()
        .check(5, &["interrupted; saved"]);
    assert!(number(&report(&run), "/steps") >= 3.0);
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
