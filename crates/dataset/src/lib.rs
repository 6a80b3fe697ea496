//! Rows of prompts, completions and preferences, from files.
//!
//! [`files()`] finds the files that a path names: one file, a folder of shards, a glob. [`read_rows`] gives their
//! rows (JSON Lines, a JSON list, Parquet, compressed or not) and where each comes from. [`Form::of`] recognises a
//! row in any of the forms in which the field writes prompts, examples and preferences, and [`read`] does both for
//! a whole path: it is the one reader of prompts, pairs, fine-tuning examples and golden answers. [`Mix`] reads
//! several sets as one. Errors name file, line and remedy. This crate knows texts and messages; what
//! a token is, and what rows are for, it does not know. `docs/data.md` shows every form.

mod columns;
mod error;
mod files;
mod form;
mod json;
mod mix;
mod open;
mod order;
mod parquet;
mod rows;
mod tally;
mod turn;

pub use columns::{Column, Columns};
pub use error::{DatasetError, Place};
pub use files::files;
pub use form::{Answered, Form, Pair};
pub use json::parse_row;
pub use mix::Mix;
pub use open::{open, unpacked};
pub use order::shuffled;
pub use rows::{Row, Source, Sourced, read, read_rows};
pub use turn::prompt;
