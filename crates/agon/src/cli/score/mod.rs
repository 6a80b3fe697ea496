//! `agon score`: log-probabilities or reward scores of given tokens, from JSONL to JSONL.
//!
//! Rows are read, scored and written in groups, so that files of any size can be processed; the output has the order of
//! the input ([`rows`]). The score is the log-probability of every token ([`log_probabilities`]) or one reward
//! ([`reward`]). A row that cannot be scored is an error with its line, never a gap.

mod log_probabilities;
mod reward;
mod rows;

use std::{path::PathBuf, process::ExitCode};

use dataset::Columns;

use crate::cli::model_args::ModelArguments;

/// Score given tokens under a language model or a reward model, from JSONL to JSONL.
///
/// The output for a row {"ids": [...]} is {"logprobs": [...]} with one entry fewer: entry t is
/// log p(ids[t+1] | ids[..=t]), in nats. The output for a row {"prompt": ..., "completion": "..."}, where the
/// prompt is text or a list of messages, is {"logprobs": [...], "ids": [...]} with one entry for every token of
/// the completion; no end-of-text token is added. Other columns are ignored. There is one line of output per row,
/// in the same order; a row that cannot be scored is an error that names its line.
///
/// With --reward the output for the same rows is {"score": ...}, computed by a reward model: a decoder
/// (...ForSequenceClassification of Llama, Mistral, Qwen2 or Qwen3, or one trained by Agon), or an encoder
/// (DeBERTa-v2 and -v3, ModernBERT). "ids" are then scored as they are; an encoder reads prompt and completion as
/// one text, separated by a new line. For a decoder, a completion of text has no end-of-text token; the judge of
/// a run reads one after completions that ended with it, and so does --closed.
///
/// Example: echo '{"prompt": "Once upon", "completion": " a time"}' | agon score --model models/base
///
/// Example: agon score --reward --model models/judge --input rows.jsonl
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The model is a reward model: one score per row.
    #[arg(long)]
    reward: bool,
    /// Append the end-of-text token to every completion of text, as the judge of a run reads it.
    #[arg(long, requires = "reward")]
    closed: bool,
    /// Read text prompts as dialogues, which go through the chat template: the turns of a `Human:` and an `Assistant:`,
    /// any other text as one of the user.
    #[arg(long)]
    chat: bool,
    /// The rows, one JSON object per line, optionally compressed by gzip or zstd; `-` is standard input.
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let columns = Columns {
        chat: arguments.chat,
        ..Columns::default()
    };
    let input = rows::RowInput::open(&arguments.input, columns)?;
    match arguments.reward {
        true => {
            let eos = match arguments.closed {
                true => rows::Eos::Append,
                false => rows::Eos::Omit,
            };
            reward::run(&arguments.model.locate_reward()?, eos, input)
        }
        false => log_probabilities::run(&arguments.model.locate()?, input),
    }
}
