//! Which of the two kinds of reward models lies in a folder.

use std::path::Path;

use crate::{
    AdapterFolder, ModelError, SUPPORTED_ENCODERS, SUPPORTED_REWARD_ARCHITECTURES,
    config::{Task, read_json},
    reward::config::from_disk,
};

/// How a reward model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RewardArchitecture {
    /// From left to right: a [`crate::RewardModel`].
    Decoder,
    /// In both directions: an [`crate::Encoder`].
    Encoder,
}

impl RewardArchitecture {
    /// That of the model in the folder `path`, by its `config.json`; an adapter of a classifier is one of a
    /// decoder.
    ///
    /// # Errors
    /// When the file cannot be read or names neither.
    pub fn of(path: &Path) -> Result<Self, ModelError> {
        if AdapterFolder::is_at(path) {
            return AdapterFolder::open_for(Task::Reward, path).map(|_| Self::Decoder);
        }
        let path = path.join("config.json");
        let raw = from_disk(read_json(&path)?);
        let named = raw["architectures"][0]
            .as_str()
            .unwrap_or("(none is named)");
        if SUPPORTED_REWARD_ARCHITECTURES.contains(&named) {
            Ok(Self::Decoder)
        } else if SUPPORTED_ENCODERS.contains(&named) {
            Ok(Self::Encoder)
        } else {
            Err(ModelError::Architecture {
                found: named.to_owned(),
                path,
                supported: [&SUPPORTED_REWARD_ARCHITECTURES[..], &SUPPORTED_ENCODERS].concat(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_kind_is_told_by_the_architecture() {
        let folder = tempfile::tempdir().unwrap();
        let of = |architectures: serde_json::Value| {
            let raw = json!({"architectures": architectures, "model_type": "llama"}).to_string();
            std::fs::write(folder.path().join("config.json"), raw).unwrap();
            RewardArchitecture::of(folder.path()).map_err(|error| error.to_string())
        };
        for name in SUPPORTED_REWARD_ARCHITECTURES {
            assert_eq!(of(json!([name])), Ok(RewardArchitecture::Decoder));
        }
        assert_eq!(
            of(json!(["AgonQwen3RewardModel"])),
            Ok(RewardArchitecture::Decoder)
        );
        for name in SUPPORTED_ENCODERS {
            assert_eq!(of(json!([name])), Ok(RewardArchitecture::Encoder));
        }
        for (other, told) in [
            (json!(["LlamaForCausalLM"]), "LlamaForCausalLM"),
            (json!(null), "(none is named)"),
        ] {
            let refused = of(other).unwrap_err();
            for part in [
                told,
                "config.json",
                "Qwen2ForSequence",
                "ModernBertForSequence",
            ] {
                assert!(refused.contains(part), "{part} is not in {refused}");
            }
        }
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        let missing = RewardArchitecture::of(folder.path()).unwrap_err();
        assert!(missing.to_string().contains("failed to read"), "{missing}");
    }
}
