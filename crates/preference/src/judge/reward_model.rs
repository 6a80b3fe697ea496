//! A decoder preference model as a judge: Bradley–Terry or pairwise.

use std::sync::Once;

use messages::{Completion, JudgeVersion, Prompt, PromptText};
use model::{RewardKind, RewardModel, Sequence, Tokenizer, within_tokens};

use crate::dedup::Deduplicated;
use crate::error::JudgeError;
use crate::judge::{Comparison, Judge, ScoredVerdict, Verdict};
use crate::prompt_encoder::{EosPolicy, plain_if_no_template};
use crate::reward_training;

/// Maximum number of tokens, prompts and responses, per forward pass: as many as make products efficient, so that a judge
/// beside the learner takes little memory.
pub const PASS_TOKENS: usize = 2048;

/// A preference model as a judge.
pub struct RewardModelJudge {
    model: RewardModel,
    version: JudgeVersion,
    tokenizer: JudgeTokenizer,
    /// Logs once that dialogues are read as plain text.
    template_warning: Once,
}

/// Tokenizer of a preference model.
pub enum JudgeTokenizer {
    /// The policy's tokenizer: reads the policy's token ids.
    Shared,
    /// Tokenizer and chat template of the judge: reads messages and text.
    Own(Box<Tokenizer>),
}

impl RewardModelJudge {
    /// A judge by `model`, with this version.
    #[must_use]
    pub fn new(model: RewardModel, version: JudgeVersion, tokenizer: JudgeTokenizer) -> Self {
        Self {
            model,
            version,
            tokenizer,
            template_warning: Once::new(),
        }
    }

    /// Token ids of a prompt and of a response to it.
    ///
    /// # Errors
    /// When the model cannot read them: a reason for an abstention.
    fn encode(&self, prompt: &Prompt, completion: &Completion) -> Result<TokenIds, String> {
        let ids = match &self.tokenizer {
            JudgeTokenizer::Shared => TokenIds {
                prompt: prompt.ids.clone(),
                response: completion.ids.clone(),
            },
            JudgeTokenizer::Own(tokenizer) => self.own_tokens(tokenizer, prompt, completion)?,
        };
        let length = ids.prompt.len() + ids.response.len();
        let config = self.model.backbone().config();
        let (max_length, vocabulary) = (config.max_positions, config.vocab_size);
        let mut all = ids.prompt.iter().chain(&ids.response);
        if let Some(id) = all.find(|&&id| id as usize >= vocabulary) {
            return Err(format!(
                "token {id} is not in the model's vocabulary of {vocabulary}"
            ));
        }
        if ids.response.is_empty() {
            return Err("the response is empty".into());
        }
        if length > max_length {
            return Err(format!(
                "prompt and response have {length} tokens, the model reads {max_length}"
            ));
        }
        Ok(ids)
    }

    /// Token ids by `tokenizer`: a dialogue is rendered with its chat template, and end-of-text is appended as
    /// [`EosPolicy`] says.
    fn own_tokens(
        &self,
        tokenizer: &Tokenizer,
        prompt: &Prompt,
        completion: &Completion,
    ) -> Result<TokenIds, String> {
        if prompt.dialogue.is_some() && !tokenizer.has_chat_template() {
            self.template_warning.call_once(|| {
                tracing::warn!(
                    judge = self.name(),
                    "the preference model has no chat template: it reads dialogues as plain text, turn by turn"
                );
            });
        }
        let prompt = plain_if_no_template(tokenizer, PromptText::from(prompt));
        let ids = tokenizer
            .encode_prompt(&prompt)
            .map_err(|e| e.to_string())?;
        let response = match EosPolicy::of(self.model.config()).appends_eos(completion.finish) {
            true => tokenizer.encode_closed(&prompt, &ids, &completion.text),
            false => tokenizer.encode_completion(&prompt, &ids, &completion.text),
        };
        Ok(TokenIds {
            response: response.map_err(|e| e.to_string())?,
            prompt: ids,
        })
    }

    /// Rewards of all sequences, `[N][rewards per response]`.
    fn rewards(&self, ids: &[TokenIds]) -> Result<Vec<Vec<f32>>, JudgeError> {
        let mut rows = Vec::with_capacity(ids.len());
        let tokens = |ids: &TokenIds| ids.prompt.len() + ids.response.len();
        for chunk in within_tokens(ids, PASS_TOKENS, tokens) {
            let sequences: Vec<_> = chunk.iter().map(TokenIds::sequence).collect();
            let rewards = reward_training::rewards(&self.model, &sequences);
            rows.extend(rewards.map_err(|error| JudgeError::new(error.to_string()))?);
        }
        Ok(rows)
    }
}

/// Token ids of a prompt and a response.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct TokenIds {
    prompt: Vec<u32>,
    response: Vec<u32>,
}

impl TokenIds {
    fn sequence(&self) -> Sequence<'_> {
        Sequence {
            prompt: &self.prompt,
            completion: &self.response,
        }
    }
}

impl Judge for RewardModelJudge {
    fn name(&self) -> &str {
        match self.model.config().kind {
            RewardKind::BradleyTerry => "bradley-terry",
            RewardKind::Pairwise { .. } => "pairwise",
        }
    }

    fn version(&self) -> JudgeVersion {
        self.version
    }

    fn is_antisymmetric(&self) -> bool {
        true
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let scored = self.judge_scored(batch)?.into_iter();
        Ok(scored.map(|scored| scored.verdict).collect())
    }

    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<ScoredVerdict>, JudgeError> {
        // A response that is part of several comparisons is evaluated once.
        let mut ids = Deduplicated::default();
        let mut index = |prompt: &Prompt, completion: &Completion| {
            Ok::<usize, String>(ids.insert(self.encode(prompt, completion)?))
        };
        let pairs: Vec<Result<[usize; 2], String>> = batch
            .iter()
            .map(|c| Ok([index(c.prompt, c.first)?, index(c.prompt, c.second)?]))
            .collect();
        let rows = self.rewards(ids.items())?;
        let kind = self.model.config().kind;
        let verdict = |pair: Result<[usize; 2], String>| {
            // A pairwise model has no score of a single completion.
            let scores = match (kind, &pair) {
                (RewardKind::BradleyTerry, Ok(pair)) => Some(pair.map(|index| rows[index][0])),
                _ => None,
            };
            let p = pair.and_then(|[first, second]| {
                kind.probability(&rows[first], &rows[second])
                    .map_err(|_| "the model's scores are not finite".to_owned())
            });
            let verdict = match p {
                Ok(p) => Verdict::Preference(p),
                Err(reason) => Verdict::Abstained { reason },
            };
            ScoredVerdict { verdict, scores }
        };
        Ok(pairs.into_iter().map(verdict).collect())
    }
}

#[cfg(test)]
mod tests {
    use messages::Finish;
    use model::{Pooling, RewardConfig};

    use super::*;
    use crate::judge::fake::{abstained, completion, prompt};
    use crate::reward_training::TrainingData;
    use crate::reward_training::tests::{TinyModel, compared, settings, tiny_model};

    fn trained(tiny: &TinyModel, epochs: &str) -> RewardModel {
        let settings = settings(&["fit.head=pairwise", epochs]);
        let examples = compared(5, 6, 1.0);
        let data = TrainingData {
            examples: &examples,
            adversarial: &[],
            apo: &settings.apo,
        };
        reward_training::fit(&tiny.model, &settings.fit, data, messages::Seed(1), |_| {
            true
        })
        .unwrap()
    }

    fn p(verdict: &Verdict) -> f32 {
        match verdict {
            Verdict::Preference(p) => p.get(),
            Verdict::Abstained { reason } => panic!("{reason}"),
        }
    }

    #[test]
    fn a_trained_model_is_antisymmetric() {
        let tiny = tiny_model();
        let model = trained(&tiny, "fit.epochs=20");
        let mut judge = RewardModelJudge::new(model, JudgeVersion(3), JudgeTokenizer::Shared);
        assert_eq!(
            (judge.name(), judge.version()),
            ("pairwise", JudgeVersion(3))
        );
        let prompt = prompt();
        let [a, b, c] = [5, 6, 7].map(|token| completion("", &[token, 1]));
        let about = |first, second| Comparison {
            prompt: &prompt,
            first,
            second,
        };
        let verdicts = judge
            .judge(&[about(&a, &b), about(&b, &a), about(&a, &a), about(&a, &c)])
            .unwrap();
        assert!(p(&verdicts[0]) > 0.8, "{verdicts:?}");
        assert_eq!(p(&verdicts[0]) + p(&verdicts[1]), 1.0);
        assert_eq!(p(&verdicts[2]), 0.5);
        let alone = judge.judge(&[about(&a, &c)]).unwrap();
        assert!(
            (p(&alone[0]) - p(&verdicts[3])).abs() < 1e-6,
            "independent of the rest of the batch"
        );
    }

    #[test]
    fn a_model_with_its_own_tokenizer_reads_text() {
        let tiny = tiny_model();
        let model = trained(&tiny, "fit.epochs=1");
        let tokenizer = Box::new(tiny.folder.tokenizer.clone());
        let mut of_texts = RewardModelJudge::new(
            model.clone(),
            JudgeVersion(1),
            JudgeTokenizer::Own(tokenizer),
        );
        let mut of_tokens = RewardModelJudge::new(model, JudgeVersion(1), JudgeTokenizer::Shared);
        let mut prompt = prompt();
        // Ids of another vocabulary; the text is w0 w4.
        let (text, tokens) = ("w0 w4", vec![0, 4]);
        prompt.text = text.into();
        prompt.ids = vec![11; 3];
        let [a, b] = ["w5", "w6 w7"].map(|text| completion(text, &[11, 11, 11]));
        let comparison = Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        };
        let by_text = of_texts.judge(&[comparison]).unwrap();
        prompt.ids = tokens;
        let [a, b] = [&[5, 1][..], &[6, 7, 1]].map(|ids| completion("", ids));
        let comparison = Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        };
        assert_eq!(by_text, of_tokens.judge(&[comparison]).unwrap());
    }

    /// Tokens that a model with its own tokenizer reads, with this chat template or without one.
    fn encoded(
        template: Option<&str>,
        pooling: Pooling,
        prompt: &Prompt,
        response: &Completion,
    ) -> (Vec<u32>, Vec<u32>) {
        let tiny = tiny_model();
        if let Some(template) = template {
            let file = tiny.folder.path.join("chat_template.jinja");
            std::fs::write(file, template).unwrap();
        }
        let folder = model::ModelFolder::open(&tiny.folder.path, None).unwrap();
        let config = RewardConfig {
            pooling,
            ..RewardConfig::default()
        };
        let model = RewardModel::from_backbone(&tiny.model, config, messages::Seed(1)).unwrap();
        let tokenizer = JudgeTokenizer::Own(Box::new(folder.tokenizer));
        let judge = RewardModelJudge::new(model, JudgeVersion(1), tokenizer);
        let ids = judge.encode(prompt, response).unwrap();
        (ids.prompt, ids.response)
    }

    #[test]
    fn messages_are_rendered_with_the_judges_own_chat_template() {
        let template = Some("{% for m in messages %}w3 {{ m.content }} {% endfor %}w4");
        let mut prompt = prompt();
        // The policy's rendering, which must be ignored.
        prompt.text = "w9 w9".into();
        prompt.ids = vec![11; 3];
        let ended = completion(" w5", &[11, 11]);
        let cut = Completion {
            finish: Finish::Length,
            ..ended.clone()
        };
        let text = encoded(template, Pooling::Sum, &prompt, &ended);
        assert_eq!(text, (vec![9, 9], vec![5, 1]), "a text is no dialogue");
        prompt.dialogue = Some(messages::Dialogue::of_user("w0"));
        for (template, pooling, response, expected) in [
            (template, Pooling::Sum, &ended, (vec![3, 0, 4], vec![5, 1])),
            (template, Pooling::Sum, &cut, (vec![3, 0, 4], vec![5])),
            (template, Pooling::Mean, &cut, (vec![3, 0, 4], vec![5])),
            (template, Pooling::Last, &cut, (vec![3, 0, 4], vec![5, 1])),
            (None, Pooling::Last, &ended, (vec![0], vec![5, 1])),
        ] {
            assert_eq!(
                encoded(template, pooling, &prompt, response),
                expected,
                "{template:?} {pooling:?} {response:?}"
            );
        }
    }

    #[test]
    fn only_unreadable_completions_get_an_abstention() {
        let tiny = tiny_model();
        let mut judge = RewardModelJudge::new(
            trained(&tiny, "fit.epochs=1"),
            JudgeVersion(1),
            JudgeTokenizer::Shared,
        );
        let prompt = prompt();
        let (fine, empty) = (completion("", &[5, 1]), completion("", &[]));
        let (long, foreign) = (completion("", &[5; 32]), completion("", &[12]));
        let about = |second| Comparison {
            prompt: &prompt,
            first: &fine,
            second,
        };
        let verdicts = judge
            .judge(&[about(&empty), about(&fine), about(&long), about(&foreign)])
            .unwrap();
        assert_eq!(verdicts[0], abstained("the response is empty"));
        assert_eq!(p(&verdicts[1]), 0.5);
        let too_long = "prompt and response have 33 tokens, the model reads 32";
        assert_eq!(verdicts[2], abstained(too_long));
        let foreign = "token 12 is not in the model's vocabulary of 12";
        assert_eq!(verdicts[3], abstained(foreign));
    }

    #[test]
    fn nan_scores_are_an_abstention() {
        let tiny = tiny_model();
        let (weights, vars) = tiny.model.weights().trainable().unwrap();
        let norm = &vars["model.norm.weight"];
        norm.set(&(norm.as_tensor() * f64::NAN).unwrap()).unwrap();
        let broken = model::LanguageModel::new(tiny.folder.config.clone(), weights).unwrap();
        let config = trained(&tiny, "fit.epochs=1").config();
        let model = RewardModel::from_backbone(&broken, config, messages::Seed(1)).unwrap();
        let mut judge = RewardModelJudge::new(model, JudgeVersion(1), JudgeTokenizer::Shared);
        let (prompt, a, b) = (prompt(), completion("", &[5]), completion("", &[6]));
        let comparison = Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        };
        let verdicts = judge.judge(&[comparison]).unwrap();
        assert_eq!(verdicts, [abstained("the model's scores are not finite")]);
    }
}
