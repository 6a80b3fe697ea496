//! The three roles, built from the settings: each knows its streams and nothing of the others.

mod alone;
mod together;

use std::{path::PathBuf, sync::Arc};

use actor::{Actor, ActorParts, IdenticalPairs};
use learner::{EVALUATION_WINDOW, Learner, LearnerParts, Rounds, Sampling, Summary};
use messages::{Dropped, LabelledPair, Pair, Prompt, Seed, Station, WeightsVersion};
use model::{DType, LanguageModel, ModelFolder, Precision, SamplingSettings, Weights};
use preference::{
    Bench, Preference, PreferenceError, PreferenceParts,
    apo::{History, Player, RoundReport, Seats},
};
use settings::{ObjectiveSettings, Settings, TransportSettings};
use telemetry::{RunDirectory, StationCounters, StationSnapshot};
use tokio::sync::watch;
use transport::{Counts, Hub, Receiver, Sender, TransportError, WeightsShelf};

use crate::world::{self, JudgeSource, Judging, World, WriterParts};

pub(crate) use alone::{Joined, join_actor, join_preference, lead};
pub(crate) use together::run;

/// How a run went.
pub(crate) struct Outcome {
    /// What the learner says.
    pub(crate) summary: Summary,
    /// What every station took, gave, dropped and still holds.
    pub(crate) stations: Vec<(Station, StationSnapshot)>,
    /// The rounds of the adversarial game.
    pub(crate) rounds: Vec<RoundReport>,
}

/// What lies between the roles, both ends of each.
#[derive(Clone)]
pub(crate) struct Streams {
    capacity: usize,
    prompts: (Sender<Prompt>, Receiver<Prompt>),
    pairs: (Sender<Pair>, Receiver<Pair>),
    labelled: (Sender<LabelledPair>, Receiver<LabelledPair>),
    drops: (Sender<Dropped>, Receiver<Dropped>),
    shelf: WeightsShelf,
}

impl Streams {
    /// Those of this run, made where they are missing.
    pub(crate) async fn open(hub: &Hub, settings: &Settings) -> Result<Self, TransportError> {
        let batch = settings.learner.train_batch_size;
        let window = (settings.learner.max_staleness as usize + 1) * batch;
        // Room for every credit there can be: a full stream is a defect, not a state. What a session that
        // was given up left behind finds room too. The samples of a round stay until it is played.
        let apo = &settings.preference.apo;
        let round = if apo.refresh_steps > 0 {
            apo.prompts
        } else {
            0
        };
        let capacity = 2 * (window + EVALUATION_WINDOW + round);
        Ok(Self {
            capacity,
            prompts: hub.stream("prompts", capacity).await?,
            pairs: hub.stream("pairs", capacity).await?,
            labelled: hub.stream("labelled pairs", capacity).await?,
            drops: hub.stream("dropped prompts", capacity).await?,
            shelf: hub.shelf().await?,
        })
    }
}

impl Streams {
    /// For how many messages each has room.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Has delivered again what a server that was killed would deliver to nobody.
    pub(crate) async fn reclaim(&self) -> Result<(), TransportError> {
        self.prompts.1.reclaim().await?;
        self.pairs.1.reclaim().await?;
        self.labelled.1.reclaim().await?;
        self.drops.1.reclaim().await?;
        Ok(())
    }

    /// What has happened to the messages of each.
    pub(crate) async fn counts(&self) -> Result<Vec<(&'static str, Counts)>, TransportError> {
        Ok(vec![
            (self.prompts.0.name(), self.prompts.0.counts().await?),
            (self.pairs.0.name(), self.pairs.0.counts().await?),
            (self.labelled.0.name(), self.labelled.0.counts().await?),
            (self.drops.0.name(), self.drops.0.counts().await?),
        ])
    }
}

/// An actor with this name, of this policy at the start and the reference it starts from.
fn actor(
    settings: &Settings,
    name: String,
    (folder, weights, policy): (&ModelFolder, &Weights, LanguageModel),
    streams: &Streams,
    counters: &StationCounters,
) -> anyhow::Result<Actor> {
    let parts = WriterParts {
        folder: folder.clone(),
        policy: policy.clone(),
        reference: Some(world::language_model(folder, weights)?),
        sampling: sampling(settings),
        slots: settings.actor.slots,
        capacity: settings.actor.max_prompt_length + settings.actor.max_new_tokens,
    };
    Ok(Actor::new(ActorParts {
        name,
        policy,
        writer: world::writer(&settings.actor.engine, parts)?,
        precision: sampling(settings).precision,
        max_drift: settings.actor.max_drift,
        tokenizer: folder.tokenizer.clone(),
        mixture_coefs: mixture_coefs(settings),
        contest_samples: settings.preference.apo.samples,
        exact_samples: usize::from(!sampling(settings).is_exact()),
        slots: settings.actor.slots,
        max_new_tokens: settings.actor.max_new_tokens,
        pacing: match pacing(settings) {
            learner::Pacing::WholeReleases => actor::Pacing::WholeReleases,
            learner::Pacing::EachPrompt => actor::Pacing::EachPrompt,
        },
        identical: match settings.learner.objective {
            ObjectiveSettings::NashMdPg { .. } | ObjectiveSettings::Rpo { .. } => {
                IdenticalPairs::Keep
            }
            _ => IdenticalPairs::Drop,
        },
        prompts: streams.prompts.1.clone(),
        pairs: streams.pairs.0.clone(),
        drops: streams.drops.0.clone(),
        shelf: streams.shelf.clone(),
        counters: counters.clone(),
    })?)
}

/// The preference service with these judges on its bench.
fn preference(
    settings: &Settings,
    (judge, player): (Bench, Option<Player>),
    streams: &Streams,
    counters: &StationCounters,
) -> anyhow::Result<Preference> {
    Ok(Preference::new(PreferenceParts {
        judge,
        gold: world::gold_bench(settings)?,
        orders: settings.preference.orders,
        player,
        pairs: streams.pairs.1.clone(),
        labelled: streams.labelled.0.clone(),
        drops: streams.drops.0.clone(),
        counters: Arc::new(counters.clone()),
    }))
}

/// The learner of this world, from its beginning or a checkpoint.
async fn learner(
    settings: &Settings,
    world: &World,
    (directory, resume): (&Arc<RunDirectory>, Option<PathBuf>),
    streams: &Streams,
    (own, stations): (&StationCounters, &[StationCounters]),
) -> anyhow::Result<Learner> {
    let parts = LearnerParts {
        settings: settings.learner.clone(),
        evaluation: settings.evaluation.clone(),
        conditions: world::conditions(&world.folder, &sampling(settings)),
        rounds: rounds(settings),
        telemetry: settings.telemetry.clone(),
        seed: Seed(settings.run.seed),
        folder: Arc::clone(&world.folder),
        policy: world.policy()?,
        set: Arc::clone(&world.set),
        pacing: pacing(settings),
        sampling: sampling_kind(settings),
        prompts: streams.prompts.0.clone(),
        labelled: streams.labelled.1.clone(),
        drops: streams.drops.1.clone(),
        weights_dtype: weights_dtype(settings),
        shelf: streams.shelf.clone(),
        directory: Arc::clone(directory),
        counters: own.clone(),
        stations: stations.to_vec(),
        resume,
    };
    Ok(Learner::new(parts).await?)
}

/// A lone actor that is strictly on-policy works release by release, so that a seed repeats.
fn pacing(settings: &Settings) -> learner::Pacing {
    let actors = match settings.transport {
        TransportSettings::Memory {} => 1,
        TransportSettings::Jetstream(_) => settings.topology.actors,
    };
    if settings.learner.max_staleness == 0 && actors * settings.actor.count == 1 {
        learner::Pacing::WholeReleases
    } else {
        learner::Pacing::EachPrompt
    }
}

/// Whether actors sample from the very distribution that the learner computes: with no truncation, temperature or
/// precision of their own, and with weights that are not rounded on their way.
fn sampling_kind(settings: &Settings) -> Sampling {
    let own = sampling(settings);
    let rounded = weights_dtype(settings) != world::dtype(settings.model.dtype);
    match own.is_exact() && own.precision == Precision::F32 && !rounded {
        true => Sampling::Exact,
        false => Sampling::Altered,
    }
}

/// The number format in which weights travel: in one process, as they are.
fn weights_dtype(settings: &Settings) -> DType {
    world::dtype(match &settings.transport {
        TransportSettings::Memory {} => settings.model.dtype,
        TransportSettings::Jetstream(jetstream) => jetstream.weights_dtype,
    })
}

/// Who judges in the session that began at `since`, and the game that will replace them, where it is played.
/// The rounds of the game lie in `rounds`.
fn judges(
    settings: &Settings,
    policy: (&ModelFolder, &Weights),
    judge: &Arc<JudgeSource>,
    (rounds, since): (PathBuf, WeightsVersion),
    stop: &watch::Receiver<bool>,
) -> anyhow::Result<(Arc<JudgeSource>, Option<Player>)> {
    if settings.preference.apo.refresh_steps == 0 {
        return Ok((Arc::clone(judge), None));
    }
    let judging = Judging::find(settings, judge, rounds, since)?;
    let seated = judging.source(judge)?;
    let stopped = || *stop.borrow();
    let game = tokio::task::block_in_place(|| judging.game(settings, policy, judge, &stopped))?;
    let (first, preference) = (Arc::clone(judge), settings.preference.clone());
    let seats: Seats = Box::new(move |model, round| {
        let judge = first.succeeded_by(model, world::version(round));
        let seats = judge.and_then(|judge| world::seats(&preference, &Arc::new(judge)));
        seats.map_err(|error| PreferenceError::Seats(format!("{error:#}")))
    });
    Ok((seated, Some(Player { game, seats })))
}

/// The rounds of the game that a run has played when it ends, or is left, after `steps`.
fn rounds_of(directory: &RunDirectory, steps: u64) -> anyhow::Result<Vec<RoundReport>> {
    let now = WeightsVersion {
        session: directory.session(),
        step: steps,
    };
    Ok(History::take_up(&world::rounds(directory.root()), now)?.rounds)
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
        precision: actor.precision.into(),
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

#[cfg(test)]
mod tests {
    use settings::Override;

    use super::*;

    #[test]
    fn sampling_is_exact_only_with_the_learners_own_numbers() {
        let of = |sets: &[&str]| {
            let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
            sampling_kind(&settings::resolve("", "test", &sets).unwrap().settings)
        };
        let over_nats = "transport.kind=jetstream";
        for exact in [
            &[][..],
            &["model.dtype=bf16"],
            &[over_nats, "transport.weights_dtype=f32"],
            &[
                over_nats,
                "transport.weights_dtype=bf16",
                "model.dtype=bf16",
            ],
        ] {
            assert_eq!(of(exact), Sampling::Exact, "{exact:?}");
        }
        for altered in [
            &["actor.temperature=0.9"][..],
            &["actor.top_k=5"],
            &["actor.precision=int8"],
            &[over_nats, "transport.weights_dtype=bf16"],
        ] {
            assert_eq!(of(altered), Sampling::Altered, "{altered:?}");
        }
    }
}
