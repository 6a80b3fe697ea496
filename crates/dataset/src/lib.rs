//! Rows of prompts, completions and preferences, from files.
//!
//! A file is JSON Lines, one object a line, or one JSON list of objects, either of them compressed or not
//! (`.gz`); or Parquet. [`read_rows`] gives its rows with their lines; [`prompt`], [`Answered::from_row`] and
//! [`Pair::from_row`] read a row in any of the forms in which the field writes prompts, examples and
//! preferences. [`Mix`] reads several sets as one. What is wrong is told with file and line. This crate knows
//! texts and messages; what a token is, and what rows are for, it does not know.

mod answered;
mod error;
mod mix;
mod order;
mod pair;
mod parquet;
mod rows;

pub use answered::{Answered, prompt, response};
pub use error::DatasetError;
pub use mix::Mix;
pub use order::shuffled;
pub use pair::{Columns, Pair};
pub use rows::read_rows;
