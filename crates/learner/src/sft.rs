//! Supervised fine-tuning: minimises the token-mean negative log-likelihood of given completions.

use std::{path::Path, time::Instant};

use dataset::{Column, Columns, DatasetError, PromptAnswer, WithSource};
use messages::Seed;
use model::{
    AdamWSettings, AnswerBoundary, EncodedAnswers, Gradients, LanguageModel, Optimizer, Schedule,
    Sequence, Tokenizer,
};
use settings::SftSettings;
use telemetry::Progress;

use crate::{boundary_counts::BoundaryCounts, error::LearnerError, prompts::log_dialogue_use};

/// A prompt and its target completion, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExampleIds {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Completion tokens, end-of-text included.
    pub completion: Vec<u32>,
}

/// Summary of fine-tuning.
#[derive(Debug, Clone, PartialEq)]
pub struct SftSummary {
    /// Loss of the last step, in nats per token.
    pub loss: f64,
    /// Steps taken.
    pub steps: u64,
    /// Duration in seconds.
    pub seconds: f64,
}

/// Trains the model's weights, or its adapter if it has one, on the batch `examples(step)` of every step; returns the
/// trained model. `examples` returns `None` to stop. `seed` is that of an adapter's dropout.
///
/// # Errors
/// If an example does not fit the model, a loss is not finite, or `examples` stops.
pub fn train(
    model: &LanguageModel,
    settings: &SftSettings,
    title: &'static str,
    seed: Seed,
    mut examples: impl FnMut(u64) -> Option<Vec<ExampleIds>>,
) -> Result<(LanguageModel, SftSummary), LearnerError> {
    let (model, vars) = model.trainable()?;
    let mut optimizer = Optimizer::new(vars, AdamWSettings::from(&settings.optimizer()))?;
    let schedule = Schedule::new(&settings.optimizer(), settings.steps);
    let mut progress = Progress::new(title, settings.steps);
    let started = Instant::now();
    let mut loss = f64::NAN;
    for step in 0..settings.steps {
        let batch = examples(step).ok_or(LearnerError::Interrupted { work: title })?;
        let with_dropout = model.with_dropout_seed(seed.derive(step));
        loss = self::step(&with_dropout, &mut optimizer, &batch, schedule.at(step))?;
        progress.advance_to(step + 1, &format!("loss {loss:.3}"));
    }
    progress.finish(&format!("loss {loss:.3}"));
    let summary = SftSummary {
        loss,
        steps: settings.steps,
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok((model, summary))
}

/// One step on a batch; returns its loss, the mean over all completion tokens.
fn step(
    model: &LanguageModel,
    optimizer: &mut Optimizer,
    examples: &[ExampleIds],
    learning_rate: f64,
) -> Result<f64, LearnerError> {
    let sequences: Vec<Sequence<'_>> = examples
        .iter()
        .map(|e| Sequence {
            prompt: &e.prompt,
            completion: &e.completion,
        })
        .collect();
    let loss = model.logprobs(&sequences)?.logp.mean_all()?.neg()?;
    let mut gradients = Gradients::default();
    gradients.backward(&loss)?;
    let norm = optimizer.norm(&gradients)?;
    let loss = f64::from(loss.to_scalar::<f32>()?);
    if !loss.is_finite() || !norm.is_finite() {
        let reason =
            "supervised fine-tuning diverged: the loss is not finite; lower sft.learning_rate";
        return Err(LearnerError::Model(model::ModelError::Weights {
            reason: reason.into(),
        }));
    }
    optimizer.step(&gradients, norm, learning_rate)?;
    Ok(loss)
}

/// Reads rows in any format with an answer. Rows with an empty answer are left out and counted.
///
/// # Errors
/// If the file cannot be read or holds no answer, or if a row is malformed or longer than `max_length` tokens.
pub fn read_examples(
    path: &Path,
    settings: &SftSettings,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<ExampleIds>, LearnerError> {
    let columns = Columns {
        prompt: Column::named(&settings.prompt_column, "sft.prompt_column"),
        answer: Column::named(&settings.completion_column, "sft.completion_column"),
        ..Columns::default()
    };
    let rows = dataset::read(path, &columns, |form| form.answered())?;
    if rows.is_empty() {
        return Err(LearnerError::Dataset(DatasetError::File {
            path: path.to_owned(),
            reason: "the file holds no examples".into(),
        }));
    }
    let prompts: Vec<_> = rows.iter().map(|row| &row.value.prompt).collect();
    log_dialogue_use(path, &prompts, tokenizer);
    let (mut examples, mut boundaries, mut empty) = (Vec::new(), BoundaryCounts::default(), 0);
    for WithSource { source, value } in &rows {
        if value.answer.trim().is_empty() {
            empty += 1;
            continue;
        }
        let read = example(value, tokenizer, max_length);
        let (example, boundary) = read.map_err(|reason| source.refuse(reason))?;
        boundaries.count(boundary);
        examples.push(example);
    }
    if empty > 0 {
        tracing::warn!(path = %path.display(), empty, "examples were left out: their answers are empty");
    }
    boundaries.log(path);
    match examples.is_empty() {
        true => Err(LearnerError::Dataset(DatasetError::File {
            path: path.to_owned(),
            reason: format!(
                "all of its {empty} answers are empty: name the column of the answers with sft.completion_column"
            ),
        })),
        false => Ok(examples),
    }
}

/// Tokens of an example, and how its answer joins its prompt.
fn example(
    PromptAnswer { prompt, answer }: &PromptAnswer,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<(ExampleIds, AnswerBoundary), String> {
    let read = tokenizer.encode_answers(prompt, &[answer]);
    let EncodedAnswers {
        prompt,
        answers,
        boundary,
    } = read.map_err(|error| error.to_string())?;
    let completion = answers.concat();
    let length = prompt.len() + completion.len();
    match length > max_length {
        true => Err(format!(
            "{length} tokens are more than sft.max_length = {max_length}"
        )),
        false => Ok((ExampleIds { prompt, completion }, boundary)),
    }
}
