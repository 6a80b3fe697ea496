//! One score a row under a reward model, be it a decoder or an encoder.

use std::{io::BufRead, path::Path, process::ExitCode};

use anyhow::Context;
use messages::PromptText;
use model::{
    DType, Encoder, ModelError, RewardArchitecture, RewardFolder, RewardKind, RewardModel, Sequence,
};
use serde::Serialize;
use serde_json::Value;

use super::{
    Dtype, FoundModel,
    rows::{Ending, Form, Given, Row, answer_all, read, refusal, text_row},
};
use crate::{failure::Misuse, model_hub::Located};

pub(super) fn run(
    found: &FoundModel,
    ending: Ending,
    (name, input): (&Path, impl BufRead),
) -> anyhow::Result<ExitCode> {
    let scorer = Scorer::open(found)?;
    let rows = read(name, input, |line, given| scorer.row(line, given, ending));
    answer_all(rows, |rows| {
        let scores = scorer.scores(rows)?;
        let answers = rows.iter().zip(scores);
        let answers = answers.map(|(row, score)| {
            answer(score).map_err(|reason| refusal(name, row.line, reason).into())
        });
        answers.collect()
    })
}

/// A row of the output.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Answer {
    score: f32,
}

/// A model that gives one score.
enum Scorer {
    Decoder(Box<RewardFolder>, Box<RewardModel>),
    Encoder(Box<Encoder>),
}

impl Scorer {
    fn open(found: &FoundModel) -> anyhow::Result<Self> {
        let FoundModel { model, device, .. } = found;
        let path = &model.path;
        match RewardArchitecture::of(path)? {
            RewardArchitecture::Decoder => Ok(Self::decoder(model, found.dtype, device)?),
            RewardArchitecture::Encoder if found.dtype == Dtype::F32 => {
                Ok(Self::Encoder(Box::new(Encoder::load(path, device)?)))
            }
            RewardArchitecture::Encoder => {
                let path = path.display();
                let advice =
                    format!("{path} is an encoder, which computes in f32; leave --dtype out");
                Err(Misuse(advice).into())
            }
        }
    }

    fn decoder(
        located: &Located,
        dtype: Dtype,
        device: &model::Device,
    ) -> Result<Self, ModelError> {
        let folder = located.reward()?;
        if let RewardKind::Pairwise { .. } = folder.config.kind {
            return Err(ModelError::Malformed {
                path: located.path.clone(),
                reason: PAIRWISE.into(),
            });
        }
        let model = folder.model(DType::from(dtype), device, None)?;
        Ok(Self::Decoder(Box::new(folder), Box::new(model)))
    }

    fn row(&self, line: usize, given: Given, ending: Ending) -> Result<Row, String> {
        let row = match (self, given) {
            (_, Given::Ids(ids)) => tokens_row(line, ids, Form::Ids),
            (Self::Decoder(folder, _), Given::Text(prompt, completion)) => {
                let asked = (&prompt, completion.as_str());
                text_row(&folder.folder.tokenizer, line, asked, ending)?
            }
            (Self::Encoder(encoder), Given::Text(prompt, completion)) => {
                let text = format!("{}\n{completion}", plain(prompt)?);
                let ids = encoder.encode(&text).map_err(|error| error.to_string())?;
                tokens_row(line, ids, Form::Text)
            }
        };
        let (vocab, positions, least) = self.limits();
        if row.tokens() < least {
            let count = row.tokens();
            return Err(format!(
                "it has {count} tokens; at least {least} are needed to be scored"
            ));
        }
        row.fits(row.tokens(), vocab, positions)?;
        Ok(row)
    }

    /// Tokens of the vocabulary, positions, and the fewest tokens that can be scored.
    fn limits(&self) -> (usize, usize, usize) {
        match self {
            Self::Decoder(folder, _) => {
                let (trunk, likelihood) = (&folder.folder.config, folder.config.likelihood);
                // A likelihood needs a token to begin with.
                (
                    trunk.vocab_size,
                    trunk.max_positions,
                    1 + usize::from(likelihood),
                )
            }
            Self::Encoder(encoder) => (encoder.vocab_size(), encoder.max_positions(), 1),
        }
    }

    fn scores(&self, rows: &[Row]) -> anyhow::Result<Vec<f32>> {
        match self {
            Self::Decoder(_, model) => {
                let sequences: Vec<Sequence<'_>> = rows
                    .iter()
                    .map(|row| Sequence {
                        prompt: &row.prompt,
                        completion: &row.completion,
                    })
                    .collect();
                model
                    .score(&sequences)?
                    .flatten_all()
                    .and_then(|scores| scores.to_vec1())
                    .context("failed to read the scores from the device")
            }
            Self::Encoder(encoder) => {
                let ids: Vec<Vec<u32>> = rows.iter().map(|row| row.completion.clone()).collect();
                Ok(encoder.score_ids(&ids)?)
            }
        }
    }
}

/// What a pairwise model is told to.
const PAIRWISE: &str = "the model is pairwise: it gives no single score, only the odds of one response \
                        over another; let it judge a run as preference.judge.kind = \"pairwise\"";

/// A row without a prompt.
fn tokens_row(line: usize, ids: Vec<u32>, form: Form) -> Row {
    Row {
        line,
        prompt: Vec::new(),
        completion: ids,
        form,
    }
}

/// A prompt for a model without a chat template, as the `encoder` judge reads it.
fn plain(prompt: PromptText) -> Result<String, String> {
    let dialogue = match prompt {
        PromptText::Text(text) => return Ok(text),
        PromptText::Dialogue(dialogue) => dialogue,
    };
    let is_text = |part: &Value| part.is_string() || part["text"].is_string();
    let parts = dialogue
        .messages
        .iter()
        .flat_map(|message| match &message.content {
            Value::Array(parts) => parts.as_slice(),
            _ => &[],
        });
    match parts.into_iter().find(|part| !is_text(part)) {
        Some(part) => Err(format!("the content {part} is not text")),
        None => Ok(dialogue.transcript()),
    }
}

/// JSON has no NaN and no infinity: they are told as what they are, broken weights.
fn answer(score: f32) -> Result<Answer, String> {
    if score.is_finite() {
        Ok(Answer { score })
    } else {
        Err(format!(
            "the score is {score}; are the model's weights finite?"
        ))
    }
}

#[cfg(test)]
mod tests {
    use messages::Seed;
    use model::{Adapter, Device, LanguageModel, LoraConfig, ModelFolder, Pooling, RewardConfig};
    use playground::Bandit;
    use tempfile::TempDir;

    use super::*;

    /// A reward model with a fresh head on a bandit of three arms.
    fn reward(config: RewardConfig) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let bandit = Bandit::new(&[0.5, 0.3, 0.2]).unwrap();
        bandit.write_model(directory.path()).unwrap();
        let folder = ModelFolder::open(directory.path(), None).unwrap();
        let weights = folder.weights(DType::F32, &Device::Cpu).unwrap();
        let trunk = LanguageModel::new(folder.config.clone(), weights).unwrap();
        let model = RewardModel::from_trunk(&trunk, config, Seed(1)).unwrap();
        model.save(directory.path(), &folder).unwrap();
        directory
    }

    fn open(directory: &TempDir, dtype: Dtype) -> anyhow::Result<Scorer> {
        Scorer::open(&FoundModel {
            model: Located::at(directory.path().to_owned(), &|| false)?,
            adapter: None,
            device: Device::Cpu,
            dtype,
        })
    }

    fn answers(scorer: &Scorer, text: &str) -> Result<Vec<f32>, String> {
        let rows = read(Path::new("rows.jsonl"), text.as_bytes(), |line, given| {
            scorer.row(line, given, Ending::Written)
        });
        let rows: Result<Vec<Row>, _> = rows.collect();
        let rows = rows.map_err(|error| error.to_string())?;
        Ok(scorer.scores(&rows).unwrap())
    }

    #[test]
    fn both_forms_of_a_row_are_scored() {
        let config = RewardConfig {
            pooling: Pooling::Mean,
            likelihood: true,
            ..RewardConfig::default()
        };
        let directory = reward(config);
        let scorer = open(&directory, Dtype::F32).unwrap();
        let text = "{\"ids\": [0, 1]}\n\n{\"prompt\": \"arm0\", \"completion\": \" arm2\"}\n";
        let found = answers(&scorer, text).unwrap();
        let Scorer::Decoder(_, model) = &scorer else {
            panic!("a bandit is a decoder")
        };
        let sequences = [
            Sequence {
                prompt: &[],
                completion: &[0, 1],
            },
            Sequence {
                prompt: &[0],
                completion: &[2],
            },
        ];
        let expected = model.score(&sequences).unwrap().flatten_all().unwrap();
        assert_eq!(found, expected.to_vec1::<f32>().unwrap());
        assert!((found[0] - found[1]).abs() > 1e-3, "{found:?}");
    }

    #[test]
    fn a_completion_is_closed_where_that_is_asked_for() {
        let directory = reward(RewardConfig::default());
        let scorer = open(&directory, Dtype::F32).unwrap();
        let ids = |ending| {
            let asked = Given::Text(PromptText::Text("arm0".into()), " arm2".into());
            scorer.row(1, asked, ending).unwrap().completion
        };
        let Scorer::Decoder(folder, _) = &scorer else {
            panic!("a bandit is a decoder")
        };
        let end = folder.folder.tokenizer.stops().text_end();
        assert_eq!(ids(Ending::Written), [2]);
        assert_eq!(ids(Ending::Closed), [&[2][..], end.as_slice()].concat());
    }

    #[test]
    fn a_row_that_cannot_be_scored_is_named_with_its_line() {
        let config = RewardConfig {
            likelihood: true,
            ..RewardConfig::default()
        };
        let directories = [reward(RewardConfig::default()), reward(config)];
        let [plain, with_likelihood] = directories.each_ref().map(|d| open(d, Dtype::F32).unwrap());
        let long = format!("{{\"ids\": {:?}}}", vec![0; 17]);
        for (scorer, line, expected) in [
            (
                &plain,
                "{\"ids\": []}",
                "it has 0 tokens; at least 1 are needed",
            ),
            (
                &with_likelihood,
                "{\"ids\": [1]}",
                "it has 1 tokens; at least 2 are needed",
            ),
            (
                &plain,
                "{\"ids\": [0, 3]}",
                "token 3 is not in the model's vocabulary of 3",
            ),
            (
                &plain,
                long.as_str(),
                "it has 17 tokens, more than fit the model's 16",
            ),
            (
                &plain,
                "{\"prompt\": \"arm0\"}",
                "there is no column \"completion\"",
            ),
        ] {
            let refused = answers(scorer, &format!("{{\"ids\": [0, 1]}}\n{line}\n")).unwrap_err();
            let expected = format!("rows.jsonl, line 2: {expected}");
            assert!(refused.contains(&expected), "{refused:?} for {line}");
        }
        assert_eq!(answers(&plain, "{\"ids\": [1]}").unwrap().len(), 1);
    }

    #[test]
    fn a_pairwise_model_has_no_single_score() {
        let directory = reward(RewardConfig {
            kind: RewardKind::Pairwise { planes: 2 },
            ..RewardConfig::default()
        });
        let refused = open(&directory, Dtype::F32).err().unwrap().to_string();
        let place = directory.path().display().to_string();
        for part in [&*place, "no single score", "preference.judge.kind"] {
            assert!(refused.contains(part), "{part:?} is not in {refused}");
        }
    }

    /// An adapter may name a base that is nowhere: then the base is named beside it.
    #[test]
    fn an_adapter_is_scored_beside_the_model_that_is_named() {
        let (base, adapter) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let bandit = Bandit::new(&[0.5, 0.3, 0.2]).unwrap();
        bandit.write_model(base.path()).unwrap();
        let folder = ModelFolder::open(base.path(), None).unwrap();
        let weights = folder.weights(DType::F32, &Device::Cpu).unwrap();
        let trunk = LanguageModel::new(folder.config.clone(), weights).unwrap();
        let targets = LoraConfig::new(2, 4.0, 0.0, &["q_proj".to_owned()]);
        let fresh = Adapter::fresh(targets, &folder.config, Seed(2), &Device::Cpu).unwrap();
        let trunk = trunk.with_adapter(fresh).unwrap();
        let model = RewardModel::from_trunk(&trunk, RewardConfig::default(), Seed(1)).unwrap();
        let mut like = folder.clone();
        like.base_model.name = "/nowhere/at/all".into();
        model.save(adapter.path(), &like).unwrap();

        let refused = open(&adapter, Dtype::F32).err().unwrap().to_string();
        for part in [
            "\"/nowhere/at/all\"",
            "this one as the adapter",
            "base_model_name_or_path",
        ] {
            assert!(refused.contains(part), "{part:?} is not in {refused}");
        }
        let scorer = Scorer::open(&FoundModel {
            model: Located::beside(adapter.path().to_owned(), base.path().to_owned()),
            adapter: None,
            device: Device::Cpu,
            dtype: Dtype::F32,
        });
        let found = answers(&scorer.unwrap(), "{\"ids\": [0, 1]}\n").unwrap();
        let sequence = Sequence {
            prompt: &[],
            completion: &[0, 1],
        };
        let expected = model.score(&[sequence]).unwrap().flatten_all().unwrap();
        assert_eq!(found, expected.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn an_answer_is_one_number_and_never_nan() {
        let line = serde_json::to_string(&answer(-1.000_000_1).unwrap()).unwrap();
        assert_eq!(line, "{\"score\":-1.0000001}");
        for broken in [f32::NAN, f32::INFINITY] {
            assert!(answer(broken).unwrap_err().contains(&broken.to_string()));
        }
    }

    #[test]
    fn a_dialogue_for_an_encoder_is_what_was_said() {
        let said = |messages: serde_json::Value| plain(serde_json::from_value(messages).unwrap());
        let messages = serde_json::json!([
            {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."},
            {"role": "user", "content": "Where?"}
        ]);
        let turns = "user: Who?\n\nassistant: Tom.\n\nuser: Where?";
        assert_eq!(said(messages), Ok(turns.into()));
        assert_eq!(said("Who?".into()), Ok("Who?".into()));
        let picture = serde_json::json!([{"role": "user", "content": [{"type": "image"}]}]);
        assert!(said(picture).unwrap_err().contains("is not text"));
    }
}
