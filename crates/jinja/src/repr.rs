//! Python's `repr`.

use crate::{
    error::TemplateError,
    limits,
    number::float_repr,
    text,
    value::{Dict, Range, Text, Value},
};

/// Writer of the `repr` of a value. A value that contains another one several times is written as often: the length is
/// checked with every part.
pub(crate) struct ReprWriter {
    written: String,
    /// Number of namespaces around the value.
    namespaces: usize,
}

impl ReprWriter {
    /// The `repr` of `value`.
    ///
    /// # Errors
    /// If Python prints an address, or the text is too long.
    pub(crate) fn written(value: &Value) -> Result<String, TemplateError> {
        let mut writer = Self {
            written: String::new(),
            namespaces: 0,
        };
        writer.value(value)?;
        Ok(writer.written)
    }

    fn push(&mut self, text: &str) {
        self.written.push_str(text);
    }

    fn value(&mut self, value: &Value) -> Result<(), TemplateError> {
        limits::work(1)?;
        limits::text(self.written.len())?;
        match value {
            Value::Undefined(_) => self.push("Undefined"),
            Value::None => self.push("None"),
            Value::Bool(true) => self.push("True"),
            Value::Bool(false) => self.push("False"),
            Value::Int(number) => self.push(&number.to_string()),
            Value::Float(number) => self.push(&float_repr(*number)),
            Value::Text(written) => {
                limits::work(value.work())?;
                self.text(written);
            }
            Value::List(list) => self.items("[", &list.items, "]")?,
            Value::Tuple(tuple) => match tuple.items.as_slice() {
                [_] => self.items("(", &tuple.items, ",)")?,
                items => self.items("(", items, ")")?,
            },
            Value::Dict(dict) => self.dict(dict)?,
            Value::View(view) => {
                self.push(value.type_name());
                self.items("([", &view.items(), "])")?;
            }
            Value::Range(range) => self.range(*range),
            Value::Namespace(namespace) => self.namespace(&namespace.borrow())?,
            Value::Loop(around) => {
                let (index, length) = (around.index(), around.items.len());
                self.push(&format!("<LoopContext {index}/{length}>"));
            }
            Value::Macro(defined) => {
                let name = text::repr(&defined.definition.name);
                self.push(&format!("<Macro {name}>"));
            }
            other => {
                let name = other.type_name();
                return Err(TemplateError::new(format!(
                    "a {name} cannot be printed: Python prints its address"
                )));
            }
        }
        Ok(())
    }

    fn text(&mut self, written: &Text) {
        let quoted = text::repr(&written.text);
        match written.is_safe {
            true => self.push(&format!("Markup({quoted})")),
            false => self.push(&quoted),
        }
    }

    fn namespace(&mut self, attributes: &Dict) -> Result<(), TemplateError> {
        if self.namespaces == 1 {
            return Err(TemplateError::unsupported(
                "printing a namespace that holds another",
            ));
        }
        self.namespaces += 1;
        self.push("<Namespace ");
        self.dict(attributes)?;
        self.push(">");
        self.namespaces -= 1;
        Ok(())
    }

    fn items(&mut self, begin: &str, items: &[Value], end: &str) -> Result<(), TemplateError> {
        self.push(begin);
        for (position, item) in items.iter().enumerate() {
            if position > 0 {
                self.push(", ");
            }
            self.value(item)?;
        }
        self.push(end);
        Ok(())
    }

    fn dict(&mut self, dict: &Dict) -> Result<(), TemplateError> {
        self.push("{");
        for (position, (key, value)) in dict.pairs.iter().enumerate() {
            if position > 0 {
                self.push(", ");
            }
            self.value(key)?;
            self.push(": ");
            self.value(value)?;
        }
        self.push("}");
        Ok(())
    }

    fn range(&mut self, range: Range) {
        let Range { start, stop, step } = range;
        match step {
            1 => self.push(&format!("range({start}, {stop})")),
            step => self.push(&format!("range({start}, {stop}, {step})")),
        }
    }
}
