//! Finished APO rounds of a run, read from disk on resume.

use std::{
    fs,
    path::{Path, PathBuf},
};

use messages::WeightsVersion;

use crate::apo::RoundReport;
use crate::error::PreferenceError;

/// File of round reports, one JSON line per round.
pub(super) const ROUNDS: &str = "rounds.jsonl";

/// APO rounds of a run up to a learner step.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    /// All rounds, oldest first.
    pub rounds: Vec<RoundReport>,
    directory: PathBuf,
}

impl History {
    /// Reads the rounds in `directory` of a run: those of the session of `before`, and those of earlier sessions up to
    /// its step. Other rounds are deleted from the file: a run that was rolled back repeats them. A session begins with
    /// the step of the last round of its checkpoint, which may be older than a round at the checkpoint's own step.
    ///
    /// # Errors
    /// When the file of reports cannot be read, parsed or rewritten.
    pub fn load(directory: &Path, before: WeightsVersion) -> Result<Self, PreferenceError> {
        let path = directory.join(ROUNDS);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(PreferenceError::Unreadable { path, source }),
        };
        let mut rounds = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let round: RoundReport =
                serde_json::from_str(text).map_err(|error| PreferenceError::MalformedRound {
                    path: path.clone(),
                    line,
                    reason: error.to_string(),
                })?;
            rounds.push(round);
        }
        let all = rounds.len();
        rounds.retain(|round| round.session == before.session || round.step <= before.step);
        if rounds.len() < all {
            let lines: String = rounds.iter().map(|round| round.line() + "\n").collect();
            fs::write(&path, lines)
                .map_err(|source| PreferenceError::Unwritable { path, source })?;
        }
        Ok(Self {
            rounds,
            directory: directory.to_owned(),
        })
    }

    /// Folder of the current judge's model; `None` when it is the initial model.
    #[must_use]
    pub fn model(&self) -> Option<PathBuf> {
        let round = self.active_round();
        (round > 0).then(|| folder(&self.directory, round))
    }

    /// Number of the last round and the weights that sampled for it; `None` when there is none.
    #[must_use]
    pub fn last(&self) -> Option<(u64, WeightsVersion)> {
        self.rounds
            .last()
            .map(|round| (round.round, round.version()))
    }

    /// Number of the round whose model is the current judge; 0 when it is the initial model.
    #[must_use]
    pub fn active_round(&self) -> u64 {
        let accepted = self
            .rounds
            .iter()
            .rev()
            .find(|round| round.rejected.is_none());
        accepted.map_or(0, |round| round.round)
    }
}

/// Folder of the model of a round.
pub(super) fn folder(directory: &Path, round: u64) -> PathBuf {
    directory.join(format!("round_{round}"))
}
