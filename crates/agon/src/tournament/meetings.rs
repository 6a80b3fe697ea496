//! Meetings of the policies of one seed: each answers the same held-out prompts with the same sampling seeds, and the
//! judge compares every two answers of a prompt.

use std::{fs, path::Path, sync::Arc};

use anyhow::Context;
use futures_util::future::join_all;
use hub::CancelToken;
use learner::PromptSet;
use messages::{Completion, Digest, Finish, Pair, Prompt, PromptId, Seed, WeightsVersion};
use model::{LanguageModel, MixtureSampler, Request, Sampler as _, SamplingSettings};
use playground::Style;
use preference::{ComparisonRequest, EvaluationJudge, JudgePool, Orders, Verdict};
use serde::{Deserialize, Serialize};
use settings::{PromptsSettings, Settings, Tournament};
use telemetry::write_atomically;

use crate::{
    assembly::{self, CompletionOrigin, JudgeSource, LoadedModel, ModelLocation, held_out_prompt},
    exit_code::UsageError,
    tournament::{
        plan::{Entrant, PlannedRun},
        run_result::RunResult,
    },
};

/// Name of the policy at the start, which plays in every meeting.
pub(super) const REFERENCE: &str = "reference";

/// The meetings of one seed at one sampling temperature.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SeedMeetings {
    pub(super) seed: u64,
    pub(super) temperature: f64,
    /// The reference, and then every entrant whose run has not diverged.
    pub(super) players: Vec<Player>,
    /// `win_rates[a][b]`: share of the judged prompts on which a's answer is preferred to b's, ties counting one half;
    /// `None` without a verdict.
    pub(super) win_rates: Vec<Vec<Option<f64>>>,
}

/// A policy's answers in the meetings of a seed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Player {
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

/// A policy that plays.
struct Participant {
    name: String,
    model: LanguageModel,
    /// 1 for the reference, which is also the second model of its sampler.
    mixture_coef: f32,
}

/// The meetings of one seed's `runs`, at each temperature. They are kept in a file and made again only if a policy or
/// a setting of the meetings has changed.
///
/// # Errors
/// When a policy cannot be read or sampled from, there are too few prompts, or the judge fails.
pub(super) fn meet(
    tournament: &Tournament,
    root: &Path,
    entrants: &[Entrant],
    runs: &[&PlannedRun],
) -> anyhow::Result<Vec<SeedMeetings>> {
    let first = runs.first().context("a seed has runs")?;
    let mut results = Vec::new();
    let mut parts = vec![first.resolved.toml.clone()];
    parts.push(format!(
        "{} {} {:?}",
        tournament.judge, tournament.prompts, tournament.temperatures
    ));
    for run in runs {
        if let Some(result) = RunResult::read(run)? {
            parts.push(format!("{} {}", run.name, result.report.weights_digest));
            results.push((*run, result));
        }
    }
    let key = Digest::of(parts.join("\n").as_bytes()).to_string();
    let path = root
        .join("meetings")
        .join(format!("seed-{}.json", first.seed));
    let saved = fs::read(&path).ok();
    let saved = saved.and_then(|bytes| serde_json::from_slice::<SavedMeetings>(&bytes).ok());
    if let Some(saved) = saved.filter(|saved| saved.key == key) {
        return Ok(saved.meetings);
    }
    tracing::info!(seed = first.seed, "meetings");
    let venue = Venue::open(tournament, &first.resolved.settings)?;
    let participants = venue.participants(entrants, &results)?;
    let meetings = tournament
        .temperatures
        .iter()
        .map(|&temperature| venue.meetings(&participants, temperature));
    let meetings = meetings.collect::<anyhow::Result<Vec<_>>>()?;
    let folder = path.parent().context("meetings are in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let saved = SavedMeetings { key, meetings };
    write_atomically(&path, &serde_json::to_vec_pretty(&saved)?)?;
    Ok(saved.meetings)
}

/// What the policies of a seed share: reference, prompts and judge.
struct Venue<'a> {
    tournament: &'a Tournament,
    settings: &'a Settings,
    base: LoadedModel,
    prompts: Vec<Prompt>,
}

impl<'a> Venue<'a> {
    fn open(tournament: &'a Tournament, settings: &'a Settings) -> anyhow::Result<Self> {
        let never = CancelToken::never();
        let base = LoadedModel::open(settings, &never)?;
        assembly::check_positions(settings, &base.folder.config)?;
        let all = assembly::prompts(settings, &base, &never)?;
        let prompts = meeting_prompts(tournament, settings, all.as_ref())?;
        Ok(Self {
            tournament,
            settings,
            base,
            prompts,
        })
    }

    /// The reference, and the entrants whose runs have results.
    fn participants(
        &self,
        entrants: &[Entrant],
        results: &[(&PlannedRun, RunResult)],
    ) -> anyhow::Result<Vec<Participant>> {
        let mut participants = vec![Participant {
            name: REFERENCE.to_owned(),
            model: self.base.language_model()?,
            mixture_coef: 1.0,
        }];
        let (device, dtype) = assembly::device(self.settings)?;
        for entrant in entrants {
            let of_entrant = |(run, _): &&(&PlannedRun, RunResult)| {
                (run.method, run.variant) == (entrant.method, entrant.variant)
            };
            let Some((run, result)) = results.iter().find(of_entrant) else {
                continue;
            };
            let template = run.resolved.settings.model.chat_template.as_deref();
            let location =
                ModelLocation::of_folder(result.checkpoint.clone(), &CancelToken::never())?;
            let (_, mut model) = location.policy(template, dtype, &device)?;
            if entrant.average {
                model = learner::checkpoint_average(&result.checkpoint, &model)?
                    .with_context(|| format!("{} has saved no average", run.name))?;
            }
            participants.push(Participant {
                name: entrant.name.clone(),
                model,
                mixture_coef: 0.0,
            });
        }
        Ok(participants)
    }

    fn meetings(
        &self,
        participants: &[Participant],
        temperature: f64,
    ) -> anyhow::Result<SeedMeetings> {
        let answers = participants
            .iter()
            .map(|player| self.answers(player, temperature));
        let answers: Vec<Vec<Completion>> = answers.collect::<anyhow::Result<_>>()?;
        let players = participants
            .iter()
            .zip(&answers)
            .map(|(player, answers)| self.player(&player.name, answers, temperature));
        Ok(SeedMeetings {
            seed: self.settings.run.seed,
            temperature,
            players: players.collect(),
            win_rates: self.win_rates(&answers)?,
        })
    }

    /// A participant's answers, one a prompt.
    fn answers(&self, player: &Participant, temperature: f64) -> anyhow::Result<Vec<Completion>> {
        let actor = &self.settings.actor;
        let sampling = SamplingSettings {
            temperature,
            ..SamplingSettings::plain(actor.max_new_tokens)
        };
        let capacity = actor.max_prompt_length + actor.max_new_tokens;
        let reference = Some(self.base.language_model()?);
        let mut sampler = MixtureSampler::new(
            player.model.clone(),
            reference,
            sampling,
            actor.slots,
            capacity,
        )?;
        for (key, prompt) in (0..).zip(&self.prompts) {
            sampler.admit(Request {
                key,
                ids: prompt.ids.clone(),
                seed: prompt.seed,
                mixture_coefs: vec![player.mixture_coef],
                exact: 0,
                max_new_tokens: sampling.max_new_tokens,
            })?;
        }
        let mut answers = vec![None; self.prompts.len()];
        while !sampler.is_idle() {
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
        answers
            .into_iter()
            .collect::<Option<_>>()
            .context("a prompt was not answered")
    }

    fn player(&self, name: &str, answers: &[Completion], temperature: f64) -> Player {
        let count = answers.len() as f64;
        let mean = |of: &dyn Fn(&Completion) -> f64| answers.iter().map(of).sum::<f64>() / count;
        let kl = || mean(&|answer| answer.sum_logp() - answer.sum_ref_logp());
        let share = |style: Style| {
            mean(&|answer| f64::from(u8::from(playground::style_of(&answer.ids) == style)))
        };
        let on_playground = matches!(self.settings.prompts, PromptsSettings::Playground { .. });
        Player {
            name: name.to_owned(),
            kl: (temperature == 1.0 && name != REFERENCE).then(kl),
            length: mean(&|answer| answer.ids.len() as f64),
            truncated: mean(&|answer| f64::from(u8::from(answer.finish == Finish::Length))),
            styles: on_playground.then(|| Style::ALL.map(share)),
        }
    }

    /// Win rates of every participant against every other.
    fn win_rates(&self, answers: &[Vec<Completion>]) -> anyhow::Result<Vec<Vec<Option<f64>>>> {
        crate::runtime()?.block_on(async {
            let judge = MeetingJudge::open(self.tournament, self.settings, &self.base)?;
            let mut rates = vec![vec![None; answers.len()]; answers.len()];
            for a in 0..answers.len() {
                for b in a + 1..answers.len() {
                    let rate = judge
                        .win_rate(&self.pairs(&answers[a], &answers[b]))
                        .await?;
                    rates[a][b] = rate;
                    rates[b][a] = rate.map(|rate| 1.0 - rate);
                }
            }
            Ok(rates)
        })
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
        held_out_prompt(PromptId(index), seed, all.held_out(index))
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
        if tournament.judge == "run" {
            let judge = JudgeSource::open(settings, origin, &never)?;
            return Ok(Self::Run(assembly::pool(settings, &Arc::new(judge))?));
        }
        let judges = assembly::evaluation_judges(settings, origin, &never)?;
        let named = judges
            .into_iter()
            .find(|judge| judge.name() == tournament.judge);
        let named = named.with_context(|| format!("no evaluation judge {:?}", tournament.judge))?;
        Ok(Self::Evaluation(named))
    }

    /// Share of the requests on which the first completion is preferred, over those with a verdict.
    async fn win_rate(&self, requests: &[ComparisonRequest]) -> anyhow::Result<Option<f64>> {
        let verdicts: Vec<Option<f64>> = match self {
            Self::Run(pool) => {
                let preferences = pool.compare_all(requests, Orders::Both).await;
                let p = preferences
                    .into_iter()
                    .map(|preference| match preference?.verdict {
                        Verdict::Preference(p) => Ok(Some(f64::from(p.get()))),
                        Verdict::Abstained { .. } => Ok(None),
                    });
                p.collect::<anyhow::Result<_>>()?
            }
            Self::Evaluation(judge) => {
                let verdicts =
                    join_all(requests.iter().map(|request| judge.verdict(request))).await;
                let p = verdicts
                    .into_iter()
                    .map(|verdict| Some(f64::from(verdict?.p.get())));
                p.collect()
            }
        };
        let wins: Vec<f64> = verdicts.into_iter().flatten().map(learner::win).collect();
        let mean = wins.iter().sum::<f64>() / wins.len().max(1) as f64;
        Ok((!wins.is_empty()).then_some(mean))
    }
}
