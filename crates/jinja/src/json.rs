//! Python's `json.dumps`.

use crate::{
    arguments::CallArguments,
    error::TemplateError,
    limits,
    number::float_repr,
    value::{Dict, Value},
};

/// A JSON serialiser with its options.
struct JsonWriter {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The `tojson` of transformers: no HTML escaping, and no ASCII escaping by default.
pub(crate) fn to_json(value: &Value, args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind(
        "tojson",
        &["ensure_ascii", "indent", "separators", "sort_keys"],
    )?;
    let indent = match args.some(1) {
        Some(Value::Text(text)) => Some(text.text.to_string()),
        Some(_) => {
            let width = usize::try_from(args.int(1, 0)?).unwrap_or(0);
            limits::text(width)?;
            Some(" ".repeat(width))
        }
        None => None,
    };
    let item_separator = if indent.is_some() { "," } else { ", " };
    let separators = match args.some(2) {
        Some(pair) => {
            let pair = pair.iterate()?;
            let texts: Option<Vec<&str>> = pair.iter().map(Value::as_str).collect();
            let texts = texts.filter(|texts| texts.len() == 2);
            let texts = texts
                .ok_or_else(|| TemplateError::new("tojson: separators must be two strings"))?;
            (texts[0].to_owned(), texts[1].to_owned())
        }
        None => (item_separator.to_owned(), ": ".to_owned()),
    };
    let writer = JsonWriter {
        ensure_ascii: args.is_true(0),
        indent,
        item_separator: separators.0,
        key_separator: separators.1,
        sort_keys: args.is_true(3),
    };
    let mut json = String::new();
    writer.value(value, 0, &mut json)?;
    Ok(json.into())
}

impl JsonWriter {
    fn value(&self, value: &Value, depth: usize, json: &mut String) -> Result<(), TemplateError> {
        limits::work(1)?;
        limits::text(json.len())?;
        match value {
            Value::None => json.push_str("null"),
            Value::Bool(value) => json.push_str(if *value { "true" } else { "false" }),
            Value::Int(number) => json.push_str(&number.to_string()),
            Value::Float(number) => json.push_str(&float(*number)),
            Value::Text(text) => {
                limits::work(value.work())?;
                self.text(&text.text, json);
            }
            Value::List(list) => self.items(&list.items, depth, json)?,
            Value::Tuple(tuple) => self.items(&tuple.items, depth, json)?,
            Value::Dict(dict) => self.dict(dict, depth, json)?,
            other => {
                let name = other.type_name();
                return Err(TemplateError::new(format!(
                    "Object of type {name} is not JSON serializable"
                )));
            }
        }
        Ok(())
    }

    fn newline(&self, depth: usize, json: &mut String) -> Result<(), TemplateError> {
        if let Some(indent) = &self.indent {
            limits::text(json.len() + indent.len().saturating_mul(depth))?;
            json.push('\n');
            json.push_str(&indent.repeat(depth));
        }
        limits::text(json.len())
    }

    fn items(&self, items: &[Value], depth: usize, json: &mut String) -> Result<(), TemplateError> {
        json.push('[');
        for (position, item) in items.iter().enumerate() {
            if position > 0 {
                json.push_str(&self.item_separator);
            }
            self.newline(depth + 1, json)?;
            self.value(item, depth + 1, json)?;
        }
        if !items.is_empty() {
            self.newline(depth, json)?;
        }
        json.push(']');
        Ok(())
    }

    fn dict(&self, dict: &Dict, depth: usize, json: &mut String) -> Result<(), TemplateError> {
        let mut pairs: Vec<_> = dict.pairs.iter().collect();
        if self.sort_keys {
            pairs = crate::filters::sort_by(pairs, |pair| &pair.0)?;
        }
        json.push('{');
        for (position, (key, value)) in pairs.into_iter().enumerate() {
            if position > 0 {
                json.push_str(&self.item_separator);
            }
            self.newline(depth + 1, json)?;
            self.text(&key_text(key)?, json);
            json.push_str(&self.key_separator);
            self.value(value, depth + 1, json)?;
        }
        if !dict.pairs.is_empty() {
            self.newline(depth, json)?;
        }
        json.push('}');
        Ok(())
    }

    fn text(&self, text: &str, json: &mut String) {
        json.push('"');
        for c in text.chars() {
            match c {
                '"' => json.push_str("\\\""),
                '\\' => json.push_str("\\\\"),
                '\n' => json.push_str("\\n"),
                '\r' => json.push_str("\\r"),
                '\t' => json.push_str("\\t"),
                '\x08' => json.push_str("\\b"),
                '\x0c' => json.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        json.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => json.push(c),
            }
        }
        json.push('"');
    }
}

fn float(number: f64) -> String {
    if number.is_nan() {
        "NaN".into()
    } else if number.is_infinite() {
        if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .into()
    } else {
        float_repr(number)
    }
}

fn key_text(key: &Value) -> Result<String, TemplateError> {
    Ok(match key {
        Value::Text(text) => text.text.to_string(),
        Value::None => "null".into(),
        Value::Bool(value) => if *value { "true" } else { "false" }.into(),
        Value::Int(number) => number.to_string(),
        Value::Float(number) => float(*number),
        other => {
            let name = other.type_name();
            let message = format!("keys must be str, int, float, bool or None, not {name}");
            return Err(TemplateError::new(message));
        }
    })
}
