//! A tournament's configuration: methods, each with a grid of settings, that train with the same budget and then meet.
//!
//! Tables are those of a run's configuration: the base file, `[settings]`, a method's `settings`, a point of its `grid`
//! and, in a smoke run, `[smoke.settings]` are merged in this order, later ones taking precedence.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use messages::{Digest, GOLD};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    checks::Checks,
    choice,
    error::{Problem, SettingsError},
    learner::PairSelection,
    prompts::PromptsSettings,
    redaction::without_secrets,
    resolve::{Override, Resolved, resolve},
    settings::Settings,
};

/// Longest name of a method, in characters.
const MAX_NAME: usize = 40;
/// Characters and length of a name.
const NAME_RULE: &str = "up to 40 letters, digits, \"-\", \"_\" and \".\"";
/// Longest beginning of a label in the name of a folder, in characters.
const MAX_FOLDER: usize = 80;
/// Digits of a label's digest in the name of a folder.
const DIGEST_DIGITS: usize = 8;
/// Largest number of grid points of a method: beyond that it is a mistake.
const MAX_VARIANTS: usize = 1000;

/// Methods, seeds and judge of a tournament.
#[derive(Debug, Clone, PartialEq)]
pub struct Tournament {
    /// Name of its directory.
    pub name: String,
    /// Parent of tournament directories.
    pub output_dir: PathBuf,
    /// Seeds of the final runs, the unit of replication.
    pub seeds: Vec<u64>,
    /// Seeds of the runs that choose among the settings of a grid; none of them is in `seeds`.
    pub selection_seeds: Vec<u64>,
    /// The judge whose win rates choose settings and compare policies.
    pub judge: TournamentJudge,
    /// Held-out prompts of a meeting.
    pub prompts: usize,
    /// Sampling temperatures of the meetings.
    pub temperatures: Vec<f64>,
    /// Runs at the same time.
    pub jobs: usize,
    /// Metrics drawn over the steps in addition to win rate, KL and length.
    pub curves: Vec<String>,
    /// The methods in their order.
    pub methods: Vec<TournamentMethod>,
}

/// The judge whose win rates count in a tournament.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(from = "String", into = "String")]
pub enum TournamentJudge {
    /// The judge that labels the pairs of a run.
    Run,
    /// The playground's known preference.
    #[default]
    Gold,
    /// An evaluation judge.
    Named(String),
}

/// Name of [`TournamentJudge::Run`] in the file.
const RUN: &str = "run";
/// Name of the policy at the start in the results of a tournament; no method has it.
pub const TOURNAMENT_REFERENCE: &str = "reference";

impl From<String> for TournamentJudge {
    fn from(name: String) -> Self {
        match name.as_str() {
            RUN => Self::Run,
            GOLD => Self::Gold,
            _ => Self::Named(name),
        }
    }
}

impl From<TournamentJudge> for String {
    fn from(judge: TournamentJudge) -> Self {
        judge.to_string()
    }
}

impl fmt::Display for TournamentJudge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Run => RUN,
            Self::Gold => GOLD,
            Self::Named(name) => name,
        })
    }
}

/// A training method and its grid of settings.
#[derive(Debug, Clone, PartialEq)]
pub struct TournamentMethod {
    /// Name, unique in the tournament.
    pub name: String,
    /// Settings of the method: one for each point of the grid.
    pub variants: Vec<MethodVariant>,
    /// Whether only the best variant meets the other methods, or each does under a name of its own.
    pub keep: KeptVariants,
}

/// Variants of a method that take part in the finals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeptVariants {
    /// The variant with the highest mean win rate over the selection seeds.
    Best,
    /// All variants, without a selection.
    All,
}

/// The settings of a method at one point of its grid.
#[derive(Debug, Clone, PartialEq)]
pub struct MethodVariant {
    /// The values of the grid, as in `tau=0.05 learning_rate=0.0007`; empty without a grid.
    pub label: String,
    /// A run's configuration, without a seed.
    table: Table,
}

/// Keys of a tournament file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TournamentFile {
    tournament: TournamentTable,
    #[serde(default)]
    settings: Table,
    #[serde(default)]
    smoke: SmokeTable,
    #[serde(rename = "method", default)]
    methods: Vec<MethodTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TournamentTable {
    name: String,
    #[serde(default = "default_output_dir")]
    output_dir: PathBuf,
    base: Option<PathBuf>,
    seeds: Vec<u64>,
    #[serde(default)]
    selection_seeds: Vec<u64>,
    #[serde(default)]
    judge: TournamentJudge,
    #[serde(default = "default_prompts")]
    prompts: usize,
    #[serde(default = "default_temperatures")]
    temperatures: Vec<f64>,
    #[serde(default = "one")]
    jobs: usize,
    #[serde(default)]
    curves: Vec<String>,
    #[serde(default = "yes")]
    equal_budget: bool,
}

/// Changes of `--smoke`, a run of everything within minutes.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct SmokeTable {
    #[serde(default)]
    settings: Table,
    prompts: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MethodTable {
    name: String,
    #[serde(default)]
    settings: Table,
    #[serde(default)]
    grid: Table,
    #[serde(default = "best")]
    keep: KeptVariants,
}

fn default_output_dir() -> PathBuf {
    "runs/tournaments".into()
}
fn default_prompts() -> usize {
    512
}
fn default_temperatures() -> Vec<f64> {
    vec![1.0]
}
fn one() -> usize {
    1
}
fn yes() -> bool {
    true
}
fn best() -> KeptVariants {
    KeptVariants::Best
}

impl Tournament {
    /// Reads the file at `path`. In a `smoke` run there are two seeds, one selection seed, the first and the last point of
    /// every grid, and the file's `[smoke]` applies; the name ends with `-smoke`.
    ///
    /// # Errors
    /// When a file cannot be read, is not TOML or has mistakes, those of every run's settings included.
    pub fn read(path: &Path, smoke: bool) -> Result<Self, SettingsError> {
        let text = read(path)?;
        let origin = path.display().to_string();
        let not_toml = |error: toml::de::Error| SettingsError::NotToml {
            origin: format!("the tournament {origin}"),
            reason: without_secrets(&error.to_string()),
        };
        let file: TournamentFile = toml::from_str(&text).map_err(not_toml)?;
        let mut base = match &file.tournament.base {
            Some(base) => {
                let base = path.parent().unwrap_or(Path::new("")).join(base);
                toml::from_str(&read(&base)?).map_err(|error| SettingsError::NotToml {
                    origin: base.display().to_string(),
                    reason: without_secrets(&error.to_string()),
                })?
            }
            None => Table::new(),
        };
        choice::merge(&mut base, file.settings.clone());
        let equal_budget = file.tournament.equal_budget;
        let of_smoke = smoke.then_some(&file.smoke.settings);
        let methods = file
            .methods
            .iter()
            .map(|table| method(table, &base, of_smoke));
        let methods = methods.collect();
        let tournament = Self::of(file, methods, smoke);
        let mut problems = tournament.problems();
        if problems.is_empty() {
            problems = tournament.run_problems(equal_budget);
        }
        match problems.is_empty() {
            true => Ok(tournament),
            false => Err(SettingsError::Problems { origin, problems }),
        }
    }

    fn of(file: TournamentFile, methods: Vec<TournamentMethod>, smoke: bool) -> Self {
        let TournamentTable {
            mut name,
            output_dir,
            mut seeds,
            mut selection_seeds,
            judge,
            mut prompts,
            temperatures,
            jobs,
            curves,
            ..
        } = file.tournament;
        if smoke {
            name.push_str("-smoke");
            seeds.truncate(2);
            selection_seeds.truncate(1);
            prompts = file.smoke.prompts.unwrap_or(prompts);
        }
        Self {
            name,
            output_dir,
            seeds,
            selection_seeds,
            judge,
            prompts,
            temperatures,
            jobs,
            curves,
            methods,
        }
    }

    /// Number of runs that choose settings, and of final runs.
    #[must_use]
    pub fn run_counts(&self) -> (usize, usize) {
        let (mut selection, mut finals) = (0, 0);
        for method in &self.methods {
            let variants = method.variants.len();
            match method.selects() {
                true => (selection, finals) = (selection + variants, finals + 1),
                false => finals += variants,
            }
        }
        (
            selection * self.selection_seeds.len(),
            finals * self.seeds.len(),
        )
    }

    /// Mistakes of the tournament itself.
    fn problems(&self) -> Vec<Problem> {
        let mut checks = Checks::default();
        checks.require(
            is_folder_name(&self.name),
            "tournament.name",
            format!("{:?} must be a name of {NAME_RULE}", self.name),
        );
        self.check_seeds(&mut checks);
        checks.require(self.jobs >= 1, "tournament.jobs", "at least 1");
        checks.require(self.prompts >= 2, "tournament.prompts", "at least 2");
        let is_valid = |temperature: &f64| temperature.is_finite() && *temperature > 0.0;
        checks.require(
            !self.temperatures.is_empty() && self.temperatures.iter().all(is_valid),
            "tournament.temperatures",
            "name at least one, each above 0",
        );
        checks.require(
            !self.methods.is_empty(),
            "method",
            "name at least one, as [[method]] with a name",
        );
        let names: BTreeSet<_> = self.methods.iter().map(|method| &method.name).collect();
        let are_distinct = names.len() == self.methods.len();
        checks.require(are_distinct, "method", "a name occurs twice");
        for method in &self.methods {
            method.check(&mut checks);
        }
        checks.problems
    }

    fn check_seeds(&self, checks: &mut Checks) {
        let distinct = |seeds: &[u64]| seeds.iter().collect::<BTreeSet<_>>().len() == seeds.len();
        checks.require(
            !self.seeds.is_empty() && distinct(&self.seeds),
            "tournament.seeds",
            "name at least one seed, each once; 5 to 8 for intervals of use",
        );
        let shared = self.selection_seeds.iter();
        let shared: Vec<_> = shared.filter(|seed| self.seeds.contains(seed)).collect();
        checks.require(
            shared.is_empty() && distinct(&self.selection_seeds),
            "tournament.selection_seeds",
            format!(
                "each once, and none of tournament.seeds, as {shared:?} are: settings that are chosen on the seeds of \
                 the report look better than they are"
            ),
        );
        let selecting = self.methods.iter().find(|method| method.selects());
        checks.require(
            selecting.is_none() || !self.selection_seeds.is_empty(),
            "tournament.selection_seeds",
            format!(
                "the grid of {} needs seeds on which its best settings are chosen; or set its keep = \"all\"",
                selecting.map_or("", |method| &method.name)
            ),
        );
    }

    /// Mistakes of the runs' settings.
    fn run_problems(&self, equal_budget: bool) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut budgets = BTreeMap::new();
        for method in &self.methods {
            for variant in &method.variants {
                let key = format!("method {}{}", method.name, in_brackets(&variant.label));
                match self.budget(variant, &key) {
                    Ok(pairs) => drop(budgets.entry(pairs).or_insert(key)),
                    Err(of_variant) => problems.extend(of_variant),
                }
            }
        }
        if equal_budget && budgets.len() > 1 {
            let budgets = budgets.iter().map(|(pairs, key)| format!("{key} {pairs}"));
            let budgets: Vec<_> = budgets.collect();
            problems.push(Problem::new(
                "tournament",
                format!(
                    "methods train on different numbers of comparisons (learner.steps times learner.train_batch_size, times \
                     those of a prompt's actor.num_generations: {}): make them equal, or set tournament.equal_budget = \
                     false",
                    budgets.join(", ")
                ),
            ));
        }
        problems
    }

    /// Number of pairs on which a run with these settings trains.
    ///
    /// # Errors
    /// The mistakes of the settings, each named after `key`.
    fn budget(&self, variant: &MethodVariant, key: &str) -> Result<u64, Vec<Problem>> {
        let seed = variant.table.get("run").and_then(|run| run.get("seed"));
        if seed.is_some() {
            let reason = "run.seed is the tournament's to set: remove it";
            return Err(vec![Problem::new(key, reason)]);
        }
        let resolved = variant.resolve(0).map_err(|error| match error {
            SettingsError::Problems { problems, .. } => problems
                .into_iter()
                .map(|problem| Problem::new(&format!("{key}: {}", problem.path), problem.message))
                .collect(),
            other => vec![Problem::new(key, other.to_string())],
        })?;
        if let Some(reason) = self.unusable(&resolved) {
            return Err(vec![Problem::new(key, reason)]);
        }
        Ok(comparisons(&resolved.settings))
    }

    /// Reason why the tournament cannot judge or evaluate a run with these settings.
    fn unusable(&self, resolved: &Resolved) -> Option<String> {
        let settings = &resolved.settings;
        let judges = &settings.evaluation.judge;
        let on_playground = matches!(settings.prompts, PromptsSettings::Playground { .. });
        let known = match &self.judge {
            TournamentJudge::Run => true,
            TournamentJudge::Gold => on_playground || judges.contains_key(GOLD),
            TournamentJudge::Named(name) => judges.contains_key(name),
        };
        if !known {
            return Some(format!(
                "tournament.judge = {:?} is no judge of this run: name one of [evaluation.judge], \"run\" for the judge that labels, or on the playground \"gold\"",
                self.judge.to_string()
            ));
        }
        (settings.evaluation.prompts == 0).then(|| {
            "evaluation.prompts = 0: a tournament reads the evaluations of its runs".to_owned()
        })
    }
}

impl TournamentMethod {
    fn check(&self, checks: &mut Checks) {
        let key = format!("method {}", self.name);
        checks.require(
            is_folder_name(&self.name) && self.name != TOURNAMENT_REFERENCE,
            &key,
            format!("a name has {NAME_RULE}, and is not \"reference\""),
        );
        let grid = format!("{key}.grid");
        checks.require(
            (1..=MAX_VARIANTS).contains(&self.variants.len()),
            &grid,
            format!(
                "every value is a list of at least one setting, with at most {MAX_VARIANTS} combinations"
            ),
        );
        let labels: BTreeSet<_> = self.variants.iter().map(|variant| &variant.label).collect();
        let are_distinct = labels.len() == self.variants.len();
        checks.require(are_distinct, &grid, "a value occurs twice");
    }

    /// Whether a selection chooses among its variants.
    #[must_use]
    pub fn selects(&self) -> bool {
        self.keep == KeptVariants::Best && self.variants.len() > 1
    }
}

impl MethodVariant {
    /// The settings of the run with this seed.
    ///
    /// # Errors
    /// When they have mistakes.
    pub fn resolve(&self, seed: u64) -> Result<Resolved, SettingsError> {
        resolve(
            &self.toml(),
            "the settings",
            &[Override::new("run.seed", Value::Integer(seed as i64))],
        )
    }

    /// The configuration of its runs, for `agon train`; without a seed.
    #[must_use]
    pub fn toml(&self) -> String {
        self.table.to_string()
    }

    /// The label as part of a file name: with its digest, if it is long or has other characters than those of names.
    #[must_use]
    pub fn folder(&self) -> String {
        if self.label.is_empty() {
            return "settings".to_owned();
        }
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.=".contains(c);
        let plain = |c: char| match c {
            ' ' => '+',
            c if is_plain(c) => c,
            _ => '_',
        };
        let name: String = self.label.chars().take(MAX_FOLDER).map(plain).collect();
        let is_whole = name.len() == self.label.len();
        if is_whole && self.label.chars().all(|c| c == ' ' || is_plain(c)) {
            return name;
        }
        let digest = Digest::of(self.label.as_bytes()).to_string();
        format!("{name}-{}", &digest[..DIGEST_DIGITS])
    }
}

/// The method of this table, with its settings on top of `base`; in a smoke run with those of `smoke` on top.
fn method(method: &MethodTable, base: &Table, smoke: Option<&Table>) -> TournamentMethod {
    let mut axes = Vec::new();
    axes_of(&method.grid, "", &mut axes);
    let mut points = vec![Vec::new()];
    for axis in &axes {
        let extended = points.iter().flat_map(|point: &Vec<GridValue>| {
            axis.values.iter().map(move |value| {
                let mut point = point.clone();
                point.push(GridValue {
                    key: axis.key.clone(),
                    value: value.clone(),
                });
                point
            })
        });
        points = extended.take(MAX_VARIANTS + 1).collect();
    }
    if smoke.is_some() && points.len() > 2 {
        points.drain(1..points.len() - 1);
    }
    let variants = points.into_iter().map(|point| {
        let mut table = base.clone();
        choice::merge(&mut table, method.settings.clone());
        for value in &point {
            choice::merge(&mut table, value.nested());
        }
        if let Some(smoke) = smoke {
            choice::merge(&mut table, smoke.clone());
        }
        let label: Vec<_> = point.iter().map(|value| value.label(&axes)).collect();
        MethodVariant {
            label: label.join(" "),
            table,
        }
    });
    TournamentMethod {
        name: method.name.clone(),
        variants: variants.collect(),
        keep: method.keep,
    }
}

/// A key of a grid and its values.
struct GridAxis {
    key: String,
    values: Vec<Value>,
}

/// A key of a grid and one of its values.
#[derive(Clone)]
struct GridValue {
    key: String,
    value: Value,
}

impl GridValue {
    /// As a table of settings.
    fn nested(&self) -> Table {
        self.key
            .rsplit('.')
            .fold(None, |below, part| {
                let value = below.map_or_else(|| self.value.clone(), Value::Table);
                Some(Table::from_iter([(part.to_owned(), value)]))
            })
            .unwrap_or_default()
    }

    /// `key=value` with the last part of the key, or all of it if another axis ends with the same.
    fn label(&self, axes: &[GridAxis]) -> String {
        let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        let own = last(&self.key);
        let is_unique = axes.iter().filter(|axis| last(&axis.key) == own).count() == 1;
        let key = if is_unique { &own } else { &self.key };
        match &self.value {
            Value::String(text) => format!("{key}={text}"),
            other => format!("{key}={other}"),
        }
    }
}

/// Adds the axes of a grid: every list in it. Any other value is an axis without values, which is reported.
fn axes_of(grid: &Table, prefix: &str, axes: &mut Vec<GridAxis>) {
    for (key, value) in grid {
        let key = format!("{prefix}{key}");
        match value {
            Value::Table(below) => axes_of(below, &format!("{key}."), axes),
            Value::Array(values) => axes.push(GridAxis {
                key,
                values: values.clone(),
            }),
            _ => axes.push(GridAxis {
                key,
                values: Vec::new(),
            }),
        }
    }
}

fn in_brackets(label: &str) -> String {
    match label.is_empty() {
        true => String::new(),
        false => format!(" ({label})"),
    }
}

/// Number of comparisons that a run trains on: one of a pair from a file, of a prompt those of any two completions or one
/// that is selected.
fn comparisons(settings: &Settings) -> u64 {
    let Settings { learner, pairs, .. } = settings;
    let completions = settings.actor.num_generations as u64;
    let of_prompt = match learner.pair_selection {
        PairSelection::All => completions * (completions - 1) / 2,
        PairSelection::BestWorst | PairSelection::Random => 1,
    };
    let share = if pairs.is_used() { pairs.share } else { 0.0 };
    let of_batch_member = share + (1.0 - share) * of_prompt as f64;
    ((learner.steps * learner.train_batch_size as u64) as f64 * of_batch_member).round() as u64
}

fn is_folder_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name.chars().all(is_plain)
        && !name.starts_with('.')
}

fn read(path: &Path) -> Result<String, SettingsError> {
    std::fs::read_to_string(path).map_err(|source| SettingsError::Unreadable {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::objective::ObjectiveSettings;

    const TWO_METHODS: &str = "[tournament]\nname = \"t\"\nseeds = [11, 12, 13]\nselection_seeds = [1]\n\
        [settings]\nlearner.objective = { kind = \"ipo\", tau = 0.5 }\n\
        [[method]]\nname = \"ipo\"\ngrid = { learner.objective.tau = [0.1, 0.2, 0.3], learner.learning_rate = [1e-3, 1e-4] }\n\
        [[method]]\nname = \"dpo\"\nsettings = { learner.objective.kind = \"dpo\" }\n\
        [smoke]\nprompts = 4\nsettings = { learner.steps = 3 }\n";

    fn read(text: &str, smoke: bool) -> Result<Tournament, SettingsError> {
        let folder = std::env::temp_dir().join(format!("agon-tournament-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let name: String = text.bytes().map(|b| format!("{b:x}")).collect();
        let digest = name.bytes().fold(0u64, |hash, b| {
            hash.wrapping_mul(31).wrapping_add(u64::from(b))
        });
        let path = folder.join(format!("{digest:x}-{smoke}.toml"));
        fs::write(&path, text).expect("a file");
        let found = Tournament::read(&path, smoke);
        fs::remove_file(&path).ok();
        fs::remove_dir(&folder).ok();
        found
    }

    #[test]
    fn a_grid_has_a_variant_for_every_combination() {
        let tournament = read(TWO_METHODS, false).expect("it is valid");
        let [ipo, dpo] = &tournament.methods[..] else {
            panic!("{tournament:?}")
        };
        assert_eq!(
            (ipo.name.as_str(), dpo.name.as_str()),
            ("ipo", "dpo"),
            "in their order"
        );
        let labels: Vec<_> = ipo
            .variants
            .iter()
            .map(|variant| variant.label.as_str())
            .collect();
        assert_eq!(labels.len(), 6);
        assert!(
            labels.contains(&"tau=0.2 learning_rate=0.0001")
                || labels.contains(&"learning_rate=0.0001 tau=0.2"),
            "{labels:?}"
        );
        assert!(ipo.selects() && !dpo.selects());
        assert_eq!(dpo.variants[0].folder(), "settings");
        let folder = |label: &str| {
            let (label, table) = (label.to_owned(), Table::new());
            MethodVariant { label, table }.folder()
        };
        assert_eq!(folder("tau=0.05"), "tau=0.05");
        assert_eq!(folder("tau=0.05 lr=1"), "tau=0.05+lr=1");
        let alike = ["a=b c", "a=b_c", "a=b/c", "a=b:c"].map(folder);
        let distinct: BTreeSet<_> = alike.iter().collect();
        assert_eq!(distinct.len(), 4, "{alike:?}");
        assert!(folder(&"x".repeat(500)).len() < 100);
        for variant in &ipo.variants {
            let settings = variant.resolve(12).expect("it resolves").settings;
            assert_eq!(settings.run.seed, 12);
            let ObjectiveSettings::Ipo { tau, .. } = settings.learner.objective else {
                panic!("{settings:?}")
            };
            assert!(
                variant.label.contains(&format!("tau={tau}")),
                "{}",
                variant.label
            );
        }
        let of_dpo = dpo.variants[0]
            .resolve(1)
            .expect("a kind replaces the table of another")
            .settings;
        assert_eq!(
            of_dpo.learner.objective,
            ObjectiveSettings::Dpo { beta: 0.1 }
        );
    }

    #[test]
    fn a_smoke_run_is_smaller_and_has_another_name() {
        let smoke = read(TWO_METHODS, true).expect("it is valid");
        assert_eq!((smoke.name.as_str(), smoke.prompts), ("t-smoke", 4));
        assert_eq!((smoke.seeds.len(), smoke.selection_seeds.len()), (2, 1));
        assert_eq!(smoke.methods[0].variants.len(), 2);
        let settings = smoke.methods[1].variants[0]
            .resolve(0)
            .expect("it resolves")
            .settings;
        assert_eq!(settings.learner.steps, 3);
    }

    /// A change of a minimal tournament, and a part of the message.
    type Mistake = ((&'static str, &'static str), &'static str);

    const MISTAKES: &[Mistake] = &[
        (
            ("seeds = [1]", "seeds = []"),
            "tournament.seeds: name at least one seed",
        ),
        (("seeds = [1]", "seeds = [1, 1]"), "tournament.seeds: "),
        (
            ("seeds = [1]", "seeds = [1]\nselection_seeds = [1]"),
            "tournament.selection_seeds: each once",
        ),
        (("seeds = [1]", "sedes = [1]"), "unknown field `sedes`"),
        (
            ("seeds = [1]", "seeds = [1]\ntemperatures = [0.0]"),
            "tournament.temperatures",
        ),
        (
            ("seeds = [1]", "seeds = [1]\njudge = \"gpt\""),
            "tournament.judge = \"gpt\" is no judge of this run",
        ),
        (("\"t\"", "\"../t\""), "tournament.name: \"../t\""),
        (("\"a\"", "\"reference\""), "method reference: a name has"),
        (("\"a\"", "\"a/b\""), "method a/b: a name has"),
        (
            ("\"a\"", "\"a\"\ngrid = { learner.learning_rate = 1.0 }"),
            "method a.grid: every value is a list",
        ),
        (
            ("\"a\"", "\"a\"\ngrid = { learner.learning_rate = [] }"),
            "method a.grid: every value is a list",
        ),
        (
            (
                "\"a\"",
                "\"a\"\ngrid = { learner.learning_rate = [1e-3, 1e-3] }\nkeep = \"all\"",
            ),
            "a value occurs twice",
        ),
        (
            (
                "\"a\"",
                "\"a\"\ngrid = { learner.learning_rate = [1e-3, 1e-4] }",
            ),
            "tournament.selection_seeds: the grid of a needs",
        ),
        (
            ("\"a\"", "\"a\"\nsettings = { learner.stepps = 1 }"),
            "method a: learner.stepps: unknown key; did you mean",
        ),
        (
            ("\"a\"", "\"a\"\nsettings = { run.seed = 1 }"),
            "method a: run.seed is the tournament's",
        ),
        (
            ("\"a\"", "\"a\"\nsettings = { evaluation.prompts = 0 }"),
            "evaluation.prompts = 0",
        ),
        (("\"a\"", "\"a\"\nkept = \"all\""), "unknown field `kept`"),
        (
            (
                "\"a\"",
                "\"a\"\nsettings = { learner.steps = 7 }\n[[method]]\nname = \"b\"\nsettings = { learner.steps = 8 }",
            ),
            "tournament.equal_budget = false",
        ),
        (
            (
                "\"a\"",
                "\"a\"\n[[method]]\nname = \"b\"\nsettings = { actor.num_generations = 4 }",
            ),
            "method a 9600, method b 57600",
        ),
        (
            ("\"a\"", "\"a\"\n[[method]]\nname = \"a\""),
            "method: a name occurs twice",
        ),
        (
            ("[[method]]\nname = \"a\"\n", ""),
            "method: name at least one",
        ),
        (
            ("seeds = [1]", "seeds = [1]\nbase = \"nowhere.toml\""),
            "nowhere.toml",
        ),
    ];

    #[test]
    fn a_budget_is_of_comparisons() {
        let equal = |settings: &str| {
            let text = format!(
                "[tournament]\nname = \"t\"\nseeds = [1]\n[[method]]\nname = \"a\"\n[[method]]\nname = \"b\"\nsettings = {settings}\n"
            );
            read(&text, false)
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        // 300 steps of 32 prompts, two completions each.
        for settings in [
            "{ actor.num_generations = 4, learner.steps = 50 }",
            "{ actor.num_generations = 4, learner.pair_selection = \"best-worst\" }",
            "{ pairs.playground_pairs = 64 }",
            "{ pairs = { playground_pairs = 64, share = 0.5 }, actor.num_generations = 3, learner.steps = 150 }",
        ] {
            assert_eq!(equal(settings), Ok(()), "{settings}");
        }
    }

    #[test]
    fn mistakes_are_named_with_their_key() {
        let minimal = "[tournament]\nname = \"t\"\nseeds = [1]\n[[method]]\nname = \"a\"\n";
        read(minimal, false).expect("it is valid");
        for (change, expected) in MISTAKES {
            let text = minimal.replace(change.0, change.1);
            let error = read(&text, false).expect_err(&text).to_string();
            assert!(error.contains(expected), "{text}\n{error}\n{expected}");
        }
    }
}
