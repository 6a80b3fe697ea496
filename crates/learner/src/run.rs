//! A learner's life: take pairs, step, publish, evaluate, save; and how it ends.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use messages::{
    Digest, DropReason, Dropped, LabelledPair, Prompt, Purpose, Seed, WeightsManifest,
    WeightsVersion,
};
use model::{DType, LanguageModel, ModelFolder, Tokenizer};
use settings::{EvaluationSettings, LearnerSettings, TelemetrySettings};
use telemetry::{Journal, Measurements, Progress, RunDirectory, SampleLog, StationCounters, Waits};
use tokio::{sync::watch, task::JoinHandle};
use transport::{Delivery, Receiver, Sender, WeightsShelf};

use crate::{
    Evaluation, EvaluationConditions, LearnerError, Pacing, PromptSet, Rounds,
    checkpoint::{self, Checkpoint, State},
    engine::Engine,
    evaluation::Tally,
    feed::Feed,
    intake::{self, InHand, Intake},
    quarantine,
    step::{StepOutcome, Trainer},
};

mod asking;
mod missing;
mod outlook;
mod patience;
mod telling;

use asking::Evaluated;
use missing::Missing;
use patience::Patience;

/// Held-out prompts on their way at once.
pub const EVALUATION_WINDOW: usize = 128;

/// Going back to a checkpoint more often than this does not help.
const MOST_ROLLBACKS: u64 = 3;

/// From which law the actors draw completions of training prompts, given the weight on the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    /// The policy's own in f32: temperature 1, no truncation. Its samples estimate expectations under the
    /// policy.
    Exact,
    /// Tempered, truncated, or with weights that are quantised or rounded on their way.
    Altered,
}

/// What a learner is made of.
pub struct LearnerParts {
    /// How it learns.
    pub settings: LearnerSettings,
    /// How it evaluates.
    pub evaluation: EvaluationSettings,
    /// Stop tokens, chat template and sampling of the completions, recorded with every evaluation.
    pub conditions: EvaluationConditions,
    /// When the adversarial game is played, if it is.
    pub rounds: Option<Rounds>,
    /// What it tells.
    pub telemetry: TelemetrySettings,
    /// The seed of prompts, completions and sampled labels.
    pub seed: Seed,
    /// The folder of the reference.
    pub folder: Arc<ModelFolder>,
    /// The policy at the start: the reference, or the reference with an adapter beside it.
    pub policy: LanguageModel,
    /// What is asked.
    pub set: Arc<dyn PromptSet>,
    /// How it is asked.
    pub pacing: Pacing,
    /// How it is answered.
    pub sampling: Sampling,
    /// Where prompts go.
    pub prompts: Sender<Prompt>,
    /// Where labelled pairs come from.
    pub labelled: Receiver<LabelledPair>,
    /// Where the notes of dropped prompts come from.
    pub drops: Receiver<Dropped>,
    /// The number format in which weights travel.
    pub weights_dtype: DType,
    /// Where weights go.
    pub shelf: WeightsShelf,
    /// Where everything is written.
    pub directory: Arc<RunDirectory>,
    /// What it took, gave and dropped.
    pub counters: StationCounters,
    /// The counters of all stations, its own included: part of every checkpoint.
    pub stations: Vec<StationCounters>,
    /// The checkpoint to take up.
    pub resume: Option<PathBuf>,
}

/// How a run of the learner ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All steps are taken.
    Finished,
    /// It was told to stop and has saved.
    Interrupted,
}

/// What a learner has to say at the end.
#[derive(Debug, Clone)]
pub struct Summary {
    /// How it ended.
    pub ending: Ending,
    /// Steps taken.
    pub steps: u64,
    /// Pairs trained on.
    pub pairs: u64,
    /// Response tokens trained on.
    pub tokens: u64,
    /// Seconds it worked, earlier sessions included.
    pub wall_seconds: f64,
    /// The digest of the final weights.
    pub weights_digest: Digest,
    /// Every evaluation, oldest first.
    pub evaluations: Vec<Evaluation>,
    /// Non-finite steps.
    pub nonfinite: u64,
    /// How often it went back to a checkpoint.
    pub rollbacks: u64,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
}

/// A learner, ready to run.
pub struct Learner {
    settings: LearnerSettings,
    evaluation: EvaluationSettings,
    conditions: EvaluationConditions,
    rounds: Option<Rounds>,
    telemetry: TelemetrySettings,
    labelled: Receiver<LabelledPair>,
    drops: Receiver<Dropped>,
    shelf: WeightsShelf,
    weights_dtype: DType,
    publication: Option<Publication>,
    directory: Arc<RunDirectory>,
    counters: StationCounters,
    stations: Vec<StationCounters>,
    engine: Engine,
    feed: Feed,
    intake: Intake,
    tally: Tally,
    contested: usize,
    sampling: Sampling,
    /// What was dropped since the last step, and so is in no mean over its pairs.
    missing: Missing,
    /// Since when nothing has come of waiting.
    patience: Patience,
    /// Whether it was said that nearly all are.
    collapsed: bool,
    journal: Journal,
    samples: SampleLog,
    tokenizer: Tokenizer,
    progress: Progress,
    waits: Waits,
    steps: watch::Sender<u64>,
    started: Instant,
    waited: Duration,
    state: State,
    resumed: Option<Checkpoint>,
}

/// Weights on their way to the shelf.
type Publication = JoinHandle<Result<(), LearnerError>>;

/// What a wait for pairs ended with.
enum Arrival {
    /// Something came; it has been dealt with.
    Something,
    /// The run is to stop.
    Shutdown,
}

impl Learner {
    /// Makes a learner and starts its thread.
    ///
    /// # Errors
    /// When the model cannot be trained, the checkpoint cannot be read or the run directory cannot be
    /// written.
    pub async fn new(parts: LearnerParts) -> Result<Self, LearnerError> {
        let trainer = Trainer::new(
            Arc::clone(&parts.folder),
            &parts.policy,
            &parts.settings,
            parts.seed,
        )?;
        let engine = Engine::spawn(trainer)?;
        let window = (parts.settings.max_staleness as usize + 1) * parts.settings.train_batch_size;
        let waits = Waits::new("learner");
        let patience = Duration::from_secs(parts.settings.batch_timeout_seconds);
        let way = (parts.prompts, waits.clone(), patience);
        let feed = Feed::new(way, parts.set, parts.seed, parts.pacing, window);
        let mut journal = Journal::open(&parts.directory.metrics())?;
        let mut samples = SampleLog::open(&parts.directory.samples())?;
        let resumed = match &parts.resume {
            Some(path) => {
                engine.restore(path.clone()).await?;
                Some(checkpoint::read(path)?)
            }
            None => None,
        };
        let session = parts.directory.session();
        let state = match &resumed {
            Some(checkpoint) => checkpoint.state.clone().resumed(session),
            None => State::beginning(&feed, session),
        };
        journal.truncate_after(state.step)?;
        samples.truncate_after(state.step)?;
        if parts.telemetry.tensorboard {
            journal.tell_tensorboard(&parts.directory.tensorboard(), state.step)?;
        }
        for counters in &parts.stations {
            if let Some(snapshot) = state.stations.get(counters.station().name()) {
                counters.restore(snapshot.clone());
            }
        }
        Ok(Self {
            progress: Progress::new("aligning", parts.settings.steps),
            settings: parts.settings,
            evaluation: parts.evaluation,
            conditions: parts.conditions,
            rounds: parts.rounds,
            telemetry: parts.telemetry,
            labelled: parts.labelled,
            drops: parts.drops,
            shelf: parts.shelf,
            weights_dtype: parts.weights_dtype,
            publication: None,
            directory: parts.directory,
            counters: parts.counters,
            stations: parts.stations,
            engine,
            feed,
            intake: Intake::default(),
            tally: Tally::default(),
            contested: 0,
            sampling: parts.sampling,
            missing: Missing::default(),
            patience: Patience::new(),
            collapsed: false,
            journal,
            samples,
            tokenizer: parts.folder.tokenizer.clone(),
            waits,
            steps: watch::Sender::new(state.step),
            started: Instant::now(),
            waited: Duration::ZERO,
            state,
            resumed,
        })
    }

    /// What it waits for while it runs.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// The steps it has taken, as they are taken.
    #[must_use]
    pub fn steps(&self) -> watch::Receiver<u64> {
        self.steps.subscribe()
    }

    /// Takes every step that is left, or as many as there are before `shutdown` turns true.
    ///
    /// # Errors
    /// When pairs do not come, the run diverges, or something cannot be read or written.
    pub async fn run(
        mut self,
        mut shutdown: watch::Receiver<bool>,
    ) -> Result<Summary, LearnerError> {
        self.begin(&mut shutdown).await?;
        while self.state.step < self.settings.steps {
            self.play(&mut shutdown).await?;
            let Some(batch) = self.take(&mut shutdown).await? else {
                return self.end(Ending::Interrupted).await;
            };
            self.train(batch).await?;
            if self
                .state
                .step
                .is_multiple_of(self.settings.weight_sync_steps)
            {
                self.publish().await?;
            }
            if due(self.state.step, self.evaluation.eval_steps)
                && self.state.step < self.settings.steps
            {
                self.evaluate(&mut shutdown).await?;
            }
            if due(self.state.step, self.settings.save_steps)
                && self.state.step < self.settings.steps
            {
                self.save().await?;
            }
        }
        match self.evaluate(&mut shutdown).await? {
            Evaluated::Completed => self.end(Ending::Finished).await,
            Evaluated::Interrupted => self.end(Ending::Interrupted).await,
        }
    }

    /// Takes up a checkpoint's pairs and prompts, or begins with an evaluation and a checkpoint to go
    /// back to.
    async fn begin(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), LearnerError> {
        if self.state.session > 0 {
            // Whatever earlier sessions published is older than this.
            self.publish().await?;
        }
        let Some(Checkpoint { state, in_hand }) = self.resumed.take() else {
            if self.evaluation.eval_steps > 0 {
                self.evaluate(shutdown).await?;
            }
            return self.save().await;
        };
        for labelled in in_hand {
            self.intake.add(labelled, None);
        }
        let intake = &mut self.intake;
        self.feed
            .restore(state.feed, self.state.version, |id| intake.forget(id))
            .await?;
        // What is asked for again will be taken again; only the rest is in hand already.
        self.counters.taken(self.intake.len() as u64);
        self.counters.set_in_hand(self.intake.len() as u64);
        tracing::info!(step = state.step, in_hand = self.intake.len(), "resumed");
        Ok(())
    }

    /// Waits for a batch of pairs that are fresh enough. `None` when the run is to stop.
    async fn take(
        &mut self,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Option<Vec<InHand>>, LearnerError> {
        let before = Instant::now();
        self.patience.renew();
        loop {
            let step = self.state.step;
            for stale in self.intake.stale(step, self.settings.max_staleness) {
                self.drop_pair(stale, DropReason::Stale);
            }
            let batch = self.intake.batch(self.settings.train_batch_size);
            let left = (self.settings.steps - step) as usize * self.settings.train_batch_size;
            let taken = batch.as_ref().map_or(0, Vec::len);
            // The batch that is about to be trained on still holds its credits: what is asked for now
            // is answered by weights at least as new as those before its step.
            self.feed
                .top_up(self.state.version, self.intake.len() + taken, left)
                .await?;
            if let Some(batch) = batch {
                self.waited += before.elapsed();
                return Ok(Some(batch));
            }
            if let Arrival::Shutdown = self.arrival("labelled pairs", shutdown).await? {
                return Ok(None);
            }
        }
    }

    /// Waits for a pair or for a note that a prompt was dropped, and deals with it.
    async fn arrival(
        &mut self,
        reason: &'static str,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Arrival, LearnerError> {
        if *shutdown.borrow() {
            return Ok(Arrival::Shutdown);
        }
        let seconds = self.settings.batch_timeout_seconds;
        let _wait = self.waits.enter(reason);
        let overdue = LearnerError::Overdue {
            reason,
            seconds,
            outstanding: self.feed.outstanding() + self.feed.asking(),
            in_hand: self.intake.len(),
            instead: self.patience.to_string(),
        };
        let end = self.patience.end(seconds);
        tokio::select! {
            delivery = self.labelled.receive() => {
                self.receive(delivery?);
            }
            delivery = self.drops.receive() => {
                let delivery = delivery?;
                let note = delivery.message();
                if note.session == self.state.session {
                    self.feed.returned(note.prompt);
                    self.missing.note(note);
                    self.patience.lost(note.reason, &note.detail);
                }
                delivery.acknowledge();
            }
            ended = published(&mut self.publication) => ended?,
            _ = shutdown.changed() => return Ok(Arrival::Shutdown),
            () = tokio::time::sleep_until(end) => return Err(overdue),
        }
        self.counters.set_in_hand(self.intake.len() as u64);
        Ok(Arrival::Something)
    }

    fn receive(&mut self, delivery: Delivery<LabelledPair>) {
        self.counters.taken(1);
        let (labelled, receipt) = delivery.take();
        let in_hand = InHand {
            labelled,
            receipt: Some(receipt),
        };
        if !self.is_of_this_run(&in_hand.labelled) {
            return self.drop_pair(in_hand, DropReason::Superseded);
        }
        if !self.feed.returned(in_hand.labelled.pair.id()) {
            return self.drop_pair(in_hand, DropReason::Duplicate);
        }
        let purpose = in_hand.labelled.pair.prompt.purpose;
        if purpose != Purpose::Contest
            && let Some(reason) = intake::unsound(&in_hand.labelled)
        {
            tracing::warn!(
                prompt = in_hand.labelled.pair.id().0,
                "a pair holds numbers that are not finite"
            );
            return self.drop_pair(in_hand, reason);
        }
        self.patience.renew();
        match purpose {
            Purpose::Train => self.intake.add(in_hand.labelled, in_hand.receipt),
            Purpose::Evaluate => {
                self.settle(in_hand.receipt);
                self.counters.given(1);
                self.tally.add(in_hand.labelled);
            }
            Purpose::Contest => {
                self.settle(in_hand.receipt);
                self.counters.given(1);
                self.contested += 1;
            }
        }
    }

    /// Whether a pair may be trained on although sessions were given up: its weights must be ones this
    /// session goes on from, and where a seed is to repeat, this session must have asked for it.
    fn is_of_this_run(&self, labelled: &LabelledPair) -> bool {
        let asked_now = labelled.pair.prompt.version.session == self.state.session;
        let whole = self.feed.pacing() == Pacing::WholeReleases;
        asked_now || !whole && self.state.descends_from(labelled.pair.version)
    }

    fn drop_pair(&mut self, in_hand: InHand, reason: DropReason) {
        if matches!(reason, DropReason::Stale | DropReason::Poisoned) {
            self.missing.lost();
        }
        self.patience.lost(reason, "");
        self.settle(in_hand.receipt);
        self.counters.dropped(reason, 1);
    }

    fn settle(&self, receipt: Option<transport::Receipt>) {
        if let Some(receipt) = receipt {
            receipt.acknowledge();
        }
    }

    /// Takes one step on these pairs, or refuses it when it is not finite.
    async fn train(&mut self, batch: Vec<InHand>) -> Result<(), LearnerError> {
        let before = Instant::now();
        let step = self.state.step;
        let (pairs, receipts): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|b| (b.labelled, b.receipt)).unzip();
        self.counters
            .set_in_hand((self.intake.len() + pairs.len()) as u64);
        let (outcome, pairs) = self.engine.step(pairs, step).await?;
        for receipt in receipts {
            self.settle(receipt);
        }
        self.counters.set_in_hand(self.intake.len() as u64);
        match outcome {
            StepOutcome::Taken(mut measurements, samples) => {
                self.counters.given(pairs.len() as u64);
                self.state.step += 1;
                self.steps.send_replace(self.state.step);
                self.state.consecutive_nonfinite = 0;
                self.state.pairs += telling::labels(&pairs) as u64;
                let tokens = pairs
                    .iter()
                    .flat_map(|l| &l.pair.completions)
                    .map(|c| c.ids.len() as u64);
                self.state.tokens += tokens.sum::<u64>();
                let missing = std::mem::take(&mut self.missing);
                if let Some(kl) = self.kl(&pairs, samples, missing) {
                    measurements.set("objective/kl", kl);
                }
                let same = self.sameness(missing.identical, pairs.len());
                measurements.set("completions/identical_ratio", same);
                measurements.merge(self.flow(&pairs, step, before.elapsed()));
                self.report(&measurements, &pairs)
            }
            StepOutcome::Refused(measurements) => {
                pairs.iter().for_each(|_| self.missing.lost());
                self.counters
                    .dropped(DropReason::Poisoned, pairs.len() as u64);
                self.journal
                    .append(step, self.wall_seconds(), &measurements)?;
                self.refused(&pairs).await
            }
        }
    }

    /// A step changed nothing: its batch is kept for people, and after too many in a row the run goes
    /// back to its last checkpoint.
    async fn refused(&mut self, pairs: &[LabelledPair]) -> Result<(), LearnerError> {
        self.state.nonfinite += 1;
        self.state.consecutive_nonfinite += 1;
        let (step, nonfinite) = (self.state.step, self.state.nonfinite);
        let path = quarantine::write(&self.directory, step, nonfinite, pairs)?;
        tracing::warn!(step, batch = %path.display(), "a step was not finite and changed nothing");
        if self.state.consecutive_nonfinite < self.settings.rollback_after {
            return Ok(());
        }
        self.roll_back().await?;
        self.publish().await
    }

    /// Goes back to the last checkpoint. That takes a step number of its own, so that the weights of the
    /// checkpoint get a version newer than those that are given up.
    async fn roll_back(&mut self) -> Result<(), LearnerError> {
        let rollbacks = self.state.rollbacks;
        let last = checkpoint::latest(&self.directory.checkpoints())?;
        let Some(last) = last.filter(|_| rollbacks < MOST_ROLLBACKS) else {
            let quarantine = self.directory.quarantine();
            return Err(LearnerError::Diverged {
                rollbacks,
                quarantine,
            });
        };
        tracing::warn!(checkpoint = %last.display(), "going back to the last checkpoint");
        self.engine.restore(last).await?;
        self.state.rollbacks += 1;
        self.state.consecutive_nonfinite = 0;
        self.state.step += 1;
        Ok(())
    }

    /// Puts the weights on the shelf as the version of this step, unless they are there already.
    /// Weights that are not finite are never published: the run goes back first.
    async fn publish(&mut self) -> Result<(), LearnerError> {
        loop {
            let version = WeightsVersion {
                session: self.state.session,
                step: self.state.step,
            };
            if self.state.version >= version {
                return Ok(());
            }
            let before = Instant::now();
            if let Some(blob) = self.engine.weights(self.weights_dtype).await? {
                return self.announce(version, blob, before).await;
            }
            tracing::warn!(
                step = version.step,
                "the weights are not finite and are not published"
            );
            self.roll_back().await?;
        }
    }

    /// Has the blob laid down and announced while the learner goes on: a step waits for the copy out of
    /// the optimiser, not for what becomes of it. Only one publication is on its way at a time.
    async fn announce(
        &mut self,
        version: WeightsVersion,
        blob: Vec<u8>,
        before: Instant,
    ) -> Result<(), LearnerError> {
        self.settle_publication().await?;
        self.state.version = version;
        let shelf = self.shelf.clone();
        self.publication = Some(tokio::spawn(async move {
            let manifest =
                tokio::task::spawn_blocking(move || (WeightsManifest::of(version, &blob), blob));
            let (manifest, blob) = manifest.await.map_err(|_| LearnerError::EngineGone)?;
            let bytes = manifest.bytes;
            shelf.publish(manifest, blob).await?;
            let mut measurements = Measurements::new();
            measurements.set("weight_sync/seconds", before.elapsed().as_secs_f64());
            measurements.set("weight_sync/bytes", bytes as f64);
            measurements.set("weight_sync/version", version.step as f64);
            telemetry::publish(&measurements, &[("role", "learner")]);
            Ok(())
        }));
        Ok(())
    }

    /// Waits until the publication that is on its way, if there is one, has ended.
    async fn settle_publication(&mut self) -> Result<(), LearnerError> {
        match &mut self.publication {
            Some(_) => published(&mut self.publication).await,
            None => Ok(()),
        }
    }

    /// Writes a checkpoint. Weights that are not finite are never saved: the run goes back first.
    async fn save(&mut self) -> Result<(), LearnerError> {
        while !self.engine.is_finite().await? {
            tracing::warn!(
                step = self.state.step,
                "the weights are not finite and are not saved"
            );
            self.roll_back().await?;
        }
        let mut state = self.state.clone();
        state.wall_seconds = self.wall_seconds();
        state.feed = self.feed.state();
        for counters in &self.stations {
            // What a station has in hand now, it will be given again.
            let mut snapshot = counters.snapshot();
            snapshot.taken = snapshot.given + snapshot.total_dropped();
            snapshot.in_hand = 0;
            state
                .stations
                .insert(counters.station().name().to_owned(), snapshot);
        }
        let path = self.directory.checkpoint(state.step);
        let checkpoint = Checkpoint {
            state,
            in_hand: self.intake.pairs(),
        };
        self.engine.save(path.clone(), checkpoint).await?;
        checkpoint::prune(
            &self.directory.checkpoints(),
            self.settings.save_total_limit,
        )?;
        tracing::debug!(path = %path.display(), "saved");
        Ok(())
    }

    async fn end(mut self, ending: Ending) -> Result<Summary, LearnerError> {
        self.settle_publication().await?;
        self.save().await?;
        let blob = self.engine.weights(DType::F32).await?.unwrap_or_default();
        let note = match ending {
            Ending::Finished => "done",
            Ending::Interrupted => "interrupted; saved",
        };
        let summary = Summary {
            ending,
            steps: self.state.step,
            pairs: self.state.pairs,
            tokens: self.state.tokens,
            wall_seconds: self.wall_seconds(),
            weights_digest: Digest::of(&blob),
            checkpoint: self.directory.checkpoint(self.state.step),
            nonfinite: self.state.nonfinite,
            rollbacks: self.state.rollbacks,
            evaluations: self.state.evaluations,
        };
        self.progress.finish_at(self.state.step, note);
        self.engine.join()?;
        Ok(summary)
    }

    fn wall_seconds(&self) -> f64 {
        self.state.wall_seconds + self.started.elapsed().as_secs_f64()
    }
}

impl State {
    fn beginning(feed: &Feed, session: u64) -> Self {
        Self {
            step: 0,
            session,
            ancestors: Vec::new(),
            version: WeightsVersion::REFERENCE,
            pairs: 0,
            tokens: 0,
            wall_seconds: 0.0,
            consecutive_nonfinite: 0,
            nonfinite: 0,
            rollbacks: 0,
            played: 0,
            feed: feed.state(),
            stations: std::collections::BTreeMap::new(),
            evaluations: Vec::new(),
        }
    }
}

/// Ends when a publication that is on its way has ended; never when there is none.
async fn published(publication: &mut Option<Publication>) -> Result<(), LearnerError> {
    let Some(on_its_way) = publication else {
        return std::future::pending().await;
    };
    let ended = on_its_way.await;
    *publication = None;
    ended.map_err(|_| LearnerError::EngineGone)?
}

/// Whether something that happens every `every` steps happens after step `step`.
fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
