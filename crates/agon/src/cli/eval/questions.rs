//! Questions and answers in the files of AlpacaEval and MT-Bench.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use dataset::{DatasetError, DatasetRow};
use serde_json::{Map, Value};

/// Form of a file of questions, and of the files of their answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// AlpacaEval: a JSON list of `instruction`, `output`, `generator`, `dataset`.
    AlpacaEval,
    /// MT-Bench of FastChat: JSON Lines of `question_id`, `category`, `turns`.
    MtBench,
}

/// A question: what the user says in each turn.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Question {
    /// `question_id`, or the place in an AlpacaEval file.
    pub(super) id: Value,
    /// `category` or `dataset`.
    pub(super) category: String,
    /// The user's turns, at least one.
    pub(super) turns: Vec<String>,
}

/// The questions of a file.
#[derive(Debug)]
pub(super) struct Questions {
    pub(super) form: Form,
    pub(super) rows: Vec<Question>,
}

/// An answer of a file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GivenAnswer {
    /// The answer in each turn.
    pub(super) turns: Vec<String>,
    /// Whether the last turn was cut off at the limit of new tokens; `None` where the file does not say.
    pub(super) truncated: Option<bool>,
}

/// The answers of a model that were written earlier.
#[derive(Debug)]
pub(super) struct GivenAnswers {
    path: PathBuf,
    /// The model's name in the file.
    pub(super) generator: String,
    /// By instruction or question id, in the order of the file.
    answers: HashMap<String, Vec<GivenAnswer>>,
}

impl Questions {
    /// Reads a file of questions; its form is that of its first row.
    ///
    /// # Errors
    /// When the file cannot be read or is empty, or a row has neither form, with file and line.
    pub(super) fn read(path: &Path) -> Result<Self, DatasetError> {
        let (mut form, mut rows) = (None, Vec::new());
        for (index, row) in dataset::read_rows(path)?.into_iter().enumerate() {
            let parsed = Question::of(&row.columns, index);
            let (of_row, question) = parsed.map_err(|reason| row.source.refuse(reason))?;
            if *form.get_or_insert(of_row) != of_row {
                let reason =
                    "it has another form than the first row: instructions and turns do not mix";
                return Err(row.source.refuse(reason));
            }
            rows.push(question);
        }
        match form {
            Some(form) => Ok(Self { form, rows }),
            None => Err(DatasetError::File {
                path: path.to_owned(),
                reason: "it holds no questions".into(),
            }),
        }
    }
}

impl Question {
    fn of(row: &Map<String, Value>, index: usize) -> Result<(Form, Self), String> {
        let text = |column: &str| row.get(column).and_then(Value::as_str);
        if let Some(turns) = row.get("turns") {
            let question = Self {
                id: row
                    .get("question_id")
                    .cloned()
                    .ok_or("it has no question_id")?,
                category: text("category").unwrap_or_default().to_owned(),
                turns: texts(turns).ok_or("turns is not a list of texts")?,
            };
            return Ok((Form::MtBench, question));
        }
        let instruction = text("instruction").filter(|text| !text.trim().is_empty());
        let instruction = instruction.ok_or(
            "it has neither an instruction (AlpacaEval) nor question_id and turns (MT-Bench)",
        )?;
        if text("input").is_some_and(|input| !input.trim().is_empty()) {
            return Err("it has an input, which AlpacaEval's form does not have: append it to the instruction".into());
        }
        let question = Self {
            id: index.into(),
            category: text("dataset").unwrap_or("agon").to_owned(),
            turns: vec![instruction.to_owned()],
        };
        Ok((Form::AlpacaEval, question))
    }

    /// Key of the question's answer in a file of answers.
    fn key(&self, form: Form) -> String {
        match form {
            Form::AlpacaEval => self.turns.concat(),
            Form::MtBench => self.id.to_string(),
        }
    }
}

/// A list of texts, of which none is blank; at least one.
fn texts(value: &Value) -> Option<Vec<String>> {
    let texts: Option<Vec<String>> = value
        .as_array()?
        .iter()
        .map(|text| Some(text.as_str()?.to_owned()))
        .collect();
    texts.filter(|texts| !texts.is_empty() && texts.iter().all(|text| !text.trim().is_empty()))
}

impl GivenAnswers {
    /// Reads the answers of one model: AlpacaEval's model outputs, or MT-Bench's model answers.
    ///
    /// # Errors
    /// When the file cannot be read, or a row is no answer of the form, with file and line.
    pub(super) fn read(path: &Path, form: Form) -> Result<Self, DatasetError> {
        let mut answers: HashMap<String, Vec<GivenAnswer>> = HashMap::new();
        let mut generator: Option<String> = None;
        for DatasetRow { columns, source } in dataset::read_rows(path)? {
            let parsed = match form {
                Form::AlpacaEval => alpaca_answer(&columns),
                Form::MtBench => mt_bench_answer(&columns),
            };
            let (key, turns) = parsed.map_err(|reason| source.refuse(reason))?;
            if let Some(name) = generator_of(&columns) {
                let first = generator.get_or_insert_with(|| name.to_owned());
                if first != name {
                    return Err(source.refuse(format!(
                        "it is an answer of {name}, and rows before it are of {first}: write the answers of each to a \
                         file of its own"
                    )));
                }
            }
            let answer = GivenAnswer {
                turns,
                truncated: columns.get("truncated").and_then(Value::as_bool),
            };
            answers.entry(key).or_default().push(answer);
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Self {
            path: path.to_owned(),
            generator: generator.unwrap_or_else(|| stem.into_owned()),
            answers,
        })
    }

    /// The answer to each question, in their order. A question that occurs several times has as many answers, in the order of
    /// the file.
    ///
    /// # Errors
    /// When a question has no answer, one of fewer turns, or more than one; with the file.
    pub(super) fn of(&self, questions: &Questions) -> Result<Vec<GivenAnswer>, DatasetError> {
        let mut asked: HashMap<String, usize> = HashMap::new();
        let mut answer = |question: &Question| {
            let key = question.key(questions.form);
            let place = asked.entry(key.clone()).or_default();
            *place += 1;
            self.nth(&key, *place - 1, question.turns.len())
        };
        let answers: Result<Vec<_>, String> = questions.rows.iter().map(&mut answer).collect();
        let answers = answers.and_then(|answers| {
            let count = |key: &str| self.answers.get(key).map_or(0, Vec::len);
            match asked.iter().find(|(key, times)| count(key) > **times) {
                Some((key, _)) => Err(format!(
                    "it has {} answers to the question {key}: keep one",
                    count(key)
                )),
                None => Ok(answers),
            }
        });
        answers.map_err(|reason| DatasetError::File {
            path: self.path.clone(),
            reason,
        })
    }

    /// The answer with this place among those to a question, which has `turns` turns.
    fn nth(&self, key: &str, place: usize, turns: usize) -> Result<GivenAnswer, String> {
        let answer = self.answers.get(key).and_then(|answers| answers.get(place));
        let answer = answer.ok_or_else(|| {
            let generator = &self.generator;
            format!("it has no answer of {generator} to the question {key}")
        })?;
        match answer.turns.len() {
            answered if answered < turns => Err(format!(
                "its answer to the question {key} has {answered} of {turns} turns"
            )),
            _ => Ok(answer.clone()),
        }
    }
}

/// Name of the model that a row is an answer of, where the row has one.
fn generator_of(row: &Map<String, Value>) -> Option<&str> {
    let names = ["generator", "model_id"].into_iter();
    names.filter_map(|key| row.get(key)?.as_str()).next()
}

fn alpaca_answer(row: &Map<String, Value>) -> Result<(String, Vec<String>), String> {
    let text = |column: &str| {
        let text = row.get(column).and_then(Value::as_str);
        text.map(str::to_owned)
            .ok_or_else(|| format!("it has no {column} as text"))
    };
    Ok((text("instruction")?, vec![text("output")?]))
}

fn mt_bench_answer(row: &Map<String, Value>) -> Result<(String, Vec<String>), String> {
    let id = row.get("question_id").ok_or("it has no question_id")?;
    let choice = row
        .get("choices")
        .and_then(|choices| choices.get(0)?.get("turns"));
    let turns = choice
        .and_then(Value::as_array)
        .ok_or("it has no choices with turns")?;
    let turns: Option<Vec<String>> = turns
        .iter()
        .map(|turn| Some(turn.as_str()?.to_owned()))
        .collect();
    Ok((id.to_string(), turns.ok_or("a turn is not text")?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file(name: &str, content: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(name);
        fs::write(&path, content).expect("a file");
        (folder, path)
    }

    #[test]
    fn both_forms_are_read_and_recognised() {
        let (_folder, path) = file(
            "eval.json",
            r#"[{"dataset": "helpful_base", "instruction": "Say hi.", "output": "Hi.", "generator": "other"}]"#,
        );
        let questions = Questions::read(&path).expect("AlpacaEval");
        assert_eq!(questions.form, Form::AlpacaEval);
        assert_eq!(questions.rows[0].category, "helpful_base");
        let answers = GivenAnswers::read(&path, Form::AlpacaEval).expect("outputs");
        assert_eq!(answers.generator, "other");
        assert_eq!(answers.of(&questions).expect("one")[0].turns, ["Hi."]);

        let (_folder, path) = file(
            "question.jsonl",
            "{\"question_id\": 81, \"category\": \"writing\", \"turns\": [\"Write.\", \"Again.\"]}\n",
        );
        let questions = Questions::read(&path).expect("MT-Bench");
        assert_eq!(questions.form, Form::MtBench);
        assert_eq!(questions.rows[0].turns, ["Write.", "Again."]);
        let answer = |turns: &str| {
            let row = format!(
                "{{\"question_id\": 81, \"model_id\": \"m\", \"choices\": [{{\"index\": 0, \"turns\": {turns}}}]}}"
            );
            let (_folder, path) = file("m.jsonl", &row);
            let answers = GivenAnswers::read(&path, Form::MtBench).expect("answers");
            answers.of(&questions)
        };
        assert_eq!(
            answer("[\"a\", \"b\"]").expect("two turns")[0].turns,
            ["a", "b"]
        );
        let missing = answer("[\"a\"]").expect_err("one turn").to_string();
        assert!(missing.contains("m.jsonl"), "{missing}");
        let expected = "its answer to the question 81 has 1 of 2 turns";
        assert!(missing.contains(expected), "{missing}");
    }

    #[test]
    fn answers_of_several_models_and_repeated_ones_are_named() {
        let answer = |instruction: &str, generator: &str| {
            format!(
                "{{\"instruction\": \"{instruction}\", \"output\": \"x\", \"generator\": \"{generator}\"}}\n"
            )
        };
        let (_folder, path) = file(
            "outputs.jsonl",
            &[answer("q", "one"), answer("r", "two")].concat(),
        );
        let error = GivenAnswers::read(&path, Form::AlpacaEval);
        let error = error.expect_err("two generators").to_string();
        let expected = "line 2: it is an answer of two, and rows before it are of one";
        assert!(
            error.contains("outputs.jsonl") && error.contains(expected),
            "{error}"
        );

        let twice = [answer("q", "one"), answer("q", "one")].concat();
        let (_folder, path) = file("outputs.jsonl", &twice);
        let given = GivenAnswers::read(&path, Form::AlpacaEval).expect("two answers");
        let both = Questions::read(&path).expect("the question twice");
        assert_eq!(given.of(&both).expect("an answer to each").len(), 2);
        let (_folder, path) = file("eval.jsonl", &answer("q", "other"));
        let once = Questions::read(&path).expect("a question");
        let error = given.of(&once).expect_err("two answers").to_string();
        let expected = "outputs.jsonl: it has 2 answers to the question q: keep one";
        assert!(error.contains(expected), "{error}");

        let (_folder, path) = file("outputs.jsonl", &answer("q", "one"));
        let given = GivenAnswers::read(&path, Form::AlpacaEval).expect("one answer");
        let (_folder, path) = file("eval.jsonl", &answer("r", "other"));
        let questions = Questions::read(&path).expect("a question");
        let error = given
            .of(&questions)
            .expect_err("another question")
            .to_string();
        assert!(error.contains("outputs.jsonl"), "{error}");
        assert!(
            error.contains("no answer of one to the question r"),
            "{error}"
        );
    }

    #[test]
    fn rows_of_neither_form_are_named() {
        for (content, expected) in [
            (
                "{\"prompt\": \"x\"}\n",
                "neither an instruction (AlpacaEval) nor question_id",
            ),
            ("{\"instruction\": \" \"}\n", "neither an instruction"),
            ("{\"turns\": [\"x\"]}\n", "it has no question_id"),
            (
                "{\"question_id\": 1, \"turns\": []}\n",
                "turns is not a list of texts",
            ),
            (
                "{\"instruction\": \"x\"}\n{\"question_id\": 1, \"turns\": [\"x\"]}\n",
                "another form than the first row",
            ),
            ("", "it holds no questions"),
        ] {
            let (_folder, path) = file("rows.jsonl", content);
            let error = Questions::read(&path).expect_err(content).to_string();
            assert!(error.contains(expected), "{content:?}: {error}");
        }
    }
}
