//! What earlier rounds of a run left behind, for one that goes on.

use std::{
    fs,
    path::{Path, PathBuf},
};

use messages::WeightsVersion;

use super::RoundReport;
use crate::PreferenceError;

/// The file of reports: one line a round.
pub(super) const ROUNDS: &str = "rounds.jsonl";

/// The rounds of a run up to a step of its learner.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    /// Every round, oldest first.
    pub rounds: Vec<RoundReport>,
    directory: PathBuf,
}

impl History {
    /// Reads the rounds in `directory` of a run whose session began at `since`: those of this session, and
    /// of earlier ones those played up to there. Others are forgotten: a run that went back plays them
    /// again.
    ///
    /// # Errors
    /// When the file of reports cannot be read or is torn.
    pub fn take_up(directory: &Path, since: WeightsVersion) -> Result<Self, PreferenceError> {
        let path = directory.join(ROUNDS);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(PreferenceError::Unreadable { path, source }),
        };
        let mut rounds = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let round: RoundReport =
                serde_json::from_str(text).map_err(|error| PreferenceError::Torn {
                    path: path.clone(),
                    line,
                    reason: error.to_string(),
                })?;
            rounds.push(round);
        }
        let all = rounds.len();
        rounds.retain(|round| round.session == since.session || round.step <= since.step);
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

    /// The folder of the model that judges after them; `None` when it is still the initial one.
    #[must_use]
    pub fn model(&self) -> Option<PathBuf> {
        let round = self.judging_round();
        (round > 0).then(|| folder(&self.directory, round))
    }

    /// The last round and the weights whose samples it was played on; `None` when none was played.
    #[must_use]
    pub fn last(&self) -> Option<(u64, WeightsVersion)> {
        self.rounds
            .last()
            .map(|round| (round.round, round.version()))
    }

    /// The number of the round whose model judges; 0 when it is the initial one.
    #[must_use]
    pub fn judging_round(&self) -> u64 {
        let accepted = self
            .rounds
            .iter()
            .rev()
            .find(|round| round.refused.is_none());
        accepted.map_or(0, |round| round.round)
    }
}

/// Where the model of a round lies.
pub(super) fn folder(directory: &Path, round: u64) -> PathBuf {
    directory.join(format!("round_{round}"))
}
