//! A decoder preference model as a judge: Bradley–Terry or pairwise, fitted or ready-made.

use std::sync::Once;

use messages::{Completion, JudgeVersion, Prompt, PromptText};
use model::{RewardKind, RewardModel, Sequence, Tokenizer};

use super::{Comparison, Judge, Scored, Verdict};
use crate::{Closing, JudgeError, distinct::Distinct, fit, texts::readable};

/// Sequences that are scored at once.
const SEQUENCES: usize = 256;

/// A preference model that judges.
pub struct Learned {
    model: RewardModel,
    version: JudgeVersion,
    reads: Reads,
    /// Says once that dialogues are read as plain text.
    without_template: Once,
}

/// What a preference model reads.
pub enum Reads {
    /// The policy's tokens: its vocabulary is the policy's.
    Tokens,
    /// Messages and text, through a tokenizer and a chat template of its own.
    Text(Box<Tokenizer>),
}

impl Learned {
    /// A judge of this version.
    #[must_use]
    pub fn new(model: RewardModel, version: JudgeVersion, reads: Reads) -> Self {
        Self {
            model,
            version,
            reads,
            without_template: Once::new(),
        }
    }

    /// The tokens of a prompt and of a response to it, or why the model cannot read them.
    fn read(&self, prompt: &Prompt, completion: &Completion) -> Result<Ids, String> {
        let ids = match &self.reads {
            Reads::Tokens => (prompt.ids.clone(), completion.ids.clone()),
            Reads::Text(tokenizer) => self.own_tokens(tokenizer, prompt, completion)?,
        };
        let (length, most) = (
            ids.0.len() + ids.1.len(),
            self.model.trunk().config().max_positions,
        );
        let vocabulary = self.model.trunk().config().vocab_size;
        let mut all = ids.0.iter().chain(&ids.1);
        if let Some(id) = all.find(|&&id| id as usize >= vocabulary) {
            return Err(format!(
                "token {id} is not in the model's vocabulary of {vocabulary}"
            ));
        }
        if ids.1.is_empty() {
            return Err("the response is empty".into());
        }
        if length > most {
            return Err(format!(
                "prompt and response have {length} tokens, the model reads {most}"
            ));
        }
        Ok(ids)
    }

    /// What was asked and answered in the tokens of `tokenizer`: a dialogue by its own chat template, and the
    /// token that ends a response where the response ended by itself or the model needs it.
    fn own_tokens(
        &self,
        tokenizer: &Tokenizer,
        prompt: &Prompt,
        completion: &Completion,
    ) -> Result<Ids, String> {
        if prompt.dialogue.is_some() && !tokenizer.has_chat_template() {
            self.without_template.call_once(|| {
                tracing::warn!(
                    judge = self.name(),
                    "the preference model has no chat template: it reads dialogues as plain text, turn by turn"
                );
            });
        }
        let asked = readable(tokenizer, PromptText::from(prompt));
        let ids = tokenizer.encode_prompt(&asked).map_err(|e| e.to_string())?;
        let response = match Closing::of(self.model.config()).closes(completion.finish) {
            true => tokenizer.encode_closed(&asked, &ids, &completion.text),
            false => tokenizer.encode_completion(&asked, &ids, &completion.text),
        };
        Ok((ids, response.map_err(|e| e.to_string())?))
    }

    fn scores(&self, ids: &[Ids]) -> Result<Vec<Vec<f32>>, JudgeError> {
        let mut rows = Vec::with_capacity(ids.len());
        for part in ids.chunks(SEQUENCES) {
            let sequences: Vec<_> = part
                .iter()
                .map(|(prompt, completion)| Sequence { prompt, completion })
                .collect();
            let scored = fit::features(&self.model, &sequences);
            rows.extend(scored.map_err(|error| JudgeError::new(error.to_string()))?);
        }
        Ok(rows)
    }
}

type Ids = (Vec<u32>, Vec<u32>);

impl Judge for Learned {
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

    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Scored>, JudgeError> {
        // Every response is read once, in however many comparisons it stands.
        let mut ids = Distinct::default();
        let mut place = |prompt: &Prompt, completion: &Completion| {
            Ok::<usize, String>(ids.place(self.read(prompt, completion)?))
        };
        let asked: Vec<Result<(usize, usize), String>> = batch
            .iter()
            .map(|c| Ok((place(c.prompt, c.first)?, place(c.prompt, c.second)?)))
            .collect();
        let rows = self.scores(ids.items())?;
        let kind = self.model.config().kind;
        let verdict = |asked: Result<(usize, usize), String>| {
            // A pairwise model has no score of one completion alone.
            let scores = match (kind, &asked) {
                (RewardKind::BradleyTerry, Ok((first, second))) => {
                    Some([rows[*first][0], rows[*second][0]])
                }
                _ => None,
            };
            let answer = asked.and_then(|(first, second)| {
                kind.probability(&rows[first], &rows[second])
                    .map_err(|_| "the model's scores are not finite".to_owned())
            });
            let verdict = match answer {
                Ok(p) => Verdict::Preference(p),
                Err(reason) => Verdict::Abstained { reason },
            };
            Scored { verdict, scores }
        };
        Ok(asked.into_iter().map(verdict).collect())
    }
}

#[cfg(test)]
mod tests {
    use messages::Finish;
    use model::{Pooling, RewardConfig};

    use super::*;
    use crate::fit::{
        Material,
        tests::{Tiny, against, settings, tiny},
    };
    use crate::judge::fake::{abstained, completion, prompt};

    fn fitted(tiny: &Tiny, epochs: &str) -> RewardModel {
        let settings = settings(&["fit.head=pairwise", epochs]);
        let examples = against(5, 6, 1.0);
        let material = Material {
            examples: &examples,
            contests: &[],
            apo: &settings.apo,
        };
        fit::fit(
            &tiny.model,
            &settings.fit,
            material,
            messages::Seed(1),
            |_| true,
        )
        .unwrap()
    }

    fn p(verdict: &Verdict) -> f32 {
        match verdict {
            Verdict::Preference(p) => p.get(),
            Verdict::Abstained { reason } => panic!("{reason}"),
        }
    }

    #[test]
    fn a_model_judges_as_it_was_fitted_and_exactly_the_other_way_round() {
        let tiny = tiny();
        let model = fitted(&tiny, "fit.epochs=20");
        let mut judge = Learned::new(model, JudgeVersion(3), Reads::Tokens);
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
            "whatever else is asked"
        );
    }

    #[test]
    fn a_model_with_words_of_its_own_reads_text() {
        let tiny = tiny();
        let model = fitted(&tiny, "fit.epochs=1");
        let tokenizer = Box::new(tiny.folder.tokenizer.clone());
        let mut of_texts = Learned::new(model.clone(), JudgeVersion(1), Reads::Text(tokenizer));
        let mut of_tokens = Learned::new(model, JudgeVersion(1), Reads::Tokens);
        let mut prompt = prompt();
        // The tokens of another vocabulary; the text says w0 w4.
        let (text, tokens) = ("w0 w4", vec![0, 4]);
        prompt.text = text.into();
        prompt.ids = vec![11; 3];
        let [a, b] = ["w5", "w6 w7"].map(|text| completion(text, &[11, 11, 11]));
        let asked = Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        };
        let by_text = of_texts.judge(&[asked]).unwrap();
        prompt.ids = tokens;
        let [a, b] = [&[5, 1][..], &[6, 7, 1]].map(|ids| completion("", ids));
        let asked = Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        };
        assert_eq!(by_text, of_tokens.judge(&[asked]).unwrap());
    }

    /// What a model with a tokenizer of its own reads: with this chat template, or without one.
    fn read_of(
        (template, pooling): (Option<&str>, Pooling),
        prompt: &Prompt,
        response: &Completion,
    ) -> Ids {
        let tiny = tiny();
        if let Some(template) = template {
            let file = tiny.folder.path.join("chat_template.jinja");
            std::fs::write(file, template).unwrap();
        }
        let folder = model::ModelFolder::open(&tiny.folder.path, None).unwrap();
        let config = RewardConfig {
            pooling,
            ..RewardConfig::default()
        };
        let model = RewardModel::from_trunk(&tiny.model, config, messages::Seed(1)).unwrap();
        let reads = Reads::Text(Box::new(folder.tokenizer));
        let judge = Learned::new(model, JudgeVersion(1), reads);
        judge.read(prompt, response).unwrap()
    }

    #[test]
    fn messages_are_read_by_the_judges_own_chat_template() {
        let template = Some("{% for m in messages %}w3 {{ m.content }} {% endfor %}w4");
        let mut asked = prompt();
        // The policy's rendering, which is not to be read.
        asked.text = "w9 w9".into();
        asked.ids = vec![11; 3];
        let ended = completion(" w5", &[11, 11]);
        let cut = Completion {
            finish: Finish::Length,
            ..ended.clone()
        };
        let read = |how, asked: &_, response| read_of(how, asked, response);
        let text = read((template, Pooling::Sum), &asked, &ended);
        assert_eq!(text, (vec![9, 9], vec![5, 1]), "a text is no dialogue");
        asked.dialogue = Some(messages::Dialogue::of_user("w0"));
        for (how, response, expected) in [
            (
                (template, Pooling::Sum),
                &ended,
                (vec![3, 0, 4], vec![5, 1]),
            ),
            ((template, Pooling::Sum), &cut, (vec![3, 0, 4], vec![5])),
            ((template, Pooling::Mean), &cut, (vec![3, 0, 4], vec![5])),
            ((template, Pooling::Last), &cut, (vec![3, 0, 4], vec![5, 1])),
            ((None, Pooling::Last), &ended, (vec![0], vec![5, 1])),
        ] {
            assert_eq!(
                read(how, &asked, response),
                expected,
                "{how:?} {response:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_read_is_abstained_from_alone() {
        let tiny = tiny();
        let mut judge = Learned::new(
            fitted(&tiny, "fit.epochs=1"),
            JudgeVersion(1),
            Reads::Tokens,
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
    fn scores_that_are_no_numbers_are_abstained_from() {
        let tiny = tiny();
        let (weights, vars) = tiny.model.weights().trainable().unwrap();
        let norm = &vars["model.norm.weight"];
        norm.set(&(norm.as_tensor() * f64::NAN).unwrap()).unwrap();
        let broken = model::LanguageModel::new(tiny.folder.config.clone(), weights).unwrap();
        let config = fitted(&tiny, "fit.epochs=1").config();
        let model = RewardModel::from_trunk(&broken, config, messages::Seed(1)).unwrap();
        let mut judge = Learned::new(model, JudgeVersion(1), Reads::Tokens);
        let (prompt, a, b) = (prompt(), completion("", &[5]), completion("", &[6]));
        let asked = Comparison {
            prompt: &prompt,
            first: &a,
            second: &b,
        };
        let verdicts = judge.judge(&[asked]).unwrap();
        assert_eq!(verdicts, [abstained("the model's scores are not finite")]);
    }
}
