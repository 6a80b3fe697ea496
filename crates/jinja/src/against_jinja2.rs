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
    assert_rejected(templates);
    // Reference cycles are freed too.
    let cyclic = "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns == ns }}{{ [ns, ns]|unique|list|length }}";
    assert_eq!(rendered(cyclic, &Map::new()).as_deref(), Ok("True1"));
    let nested =
        "{% macro f(n) %}[{% if n %}{{ f(n - 1) }}{% endif %}]{% endmacro %}{{ f(20)|length }}";
    assert_eq!(rendered(nested, &Map::new()).as_deref(), Ok("42"));
}

/// Renders the templates on a thread with a small stack; each is an error of bounded length.
fn assert_rejected(templates: impl IntoIterator<Item = String> + Send + 'static) {
    let run = move || {
        for template in templates {
            let shown: String = template.chars().take(200).collect();
            match rendered(&template, &Map::new()) {
                Ok(text) => panic!("{shown}: {} bytes", text.len()),
                Err(error) => assert!(error.chars().count() < 1100, "{shown}: {error}"),
            }
        }
    };
    let thread = std::thread::Builder::new().stack_size(512 << 10);
    thread.spawn(run).unwrap().join().unwrap();
}

/// Values that contain one another several times: small, but endless to compare or print.
#[test]
fn values_that_repeat_one_another_are_rejected() {
    let doubled = "{% set ns = namespace(l=[1], m=[1], t=(1,), d={'a': 1}, e={'a': 1}) %}\
                   {% for i in range(100) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}\
                   {% set ns.t = (ns.t, ns.t) %}{% set ns.d = {'a': ns.d, 'b': ns.d} %}\
                   {% set ns.e = {'a': ns.e, 'b': ns.e} %}{% endfor %}";
    let uses = [
        "ns.l",
        "ns.t",
        "ns.d",
        "ns",
        "ns.l == ns.m",
        "ns.l != ns.m",
        "ns.d == ns.e",
        "ns.l < ns.m",
        "ns.l in [ns.m]",
        "[ns.m].index(ns.l)",
        "[ns.m].count(ns.l)",
        "[ns.l, ns.m]|sort",
        "[ns.l, ns.m]|max",
        "[ns.d, ns.e]|map('string')|list",
        "{ns.t: 1}",
        "[ns.t]|unique|list",
        "[ns.l]|select('eq', ns.m)|list",
        "ns.l|tojson",
        "ns.d|tojson(indent=1)",
        "ns.l|string|length",
        "[ns.l]|join",
        "'%s' % [ns.l]",
        "'{}'.format(ns.l)",
        "ns.d.values()|list",
        "none[ns.l].x",
        "[1].index(ns.l)",
    ];
    assert_rejected(uses.map(|expression| format!("{doubled}{{{{ {expression} }}}}")));
}

/// Operations that take long or much, each of which is one step.
#[test]
fn long_operations_are_charged() {
    let big = "{% set b = 'ab' * 4000000 %}{% set c = 'ab' * 3999999 ~ 'ba' %}{% set l = range(100000)|list %}\
               {% set ns = namespace(x=[], n=0) %}{% for i in range(99999) %}";
    let used = [
        "b|length",
        "b == c",
        "b < c",
        "'ba ' in b",
        "b.count('a')",
        "b.find('c')",
        "b|upper|length",
        "b[1:3]",
        "b[3]",
        "b is lower",
        "b|urlencode|length",
        "l|sum",
        "l|max",
        "-1 in l",
        "l.index(-1)",
        "l == range(100000)|list",
        "range(100000) == range(100001)",
        "l|map('string')|list|length",
        "l|batch(2)|list|length",
        "l|select('eq', 1)|list|length",
        "l|sort|first",
        "l|tojson|length",
    ];
    let loops = used.map(|expression| format!("{big}{{% set x = {expression} %}}{{% endfor %}}"));
    let kept = [
        "[[1]|slice(1000000)]",
        "[[1]|slice(100000)|list]",
        "[l|batch(1)]",
        "[b.split('a')]",
    ];
    let kept = kept.map(|kept| format!("{big}{{% set ns.x = ns.x + [{kept}] %}}{{% endfor %}}"));
    let numbers: String = (0..50_000)
        .map(|i| format!("{{% set v{i} = 1 %}}"))
        .collect();
    let parameters: Vec<String> = (0..50_000).map(|i| format!("a{i}=1")).collect();
    let parameters = parameters.join(",");
    let others = [
        format!("{numbers}{{{{ v1 }}}}"),
        format!("{{% macro f({parameters}) %}}{{% endmacro %}}{{{{ f() }}}}"),
        format!("{{{{ 1|{}a }}}}", "a.".repeat(400_000)),
        format!("{{{{ {}1 }}}}", "1,".repeat(500_000) + "*"),
        " ".repeat(1 << 20) + "  ",
        "{% set b = 'a' * 999999 %}{% for i in range(99) %}{{ b }}{% endfor %}".to_owned(),
        "{{ strftime_now('%c' * 4000000) }}".to_owned(),
        "{{ raise_exception('a' * 8000000) }}".to_owned(),
        "{{ [{}]|map(attribute='a.' * 4000000)|list }}".to_owned(),
        "{{ [{}]|sort(attribute='a,' * 4000000) }}".to_owned(),
        "{{ range(99999)|map('default', *range(99999))|list }}".to_owned(),
        "{% for i in range(99999) %}{% for j in range(99) %}{% macro f() %}{% endmacro %}{% endfor %}{% endfor %}".to_owned(),
        "{% macro f(n) %}{% call f(n) %}{{ caller() }}{% endcall %}{% endmacro %}{{ f(1) }}".to_owned(),
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_owned(),
        "{% macro f(n) %}{% for i in range(99999) %}{{ f(i) }}{% endfor %}{% endmacro %}{{ f(1) }}".to_owned(),
    ];
    assert_rejected(loops.into_iter().chain(kept).chain(others));
}

/// Numbers at the ends of their types, and an order that is none.
#[test]
fn extreme_numbers_do_not_panic() {
    let most = i128::MAX;
    let least = format!("(-{most} - 1)");
    let refused = [
        format!("range({least}, {most})"),
        format!("range({most}, {least}, {least})"),
        format!("range(0, {most})"),
        "'%.99999f' % 1.5".to_owned(),
        "'{:.99999e}'.format(1.5)".to_owned(),
        "['nan'|float, 1, 2]|sort".to_owned(),
        "1.5|round(2000000000, 'ceil')".to_owned(),
        format!("{most}|round(-38)"),
        format!("'a'|truncate({least})"),
        format!("{least}|abs"),
        format!("{least} // -1"),
    ];
    assert_rejected(refused.map(|expression| format!("{{{{ {expression} }}}}")));
    for (expression, expected) in [
        (format!("'a'|truncate({most})"), "a".to_owned()),
        ("(10 ** 37 * 4)|round(-38)".to_owned(), "0".to_owned()),
        (
            "(10 ** 37 * 6)|round(-38)".to_owned(),
            10i128.pow(38).to_string(),
        ),
        (
            format!("range({most}, {most} - 9, {least})|list"),
            format!("[{most}]"),
        ),
        (
            format!("[1, 2, 3][{least}:{most}:{most}]"),
            "[1]".to_owned(),
        ),
        (
            format!("[1, 2, 3][{most}:{least}:{least}]"),
            "[3]".to_owned(),
        ),
        ("'--5'|int".to_owned(), "0".to_owned()),
    ] {
        let text = rendered(&format!("{{{{ {expression} }}}}"), &Map::new());
        assert_eq!(text.as_deref(), Ok(&*expected), "{expression}");
    }
    // As Python's sort, stable for any number of elements.
    let sorted = "{% set l = range(100)|list %}{{ (l[::-1] + l)|sort == (l + l)|sort }}";
    assert_eq!(rendered(sorted, &Map::new()).as_deref(), Ok("True"));
}

/// Mutations of the templates above: never a panic, and nothing after the limits.
#[test]
fn mutated_templates_do_not_panic() {
    let variables = serde_json::from_str(&read("variables.json")).unwrap();
    let templates: Vec<String> = read("cases.jsonl")
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["template"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    let parts = [
        "0", "-1", "99999999", "1e308", "''", "[]", "{}", "none", "x", "messages", "{{", "}}",
        "{%", "%}", "|", ".", "(", ")", "*", "**", "~", ":", ",", "'", "\\", "é", "\n",
    ];
    let mut state = 17u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..20_000 {
        let mut mutated: Vec<char> = templates[random(templates.len())].chars().collect();
        for _ in 0..=random(3) {
            let start = random(mutated.len() + 1);
            let end = (start + random(6)).min(mutated.len());
            let part: Vec<char> = match random(3) {
                0 => Vec::new(),
                1 => parts[random(parts.len())].chars().collect(),
                _ => {
                    let other: Vec<char> = templates[random(templates.len())].chars().collect();
                    let from = random(other.len());
                    other[from..(from + random(20)).min(other.len())].to_vec()
                }
            };
            mutated.splice(start..end, part);
        }
        let template: String = mutated.into_iter().collect();
        let outcome = std::panic::catch_unwind(|| rendered(&template, &variables));
        assert!(outcome.is_ok(), "{template}");
    }
}
