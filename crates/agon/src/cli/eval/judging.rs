//! Judgement of the pairs of an evaluation: by the configured judge and by the evaluation judges.

use std::sync::Arc;

use futures_util::future::join_all;
use hub::CancelToken;
use messages::{EvaluationVerdict, JudgeVersion, Label, LabelledPair, Pair};
use model::ModelFolder;
use preference::{ComparisonRequest, Orders, Preference, Verdict};
use settings::Settings;

use crate::assembly::{self, CompletionOrigin, JudgeSource};

/// A pair and what the judges say.
pub(super) struct JudgedPair {
    pair: Arc<Pair>,
    /// Preference of the configured judge.
    pub(super) preference: Preference,
    verdicts: Vec<EvaluationVerdict>,
}

/// Judges every pair in both orders; tokens are those of the model in `folder`.
///
/// # Errors
/// When a judge cannot be loaded, or the configured one fails.
pub(super) fn judged(
    settings: &Settings,
    folder: &ModelFolder,
    pairs: Vec<Pair>,
) -> anyhow::Result<Vec<JudgedPair>> {
    let pairs: Vec<_> = pairs.into_iter().map(Arc::new).collect();
    let requests: Vec<_> = pairs
        .iter()
        .map(|pair| ComparisonRequest::new(Arc::clone(pair), 0, 1))
        .collect();
    crate::runtime()?.block_on(async {
        let (origin, never) = (CompletionOrigin::Model(folder), CancelToken::never());
        let judge = JudgeSource::open(settings, origin, &never)?;
        let pool = assembly::pool(settings, &Arc::new(judge))?;
        let others = assembly::evaluation_judges(settings, origin, &never)?;
        let verdicts = requests.iter().map(|request| {
            let verdicts = others.iter().map(|judge| judge.verdict(request));
            join_all(verdicts)
        });
        let (preferences, verdicts) = tokio::join!(
            pool.compare_all(&requests, Orders::Both),
            join_all(verdicts)
        );
        let judged = pairs.into_iter().zip(preferences).zip(verdicts);
        let judged = judged.map(|((pair, preference), verdicts)| {
            Ok(JudgedPair {
                pair,
                preference: preference?,
                verdicts: verdicts.into_iter().flatten().collect(),
            })
        });
        judged.collect()
    })
}

impl JudgedPair {
    /// The pair with its label; `None` if the judge abstained.
    pub(super) fn labelled(&self) -> Option<LabelledPair> {
        let Verdict::Preference(p) = self.preference.verdict else {
            return None;
        };
        Some(LabelledPair {
            pair: Pair::clone(&self.pair),
            labels: vec![Label {
                first: 0,
                second: 1,
                p,
                judged: Some(p),
            }],
            judge: String::new(),
            judge_version: JudgeVersion::default(),
            scores: None,
            verdicts: self.verdicts.clone(),
        })
    }

    /// Reason why the judge abstained, if it did.
    pub(super) fn reason(&self) -> Option<&str> {
        match &self.preference.verdict {
            Verdict::Preference(_) => None,
            Verdict::Abstained { reason } => Some(reason),
        }
    }
}
