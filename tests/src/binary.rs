//! Location of the program under test, which the command that runs the tests has built.

use std::{
    env,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::workspace_root;

/// Path of the `agon` binary: in the profile's folder, where `cargo test --workspace` puts it, or `AGON_BINARY`.
///
/// # Panics
/// If it does not exist.
pub fn agon_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let default = profile_folder().join(format!("agon{}", env::consts::EXE_SUFFIX));
        let binary = env::var_os("AGON_BINARY").map_or(default, |path| workspace_root().join(path));
        assert!(
            binary.exists(),
            "{} does not exist: run cargo test --workspace, which builds it, or set AGON_BINARY",
            binary.display()
        );
        binary
    })
}

/// Folder of the cargo profile, `<target>/<profile>`: the folder of this executable, or the one above for a test, which
/// is in `deps`.
pub(crate) fn profile_folder() -> PathBuf {
    let executable = env::current_exe().expect("a running program has an executable");
    let folder = executable.parent().expect("an executable is in a folder");
    let above = folder.parent().filter(|_| folder.ends_with("deps"));
    above.unwrap_or(folder).to_owned()
}
