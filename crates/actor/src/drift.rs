//! How far coarse numbers lead from the model that is trained.
//!
//! With every version of the weights one prompt's completions are scored again in f32. Where their
//! log-probabilities lie too far from those they were written with, the next version is kept in f32.

use messages::Completion;
use model::{Finished, LanguageModel, ModelError, Precision, Request, Sequence};

/// The numbers that completions are written with, and how far they may lead.
#[derive(Debug)]
pub(crate) struct Drift {
    /// In which weights are kept.
    precision: Precision,
    /// The largest mean distance of log-probabilities, in nats a token; 0: any.
    most: f64,
    watch: Watch,
}

#[derive(Debug)]
enum Watch {
    /// The first prompt of this version is yet to come.
    Ready,
    /// This one is being answered.
    On { key: u64, ids: Vec<u32> },
    /// This version has been looked at.
    Done,
}

impl Drift {
    pub(crate) fn new(precision: Precision, most: f64) -> Self {
        Self {
            precision,
            most,
            watch: Watch::Ready,
        }
    }

    /// In which numbers the next version is to be kept, which is now looked at anew.
    pub(crate) fn renew(&mut self) -> Precision {
        self.watch = Watch::Ready;
        self.precision
    }

    /// Remembers the first prompt of a version.
    pub(crate) fn admit(&mut self, request: &Request) {
        let is_watched = self.precision != Precision::F32 && self.most > 0.0;
        if is_watched && matches!(self.watch, Watch::Ready) {
            self.watch = Watch::On {
                key: request.key,
                ids: request.ids.clone(),
            };
        }
    }

    /// Forgets a prompt that was refused.
    pub(crate) fn refused(&mut self, key: u64) {
        if matches!(&self.watch, Watch::On { key: watched, .. } if *watched == key) {
            self.watch = Watch::Ready;
        }
    }

    /// The mean distance of its completions' log-probabilities from those of the policy in f32, in nats a
    /// token, if this is the prompt that is watched, and whether that is too far: then f32 is next.
    pub(crate) fn of(
        &mut self,
        policy: &LanguageModel,
        finished: &Finished,
    ) -> Result<Option<(f64, bool)>, ModelError> {
        let Watch::On { key, ids } = &self.watch else {
            return Ok(None);
        };
        if *key != finished.key {
            return Ok(None);
        }
        let drift = distance(policy, ids, &finished.completions)?;
        self.watch = Watch::Done;
        let is_too_far = drift.is_nan() || drift > self.most;
        if is_too_far {
            self.precision = Precision::F32;
        }
        Ok(Some((drift, is_too_far)))
    }
}

fn distance(
    policy: &LanguageModel,
    prompt: &[u32],
    completions: &[Completion],
) -> Result<f64, ModelError> {
    let sequences: Vec<_> = completions
        .iter()
        .map(|completion| Sequence {
            prompt,
            completion: &completion.ids,
        })
        .collect();
    let exact: Vec<f32> = policy.score(&sequences)?.logp.to_vec1()?;
    let written = completions.iter().flat_map(|completion| &completion.logp);
    let gaps = exact
        .iter()
        .zip(written)
        .map(|(a, b)| f64::from((a - b).abs()));
    Ok(gaps.sum::<f64>() / exact.len().max(1) as f64)
}
