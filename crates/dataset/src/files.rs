//! Expansion of a path to data files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use crate::error::DatasetError;

/// Extensions of data files; `.gz` or `.zst` may follow.
const EXTENSIONS: [&str; 4] = ["jsonl", "ndjson", "json", "parquet"];

/// JSON files with metadata of a data set, without rows.
const METADATA: [&str; 4] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
];

/// JSON files that `Dataset.save_to_disk` writes next to its Arrow files.
const SAVE_TO_DISK: [&str; 2] = ["state.json", "dataset_dict.json"];

/// Extensions of unsupported data files, and the remedy.
const UNSUPPORTED: [(&[&str], &str); 5] = [
    (
        &["arrow", "feather"],
        "write Arrow as Parquet (Dataset.to_parquet)",
    ),
    (
        &["csv", "tsv", "txt", "xlsx", "avro", "orc"],
        "convert CSV and similar formats to JSON Lines (Dataset.to_json)",
    ),
    (&["zip", "tar", "tgz", "7z", "rar"], "extract archives"),
    (
        &["bz2", "xz", "lz4", "br"],
        "compress files with gzip or zstd",
    ),
    (
        &["pkl", "pickle", "npy", "npz", "db", "sqlite", "msgpack"],
        "write the rows as JSON Lines",
    ),
];

/// Name parts of splits that are not for training.
const HELD_OUT: [&str; 13] = [
    "test",
    "tests",
    "testing",
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "evaluation",
    "heldout",
    "held_out",
    "holdout",
    "hold_out",
];

/// Expands `path` to data files: the file itself, the data files directly in a folder, or the matches of a glob (`*`,
/// `?`, `[...]`, `**`), sorted by name. Other data in a folder is logged as a warning.
///
/// # Errors
/// When there are none, or a folder contains several splits (training and test shards).
pub fn files(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    reject_url(path)?;
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => shards(path),
        Ok(_) => Ok(vec![path.to_owned()]),
        Err(error) if error.kind() == io::ErrorKind::NotFound && is_glob(path) => matches(path),
        Err(source) => Err(DatasetError::Unreadable {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Whether `file` is one of the data files of `path`, a file, a folder or a glob, or `path` itself.
#[must_use]
pub fn is_part_of(file: &Path, path: &Path) -> bool {
    let matches =
        |pattern: &str| glob::Pattern::new(pattern).is_ok_and(|glob| glob.matches_path(file));
    file.starts_with(path) || path.to_str().is_some_and(matches)
}

/// Rejects URLs: nothing is downloaded.
fn reject_url(path: &Path) -> Result<(), DatasetError> {
    let text = path.to_string_lossy();
    let hub = ["hf://datasets/", "hf:datasets/", "hf://", "hf:"]
        .iter()
        .find_map(|start| text.strip_prefix(start));
    let remedy = match hub {
        Some(name) => {
            let name: Vec<&str> = name.split('/').take(2).collect();
            let name = name.join("/");
            let name = name.split('@').next().unwrap_or_default();
            format!(
                "download it with `hf download --repo-type dataset {name} --local-dir FOLDER` and name the folder"
            )
        }
        None if text.contains("://") => "download the file and name it".to_owned(),
        None => return Ok(()),
    };
    Err(DatasetError::File {
        path: path.to_owned(),
        reason: format!("rows are read from local files, not from URLs: {remedy}"),
    })
}

fn is_glob(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

fn matches(pattern: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let unusable = |reason: String| DatasetError::File {
        path: pattern.to_owned(),
        reason,
    };
    // As in a shell and in a folder, hidden files are left out.
    let options = glob::MatchOptions {
        require_literal_leading_dot: true,
        ..glob::MatchOptions::new()
    };
    let found = glob::glob_with(&pattern.to_string_lossy(), options)
        .map_err(|error| unusable(format!("not a glob: {error}")))?;
    let mut all = Vec::new();
    for entry in found {
        let path = entry.map_err(|error| DatasetError::Unreadable {
            path: error.path().to_owned(),
            source: error.into(),
        })?;
        if path.is_file() {
            all.push(path);
        }
    }
    if all.is_empty() {
        return Err(unusable("no file matches the glob".into()));
    }
    if let Some(missing) = missing_shards(&all) {
        tracing::warn!(path = %pattern.display(), "{missing} missing: the others are read");
    }
    all.sort();
    Ok(all)
}

/// Contents of a folder.
#[derive(Debug, Default)]
struct FolderContents {
    rows: Vec<PathBuf>,
    /// Names of unsupported data files.
    unsupported: BTreeSet<String>,
    /// Names of subfolders.
    folders: BTreeSet<String>,
    /// Whether it was written by `Dataset.save_to_disk`.
    is_save_to_disk: bool,
}

impl FolderContents {
    fn add(&mut self, path: PathBuf) {
        let name = name(&path);
        self.is_save_to_disk |= SAVE_TO_DISK.contains(&name.as_str());
        if path.is_dir() {
            self.folders.extend((!is_hidden(&name)).then_some(name));
        } else if is_data_file(&name) {
            self.rows.push(path);
        } else if remedy(&name).is_some() {
            self.unsupported.insert(name);
        }
    }

    /// Logs the data that is not read.
    fn log_skipped(&self, folder: &Path) {
        let subfolders = self.folders.iter();
        let subfolders = subfolders.filter(|name| has_data_files(&folder.join(name)));
        let skipped: Vec<String> = self.unsupported.iter().chain(subfolders).cloned().collect();
        if !skipped.is_empty() {
            tracing::warn!(
                path = %folder.display(),
                read = self.rows.len(),
                skipped = skipped.join(", "),
                "part of the folder is not read: name files or a glob to read others"
            );
        }
    }

    /// Error message for a folder without data files.
    fn no_data_files(&self) -> String {
        let is_arrow = |name: &String| name.ends_with(".arrow");
        if self.is_save_to_disk && (self.unsupported.iter().any(is_arrow) || self.rows.is_empty()) {
            return "the folder was written by Dataset.save_to_disk, whose Arrow files are not supported: convert each split with \
                    load_from_disk(...).to_parquet(\"rows.parquet\"), or to_json"
                .into();
        }
        let none = "the folder contains no data file (.jsonl, .json, .parquet, .gz, .zst)";
        let mut remedies = self
            .unsupported
            .iter()
            .filter_map(|name| Some((name, remedy(name)?)));
        match (remedies.next(), self.folders.first()) {
            (Some((name, remedy)), _) => format!("{none}, only {name:?}: {remedy}"),
            (None, Some(folder)) => format!("{none}; it contains the folder {folder:?}: name that"),
            (None, None) => none.into(),
        }
    }
}

/// The data files directly in `folder`.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let unreadable = |source| DatasetError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    let mut found = FolderContents::default();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        found.add(entry.map_err(unreadable)?.path());
    }
    found.rows.sort();
    let error = |reason| DatasetError::File {
        path: folder.to_owned(),
        reason,
    };
    if found.rows.is_empty() {
        return Err(error(found.no_data_files()));
    }
    let splits = splits(&found.rows);
    if splits.len() > 1 {
        return Err(error(several_splits(folder, &splits)));
    }
    if let Some(missing) = missing_shards(&found.rows) {
        return Err(error(format!(
            "{missing} missing: complete the download, or name the files that are to be read by a glob"
        )));
    }
    found.log_skipped(folder);
    Ok(found.rows)
}

/// Whether a folder directly contains data files.
fn has_data_files(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .any(|path| path.is_file() && is_data_file(&name(&path)))
}

/// Remedy for an unsupported data file of this name; `None` if it is not data.
fn remedy(name: &str) -> Option<&'static str> {
    let name = without_compression(name);
    let documentation = ["readme", "license", "licence", "requirements"];
    if is_hidden(&name) || documentation.iter().any(|start| name.starts_with(start)) {
        return None;
    }
    let extension = extension(&name)?.to_owned();
    let entry = UNSUPPORTED
        .iter()
        .find(|(extensions, _)| extensions.contains(&extension.as_str()));
    entry.map(|(_, remedy)| *remedy)
}

fn is_hidden(name: &str) -> bool {
    name.starts_with(['.', '_'])
}

/// The name in lower case, without the extension of a compression format.
fn without_compression(name: &str) -> String {
    let name = name.to_lowercase();
    let suffixes = [".gz", ".zst"];
    let stripped = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
    stripped.map(str::to_owned).unwrap_or(name)
}

fn extension(name: &str) -> Option<&str> {
    name.rsplit_once('.').map(|(_, extension)| extension)
}

/// Error message for a folder with several splits.
fn several_splits(folder: &Path, splits: &BTreeSet<String>) -> String {
    let names: Vec<String> = splits.iter().map(|split| format!("{split:?}")).collect();
    let first = splits.iter().find(|split| !is_held_out(split));
    let first = first.or(splits.first()).map_or("", String::as_str);
    let glob = folder.join(format!("{first}*"));
    format!(
        "the folder contains several splits ({}): select one by a glob, such as {:?}",
        names.join(", "),
        glob.display().to_string()
    )
}

fn is_data_file(name: &str) -> bool {
    if is_hidden(name) || METADATA.contains(&name) {
        return false;
    }
    extension(&without_compression(name)).is_some_and(|extension| EXTENSIONS.contains(&extension))
}

/// Splits of the shards by name; empty when the names do not distinguish splits.
fn splits(shards: &[PathBuf]) -> BTreeSet<String> {
    let mut numbered = BTreeMap::new();
    for shard in shards {
        let name = name(shard);
        let rows = without_compression(&name).len();
        let stem = name[..rows].rsplit_once('.').map_or("", |(stem, _)| stem);
        let split = without_number(stem);
        numbered.insert(split.to_owned(), split.len() < stem.len());
    }
    let is_distinguished = numbered.values().any(|&is_numbered| is_numbered)
        || numbered.keys().any(|split| is_held_out(split));
    match is_distinguished {
        true => numbered.into_keys().collect(),
        false => BTreeSet::new(),
    }
}

/// Shards that the names of the others say there are: `train-00001-of-00002` beside `train-00000-of-00002`.
fn missing_shards(shards: &[PathBuf]) -> Option<String> {
    let mut numbers: BTreeMap<(String, usize), BTreeSet<usize>> = BTreeMap::new();
    for shard in shards {
        if let Some((split, number, count)) = shard_number(&name(shard)) {
            numbers.entry((split, count)).or_default().insert(number);
        }
    }
    numbers.into_iter().find_map(|((split, count), found)| {
        let missing = (0..count).filter(|number| !found.contains(number));
        let (first, missing) = (missing.clone().next()?, missing.count());
        let verb = if missing == 1 { "is" } else { "are" };
        Some(format!(
            "{missing} of the {count} shards of {split:?}, the first {first:05}-of-{count:05}, {verb}"
        ))
    })
}

/// The split, number and count in the name of a shard, `train`, 0 and 2 in `train-00000-of-00002.parquet`; `None` for
/// other names and for numbers that are not below the count.
fn shard_number(name: &str) -> Option<(String, usize, usize)> {
    let stem = without_compression(name);
    let split = without_number(stem.rsplit_once('.')?.0).to_owned();
    let mut parts = stem
        .get(split.len()..)?
        .trim_start_matches('-')
        .split(['-', '.']);
    let number = parts.next()?.parse().ok()?;
    let count = parts.nth(1)?.parse().ok()?;
    // Numbers of more digits are no shards; they would be listed one by one.
    (number < count && count < 100_000).then_some((split, number, count))
}

/// The split name `train` of `train-00000-of-00002`, which may be followed by a hash.
fn without_number(stem: &str) -> &str {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = stem.split('-').collect();
    let position = parts
        .windows(3)
        .position(|window| is_number(window[0]) && window[1] == "of" && is_number(window[2]));
    let length = position.map_or(stem.len(), |position| {
        parts[..position]
            .iter()
            .map(|part| part.len() + 1)
            .sum::<usize>()
            .saturating_sub(1)
    });
    &stem[..length]
}

/// Whether the name of a split marks it as not for training.
fn is_held_out(split: &str) -> bool {
    let split = split.to_lowercase();
    let parts = split.split(|c: char| !c.is_alphanumeric());
    let parts: Vec<&str> = parts
        .map(|part| part.trim_end_matches(|c: char| c.is_ascii_digit()))
        .collect();
    let pairs = parts.windows(2).map(|pair| pair.join("_"));
    pairs
        .chain(parts.iter().map(|&part| part.to_owned()))
        .any(|part| HELD_OUT.contains(&part.as_str()))
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in names {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, "{}\n").expect("a file");
        }
        folder
    }

    fn found(path: &Path) -> Result<Vec<String>, String> {
        let found = files(path).map_err(|error| error.to_string())?;
        Ok(found.iter().map(|path| name(path)).collect())
    }

    #[test]
    fn folders_and_globs_expand_to_sorted_files() {
        let names = [
            "train-00001-of-00002.parquet",
            "train-00000-of-00002.parquet",
            "README.md",
            "dataset_info.json",
            ".hidden.jsonl",
        ];
        let shards = folder(&names);
        let expected = Ok(vec![names[1].to_owned(), names[0].to_owned()]);
        assert_eq!(found(shards.path()), expected);
        assert_eq!(found(&shards.path().join("train-*.parquet")), expected);
        assert_eq!(
            found(&shards.path().join("*.jsonl")),
            Err(format!(
                "{}: no file matches the glob",
                shards.path().join("*.jsonl").display()
            ))
        );
        assert_eq!(found(&shards.path().join("train-0000[01]*")), expected);

        let lines = folder(&["b.jsonl.gz", "a.jsonl", "c.json.zst", "more/d.jsonl"]);
        let own = ["a.jsonl", "b.jsonl.gz", "c.json.zst"].map(String::from);
        assert_eq!(found(lines.path()), Ok(own.to_vec()));
        assert_eq!(
            found(&lines.path().join("**/*.jsonl")).map(|all| all.len()),
            Ok(2)
        );
        // Extensions in upper case; unsupported files are skipped.
        let mixed = folder(&[
            "a.jsonl",
            "B.JSONL",
            "c.Parquet",
            "d.csv",
            "README.md",
            "more/e.jsonl",
        ]);
        let read = ["B.JSONL", "a.jsonl", "c.Parquet"].map(String::from);
        assert_eq!(found(mixed.path()), Ok(read.to_vec()));
        // Numbers within a name do not distinguish splits.
        let numbered = folder(&["part.0.jsonl", "part.1.jsonl"]);
        assert_eq!(found(numbered.path()).map(|all| all.len()), Ok(2));
        for (file, path, expected) in [
            ("a/b.jsonl", "a", true),
            ("a/b.jsonl", "a/b.jsonl", true),
            ("a/b.jsonl", "a/*.jsonl", true),
            ("a/*.jsonl", "a/*.jsonl", true),
            ("a/b.jsonl", "a/*.json", false),
            ("ab", "a", false),
        ] {
            let found = is_part_of(Path::new(file), Path::new(path));
            assert_eq!(found, expected, "{file} {path}");
        }
        // An existing file is not treated as a glob.
        let odd = folder(&["a[1].jsonl"]);
        assert_eq!(
            found(&odd.path().join("a[1].jsonl")),
            Ok(vec!["a[1].jsonl".into()])
        );
    }

    #[test]
    fn folders_with_several_splits_or_no_data_are_errors() {
        for (names, expected) in [
            (
                &[
                    "train_prefs-00000-of-00001.parquet",
                    "test_prefs-00000-of-00001.parquet",
                ][..],
                "several splits (\"test_prefs\", \"train_prefs\"): select one by a glob",
            ),
            (&["train.jsonl", "test.jsonl.gz"], "train*\""),
            (&["a.train.jsonl", "a.test.jsonl"], "a.train*\""),
            (&["train1.jsonl", "test1.jsonl"], "several splits"),
            (
                &["training_data.json", "evaluation.json"],
                "training_data*\"",
            ),
            (&["train.jsonl", "heldout.jsonl"], "several splits"),
            (&["train.jsonl", "held_out.jsonl"], "several splits"),
            (&["train.jsonl", "holdout.jsonl.zst"], "several splits"),
            (&["data.csv", "README.md"], "only \"data.csv\": convert CSV"),
            (&["rows.jsonl.bz2"], "compress files with gzip or zstd"),
            (&["rows.zip"], "extract archives"),
            (&["data-00000-of-00001.arrow"], "Dataset.to_parquet"),
            (
                &[
                    "data-00000-of-00001.arrow",
                    "dataset_info.json",
                    "state.json",
                ],
                "save_to_disk",
            ),
            (&["dataset_dict.json", "train/state.json"], "save_to_disk"),
            (
                &[
                    "train_sft-00000-of-00001.parquet",
                    "train_gen-00000-of-00001.parquet",
                ],
                "several splits",
            ),
            (
                &["data/train.jsonl"],
                "it contains the folder \"data\": name that",
            ),
            (&["README.md"], "contains no data file"),
            (
                &["train-00000-of-00002.parquet"],
                "1 of the 2 shards of \"train\", the first 00001-of-00002, is missing: complete",
            ),
            (
                &[
                    "a-00002-of-00005-9f2e.jsonl.zst",
                    "a-00003-of-00005-17ab.jsonl.zst",
                ],
                "3 of the 5 shards of \"a\", the first 00000-of-00005, are missing",
            ),
        ] {
            let folder = folder(names);
            let error = found(folder.path()).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn missing_files_and_urls_are_reported() {
        let empty = folder(&[]);
        for (name, expected) in [
            ("none.jsonl", "none.jsonl: No such file"),
            ("*.jsonl", "no file matches the glob"),
        ] {
            let error = found(&empty.path().join(name)).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
        for (address, expected) in [
            (
                "hf://datasets/org/set",
                "--repo-type dataset org/set --local-dir",
            ),
            (
                "hf://datasets/org/set@main/data/train.jsonl",
                "dataset org/set --local-dir",
            ),
            (
                "https://example.org/rows.jsonl",
                "download the file and name it",
            ),
        ] {
            let error = found(Path::new(address)).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}
