//! Batches that gave a loss or a gradient that is not finite: kept for people to look at.

use std::path::PathBuf;

use messages::LabelledPair;
use telemetry::{RunDirectory, SampleLog};

use crate::{LearnerError, checkpoint::encode_pairs};

/// Writes the batch of the `count`-th non-finite step into the run's quarantine: as it was, for a
/// program, and as samples, for people. Returns the first of the two files.
pub(crate) fn write(
    directory: &RunDirectory,
    step: u64,
    count: u64,
    pairs: &[LabelledPair],
) -> Result<PathBuf, LearnerError> {
    let folder = directory.quarantine();
    let name = format!("step_{step}_{count}");
    let path = folder.join(format!("{name}.pairs"));
    let unwritable = |reason: std::io::Error| LearnerError::Unwritable {
        path: path.clone(),
        reason: reason.to_string(),
    };
    std::fs::create_dir_all(&folder).map_err(unwritable)?;
    telemetry::write_atomically(&path, &encode_pairs(pairs))?;
    let mut samples = SampleLog::open(&folder.join(format!("{name}.jsonl")))?;
    for pair in pairs {
        samples.append(step, pair)?;
    }
    Ok(path)
}
