//! Checksums of a checkpoint's files: `checksums.json`, which is written last.
//!
//! A folder without it is not whole, or was written by an earlier build. CRC-32C detects damage, not forgery; it costs
//! less than writing the files. Does not know what the files hold.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use messages::wire;
use serde::{Deserialize, Serialize};
use telemetry::wait_for_descriptor;

use crate::checkpoint::files::read_regular;

/// Name of the file.
pub(super) const CHECKSUMS: &str = "checksums.json";

/// Version of the layout of checkpoints; increased when a build cannot resume those of the build before.
const FORMAT: u32 = 1;

/// Length of the blocks that a file is read in, in bytes.
const BLOCK_BYTES: usize = 1 << 20;

/// The content of `checksums.json`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Checksums {
    format: u32,
    /// Version of the wire encoding of the labelled pairs.
    messages: u8,
    files: BTreeMap<String, FileChecksum>,
}

/// The part of `checksums.json` that every build understands.
#[derive(Deserialize)]
struct Versions {
    format: u32,
    messages: u8,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct FileChecksum {
    bytes: u64,
    crc32c: u32,
}

/// Reason why a checkpoint cannot be resumed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Defect {
    /// Another build wrote it, in another layout.
    OtherBuild(&'static str),
    /// A file is missing or differs from what was written.
    Damaged(String),
}

impl std::fmt::Display for Defect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OtherBuild(when) => write!(
                f,
                "it was written by {when} build of agon, in another layout; resume it with that build, or start a new \
                 run from its weights (model.path)"
            ),
            Self::Damaged(reason) => f.write_str(reason),
        }
    }
}

/// The content of `checksums.json` for the files of `folder`.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn of_folder(folder: &Path) -> io::Result<Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in wait_for_descriptor(|| fs::read_dir(folder))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_file() && name != CHECKSUMS {
            files.insert(name, checksum(&entry.path())?);
        }
    }
    let checksums = Checksums {
        format: FORMAT,
        messages: wire::VERSION,
        files,
    };
    Ok(serde_json::to_vec_pretty(&checksums)?)
}

/// Checks that every file of a checkpoint is as it was written.
///
/// # Errors
/// The first defect.
pub(crate) fn verify(folder: &Path) -> Result<(), Defect> {
    let Some(bytes) = read_checksums(folder)? else {
        return Err(match folder.join("state.json").is_file() {
            true => Defect::OtherBuild("an earlier"),
            false => Defect::Damaged("state.json and checksums.json are missing".into()),
        });
    };
    let malformed = |error| Defect::Damaged(format!("{CHECKSUMS} is damaged: {error}"));
    let versions: Versions = serde_json::from_slice(&bytes).map_err(malformed)?;
    let ours = (FORMAT, wire::VERSION);
    match (versions.format, versions.messages).cmp(&ours) {
        std::cmp::Ordering::Less => return Err(Defect::OtherBuild("an earlier")),
        std::cmp::Ordering::Greater => return Err(Defect::OtherBuild("a later")),
        std::cmp::Ordering::Equal => {}
    }
    let checksums: Checksums = serde_json::from_slice(&bytes).map_err(malformed)?;
    for (name, expected) in &checksums.files {
        check_file(folder, name, expected)?;
    }
    Ok(())
}

fn check_file(folder: &Path, name: &str, expected: &FileChecksum) -> Result<(), Defect> {
    let damaged = |reason: String| Err(Defect::Damaged(format!("{name} {reason}")));
    let path = folder.join(name);
    match fs::metadata(&path) {
        Ok(metadata) if !metadata.is_file() => return damaged("is not a regular file".into()),
        Ok(metadata) if metadata.len() != expected.bytes => {
            let found = metadata.len();
            return damaged(format!("has {found} bytes instead of {}", expected.bytes));
        }
        Ok(_) => {}
        Err(error) => return damaged(format!("cannot be read: {error}")),
    }
    match checksum(&path) {
        Ok(found) if found == *expected => Ok(()),
        Ok(_) => damaged(format!(
            "is damaged: its checksum is not that in {CHECKSUMS}"
        )),
        Err(error) => damaged(format!("cannot be read: {error}")),
    }
}

/// Content of a regular file; `None` if there is none.
fn read_checksums(folder: &Path) -> Result<Option<Vec<u8>>, Defect> {
    match read_regular(&folder.join(CHECKSUMS)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Defect::Damaged(format!(
            "{CHECKSUMS} cannot be read: {error}"
        ))),
    }
}

fn checksum(path: &Path) -> io::Result<FileChecksum> {
    let mut file = wait_for_descriptor(|| File::open(path))?;
    let mut block = vec![0; BLOCK_BYTES];
    let (mut bytes, mut crc32c) = (0, 0);
    loop {
        let read = file.read(&mut block)?;
        if read == 0 {
            return Ok(FileChecksum { bytes, crc32c });
        }
        bytes += read as u64;
        crc32c = crc32c::crc32c_append(crc32c, &block[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("state.json"), "{}").unwrap();
        fs::write(
            folder.path().join("model.safetensors"),
            vec![7; 3 * BLOCK_BYTES / 2],
        )
        .unwrap();
        let checksums = of_folder(folder.path()).unwrap();
        fs::write(folder.path().join(CHECKSUMS), checksums).unwrap();
        folder
    }

    #[test]
    fn every_damaged_file_is_named() {
        let folder = folder();
        let path = |name: &str| folder.path().join(name);
        assert_eq!(verify(folder.path()), Ok(()));
        // Written later, by someone else.
        fs::write(path("notes.txt"), "unknown files are ignored").unwrap();
        assert_eq!(verify(folder.path()), Ok(()));
        for name in ["state.json", "model.safetensors", CHECKSUMS] {
            let whole = fs::read(path(name)).unwrap();
            for index in [0, whole.len() / 2, whole.len() - 1] {
                let mut bytes = whole.clone();
                bytes[index] ^= 1;
                fs::write(path(name), bytes).unwrap();
                let defect = verify(folder.path()).unwrap_err();
                assert!(
                    matches!(defect, Defect::Damaged(_)),
                    "{name} {index}: {defect}"
                );
                // A bit of the checksums may be that of another file's entry.
                let is_named = name == CHECKSUMS || defect.to_string().contains(name);
                assert!(is_named, "{name} {index}: {defect}");
            }
            fs::write(path(name), &whole[..whole.len() / 2]).unwrap();
            let defect = verify(folder.path()).unwrap_err().to_string();
            assert!(defect.contains(name), "{defect}");
            fs::write(path(name), whole).unwrap();
        }
        fs::remove_file(path("model.safetensors")).unwrap();
        let defect = verify(folder.path()).unwrap_err().to_string();
        assert!(
            defect.contains("model.safetensors cannot be read"),
            "{defect}"
        );
    }

    #[test]
    fn another_build_is_named_as_such() {
        let folder = folder();
        let path = folder.path().join(CHECKSUMS);
        let whole = fs::read_to_string(&path).unwrap();
        let with = |from: String, to: &str| fs::write(&path, whole.replace(&from, to)).unwrap();
        with(format!("\"format\": {FORMAT}"), "\"format\": 0");
        assert_eq!(verify(folder.path()), Err(Defect::OtherBuild("an earlier")));
        with(
            format!("\"messages\": {}", wire::VERSION),
            "\"messages\": 200",
        );
        assert_eq!(verify(folder.path()), Err(Defect::OtherBuild("a later")));
        fs::remove_file(&path).unwrap();
        let defect = verify(folder.path()).unwrap_err().to_string();
        assert!(defect.contains("written by an earlier build"), "{defect}");
    }
}
