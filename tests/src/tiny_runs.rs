//! Small runs for tests, as arguments of `agon train`: a bandit, a playground, a playground with an adapter.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::{binary::profile_folder, workspace_root};

/// A playground that trains within seconds; too small to learn much.
const TINY_PLAYGROUND: [&str; 17] = [
    "playground.hidden_size=32",
    "playground.layers=1",
    "playground.heads=2",
    "playground.intermediate_size=64",
    "sft.steps=20",
    "sft.train_batch_size=16",
    "actor.mixture_coef=0.125",
    "actor.slots=16",
    "actor.max_new_tokens=16",
    "learner.steps=12",
    "learner.train_batch_size=8",
    "learner.max_staleness=0",
    "learner.save_steps=0",
    "evaluation.prompts=16",
    "evaluation.eval_steps=0",
    "telemetry.logging_steps=1000",
    "telemetry.samples_per_step=1",
];

/// A LoRA adapter with dropout, the GANPO regulariser, and gradient accumulation over two micro-batches.
const ADAPTER_AND_GANPO: [&str; 6] = [
    "model.lora_rank=4",
    "model.lora_dropout=0.1",
    "learner.ganpo.lambda=0.5",
    "learner.ganpo.heads=2",
    "learner.ganpo.layers=1",
    "learner.gradient_accumulation_steps=2",
];

/// The bandit of `configs/bandit.toml`, shortened; it does not converge.
const SHORT_BANDIT: [&str; 4] = [
    "learner.steps=100",
    "learner.train_batch_size=32",
    "evaluation.prompts=32",
    "actor.slots=64",
];

/// Path of a file in `configs/`.
pub fn config(name: &str) -> PathBuf {
    workspace_root().join("configs").join(name)
}

/// Arguments of `agon train` for a tiny playground with run directory `run` and these settings changed.
pub fn tiny_playground(run: &Path, sets: &[&str]) -> Vec<String> {
    let base_dir = format!("playground.base_dir={:?}", base_dir());
    let sets = TINY_PLAYGROUND
        .iter()
        .copied()
        .chain([base_dir.as_str()])
        .chain(sets.iter().copied());
    train("default.toml", run, sets)
}

/// Like [`tiny_playground`], training an adapter with the GANPO regulariser.
pub fn tiny_adapted(run: &Path, sets: &[&str]) -> Vec<String> {
    tiny_playground(run, &[&ADAPTER_AND_GANPO, sets].concat())
}

/// Arguments of `agon train` for a short bandit with run directory `run` and these settings changed.
pub fn tiny_bandit(run: &Path, sets: &[&str]) -> Vec<String> {
    train(
        "bandit.toml",
        run,
        SHORT_BANDIT.iter().copied().chain(sets.iter().copied()),
    )
}

fn train<'a>(file: &str, run: &Path, sets: impl Iterator<Item = &'a str>) -> Vec<String> {
    let arguments = [
        "train",
        &config(file).to_string_lossy(),
        "--run-dir",
        &run.to_string_lossy(),
    ]
    .map(str::to_owned);
    let sets = sets.flat_map(|set| ["--set".to_owned(), set.to_owned()]);
    arguments.into_iter().chain(sets).collect()
}

/// Folder of the base models of this test process; emptied at its start, because the program may have changed.
fn base_dir() -> &'static Path {
    static BASE_DIR: OnceLock<PathBuf> = OnceLock::new();
    BASE_DIR.get_or_init(|| {
        let executable = std::env::current_exe().expect("a running test has an executable");
        let name = executable.file_stem().expect("an executable has a name");
        let path = profile_folder().join("test-base-models").join(name);
        if path.exists() {
            fs::remove_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        path
    })
}
