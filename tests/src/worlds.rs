//! Runs small enough for a test: a bandit and a playground, as arguments of `agon train`.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::{binary::profile_folder, workspace_root};

/// A playground that is made and trained in seconds; what it learns is not the point.
const TINY: [&str; 17] = [
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

/// An adapter with dropout in place of the whole weights, and discriminators beside the objective, in two
/// passes a step.
const ADAPTED: [&str; 6] = [
    "model.lora_rank=4",
    "model.lora_dropout=0.1",
    "learner.ganpo.lambda=0.5",
    "learner.ganpo.heads=2",
    "learner.ganpo.layers=1",
    "learner.gradient_accumulation_steps=2",
];

/// The bandit of `configs/bandit.toml`, for the paths it takes and not for where it arrives.
const SHORT: [&str; 4] = [
    "learner.steps=100",
    "learner.train_batch_size=32",
    "evaluation.prompts=32",
    "actor.slots=64",
];

/// A file of `configs/`.
pub fn config(name: &str) -> PathBuf {
    workspace_root().join("configs").join(name)
}

/// `agon train` on a tiny playground into the run directory `run`, with these settings changed.
pub fn tiny_playground(run: &Path, sets: &[&str]) -> Vec<String> {
    let base = format!("playground.base_dir={:?}", bases());
    let sets = TINY
        .iter()
        .copied()
        .chain([base.as_str()])
        .chain(sets.iter().copied());
    train("default.toml", run, sets)
}

/// As [`tiny_playground`], training an adapter with a latent-space regulariser.
pub fn tiny_adapted(run: &Path, sets: &[&str]) -> Vec<String> {
    tiny_playground(run, &[&ADAPTED, sets].concat())
}

/// `agon train` on a short bandit into the run directory `run`, with these settings changed.
pub fn tiny_bandit(run: &Path, sets: &[&str]) -> Vec<String> {
    train(
        "bandit.toml",
        run,
        SHORT.iter().copied().chain(sets.iter().copied()),
    )
}

fn train<'a>(file: &str, run: &Path, sets: impl Iterator<Item = &'a str>) -> Vec<String> {
    let words = [
        "train",
        &config(file).to_string_lossy(),
        "--run-dir",
        &run.to_string_lossy(),
    ]
    .map(str::to_owned);
    let sets = sets.flat_map(|set| ["--set".to_owned(), set.to_owned()]);
    words.into_iter().chain(sets).collect()
}

/// Where the tests of this process keep their bases: made anew by every process, for the program may
/// have changed.
fn bases() -> &'static Path {
    static BASES: OnceLock<PathBuf> = OnceLock::new();
    BASES.get_or_init(|| {
        let executable = std::env::current_exe().expect("a running test has an executable");
        let name = executable.file_stem().expect("an executable has a name");
        let path = profile_folder().join("house-bases").join(name);
        if path.exists() {
            fs::remove_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        path
    })
}
