//! A prompt, and a prompt with its answer.

use ::messages::{Dialogue, PromptText};
use serde_json::Value;

use crate::pair::{messages, prompt_of, response_of, said};

/// The column of whole dialogues, TRL's language-modelling form.
const DIALOGUE: &str = "messages";

/// A prompt and what is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// What was asked.
    pub prompt: PromptText,
    /// The answer.
    pub answer: String,
}

impl Answered {
    /// Reads a row in one of the field's forms: `{"prompt", "completion"}` (or `"chosen"`), each as text or as
    /// messages, or `{"messages"}`, a dialogue whose last turn is the answer.
    ///
    /// # Errors
    /// What is missing or malformed, in words.
    pub fn from_row(row: &Value) -> Result<Self, String> {
        if let (None, Some(dialogue)) = (row.get("prompt"), row.get(DIALOGUE)) {
            let (prompt, answer) = taken_apart(dialogue)?;
            let answer = answer.ok_or("the last turn of \"messages\" is not the assistant's")?;
            return Ok(Self { prompt, answer });
        }
        let answer = row.get("completion").or_else(|| row.get("chosen"));
        let answer = answer.ok_or("there is no column \"completion\"")?;
        Ok(Self {
            prompt: prompt(row, "prompt")?,
            answer: response_of(answer).map_err(|why| format!("the completion: {why}"))?,
        })
    }
}

/// The prompt of a row, as text or as messages: what stands in `column` or, where there is no such column, the
/// dialogue in `"messages"` without the assistant's last turn.
///
/// # Errors
/// What is missing or malformed, in words.
pub fn prompt(row: &Value, column: &str) -> Result<PromptText, String> {
    match (row.get(column), row.get(DIALOGUE)) {
        (Some(value), _) => prompt_of(value).map_err(|why| format!("column {column:?}: {why}")),
        (None, Some(dialogue)) => taken_apart(dialogue).map(|(prompt, _)| prompt),
        (None, None) => Err(format!("there is no column {column:?}")),
    }
}

/// The response in a column, as text or as messages that end with it.
///
/// # Errors
/// What is missing or malformed, in words.
pub fn response(row: &Value, column: &str) -> Result<String, String> {
    let value = row
        .get(column)
        .ok_or_else(|| format!("there is no column {column:?}"))?;
    response_of(value).map_err(|why| format!("column {column:?}: {why}"))
}

/// A dialogue's prompt, and the assistant's turn that ends it, if one does.
fn taken_apart(dialogue: &Value) -> Result<(PromptText, Option<String>), String> {
    let turns = dialogue.as_array().ok_or("\"messages\" is not a list")?;
    let mut turns = messages(turns)?;
    let answered = turns.last().is_some_and(|turn| turn.role == "assistant");
    let answer = match answered {
        true => turns.pop().as_ref().map(said).transpose()?,
        false => None,
    };
    if turns.is_empty() {
        return Err("\"messages\" holds no turn before the answer".into());
    }
    Ok((PromptText::Dialogue(Dialogue::new(turns)), answer))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(text: &str) -> PromptText {
        PromptText::Dialogue(Dialogue::of_user(text))
    }

    #[test]
    fn answers_are_read_in_every_form_of_the_field() {
        let user = json!([{"role": "user", "content": "2 + 2?"}]);
        let assistant = json!({"role": "assistant", "content": "4"});
        let rows = [
            json!({"prompt": user, "completion": [assistant]}),
            json!({"prompt": user, "completion": "4"}),
            json!({"prompt": user, "chosen": assistant}),
            json!({"messages": [user[0], assistant]}),
        ];
        for row in rows {
            let read = Answered::from_row(&row).unwrap_or_else(|why| panic!("{row}: {why}"));
            assert_eq!(
                (read.prompt, read.answer.as_str()),
                (asked("2 + 2?"), "4"),
                "{row}"
            );
            assert_eq!(prompt(&row, "prompt"), Ok(asked("2 + 2?")), "{row}");
        }
        let plain = json!({"prompt": "2 + 2?", "completion": "4"});
        let read = Answered::from_row(&plain).expect("text");
        assert_eq!(read.prompt, PromptText::Text("2 + 2?".into()));
    }

    #[test]
    fn a_dialogue_without_an_answer_is_a_prompt_and_no_example() {
        let row = json!({"messages": [{"role": "user", "content": "2 + 2?"}]});
        assert_eq!(prompt(&row, "prompt"), Ok(asked("2 + 2?")));
        let why = Answered::from_row(&row).expect_err("nobody answered");
        assert!(why.contains("not the assistant's"), "{why}");
    }

    #[test]
    fn what_is_missing_is_named() {
        for (row, says) in [
            (json!({"text": "a"}), "there is no column \"question\""),
            (json!({"question": 3}), "column \"question\""),
            (json!({"messages": "a"}), "\"messages\" is not a list"),
            (
                json!({"messages": [{"role": "assistant", "content": "4"}]}),
                "no turn before the answer",
            ),
        ] {
            let why = prompt(&row, "question").expect_err(says);
            assert!(why.contains(says), "{why}");
        }
        let why = Answered::from_row(&json!({"prompt": "a"})).expect_err("no answer");
        assert!(why.contains("\"completion\""), "{why}");
    }
}
