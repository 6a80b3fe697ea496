//! A disk that is full while a checkpoint is written costs that checkpoint and no other.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use house::{Workplace, agon_binary, report, tiny_playground};

/// Files may not grow beyond so many kibibytes: room for metrics and words, none for the weights.
const LIMIT_KIB: u32 = 48;

/// Every file under `folder` and what it holds.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("an entry of a folder").path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            let content = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            found.insert(path, content);
        }
    }
    found
}

/// `agon` with these arguments under a limit on the size of files. The signal that comes with the
/// limit is ignored, so that writing fails as it does on a full disk: with an error.
fn limited(arguments: &[String]) -> Command {
    let mut command = Command::new("bash");
    let script = format!("ulimit -f {LIMIT_KIB}; trap '' XFSZ; exec \"$0\" \"$@\"");
    command
        .arg("-c")
        .arg(script)
        .arg(agon_binary())
        .args(arguments);
    command
}

#[test]
fn a_checkpoint_that_does_not_fit_leaves_the_old_one_as_it_was() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    workplace
        .run(&tiny_playground(&run, &["learner.steps=2"]))
        .succeeded();
    let checkpoints = run.join("checkpoints");
    let weights = checkpoints.join("step_2/model.safetensors");
    let size = fs::metadata(&weights)
        .unwrap_or_else(|e| panic!("{}: {e}", weights.display()))
        .len();
    assert!(
        size > 1024 * u64::from(LIMIT_KIB),
        "weights of {size} bytes fit the limit"
    );
    let before = contents(&checkpoints);

    let mut more = tiny_playground(&run, &["learner.steps=6", "learner.save_steps=2"]);
    more.push("--resume".into());
    let ended = workplace
        .start_command(limited(&more))
        .wait()
        .without_panic();
    let says = [
        "checkpoint",
        "step_4",
        "model.safetensors",
        "earlier checkpoints are untouched",
    ];
    ended.check(1, &says);
    // Byte for byte, and nothing unfinished beside it.
    assert!(
        before == contents(&checkpoints),
        "the folder of checkpoints changed"
    );
    let names: Vec<_> = fs::read_dir(&checkpoints)
        .expect("it was read above")
        .map(|entry| entry.expect("an entry of a folder").file_name())
        .filter(|name| !name.to_string_lossy().starts_with("step_"))
        .collect();
    assert!(names.is_empty(), "left behind: {names:?}");

    workplace.run(&more).succeeded();
    assert_eq!(report(&run)["steps"], 6);
    assert!(checkpoints.join("step_6/model.safetensors").exists());
}
