//! `agon score`: the log-probability of every given token. Rows in, rows out.
//!
//! Rows are read, grouped and answered group by group, so that a file of any size passes through, and
//! answers keep the order of the rows. Reading knows nothing of models ([`Source`]); what is asked of one
//! is [`log_probabilities`] alone. A row that cannot be answered is an error with its line, never a gap.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    iter::Peekable,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use dataset::DatasetError;
use flate2::read::MultiGzDecoder;
use messages::PromptText;
use model::{
    DType, Device, LanguageModel, ModelConfig, ModelError, ModelFolder, Sequence, Tokenizer,
};
use serde::Serialize;
use serde_json::Value;

/// Tokens that are scored at once; a longer row is scored alone.
const TOKEN_BUDGET: usize = 4096;

/// Log-probabilities of given tokens under a model, from JSONL to JSONL.
///
/// A row {"ids": [...]} is answered by {"logprobs": [...]} with one entry less: entry t is
/// log p(ids[t+1] | ids[..=t]), in nats. A row {"prompt": ..., "completion": "..."}, the prompt being
/// text or a list of messages, is answered by {"logprobs": [...], "ids": [...]} with one entry for
/// every token of the completion; no end-of-text token is added. Other columns are ignored. One answer
/// a row, in their order; a row that cannot be answered ends the command with its line.
///
/// Example: echo '{"prompt": "Once upon", "completion": " a time"}' | agon score --model models/base
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The rows, one JSON object a line; a name that ends in `.gz` is unpacked; `-` is standard input.
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
}

// No doc comment: clap would show it in place of the command's own.
#[derive(clap::Args)]
pub(crate) struct ModelArguments {
    /// The model: a Hugging Face folder, such as a run's checkpoint.
    #[arg(long = "model", value_name = "DIR")]
    path: PathBuf,
    /// Where to compute: `cpu`, `cuda`, `cuda:N` or `metal`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The numbers to compute in.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
}

/// A number format for weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Dtype {
    /// 32-bit floating point.
    F32,
    /// 16-bit brain floating point.
    Bf16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
        }
    }
}

impl ModelArguments {
    /// The model that is named.
    pub(crate) fn open(&self) -> Result<(ModelFolder, LanguageModel), ModelError> {
        open(&self.path, self.dtype.into(), &model::device(&self.device)?)
    }
}

/// The model in the folder `path`, its weights as `dtype` on `device`.
pub(crate) fn open(
    path: &Path,
    dtype: DType,
    device: &Device,
) -> Result<(ModelFolder, LanguageModel), ModelError> {
    let folder = ModelFolder::open(path, None)?;
    let weights = folder.weights(dtype, device)?;
    let model = LanguageModel::new(folder.config.clone(), weights)?;
    Ok((folder, model))
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (name, input) = open_input(&arguments.input)?;
    let (folder, model) = arguments.model.open()?;
    let source = Source {
        name: &name,
        tokenizer: &folder.tokenizer,
        config: &folder.config,
    };
    let mut rows = source.rows(input).peekable();
    let mut output = io::stdout().lock();
    loop {
        let group = next_group(&mut rows, TOKEN_BUDGET)?;
        if group.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        let answers = log_probabilities(&model, &group, &name)?;
        write_lines(&mut output, &answers)?;
    }
}

/// The lines of the file `path`, or of standard input, and what to call them in errors.
fn open_input(path: &Path) -> Result<(PathBuf, Box<dyn BufRead>), DatasetError> {
    if path.as_os_str() == "-" {
        return Ok(("standard input".into(), Box::new(io::stdin().lock())));
    }
    let file = File::open(path).map_err(|source| DatasetError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let packed = path.extension().is_some_and(|extension| extension == "gz");
    let input: Box<dyn BufRead> = if packed {
        Box::new(BufReader::new(MultiGzDecoder::new(file)))
    } else {
        Box::new(BufReader::new(file))
    };
    Ok((path.to_owned(), input))
}

/// What rows are read from, and the model whose tokens they are to be.
struct Source<'a> {
    name: &'a Path,
    tokenizer: &'a Tokenizer,
    config: &'a ModelConfig,
}

/// What the model reads, what it is asked about, and how it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    /// From 1.
    line: usize,
    prompt: Vec<u32>,
    completion: Vec<u32>,
    form: Form,
}

/// How a row was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As token ids, of which the first is the prompt.
    Ids,
    /// As a prompt and a completion, whose ids the answer tells.
    Text,
}

/// A row of the output.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Answer {
    logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<Vec<u32>>,
}

impl Source<'_> {
    /// The rows of `input`; empty lines are passed over.
    fn rows(&self, input: impl BufRead) -> impl Iterator<Item = Result<Row, DatasetError>> {
        input.lines().enumerate().filter_map(|(index, text)| {
            let line = index + 1;
            let row = match text {
                Ok(text) if text.trim().is_empty() => return None,
                Ok(text) => self.row(line, &text),
                Err(error) => Err(format!("the line cannot be read: {error}")),
            };
            Some(row.map_err(|reason| refusal(self.name, line, reason)))
        })
    }

    fn row(&self, line: usize, text: &str) -> Result<Row, String> {
        let row: Value =
            serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
        let row = match (row.get("ids"), row.get("prompt"), row.get("completion")) {
            (Some(ids), None, None) => ids_row(line, ids)?,
            (None, Some(prompt), Some(completion)) => self.text_row(line, prompt, completion)?,
            _ => {
                let forms = "a row is either {\"ids\": [...]} or {\"prompt\": ..., \"completion\": \"...\"}";
                return Err(forms.into());
            }
        };
        self.fits(&row)?;
        Ok(row)
    }

    fn text_row(&self, line: usize, prompt: &Value, completion: &Value) -> Result<Row, String> {
        let text = completion
            .as_str()
            .ok_or_else(|| format!("\"completion\" is not text but {completion}"))?;
        let prompt: PromptText = serde_json::from_value(prompt.clone())
            .map_err(|error| format!("\"prompt\" cannot be used: {error}"))?;
        let tokens = |error: ModelError| error.to_string();
        let prompt_ids = self.tokenizer.encode_prompt(&prompt).map_err(tokens)?;
        let completion = self
            .tokenizer
            .encode_completion(&prompt, &prompt_ids, text)
            .map_err(tokens)?;
        if completion.is_empty() {
            return Err("\"completion\" has no token to score".into());
        }
        Ok(Row {
            line,
            prompt: prompt_ids,
            completion,
            form: Form::Text,
        })
    }

    /// What the model would refuse, it would refuse for the whole group.
    fn fits(&self, row: &Row) -> Result<(), String> {
        let (vocab, positions) = (self.config.vocab_size, self.config.max_positions);
        let mut ids = row.prompt.iter().chain(&row.completion);
        if let Some(id) = ids.find(|&&id| id as usize >= vocab) {
            return Err(format!(
                "token {id} is not in the model's vocabulary of {vocab}"
            ));
        }
        // The last token is only predicted, never read.
        let read = row.tokens() - 1;
        if read > positions {
            return Err(format!(
                "it has {} tokens, more than fit the model's {positions} positions",
                row.tokens()
            ));
        }
        Ok(())
    }
}

fn ids_row(line: usize, ids: &Value) -> Result<Row, String> {
    let mut ids: Vec<u32> = serde_json::from_value(ids.clone())
        .map_err(|error| format!("\"ids\" is not a list of token ids: {error}"))?;
    if ids.len() < 2 {
        let count = ids.len();
        return Err(format!(
            "\"ids\" has {count} tokens; at least 2 are needed: one to read, one to score"
        ));
    }
    let completion = ids.split_off(1);
    Ok(Row {
        line,
        prompt: ids,
        completion,
        form: Form::Ids,
    })
}

impl Row {
    fn tokens(&self) -> usize {
        self.prompt.len() + self.completion.len()
    }
}

fn refusal(name: &Path, line: usize, reason: String) -> DatasetError {
    DatasetError::Row {
        path: name.to_owned(),
        line,
        reason,
    }
}

/// The next rows that have at most `budget` tokens together, or one that is longer; none at the end. An
/// error waits until the rows before it have been taken.
fn next_group<E>(
    rows: &mut Peekable<impl Iterator<Item = Result<Row, E>>>,
    budget: usize,
) -> Result<Vec<Row>, E> {
    let Some(first) = rows.next().transpose()? else {
        return Ok(Vec::new());
    };
    let mut tokens = first.tokens();
    let mut group = vec![first];
    while let Some(Ok(row)) =
        rows.next_if(|next| matches!(next, Ok(row) if tokens + row.tokens() <= budget))
    {
        tokens += row.tokens();
        group.push(row);
    }
    Ok(group)
}

/// One answer a row: log π of each of its completion's tokens. `name` is what the rows were read from.
fn log_probabilities(
    model: &LanguageModel,
    rows: &[Row],
    name: &Path,
) -> anyhow::Result<Vec<Answer>> {
    let sequences: Vec<Sequence<'_>> = rows
        .iter()
        .map(|row| Sequence {
            prompt: &row.prompt,
            completion: &row.completion,
        })
        .collect();
    let mut scored = model
        .score(&sequences)?
        .logp
        .to_vec1::<f32>()
        .context("failed to read the log-probabilities from the device")?
        .into_iter();
    rows.iter()
        .map(|row| {
            let logprobs = scored.by_ref().take(row.completion.len()).collect();
            Ok(answer(row, logprobs).map_err(|reason| refusal(name, row.line, reason))?)
        })
        .collect()
}

/// JSON has no NaN and no infinity: they are told as what they are, broken weights.
fn answer(row: &Row, logprobs: Vec<f32>) -> Result<Answer, String> {
    if let Some(place) = logprobs.iter().position(|logp| !logp.is_finite()) {
        return Err(format!(
            "the log-probability of token {} ({place} of those scored, from 0) is {}; are the model's weights finite?",
            row.completion[place], logprobs[place]
        ));
    }
    let ids = (row.form == Form::Text).then(|| row.completion.clone());
    Ok(Answer { logprobs, ids })
}

fn write_lines(output: &mut impl Write, answers: &[Answer]) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for answer in answers {
        serde_json::to_writer(&mut lines, answer)?;
        lines.push(b'\n');
    }
    output
        .write_all(&lines)
        .and_then(|()| output.flush())
        .context("failed to write to standard output")
}

#[cfg(test)]
mod tests {
    use flate2::{Compression, write::GzEncoder};
    use playground::Bandit;
    use tempfile::TempDir;

    use super::*;

    /// Three arms with these probabilities after the token 0.
    fn bandit() -> (TempDir, ModelFolder, LanguageModel) {
        let directory = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.3, 0.2])
            .unwrap()
            .write_model(directory.path())
            .unwrap();
        let (folder, model) = open(directory.path(), DType::F32, &Device::Cpu).unwrap();
        (directory, folder, model)
    }

    fn read(folder: &ModelFolder, text: &[u8]) -> Vec<Result<Row, String>> {
        let source = Source {
            name: Path::new("rows.jsonl"),
            tokenizer: &folder.tokenizer,
            config: &folder.config,
        };
        source
            .rows(text)
            .map(|row| row.map_err(|error| error.to_string()))
            .collect()
    }

    #[test]
    fn both_forms_of_a_row_become_tokens() {
        let (_directory, folder, _) = bandit();
        let text = "{\"ids\": [0, 1, 2], \"attention_mask\": [1, 1, 1]}\n\n\
                    {\"prompt\": \"arm0\", \"completion\": \" arm2 arm1\"}\n";
        let rows = [
            (1, vec![0], vec![1, 2], Form::Ids),
            (3, vec![0], vec![2, 1], Form::Text),
        ]
        .map(|(line, prompt, completion, form)| {
            Ok(Row {
                line,
                prompt,
                completion,
                form,
            })
        });
        assert_eq!(read(&folder, text.as_bytes()), rows);
    }

    #[test]
    fn a_row_that_cannot_be_scored_is_named_with_its_line() {
        let (_directory, folder, _) = bandit();
        let long = format!("{{\"ids\": {:?}}}", vec![0; 18]);
        let cases = [
            ("{\"ids\": [0, 1]", "it is not JSON"),
            ("[0, 1]", "a row is either"),
            ("{\"prompt\": \"arm0\"}", "a row is either"),
            (
                "{\"ids\": [0, 1], \"prompt\": \"arm0\", \"completion\": \"arm1\"}",
                "a row is either",
            ),
            (
                "{\"ids\": [0]}",
                "\"ids\" has 1 tokens; at least 2 are needed",
            ),
            (
                "{\"ids\": [0, -1]}",
                "\"ids\" is not a list of token ids: invalid value: integer `-1`",
            ),
            (
                "{\"ids\": [0, 3]}",
                "token 3 is not in the model's vocabulary of 3",
            ),
            (
                long.as_str(),
                "it has 18 tokens, more than fit the model's 16 positions",
            ),
            (
                "{\"prompt\": 1, \"completion\": \"arm1\"}",
                "\"prompt\" cannot be used: a prompt is a string",
            ),
            (
                "{\"prompt\": \"arm0\", \"completion\": [1]}",
                "\"completion\" is not text but [1]",
            ),
            (
                "{\"prompt\": \"arm0\", \"completion\": \"\"}",
                "\"completion\" has no token to score",
            ),
        ];
        for (line, expected) in cases {
            let text = format!("{{\"ids\": [0, 1]}}\n{line}\n");
            let refused = read(&folder, text.as_bytes()).remove(1).unwrap_err();
            let expected = format!("rows.jsonl, line 2: {expected}");
            assert!(refused.contains(&expected), "{refused:?} for {line}");
        }
        let refused = read(&folder, b"\xff\n").remove(0).unwrap_err();
        assert!(
            refused.contains("line 1: the line cannot be read"),
            "{refused}"
        );
    }

    #[test]
    fn rows_are_grouped_in_order_within_the_budget() {
        let row = |line: usize, tokens: usize| Row {
            line,
            prompt: vec![0],
            completion: vec![0; tokens - 1],
            form: Form::Ids,
        };
        let groups = |lengths: &[usize], budget: usize| {
            let rows = lengths.iter().enumerate();
            let mut rows = rows
                .map(|(line, &tokens)| Ok::<_, ()>(row(line, tokens)))
                .peekable();
            let mut groups = Vec::new();
            loop {
                let group = next_group(&mut rows, budget).unwrap();
                if group.is_empty() {
                    return groups;
                }
                groups.push(group.iter().map(|row| row.line).collect::<Vec<_>>());
            }
        };
        assert_eq!(groups(&[], 4), Vec::<Vec<usize>>::new());
        assert_eq!(groups(&[2, 2, 2], 4), [vec![0, 1], vec![2]]);
        assert_eq!(groups(&[9, 2, 9, 2], 4), [[0], [1], [2], [3]]);
        assert_eq!(groups(&[3, 2, 2, 3], 5), [vec![0, 1], vec![2, 3]]);

        let mut broken = [Ok(row(1, 2)), Err("torn")].into_iter().peekable();
        assert_eq!(next_group(&mut broken, 8), Ok(vec![row(1, 2)]));
        assert_eq!(next_group(&mut broken, 8), Err("torn"));
    }

    #[test]
    fn the_log_probabilities_are_the_models() {
        let (_directory, folder, model) = bandit();
        let text = "{\"ids\": [0, 1]}\n{\"prompt\": \"arm0\", \"completion\": \" arm2\"}\n\
                    {\"ids\": [0, 0, 1]}\n";
        let rows: Vec<Row> = read(&folder, text.as_bytes())
            .into_iter()
            .map(Result::unwrap)
            .collect();
        let answers = log_probabilities(&model, &rows, Path::new("rows")).unwrap();
        for (answer, p) in answers.iter().zip([0.3f32, 0.2, 0.5]) {
            assert!((answer.logprobs[0] - p.ln()).abs() < 1e-5, "{answer:?}");
        }
        let lengths: Vec<usize> = answers.iter().map(|a| a.logprobs.len()).collect();
        assert_eq!(lengths, [1, 1, 2]);
        let alone = log_probabilities(&model, &rows[2..], Path::new("rows")).unwrap();
        assert!((alone[0].logprobs[1] - answers[2].logprobs[1]).abs() < 1e-6);
    }

    #[test]
    fn an_answer_keeps_every_digit_and_has_no_nan() {
        let row = Row {
            line: 1,
            prompt: vec![0],
            completion: vec![2, 1],
            form: Form::Text,
        };
        let logprobs = vec![-0.1f32, -1.000_000_1];
        let told = answer(&row, logprobs.clone()).unwrap();
        let mut line = Vec::new();
        write_lines(&mut line, &[told]).unwrap();
        let line = String::from_utf8(line).unwrap();
        assert_eq!(line, "{\"logprobs\":[-0.1,-1.0000001],\"ids\":[2,1]}\n");
        let back: Value = serde_json::from_str(&line).unwrap();
        let back: Vec<f32> = serde_json::from_value(back["logprobs"].clone()).unwrap();
        assert_eq!(back, logprobs);

        for broken in [f32::NAN, f32::NEG_INFINITY] {
            let refused = answer(&row, vec![-0.5, broken]).unwrap_err();
            assert!(
                refused.contains("token 1") && refused.contains(&broken.to_string()),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_packed_file_reads_as_the_plain_one() {
        let directory = tempfile::tempdir().unwrap();
        let (plain, packed) = (
            directory.path().join("a.jsonl"),
            directory.path().join("a.jsonl.gz"),
        );
        std::fs::write(&plain, "one\ntwo\n").unwrap();
        let mut encoder = GzEncoder::new(File::create(&packed).unwrap(), Compression::fast());
        encoder.write_all(b"one\ntwo\n").unwrap();
        encoder.finish().unwrap();
        for path in [plain, packed] {
            let (name, input) = open_input(&path).unwrap();
            let lines: Vec<String> = input.lines().map(Result::unwrap).collect();
            assert_eq!(
                (lines.as_slice(), &name),
                (&["one", "two"].map(String::from)[..], &path)
            );
        }
        let missing = open_input(Path::new("nowhere.jsonl")).err().unwrap();
        assert!(missing.to_string().contains("nowhere.jsonl"));
        let (name, _) = open_input(Path::new("-")).unwrap();
        assert_eq!(name, Path::new("standard input"));
    }
}
