//! Builds and runs the roles of a run. Each role knows its streams and nothing of the other roles.

mod build;
mod judge_outage;
mod role_settings;
mod single_process;
mod streams;

use std::{sync::Arc, time::Duration};

use learner::{RunOrigin, Summary};
use messages::{Stage, WeightsVersion};
use preference::apo::{History, RoundReport};
use settings::Settings;
use telemetry::{RunDirectory, StageSnapshot};

use crate::assembly::{self, RunInputs};

pub(crate) use build::{ApoSession, InitialActorPolicy, Role, RoleBuilder, StageMember};
pub(crate) use judge_outage::with_judge_outage;
pub(crate) use role_settings::{sampling, weights_form};
pub(crate) use single_process::{join_all, run_single_process};
pub(crate) use streams::{RunStreams, STREAM_NAMES};

/// Time for roles to finish their messages in flight once the learner is done.
pub(crate) const EXIT_GRACE: Duration = Duration::from_secs(60);

/// A run that a learner of this process starts or resumes.
pub(crate) struct RunContext<'a> {
    /// Settings.
    pub(crate) settings: &'a Settings,
    /// The same, resolved, as TOML.
    pub(crate) config: &'a str,
    /// Base model, adapter and prompts.
    pub(crate) inputs: &'a RunInputs,
    /// Run directory.
    pub(crate) directory: &'a Arc<RunDirectory>,
    /// Start and inputs of the run.
    pub(crate) origin: RunOrigin,
}

impl RunContext<'_> {
    /// Start of this session.
    pub(crate) fn start(&self) -> anyhow::Result<SessionStart> {
        let resumed = self.origin.resume.as_deref();
        let version = resumed.map(learner::checkpoint_version).transpose()?;
        let apo_step = resumed.map(learner::checkpoint_apo_step).transpose()?;
        Ok(SessionStart {
            session: self.directory.session(),
            step: version.map_or(0, |version| version.step),
            apo_step: apo_step.unwrap_or(0),
        })
    }

    /// The outcome of the run, from the learner's summary and the counters of all stages.
    pub(crate) fn outcome(
        &self,
        summary: Summary,
        stages: Vec<(Stage, StageSnapshot)>,
    ) -> anyhow::Result<RunOutcome> {
        let end = WeightsVersion {
            session: self.directory.session(),
            step: summary.steps,
        };
        let rounds = History::load(&assembly::rounds_directory(self.directory.root()), end)?.rounds;
        Ok(RunOutcome {
            summary,
            stages,
            rounds,
        })
    }
}

/// Start of a session: what it continues from; zeros in a new run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionStart {
    /// Session number.
    pub(crate) session: u64,
    /// Learner step.
    pub(crate) step: u64,
    /// Step of the last completed APO round. One at `step` itself may be due still, although an earlier session had it.
    pub(crate) apo_step: u64,
}

impl SessionStart {
    /// The session, with the step up to which rounds of earlier sessions count.
    pub(crate) fn rounds_before(self) -> WeightsVersion {
        WeightsVersion {
            session: self.session,
            step: self.apo_step,
        }
    }
}

/// Result of a finished or interrupted run.
pub(crate) struct RunOutcome {
    /// Summary of the learner.
    pub(crate) summary: Summary,
    /// Counters of each stage.
    pub(crate) stages: Vec<(Stage, StageSnapshot)>,
    /// Rounds of adversarial preference optimisation.
    pub(crate) rounds: Vec<RoundReport>,
}
