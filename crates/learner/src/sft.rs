//! Supervised fine-tuning: minimises the token-mean negative log-likelihood of given completions.

use std::{path::Path, time::Instant};

use dataset::{Column, Columns, DatasetError, FileLimits, PromptAnswer};
use messages::Seed;
use model::{
    AdamWSettings, AnswerBoundary, EncodedAnswers, Gradients, LanguageModel, Optimizer, Schedule,
    Sequence, Tokenizer,
};
use settings::SftSettings;
use telemetry::Progress;

use crate::{boundary_counts::BoundaryCounts, error::LearnerError, prompts::TemplateUse};

/// Factor over the first loss at which fine-tuning has diverged; below one nat, over one nat.
const DIVERGENCE_FACTOR: f64 = 1e3;

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
/// [`LearnerError::SftDiverged`] if a loss is not finite or far beyond the first, or the weights are not finite. If an
/// example does not fit the model, or `examples` stops.
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
    let (mut first, mut loss) = (f64::NAN, f64::NAN);
    for step in 0..settings.steps {
        let batch = examples(step).ok_or(LearnerError::Interrupted { work: title })?;
        let with_dropout = model.with_dropout_seed(seed.derive(step));
        let gradients;
        LossGradients { loss, gradients } = loss_gradients(&with_dropout, &batch)?;
        if step == 0 {
            first = loss;
        }
        let norm = optimizer.norm(&gradients)?;
        check(step + 1, loss, norm, first)?;
        optimizer.step(&gradients, norm, schedule.at(step))?;
        progress.advance_to(step + 1, &format!("loss {loss:.3}"));
    }
    if !model.trained().is_finite()? {
        check(settings.steps, f64::NAN, 0.0, first)?;
    }
    progress.finish(&format!("loss {loss:.3}"));
    let summary = SftSummary {
        loss,
        steps: settings.steps,
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok((model, summary))
}

/// Loss of a batch and its gradients.
struct LossGradients {
    /// Mean over all completion tokens, in nats.
    loss: f64,
    gradients: Gradients,
}

fn loss_gradients(
    model: &LanguageModel,
    examples: &[ExampleIds],
) -> Result<LossGradients, LearnerError> {
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
    Ok(LossGradients {
        loss: f64::from(loss.to_scalar::<f32>()?),
        gradients,
    })
}

/// Checks that a step has not diverged: a loss of some nats per token has a scale from the first step on.
fn check(step: u64, loss: f64, grad_norm: f64, first: f64) -> Result<(), LearnerError> {
    let limit = DIVERGENCE_FACTOR * first.max(1.0);
    match loss <= limit && grad_norm.is_finite() {
        true => Ok(()),
        false => Err(LearnerError::SftDiverged { step, loss, first }),
    }
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
    let columns = columns(settings);
    let (mut examples, mut boundaries, mut empty) = (Vec::new(), BoundaryCounts::default(), 0);
    let mut template = TemplateUse::default();
    dataset::visit(path, &columns, |source, row| {
        let value = row.answered().map_err(|reason| source.refuse(reason))?;
        template.count(&value.prompt);
        if value.answer.trim().is_empty() {
            empty += 1;
            return Ok(());
        }
        let read = example(&value, tokenizer, max_length);
        let (example, boundary) = read.map_err(|reason| source.refuse(reason))?;
        boundaries.count(boundary);
        examples.push(example);
        Ok(())
    })?;
    if examples.is_empty() && empty == 0 {
        return Err(LearnerError::Dataset(DatasetError::File {
            path: path.to_owned(),
            reason: "the file holds no examples".into(),
        }));
    }
    template.log(path, &columns, tokenizer);
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

/// Columns of prompts and completions.
fn columns(settings: &SftSettings) -> Columns {
    Columns {
        prompt: Column::named(&settings.prompt_column, "sft.prompt_column"),
        answer: Column::named(&settings.completion_column, "sft.completion_column"),
        chat: settings.chat,
        limits: FileLimits {
            max_file_bytes: settings.max_file_bytes,
            max_rows: settings.max_rows,
            section: Some("sft"),
        },
        ..Columns::default()
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
