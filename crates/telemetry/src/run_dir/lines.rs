//! Append-only JSON Lines file whose objects have a learner `step`.
//!
//! A line is passed to the operating system in one write. A last line truncated by a crash is removed on opening,
//! so that the next one never continues it. This part does not know the contents of a line beyond its step.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::TelemetryError,
    printable::printable_json,
    run_dir::{atomic, descriptors::wait_for_descriptor, private::private_file},
};

/// Block size of the backward search for the last line, in bytes.
const BLOCK_BYTES: u64 = 64 * 1024;

/// A JSON Lines file open for appending.
#[derive(Debug)]
pub(crate) struct LineFile {
    path: PathBuf,
    file: File,
    /// End of the last complete line, in bytes.
    length: u64,
}

/// The field of a line that is parsed when truncating.
#[derive(Deserialize)]
struct StepField {
    step: u64,
}

impl LineFile {
    /// Opens the file for appending, creates it if absent, and removes an incomplete last line.
    pub(crate) fn open(path: &Path) -> Result<Self, TelemetryError> {
        let (file, length) = open_repaired(path).map_err(TelemetryError::file("open", path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            length,
        })
    }

    /// Appends one line without terminal control characters; when the write fails, the file is unchanged.
    pub(crate) fn append(&mut self, row: &impl Serialize) -> Result<(), TelemetryError> {
        let line =
            serde_json::to_string(row).expect("rows have string keys and serialise to memory");
        let mut line = printable_json(&line).into_owned();
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|source| {
            // A full disk can still be truncated; if not, the next open removes the incomplete line.
            self.file.set_len(self.length).ok();
            TelemetryError::file("append to", &self.path)(source)
        })?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// Removes all lines of later steps and all malformed lines; returns their number. The file is replaced
    /// atomically.
    pub(crate) fn truncate_after(&mut self, step: u64) -> Result<usize, TelemetryError> {
        let old = wait_for_descriptor(|| File::open(&self.path))
            .map_err(TelemetryError::file("open", &self.path))?;
        let dropped = atomic::replace(&self.path, |new| copy_until(step, old, new))?;
        *self = Self::open(&self.path)?;
        Ok(dropped)
    }
}

/// All lines of the file in order; an incomplete last line is ignored.
pub(crate) fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, TelemetryError> {
    let mut reader = BufReader::new(File::open(path).map_err(TelemetryError::file("open", path))?);
    let (mut rows, mut line) = (Vec::new(), Vec::new());
    while reader
        .read_until(b'\n', &mut line)
        .map_err(TelemetryError::file("read", path))?
        > 0
    {
        match serde_json::from_slice(&line) {
            Ok(row) => rows.push(row),
            Err(_) if !line.ends_with(b"\n") => break,
            Err(source) => {
                return Err(TelemetryError::Line {
                    path: path.to_path_buf(),
                    line: rows.len() + 1,
                    source,
                });
            }
        }
        line.clear();
    }
    Ok(rows)
}

fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice(line)
        .ok()
        .map(|line: StepField| line.step)
}

fn open_repaired(path: &Path) -> io::Result<(File, u64)> {
    let open = || {
        private_file()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
    };
    let mut file = wait_for_descriptor(open)?;
    let length = file.seek(SeekFrom::End(0))?;
    let start = last_line_start(&mut file, length)?;
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.read_to_end(&mut tail)?;
    if step_of(&tail).is_some() {
        file.write_all(b"\n")?;
        return Ok((file, length + 1));
    }
    file.set_len(start)?;
    Ok((file, start))
}

/// Offset after the last newline; the length itself when the file ends in one.
fn last_line_start(file: &mut File, length: u64) -> io::Result<u64> {
    let mut block = Vec::new();
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(BLOCK_BYTES);
        block.clear();
        file.seek(SeekFrom::Start(start))?;
        Read::by_ref(file)
            .take(end - start)
            .read_to_end(&mut block)?;
        if let Some(newline) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + newline as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

fn copy_until(step: u64, old: File, new: &mut impl Write) -> io::Result<usize> {
    let mut reader = BufReader::new(old);
    let (mut line, mut dropped) = (Vec::new(), 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        match step_of(&line) {
            Some(at) if at <= step => new.write_all(&line)?,
            _ => dropped += 1,
        }
        line.clear();
    }
    Ok(dropped)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use serde_json::{Value, json};

    use super::*;

    fn opened(contents: &[u8]) -> (tempfile::TempDir, LineFile) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines.jsonl");
        fs::write(&path, contents).unwrap();
        let lines = LineFile::open(&path).unwrap();
        (directory, lines)
    }

    #[test]
    fn an_incomplete_last_line_is_removed_and_a_complete_one_terminated() {
        let long = format!(
            "{{\"step\":1,\"text\":\"{}",
            "x".repeat(3 * BLOCK_BYTES as usize)
        );
        let cases = [
            ("", ""),
            ("{\"step\":1}\n", "{\"step\":1}\n"),
            ("{\"step\":1}\n{\"st", "{\"step\":1}\n"),
            ("{\"st", ""),
            ("{\"step\":1}\n{\"step\":2}", "{\"step\":1}\n{\"step\":2}\n"),
            (long.as_str(), ""),
        ];
        for (before, after) in cases {
            let (_directory, mut lines) = opened(before.as_bytes());
            assert_eq!(fs::read_to_string(&lines.path).unwrap(), after);
            lines.append(&json!({"step": 9})).unwrap();
            assert_eq!(
                fs::read_to_string(&lines.path).unwrap(),
                format!("{after}{{\"step\":9}}\n")
            );
            assert_eq!(lines.length, fs::metadata(&lines.path).unwrap().len());
        }
    }

    #[test]
    fn a_new_file_is_readable_by_its_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines.jsonl");
        let mut lines = LineFile::open(&path).unwrap();
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        lines.truncate_after(0).unwrap();
        assert_eq!(mode(), 0o600);
    }

    #[test]
    fn truncation_removes_later_and_malformed_lines() {
        let before = "{\"step\":1}\n{\"step\":3}\nnot json\n{\"step\":2,\"a\":0}\n{\"step\":4}\n";
        let (_directory, mut lines) = opened(before.as_bytes());
        assert_eq!(lines.truncate_after(2).unwrap(), 3);
        lines.append(&json!({"step": 3, "again": true})).unwrap();
        assert_eq!(
            fs::read_to_string(&lines.path).unwrap(),
            "{\"step\":1}\n{\"step\":2,\"a\":0}\n{\"step\":3,\"again\":true}\n"
        );
    }

    #[test]
    fn reading_ignores_an_incomplete_line_and_rejects_a_malformed_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"st").unwrap();
        let rows: Vec<Value> = read_lines(&path).unwrap();
        assert_eq!(rows, [json!({"step": 1}), json!({"step": 2})]);
        fs::write(&path, "{\"step\":1}\n{\"st\n{\"step\":3}\n").unwrap();
        let message = read_lines::<Value>(&path).unwrap_err().to_string();
        assert!(
            message.starts_with("failed to read line 2 of "),
            "{message}"
        );
    }
}
