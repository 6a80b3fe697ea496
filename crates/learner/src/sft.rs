//! Supervised fine-tuning: the token-mean negative log-likelihood of given completions.

use std::{path::Path, time::Instant};

use dataset::{Answered, Column, Columns, DatasetError, Sourced};
use messages::Seed;
use model::{
    AdamWSettings, AnsweredIds, Gradients, LanguageModel, Optimizer, Schedule, Seam, Sequence,
    Tokenizer,
};
use settings::SftSettings;
use telemetry::Progress;

use crate::{LearnerError, prompts::say_how_dialogues_are_used, seams::Seams};

/// A prompt and the completion that is to be learned, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExampleIds {
    /// What the model reads.
    pub prompt: Vec<u32>,
    /// What it is to write, end-of-text included.
    pub completion: Vec<u32>,
}

/// What fine-tuning has to say at the end.
#[derive(Debug, Clone, PartialEq)]
pub struct SftSummary {
    /// The loss of the last step, in nats per token.
    pub loss: f64,
    /// Steps taken.
    pub steps: u64,
    /// Seconds they took.
    pub seconds: f64,
}

/// Trains the model's weights, or its adapter where it has one, on `examples(step)`, a batch for every
/// step; returns the trained model. `examples` gives `None` when the work is to stop. An adapter's dropout
/// is drawn from `seed`.
///
/// # Errors
/// When an example does not fit the model, a loss is not finite, or the work was stopped.
pub fn train(
    model: &LanguageModel,
    settings: &SftSettings,
    title: &'static str,
    seed: Seed,
    mut examples: impl FnMut(u64) -> Option<Vec<ExampleIds>>,
) -> Result<(LanguageModel, SftSummary), LearnerError> {
    let (model, vars) = model.trainable()?;
    let mut optimizer = Optimizer::new(vars, adamw(settings))?;
    let schedule = schedule(settings);
    let mut progress = Progress::new(title, settings.steps);
    let started = Instant::now();
    let mut loss = f64::NAN;
    for step in 0..settings.steps {
        let batch = examples(step).ok_or(LearnerError::Interrupted { work: title })?;
        let dropping = model.dropping(seed.derive(step));
        loss = self::step(&dropping, &mut optimizer, &batch, schedule.at(step))?;
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

/// One step on a batch: the mean over all completion tokens.
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
    let loss = model.score(&sequences)?.logp.mean_all()?.neg()?;
    let mut gradients = Gradients::default();
    gradients.add(&loss)?;
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

fn adamw(settings: &SftSettings) -> AdamWSettings {
    AdamWSettings {
        beta1: settings.adam_beta1,
        beta2: settings.adam_beta2,
        epsilon: 1e-8,
        weight_decay: settings.weight_decay,
        max_grad_norm: settings.max_grad_norm,
    }
}

fn schedule(settings: &SftSettings) -> Schedule {
    Schedule {
        learning_rate: settings.learning_rate,
        kind: settings.lr_scheduler_type,
        warmup_ratio: settings.warmup_ratio,
        min_lr_ratio: settings.min_lr_ratio,
        steps: settings.steps,
    }
}

/// Reads rows in any of the forms with an answer. Those whose answer is empty are left out and counted.
///
/// # Errors
/// When the file cannot be read, holds no answer, or a row is malformed or longer than `max_length` tokens.
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
    say_how_dialogues_are_used(path, &prompts, tokenizer);
    let (mut examples, mut seams, mut empty) = (Vec::new(), Seams::default(), 0);
    for Sourced { source, value } in &rows {
        if value.answer.trim().is_empty() {
            empty += 1;
            continue;
        }
        let read = example(value, tokenizer, max_length);
        let (example, seam) = read.map_err(|reason| source.refuse(reason))?;
        seams.count(seam);
        examples.push(example);
    }
    if empty > 0 {
        tracing::warn!(path = %path.display(), empty, "examples were left out: their answers are empty");
    }
    seams.say(path);
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

/// The tokens of an example, and how its answer follows its prompt.
fn example(
    Answered { prompt, answer }: &Answered,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<(ExampleIds, Seam), String> {
    let read = tokenizer.encode_answered(prompt, &[answer]);
    let AnsweredIds {
        prompt,
        answers,
        seam,
    } = read.map_err(|error| error.to_string())?;
    let completion = answers.concat();
    let length = prompt.len() + completion.len();
    match length > max_length {
        true => Err(format!(
            "{length} tokens are more than sft.max_length = {max_length}"
        )),
        false => Ok((ExampleIds { prompt, completion }, seam)),
    }
}
