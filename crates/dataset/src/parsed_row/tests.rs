//! Tests of every format.

use messages::Dialogue;
use serde_json::json;

use super::*;
use crate::columns::LabelColumns;

/// The documentation of all formats.
const DOCUMENTATION: &str = include_str!("../../../../docs/data.md");

fn extract<T>(
    row: &Value,
    columns: &Columns,
    value: impl Fn(&ParsedRow<'_>) -> Result<T, String>,
) -> Result<T, String> {
    let row = row.as_object().expect("a row is an object");
    value(&ParsedRow::of(row, columns)?)
}

fn pair(row: &Value) -> Result<(PromptText, String, String), String> {
    let pair = extract(row, &Columns::default(), |row| row.pair())?;
    Ok((pair.prompt, pair.chosen, pair.rejected))
}

fn answered(row: &Value) -> Result<(PromptText, String), String> {
    let PromptAnswer { prompt, answer } = extract(row, &Columns::default(), |row| row.answered())?;
    Ok((prompt, answer))
}

fn prompt(row: &Value) -> Result<PromptText, String> {
    extract(row, &Columns::default(), |row| row.prompt())
}

fn prompt_in(column: &str) -> Columns {
    Columns {
        prompt: Column::named(column, "prompts.prompt_column"),
        ..Columns::default()
    }
}

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn dialogue(turns: &[(&str, &str)]) -> PromptText {
    let turns = turns.iter().map(|(role, text)| Message::new(role, *text));
    PromptText::Dialogue(Dialogue::new(turns.collect()))
}

fn text(text: &str) -> PromptText {
    PromptText::Text(text.into())
}

#[test]
fn all_documented_examples_are_parsed() {
    let mut examples = 0;
    for block in DOCUMENTATION.split("\n```json ").skip(1) {
        let (kinds, rest) = block.split_once('\n').expect("a line of kinds");
        let (rows, _) = rest.split_once("\n```").expect("an end");
        for row in rows.lines() {
            let value: Value = serde_json::from_str(row).unwrap_or_else(|e| panic!("{e}: {row}"));
            let columns = Columns {
                chat: kinds.starts_with("chat "),
                ..Columns::default()
            };
            let of = |read: &dyn Fn(&ParsedRow<'_>) -> Result<PromptText, String>| {
                extract(&value, &columns, read)
            };
            let all = [
                ("prompt", of(&|row| row.prompt())),
                ("answered", of(&|row| Ok(row.answered()?.prompt))),
                ("pair", of(&|row| Ok(row.pair()?.prompt))),
            ];
            for (kind, read) in all {
                let is_dialogue = matches!(read, Ok(PromptText::Dialogue(_)));
                assert!(is_dialogue || read.is_err() || !columns.chat, "{row}");
                let expected = kinds.split(' ').any(|name| name == kind);
                // A dialogue without a usable answer is still a prompt.
                if expected || kind != "prompt" {
                    assert_eq!(read.is_ok(), expected, "as {kind}: {read:?} of {row}");
                }
            }
            examples += 1;
        }
    }
    assert!(examples >= 25, "{examples} examples");
}

#[test]
fn pairs_are_parsed_in_every_format() {
    let user = turn("user", "q");
    let assistant = |text: &str| turn("assistant", text);
    let question = dialogue(&[("user", "q")]);
    let with_system = dialogue(&[("system", "s"), ("user", "q")]);
    let many = dialogue(&[("user", "first?"), ("assistant", "x"), ("user", "q")]);
    let complete = |answer: &str| {
        json!([
            turn("user", "first?"),
            assistant("x"),
            user,
            assistant(answer)
        ])
    };
    let ab = |prompt: &PromptText| (prompt.clone(), "a".to_owned(), "b".to_owned());
    let cases = [
        (
            json!({"prompt": "q", "chosen": "a", "rejected": "b"}),
            ab(&text("q")),
        ),
        (
            json!({"prompt": [user], "chosen": [assistant("a")], "rejected": [assistant("b")]}),
            ab(&question),
        ),
        (
            json!({"prompt": [user], "chosen": "a", "rejected": assistant("b")}),
            ab(&question),
        ),
        (
            json!({"chosen": [user, assistant("a")], "rejected": [user, assistant("b")]}),
            ab(&question),
        ),
        // UltraFeedback: the dialogues have turns that the text prompt lacks.
        (
            json!({"prompt": "first?", "chosen": complete("a"), "rejected": complete("b"), "messages": complete("a")}),
            ab(&many),
        ),
        (
            json!({"prompt": [user], "chosen": [turn("system", "s"), user, assistant("a")],
                "rejected": [turn("system", "s"), user, assistant("b")]}),
            ab(&with_system),
        ),
        (
            json!({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}),
            ab(&question),
        ),
        (
            json!({"conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}),
            ab(&question),
        ),
        (
            json!({"messages": [user, assistant("a")], "chosen": "a", "rejected": "b"}),
            ab(&question),
        ),
        (
            json!({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}),
            ab(&with_system),
        ),
        (
            json!({"system": "", "question": "q", "chosen": "a", "rejected": "b"}),
            ab(&question),
        ),
        (
            json!({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}),
            ab(&with_system),
        ),
        (
            json!({"instruction": "do", "input": "this", "chosen": "a", "rejected": "b"}),
            ab(&dialogue(&[("user", "do\nthis")])),
        ),
    ];
    for (row, expected) in cases {
        assert_eq!(pair(&row), Ok(expected), "{row}");
        // The prompt does not depend on the use of the row.
        assert_eq!(prompt(&row), pair(&row).map(|(prompt, ..)| prompt), "{row}");
        assert_eq!(
            answered(&row).map(|(_, answer)| answer),
            Ok("a".into()),
            "{row}"
        );
    }
}

#[test]
fn the_implicit_prompt_of_texts_is_their_common_prefix() {
    let hh = |tail: &str| format!("\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: {tail}");
    for (chosen, rejected, cut) in [
        (
            hh("a"),
            hh("b"),
            "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:",
        ),
        (
            "\n\nHuman: q\n\nAssistant: a".into(),
            "\n\nHuman: q\n\nAssistant: b\n\nHuman: r\n\nAssistant: c".into(),
            "\n\nHuman: q\n\nAssistant:",
        ),
        (
            hh("a"),
            hh("a"),
            "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:",
        ),
        // TRL's own example, as extract_prompt gives it.
        (
            "The sky is blue.".into(),
            "The sky is green.".into(),
            "The sky is",
        ),
        ("Où est-ce?".into(), "Où est-il?".into(), "Où est-"),
    ] {
        let row = json!({"chosen": chosen, "rejected": rejected});
        let expected = (
            text(cut),
            chosen[cut.len()..].to_owned(),
            rejected[cut.len()..].to_owned(),
        );
        assert_eq!(pair(&row), Ok(expected), "{row}");
    }
}

/// Columns of text prompts that are dialogues.
fn chat() -> Columns {
    Columns {
        chat: true,
        ..Columns::default()
    }
}

/// Checks the prompt and the answers of a pair that is read with `chat`.
fn assert_chat_pair(row: &Value, prompt: &PromptText, answers: [&str; 2]) {
    let read = extract(row, &chat(), |row| row.pair());
    let read = read.unwrap_or_else(|error| panic!("{row}: {error}"));
    assert_eq!(&read.prompt, prompt, "{row}");
    assert_eq!(
        [read.chosen.as_str(), read.rejected.as_str()],
        answers,
        "{row}"
    );
    assert!(!read.has_later_turns, "{row}");
}

#[test]
fn transcripts_are_their_turns_with_chat() {
    let asked = dialogue(&[("user", "q")]);
    let twice = dialogue(&[("user", "q"), ("assistant", "x"), ("user", "r")]);
    let hh = |tail: &str| format!("\n\nHuman: q\n\nAssistant: x \n\nHuman: r\n\nAssistant:{tail}");
    let ab = ["a", "b"];
    let row = json!({"chosen": hh(" a\n"), "rejected": hh(" b")});
    assert_chat_pair(&row, &twice, ab);
    let row = json!({"prompt": hh(""), "chosen": " a", "rejected": "b "});
    assert_chat_pair(&row, &twice, ab);
    // White space and a mark before the first turn, other line ends, and several empty lines.
    let prompt = "\u{feff} Human: q\r\n\r\nAssistant:";
    let row = json!({"prompt": prompt, "chosen": "a", "rejected": "b"});
    assert_chat_pair(&row, &asked, ab);
    let windows = ["a", "b"].map(|answer| format!("\nHuman: q\r\n\r\n\r\nAssistant: {answer}"));
    let row = json!({"chosen": windows[0], "rejected": windows[1]});
    assert_chat_pair(&row, &asked, ab);
    // Empty turns stay, and two of one speaker are one.
    let prompt = "Human:\n\nAssistant:\n\nHuman: q \n\nHuman: r";
    let row = json!({"prompt": prompt, "chosen": "a", "rejected": "b"});
    let merged = dialogue(&[("user", ""), ("assistant", ""), ("user", "q\n\nr")]);
    assert_chat_pair(&row, &merged, ab);
    // A turn that is continued keeps the white space on both sides of the cut.
    let prompt = "Human: q\n\nAssistant: It is ";
    let row = json!({"prompt": prompt, "chosen": " a", "rejected": "b "});
    let continued = dialogue(&[("user", "q"), ("assistant", "It is ")]);
    assert_chat_pair(&row, &continued, [" a", "b "]);
}

#[test]
fn other_texts_are_a_turn_of_the_user_with_chat() {
    for prompt in ["q", "Human: rights", "Go on:\n\nHuman: q\n\nAssistant:"] {
        let row = json!({"prompt": prompt, "chosen": "a", "rejected": " b"});
        assert_chat_pair(&row, &dialogue(&[("user", prompt)]), ["a", "b"]);
    }
    // Messages stay as they are.
    let row = json!({"prompt": [turn("user", "q")], "chosen": " a", "rejected": "b"});
    assert_chat_pair(&row, &dialogue(&[("user", "q")]), [" a", "b"]);
}

#[test]
fn columns_of_a_dialogue_go_with_a_transcript() {
    let (asked, brief) = (
        dialogue(&[("user", "q")]),
        dialogue(&[("system", "s"), ("user", "q")]),
    );
    let open = "\n\nHuman: q\n\nAssistant:";
    let [chosen, rejected] = [" a", " b"].map(|answer| format!("{open}{answer}"));
    for (system, prompt) in [("s", &brief), ("", &asked)] {
        let row = json!({"system": system, "prompt": open, "chosen": "a", "rejected": "b"});
        assert_chat_pair(&row, prompt, ["a", "b"]);
        let row = json!({"system": system, "chosen": chosen, "rejected": rejected});
        assert_chat_pair(&row, prompt, ["a", "b"]);
        let row = json!({"system": system, "text": chosen});
        let answered = extract(&row, &chat(), |row| row.answered()).expect("an answer");
        assert_eq!(&answered.prompt, prompt, "{row}");
    }
    let messages = [" a", "b"].map(|answer| json!([turn("assistant", answer)]));
    let row = json!({"prompt": open, "chosen": messages[0], "rejected": messages[1]});
    assert_chat_pair(&row, &asked, [" a", "b"]);
}

#[test]
fn texts_that_are_no_dialogue_are_refused_with_chat() {
    let single = |answer: &str| format!("Human: Up?\nAssistant: {answer}");
    let open = "\n\nHuman: q\n\nAssistant:";
    let by_chance = ["a", "b"].map(single);
    for (row, expected) in [
        // What both begin with ends with "Assistant:".
        (
            json!({"chosen": by_chance[0], "rejected": by_chance[1]}),
            "the texts are no dialogue: one begins with \"Human:\", and each \"Human:\" and \"Assistant:\" follows an \
             empty line",
        ),
        (
            json!({"chosen": single("Blue is it"), "rejected": single("Bright is it")}),
            "each \"Human:\" and \"Assistant:\" follows an empty line",
        ),
        (
            json!({"chosen": "The sky is blue.", "rejected": "The sky is green."}),
            "the texts are no dialogue",
        ),
        (
            json!({"prompt": "q", "chosen": format!("{open} a"), "rejected": format!("{open} b")}),
            "a whole dialogue beside a prompt: leave \"prompt\" out",
        ),
        (
            json!({"history": [["x", "y"]], "prompt": open, "chosen": "a", "rejected": "b"}),
            "\"history\" stands beside a text with turns of its own",
        ),
    ] {
        let error = extract(&row, &chat(), |row| row.pair()).expect_err(expected);
        assert!(error.contains(expected), "{row}: {error}");
    }
    // Without `chat` no system's turn and no tools are lost.
    let row =
        json!({"system": "s", "chosen": format!("{open} a"), "rejected": format!("{open} b")});
    let error = pair(&row).expect_err("a text has no system's turn");
    assert!(
        error.contains("\"system\"") && error.contains("chat = true"),
        "{error}"
    );
}

#[test]
fn texts_that_part_before_their_last_turn_are_marked() {
    let parting = |response: &str| {
        json!({
            "chosen": "\n\nHuman: q\n\nAssistant: a",
            "rejected": format!("\n\nHuman: q\n\nAssistant: {response}"),
        })
    };
    let marked = |row: &Value, columns: &Columns| {
        extract(row, columns, |row| Ok(row.pair()?.has_later_turns)).expect("a pair")
    };
    for response in ["b\n\nHuman: r\n\nAssistant: c", "b\n\nAssistant: c"] {
        assert!(
            marked(&parting(response), &Columns::default()),
            "{response}"
        );
        assert!(marked(&parting(response), &chat()), "{response}");
    }
    // Also where the user has the last word, which is no answer to a text, and in an answer beside its prompt.
    assert!(marked(&parting("b\n\nHuman: r"), &chat()));
    assert!(!marked(&parting("b\nHuman: r"), &chat()));
    let beside = json!({"prompt": "q", "chosen": "b\n\nHuman: r", "rejected": "a"});
    assert!(marked(&beside, &chat()));
    // An answer is the first turn after the common ones.
    let row = parting("b \n\nHuman: r\n\nAssistant: c");
    let reversed = json!({"chosen": row["rejected"], "rejected": row["chosen"]});
    let golden = Columns {
        golden: Some(Column::named("chosen", "prompts.golden_column")),
        ..chat()
    };
    for row in [reversed, beside] {
        let read = extract(&row, &golden, |row| Ok((row.answered()?, row.golden()?)));
        let (answered, golden) = read.expect("an answer");
        assert_eq!(answered.prompt, dialogue(&[("user", "q")]));
        assert_eq!(
            (answered.answer.as_str(), golden.as_deref()),
            ("b", Some("b"))
        );
    }
}

#[test]
fn text_prompts_that_look_like_several_turns_are_recognised() {
    for (prompt, expected) in [
        ("\n\nHuman: q\n\nAssistant:", false),
        ("Who is Human: a name?", false),
        ("Human: q\nAssistant:", true),
        ("Go on:\n\nHuman: q\n\nAssistant:", true),
    ] {
        let row = json!({"prompt": prompt, "completion": "a"});
        let stray = extract(&row, &chat(), |row| Ok(row.has_stray_speakers()));
        assert_eq!(stray, Ok(expected), "{prompt:?}");
        let stray = extract(
            &row,
            &Columns::default(),
            |row| Ok(row.has_stray_speakers()),
        );
        assert_eq!(stray, Ok(false), "{prompt:?}");
    }
}

#[test]
fn the_golden_answer_of_two_texts_is_without_their_prompt() {
    let row = json!({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"});
    for (column, expected) in [("chosen", " a"), ("rejected", " b")] {
        let columns = Columns {
            golden: Some(Column::named(column, "prompts.golden_column")),
            ..Columns::default()
        };
        let golden = extract(&row, &columns, |row| row.golden());
        assert_eq!(golden, Ok(Some(expected.into())));
    }
}

#[test]
fn a_transcript_without_a_prompt_is_a_dialogue_and_its_answer() {
    let text = |text: &str| extract(&json!({"text": text}), &chat(), |row| row.answered());
    let answered = text("\n\nHuman: q\n\nAssistant: a").expect("an answer");
    assert_eq!(answered.prompt, dialogue(&[("user", "q")]));
    assert_eq!(answered.answer, "a");
    let plain = text("The sky is blue.").expect("a text");
    assert_eq!(plain.prompt, super::tests::text(""));
    assert_eq!(plain.answer, "The sky is blue.");
    let error = text("\n\nHuman: q\n\nAssistant: a\n\nHuman: r").expect_err("no answer");
    assert!(error.contains("not an answer of the Assistant"), "{error}");
}

#[test]
fn answers_are_parsed_in_every_format() {
    let user = turn("user", "2 + 2?");
    let assistant = turn("assistant", "4");
    let question = dialogue(&[("user", "2 + 2?")]);
    let parts = json!([{"type": "text", "text": "4", "image": null}]);
    for row in [
        json!({"prompt": user, "completion": [assistant]}),
        json!({"prompt": [user], "completion": "4"}),
        json!({"prompt": user, "chosen": assistant}),
        json!({"prompt": "2 + 2?", "completion": [assistant]}),
        json!({"prompt": "2 + 2?", "completion": [user, assistant]}),
        json!({"prompt": "2 + 2?", "messages": [user, assistant]}),
        json!({"completion": [user, assistant]}),
        json!({"messages": [user, assistant]}),
        json!({"messages": [user, {"role": "assistant", "content": parts}]}),
        json!({"messages": [user], "completion": "4"}),
        json!({"conversation": [user, assistant]}),
        json!({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}),
        json!({"instruction": "2 + 2?", "input": "", "output": "4"}),
        json!({"instruction": "", "input": "2 + 2?", "output": "4"}),
        json!({"question": "2 + 2?", "answer": "4"}),
        json!({"system_prompt": null, "question": "2 + 2?", "response": "4"}),
    ] {
        assert_eq!(answered(&row), Ok((question.clone(), "4".into())), "{row}");
        assert_eq!(prompt(&row), Ok(question.clone()), "{row}");
    }
    let plain = json!({"prompt": "2 + 2?", "completion": "4", "messages": [user]});
    assert_eq!(answered(&plain), Ok((text("2 + 2?"), "4".into())));
    let history = json!({"instruction": "and 3?", "output": "6", "history": [["2 + 2?", "4"]], "system": "add"});
    let turns = [
        ("system", "add"),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "and 3?"),
    ];
    assert_eq!(answered(&history), Ok((dialogue(&turns), "6".into())));
    let alone = json!({"text": "the sky"});
    assert_eq!(answered(&alone), Ok((text(""), "the sky".into())));
    assert!(prompt(&alone).is_err_and(|error| error.contains("has no prompt")));
}

#[test]
fn a_prompt_column_does_not_leak_the_answer() {
    let (user, assistant) = (turn("user", "hi"), turn("assistant", "ANSWER"));
    let question = dialogue(&[("user", "hi")]);
    let share = json!([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ANSWER"}]);
    for (column, row) in [
        ("messages", json!({"messages": [user, assistant]})),
        (
            "messages",
            json!({"prompt": "hi", "messages": [user, assistant]}),
        ),
        (
            "conversations",
            json!({"conversations": share, "messages": null}),
        ),
        (
            "chosen",
            json!({"chosen": [user, assistant], "rejected": [user, turn("assistant", "no")]}),
        ),
        ("chosen", json!({"chosen": [user, assistant]})),
        ("completion", json!({"completion": [user, assistant]})),
    ] {
        let columns = prompt_in(column);
        assert_eq!(
            extract(&row, &columns, |row| row.prompt()),
            Ok(question.clone()),
            "{row}"
        );
    }
    // The value of a prompt column is a prompt that completions continue.
    let row = json!({"prompt": [user, assistant], "mine": [user, assistant]});
    let prefix = dialogue(&[("user", "hi"), ("assistant", "ANSWER")]);
    for column in ["prompt", "mine"] {
        assert_eq!(
            extract(&row, &prompt_in(column), |row| row.prompt()),
            Ok(prefix.clone())
        );
    }
}

#[test]
fn configured_columns_are_read_in_every_format() {
    let text_row = json!({"question": "q", "good": "a", "bad": "b", "gold": "c"});
    let columns = Columns {
        prompt: Column::named("question", "prompts.prompt_column"),
        answer: Column::named("good", "sft.completion_column"),
        golden: Some(Column::named("gold", "prompts.golden_column")),
        chosen: Column::named("good", "chosen_column"),
        rejected: Column::named("bad", "rejected_column"),
        ..Columns::default()
    };
    let read = extract(&text_row, &columns, |row| row.pair()).expect("a pair");
    assert_eq!((read.prompt, read.rejected.as_str()), (text("q"), "b"));
    assert_eq!(
        extract(&text_row, &columns, |row| Ok(row.answered()?.answer)),
        Ok("a".into())
    );
    assert_eq!(
        extract(&text_row, &columns, |row| row.golden()),
        Ok(Some("c".into()))
    );
    let complete = |answer: &str| json!([turn("user", "q"), turn("assistant", answer)]);
    let row = json!({"question": "q", "good": complete("a"), "bad": complete("b"), "gold": complete("c")});
    let read = extract(&row, &columns, |row| row.pair()).expect("a pair");
    assert_eq!(
        (read.prompt, read.chosen.as_str()),
        (dialogue(&[("user", "q")]), "a")
    );
    assert_eq!(
        extract(&row, &columns, |row| row.golden()),
        Ok(Some("c".into()))
    );
    // Orca and Alpaca with their own column names configured are read completely.
    let orca = json!({"system": "s", "question": "q", "chosen": "a", "rejected": "b"});
    let with_system = dialogue(&[("system", "s"), ("user", "q")]);
    assert_eq!(
        extract(&orca, &prompt_in("question"), |row| row.prompt()),
        Ok(with_system)
    );
    let alpaca = json!({"instruction": "do", "input": "this", "chosen": "a", "rejected": "b"});
    let both = dialogue(&[("user", "do\nthis")]);
    assert_eq!(
        extract(&alpaca, &prompt_in("instruction"), |row| row.prompt()),
        Ok(both)
    );
    // A golden answer does not affect the format.
    let golden = Columns {
        golden: Some(Column::named("messages", "prompts.golden_column")),
        ..Columns::default()
    };
    let row = json!({"messages": [turn("user", "q"), turn("assistant", "a")], "golden": "b"});
    assert_eq!(
        extract(&row, &golden, |row| row.golden()),
        Ok(Some("a".into()))
    );
    assert_eq!(
        extract(&row, &golden, |row| row.prompt()),
        Ok(dialogue(&[("user", "q")]))
    );
}

#[test]
fn tools_and_template_variables_are_part_of_the_dialogue() {
    let tool = json!({"type": "function", "function": {"name": "now", "parameters": {}}});
    for tools in [json!([tool]), json!(json!([tool]).to_string())] {
        let row = json!({"prompt": [turn("user", "q")], "tools": tools,
            "chat_template_kwargs": {"enable_thinking": false}});
        let Ok(PromptText::Dialogue(read)) = prompt(&row) else {
            panic!("{row} is a dialogue")
        };
        assert_eq!(read.tools, std::slice::from_ref(&tool));
        assert_eq!(read.template_kwargs["enable_thinking"], json!(false));
    }
    let defaulted =
        json!({"type": "function", "function": {"name": "now", "parameters": {"default": null}}});
    let row = json!({"prompt": [turn("user", "q")], "tools": [defaulted]});
    let Ok(PromptText::Dialogue(read)) = prompt(&row) else {
        panic!("{row} is a dialogue")
    };
    assert_eq!(read.tools, [defaulted], "a default may be null");
    for none in [json!(null), json!([]), json!("")] {
        let row = json!({"prompt": [turn("user", "q")], "tools": none});
        assert_eq!(prompt(&row), Ok(dialogue(&[("user", "q")])), "{row}");
        assert_eq!(
            prompt(&json!({"prompt": "q", "tools": none})),
            Ok(text("q"))
        );
    }
    let complete = json!([turn("user", "q"), turn("assistant", "a")]);
    let row = json!({"messages": complete, "tools": [tool]});
    let (prompt, _) = answered(&row).expect("an answer");
    assert!(matches!(prompt, PromptText::Dialogue(read) if read.tools.len() == 1));
}

#[test]
fn rows_have_a_kind_of_prompt() {
    let (user, assistant) = (turn("user", "hi"), turn("assistant", "ANSWER"));
    let complete = json!([user, assistant]);
    for (column, row, expected) in [
        (
            "prompt",
            json!({"prompt": "hi", "completion": " you"}),
            PromptKind::Text,
        ),
        (
            "prompt",
            json!({"chosen": "hi a", "rejected": "hi b"}),
            PromptKind::Text,
        ),
        (
            "prompt",
            json!({"prompt": "hi", "system": "s"}),
            PromptKind::Dialogue,
        ),
        ("prompt", json!({"prompt": complete}), PromptKind::Dialogue),
        (
            "prompt",
            json!({"messages": complete}),
            PromptKind::Dialogue,
        ),
        ("dialog", json!({"dialog": complete}), PromptKind::Continued),
        (
            "messages",
            json!({"messages": complete}),
            PromptKind::Dialogue,
        ),
        ("prompt", json!({"text": "hi"}), PromptKind::TextOnly),
    ] {
        let kind = extract(&row, &prompt_in(column), |row| Ok(row.kind()));
        assert_eq!(kind, Ok(expected), "{row}");
    }
}

#[test]
fn answers_that_begin_with_their_prompt_are_recognised() {
    for (row, expected) in [
        (json!({"prompt": "hi", "completion": " you"}), false),
        (json!({"prompt": "hi", "completion": "hi you"}), true),
        (
            json!({"prompt": "hi", "chosen": "hi a", "rejected": "hi b"}),
            true,
        ),
        (
            json!({"prompt": "hi", "chosen": "hi a", "rejected": "b"}),
            false,
        ),
        (json!({"chosen": "hi a", "rejected": "hi b"}), false),
        (
            json!({"prompt": [turn("user", "hi")], "completion": "hi you"}),
            false,
        ),
    ] {
        let repeats = extract(&row, &Columns::default(), |row| Ok(row.repeats_prompt()));
        assert_eq!(repeats, Ok(expected), "{row}");
    }
    let row = json!({"prompt": "hi", "completion": "hi you"});
    assert_eq!(
        extract(&row, &chat(), |row| Ok(row.repeats_prompt())),
        Ok(true)
    );
}

#[test]
fn unread_columns_are_listed() {
    let columns = Columns::default();
    let row = json!({"prompt": "q", "completion": "a", "score": 1, "input": "x", "system": null});
    let unread = extract(&row, &columns, |row| {
        Ok(row
            .unread()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>())
    });
    assert_eq!(unread, Ok(vec!["score".to_owned(), "input".into()]));
    let row = json!({"instruction": "q", "input": "x", "output": "a"});
    assert_eq!(extract(&row, &columns, |row| Ok(row.unread().len())), Ok(0));
    // A dialogue beside a prompt with answers is not read, and said so.
    let row = json!({"prompt": "q", "chosen": "x", "rejected": "y",
        "messages": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "mid"}]});
    let unread = extract(&row, &columns, |row| {
        Ok(row.unread().into_iter().map(str::to_owned).collect())
    });
    assert_eq!(unread, Ok(vec!["messages".to_owned()]));
}

#[test]
fn columns_beside_those_that_are_read_are_unread() {
    let (user, assistant) = (turn("user", "q0"), turn("assistant", "a0"));
    let complete = json!([user, assistant]);
    let share = json!([{"from": "human", "value": "q0"}, {"from": "gpt", "value": "a0"}]);
    let scored = Columns {
        golden: Some(Column::named("answer", "prompts.golden_column")),
        label: Some(LabelColumns::Probability(Column::named(
            "p",
            "pairs.label_column",
        ))),
        ..Columns::default()
    };
    let plain = Columns::default();
    for (row, columns, expected) in [
        // HuggingFaceH4/ultrachat_200k.
        (
            json!({"prompt": "P0", "messages": complete}),
            &plain,
            &["prompt"][..],
        ),
        (
            json!({"prompt": [user], "messages": complete}),
            &plain,
            &["messages"],
        ),
        (
            json!({"conversations": share, "messages": complete}),
            &plain,
            &["conversations"],
        ),
        (
            json!({"conversations": share, "messages": complete}),
            &prompt_in("conversations"),
            &["messages"],
        ),
        (
            json!({"prompt": "q", "completion": "a", "output": "b", "response": null, "answer": "c"}),
            &plain,
            &["output", "answer"],
        ),
        (
            json!({"prompt": "q", "output": "b", "answer": "c"}),
            &plain,
            &["answer"],
        ),
        // UltraFeedback.
        (
            json!({"prompt": "q0", "messages": complete, "chosen": complete, "rejected": complete}),
            &plain,
            &["prompt", "messages"],
        ),
        (
            json!({"chosen": "The a", "rejected": "The b", "output": "c"}),
            &plain,
            &["output"],
        ),
        (
            json!({"system": "s", "system_prompt": "t", "question": "q", "answer": "a"}),
            &plain,
            &["system_prompt"],
        ),
        // Columns that the settings name are read beside the format's own.
        (
            json!({"prompt": "q", "completion": "a", "answer": "c", "p": 1, "q": 1}),
            &scored,
            &["q"],
        ),
        (json!({"messages": complete, "tools": []}), &plain, &[]),
    ] {
        let unread = extract(&row, columns, |row| {
            Ok(row
                .unread()
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>())
        });
        let expected = expected.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(unread, Ok(expected), "{row}");
    }
    // Such a prompt is not one turn of the user either.
    let row = json!({"prompt": "Human: q0\nAssistant:", "messages": complete});
    let stray = extract(&row, &chat(), |row| Ok(row.has_stray_speakers()));
    assert_eq!(stray, Ok(false));
}

#[test]
fn an_answer_that_is_marked_as_not_trained_on_is_refused() {
    let user = turn("user", "q0");
    let marked = |key: &str, mark: Value| {
        let mut turn = turn("assistant", "a0");
        turn[key] = mark;
        turn
    };
    let share = |from: &str, train: bool| json!({"from": from, "value": "x", "train": train});
    for (row, expected) in [
        (
            json!({"messages": [user, marked("weight", json!(0))]}),
            "column \"messages\": turn 2 is the answer, and its \"weight\" is 0",
        ),
        (
            json!({"messages": [user, marked("weight", json!(0.0))]}),
            "its \"weight\" is 0.0",
        ),
        (
            json!({"conversations": [share("human", false), share("gpt", false)]}),
            "column \"conversations\": turn 2 is the answer, and its \"train\" is false",
        ),
        (
            json!({"conversations": [share("human", true), share("function_call", false)]}),
            "its \"train\" is false",
        ),
        (
            json!({"prompt": "q0", "completion": marked("train", json!(false))}),
            "column \"completion\": turn 1 is the answer",
        ),
        (
            json!({"messages": [user, marked("weight", json!(0))], "completion": "a0"}),
            "column \"messages\": turn 2",
        ),
        (
            json!({"chosen": [user, marked("weight", json!(0))], "rejected": [user, turn("assistant", "b")]}),
            "column \"chosen\": turn 2",
        ),
    ] {
        let error = answered(&row).expect_err(expected);
        assert!(error.contains(expected), "{row}: {error}");
        assert!(error.contains("remove the row, or the key"), "{error}");
        // It is a prompt like any other.
        assert!(prompt(&row).is_ok(), "{row}");
    }
    for row in [
        json!({"messages": [user, marked("weight", json!(1))]}),
        json!({"messages": [user, marked("weight", Value::Null)]}),
        json!({"messages": [user, marked("weight", json!(0)), user, marked("weight", json!(1))]}),
        json!({"conversations": [share("human", false), share("gpt", true)]}),
        json!({"prompt": [user, marked("train", json!(false)), user], "completion": "a0"}),
        json!({"chosen": [user, turn("assistant", "a")], "rejected": [user, marked("weight", json!(0))]}),
    ] {
        let read = answered(&row);
        assert!(read.is_ok(), "{row}: {read:?}");
    }
}

fn assert_pair_errors(cases: &[(Value, &str)]) {
    for (row, expected) in cases {
        let error = pair(row).expect_err(expected);
        assert!(error.contains(expected), "{row}: {error}");
    }
}

#[test]
fn missing_parts_of_a_pair_are_reported() {
    let user = turn("user", "q");
    let assistant = |text: &str| turn("assistant", text);
    assert_pair_errors(&[
        (
            json!({"prompt": "q", "chosen": "a"}),
            "no column \"rejected\" among \"prompt\", \"chosen\"",
        ),
        (
            json!({"prompt": "q", "chosen": null, "rejected": "b"}),
            "the value of column \"chosen\" is null",
        ),
        (
            json!({"prompt": 1, "chosen": "a", "rejected": "b"}),
            "column \"prompt\": 1 is neither text nor messages",
        ),
        (
            json!({"prompt": [], "chosen": "a", "rejected": "b"}),
            "the list of messages is empty",
        ),
        (json!({"chosen": "a", "rejected": "b"}), "no common prefix"),
        (
            json!({"chosen": "q a", "rejected": null}),
            "the value of column \"rejected\" is null",
        ),
        (
            json!({"chosen": "q a", "rejected": 5}),
            "column \"rejected\" is not text but 5",
        ),
        (
            json!({"chosen": "q a"}),
            "there is no column \"rejected\" among \"chosen\"; a row without a column \"prompt\" needs both texts",
        ),
        (
            json!({"rejected": "q b", "good": "q a"}),
            "there is no column \"chosen\" among \"rejected\", \"good\"",
        ),
        (
            json!({"query": "q", "chosen": "The a", "rejected": "The b"}),
            "\"query\" may be the prompt",
        ),
        (
            json!({"chosen": [user], "rejected": [user]}),
            "the last turn is the user's (\"q\")",
        ),
        (
            json!({"chosen": [user, assistant("a")], "rejected": "b"}),
            "a complete dialogue and the other only an answer",
        ),
        (
            json!({"prompt": "q", "chosen": 3, "rejected": "b"}),
            "column \"chosen\": 3 is neither text nor messages",
        ),
    ]);
}

#[test]
fn inconsistent_dialogues_of_a_pair_are_reported() {
    let user = turn("user", "q");
    let assistant = |text: &str| turn("assistant", text);
    assert_pair_errors(&[
        (
            json!({"prompt": "q", "chosen": [user, assistant("a"), turn("user", "thanks")],
                "rejected": [user, assistant("b"), turn("user", "thanks")]}),
            "column \"chosen\": the last turn is the user's (\"thanks\"), not an answer",
        ),
        (
            json!({"chosen": [user, assistant("a"), user, assistant("c")], "rejected": [user, assistant("b"), user, assistant("d")]}),
            "differ from turn 2 on",
        ),
        (
            json!({"prompt": [user], "chosen": [assistant("a"), user, assistant("c")], "rejected": [assistant("b")]}),
            "the answer has 3 turns",
        ),
        (
            json!({"prompt": [turn("user", "other")], "chosen": [user, assistant("a")], "rejected": [user, assistant("b")]}),
            "have different prompts",
        ),
        (
            json!({"messages": [user, assistant("c")], "chosen": "a", "rejected": "b"}),
            "a different answer (\"c\")",
        ),
        (
            json!({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: thanks", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
            "the Human's",
        ),
        (
            json!({"prompt": [turn("system", "s")], "chosen": "a", "rejected": "b"}),
            "the system's",
        ),
        (
            json!({"system": "t", "prompt": [turn("system", "s"), user], "chosen": "a", "rejected": "b"}),
            "\"system\" and the system message of the dialogue differ",
        ),
        (
            json!({"prompt": "q", "images": ["x.png"], "chosen": "a", "rejected": "b"}),
            "column \"images\"",
        ),
        (
            json!({"prompt": "q", "images": [], "videos": ["x.mp4"], "chosen": "a", "rejected": "b"}),
            "column \"videos\"",
        ),
        (
            json!({"prompt": "q", "tools": [{}], "chosen": "a", "rejected": "b"}),
            "column \"tools\" is for a chat template",
        ),
    ]);
}

#[test]
fn missing_columns_are_reported_with_their_setting() {
    let columns = prompt_in("question");
    for (row, expected) in [
        (
            json!({"text": "a"}),
            "no column \"question\" among \"text\"; set prompts.prompt_column to use another",
        ),
        (
            json!({"question": null}),
            "the value of column \"question\" is null",
        ),
        (json!({"question": 3}), "column \"question\": 3 is neither"),
    ] {
        let error = extract(&row, &columns, |row| row.prompt()).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
    for (row, expected) in [
        (json!({}), "the row is empty"),
        (json!({"messages": "a"}), "\"messages\" is not a list"),
        (
            json!({"messages": "[{\"role\": \"user\", \"content\": \"hi\"}]"}),
            "it is JSON as text; write the list itself",
        ),
        (
            json!({"messages": [turn("assistant", "4")]}),
            "no turn before the answer",
        ),
    ] {
        let error = prompt(&row).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
    for (row, expected) in [
        (json!({"prompt": "a"}), "no column \"completion\""),
        (
            json!({"messages": [turn("user", "4")]}),
            "the last turn of \"messages\" is the user's",
        ),
        (
            json!({"prompt": "a", "completion": "b", "label": false}),
            "\"label\" is false",
        ),
    ] {
        let error = answered(&row).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_route_is_text_a_number_or_a_golden_answer_and_may_be_missing() {
    let columns = |golden: Option<&str>| Columns {
        golden: golden.map(|name| Column::named(name, "prompts.golden_column")),
        route: Some(Column::named("task", "prompts.route_column")),
        ..Columns::default()
    };
    let route = |task: Value, golden| {
        let row = json!({"prompt": "q", "task": task});
        extract(&row, &columns(golden), |row| row.route())
    };
    let missing = json!({"prompt": "q"});
    assert_eq!(
        extract(&missing, &columns(None), |row| row.route()),
        Ok(None)
    );
    for (task, expected) in [
        (json!("math"), Some("math")),
        (json!(7), Some("7")),
        (json!(true), Some("true")),
        (json!(" "), None),
        (Value::Null, None),
    ] {
        let found = route(task.clone(), None);
        assert_eq!(found, Ok(expected.map(str::to_owned)), "{task}");
    }
    let messages = json!([turn("assistant", "42")]);
    let refused = route(messages.clone(), None).expect_err("a list");
    assert!(
        refused.contains("column \"task\" is neither text nor a number"),
        "{refused}"
    );
    assert!(refused.contains("prompts.route_column"), "{refused}");
    assert_eq!(route(messages, Some("task")), Ok(Some("42".into())));
}
