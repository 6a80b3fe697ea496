//! `[pairs]`: pairs from files that are trained on, beside the actors' samples or instead of them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    checks::Checks,
    fit::PairsSettings,
    objective::ObjectiveSettings,
    prompts::{CurriculumSetting, MixedFile, PromptsSettings, TooLong, one},
    settings::Settings,
};

/// Smallest share of a batch above 0 that a run can have: shares are counted in millionths.
const SMALLEST_SHARE: f64 = 1e-6;

/// Pairs from files that are trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilePairsSettings {
    /// A file, a folder of shards or a glob; empty: the files of `mix`, or none.
    pub path: PathBuf,
    /// Several files, in proportion to their weights.
    pub mix: Vec<MixedFile>,
    /// Number of pairs that the playground generates and writes to a file; 0: none.
    pub playground_pairs: usize,
    /// Share of every batch that comes from files: 1 offline, 0 online.
    pub share: f64,
    /// Source of the labels.
    pub label: PairLabelSource,
    /// Passes over the pairs after which the run ends; 0: as many as the learner's steps take.
    pub epochs: u64,
    /// Whether every pass has an order of its own.
    pub shuffle: bool,
    /// Column of the prompt; in rows without it, the prompt is the common prefix of both dialogues.
    pub prompt_column: String,
    /// Column of the preferred response or dialogue.
    pub chosen_column: String,
    /// Column of the rejected response or dialogue.
    pub rejected_column: String,
    /// Column of the probability that the chosen response is preferred; empty: it is 1.
    pub label_column: String,
    /// Column of the chosen response's score; empty: none.
    pub chosen_score_column: String,
    /// Column of the rejected response's score; empty: none.
    pub rejected_score_column: String,
    /// Column of the golden answer, which a judge by exact match compares with; empty: none.
    pub golden_column: String,
    /// Column of the value by which a judge is chosen; empty: none.
    pub route_column: String,
    /// Temperature of the scores: p = σ((score − score′) / temperature); 0: the higher score wins.
    pub score_temperature: f64,
    /// Whether a text prompt is a dialogue, which goes through the chat template: the turns of a `Human:` and an
    /// `Assistant:`, or one of the user.
    pub chat: bool,
    /// Maximum tokens of prompt and response together.
    pub max_length: usize,
    /// Handling of longer pairs.
    pub too_long: TooLong,
    /// Maximum size of a file's rows in bytes: decompressed, and in Parquet of the columns that are read.
    pub max_file_bytes: u64,
    /// Maximum number of rows of a file.
    pub max_rows: u64,
}

/// Source of the labels of pairs from files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PairLabelSource {
    /// The file: chosen and rejected, a probability, or scores.
    File,
    /// The judge of the run, once for each pair.
    Judge,
}

impl FilePairsSettings {
    /// Whether batches have pairs from files.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.has_source() && self.share > 0.0
    }

    /// Whether all pairs are from files.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        self.has_source() && self.share == 1.0
    }

    /// Whether the settings name pairs.
    fn has_source(&self) -> bool {
        self.playground_pairs > 0 || !self.files().is_empty()
    }

    /// All named files, with their weights; not the one that the playground writes.
    #[must_use]
    pub fn files(&self) -> Vec<MixedFile> {
        if !self.mix.is_empty() {
            return self.mix.clone();
        }
        let path = self.path.clone();
        let single = (!path.as_os_str().is_empty()).then(|| MixedFile {
            path,
            weight: one(),
        });
        single.into_iter().collect()
    }

    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        self.check_source(settings, checks);
        self.check_labels(checks);
        self.check_judged_columns(settings, checks);
        self.check_without_source(checks);
        checks.ratio(self.share, "pairs.share");
        checks.require(
            self.share == 0.0 || self.share >= SMALLEST_SHARE,
            "pairs.share",
            format!(
                "{} is less than a millionth: raise it, or set it to 0",
                self.share
            ),
        );
        checks.at_least(self.max_length as u64, 2, "pairs.max_length");
        checks.require(
            self.epochs == 0 || self.is_used(),
            "pairs.epochs",
            "it needs pairs from files: name pairs.path and a pairs.share above 0, or set it to 0",
        );
        if self.is_used() {
            self.check_objective(settings, checks);
        }
        if self.is_offline() {
            self.check_offline(settings, checks);
        }
    }

    fn check_source(&self, settings: &Settings, checks: &mut Checks) {
        let named = [
            !self.path.as_os_str().is_empty(),
            !self.mix.is_empty(),
            self.playground_pairs > 0,
        ];
        checks.require(
            named.iter().filter(|&&named| named).count() <= 1,
            "pairs.path",
            "name one source of pairs: pairs.path, pairs.mix or pairs.playground_pairs",
        );
        for file in &self.mix {
            checks.positive(file.weight, "pairs.mix");
            let is_named = !file.path.as_os_str().is_empty();
            checks.require(is_named, "pairs.mix", "a file has no path");
        }
        if self.playground_pairs > 0 {
            checks.at_least(self.playground_pairs as u64, 10, "pairs.playground_pairs");
            checks.require(
                matches!(settings.preference.fit.pairs, PairsSettings::Playground(_))
                    && !matches!(settings.prompts, PromptsSettings::Bandit {}),
                "pairs.playground_pairs",
                "they are generated as those of [preference.fit.pairs]: set preference.fit.pairs.kind = \"playground\" \
                 and use the playground's model",
            );
        }
    }

    fn check_labels(&self, checks: &mut Checks) {
        let named = |column: &String| !column.is_empty();
        let scores = [&self.chosen_score_column, &self.rejected_score_column].map(named);
        checks.require(
            scores[0] == scores[1],
            "pairs.rejected_score_column",
            "scores need both columns: name pairs.chosen_score_column and pairs.rejected_score_column, or neither",
        );
        checks.require(
            !(named(&self.label_column) && scores[0]),
            "pairs.label_column",
            "a pair has one label: name pairs.label_column or the columns of scores, not both",
        );
        let has_columns = named(&self.label_column) || scores.contains(&true);
        checks.require(
            self.label == PairLabelSource::File || !has_columns,
            "pairs.label",
            "\"judge\" does not read the file's labels: remove pairs.label_column and the columns of scores, or set it \
             to \"file\"",
        );
        checks.non_negative(self.score_temperature, "pairs.score_temperature");
        checks.require(
            self.score_temperature <= 0.0 || scores[0],
            "pairs.score_temperature",
            "there are no scores: name pairs.chosen_score_column and pairs.rejected_score_column, or set it to 0",
        );
    }

    /// Columns that only a judge reads, and that it needs.
    fn check_judged_columns(&self, settings: &Settings, checks: &mut Checks) {
        let judge = &settings.preference.judge;
        let is_judged = self.is_used() && self.label == PairLabelSource::Judge;
        for (key, column, is_needed, reader) in [
            (
                "golden_column",
                &self.golden_column,
                judge.reads_golden(),
                "\"exact-match\" compares with a golden answer",
            ),
            (
                "route_column",
                &self.route_column,
                judge.reads_route(),
                "\"route\" chooses a judge by a column",
            ),
        ] {
            checks.require(
                !(is_judged && is_needed && column.is_empty()),
                &format!("pairs.{key}"),
                format!("pairs.label = \"judge\" asks [preference.judge], where {reader}: name the column of the pairs' files"),
            );
            checks.require(
                column.is_empty() || self.label == PairLabelSource::Judge,
                &format!("pairs.{key}"),
                "only a judge reads it: set pairs.label = \"judge\", or remove it",
            );
        }
    }

    /// Settings that nothing follows from without pairs, although they were set.
    fn check_without_source(&self, checks: &mut Checks) {
        if self.has_source() {
            return;
        }
        let remedy = "there are no pairs from files: name pairs.path, pairs.mix or pairs.playground_pairs, or remove it";
        let columns = [
            ("label_column", &self.label_column),
            ("chosen_score_column", &self.chosen_score_column),
            ("golden_column", &self.golden_column),
            ("route_column", &self.route_column),
        ];
        let label = (self.label == PairLabelSource::Judge).then_some("label");
        // 0 is true of a run without files, and 1 the default.
        let share = (self.share > 0.0 && self.share < 1.0).then_some("share");
        let set = columns.iter().filter(|(_, column)| !column.is_empty());
        for key in set.map(|(key, _)| *key).chain(label).chain(share) {
            checks.require(false, &format!("pairs.{key}"), remedy);
        }
    }

    /// Objectives that need samples cannot train on given answers.
    fn check_objective(&self, settings: &Settings, checks: &mut Checks) {
        checks.require(
            !matches!(
                settings.learner.objective,
                ObjectiveSettings::NashMdPg { .. } | ObjectiveSettings::Rloo { .. }
            ),
            "learner.objective.kind",
            format!(
                "\"{}\" is a policy gradient and needs the policy's own samples: set pairs.share = 0, or choose \
                 \"ipo\", \"dpo\", \"slic\", \"rpo\" or \"rejection-sampling\"",
                settings.learner.objective.name()
            ),
        );
    }

    /// Settings that nothing follows from in a run without samples, although they were set.
    fn check_offline(&self, settings: &Settings, checks: &mut Checks) {
        checks.require(
            settings.actor.mixture_coef == 0.0,
            "actor.mixture_coef",
            "pairs.share = 1 trains on no samples, so there is no mixture to sample from: set it to 0, or lower \
             pairs.share",
        );
        checks.require(
            settings.actor.num_generations == 2,
            "actor.num_generations",
            "pairs.share = 1 trains on no samples: set it to 2, or lower pairs.share",
        );
        checks.require(
            settings.preference.apo.refresh_steps == 0 || self.label == PairLabelSource::Judge,
            "preference.apo.refresh_steps",
            "pairs.share = 1 with pairs.label = \"file\" trains on no label of the preference model: set it to 0, or \
             pairs.label = \"judge\"",
        );
        let preference = &settings.preference;
        for (key, is_set) in [
            ("missing_eos_penalty", preference.missing_eos_penalty > 0.0),
            ("length_penalty", preference.length_penalty > 0.0),
            ("length_normalization", preference.length_normalization),
        ] {
            checks.require(
                !is_set || self.label == PairLabelSource::Judge,
                &format!("preference.{key}"),
                "it changes labels of the judge, and pairs.share = 1 with pairs.label = \"file\" has none: remove it, or set \
                 pairs.label = \"judge\"",
            );
        }
        let has_curriculum = match &settings.prompts {
            PromptsSettings::Dataset(dataset) => dataset.curriculum != CurriculumSetting::None,
            _ => false,
        };
        checks.require(
            !has_curriculum,
            "prompts.curriculum",
            "pairs.share = 1 draws no prompts to train on: set it to \"none\", or lower pairs.share",
        );
    }
}

impl Settings {
    /// Whether actors are needed: a batch, an evaluation or APO has samples.
    #[must_use]
    pub fn needs_samples(&self) -> bool {
        !self.pairs.is_offline()
            || self.evaluation.prompts > 0
            || self.preference.apo.refresh_steps > 0
    }

    /// Number of actors in this process; 0 if nothing is sampled.
    #[must_use]
    pub fn actor_count(&self) -> usize {
        match self.needs_samples() {
            true => self.actor.count,
            false => 0,
        }
    }

    /// Whether a preference service is needed: samples, or pairs from files, are judged.
    #[must_use]
    pub fn needs_judge(&self) -> bool {
        self.needs_samples() || self.pairs.is_used() && self.pairs.label == PairLabelSource::Judge
    }
}

#[cfg(test)]
mod tests {
    use crate::{checks::tests::assert_reported, resolve, settings::Settings};

    fn settings(text: &str) -> Settings {
        resolve(text, "test", &[])
            .unwrap_or_else(|error| panic!("{text}: {error}"))
            .settings
    }

    #[test]
    fn contradictions_of_pairs_are_reported() {
        let of = |key: &str, rest: &str| format!("[pairs]\npath = \"x\"\n{key}\n{rest}");
        let cases = [
            (of("mix = [{ path = \"y\" }]", ""), "one source"),
            (of("playground_pairs = 10", ""), "one source"),
            (of("share = 1.5", ""), "pairs.share: 1.5 must be"),
            (of("share = 1e-9", ""), "less than a millionth"),
            (of("share = -0.1", ""), "must be from 0 to 1"),
            (of("share = 0.0\nepochs = 1", ""), "pairs.epochs"),
            (of("chosen_score_column = \"s\"", ""), "need both columns"),
            (of("score_temperature = 2.0", ""), "there are no scores"),
            (of("", "[preference]\nlength_penalty = 0.1"), "preference.length_penalty"),
            (of("", "[preference]\nmissing_eos_penalty = 0.1"), "preference.missing_eos_penalty"),
            (
                of("", "[model]\npath = \"m\"\n[prompts]\nkind = \"dataset\"\npath = \"p\"\ncurriculum = \"signal\""),
                "prompts.curriculum",
            ),
            (
                of(
                    "label_column = \"p\"\nchosen_score_column = \"s\"\nrejected_score_column = \"t\"",
                    "",
                ),
                "one label",
            ),
            (
                of("label = \"judge\"\nlabel_column = \"p\"", ""),
                "does not read",
            ),
            (
                of("score_temperature = -1.0", ""),
                "must not be negative",
            ),
            (of("max_length = 1", ""), "pairs.max_length"),
            (
                of("share = 0.5", "[learner.objective]\nkind = \"nash-md-pg\""),
                "needs the policy's own samples",
            ),
            (of("", "[actor]\nmixture_coef = 0.1"), "no mixture"),
            (of("", "[actor]\nnum_generations = 4"), "trains on no samples"),
            (
                of("", "[preference.apo]\nrefresh_steps = 10"),
                "preference.apo.refresh_steps",
            ),
            ("[pairs]\nepochs = 1".into(), "name pairs.path"),
            ("[pairs]\nlabel_column = \"p\"".into(), "there are no pairs from files"),
            ("[pairs]\nlabel = \"judge\"".into(), "there are no pairs from files"),
            ("[pairs]\nshare = 0.5".into(), "pairs.share: there are no pairs from files"),
            (of("golden_column = \"answer\"", ""), "only a judge reads it"),
            (
                of(
                    "label = \"judge\"",
                    "[preference.judge]\nkind = \"rule\"\nrules = [{ kind = \"exact-match\", weight = 1 }]",
                ),
                "pairs.golden_column: pairs.label = \"judge\" asks",
            ),
            (
                "[pairs]\nplayground_pairs = 100\n[preference.fit.pairs]\nkind = \"dataset\"\npath = \"x\"".into(),
                "pairs.playground_pairs",
            ),
        ];
        let cases: Vec<(&str, &str)> = cases.iter().map(|(text, e)| (text.as_str(), *e)).collect();
        assert_reported(&cases);
    }

    #[test]
    fn only_the_roles_that_are_needed_are() {
        for (text, samples, judge) in [
            ("", true, true),
            ("[pairs]\nshare = 0.0", true, true),
            ("[pairs]\npath = \"x\"", true, true),
            ("[evaluation]\nprompts = 0", true, true),
            (
                "[pairs]\npath = \"x\"\n[evaluation]\nprompts = 0",
                false,
                false,
            ),
            (
                "[pairs]\npath = \"x\"\nlabel = \"judge\"\n[evaluation]\nprompts = 0",
                false,
                true,
            ),
            (
                "[pairs]\npath = \"x\"\nshare = 0.5\n[evaluation]\nprompts = 0",
                true,
                true,
            ),
        ] {
            let settings = settings(text);
            let needed = (settings.needs_samples(), settings.needs_judge());
            assert_eq!(needed, (samples, judge), "{text}");
            assert_eq!(settings.actor_count() > 0, samples, "{text}");
        }
    }

    #[test]
    fn rpo_needs_no_golden_answers_where_the_chosen_ones_are_the_baseline() {
        let rpo = "[prompts]\nkind = \"bandit\"\n[model]\nreference_probabilities = [0.5, 0.5]\n\
                   [actor]\nmax_new_tokens = 1\n[learner.objective]\nkind = \"rpo\"\n\
                   [preference.judge]\nkind = \"matrix\"\nmatrix = [[0.5, 0.5], [0.5, 0.5]]\n";
        assert_reported(&[(rpo, "golden")]);
        settings(&format!("{rpo}[pairs]\npath = \"x\"\n"));
    }
}
