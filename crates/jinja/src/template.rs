//! A template, compiled.

use serde_json::{Map, Value as Json};

use crate::{Error, ast::Statement, parser, render::Renderer, scope::Scope, value::Value};

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    body: Vec<Statement>,
}

impl Template {
    /// Compiles `source`.
    ///
    /// # Errors
    /// When it is no Jinja2, or uses a statement that chat templates cannot: with the line.
    pub fn compile(source: &str) -> Result<Self, Error> {
        let body = parser::parse(source)?;
        Ok(Self { body })
    }

    /// The text for these variables.
    ///
    /// # Errors
    /// When the template raises, or computes what Python cannot; with the line.
    pub fn render(&self, variables: &Map<String, Json>) -> Result<String, Error> {
        let scope = Scope::root();
        for (name, value) in variables {
            scope.set(name, Value::from(value));
        }
        let mut text = String::new();
        let renderer = Renderer::default();
        renderer.render(&self.body, &scope, &mut text)?;
        Ok(text)
    }
}
