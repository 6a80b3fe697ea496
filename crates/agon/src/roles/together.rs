//! All roles in one process, joined by streams in memory, and what happens when one of them ends.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use learner::{Learner, Summary};
use messages::{Station, WeightsVersion};
use settings::Settings;
use telemetry::{RunDirectory, StationCounters};
use tokio::{sync::watch, task::JoinSet};
use transport::Hub;

use super::{Outcome, Streams};
use crate::{
    overview::{Lookout, Source},
    presence::{RunRecord, RunState, Step, Teller},
    world::{self, JudgeSource, World},
};

/// How long actors and judge may take to finish what they have in hand.
const GRACE: Duration = Duration::from_secs(60);

/// Builds all roles, runs them side by side until the learner is done or told to stop, then lets the
/// others finish.
///
/// `resolved` is the text of the settings, `metrics` where Prometheus finds this process.
pub(crate) async fn run(
    (settings, resolved, metrics): (&Settings, &str, &str),
    (world, judge): (&World, &Arc<JudgeSource>),
    directory: &Arc<RunDirectory>,
    resume: Option<PathBuf>,
    stop: &watch::Sender<bool>,
) -> anyhow::Result<Outcome> {
    // Both ends of every stream stay open until all roles have left: none fails because another is
    // done before it.
    let streams = Streams::open(&Hub::in_memory(), settings).await?;
    let counters =
        [Station::Actor, Station::Preference, Station::Learner].map(StationCounters::new);
    let [of_actors, of_preference, of_learner] = &counters;
    let start = world.start();

    let (quit, quitting) = watch::channel(false);
    let (mut others, mut tellers) = (JoinSet::new(), Vec::new());
    let teller = |counters: &StationCounters, name: String, waits, step| Teller {
        station: counters.station(),
        name,
        metrics: metrics.to_owned(),
        counters: counters.clone(),
        waits,
        step,
    };
    let (mut waits, mut step) = (Vec::new(), None);
    for index in 0..settings.actor.count {
        let name = format!("actor-{index}");
        let model = (start.0, start.1, world.policy()?);
        let actor = super::actor(settings, name, model, &streams, of_actors)?;
        waits.push(actor.waits());
        let loaded = actor.loaded();
        step = Some(Box::new(move || loaded.borrow().step) as Step);
        let quitting = quitting.clone();
        others.spawn(async move { actor.run(quitting).await.map_err(anyhow::Error::from) });
    }
    tellers.push(teller(of_actors, "actors".into(), waits, step));
    let begun = resume
        .as_deref()
        .map(learner::checkpoint_step)
        .transpose()?;
    let begun = WeightsVersion {
        session: directory.session(),
        step: begun.unwrap_or(0),
    };
    let since = (world::rounds(directory.root()), begun);
    let (judge, player) = super::judges(settings, start, judge, since, &stop.subscribe())?;
    let bench = world::bench(settings, &judge)?;
    if !settings.preference.http.listen.is_empty() {
        let server = world::server(settings, &judge, bench.clone()).await?;
        let quitting = quitting.clone();
        others.spawn(async move { server.run(quitting).await.map_err(anyhow::Error::from) });
    }
    let preference = super::preference(settings, (bench, player), &streams, of_preference)?;
    let waits = vec![preference.waits()];
    tellers.push(teller(of_preference, "preference".into(), waits, None));
    others.spawn(async move { preference.run(quitting).await.map_err(anyhow::Error::from) });

    let place = (directory, resume);
    let learner = super::learner(settings, world, place, &streams, (of_learner, &counters)).await?;
    let steps = learner.steps();
    let step: Step = Box::new(move || *steps.borrow());
    tellers.push(teller(
        of_learner,
        "learner".into(),
        vec![learner.waits()],
        Some(step),
    ));
    let record = RunRecord::led_from(directory, resolved, begun.step);
    let source = Source::Here { record, tellers };
    let lookout = Lookout::start(directory, settings, streams.clone(), source);
    let ended = supervise(learner, others, quit, stop).await;
    lookout
        .end(RunState::after(
            ended.as_ref().ok().map(|summary| summary.ending),
        ))
        .await;
    let summary = ended?;
    let stations = counters.iter().map(|c| (c.station(), c.snapshot()));
    Ok(Outcome {
        stations: stations.collect(),
        rounds: super::rounds_of(directory, summary.steps)?,
        summary,
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
