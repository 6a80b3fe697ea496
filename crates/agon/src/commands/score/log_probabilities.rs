//! The log-probability of every given token under a language model.

use std::{io::BufRead, path::Path, process::ExitCode};

use anyhow::Context;
use model::{LanguageModel, ModelFolder, RewardArchitecture, Sequence};
use serde::Serialize;

use super::{
    FoundModel,
    rows::{Ending, Form, Given, Row, answer_all, read, refusal, text_row},
};
use crate::failure::Misuse;

pub(super) fn run(
    found: &FoundModel,
    name: &Path,
    input: impl BufRead,
) -> anyhow::Result<ExitCode> {
    if RewardArchitecture::of(&found.model.path).is_ok() {
        let path = found.model.path.display();
        let advice =
            format!("{path} is a reward model, which gives no log-probabilities; add --reward");
        return Err(Misuse(advice).into());
    }
    let (folder, model) = found.open()?;
    let rows = read(name, input, |line, given| row(&folder, line, given));
    answer_all(rows, |rows| log_probabilities(&model, rows, name))
}

/// A row of the output.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Answer {
    logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<Vec<u32>>,
}

fn row(folder: &ModelFolder, line: usize, given: Given) -> Result<Row, String> {
    let row = match given {
        Given::Ids(ids) => ids_row(line, ids)?,
        Given::Text(prompt, completion) => {
            let asked = (&prompt, completion.as_str());
            text_row(&folder.tokenizer, line, asked, Ending::Written)?
        }
    };
    let config = &folder.config;
    // The last token is only predicted, never read.
    row.fits(row.tokens() - 1, config.vocab_size, config.max_positions)?;
    Ok(row)
}

/// Of token ids, the first is the prompt.
fn ids_row(line: usize, mut ids: Vec<u32>) -> Result<Row, String> {
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

#[cfg(test)]
mod tests {
    use model::{DType, Device};
    use playground::Bandit;
    use serde_json::Value;
    use tempfile::TempDir;

    use super::*;
    use crate::commands::score::rows::write_lines;

    /// Three arms with these probabilities after the token 0.
    fn bandit() -> (TempDir, ModelFolder, LanguageModel) {
        let directory = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.3, 0.2])
            .unwrap()
            .write_model(directory.path())
            .unwrap();
        let numbers = (DType::F32, &Device::Cpu);
        let (folder, model) = model::open_policy(directory.path(), None, None, numbers).unwrap();
        (directory, folder, model)
    }

    fn rows_of(folder: &ModelFolder, text: &[u8]) -> Vec<Result<Row, String>> {
        let rows = read(Path::new("rows.jsonl"), text, |line, given| {
            row(folder, line, given)
        });
        rows.map(|row| row.map_err(|error| error.to_string()))
            .collect()
    }

    #[test]
    fn both_forms_of_a_row_become_tokens() {
        let (_directory, folder, _) = bandit();
        // A byte order mark before the first row, and Python's NaN, do no harm.
        let text = "\u{feff}{\"ids\": [0, 1, 2], \"score\": NaN}\n\n\
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
        assert_eq!(rows_of(&folder, text.as_bytes()), rows);
    }

    #[test]
    fn a_row_that_cannot_be_scored_is_named_with_its_line() {
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
    fn the_log_probabilities_are_the_models() {
        let (_directory, folder, model) = bandit();
        let text = "{\"ids\": [0, 1]}\n{\"prompt\": \"arm0\", \"completion\": \" arm2\"}\n\
                    {\"ids\": [0, 0, 1]}\n";
        let rows: Vec<Row> = rows_of(&folder, text.as_bytes())
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
}
