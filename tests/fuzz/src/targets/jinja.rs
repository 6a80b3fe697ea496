//! Chat templates: compiled and rendered.

use std::path::Path;

use jinja::Template;
use serde_json::{Map, Value, json};

use crate::targets::{Input, Outcome};

/// Templates as models have them, and one for each group of features.
const VALID: [&str; 5] = [
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + \
     '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "{%- set ns = namespace(found=false, n=0) -%}\n{%- for m in messages[::-1] -%}\n{%- if not ns.found and \
     m.role == 'user' -%}{%- set ns.found = true -%}{{ loop.index0 ~ ': ' ~ m.content.split(' ')[-1].strip() }}\
     {%- elif m.content is string -%}{{ m.content[:3] | upper }}{%- endif -%}\n{%- endfor -%}",
    "{% macro show(value, depth=0) %}{% if depth < 3 %}{{ show([value], depth + 1) }}{% else %}\
     {{ value | tojson(indent=2) }}{% endif %}{% endmacro %}{{ show(tools) }}\
     {% for k, v in messages[0].items() %}{{ k }}={{ v }},{% endfor %}",
    "{{ range(0, 10, 2) | list | join(', ') }}{{ '%s-%05.1f' | format('a', 1.25) }}{{ messages | map(attribute='role') \
     | unique | sort | first }}{{ 7 // 2 ** 3 % 5 }}{{ 'a' * 3 }}{{ [1, 2] + [3] }}{{ 1 if x is defined else 2 }}",
    "{% if messages | length > 5 %}{{ raise_exception('too many') }}{% endif %}{{ messages | selectattr('role', \
     'equalto', 'user') | list | tojson }}{{ 'abc' | replace('b', 'x') | indent(4) }}\
     {# note #}{% raw %}{{ }}{% endraw %}",
];

/// What costs time, memory or stack, and what ends or begins something.
const FRAGMENTS: [&str; 26] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "(",
    "[",
    "not ",
    "-",
    " ~ 'a'",
    " ** 99999",
    " * 99999999",
    "[::-1]",
    "[-1:9223372036854775807]",
    "{% for i in range(999999999) %}x{% endfor %}",
    "{% for i in messages %}{% for j in messages %}",
    "{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set a = [1] %}{% set b = a.append(a) %}{{ a == a }}{{ a }}",
    "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a }}",
    "|tojson(indent=99999999)",
    "|indent(99999999)",
    "|batch(99999999)|list",
    "|format(1, 2)",
    "'%999999999d'|format(1)",
    ".a.a.a.a",
];

pub(super) fn prepare(_: &Path) -> Input {
    let variables = variables();
    Box::new(move |mutator| {
        let valid = *mutator.pick(&VALID);
        let source = mutator.text(valid, &FRAGMENTS);
        let template = match Template::compile(&source) {
            Ok(template) => template,
            // The caller adds the file.
            Err(error) => {
                return Outcome::of(Err::<(), _>(&error), &["line ", error.message.as_str()]);
            }
        };
        match template.render(&variables) {
            Ok(_) => Outcome::Accepted,
            Err(error) => Outcome::of(Err::<(), _>(&error), &["line ", error.message.as_str()]),
        }
    })
}

fn variables() -> Map<String, Value> {
    let variables = json!({
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_generation_prompt": true,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "what is 2 + 2?"},
            {"role": "assistant", "content": "4", "tool_calls": [{"id": 1}]},
            {"role": "user", "content": "and 3?"},
        ],
    });
    variables.as_object().cloned().unwrap_or_default()
}
