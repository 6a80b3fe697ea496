//! Adversarial preference optimisation (Cheng et al. 2311.08045): the preference model plays too.
//!
//! A round begins when the policy's own samples of as many prompts as the settings ask for have come. A
//! model is fitted anew, from the trunk that every model of the run starts from: it is to put golden
//! answers above the samples while it stays faithful to the annotated pairs. It is measured, refused if it
//! is inaccurate or badly calibrated on held-out pairs, and else handed out, to judge from then on. Nobody
//! waits for it meanwhile; who judges, and when labels are given, is the service's affair.

mod history;
mod player;
mod round;

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, thread};

use messages::{Pair, Probability, PromptId, Seed, WeightsVersion};
use model::{LanguageModel, ModelFolder, RewardModel};
use settings::{ApoSettings, FitSettings};
use tokio::sync::oneshot;

use crate::fit::{Contest, Example};
use crate::labelling::couples;
use crate::{Comparison, Judge, PreferenceError, Verdict};

pub use history::History;
pub use player::{Player, Seats};
use round::Round;
pub use round::{PolicySamples, Quality, RoundReport, Share};

/// What the game is made of.
pub struct GameParts {
    /// How it is played.
    pub settings: ApoSettings,
    /// How a model is fitted.
    pub fit: FitSettings,
    /// What every model is fitted from.
    pub trunk: LanguageModel,
    /// The trunk's folder: its shape and tokenizer go into every model's own.
    pub folder: ModelFolder,
    /// The model that judged first.
    pub initial: RewardModel,
    /// The model that judges now.
    pub current: RewardModel,
    /// The last round that was played, and the weights whose samples it was played on.
    pub last: Option<(u64, WeightsVersion)>,
    /// Annotated pairs to fit to.
    pub annotated: Vec<Example>,
    /// Annotated pairs to measure on.
    pub held_out: Vec<Example>,
    /// Who knows the true preference between two samples, in a world that has one.
    pub gold: Option<Box<dyn Judge>>,
    /// Where models and reports are written: `round_N/` and `rounds.jsonl`.
    pub directory: PathBuf,
    /// The seed of heads and orders.
    pub seed: Seed,
}

/// The game, from the preference service's side.
pub struct Game {
    gold: Option<Box<dyn Judge>>,
    wanted: usize,
    collected: Vec<Collected>,
    without_golden: usize,
    /// The prompts of the round that is being collected.
    prompts: BTreeSet<PromptId>,
    round: u64,
    /// The weights of the last round.
    last: Option<WeightsVersion>,
    fixed: Arc<Fixed>,
    current: RewardModel,
    fitting: Option<oneshot::Receiver<Result<Outcome, PreferenceError>>>,
}

/// What stays the same from round to round.
struct Fixed {
    settings: ApoSettings,
    fit: FitSettings,
    trunk: LanguageModel,
    folder: ModelFolder,
    initial: RewardModel,
    annotated: Vec<Example>,
    held_out: Vec<Example>,
    directory: PathBuf,
    seed: Seed,
}

/// The policy's samples of one prompt, with what the world says of them.
struct Collected {
    contest: Contest,
    known: Vec<Example>,
}

/// How a round ended.
pub struct Outcome {
    /// What was found.
    pub report: RoundReport,
    /// The new model, unless it was refused.
    pub model: Option<RewardModel>,
}

impl Game {
    /// A game before its next round.
    #[must_use]
    pub fn new(parts: GameParts) -> Self {
        Self {
            gold: parts.gold,
            wanted: parts.settings.prompts,
            collected: Vec::new(),
            without_golden: 0,
            prompts: BTreeSet::new(),
            round: parts.last.map_or(0, |(round, _)| round),
            last: parts.last.map(|(_, version)| version),
            current: parts.current,
            fitting: None,
            fixed: Arc::new(Fixed {
                settings: parts.settings,
                fit: parts.fit,
                trunk: parts.trunk,
                folder: parts.folder,
                initial: parts.initial,
                annotated: parts.annotated,
                held_out: parts.held_out,
                directory: parts.directory,
                seed: parts.seed,
            }),
        }
    }

    /// Whether labels wait while a model is fitted.
    #[must_use]
    pub fn holds_labels(&self) -> bool {
        self.fixed.settings.wait
    }

    /// Whether a model is being fitted.
    #[must_use]
    pub fn is_fitting(&self) -> bool {
        self.fitting.is_some()
    }

    /// Takes the policy's samples of one prompt; with the last of a round, fitting begins. A prompt
    /// without a golden answer counts toward the round, is told of once, and takes no part. Samples that
    /// were taken before, or are of a round that was played, are passed over.
    ///
    /// Says whether fitting has begun.
    ///
    /// # Errors
    /// When the thread that fits cannot be started.
    pub fn take(&mut self, pair: &Pair) -> Result<bool, PreferenceError> {
        let is_played = self.last.is_some_and(|last| pair.prompt.version <= last);
        if is_played || !self.prompts.insert(pair.id()) {
            return Ok(false);
        }
        match &pair.prompt.golden {
            Some(golden) => {
                let known = self.known(pair);
                let contest = Contest {
                    prompt: pair.prompt.ids.clone(),
                    golden: golden.clone(),
                    samples: pair.completions.iter().map(|c| c.ids.clone()).collect(),
                };
                self.collected.push(Collected { contest, known });
            }
            None => {
                if self.without_golden == 0 {
                    tracing::warn!(
                        prompt = pair.id().0,
                        "a prompt of the game has no golden answer and takes no part; see prompts.golden_column"
                    );
                }
                self.without_golden += 1;
            }
        }
        let begins = self.collected.len() + self.without_golden >= self.wanted;
        if begins {
            self.begin(pair.prompt.version)?;
        }
        Ok(begins)
    }

    /// The end of the round that is being fitted; never, when none is.
    pub async fn outcome(&mut self) -> Result<Outcome, PreferenceError> {
        let Some(fitting) = &mut self.fitting else {
            return std::future::pending().await;
        };
        let outcome = fitting.await.unwrap_or(Err(PreferenceError::FitPanicked));
        self.fitting = None;
        let outcome = outcome?;
        if let Some(model) = &outcome.model {
            self.current = model.clone();
        }
        Ok(outcome)
    }

    /// Every two samples of a prompt with the true preference between them.
    fn known(&mut self, pair: &Pair) -> Vec<Example> {
        let Some(gold) = &mut self.gold else {
            return Vec::new();
        };
        let completions = &pair.completions;
        let couples: Vec<_> = couples(pair)
            .map(|(i, j)| (usize::from(i), usize::from(j)))
            .collect();
        let comparison = |&(i, j): &(usize, usize)| Comparison {
            prompt: &pair.prompt,
            first: &completions[i],
            second: &completions[j],
        };
        let asked: Vec<_> = couples.iter().map(comparison).collect();
        let Ok(verdicts) = gold.judge(&asked) else {
            return Vec::new();
        };
        let example = |((i, j), p): ((usize, usize), Probability)| Example {
            prompt: pair.prompt.ids.clone(),
            first: completions[i].ids.clone(),
            second: completions[j].ids.clone(),
            label: p.get(),
        };
        let answered = couples
            .into_iter()
            .zip(verdicts)
            .filter_map(|(couple, verdict)| match verdict {
                Verdict::Preference(p) => Some((couple, p)),
                Verdict::Abstained { .. } => None,
            });
        answered.map(example).collect()
    }

    /// Starts a round on what was collected. A round that comes while the one before is still fitted
    /// takes its place: its samples are newer.
    fn begin(&mut self, version: WeightsVersion) -> Result<(), PreferenceError> {
        self.round += 1;
        self.last = Some(version);
        self.prompts.clear();
        let collected = std::mem::take(&mut self.collected);
        let (contests, known): (Vec<_>, Vec<_>) =
            collected.into_iter().map(|c| (c.contest, c.known)).unzip();
        let round = Round {
            number: self.round,
            version,
            contests,
            known: known.concat(),
            without_golden: std::mem::take(&mut self.without_golden),
            before: self.current.clone(),
            fixed: Arc::clone(&self.fixed),
        };
        let (reply, fitting) = oneshot::channel();
        tracing::info!(
            round = self.round,
            step = version.step,
            "fitting a preference model on the policy's samples"
        );
        thread::Builder::new()
            .name("preference-fit".into())
            .spawn(move || {
                // A round that nobody waits for any more has lost to a newer one.
                let play = round.play(&|| reply.is_closed());
                drop(reply.send(play));
            })
            .map_err(|source| PreferenceError::Thread {
                thread: "preference-fit".into(),
                judge: "preference model in the making".into(),
                source,
            })?;
        self.fitting = Some(fitting);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
