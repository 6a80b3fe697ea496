//! Parts of a learner: what it trains, from where it starts, which prompts and pairs it takes, and its streams.

use std::{path::PathBuf, sync::Arc, time::Duration};

use messages::{Dropped, LabelledPair, MessageLimits, Pacing, Pair, Prompt, Seed};
use model::{LanguageModel, ModelFolder, PublishedForm, PublishedWeights};
use settings::{EvaluationSettings, LearnerSettings, ReferenceSettings, TelemetrySettings};
use telemetry::{RunDirectory, StageCounters, Waits};
use transport::{Receiver, Sender, WeightStore};

use crate::{
    apo_sampler::ApoSchedule,
    checkpoint,
    curriculum::Curriculum,
    error::LearnerError,
    evaluation::EvaluationConditions,
    file_pairs::{BatchShare, FilePairs, FilePairsParts, Judging, PairFiles},
    input_record::InputRecord,
    prompts::PromptSet,
    reporter::Sampling,
    trainer::ReferenceLogprobs,
};

/// Parts of a learner.
pub struct LearnerParts {
    /// Training settings.
    pub settings: LearnerSettings,
    /// Evaluation settings.
    pub evaluation: EvaluationSettings,
    /// Stop tokens, chat template and sampling settings, recorded with every evaluation.
    pub conditions: EvaluationConditions,
    /// Schedule of APO rounds, if APO is on.
    pub apo: Option<ApoSchedule>,
    /// Telemetry settings.
    pub telemetry: TelemetrySettings,
    /// Seed of prompts, completions and sampled labels.
    pub seed: Seed,
    /// Policy to train.
    pub model: InitialPolicy,
    /// Prompts and how they are answered.
    pub prompts: PromptPlan,
    /// Streams.
    pub streams: LearnerStreams,
    /// Message counters.
    pub counters: LearnerCounters,
    /// Run directory.
    pub directory: Arc<RunDirectory>,
    /// Start of the run.
    pub origin: RunOrigin,
}

/// Origin of a run: the checkpoint to resume and the record of its inputs. [`Self::check`] checks that both fit.
#[derive(Debug, Clone, Default)]
pub struct RunOrigin {
    /// Checkpoint to resume, which is whole; `None` for a new run.
    pub resume: Option<PathBuf>,
    /// Record of the run's inputs; part of every checkpoint.
    pub inputs: InputRecord,
    /// Whether the run is resumed although its inputs have changed.
    pub accepts_changes: bool,
}

/// Message counters of the learner's process.
pub struct LearnerCounters {
    /// Counters of the learner stage.
    pub own: StageCounters,
    /// Counters of all stages in this process, the learner's included; part of every checkpoint.
    pub stages: Vec<StageCounters>,
}

/// Policy at the start of a run.
pub struct InitialPolicy {
    /// Model folder of the reference.
    pub folder: Arc<ModelFolder>,
    /// The reference, or the reference with an adapter.
    pub policy: LanguageModel,
    /// The reference with which the run begins: the policy without its adapter, which may be packed.
    pub start: LanguageModel,
    /// Update rule of the reference.
    pub reference: ReferenceSettings,
}

/// Prompts of a run and how they are answered, and the pairs from files beside the answers.
pub struct PromptPlan {
    /// Prompt set.
    pub set: Arc<dyn PromptSet>,
    /// Floor of the curriculum by signal, `prompts.curriculum_floor`; `None` without a curriculum. Ignored for a set
    /// without [`PromptSet::train_count`].
    pub curriculum_floor: Option<f64>,
    /// Pacing of prompts.
    pub pacing: Pacing,
    /// Distribution of the completions.
    pub sampling: Sampling,
    /// Pairs from files, if batches have some.
    pub pairs: Option<FilePairsPlan>,
}

/// Pairs from files and how they are used.
pub struct FilePairsPlan {
    /// The pairs.
    pub files: Arc<PairFiles>,
    /// Split of every batch.
    pub share: BatchShare,
    /// Storage of the reference's log-probabilities of the pairs; `None`: they are computed in every pass.
    pub reference_logprobs: Option<ReferenceLogprobs>,
    /// The run's judge, if it labels them.
    pub judge: Option<FilePairsJudge>,
}

/// The judge that labels pairs from files.
pub struct FilePairsJudge {
    /// Kind of the judge, for messages.
    pub name: &'static str,
    /// Outgoing pairs.
    pub pairs: Sender<Pair>,
}

impl PromptPlan {
    /// The curriculum of a run with this seed, if there is one.
    pub(crate) fn curriculum(&self, seed: Seed) -> Option<Curriculum> {
        let count = self.set.train_count()? as u64;
        Some(Curriculum::new(count, self.curriculum_floor?, seed))
    }
}

/// Streams of a learner.
pub struct LearnerStreams {
    /// Outgoing prompts.
    pub prompts: Sender<Prompt>,
    /// Incoming labelled pairs.
    pub labelled: Receiver<LabelledPair>,
    /// Incoming notes of dropped prompts.
    pub drops: Receiver<Dropped>,
    /// Outgoing weights.
    pub weight_store: WeightStore<PublishedWeights>,
    /// Form of outgoing weights.
    pub weights_form: PublishedForm,
    /// Limits of incoming labelled pairs and drop notes.
    pub limits: MessageLimits,
}

impl FilePairsPlan {
    /// The pairs of `session`.
    pub(crate) fn pairs(
        self,
        settings: &LearnerSettings,
        session: u64,
        waits: &Waits,
    ) -> FilePairs {
        FilePairs::new(FilePairsParts {
            files: self.files,
            share: self.share,
            session,
            steps: settings.steps,
            judging: self.judge.map(|FilePairsJudge { name, pairs }| Judging {
                name,
                pairs,
                timeout: Duration::from_secs(settings.batch_timeout_seconds),
                waits: waits.clone(),
                min_margin: settings.min_margin,
            }),
        })
    }
}

impl RunOrigin {
    /// Checks that the run may be resumed with these inputs: they are those of its checkpoint, or changes are accepted,
    /// which are logged.
    ///
    /// # Errors
    /// If they differ, or the checkpoint cannot be read.
    pub fn check(&self) -> Result<(), LearnerError> {
        let Some(path) = &self.resume else {
            return Ok(());
        };
        let changes = self
            .inputs
            .changes(&checkpoint::read(path)?.snapshot.inputs);
        if changes.is_empty() {
            return Ok(());
        }
        let changes = changes.join("; ");
        if self.accepts_changes {
            tracing::warn!(
                changes,
                "the run is resumed with other inputs than it began with"
            );
            return Ok(());
        }
        Err(LearnerError::ChangedInputs {
            path: path.clone(),
            changes,
        })
    }
}
