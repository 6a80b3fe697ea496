//! Chat templates and stop tokens of real-world model folders.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{Sandbox, make_pipe, shared};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A copy of the story model with these keys changed, each given as file, key and value.
fn stories_with(sandbox: &Sandbox, changes: &[(&str, &str, Value)]) -> Option<PathBuf> {
    let model = shared("chat_templates", "data/models/stories260K")?;
    let copy = sandbox.copy_of(&model, "model");
    for (file, key, value) in changes {
        let path = copy.join(file);
        let text = fs::read(&path).expect("the file was copied");
        let mut json: Value = serde_json::from_slice(&text).expect("valid JSON");
        json[key] = value.clone();
        fs::write(&path, json.to_string()).expect("the file is writable");
    }
    Some(copy)
}

#[test]
fn completions_end_at_the_end_token_of_the_tokenizer() {
    for case in ["eos-only-tokenizer", "eos-null"] {
        let Some(model) = shared("text_ends", &format!("data/cases/A10/{case}")) else {
            return;
        };
        let sandbox = Sandbox::new();
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
        let result = sandbox.run(&[&call[..], &length].concat()).succeeded();
        let mut ended = 0;
        for line in result.json_lines() {
            let ids = line["ids"].as_array().unwrap();
            let position = ids.iter().position(|id| *id == 1);
            let last = (line["finish"] == "eos").then(|| ids.len() - 1);
            assert_eq!(position, last, "{case}: {line}");
            ended += usize::from(position.is_some());
        }
        assert!(ended > 0, "{case}: none of the four ended");
    }
}

#[test]
fn fine_tuning_learns_the_end_of_turn_of_the_template() {
    let Some(case) = shared("turn_ends", "data/cases/A09") else {
        return;
    };
    let sandbox = Sandbox::new();
    let out = text(&sandbox.path("out"));
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
    sandbox.run(&call).succeeded();
    let call = [
        "generate", "--model", &out, "--chat", "--prompt", "Say hi 3", "--num", "1", "--top-k",
        "1", "--json",
    ];
    let line = &sandbox.run(&call).succeeded().json_lines()[0];
    assert_eq!(
        line["ids"].as_array().unwrap().last(),
        Some(&json!(1)),
        "{line}"
    );
    // The generation prompt ends with a space; the answers of the rows do not start with one.
    assert_eq!(line["completion"], "Lily was happy.", "{line}");
    // A transcript is its turns: the last of them, begun by the assistant, is continued.
    let begun = "Human: Say hi 3\n\nAssistant: Lily was";
    let call = call.map(|argument| match argument {
        "Say hi 3" => begun,
        argument => argument,
    });
    let line = &sandbox.run(&call).succeeded().json_lines()[0];
    assert_eq!(line["completion"], " happy.", "{line}");
}

#[test]
fn a_model_without_stop_tokens_is_reported() {
    let sandbox = Sandbox::new();
    let nothing = [
        ("config.json", "eos_token_id", Value::Null),
        ("tokenizer_config.json", "eos_token", Value::Null),
        ("special_tokens_map.json", "eos_token", Value::Null),
    ];
    let Some(model) = stories_with(&sandbox, &nothing) else {
        return;
    };
    let generation = model.join("generation_config.json");
    if generation.exists() {
        fs::remove_file(generation).unwrap();
    }
    let says = "the model names no stop token";
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
    sandbox.run(&call).check(0, &[says, &path]);
    let config = sandbox.write("run.toml", format!("[model]\npath = {path:?}\n"));
    let checked = sandbox.run(&["check", &text(&config)]);
    assert!(checked.stderr.contains(says), "{}", checked.stderr);
}

/// The templates of Qwen3-Coder and Nemotron test whether `tools`, which is none here, is iterable.
#[test]
fn chat_templates_of_real_models_render() {
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
        let sandbox = Sandbox::new();
        let Some(model) = stories_with(&sandbox, &[]) else {
            return;
        };
        let scored = |template: &str| {
            fs::write(model.join("chat_template.jinja"), template).unwrap();
            let row = json!({"prompt": prompt, "completion": " x"});
            let rows = text(&sandbox.write("rows.jsonl", row.to_string()));
            let result = sandbox.run(&["score", "--model", &text(&model), "--input", &rows]);
            result.succeeded().json_lines()[0]["logprobs"].clone()
        };
        let template =
            fs::read_to_string(templates.join(case).join("chat_template.jinja")).unwrap();
        let literal = format!("{{% raw %}}{expected}{{% endraw %}}");
        assert_eq!(scored(&template), scored(&literal), "{case}");
    }
}

/// A template is an untrusted program: each of these exhausts time, memory or the stack of a naive interpreter.
#[test]
fn hostile_chat_templates_are_refused_with_their_file() {
    let Some(templates) = shared("templates_are_refused", "data/cases/security/templates") else {
        return;
    };
    let doubled = "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}";
    let mut hostile = vec![
        format!("{doubled}{{{{ ns.l }}}}"),
        format!("{{{{ 1|{}a }}}}", "a.".repeat(500_000)),
        " ".repeat(2 << 20),
    ];
    let cases = fs::read_dir(templates).expect("a folder of templates");
    let paths = cases.map(|entry| entry.expect("an entry").path());
    // Long but harmless: 50,000 concatenated letters.
    let paths = paths.filter(|path| !path.ends_with("deeptilde.jinja"));
    hostile.extend(paths.map(|path| fs::read_to_string(path).expect("a template")));
    let sandbox = Sandbox::new();
    let Some(model) = stories_with(&sandbox, &[]) else {
        return;
    };
    let row = json!({"prompt": [{"role": "user", "content": "Hi"}], "completion": " x"});
    let rows = text(&sandbox.write("rows.jsonl", row.to_string()));
    let file = model.join("chat_template.jinja");
    for template in hostile {
        fs::write(&file, template).expect("the file is writable");
        let result = sandbox.run(&["score", "--model", &text(&model), "--input", &rows]);
        result.check(3, &["chat_template.jinja"]).without_panic();
    }
    fs::remove_file(&file).expect("the file is there");
    make_pipe(&file);
    let result = sandbox.run(&["score", "--model", &text(&model), "--input", &rows]);
    result.check(3, &["chat_template.jinja"]).without_panic();
}
