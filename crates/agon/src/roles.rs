//! The three roles of one process, joined by streams in memory, and what happens when one of them ends.

use std::{path::PathBuf, sync::Arc, time::Duration};

use actor::{Actor, ActorParts, IdenticalPairs};
use anyhow::{Context, anyhow};
use learner::{EVALUATION_WINDOW, Learner, LearnerParts, Rounds, Summary};
use messages::{Seed, Station};
use model::SamplingSettings;
use preference::{
    Preference, PreferenceError, PreferenceParts,
    apo::{History, Player, RoundReport, Seats},
};
use settings::{ObjectiveSettings, Settings};
use telemetry::{RunDirectory, StationCounters, StationSnapshot};
use tokio::{sync::watch, task::JoinSet};
use transport::{WeightsShelf, stream};

use crate::world::{self, JudgeSource, Judging, World};

/// How long actors and judge may take to finish what they have in hand.
const GRACE: Duration = Duration::from_secs(60);

/// How a run went.
pub(crate) struct Outcome {
    /// What the learner says.
    pub(crate) summary: Summary,
    /// What every station took, gave, dropped and still holds.
    pub(crate) stations: Vec<(Station, StationSnapshot)>,
    /// The rounds of the adversarial game.
    pub(crate) rounds: Vec<RoundReport>,
}

/// Builds all roles, runs them side by side until the learner is done or told to stop, then lets the
/// others finish.
pub(crate) async fn run(
    settings: &Settings,
    world: &World,
    directory: &Arc<RunDirectory>,
    resume: Option<PathBuf>,
    stop: &watch::Sender<bool>,
) -> anyhow::Result<Outcome> {
    let batch = settings.learner.train_batch_size;
    let window = (settings.learner.max_staleness as usize + 1) * batch;
    // Room for every credit there can be: a full stream is a defect, not a state.
    let capacity = window + EVALUATION_WINDOW;
    let (prompts, for_actors) = stream("prompts", capacity);
    let (pairs, for_judge) = stream("pairs", capacity);
    let (labelled, for_learner) = stream("labelled pairs", capacity);
    let (drops, dropped) = stream("dropped prompts", capacity);
    let shelf = WeightsShelf::default();
    let counters =
        [Station::Actor, Station::Preference, Station::Learner].map(StationCounters::new);
    let [of_actors, of_preference, of_learner] = &counters;

    // Both ends of every stream stay open until all roles have left: none fails because another is
    // done before it.
    let _open = (
        prompts.clone(),
        for_judge.clone(),
        for_learner.clone(),
        dropped.clone(),
    );

    let (quit, quitting) = watch::channel(false);
    let mut others = JoinSet::new();
    for index in 0..settings.actor.count {
        let streams = (for_actors.clone(), pairs.clone(), drops.clone());
        let actor = actor(settings, world, index, streams, (&shelf, of_actors))?;
        let quitting = quitting.clone();
        others.spawn(async move { actor.run(quitting).await.map_err(anyhow::Error::from) });
    }
    let step = resume
        .as_deref()
        .map(learner::checkpoint_step)
        .transpose()?;
    let (judge, player) = judges(settings, world, directory, step.unwrap_or(0), stop)?;
    let bench = world::bench(settings, &judge)?;
    if !settings.preference.http.listen.is_empty() {
        let server = world::server(settings, &judge, bench.clone()).await?;
        let quitting = quitting.clone();
        others.spawn(async move { server.run(quitting).await.map_err(anyhow::Error::from) });
    }
    let preference = Preference::new(PreferenceParts {
        judge: bench,
        gold: world::gold_bench(settings)?,
        orders: settings.preference.orders,
        player,
        pairs: for_judge,
        labelled,
        drops,
        counters: Arc::new(of_preference.clone()),
    });
    others.spawn(async move { preference.run(quitting).await.map_err(anyhow::Error::from) });

    let learner = Learner::new(LearnerParts {
        settings: settings.learner.clone(),
        evaluation: settings.evaluation.clone(),
        rounds: rounds(settings),
        telemetry: settings.telemetry.clone(),
        seed: Seed(settings.run.seed),
        folder: Arc::clone(&world.folder),
        policy: world.policy()?,
        set: Arc::clone(&world.set),
        pacing: learner_pacing(settings),
        prompts,
        labelled: for_learner,
        drops: dropped,
        shelf,
        directory: Arc::clone(directory),
        counters: of_learner.clone(),
        stations: counters.to_vec(),
        resume,
    })
    .await?;
    let summary = supervise(learner, others, quit, stop).await?;
    let stations = counters
        .iter()
        .map(|c| (c.station(), c.snapshot()))
        .collect();
    let rounds = History::take_up(&world::rounds(directory), summary.steps)?.rounds;
    Ok(Outcome {
        summary,
        stations,
        rounds,
    })
}

/// Waits for the learner, then lets the others finish. A role that ends before it is told to, with or
/// without a reason, is a failure: the learner saves and the run ends with that role's reason.
async fn supervise(
    learner: Learner,
    mut others: JoinSet<anyhow::Result<()>>,
    quit: watch::Sender<bool>,
    stop: &watch::Sender<bool>,
) -> anyhow::Result<Summary> {
    let mut learning = tokio::spawn(learner.run(stop.subscribe()));
    let summary = tokio::select! {
        ended = &mut learning => ended.context("the learner panicked")??,
        Some(ended) = others.join_next() => {
            let unasked = || Err(anyhow!("an actor or the preference service ended without being told to"));
            let failed = ended.context("a role panicked").and_then(|ended| ended);
            let failed = failed.and_then(|()| unasked());
            stop.send_replace(true);
            if let Err(late) = within(GRACE, "the learner", learning).await {
                tracing::error!("{late}; what it did since its last checkpoint is lost");
            }
            return failed;
        }
    };
    quit.send_replace(true);
    let finish = async {
        while let Some(ended) = others.join_next().await {
            ended.context("a role panicked")??;
        }
        anyhow::Ok(())
    };
    within(GRACE, "actors or judge", finish).await??;
    Ok(summary)
}

async fn within<T>(grace: Duration, who: &str, end: impl Future<Output = T>) -> anyhow::Result<T> {
    let late = |_| anyhow!("{who} did not finish within {} s", grace.as_secs());
    tokio::time::timeout(grace, end).await.map_err(late)
}

type ActorStreams = (
    transport::Receiver<messages::Prompt>,
    transport::Sender<messages::Pair>,
    transport::Sender<messages::Dropped>,
);

fn actor(
    settings: &Settings,
    world: &World,
    index: usize,
    (prompts, pairs, drops): ActorStreams,
    (shelf, counters): (&WeightsShelf, &StationCounters),
) -> anyhow::Result<Actor> {
    let lone = learner_pacing(settings) == learner::Pacing::WholeReleases;
    Ok(Actor::new(ActorParts {
        name: format!("actor-{index}"),
        policy: world.policy()?,
        reference: world::language_model(&world.folder, &world.weights)?,
        tokenizer: world.folder.tokenizer.clone(),
        sampling: sampling(settings),
        mixture_coefs: mixture_coefs(settings),
        contest_samples: settings.preference.apo.samples,
        slots: settings.actor.slots,
        max_prompt_length: settings.actor.max_prompt_length,
        pacing: if lone {
            actor::Pacing::WholeReleases
        } else {
            actor::Pacing::EachPrompt
        },
        identical: match settings.learner.objective {
            ObjectiveSettings::NashMdPg { .. } | ObjectiveSettings::Rpo { .. } => {
                IdenticalPairs::Keep
            }
            _ => IdenticalPairs::Drop,
        },
        prompts,
        pairs,
        drops,
        shelf: shelf.clone(),
        counters: counters.clone(),
    })?)
}

/// A lone actor that is strictly on-policy works release by release, so that a seed repeats.
fn learner_pacing(settings: &Settings) -> learner::Pacing {
    if settings.learner.max_staleness == 0 && settings.actor.count == 1 {
        learner::Pacing::WholeReleases
    } else {
        learner::Pacing::EachPrompt
    }
}

/// Who judges from this step on, and the game that will replace them, where it is played.
fn judges(
    settings: &Settings,
    world: &World,
    directory: &RunDirectory,
    step: u64,
    stop: &watch::Sender<bool>,
) -> anyhow::Result<(Arc<JudgeSource>, Option<Player>)> {
    if settings.preference.apo.refresh_steps == 0 {
        return Ok((Arc::clone(&world.judge), None));
    }
    let judging = Judging::find(settings, world, directory, step)?;
    let judge = judging.source(world)?;
    let stopped = || *stop.borrow();
    let game = tokio::task::block_in_place(|| judging.game(settings, world, directory, &stopped))?;
    let (first, preference) = (Arc::clone(&world.judge), settings.preference.clone());
    let seats: Seats = Box::new(move |model, round| {
        let judge = first.succeeded_by(model, world::version(round));
        let seats = judge.and_then(|judge| world::seats(&preference, &Arc::new(judge)));
        seats.map_err(|error| PreferenceError::Seats(format!("{error:#}")))
    });
    Ok((judge, Some(Player { game, seats })))
}

/// When the adversarial game is played, if it is.
fn rounds(settings: &Settings) -> Option<Rounds> {
    let apo = &settings.preference.apo;
    (apo.refresh_steps > 0).then_some(Rounds {
        every: apo.refresh_steps,
        most: apo.max_rounds,
        prompts: apo.prompts,
    })
}

/// How tokens are drawn.
pub(crate) fn sampling(settings: &Settings) -> SamplingSettings {
    let actor = &settings.actor;
    SamplingSettings {
        temperature: actor.temperature,
        top_k: actor.top_k,
        top_p: actor.top_p,
        min_p: actor.min_p,
        max_new_tokens: actor.max_new_tokens,
    }
}

/// The weight on the reference of every completion: Nash-MD by policy gradient compares a completion of
/// the policy with one of the mixture, all other objectives compare completions of the mixture.
fn mixture_coefs(settings: &Settings) -> Vec<f32> {
    let mixture = settings.actor.mixture_coef as f32;
    match settings.learner.objective {
        ObjectiveSettings::NashMdPg { .. } => vec![0.0, mixture],
        _ => vec![mixture; settings.actor.num_generations],
    }
}
