//! A full disk during a save loses only the checkpoint that is being written.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use system_tests::{Sandbox, agon_binary, report, tiny_playground};

/// Maximum file size in KiB: enough for metrics and logs, too small for the weights.
const LIMIT_KIB: u32 = 48;

/// Path and content of every file under `folder`.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            let content = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            found.insert(path, content);
        }
    }
    found
}

/// An `agon` command with a limit on file sizes. SIGXFSZ is ignored, so that writes fail with an error as on a full
/// disk.
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
fn a_failed_save_leaves_earlier_checkpoints_unchanged() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox
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
    let output = sandbox.start_command(limited(&more)).wait().without_panic();
    let says = [
        "checkpoint",
        "step_4",
        "model.safetensors",
        "earlier checkpoints are untouched",
    ];
    output.check(1, &says);
    // Unchanged byte for byte, without unfinished files.
    assert!(before == contents(&checkpoints), "the checkpoints changed");
    let names: Vec<_> = fs::read_dir(&checkpoints)
        .expect("the folder exists")
        .map(|entry| entry.expect("a directory entry").file_name())
        .filter(|name| !name.to_string_lossy().starts_with("step_"))
        .collect();
    assert!(names.is_empty(), "left behind: {names:?}");

    sandbox.run(&more).succeeded();
    assert_eq!(report(&run)["steps"], 6);
    assert!(checkpoints.join("step_6/model.safetensors").exists());
}
