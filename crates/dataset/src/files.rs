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

/// Parts of a name that mark rows which are not for training.
const HELD_OUT: [&str; 6] = ["test", "validation", "valid", "val", "dev", "eval"];

/// The files that `path` names: itself; the files of rows directly in a folder; those that match a glob (`*`, `?`,
/// `[...]`, `**`). Several are in the order of their names.
///
/// # Errors
/// When there is none, or a folder holds several splits (training and test shards).
pub fn files(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
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

/// The files of rows directly in `folder`.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let unreadable = |source| DatasetError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    let (mut shards, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_dir() {
            folders.push(path);
        } else if holds_rows(&name(&path)) {
            shards.push(path);
        }
    }
    shards.sort();
    let refused = |reason| DatasetError::File {
        path: folder.to_owned(),
        reason,
    };
    if shards.is_empty() {
        return Err(refused(nothing_in(&folders)));
    }
    let splits = splits(&shards);
    match splits.len() {
        0 | 1 => Ok(shards),
        _ => Err(refused(several(folder, &splits))),
    }
}

fn nothing_in(folders: &[PathBuf]) -> String {
    let advice = folders
        .iter()
        .map(|folder| name(folder))
        .filter(|name| !name.starts_with('.'))
        .min();
    let advice = advice
        .map(|name| format!("; it holds the folder {name:?}: name that"))
        .unwrap_or_default();
    format!("the folder holds no file of rows (.jsonl, .json, .parquet, .gz, .zst){advice}")
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
    if name.starts_with(['.', '_']) || DESCRIPTIONS.contains(&name) {
        return false;
    }
    let name = [".gz", ".zst"]
        .iter()
        .find_map(|packed| name.strip_suffix(packed))
        .unwrap_or(name);
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    ENDINGS.contains(&ending)
}

/// The splits that shards belong to: one when nothing in their names tells them apart.
fn splits(shards: &[PathBuf]) -> BTreeSet<String> {
    let mut numbered = BTreeMap::new();
    for shard in shards {
        let name = name(shard);
        let stem = name.split('.').next().unwrap_or_default();
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
    let mut parts = split.split(|c: char| !c.is_alphanumeric());
    parts.any(|part| HELD_OUT.contains(&part))
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
    }
}
