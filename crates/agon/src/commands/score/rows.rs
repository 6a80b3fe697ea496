//! Rows of tokens in, answers out: one JSON object a line. Which model is asked, and what, is not known
//! here.

use std::{
    io::{self, BufRead, Write},
    iter::Peekable,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use dataset::{Answered, Columns, DatasetError, Place};
use messages::PromptText;
use model::{ModelError, Tokenizer};
use serde::Serialize;

/// Tokens that are scored at once; a longer row is scored alone.
const TOKEN_BUDGET: usize = 4096;

/// A row as it was written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Given {
    /// As token ids.
    Ids(Vec<u32>),
    /// As a prompt and a completion.
    Text(PromptText, String),
}

/// What the model reads and what it is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    /// From 1.
    pub(super) line: usize,
    pub(super) prompt: Vec<u32>,
    pub(super) completion: Vec<u32>,
    /// Whether the completion's ids are news to whoever wrote the row.
    pub(super) form: Form,
}

/// How a row was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As token ids.
    Ids,
    /// As a prompt and a completion.
    Text,
}

impl Row {
    pub(super) fn tokens(&self) -> usize {
        self.prompt.len() + self.completion.len()
    }

    /// Whether a model of so many tokens and positions takes the row, of which it reads the first `read`
    /// tokens. What the model would refuse, it would refuse for the whole group.
    pub(super) fn fits(&self, read: usize, vocab: usize, positions: usize) -> Result<(), String> {
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

/// The lines of the file `path`, or of standard input, unpacked, and what to call them in errors.
pub(super) fn open_input(path: &Path) -> Result<(PathBuf, Box<dyn BufRead>), DatasetError> {
    if path.as_os_str() == "-" {
        let name = PathBuf::from("standard input");
        let input = dataset::unpacked(&name, io::stdin())?;
        return Ok((name, input));
    }
    Ok((path.to_owned(), dataset::open(path)?))
}

/// The rows of `input`, which errors call `name`, as `row` makes them of a line's number and content;
/// empty lines are passed over.
pub(super) fn read<'a>(
    name: &'a Path,
    input: impl BufRead + 'a,
    row: impl Fn(usize, Given) -> Result<Row, String> + 'a,
) -> impl Iterator<Item = Result<Row, DatasetError>> + 'a {
    input.lines().enumerate().filter_map(move |(index, text)| {
        let line = index + 1;
        let row = match text {
            Ok(text) if text.trim().is_empty() => return None,
            Ok(text) => given(&text).and_then(|given| row(line, given)),
            Err(error) => Err(format!("the line cannot be read: {error}")),
        };
        Some(row.map_err(|reason| refusal(name, line, reason)))
    })
}

fn given(text: &str) -> Result<Given, String> {
    let mut row = dataset::parse_row(text)?;
    // Whether the completion was wanted is no matter here.
    row.shift_remove("label");
    let is_there = |name| row.get(name).is_some_and(|value| !value.is_null());
    if let Some(ids) = row.get("ids").filter(|ids| !ids.is_null()) {
        if is_there("prompt") || is_there("completion") {
            return Err("a row has either \"ids\" or text, not both".into());
        }
        return serde_json::from_value(ids.clone())
            .map(Given::Ids)
            .map_err(|error| format!("\"ids\" is not a list of token ids: {error}"));
    }
    // Of a pair neither response is *the* one.
    if is_there("chosen") && !is_there("completion") {
        return Err(
            "a row of \"chosen\" and \"rejected\" has two responses: score each as a \"completion\"".into(),
        );
    }
    let columns = Columns::default();
    let Answered { prompt, answer } = dataset::Form::of(&row, &columns)
        .and_then(|form| form.answered())
        .map_err(|reason| {
            format!(
                "{reason}; a row is either {{\"ids\": [...]}} or {{\"prompt\": ..., \"completion\": \"...\"}}"
            )
        })?;
    Ok(Given::Text(prompt, answer))
}

/// How the completion of a row of text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// As it is written.
    Written,
    /// With the token that ends a completion, as one that ended by itself.
    Closed,
}

/// A row of a prompt and a completion in the tokens of a decoder.
pub(super) fn text_row(
    tokenizer: &Tokenizer,
    line: usize,
    (prompt, completion): (&PromptText, &str),
    ending: Ending,
) -> Result<Row, String> {
    let told = |error: ModelError| error.to_string();
    let prompt_ids = tokenizer.encode_prompt(prompt).map_err(told)?;
    let completion = match ending {
        Ending::Written => tokenizer.encode_completion(prompt, &prompt_ids, completion),
        Ending::Closed => tokenizer.encode_closed(prompt, &prompt_ids, completion),
    };
    let completion = completion.map_err(told)?;
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

pub(super) fn refusal(name: &Path, line: usize, reason: String) -> DatasetError {
    DatasetError::Row {
        path: name.to_owned(),
        place: Place::Line(line),
        reason,
    }
}

/// Writes what `answer` says of the rows, group by group.
pub(super) fn answer_all<A: Serialize>(
    rows: impl Iterator<Item = Result<Row, DatasetError>>,
    mut answer: impl FnMut(&[Row]) -> anyhow::Result<Vec<A>>,
) -> anyhow::Result<ExitCode> {
    let mut rows = rows.peekable();
    let mut output = io::stdout().lock();
    loop {
        let group = next_group(&mut rows, TOKEN_BUDGET)?;
        if group.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        write_lines(&mut output, &answer(&group)?)?;
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

pub(super) fn write_lines(
    output: &mut impl Write,
    answers: &[impl Serialize],
) -> anyhow::Result<()> {
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
    use super::*;

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
    fn columns_without_a_part_in_a_row_do_not_matter() {
        let text = || Ok(Given::Text(PromptText::Text("a".into()), "b".into()));
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
                Ok(Given::Ids(vec![1, 2])),
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
            match (given(row), expected) {
                (Err(error), Err(says)) => assert!(error.contains(says), "{error}"),
                (read, expected) => assert_eq!(read, expected.map_err(str::to_owned), "{row}"),
            }
        }
    }

    #[test]
    fn an_input_is_called_by_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.jsonl");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        let (name, input) = open_input(&path).unwrap();
        assert_eq!((name, input.lines().count()), (path, 2));
        let missing = open_input(Path::new("nowhere.jsonl")).err().unwrap();
        assert!(missing.to_string().contains("nowhere.jsonl"));
    }
}
