//! The files that a path names.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use crate::error::DatasetError;

/// What a name of a file of rows ends with; `.gz` and `.zst` may follow.
const ENDINGS: [&str; 4] = ["jsonl", "ndjson", "json", "parquet"];

/// JSON that describes a data set and holds no rows of it.
const DESCRIPTIONS: [&str; 4] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
];

/// JSON that `Dataset.save_to_disk` writes beside its Arrow files.
const SAVED: [&str; 2] = ["state.json", "dataset_dict.json"];

/// What names of data that is not read end with, and what to do instead.
const FOREIGN: [(&[&str], &str); 5] = [
    (
        &["arrow", "feather"],
        "write Arrow as Parquet (Dataset.to_parquet)",
    ),
    (
        &["csv", "tsv", "txt", "xlsx", "avro", "orc"],
        "write CSV and its like as JSON Lines (Dataset.to_json)",
    ),
    (&["zip", "tar", "tgz", "7z", "rar"], "unpack archives"),
    (&["bz2", "xz", "lz4", "br"], "pack files by gzip or zstd"),
    (
        &["pkl", "pickle", "npy", "npz", "db", "sqlite", "msgpack"],
        "write the rows as JSON Lines",
    ),
];

/// Parts of a name that mark rows which are not for training.
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

/// The files that `path` names: itself; the files of rows directly in a folder; those that match a glob (`*`, `?`,
/// `[...]`, `**`). Several are in the order of their names. What a folder holds besides is named in the log.
///
/// # Errors
/// When there is none, or a folder holds several splits (training and test shards).
pub fn files(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    refuse_remote(path)?;
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

/// That a path is not an address: nothing is fetched.
fn refuse_remote(path: &Path) -> Result<(), DatasetError> {
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
                "fetch it with `hf download --repo-type dataset {name} --local-dir FOLDER` and name the folder"
            )
        }
        None if text.contains("://") => "fetch the file and name it".to_owned(),
        None => return Ok(()),
    };
    Err(DatasetError::File {
        path: path.to_owned(),
        reason: format!("rows are read from files on this machine, not from addresses: {remedy}"),
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
    let found = glob::glob(&pattern.to_string_lossy())
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
    all.sort();
    Ok(all)
}

/// What a folder holds.
#[derive(Debug, Default)]
struct Found {
    rows: Vec<PathBuf>,
    /// Names of files that look like data and are not read.
    foreign: BTreeSet<String>,
    /// Names of folders.
    folders: BTreeSet<String>,
    /// Whether `Dataset.save_to_disk` wrote it.
    is_saved: bool,
}

impl Found {
    fn add(&mut self, path: PathBuf) {
        let name = name(&path);
        self.is_saved |= SAVED.contains(&name.as_str());
        if path.is_dir() {
            self.folders.extend((!is_hidden(&name)).then_some(name));
        } else if holds_rows(&name) {
            self.rows.push(path);
        } else if remedy(&name).is_some() {
            self.foreign.insert(name);
        }
    }

    /// Logs what is passed over.
    fn say(&self, folder: &Path) {
        let inner = self.folders.iter();
        let inner = inner.filter(|name| has_rows(&folder.join(name)));
        let passed: Vec<String> = self.foreign.iter().chain(inner).cloned().collect();
        if !passed.is_empty() {
            tracing::warn!(
                path = %folder.display(),
                read = self.rows.len(),
                passed_over = passed.join(", "),
                "some of the folder is not read: name files or a glob to have others read"
            );
        }
    }

    /// Why nothing of it can be read.
    fn nothing(&self) -> String {
        let is_arrow = |name: &String| name.ends_with(".arrow");
        if self.is_saved && (self.foreign.iter().any(is_arrow) || self.rows.is_empty()) {
            return "the folder is one of Dataset.save_to_disk, whose Arrow files are not read: write the data set with \
                    load_from_disk(...).to_parquet(\"rows.parquet\"), or to_json, of each split"
                .into();
        }
        let none = "the folder holds no file of rows (.jsonl, .json, .parquet, .gz, .zst)";
        let mut remedies = self
            .foreign
            .iter()
            .filter_map(|name| Some((name, remedy(name)?)));
        match (remedies.next(), self.folders.first()) {
            (Some((name, remedy)), _) => format!("{none} but {name:?}: {remedy}"),
            (None, Some(inner)) => format!("{none}; it holds the folder {inner:?}: name that"),
            (None, None) => none.into(),
        }
    }
}

/// The files of rows directly in `folder`.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let unreadable = |source| DatasetError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    let mut found = Found::default();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        found.add(entry.map_err(unreadable)?.path());
    }
    found.rows.sort();
    let refused = |reason| DatasetError::File {
        path: folder.to_owned(),
        reason,
    };
    if found.rows.is_empty() {
        return Err(refused(found.nothing()));
    }
    let splits = splits(&found.rows);
    if splits.len() > 1 {
        return Err(refused(several(folder, &splits)));
    }
    found.say(folder);
    Ok(found.rows)
}

/// Whether a folder directly holds files of rows.
fn has_rows(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .any(|path| path.is_file() && holds_rows(&name(&path)))
}

/// What to do with data of this name, which is not read; none when it is no data.
fn remedy(name: &str) -> Option<&'static str> {
    let name = unpacked(name);
    let is_about = ["readme", "license", "licence", "requirements"];
    if is_hidden(&name) || is_about.iter().any(|about| name.starts_with(about)) {
        return None;
    }
    let ending = ending(&name)?.to_owned();
    let of = FOREIGN
        .iter()
        .find(|(endings, _)| endings.contains(&ending.as_str()));
    of.map(|(_, remedy)| *remedy)
}

fn is_hidden(name: &str) -> bool {
    name.starts_with(['.', '_'])
}

/// A name in small letters, without the ending of what it is packed by.
fn unpacked(name: &str) -> String {
    let name = name.to_lowercase();
    let packed = [".gz", ".zst"];
    let bare = packed.iter().find_map(|packed| name.strip_suffix(packed));
    bare.map(str::to_owned).unwrap_or(name)
}

fn ending(name: &str) -> Option<&str> {
    name.rsplit_once('.').map(|(_, ending)| ending)
}

fn several(folder: &Path, splits: &BTreeSet<String>) -> String {
    let names: Vec<String> = splits.iter().map(|split| format!("{split:?}")).collect();
    let first = splits.iter().find(|split| !is_held_out(split));
    let first = first.or(splits.first()).map_or("", String::as_str);
    let glob = folder.join(format!("{first}*"));
    format!(
        "the folder holds several splits ({}): name one by a glob, as in {:?}",
        names.join(", "),
        glob.display().to_string()
    )
}

fn holds_rows(name: &str) -> bool {
    if is_hidden(name) || DESCRIPTIONS.contains(&name) {
        return false;
    }
    ending(&unpacked(name)).is_some_and(|ending| ENDINGS.contains(&ending))
}

/// The splits that shards belong to: one when nothing in their names tells them apart.
fn splits(shards: &[PathBuf]) -> BTreeSet<String> {
    let mut numbered = BTreeMap::new();
    for shard in shards {
        let name = name(shard);
        let rows = unpacked(&name).len();
        let stem = name[..rows].rsplit_once('.').map_or("", |(stem, _)| stem);
        let split = without_number(stem);
        numbered.insert(split.to_owned(), split.len() < stem.len());
    }
    let told_apart = numbered.values().any(|&is_numbered| is_numbered)
        || numbered.keys().any(|split| is_held_out(split));
    match told_apart {
        true => numbered.into_keys().collect(),
        false => BTreeSet::new(),
    }
}

/// `train` of `train-00000-of-00002`, which a hash may follow.
fn without_number(stem: &str) -> &str {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = stem.split('-').collect();
    let place = parts
        .windows(3)
        .position(|window| is_number(window[0]) && window[1] == "of" && is_number(window[2]));
    let kept = place.map_or(stem.len(), |place| {
        parts[..place]
            .iter()
            .map(|part| part.len() + 1)
            .sum::<usize>()
            .saturating_sub(1)
    });
    &stem[..kept]
}

fn is_held_out(split: &str) -> bool {
    let split = split.to_lowercase();
    let parts = split.split(|c: char| !c.is_alphanumeric());
    let parts: Vec<&str> = parts
        .map(|part| part.trim_end_matches(|c: char| c.is_ascii_digit()))
        .collect();
    let two = parts.windows(2).map(|two| two.join("_"));
    two.chain(parts.iter().map(|&part| part.to_owned()))
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
    fn a_folder_and_a_glob_are_their_files_in_order() {
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
        assert_eq!(found(&shards.path().join("train-0000[01]*")), expected);

        let lines = folder(&["b.jsonl.gz", "a.jsonl", "c.json.zst", "more/d.jsonl"]);
        let own = ["a.jsonl", "b.jsonl.gz", "c.json.zst"].map(String::from);
        assert_eq!(found(lines.path()), Ok(own.to_vec()));
        assert_eq!(
            found(&lines.path().join("**/*.jsonl")).map(|all| all.len()),
            Ok(2)
        );
        // The endings of other systems; what is not read is passed over.
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
        // Numbers within a name are no splits.
        let numbered = folder(&["part.0.jsonl", "part.1.jsonl"]);
        assert_eq!(found(numbered.path()).map(|all| all.len()), Ok(2));
        // A name that is there is a name, whatever letters it has.
        let odd = folder(&["a[1].jsonl"]);
        assert_eq!(
            found(&odd.path().join("a[1].jsonl")),
            Ok(vec!["a[1].jsonl".into()])
        );
    }

    #[test]
    fn splits_in_one_folder_are_not_mixed() {
        for (names, says) in [
            (
                &[
                    "train_prefs-00000-of-00001.parquet",
                    "test_prefs-00000-of-00001.parquet",
                ][..],
                "several splits (\"test_prefs\", \"train_prefs\"): name one by a glob",
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
            (&["data.csv", "README.md"], "but \"data.csv\": write CSV"),
            (&["rows.jsonl.bz2"], "pack files by gzip or zstd"),
            (&["rows.zip"], "unpack archives"),
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
                "it holds the folder \"data\": name that",
            ),
            (&["README.md"], "holds no file of rows"),
        ] {
            let folder = folder(names);
            let error = found(folder.path()).expect_err(says);
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        let empty = folder(&[]);
        for (name, says) in [
            ("none.jsonl", "none.jsonl: No such file"),
            ("*.jsonl", "no file matches the glob"),
        ] {
            let error = found(&empty.path().join(name)).expect_err(says);
            assert!(error.contains(says), "{error}");
        }
        for (address, says) in [
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
                "fetch the file and name it",
            ),
        ] {
            let error = found(Path::new(address)).expect_err(says);
            assert!(error.contains(says), "{error}");
        }
    }
}
