//! Chat templates: rendering of dialogues as text.
//!
//! A template is a Jinja program in a Hugging Face folder. This module promises the output of transformers'
//! `apply_chat_template`: with `add_generation_prompt`, or with `continue_final_message` if the last turn is the
//! assistant's. Constructs that `jinja` does not support are refused, never rendered differently. A template of a
//! folder that does not compile fails when a dialogue is rendered; a template given by the user fails when it is
//! loaded. A template is an untrusted program: `jinja` bounds its size, time and memory. Does not know tokens, except
//! for the names of special ones.

pub(crate) mod continuation_tokenizer;
mod continue_final_message;
pub(crate) mod given_answers;

use std::path::{Path, PathBuf};

use jinja::Template;
use messages::{Dialogue, Digest, Message};
use serde_json::{Map, Value, json};

use crate::{
    error::ModelError,
    input_file::read_text,
    special_tokens::{SpecialTokens, optional_json},
};

/// File of a folder's chat template.
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// File of the template for dialogues with tools, beside the other one.
pub(crate) const TOOL_USE_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";

/// A chat template with its variant for tool use and the special tokens that templates may reference.
pub(crate) struct ChatTemplate {
    default: Option<TemplateSource>,
    tool_use: Option<TemplateSource>,
    special: Vec<(String, String)>,
    /// Whether the template prints content parts only, so that texts are passed to it as parts.
    needs_parts: bool,
    /// Whether the settings gave it in place of the folder's own.
    is_given: bool,
}

/// Source of a template with the compiled template or the compile error.
struct TemplateSource {
    path: PathBuf,
    text: String,
    template: Result<Template, String>,
}

impl TemplateSource {
    fn new(path: PathBuf, text: String) -> Self {
        let template = Template::compile(&text).map_err(|error| {
            format!(
                "its chat template does not compile: {error}; another file can be named instead"
            )
        });
        Self {
            path,
            text,
            template,
        }
    }

    /// Reads a file of a model folder.
    fn read(path: PathBuf) -> Result<Self, ModelError> {
        let text = read_text(&path, jinja::MAX_SOURCE_BYTES as u64)?;
        Ok(Self::new(path, text))
    }

    /// Reads a file that the configuration names, which may be a link.
    fn read_given(path: &Path) -> Result<Self, ModelError> {
        let unreadable = |source| ModelError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let target = path.canonicalize().map_err(unreadable)?;
        let text = read_text(&target, jinja::MAX_SOURCE_BYTES as u64)?;
        Ok(Self::new(path.to_owned(), text))
    }

    /// The compiled template.
    ///
    /// # Errors
    /// When it does not compile.
    fn compiled(&self) -> Result<&Template, ModelError> {
        self.template
            .as_ref()
            .map_err(|reason| ModelError::Malformed {
                path: self.path.clone(),
                reason: reason.clone(),
            })
    }
}

/// Checks that the file at `path` is a chat template that compiles.
///
/// # Errors
/// When it cannot be read, or does not compile.
pub fn check_chat_template(path: &Path) -> Result<(), ModelError> {
    TemplateSource::read_given(path)?.compiled().map(drop)
}

/// Variables that are set from the dialogue and must not be overridden.
const RESERVED: [&str; 4] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
];

impl ChatTemplate {
    /// Loads the template `given`, or `chat_template.jinja` of `folder` with its `additional_chat_templates`, or the
    /// templates in its `tokenizer_config.json`, in this order; `None` when none of them exists.
    pub(crate) fn load(
        folder: &Path,
        given: Option<&Path>,
        special: &SpecialTokens,
    ) -> Result<Option<Self>, ModelError> {
        let own = folder.join(CHAT_TEMPLATE);
        let (default, tool_use) = if let Some(path) = given {
            check_chat_template(path)?;
            (Some(TemplateSource::read_given(path)?), None)
        } else if own.exists() {
            let other = folder.join(TOOL_USE_TEMPLATE);
            let tool_use = other
                .exists()
                .then(|| TemplateSource::read(other))
                .transpose()?;
            (Some(TemplateSource::read(own)?), tool_use)
        } else {
            let settings = folder.join("tokenizer_config.json");
            let named = &optional_json(&settings)?["chat_template"];
            let source = |name| {
                let text = template_named(named, name);
                text.map(|text| TemplateSource::new(settings.clone(), text.to_owned()))
            };
            (source("default"), source("tool_use"))
        };
        if default.is_none() && tool_use.is_none() {
            return Ok(None);
        }
        let uses_date = |source: &TemplateSource| source.text.contains("strftime_now");
        if default.iter().chain(&tool_use).any(uses_date) {
            tracing::info!(
                path = %folder.display(),
                "the chat template uses the current date: it is fixed at 26 July 2024, so that prompts are reproducible"
            );
        }
        let mut chat = Self {
            default,
            tool_use,
            special: special.variables().to_vec(),
            needs_parts: false,
            is_given: given.is_some(),
        };
        chat.needs_parts = chat.prints_parts_only();
        if chat.needs_parts {
            tracing::info!(
                path = %folder.display(),
                "the chat template prints content parts only: messages with text are passed to it as one part"
            );
        }
        Ok(Some(chat))
    }

    /// Whether the template prints nothing of a message whose content is a text, but prints a text part.
    fn prints_parts_only(&self) -> bool {
        let roles: [&[&str]; 2] = [&["user"], &["system", "user"]];
        let is_printed = |roles: &[&str], content: &Value| {
            let turn = |role: &&str| Message::new(role, content.clone());
            let dialogue = Dialogue::new(roles.iter().map(turn).collect());
            let text = self.render_to(&dialogue, RenderEnd::Closed);
            // A list that is printed as such is not read, and a shortened text is.
            let is_read =
                |text: String| text.contains(content_word(content)) && !text.contains("'type'");
            text.is_ok_and(is_read)
        };
        let is_any_printed = |content: Value| roles.iter().any(|roles| is_printed(roles, &content));
        !is_any_printed(PROBE.into()) && is_any_printed(text_part(PROBE))
    }

    /// Messages as the template takes them.
    fn messages(&self, dialogue: &Dialogue) -> Vec<Value> {
        let mut messages = messages(dialogue);
        if self.needs_parts {
            for content in messages
                .iter_mut()
                .filter_map(|turn| turn.get_mut("content"))
            {
                if let Value::String(text) = content {
                    *content = text_part(text);
                }
            }
        }
        messages
    }

    /// Checks that every template compiles.
    ///
    /// # Errors
    /// When one does not.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        let mut sources = [&self.default, &self.tool_use].into_iter().flatten();
        sources.try_for_each(|source| source.compiled().map(drop))
    }

    /// Renders `dialogue` with the generation prompt or, if the last turn is the assistant's, up to the end of its
    /// text.
    pub(crate) fn render(&self, dialogue: &Dialogue) -> Result<String, ModelError> {
        if dialogue.continues_final_message() {
            let source = self.source(dialogue)?;
            let messages = self.messages(dialogue);
            let text = continue_final_message::rendered(&source.text, messages, |messages| {
                self.text(source, dialogue, messages, RenderEnd::Closed)
            });
            return text.map_err(failure);
        }
        self.render_to(dialogue, RenderEnd::GenerationPrompt)
    }

    /// The text, if the settings gave it in place of the folder's own.
    pub(crate) fn given(&self) -> Option<&str> {
        let source = self.default.as_ref().filter(|_| self.is_given);
        source.map(|source| source.text.as_str())
    }

    /// Digest of the template sources.
    pub(crate) fn digest(&self) -> Digest {
        let sources = [&self.default, &self.tool_use].into_iter().flatten();
        let texts: Vec<&str> = sources.map(|source| source.text.as_str()).collect();
        Digest::of(texts.join("\0").as_bytes())
    }

    /// Renders `dialogue` without a generation prompt, its last turn closed.
    pub(crate) fn render_closed(&self, dialogue: &Dialogue) -> Result<String, ModelError> {
        self.render_to(dialogue, RenderEnd::Closed)
    }

    /// Renders `dialogue` with this answer as the assistant's turn, or appended to the last turn if that is the
    /// assistant's.
    pub(crate) fn render_answered(
        &self,
        dialogue: &Dialogue,
        answer: &str,
    ) -> Result<String, ModelError> {
        let mut answered = dialogue.clone();
        match answered.messages.last_mut() {
            Some(last) if dialogue.continues_final_message() => match last.content_mut() {
                Value::Array(parts) => parts.push(json!({"type": "text", "text": answer})),
                content => *content = format!("{}{answer}", content.as_str().unwrap_or("")).into(),
            },
            _ => answered.messages.push(Message::new("assistant", answer)),
        }
        self.render_to(&answered, RenderEnd::Closed)
    }

    fn render_to(&self, dialogue: &Dialogue, end: RenderEnd) -> Result<String, ModelError> {
        let source = self.source(dialogue)?;
        let text = self.text(source, dialogue, self.messages(dialogue), end);
        let text = text.map_err(failure)?;
        if let Some(lost) = lost_part(dialogue, &text) {
            tracing::warn!(
                lost,
                "the chat template prints nothing of a content part: give the content as a text"
            );
        }
        Ok(text)
    }

    /// Selects the template for the dialogue, as transformers does.
    fn source(&self, dialogue: &Dialogue) -> Result<&TemplateSource, ModelError> {
        let for_tools = self
            .tool_use
            .as_ref()
            .filter(|_| !dialogue.tools.is_empty());
        for_tools.or(self.default.as_ref()).ok_or_else(|| {
            failure(
                "the model has a template for dialogues with tools only, none named \"default\""
                    .into(),
            )
        })
    }

    fn text(
        &self,
        source: &TemplateSource,
        dialogue: &Dialogue,
        messages: Vec<Value>,
        end: RenderEnd,
    ) -> Result<String, String> {
        let mut variables = Map::new();
        variables.insert("documents".into(), Value::Null);
        let special = self.special.iter();
        variables.extend(special.map(|(name, text)| (name.clone(), text.as_str().into())));
        for (name, value) in &dialogue.template_kwargs {
            if RESERVED.contains(&name.as_str()) {
                return Err(format!(
                    "template_kwargs may not set {name:?}, which follows from the dialogue"
                ));
            }
            variables.insert(name.clone(), value.clone());
        }
        let tools = match dialogue.tools.as_slice() {
            [] => Value::Null,
            tools => tools.into(),
        };
        variables.insert("tools".into(), tools);
        variables.insert("messages".into(), messages.into());
        let is_open = matches!(end, RenderEnd::GenerationPrompt);
        variables.insert("add_generation_prompt".into(), is_open.into());
        let template = source.compiled().map_err(|error| error.to_string())?;
        template
            .render(&variables)
            .map_err(|error| format!("{}: {error}", source.path.display()))
    }
}

/// End of a rendered dialogue.
#[derive(Clone, Copy)]
enum RenderEnd {
    /// The generation prompt, which starts the assistant's turn.
    GenerationPrompt,
    /// The closed last turn.
    Closed,
}

/// Text that tells whether a template prints a message.
const PROBE: &str = "Which colour has grass?";

/// The least that a template prints of [`PROBE`]: all of a part, the beginning of a text.
fn content_word(content: &Value) -> &'static str {
    match content {
        Value::String(_) => &PROBE[..3],
        _ => PROBE,
    }
}

/// The first text part of a dialogue of which nothing is in its rendering, since the template does not read parts.
fn lost_part<'a>(dialogue: &'a Dialogue, rendered: &str) -> Option<&'a str> {
    let contents = dialogue
        .messages
        .iter()
        .filter_map(|turn| turn.content().as_array());
    let mut texts = contents.flatten().filter_map(|part| part["text"].as_str());
    texts.find(|text| {
        let mut words = text.split(|c: char| !c.is_alphanumeric());
        let word = words.find(|word| !word.is_empty());
        word.is_some_and(|word| !rendered.contains(word))
    })
}

/// Content with one part, a text.
fn text_part(text: &str) -> Value {
    json!([{"type": "text", "text": text}])
}

fn failure(reason: String) -> ModelError {
    ModelError::ChatTemplate { reason }
}

/// The template with this name; a single string is the default template.
fn template_named<'a>(templates: &'a Value, name: &str) -> Option<&'a str> {
    match templates {
        Value::String(text) => Some(text.as_str()).filter(|_| name == "default"),
        Value::Array(entries) => {
            let named = |entry: &&Value| entry["name"] == name;
            entries.iter().find(named)?["template"].as_str()
        }
        Value::Object(templates) => templates.get(name)?.as_str(),
        _ => None,
    }
}

/// Keys of a message that may contain the assistant's reasoning.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Messages as transformers passes them to templates: without null values, and with the assistant's reasoning under
/// both names that templates use.
fn messages(dialogue: &Dialogue) -> Vec<Value> {
    dialogue
        .messages
        .iter()
        .map(|message| message_value(message).into())
        .collect()
}

fn message_value(message: &Message) -> Map<String, Value> {
    let mut turn = message.fields().clone();
    turn.retain(|_, value| !value.is_null());
    let Some(reasoning) = REASONING.iter().find_map(|name| turn.get(*name)).cloned() else {
        return turn;
    };
    let mut aliased = Map::new();
    aliased.insert("thinking".into(), reasoning.clone());
    aliased.extend(turn);
    aliased.insert("reasoning_content".into(), reasoning);
    aliased
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::fixtures::shared;

    const IM: [&str; 2] = [
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "Hello!<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    ];
    const THOUGHT: &str = "<think>\nA greeting.\n</think>\n\n";

    fn dialogue() -> Dialogue {
        Dialogue::new(vec![
            Message::new("system", "Be brief."),
            Message::new("user", "Hi there"),
            Message::new("assistant", format!("{THOUGHT}Hello!")),
            Message::new("user", "Why is the sky blue?"),
        ])
    }

    fn template(source: &str) -> ChatTemplate {
        let special = SpecialTokens::named_by(&[json!({"bos_token": "<s>"})]);
        let mut chat = ChatTemplate {
            default: Some(TemplateSource::new("template".into(), source.to_owned())),
            tool_use: None,
            special: special.variables().to_vec(),
            needs_parts: false,
            is_given: false,
        };
        chat.needs_parts = chat.prints_parts_only();
        chat
    }

    fn pretrained(folder: &str) -> Option<ChatTemplate> {
        let folder = shared(&format!("data/tokenizers/{folder}"))?;
        Some(
            ChatTemplate::load(&folder, None, &SpecialTokens::read(&folder).unwrap())
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
            let Some(template) = pretrained(folder) else {
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
        let Some(template) = pretrained("chat-templates-only/qwen3") else {
            return;
        };
        assert_eq!(template.render(&Dialogue::new(messages)).unwrap(), expected);
    }

    /// Expected strings are from transformers with `continue_final_message=True`.
    #[test]
    fn a_final_assistant_turn_is_continued() {
        let chatml = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}\
                      {% if add_generation_prompt %}<|assistant|>{% endif %}";
        let trimming = chatml
            .replace("m.content", "m.content|trim")
            .replace("|end|>", "|end|>\n");
        let parts = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}\
                     {% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}";
        let begun = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
                     {% if add_generation_prompt %}[assistant]{% endif %}";
        let several = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b "}, {"type": "image"}]);
        let cases = [
            (
                chatml,
                json!("Sure: "),
                "<|user|>Hi<|end|><|assistant|>Sure: ",
            ),
            (
                &trimming,
                json!("Sure: "),
                "<|user|>Hi<|end|>\n<|assistant|>Sure:",
            ),
            (
                &trimming,
                json!(" Sure"),
                "<|user|>Hi<|end|>\n<|assistant|>Sure",
            ),
            (chatml, json!(""), "<|user|>Hi<|end|><|assistant|>"),
            (chatml, json!("Hi"), "<|user|>Hi<|end|><|assistant|>Hi"),
            (parts, several, "[user]Hi;[assistant]ab "),
            (begun, json!("ANSWER"), "<s>[user] Hi\n[assistant] ANSWER"),
        ];
        let continued = |source: &str, content: Value| {
            let answer = Message::new("assistant", content);
            template(source).render(&Dialogue::new(vec![Message::new("user", "Hi"), answer]))
        };
        for (source, content, expected) in cases {
            assert_eq!(continued(source, content).unwrap(), expected, "{source}");
        }
        let refused = [
            (
                "{% for m in messages %}{{ m.content|upper }}{% endfor %}",
                json!("x"),
                "does not print it",
            ),
            (
                "{% for m in messages %}{{ m.role }}{% endfor %}",
                json!("x"),
                "reads no content",
            ),
            (chatml, json!([{"type": "image"}]), "has no text"),
            (chatml, Value::Null, "has no text"),
        ];
        for (source, content, expected) in refused {
            let error = continued(source, content).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn templates_get_messages_and_variables_as_in_transformers() {
        let messages: Vec<Message> = serde_json::from_value(json!([
            {"name": "Ann", "content": "Hi", "role": "user", "weight": null},
            {"role": "assistant", "content": null, "reasoning": "hm", "tool_calls": null},
            {"role": "user", "content": [{"type": "text", "text": "It's"}]},
        ]))
        .unwrap();
        let mut dialogue = Dialogue::new(messages);
        let text = |source: &str, dialogue: &Dialogue| template(source).render(dialogue).unwrap();
        let printed = "{'name': 'Ann', 'content': 'Hi', 'role': 'user'}{'thinking': 'hm', 'role': 'assistant', \
                       'reasoning': 'hm', 'reasoning_content': 'hm'}\
                       {'role': 'user', 'content': [{'type': 'text', 'text': \"It's\"}]}";
        assert_eq!(
            text("{% for m in messages %}{{ m }}{% endfor %}", &dialogue),
            printed
        );
        let none = "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ flag is defined }}";
        assert_eq!(text(none, &dialogue), "True True True False");
        dialogue.tools = vec![json!({"name": "look"})];
        dialogue.template_kwargs = Map::from_iter([
            ("flag".into(), json!([1, null])),
            ("bos_token".into(), json!("<b>")),
            ("documents".into(), json!([])),
        ]);
        let given = "{{ tools }} {{ documents }} {{ flag }} {{ bos_token }}";
        assert_eq!(
            text(given, &dialogue),
            "[{'name': 'look'}] [] [1, None] <b>"
        );
        dialogue
            .template_kwargs
            .insert("messages".into(), json!([]));
        let error = template("").render(&dialogue).unwrap_err().to_string();
        assert!(error.contains("may not set \"messages\""), "{error}");
    }

    /// vLLM finds out the form of a message's content in the same way.
    #[test]
    fn a_template_of_content_parts_prints_texts_too() {
        let parts = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}";
        let either = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
                      {% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}";
        let of_user = |content: Value| Dialogue::new(vec![Message::new("user", content)]);
        for (source, content, expected) in [
            (parts, "Hi".into(), "[Hi]"),
            (parts, json!([{"type": "text", "text": "Hi"}]), "[Hi]"),
            (either, "Hi".into(), "Hi"),
            (either, json!([{"type": "text", "text": "Hi"}]), "[Hi]"),
            ("{{ messages|length }}", "Hi".into(), "1"),
            ("{{ messages[0].content[:4] }}", "Hi there".into(), "Hi t"),
        ] {
            let text = template(source).render(&of_user(content)).unwrap();
            assert_eq!(text, expected, "{source}");
        }
        let question = of_user(json!([{"type": "text", "text": " Why, then?"}]));
        for (rendered, lost) in [
            ("user: Why, then?", false),
            ("[{'text': 'Why, then?'}]", false),
            ("user: ", true),
        ] {
            assert_eq!(lost_part(&question, rendered).is_some(), lost, "{rendered}");
        }
        assert_eq!(lost_part(&of_user("Why?".into()), "user: "), None, "a text");
        let continued = Dialogue::new(vec![
            Message::new("user", "Hi"),
            Message::new("assistant", "Well, "),
        ]);
        assert_eq!(template(parts).render(&continued).unwrap(), "[Hi][Well, ");
    }

    #[test]
    fn templates_from_users_render() {
        let turns = |roles: &[&str]| {
            let turn = |role: &&str| Message::new(role, "Hi");
            Dialogue::new(roles.iter().map(turn).collect())
        };
        let parts = Message::new("user", json!([{"type": "text", "text": "a"}]));
        let cases = [
            ("A04", turns(&["user"]), "Hi"),
            ("A16", turns(&["system", "user", "user", "user"]), "Hi|Hi|"),
            (
                "A26",
                Dialogue::new(vec![parts]),
                "[{'type': 'text', 'text': 'a'}]",
            ),
        ];
        for (case, dialogue, expected) in cases {
            let Some(folder) = shared(&format!("data/cases/{case}")) else {
                return;
            };
            let template = ChatTemplate::load(&folder, None, &SpecialTokens::default());
            let text = template.unwrap().unwrap().render(&dialogue).unwrap();
            assert_eq!(text, expected, "{case}");
        }
    }

    #[test]
    fn exceptions_raised_by_a_template_are_reported() {
        let source = "{% for m in messages %}\n{% if m.role == 'system' %}\n\
                      {{ raise_exception('no system message, please') }}{% endif %}{% endfor %}";
        let error = template(source)
            .render(&dialogue())
            .unwrap_err()
            .to_string();
        let named = "template: line 3: no system message, please";
        assert!(error.contains(named), "{error}");
        assert_eq!(
            template(source).render(&Dialogue::of_user("Hi")).unwrap(),
            ""
        );
    }

    #[test]
    fn templates_are_looked_up_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = |file: &str| folder.path().join(file);
        let text = |given: Option<&Path>| {
            let special = SpecialTokens::read(folder.path()).unwrap();
            let template = ChatTemplate::load(folder.path(), given, &special).unwrap();
            template.map(|template| template.render(&dialogue()).unwrap())
        };
        assert_eq!(text(None), None);

        let mut with_tools = dialogue();
        with_tools.tools = vec![json!({"name": "look"})];
        let for_tools = || {
            let special = SpecialTokens::read(folder.path()).unwrap();
            let template = ChatTemplate::load(folder.path(), None, &special)
                .unwrap()
                .unwrap();
            template.render(&with_tools).unwrap()
        };
        let named = json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]);
        let settings = json!({"chat_template": named, "eos_token": null});
        fs::write(path("tokenizer_config.json"), settings.to_string()).unwrap();
        fs::write(
            path("special_tokens_map.json"),
            json!({"eos_token": {"content": "</s>"}}).to_string(),
        )
        .unwrap();
        assert_eq!(text(None).as_deref(), Some("</s>"));
        assert_eq!(for_tools(), "tools");

        let by_name = json!({"tool_use": "tools by name", "default": "by name"});
        let settings = json!({ "chat_template": by_name });
        fs::write(path("tokenizer_config.json"), settings.to_string()).unwrap();
        assert_eq!(text(None).as_deref(), Some("by name"));
        assert_eq!(for_tools(), "tools by name");

        let settings = json!({"chat_template": "{{ eos_token }}!", "eos_token": "<eos>"});
        fs::write(path("tokenizer_config.json"), settings.to_string()).unwrap();
        assert_eq!(text(None).as_deref(), Some("<eos>!"));

        fs::write(path("chat_template.jinja"), "beside").unwrap();
        assert_eq!(text(None).as_deref(), Some("beside"));
        assert_eq!(for_tools(), "beside");
        fs::create_dir(path("additional_chat_templates")).unwrap();
        fs::write(
            path("additional_chat_templates/tool_use.jinja"),
            "also beside",
        )
        .unwrap();
        assert_eq!(for_tools(), "also beside");
        assert_eq!(text(None).as_deref(), Some("beside"));

        fs::write(path("other.jinja"), "given").unwrap();
        assert_eq!(text(Some(&path("other.jinja"))).as_deref(), Some("given"));
    }

    #[test]
    fn errors_name_the_unusable_template() {
        let folder = tempfile::tempdir().unwrap();
        let broken = folder.path().join("broken.jinja");
        fs::write(&broken, "\n{% if %}").unwrap();
        let cases = [
            (
                broken,
                "broken.jinja is not usable: its chat template does not compile: line 2: expected an expression",
            ),
            (
                folder.path().join("absent.jinja"),
                "absent.jinja: No such file",
            ),
        ];
        for (path, expected) in cases {
            let error = ChatTemplate::load(folder.path(), Some(&path), &SpecialTokens::default())
                .err()
                .unwrap()
                .to_string()
                .replace('"', "");
            assert!(error.contains(expected), "{error}");
        }
    }
}
