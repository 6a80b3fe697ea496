//! Reader of data sets of prompts, completions and preferences.
//!
//! [`files()`] expands a path: one file, a folder of shards, a glob. [`read_rows`] reads their rows (JSON Lines, a JSON
//! list, Parquet, compressed or not) with the position of each. [`ParsedRow::of`] recognises the common formats of
//! prompts, fine-tuning examples and preferences, and [`read`] does both for a path: it reads prompts, pairs,
//! fine-tuning examples and golden answers alike; [`visit`] passes on row after row without keeping any. Files are read
//! as streams within [`FileLimits`]. [`Mix`] interleaves several data sets. Errors name file, line and remedy. This crate
//! knows texts and messages; it does not know tokens or the use of a row. `docs/data.md` documents every format.

mod columns;
mod compression;
mod error;
mod files;
mod json;
mod json_rows;
mod limits;
mod mix;
mod order;
mod parquet;
mod parsed_row;
mod rows;
mod tally;
mod turn;

pub use columns::{Column, Columns, LabelColumns};
pub use compression::{open, unpacked};
pub use error::{DatasetError, RowPosition};
pub use files::{files, is_part_of};
pub use json::{parse_row, row_lines};
pub use limits::FileLimits;
pub use mix::Mix;
pub use order::shuffled;
pub use parsed_row::{PairLabel, ParsedRow, PreferencePair, PromptAnswer, dialogue};
pub use rows::{DatasetRow, RowSource, WithSource, check, read, read_rows, visit};
pub use turn::prompt;
