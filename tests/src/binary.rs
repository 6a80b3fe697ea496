//! The program under test: built by the command that runs these tests, and found.

use std::{
    env,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::workspace_root;

/// Where `agon` lies: beside the tests, where `cargo test --workspace` puts it, unless `AGON_BINARY`
/// names one.
///
/// # Panics
/// When it is not there.
pub fn agon_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let beside = profile_folder().join(format!("agon{}", env::consts::EXE_SUFFIX));
        let binary = env::var_os("AGON_BINARY").map_or(beside, |path| workspace_root().join(path));
        assert!(
            binary.exists(),
            "{} is not there: run cargo test --workspace, which builds it, or name it with AGON_BINARY",
            binary.display()
        );
        binary
    })
}

/// The folder of the profile, `<target>/<profile>`: this executable lies there, or in its `deps` when it is
/// a test.
pub(crate) fn profile_folder() -> PathBuf {
    let executable = env::current_exe().expect("a running program has an executable");
    let folder = executable.parent().expect("an executable lies in a folder");
    let above = folder.parent().filter(|_| folder.ends_with("deps"));
    above.unwrap_or(folder).to_owned()
}
