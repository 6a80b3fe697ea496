//! What no type can say: ranges, and settings that contradict each other.

mod preference;
mod telemetry;
mod transport;

use crate::{
    ActorSettings, EngineSettings, GanpoSettings, MaxGradNorm, ModelSettings, ObjectiveSettings,
    Problem, PromptsSettings, Settings, SftSettings,
};

/// Every contradiction and every number out of its range.
pub(crate) fn contradictions(settings: &Settings) -> Vec<Problem> {
    let mut checks = Checks {
        problems: Vec::new(),
    };
    checks.sampling(settings);
    checks.learning(settings);
    checks.schedule(settings);
    checks.supervised(&settings.sft);
    checks.sources(settings);
    checks.adapter(&settings.model);
    checks.worlds(settings);
    checks.preference(settings);
    checks.telemetry(&settings.telemetry);
    checks.objective(settings);
    checks.transport(settings);
    checks.ganpo(&settings.learner.ganpo);
    checks.problems
}

struct Checks {
    problems: Vec<Problem>,
}

impl Checks {
    fn require(&mut self, holds: bool, path: &str, message: impl Into<String>) {
        if !holds {
            self.problems.push(Problem::new(path, message));
        }
    }

    fn positive(&mut self, value: f64, path: &str) {
        let holds = value > 0.0 && value.is_finite();
        self.require(holds, path, format!("{value} must be greater than 0"));
    }

    fn share(&mut self, value: f64, path: &str) {
        self.require(
            (0.0..=1.0).contains(&value),
            path,
            format!("{value} must be from 0 to 1"),
        );
    }

    fn at_least(&mut self, value: u64, least: u64, path: &str) {
        self.require(
            value >= least,
            path,
            format!("{value} must be at least {least}"),
        );
    }

    fn decay(&mut self, value: f64, path: &str) {
        let holds = (0.0..1.0).contains(&value);
        self.require(holds, path, format!("{value} must be from 0 to below 1"));
    }

    fn sampling(&mut self, settings: &Settings) {
        let actor = &settings.actor;
        self.at_least(actor.count as u64, 1, "actor.count");
        self.at_least(actor.num_generations as u64, 2, "actor.num_generations");
        self.at_least(actor.max_new_tokens as u64, 1, "actor.max_new_tokens");
        self.at_least(actor.max_prompt_length as u64, 1, "actor.max_prompt_length");
        self.require(
            actor.slots >= actor.num_generations,
            "actor.slots",
            format!(
                "{} slots cannot hold the {} completions of one prompt (actor.num_generations)",
                actor.slots, actor.num_generations
            ),
        );
        let is_exact =
            actor.temperature == 1.0 && (actor.top_k, actor.top_p, actor.min_p) == (0, 1.0, 0.0);
        self.require(
            is_exact || actor.slots >= 3,
            "actor.slots",
            format!(
                "{} slots cannot hold a held-out prompt's three completions: with a temperature other than 1 or \
                 truncation the KL is estimated from a sample of its own",
                actor.slots
            ),
        );
        self.share(actor.mixture_coef, "actor.mixture_coef");
        self.positive(actor.temperature, "actor.temperature");
        self.positive(actor.top_p, "actor.top_p");
        self.share(actor.top_p, "actor.top_p");
        self.decay(actor.min_p, "actor.min_p");
        self.require(
            actor.max_drift >= 0.0 && actor.max_drift.is_finite(),
            "actor.max_drift",
            format!("{} must not be negative", actor.max_drift),
        );
        if let EngineSettings::Mistral { timeout_seconds } = actor.engine {
            self.positive(timeout_seconds, "actor.engine.timeout_seconds");
            self.require(
                settings.model.device == "cpu",
                "actor.engine.kind",
                "\"mistral\" computes on the CPU: set model.device = \"cpu\"",
            );
        }
    }

    fn learning(&mut self, settings: &Settings) {
        let learner = &settings.learner;
        self.at_least(
            learner.train_batch_size as u64,
            1,
            "learner.train_batch_size",
        );
        self.at_least(learner.steps, 1, "learner.steps");
        let passes = learner.gradient_accumulation_steps;
        self.at_least(passes as u64, 1, "learner.gradient_accumulation_steps");
        self.require(
            passes == 0 || learner.train_batch_size.is_multiple_of(passes),
            "learner.gradient_accumulation_steps",
            format!(
                "{passes} does not divide learner.train_batch_size = {}",
                learner.train_batch_size
            ),
        );
        self.positive(learner.learning_rate, "learner.learning_rate");
        self.share(learner.warmup_ratio, "learner.warmup_ratio");
        self.share(learner.min_lr_ratio, "learner.min_lr_ratio");
        self.decay(learner.adam_beta1, "learner.adam_beta1");
        self.decay(learner.adam_beta2, "learner.adam_beta2");
        self.positive(learner.adam_epsilon, "learner.adam_epsilon");
        if let MaxGradNorm::Norm(norm) = learner.max_grad_norm {
            self.positive(norm, "learner.max_grad_norm");
        }
        self.require(
            learner.weight_decay >= 0.0 && learner.weight_decay.is_finite(),
            "learner.weight_decay",
            format!("{} must not be negative", learner.weight_decay),
        );
        self.share(learner.label_flip, "learner.label_flip");
        self.require(
            !learner.gradient_checkpointing
                || settings.model.device == "cpu" && settings.model.lora_rank == 0,
            "learner.gradient_checkpointing",
            "it is for whole models on the CPU: set model.device = \"cpu\" and model.lora_rank = 0",
        );
        self.share(learner.label_smoothing, "learner.label_smoothing");
    }

    fn schedule(&mut self, settings: &Settings) {
        let learner = &settings.learner;
        self.at_least(learner.weight_sync_steps, 1, "learner.weight_sync_steps");
        self.at_least(learner.rollback_after, 1, "learner.rollback_after");
        self.at_least(
            learner.save_total_limit as u64,
            1,
            "learner.save_total_limit",
        );
        self.at_least(
            learner.batch_timeout_seconds,
            1,
            "learner.batch_timeout_seconds",
        );
        self.require(
            learner.weight_sync_steps <= learner.max_staleness.saturating_add(1),
            "learner.max_staleness",
            format!(
                "{} cannot be kept when weights are published only every {} steps \
                 (learner.weight_sync_steps): raise it to {} or publish more often",
                learner.max_staleness,
                learner.weight_sync_steps,
                learner.weight_sync_steps.saturating_sub(1)
            ),
        );
        self.at_least(settings.evaluation.prompts as u64, 1, "evaluation.prompts");
    }

    fn supervised(&mut self, sft: &SftSettings) {
        self.at_least(sft.steps, 1, "sft.steps");
        self.at_least(sft.train_batch_size as u64, 1, "sft.train_batch_size");
        self.at_least(sft.max_length as u64, 2, "sft.max_length");
        self.positive(sft.learning_rate, "sft.learning_rate");
        self.share(sft.warmup_ratio, "sft.warmup_ratio");
        self.share(sft.min_lr_ratio, "sft.min_lr_ratio");
        self.decay(sft.adam_beta1, "sft.adam_beta1");
        self.decay(sft.adam_beta2, "sft.adam_beta2");
        self.positive(sft.max_grad_norm, "sft.max_grad_norm");
    }

    /// The keys of an adapter in `table`.
    fn lora(&mut self, table: &str, (rank, alpha, dropout): (usize, f64, f64), modules: &[String]) {
        let path = |key: &str| format!("{table}.{key}");
        self.positive(alpha, &path("lora_alpha"));
        self.decay(dropout, &path("lora_dropout"));
        self.require(
            rank == 0 || !modules.is_empty(),
            &path("target_modules"),
            "name the modules to adapt, or \"all-linear\"",
        );
    }

    /// Models that may be left out are not named by nothing.
    fn sources(&mut self, settings: &Settings) {
        let sources = [
            ("model.path", &settings.model.path),
            ("model.adapter", &settings.model.adapter),
            ("preference.fit.path", &settings.preference.fit.path),
        ];
        for (path, source) in sources {
            self.require(
                source.as_ref().is_none_or(|source| !source.is_empty()),
                path,
                "it is empty: name a folder or hf:ORG/NAME@REVISION, or leave the key out",
            );
        }
    }

    fn adapter(&mut self, model: &ModelSettings) {
        let shape = (model.lora_rank, model.lora_alpha, model.lora_dropout);
        self.lora("model", shape, &model.target_modules);
        self.require(
            model.lora_rank > 0 || model.adapter.is_none(),
            "model.lora_rank",
            "0 trains the whole weights, but model.adapter names an adapter: set it to the \"r\" of its adapter_config.json",
        );
    }

    fn ganpo(&mut self, ganpo: &GanpoSettings) {
        let path = |key: &str| format!("learner.ganpo.{key}");
        self.require(
            ganpo.lambda >= 0.0 && ganpo.lambda.is_finite(),
            &path("lambda"),
            format!("{} must not be negative", ganpo.lambda),
        );
        self.at_least(ganpo.heads as u64, 1, &path("heads"));
        self.at_least(ganpo.layers as u64, 1, &path("layers"));
        self.at_least(ganpo.max_length as u64, 1, &path("max_length"));
        self.require(
            ganpo.hidden_size.is_multiple_of(ganpo.heads.max(1)),
            &path("hidden_size"),
            format!(
                "{} must be a multiple of learner.ganpo.heads = {}",
                ganpo.hidden_size, ganpo.heads
            ),
        );
        self.decay(ganpo.momentum, &path("momentum"));
        self.positive(ganpo.lr_ratio, &path("lr_ratio"));
        self.require(
            ganpo.freeze_after == 0 || ganpo.freeze_after > ganpo.warmup_steps,
            &path("freeze_after"),
            format!(
                "{} is over before learner.ganpo.warmup_steps = {}",
                ganpo.freeze_after, ganpo.warmup_steps
            ),
        );
    }

    fn worlds(&mut self, settings: &Settings) {
        let (model, prompts) = (&settings.model, &settings.prompts);
        let world = &settings.playground;
        self.require(
            world.heads > 0 && world.hidden_size.is_multiple_of(2 * world.heads.max(1)),
            "playground.hidden_size",
            format!(
                "{} must be an even multiple of playground.heads = {}",
                world.hidden_size, world.heads
            ),
        );
        self.require(
            model.path.is_none() || model.reference_probabilities.is_none(),
            "model.reference_probabilities",
            "a model is either read from model.path or made from these probabilities, not both",
        );
        let is_bandit = matches!(prompts, PromptsSettings::Bandit {});
        self.require(
            is_bandit == model.reference_probabilities.is_some(),
            "model.reference_probabilities",
            "these belong to prompts.kind = \"bandit\", and a bandit needs them: one per arm",
        );
        self.require(
            !is_bandit || settings.actor.max_new_tokens == 1,
            "actor.max_new_tokens",
            "a bandit's completion is one arm: set it to 1",
        );
        if let PromptsSettings::Dataset(dataset) = prompts {
            self.require(
                dataset.path.as_os_str().is_empty() != dataset.mix.is_empty(),
                "prompts.path",
                "name the file of prompts, or several in prompts.mix, not both",
            );
            for file in &dataset.mix {
                self.positive(file.weight, "prompts.mix");
            }
            self.require(
                model.path.is_some(),
                "model.path",
                "prompts.kind = \"dataset\" needs a model: name a Hugging Face folder, or hf:ORG/NAME",
            );
        }
        if let Some(probabilities) = &model.reference_probabilities {
            self.probabilities(probabilities);
        }
    }

    /// A policy gradient is an expectation over samples of the policy itself: of its whole distribution at
    /// temperature 1.
    fn policy_gradient(&mut self, actor: &ActorSettings) {
        let drawn = [
            ("temperature", actor.temperature == 1.0, "1.0"),
            ("top_k", actor.top_k == 0, "0"),
            ("top_p", actor.top_p == 1.0, "1.0"),
            ("min_p", actor.min_p == 0.0, "0.0"),
        ];
        for (key, holds, needed) in drawn {
            self.require(
                holds,
                &format!("actor.{key}"),
                format!(
                    "\"nash-md-pg\" is a policy gradient, which is biased unless completions are drawn from the \
                     policy's whole distribution: set it to {needed}, or choose another learner.objective.kind"
                ),
            );
        }
    }

    fn probabilities(&mut self, probabilities: &[f64]) {
        let path = "model.reference_probabilities";
        let sum: f64 = probabilities.iter().sum();
        self.require(
            probabilities.len() >= 2,
            path,
            "a bandit has at least two arms",
        );
        self.require(
            probabilities.iter().all(|&p| p > 0.0 && p < 1.0),
            path,
            "every arm's probability must lie between 0 and 1",
        );
        self.require(
            (sum - 1.0).abs() < 1e-6,
            path,
            format!("they add up to {sum}, not to 1"),
        );
    }

    fn objective(&mut self, settings: &Settings) {
        let path = |key: &str| format!("learner.objective.{key}");
        match &settings.learner.objective {
            ObjectiveSettings::Ipo { tau, .. } => self.positive(*tau, &path("tau")),
            ObjectiveSettings::Dpo { beta } | ObjectiveSettings::Slic { beta } => {
                self.positive(*beta, &path("beta"));
            }
            ObjectiveSettings::Rpo {
                beta,
                eta,
                nll_coef,
                ..
            } => {
                self.positive(*beta, &path("beta"));
                self.require(
                    *eta >= 0.0,
                    &path("eta"),
                    format!("{eta} must not be negative"),
                );
                self.require(
                    *nll_coef >= 0.0,
                    &path("nll_coef"),
                    format!("{nll_coef} must not be negative"),
                );
                self.require(
                    settings.prompts.has_golden(),
                    &path("kind"),
                    "\"rpo\" needs a golden answer for every prompt: name prompts.golden_column",
                );
            }
            ObjectiveSettings::NashMdPg { tau } => {
                self.positive(*tau, &path("tau"));
                self.policy_gradient(&settings.actor);
                self.require(
                    settings.actor.num_generations == 2,
                    "actor.num_generations",
                    "\"nash-md-pg\" compares one completion of the policy with one of the mixture: set it to 2",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{SettingsError, resolve};

    fn mistakes(text: &str) -> Vec<String> {
        match resolve(text, "test.toml", &[]) {
            Ok(_) => Vec::new(),
            Err(SettingsError::Problems { problems, .. }) => {
                problems.iter().map(ToString::to_string).collect()
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn contradictions_are_named_with_both_keys() {
        let cases = [
            (
                "[learner]\nweight_sync_steps = 4\nmax_staleness = 1",
                "raise it to 3",
            ),
            (
                "[learner]\ntrain_batch_size = 10\ngradient_accumulation_steps = 4",
                "does not divide",
            ),
            ("[actor]\nslots = 1", "actor.num_generations"),
            (
                "[actor]\nmixture_coef = 1.5",
                "actor.mixture_coef: 1.5 must be from 0 to 1",
            ),
            (
                "[model]\nreference_probabilities = [0.5, 0.5]",
                "belong to prompts.kind = \"bandit\"",
            ),
            (
                "[learner.ganpo]\nhidden_size = 20",
                "20 must be a multiple of learner.ganpo.heads = 8",
            ),
            (
                "[learner.ganpo]\nwarmup_steps = 9\nfreeze_after = 9",
                "9 is over before learner.ganpo.warmup_steps = 9",
            ),
            (
                "[actor]\nmax_drift = -1",
                "actor.max_drift: -1 must not be negative",
            ),
            (
                "[learner]\ngradient_checkpointing = true\n[model]\nlora_rank = 4",
                "model.lora_rank = 0",
            ),
            (
                "[learner.ganpo]\nlambda = -1",
                "learner.ganpo.lambda: -1 must not be negative",
            ),
            ("[prompts]\nkind = \"dataset\"\npath = \"x\"", "model.path"),
            (
                "[preference.judge]\nkind = \"matrix\"\nmatrix = [[0.5]]",
                "a matrix judges a bandit's arms",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\nnum_generations = 4",
                "set it to 2",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\ntemperature = 0.7",
                "actor.temperature: \"nash-md-pg\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\ntop_k = 40",
                "actor.top_k: \"nash-md-pg\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\ntop_p = 0.9",
                "actor.top_p: \"nash-md-pg\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\nmin_p = 0.05",
                "actor.min_p: \"nash-md-pg\" is a policy gradient",
            ),
            ("[actor]\nslots = 2\ntemperature = 0.7", "three completions"),
            (
                "[learner.objective]\nkind = \"dpo\"\nbeta = 0",
                "learner.objective.beta",
            ),
            (
                "[model]\npath = \"m\"\n[prompts]\nkind = \"dataset\"\npath = \"p\"\n\
                 [preference.judge]\nkind = \"rule\"\nrules = [{ kind = \"ended\", weight = 1 }]\n\
                 [learner.objective]\nkind = \"rpo\"",
                "prompts.golden_column",
            ),
        ];
        are_named(&cases);
    }

    #[test]
    fn a_rule_that_compares_needs_golden_answers() {
        are_named(&[(
            "[model]\npath = \"m\"\n[prompts]\nkind = \"dataset\"\npath = \"p\"\n\
             [preference.judge]\nkind = \"rule\"\nrules = [{ kind = \"exact-match\", weight = 1 }]",
            "preference.judge.rules: \"exact-match\" compares with a golden answer",
        )]);
    }

    fn are_named(cases: &[(&str, &str)]) {
        for (text, expected) in cases {
            let mistakes = mistakes(text);
            assert!(
                mistakes.iter().any(|m| m.contains(expected)),
                "{text:?} gave {mistakes:?}"
            );
        }
    }

    #[test]
    fn a_run_is_one_folder_of_its_place() {
        for name in [
            "", " ", ".", "..", "a/b", "../a", "/a", "a\\b", "a\tb", "a\nb",
        ] {
            let said = mistakes(&format!("[run]\nname = {name:?}"));
            assert!(said[0].contains("run.name: "), "{said:?} of {name:?}");
        }
        for name in ["trial-7", "a.b", "Lauf 3", "…"] {
            let said = mistakes(&format!("[run]\nname = {name:?}"));
            assert_eq!(said, Vec::<String>::new(), "{name:?}");
        }
    }

    #[test]
    fn a_model_is_not_named_by_nothing() {
        are_named(&[
            ("[model]\npath = \"\"", "model.path: it is empty"),
            (
                "[model]\nlora_rank = 4\nadapter = \"\"",
                "model.adapter: it is empty",
            ),
            (
                "[preference.fit]\npath = \"\"",
                "preference.fit.path: it is empty",
            ),
        ]);
    }

    #[test]
    fn what_an_adapter_cannot_be_is_named_in_either_table() {
        are_named(&[
            (
                "[model]\nadapter = \"a\"",
                "model.lora_rank: 0 trains the whole weights",
            ),
            (
                "[model]\nlora_rank = 4\ntarget_modules = []",
                "model.target_modules: name the modules",
            ),
            (
                "[preference.fit]\nlora_rank = 4\ntarget_modules = []",
                "preference.fit.target_modules: name the modules",
            ),
            (
                "[model]\nlora_dropout = 1.0",
                "model.lora_dropout: 1 must be from 0 to below 1",
            ),
            (
                "[preference.fit]\nlora_alpha = 0.0",
                "preference.fit.lora_alpha: 0 must be",
            ),
        ]);
    }

    #[test]
    fn a_bandit_needs_a_matrix_that_is_a_preference() {
        let bandit = |matrix: &str| {
            mistakes(&format!(
                "[prompts]\nkind = \"bandit\"\n[model]\nreference_probabilities = [0.4, 0.6]\n\
                 [actor]\nmax_new_tokens = 1\n[preference.judge]\nkind = \"matrix\"\nmatrix = {matrix}"
            ))
        };
        assert_eq!(bandit("[[0.5, 0.7], [0.3, 0.5]]"), Vec::<String>::new());
        assert!(bandit("[[0.5, 0.7], [0.4, 0.5]]")[0].contains("[0][1] = 0.7 and [1][0] = 0.4"));
        assert!(bandit("[[0.5]]")[0].contains("2 rows of 2 numbers"));
    }
}
