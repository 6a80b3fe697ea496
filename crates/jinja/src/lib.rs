//! Chat templates: Jinja2 with Python's values, as transformers renders it.
//!
//! A [`Template`] is compiled once and rendered with variables in JSON. It promises the text that jinja2
//! 3.1 gives in the environment that transformers builds: an immutable sandbox with `trim_blocks`,
//! `lstrip_blocks` and loop controls, no escaping, the lenient `Undefined`, and the tag `generation`, the
//! filter `tojson` and the functions `raise_exception` and `strftime_now` of transformers. Values print,
//! compare, sort and compute as Python's do. What jinja2 raises is an [`Error`]; so is what this crate
//! does not know (`include`, `urlize`, integers beyond 128 bits), and what would take too long or too much
//! memory, never another text. The same variables
//! give the same text on every day: templates that ask for the date get a fixed one. What messages
//! and tools are it does not know.

#[cfg(test)]
mod against_jinja2;
mod arguments;
mod ast;
mod clock;
mod error;
mod filters;
mod format;
mod functions;
mod json;
mod lexer;
mod limits;
mod loops;
mod methods;
mod number;
mod operators;
mod parser;
mod render;
mod scope;
mod template;
mod tests;
mod text;
mod value;

pub use error::Error;
pub use template::Template;
