//! Comparison with jinja2.
//!
//! Each line of `tests/cases.jsonl` has a template and its output by jinja2 with `tests/variables.json`, or the
//! exception raised; `tests/expected.py` generates it.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Map, Value, json};

use crate::template::Template;

fn read(file: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    fs::read_to_string(folder.join(file)).unwrap()
}

fn rendered(template: &str, variables: &Map<String, Value>) -> Result<String, String> {
    let template = Template::compile(template).map_err(|error| error.to_string())?;
    template
        .render(variables)
        .map_err(|error| error.to_string())
}

/// Templates that jinja2 renders and this crate rejects are marked `refused`.
#[test]
fn every_construct_matches_jinja2() {
    let variables = serde_json::from_str(&read("variables.json")).unwrap();
    let mut differences = Vec::new();
    for line in read("cases.jsonl").lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let template = case["template"].as_str().unwrap();
        let found = rendered(template, &variables);
        let expected = case["text"].as_str().filter(|_| case["refused"] != true);
        if found.as_deref().ok() != expected {
            differences.push(format!(
                "{template}\n    jinja2: {}{}\n    here:   {found:?}",
                case["text"], case["raises"]
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{} differ:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

/// Chat templates of the shared models. Without these or a Python with jinja2, logs a skip and returns `None`; in CI it
/// panics.
fn real_templates() -> Option<Vec<String>> {
    let root = std::env::var_os("AGON_SHARED").unwrap_or_else(|| "../shared".into());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(root)
        .join("data/tokenizers");
    let has_jinja2 = Command::new("python3")
        .args(["-c", "import jinja2"])
        .output();
    let skipped = if !folder.exists() {
        "AGON_SHARED has no data/tokenizers"
    } else if !has_jinja2.is_ok_and(|output| output.status.success()) {
        "no python3 with jinja2 is installed"
    } else {
        let mut templates = Vec::new();
        collect(&folder, &mut templates);
        return Some(templates);
    };
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "SKIPPED real templates: {skipped}"
    );
    eprintln!("SKIPPED real templates: {skipped}");
    None
}

/// Collects the chat templates in a folder, recursively.
fn collect(folder: &Path, templates: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, templates);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "jinja")
        {
            templates.push(fs::read_to_string(&path).unwrap());
        } else if path.ends_with("tokenizer_config.json") {
            let config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            templates.extend(config["chat_template"].as_str().map(str::to_owned));
        }
    }
}

/// Typical dialogues: with and without system messages, tools, content parts and reasoning.
fn dialogues() -> Vec<Value> {
    let user = json!({"role": "user", "content": "Hi there"});
    let system = json!({"role": "system", "content": "Be brief."});
    let thought =
        json!({"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"});
    let parts =
        json!({"role": "user", "content": [{"type": "text", "text": "It's"}, {"type": "image"}]});
    let arguments = json!({"town": "Zürich <&'>", "at": [1, 2.5, true, null], "deep": {}});
    let call = |arguments: &Value| {
        let call =
            json!({"type": "function", "function": {"name": "look", "arguments": arguments}});
        json!({"role": "assistant", "content": "", "tool_calls": [call]})
    };
    let (as_map, as_text) = (call(&arguments), call(&arguments.to_string().into()));
    let found = json!({"role": "tool", "name": "look", "content": "rain"});
    let reasoned = json!({"role": "assistant", "content": "Yes", "reasoning_content": "hm"});
    vec![
        json!([user]),
        json!([system, user, thought, user]),
        json!([user, thought]),
        json!([system, parts]),
        json!([user, as_map, found]),
        json!([user, as_text, found, thought, user]),
        json!([user, reasoned, user]),
        json!([user, user]),
        json!([thought]),
        json!([{"role": "user"}]),
    ]
}

#[test]
fn real_templates_match_jinja2() {
    let Some(templates) = real_templates() else {
        return;
    };
    let schema =
        json!({"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]});
    let tool = json!({"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": schema}});
    let mut cases = Vec::new();
    for template in &templates {
        for messages in dialogues() {
            for (tools, add_generation_prompt) in [
                (Value::Null, true),
                (json!([tool]), true),
                (Value::Null, false),
            ] {
                let variables = json!({
                    "messages": messages, "tools": tools, "documents": null, "bos_token": "<s>",
                    "eos_token": "</s>", "add_generation_prompt": add_generation_prompt,
                });
                cases.push(json!({"template": template, "variables": variables}));
            }
        }
    }
    let lines: Vec<String> = cases.iter().map(Value::to_string).collect();
    let answers = render_with_jinja2(&(lines.join("\n") + "\n"));
    assert_eq!(answers.len(), cases.len());
    for (case, answer) in cases.iter().zip(answers) {
        let variables = case["variables"].as_object().unwrap();
        let found = rendered(case["template"].as_str().unwrap(), variables);
        assert_eq!(
            found.as_deref().ok(),
            answer["text"].as_str(),
            "{case}\n{answer}\n{found:?}"
        );
    }
}

/// Renders these lines with jinja2.
fn render_with_jinja2(lines: &str) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/expected.py");
    let mut peer = Command::new("python3")
        .arg(script)
        .arg("--stdin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = peer.stdin.take().unwrap();
    let lines = lines.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()).unwrap());
    let output = peer.wait_with_output().unwrap();
    writer.join().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_terminator('\n')
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Untrusted templates with excessive time or memory fail quickly with an error.
#[test]
fn excessive_templates_are_rejected() {
    let deep =
        |part: &str, count: usize, end: &str| format!("{{{{ {}{end} }}}}", part.repeat(count));
    let endless = "{% for a in range(9999) %}{% for a in range(9999) %}{% for a in range(9999) %}x\
                   {% endfor %}{% endfor %}{% endfor %}";
    let growing = "{% set ns = namespace(l=[], m='xx') %}{% for i in range(99000) %}";
    let templates = [
        "{{ 'a\nb'|indent(9999999999) }}".to_owned(),
        "{{ '%999999999999d'|format(1) }}".to_owned(),
        "{{ [1]|batch(99999999999, 0)|list|length }}".to_owned(),
        "{{ [1]|slice(9999999999)|list|length }}".to_owned(),
        "{{ [[1]]|tojson(indent=99999999999) }}".to_owned(),
        "{{ 'a'.center(99999999999) }}".to_owned(),
        "{{ 'a'.zfill(99999999999) }}".to_owned(),
        "{{ 'a' * 99999999999 }}".to_owned(),
        "{{ ('a' * 999999)|replace('a', 'b' * 999999) }}".to_owned(),
        "{{ ('a' * 999999).replace('', 'b' * 999999) }}".to_owned(),
        "{{ range(99999)|join('b' * 999999) }}".to_owned(),
        "{{ ('{0}' * 99999).format('b' * 999999) }}".to_owned(),
        "{{ range(99999)|unique|list|length }}".to_owned(),
        "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(30) }}".into(),
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}".to_owned(),
        format!("{growing}{{% set ns.l = [ns.l] %}}{{% endfor %}}{{{{ ns.l }}}}"),
        format!("{growing}{{% set ns.l = namespace(l=ns.l) %}}{{% endfor %}}{{{{ ns.l }}}}"),
        format!("{growing}{{% set ns.m = ns.m ~ ns.m %}}{{% endfor %}}"),
        format!("{growing}{{% set ns.l = ns.l + ['x' * 99999] %}}{{% endfor %}}"),
        "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns == ns }}{{ ns }}".to_owned(),
        endless.to_owned(),
        deep("a.b", 1, &".b".repeat(9999)),
        deep("1 or ", 9999, "1"),
        deep("'a' ~ ", 9999, "'a'").replace("~ 'a' ~", "+"),
        deep("-", 9999, "1"),
        deep("(", 9999, "1"),
        deep("[", 9999, "1"),
        deep("not ", 9999, "1"),
        "{% if 1 %}".repeat(9999),
    ];
    for template in templates {
        let shown = &template[..template.len().min(60)];
        let found = rendered(&template, &Map::new());
        assert!(
            found.is_err(),
            "{shown}: {:?}",
            found.map(|text| text.len())
        );
    }
    // Reference cycles are freed too.
    let cyclic = "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns == ns }}{{ [ns, ns]|unique|list|length }}";
    assert_eq!(rendered(cyclic, &Map::new()).as_deref(), Ok("True1"));
    let nested =
        "{% macro f(n) %}[{% if n %}{{ f(n - 1) }}{% endif %}]{% endmacro %}{{ f(20)|length }}";
    assert_eq!(rendered(nested, &Map::new()).as_deref(), Ok("42"));
}
