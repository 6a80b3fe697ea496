//! Rows of prompts, completions and preferences, from files.
//!
//! A file is JSON Lines, one object a line, or one JSON list of objects; either may be compressed (`.gz`).
//! [`read_rows`] gives its rows with their lines, [`Pair::from_row`] reads a row in any of the forms in
//! which the field writes preferences. What is wrong is told with file and line. This crate knows texts
//! and messages; what a token is, and what rows are for, it does not know.

mod error;
mod order;
mod pair;
mod rows;

pub use error::DatasetError;
pub use order::shuffled;
pub use pair::{Columns, Pair};
pub use rows::read_rows;
