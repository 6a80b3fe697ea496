//! Where a completion begins and ends: chat templates and stop tokens of folders that people have.

use std::{
    fs,
    path::{Path, PathBuf},
};

use house::{Workplace, shared};
use serde_json::{Value, json};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A copy of the small story model, with these values in `config.json` and `tokenizer_config.json`.
fn stories_with(workplace: &Workplace, changes: &[(&str, &str, Value)]) -> Option<PathBuf> {
    let model = shared("turns", "data/models/stories260K")?;
    let copy = workplace.copy_of(&model, "model");
    for (file, key, value) in changes {
        let path = copy.join(file);
        let text = fs::read(&path).expect("it was copied");
        let mut json: Value = serde_json::from_slice(&text).expect("it is JSON");
        json[key] = value.clone();
        fs::write(&path, json.to_string()).expect("it is written");
    }
    Some(copy)
}

#[test]
fn a_text_ends_where_the_tokenizer_says() {
    for case in ["eos-only-tokenizer", "eos-null"] {
        let Some(model) = shared("text_ends", &format!("data/cases/A10/{case}")) else {
            return;
        };
        let workplace = Workplace::new();
        let model = text(&model);
        let call = [
            "generate",
            "--model",
            &model,
            "--prompt",
            "Once upon a time",
            "--json",
        ];
        let length = ["--num", "4", "--max-new-tokens", "400", "--seed", "3"];
        let ended = workplace.run(&[&call[..], &length].concat()).succeeded();
        let mut closed = 0;
        for line in ended.json_lines() {
            let ids = line["ids"].as_array().unwrap();
            let place = ids.iter().position(|id| *id == 1);
            let last = (line["finish"] == "eos").then(|| ids.len() - 1);
            assert_eq!(place, last, "{case}: {line}");
            closed += usize::from(place.is_some());
        }
        assert!(closed > 0, "{case}: none of the four ended");
    }
}

#[test]
fn fine_tuning_closes_a_turn_as_its_template_does() {
    let Some(case) = shared("turn_ends", "data/cases/A09") else {
        return;
    };
    let workplace = Workplace::new();
    let out = text(&workplace.path("out"));
    let set = |key: &str, value: &Path| format!("{key}={:?}", text(value));
    let (model, rows) = (case.join("chat-eot"), case.join("sft-chat.jsonl"));
    let settings = [set("model.path", &model), set("sft.path", &rows)];
    let config = text(&case.join("prompts.toml"));
    let mut call = vec!["sft", &config, "--output", &out];
    for setting in settings
        .iter()
        .map(String::as_str)
        .chain(["sft.steps=80", "sft.train_batch_size=16"])
    {
        call.extend(["--set", setting]);
    }
    workplace.run(&call).succeeded();
    let call = [
        "generate", "--model", &out, "--chat", "--prompt", "Say hi 3", "--num", "1", "--top-k",
        "1", "--json",
    ];
    let line = &workplace.run(&call).succeeded().json_lines()[0];
    assert_eq!(
        line["ids"].as_array().unwrap().last(),
        Some(&json!(1)),
        "{line}"
    );
    // The generation prompt ends with a space, and the answer of the rows has none.
    assert_eq!(line["completion"], "Lily was happy.", "{line}");
}

#[test]
fn a_model_that_nothing_ends_is_named() {
    let workplace = Workplace::new();
    let nothing = [
        ("config.json", "eos_token_id", Value::Null),
        ("tokenizer_config.json", "eos_token", Value::Null),
        ("special_tokens_map.json", "eos_token", Value::Null),
    ];
    let Some(model) = stories_with(&workplace, &nothing) else {
        return;
    };
    let generation = model.join("generation_config.json");
    if generation.exists() {
        fs::remove_file(generation).unwrap();
    }
    let says = "no token ends a completion";
    let path = text(&model);
    let call = [
        "generate",
        "--model",
        &path,
        "--prompt",
        "Once",
        "--max-new-tokens",
        "2",
    ];
    workplace.run(&call).check(0, &[says, &path]);
    let config = workplace.write("run.toml", format!("[model]\npath = {path:?}\n"));
    let checked = workplace.run(&["check", &text(&config)]);
    assert!(checked.err.contains(says), "{}", checked.err);
}

/// Qwen3-Coder's and Nemotron's templates ask whether the tools, which are none, can be gone through.
#[test]
fn templates_of_real_models_render() {
    let Some(templates) = shared("templates_render", "data/cases") else {
        return;
    };
    let turn = |role: &str, content: Value| json!({"role": role, "content": content});
    let user = turn("user", json!("Hi"));
    let parts = json!([{"type": "text", "text": "Hi"}]);
    let cases = [
        ("A04", json!([user]), "Hi"),
        (
            "A16",
            json!([turn("system", json!("Be brief.")), user, user, user]),
            "Hi|Hi|",
        ),
        (
            "A26",
            json!([turn("user", parts)]),
            "[{'type': 'text', 'text': 'Hi'}]",
        ),
    ];
    for (case, prompt, expected) in cases {
        let workplace = Workplace::new();
        let Some(model) = stories_with(&workplace, &[]) else {
            return;
        };
        let scored = |template: &str| {
            fs::write(model.join("chat_template.jinja"), template).unwrap();
            let row = json!({"prompt": prompt, "completion": " x"});
            let rows = text(&workplace.write("rows.jsonl", row.to_string()));
            let ended = workplace.run(&["score", "--model", &text(&model), "--input", &rows]);
            ended.succeeded().json_lines()[0]["logprobs"].clone()
        };
        let template =
            fs::read_to_string(templates.join(case).join("chat_template.jinja")).unwrap();
        let literal = format!("{{% raw %}}{expected}{{% endraw %}}");
        assert_eq!(scored(&template), scored(&literal), "{case}");
    }
}
