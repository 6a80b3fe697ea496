//! Log-probability of every given token under a language model.

use std::{path::Path, process::ExitCode};

use anyhow::Context;
use model::{AdapterFolder, LanguageModel, ModelFolder, RewardArchitecture, Sequence};
use serde::Serialize;

use crate::cli::{
    model_args::LocatedModel,
    score::rows::{Eos, RowContent, RowFormat, RowInput, TokenRow, row_error, score_all, text_row},
};
use crate::exit_code::UsageError;

/// Scores all rows of `input` and writes the results to standard output.
pub(crate) fn run(located: &LocatedModel, input: RowInput) -> anyhow::Result<ExitCode> {
    let path = &located.location.path;
    // An adapter that names no task may be of either model.
    let is_language_adapter = AdapterFolder::is_at(path) && AdapterFolder::open(path).is_ok();
    if !is_language_adapter && RewardArchitecture::of(path).is_ok() {
        let path = path.display();
        let advice =
            format!("{path} is a reward model, which gives no log-probabilities; add --reward");
        return Err(UsageError(advice).into());
    }
    let (folder, model) = located.open()?;
    let (name, rows) = input.rows(|line, content| row(&folder, line, content));
    score_all(rows, |rows| log_probabilities(&model, rows, &name))
}

/// A line of the output.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct LogProbabilities {
    logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<Vec<u32>>,
}

fn row(folder: &ModelFolder, line: usize, content: RowContent) -> Result<TokenRow, String> {
    let row = match content {
        RowContent::Ids(ids) => ids_row(line, ids)?,
        RowContent::Text(prompt, completion) => {
            text_row(&folder.tokenizer, line, &prompt, &completion, Eos::Omit)?
        }
    };
    let config = &folder.config;
    // The last token is only predicted, never read.
    row.check(row.tokens() - 1, config.vocab_size, config.max_positions)?;
    Ok(row)
}

/// A row of token ids; the first is the prompt.
fn ids_row(line: usize, mut ids: Vec<u32>) -> Result<TokenRow, String> {
    if ids.len() < 2 {
        let count = ids.len();
        return Err(format!(
            "\"ids\" has {count} tokens; at least 2 are needed: one to read, one to score"
        ));
    }
    let completion = ids.split_off(1);
    Ok(TokenRow {
        line,
        prompt: ids,
        completion,
        format: RowFormat::Ids,
    })
}

/// Log-probabilities of each row's completion. `name` is the name of the input in errors.
fn log_probabilities(
    model: &LanguageModel,
    rows: &[TokenRow],
    name: &Path,
) -> anyhow::Result<Vec<LogProbabilities>> {
    let sequences: Vec<Sequence<'_>> = rows
        .iter()
        .map(|row| Sequence {
            prompt: &row.prompt,
            completion: &row.completion,
        })
        .collect();
    let mut scored = model
        .logprobs(&sequences)?
        .logp
        .to_vec1::<f32>()
        .context("failed to read the log-probabilities from the device")?
        .into_iter();
    rows.iter()
        .map(|row| {
            let logprobs = scored.by_ref().take(row.completion.len()).collect();
            Ok(output(row, logprobs).map_err(|reason| row_error(name, row.line, reason))?)
        })
        .collect()
}

/// The line of output for a row; fails on NaN and infinity, which JSON cannot represent.
fn output(row: &TokenRow, logprobs: Vec<f32>) -> Result<LogProbabilities, String> {
    if let Some(index) = logprobs.iter().position(|logp| !logp.is_finite()) {
        return Err(format!(
            "the log-probability of token {} ({index} of those scored, from 0) is {}; are the model's weights finite?",
            row.completion[index], logprobs[index]
        ));
    }
    let ids = (row.format == RowFormat::Text).then(|| row.completion.clone());
    Ok(LogProbabilities { logprobs, ids })
}

#[cfg(test)]
mod tests {
    use model::{DType, Device};
    use playground::Bandit;
    use serde_json::Value;
    use tempfile::TempDir;

    use super::*;
    use crate::cli::score::rows::{read, write_lines};

    /// A bandit with three arms, which follow token 0.
    fn bandit() -> (TempDir, ModelFolder, LanguageModel) {
        let directory = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.3, 0.2])
            .unwrap()
            .write_model(directory.path())
            .unwrap();
        let opened = model::open_policy(directory.path(), None, None, DType::F32, &Device::Cpu);
        let (folder, model) = opened.unwrap();
        (directory, folder, model)
    }

    fn rows_of(folder: &ModelFolder, text: &[u8]) -> Vec<Result<TokenRow, String>> {
        let columns = dataset::Columns::default();
        let rows = read("rows.jsonl".into(), columns, text, |line, content| {
            row(folder, line, content)
        });
        rows.map(|row| row.map_err(|error| error.to_string()))
            .collect()
    }

    #[test]
    fn rows_of_both_formats_are_encoded() {
        let (_directory, folder, _) = bandit();
        // A byte order mark and Python's NaN are accepted.
        let text = "\u{feff}{\"ids\": [0, 1, 2], \"score\": NaN}\n\n\
                    {\"prompt\": \"arm0\", \"completion\": \" arm2 arm1\"}\n";
        let rows = [
            (1, vec![0], vec![1, 2], RowFormat::Ids),
            (3, vec![0], vec![2, 1], RowFormat::Text),
        ]
        .map(|(line, prompt, completion, format)| {
            Ok(TokenRow {
                line,
                prompt,
                completion,
                format,
            })
        });
        assert_eq!(rows_of(&folder, text.as_bytes()), rows);
    }

    #[test]
    fn errors_name_the_line_of_the_row() {
        let (_directory, folder, _) = bandit();
        let long = format!("{{\"ids\": {:?}}}", vec![0; 18]);
        let cases = [
            ("{\"ids\": [0, 1]", "column 14: not JSON: EOF"),
            ("[0, 1]", "a row must be a JSON object"),
            (
                "{\"prompt\": \"arm0\"}",
                "there is no column \"completion\"",
            ),
            (
                "{\"prompt\": \"arm0\", \"chosen\": \"arm1\", \"rejected\": \"arm2\"}",
                "a row of \"chosen\" and \"rejected\" has two responses",
            ),
            (
                "{\"ids\": [0, 1], \"prompt\": \"arm0\", \"completion\": \"arm1\"}",
                "a row has either",
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
                "column \"prompt\": 1 is neither text nor messages",
            ),
            (
                "{\"prompt\": \"arm0\", \"completion\": [1]}",
                "column \"completion\": turn 1: 1 is not a message",
            ),
            (
                "{\"prompt\": \"arm0\", \"completion\": \"\"}",
                "\"completion\" has no token to score",
            ),
        ];
        for (line, expected) in cases {
            let text = format!("{{\"ids\": [0, 1]}}\n{line}\n");
            let refused = rows_of(&folder, text.as_bytes()).remove(1).unwrap_err();
            let expected = format!("rows.jsonl, line 2: {expected}");
            assert!(refused.contains(&expected), "{refused:?} for {line}");
        }
        let refused = rows_of(&folder, b"\xff\n").remove(0).unwrap_err();
        assert!(
            refused.contains("line 1: the line cannot be read"),
            "{refused}"
        );
    }

    #[test]
    fn log_probabilities_match_the_bandits() {
        let (_directory, folder, model) = bandit();
        let text = "{\"ids\": [0, 1]}\n{\"prompt\": \"arm0\", \"completion\": \" arm2\"}\n\
                    {\"ids\": [0, 0, 1]}\n";
        let rows: Vec<TokenRow> = rows_of(&folder, text.as_bytes())
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
    fn output_keeps_every_digit_and_has_no_nan() {
        let row = TokenRow {
            line: 1,
            prompt: vec![0],
            completion: vec![2, 1],
            format: RowFormat::Text,
        };
        let logprobs = vec![-0.1f32, -1.000_000_1];
        let scored = output(&row, logprobs.clone()).unwrap();
        let mut line = Vec::new();
        write_lines(&mut line, &[scored]).unwrap();
        let line = String::from_utf8(line).unwrap();
        assert_eq!(line, "{\"logprobs\":[-0.1,-1.0000001],\"ids\":[2,1]}\n");
        let back: Value = serde_json::from_str(&line).unwrap();
        let back: Vec<f32> = serde_json::from_value(back["logprobs"].clone()).unwrap();
        assert_eq!(back, logprobs);

        for broken in [f32::NAN, f32::NEG_INFINITY] {
            let refused = output(&row, vec![-0.5, broken]).unwrap_err();
            assert!(
                refused.contains("token 1") && refused.contains(&broken.to_string()),
                "{refused}"
            );
        }
    }
}
