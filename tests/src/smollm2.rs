//! SmolLM2-135M-Instruct in a GGUF file, a real chat model, which is fetched rather than kept.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use serde_json::Value;

use crate::shared;

/// Held while the file is fetched, once for the tests of a process.
static FETCH: Mutex<()> = Mutex::new(());

/// The model's file, fetched first if the folder `target` does not have it (`env!("CARGO_TARGET_TMPDIR")`), and its reference
/// values. Logs that the test
/// named `test` is skipped and returns `None` if it cannot be fetched.
///
/// # Panics
/// If it cannot be fetched and `CI=true`: a skip is a failure in CI.
pub fn smollm2(test: &str, target: &str) -> Option<(PathBuf, Value)> {
    let source = shared(test, "data/models/smollm2-135m")?;
    let folder = Path::new(target).join("smollm2-135m");
    let fetching = FETCH
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let output = Command::new(source.join("fetch")).arg(&folder).output();
    drop(fetching);
    let failure = match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(failure) = failure {
        let message = format!("SKIPPED {test}: the model could not be fetched: {failure}");
        assert!(env::var("CI").as_deref() != Ok("true"), "{message}");
        eprintln!("{message}");
        return None;
    }
    let reference = std::fs::read(source.join("reference.json")).expect("the reference values");
    let reference = serde_json::from_slice(&reference).expect("JSON");
    Some((folder.join("SmolLM2-135M-Instruct.Q4_1.gguf"), reference))
}
