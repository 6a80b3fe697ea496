//! What no type can say about judges, preference models and the service.

use super::Checks;
use crate::{
    ApoSettings, ChatSettings, EndpointSettings, FitSettings, JudgeSettings, LocalChatSettings,
    ModelSource, PairsSettings, PlaygroundGolden, PreferenceSettings, PromptsSettings,
    RuleSettings, Settings,
};

impl Checks {
    pub(super) fn preference(&mut self, settings: &Settings) {
        let preference = &settings.preference;
        self.service(preference);
        self.judge(&preference.judge, settings);
        self.chat(&preference.chat);
        self.fit(&preference.fit);
        let chosen = PromptsSettings::Playground {
            golden: PlaygroundGolden::Chosen,
        };
        self.require(
            settings.prompts != chosen
                || matches!(preference.fit.pairs, PairsSettings::Playground(_)),
            "prompts.golden",
            "\"chosen\" are the playground's annotated pairs: set preference.fit.pairs.kind = \"playground\"",
        );
        if preference.apo.refresh_steps > 0 {
            self.apo(&preference.apo, settings);
        }
    }

    fn service(&mut self, preference: &PreferenceSettings) {
        let path = |key: &str| format!("preference.{key}");
        self.at_least(preference.replicas as u64, 1, &path("replicas"));
        self.at_least(preference.max_batch as u64, 1, &path("max_batch"));
        self.at_least(preference.max_queue as u64, 1, &path("max_queue"));
        self.at_least(
            preference.circuit_failures as u64,
            1,
            &path("circuit_failures"),
        );
        self.positive(preference.timeout_seconds, &path("timeout_seconds"));
        self.positive(
            preference.circuit_probe_seconds,
            &path("circuit_probe_seconds"),
        );
        self.require(
            (0.0..0.5).contains(&preference.tie_margin),
            &path("tie_margin"),
            format!("{} must be from 0 to below 1/2", preference.tie_margin),
        );
        self.share(preference.max_order_gap, &path("max_order_gap"));
        let http = &preference.http;
        self.at_least(http.max_pairs as u64, 1, &path("http.max_pairs"));
        self.at_least(http.max_bytes as u64, 1, &path("http.max_bytes"));
        self.at_least(http.max_characters as u64, 1, &path("http.max_characters"));
        self.require(
            http.listen.is_empty() || http.listen.contains(':'),
            &path("http.listen"),
            format!("{:?} is not host:port", http.listen),
        );
    }

    fn judge(&mut self, judge: &JudgeSettings, settings: &Settings) {
        match judge {
            JudgeSettings::Gold { cycle } => {
                self.require(
                    matches!(settings.prompts, PromptsSettings::Playground { .. }),
                    "preference.judge.kind",
                    "\"gold\" judges the playground's summaries only; use \"rule\" for other prompts",
                );
                self.require(
                    cycle.is_finite(),
                    "preference.judge.cycle",
                    "it must be a finite number",
                );
            }
            JudgeSettings::Matrix { matrix } => self.matrix(matrix, settings),
            JudgeSettings::Rule { temperature, rules } => {
                let path = "preference.judge.temperature";
                let holds = *temperature >= 0.0 && temperature.is_finite();
                self.require(holds, path, format!("{temperature} must not be negative"));
                self.require(
                    !rules.is_empty(),
                    "preference.judge.rules",
                    "name at least one rule",
                );
                let compares =
                    |rule: &RuleSettings| matches!(rule, RuleSettings::ExactMatch { .. });
                self.require(
                    !rules.iter().any(compares) || settings.prompts.has_golden(),
                    "preference.judge.rules",
                    "\"exact-match\" compares with a golden answer: name prompts.golden_column",
                );
            }
            JudgeSettings::BradleyTerry { .. } | JudgeSettings::Pairwise { .. } => {}
            JudgeSettings::Encoder { path, template } => self.encoder(path, template),
            JudgeSettings::Ensemble {
                members,
                deviations,
                ..
            } => self.ensemble(members, *deviations, settings),
            JudgeSettings::Http(endpoints) => self.endpoints(endpoints),
            JudgeSettings::Mistral(model) => self.local_chat(model),
            JudgeSettings::Service { urls, .. } => self.urls(urls),
        }
    }

    fn matrix(&mut self, matrix: &[Vec<f64>], settings: &Settings) {
        let path = "preference.judge.matrix";
        let arms = matrix.len();
        let expected = settings
            .model
            .reference_probabilities
            .as_ref()
            .map_or(arms, Vec::len);
        self.require(
            settings.model.reference_probabilities.is_some(),
            path,
            "a matrix judges a bandit's arms: set prompts.kind = \"bandit\"",
        );
        if arms == 0 || arms != expected || matrix.iter().any(|row| row.len() != arms) {
            let message =
                format!("it must have {expected} rows of {expected} numbers, one per arm");
            self.require(false, path, message);
            return;
        }
        for (i, row) in matrix.iter().enumerate() {
            for (j, &p) in row.iter().enumerate().skip(i) {
                self.require(
                    (0.0..=1.0).contains(&p) && (p + matrix[j][i] - 1.0).abs() < 1e-6,
                    path,
                    format!(
                        "[{i}][{j}] = {p} and [{j}][{i}] = {} must add up to 1",
                        matrix[j][i]
                    ),
                );
            }
        }
    }

    fn encoder(&mut self, path: &ModelSource, template: &str) {
        self.require(
            !path.is_empty(),
            "preference.judge.path",
            "name the folder of the encoder",
        );
        self.require(
            template.contains("{response}"),
            "preference.judge.template",
            "it must say where the {response} stands",
        );
    }

    fn ensemble(&mut self, members: &[JudgeSettings], deviations: f64, settings: &Settings) {
        self.require(
            members.len() >= 2,
            "preference.judge.members",
            "an ensemble has at least two members",
        );
        self.require(
            deviations >= 0.0 && deviations.is_finite(),
            "preference.judge.deviations",
            format!("{deviations} must not be negative"),
        );
        for member in members {
            let fits = !matches!(
                member,
                JudgeSettings::Ensemble { .. }
                    | JudgeSettings::Http(_)
                    | JudgeSettings::Service { .. }
            );
            self.require(
                fits,
                "preference.judge.members",
                format!(
                    "{:?} cannot be a member: members compute in this process",
                    member.name()
                ),
            );
            self.judge(member, settings);
        }
    }

    fn endpoints(&mut self, endpoints: &EndpointSettings) {
        self.urls(&endpoints.urls);
        self.require(
            !endpoints.model.is_empty(),
            "preference.judge.model",
            "name the model to ask",
        );
        self.at_least(
            endpoints.concurrency as u64,
            1,
            "preference.judge.concurrency",
        );
    }

    fn local_chat(&mut self, model: &LocalChatSettings) {
        self.require(
            !model.path.as_os_str().is_empty(),
            "preference.judge.path",
            "name a Hugging Face folder or a .gguf file",
        );
    }

    fn chat(&mut self, chat: &ChatSettings) {
        let path = |key: &str| format!("preference.chat.{key}");
        self.at_least(chat.max_tokens as u64, 1, &path("max_tokens"));
        for place in ["{first}", "{second}"] {
            self.require(
                chat.template.contains(place),
                &path("template"),
                format!("it must say where {place} stands"),
            );
        }
        let verdicts = [&chat.first_verdict, &chat.second_verdict, &chat.tie_verdict];
        let distinct = verdicts[0] != verdicts[1] && !verdicts[..2].contains(&verdicts[2]);
        self.require(
            distinct && !verdicts[0].is_empty() && !verdicts[1].is_empty(),
            &path("first_verdict"),
            "first_verdict, second_verdict and tie_verdict must differ, and the first two must say something",
        );
    }

    fn urls(&mut self, urls: &[String]) {
        let path = "preference.judge.urls";
        self.require(!urls.is_empty(), path, "name at least one address");
        for url in urls {
            self.require(
                url.starts_with("http://") || url.starts_with("https://"),
                path,
                format!("{url:?} does not begin with http:// or https://"),
            );
        }
    }

    fn fit(&mut self, fit: &FitSettings) {
        let path = |key: &str| format!("preference.fit.{key}");
        let adapter = (fit.lora_rank, fit.lora_alpha, fit.lora_dropout);
        self.lora("preference.fit", adapter, &fit.target_modules);
        self.at_least(fit.planes as u64, 1, &path("planes"));
        self.at_least(fit.epochs as u64, 1, &path("epochs"));
        self.at_least(fit.train_batch_size as u64, 1, &path("train_batch_size"));
        self.at_least(fit.max_length as u64, 2, &path("max_length"));
        self.positive(fit.learning_rate, &path("learning_rate"));
        self.positive(fit.max_grad_norm, &path("max_grad_norm"));
        self.share(fit.warmup_ratio, &path("warmup_ratio"));
        self.share(fit.min_lr_ratio, &path("min_lr_ratio"));
        self.share(fit.label_smoothing, &path("label_smoothing"));
        self.decay(fit.adam_beta1, &path("adam_beta1"));
        self.decay(fit.adam_beta2, &path("adam_beta2"));
        self.require(
            fit.validation > 0.0 && fit.validation < 1.0,
            &path("validation"),
            format!("{} must lie between 0 and 1", fit.validation),
        );
        match &fit.pairs {
            PairsSettings::Playground(made) => {
                self.at_least(made.count as u64, 10, &path("pairs.count"));
                self.share(made.flip, &path("pairs.flip"));
                let message = "it must be a finite number";
                self.require(made.cycle.is_finite(), &path("pairs.cycle"), message);
            }
            PairsSettings::Dataset(file) => self.require(
                !file.path.as_os_str().is_empty(),
                &path("pairs.path"),
                "name the file of pairs",
            ),
        }
    }

    fn apo(&mut self, apo: &ApoSettings, settings: &Settings) {
        let path = |key: &str| format!("preference.apo.{key}");
        let plays = matches!(
            settings.preference.judge,
            JudgeSettings::BradleyTerry { .. } | JudgeSettings::Pairwise { .. }
        );
        self.require(
            plays,
            &path("refresh_steps"),
            "only a model can be fitted again: set preference.judge.kind to \"bradley-terry\" or \"pairwise\"",
        );
        self.require(
            settings.prompts.has_golden(),
            &path("refresh_steps"),
            "the game needs golden answers: name prompts.golden_column",
        );
        self.at_least(apo.prompts as u64, 1, &path("prompts"));
        self.at_least(apo.samples as u64, 1, &path("samples"));
        self.require(
            apo.samples <= settings.actor.slots,
            &path("samples"),
            format!(
                "{} samples of a prompt do not fit actor.slots = {}",
                apo.samples, settings.actor.slots
            ),
        );
        self.require(
            apo.coef >= 0.0 && apo.coef.is_finite(),
            &path("coef"),
            format!("{} must not be negative", apo.coef),
        );
        self.share(apo.min_accuracy, &path("min_accuracy"));
        self.share(apo.max_ece, &path("max_ece"));
    }
}
