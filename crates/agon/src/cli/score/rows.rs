//! Rows of tokens in, scores out: one JSON object per line. How rows are scored, this module does not know.

use std::{
    io::{self, BufRead, Write},
    iter::Peekable,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use dataset::{Columns, DatasetError, PromptAnswer, RowPosition};
use messages::PromptText;
use model::{ModelError, Tokenizer};
use serde::Serialize;

/// Largest number of tokens in a group; a longer row is scored alone.
const TOKEN_BUDGET: usize = 4096;

/// Content of a row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum RowContent {
    /// Token ids.
    Ids(Vec<u32>),
    /// A prompt and a completion.
    Text(PromptText, String),
}

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenRow {
    /// Line number, from 1.
    pub(crate) line: usize,
    /// Tokens that are read.
    pub(crate) prompt: Vec<u32>,
    /// Tokens that are scored.
    pub(crate) completion: Vec<u32>,
    /// Format of the input; the ids of a text are part of the output.
    pub(crate) format: RowFormat,
}

/// Format of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowFormat {
    /// Token ids.
    Ids,
    /// A prompt and a completion.
    Text,
}

impl TokenRow {
    /// Number of tokens.
    pub(crate) fn tokens(&self) -> usize {
        self.prompt.len() + self.completion.len()
    }

    /// Checks the row against the model's vocabulary and positions, given that the model reads the first `read`
    /// tokens: an error of the model would fail the whole group.
    pub(crate) fn check(&self, read: usize, vocab: usize, positions: usize) -> Result<(), String> {
        let mut ids = self.prompt.iter().chain(&self.completion);
        if let Some(id) = ids.find(|&&id| id as usize >= vocab) {
            return Err(format!(
                "token {id} is not in the model's vocabulary of {vocab}"
            ));
        }
        if read > positions {
            return Err(format!(
                "it has {} tokens, more than fit the model's {positions} positions",
                self.tokens()
            ));
        }
        Ok(())
    }
}

/// A decompressed input and its name in errors.
pub(crate) struct RowInput {
    /// Path of the file, or `standard input`.
    pub(crate) name: PathBuf,
    /// Columns of the rows.
    pub(crate) columns: Columns,
    /// The lines.
    pub(crate) lines: Box<dyn BufRead>,
}

impl RowInput {
    /// Opens the file `path` with these columns; `-` is standard input.
    pub(crate) fn open(path: &Path, columns: Columns) -> Result<Self, DatasetError> {
        if path.as_os_str() == "-" {
            let name = PathBuf::from("standard input");
            let lines = dataset::unpacked(&name, io::stdin())?;
            return Ok(Self {
                name,
                columns,
                lines,
            });
        }
        Ok(Self {
            name: path.to_owned(),
            columns,
            lines: dataset::open(path)?,
        })
    }

    /// The rows, as [`read`] reads them, and the name of the input.
    pub(crate) fn rows(
        self,
        row: impl Fn(usize, RowContent) -> Result<TokenRow, String>,
    ) -> (
        PathBuf,
        impl Iterator<Item = Result<TokenRow, DatasetError>>,
    ) {
        let Self {
            name,
            columns,
            lines,
        } = self;
        (name.clone(), read(name, columns, lines, row))
    }
}

/// The rows of `input` with these columns, named `name` in errors; `row` converts a line number and content. Empty lines
/// are skipped.
pub(crate) fn read(
    name: PathBuf,
    columns: Columns,
    input: impl BufRead,
    row: impl Fn(usize, RowContent) -> Result<TokenRow, String>,
) -> impl Iterator<Item = Result<TokenRow, DatasetError>> {
    let lines = dataset::row_lines(input);
    lines.enumerate().filter_map(move |(index, text)| {
        let line = index + 1;
        let row = match text {
            Ok(text) if text.trim().is_empty() => return None,
            Ok(text) => parse(&text, &columns).and_then(|content| row(line, content)),
            Err(error) => Err(error),
        };
        Some(row.map_err(|reason| row_error(&name, line, reason)))
    })
}

fn parse(text: &str, columns: &Columns) -> Result<RowContent, String> {
    let mut row = dataset::parse_row(text)?;
    // The label of an unpaired preference does not matter here.
    row.shift_remove("label");
    let is_there = |name| row.get(name).is_some_and(|value| !value.is_null());
    if let Some(ids) = row.get("ids").filter(|ids| !ids.is_null()) {
        if is_there("prompt") || is_there("completion") {
            return Err("a row has either \"ids\" or text, not both".into());
        }
        return serde_json::from_value(ids.clone())
            .map(RowContent::Ids)
            .map_err(|error| format!("\"ids\" is not a list of token ids: {error}"));
    }
    // A pair has no single completion.
    if is_there("chosen") && !is_there("completion") {
        return Err(
            "a row of \"chosen\" and \"rejected\" has two responses: score each as a \"completion\"".into(),
        );
    }
    let PromptAnswer { prompt, answer } = dataset::ParsedRow::of(&row, columns)
        .and_then(|form| form.answered())
        .map_err(|reason| {
            format!(
                "{reason}; a row is either {{\"ids\": [...]}} or {{\"prompt\": ..., \"completion\": \"...\"}}"
            )
        })?;
    Ok(RowContent::Text(prompt, answer))
}

/// Whether an end-of-text token follows a completion of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Eos {
    /// No token is added.
    Omit,
    /// The end-of-text token is appended, as after a completion that a model finished.
    Append,
}

/// Encodes a prompt and a completion as tokens of a decoder.
pub(crate) fn text_row(
    tokenizer: &Tokenizer,
    line: usize,
    prompt: &PromptText,
    completion: &str,
    eos: Eos,
) -> Result<TokenRow, String> {
    let message = |error: ModelError| error.to_string();
    let prompt_ids = tokenizer.encode_prompt(prompt).map_err(message)?;
    let completion = match eos {
        Eos::Omit => tokenizer.encode_completion(prompt, &prompt_ids, completion),
        Eos::Append => tokenizer.encode_closed(prompt, &prompt_ids, completion),
    };
    let completion = completion.map_err(message)?;
    if completion.is_empty() {
        return Err("\"completion\" has no token to score".into());
    }
    Ok(TokenRow {
        line,
        prompt: prompt_ids,
        completion,
        format: RowFormat::Text,
    })
}

/// Error of a row.
pub(crate) fn row_error(name: &Path, line: usize, reason: String) -> DatasetError {
    DatasetError::Row {
        path: name.to_owned(),
        position: RowPosition::Line(line),
        reason,
    }
}

/// Scores the rows with `score` and writes the results, group by group.
pub(crate) fn score_all<S: Serialize>(
    rows: impl Iterator<Item = Result<TokenRow, DatasetError>>,
    mut score: impl FnMut(&[TokenRow]) -> anyhow::Result<Vec<S>>,
) -> anyhow::Result<ExitCode> {
    let mut rows = rows.peekable();
    let mut output = io::stdout().lock();
    loop {
        let group = next_group(&mut rows, TOKEN_BUDGET)?;
        if group.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        write_lines(&mut output, &score(&group)?)?;
    }
}

/// The next rows with at most `budget` tokens in total, or a single longer one; empty at the end. An error is returned
/// after the rows before it.
fn next_group<E>(
    rows: &mut Peekable<impl Iterator<Item = Result<TokenRow, E>>>,
    budget: usize,
) -> Result<Vec<TokenRow>, E> {
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

/// Writes each score as a line of JSON.
pub(crate) fn write_lines(
    output: &mut impl Write,
    scores: &[impl Serialize],
) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for score in scores {
        serde_json::to_writer(&mut lines, score)?;
        lines.push(b'\n');
    }
    output
        .write_all(&lines)
        .and_then(|()| output.flush())
        .context("failed to write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_in_order_within_the_budget() {
        let row = |line: usize, tokens: usize| TokenRow {
            line,
            prompt: vec![0],
            completion: vec![0; tokens - 1],
            format: RowFormat::Ids,
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

        let mut broken = [Ok(row(1, 2)), Err("corrupt")].into_iter().peekable();
        assert_eq!(next_group(&mut broken, 8), Ok(vec![row(1, 2)]));
        assert_eq!(next_group(&mut broken, 8), Err("corrupt"));
    }

    #[test]
    fn null_columns_and_labels_are_ignored() {
        let text = || Ok(RowContent::Text(PromptText::Text("a".into()), "b".into()));
        for (row, expected) in [
            (
                r#"{"prompt": "a", "completion": "b", "label": false}"#,
                text(),
            ),
            (r#"{"ids": null, "prompt": "a", "completion": "b"}"#, text()),
            (
                r#"{"chosen": null, "prompt": "a", "completion": "b"}"#,
                text(),
            ),
            (
                r#"{"ids": [1, 2], "prompt": null, "completion": null}"#,
                Ok(RowContent::Ids(vec![1, 2])),
            ),
            (
                r#"{"ids": [1], "prompt": "a"}"#,
                Err("either \"ids\" or text"),
            ),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#,
                Err("two responses"),
            ),
        ] {
            match (parse(row, &Columns::default()), expected) {
                (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
                (parsed, expected) => assert_eq!(parsed, expected.map_err(str::to_owned), "{row}"),
            }
        }
    }

    #[test]
    fn inputs_and_their_errors_have_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.jsonl");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        let input = RowInput::open(&path, Columns::default()).unwrap();
        assert_eq!((input.name, input.lines.lines().count()), (path, 2));
        let missing = RowInput::open(Path::new("nowhere.jsonl"), Columns::default())
            .err()
            .unwrap();
        assert!(missing.to_string().contains("nowhere.jsonl"));
    }
}
