//! Detection of the kind of reward model in a folder.

use std::path::Path;

use crate::{
    config::{ModelTask, SUPPORTED_REWARD_ARCHITECTURES, read_json},
    encoder::SUPPORTED_ENCODERS,
    error::ModelError,
    lora::AdapterFolder,
    reward::config::from_disk,
};

/// Kind of reward model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RewardArchitecture {
    /// A causal decoder: [`crate::RewardModel`].
    Decoder,
    /// A bidirectional encoder: [`crate::Encoder`].
    Encoder,
}

impl RewardArchitecture {
    /// Kind of the model in the folder `path`, by its `config.json`. An adapter of a classifier is a decoder.
    ///
    /// # Errors
    /// When the file cannot be read or the architecture is neither.
    pub fn of(path: &Path) -> Result<Self, ModelError> {
        if AdapterFolder::is_at(path) {
            return AdapterFolder::open_for(ModelTask::Reward, path).map(|_| Self::Decoder);
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
    fn the_kind_follows_from_the_architecture() {
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
        for (other, named) in [
            (json!(["LlamaForCausalLM"]), "LlamaForCausalLM"),
            (json!(null), "(none is named)"),
        ] {
            let refused = of(other).unwrap_err();
            for part in [
                named,
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
