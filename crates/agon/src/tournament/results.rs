//! The results of a tournament: every table and curve of its report as data.

use messages::GOLD;
use playground::{exploitability, style_preference};
use serde::Serialize;
use settings::{JudgeSettings, TOURNAMENT_REFERENCE, Tournament, TournamentJudge};
use telemetry::{Machine, RunView, describe_machine};

use crate::tournament::{
    meetings::SeedMeetings,
    plan::{Entrant, PlannedRun, SelectedVariant},
    run_result::{RunResult, win_rate},
    statistics::{SeedMean, holm, t_test},
};

/// Everything in a report.
#[derive(Serialize)]
pub(super) struct TournamentResults {
    pub(super) name: String,
    pub(super) judge: TournamentJudge,
    pub(super) seeds: Vec<u64>,
    pub(super) selection_seeds: Vec<u64>,
    /// Held-out prompts of a meeting.
    pub(super) prompts: usize,
    pub(super) selected: Vec<SelectedVariant>,
    /// One for each sampling temperature.
    pub(super) standings: Vec<Standings>,
    pub(super) training: Vec<Training>,
    pub(super) version: &'static str,
    pub(super) machine: Machine,
}

/// The meetings at one temperature.
#[derive(Serialize)]
pub(super) struct Standings {
    pub(super) temperature: f64,
    /// Comparisons without a verdict, over all seeds.
    pub(super) unjudged: usize,
    pub(super) policies: Vec<PolicyResult>,
    /// Every two entrants once, with p-values corrected over all of them.
    pub(super) comparisons: Vec<MethodComparison>,
}

/// A policy's results over the seeds.
#[derive(Serialize)]
pub(super) struct PolicyResult {
    pub(super) name: String,
    /// Win rate against the reference.
    pub(super) win_rate: Option<SeedMean>,
    /// KL from the reference in nats, at temperature 1.
    pub(super) kl: Option<SeedMean>,
    pub(super) length: Option<SeedMean>,
    pub(super) truncated: Option<SeedMean>,
    pub(super) styles: Option<StyleResult>,
    /// Seeds whose run diverged.
    pub(super) diverged: Vec<u64>,
}

/// The mix of styles on a playground with a cyclic preference.
#[derive(Serialize)]
pub(super) struct StyleResult {
    /// Shares of plain, formal and playful answers.
    pub(super) mix: [f64; 3],
    /// Best win rate of a single style against the mix; ½ at the Nash equilibrium.
    pub(super) exploitability: SeedMean,
    /// Total variation distance from the regularised equilibrium of the styles at the entrant's τ or β.
    pub(super) distance: Option<SeedMean>,
}

/// A meeting of two entrants over the seeds.
#[derive(Serialize)]
pub(super) struct MethodComparison {
    pub(super) a: String,
    pub(super) b: String,
    /// Win rate of a against b.
    pub(super) win_rate: SeedMean,
    /// P-value of a two-sided t-test that the win rate is ½, adjusted by Holm's method.
    pub(super) p: Option<f64>,
    /// Win rate of a against the reference less that of b, paired by seed.
    pub(super) difference: Option<SeedMean>,
    /// P-value of a t-test that the difference is 0, adjusted by Holm's method.
    pub(super) difference_p: Option<f64>,
}

/// An entrant's training over the seeds.
#[derive(Serialize)]
pub(super) struct Training {
    pub(super) name: String,
    pub(super) seconds: Option<SeedMean>,
    pub(super) pairs: Option<SeedMean>,
    pub(super) memory_gib: Option<SeedMean>,
    pub(super) evaluations: Vec<EvaluationMean>,
    /// Further curves: mean over the seeds.
    pub(super) curves: Vec<MeanCurve>,
    /// Rounds of adversarial preference optimisation.
    pub(super) rounds: Vec<RoundMean>,
}

/// Evaluations of all seeds at one step.
#[derive(Serialize)]
pub(super) struct EvaluationMean {
    pub(super) step: u64,
    /// Under the tournament's judge.
    pub(super) win_rate: Option<SeedMean>,
    /// Under the judge that labels.
    pub(super) run_win_rate: Option<SeedMean>,
    pub(super) kl: Option<SeedMean>,
    pub(super) length: Option<SeedMean>,
}

/// A metric over the steps.
#[derive(Serialize)]
pub(super) struct MeanCurve {
    pub(super) metric: String,
    pub(super) points: Vec<CurvePoint>,
}

/// A point of a curve.
#[derive(Serialize)]
pub(super) struct CurvePoint {
    pub(super) step: u64,
    pub(super) value: SeedMean,
}

/// Quality of the preference model after an APO round, on held-out annotated pairs.
#[derive(Serialize)]
pub(super) struct RoundMean {
    /// 0: before the first round.
    pub(super) round: u64,
    pub(super) accuracy: Option<SeedMean>,
    pub(super) ece: Option<SeedMean>,
}

impl TournamentResults {
    /// The results of the final runs and of their meetings.
    pub(super) fn new(
        tournament: &Tournament,
        selected: &[SelectedVariant],
        entrants: &[Entrant],
        results: &[RunResult],
        met: &[SeedMeetings],
    ) -> Self {
        let cycle = results
            .iter()
            .find_map(|result| cycle(tournament, result.run));
        let standings = tournament.temperatures.iter().map(|&temperature| {
            let met: Vec<_> = met
                .iter()
                .filter(|met| met.temperature == temperature)
                .collect();
            Standings::new(temperature, entrants, &met, cycle)
        });
        let last_weights = entrants.iter().filter(|entrant| !entrant.average);
        let training = last_weights.map(|entrant| Training::new(tournament, entrant, results));
        Self {
            name: tournament.name.clone(),
            judge: tournament.judge.clone(),
            seeds: tournament.seeds.clone(),
            selection_seeds: tournament.selection_seeds.clone(),
            prompts: tournament.prompts,
            selected: selected.to_vec(),
            standings: standings.collect(),
            training: training.collect(),
            version: env!("CARGO_PKG_VERSION"),
            machine: describe_machine(),
        }
    }
}

/// Strength of the cyclic preference of the tournament's judge, if it has one.
fn cycle(tournament: &Tournament, run: &PlannedRun) -> Option<f64> {
    let settings = &run.resolved.settings;
    let (of_run, others) = (&settings.preference.judge, &settings.evaluation.judge);
    let judge = match &tournament.judge {
        TournamentJudge::Run => of_run,
        TournamentJudge::Gold => others.get(GOLD).unwrap_or(of_run),
        TournamentJudge::Named(name) => others.get(name)?,
    };
    match judge {
        JudgeSettings::Gold { cycle } if *cycle > 0.0 => Some(*cycle),
        _ => None,
    }
}

impl Standings {
    fn new(
        temperature: f64,
        entrants: &[Entrant],
        met: &[&SeedMeetings],
        cycle: Option<f64>,
    ) -> Self {
        let mut policies = vec![PolicyResult::new(TOURNAMENT_REFERENCE, met)];
        policies[0].styles = cycle.and_then(|cycle| StyleResult::new(None, met, cycle));
        for entrant in entrants {
            let mut policy = PolicyResult::new(&entrant.name, met);
            policy.styles = cycle.and_then(|cycle| StyleResult::new(Some(entrant), met, cycle));
            policies.push(policy);
        }
        Self {
            temperature,
            unjudged: met.iter().map(|met| met.unjudged).sum(),
            policies,
            comparisons: comparisons(entrants, met),
        }
    }

    /// Whether the win rate of two entrants is apart from ½ at a family-wise error rate of .05.
    pub(super) fn differs(&self, a: &str, b: &str) -> bool {
        let is_of = |found: &&MethodComparison| [(a, b), (b, a)].contains(&(&found.a, &found.b));
        let found = self.comparisons.iter().find(is_of);
        found.and_then(|found| found.p).is_some_and(|p| p < 0.05)
    }

    /// Mean win rate of `a` against `b`.
    pub(super) fn win_rate(&self, a: &str, b: &str) -> Option<f64> {
        if b == TOURNAMENT_REFERENCE {
            let policy = self.policies.iter().find(|policy| policy.name == a)?;
            return policy.win_rate.map(|rate| rate.mean);
        }
        if a == TOURNAMENT_REFERENCE {
            return self.win_rate(b, a).map(|rate| 1.0 - rate);
        }
        let of = |a: &str, b: &str| {
            let found = self
                .comparisons
                .iter()
                .find(|found| found.a == a && found.b == b);
            found.map(|found| found.win_rate.mean)
        };
        of(a, b).or_else(|| of(b, a).map(|rate| 1.0 - rate))
    }
}

/// Every two entrants that have met, with p-values adjusted for their number.
fn comparisons(entrants: &[Entrant], met: &[&SeedMeetings]) -> Vec<MethodComparison> {
    let mut comparisons = Vec::new();
    let mut tests = [Vec::new(), Vec::new()];
    for (index, a) in entrants.iter().enumerate() {
        for b in &entrants[index + 1..] {
            let rates: Vec<f64> = met
                .iter()
                .filter_map(|met| met.rate(&a.name, &b.name))
                .collect();
            let Some(win_rate) = SeedMean::of_shares(&rates) else {
                continue;
            };
            let differences = met.iter().filter_map(|met| {
                Some(
                    met.rate(&a.name, TOURNAMENT_REFERENCE)?
                        - met.rate(&b.name, TOURNAMENT_REFERENCE)?,
                )
            });
            let differences: Vec<f64> = differences.collect();
            tests[0].push(t_test(&rates, 0.5));
            tests[1].push(t_test(&differences, 0.0));
            comparisons.push(MethodComparison {
                a: a.name.clone(),
                b: b.name.clone(),
                win_rate,
                p: None,
                difference: SeedMean::of(&differences),
                difference_p: None,
            });
        }
    }
    let [p, difference_p] = tests.map(|tests| adjusted(&tests));
    for ((comparison, p), difference_p) in comparisons.iter_mut().zip(p).zip(difference_p) {
        (comparison.p, comparison.difference_p) = (p, difference_p);
    }
    comparisons
}

/// The p-values that there are, adjusted for their number.
fn adjusted(tests: &[Option<f64>]) -> Vec<Option<f64>> {
    let known: Vec<f64> = tests.iter().flatten().copied().collect();
    let mut adjusted = holm(&known).into_iter();
    tests
        .iter()
        .map(|test| test.and_then(|_| adjusted.next()))
        .collect()
}

impl SeedMeetings {
    fn index(&self, name: &str) -> Option<usize> {
        self.policies.iter().position(|policy| policy.name == name)
    }

    /// Win rate of `a` against `b`, if both took part.
    fn rate(&self, a: &str, b: &str) -> Option<f64> {
        self.win_rates[self.index(a)?][self.index(b)?]
    }
}

impl PolicyResult {
    fn new(name: &str, met: &[&SeedMeetings]) -> Self {
        let policies = || {
            met.iter()
                .filter_map(|met| Some(&met.policies[met.index(name)?]))
        };
        let over = |values: Vec<f64>| SeedMean::of_amounts(&values);
        let share = |values: Vec<f64>| SeedMean::of_shares(&values);
        let absent = met.iter().filter(|met| met.index(name).is_none());
        Self {
            name: name.to_owned(),
            win_rate: share(
                met.iter()
                    .filter_map(|met| met.rate(name, TOURNAMENT_REFERENCE))
                    .collect(),
            ),
            kl: over(policies().filter_map(|policy| policy.kl).collect()),
            length: over(policies().map(|policy| policy.length).collect()),
            truncated: share(policies().map(|policy| policy.truncated).collect()),
            styles: None,
            diverged: absent.map(|met| met.seed).collect(),
        }
    }
}

impl StyleResult {
    /// Styles of an entrant, or of the reference.
    fn new(entrant: Option<&Entrant>, met: &[&SeedMeetings], cycle: f64) -> Option<Self> {
        let name = entrant.map_or(TOURNAMENT_REFERENCE, |entrant| &entrant.name);
        let mut mixes = Vec::new();
        let mut distances = Vec::new();
        for met in met {
            let styles = |name: &str| met.policies[met.index(name)?].styles;
            let (Some(mix), Some(reference)) = (styles(name), styles(TOURNAMENT_REFERENCE)) else {
                continue;
            };
            mixes.push(mix);
            distances.extend(entrant.and_then(|entrant| {
                let equilibrium = equilibrium(&reference, entrant, cycle)?;
                let apart = mix.iter().zip(&equilibrium).map(|(a, b)| (a - b).abs());
                Some(apart.sum::<f64>() / 2.0)
            }));
        }
        let exploited: Vec<f64> = mixes
            .iter()
            .map(|&mix| exploitability(mix, cycle))
            .collect();
        let mean =
            |style: usize| mixes.iter().map(|mix| mix[style]).sum::<f64>() / mixes.len() as f64;
        Some(Self {
            exploitability: SeedMean::of_shares(&exploited)?,
            mix: [0, 1, 2].map(mean),
            distance: SeedMean::of_shares(&distances),
        })
    }
}

/// The regularised Nash equilibrium of the styles alone, at the temperature of an entrant.
fn equilibrium(reference: &[f64; 3], entrant: &Entrant, cycle: f64) -> Option<Vec<f64>> {
    use playground::Style;
    let beats = |style: Style| {
        Style::ALL
            .map(|other| style_preference(style, other, cycle))
            .to_vec()
    };
    let matrix: Vec<Vec<f64>> = Style::ALL.into_iter().map(beats).collect();
    playground::fixed_point(
        &matrix,
        reference,
        entrant.temperature,
        entrant.mixture_coef,
    )
    .ok()
}

impl Training {
    fn new(tournament: &Tournament, entrant: &Entrant, results: &[RunResult]) -> Self {
        let results: Vec<&RunResult> = results
            .iter()
            .filter(|result| result.is_of(entrant))
            .collect();
        let over = |of: &dyn Fn(&RunResult) -> Option<f64>| {
            let values: Vec<f64> = results.iter().filter_map(|result| of(result)).collect();
            SeedMean::of(&values)
        };
        let views: Vec<&RunView> = results.iter().map(|result| &result.view).collect();
        let curves = tournament.curves.iter().map(|metric| MeanCurve {
            metric: metric.clone(),
            points: mean_curve(&views, metric),
        });
        Self {
            name: entrant.name.clone(),
            seconds: over(&|result| Some(result.report.wall_seconds)),
            pairs: over(&|result| Some(result.report.pairs as f64)),
            memory_gib: over(&|result| {
                Some(result.report.peak_memory_bytes? as f64 / f64::from(1 << 30))
            }),
            evaluations: evaluation_means(tournament, &results),
            curves: curves.collect(),
            rounds: round_means(&results),
        }
    }
}

fn evaluation_means(tournament: &Tournament, results: &[&RunResult]) -> Vec<EvaluationMean> {
    let Some(first) = results.first() else {
        return Vec::new();
    };
    let steps = first
        .report
        .evaluations
        .iter()
        .map(|evaluation| evaluation.step);
    let mean = |step: u64| {
        let all = || {
            let all = results.iter().flat_map(|result| &result.report.evaluations);
            all.filter(move |evaluation| evaluation.step == step)
        };
        let over = |values: Vec<f64>| SeedMean::of_amounts(&values);
        let share = |values: Vec<f64>| SeedMean::of_shares(&values);
        EvaluationMean {
            step,
            win_rate: share(
                all()
                    .filter_map(|e| win_rate(e, &tournament.judge))
                    .collect(),
            ),
            run_win_rate: share(all().map(|e| e.win_rate.mean).collect()),
            kl: over(all().map(|e| e.kl).collect()),
            length: over(all().map(|e| e.response_length).collect()),
        }
    };
    steps.map(mean).collect()
}

/// Mean of a metric over runs, at the steps that all of them recorded.
fn mean_curve(views: &[&RunView], metric: &str) -> Vec<CurvePoint> {
    let curves: Vec<_> = views
        .iter()
        .filter_map(|view| view.curves().get(metric))
        .collect();
    let Some(first) = curves.first() else {
        return Vec::new();
    };
    let points = first.steps.iter().filter_map(|&step| {
        let values = curves.iter().filter_map(|curve| {
            let index = curve.steps.binary_search(&step).ok()?;
            curve.values[index]
        });
        let values: Vec<f64> = values.collect();
        let value = SeedMean::of(&values).filter(|mean| mean.seeds == curves.len())?;
        Some(CurvePoint { step, value })
    });
    points.collect()
}

fn round_means(results: &[&RunResult]) -> Vec<RoundMean> {
    let rounds = results.iter().flat_map(|result| &result.report.rounds);
    let last = rounds.map(|round| round.round).max();
    let Some(last) = last else {
        return Vec::new();
    };
    let mean = |number: u64| {
        let qualities = results.iter().filter_map(|result| {
            let rounds = &result.report.rounds;
            match number {
                0 => rounds.first().map(|round| round.held_out.before),
                _ => rounds
                    .iter()
                    .find(|round| round.round == number)
                    .map(|round| round.held_out.after),
            }
        });
        let qualities: Vec<_> = qualities.collect();
        let over = |values: Vec<f64>| SeedMean::of_shares(&values);
        RoundMean {
            round: number,
            accuracy: over(qualities.iter().map(|quality| quality.accuracy).collect()),
            ece: over(qualities.iter().map(|quality| quality.ece).collect()),
        }
    };
    (0..=last).map(mean).collect()
}
