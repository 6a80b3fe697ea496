//! The program under test: built once for every process of tests, and found.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use crate::workspace_root;

/// Where `agon` lies: built from the working tree with the profile of the tests, unless `AGON_BINARY`
/// names one.
///
/// # Panics
/// When it does not build: with what the compiler says.
pub fn agon_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match env::var_os("AGON_BINARY") {
        Some(path) => workspace_root().join(path),
        None => build(),
    })
}

/// The folder of the profile, `<target>/<profile>`: two above this executable, `deps/<test>-<hash>`.
pub(crate) fn profile_folder() -> PathBuf {
    let executable = env::current_exe().expect("a running test has an executable");
    let folder = executable.ancestors().nth(2);
    folder
        .expect("cargo puts tests two folders deep")
        .to_owned()
}

fn build() -> PathBuf {
    let folder = profile_folder();
    let target = folder
        .parent()
        .expect("the profile lies in the target folder");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--quiet",
            "--package",
            "agon",
            "--package",
            "house",
        ])
        .arg("--target-dir")
        .arg(target)
        .current_dir(workspace_root());
    if folder.ends_with("release") {
        command.arg("--release");
    }
    let output = command
        .output()
        .expect("cargo, which runs this test, starts");
    assert!(
        output.status.success(),
        "agon does not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    folder.join(format!("agon{}", env::consts::EXE_SUFFIX))
}
