//! Files of a repository that make up a model.
//!
//! The names come from the Hub and from the index of a sharded model. Only plain file names are used.

use std::{collections::BTreeSet, path::Path};

use messages::FileName;
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

/// Largest file of a repository: the Hub takes none of more than 500 GB.
const MAX_WEIGHTS_BYTES: u64 = 1 << 39;
/// Largest file other than weights.
const MAX_TEXT_BYTES: u64 = 1 << 27;

/// Largest size that a file of this name may have, in bytes.
pub(super) fn max_bytes(name: &FileName) -> u64 {
    match name.as_str().ends_with(".safetensors") {
        true => MAX_WEIGHTS_BYTES,
        false => MAX_TEXT_BYTES,
    }
}

/// The files directly in a repository that lists these paths; those in its folders are no part of a model.
///
/// # Errors
/// When a path leads out of the repository, such as one with `..`.
pub(super) fn in_root(paths: &[String]) -> Result<BTreeSet<FileName>, String> {
    let leads_out = |path: &&String| path.split('/').any(|part| ["", ".", ".."].contains(&part));
    match paths.iter().find(leads_out) {
        Some(path) => Err(format!(
            "it lists {path:?}, which is no path in a repository"
        )),
        None => Ok(paths.iter().flat_map(FileName::new).collect()),
    }
}

/// The files to download from a repository with files of these names: configuration and tokenizer, an adapter, and
/// the weights. The shards are known once their index is in `folder`.
pub(super) fn required(
    model: &HubModel,
    names: &BTreeSet<FileName>,
    folder: &Path,
) -> Result<Vec<FileName>, HubError> {
    let named = |name: &str| names.iter().find(|known| known.as_str() == name).cloned();
    let weights = match (named(WEIGHTS), named(INDEX)) {
        (Some(single), _) => vec![single],
        (None, Some(index)) => shards(model, names, index, folder)?,
        (None, None) => Vec::new(),
    };
    let adapter: Vec<FileName> = ADAPTER.into_iter().filter_map(named).collect();
    let has_adapter = adapter.len() == ADAPTER.len();
    if weights.is_empty() && !has_adapter {
        return Err(no_safetensors(model, names));
    }
    let licences = names.iter().filter(|name| model::is_licence(name.as_str()));
    let optional = OPTIONAL.into_iter().filter_map(named);
    let optional = optional.chain(licences.cloned());
    let adapter = has_adapter.then_some(adapter).into_iter().flatten();
    // Weights last: their presence means that the snapshot is complete.
    Ok(optional.chain(adapter).chain(weights).collect())
}

/// The index, and the shards it lists.
fn shards(
    model: &HubModel,
    names: &BTreeSet<FileName>,
    index: FileName,
    folder: &Path,
) -> Result<Vec<FileName>, HubError> {
    let failed = |reason: String| HubError::Failed {
        model: model.clone(),
        reason,
    };
    let shards = match folder.join(&index).exists() {
        true => model::indexed_files(folder).map_err(|error| failed(error.to_string()))?,
        false => return Ok(vec![index]),
    };
    if let Some(missing) = shards.iter().find(|name| !names.contains(*name)) {
        return Err(failed(format!(
            "its {INDEX} lists {:?}, which the repository does not have",
            missing.as_str()
        )));
    }
    Ok([index].into_iter().chain(shards).collect())
}

fn no_safetensors(model: &HubModel, names: &BTreeSet<FileName>) -> HubError {
    let extensions = [".bin", ".gguf", ".pth", ".pt", ".msgpack", ".h5"];
    let is_weights = |name: &&FileName| extensions.iter().any(|end| name.as_str().ends_with(end));
    let found = names.iter().find(is_weights);
    HubError::NoSafetensors {
        model: model.clone(),
        found: found.map_or(String::new(), |name| format!(" (it has {name})")),
    }
}

/// Whether a folder holds every mandatory file of a model or an adapter.
pub(super) fn is_complete(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).exists();
    let shards = || {
        has(INDEX)
            .then(|| model::indexed_files(folder).ok())
            .flatten()
    };
    let has_shards = || shards().is_some_and(|all| all.iter().all(|name| has(name.as_str())));
    let model = has(CONFIG) && has(TOKENIZER) && (has(WEIGHTS) || has_shards());
    model || (!has(CONFIG) && ADAPTER.into_iter().all(has))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use settings::ModelSource;

    use super::*;

    fn model() -> HubModel {
        match "hf:org/name".parse() {
            Ok(ModelSource::Hub(model)) => model,
            other => panic!("{other:?}"),
        }
    }

    fn required_of(names: &[&str], folder: &Path) -> Result<Vec<String>, String> {
        let paths: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let found = required(&model(), &in_root(&paths)?, folder);
        let found = found.map_err(|error| error.to_string())?;
        Ok(found.into_iter().map(String::from).collect())
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
        let foreign = required_of(&names[..2], folder.path()).unwrap_err();
        assert!(foreign.contains("b.safetensors"), "{foreign}");
        for path in ["../b.safetensors", "/dev/zero", "x/b.safetensors"] {
            let index = format!(r#"{{"weight_map": {{"x": {path:?}}}}}"#);
            fs::write(folder.path().join(INDEX), index).unwrap();
            let refused = required_of(&names, folder.path()).unwrap_err();
            assert!(
                refused.contains(path) && refused.contains("not a plain file name"),
                "{refused}"
            );
        }
    }

    #[test]
    fn only_paths_inside_a_repository_are_taken() {
        let listed = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
            in_root(&paths)
        };
        let root = listed(&["onnx/model.onnx", "LICENSE", ".gitattributes", "a\\..\\b"]).unwrap();
        assert_eq!(
            root.into_iter().map(String::from).collect::<Vec<_>>(),
            [".gitattributes", "LICENSE"]
        );
        for path in [
            "LICENSE/../../../x",
            "../x",
            "/etc/passwd",
            "a//b",
            "",
            "..",
        ] {
            let refused = listed(&[CONFIG, path]).unwrap_err();
            assert!(refused.contains("no path in a repository"), "{refused}");
        }
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
