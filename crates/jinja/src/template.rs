//! Compiled templates.

use serde_json::{Map, Value as Json};

use crate::{
    ast::Statement, error::TemplateError, limits, parser, render::Renderer, scope::Scope,
    value::Value,
};

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    body: Vec<Statement>,
}

impl Template {
    /// Compiles `source`.
    ///
    /// # Errors
    /// If it is not valid Jinja2, uses an unsupported statement, or is longer than [`crate::MAX_SOURCE_BYTES`]; with the
    /// line.
    pub fn compile(source: &str) -> Result<Self, TemplateError> {
        limits::source(source.len())?;
        let body = parser::parse(source)?;
        Ok(Self { body })
    }

    /// Renders the template with these variables.
    ///
    /// # Errors
    /// If the template raises, an operation fails as in Python, or a limit is exceeded; with the line.
    pub fn render(&self, variables: &Map<String, Json>) -> Result<String, TemplateError> {
        let scope = Scope::root();
        for (name, value) in variables {
            scope.set(name, Value::from(value));
        }
        let mut text = String::new();
        // The budget begins here: the variables are the caller's.
        let renderer = Renderer::default();
        renderer.render(&self.body, &scope, &mut text)?;
        Ok(text)
    }
}
