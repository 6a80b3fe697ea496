//! The runs of a tournament, their files, and the policies that meet.

use std::path::{Path, PathBuf};

use serde::Serialize;
use settings::{Resolved, Tournament};
use telemetry::write_atomically;

use crate::{exit_code::UsageError, tournament::files};

/// The runs of a tournament in a folder.
pub(super) struct Plan<'a> {
    tournament: &'a Tournament,
    root: &'a Path,
}

/// One run.
pub(super) struct PlannedRun {
    /// Index of the method.
    pub(super) method: usize,
    /// Index of the variant in the method.
    pub(super) variant: usize,
    pub(super) seed: u64,
    /// Method, settings and seed, for people.
    pub(super) name: String,
    /// Configuration file of the run, without the seed.
    pub(super) configuration: PathBuf,
    /// Run directory.
    pub(super) directory: PathBuf,
    /// The tournament's directory.
    pub(super) root: PathBuf,
    /// Resolved settings, the seed included.
    pub(super) resolved: Resolved,
}

/// The variant with which a method takes part in the finals.
#[derive(Debug, Clone, Serialize)]
pub(super) struct SelectedVariant {
    /// Name of the method.
    pub(super) method: String,
    #[serde(skip)]
    pub(super) method_index: usize,
    #[serde(skip)]
    pub(super) variant_index: usize,
    /// Values of the grid, as `key=value`.
    pub(super) label: String,
    /// Mean win rate against the reference over the selection seeds; `None` without a selection.
    pub(super) score: Option<f64>,
    /// All variants with their scores; a run that diverged gives its variant none.
    pub(super) candidates: Vec<Candidate>,
}

/// A variant and its score.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Candidate {
    pub(super) label: String,
    pub(super) score: Option<f64>,
}

/// A policy that takes part: a run's last weights, or their moving average.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Entrant {
    pub(super) name: String,
    #[serde(skip)]
    pub(super) method: usize,
    #[serde(skip)]
    pub(super) variant: usize,
    /// Whether it is the moving average.
    pub(super) average: bool,
    /// τ or β.
    pub(super) temperature: f64,
    /// Weight of the reference in the behaviour policy.
    pub(super) mixture_coef: f64,
}

impl<'a> Plan<'a> {
    pub(super) fn new(tournament: &'a Tournament, root: &'a Path) -> Self {
        Self { tournament, root }
    }

    /// Writes the configuration of every variant, so that each run can be repeated by hand.
    pub(super) fn write_configurations(&self) -> anyhow::Result<()> {
        for (index, method) in self.tournament.methods.iter().enumerate() {
            for (variant, settings) in method.variants.iter().enumerate() {
                let path = self.configuration(index, variant);
                let text = settings.toml();
                let name = format!("{}.toml", settings.folder());
                let folder = Path::new("settings").join(&method.name);
                files::create_folder(self.root, &folder)?;
                let written = files::read(&self.root.join(&folder), &name)?;
                if written.is_some_and(|written| written != text) {
                    return Err(UsageError(format!(
                        "{} was made with other settings of {}: choose another tournament.name, or remove {}",
                        self.root.display(),
                        method.name,
                        self.root.display()
                    ))
                    .into());
                }
                write_atomically(&path, text.as_bytes())?;
            }
        }
        Ok(())
    }

    fn configuration(&self, method: usize, variant: usize) -> PathBuf {
        let method = &self.tournament.methods[method];
        let name = format!("{}.toml", method.variants[variant].folder());
        self.root.join("settings").join(&method.name).join(name)
    }

    fn run(&self, method: usize, variant: usize, seed: u64) -> anyhow::Result<PlannedRun> {
        let of_method = &self.tournament.methods[method];
        let of_variant = &of_method.variants[variant];
        let folder = self.root.join("runs").join(&of_method.name);
        let directory = folder
            .join(of_variant.folder())
            .join(format!("seed-{seed}"));
        let name = match of_variant.label.is_empty() {
            true => format!("{}, seed {seed}", of_method.name),
            false => format!("{} {}, seed {seed}", of_method.name, of_variant.label),
        };
        Ok(PlannedRun {
            method,
            variant,
            seed,
            name,
            configuration: self.configuration(method, variant),
            directory,
            root: self.root.to_owned(),
            resolved: of_variant.resolve(seed)?,
        })
    }

    /// All variants of the methods that select, at every selection seed.
    pub(super) fn selection_runs(&self) -> anyhow::Result<Vec<PlannedRun>> {
        let mut runs = Vec::new();
        for &seed in &self.tournament.selection_seeds {
            for (index, method) in self.tournament.methods.iter().enumerate() {
                for variant in 0..method.variants.len() {
                    if method.selects() {
                        runs.push(self.run(index, variant, seed)?);
                    }
                }
            }
        }
        Ok(runs)
    }

    /// The selected variants at every seed.
    pub(super) fn final_runs(
        &self,
        selected: &[SelectedVariant],
    ) -> anyhow::Result<Vec<PlannedRun>> {
        let mut runs = Vec::new();
        for &seed in &self.tournament.seeds {
            for chosen in selected {
                runs.push(self.run(chosen.method_index, chosen.variant_index, seed)?);
            }
        }
        Ok(runs)
    }

    /// The policies that meet: of every selected variant its last weights, and their average if the run keeps one.
    pub(super) fn entrants(&self, selected: &[SelectedVariant]) -> anyhow::Result<Vec<Entrant>> {
        let mut entrants = Vec::new();
        for chosen in selected {
            let method = &self.tournament.methods[chosen.method_index];
            let variant = &method.variants[chosen.variant_index];
            let settings = variant.resolve(self.tournament.seeds[0])?.settings;
            let several = !method.selects() && method.variants.len() > 1;
            let name = match several {
                true => format!("{} {}", method.name, variant.label),
                false => method.name.clone(),
            };
            let entrant = |name: String, average: bool| Entrant {
                name,
                method: chosen.method_index,
                variant: chosen.variant_index,
                average,
                temperature: settings.learner.objective.temperature(),
                mixture_coef: settings.actor.mixture_coef,
            };
            entrants.push(entrant(name.clone(), false));
            if settings.learner.ema_decay > 0.0 {
                entrants.push(entrant(format!("{name}, average"), true));
            }
        }
        Ok(entrants)
    }
}
