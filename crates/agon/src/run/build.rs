//! Builds the roles of a run from its settings: one builder per role, for runs of one process and of several.

use std::{net::SocketAddr, path::Path, pin::Pin, sync::Arc};

use actor::{Actor, ActorModel, ActorParts, ActorStreams, PrecisionLimit};
use anyhow::Error;
use hub::CancelToken;
use learner::{
    BatchShare, FilePairsJudge, FilePairsPlan, InitialPolicy, Learner, LearnerCounters,
    LearnerParts, LearnerStreams, PromptPlan, ReferenceLogprobs,
};
use messages::{Seed, Stage, WeightsVersion};
use model::LanguageModel;
use preference::{
    JudgePool, LabelPenalties, PreferenceError, PreferenceService, PreferenceServiceParts,
    apo::{ApoRunner, ReplicaFactory},
};
use settings::{LearnerSettings, PairLabelSource, Settings};
use telemetry::StageCounters;
use tokio::sync::watch;

use crate::{
    assembly::{
        self, ApoJudge, CompletionOrigin, JudgeSource, LoadedModel, RunInputs, SamplerParts,
    },
    cluster::membership::StatusSource,
    run::{
        RunContext, RunStreams,
        role_settings::{
            apo_schedule, completion_plan, curriculum_floor, identical_pairs, message_limits,
            pacing, sampling, sampling_kind, steps, weights_form,
        },
    },
};

/// A task of a role; ends when shutdown is requested.
pub(crate) type RoleTask = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// A role that is ready to run.
pub(crate) struct Role {
    /// Tasks to run side by side.
    pub(crate) tasks: Vec<RoleTask>,
    /// Source of its heartbeats.
    pub(crate) status_source: StatusSource,
    /// Address of its HTTP server, if it has one.
    pub(crate) http_address: Option<SocketAddr>,
}

/// The policy of an actor at the start.
pub(crate) struct InitialActorPolicy<'a> {
    /// The reference.
    pub(crate) reference: &'a LoadedModel,
    /// The policy: the reference, with an adapter if one is trained.
    pub(crate) policy: LanguageModel,
}

/// Start of this session's adversarial preference optimisation (APO).
#[derive(Clone, Copy)]
pub(crate) struct ApoSession<'a> {
    /// The policy at the start of the run.
    pub(crate) policy: &'a LoadedModel,
    /// Run directory of the process, with the rounds and people's verdicts.
    pub(crate) run_dir: &'a Path,
    /// The session, with the step up to which rounds of earlier sessions count.
    pub(crate) rounds_before: WeightsVersion,
}

/// A role as a member of its stage.
pub(crate) struct StageMember<'a> {
    /// Name in the run.
    pub(crate) name: &'a str,
    /// Counters of the stage in this process.
    pub(crate) counters: StageCounters,
}

/// Builds the roles of one process.
pub(crate) struct RoleBuilder<'a> {
    /// Settings.
    pub(crate) settings: &'a Settings,
    /// Streams of the run.
    pub(crate) streams: &'a RunStreams,
    /// URL of the process's Prometheus metrics.
    pub(crate) metrics: &'a str,
    /// Turns true when actors and preference services are to finish.
    pub(crate) shutdown: watch::Receiver<bool>,
}

impl RoleBuilder<'_> {
    /// The actors of this process, `actor.count` of them, as one role.
    pub(crate) fn actors<'m>(
        &self,
        role_name: &str,
        actor_name: impl Fn(usize) -> String,
        policy: impl Fn() -> anyhow::Result<InitialActorPolicy<'m>>,
    ) -> anyhow::Result<Role> {
        let counters = StageCounters::new(Stage::Actor);
        let mut status_source = self.status_source(counters, role_name);
        let mut tasks = Vec::new();
        for index in 0..self.settings.actor.count {
            let actor = self.actor(actor_name(index), policy()?, &status_source.counters)?;
            status_source.waits.push(actor.waits());
            let loaded = actor.loaded();
            status_source.step = Some(Box::new(move || loaded.borrow().step));
            let shutdown = self.shutdown.clone();
            tasks.push(task(async move { Ok(actor.run(shutdown).await?) }));
        }
        Ok(Role {
            tasks,
            status_source,
            http_address: None,
        })
    }

    fn actor(
        &self,
        name: String,
        initial: InitialActorPolicy<'_>,
        counters: &StageCounters,
    ) -> anyhow::Result<Actor> {
        let settings = &self.settings.actor;
        let InitialActorPolicy { reference, policy } = initial;
        let sampling = sampling(self.settings);
        let precision = PrecisionLimit {
            precision: sampling.precision,
            learner: model::training_precision(self.settings.learner.precision),
            max_error: settings.max_quantization_error,
        };
        let parts = SamplerParts {
            folder: (*reference.folder).clone(),
            policy: policy.clone(),
            reference: Some(reference.language_model()?),
            sampling,
            slots: settings.slots,
            capacity: settings.max_prompt_length + settings.max_new_tokens,
        };
        Ok(Actor::new(ActorParts {
            name,
            model: ActorModel {
                policy,
                sampler: assembly::sampler(&settings.engine, parts)?,
                slots: settings.slots,
                precision,
                tokenizer: reference.folder.tokenizer.clone(),
            },
            completions: completion_plan(self.settings),
            pacing: pacing(self.settings),
            identical: identical_pairs(self.settings),
            streams: ActorStreams {
                prompts: self.streams.prompts.receiver.clone(),
                pairs: self.streams.pairs.sender.clone(),
                drops: self.streams.drops.sender.clone(),
                weight_store: self.streams.weight_store.clone(),
                limits: message_limits(self.settings, &reference.folder.config),
            },
            counters: counters.clone(),
        })?)
    }

    /// The preference service with this judge, or with the current judge of APO, and its HTTP server if the settings
    /// name an address. Loading the judge of APO blocks; ends early once `cancel` is cancelled.
    pub(crate) async fn preference(
        &self,
        member: StageMember<'_>,
        judge: &Arc<JudgeSource>,
        session: ApoSession<'_>,
        cancel: &CancelToken,
    ) -> anyhow::Result<Role> {
        let settings = self.settings;
        let StageMember { name, counters } = member;
        let policy = session.policy;
        let limits = message_limits(settings, &policy.folder.config);
        let (judge, apo) = judge_and_apo(settings, judge, session, cancel)?;
        let pool = assembly::pool(settings, &judge)?;
        let evaluation = tokio::task::block_in_place(|| {
            assembly::evaluation_judges(settings, CompletionOrigin::Policy(policy), cancel)
        })?;
        let mut tasks = Vec::new();
        let http_address = self.serve(&judge, &pool, &mut tasks).await?;
        let service = PreferenceService::new(PreferenceServiceParts {
            judge: pool,
            evaluation,
            orders: settings.preference.orders,
            penalties: LabelPenalties::from(&settings.preference),
            apo,
            pairs: self.streams.pairs.receiver.clone(),
            limits,
            weight_store: self.streams.weight_store.clone(),
            labelled: self.streams.labelled.sender.clone(),
            drops: self.streams.drops.sender.clone(),
            counters: Arc::new(counters.clone()),
        });
        let mut status_source = self.status_source(counters, name);
        status_source.waits.push(service.waits());
        let shutdown = self.shutdown.clone();
        tasks.push(task(async move { Ok(service.run(shutdown).await?) }));
        Ok(Role {
            tasks,
            status_source,
            http_address,
        })
    }

    /// Adds the HTTP server of `pool` to the tasks, if the settings name an address; returns the address.
    async fn serve(
        &self,
        judge: &JudgeSource,
        pool: &JudgePool,
        tasks: &mut Vec<RoleTask>,
    ) -> anyhow::Result<Option<SocketAddr>> {
        if self.settings.preference.http.listen.is_empty() {
            return Ok(None);
        }
        let server = assembly::server(self.settings, judge, pool.clone()).await?;
        let (address, shutdown) = (server.address(), self.shutdown.clone());
        tasks.push(task(async move {
            server.run(shutdown).await;
            Ok(())
        }));
        Ok(Some(address))
    }

    /// The learner, restored from the checkpoint of `context` if there is one. `others` are the counters of the other
    /// stages in this process, which its checkpoints contain.
    pub(crate) async fn learner(
        &self,
        role_name: &str,
        context: &RunContext<'_>,
        others: &[StageCounters],
    ) -> anyhow::Result<(Learner, StatusSource)> {
        let (settings, inputs) = (self.settings, context.inputs);
        let counters = StageCounters::new(Stage::Learner);
        let learner = Learner::new(LearnerParts {
            settings: planned(settings, inputs),
            evaluation: settings.evaluation.clone(),
            conditions: assembly::conditions(&inputs.model.folder, &sampling(settings)),
            apo: apo_schedule(settings),
            telemetry: settings.telemetry.clone(),
            seed: Seed(settings.run.seed),
            model: InitialPolicy {
                folder: Arc::clone(&inputs.model.folder),
                policy: inputs.policy_to_train(settings)?,
                start: inputs.model.language_model()?,
                reference: settings.reference,
            },
            prompts: PromptPlan {
                set: Arc::clone(&inputs.prompts),
                curriculum_floor: curriculum_floor(settings),
                pacing: pacing(settings),
                sampling: sampling_kind(settings),
                pairs: self.file_pairs(context),
            },
            streams: LearnerStreams {
                prompts: self.streams.prompts.sender.clone(),
                labelled: self.streams.labelled.receiver.clone(),
                drops: self.streams.drops.receiver.clone(),
                weight_store: self.streams.weight_store.clone(),
                weights_form: weights_form(settings, inputs.trains_adapter()),
                limits: message_limits(settings, &inputs.model.folder.config),
            },
            directory: Arc::clone(context.directory),
            counters: LearnerCounters {
                own: counters.clone(),
                stages: [others, std::slice::from_ref(&counters)].concat(),
            },
            origin: context.origin.clone(),
        })
        .await?;
        let mut status_source = self.status_source(counters, role_name);
        status_source.waits.push(learner.waits());
        let steps = learner.steps();
        status_source.step = Some(Box::new(move || *steps.borrow()));
        Ok((learner, status_source))
    }

    /// Pairs from files and how they are used; `None` if batches have none.
    fn file_pairs(&self, context: &RunContext<'_>) -> Option<FilePairsPlan> {
        let settings = self.settings;
        let files = context.inputs.pairs.as_ref()?;
        // Elsewhere the last bit of a row may depend on its batch.
        let is_cpu = settings.model.device == "cpu";
        let reference_logprobs = is_cpu.then(|| ReferenceLogprobs {
            path: assembly::reference_logprobs_path(context.directory.root()),
            key: assembly::reference_key(settings, &context.origin.inputs, files),
        });
        let judges = settings.pairs.label == PairLabelSource::Judge;
        Some(FilePairsPlan {
            files: Arc::clone(files),
            share: BatchShare::new(&settings.learner, &settings.pairs),
            reference_logprobs,
            judge: judges.then(|| FilePairsJudge {
                name: settings.preference.judge.name(),
                pairs: self.streams.pairs.sender.clone(),
            }),
        })
    }

    fn status_source(&self, counters: StageCounters, name: &str) -> StatusSource {
        StatusSource {
            stage: counters.stage(),
            name: name.to_owned(),
            metrics: self.metrics.to_owned(),
            counters,
            waits: Vec::new(),
            step: None,
        }
    }
}

/// The learner's settings with the steps that it takes.
fn planned(settings: &Settings, inputs: &RunInputs) -> LearnerSettings {
    let steps = steps(settings, inputs);
    if steps < settings.learner.steps {
        tracing::info!(
            steps,
            epochs = settings.pairs.epochs,
            "pairs.epochs ends the run before learner.steps"
        );
    }
    LearnerSettings {
        steps,
        ..settings.learner.clone()
    }
}

fn task(future: impl Future<Output = Result<(), Error>> + Send + 'static) -> RoleTask {
    Box::pin(future)
}

/// The judge of the session, and the runner of APO that replaces it after each round; without APO, the given judge.
fn judge_and_apo(
    settings: &Settings,
    judge: &Arc<JudgeSource>,
    session: ApoSession<'_>,
    cancel: &CancelToken,
) -> anyhow::Result<(Arc<JudgeSource>, Option<ApoRunner>)> {
    if apo_schedule(settings).is_none() {
        return Ok((Arc::clone(judge), None));
    }
    let apo_judge = ApoJudge::load(settings, judge, session.run_dir, session.rounds_before)?;
    let current = apo_judge.source(judge)?;
    let policy = session.policy;
    let apo = tokio::task::block_in_place(|| apo_judge.apo(settings, policy, judge, cancel))?;
    let (first, preference) = (Arc::clone(judge), settings.preference.clone());
    let replicas: ReplicaFactory = Box::new(move |model, round| {
        let judge = first.with_model(model, assembly::judge_version(round));
        let replicas =
            judge.and_then(|judge| assembly::judge_replicas(&preference, &Arc::new(judge)));
        replicas.map_err(|error| PreferenceError::Replicas(format!("{error:#}")))
    });
    Ok((current, Some(ApoRunner::new(apo, replicas))))
}
