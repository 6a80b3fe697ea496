//! Digest of what determines a judge's verdicts. The preference service names it, so that a client notices when another
//! judge answers at the same address.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use messages::Digest;
use preference::Composition;
use serde_json::json;

use crate::assembly::JudgeSource;

/// Number of samples of a file.
const SAMPLES: u64 = 64;
/// Bytes of a sample. A smaller file than all samples is read whole.
const SAMPLE_BYTES: u64 = 4096;

/// The digest of this judge.
///
/// # Errors
/// When a file of a model cannot be read.
pub(crate) fn judge_digest(judge: &JudgeSource) -> anyhow::Result<Digest> {
    let parts = match judge {
        JudgeSource::Plain(settings) => json!(settings),
        JudgeSource::Model(model) => json!(folder_digest(model.path())?),
        JudgeSource::Encoder {
            folder, template, ..
        } => json!([folder_digest(folder)?, template]),
        JudgeSource::Chat(chat) => json!(chat.version()),
        JudgeSource::Composed {
            members,
            composition,
        } => {
            let members = members.iter().map(|member| judge_digest(member));
            let members = members.collect::<anyhow::Result<Vec<_>>>()?;
            match composition {
                Composition::Ensemble(rule) if rule.weights.is_empty() => {
                    json!([members, rule.combine, rule.deviations])
                }
                Composition::Ensemble(rule) => {
                    json!([members, rule.combine, rule.deviations, rule.weights])
                }
                Composition::Route(rule) => json!(["route", members, rule.values]),
            }
        }
    };
    Ok(Digest::of(parts.to_string().as_bytes()))
}

/// Digest of the files in `folder`: their names, sizes and samples of their content. All of the weights would take
/// minutes to read.
fn folder_digest(folder: &Path) -> anyhow::Result<Digest> {
    let unreadable = || format!("failed to read {}", folder.display());
    let entries = fs::read_dir(folder).with_context(unreadable)?;
    let paths = entries.map(|entry| Ok(entry?.path()));
    let mut paths = paths
        .collect::<io::Result<Vec<PathBuf>>>()
        .with_context(unreadable)?;
    paths.sort();
    let mut bytes = Vec::new();
    for path in paths.iter().filter(|path| path.is_file()) {
        bytes.extend(path.file_name().unwrap_or_default().as_encoded_bytes());
        let file = sampled(path).with_context(|| format!("failed to read {}", path.display()))?;
        bytes.extend(file);
    }
    Ok(Digest::of(&bytes))
}

/// Size of the file and samples at equal distances, the first at its beginning.
fn sampled(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let distance = (size / SAMPLES).max(SAMPLE_BYTES);
    let mut bytes = size.to_le_bytes().to_vec();
    let mut offset = 0;
    while offset < size {
        let length = SAMPLE_BYTES.min(size - offset);
        let mut sample = vec![0; usize::try_from(length).unwrap_or_default()];
        file.read_exact_at(&mut sample, offset)?;
        bytes.extend(sample);
        offset += distance;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_other_weights_has_another_digest() {
        let directory = tempfile::tempdir().expect("a temporary folder");
        let weights: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let folder = |name: &str, files: &[(&str, &[u8])]| {
            let folder = directory.path().join(name);
            fs::create_dir_all(folder.join("a folder")).expect("a folder");
            for (file, content) in files {
                fs::write(folder.join(file), content).expect("a file");
            }
            folder_digest(&folder).expect("a readable folder")
        };
        let one = folder("one", &[("config.json", b"{}"), ("model", &weights)]);
        let same = folder("same", &[("config.json", b"{}"), ("model", &weights)]);
        assert_eq!(one, same, "wherever it is");
        let trained: Vec<u8> = weights.iter().map(|byte| byte + 1).collect();
        for (name, files) in [
            (
                "weights",
                [("config.json", &b"{}"[..]), ("model", &trained)],
            ),
            ("size", [("config.json", b"{}"), ("model", &weights[1..])]),
            ("config", [("config.json", b"[]"), ("model", &weights)]),
            ("name", [("other.json", b"{}"), ("model", &weights)]),
        ] {
            assert_ne!(folder(name, &files), one, "{name}");
        }
        let missing = folder_digest(&directory.path().join("none")).expect_err("there is none");
        assert!(missing.to_string().contains("none"), "{missing}");
    }
}
