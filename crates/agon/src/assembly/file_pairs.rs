//! Pairs from files that are trained on, as tokens of the policy; the playground's are generated and written first.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hub::CancelToken;
use learner::PairFiles;
use messages::{Digest, Seed};
use model::ModelFolder;
use settings::{FilePairsSettings, PairsSettings, Settings};

use crate::assembly::{LoadedModel, playground};

/// The pairs of `[pairs]`, as tokens of the policy that starts from `model`; `None` if batches have none. Blocks while the
/// playground's are generated; ends early once `cancel` is cancelled.
pub(crate) fn file_pairs(
    settings: &Settings,
    model: &LoadedModel,
    cancel: &CancelToken,
) -> anyhow::Result<Option<Arc<PairFiles>>> {
    let pairs = &settings.pairs;
    if !pairs.is_used() {
        return Ok(None);
    }
    let read = match (pairs.playground_pairs, &settings.preference.fit.pairs) {
        (0, _) | (_, PairsSettings::Dataset(_)) => read_pair_files(settings, pairs, &model.folder)?,
        (count, PairsSettings::Playground(annotated)) => {
            let annotated = settings::PlaygroundPairs {
                count,
                ..*annotated
            };
            let path = playground::pairs_file(settings, annotated, model, cancel)?;
            tracing::info!(path = %path.display(), pairs = count, "the playground's pairs are in a file");
            let generated = FilePairsSettings {
                prompt_column: "prompt".into(),
                chosen_column: "chosen".into(),
                rejected_column: "rejected".into(),
                path,
                ..pairs.clone()
            };
            read_pair_files(settings, &generated, &model.folder)?
        }
    };
    Ok(Some(Arc::new(read)))
}

/// The pairs of files, as tokens of the policy in this folder.
pub(super) fn read_pair_files(
    settings: &Settings,
    pairs: &FilePairsSettings,
    folder: &ModelFolder,
) -> anyhow::Result<PairFiles> {
    let seed = Seed(settings.run.seed);
    let positions = folder.config.max_positions;
    let (margin, tokenizer) = (settings.learner.min_margin, &folder.tokenizer);
    Ok(PairFiles::load(pairs, margin, seed, positions, tokenizer)?)
}

/// Digest of everything that the reference's log-probabilities of these pairs depend on: the reference's files, `record`ed
/// as part of the run's inputs, the pairs, the precision and the build.
pub(crate) fn reference_key(
    settings: &Settings,
    record: &learner::InputRecord,
    pairs: &PairFiles,
) -> Digest {
    let recorded = [
        "weights of the reference model",
        "config.json of the reference model",
    ];
    let recorded = recorded.map(|name| record.get(name).unwrap_or_default().to_owned());
    let parts = format!(
        "{recorded:?} {} {:?} {:?} {}",
        pairs.digest(),
        settings.model.dtype,
        settings.learner.precision,
        env!("CARGO_PKG_VERSION"),
    );
    Digest::of(parts.as_bytes())
}

/// Name of the file in a run directory with the reference's log-probabilities of the pairs.
pub(crate) fn reference_logprobs_path(run: &Path) -> PathBuf {
    run.join("reference_logprobs.bin")
}
