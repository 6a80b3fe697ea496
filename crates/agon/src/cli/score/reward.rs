//! One score per row under a reward model, a decoder or an encoder.

use std::process::ExitCode;

use anyhow::Context;
use messages::PromptText;
use model::{
    DType, Encoder, ModelError, RewardArchitecture, RewardFolder, RewardKind, RewardModel, Sequence,
};
use serde::Serialize;
use serde_json::Value;

use crate::cli::{
    model_args::{DtypeArgument, LocatedModel},
    score::rows::{Eos, RowContent, RowFormat, RowInput, TokenRow, row_error, score_all, text_row},
};
use crate::exit_code::UsageError;

/// Scores all rows of `input` and writes the results to standard output.
pub(crate) fn run(located: &LocatedModel, eos: Eos, input: RowInput) -> anyhow::Result<ExitCode> {
    let scorer = Scorer::open(located)?;
    let (name, rows) = input.rows(|line, content| scorer.row(line, content, eos));
    score_all(rows, |rows| {
        let scores = rows.iter().zip(scorer.scores(rows)?);
        let scores = scores.map(|(row, score)| {
            output(score).map_err(|reason| row_error(&name, row.line, reason).into())
        });
        scores.collect()
    })
}

/// A line of the output.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct RewardScore {
    score: f32,
}

/// A reward model with one score per completion.
enum Scorer {
    Decoder(Box<RewardFolder>, Box<RewardModel>),
    Encoder(Box<Encoder>),
}

impl Scorer {
    fn open(located: &LocatedModel) -> anyhow::Result<Self> {
        let path = &located.location.path;
        match RewardArchitecture::of(path)? {
            RewardArchitecture::Decoder => Ok(Self::decoder(located)?),
            RewardArchitecture::Encoder if located.dtype == DtypeArgument::F32 => {
                let encoder = Encoder::load(path, &located.device)?;
                Ok(Self::Encoder(Box::new(encoder)))
            }
            RewardArchitecture::Encoder => {
                let path = path.display();
                let advice =
                    format!("{path} is an encoder, which computes in f32; leave --dtype out");
                Err(UsageError(advice).into())
            }
        }
    }

    fn decoder(located: &LocatedModel) -> Result<Self, ModelError> {
        let folder = located.location.reward()?;
        if let RewardKind::Pairwise { .. } = folder.config.kind {
            return Err(ModelError::Malformed {
                path: located.location.path.clone(),
                reason: PAIRWISE.into(),
            });
        }
        let model = folder.model(DType::from(located.dtype), &located.device, None)?;
        Ok(Self::Decoder(Box::new(folder), Box::new(model)))
    }

    fn row(&self, line: usize, content: RowContent, eos: Eos) -> Result<TokenRow, String> {
        let row = match (self, content) {
            (_, RowContent::Ids(ids)) => tokens_row(line, ids, RowFormat::Ids),
            (Self::Decoder(folder, _), RowContent::Text(prompt, completion)) => {
                text_row(&folder.folder.tokenizer, line, &prompt, &completion, eos)?
            }
            (Self::Encoder(encoder), RowContent::Text(prompt, completion)) => {
                let text = format!("{}\n{completion}", plain_text(prompt)?);
                let ids = encoder.encode(&text).map_err(|error| error.to_string())?;
                tokens_row(line, ids, RowFormat::Text)
            }
        };
        let (vocab, positions, min_tokens) = self.limits();
        if row.tokens() < min_tokens {
            let count = row.tokens();
            return Err(format!(
                "it has {count} tokens; at least {min_tokens} are needed to be scored"
            ));
        }
        row.check(row.tokens(), vocab, positions)?;
        Ok(row)
    }

    /// Size of the vocabulary, number of positions, and the smallest number of tokens that can be scored.
    fn limits(&self) -> (usize, usize, usize) {
        match self {
            Self::Decoder(folder, _) => {
                let (backbone, likelihood) = (&folder.folder.config, folder.config.likelihood);
                // A likelihood needs a first token to condition on.
                (
                    backbone.vocab_size,
                    backbone.max_positions,
                    1 + usize::from(likelihood),
                )
            }
            Self::Encoder(encoder) => (encoder.vocab_size(), encoder.max_positions(), 1),
        }
    }

    fn scores(&self, rows: &[TokenRow]) -> anyhow::Result<Vec<f32>> {
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
                    .rewards(&sequences)?
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

/// Error for a pairwise model.
const PAIRWISE: &str = "the model is pairwise: it gives no single score, only the odds of one response \
                        over another; let it judge a run as preference.judge.kind = \"pairwise\"";

/// A row without a prompt.
fn tokens_row(line: usize, ids: Vec<u32>, format: RowFormat) -> TokenRow {
    TokenRow {
        line,
        prompt: Vec::new(),
        completion: ids,
        format,
    }
}

/// A prompt as text without a chat template, as the `encoder` judge reads it.
fn plain_text(prompt: PromptText) -> Result<String, String> {
    let dialogue = match prompt {
        PromptText::Text(text) => return Ok(text),
        PromptText::Dialogue(dialogue) => dialogue,
    };
    let is_text = |part: &Value| part.is_string() || part["text"].is_string();
    let parts = dialogue
        .messages
        .iter()
        .flat_map(|message| match message.content() {
            Value::Array(parts) => parts.as_slice(),
            _ => &[],
        });
    match parts.into_iter().find(|part| !is_text(part)) {
        Some(part) => Err(format!("the content {part} is not text")),
        None => Ok(dialogue.transcript()),
    }
}

/// The line of output; fails on NaN and infinity, which JSON cannot represent.
fn output(score: f32) -> Result<RewardScore, String> {
    if score.is_finite() {
        Ok(RewardScore { score })
    } else {
        Err(format!(
            "the score is {score}; are the model's weights finite?"
        ))
    }
}

#[cfg(test)]
mod tests {
    use hub::CancelToken;
    use messages::Seed;
    use model::{Adapter, Device, LanguageModel, LoraConfig, ModelFolder, Pooling, RewardConfig};
    use playground::Bandit;
    use tempfile::TempDir;

    use super::*;
    use crate::{assembly::ModelLocation, cli::score::rows::read};

    /// A reward model with a new head on a bandit of three arms.
    fn reward(config: RewardConfig) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let bandit = Bandit::new(&[0.5, 0.3, 0.2]).unwrap();
        bandit.write_model(directory.path()).unwrap();
        let folder = ModelFolder::open(directory.path(), None).unwrap();
        let weights = folder.weights(DType::F32, &Device::Cpu).unwrap();
        let backbone = LanguageModel::new(folder.config.clone(), weights).unwrap();
        let model = RewardModel::from_backbone(&backbone, config, Seed(1)).unwrap();
        model.save(directory.path(), &folder).unwrap();
        directory
    }

    fn open(directory: &TempDir, dtype: DtypeArgument) -> anyhow::Result<Scorer> {
        let path = directory.path().to_owned();
        Scorer::open(&LocatedModel {
            location: ModelLocation::of_folder(path, &CancelToken::never())?,
            adapter: None,
            device: Device::Cpu,
            dtype,
        })
    }

    fn scores(scorer: &Scorer, text: &str) -> Result<Vec<f32>, String> {
        let columns = dataset::Columns::default();
        let rows = read(
            "rows.jsonl".into(),
            columns,
            text.as_bytes(),
            |line, content| scorer.row(line, content, Eos::Omit),
        );
        let rows: Result<Vec<TokenRow>, _> = rows.collect();
        let rows = rows.map_err(|error| error.to_string())?;
        Ok(scorer.scores(&rows).unwrap())
    }

    #[test]
    fn rows_of_both_formats_are_scored() {
        let config = RewardConfig {
            pooling: Pooling::Mean,
            likelihood: true,
            ..RewardConfig::default()
        };
        let directory = reward(config);
        let scorer = open(&directory, DtypeArgument::F32).unwrap();
        let text = "{\"ids\": [0, 1]}\n\n{\"prompt\": \"arm0\", \"completion\": \" arm2\"}\n";
        let found = scores(&scorer, text).unwrap();
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
        let expected = model.rewards(&sequences).unwrap().flatten_all().unwrap();
        assert_eq!(found, expected.to_vec1::<f32>().unwrap());
        assert!((found[0] - found[1]).abs() > 1e-3, "{found:?}");
    }

    #[test]
    fn the_end_of_text_token_is_appended_on_request() {
        let directory = reward(RewardConfig::default());
        let scorer = open(&directory, DtypeArgument::F32).unwrap();
        let ids = |eos| {
            let content = RowContent::Text(PromptText::Text("arm0".into()), " arm2".into());
            scorer.row(1, content, eos).unwrap().completion
        };
        let Scorer::Decoder(folder, _) = &scorer else {
            panic!("a bandit is a decoder")
        };
        let end = folder.folder.tokenizer.stops().text_end();
        assert_eq!(ids(Eos::Omit), [2]);
        assert_eq!(ids(Eos::Append), [&[2][..], end.as_slice()].concat());
    }

    #[test]
    fn errors_name_the_line_of_the_row() {
        let config = RewardConfig {
            likelihood: true,
            ..RewardConfig::default()
        };
        let directories = [reward(RewardConfig::default()), reward(config)];
        let [plain, with_likelihood] = directories
            .each_ref()
            .map(|d| open(d, DtypeArgument::F32).unwrap());
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
            let refused = scores(scorer, &format!("{{\"ids\": [0, 1]}}\n{line}\n")).unwrap_err();
            let expected = format!("rows.jsonl, line 2: {expected}");
            assert!(refused.contains(&expected), "{refused:?} for {line}");
        }
        assert_eq!(scores(&plain, "{\"ids\": [1]}").unwrap().len(), 1);
    }

    #[test]
    fn a_pairwise_model_has_no_single_score() {
        let directory = reward(RewardConfig {
            kind: RewardKind::Pairwise { planes: 2 },
            ..RewardConfig::default()
        });
        let refused = open(&directory, DtypeArgument::F32)
            .err()
            .unwrap()
            .to_string();
        let path = directory.path().display().to_string();
        for part in [&*path, "no single score", "preference.judge.kind"] {
            assert!(refused.contains(part), "{part:?} is not in {refused}");
        }
    }

    /// The base that an adapter names may be unavailable; then the command line names another.
    #[test]
    fn an_adapter_is_scored_with_the_given_base() {
        let (base, adapter) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let bandit = Bandit::new(&[0.5, 0.3, 0.2]).unwrap();
        bandit.write_model(base.path()).unwrap();
        let folder = ModelFolder::open(base.path(), None).unwrap();
        let weights = folder.weights(DType::F32, &Device::Cpu).unwrap();
        let backbone = LanguageModel::new(folder.config.clone(), weights).unwrap();
        let targets = LoraConfig::new(2, 4.0, 0.0, &["q_proj".to_owned()]);
        let fresh = Adapter::fresh(targets, &folder.config, Seed(2), &Device::Cpu).unwrap();
        let backbone = backbone.with_adapter(fresh).unwrap();
        let model =
            RewardModel::from_backbone(&backbone, RewardConfig::default(), Seed(1)).unwrap();
        let mut like = folder.clone();
        like.base_model.name = "/nowhere/at/all".into();
        model.save(adapter.path(), &like).unwrap();

        let refused = open(&adapter, DtypeArgument::F32)
            .err()
            .unwrap()
            .to_string();
        for part in [
            "\"/nowhere/at/all\"",
            "this one as the adapter",
            "base_model_name_or_path",
        ] {
            assert!(refused.contains(part), "{part:?} is not in {refused}");
        }
        let scorer = Scorer::open(&LocatedModel {
            location: ModelLocation::with_base(adapter.path().to_owned(), base.path().to_owned()),
            adapter: None,
            device: Device::Cpu,
            dtype: DtypeArgument::F32,
        });
        let found = scores(&scorer.unwrap(), "{\"ids\": [0, 1]}\n").unwrap();
        let sequence = Sequence {
            prompt: &[],
            completion: &[0, 1],
        };
        let expected = model.rewards(&[sequence]).unwrap().flatten_all().unwrap();
        assert_eq!(found, expected.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn output_is_one_score_and_never_nan() {
        let line = serde_json::to_string(&output(-1.000_000_1).unwrap()).unwrap();
        assert_eq!(line, "{\"score\":-1.0000001}");
        for broken in [f32::NAN, f32::INFINITY] {
            assert!(output(broken).unwrap_err().contains(&broken.to_string()));
        }
    }

    #[test]
    fn dialogues_for_encoders_become_transcripts() {
        let text =
            |messages: serde_json::Value| plain_text(serde_json::from_value(messages).unwrap());
        let messages = serde_json::json!([
            {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."},
            {"role": "user", "content": "Where?"}
        ]);
        let turns = "user: Who?\n\nassistant: Tom.\n\nuser: Where?";
        assert_eq!(text(messages), Ok(turns.into()));
        assert_eq!(text("Who?".into()), Ok("Who?".into()));
        let picture = serde_json::json!([{"role": "user", "content": [{"type": "image"}]}]);
        assert!(text(picture).unwrap_err().contains("is not text"));
    }
}
