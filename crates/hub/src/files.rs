//! Which files of a repository make up a model.

use std::{collections::BTreeSet, fs, path::Path};

use hf_hub::api::RepoInfo;
use serde_json::Value;
use settings::HubModel;

use crate::error::HubError;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Files read together with the weights, if they exist. Licences are downloaded too, to accompany derived models.
const OPTIONAL: [&str; 7] = [
    CONFIG,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "reward_config.json",
];

/// Names of all files of a repository.
pub(super) fn names(info: &RepoInfo) -> BTreeSet<String> {
    let files = info.siblings.iter();
    files.map(|file| file.rfilename.clone()).collect()
}

/// The files to download from a repository with files of these names: configuration and tokenizer, an adapter, and
/// the weights. The shards are known once their index is in `folder`.
pub(super) fn required(
    model: &HubModel,
    names: &BTreeSet<String>,
    folder: &Path,
) -> Result<Vec<String>, HubError> {
    let has = |name: &&str| names.contains(*name);
    let weights: Vec<String> = match [WEIGHTS, INDEX].into_iter().find(has) {
        Some(INDEX) => shards(model, names, folder)?,
        Some(single) => vec![single.to_owned()],
        None => Vec::new(),
    };
    let adapter = ADAPTER.iter().all(has);
    if weights.is_empty() && !adapter {
        return Err(no_safetensors(model, names));
    }
    let licences = names.iter().filter(|name| model::is_licence(name)).cloned();
    let optional = OPTIONAL.into_iter().filter(has).map(str::to_owned);
    let optional = optional.chain(licences);
    let adapter = adapter.then_some(ADAPTER).into_iter().flatten();
    let adapter = adapter.map(str::to_owned);
    // Weights last: their presence means that the snapshot is complete.
    Ok(optional.chain(adapter).chain(weights).collect())
}

/// The index, and the shards it lists.
fn shards(
    model: &HubModel,
    names: &BTreeSet<String>,
    folder: &Path,
) -> Result<Vec<String>, HubError> {
    let mut files = vec![INDEX.to_owned()];
    let Some(shards) = indexed_shards(&folder.join(INDEX)) else {
        return Ok(files);
    };
    if let Some(missing) = shards.iter().find(|name| !names.contains(*name)) {
        return Err(HubError::Failed {
            model: model.clone(),
            reason: format!("its {INDEX} lists {missing:?}, which the repository does not have"),
        });
    }
    files.extend(shards);
    Ok(files)
}

/// The files that an index lists; `None` if it is missing or malformed.
fn indexed_shards(index: &Path) -> Option<BTreeSet<String>> {
    let index: Value = serde_json::from_slice(&fs::read(index).ok()?).ok()?;
    let map = index["weight_map"].as_object()?;
    map.values()
        .map(|file| file.as_str().map(str::to_owned))
        .collect()
}

fn no_safetensors(model: &HubModel, names: &BTreeSet<String>) -> HubError {
    let extensions = [".bin", ".gguf", ".pth", ".pt", ".msgpack", ".h5"];
    let is_weights = |name: &&String| extensions.iter().any(|end| name.ends_with(end));
    let found = names.iter().find(is_weights);
    HubError::NoSafetensors {
        model: model.clone(),
        found: found.map_or(String::new(), |name| format!(" (it has {name})")),
    }
}

/// Whether a folder holds every mandatory file of a model or an adapter.
pub(super) fn is_complete(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).exists();
    let shards = || indexed_shards(&folder.join(INDEX));
    let weights = || has(WEIGHTS) || shards().is_some_and(|all| all.iter().all(|name| has(name)));
    let model = has(CONFIG) && has(TOKENIZER) && weights();
    model || (!has(CONFIG) && ADAPTER.into_iter().all(has))
}

#[cfg(test)]
mod tests {
    use settings::ModelSource;

    use super::*;

    fn model() -> HubModel {
        match "hf:org/name".parse() {
            Ok(ModelSource::Hub(model)) => model,
            other => panic!("{other:?}"),
        }
    }

    fn required_of(names: &[&str], folder: &Path) -> Result<Vec<String>, String> {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        required(&model(), &names, folder).map_err(|error| error.to_string())
    }

    #[test]
    fn only_files_of_the_model_are_required() {
        let folder = tempfile::tempdir().unwrap();
        let cases: [(&[&str], &[&str]); 5] = [
            (
                &[
                    "README.md",
                    CONFIG,
                    TOKENIZER,
                    WEIGHTS,
                    "pytorch_model.bin",
                    "onnx/model.onnx",
                    "LICENSE.txt",
                ],
                &[CONFIG, TOKENIZER, "LICENSE.txt", WEIGHTS],
            ),
            (&[CONFIG, INDEX, WEIGHTS], &[CONFIG, WEIGHTS]),
            (&[CONFIG, INDEX, "a.safetensors"], &[CONFIG, INDEX]),
            (
                &["adapter_config.json", "adapter_model.safetensors"],
                &ADAPTER,
            ),
            (
                &[ADAPTER[0], ADAPTER[1], "reward_config.json"],
                &["reward_config.json", ADAPTER[0], ADAPTER[1]],
            ),
        ];
        for (names, expected) in cases {
            assert_eq!(
                required_of(names, folder.path()).unwrap(),
                expected,
                "{names:?}"
            );
        }
        let bare = required_of(&[CONFIG, "pytorch_model.bin"], folder.path()).unwrap_err();
        assert!(
            bare.contains("no safetensors (it has pytorch_model.bin)"),
            "{bare}"
        );
    }

    #[test]
    fn indexed_shards_must_be_in_the_repository() {
        let folder = tempfile::tempdir().unwrap();
        let index =
            r#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}"#;
        fs::write(folder.path().join(INDEX), index).unwrap();
        let names = [INDEX, "a.safetensors", "b.safetensors", "c.safetensors"];
        assert_eq!(required_of(&names, folder.path()).unwrap(), &names[..3]);
        // Hence an index cannot name a path outside the cache.
        let foreign = required_of(&names[..2], folder.path()).unwrap_err();
        assert!(foreign.contains("b.safetensors"), "{foreign}");
    }

    #[test]
    fn a_folder_is_complete_with_its_last_file() {
        let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
        let cases: [&[(&str, &str)]; 3] = [
            &[(CONFIG, ""), (TOKENIZER, ""), (WEIGHTS, "")],
            &[
                (CONFIG, ""),
                (TOKENIZER, ""),
                (INDEX, index),
                ("a.safetensors", ""),
                ("b.safetensors", ""),
            ],
            &[(ADAPTER[0], ""), (ADAPTER[1], "")],
        ];
        for files in cases {
            let folder = tempfile::tempdir().unwrap();
            for (name, content) in files {
                assert!(!is_complete(folder.path()), "{files:?} before {name}");
                fs::write(folder.path().join(name), content).unwrap();
            }
            assert!(is_complete(folder.path()), "{files:?}");
        }
    }
}
