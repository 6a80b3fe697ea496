//! `agon golden`: golden answers to prompts, written by a stronger local model.
//!
//! Rows in, rows out: each row of a prompts file gets a column with the model's answer, so that the file
//! serves where one with golden answers is asked for. An answer that is cut off is no golden one.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use dataset::{Column, Columns, DatasetError, Form, Row};
use messages::{Dialogue, Finish, PromptText, Seed};
use mistral::{Chat, MistralError, Source};
use model::SamplingSettings;
use serde_json::Value;

use crate::failure::Misuse;

/// Golden answers to prompts, written by a stronger local model, for the adversarial game (APO) and RPO.
///
/// Reads a file of prompts, as prompts.path does, has a model answer each of them, and writes every row
/// again as a line of JSON with the answer in a column of its own. Name that file with prompts.path and the
/// column with prompts.golden_column. A dialogue goes through the model's chat template; a text is continued
/// as it stands, or with --chat is one message of a user. A row whose answer is empty or reaches
/// --max-new-tokens is left out and counted. mistral.rs computes, on the CPU: the build needs
/// `--features mistral`.
///
/// Example: agon golden --model models/strong.gguf --chat --prompts prompts.jsonl --output golden.jsonl
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The model: a Hugging Face folder or a .gguf file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// A tokenizer.json instead of the model's own.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// A .jinja file instead of the model's own chat template.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Quantise a folder's weights as they are loaded: `q8_0`, `q4k`, ...
    #[arg(long, value_name = "TYPE")]
    isq: Option<String>,
    /// The prompts: a file, a folder of shards or a glob, in any form of docs/data.md.
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// The column of the prompts.
    #[arg(long, value_name = "NAME", default_value = "prompt")]
    prompt_column: String,
    /// The column of the answers.
    #[arg(long, value_name = "NAME", default_value = "golden")]
    golden_column: String,
    /// Where the rows go; a file that is there is not written over.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Send each text as a user's message through the model's chat template.
    #[arg(long)]
    chat: bool,
    /// The longest answer, in tokens.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Repeats the same answers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How long one answer may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    mistral::is_built()?;
    arguments.check()?;
    let rows = arguments.rows()?;
    let source = arguments.source();
    let patience = Duration::from_secs(arguments.timeout);
    let chat = Chat::open(&source, patience)?;
    let talks = |(_, prompt): &(Value, PromptText)| matches!(prompt, PromptText::Dialogue(_));
    if rows.iter().any(talks) && !chat.has_chat_template() {
        return Err(MistralError::NoTemplate {
            path: source.path,
            setting: "--chat-template",
        }
        .into());
    }
    let partial = arguments.output.with_added_extension("partial");
    let kept = arguments
        .write(&chat, &rows, &partial)?
        .with_context(|| format!("failed to write {}", partial.display()))?;
    let output = arguments.output.display();
    fs::rename(&partial, &arguments.output).with_context(|| format!("failed to write {output}"))?;
    note!(
        "wrote {kept} golden answers to {output}; {} prompts were left out: their answers were empty or longer than {} tokens",
        rows.len() - kept,
        arguments.max_new_tokens
    );
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    /// What no type can say.
    fn check(&self) -> Result<(), Misuse> {
        let output = self.output.display();
        let requirements = [
            (
                self.max_new_tokens > 0,
                "--max-new-tokens must be at least 1".to_owned(),
            ),
            (
                self.temperature >= 0.0 && self.temperature.is_finite(),
                "--temperature must not be negative".to_owned(),
            ),
            (
                self.prompt_column != self.golden_column,
                "--golden-column must not be the prompts' column".to_owned(),
            ),
            (
                !self.output.exists(),
                format!("{output} is there already: name another file with --output"),
            ),
        ];
        match requirements.into_iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err(Misuse(message)),
            None => Ok(()),
        }
    }

    fn source(&self) -> Source {
        Source {
            path: self.model.clone(),
            tokenizer: self.tokenizer.clone(),
            chat_template: self.chat_template.clone(),
            isq: self.isq.clone(),
        }
    }

    /// The rows and what is asked in each.
    fn rows(&self) -> Result<Vec<(Value, PromptText)>, DatasetError> {
        let columns = Columns {
            prompt: Column::named(&self.prompt_column, "--prompt-column"),
            ..Columns::default()
        };
        let asked = |Row {
                         source,
                         columns: row,
                     }: Row| {
            let prompt = Form::of(&row, &columns).and_then(|form| form.prompt());
            let prompt = prompt.map_err(|reason| source.refuse(reason))?;
            Ok((Value::Object(row), self.sent(prompt)))
        };
        let rows = dataset::read_rows(&self.prompts)?;
        rows.into_iter().map(asked).collect()
    }

    fn sent(&self, prompt: PromptText) -> PromptText {
        match prompt {
            PromptText::Text(text) if self.chat => PromptText::Dialogue(Dialogue::of_user(&text)),
            other => other,
        }
    }

    fn sampling(&self) -> SamplingSettings {
        let plain = SamplingSettings::plain(self.max_new_tokens);
        if self.temperature > 0.0 {
            SamplingSettings {
                temperature: self.temperature,
                ..plain
            }
        } else {
            SamplingSettings { top_k: 1, ..plain }
        }
    }

    /// Has every prompt answered and writes the rows that have a golden answer. The outer error is the
    /// model's, the inner one the file's.
    fn write(
        &self,
        chat: &Chat,
        rows: &[(Value, PromptText)],
        path: &Path,
    ) -> Result<io::Result<usize>, MistralError> {
        let mut file = match File::create(path) {
            Ok(file) => BufWriter::new(file),
            Err(error) => return Ok(Err(error)),
        };
        let (sampling, mut kept) = (self.sampling(), 0);
        for (number, (row, prompt)) in (0..).zip(rows) {
            let seed = Seed(self.seed).derive(number);
            let answer = chat.answer(prompt, (&sampling, seed), 0)?;
            let golden = golden(prompt, &answer.text);
            if answer.finish != Finish::EndOfText || golden.is_empty() {
                continue;
            }
            let mut row = row.clone();
            row[&self.golden_column] = golden.into();
            if let Err(error) = writeln!(file, "{row}") {
                return Ok(Err(error));
            }
            kept += 1;
        }
        Ok(file.flush().map(|()| kept))
    }
}

/// The golden answer in what the model said. The space that parts it from a text it continues is a part of
/// it.
fn golden<'a>(prompt: &PromptText, said: &'a str) -> &'a str {
    match prompt {
        PromptText::Text(_) => said.trim_end(),
        PromptText::Dialogue(_) => said.trim(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_golden_answer_keeps_the_space_that_parts_it_from_its_prompt() {
        let text = PromptText::Text("The cat sat on".into());
        let dialogue = PromptText::Dialogue(Dialogue::of_user("Hi"));
        assert_eq!(golden(&text, " the floor.\n"), " the floor.");
        assert_eq!(golden(&text, " \n"), "");
        assert_eq!(golden(&dialogue, " Hello.\n"), "Hello.");
    }
}
