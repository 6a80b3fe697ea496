//! Answers and judgements in the files of AlpacaEval and MT-Bench, which outside graders read.
//!
//! Every answer carries what its win rate depends on besides the model: stop tokens, chat template, sampling settings
//! and whether it was truncated. Both graders ignore keys that they do not know.

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use learner::EvaluationConditions;
use messages::{Digest, Probability};
use preference::{Preference, Verdict};
use serde_json::{Value, json};
use telemetry::write_atomically;

use crate::cli::eval::{
    answers::Answer,
    questions::{Form, Question},
};

/// Hexadecimal digits of an answer's id.
const ID_DIGITS: usize = 22;

/// All answers and judgements of an evaluation.
pub(super) struct AnswerFiles<'a> {
    pub(super) form: Form,
    /// Names of A and B.
    pub(super) names: [String; 2],
    /// Name of the judge.
    pub(super) judge: String,
    /// Conditions of A's and B's answers; `None` if they are not known.
    pub(super) conditions: [Option<&'a EvaluationConditions>; 2],
    pub(super) questions: &'a [Question],
    /// Answers of A and B to each question.
    pub(super) answers: &'a [[Answer; 2]],
    /// Judgements of A against B, by question and turn.
    pub(super) judgements: &'a [Judgement],
}

/// A judgement of A's answer against B's.
#[derive(Debug, Clone)]
pub(super) struct Judgement {
    /// Index of the question.
    pub(super) question: usize,
    /// Number of turns that were judged.
    pub(super) turns: usize,
    /// The preference for A's.
    pub(super) preference: Preference,
}

impl AnswerFiles<'_> {
    /// Writes all files to `folder`: for AlpacaEval `NAME.json` of each model and `annotations.json`; for MT-Bench
    /// `model_answer/NAME.jsonl` of each and `model_judgment/JUDGE_pair.jsonl`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = now.map_or(0.0, |since| since.as_secs_f64());
        match self.form {
            Form::AlpacaEval => {
                for model in 0..2 {
                    let name = format!("{}.json", self.names[model]);
                    write(&folder.join(name), &list(&self.alpaca_outputs(model)))?;
                }
                let annotations = list(&self.alpaca_annotations());
                write(&folder.join("annotations.json"), &annotations)
            }
            Form::MtBench => {
                for model in 0..2 {
                    let name = format!("model_answer/{}.jsonl", self.names[model]);
                    write(
                        &folder.join(name),
                        &lines(&self.mt_bench_answers(model, time)),
                    )?;
                }
                let name = format!("model_judgment/{}_pair.jsonl", self.judge);
                write(&folder.join(name), &lines(&self.mt_bench_judgements(time)))
            }
        }
    }

    fn alpaca_outputs(&self, model: usize) -> Vec<Value> {
        let row = |(question, answers): (&Question, &[Answer; 2])| {
            let answer = &answers[model];
            let mut row = json!({
                "dataset": question.category,
                "instruction": question.turns.first(),
                "output": answer.turns.first(),
                "generator": self.names[model],
                "truncated": answer.truncated.first(),
            });
            self.add_conditions(model, &mut row);
            row
        };
        self.questions.iter().zip(self.answers).map(row).collect()
    }

    /// Annotations with B as the baseline, `output_1`: the preference is 1 for it and 2 for A's `output_2`.
    fn alpaca_annotations(&self) -> Vec<Value> {
        let row = |judgement: &Judgement| {
            let question = &self.questions[judgement.question];
            let [a, b] = &self.answers[judgement.question];
            json!({
                "dataset": question.category,
                "instruction": question.turns.first(),
                "output_1": b.turns.first(),
                "generator_1": self.names[1],
                "output_2": a.turns.first(),
                "generator_2": self.names[0],
                "annotator": self.judge,
                "preference": p(&judgement.preference).map(|p| 1.0 + f64::from(p.get())),
            })
        };
        self.judgements.iter().map(row).collect()
    }

    fn mt_bench_answers(&self, model: usize, time: f64) -> Vec<Value> {
        let row = |(question, answers): (&Question, &[Answer; 2])| {
            let answer = &answers[model];
            let key = json!([question.id, self.names[model], answer.turns]);
            let id = Digest::of(key.to_string().as_bytes()).to_string();
            let mut row = json!({
                "question_id": question.id,
                "answer_id": id.get(..ID_DIGITS),
                "model_id": self.names[model],
                "choices": [{"index": 0, "turns": answer.turns}],
                "tstamp": time,
                "truncated": answer.truncated.last(),
                "truncated_turns": answer.truncated,
            });
            self.add_conditions(model, &mut row);
            row
        };
        self.questions.iter().zip(self.answers).map(row).collect()
    }

    /// Pairwise judgements as FastChat's `gen_judgment` writes them: A is model 1, and shown first in game 1.
    fn mt_bench_judgements(&self, time: f64) -> Vec<Value> {
        let row = |judgement: &Judgement| {
            let preference = &judgement.preference;
            let games = match preference.estimates {
                Some(estimates) => estimates.map(Some),
                None => [p(preference); 2],
            };
            let [first, second] = games.map(winner);
            let says = games.map(|p| match (p, &preference.verdict) {
                (_, Verdict::Abstained { reason }) => reason.clone(),
                (Some(p), _) => format!("p = {}", p.get()),
                (None, _) => String::new(),
            });
            json!({
                "question_id": self.questions[judgement.question].id,
                "model_1": self.names[0],
                "model_2": self.names[1],
                "g1_winner": first,
                "g2_winner": second,
                "judge": [self.judge, "pair"],
                "g1_judgment": says[0],
                "g2_judgment": says[1],
                "turn": judgement.turns,
                "tstamp": time,
            })
        };
        self.judgements.iter().map(row).collect()
    }

    fn add_conditions(&self, model: usize, row: &mut Value) {
        let conditions = self.conditions[model].map(|conditions| json!(conditions));
        let conditions = conditions.as_ref().and_then(Value::as_object);
        for (key, value) in conditions.into_iter().flatten() {
            row[key] = value.clone();
        }
    }
}

fn p(preference: &Preference) -> Option<Probability> {
    match preference.verdict {
        Verdict::Preference(p) => Some(p),
        Verdict::Abstained { .. } => None,
    }
}

fn winner(p: Option<Probability>) -> &'static str {
    match p.map(Probability::get) {
        None => "error",
        Some(p) if p > 0.5 => "model_1",
        Some(p) if p < 0.5 => "model_2",
        Some(_) => "tie",
    }
}

fn list(rows: &[Value]) -> String {
    format!("{:#}\n", Value::from(rows))
}

fn lines(rows: &[Value]) -> String {
    rows.iter().fold(String::new(), |mut lines, row| {
        // Writing to a string does not fail.
        writeln!(lines, "{row}").ok();
        lines
    })
}

fn write(path: &Path, content: &str) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        let unwritable = || format!("failed to create {}", folder.display());
        fs::create_dir_all(folder).with_context(unwritable)?;
    }
    Ok(write_atomically(path, content.as_bytes())?)
}
