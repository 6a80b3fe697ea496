//! The learner's loop: takes batches, steps, publishes, evaluates and saves.
//!
//! The components own their state and return outcomes; the loop alone decides what follows, rollbacks included.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use messages::{Digest, LabelledPair, Seed};
use settings::LearnerSettings;
use telemetry::Waits;
use tokio::sync::watch;

use crate::{
    apo_sampler::ApoSampler,
    checkpoint::{self, Checkpoint, Checkpoints, RunSnapshot},
    error::LearnerError,
    evaluation::Evaluation,
    evaluator::{Evaluated, Evaluator},
    pair_selection::LabelSelection,
    pair_source::{BatchLimits, PairSource, PairSourceParts, TrainingBatch},
    parts::{FilePairsPlan, InitialPolicy, LearnerParts},
    progress::RunProgress,
    prompt_scheduler::{PromptScheduler, PromptSchedulerParts, PromptSchedulerState},
    publisher::Publisher,
    recovery::{Recovery, RecoveryCounts},
    reporter::{AppliedStep, Reporter, ReporterParts, StepContext},
    trainer::{StepOutcome, Trainer, followers::Publication, thread::TrainerThread},
};

/// Ending of a learner's run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All steps were taken.
    Finished,
    /// A shutdown was requested; the run was saved.
    Interrupted,
}

/// Summary of a learner's run.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Ending of the run.
    pub ending: Ending,
    /// Steps taken.
    pub steps: u64,
    /// Pairs trained on.
    pub pairs: u64,
    /// Pairs among them that came from files.
    pub file_pairs: u64,
    /// Response tokens trained on.
    pub tokens: u64,
    /// Working time in seconds, earlier sessions included.
    pub wall_seconds: f64,
    /// Digest of the final weights.
    pub weights_digest: Digest,
    /// Evaluations, oldest first.
    pub evaluations: Vec<Evaluation>,
    /// Rejected steps and rollbacks.
    pub recovery: RecoveryCounts,
    /// Fraction of the steps with a clipped gradient; `None` if this session took none.
    pub clipped_share: Option<f64>,
    /// Last checkpoint.
    pub checkpoint: PathBuf,
}

/// A learner.
pub struct Learner {
    settings: LearnerSettings,
    progress: RunProgress,
    trainer: TrainerThread,
    source: PairSource,
    publisher: Publisher,
    evaluator: Evaluator,
    apo: ApoSampler,
    recovery: Recovery,
    reporter: Reporter,
    checkpoints: Checkpoints,
    /// Part of the resumed checkpoint that [`Self::start`] restores.
    resumed: Option<ResumedPairs>,
}

/// Outstanding prompts and buffered pairs of a resumed checkpoint.
struct ResumedPairs {
    scheduler: PromptSchedulerState,
    buffered: Vec<LabelledPair>,
}

/// The trainer of a policy before its first step. It has a copy of what it trains; the policy itself is dropped.
fn initial_trainer(
    model: InitialPolicy,
    settings: &LearnerSettings,
    seed: Seed,
) -> Result<Trainer, LearnerError> {
    Trainer::new(model.folder, &model.policy, settings, seed)?
        .with_start(&model.start)
        .with_reference(model.reference)
}

impl Learner {
    /// Builds a learner and starts its trainer thread.
    ///
    /// # Errors
    /// If the model cannot be trained, the checkpoint cannot be read, or the run directory cannot be written.
    pub async fn new(parts: LearnerParts) -> Result<Self, LearnerError> {
        let (settings, directory) = (parts.settings, parts.directory);
        let (model, streams) = (parts.model, parts.streams);
        let tokenizer = model.folder.tokenizer.clone();
        let trainer = initial_trainer(model, &settings, parts.seed)?;
        let trainer = spawn(trainer, parts.prompts.pairs.as_ref())?;
        let mut reporter = Reporter::open(ReporterParts {
            settings: settings.clone(),
            telemetry: parts.telemetry,
            sampling: parts.prompts.sampling,
            directory: Arc::clone(&directory),
            tokenizer,
        })?;
        let session = directory.session();
        let (snapshot, buffered) = match &parts.origin.resume {
            Some(path) => {
                let Checkpoint { snapshot, buffered } = checkpoint::read(path)?;
                trainer.restore(path.clone()).await?;
                (snapshot.resumed_by(session), Some(buffered))
            }
            None => (RunSnapshot::initial(session), None),
        };
        let mut checkpoints = Checkpoints::new(
            Arc::clone(&directory),
            settings.save_total_limit,
            parts.origin.inputs,
            parts.counters.stages,
        );
        checkpoints.begin(&snapshot.lineage)?;
        checkpoints.restore_counters(snapshot.stages);
        reporter.continue_from(snapshot.totals.step)?;
        let waits = Waits::new("learner");
        let curriculum = parts.prompts.curriculum(parts.seed);
        let files = parts
            .prompts
            .pairs
            .map(|plan| plan.pairs(&settings, session, &waits));
        let mut source = PairSource::new(PairSourceParts {
            scheduler: PromptScheduler::new(PromptSchedulerParts {
                prompts: streams.prompts,
                set: parts.prompts.set,
                seed: parts.seed,
                pacing: parts.prompts.pacing,
                window: settings.prompt_window(),
                timeout: Duration::from_secs(settings.batch_timeout_seconds),
                waits: waits.clone(),
                curriculum,
            }),
            labelled: streams.labelled,
            drops: streams.drops,
            files,
            lineage: snapshot.lineage,
            counters: parts.counters.own,
            waits,
            limits: BatchLimits::new(&settings),
            selection: LabelSelection::new(&settings, parts.seed),
            message_limits: streams.limits,
        });
        source.restore_files(snapshot.files);
        let (weight_store, form) = (streams.weight_store, streams.weights_form);
        let scheduler = snapshot.scheduler;
        Ok(Self {
            progress: RunProgress::new(snapshot.totals),
            trainer,
            source,
            publisher: Publisher::new(weight_store, form, session, snapshot.version),
            evaluator: Evaluator::new(parts.evaluation, parts.conditions, snapshot.evaluations),
            apo: ApoSampler::new(parts.apo, snapshot.apo_step),
            recovery: Recovery::new(directory, settings.rollback_after, snapshot.recovery),
            reporter,
            checkpoints,
            resumed: buffered.map(|buffered| ResumedPairs {
                scheduler,
                buffered,
            }),
            settings,
        })
    }

    /// Current waits.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.source.waits()
    }

    /// Watches the number of steps taken.
    #[must_use]
    pub fn steps(&self) -> watch::Receiver<u64> {
        self.progress.watch_steps()
    }

    /// Takes the remaining steps, until `shutdown` turns true.
    ///
    /// # Errors
    /// If pairs do not arrive in time, the run diverges, or a file cannot be read or written.
    pub async fn run(
        mut self,
        mut shutdown: watch::Receiver<bool>,
    ) -> Result<Summary, LearnerError> {
        self.publisher.abandon_after(shutdown.clone());
        self.start(&mut shutdown).await?;
        while self.progress.step() < self.settings.steps {
            self.collect_apo_samples(&mut shutdown).await?;
            let Some(batch) = self.next_batch(&mut shutdown).await? else {
                return self.finish(Ending::Interrupted).await;
            };
            self.train(batch).await?;
            let sync_steps = self.settings.weight_sync_steps;
            if self.progress.step().is_multiple_of(sync_steps) && !self.source.is_offline() {
                self.publish().await?;
            }
            if self.is_due(self.evaluator.interval()) {
                self.evaluate(&mut shutdown).await?;
            }
            if self.is_due(self.settings.save_steps) {
                self.save().await?;
            }
        }
        let is_evaluated = self.evaluator.has_evaluated(self.progress.step());
        let evaluated = match is_evaluated || self.evaluator.is_off() {
            // By the session that this one resumes, or never.
            true => Evaluated::Completed,
            false => self.evaluate(&mut shutdown).await?,
        };
        match evaluated {
            Evaluated::Completed | Evaluated::Unjudged => self.finish(Ending::Finished).await,
            Evaluated::Interrupted => self.finish(Ending::Interrupted).await,
        }
    }

    /// Restores a checkpoint's pairs and prompts, after the evaluation of its step if that was interrupted; or begins
    /// with an evaluation, and a checkpoint to roll back to.
    async fn start(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), LearnerError> {
        if self.source.lineage().session > 0 {
            // Newer than everything that earlier sessions published. Announced before the session's first prompt, since
            // actors take a session from its announcement only.
            self.publish().await?;
            self.publisher.settle().await?;
        }
        let Some(ResumedPairs {
            scheduler,
            buffered,
        }) = self.resumed.take()
        else {
            if self.evaluator.interval() > 0 {
                self.evaluate(shutdown).await?;
            }
            return self.save().await;
        };
        let step = self.progress.step();
        if self.is_due(self.evaluator.interval()) && !self.evaluator.has_evaluated(step) {
            tracing::info!(step, "repeating the interrupted evaluation of this step");
            self.evaluate(shutdown).await?;
        }
        let version = self.publisher.version();
        let in_flight = self.source.restore(scheduler, buffered, version).await?;
        tracing::info!(step = self.progress.step(), in_flight, "resumed");
        Ok(())
    }

    /// Waits for the batch of the next step. `None` on shutdown.
    async fn next_batch(
        &mut self,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Option<TrainingBatch>, LearnerError> {
        self.source
            .next_batch(self.progress.step(), &mut self.publisher, shutdown)
            .await
    }

    /// Takes a step on this batch. A rejected step changes nothing; too many in a row roll the run back.
    async fn train(&mut self, batch: TrainingBatch) -> Result<(), LearnerError> {
        let (started, step) = (Instant::now(), self.progress.step());
        let limits = self.recovery.step_limits();
        let (outcome, pairs) = self.trainer.step(batch.pairs, step, limits).await?;
        self.source.acknowledge(batch.receipts);
        match outcome {
            StepOutcome::Applied(measurements, samples) => {
                let waits = self.source.finish_step(pairs.len());
                self.progress.advance(&pairs);
                self.recovery.count_applied(&measurements);
                let applied = AppliedStep {
                    pairs: &pairs,
                    samples,
                    measurements,
                    waits,
                    busy: started.elapsed(),
                };
                let run = StepContext {
                    totals: self.progress.totals(),
                    version: self.publisher.version(),
                    recovery: self.recovery.counts(),
                    last_evaluation: self.evaluator.history().last(),
                };
                self.reporter.log_step(applied, &run)
            }
            StepOutcome::Rejected(measurements) => {
                self.source.drop_nonfinite(pairs.len());
                let totals = self.progress.totals();
                self.reporter.log_rejected(&totals, &measurements)?;
                self.recovery.quarantine(step, &pairs, &measurements)?;
                if !self.recovery.must_roll_back() {
                    return Ok(());
                }
                self.roll_back().await?;
                self.publish().await
            }
        }
    }

    /// Rolls back to the last checkpoint. Consumes a step number, so that the restored weights get a newer version
    /// than the discarded ones.
    async fn roll_back(&mut self) -> Result<(), LearnerError> {
        let last = self.checkpoints.newest()?;
        self.recovery.roll_back(&self.trainer, last).await?;
        self.progress.skip_step();
        Ok(())
    }

    /// Rolls back while the weights are not valid.
    async fn ensure_valid_weights(&mut self) -> Result<(), LearnerError> {
        while !self
            .recovery
            .has_valid_weights(&self.trainer, self.progress.step())
            .await?
        {
            self.roll_back().await?;
        }
        Ok(())
    }

    /// Publishes the weights of this step; rolls back while they are not valid.
    async fn publish(&mut self) -> Result<(), LearnerError> {
        let is_last = self.progress.step() >= self.settings.steps;
        let publication = match is_last || self.is_due(self.evaluator.interval()) {
            true => Publication::Evaluation,
            false => Publication::Training,
        };
        self.publish_for(publication).await
    }

    async fn publish_for(&mut self, publication: Publication) -> Result<(), LearnerError> {
        if self.publisher.has_published(self.progress.step()) {
            return Ok(());
        }
        self.ensure_valid_weights().await?;
        let step = self.progress.step();
        self.publisher
            .publish(&self.trainer, step, publication)
            .await
    }

    /// Evaluates the weights of this step.
    async fn evaluate(
        &mut self,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Evaluated, LearnerError> {
        self.publish_for(Publication::Evaluation).await?;
        let evaluated = self
            .evaluator
            .run(&mut self.source, &mut self.publisher, shutdown)
            .await?;
        if evaluated == Evaluated::Completed
            && let Some(evaluation) = self.evaluator.history().last()
        {
            let wall_seconds = self.progress.totals().wall_seconds;
            self.reporter.log_evaluation(evaluation, wall_seconds)?;
        }
        Ok(evaluated)
    }

    /// Collects policy samples for an APO round, if one is due.
    async fn collect_apo_samples(
        &mut self,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<(), LearnerError> {
        let step = self.progress.step();
        if !self.apo.is_due(step) {
            return Ok(());
        }
        self.publish().await?;
        self.apo
            .collect(step, &mut self.source, &mut self.publisher, shutdown)
            .await
    }

    /// Writes a checkpoint; rolls back while the weights are not valid.
    async fn save(&mut self) -> Result<(), LearnerError> {
        self.ensure_valid_weights().await?;
        self.checkpoints
            .save(&self.trainer, self.checkpoint())
            .await?;
        let save = |trainer: &Trainer| {
            trainer.save_reference_logprobs();
            Ok(())
        };
        self.trainer.inspect(save).await
    }

    /// The run as of now; [`Checkpoints::save`] adds the inputs and the stages' counters.
    fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            snapshot: RunSnapshot {
                totals: self.progress.totals(),
                lineage: self.source.lineage().clone(),
                version: self.publisher.version(),
                recovery: self.recovery.state(),
                scheduler: self.source.scheduler_state(),
                files: self.source.files_state(),
                apo_step: self.apo.last_step(),
                evaluations: self.evaluator.history().to_vec(),
                ..RunSnapshot::default()
            },
            buffered: self.source.buffered(),
        }
    }

    /// Whether an action with this interval is due at this step; never at the last.
    fn is_due(&self, interval: u64) -> bool {
        let step = self.progress.step();
        interval > 0 && step.is_multiple_of(interval) && step < self.settings.steps
    }

    /// Saves the run and ends the trainer thread.
    async fn finish(mut self, ending: Ending) -> Result<Summary, LearnerError> {
        self.publisher.settle().await?;
        self.save().await?;
        let blob = self.trainer.weights().await?;
        let note = match ending {
            Ending::Finished => "done",
            Ending::Interrupted => "interrupted; saved",
        };
        let totals = self.progress.totals();
        let summary = Summary {
            ending,
            steps: totals.step,
            pairs: totals.pairs,
            file_pairs: totals.file_pairs,
            tokens: totals.tokens,
            wall_seconds: totals.wall_seconds,
            weights_digest: Digest::of(&blob),
            checkpoint: self.checkpoints.path(totals.step),
            recovery: self.recovery.counts(),
            clipped_share: self.reporter.clipped_share(),
            evaluations: self.evaluator.into_history(),
        };
        self.reporter.finish(totals.step, note);
        self.trainer.join()?;
        Ok(summary)
    }
}

/// Starts the thread of a trainer that keeps the reference's log-probabilities of these pairs.
fn spawn(
    mut trainer: Trainer,
    pairs: Option<&FilePairsPlan>,
) -> Result<TrainerThread, LearnerError> {
    if let Some(kept) = pairs.and_then(|plan| plan.reference_logprobs.clone()) {
        trainer.keep_reference_logprobs(kept);
    }
    TrainerThread::spawn(trainer)
}
