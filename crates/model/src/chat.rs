//! Chat templates: from a dialogue to the one text that the model was trained to continue.
//!
//! A template is a Jinja program that a Hugging Face folder carries. This module promises the text that
//! the `apply_chat_template` of transformers gives with `add_generation_prompt=True`, as far as templates
//! use what minijinja knows; a template that does not compile is refused when the folder is opened. The
//! same dialogue gives the same text on every day: templates that ask for the date are told a fixed one.
//! Tokens this module does not know, save for the names of the special ones.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    value::{Enumerator, Kwargs, Object},
};
use serde::Serialize;
use serde_json::{
    Value as Json,
    ser::{Formatter, PrettyFormatter, Serializer},
};

use messages::{Digest, Message};

use crate::{ModelError, config::read_json};

/// A compiled template, with the special tokens that it may name.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// The template `given`, else `chat_template.jinja` of `folder`, else the one in its
    /// `tokenizer_config.json`; none when there is none of them.
    pub(crate) fn load(folder: &Path, given: Option<&Path>) -> Result<Option<Self>, ModelError> {
        let settings = optional_json(&folder.join("tokenizer_config.json"))?;
        let Some((path, source)) = find_source(folder, given, &settings)? else {
            return Ok(None);
        };
        let special = special_tokens(&[
            settings,
            optional_json(&folder.join("special_tokens_map.json"))?,
        ]);
        let template = Self::compile(&source, special).map_err(|error| ModelError::Malformed {
            path,
            reason: format!(
                "its chat template does not compile: {error}; another file can be named instead"
            ),
        })?;
        Ok(Some(template))
    }

    fn compile(source: &str, special: Vec<(&'static str, String)>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", |value: Value, options: Kwargs| {
            to_json(&value, &options)
        });
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", |format: String| strftime(&format));
        for (name, token) in special {
            environment.add_global(name, token);
        }
        environment.add_template_owned("template", without_generation_tags(source))?;
        Ok(Self { environment })
    }

    /// Digest of the template's text: templates of one digest render alike.
    pub(crate) fn digest(&self) -> Digest {
        let template = self.environment.get_template("template");
        let source = template.as_ref().map_or("", |template| template.source());
        Digest::of(source.as_bytes())
    }

    /// The text of `messages`, ending where the assistant's next turn begins.
    pub(crate) fn render(&self, messages: &[Message]) -> Result<String, ModelError> {
        let messages: Vec<Value> = messages.iter().map(message_value).collect();
        // Transformers passes these two as none, and templates test them without asking whether they are
        // defined.
        let context =
            context! { messages, add_generation_prompt => true, tools => (), documents => () };
        self.environment
            .get_template("template")
            .and_then(|template| template.render(context))
            .map_err(|error| ModelError::ChatTemplate {
                reason: error.to_string(),
            })
    }
}

/// Where the template comes from, and its text.
fn find_source(
    folder: &Path,
    given: Option<&Path>,
    settings: &Json,
) -> Result<Option<(PathBuf, String)>, ModelError> {
    let beside = folder.join("chat_template.jinja");
    let file = given
        .map(Path::to_owned)
        .or_else(|| beside.exists().then_some(beside));
    if let Some(path) = file {
        return match std::fs::read_to_string(&path) {
            Ok(source) => Ok(Some((path, source))),
            Err(source) => Err(ModelError::Unreadable { path, source }),
        };
    }
    let named = &settings["chat_template"];
    let among = || {
        named
            .as_array()?
            .iter()
            .find(|entry| entry["name"] == "default")?["template"]
            .as_str()
    };
    let source = named.as_str().or_else(among);
    Ok(source.map(|source| (folder.join("tokenizer_config.json"), source.to_owned())))
}

/// The special tokens that templates name, from the first source that has each.
fn special_tokens(sources: &[Json]) -> Vec<(&'static str, String)> {
    let text = |token: &Json| {
        token
            .as_str()
            .or(token["content"].as_str())
            .map(str::to_owned)
    };
    ["bos_token", "eos_token", "unk_token", "pad_token"]
        .into_iter()
        .filter_map(|name| Some((name, sources.iter().find_map(|source| text(&source[name]))?)))
        .collect()
}

fn optional_json(path: &Path) -> Result<Json, ModelError> {
    if path.exists() {
        read_json(path)
    } else {
        Ok(Json::Null)
    }
}

/// `{% generation %}` marks the assistant's words for transformers' loss masks and prints nothing: a
/// scope, which is what `{% with %}` is.
fn without_generation_tags(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let (before, after) = rest.split_at(start + length);
        let (before, tag) = before.split_at(start);
        plain.push_str(before);
        match tag.trim_matches(|c: char| "{%-+".contains(c) || c.is_whitespace()) {
            "generation" => plain.push_str(&tag.replace("generation", "with")),
            "endgeneration" => plain.push_str(&tag.replace("endgeneration", "endwith")),
            _ => plain.push_str(tag),
        }
        rest = after;
    }
    plain.push_str(rest);
    plain
}

fn message_value(message: &Message) -> Value {
    let spoken = [
        ("role", Value::from(message.role.as_str())),
        ("content", ordered(&message.content)),
    ];
    let spoken = spoken
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    let extra = message
        .extra
        .iter()
        .map(|(name, value)| (name.clone(), ordered(value)));
    Value::from_object(Fields(spoken.chain(extra).collect()))
}

fn ordered(json: &Json) -> Value {
    match json {
        Json::Object(map) => Value::from_object(Fields(
            map.iter().map(|(k, v)| (k.clone(), ordered(v))).collect(),
        )),
        Json::Array(items) => Value::from(items.iter().map(ordered).collect::<Vec<_>>()),
        other => Value::from_serialize(other),
    }
}

/// A map that keeps the order of its keys, as Python's do; minijinja's own sorts them, and the arguments
/// of a tool call are printed in their order.
#[derive(Debug)]
struct Fields(Vec<(String, Value)>);

impl Object for Fields {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(
            self.0
                .iter()
                .map(|(name, _)| Value::from(name.as_str()))
                .collect(),
        )
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, options: &Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if ensure_ascii == Some(true) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson(ensure_ascii=true) is not supported",
        ));
    }
    let mut json = Vec::new();
    match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut json, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, PythonFormatter)),
    }
    .map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "the value is not JSON").with_source(error)
    })?;
    Ok(Value::from(
        String::from_utf8(json).expect("serde_json writes UTF-8"),
    ))
}

/// `", "` between elements and `": "` after keys.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Python's `strftime` at midnight of Friday 26 July 2024, the day to which Llama 3's own template falls
/// back: a prompt must not change overnight.
fn strftime(format: &str) -> String {
    [
        ("%Y", "2024"),
        ("%y", "24"),
        ("%B", "July"),
        ("%b", "Jul"),
        ("%m", "07"),
        ("%-m", "7"),
        ("%d", "26"),
        ("%-d", "26"),
        ("%e", "26"),
        ("%A", "Friday"),
        ("%a", "Fri"),
        ("%j", "208"),
        ("%H", "00"),
        ("%I", "12"),
        ("%M", "00"),
        ("%S", "00"),
        ("%p", "AM"),
        ("%%", "%"),
    ]
    .into_iter()
    .fold(format.to_owned(), |text, (directive, value)| {
        text.replace(directive, value)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::fixtures::shared;

    const IM: [&str; 2] = [
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "Hello!<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    ];
    const THOUGHT: &str = "<think>\nA greeting.\n</think>\n\n";

    fn dialogue() -> Vec<Message> {
        vec![
            Message::new("system", "Be brief."),
            Message::new("user", "Hi there"),
            Message::new("assistant", &format!("{THOUGHT}Hello!")),
            Message::new("user", "Why is the sky blue?"),
        ]
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::compile(source, vec![("bos_token", "<s>".into())]).unwrap()
    }

    fn real(folder: &str) -> Option<ChatTemplate> {
        let folder = shared(&format!("data/tokenizers/{folder}"))?;
        Some(
            ChatTemplate::load(&folder, None)
                .unwrap()
                .expect("the folder has a template"),
        )
    }

    /// The expected strings were rendered with jinja2 3.1 in the environment that transformers builds.
    #[test]
    fn real_templates_render_as_jinja2_does() {
        let smol = "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 26 July 2024\n\
                    Reasoning Mode: /think\n\n## Custom Instructions\n\nBe brief.\n\n";
        let system = "<|im_start|>system\nBe brief.<|im_end|>\n";
        let phi = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n<think>\nA greeting.\n\
                   </think>\n\nHello!<|end|>\n<|user|>\nWhy is the sky blue?<|end|>\n<|assistant|>\n";
        let cases = [
            (
                "chat-templates-only/qwen2.5",
                format!("{system}{}{THOUGHT}{}", IM[0], IM[1]),
            ),
            (
                "chat-templates-only/qwen3",
                format!("{system}{}{}", IM[0], IM[1]),
            ),
            (
                "chat-templates-only/smollm3",
                format!("{smol}{}{THOUGHT}{}", IM[0], IM[1]),
            ),
            ("phi-3-mini", phi.to_owned()),
        ];
        for (folder, expected) in cases {
            let Some(template) = real(folder) else {
                continue;
            };
            assert_eq!(template.render(&dialogue()).unwrap(), expected, "{folder}");
        }
    }

    #[test]
    fn tool_calls_keep_the_order_of_their_arguments() {
        let call = json!({"function": {"name": "look",
            "arguments": {"town": "Zürich <&'>", "at": [1, 2.5, true, null], "deep": {}}}});
        let messages: Vec<Message> = serde_json::from_value(json!([
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
        ]))
        .unwrap();
        let expected = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n\
                        {\"name\": \"look\", \"arguments\": {\"town\": \"Zürich <&'>\", \
                        \"at\": [1, 2.5, true, null], \"deep\": {}}}\n</tool_call><|im_end|>\n\
                        <|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n\
                        <|im_start|>assistant\n";
        let Some(template) = real("chat-templates-only/qwen3") else {
            return;
        };
        assert_eq!(template.render(&messages).unwrap(), expected);
    }

    /// The expected strings are jinja2's.
    #[test]
    fn the_language_of_templates() {
        let cases = [
            (
                "{% for m in messages[:2] %}\n  {%- generation -%}\n a{% set z = 1 %} {{ m.content }}\n  \
                 {% endgeneration %}\n b\n{% endfor %}\n",
                "a Be brief.\n b\na Hi there\n b\n",
            ),
            (
                "{{ bos_token }}|{{ eos_token }}|{{ eos_token is defined }}",
                "<s>||False",
            ),
            (
                "{{ messages[-1]['content'].split(' ')[0].strip('W') }}",
                "hy",
            ),
            (
                "{{ messages[0] | tojson }}",
                "{\"role\": \"system\", \"content\": \"Be brief.\"}",
            ),
            (
                "{{ ['é', {}, []] | tojson(indent=2) }}",
                "[\n  \"é\",\n  {},\n  []\n]",
            ),
            (
                "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
                "role=system;content=Be brief.;",
            ),
            (
                "{{ 'name' in messages[0] }} {{ 'role' in messages[0] }}",
                "False True",
            ),
            (
                "{% if tools is not none %}tools{% endif %}{{ add_generation_prompt }}",
                "True",
            ),
            (
                "{% generation %}{% set z = 1 %}{% endgeneration %}{{ z is defined }}",
                "False",
            ),
            ("{{ none }}|{{ 1.5 }}|{{ [1, true] }}", "None|1.5|[1, True]"),
            (
                "{{ strftime_now('%a %-d %b %Y, %j%%') }}",
                "Fri 26 Jul 2024, 208%",
            ),
        ];
        for (source, expected) in cases {
            assert_eq!(
                template(source).render(&dialogue()).unwrap(),
                expected,
                "{source}"
            );
        }
    }

    #[test]
    fn what_a_template_raises_reaches_the_user() {
        let source = "{% for m in messages %}\n{% if m.role == 'system' %}\n\
                      {{ raise_exception('no system message, please') }}{% endif %}{% endfor %}";
        let error = template(source)
            .render(&dialogue())
            .unwrap_err()
            .to_string();
        assert!(error.contains("no system message, please"), "{error}");
        assert_eq!(template(source).render(&dialogue()[1..2]).unwrap(), "");
    }

    #[test]
    fn templates_are_found_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = |file: &str| folder.path().join(file);
        let text = |given: Option<&Path>| {
            let template = ChatTemplate::load(folder.path(), given).unwrap();
            template.map(|template| template.render(&dialogue()).unwrap())
        };
        assert_eq!(text(None), None);

        let named = json!([{"name": "tools", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]);
        let settings = json!({"chat_template": named, "eos_token": null});
        fs::write(path("tokenizer_config.json"), settings.to_string()).unwrap();
        fs::write(
            path("special_tokens_map.json"),
            json!({"eos_token": {"content": "</s>"}}).to_string(),
        )
        .unwrap();
        assert_eq!(text(None).as_deref(), Some("</s>"));

        let settings = json!({"chat_template": "{{ eos_token }}!", "eos_token": "<eos>"});
        fs::write(path("tokenizer_config.json"), settings.to_string()).unwrap();
        assert_eq!(text(None).as_deref(), Some("<eos>!"));

        fs::write(path("chat_template.jinja"), "beside").unwrap();
        assert_eq!(text(None).as_deref(), Some("beside"));

        fs::write(path("other.jinja"), "given").unwrap();
        assert_eq!(text(Some(&path("other.jinja"))).as_deref(), Some("given"));
    }

    #[test]
    fn unusable_templates_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let broken = folder.path().join("broken.jinja");
        fs::write(&broken, "\n{% if %}").unwrap();
        let cases = [
            (
                broken,
                "broken.jinja is not usable: its chat template does not compile: syntax error",
            ),
            (
                folder.path().join("absent.jinja"),
                "absent.jinja: No such file",
            ),
        ];
        for (path, expected) in cases {
            let error = ChatTemplate::load(folder.path(), Some(&path))
                .err()
                .unwrap()
                .to_string()
                .replace('"', "");
            assert!(error.contains(expected), "{error}");
        }
    }
}
