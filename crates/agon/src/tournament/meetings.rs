//! Meetings of the policies of one seed: each answers the same held-out prompts with the same sampling seeds, and the
//! judge compares every two answers of a prompt.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use futures_util::future::join_all;
use hub::CancelToken;
use learner::PromptSet;
use messages::{Completion, Digest, Finish, Pair, Prompt, PromptId, Seed, WeightsVersion};
use model::{LanguageModel, MixtureSampler, Request, Sampler as _, SamplingSettings};
use playground::Style;
use preference::{ComparisonRequest, EvaluationJudge, JudgePool, Orders, Verdict};
use serde::{Deserialize, Serialize};
use settings::{PromptsSettings, Settings, TOURNAMENT_REFERENCE, Tournament, TournamentJudge};
use telemetry::write_atomically;
use tokio::{runtime::Handle, sync::watch};

use crate::{
    assembly::{self, CompletionOrigin, JudgeSource, LoadedModel, ModelLocation},
    exit_code::{Resource, UsageError},
    signals,
    tournament::{
        files,
        plan::{Entrant, PlannedRun},
        run_result::RunResult,
    },
};

/// The meetings of one seed at one sampling temperature.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SeedMeetings {
    pub(super) seed: u64,
    pub(super) temperature: f64,
    /// The reference, and then every entrant whose run has not diverged.
    pub(super) policies: Vec<PolicyAnswers>,
    /// `win_rates[a][b]`: share of the judged prompts on which a's answer is preferred to b's, ties counting one half;
    /// `None` on the diagonal.
    pub(super) win_rates: Vec<Vec<Option<f64>>>,
    /// Comparisons without a verdict, which are in no win rate.
    pub(super) unjudged: usize,
}

/// A policy's answers in the meetings of a seed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct PolicyAnswers {
    pub(super) name: String,
    /// KL from the reference a completion, in nats, at temperature 1; `None` at others.
    pub(super) kl: Option<f64>,
    /// Mean length in tokens.
    pub(super) length: f64,
    /// Share of answers cut off at the limit of new tokens.
    pub(super) truncated: f64,
    /// On the playground the shares of plain, formal and playful answers.
    pub(super) styles: Option<[f64; 3]>,
}

/// The meetings of a seed in a file, with what they depend on.
#[derive(Serialize, Deserialize)]
struct SavedMeetings {
    key: String,
    meetings: Vec<SeedMeetings>,
}

/// A policy that takes part.
struct MeetingPolicy {
    name: String,
    model: LanguageModel,
    /// 1 for the reference, which is also the second model of its sampler.
    mixture_coef: f32,
}

/// The final runs of one seed.
pub(super) struct SeedFinals<'a> {
    /// Any of them, diverged or not.
    pub(super) first: &'a PlannedRun,
    /// Results of those that have not diverged.
    pub(super) results: Vec<&'a RunResult<'a>>,
}

/// Comparisons that a judge gets at once; the deadline of its verdicts is that of a training step.
const CHUNK: usize = 64;

/// The meetings of one seed, at each temperature; `None` after a shutdown. They are kept in a file and made again only if
/// a policy or a setting of the meetings has changed.
///
/// # Errors
/// When a policy cannot be read or sampled from, there are too few prompts, or the judge fails, gives no verdict on two
/// policies, or none in time.
pub(super) fn meet(
    tournament: &Tournament,
    root: &Path,
    entrants: &[Entrant],
    finals: &SeedFinals<'_>,
    shutdown: &watch::Sender<bool>,
) -> anyhow::Result<Option<Vec<SeedMeetings>>> {
    let first = finals.first;
    let mut parts = vec![first.resolved.toml.clone()];
    parts.push(format!(
        "{} {} {:?}",
        tournament.judge, tournament.prompts, tournament.temperatures
    ));
    for RunResult { run, report, .. } in &finals.results {
        parts.push(format!("{} {}", run.name, report.weights_digest));
    }
    let key = Digest::of(parts.join("\n").as_bytes()).to_string();
    files::create_folder(root, Path::new("meetings"))?;
    let folder = root.join("meetings");
    let name = format!("seed-{}.json", first.seed);
    let saved = files::read(&folder, &name)?;
    let saved = saved.and_then(|text| serde_json::from_str::<SavedMeetings>(&text).ok());
    let is_valid = |saved: &SavedMeetings| saved.key == key && saved.fits(tournament);
    if let Some(saved) = saved.filter(is_valid) {
        return Ok(Some(saved.meetings));
    }
    tracing::info!(seed = first.seed, "comparing the final policies of a seed");
    let cancel = signals::cancel_token(shutdown);
    let inputs = MeetingInputs::open(tournament, &first.resolved.settings, &cancel)?;
    let policies = inputs.policies(entrants, &finals.results)?;
    let mut meetings = Vec::new();
    for &temperature in &tournament.temperatures {
        let Some(met) = inputs.meetings(&policies, temperature, shutdown)? else {
            return Ok(None);
        };
        meetings.push(met);
    }
    let saved = SavedMeetings { key, meetings };
    write_atomically(&folder.join(name), &serde_json::to_vec_pretty(&saved)?)?;
    Ok(Some(saved.meetings))
}

impl SavedMeetings {
    /// Whether there is one for each temperature, with a row and a column for each policy.
    fn fits(&self, tournament: &Tournament) -> bool {
        let is_square = |met: &SeedMeetings| {
            let count = met.policies.len();
            let rows = &met.win_rates;
            count > 0 && rows.len() == count && rows.iter().all(|row| row.len() == count)
        };
        let temperatures: Vec<f64> = self.meetings.iter().map(|met| met.temperature).collect();
        temperatures == tournament.temperatures && self.meetings.iter().all(is_square)
    }
}

/// Inputs that the meetings of a seed share: settings, reference, prompts.
struct MeetingInputs<'a> {
    tournament: &'a Tournament,
    settings: &'a Settings,
    base: LoadedModel,
    prompts: Vec<Prompt>,
    cancel: &'a CancelToken,
}

impl<'a> MeetingInputs<'a> {
    fn open(
        tournament: &'a Tournament,
        settings: &'a Settings,
        cancel: &'a CancelToken,
    ) -> anyhow::Result<Self> {
        let base = LoadedModel::open(settings, cancel)?;
        assembly::check_positions(settings, &base.folder.config)?;
        let all = assembly::prompts(settings, &base, cancel)?;
        let prompts = meeting_prompts(tournament, settings, all.as_ref())?;
        Ok(Self {
            tournament,
            settings,
            base,
            prompts,
            cancel,
        })
    }

    /// The reference, and the entrants whose runs have results.
    fn policies(
        &self,
        entrants: &[Entrant],
        results: &[&RunResult],
    ) -> anyhow::Result<Vec<MeetingPolicy>> {
        let mut policies = vec![MeetingPolicy {
            name: TOURNAMENT_REFERENCE.to_owned(),
            model: self.base.language_model()?,
            mixture_coef: 1.0,
        }];
        let (device, dtype) = assembly::device(self.settings)?;
        for entrant in entrants {
            let Some(result) = results.iter().find(|result| result.is_of(entrant)) else {
                continue;
            };
            let run = result.run;
            let template = run.resolved.settings.model.chat_template.as_deref();
            let location = ModelLocation::of_folder(result.checkpoint.clone(), self.cancel)?;
            let (_, mut model) = location.policy(template, dtype, &device)?;
            if entrant.average {
                model = learner::checkpoint_average(&result.checkpoint, &model)?
                    .with_context(|| format!("{} has saved no average", run.name))?;
            }
            policies.push(MeetingPolicy {
                name: entrant.name.clone(),
                model,
                mixture_coef: 0.0,
            });
        }
        Ok(policies)
    }

    /// The meetings at one temperature; `None` after a shutdown.
    fn meetings(
        &self,
        policies: &[MeetingPolicy],
        temperature: f64,
        shutdown: &watch::Sender<bool>,
    ) -> anyhow::Result<Option<SeedMeetings>> {
        let mut answers = Vec::new();
        for policy in policies {
            let Some(of_policy) = self.answers(policy, temperature)? else {
                return Ok(None);
            };
            answers.push(of_policy);
        }
        let both = policies.iter().zip(&answers);
        let policies =
            both.map(|(policy, answers)| self.policy(&policy.name, answers, temperature));
        let mut met = SeedMeetings {
            seed: self.settings.run.seed,
            temperature,
            policies: policies.collect(),
            win_rates: vec![vec![None; answers.len()]; answers.len()],
            unjudged: 0,
        };
        let judged = Handle::current().block_on(self.judge(&answers, &mut met, shutdown))?;
        Ok(judged.then_some(met))
    }

    /// A policy's answers, one a prompt; `None` after a shutdown.
    fn answers(
        &self,
        policy: &MeetingPolicy,
        temperature: f64,
    ) -> anyhow::Result<Option<Vec<Completion>>> {
        let actor = &self.settings.actor;
        let sampling = SamplingSettings {
            temperature,
            ..SamplingSettings::plain(actor.max_new_tokens)
        };
        let capacity = actor.max_prompt_length + actor.max_new_tokens;
        let reference = Some(self.base.language_model()?);
        let mut sampler = MixtureSampler::new(
            policy.model.clone(),
            reference,
            sampling,
            actor.slots,
            capacity,
        )?;
        for request in self.requests(policy, sampling.max_new_tokens) {
            sampler.admit(request)?;
        }
        let mut answers = vec![None; self.prompts.len()];
        while !sampler.is_idle() {
            if self.cancel.is_cancelled() {
                return Ok(None);
            }
            for finished in sampler.step()? {
                let index = finished.key as usize;
                let mut completion = finished
                    .completions
                    .into_iter()
                    .next()
                    .context("no completion")?;
                let ids = &self.prompts[index].ids;
                completion.text = self.base.folder.tokenizer.completion_text(ids, &completion);
                answers[index] = Some(completion);
            }
        }
        let answers: Option<Vec<Completion>> = answers.into_iter().collect();
        answers.map(Some).context("a prompt was not answered")
    }

    /// A policy's requests, one a prompt, in the prompts' order.
    fn requests(
        &self,
        policy: &MeetingPolicy,
        max_new_tokens: usize,
    ) -> impl Iterator<Item = Request> {
        let request = move |(key, prompt): (u64, &Prompt)| Request {
            key,
            ids: prompt.ids.clone(),
            seed: prompt.seed,
            mixture_coefs: vec![policy.mixture_coef],
            exact: 0,
            max_new_tokens,
            records_reference: true,
        };
        (0..).zip(&self.prompts).map(request)
    }

    fn policy(&self, name: &str, answers: &[Completion], temperature: f64) -> PolicyAnswers {
        let count = answers.len() as f64;
        let mean = |of: &dyn Fn(&Completion) -> f64| answers.iter().map(of).sum::<f64>() / count;
        let kl = || mean(&|answer| answer.log_ratio().unwrap_or(f64::NAN));
        let share = |style: Style| {
            mean(&|answer| f64::from(u8::from(playground::style_of(&answer.ids) == style)))
        };
        let on_playground = matches!(self.settings.prompts, PromptsSettings::Playground { .. });
        PolicyAnswers {
            name: name.to_owned(),
            kl: (temperature == 1.0 && name != TOURNAMENT_REFERENCE).then(kl),
            length: mean(&|answer| answer.ids.len() as f64),
            truncated: mean(&|answer| f64::from(u8::from(answer.finish == Finish::Length))),
            styles: on_playground.then(|| Style::ALL.map(share)),
        }
    }

    /// Judges every policy's answers against every other's. Whether all have met: not after a shutdown.
    async fn judge(
        &self,
        answers: &[Vec<Completion>],
        met: &mut SeedMeetings,
        shutdown: &watch::Sender<bool>,
    ) -> anyhow::Result<bool> {
        let judge = MeetingJudge::open(self.tournament, self.settings, &self.base)?;
        for a in 0..answers.len() {
            for b in a + 1..answers.len() {
                let mut requested = shutdown.subscribe();
                let both = [met.policies[a].name.as_str(), &met.policies[b].name];
                let requests = self.pairs(&answers[a], &answers[b]);
                let wins = tokio::select! {
                    wins = self.wins(&judge, &requests, both) => wins?,
                    _ = requested.wait_for(|requested| *requested) => return Ok(false),
                };
                met.unjudged += self.prompts.len() - wins.len();
                let rate = wins.iter().sum::<f64>() / wins.len() as f64;
                met.win_rates[a][b] = Some(rate);
                met.win_rates[b][a] = Some(1.0 - rate);
            }
        }
        Ok(true)
    }

    /// Outcomes of the judged comparisons of two policies: 1, 0 or ½, at least one.
    async fn wins(
        &self,
        judge: &MeetingJudge,
        requests: &[ComparisonRequest],
        [a, b]: [&str; 2],
    ) -> anyhow::Result<Vec<f64>> {
        let name = self.tournament.judge.to_string();
        let deadline = Duration::from_secs(self.settings.learner.batch_timeout_seconds);
        let mut wins = Vec::new();
        for chunk in requests.chunks(CHUNK) {
            let verdicts = tokio::time::timeout(deadline, judge.verdicts(chunk)).await;
            let verdicts = verdicts.map_err(|_| {
                Resource(format!(
                    "the judge {name:?} gave no verdict on {a} against {b} for {} s (learner.batch_timeout_seconds)",
                    deadline.as_secs()
                ))
            })?;
            wins.extend(verdicts?.into_iter().flatten().map(learner::win));
        }
        if wins.is_empty() {
            let (seed, count) = (self.settings.run.seed, requests.len());
            return Err(Resource(format!(
                "the judge {name:?} gave no verdict on any of {count} answers of {a} against {b}, seed {seed}: when it is \
                 repaired, the same command continues"
            ))
            .into());
        }
        Ok(wins)
    }

    fn pairs(&self, a: &[Completion], b: &[Completion]) -> Vec<ComparisonRequest> {
        let answers = a.iter().zip(b);
        let pairs = self.prompts.iter().zip(answers).map(|(prompt, (a, b))| {
            let pair = Pair {
                prompt: prompt.clone(),
                version: WeightsVersion::REFERENCE,
                completions: vec![a.clone(), b.clone()],
                actor: "tournament".into(),
            };
            ComparisonRequest::new(Arc::new(pair), 0, 1)
        });
        pairs.collect()
    }
}

/// The prompts of a tournament's meetings: held-out ones that the runs' evaluations do not use.
fn meeting_prompts(
    tournament: &Tournament,
    settings: &Settings,
    all: &dyn PromptSet,
) -> anyhow::Result<Vec<Prompt>> {
    let (skipped, count) = (settings.evaluation.prompts, tournament.prompts);
    if let Some(distinct) = all
        .held_out_count()
        .filter(|&distinct| distinct < skipped + count)
    {
        return Err(UsageError(format!(
            "evaluation.prompts = {skipped} and tournament.prompts = {count} need {} held-out prompts, and there are {distinct}: \
             set prompts.held_out, or name prompts.held_out_path",
            skipped + count
        ))
        .into());
    }
    let prompts = (skipped..skipped + count).map(|index| {
        let index = index as u64;
        let seed = Seed(settings.run.seed).derive(1 << 63 | index);
        all.held_out(index).held_out_prompt(PromptId(index), seed)
    });
    Ok(prompts.collect())
}

/// The judge of the meetings.
enum MeetingJudge {
    /// The judge that labels the runs.
    Run(JudgePool),
    Evaluation(EvaluationJudge),
}

impl MeetingJudge {
    fn open(
        tournament: &Tournament,
        settings: &Settings,
        base: &LoadedModel,
    ) -> anyhow::Result<Self> {
        let (origin, never) = (CompletionOrigin::Policy(base), CancelToken::never());
        if tournament.judge == TournamentJudge::Run {
            let judge = JudgeSource::open(settings, origin, &never)?;
            return Ok(Self::Run(assembly::pool(settings, &Arc::new(judge))?));
        }
        let name = tournament.judge.to_string();
        let judges = assembly::evaluation_judges(settings, origin, &never)?;
        let named = judges.into_iter().find(|judge| judge.name() == name);
        let named = named.with_context(|| format!("no evaluation judge {name:?}"))?;
        Ok(Self::Evaluation(named))
    }

    /// The probability that the first completion of each request is preferred; `None` without a verdict.
    async fn verdicts(&self, requests: &[ComparisonRequest]) -> anyhow::Result<Vec<Option<f64>>> {
        match self {
            Self::Run(pool) => {
                let preferences = pool.compare_all(requests, Orders::Both).await;
                let p = preferences
                    .into_iter()
                    .map(|preference| match preference?.verdict {
                        Verdict::Preference(p) => Ok(Some(f64::from(p.get()))),
                        Verdict::Abstained { .. } => Ok(None),
                    });
                p.collect()
            }
            Self::Evaluation(judge) => {
                let verdicts =
                    join_all(requests.iter().map(|request| judge.verdict(request))).await;
                let p = verdicts
                    .into_iter()
                    .map(|verdict| Some(f64::from(verdict?.p.get())));
                Ok(p.collect())
            }
        }
    }
}
