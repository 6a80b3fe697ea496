//! Validation beyond the types: value ranges, and settings that contradict one another.
//!
//! The checks of a section are in the file of the section. This file has the entry point and the collector of
//! problems.

use crate::{error::Problem, settings::Settings};

/// All values out of range and all contradictions, in the order of the sections.
pub(crate) fn contradictions(settings: &Settings) -> Vec<Problem> {
    let mut checks = Checks::default();
    settings.actor.check(settings, &mut checks);
    settings.learner.check(settings, &mut checks);
    settings.reference.check(settings, &mut checks);
    settings.evaluation.check(settings, &mut checks);
    settings.sft.check(&mut checks);
    settings.model.check(settings, &mut checks);
    settings.playground.check(&mut checks);
    settings.prompts.check(settings, &mut checks);
    settings.pairs.check(settings, &mut checks);
    settings.preference.check(settings, &mut checks);
    settings.telemetry.check(&mut checks);
    settings.learner.objective.check(settings, &mut checks);
    settings.transport.check(settings, &mut checks);
    settings.learner.ganpo.check(&mut checks);
    checks.problems
}

/// Collector of problems.
#[derive(Default)]
pub(crate) struct Checks {
    pub(crate) problems: Vec<Problem>,
}

impl Checks {
    /// Reports `message` for the key `path` unless `holds`.
    pub(crate) fn require(&mut self, holds: bool, path: &str, message: impl Into<String>) {
        if !holds {
            self.problems.push(Problem::new(path, message));
        }
    }

    /// Requires a finite value above 0.
    pub(crate) fn positive(&mut self, value: f64, path: &str) {
        let holds = value > 0.0 && value.is_finite();
        self.require(holds, path, format!("{value} must be greater than 0"));
    }

    /// Requires a finite value of at least 0.
    pub(crate) fn non_negative(&mut self, value: f64, path: &str) {
        let holds = value >= 0.0 && value.is_finite();
        self.require(holds, path, format!("{value} must not be negative"));
    }

    /// Requires a finite value.
    pub(crate) fn finite(&mut self, value: f64, path: &str) {
        self.require(value.is_finite(), path, "it must be a finite number");
    }

    /// Requires a value in [0, 1].
    pub(crate) fn ratio(&mut self, value: f64, path: &str) {
        self.require(
            (0.0..=1.0).contains(&value),
            path,
            format!("{value} must be from 0 to 1"),
        );
    }

    /// Requires a value in [0, 1).
    pub(crate) fn ratio_below_one(&mut self, value: f64, path: &str) {
        let holds = (0.0..1.0).contains(&value);
        self.require(holds, path, format!("{value} must be from 0 to below 1"));
    }

    /// Requires a value of at least `least`.
    pub(crate) fn at_least(&mut self, value: u64, least: u64, path: &str) {
        self.require(
            value >= least,
            path,
            format!("{value} must be at least {least}"),
        );
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::{error::SettingsError, resolve::resolve};

    /// The problems of a configuration, as text.
    pub(crate) fn problems(text: &str) -> Vec<String> {
        match resolve(text, "test.toml", &[]) {
            Ok(_) => Vec::new(),
            Err(SettingsError::Problems { problems, .. }) => {
                problems.iter().map(ToString::to_string).collect()
            }
            Err(other) => panic!("{other}"),
        }
    }

    /// Asserts that each configuration has a problem that contains the text.
    pub(crate) fn assert_reported(cases: &[(&str, &str)]) {
        for (text, expected) in cases {
            let problems = problems(text);
            assert!(
                problems.iter().any(|problem| problem.contains(expected)),
                "{text:?} gave {problems:?}"
            );
        }
    }
}
