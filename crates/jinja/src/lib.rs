//! Chat templates: Jinja2 with Python's values, as transformers renders it.
//!
//! A [`Template`] is compiled once and rendered with JSON variables. The output equals that of jinja2 3.1 in the
//! environment of transformers: an immutable sandbox with `trim_blocks`, `lstrip_blocks` and loop controls, no
//! escaping, the lenient `Undefined`, and the tag `generation`, the filter `tojson` and the functions `raise_exception`
//! and `strftime_now` of transformers. Values are formatted, compared, sorted and computed as in Python.
//!
//! Exceptions of jinja2 become an [`TemplateError`], as do unsupported features (`include`, `urlize`, integers beyond 128 bits)
//! and excessive source, output, time, memory or nesting; the output never silently differs. Rendering is deterministic:
//! `strftime_now` uses a fixed date. The crate knows nothing of messages and tools.

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
mod repr;
mod scope;
mod template;
mod tests;
mod text;
mod value;

pub use error::TemplateError;
pub use limits::MAX_SOURCE_BYTES;
pub use template::Template;
