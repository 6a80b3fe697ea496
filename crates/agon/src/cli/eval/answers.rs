//! Answers of both models to questions: sampled turn by turn, or read from a file.

use anyhow::Context;
use learner::PromptRow;
use messages::{
    Completion, Dialogue, Finish, Message, Pair, PromptId, PromptText, Seed, WeightsVersion,
};
use model::{LanguageModel, MixtureSampler, Request, Sampler as _, Tokenizer};
use settings::Settings;

use crate::{
    cli::eval::questions::{GivenAnswer, Question},
    exit_code::UsageError,
};

/// A model's answer to a question, turn by turn.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    /// Texts of the turns, without white space around them.
    pub(super) turns: Vec<String>,
    /// Whether each turn was cut off at the limit of new tokens; `None` where a file of answers does not say.
    pub(super) truncated: Vec<Option<bool>>,
}

/// A turn to be sampled.
struct Turn {
    /// Index of the question.
    question: usize,
    /// 0: of A; 1: of B.
    model: usize,
    ids: Vec<u32>,
}

/// Samples answers of A and B with A's tokenizer.
pub(super) struct AnswerSampler<'a> {
    pub(super) settings: &'a Settings,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) a: &'a LanguageModel,
    /// `None` if B's answers are given.
    pub(super) b: Option<&'a LanguageModel>,
}

impl AnswerSampler<'_> {
    /// Answers of A and, unless they are `given`, of B to all questions.
    ///
    /// # Errors
    /// When a turn cannot be rendered or is too long, or sampling fails.
    pub(super) fn answers(
        &self,
        questions: &[Question],
        given: Option<Vec<GivenAnswer>>,
    ) -> anyhow::Result<Vec<[Answer; 2]>> {
        let mut answers = vec![[Answer::default(), Answer::default()]; questions.len()];
        let sampled = if given.is_some() { 1 } else { 2 };
        let last = questions.iter().map(|question| question.turns.len()).max();
        for turn in 0..last.unwrap_or(0) {
            let asked = questions.iter().zip(&answers).enumerate();
            let asked = asked.filter(|(_, (question, _))| turn < question.turns.len());
            let mut turns = Vec::new();
            for (index, (question, both)) in asked {
                for (model, answer) in both.iter().enumerate().take(sampled) {
                    turns.push(Turn {
                        question: index,
                        model,
                        ids: self.encoded(question, &answer.turns)?,
                    });
                }
            }
            self.sample(turn, &turns, &mut answers)?;
        }
        for (answers, given) in answers.iter_mut().zip(given.into_iter().flatten()) {
            answers[1] = Answer {
                truncated: vec![given.truncated; given.turns.len()],
                turns: given.turns,
            };
        }
        Ok(answers)
    }

    /// Tokens of the next turn after what the model `said`.
    fn encoded(&self, question: &Question, said: &[String]) -> anyhow::Result<Vec<u32>> {
        let prompt = prompt_text(self.tokenizer, question, said)?;
        let ids = self.tokenizer.encode_prompt(&prompt)?;
        let (found, most) = (ids.len(), self.settings.actor.max_prompt_length);
        if found > most {
            return Err(UsageError(format!(
                "turn {} of question {} has {found} tokens, more than actor.max_prompt_length = {most}: raise it",
                said.len() + 1,
                question.id
            ))
            .into());
        }
        Ok(ids)
    }

    fn sample(
        &self,
        turn: usize,
        turns: &[Turn],
        answers: &mut [[Answer; 2]],
    ) -> anyhow::Result<()> {
        let actor = &self.settings.actor;
        let sampling = crate::run::sampling(self.settings);
        let capacity = actor.max_prompt_length + actor.max_new_tokens;
        let (a, b) = (self.a.clone(), self.b.cloned());
        let mut sampler = MixtureSampler::new(a, b, sampling, actor.slots, capacity)?;
        for (key, one) in (0..).zip(turns) {
            let seed = Seed(self.settings.run.seed).derive(1 << 63 | one.question as u64);
            sampler.admit(Request {
                key,
                ids: one.ids.clone(),
                seed: seed.derive((2 * turn + one.model) as u64),
                mixture_coefs: vec![one.model as f32],
                exact: 0,
                max_new_tokens: sampling.max_new_tokens,
                records_reference: false,
            })?;
        }
        while !sampler.is_idle() {
            for finished in sampler.step()? {
                let turn = &turns[finished.key as usize];
                let completion = finished.completions.first().context("no completion")?;
                let text = self.tokenizer.completion_text(&turn.ids, completion);
                let answer = &mut answers[turn.question][turn.model];
                answer.turns.push(text.trim().to_owned());
                answer
                    .truncated
                    .push(Some(completion.finish == Finish::Length));
            }
        }
        Ok(())
    }
}

/// The dialogue up to the user's next turn; the text itself, for a model without a chat template.
fn prompt_text(
    tokenizer: &Tokenizer,
    question: &Question,
    said: &[String],
) -> Result<PromptText, UsageError> {
    let asked = question.turns.iter().take(said.len() + 1);
    if !tokenizer.has_chat_template() {
        return match (said, question.turns.first()) {
            ([], Some(text)) => Ok(PromptText::Text(text.clone())),
            _ => Err(UsageError(format!(
                "question {} has several turns, which need a chat template: name one with model.chat_template",
                question.id
            ))),
        };
    }
    let mut messages = Vec::new();
    for (index, turn) in asked.enumerate() {
        messages.push(Message::new("user", turn.as_str()));
        messages.extend(
            said.get(index)
                .map(|text| Message::new("assistant", text.as_str())),
        );
    }
    Ok(PromptText::Dialogue(Dialogue::new(messages)))
}

/// The pair that a judge compares after `turns` turns: the first turn as the prompt, and as completions what follows
/// it, the further turns of the user included.
///
/// # Errors
/// When the texts cannot be encoded.
pub(super) fn pair(
    tokenizer: &Tokenizer,
    question: &Question,
    answers: &[Answer; 2],
    place: PairPlace,
) -> anyhow::Result<Pair> {
    let prompt = prompt_text(tokenizer, question, &[])?;
    let ids = tokenizer.encode_prompt(&prompt)?;
    let completion = |answer: &Answer| -> anyhow::Result<Completion> {
        let text = conversation(question, answer, place.turns);
        let is_truncated = answer.truncated.get(place.turns - 1).copied().flatten();
        let (finish, ids) = match is_truncated.unwrap_or_default() {
            true => (
                Finish::Length,
                tokenizer.encode_completion(&prompt, &ids, &text)?,
            ),
            false => (
                Finish::EndOfText,
                tokenizer.encode_closed(&prompt, &ids, &text)?,
            ),
        };
        Ok(Completion::unrecorded(ids, finish, text))
    };
    let completions = answers
        .iter()
        .map(completion)
        .collect::<anyhow::Result<_>>()?;
    let id = PromptId(place.index as u64);
    let prompt = row(tokenizer, prompt, ids).held_out_prompt(id, Seed(id.0));
    Ok(Pair {
        prompt,
        version: WeightsVersion::REFERENCE,
        completions,
        actor: "eval".into(),
    })
}

/// The prompt as a row of a set of prompts.
fn row(tokenizer: &Tokenizer, prompt: PromptText, ids: Vec<u32>) -> PromptRow {
    let (text, dialogue) = match prompt {
        PromptText::Text(text) => (text, None),
        PromptText::Dialogue(dialogue) => (tokenizer.decode(&ids), Some(dialogue)),
    };
    PromptRow {
        ids,
        text,
        dialogue,
        golden: None,
        answer: None,
        route: None,
    }
}

/// Place of a judged pair.
#[derive(Debug, Clone, Copy)]
pub(super) struct PairPlace {
    /// Index among all judged pairs.
    pub(super) index: usize,
    /// Number of turns, at least one.
    pub(super) turns: usize,
}

/// The conversation after the first turn of the user, as text.
fn conversation(question: &Question, answer: &Answer, turns: usize) -> String {
    let mut text = String::new();
    for turn in 0..turns {
        if turn > 0 {
            let asked = question.turns.get(turn).map_or("", String::as_str);
            text += &format!("\n\nuser: {asked}\n\nassistant: ");
        }
        text += answer.turns.get(turn).map_or("", String::as_str);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_turns_are_judged_with_the_conversation_before_them() {
        let question = Question {
            id: 1.into(),
            category: String::new(),
            turns: vec!["Q1".into(), "Q2".into()],
        };
        let answer = Answer {
            turns: vec!["A1".into(), "A2".into()],
            truncated: vec![Some(false), Some(true)],
        };
        assert_eq!(conversation(&question, &answer, 1), "A1");
        let both = "A1\n\nuser: Q2\n\nassistant: A2";
        assert_eq!(conversation(&question, &answer, 2), both);
    }
}
