//! Adversarial preference optimisation, APO (Cheng et al. 2311.08045).
//!
//! A round starts when the policy's samples of the configured number of prompts are collected. A preference model is
//! trained from the backbone that every model of the run starts from, to prefer golden answers to the samples and to
//! fit the annotated pairs. It is rejected if it is inaccurate or badly calibrated on held-out pairs, and else becomes
//! the judge. Training runs on its own thread.
//! Does not know what installs the model, or when labels are given.

mod history;
mod round;
mod runner;

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, thread};

use messages::{Pair, PromptId, Seed, WeightsVersion};
use model::{LanguageModel, ModelFolder, RewardModel};
use settings::{ApoSettings, FitSettings};
use tokio::sync::oneshot;

use crate::error::PreferenceError;
use crate::judge::{Comparison, Judge, Verdict};
use crate::reward_training::{AdversarialExample, PreferenceExample};

pub use history::History;
use round::ApoRound;
pub use round::{BeforeAfter, PolicySampleQuality, Quality, RoundReport};
pub(crate) use runner::next_model;
pub use runner::{ApoRunner, ReplicaFactory};

/// Reads the pairs of people's verdicts on the run's samples, as they are now. Called on the thread of a round.
pub type HumanVerdictPairs = Box<dyn Fn() -> Vec<PreferenceExample> + Send + Sync>;

/// Pairs that every round trains on and is measured on.
pub struct ApoPairs {
    /// Annotated pairs for training.
    pub annotated: Vec<PreferenceExample>,
    /// Annotated pairs for evaluation.
    pub held_out: Vec<PreferenceExample>,
    /// Pairs of people's verdicts, which are trained on as the annotated ones.
    pub human_verdicts: HumanVerdictPairs,
}

/// Dependencies of [`Apo`].
pub struct ApoParts {
    /// Settings of APO.
    pub settings: ApoSettings,
    /// Settings of preference model training.
    pub fit: FitSettings,
    /// Backbone that every model is trained from.
    pub backbone: LanguageModel,
    /// Folder of the backbone; its configuration and tokenizer are copied into every model's folder.
    pub folder: ModelFolder,
    /// The first judge of the run.
    pub initial: RewardModel,
    /// The current judge.
    pub current: RewardModel,
    /// Number of the last finished round, and the weights that sampled for it.
    pub last: Option<(u64, WeightsVersion)>,
    /// Pairs of the rounds.
    pub pairs: ApoPairs,
    /// Judge with the true preference between two samples, where it is known.
    pub gold: Option<Box<dyn Judge>>,
    /// Output directory: `round_N/` with the models, and `rounds.jsonl` with the reports.
    pub directory: PathBuf,
    /// Seed of fresh heads and of the data order.
    pub seed: Seed,
}

/// Collects samples and trains one preference model per round.
pub struct Apo {
    gold: Option<Box<dyn Judge>>,
    collected: Vec<CollectedSamples>,
    without_golden: usize,
    /// Prompts of the round that is being collected.
    prompts: BTreeSet<PromptId>,
    /// Number of the last round that was started.
    round: u64,
    /// Weights that sampled for that round.
    last: Option<WeightsVersion>,
    context: Arc<ApoContext>,
    current: RewardModel,
    training: Option<oneshot::Receiver<Result<RoundOutcome, PreferenceError>>>,
}

/// Models and settings that all rounds share.
struct ApoContext {
    settings: ApoSettings,
    fit: FitSettings,
    backbone: LanguageModel,
    folder: ModelFolder,
    initial: RewardModel,
    pairs: ApoPairs,
    directory: PathBuf,
    seed: Seed,
}

/// The policy's samples of one prompt.
struct CollectedSamples {
    adversarial_example: AdversarialExample,
    /// Every two samples with their gold label.
    gold_examples: Vec<PreferenceExample>,
}

/// Result of a round.
pub struct RoundOutcome {
    /// Measurements of the round.
    pub report: RoundReport,
    /// The new model; `None` if it was rejected.
    pub model: Option<RewardModel>,
}

impl Apo {
    /// APO before its next round.
    #[must_use]
    pub fn new(parts: ApoParts) -> Self {
        Self {
            gold: parts.gold,
            collected: Vec::new(),
            without_golden: 0,
            prompts: BTreeSet::new(),
            round: parts.last.map_or(0, |(round, _)| round),
            last: parts.last.map(|(_, version)| version),
            current: parts.current,
            training: None,
            context: Arc::new(ApoContext {
                settings: parts.settings,
                fit: parts.fit,
                backbone: parts.backbone,
                folder: parts.folder,
                initial: parts.initial,
                pairs: parts.pairs,
                directory: parts.directory,
                seed: parts.seed,
            }),
        }
    }

    /// Whether labelling waits while a model is trained.
    #[must_use]
    pub fn waits_for_training(&self) -> bool {
        self.context.settings.wait
    }

    /// Whether a model is being trained.
    #[must_use]
    pub fn is_training(&self) -> bool {
        self.training.is_some()
    }

    /// Adds the policy's samples of one prompt; the last prompt of a round starts training. A prompt without a golden
    /// answer counts toward the round but adds no example. Duplicates, and samples of a finished round, are
    /// ignored. Returns whether training has started.
    ///
    /// # Errors
    /// When the training thread cannot be started.
    pub fn collect_samples(&mut self, pair: &Pair) -> Result<bool, PreferenceError> {
        let is_finished = self.last.is_some_and(|last| pair.prompt.version <= last);
        if is_finished || !self.prompts.insert(pair.id()) {
            return Ok(false);
        }
        match &pair.prompt.golden {
            Some(golden) => {
                let gold_examples = self.gold_examples(pair);
                let adversarial_example = AdversarialExample {
                    prompt: pair.prompt.ids.clone(),
                    golden: golden.clone(),
                    samples: pair.completions.iter().map(|c| c.ids.clone()).collect(),
                };
                self.collected.push(CollectedSamples {
                    adversarial_example,
                    gold_examples,
                });
            }
            None => {
                if self.without_golden == 0 {
                    tracing::warn!(
                        prompt = pair.id().0,
                        "a prompt of the APO round has no golden answer and is skipped; see prompts.golden_column"
                    );
                }
                self.without_golden += 1;
            }
        }
        let prompts = self.collected.len() + self.without_golden;
        let round_complete = prompts >= self.context.settings.prompts;
        if round_complete {
            self.start_round(pair.prompt.version)?;
        }
        Ok(round_complete)
    }

    /// Waits for the end of the round in training; pending forever when there is none. Cancel-safe.
    ///
    /// # Errors
    /// When training failed.
    pub async fn outcome(&mut self) -> Result<RoundOutcome, PreferenceError> {
        let Some(training) = &mut self.training else {
            return std::future::pending().await;
        };
        let outcome = training.await.unwrap_or(Err(PreferenceError::FitPanicked));
        self.training = None;
        let outcome = outcome?;
        if let Some(model) = &outcome.model {
            self.current = model.clone();
        }
        Ok(outcome)
    }

    /// Every two samples of a prompt with the gold preference between them; empty without a gold judge.
    fn gold_examples(&mut self, pair: &Pair) -> Vec<PreferenceExample> {
        let Some(gold) = &mut self.gold else {
            return Vec::new();
        };
        let comparison = |(first, second)| Comparison {
            prompt: &pair.prompt,
            first: &pair.completions[usize::from(first)],
            second: &pair.completions[usize::from(second)],
        };
        let comparisons: Vec<_> = pair.compared().map(comparison).collect();
        let Ok(verdicts) = gold.judge(&comparisons) else {
            return Vec::new();
        };
        let example = |(comparison, verdict): (Comparison<'_>, Verdict)| match verdict {
            Verdict::Preference(p) => Some(PreferenceExample {
                prompt: comparison.prompt.ids.clone(),
                first: comparison.first.ids.clone(),
                second: comparison.second.ids.clone(),
                label: p.get(),
            }),
            Verdict::Abstained { .. } => None,
        };
        let judged = comparisons.into_iter().zip(verdicts);
        judged.filter_map(example).collect()
    }

    /// Starts a round on the collected samples. It supersedes a round that is still in training: its samples are
    /// newer.
    fn start_round(&mut self, version: WeightsVersion) -> Result<(), PreferenceError> {
        self.round += 1;
        self.last = Some(version);
        self.prompts.clear();
        let collected = std::mem::take(&mut self.collected);
        let (adversarial, gold_examples): (Vec<_>, Vec<_>) = collected
            .into_iter()
            .map(|c| (c.adversarial_example, c.gold_examples))
            .unzip();
        let round = ApoRound {
            number: self.round,
            version,
            adversarial,
            gold_examples: gold_examples.concat(),
            without_golden: std::mem::take(&mut self.without_golden),
            current: self.current.clone(),
            context: Arc::clone(&self.context),
        };
        let (reply, training) = oneshot::channel();
        tracing::info!(
            round = self.round,
            step = version.step,
            "training a preference model on the policy's samples"
        );
        thread::Builder::new()
            .name("preference-fit".into())
            .spawn(move || {
                // The receiver of a superseded round is closed.
                let outcome = round.run(&|| reply.is_closed());
                drop(reply.send(outcome));
            })
            .map_err(|source| PreferenceError::Thread {
                thread: "preference-fit".into(),
                judge: "preference model in training".into(),
                source,
            })?;
        self.training = Some(training);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
